// The list of requests, newest first: a sample of all, and every request that this page sent.

import { $, count, duration, el, keepOneInTabOrder, plural, roam, setText } from "./dom.js";

const MAX_ROWS = 40;
const PAUSE_MS = 500;
const MAX_AT_ONCE = 8;

export class Requests {
  constructor(store, onOpen) {
    Object.assign(this, { store, onOpen, rows: new Map(), room: MAX_AT_ONCE, roomAt: 0, dirty: new Set() });
    this.list = $("requests");
    roam(this.list);
    store.addEventListener("story", ({ detail }) => this.note(detail.story, detail.isNew));
    store.addEventListener("point", ({ detail }) => this.noteRate(detail));
    store.addEventListener("peers", () => this.rows.forEach((row) => this.dirtyLater(row.story)));
  }

  note(story, isNew) {
    if (!this.rows.has(story.id) && (story.isMine || (isNew && this.hasRoom()))) this.add(story);
    if (this.rows.has(story.id)) this.dirtyLater(story);
  }

  // All requests while there are few, two a second under load: nobody can read rows that rush by.
  hasRoom() {
    const now = performance.now();
    this.room = Math.min(MAX_AT_ONCE, this.room + (now - this.roomAt) / PAUSE_MS);
    this.roomAt = now;
    if (this.room < 1) return false;
    this.room -= 1;
    return true;
  }

  noteRate(point) {
    const shown = [...this.rows.values()].filter(({ story }) => performance.now() - story.arrived < 5000).length / 5;
    const isSome = point && point.requests_per_s > shown + 2;
    setText($("requests-note"), isSome ? `a few of ${count(point.requests_per_s)} a second` : "");
  }

  // Rows are written once a frame at most, however many events came.
  dirtyLater(story) {
    if (!this.dirty.size) requestAnimationFrame(() => this.render());
    this.dirty.add(story);
  }

  add(story) {
    const parts = { number: el("b"), tokens: el("span", { className: "row-tokens" }), path: el("span", { className: "row-path" }), time: el("span", { className: "row-time" }) };
    const mark = el("span", { className: "mark" });
    const button = el("button", { type: "button", tabIndex: -1 }, mark, parts.number, parts.path, parts.tokens, parts.time);
    const item = el("li", { data: { request: story.id } }, button);
    button.addEventListener("click", () => this.onOpen(story));
    this.rows.set(story.id, { story, item, ...parts });
    this.list.prepend(item);
    for (const [id, row] of this.rows) {
      if (this.rows.size <= MAX_ROWS) break;
      if (row.item.contains(document.activeElement)) continue;
      row.item.remove();
      this.rows.delete(id);
    }
    $("requests-empty").hidden = true;
    keepOneInTabOrder(this.list);
  }

  render() {
    for (const story of this.dirty) {
      const row = this.rows.get(story.id);
      if (!row) continue;
      row.item.dataset.state = story.outcome === null ? "running" : story.outcome === "ok" ? "ok" : story.outcome === "cancelled" ? "cancelled" : "failed";
      row.item.classList.toggle("mine", story.isMine);
      setText(row.number, story.number);
      setText(row.path, this.path(story));
      setText(row.tokens, `${count(story.promptTokens ?? 0)} → ${plural(story.tokens, "token")}`);
      setText(row.time, story.outcome && story.outcome !== "ok" ? story.outcome : story.totalMs === null ? "…" : duration(story.totalMs));
    }
    this.dirty.clear();
  }

  path(story) {
    if (!story.decode) return "routing…";
    const decode = this.store.nameOf(story.decode);
    return story.prefill ? `${decode} ← ${this.store.nameOf(story.prefill)}` : decode;
  }
}
