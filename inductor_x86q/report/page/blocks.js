"use strict";
// The model's blocks: a tree by module path. A leaf is a box of the graph, a block what its module holds.

function makeBlock(path, parent) {
  return { isBlock: true, key: "block " + path, path, parent, children: [], leaves: [], open: parent === null };
}

/** The tree over the boxes of the graph, and its leaves. A block that would hold one thing only is left out. */
function buildBlocks(graph) {
  const root = makeBlock("", null), blocks = new Map([["", root]]);
  const block = path => {
    if (!blocks.has(path)) {
      const parent = block(path.split(".").slice(0, -1).join("."));
      const made = makeBlock(path, parent);
      blocks.set(path, made);
      parent.children.push(made);
    }
    return blocks.get(path);
  };
  const leaves = graph.map((box, index) => ({ isBlock: false, key: "box " + index, box, path: box.path, inputs: [], users: [] }));
  leaves.forEach(leaf => {
    leaf.parent = block(leaf.path);
    leaf.parent.children.push(leaf);
    for (const [source, type] of leaf.box.in) {
      leaf.inputs.push([leaves[source], type]);
      leaves[source].users.push([leaf, type]);
    }
  });
  collapse(root);
  for (const leaf of leaves) for (let b = leaf.parent; b; b = b.parent) b.leaves.push(leaf);
  return { root, leaves };
}

function collapse(block) {
  block.children = block.children.map(child => {
    if (!child.isBlock) return child;
    collapse(child);
    if (child.children.length > 1) return child;
    child.children[0].parent = block;
    return child.children[0];
  });
}

function allBlocks(block) {
  return block.children.filter(child => child.isBlock).flatMap(child => [child, ...allBlocks(child)]);
}

/** A path as it reads inside of its parent block. */
function localName(item) {
  const above = item.parent ? item.parent.path : "";
  if (item.path === above) return "";
  return above ? item.path.slice(above.length + 1) : item.path;
}

/** Opens blocks while that many boxes or fewer are to be seen: the outermost each by itself, those inside of them level
 *  by level; then those around what was missed. */
function openAtFirst(root, limit, limitForMissed) {
  let count = root.children.length, level = [];
  for (const block of root.children.filter(child => child.isBlock)) {
    if (count + block.children.length > limit) continue;
    count += block.children.length;
    block.open = true;
    level.push(...block.children.filter(child => child.isBlock));
  }
  while (level.length) {
    const more = level.reduce((sum, block) => sum + block.children.length, 0);
    if (count + more > limit) break;
    count += more;
    for (const block of level) block.open = true;
    level = level.flatMap(block => block.children.filter(child => child.isBlock));
  }
  for (const leaf of root.leaves.filter(leaf => leaf.box.kind === "missed")) {
    for (const block of ancestors(leaf).filter(block => !block.open)) {
      if ((count += block.children.length) > limitForMissed) return;
      block.open = true;
    }
  }
}

/** The blocks around a leaf or block, the outermost first, without the root. */
function ancestors(item) {
  const found = [];
  for (let block = item.parent; block && block.parent; block = block.parent) found.unshift(block);
  return found;
}

/** What is drawn for a leaf: itself, or the outermost folded block around it. */
function shownFor(leaf) {
  return ancestors(leaf).find(block => !block.open) || leaf;
}

function countKinds(block) {
  const counts = { fused: 0, missed: 0, kept_float: 0 };
  for (const leaf of block.leaves) if (leaf.box.kind in counts) counts[leaf.box.kind] += 1;
  return counts;
}
