// The last minute in four small charts, a point a second.

import { count, duration, setText } from "./dom.js";
import { pathOf, roundUp, stretches, svg } from "./plot.js";

const SPAN_S = 60;
const [TOP, BOTTOM, RIGHT] = [15.5, 1.5, 4];
const KINDS = {
  queued: { least: 4, words: (value) => count(value) },
  ttft_ms: { least: 1, words: duration },
  itl_ms: { least: 1, words: duration },
  cached: { least: 1, most: 1, words: (value) => `${Math.round(value * 100)} %` },
};

export class Charts {
  constructor(store) {
    this.store = store;
    this.figures = [...document.querySelectorAll("[data-chart]")].map((figure) => ({
      name: figure.dataset.chart,
      picture: figure.querySelector("svg"),
      value: figure.querySelector("b"),
      title: figure.querySelector("figcaption").firstChild.textContent.trim(),
    }));
    store.addEventListener("point", () => this.draw());
    const observer = new ResizeObserver(() => this.draw());
    for (const { picture } of this.figures) observer.observe(picture);
  }

  draw() {
    for (const figure of this.figures) this.drawOne(figure);
  }

  drawOne({ name, picture, value, title }) {
    const kind = KINDS[name];
    const numbers = this.store.points.slice(-SPAN_S).map((point) => point[name]);
    const known = numbers.filter((number) => number !== null);
    const now = known.length ? kind.words(known.at(-1)) : null;
    setText(value, now ?? "–");
    picture.setAttribute("aria-label", `${title}, the last minute; now ${now ?? "nothing measured"}`);
    const [width, height] = [picture.clientWidth, picture.clientHeight];
    if (!width || document.hidden) return;
    const end = kind.most ?? roundUp(Math.max(kind.least, ...known));
    const points = numbers.map((number, rank) => [
      width - RIGHT - ((numbers.length - 1 - rank) * (width - RIGHT)) / (SPAN_S - 1),
      number === null ? null : height - BOTTOM - (Math.min(number, end) / end) * (height - TOP - BOTTOM),
    ]);
    picture.replaceChildren(...this.grid(width, height, kind.words(end)), ...this.line(points, height));
  }

  grid(width, height, words) {
    const lines = [14, Math.round((height + 14) / 2) - 0.5, height - 0.5].map((y) => `M0 ${y}H${width}`);
    return [
      svg("path", { class: "grid", d: lines.join("") }),
      svg("text", { y: 10 }, `${SPAN_S} s`),
      svg("text", { x: width, y: 10, "text-anchor": "end" }, words),
    ];
  }

  line(points, height) {
    const drawn = stretches(points).flatMap((stretch) => [
      svg("path", { class: "area", d: `${pathOf(stretch)}V${height - 1}H${stretch[0][0]}Z` }),
      svg("path", { class: "line", d: pathOf(stretch) }),
    ]);
    const last = points.at(-1);
    // the second that is now, if it has a value, stands out
    return last?.[1] ? [...drawn, svg("circle", { cx: last[0], cy: last[1], r: 3 })] : drawn;
  }
}
