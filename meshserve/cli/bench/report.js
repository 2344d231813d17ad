// The plots of a report: which there are, by what was run, and how they are drawn. In the report this
// script stands in one element with the dashboard's plot.js, whose functions are used here.

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

// Four significant digits or so.
function show(value) {
  const digits = value < 10 ? 3 : value < 100 ? 2 : value < 10000 ? 1 : 0;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

// One picture with a legend. Things are drawn in the order in which they are added.
class Plot {
  constructor(title, x, y, height = 300) {
    Object.assign(this, { title, x, y, height, keys: new Map() });
    this.picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": title });
  }

  at([x, y]) {
    const [width, height] = [WIDTH - LEFT - RIGHT, this.height - TOP - BOTTOM];
    return [LEFT + this.x.place(x) * width, TOP + (1 - this.y.place(y)) * height];
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
    for (const part of parts) {
      this.path(`line ${colour}`, pathOf(part.map((point) => this.at(point)), isStepped));
    }
    return this.key(name, colour);
  }

  dot([x, y], radius, className, title = null) {
    const [cx, cy] = this.at([x, y]);
    const children = title === null ? [] : [svg("title", {}, title)];
    return this.add(svg("circle", { class: className, cx, cy, r: radius }, ...children));
  }

  // A title is shown under the pointer.
  dots(points, colour, name = "", titles = []) {
    points.forEach((point, rank) => {
      if (point.every(Number.isFinite)) this.dot(point, 3.5, `dot ${colour}`, titles[rank]);
    });
    return this.key(name, colour);
  }

  // A ring with words under it, or over it, on the side that has room.
  mark(point, words) {
    const [x, y] = this.at(point);
    const top = y < this.height - BOTTOM - 30 ? y + 24 : y - 14;
    const [left, anchor] = x > WIDTH * 0.6 ? [x - 10, "end"] : [x + 10, "start"];
    return this.dot(point, 8, "ring").text(words, left, top, anchor, { class: "word" });
  }

  figure() {
    const keys = [...this.keys].map(([name, colour]) => element("span", `key ${colour}`, name));
    const caption = element("figcaption", "", element("b", "", this.title), ...keys);
    return element("figure", "", caption, this.picture);
  }
}

// The values of one axis, 0 or 1, of the points of all lines.
const along = (axis, lines) => lines.flat().map((point) => point[axis]);

// Cumulative: [name, points] for each line, whose points are milliseconds and the share of all up to that.
function distribution(title, lines) {
  const known = lines.filter(([, points]) => points?.length);
  const x = Scale.around(along(0, known.map(([, points]) => points)), "ms", { isLog: true });
  const y = new Scale(0, 1, "share of all");
  const plot = new Plot(`${title}: distribution`, x, y);
  plot.axes(y.ticks().map((tick) => [tick, `${round(tick * 100)} %`]));
  known.forEach(([name, points], rank) => {
    const colour = COLOURS[rank % COLOURS.length] + (rank < COLOURS.length ? "" : " again");
    plot.line([[points[0][0], 0], ...points], colour, name, true);
  });
  return plot;
}

// A plot for each kind of time that any of them has: without a stream there are no gaps.
function distributions() {
  const all = report.distributions;
  const kinds = KINDS.filter((kind) => all.some(({ times }) => times[kind]));
  const lines = (kind) => all.map(({ name, times }) => [name, times[kind]]);
  return kinds.map((kind) => distribution(report.labels[kind], lines(kind)));
}

// What each second brought: [name, field, colour] for each line.
function bySecond(title, unit, seconds, lines, isLog = false) {
  const found = lines.map(([, field]) => seconds.map((second) => [second.second, second[field] ?? null]));
  const x = Scale.around([1, ...along(0, found)], "seconds");
  const plot = new Plot(title, x, Scale.around(along(1, found), unit, { isLog })).axes();
  lines.forEach(([name, , colour], rank) => plot.line(found[rank], colour, name));
  return plot;
}

// [name, points, titles] for each side.
function cloud(title, label, sides) {
  const [x, y] = [label, "E2E latency p50, ms"].map((words, axis) =>
    Scale.around(along(axis, sides.map(([, points]) => points)), words, { isFromZero: false }),
  );
  const plot = new Plot(title, x, y).axes();
  sides.forEach(([name, points, titles], rank) => plot.dots(points, COLOURS[rank], name, titles));
  return plot;
}

function plotsOfRun([run]) {
  // what came after the window, when no more was sent, is left out
  const seconds = run.timeline.filter(({ second }) => second < Math.max(1, run.window_s));
  const rates = [["due", "due", "c0"], ["answered", "requests", "c1"]];
  if (seconds.some(({ errors }) => errors)) rates.push(["failed", "errors", "c4"]);
  const times = [
    ["TTFT p50", "ttft_p50_ms", "c1"],
    ["TTFT max", "ttft_max_ms", "c2"],
    ["E2E latency p50", "e2e_p50_ms", "c3"],
    ["E2E latency max", "e2e_max_ms", "c4"],
  ];
  const [{ times: latencies }] = report.distributions;
  const answered = seconds.filter((second) => second.requests);
  const points = answered.map((second) => [second.requests, second.e2e_p50_ms]);
  const titles = answered.map(({ second }) => `second ${second}`);
  return [
    distribution("latencies", [...KINDS, "queue"].map((kind) => [report.labels[kind], latencies[kind]])),
    bySecond("requests in each second", "requests", seconds, rates),
    bySecond("latency in each second", "ms", seconds, times, true),
    cloud("throughput against latency, each second", "answers in a second", [["", points, titles]]),
  ];
}

function plotsOfSweep(runs) {
  const quantiles = ["p50", "p99"];
  const lines = quantiles.map((quantile) => runs.map((run) => [run.requests_per_s, run.e2e_ms[quantile] ?? null]));
  const x = Scale.around(along(0, lines), "requests/s");
  const y = Scale.around(along(1, lines), "E2E latency, ms", { isLog: true });
  const plot = new Plot("throughput against latency", x, y).axes();
  const labels = runs.map((run) => run.label);
  quantiles.forEach((quantile, rank) => {
    plot.line(lines[rank], COLOURS[rank], quantile).dots(lines[rank], COLOURS[rank], quantile, labels);
  });
  const { at, is_inside: isInside } = report.knee;
  plot.mark(lines[0][labels.indexOf(at)], isInside ? `knee: ${at}` : `${at}, no knee yet`);
  return [plot, ...distributions()];
}

// The interval of each figure's ratio of B to A.
function intervals(ratios) {
  const ends = ratios.flatMap(([, { low, high }]) => [low, high]);
  const x = Scale.around([1, ...ends], "B / A", { isLog: true });
  const y = new Scale(-0.6, ratios.length - 0.4);
  const plot = new Plot("B to A, with 95 % intervals", x, y, 60 + 26 * ratios.length);
  const short = (name) => name.replace("end-to-end", "e2e").replace("output tokens", "tokens");
  plot.axes(ratios.map(([name], row) => [row, short(name)]));
  plot.path("dashed", `M${plot.at([1, 0])[0]} ${TOP}V${plot.height - BOTTOM}`);
  ratios.forEach(([, { low, high, median }], row) => {
    const colour = low > 1 || high < 1 ? "c1" : "c0"; // those that differ stand out
    const [[left, top], [right]] = [plot.at([low, row]), plot.at([high, row])];
    plot.path(`thick ${colour}`, `M${left} ${top}H${Math.max(right, left + 1)}`);
    plot.dot([median, row], 4.5, `dot ${colour}`);
  });
  return plot;
}

// The runs of A and B stand in turn.
function plotsOfComparison(runs) {
  const ratios = Object.entries(report.ratios).reverse();
  const points = runs.map((run) => [run.requests_per_s, run.e2e_ms.p50 ?? null]);
  const sides = ["A", "B"].map((name, side) => [name, points.filter((_, turn) => turn % 2 === side)]);
  const turns = cloud("throughput against latency, each turn", "requests/s", sides);
  return [...(ratios.length ? [intervals(ratios)] : []), ...distributions(), turns];
}

// Where the time of a mesh's requests goes, as one bar.
function phases({ phases_ms: all = {}, receipts }) {
  const known = Object.entries(all).filter(([, value]) => value >= 0.0005);
  const total = known.reduce((sum, [, value]) => sum + value, 0);
  if (!total) return [];
  const [parts, keys] = [[], []];
  known.forEach(([phase, value], rank) => {
    const colour = COLOURS[rank % COLOURS.length];
    const part = element("span", `part ${colour}`);
    part.style.width = `${(value / total) * 100}%`;
    parts.push(part);
    keys.push(element("span", `key ${colour}`, `${phase.replaceAll("_", " ")} ${show(value)}`));
  });
  const count = `${receipts.toLocaleString("en")} receipt${receipts === 1 ? "" : "s"}`;
  const title = element("h2", "", `Where the time goes: ms, mean of ${count}`);
  return [title, element("div", "bar", ...parts), element("p", "keys", ...keys)];
}

const plotsOf = { run: plotsOfRun, sweep: plotsOfSweep, compare: plotsOfComparison };
if (report.kind === "run") document.getElementById("phases").append(...phases(report.runs[0]));
if (report.runs.some((run) => run.requests)) {
  const plots = plotsOf[report.kind](report.runs);
  document.getElementById("plots").append(...plots.map((plot) => plot.figure()));
}
