// The plots of a report, in one script with plot.js of the dashboard: which there are, by what was run, and how they are drawn.

const COLOURS = ["c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8"];
const KINDS = ["ttft", "itl", "e2e"];
const WIDTH = 560;
const [LEFT, RIGHT, TOP, BOTTOM] = [88, 14, 14, 44];
const report = JSON.parse(document.getElementById("figures").textContent);

function element(tag, className, ...children) {
  const made = Object.assign(document.createElement(tag), { className });
  made.append(...children);
  return made;
}

const round = (value) => value.toLocaleString("en", { maximumSignificantDigits: 6 });
const percent = (share) => `${round(share * 100)} %`;

// Four significant digits or so.
function show(value) {
  const digits = [[3, 10], [2, 100], [1, 10000], [0, Infinity]].find(([, limit]) => Math.abs(value) < limit)[0];
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

// One picture with a legend. Things are drawn in the order in which they are added.
class Plot {
  constructor(title, x, y, height = 300) {
    Object.assign(this, { title, x, y, height, keys: new Map() });
    this.picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": title });
  }

  at([x, y]) {
    return [LEFT + this.x.place(x) * (WIDTH - LEFT - RIGHT), TOP + (1 - this.y.place(y)) * (this.height - TOP - BOTTOM)];
  }

  add(...parts) {
    this.picture.append(...parts);
    return this;
  }

  path(className, d) {
    return this.add(svg("path", { class: className, d }));
  }

  text(words, x, y, anchor = "middle", attributes = {}) {
    return this.add(svg("text", { x, y, "text-anchor": anchor, ...attributes }, words));
  }

  // With [place, words] for each line of the grid that names the vertical axis.
  axes(names = this.y.ticks().map((tick) => [tick, round(tick)])) {
    const [bottom, right] = [this.height - BOTTOM, WIDTH - RIGHT];
    for (const tick of this.x.ticks()) {
      const [left] = this.at([tick, this.y.low]);
      this.path("grid", `M${left} ${TOP}V${bottom}`).text(round(tick), left, bottom + 16);
    }
    for (const [tick, words] of names) {
      const [, top] = this.at([this.x.low, tick]);
      this.path("grid", `M${LEFT} ${top}H${right}`).text(words, LEFT - 6, top + 4, "end");
    }
    this.text(this.x.label, (LEFT + right) / 2, this.height - 6);
    const middle = (TOP + bottom) / 2;
    return this.text(this.y.label, 12, middle, "middle", { transform: `rotate(-90 12 ${middle})` });
  }

  key(name, colour) {
    if (name) this.keys.set(name, colour);
    return this;
  }

  // Joined, except over points that are not there; stepped as a distribution is.
  line(points, colour, name, isStepped = false) {
    const parts = stretches(points);
    if (parts.flat().length === 1) return this.dots(parts.flat(), colour, name);
    for (const part of parts) this.path(`line ${colour}`, pathOf(part.map((point) => this.at(point)), isStepped));
    return this.key(name, colour);
  }

  // A title is shown under the pointer.
  dots(points, colour, name = "", titles = []) {
    points.forEach((point, rank) => {
      if (!point.every(Number.isFinite)) return;
      const [cx, cy] = this.at(point);
      this.add(svg("circle", { class: `dot ${colour}`, cx, cy, r: 3.5 }, ...(titles[rank] ? [svg("title", {}, titles[rank])] : [])));
    });
    return this.key(name, colour);
  }

  // A ring with words under it, or over it, on the side that has room.
  mark(point, words) {
    const [cx, cy] = this.at(point);
    const isRight = cx > WIDTH * 0.6;
    const y = cy < this.height - BOTTOM - 30 ? cy + 24 : cy - 14;
    return this.add(svg("circle", { class: "ring", cx, cy, r: 8 })).text(words, cx + (isRight ? -10 : 10), y, isRight ? "end" : "start", { class: "word" });
  }

  figure() {
    const keys = [...this.keys].map(([name, colour]) => element("span", `key ${colour}`, name));
    return element("figure", "", element("figcaption", "", element("b", "", this.title), ...keys), this.picture);
  }
}

// Cumulative: [name, points] for each line, whose points are milliseconds and the share of all up to that.
function distribution(title, lines) {
  const known = lines.filter(([, points]) => points?.length);
  const times = Scale.around(known.flatMap(([, points]) => points.map(([x]) => x)), "ms", { isLog: true });
  const shares = new Scale(0, 1, "share of all");
  const plot = new Plot(`${title}: distribution`, times, shares).axes(shares.ticks().map((tick) => [tick, percent(tick)]));
  known.forEach(([name, points], rank) => {
    const colour = COLOURS[rank % COLOURS.length] + (rank < COLOURS.length ? "" : " again");
    plot.line([[points[0][0], 0], ...points], colour, name, true);
  });
  return plot;
}

// A plot for each kind of time that any of them has: without a stream there are no gaps.
function distributions() {
  const kinds = KINDS.filter((kind) => report.distributions.some(({ times }) => times[kind]));
  return kinds.map((kind) => distribution(report.labels[kind], report.distributions.map(({ name, times }) => [name, times[kind]])));
}

// What each second brought: [name, field, colour] for each line.
function bySecond(title, unit, seconds, lines, isLog = false) {
  const found = lines.map(([name, field, colour]) => [name, colour, seconds.map((second) => [second.second, second[field] ?? null])]);
  const values = found.flatMap(([, , points]) => points.map(([, y]) => y));
  const x = Scale.around([1, ...seconds.map(({ second }) => second)], "seconds");
  const plot = new Plot(title, x, Scale.around(values, unit, { isLog })).axes();
  for (const [name, colour, points] of found) plot.line(points, colour, name);
  return plot;
}

// [name, points, titles] for each side.
function cloud(title, label, sides) {
  const known = sides.flatMap(([, points]) => points);
  const [x, y] = [[label, 0], ["E2E latency p50, ms", 1]].map(([words, axis]) => Scale.around(known.map((point) => point[axis]), words, { isFromZero: false }));
  const plot = new Plot(title, x, y).axes();
  sides.forEach(([name, points, titles], rank) => plot.dots(points, COLOURS[rank], name, titles));
  return plot;
}

function plotsOfRun([run]) {
  // what came after the window, when no more was sent, is left out
  const seconds = run.timeline.filter(({ second }) => second < Math.max(1, run.window_s));
  const rates = [["due", "due", "c0"], ["answered", "requests", "c1"], ["failed", "errors", "c4"]];
  const times = [["TTFT p50", "ttft_p50_ms"], ["TTFT max", "ttft_max_ms"], ["E2E latency p50", "e2e_p50_ms"], ["E2E latency max", "e2e_max_ms"]];
  const answered = seconds.filter((second) => second.requests);
  const points = answered.map((second) => [second.requests, second.e2e_p50_ms]);
  return [
    distribution("latencies", [...KINDS, "queue"].map((kind) => [report.labels[kind], report.distributions[0].times[kind]])),
    bySecond("requests in each second", "requests", seconds, seconds.some(({ errors }) => errors) ? rates : rates.slice(0, 2)),
    bySecond("latency in each second", "ms", seconds, times.map((line, rank) => [...line, COLOURS[rank]]), true),
    cloud("throughput against latency, each second", "answers in a second", [["", points, answered.map(({ second }) => `second ${second}`)]]),
  ];
}

function plotsOfSweep(runs) {
  const lines = ["p50", "p99"].map((quantile) => [quantile, runs.map((run) => [run.requests_per_s, run.e2e_ms[quantile] ?? null])]);
  const [x, y] = [0, 1].map((axis) => lines.flatMap(([, points]) => points.map((point) => point[axis])));
  const plot = new Plot("throughput against latency", Scale.around(x, "requests/s"), Scale.around(y, "E2E latency, ms", { isLog: true })).axes();
  lines.forEach(([name, points], rank) => plot.line(points, COLOURS[rank], name).dots(points, COLOURS[rank], name, runs.map((run) => run.label)));
  const { at, is_inside: isInside } = report.knee;
  const knee = lines[0][1][runs.findIndex((run) => run.label === at)];
  return [plot.mark(knee, isInside ? `knee: ${at}` : `${at}, no knee yet`), ...distributions()];
}

// The interval of each figure's ratio of B to A.
function intervals(ratios) {
  const x = Scale.around([1, ...ratios.flatMap(([, { low, high }]) => [low, high])], "B / A", { isLog: true });
  const plot = new Plot("B to A, with 95 % intervals", x, new Scale(-0.6, ratios.length - 0.4), 60 + 26 * ratios.length);
  const names = ratios.map(([name], row) => [row, name.replace("end-to-end", "e2e").replace("output tokens", "tokens")]);
  plot.axes(names).path("dashed", `M${plot.at([1, 0])[0]} ${TOP}V${plot.height - BOTTOM}`);
  ratios.forEach(([, { low, high, median }], row) => {
    const colour = low > 1 || high < 1 ? "c1" : "c0";
    const [[left, cy], [right], [cx]] = [low, high, median].map((value) => plot.at([value, row]));
    plot.path(`thick ${colour}`, `M${left} ${cy}H${Math.max(right, left + 1)}`).add(svg("circle", { class: `dot ${colour}`, cx, cy, r: 4.5 }));
  });
  return plot;
}

// The runs of A and B stand in turn.
function plotsOfComparison(runs) {
  const ratios = Object.entries(report.ratios).reverse();
  const points = runs.map((run) => [run.requests_per_s, run.e2e_ms.p50 ?? null]);
  const sides = ["A", "B"].map((name, side) => [name, points.filter((_, turn) => turn % 2 === side)]);
  return [...(ratios.length ? [intervals(ratios)] : []), ...distributions(), cloud("throughput against latency, each turn", "requests/s", sides)];
}

// Where the time of a mesh's requests goes, as one bar.
function phases({ phases_ms: all = {}, receipts }) {
  const known = Object.entries(all).filter(([, value]) => value >= 0.0005);
  const total = known.reduce((sum, [, value]) => sum + value, 0);
  if (!total) return [];
  const parts = known.map(([, value], rank) => {
    const part = element("span", `part ${COLOURS[rank % COLOURS.length]}`);
    part.style.width = `${(value / total) * 100}%`;
    return part;
  });
  const keys = known.map(([phase, value], rank) => element("span", `key ${COLOURS[rank % COLOURS.length]}`, `${phase.replaceAll("_", " ")} ${show(value)}`));
  const title = `Where the time goes: ms, mean of ${receipts.toLocaleString("en")} receipt${receipts === 1 ? "" : "s"}`;
  return [element("h2", "", title), element("div", "bar", ...parts), element("p", "keys", ...keys)];
}

if (report.kind === "run") document.getElementById("phases").append(...phases(report.runs[0]));
if (report.runs.some((run) => run.requests)) {
  const plots = { run: plotsOfRun, sweep: plotsOfSweep, compare: plotsOfComparison }[report.kind](report.runs);
  document.getElementById("plots").append(...plots.map((plot) => plot.figure()));
}
