// Noise in B A: the energies of N_B A, B N_A and N_B N_A after K noisy steps of four schedules, and one entry's density.

const M = 64, N = 64, RANKS = [2, 4, 8, 16, 32]; // as in product_noise.py
const ARMS = [ // name, steps of B and of A when K is given, factor on both variances
  ["K steps of both", (K) => K, 1], ["K alternating", (K) => K / 2, 1], ["K/2 of both", (K) => K / 2, 1],
  ["K/2 of both, σ/√2", (K) => K / 2, 0.5],
];
// [m T σ_B² |A|², n T σ_A² |B|², m n r T σ_B² T σ_A²] after T noisy steps of each factor
const terms = ({ sigma_B, sigma_A, norm_B, norm_A, rank }, T, factor = 1) => {
  const b = factor * T * sigma_B ** 2, a = factor * T * sigma_A ** 2;
  return [M * b * norm_A ** 2, N * a * norm_B ** 2, M * N * rank * b * a];
};
const sum = (list) => list.reduce((total, x) => total + x, 0);
const arms = (state) => ARMS.map(([name, steps, factor]) => ({ name, terms: terms(state, steps(state.steps), factor) }));
const signal = ({ norm_B, norm_A, rank }) => (norm_B ** 2 * norm_A ** 2) / rank;
// Density at z of (1 / sqrt r) sum of r products of two standard normals: reverse Bessel polynomials, r even
const density = (z, rank) => {
  const x = Math.sqrt(rank) * Math.abs(z), n = rank / 2 - 1;
  let before = 1, now = n === 0 ? 1 : x + 1, scale = 2;
  for (let k = 2; k <= n; k++) [before, now] = [now, (2 * k - 1) * now + x * x * before];
  for (let k = 1; k <= n; k++) scale *= 2 * k;
  return (Math.sqrt(rank) * Math.exp(-x) * now) / scale;
};
const normal = (z) => Math.exp((-z * z) / 2) / Math.sqrt(2 * Math.PI);

const CSS = `
.fl-pn .fl-0 { fill: var(--fl-accent); }
.fl-pn .fl-1 { fill: var(--fl-accent); opacity: 0.45; }
.fl-pn .fl-2 { fill: var(--fl-hot); }
.fl-pn .fl-hot { fill: none; stroke: var(--fl-hot); stroke-width: 2; }
.fl-pn .fl-dot { fill: currentColor; }
`;

const W = 230, H = 170, LEFT = 30, RIGHT = 8, TOP = 14, BOTTOM = 34, FLOOR = H - BOTTOM;
const curve = (name, points) => `<polyline class="${name}" points="${points.map(([x, y]) => `${px(x)},${px(y)}`).join(" ")}"/>`;
const axes = (xLabel) => line("fl-axis", LEFT, TOP, LEFT, FLOOR) + line("fl-axis", LEFT, FLOOR, W - RIGHT, FLOOR) +
  text((LEFT + W - RIGHT) / 2, H - 3, xLabel);
const short = (x) => String(Number(x.toPrecision(3)));

// One bar an arm, its three terms on end
function bars(list) {
  const most = Math.max(...list.map(({ terms: e }) => sum(e)), 1e-12), slot = (H - 4) / list.length;
  return list.map(({ name, terms: e }, i) => {
    let x = 2;
    const y = i * slot, total = sum(e), wide = (W - 60) / most;
    const parts = e.map((value, k) => {
      const rect = `<rect class="fl-${k}" x="${px(x)}" y="${px(y + 17)}" width="${px(value * wide)}" height="16"/>`;
      x += value * wide;
      return rect;
    }).join("");
    return text(2, y + 12, name, "start") + parts + text(x + 5, y + 30, short(total), "start");
  }).join("");
}

// Totals against steps: both factors, and one at a time. Half the steps of both are as high as all of the other.
function course(state) {
  const K = state.steps, top = Math.max(sum(terms(state, K)), 1e-12);
  const x = (k) => LEFT + (k / K) * (W - LEFT - RIGHT), y = (v) => FLOOR - (v / top) * (FLOOR - TOP);
  const run = (T, e = sum) => Array.from({ length: 41 }, (_, i) => [x((i * K) / 40), y(e(terms(state, T((i * K) / 40))))]);
  const level = y(sum(terms(state, K / 2)));
  return axes("step") + text(LEFT - 5, TOP + 4, short(top), "end") + [0, K / 2, K].map((k) => text(x(k), FLOOR + 15, k)).join("") +
    curve("fl-was", run((k) => k, (e) => e[0] + e[1])) + curve("fl-hot", run((k) => k)) + curve("fl-now", run((k) => k / 2)) +
    line("fl-was", x(K / 2), level, x(K), level) + [K / 2, K].map((k) => `<circle class="fl-dot" cx="${px(x(k))}" cy="${px(level)}" r="4"/>`).join("");
}

// log10 of the density of an entry of N_B N_A at unit variance, and of a normal one
function tails(rank) {
  const x = (z) => LEFT + ((z + 5) / 10) * (W - LEFT - RIGHT), y = (d) => FLOOR - (1 + Math.max(-6, Math.log10(d)) / 6) * (FLOOR - TOP);
  const run = (f) => Array.from({ length: 81 }, (_, i) => i / 8 - 5).map((z) => [x(z), y(f(z))]);
  return axes("standard deviations") + [[1, "1"], [1e-3, "10⁻³"], [1e-6, "10⁻⁶"]].map(([d, words]) => text(LEFT - 4, y(d) + 4, words, "end")).join("") +
    [-5, 0, 5].map((z) => text(x(z), FLOOR + 15, z)).join("") + curve("fl-was", run(normal)) + curve("fl-hot", run((z) => density(z, rank)));
}

const cells = (list, size) => "<thead><tr><th></th><th>N_B A</th><th>B N_A</th><th>N_B N_A</th><th>total</th><th>signal / noise</th></tr></thead>" +
  list.map(({ name, terms: e }) => `<tr><th scope="row">${name}</th>` + [...e, sum(e), size / sum(e)].map((x) =>
    `<td>${Number.isFinite(x) ? x.toFixed(3) : "∞"}</td>`).join("") + "</tr>").join("");

function render({ model, el }) {
  const sliders = {
    sigma_B: slider("noise of one step on B, σ_B", 0, 0.1, 0.005), sigma_A: slider("on A, σ_A", 0, 0.1, 0.005),
    rank: slider("rank r", 0, RANKS.length - 1, 1), norm_B: slider("norm of B", 0, 4, 0.25), norm_A: slider("norm of A", 0, 4, 0.25),
    steps: slider("local steps K", 2, 40, 2),
  }, names = Object.keys(sliders);
  const stacked = picture("Energy by term. Blue: N_B A; pale: B N_A; red: N_B N_A.", W, H);
  const growth = picture("Total after each step. Red: both factors at every step (dashed: without N_B N_A); blue: one at a time. The dots are level.", W, H);
  const shape = picture("Density of one entry of N_B N_A (red) and of a normal one of equal variance (dashed), logarithmic.", W, H);
  const result = outcome(), table = document.createElement("table");

  const draw = () => {
    const state = Object.fromEntries(names.map((name) => [name, model.get(name)])), list = arms(state), size = signal(state);
    const totals = list.map(({ name, terms: e }) => `${name} ${sum(e).toFixed(3)}`).join(", ");
    for (const name of names) sliders[name].show(name === "rank" ? RANKS.indexOf(state.rank) : state[name], String(state[name]));
    stacked.draw(bars(list), `Bars of noise energy: ${totals}`);
    growth.draw(course(state), `Energy after ${state.steps} steps: both factors ${short(sum(list[0].terms))}, alternating ${short(sum(list[1].terms))}`);
    shape.draw(tails(state.rank), `Density at rank ${state.rank}: ${short(density(4, state.rank) / normal(4))} times a normal one at four standard deviations`);
    table.innerHTML = cells(list, size);
    result.textContent = `σ_B = ${state.sigma_B}, σ_A = ${state.sigma_A}, ‖B‖ = ${state.norm_B}, ‖A‖ = ${state.norm_A}, r = ${state.rank}, ` +
      `K = ${state.steps}. Noise in BA: ${totals}. Signal ‖B‖²‖A‖²/r = ${size.toFixed(3)}.`;
  };
  for (const name of names) sliders[name].input.addEventListener("input", ({ target }) => {
    model.set(name, name === "rank" ? RANKS[target.value] : Number(target.value));
    model.save_changes();
  });
  const events = names.map((name) => "change:" + name);
  events.forEach((event) => model.on(event, draw));

  el.replaceChildren(dress(el, "fl-pn", CSS), row(...names.map((name) => sliders[name].box)), row(stacked.box, growth.box, shape.box), table, result);
  draw();
  return () => events.forEach((event) => model.off(event, draw));
}

export default { render, math: { arms, terms, signal, density, normal } };
