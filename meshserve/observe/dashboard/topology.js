// Who is in the mesh, as cards with links between them: clients, then who takes requests in, then decode, then prefill workers.

import { $, bytes, count, duration, el, isStill, keepOneInTabOrder, roam, setText } from "./dom.js";

const CLIENT = "client";
const NARROW_PX = 640;
const MANY_LINKS = 40;
const GROUPS = ["front", "decode", "prefill"];
const SVG = "http://www.w3.org/2000/svg";

function groupOf(peer) {
  if (peer.roles.includes("decode")) return "decode";
  return peer.roles.includes("prefill") ? "prefill" : "front";
}

const isGone = (peer) => peer.state === "dead" || peer.state === "left";

// Pairs that talk in the course of a request; the first of each pair stands on the client's side.
function areLinked(one, other) {
  const has = (peer, ...roles) => roles.some((role) => peer.roles.includes(role));
  return (has(one, "frontend") && has(other, "processor")) || (has(one, "processor") && has(other, "router", "decode")) || (has(one, "decode") && has(other, "prefill"));
}

export class Topology {
  constructor(store, onOpen) {
    Object.assign(this, { store, onOpen, cards: new Map(), boxes: new Map(), lines: new Map(), bids: [] });
    this.stage = $("stage");
    this.list = $("peers");
    roam(this.list);
    store.addEventListener("peers", () => this.renderPeers());
    store.addEventListener("loads", () => this.renderLoads());
    store.addEventListener("point", () => this.renderLoads());
    new ResizeObserver(() => this.layOut()).observe(this.stage);
  }

  // --- cards

  renderPeers() {
    const peers = [...this.store.peers.values()];
    for (const [id, card] of this.cards) {
      if (!this.store.peers.has(id)) {
        card.item.remove();
        this.cards.delete(id);
      }
    }
    for (const peer of peers) this.renderPeer(peer);
    const order = peers.sort((a, b) => GROUPS.indexOf(groupOf(a)) - GROUPS.indexOf(groupOf(b)) || a.name.localeCompare(b.name, "en", { numeric: true }));
    order.forEach((peer, rank) => {
      const { item } = this.cards.get(peer.id);
      if (this.list.children[rank] !== item) this.list.insertBefore(item, this.list.children[rank] ?? null);
    });
    keepOneInTabOrder(this.list);
    this.layOut();
    this.renderLoads();
  }

  renderPeer(peer) {
    const card = this.cards.get(peer.id) ?? this.makeCard(peer);
    card.item.className = `peer ${groupOf(peer)}`;
    card.item.dataset.state = peer.state;
    setText(card.name, peer.name);
    setText(card.roles, peer.roles.join(" · "));
  }

  makeCard(peer) {
    const [name, roles, status, level] = [el("b", { className: "peer-name" }), el("span", { className: "peer-roles" }), el("span", { className: "peer-status" }), el("i")];
    const meter = el("span", { className: "meter" }, level);
    const button = el("button", { type: "button", tabIndex: -1 }, el("span", { className: "dot" }), name, roles, status, meter);
    const item = el("li", { data: { peer: peer.id } }, button);
    button.addEventListener("click", () => this.onOpen(peer.id));
    const card = { item, button, name, roles, status, meter, level };
    this.cards.set(peer.id, card);
    this.list.append(item);
    if (!isStill()) item.animate([{ opacity: 0, transform: "scale(.92)" }, { opacity: 1, transform: "none" }], 350);
    return card;
  }

  renderLoads() {
    for (const peer of this.store.peers.values()) {
      const card = this.cards.get(peer.id);
      const load = this.store.loads.get(peer.id);
      const rate = this.store.rates.get(peer.id)?.lastRequests ?? 0;
      setText(card.status, statusOf(peer, load, hasRoom(this.boxes.get(peer.id)) || !load ? rate : 0));
      card.meter.hidden = !load || isGone(peer);
      if (card.meter.hidden) continue;
      const held = (load.used_blocks + load.cached_blocks) / Math.max(1, load.num_blocks);
      card.level.style.width = `${Math.min(100, Math.max(held ? 1.5 : 0, held * 100)).toFixed(1)}%`;
      card.item.classList.toggle("busy", load.num_running + load.num_waiting + load.num_tickets > 0);
    }
  }

  // --- places

  layOut() {
    const width = this.stage.clientWidth;
    if (!width) return;
    const groups = GROUPS.map((group) => [...this.list.children].map((item) => this.store.peers.get(item.dataset.peer)).filter((peer) => groupOf(peer) === group));
    this.isNarrow = width < NARROW_PX;
    this.boxes.clear();
    if (this.isNarrow) this.layOutRows(width, groups);
    else this.layOutColumns(width, groups);
    for (const [id, { item }] of this.cards) {
      const box = this.boxes.get(id);
      Object.assign(item.style, { left: `${box.x}px`, top: `${box.y}px`, width: `${box.w}px`, height: `${box.h}px` });
      item.classList.toggle("compact", box.h < 80);
      item.classList.toggle("large", box.h >= 120 && box.w >= 230);
    }
    this.drawLinks();
  }

  layOutColumns(width, groups) {
    const present = groups.filter((group) => group.length);
    const rows = Math.min(8, Math.max(...present.map((group) => group.length), 1));
    this.stage.style.minHeight = rows > 4 ? `${rows * 66 + 24}px` : "";
    const height = this.stage.clientHeight;
    const cell = (height - 24) / rows;
    const cardHeight = cell >= 200 ? 128 : cell >= 140 ? 104 : cell >= 124 ? 90 : 54;
    const spans = present.map((group) => Math.ceil(group.length / rows));
    const client = { w: 72, h: 84 };
    const numCards = spans.reduce((sum, span) => sum + span, 0);
    const cardWidth = Math.min(264, (width - client.w - 24 - (width > 1000 ? 84 : 58) * present.length) / Math.max(1, numCards));
    const used = client.w + cardWidth * numCards + 10 * (numCards - present.length);
    const gap = (width - 24 - used) / Math.max(1, present.length);
    this.boxes.set(CLIENT, { x: 12, y: height / 2 - client.h / 2, ...client, rank: 0 });
    let x = 12 + client.w + gap;
    present.forEach((group, column) => {
      const perSpan = Math.ceil(group.length / spans[column]);
      group.forEach((peer, rank) => {
        const inSpan = Math.min(perSpan, group.length - Math.floor(rank / perSpan) * perSpan);
        const pitch = Math.min(height / inSpan, cardHeight + Math.max(44, cardHeight * 0.75));
        const y = height / 2 + ((rank % perSpan) - (inSpan - 1) / 2) * pitch - cardHeight / 2;
        this.boxes.set(peer.id, { x: x + Math.floor(rank / perSpan) * (cardWidth + 10), y, w: cardWidth, h: cardHeight, rank: column + 1 });
      });
      x += cardWidth * spans[column] + 10 * (spans[column] - 1) + gap;
    });
  }

  layOutRows(width, groups) {
    const [pad, gap, between] = [2, 12, 58];
    const client = { w: 84, h: 68 };
    this.boxes.set(CLIENT, { x: (width - client.w) / 2, y: 4, ...client, rank: 0 });
    let y = 4 + client.h + between;
    groups.filter((group) => group.length).forEach((group, row) => {
      const perRow = Math.min(group.length, 2);
      const w = Math.min(220, (width - 2 * pad - gap * (perRow - 1)) / perRow);
      const h = group.length > 8 ? 54 : 92;
      group.forEach((peer, rank) => {
        const line = Math.floor(rank / perRow);
        const inLine = Math.min(perRow, group.length - line * perRow);
        const left = (width - inLine * w - (inLine - 1) * gap) / 2;
        this.boxes.set(peer.id, { x: left + (rank % perRow) * (w + gap), y: y + line * (h + gap), w, h, rank: row + 1 });
      });
      y += Math.ceil(group.length / perRow) * (h + gap) - gap + between;
    });
    this.stage.style.minHeight = `${y - between + 8}px`;
  }

  // --- links

  drawLinks() {
    const svg = $("links");
    const { clientWidth: width, clientHeight: height } = this.stage;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.lines.clear();
    const parts = [this.drawClient()];
    const peers = [...this.store.peers.values()].filter((peer) => !isGone(peer) && peer.state !== "joining");
    for (const one of peers) {
      if (one.roles.includes("frontend")) parts.push(this.drawLink(CLIENT, one.id));
      for (const other of peers) if (one !== other && areLinked(one, other) && !this.lines.has(key(one.id, other.id))) parts.push(this.drawLink(one.id, other.id));
    }
    svg.replaceChildren(...parts);
    svg.classList.toggle("dense", this.lines.size > MANY_LINKS);
    this.tellLayout?.();
  }

  drawClient() {
    const { x, y, w, h } = this.boxes.get(CLIENT);
    const group = document.createElementNS(SVG, "g");
    group.setAttribute("class", "client");
    const [cx, cy] = [x + w / 2, y + h / 2 - 9];
    const figure = document.createElementNS(SVG, "path");
    figure.setAttribute("d", `M${cx - 15} ${cy - 12}h30a4 4 0 0 1 4 4v16a4 4 0 0 1-4 4h-30a4 4 0 0 1-4-4v-16a4 4 0 0 1 4-4zM${cx - 24} ${cy + 18}h48`);
    const label = document.createElementNS(SVG, "text");
    label.setAttribute("x", cx);
    label.setAttribute("y", cy + 37);
    label.textContent = "clients";
    group.append(figure, label);
    return group;
  }

  drawLink(one, other) {
    const path = document.createElementNS(SVG, "path");
    const [a, b, c, d] = this.curve(one, other);
    path.setAttribute("d", `M${a.x} ${a.y}C${b.x} ${b.y} ${c.x} ${c.y} ${d.x} ${d.y}`);
    path.setAttribute("class", "link");
    this.lines.set(key(one, other), path);
    return path;
  }

  // The four points of the curve from one peer to another; the same curve for both directions.
  curve(from, to) {
    const [one, other] = [this.boxes.get(from), this.boxes.get(to)];
    if (!one || !other) return null;
    if (one.rank > other.rank) return this.curve(to, from).reverse();
    const middle = (box) => ({ x: box.x + box.w / 2, y: box.y + box.h / 2 });
    const [a, d] = [middle(one), middle(other)];
    if (one.rank === other.rank) {
      const side = one.x + one.w;
      return [{ x: side, y: a.y }, { x: side + 46, y: a.y }, { x: side + 46, y: d.y }, { x: other.x + other.w, y: d.y }];
    }
    if (this.isNarrow) {
      [a.y, d.y] = [one.y + one.h, other.y];
      const bend = (d.y - a.y) / 2;
      return [a, { x: a.x, y: a.y + bend }, { x: d.x, y: d.y - bend }, d];
    }
    [a.x, d.x] = [one.x + one.w, other.x];
    const bend = (d.x - a.x) / 2;
    return [a, { x: a.x + bend, y: a.y }, { x: d.x - bend, y: d.y }, d];
  }

  lightLink(from, to, tone, ms) {
    const line = this.lines.get(key(from, to));
    if (!line) return;
    line.dataset.tone = tone;
    line.parentNode?.append(line);
    clearTimeout(line.timer);
    line.timer = setTimeout(() => delete line.dataset.tone, ms);
  }

  // --- what happens at a peer

  pulse(id, tone, ms = 700) {
    const card = this.cards.get(id);
    if (!card) return;
    card.item.dataset.tone = tone;
    clearTimeout(card.timer);
    card.timer = setTimeout(() => delete card.item.dataset.tone, ms);
  }

  // What the router thought of each candidate, at their cards, the best first.
  showBids(candidates, ms) {
    this.hideBids();
    candidates.forEach((candidate, rank) => {
      const card = this.cards.get(this.store.idOf(candidate.peer));
      if (!card) return;
      const words = candidate.overlap_blocks ? `has ${count(candidate.overlap_blocks)} blocks` : `cost ${duration(candidate.cost_ms)}`;
      const bid = el("span", { className: rank ? "bid" : "bid best" }, rank ? words : `✓ ${words}`);
      card.item.append(bid);
      this.bids.push(bid);
    });
    clearTimeout(this.bidTimer);
    this.bidTimer = setTimeout(() => this.hideBids(), ms);
  }

  hideBids() {
    for (const bid of this.bids) bid.remove();
    this.bids = [];
  }
}

const hasRoom = (box) => box && box.w >= 200 && box.h >= 80;

const key = (one, other) => (one < other ? `${one} ${other}` : `${other} ${one}`);

function statusOf(peer, load, requestsPerS) {
  if (peer.state !== "alive") return peer.state === "joining" ? "joining…" : peer.state;
  const rate = requestsPerS > 0 ? `${count(requestsPerS)} req/s` : "";
  if (!load) return rate || "ready";
  const parts = [];
  if (load.num_running) parts.push(`${count(load.num_running)} running`);
  if (load.num_waiting) parts.push(`${count(load.num_waiting)} waiting`);
  if (load.num_tickets) parts.push(`${count(load.num_tickets)} queued`);
  return [parts.join(", ") || (rate ? "" : "idle"), rate].filter(Boolean).join(" · ");
}

export function kvWords(peer, load) {
  const held = load.used_blocks + load.cached_blocks;
  const size = peer.block_bytes ? ` (${bytes(held * peer.block_bytes)})` : "";
  return `${count(held)} of ${count(load.num_blocks)}${size}`;
}
