// What plots are made of: scales with round numbers, and lines. For the dashboard's charts, and for the
// reports of `meshserve bench`. All is SVG whose colours are the page's CSS: one picture is right in
// light, in dark and on paper.

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// 1, 2, 5 or 10 times a power of ten: the least that is not below the value.
export function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((end) => end >= value * 0.999);
}

// About five multiples of a round number.
function linearTicks(low, high) {
  const step = roundUp((high - low) / 5);
  const first = Math.ceil(low / step - 1e-9);
  const count = Math.floor(high / step + 1e-9) - first + 1;
  return Array.from({ length: count }, (_, rank) => Number(((first + rank) * step).toPrecision(12)));
}

// 1, 2 and 5 times powers of ten, or powers alone where those would be many; even steps where all is of
// one magnitude.
function logTicks(low, high) {
  if (high / low < 8) return linearTicks(low, high);
  const factors = high / low < 2000 ? [1, 2, 5] : [1];
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    found.push(...factors.map((factor) => Number((factor * 10 ** power).toPrecision(12))));
  }
  return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
}

// From values to a place between 0, the low end, and 1, the high one.
export class Scale {
  constructor(low, high, label = "", isLog = false) {
    Object.assign(this, { low, high, label, isLog });
  }

  // With room for all these values.
  static around(values, label, { isLog = false, isFromZero = true } = {}) {
    let known = values.filter((value) => Number.isFinite(value) && (value > 0 || !isLog));
    if (!known.length) known = [1];
    const low = known.reduce((one, other) => Math.min(one, other));
    const high = known.reduce((one, other) => Math.max(one, other));
    if (isLog) return new Scale(low / 1.1, Math.max(high, low * 1.5) * 1.1, label, true);
    const begin = isFromZero ? Math.min(0, low) : low;
    const margin = (high - begin) * 0.05 || Math.abs(high) * 0.05 || 1;
    return new Scale(isFromZero ? begin : begin - margin, high + margin, label);
  }

  place(value) {
    if (!this.isLog) return (value - this.low) / (this.high - this.low);
    return Math.log(Math.max(value, this.low) / this.low) / Math.log(this.high / this.low);
  }

  ticks() {
    const found = this.isLog ? logTicks(this.low, this.high) : linearTicks(this.low, this.high);
    return found.length ? found : [this.low, this.high];
  }
}

// A line's parts between points that are not there: those with a coordinate that is null or no number.
export function stretches(points) {
  const found = [[]];
  for (const point of points) {
    if (point.every(Number.isFinite)) found.at(-1).push(point);
    else found.push([]);
  }
  return found.filter((stretch) => stretch.length);
}

// The path through the points of a stretch, in pixels; a point alone is a dot, as line ends are round.
export function pathOf(stretch, isStepped = false) {
  const tenths = (pixels) => Math.round(pixels * 10) / 10;
  const [[left, top], ...others] = stretch.map((point) => point.map(tenths));
  const steps = others.map(([x, y]) => (isStepped ? `H${x}V${y}` : `L${x} ${y}`));
  return `M${left} ${top}${steps.join("") || "h0"}`;
}
