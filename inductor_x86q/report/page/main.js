// The page: its data, the table, search, selection, the histogram and the keys.

const read = JSON.parse(document.getElementById("data").textContent);
const data = { ...read, items: new Map(read.items), nodes: new Map(read.nodes.map(node => [node[0], node])) };
const { root, leaves } = buildBlocks(data.graph);
const leafOf = new Map(leaves.flatMap(leaf => leaf.box.names.map(name => [name, leaf])));
const rows = [...document.querySelectorAll("#rows tr")];
const search = document.getElementById("search"), operations = document.getElementById("operations"), changes = document.getElementById("changes");
const lower = (...texts) => texts.join(" ").toLowerCase();
const rowText = new Map(rows.map(row => [row, lower(row.textContent, row.dataset.layer)]));
for (const leaf of leaves) {
  leaf.text = lower(leaf.box.title, leaf.path, ...leaf.box.names);
  leaf.change = leaf.box.names.map(name => (data.items.get(name) || {}).change).filter(Boolean).map(([kind]) => kind)[0];
}
let shown = new Map(), selected = null, matches = null, focused = null;

// --- graph ---

function draw() {
  place(root);
  shown = new Map();
  view.world = element("g", {});
  view.world.append(drawInside(root, shown, 0, 0));
  svg.replaceChildren(markers(), view.world);
  applyView();
  mark();
  roam(shown.get(focused) || [...shown.values()][0], false);
}

/** Opens or folds a block; it stays where it is in the window. */
function toggle(block, open = !block.open) {
  const before = shown.get(block.key);
  block.open = open;
  draw();
  if (before) keepInPlace(before, shown.get(block.key));
}

function setAll(open) {
  for (const block of allBlocks(root)) block.open = open;
  draw();
  fit(root, true);
}

/** Dims what the search does not find, and frames what is selected. */
function mark() {
  for (const { item, box } of shown.values()) {
    const inside = item.isBlock ? item.leaves : [item];
    box.classList.toggle("off", matches !== null && !inside.some(leaf => matches.has(leaf)));
    box.classList.toggle("on", selected !== null && (item === selected || (item.isBlock && !item.open && inside.includes(selected))));
  }
  for (const edge of svg.querySelectorAll(".e")) edge.classList.toggle("off", matches !== null);
}

// --- selection ---

function select(item, { from = "" } = {}) {
  selected = item;
  const go = target => select(target);
  showPanel(item.isBlock ? blockContent(item, go) : leafContent(item, data, go), deselect);
  const folded = ancestors(item).filter(block => !block.open);
  for (const block of folded) block.open = true;
  if (folded.length) draw();
  else mark();
  reveal(shown.get(item.key));
  markRows(item.isBlock ? [] : item.box.names, from !== "table");
}

function deselect() {
  selected = null;
  panel.hidden = true;
  mark();
  markRows([], false);
}

function markRows(names, scroll) {
  for (const row of rows) row.classList.toggle("on", names.includes(row.dataset.node) && !row.classList.contains("gone"));
  for (const bar of document.querySelectorAll("#histogram rect")) bar.classList.toggle("on", names.includes(bar.dataset.node));
  const first = rows.find(row => row.classList.contains("on"));
  if (!first || !scroll) return;
  first.hidden = false;
  first.scrollIntoView({ block: "nearest" });
}

function selectRow(row) {
  if (row.classList.contains("gone")) return;
  const leaf = leafOf.get(row.dataset.node);
  if (leaf) return select(leaf, { from: "table" });
  showPanel([html("h2", {}, row.dataset.layer), kindBadge(row.className), ...itemContent(data.items.get(row.dataset.node), data)], deselect);
  markRows([row.dataset.node], false);
}

// --- search ---

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean), hits = new Set();
  for (const row of rows) {
    const found = words.every(word => rowText.get(row).includes(word)) && (!changes.checked || row.dataset.change);
    if (found && !row.classList.contains("gone")) hits.add(row.dataset.node);
    row.hidden = !found || (row.classList.contains("generated") && !operations.checked && !changes.checked);
  }
  const all = !words.length && !changes.checked;
  const byText = leaf => words.length > 0 && !changes.checked && words.every(word => leaf.text.includes(word));
  matches = all ? null : new Set(leaves.filter(leaf => leaf.box.names.some(name => hits.has(name)) || byText(leaf)));
  mark();
  if (matches && matches.size) reveal(shown.get(shownFor([...matches][0]).key));
  resetRows();
}

function selectNext(back) {
  const found = matches ? [...matches] : [];
  if (!found.length) return;
  const at = found.indexOf(selected), step = back ? -1 : 1;
  select(found[at < 0 ? 0 : (at + step + found.length) % found.length]);
}

// --- histogram ---

function drawHistogram() {
  const box = document.getElementById("histogram"), { bars, timed } = data;
  if (!bars.length) return;
  const most = Math.max(...bars.map(([, value]) => value)), drawing = element("svg", { preserveAspectRatio: "none", viewBox: `0 0 ${bars.length} 100`, "aria-hidden": "true" });
  bars.forEach(([name, value, text], position) => {
    const item = data.items.get(name), height = Math.max(2, 100 * value / most);
    const bar = element("rect", { x: position + 0.1, y: 100 - height, width: 0.8, height, class: item ? item.kind : "" });
    bar.dataset.node = name;
    bar.append(element("title", {}, text));
    bar.addEventListener("click", () => leafOf.has(name) && select(leafOf.get(name)));
    drawing.append(bar);
  });
  box.append(html("span", {}, timed ? "time by layer" : "multiply-accumulates by layer"), drawing, html("span", {}, `most: ${bars.find(([, value]) => value === most)[2]}`));
  box.hidden = false;
}

for (const [name, value] of data.timed ? data.bars : []) {
  for (const block of leafOf.has(name) ? ancestors(leafOf.get(name)) : []) block.microseconds = (block.microseconds || 0) + value;
}

// --- keys: one box and one row can be reached by Tab, the arrows go on from there ---

function roam(spot, focus = true) {
  for (const { box } of shown.values()) box.setAttribute("tabindex", "-1");
  if (!spot) return;
  focused = spot.item.key;
  spot.box.setAttribute("tabindex", "0");
  if (!focus) return;
  spot.box.focus({ preventScroll: true });
  reveal(spot);
}

const DIRECTIONS = { ArrowDown: [0, 1], ArrowUp: [0, -1], ArrowRight: [1, 0], ArrowLeft: [-1, 0] };

function neighbour(spot, [dx, dy]) {
  let best = null, least = Infinity;
  for (const other of shown.values()) {
    const x = other.x + other.width / 2 - spot.x - spot.width / 2, y = other.y + other.height / 2 - spot.y - spot.height / 2;
    const along = x * dx + y * dy, aside = Math.abs(x * dy) + Math.abs(y * dx);
    if (along > 1 && along + 2 * aside < least) [best, least] = [other, along + 2 * aside];
  }
  return best;
}

function activate(spot) {
  const { item } = spot;
  if (item.isBlock) toggle(item);
  select(item, { from: "graph" });
}

svg.addEventListener("click", event => {
  const box = event.target.closest(".b"), moved = dragged && dragged.moved;
  dragged = null;
  if (!box || moved) return;
  const spot = shown.get(box.dataset.key);
  focused = spot.item.key;
  activate(spot);
  roam(shown.get(focused));
});

svg.addEventListener("keydown", event => {
  const spot = shown.get(focused);
  if (!spot || event.ctrlKey || event.metaKey || event.altKey) return;
  if (DIRECTIONS[event.key]) {
    const next = neighbour(spot, DIRECTIONS[event.key]);
    if (next) roam(next);
  } else if (event.key === "Enter" || event.key === " ") {
    activate(spot);
    roam(shown.get(focused));
  } else return;
  event.preventDefault();
});

function resetRows() {
  const first = rows.find(row => !row.hidden);
  for (const row of rows) row.tabIndex = row === first ? 0 : -1;
}

document.getElementById("rows").addEventListener("keydown", event => {
  const open = rows.filter(row => !row.hidden), at = open.indexOf(document.activeElement);
  const next = { ArrowDown: open[at + 1], ArrowUp: open[at - 1], Home: open[0], End: open[open.length - 1] }[event.key];
  if (event.key === "Enter" || event.key === " ") selectRow(open[at]);
  else if (next) {
    open[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  } else return;
  event.preventDefault();
});

document.addEventListener("keydown", event => {
  if (event.key === "Escape" && !panel.hidden) return deselect();
  if (event.target.closest("input") || event.ctrlKey || event.metaKey || event.altKey) return;
  const action = { "/": () => search.focus(), "+": () => zoom(1.25), "-": () => zoom(0.8), 0: () => fit(root) }[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

search.addEventListener("input", filter);
search.addEventListener("keydown", event => { if (event.key === "Enter") selectNext(event.shiftKey); });
for (const box of [operations, changes]) box.addEventListener("change", filter);
for (const row of rows) row.addEventListener("click", () => selectRow(row));
const BUTTONS = { fold: () => setAll(false), unfold: () => setAll(true), smaller: () => zoom(0.8), larger: () => zoom(1.25), fit: () => fit(root) };
for (const [name, action] of Object.entries(BUTTONS)) document.getElementById(name).addEventListener("click", action);

// --- start ---

drawHistogram();
if (leaves.length) {
  openAtFirst(root, 45, 150);
  draw();
  fit(root, true);
} else {
  svg.remove();
  document.getElementById("tools").hidden = true;
  document.getElementById("empty").hidden = false;
}
if (location.hash) search.value = decodeURIComponent(location.hash.slice(1));
filter();
