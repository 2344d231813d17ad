// Shows requests in slow motion: a few at a time, each step long enough to be followed, and one of them in words.

import { $, bytes, count, duration, isStill, plural, setText } from "./dom.js";

const MAX_SHOWN = 3;
const MAX_QUEUED = 3;
const GATHER_MS = 500;
const SETTLE_MS = 600;
const MAX_AGE_MS = 30000;
// A presenter may want it slower or faster: `/?pace=2` takes twice the time.
const PACE = Math.min(10, Math.max(0.1, Number(new URLSearchParams(location.search).get("pace")) || 1));
const paced = (ms) => ms * PACE;
const MOVE_MS = { prompt: paced(750), ask: paced(500), ticket: paced(750), claim: paced(650), blocks: paced(1300), tokens: paced(850) };
const REST_MS = paced(150);

export class Player {
  constructor(store, topology) {
    Object.assign(this, { store, topology, shown: [], queue: [], moves: [], spotlight: null });
    this.canvas = $("moving");
    this.context = this.canvas.getContext("2d");
    topology.tellLayout = () => this.resize();
    store.addEventListener("story", ({ detail }) => this.offer(detail.story, detail.isNew));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.readColours());
    this.readColours();
  }

  readColours() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    this.colours = Object.fromEntries(["prompt", "route", "ticket", "claim", "blocks", "tokens", "bad", "panel", "text"].map((name) => [name, read(`--${name}`)]));
    this.font = `600 ${parseFloat(style.fontSize) * 0.8}px ${read("--sans")}`;
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.topology.stage;
    const scale = Math.min(2, devicePixelRatio || 1);
    if (this.canvas.width !== Math.round(width * scale) || this.canvas.height !== Math.round(height * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(height * scale);
    }
    this.context.setTransform(scale, 0, 0, scale, 0, 0);
  }

  // --- who is shown

  offer(story, isNew) {
    if (story.isMine) this.prefer(story);
    if (!isNew || story.isMine || document.hidden) return;
    if (this.shown.length < MAX_SHOWN && !this.queue.length) this.begin(story);
    else if (this.queue.length < MAX_QUEUED) this.queue.push(story);
  }

  // A request that this page sent is the one that is told in words.
  prefer(story) {
    if (this.spotlight === story || (story.numPlayed && !this.shown.includes(story))) return;
    this.queue = this.queue.filter((queued) => queued !== story);
    this.spotlight = story;
    if (!this.shown.includes(story)) this.begin(story);
    this.beginTelling();
  }

  begin(story) {
    this.shown.push(story);
    this.spotlight ??= story;
    story.beganShow = performance.now();
    this.wait(story, GATHER_MS);
  }

  end(story) {
    this.shown = this.shown.filter((other) => other !== story);
    if (this.spotlight === story) {
      this.spotlight = null;
      delete $("narrator").dataset.request;
    }
    const next = this.queue.shift();
    if (next) this.begin(next);
  }

  wait(story, ms) {
    setTimeout(() => this.step(story), ms);
  }

  // --- one step after the other

  step(story) {
    if (!this.shown.includes(story)) return;
    const event = story.events[story.numPlayed];
    if (!event) {
      const isOver = performance.now() - story.beganShow > MAX_AGE_MS || !this.store.stories.has(story.id);
      if (isOver) this.end(story);
      else this.wait(story, 120);
    } else if (event.kind === "result" && performance.now() - story.endedAt < SETTLE_MS) {
      this.wait(story, 120); // events of earlier steps may still arrive from other peers
    } else {
      story.numPlayed += 1;
      const ms = this[event.kind]?.(story, event) ?? 0;
      if (ms === Infinity) return;
      if (ms) this.wait(story, ms);
      else this.step(story);
    }
  }

  submit(story) {
    const entry = this.entryOf(story);
    this.tell(story, "prompt", `A prompt of ${plural(story.promptTokens, "token")} arrives at ${this.name(entry)}.`);
    this.move(story, "client", entry, "prompt", "prompt", MOVE_MS.prompt);
    if (entry === story.front) return MOVE_MS.prompt + REST_MS;
    this.later(MOVE_MS.prompt, () => this.move(story, entry, story.front, "prompt", "prompt", MOVE_MS.prompt));
    return 2 * MOVE_MS.prompt + REST_MS;
  }

  routed(story, { peer, details }) {
    const best = details.candidates[0];
    const router = this.store.idOf(details.router);
    const asked = details.router ? `The router${router === peer ? "" : ` (${details.router})`} picks ${best.peer}` : `No router: ${best.peer} is next`;
    this.tell(story, "route", `${asked}: ${reasonOf(best)}.`);
    this.pulse(story, router ?? peer, "route", paced(1500));
    if (story === this.spotlight) this.topology.showBids(details.candidates, paced(1700));
    let ms = paced(1700);
    if (router && router !== peer) {
      this.move(story, peer, router, "route", "who?", MOVE_MS.ask);
      this.later(MOVE_MS.ask, () => this.move(story, router, peer, "route", best.peer, MOVE_MS.ask));
      ms = Math.max(ms, 2 * MOVE_MS.ask + 2 * REST_MS);
    }
    this.later(ms, () => this.move(story, peer, details.decode, "prompt", "prompt", MOVE_MS.prompt));
    return ms + MOVE_MS.prompt + REST_MS;
  }

  ticket(story, { peer, details }) {
    const names = details.peers.map((id) => this.name(id));
    const where = names.length > 2 ? plural(names.length, "prefill worker") : names.join(" and ");
    const again = details.attempt > 1 ? `Attempt ${details.attempt}: ` : "";
    this.tell(story, "ticket", `${again}${this.name(peer)} hands the prefill over: it sends a ticket to ${where}.`);
    for (const id of details.peers.slice(0, 6)) this.move(story, peer, id, "ticket", "ticket", MOVE_MS.ticket);
    return MOVE_MS.ticket + REST_MS;
  }

  claim(story, { peer, details }) {
    this.tell(story, "claim", `${this.name(details.peer_claiming)} has a slot free and claims the prompt. The first claim gets it.`);
    this.move(story, details.peer_claiming, peer, "claim", "claim", MOVE_MS.claim);
    return MOVE_MS.claim + REST_MS;
  }

  prefill_begun(story, { peer, details }) {
    this.tell(story, "claim", `${this.name(peer)} computes the KV cache of ${plural(details.num_tokens, "token")}.`);
    this.pulse(story, peer, "blocks", paced(900));
    return paced(850);
  }

  blocks(story, { peer, details }) {
    const total = details.count + this.takeAll(story, "blocks");
    const size = this.store.peers.get(peer)?.block_bytes;
    const words = `${plural(total, "KV block")}${size ? ` (${bytes(total * size)})` : ""}`;
    this.tell(story, "blocks", `${words} move from ${this.name(details.peer_sending)} to ${this.name(peer)}, each with a checksum.`);
    this.move(story, details.peer_sending, peer, "blocks", `${count(total)} KV`, MOVE_MS.blocks, Math.min(7, Math.max(3, total)));
    return MOVE_MS.blocks + REST_MS;
  }

  attempt_failed(story, { peer, details }) {
    this.tell(story, "ticket", `Attempt ${details.attempt} on ${this.name(details.peer_failing)} failed (${details.outcome}); the next one follows.`);
    this.pulse(story, details.peer_failing, "bad", paced(1200));
    this.topology.lightLink(peer, details.peer_failing, "bad", paced(1200));
    return paced(1200);
  }

  handoff_ended(story, { peer, details }) {
    if (details.state !== "local") return 0;
    this.tell(story, "claim", `No prefill worker claimed the prompt in time: ${this.name(peer)} prefills it itself.`);
    return paced(1000);
  }

  tokens(story, { peer, details }) {
    const total = details.count + this.takeAll(story, "tokens");
    const isLocal = !story.prefill && !story.isTold;
    story.isTold = true;
    const first = isLocal ? `The prompt is short, or its prefix is cached: ${this.name(story.decode)} prefills it itself and generates. ` : `${this.name(story.decode)} has the whole KV cache and generates. `;
    this.tell(story, "tokens", `${first}${plural(Math.max(total, story.outcome ? story.tokens : total), "token")} stream back.`);
    this.pulse(story, story.decode, "tokens", paced(1200));
    const entry = this.entryOf(story);
    const stops = [story.decode, peer, ...(entry === peer ? [] : [entry]), "client"];
    const numParts = Math.min(6, Math.max(2, total));
    const pause = MOVE_MS.tokens * 0.8;
    for (let leg = 1; leg < stops.length; leg += 1) {
      this.later(pause * (leg - 1), () => this.move(story, stops[leg - 1], stops[leg], "tokens", "tokens", MOVE_MS.tokens, numParts));
    }
    return pause * (stops.length - 1) + 2 * REST_MS;
  }

  result(story) {
    const took = story.totalMs ? ` in ${duration(story.totalMs)}` : "";
    const slow = story.totalMs && story.totalMs < 2000 ? ` (shown in slow motion)` : "";
    const cached = story.cached ? ` ${count(story.cached)} of ${plural(story.promptTokens, "prompt token")} came from the cache.` : "";
    if (story.outcome === "ok") this.tell(story, "done", `Done: ${plural(story.tokens, "token")}${took}${slow}.${cached}`);
    else this.tell(story, "failed", story.outcome === "cancelled" ? "The client left: the request is cancelled on every peer." : `Failed: ${story.outcome}.`);
    this.later(story === this.spotlight ? paced(1800) : paced(300), () => this.end(story));
    return Infinity;
  }

  // Counts of one kind that have arrived in the meantime are shown together.
  takeAll(story, kind) {
    let total = 0;
    while (story.events[story.numPlayed]?.kind === kind) {
      total += story.events[story.numPlayed].details.count;
      story.numPlayed += 1;
    }
    return total;
  }

  // --- telling

  entryOf(story) {
    return this.store.peers.has(story.entry) ? story.entry : story.front;
  }

  name(id) {
    return this.store.nameOf(id);
  }

  later(ms, action) {
    setTimeout(action, ms);
  }

  beginTelling() {
    for (const item of $("steps").children) delete item.dataset.is;
  }

  tell(story, step, words) {
    if (story !== this.spotlight) return;
    if (step !== "route") this.topology.hideBids();
    const items = [...$("steps").children];
    if (step === "prompt") this.beginTelling();
    for (const item of items) if (item.dataset.is === "now") item.dataset.is = "done";
    const now = items.find((item) => item.dataset.step === step);
    if (now) now.dataset.is = "now";
    if (step === "tokens") for (const item of items) if (!item.dataset.is) item.dataset.is = "skipped";
    $("narrator").dataset.request = story.id;
    $("narrator").dataset.step = step;
    setText($("caption"), words);
  }

  pulse(story, id, tone, ms) {
    this.topology.pulse(id, story === this.spotlight ? tone : "other", ms);
  }

  // --- moving

  move(story, from, to, kind, label, ms, numParts = 1) {
    const isMain = story === this.spotlight;
    if (isMain) this.topology.lightLink(from, to, kind, ms + 250);
    if (isStill() || from === to || document.hidden) return;
    if (!this.topology.curve(from, to)) return;
    this.moves.push({ from, to, kind, label: isMain ? label : "", began: performance.now(), ms, numParts, isMain });
    if (this.moves.length === 1) requestAnimationFrame((now) => this.draw(now));
  }

  draw(now) {
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.moves = this.moves.filter((move) => now - move.began < move.ms);
    for (const move of this.moves) this.drawMove(move, now);
    if (this.moves.length) requestAnimationFrame((next) => this.draw(next));
  }

  drawMove(move, now) {
    const curve = this.topology.curve(move.from, move.to);
    if (!curve) return;
    const context = this.context;
    const spread = move.numParts > 1 ? 0.45 : 0;
    const passed = Math.max(0, (now - move.began) / move.ms);
    context.globalAlpha = move.isMain ? 1 : 0.45;
    context.fillStyle = this.colours[move.kind];
    let head = null;
    for (let part = move.numParts - 1; part >= 0; part -= 1) {
      const share = passed * (1 + spread) - (spread * part) / Math.max(1, move.numParts - 1);
      if (share < 0 || share > 1) continue;
      const at = pointOn(curve, ease(share));
      drawPart(context, move.kind, at, move.isMain ? 1 : 0.75);
      head = at;
    }
    if (head && move.label) this.drawLabel(move.label, head, this.colours[move.kind], curve);
    context.globalAlpha = 1;
  }

  // Beside the moving part, and within the gap between the two cards, so that the label hides neither.
  drawLabel(text, { x, y }, colour, [a, , , d]) {
    const context = this.context;
    context.font = this.font;
    const width = context.measureText(text).width + 14;
    const isUpright = this.topology.isNarrow;
    const [low, high] = [Math.min(a.x, d.x) + 4, Math.max(a.x, d.x) - width - 4];
    const free = high > low ? Math.min(Math.max(low, x - width / 2), high) : (low + high) / 2;
    const left = isUpright ? Math.min(x + 16, this.topology.stage.clientWidth - width - 2) : free;
    const top = isUpright ? Math.min(Math.max(Math.min(a.y, d.y) + 3, y - 11.5), Math.max(a.y, d.y) - 26) : y - 38;
    context.fillStyle = this.colours.panel;
    context.strokeStyle = colour;
    context.lineWidth = 1.5;
    context.beginPath();
    context.roundRect(left, top, width, 23, 11.5);
    context.fill();
    context.stroke();
    context.fillStyle = this.colours.text;
    context.textBaseline = "middle";
    context.fillText(text, left + 7, top + 12);
  }
}

function reasonOf(candidate) {
  return (candidate.reason || "the best").replace(/\.$/, "");
}

const ease = (share) => (share < 0.5 ? 2 * share * share : 1 - (2 - 2 * share) ** 2 / 2);

function pointOn([a, b, c, d], t) {
  const u = 1 - t;
  const mix = (axis) => u ** 3 * a[axis] + 3 * u * u * t * b[axis] + 3 * u * t * t * c[axis] + t ** 3 * d[axis];
  return { x: mix("x"), y: mix("y") };
}

// A shape for each kind, so that colour is not the only sign: prompts are discs, tickets tags, claims diamonds, blocks squares, tokens dots.
function drawPart(context, kind, { x, y }, scale) {
  context.beginPath();
  if (kind === "blocks") context.roundRect(x - 7 * scale, y - 7 * scale, 14 * scale, 14 * scale, 2.5);
  else if (kind === "ticket") context.roundRect(x - 11 * scale, y - 7 * scale, 22 * scale, 14 * scale, 4);
  else if (kind === "claim" || kind === "route") {
    const reach = 9 * scale;
    context.moveTo(x, y - reach);
    context.lineTo(x + reach, y);
    context.lineTo(x, y + reach);
    context.lineTo(x - reach, y);
    context.closePath();
  } else context.arc(x, y, (kind === "tokens" ? 5 : 9) * scale, 0, 2 * Math.PI);
  context.fill();
}
