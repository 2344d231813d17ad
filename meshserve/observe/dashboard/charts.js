// The last minute in four small charts, a point a second.

import { count, duration, setText } from "./dom.js";

const SPAN_S = 60;
const KINDS = {
  queued: { tone: "--ticket", least: 4, words: (value) => count(value) },
  ttft_ms: { tone: "--prompt", least: 1, words: duration },
  itl_ms: { tone: "--tokens", least: 1, words: duration },
  cached: { tone: "--blocks", least: 1, most: 1, words: (value) => `${Math.round(value * 100)} %` },
};

// The end of a scale: 1, 2 or 5 times a power of ten.
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((end) => end >= value * 0.999);
}

export class Charts {
  constructor(store) {
    this.store = store;
    this.figures = [...document.querySelectorAll("[data-chart]")].map((figure) => ({
      name: figure.dataset.chart,
      canvas: figure.querySelector("canvas"),
      value: figure.querySelector("b"),
      title: figure.querySelector("figcaption").firstChild.textContent.trim(),
    }));
    store.addEventListener("point", () => this.draw());
    const observer = new ResizeObserver(() => this.draw());
    for (const { canvas } of this.figures) observer.observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  draw() {
    const style = getComputedStyle(document.documentElement);
    for (const figure of this.figures) this.drawOne(figure, style);
  }

  drawOne({ name, canvas, value, title }, style) {
    const kind = KINDS[name];
    const points = this.store.points.slice(-SPAN_S);
    const known = points.map((point) => point[name]).filter((number) => number !== null);
    const last = known.length ? known.at(-1) : null;
    setText(value, last === null ? "–" : kind.words(last));
    canvas.setAttribute("aria-label", `${title}, the last minute; now ${last === null ? "nothing measured" : kind.words(last)}`);
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || document.hidden) return;
    const scale = Math.min(2, devicePixelRatio || 1);
    if (canvas.width !== Math.round(width * scale)) canvas.width = Math.round(width * scale);
    if (canvas.height !== Math.round(height * scale)) canvas.height = Math.round(height * scale);
    const context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    const end = kind.most ?? roundUp(Math.max(kind.least, ...known));
    this.drawScale(context, width, height, kind.words(end), style);
    this.drawLine(context, points, name, width, height, end, style.getPropertyValue(kind.tone).trim());
  }

  drawScale(context, width, height, words, style) {
    context.strokeStyle = style.getPropertyValue("--line").trim();
    context.lineWidth = 1;
    context.beginPath();
    for (const y of [14.5, (height + 14) / 2, height - 0.5]) {
      context.moveTo(0, Math.round(y) - 0.5);
      context.lineTo(width, Math.round(y) - 0.5);
    }
    context.stroke();
    context.fillStyle = style.getPropertyValue("--muted").trim();
    context.font = `${parseFloat(style.fontSize) * 0.72}px ${style.getPropertyValue("--sans").trim()}`;
    context.textBaseline = "alphabetic";
    context.textAlign = "right";
    context.fillText(words, width, 10);
    context.textAlign = "left";
    context.fillText("60 s", 0, 10);
  }

  drawLine(context, points, name, width, height, end, colour) {
    const x = (rank) => width - 4 - ((points.length - 1 - rank) * (width - 4)) / (SPAN_S - 1);
    const y = (number) => height - 1.5 - (Math.min(number, end) / end) * (height - 17);
    context.strokeStyle = context.fillStyle = colour;
    context.lineWidth = 2;
    context.lineJoin = "round";
    let began = null;
    const close = (lastX, lastY) => {
      if (lastX - began < 1) context.arc(lastX, lastY, 1.5, 0, 2 * Math.PI); // a lone second, between seconds without a measurement
      context.stroke();
      context.globalAlpha = 0.12;
      context.lineTo(lastX, height - 1);
      context.lineTo(began, height - 1);
      context.fill();
      context.globalAlpha = 1;
      began = null;
    };
    points.forEach((point, rank) => {
      const number = point[name];
      if (number === null) {
        if (began !== null) close(x(rank - 1), y(points[rank - 1][name]));
        return;
      }
      if (began === null) {
        began = x(rank);
        context.beginPath();
        context.moveTo(began - 1, y(number));
      }
      context.lineTo(x(rank), y(number));
    });
    const last = points.at(-1)?.[name];
    if (began !== null) close(x(points.length - 1), y(last));
    if (last === null || last === undefined) return;
    context.beginPath();
    context.arc(x(points.length - 1), y(last), 3, 0, 2 * Math.PI);
    context.fill();
  }
}
