// What this browser keeps: conversations and settings, in localStorage and nowhere else.

const CONVERSATIONS = "tpilite.conversations";
const SETTINGS = "tpilite.settings";

function read(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? fallback;
  } catch {
    return fallback;
  }
}

function isConversation(value) {
  return typeof value?.id === "string" && Array.isArray(value.messages);
}

export function loadConversations() {
  const found = read(CONVERSATIONS, []);
  return Array.isArray(found) ? found.filter(isConversation) : [];
}

// False when the browser has no room: the page goes on without keeping.
export function saveConversations(conversations) {
  try {
    localStorage.setItem(CONVERSATIONS, JSON.stringify(conversations.filter((c) => c.messages.length)));
    return true;
  } catch {
    return false;
  }
}

export function loadSettings() {
  const found = read(SETTINGS, {});
  return found && typeof found === "object" && !Array.isArray(found) ? found : {};
}

export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // They hold until the page is closed.
  }
}

export function newConversation(kind) {
  // randomUUID is there on HTTPS and loopback only, and the page is served to a home network too.
  const random = crypto.getRandomValues(new Uint32Array(2));
  return { id: `${Date.now().toString(36)}-${random[0].toString(36)}${random[1].toString(36)}`, kind, messages: [] };
}

export function titleOf(conversation) {
  const first = conversation.messages.find((message) => message.content.trim());
  if (!first) return "New conversation";
  const line = first.content.trim().replace(/\s+/g, " ");
  return line.length > 60 ? `${line.slice(0, 58).trimEnd()}…` : line;
}
