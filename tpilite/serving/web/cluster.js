// The panel of the cluster: what the machines do and where a token's time goes, asked for every few seconds.

import * as api from "./api.js";
import { element } from "./markdown.js";

const PERIOD_MS = 2000;
const SAMPLES = 45;
const PARTS = [
  ["compute", "compute_seconds", "Computing"],
  ["load", "load_wait_seconds", "Waiting for the disk"],
  ["network", "network_wait_seconds", "Waiting for the network"],
  ["rest", "rest_seconds", "The rest"],
];
const STATUS = { ok: "ready", waiting: "waiting", failed: "failed", stopping: "waiting" };
const STATES = { ready: "Ready", preparing: "Preparing", missing: "Missing", waiting: "Waiting" };

const byId = (id) => document.getElementById(id);

export class Cluster {
  // `onState` hears of every state; `onDenied` when the key is missing or wrong.
  constructor(onState, onDenied) {
    this.onState = onState;
    this.onDenied = onDenied;
    this.samples = [];
    this.last = null;
    this.timer = 0;
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.look();
    });
  }

  async look() {
    clearTimeout(this.timer);
    try {
      this.show(await api.cluster());
    } catch (error) {
      if (error.status === 401) {
        this.onDenied();
        return;
      }
      this.status("failed", "Not reachable");
      this.say("The server does not answer. This page goes on when it is back.");
    }
    this.timer = setTimeout(() => this.look(), document.hidden ? 10 * PERIOD_MS : PERIOD_MS);
  }

  show(state) {
    const ranks = state.ranks ?? [];
    const ready = ranks.filter((rank) => rank.state === "ready").length;
    const machines = `${ready === ranks.length ? ranks.length : `${ready} of ${ranks.length}`} machine${ranks.length === 1 ? "" : "s"}`;
    const rate = state.figures.tokens_per_second;
    const words = { ok: machines, waiting: "Waiting for a machine", failed: "Not working", stopping: "Shutting down" };
    const busy = rate ? ` · ${number(rate)} tokens/s` : "";
    const isWhole = state.status !== "ok" || ready === ranks.length;
    this.status(isWhole ? STATUS[state.status] ?? "waiting" : "waiting", (words[state.status] ?? state.status) + (state.status === "ok" ? busy : ""));
    this.say(state.reason);
    byId("rate").textContent = rate ? number(rate) : "–";
    byId("rate").parentElement.classList.toggle("idle", !rate);
    this.sample(state.figures);
    byId("ranks").replaceChildren(...ranks.map(rankItem));
    byId("totals").replaceChildren(
      ...pairs([
        ["In line", state.figures.requests_waiting],
        ["Tokens read", whole(state.figures.prompt_tokens)],
        ["Tokens written", whole(state.figures.new_tokens)],
        ["Running for", duration(state.figures.uptime_seconds)],
      ]),
    );
    this.onState(state);
  }

  // Milliseconds per token between this look and the one before.
  sample(figures) {
    const last = this.last;
    this.last = figures;
    const tokens = last ? figures.new_tokens - last.new_tokens : 0;
    if (last && tokens > 0) {
      this.samples.push(PARTS.map(([, name]) => (1000 * Math.max(0, figures[name] - last[name])) / tokens));
      this.samples = this.samples.slice(-SAMPLES);
    }
    this.draw();
  }

  draw() {
    const space = "http://www.w3.org/2000/svg";
    const chart = byId("chart");
    const top = Math.max(1e-6, ...this.samples.map((parts) => parts.reduce((a, b) => a + b, 0)));
    chart.setAttribute("viewBox", `0 0 ${SAMPLES} 100`);
    chart.replaceChildren(
      ...this.samples.flatMap((parts, i) => {
        let y = 100;
        return parts.map((ms, part) => {
          const height = (94 * ms) / top;
          const bar = document.createElementNS(space, "rect");
          y -= height;
          bar.setAttribute("class", PARTS[part][0]);
          bar.setAttribute("x", String(SAMPLES - this.samples.length + i + 0.1));
          bar.setAttribute("width", "0.8");
          bar.setAttribute("y", String(y));
          bar.setAttribute("height", String(height));
          return bar;
        });
      }),
    );
    const now = this.samples.at(-1);
    byId("chart-empty").hidden = Boolean(now);
    chart.parentElement.classList.toggle("empty", !now);
    byId("legend").replaceChildren(
      ...PARTS.map(([part, , name], i) =>
        element("div", { class: part }, element("i"), element("dt", {}, name), element("dd", {}, now ? `${number(now[i])} ms` : "–")),
      ),
    );
  }

  status(state, text) {
    byId("status-dot").className = `dot ${state}`;
    byId("status-text").textContent = text;
  }

  say(reason) {
    byId("health").hidden = !reason;
    byId("health").textContent = reason ?? "";
  }
}

function rankItem(rank) {
  const facts = [];
  if (rank.memory_bytes != null) facts.push(`${bytes(rank.memory_bytes)} in use`);
  if (rank.resident_share != null) facts.push(`${Math.round(100 * rank.resident_share)} % in memory`);
  if (rank.tokens_per_second) facts.push(`${number(rank.tokens_per_second)} tokens/s`);
  const item = element(
    "li",
    {},
    element(
      "div",
      { class: "rank-name" },
      element("span", { class: `dot ${rank.state}` }),
      element("span", {}, rank.name || `Machine ${rank.rank}`),
      element("span", { class: "state" }, STATES[rank.state] ?? rank.state),
    ),
    element("p", { class: "rank-facts" }, facts.join(" · ")),
  );
  if (rank.resident_share != null) {
    const fill = element("i");
    fill.style.width = `${100 * rank.resident_share}%`;
    item.append(element("div", { class: "share", "aria-hidden": "true" }, fill));
  }
  return item;
}

function pairs(rows) {
  return rows.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(value))));
}

export function number(value) {
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

function whole(value) {
  return Math.round(value).toLocaleString("en");
}

function bytes(value) {
  return value >= 1e9 ? `${(value / 1e9).toFixed(1)} GB` : `${whole(value / 1e6)} MB`;
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}
