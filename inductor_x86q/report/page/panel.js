// The panel beside the graph: all that is known of what is selected.

const panel = document.getElementById("panel");

function html(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const KINDS = { fused: "int8", missed: "missed", kept_float: "float by design", generated: "generated kernel", gone: "no longer there" };

function kindBadge(kind) {
  return html("span", { class: "kind " + kind }, KINDS[kind] || kind);
}

function facts(pairs) {
  return html("dl", {}, ...pairs.flatMap(([name, text]) => [html("dt", {}, name), html("dd", {}, text)]));
}

/** Buttons that select something else; nothing where there is nothing to select. */
function links(title, entries, go) {
  if (!entries.length) return [];
  const list = html("ul");
  for (const [text, target] of entries) {
    const button = html("button", { type: "button" }, text);
    button.addEventListener("click", () => go(target));
    list.append(html("li", {}, button));
  }
  return [html("h3", {}, title), list];
}

function leafName(leaf) {
  return `${leaf.box.title}  ${leaf.box.layer}`;
}

/** What a leaf's nodes are; `data` has maps of items and nodes by name. */
function leafContent(leaf, data, go) {
  const parts = [html("h2", {}, leaf.box.layer), kindBadge(leaf.box.kind)];
  for (const name of leaf.box.names) {
    const item = data.items.get(name);
    if (item) parts.push(...itemContent(item, data));
    else {
      const [, operator, type, shape] = data.nodes.get(name);
      parts.push(facts([["operator", operator], ["type", type], ["shape", shape], ["node", name]].filter(pair => pair[1])));
    }
  }
  parts.push(...links("reads", leaf.inputs.map(([source, type]) => [`${leafName(source)}  (${type})`, source]), go));
  parts.push(...links("is read by", leaf.users.map(([user]) => [leafName(user), user]), go));
  return [...parts, ...codeContent(leaf.box.names, data)];
}

function itemContent(item, data) {
  const parts = [];
  if (item.reason) parts.push(html("p", { class: "reason " + item.kind }, item.reason));
  parts.push(facts(item.facts));
  if (item.change) parts.push(html("h3", {}, "changed"), facts([[item.change[0], "before: " + item.change[1]]]));
  const drift = data.drift.find(([layer]) => layer === item.title);
  if (drift && item.kind !== "generated") parts.push(facts([["drift", drift[1]]]));
  return parts;
}

function codeContent(names, data) {
  const calls = [...new Set(names.flatMap(name => (data.items.get(name) || { code: [] }).code))];
  if (!data.code.length) {
    return [html("h3", {}, "C++"), html("p", {}, "not in this report: explain(..., code=True) or x86q explain --code puts it here")];
  }
  if (!calls.length) return [];
  const parts = [html("h3", {}, "C++")];
  for (const call of calls.map(number => data.code[number])) {
    parts.push(html("pre", { class: "call", tabindex: "0", "aria-label": "call" }, call.call));
    if (call.kernel !== null) parts.push(html("pre", { class: "kernel", tabindex: "0", "aria-label": "kernel" }, data.kernels[call.kernel]));
  }
  return parts;
}

function blockContent(block, go) {
  const counts = countKinds(block);
  const numbers = [["int8", counts.fused], ["missed", counts.missed], ["float by design", counts.kept_float], ["operations", block.leaves.length]];
  const pairs = numbers.filter(([, count]) => count).map(([name, count]) => [name, String(count)]);
  if (block.microseconds) pairs.push(["time", block.microseconds.toFixed(1) + " µs"]);
  const layers = block.leaves.filter(leaf => leaf.box.kind in counts);
  layers.sort((a, b) => (b.box.kind === "missed") - (a.box.kind === "missed"));
  return [html("h2", {}, block.path), html("span", { class: "kind" }, "block"), facts(pairs), ...links("layers", layers.map(leaf => [leafName(leaf), leaf]), go)];
}

function showPanel(content, close) {
  const button = html("button", { type: "button", class: "close", "aria-label": "close", title: "close (Esc)" }, "×");
  button.addEventListener("click", close);
  panel.replaceChildren(button, ...content);
  panel.hidden = false;
  panel.scrollTop = 0;
}
