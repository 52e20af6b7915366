// Markdown as DOM nodes. Text only ever becomes text nodes, links lead to http, https and mail addresses
// alone, and images are shown as links, so that nothing is fetched that nobody clicked.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*).*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const MAX_DEPTH = 12; // of quotes and lists within each other; deeper ones are shown as text

// Spans are bounded, so that text full of marks that never close takes time by its length, not its square.
const INLINE = new RegExp(
  [
    /(?<!`)(?<ticks>`{1,6})(?!`)(?<code>[^`]|[^`][\s\S]{0,1000}?[^`])\k<ticks>(?!`)/,
    /\\(?<escaped>[!-/:-@[-`{-~])/,
    /!?\[(?<label>[^\][\n]{0,300})\]\((?<href>[^\s()]{1,2000}(?:\([^\s()]{0,200}\))?)(?:\s"[^"\n]{0,200}")?\)/,
    /<(?<auto>https?:\/\/[^\s<>]{1,2000})>/,
    /(?<bare>https?:\/\/[^\s<>()]{0,2000}[^\s<>().,;:!?'"\]])/,
    /\*\*(?<strong>[^\s*](?:[\s\S]{0,1000}?\S)?)\*\*(?!\*)/,
    /(?<!\w)__(?<strong2>[^\s_](?:[\s\S]{0,1000}?\S)?)__(?!\w)/,
    /\*(?<em>[^\s*](?:[^*]{0,1000}[^\s*])?)\*/,
    /(?<!\w)_(?<em2>[^\s_](?:[^_]{0,1000}[^\s_])?)_(?!\w)/,
    /~~(?<del>[^\s~](?:[\s\S]{0,1000}?\S)?)~~/,
  ].map((part) => part.source).join("|"),
  "g",
);

export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) node.setAttribute(attribute, value);
  node.append(...children);
  return node;
}

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function render(text) {
  const fragment = document.createDocumentFragment();
  fragment.append(...blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0));
  return fragment;
}

function blocks(lines, depth) {
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) {
      at += 1;
      continue;
    }
    let match;
    if ((match = line.match(FENCE))) {
      const [, marks, language] = match;
      const end = lines.findIndex((l, i) => i > at && l.trim().startsWith(marks) && !l.trim().replaceAll(marks[0], ""));
      const stop = end < 0 ? lines.length : end;
      nodes.push(codeBlock(lines.slice(at + 1, stop).join("\n"), language));
      at = stop + 1;
    } else if ((match = line.match(HEADING))) {
      nodes.push(element(`h${Math.min(match[1].length, 4)}`, {}, ...inline(match[2])));
      at += 1;
    } else if (RULE.test(line)) {
      nodes.push(element("hr"));
      at += 1;
    } else if (QUOTE.test(line) && depth < MAX_DEPTH) {
      const inner = [];
      while (at < lines.length && (match = lines[at].match(QUOTE))) {
        inner.push(match[1]);
        at += 1;
      }
      nodes.push(element("blockquote", {}, ...blocks(inner, depth + 1)));
    } else if (ITEM.test(line) && depth < MAX_DEPTH) {
      let list;
      [list, at] = listFrom(lines, at, depth);
      nodes.push(list);
    } else if (line.includes("|") && DIVIDER.test(lines[at + 1] ?? "") && lines[at + 1].includes("-")) {
      const rows = [];
      let end = at + 2;
      while (end < lines.length && lines[end].includes("|")) rows.push(cells(lines[end++]));
      nodes.push(table(cells(line), rows));
      at = end;
    } else {
      const paragraph = [line];
      at += 1;
      while (at < lines.length && lines[at].trim() && !begins(lines[at])) paragraph.push(lines[at++]);
      nodes.push(element("p", {}, ...inline(paragraph.join("\n"))));
    }
  }
  return nodes;
}

function begins(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
}

function listFrom(lines, start, depth) {
  const first = lines[start].match(ITEM);
  const indent = first[1].length;
  const ordered = /\d/.test(first[2]);
  const list = element(ordered ? "ol" : "ul");
  if (ordered && parseInt(first[2], 10) !== 1) list.setAttribute("start", String(parseInt(first[2], 10)));
  let at = start;
  while (at < lines.length) {
    const match = lines[at].match(ITEM);
    if (!match || match[1].length > indent + 1 || match[1].length < indent || /\d/.test(match[2]) !== ordered) break;
    const inner = [match[3]];
    at += 1;
    // What is indented belongs to the item, and so does a blank line that is followed by such.
    while (at < lines.length) {
      const blank = !lines[at].trim();
      const next = blank ? lines[at + 1] ?? "" : lines[at];
      const deeper = next.trim() && next.search(/\S/) > indent;
      if (!deeper && (blank || ITEM.test(next) || begins(next))) break;
      inner.push(blank ? "" : lines[at].replace(new RegExp(`^\\s{0,${indent + match[2].length + 1}}`), ""));
      at += 1;
    }
    const item = element("li");
    const content = blocks(inner, depth + 1);
    // An item of one paragraph needs no paragraph of its own.
    if (content[0]?.localName === "p") item.append(...content[0].childNodes, ...content.slice(1));
    else item.append(...content);
    list.append(item);
    while (at + 1 < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1])) at += 1;
  }
  return [list, at];
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(head, rows) {
  const row = (name, texts) => element("tr", {}, ...texts.map((text) => element(name, {}, ...inline(text))));
  const body = element("tbody", {}, ...rows.map((texts) => row("td", texts)));
  return element("div", { class: "table", tabindex: "0" }, element("table", {}, element("thead", {}, row("th", head)), body));
}

function codeBlock(code, language) {
  const button = element("button", { type: "button", "data-copy": "" }, icon("copy"), "Copy");
  return element(
    "div",
    { class: "code" },
    element("div", {}, element("span", {}, language || "text"), button),
    element("pre", { tabindex: "0" }, element("code", {}, code)),
  );
}

function inline(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > end) nodes.push(text.slice(end, match.index));
    nodes.push(inlineNode(match[0], match.groups));
    end = match.index + match[0].length;
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

function inlineNode(whole, groups) {
  if (groups.code !== undefined) return element("code", {}, groups.code);
  if (groups.escaped !== undefined) return groups.escaped;
  if (groups.href !== undefined) return link(groups.href, groups.label || groups.href) ?? whole;
  const address = groups.auto ?? groups.bare;
  if (address !== undefined) return link(address, address) ?? whole;
  const strong = groups.strong ?? groups.strong2;
  if (strong !== undefined) return element("strong", {}, ...inline(strong));
  const em = groups.em ?? groups.em2;
  if (em !== undefined) return element("em", {}, ...inline(em));
  return element("del", {}, ...inline(groups.del));
}

function link(href, label) {
  let address;
  try {
    address = new URL(href);
  } catch {
    return null;
  }
  if (!["http:", "https:", "mailto:"].includes(address.protocol)) return null;
  return element("a", { href: address.href, target: "_blank", rel: "noopener noreferrer" }, label);
}
