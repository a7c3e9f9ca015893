// Soft-thresholding: a spectrum, a threshold, what survives, and the proximal path that leads there.

// xi(x, tau) = sign(x) max(|x| - tau, 0)
const soft = (x, tau) => Math.sign(x) * Math.max(Math.abs(x) - tau, 0);
const rank = (w) => w.filter((x) => x !== 0).length;
const nuclear = (w) => w.reduce((sum, x) => sum + Math.abs(x), 0);
// w <- xi(w - rho (w - v), rho tau), from w = start; row k is the state after k steps
const path = (v, tau, rho, steps, start) => {
  const rows = [v.map(() => start)];
  for (let k = 0; k < steps; k++) rows.push(rows[k].map((x, i) => soft(x - rho * (x - v[i]), rho * tau)));
  return rows;
};

const CSS = `
.fl-st .fl-row > * { flex-basis: 17rem; }
.fl-st .fl-was { stroke-dasharray: 2 2; opacity: 0.7; }
.fl-st .fl-kept { fill: var(--fl-accent); }
.fl-st .fl-cut { stroke: currentColor; stroke-dasharray: 6 3; }
.fl-st .fl-band { fill: currentColor; opacity: 0.08; }
.fl-st .fl-line { fill: none; stroke: var(--fl-accent); stroke-width: 2; }
.fl-st .fl-dead { fill: none; stroke: currentColor; stroke-width: 1.2; stroke-dasharray: 3 2; opacity: 0.75; }
.fl-st .fl-off { fill: none; stroke: currentColor; stroke-width: 1.5; }
`;

const W = 340, H = 220, LEFT = 34, RIGHT = 8, TOP = 20, BOTTOM = 36;

// A linear scale from [a, b] to [p, q], and about five round ticks inside [a, b].
const scale = (a, b, p, q) => (x) => p + ((x - a) / (b - a)) * (q - p);
const ticks = (a, b) => {
  const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200].find((s) => (b - a) / s <= 6) ?? (b - a) / 5;
  const list = [];
  for (let i = Math.ceil(a / step); i * step <= b + 1e-9; i++) list.push(Number((i * step).toFixed(6)));
  return list;
};
const frame = (y, a, b, xLabel, yLabel) =>
  ticks(a, b).map((k) =>
    `<line class="fl-axis" x1="${LEFT - 4}" x2="${LEFT}" y1="${px(y(k))}" y2="${px(y(k))}"/>` +
    `<text x="${LEFT - 7}" y="${px(y(k) + 4)}" text-anchor="end">${k}</text>`).join("") +
  `<line class="fl-axis" x1="${LEFT}" x2="${LEFT}" y1="${TOP}" y2="${H - BOTTOM}"/>` +
  `<line class="fl-axis" x1="${LEFT}" x2="${W - RIGHT}" y1="${px(y(0))}" y2="${px(y(0))}"/>` +
  `<text x="${(LEFT + W - RIGHT) / 2}" y="${H - 3}" text-anchor="middle">${xLabel}</text>` +
  `<text x="${LEFT}" y="${TOP - 8}" text-anchor="middle">${yLabel}</text>`;

function bars(v, tau, low, high) {
  const y = scale(low, high, H - BOTTOM, TOP), slot = (W - LEFT - RIGHT) / v.length, width = slot * 0.66;
  const bar = (name, x, i) => {
    const top = Math.min(y(x), y(0)), height = Math.abs(y(x) - y(0));
    return `<rect class="${name}" x="${px(LEFT + (i + 0.17) * slot)}" y="${px(top)}" ` +
      `width="${px(width)}" height="${px(height)}"/>`;
  };
  const cut = Math.min(tau, high), cutLow = Math.max(-tau, low);
  const every = Math.ceil(v.length / 16); // labels that do not collide
  return `<rect class="fl-band" x="${LEFT}" y="${px(y(cut))}" width="${W - LEFT - RIGHT}" ` +
    `height="${px(y(cutLow) - y(cut))}"/>` +
    v.map((x, i) => bar("fl-was", x, i) + (soft(x, tau) === 0 ? "" : bar("fl-kept", soft(x, tau), i)) +
      (i % every ? "" : `<text x="${px(LEFT + (i + 0.5) * slot)}" y="${H - BOTTOM + 15}" ` +
        `text-anchor="middle">${i + 1}</text>`)).join("") +
    [tau, -tau].filter((c) => c <= high && c >= low).map((c) =>
      `<line class="fl-cut" x1="${LEFT}" x2="${W - RIGHT}" y1="${px(y(c))}" y2="${px(y(c))}"/>`).join("") +
    (tau <= high ? `<text x="${W - RIGHT}" y="${px(y(tau) - 5)}" text-anchor="end">τ</text>` : "") +
    frame(y, low, high, "direction i", "vᵢ");
}

function lines(rows, end, step, low, high) {
  const y = scale(low, high, H - BOTTOM, TOP), x = scale(0, rows.length - 1, LEFT, W - RIGHT - 4);
  const line = (i) => rows.map((w, k) => `${px(x(k))},${px(y(w[i]))}`).join(" ");
  return rows[0].map((_, i) => `<polyline class="${end[i] === 0 ? "fl-dead" : "fl-line"}" points="${line(i)}"/>`).join("") +
    `<line class="fl-cut" x1="${px(x(step))}" x2="${px(x(step))}" y1="${TOP}" y2="${H - BOTTOM}"/>` +
    rows[step].map((w) => `<circle class="${w === 0 ? "fl-off" : "fl-kept"}" cx="${px(x(step))}" ` +
      `cy="${px(y(w))}" r="3.5"/>`).join("") +
    ticks(0, rows.length - 1).map((k) =>
      `<text x="${px(x(k))}" y="${H - BOTTOM + 15}" text-anchor="middle">${k}</text>`).join("") +
    frame(y, low, high, "proximal step k", "wᵢ");
}

function render({ model, el }) {
  const size = Math.max(...model.get("v").map(Math.abs), 0.1);
  const tau = slider("threshold τ", 0, (Math.ceil(size * 10.5) / 10).toFixed(1), 0.05);
  const step = slider("proximal steps k", 0, model.get("steps"), 1);
  const spectrum = picture("Outline: the spectrum v. Filled: ξ(v, τ), what survives. Inside the band |vᵢ| ≤ τ nothing does.", W, H);
  const descent = picture("Each entry from its start towards ξ(v, τ). Dashed: directions that end at exactly zero.", W, H);
  const result = outcome();

  const draw = () => {
    const v = model.get("v"), t = model.get("tau"), n = model.get("steps"), k = Math.min(model.get("step"), n);
    const rows = path(v, t, model.get("rho"), n, model.get("start"));
    const end = v.map((x) => soft(x, t)), now = rows[k];
    const high = Math.max(...v, model.get("start"), 0.1) * 1.08;
    const low = Math.min(...v, model.get("start"), 0) * 1.15;
    step.input.max = n;
    tau.show(t, t.toFixed(2));
    step.show(k, String(k));
    spectrum.draw(bars(v, t, low, high), `Bars: ${rank(end)} of ${v.length} directions survive the threshold ${t.toFixed(2)}`);
    descent.draw(lines(rows, end, k, low, high), `Paths: ${rank(now)} of ${v.length} entries are not zero after ${k} steps`);
    result.textContent = `τ = ${t.toFixed(2)}: ${rank(end)} of ${v.length} directions survive, ` +
      `so rank ‖ξ(v, τ)‖₀ = ${rank(end)} and nuclear norm Σ|ξ(vᵢ, τ)| = ${nuclear(end).toFixed(2)} ` +
      `(before: ${nuclear(v).toFixed(2)}). After ${k} proximal steps: rank ${rank(now)}, nuclear norm ${nuclear(now).toFixed(2)}.`;
  };
  const send = (name, input) => input.addEventListener("input", () => { model.set(name, Number(input.value)); model.save_changes(); });
  send("tau", tau.input);
  send("step", step.input);
  const events = ["v", "tau", "step", "steps", "rho", "start"].map((name) => "change:" + name);
  events.forEach((event) => model.on(event, draw));

  el.replaceChildren(dress(el, "fl-st", CSS), row(tau.box, step.box), row(spectrum.box, descent.box), result);
  draw();
  return () => events.forEach((event) => model.off(event, draw));
}

export default { render, math: { soft, rank, nuclear, path } };
