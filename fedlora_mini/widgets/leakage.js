// Subspace leakage: sites that share B and keep A, one round of local steps, and what the averaged B has taken along.

// As in leakage.py: B_0 and A_0 are orthonormal, so an m x n change D A_0 is D, and B_0 dA is X in its first r rows.
const M = 12, RANKS = 4, RATE = 0.1, STEPS = 20, TINY = 1e-16;
const LAMBDAS = [0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10];
const dot = (x, y) => x.reduce((sum, xi, i) => sum + xi * y[i], 0);
const times = (c, x) => x.map((xi) => c * xi);
const plus = (x, c, y) => x.map((xi, i) => xi + c * y[i]);
const norm = (x) => Math.sqrt(dot(x, x));
const unit = (x) => times(1 / norm(x), x);
const mean = (rows) => rows.reduce((sum, x) => plus(sum, 1 / rows.length, x), times(0, rows[0]));

// Every site's private change and its target for the shared one, as vectors of m r numbers; |both| = 1, angle theta.
const problem = ({ theta, rank: r, sites: K, common, private: own }) => {
  const cells = Array.from({ length: M * r }, (_, i) => [Math.floor(i / r), i % r]), angle = (theta * Math.PI) / 180;
  const all = cells.map(([i, j]) => common[i * RANKS + j]);
  return Array.from({ length: K }, (_, k) => {
    const p = unit(cells.map(([i, j]) => (i < r ? own[(k * RANKS + i) * RANKS + j] : 0)));
    return { p, target: plus(times(Math.cos(angle), p), Math.sin(angle), unit(plus(all, -dot(all, p), p))) };
  });
};
const cos2 = (D, p) => (dot(D, D) < TINY ? 0 : dot(D, p) ** 2 / dot(D, D));
// The gradient of cos²(D, p) in D: of size 1 / |D|, and across D.
const slope = (D, p) => {
  const size = dot(D, D), along = dot(D, p);
  return size < TINY ? times(0, D) : times((2 * along) / size, plus(p, -along / size, D));
};
// D <- D - rate (D - target + lam slope): row k holds every site's D = B - B_0 after k steps
const round = (sites, lam) => {
  const rows = [sites.map(({ p }) => times(0, p))];
  for (let k = 0; k < STEPS; k++) rows.push(rows[k].map((D, i) =>
    plus(plus(D, -RATE, plus(D, -1, sites[i].target)), -RATE * lam, slope(D, sites[i].p))));
  return rows;
};
const orthonormal = (vectors) => {
  const basis = [], large = Math.max(...vectors.map(norm));
  for (const v of vectors) {
    let rest = v;
    for (let pass = 0; pass < 2; pass++) for (const q of basis) rest = plus(rest, -dot(rest, q), q);
    if (norm(rest) > 1e-6 * large) basis.push(unit(rest));
  }
  return basis;
};
// Eigenvalues of a small symmetric matrix, largest first: Jacobi's rotations.
const eigenvalues = (S) => {
  const A = S.map((row) => [...row]), n = A.length;
  for (let sweep = 0; sweep < 12; sweep++) for (let p = 0; p < n; p++) for (let q = p + 1; q < n; q++) {
    const t = 0.5 * Math.atan2(2 * A[p][q], A[q][q] - A[p][p]), c = Math.cos(t), s = Math.sin(t);
    for (let k = 0; k < n; k++) [A[k][p], A[k][q]] = [c * A[k][p] - s * A[k][q], s * A[k][p] + c * A[k][q]];
    for (let k = 0; k < n; k++) [A[p][k], A[q][k]] = [c * A[p][k] - s * A[q][k], s * A[p][k] + c * A[q][k]];
  }
  return A.map((row, i) => row[i]).sort((a, b) => b - a);
};
// M2 (mean of the sites), M3, the squared cosines of M4 and the norm, of one row of `round`
const metrics = (sites, Ds, r) => {
  const D = mean(Ds), size = dot(D, D), spans = orthonormal(sites.map(({ p }) => p));
  const columns = Array.from({ length: r }, (_, j) => D.filter((_, i) => i % r === j));
  const tops = size < TINY ? [] : orthonormal(columns).map((q) => q.slice(0, r));
  const cosines = eigenvalues(tops.map((a) => tops.map((b) => dot(a, b)))).map((x) => Math.min(1, Math.max(0, x)));
  return {
    leak_cos2: dot(Ds.map((d, k) => cos2(d, sites[k].p)), Ds.map(() => 1 / Ds.length)),
    leak_explained: size < TINY ? 0 : spans.reduce((sum, q) => sum + dot(D, q) ** 2, 0) / size,
    overlap: cosines.length ? cosines.reduce((sum, x) => sum + x, 0) / cosines.length : 0, cosines, drift: Math.sqrt(size),
  };
};
// What they are in the mean for a random D
const chance = ({ rank: r, sites: K }) => ({ leak_cos2: 1 / (M * r), leak_explained: Math.min(K, r * r) / (M * r), overlap: r / M });

const CSS = `
.fl-sl .fl-own { stroke: var(--fl-hot); stroke-width: 3; }
.fl-sl .fl-luck { stroke: currentColor; stroke-dasharray: 1 4; stroke-linecap: round; stroke-width: 1.5; }
.fl-sl .fl-dot { fill: var(--fl-accent); }
`;

const W = 230, H = 170, LEFT = 30, RIGHT = 8, TOP = 14, BOTTOM = 34, FLOOR = H - BOTTOM;
const degrees = (c) => (Math.acos(Math.sqrt(c)) * 180) / Math.PI;
const angles = (list) => list.map((c) => `${degrees(c).toFixed(0)}°`).join(", ");

// One fan for every principal angle: the private direction lies, the shared one stands at its angle to it.
function fans(was, now, luck) {
  const slot = W / Math.max(2, now.length), length = Math.min(slot - 10, FLOOR - TOP);
  const ray = (name, i, c) => line(name, i * slot + 2, FLOOR, i * slot + 2 + length * Math.sqrt(c), FLOOR - length * Math.sqrt(1 - c));
  return now.map((c, i) => ray("fl-own", i, 1) + ray("fl-luck", i, luck) + (was[i] === undefined ? "" : ray("fl-was", i, was[i])) +
    ray("fl-now", i, c) + text(i * slot + 2 + length / 2, FLOOR + 17, `${degrees(c).toFixed(0)}°`)).join("");
}

// The averaged drift as a vector: along the span of the sites' private changes, and across it.
function split(was, now, luck) {
  const size = (FLOOR - TOP) / Math.max(was.drift, now.drift, 0.1), [ox, oy] = [LEFT + 20, FLOOR];
  const tip = ({ drift, leak_explained: e }) => [ox + size * drift * Math.sqrt(e), oy - size * drift * Math.sqrt(Math.max(0, 1 - e))];
  const [[x, y], [x0, y0]] = [tip(now), tip(was)], far = 0.95 * (FLOOR - TOP);
  return line("fl-axis", ox, oy, W - RIGHT, oy) + line("fl-axis", ox, oy, ox, TOP) +
    line("fl-luck", ox, oy, ox + far * Math.sqrt(luck), oy - far * Math.sqrt(1 - luck)) + line("fl-was", ox, oy, x0, y0) +
    line("fl-was", x, y, x, oy) + line("fl-own", ox, oy, x, oy) + line("fl-now", ox, oy, x, y) +
    `<circle class="fl-dot" cx="${px(x)}" cy="${px(y)}" r="4"/>` + text(x + 8, y + 4, now.drift.toFixed(2), "start") +
    text(W - RIGHT, oy + 17, "in the sites' span", "end") + text(ox - 6, TOP + 8, "rest", "end");
}

// leak_cos2 after every step, and where the round stands
function curves(was, now, step) {
  const x = (k) => LEFT + (k / STEPS) * (W - LEFT - RIGHT), y = (v) => FLOOR - v * (FLOOR - TOP);
  const path = (name, v) => `<polyline class="${name}" points="${v.map((c, k) => (k ? `${px(x(k))},${px(y(c))}` : "")).join(" ").trim()}"/>`;
  return [0, 0.5, 1].map((v) => line("fl-axis", LEFT - 4, y(v), LEFT, y(v)) + text(LEFT - 7, y(v) + 4, v, "end")).join("") +
    line("fl-axis", LEFT, TOP, LEFT, FLOOR) + line("fl-axis", LEFT, FLOOR, W - RIGHT, FLOOR) +
    [1, 5, 10, 15, 20].map((k) => text(x(k), FLOOR + 15, k)).join("") + text((LEFT + W) / 2, H - 3, "local step") +
    line("fl-axis", x(step), TOP, x(step), FLOOR) + path("fl-was", was) + path("fl-now", now) +
    `<circle class="fl-dot" cx="${px(x(step))}" cy="${px(y(now[step]))}" r="4"/>`;
}

const ROWS = [["leak_cos2", "leak_cos2, mean of sites"], ["leak_explained", "leak_explained"], ["overlap", "overlap of columns"],
  ["drift", "norm of the averaged drift"]];
const cells = (now, was, luck) => "<thead><tr><th></th><th>with SOR</th><th>without</th><th>by chance</th></tr></thead>" +
  ROWS.map(([name, title]) => `<tr><th scope="row">${title}</th>` + [now, was, luck].map((m) =>
    `<td>${m[name] === undefined ? "" : m[name].toFixed(3)}</td>`).join("") + "</tr>").join("");

function render({ model, el }) {
  const names = ["theta", "rank", "sites", "lam", "step"];
  const sliders = {
    theta: slider("angle θ between private and shared change", 5, 90, 5), rank: slider("rank r", 1, RANKS, 1),
    sites: slider("sites K", 2, 8, 1), lam: slider("SOR weight λ", 0, LAMBDAS.length - 1, 1),
    step: slider("local steps", 1, STEPS, 1),
  };
  const fan = picture("Principal angles of the columns. Red: a private direction; above it the nearest one of the averaged shared change.", W, H);
  const drift = picture("The averaged drift. Red: its part in the span of the sites' private changes.", W, H);
  const course = picture("leak_cos2 during the round, mean of the sites.", W, H);
  const result = outcome(), note = document.createElement("p"), table = document.createElement("table");
  note.className = "fl-result";
  note.textContent = "Dashed: without SOR. Dotted rays: a random change of the shared factor.";

  const draw = () => {
    const state = Object.fromEntries([...names, "common", "private"].map((name) => [name, model.get(name)]));
    const { theta, rank, sites: K, lam, step } = state, sites = problem(state), luck = chance(state);
    const [was, now] = [0, lam].map((weight) => round(sites, weight));
    const [a, b] = [was, now].map((rows) => metrics(sites, rows[step], rank));
    const [c0, c] = [was, now].map((rows) => rows.map((Ds) => metrics(sites, Ds, rank).leak_cos2));
    const near = LAMBDAS.reduce((best, x, i) => (Math.abs(x - lam) < Math.abs(LAMBDAS[best] - lam) ? i : best), 0);
    sliders.theta.show(theta, `${theta}°`);
    sliders.lam.show(near, String(lam));
    for (const name of ["rank", "sites", "step"]) sliders[name].show(state[name], String(state[name]));
    fan.draw(fans(a.cosines, b.cosines, luck.overlap), `Principal angles ${angles(b.cosines)}; without SOR ${angles(a.cosines)}`);
    drift.draw(split(a, b, luck.leak_explained), `A vector of norm ${b.drift.toFixed(2)}, ${(100 * b.leak_explained).toFixed(0)} % of its square in the sites' span`);
    course.draw(curves(c0, c, step), `leak_cos2 after step ${step}: ${c[step].toFixed(3)}; without SOR ${c0[step].toFixed(3)}`);
    table.innerHTML = cells(b, a, luck);
    result.textContent = `θ = ${theta}°, r = ${rank}, K = ${K}, λ = ${lam}, local steps: ${step}. ` +
      `leak_cos2 ${b.leak_cos2.toFixed(3)}, leak_explained ${b.leak_explained.toFixed(3)}, overlap ${b.overlap.toFixed(3)}, drift ${b.drift.toFixed(3)}.`;
  };
  for (const name of names) sliders[name].input.addEventListener("input", ({ target }) => {
    model.set(name, name === "lam" ? LAMBDAS[target.value] : Number(target.value));
    model.save_changes();
  });
  const events = [...names, "common", "private"].map((name) => "change:" + name);
  events.forEach((event) => model.on(event, draw));

  el.replaceChildren(dress(el, "fl-sl", CSS), row(...names.map((name) => sliders[name].box)), row(fan.box, drift.box, course.box), note, table, result);
  draw();
  return () => events.forEach((event) => model.off(event, draw));
}

export default { render, math: { problem, round, metrics, chance } };
