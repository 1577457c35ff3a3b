// Zoom and pan: the wheel moves, with Ctrl or pinched it zooms, as does dragging and the buttons.

const view = { x: 0, y: 0, scale: 1, world: null };

function applyView() {
  view.world.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.scale})`);
}

function zoom(factor, x = svg.clientWidth / 2, y = svg.clientHeight / 2) {
  const scale = Math.min(4, Math.max(0.02, view.scale * factor));
  view.x = x - (x - view.x) * scale / view.scale;
  view.y = y - (y - view.y) * scale / view.scale;
  view.scale = scale;
  applyView();
}

/** All of the graph, or, `readable`, its beginning in a size that can be read. */
function fit(root, readable = false) {
  const across = (svg.clientWidth - 24) / root.width, down = (svg.clientHeight - 24) / root.height;
  view.scale = Math.min(1, readable ? Math.max(across, 0.6) : Math.min(across, down));
  const first = readable ? root.children[0] : { x: 0, width: root.width };
  view.x = svg.clientWidth / 2 - (first.x + first.width / 2) * view.scale;
  view.y = Math.max(12, readable ? 12 : (svg.clientHeight - root.height * view.scale) / 2);
  applyView();
}

/** Moves a place into view, to the middle unless it is to be seen already. */
function reveal(spot) {
  const x = view.x + spot.x * view.scale, y = view.y + spot.y * view.scale;
  const width = Math.min(spot.width * view.scale, svg.clientWidth / 2), height = spot.height * view.scale;
  if (x >= 0 && y >= 0 && x + width <= svg.clientWidth && y + height <= svg.clientHeight && view.scale > 0.3) return;
  view.scale = Math.max(view.scale, 0.6);
  view.x = svg.clientWidth / 2 - (spot.x + spot.width / 2) * view.scale;
  view.y = svg.clientHeight / 2 - (spot.y + spot.height / 2) * view.scale;
  applyView();
}

/** After a new layout: what was at one place of the window is there again. */
function keepInPlace(before, after) {
  view.x += (before.x - after.x) * view.scale;
  view.y += (before.y - after.y) * view.scale;
  applyView();
}

let dragged = null;

svg.addEventListener("wheel", event => {
  event.preventDefault();
  if (event.ctrlKey || event.metaKey) {
    const corner = svg.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY / 200), event.clientX - corner.left, event.clientY - corner.top);
  } else {
    view.x -= event.shiftKey ? event.deltaY : event.deltaX;
    view.y -= event.shiftKey ? 0 : event.deltaY;
    applyView();
  }
}, { passive: false });

svg.addEventListener("pointerdown", event => {
  if (event.button === 0) dragged = { x: event.clientX, y: event.clientY, moved: false };
});

svg.addEventListener("pointermove", event => {
  if (!dragged || !(event.buttons & 1)) return;
  const dx = event.clientX - dragged.x, dy = event.clientY - dragged.y;
  if (!dragged.moved && Math.hypot(dx, dy) < 4) return;
  if (!dragged.moved) svg.setPointerCapture(event.pointerId);
  svg.classList.add("moving");
  dragged = { x: event.clientX, y: event.clientY, moved: true };
  view.x += dx;
  view.y += dy;
  applyView();
});

svg.addEventListener("pointerup", () => svg.classList.remove("moving"));
