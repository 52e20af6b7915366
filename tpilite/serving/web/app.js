// The page: conversations on the left, the one that is open in the middle, the cluster on the right.

import * as api from "./api.js";
import { Cluster, number } from "./cluster.js";
import { element, icon, render } from "./markdown.js";
import * as store from "./store.js";

const byId = (id) => document.getElementById(id);
const SLIDERS = [
  ["temperature", "Temperature", "Higher is more surprising, 0 always takes the likeliest.", 0, 2, 0.05],
  ["top_p", "Top p", "Chooses among the likeliest that reach this together.", 0.05, 1, 0.01],
  ["top_k", "Top k", "Chooses among so many; 0 for all.", 0, 200, 1],
  ["min_p", "Min p", "Leaves out what is less likely than this share of the best.", 0, 0.5, 0.01],
  ["repetition_penalty", "Repetition penalty", "Above 1, words that were there come back less often.", 1, 2, 0.01],
];
const STARTERS = {
  chat: ["Explain the tides to a child.", "What can I cook from lentils, carrots and rice?", "Help me write a kind letter to a neighbour."],
  text: ["Once upon a time", "One day, a little fox", "The old house by the sea"],
};
const TEXT_TOKENS = 256; // in one go, where the settings do not say
const RENDER_MS = 60;

let conversations = store.loadConversations();
let settings = store.loadSettings();
let defaults = {};
let kind = null; // "chat" or "text", once the model is known
let model = "";
let context = 0;
let current = null;
let running = null; // {controller, conversation, message} while an answer is made

// ---- the list

function list() {
  const items = conversations.filter((c) => c.messages.length).map((conversation) => {
    const title = store.titleOf(conversation);
    const open = element("button", { type: "button", class: "open" }, title);
    const remove = element("button", { type: "button", class: "icon", "aria-label": `Delete “${title}”` }, icon("trash"));
    open.addEventListener("click", () => show(conversation));
    remove.addEventListener("click", () => askToDelete(conversation));
    const item = element("li", {}, open, remove);
    if (conversation === current) {
      item.className = "current";
      open.setAttribute("aria-current", "page");
    }
    return item;
  });
  byId("conversations").replaceChildren(...items);
}

function keep() {
  if (!store.saveConversations(conversations)) {
    notice("This browser has no room left to keep conversations: delete some.");
  }
}

function begin() {
  show(store.newConversation(kind ?? "chat"));
  byId("prompt").focus();
}

function show(conversation) {
  current = conversation;
  closeDrawers();
  byId("log").className = current.kind === "text" ? "text" : "";
  byId("log").replaceChildren(...current.messages.map((message) => messageNode(message)));
  refresh();
  byId("scroll").scrollTop = byId("scroll").scrollHeight;
}

function askToDelete(conversation) {
  byId("delete-name").textContent = store.titleOf(conversation);
  byId("delete-yes").onclick = () => {
    if (running?.conversation === conversation) running.controller.abort();
    conversations = conversations.filter((other) => other !== conversation);
    keep();
    byId("delete-dialog").close();
    if (conversation === current) begin();
    else list();
  };
  byId("delete-dialog").showModal();
}

// ---- messages

function messageNode(message) {
  const body = element("div", { class: message.role === "assistant" && current.kind === "chat" ? "body prose" : "body" });
  const node = element("article", { class: `message ${message.role}`, "aria-label": message.role === "user" ? "You" : "The model" }, body);
  if (message.role === "assistant") {
    const copy = element("button", { type: "button", class: "icon", "aria-label": "Copy", title: "Copy" }, icon("copy"));
    const again = element("button", { type: "button", class: "icon", "aria-label": "Try again", title: "Try again" }, icon("again"));
    copy.addEventListener("click", () => copied(copy, current.kind === "text" ? wholeText(current) : message.content));
    again.addEventListener("click", () => retry(message));
    node.append(element("div", { class: "meta" }, copy, again, element("span", { class: "said" })));
  }
  fill(node, message);
  return node;
}

function fill(node, message) {
  const body = node.querySelector(".body");
  const isRunning = running?.message === message;
  if (message.role === "assistant" && current.kind === "chat") body.replaceChildren(render(message.content));
  else body.replaceChildren(message.content);
  if (message.thought) {
    if (!node.querySelector(".thought")) {
      body.before(element("details", { class: "thought" }, element("summary", {}), element("div", {})));
    }
    node.querySelector(".thought summary").textContent = isRunning && !message.content ? "Thinking" : "Thought";
    node.querySelector(".thought div").textContent = message.thought;
  }
  if (isRunning && !message.content) {
    body.replaceChildren(element("span", { class: "waiting-dots", role: "img", "aria-label": "Thinking" }, element("i"), element("i"), element("i")));
  }
  const meta = node.querySelector(".meta");
  if (!meta) return;
  meta.hidden = isRunning;
  meta.querySelector(".said").textContent = message.said ?? "";
  node.querySelector(".failure")?.remove();
  if (message.failure) meta.before(element("p", { class: "failure", role: "alert" }, message.failure));
}

async function copied(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without HTTPS there is no clipboard; the older way needs a field to copy from.
    const field = element("textarea", { class: "hidden", "aria-hidden": "true" });
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    button.focus();
  }
  button.querySelector("use").setAttribute("href", "#i-check");
  setTimeout(() => button.querySelector("use").setAttribute("href", "#i-copy"), 1200);
}

function wholeText(conversation) {
  return conversation.messages.map((message) => message.content).join("");
}

// ---- asking

async function send(text) {
  if (running || !kind) return;
  const conversation = current;
  const last = conversation.messages.at(-1);
  if (conversation.kind === "text") {
    if (!text && !last) return;
    // Two words do not grow together where one text follows the other.
    if (text && last && !/\s$/.test(last.content) && !/^[\s.,;:!?'’)]/.test(text)) text = ` ${text}`;
  } else if (!text.trim()) {
    return;
  }
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  if (text) {
    const message = { role: "user", content: text };
    conversation.messages.push(message);
    byId("log").append(messageNode(message));
  }
  await answer(conversation);
}

async function retry(message) {
  if (running) return;
  const at = current.messages.indexOf(message);
  current.messages.splice(at);
  show(current);
  await answer(current);
}

async function answer(conversation) {
  const message = { role: "assistant", content: "" };
  const controller = new AbortController();
  running = { controller, conversation, message };
  const asked = requestOf(conversation);
  conversation.messages.push(message);
  const node = messageNode(message);
  byId("log").append(node);
  byId("log").setAttribute("aria-busy", "true");
  refresh();
  follow(true);
  let painted = 0;
  let first = 0;
  const paint = () => {
    painted = performance.now();
    if (conversation === current) {
      const atEnd = isAtEnd();
      fill(node.isConnected ? node : byId("log").lastElementChild, message);
      follow(atEnd);
    }
  };
  try {
    let usage = null;
    const path = conversation.kind === "text" ? "v1/completions" : "v1/chat/completions";
    for await (const chunk of answered(path, asked, controller.signal)) {
      notice(chunk.paused ? "A machine is missing. The answer goes on when it is back." : "");
      if (chunk.text || chunk.thought) {
        first ||= performance.now();
        message.content += chunk.text ?? "";
        if (chunk.thought) message.thought = (message.thought ?? "") + chunk.thought;
        if (performance.now() - painted > RENDER_MS) paint();
      }
      usage = chunk.usage ?? usage;
      if (chunk.reason === "length") message.cut = true;
    }
    const seconds = (performance.now() - first) / 1000;
    const n = usage?.completion_tokens ?? 0;
    message.total = usage?.total_tokens;
    const speed = n > 1 && seconds > 0 ? ` · ${number((n - 1) / seconds)} tokens/s` : "";
    message.said = `${n} token${n === 1 ? "" : "s"}${speed}${message.cut ? " · ended at its longest" : ""}`;
  } catch (error) {
    if (error.name === "AbortError") message.said = "stopped";
    else if (error.status === 401) askForKey(true);
    else message.failure = failure(error);
  } finally {
    running = null;
    notice("");
    if (!message.content && !message.thought && !message.failure && message.said === "stopped") {
      conversation.messages.pop();
      if (conversation === current) byId("log").lastElementChild?.remove();
    } else {
      paint();
    }
    byId("log").removeAttribute("aria-busy");
    keep();
    refresh();
  }
}

async function* answered(path, body, signal) {
  for (;;) {
    try {
      yield* api.stream(path, body, signal);
      return;
    } catch (error) {
      // What a model wrote may be read back as more tokens than it was written in, beyond what `room` counts.
      const fewer = Math.floor((body.max_tokens ?? 0) / 2);
      if (!body.prompt || error.code !== "context_length_exceeded" || fewer < 1) throw error;
      body = { ...body, max_tokens: fewer };
    }
  }
}

function requestOf(conversation) {
  const body = { model };
  for (const [name] of SLIDERS) if (settings[name] != null) body[name] = settings[name];
  if (settings.seed != null) body.seed = settings.seed;
  if (settings.stop) body.stop = settings.stop;
  if (conversation.kind === "text") {
    const prompt = wholeText(conversation);
    const wanted = settings.max_tokens ?? defaults.max_tokens ?? TEXT_TOKENS;
    return { ...body, prompt, max_tokens: Math.max(1, Math.min(wanted, room(conversation))) };
  }
  if (settings.max_tokens != null) body.max_tokens = settings.max_tokens;
  const said = [];
  for (const { role, content, thought } of conversation.messages) {
    // After an answer that failed two messages of the same side follow each other, which most formats refuse.
    if (said.at(-1)?.role === role) said.at(-1).content += `\n\n${content}`;
    else if (content) said.push(thought ? { role, content, reasoning_content: thought } : { role, content });
  }
  const system = settings.system?.trim();
  return { ...body, messages: system ? [{ role: "system", content: system }, ...said] : said };
}

// So many tokens are left in the model's context: what was not counted by the model is at most one for a byte.
function room(conversation) {
  let used = 1;
  for (const message of conversation.messages) {
    used = message.total ?? used + new TextEncoder().encode(message.content).length;
  }
  return context - used;
}

function failure(error) {
  if (error.code === "context_length_exceeded") return "This conversation has become longer than the model can hold. Begin a new one.";
  if (error.status === 429) return "Too many are asking at once. Try again in a moment.";
  if (error instanceof TypeError) return "The server does not answer. Try again when it is back.";
  return error.message;
}

// ---- the frame

function refresh() {
  list();
  const title = store.titleOf(current);
  byId("title").textContent = title;
  document.title = current.messages.length ? `${title} · tpilite` : "tpilite";
  byId("welcome").hidden = current.messages.length > 0;
  const button = byId("send");
  button.setAttribute("aria-label", running ? "Stop" : current.kind === "text" ? "Continue" : "Send");
  button.querySelector("use").setAttribute("href", running ? "#i-stop" : "#i-send");
  const canContinue = current.kind === "text" && current.messages.length > 0;
  button.disabled = !running && (!kind || (!byId("prompt").value.trim() && !canContinue));
  const placeholder = canContinue ? "Add to the text, or let the model go on" : current.kind === "text" ? "Begin a text" : "Write a message";
  byId("prompt").placeholder = placeholder;
}

function isAtEnd() {
  const scroll = byId("scroll");
  return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
}

function follow(should) {
  if (should) byId("scroll").scrollTop = byId("scroll").scrollHeight;
}

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

function grow() {
  const field = byId("prompt");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  refresh();
}

function welcome() {
  const hour = new Date().getHours();
  byId("greeting").textContent = hour < 5 || hour >= 18 ? "Good evening." : hour < 12 ? "Good morning." : "Good afternoon.";
  byId("about").textContent = kind === "text"
    ? `${model} continues texts: begin one, and it goes on. Everything stays on your own machines.`
    : `${model} runs on your own machines. Nothing that you write leaves them.`;
  byId("starters").replaceChildren(...STARTERS[kind].map((text) => {
    const button = element("button", { type: "button" }, text);
    button.addEventListener("click", () => send(text));
    return element("li", {}, button);
  }));
  byId("model").textContent = model;
  byId("system-setting").hidden = kind === "text";
}

// ---- drawers and dialogs

function closeDrawers() {
  byId("sidebar").classList.remove("shown");
  if (matchMedia("(max-width: 70rem)").matches) showCluster(false);
  byId("shade").hidden = byId("cluster").hidden;
}

function showCluster(shown) {
  byId("cluster").hidden = !shown;
  byId("app").classList.toggle("with-cluster", shown);
  byId("open-cluster").setAttribute("aria-expanded", String(shown));
  byId("shade").hidden = !shown;
  byId("shade").className = "for-cluster";
}

function askForKey(isWrong) {
  byId("key-error").hidden = !isWrong || !api.key.get();
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

function sliders() {
  byId("sliders").replaceChildren(...SLIDERS.map(([name, label, help, low, high, step]) => {
    const value = settings[name] ?? defaults[name] ?? low;
    const input = element("input", { type: "range", id: name, min: low, max: high, step, "aria-describedby": `${name}-help` });
    const output = element("output", { for: name });
    input.value = String(value);
    output.textContent = String(value);
    input.addEventListener("input", () => {
      settings[name] = Number(input.value);
      output.textContent = input.value;
      store.saveSettings(settings);
    });
    return element("div", { class: "setting" }, element("label", { for: name }, label, output), input, element("small", { id: `${name}-help` }, help));
  }));
  for (const name of ["max_tokens", "seed", "stop", "system"]) byId(name).value = settings[name] ?? "";
  byId("forget-key").hidden = !api.key.get();
}

for (const name of ["max_tokens", "seed"]) {
  byId(name).addEventListener("input", ({ target }) => {
    const value = target.valueAsNumber;
    if (Number.isSafeInteger(value) && value >= Number(target.min)) settings[name] = value;
    else delete settings[name];
    store.saveSettings(settings);
  });
}
for (const name of ["stop", "system"]) {
  byId(name).addEventListener("input", ({ target }) => {
    settings[name] = target.value;
    store.saveSettings(settings);
  });
}
byId("reset").addEventListener("click", () => {
  settings = {};
  store.saveSettings(settings);
  sliders();
});
byId("forget-key").addEventListener("click", () => {
  api.key.forget();
  byId("settings").close();
  cluster.look();
});
byId("open-settings").addEventListener("click", () => {
  sliders();
  byId("settings").showModal();
});
byId("open-cluster").addEventListener("click", () => showCluster(byId("cluster").hidden));
byId("open-sidebar").addEventListener("click", () => {
  byId("sidebar").classList.add("shown");
  byId("shade").className = "";
  byId("shade").hidden = false;
  byId("new").focus();
});
byId("shade").addEventListener("click", closeDrawers);
byId("new").addEventListener("click", begin);
for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => {
    const dialog = button.closest("dialog");
    if (dialog) dialog.close();
    else if (button.closest("#cluster")) {
      showCluster(false);
      byId("open-cluster").focus();
    } else closeDrawers();
  });
}
byId("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.key.set(byId("key").value.trim());
  byId("key").value = "";
  byId("key-dialog").close();
  cluster.look();
});

// ---- the composer

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) {
    running.controller.abort();
    return;
  }
  const text = byId("prompt").value;
  byId("prompt").value = "";
  grow();
  send(current.kind === "text" ? text : text.trim());
});
byId("prompt").addEventListener("input", grow);
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running && !byId("send").disabled) byId("composer").requestSubmit();
  }
});
byId("log").addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (button) copied(button, button.closest(".code").querySelector("code").textContent);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (running) running.controller.abort();
  else if (!byId("shade").hidden) closeDrawers();
});

const cluster = new Cluster(
  (state) => {
    const isNew = kind === null;
    defaults = state.defaults;
    model = state.model.id;
    context = state.model.context;
    kind = state.model.chat ? "chat" : "text";
    if (isNew) {
      if (!current.messages.length) current.kind = kind;
      welcome();
      show(current);
      byId("prompt").focus();
    }
  },
  () => askForKey(true),
);
current = store.newConversation("chat");
show(current);
cluster.look();
