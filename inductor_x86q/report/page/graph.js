// Laying out and drawing. Each open block is laid out by itself and is one box in the layout of the block around it.

const WIDTH = 250, HEIGHT = 46, PAD = 16, HEAD = 30, NEAR = 4;
const svg = document.getElementById("graph");

function edgeKind(type) {
  return { uint8: "int8", int8: "int8", bfloat16: "bf16", float16: "bf16", float32: "fp32", float64: "fp32" }[type] || "other";
}

/** Gives every shown child of an open block its place in it, and the block its size and edges. */
function place(block) {
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ rankdir: "TB", nodesep: 22, edgesep: 14, ranksep: 34 });
  graph.setDefaultEdgeLabel(() => ({}));
  for (const child of block.children) {
    if (child.isBlock && child.open) place(child);
    else Object.assign(child, { width: WIDTH, height: HEIGHT });
    graph.setNode(child.key, { width: child.width, height: child.height });
  }
  const edges = block.parent ? [...innerEdges(block), ...borderEdges(block)] : innerEdges(block);
  for (const edge of edges) {
    for (const end of [edge.from, edge.to]) if (!graph.hasNode(end)) graph.setNode(end, { width: 2, height: 2 });
    graph.setEdge(edge.from, edge.to, {});
  }
  dagre.layout(graph);
  const side = block.parent ? PAD : 0, size = graph.graph();
  const top = graph.hasNode("enter") ? NEAR : block.parent ? HEAD : 0;  // an edge that enters leaves room for the name
  const bottom = graph.hasNode("leave") ? 0 : side;
  for (const child of block.children) {
    const spot = graph.node(child.key);
    Object.assign(child, { x: spot.x - child.width / 2 + side, y: spot.y - child.height / 2 + top });
  }
  Object.assign(block, { width: Math.max(size.width, WIDTH) + 2 * side, height: size.height + top + bottom });
  for (const name of ["enter", "leave"]) block[name] = graph.hasNode(name) ? graph.node(name).x + side : block.width / 2;
  const children = new Map(block.children.map(child => [child.key, child]));
  for (const edge of edges) {
    const points = graph.edge(edge.from, edge.to).points.map(p => ({ x: p.x + side, y: p.y + top }));
    edge.points = attached(points, children.get(edge.from), children.get(edge.to), block);
    edge.ends = edge.to !== "leave" && !(children.get(edge.to) || {}).open;
  }
  block.edges = edges;
}

/** The edges between the children of a block, those of the same two children as one. */
function innerEdges(block) {
  const found = new Map();
  for (const leaf of block.leaves) {
    const to = childAround(block, leaf);
    for (const [source, type] of leaf.inputs) {
      const from = childAround(block, source);
      if (from && from !== to) addEdge(found, from.key, to.key, type);
    }
  }
  return [...found.values()];
}

/** What enters a block at its top and leaves it at its bottom. */
function borderEdges(block) {
  const found = new Map();
  for (const leaf of block.leaves) {
    const child = childAround(block, leaf);
    for (const [source, type] of leaf.inputs) if (!childAround(block, source)) addEdge(found, "enter", child.key, type);
    for (const [user, type] of leaf.users) if (!childAround(block, user)) addEdge(found, child.key, "leave", type);
  }
  return [...found.values()];
}

function addEdge(found, from, to, type) {
  const key = JSON.stringify([from, to]);
  if (!found.has(key)) found.set(key, { from, to, types: new Set() });
  found.get(key).types.add(type);
}

function childAround(block, item) {
  while (item && item.parent !== block) item = item.parent;
  return item;
}

/** An edge's points, led to where edges enter and leave open blocks; one that runs upwards stays as it was laid out. */
function attached(points, from, to, block) {
  const last = points.length - 1;
  if (from && to && from.y + from.height > to.y) return points;
  if (!from) points[0] = { x: block.enter, y: 0 };
  else if (from.isBlock && from.open) points[0] = { x: from.x + from.leave, y: from.y + from.height };
  if (!to) points[last] = { x: block.leave, y: block.height };
  else if (to.isBlock && to.open) points[last] = { x: to.x + to.enter, y: to.y };
  return points;
}

// --- drawing ---

function element(name, attributes, ...children) {
  const made = document.createElementNS(svg.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function cut(text, size) {
  return text.length <= size ? text : text.slice(0, Math.floor(size / 3)) + "…" + text.slice(Math.floor(size / 3) + 1 - size);
}

/** Draws an open block's inside; `shown` collects the element and place of each box that can be reached. */
function drawInside(block, shown, left, top) {
  const group = element("g", {});
  for (const child of block.children) if (child.isBlock && child.open) group.append(drawOpen(child, shown, left, top));
  for (const edge of block.edges) group.append(drawEdge(edge));
  for (const child of block.children) {
    if (child.isBlock && child.open) continue;
    const box = child.isBlock ? drawFolded(child) : drawLeaf(child);
    box.setAttribute("transform", `translate(${child.x} ${child.y})`);
    shown.set(child.key, { item: child, box, x: left + child.x, y: top + child.y, width: WIDTH, height: HEIGHT });
    group.append(box);
  }
  return group;
}

function drawOpen(block, shown, left, top) {
  const { x, y, width, height } = block;
  const head = boxElement(block, "block open" + (countKinds(block).missed ? " has-missed" : ""), `block ${block.path}, open`);
  head.setAttribute("aria-expanded", "true");
  head.append(element("rect", { width, height, rx: 8 }), label(10, 20, "▾ " + cut(block.path, Math.floor(width / 8) - 4)));
  shown.set(block.key, { item: block, box: head, x: left + x, y: top + y, width, height: HEAD });
  return element("g", { transform: `translate(${x} ${y})` }, head, drawInside(block, shown, left + x, top + y));
}

function drawEdge(edge) {
  const kinds = [...edge.types].map(edgeKind);
  const kind = ["fp32", "bf16", "int8"].find(name => kinds.includes(name)) || "other";
  const path = element("path", { class: "e " + kind, d: curve(edge.points) });
  if (edge.ends) path.setAttribute("marker-end", `url(#to-${kind})`);
  path.append(element("title", {}, [...edge.types].join(", ")));
  return path;
}

/** A smooth line: of three points an S, of more one between the middles of its pieces, bent at its points. */
function curve(points) {
  const at = p => `${p.x.toFixed(1)} ${p.y.toFixed(1)}`, [first, last] = [points[0], points[points.length - 1]];
  const y = (first.y + last.y) / 2;
  if (points.length === 3) return `M${at(first)}C${at({ x: first.x, y })} ${at({ x: last.x, y })} ${at(last)}`;
  const middle = (a, b) => ({ x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 });
  let d = "M" + at(first);
  for (let i = 1; i < points.length - 1; i++) d += `Q${at(points[i])} ${at(middle(points[i], points[i + 1]))}`;
  return d + "L" + at(last);
}

function boxElement(item, kind, name) {
  const box = element("g", { class: "b " + kind, role: "button", tabindex: "-1", "aria-label": name });
  box.dataset.key = item.key;
  box.append(element("title", {}, name));
  return box;
}

function label(x, y, text, kind = "", end = false) {
  return element("text", { x, y, class: kind, ...(end ? { "text-anchor": "end" } : {}) }, text);
}

function drawFolded(block) {
  const counts = countKinds(block), total = counts.fused + counts.missed + counts.kept_float;
  const words = [[counts.missed, "missed"], [counts.kept_float, "float"], [counts.fused, "int8"]];
  const summary = words.filter(([count]) => count).map(([count, word]) => `${count} ${word}`).join(", ") || `${block.leaves.length} operations`;
  const box = boxElement(block, "block" + (counts.missed ? " has-missed" : ""), `block ${block.path}: ${summary}, folded`);
  box.setAttribute("aria-expanded", "false");
  box.append(element("rect", { width: WIDTH, height: HEIGHT, rx: 6 }), label(10, 18, "▸ " + cut(block.path, 30)));
  box.append(label(10, 35, summary, counts.missed ? "warn" : "l"));
  let x = 0;
  for (const kind of ["missed", "kept_float", "fused"]) {
    if (!counts[kind]) continue;
    const width = (WIDTH - 20) * counts[kind] / total;
    box.append(element("rect", { class: "share " + kind, x: 10 + x, y: HEIGHT - 6, width, height: 3 }));
    x += width;
  }
  if (block.leaves.some(leaf => leaf.change)) markChange(box, "changed");
  else if (block.microseconds) box.append(label(WIDTH - 8, 35, block.microseconds.toFixed(0) + " µs", "s", true));
  return box;
}

function drawLeaf(leaf) {
  const { box: data } = leaf;
  const local = localName(leaf), corner = data.corner;
  const numbered = /[^.]*(\.\d+)*$/.exec(leaf.path)[0]; // a bare number says nothing: "mlp.3" of "layers.0.mlp.3"
  const name = data.layer !== leaf.path ? "" : /^\d+$/.test(local) ? numbered : local;
  const box = boxElement(leaf, data.kind, `${data.kind.replace("_", " ")}: ${data.title}, ${data.layer}, ${corner}`);
  box.append(element("rect", { width: WIDTH, height: HEIGHT, rx: 6 }));
  if (data.region) box.append(element("rect", { class: "region", x: -4, y: -4, width: WIDTH + 8, height: HEIGHT + 8, rx: 9 }));
  box.append(label(10, 18, cut(data.title, leaf.change ? 31 - leaf.change.length : 32)), label(10, 36, cut(name, Math.max(8, 31 - corner.length)), "l"));
  box.append(label(WIDTH - 8, 36, corner, "s", true));
  if (leaf.change) markChange(box, leaf.change);
  return box;
}

/** Says on a box what has changed since the report that this one is compared with. */
function markChange(box, change) {
  box.classList.add("changed");
  box.append(label(WIDTH - 8, 18, change, "change", true));
}

function markers() {
  const arrow = kind => element("marker", { id: "to-" + kind, class: kind, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 8, markerHeight: 8, markerUnits: "userSpaceOnUse", orient: "auto" },
    element("path", { d: "M0 0L8 4L0 8z" }));
  return element("defs", {}, ...["int8", "bf16", "fp32", "other"].map(arrow));
}
