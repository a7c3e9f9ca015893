// What every widget is made of. `load` puts this text in front of a module, so that each stays one text.

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
