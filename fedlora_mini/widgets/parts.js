// What every widget is made of. `load` puts this text in front of a module, so that each stays one text.

const LOOK = `
.fl { --fl-accent: var(--pst-color-primary, var(--jp-brand-color1, #0a6ebd)); --fl-hot: var(--pst-color-danger, #c62828);
  color: inherit; max-width: 46rem; font-size: 0.95rem; }
.fl .fl-row { display: flex; flex-wrap: wrap; gap: 0.5rem 1.25rem; }
.fl .fl-row > * { flex: 1 1 12.5rem; min-width: 0; margin: 0; }
.fl label { display: block; }
.fl label b, .fl td { font-variant-numeric: tabular-nums; }
.fl input { display: block; width: 100%; min-height: 1.75rem; margin: 0; accent-color: var(--fl-accent); }
.fl input:focus-visible { outline: 2px solid var(--fl-accent); outline-offset: 0; }
.fl .fl-row figure figcaption { color: inherit; font: inherit; font-size: 0.85em; margin: 0.3rem 0 0; padding: 0;
  text-align: left; }
.fl svg { display: block; width: 100%; height: auto; overflow: visible; }
.fl text { fill: currentColor; font: 12px system-ui, sans-serif; }
.fl .fl-axis { stroke: currentColor; opacity: 0.6; }
.fl .fl-was { fill: none; stroke: currentColor; stroke-width: 1.5; stroke-dasharray: 4 3; opacity: 0.8; }
.fl .fl-now { fill: none; stroke: var(--fl-accent); stroke-width: 2.5; }
.fl table { border-collapse: collapse; margin: 0.6rem 0 0; font-size: 0.9em; }
.fl th, .fl td { padding: 0.1rem 0.9rem 0.1rem 0; text-align: right; font-weight: inherit; border: 0; color: inherit;
  background: none; }
.fl th:first-child { text-align: left; }
.fl thead th { border-bottom: 1px solid; }
.fl .fl-result { margin: 0.5rem 0 0; }
`;

// Gives the element of a widget its classes; returns the style that goes with them, behind the look of all.
function dress(el, name, css) {
  const style = document.createElement("style");
  el.classList.add("fl", name);
  style.textContent = LOOK + css;
  return style;
}

// The sentence that says in words what the pictures show, read aloud when it changes
function outcome() {
  const result = document.createElement("p");
  result.className = "fl-result";
  result.setAttribute("aria-live", "polite");
  return result;
}

const px = (x) => x.toFixed(1);
const line = (name, x1, y1, x2, y2) => `<line class="${name}" x1="${px(x1)}" y1="${px(y1)}" x2="${px(x2)}" y2="${px(y2)}"/>`;
const text = (x, y, words, anchor = "middle") => `<text x="${px(x)}" y="${px(y)}" text-anchor="${anchor}">${words}</text>`;

function slider(label, min, max, step) {
  const box = document.createElement("label"), value = document.createElement("b");
  const input = Object.assign(document.createElement("input"), { type: "range", min, max, step });
  box.append(label + " = ", value, input);
  input.addEventListener("keydown", (event) => event.stopPropagation()); // JupyterLab takes the arrows otherwise
  return { box, input, show: (x, words) => { input.value = x; value.textContent = words; input.setAttribute("aria-valuetext", words); } };
}

// A figure of width x height units, its shapes to be drawn
function picture(caption, width, height) {
  const box = document.createElement("figure"), note = document.createElement("figcaption");
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("role", "img");
  note.textContent = caption;
  box.append(svg, note);
  return { box, draw: (shapes, label) => { svg.innerHTML = shapes; svg.setAttribute("aria-label", label); } };
}

function row(...items) {
  const box = document.createElement("div");
  box.className = "fl-row";
  box.append(...items);
  return box;
}
