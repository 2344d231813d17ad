// The state of the mesh as /mesh/events reports it. Everything here is bounded.

const MAX_STORIES = 80;
const MAX_POINTS = 120;
const SILENT_MS = 4000;
const REOPEN_MS = 2000;
const JITTER_MS = 250;

const RANK = ["submit", "routed", "accepted", "ticket", "claim", "prefill_begun", "blocks", "attempt_failed", "handoff_ended", "tokens", "result"];

// Peers' clocks differ a little: events at about the same time are put in the order of a request's steps.
function isBefore(one, other) {
  const apart = one.at - other.at;
  if (Math.abs(apart) > JITTER_MS) return apart < 0;
  const attempts = (one.details.attempt ?? 0) - (other.details.attempt ?? 0);
  const isHandoff = (event) => "attempt" in event.details;
  if (isHandoff(one) && isHandoff(other) && attempts) return attempts < 0;
  return RANK.indexOf(one.kind) < RANK.indexOf(other.kind);
}

export class Story {
  constructor(id, at) {
    Object.assign(this, { id, at, arrived: performance.now(), events: [], numPlayed: 0, isMine: false, receipt: null });
    Object.assign(this, { front: null, decode: null, prefill: null, promptTokens: null, tokens: 0, blocks: 0, outcome: null, totalMs: null });
    Object.assign(this, { candidates: [], router: null, policy: "", cached: null, endedAt: 0 });
  }

  // Requests are named by the frontend that took them in, and a counter.
  get entry() {
    return this.id.split("-")[0];
  }

  get number() {
    return `#${this.id.split("-").pop()}`;
  }

  add(event) {
    this.note(event);
    let place = this.events.length;
    while (place > this.numPlayed && isBefore(event, this.events[place - 1])) place -= 1;
    if (this.events.length < 400) this.events.splice(place, 0, event);
  }

  note({ kind, peer, details, at }) {
    if (kind === "submit") Object.assign(this, { front: peer, promptTokens: details.num_tokens, at });
    else if (kind === "routed") Object.assign(this, { decode: details.decode, candidates: details.candidates, router: details.router, policy: details.policy });
    else if (kind === "claim") this.prefill = details.peer_claiming;
    else if (kind === "handoff_ended" && details.state !== "done") this.prefill = null;
    else if (kind === "blocks") this.blocks += details.count;
    else if (kind === "tokens") this.tokens += details.count;
    else if (kind === "result") {
      Object.assign(this, { outcome: details.outcome, tokens: details.num_tokens, cached: details.num_cached_tokens, totalMs: at - this.at, endedAt: performance.now() });
    }
  }
}

export class Store extends EventTarget {
  constructor() {
    super();
    this.peers = new Map();
    this.loads = new Map();
    this.latencies = new Map();
    this.rates = new Map();
    this.roundTrips = {};
    this.points = [];
    this.stories = new Map();
    this.mine = new Set();
    this.meshName = "";
    this.frontend = null;
    this.heardAt = 0;
    this.isLive = false;
  }

  tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }

  open() {
    this.connect();
    setInterval(() => this.check(), REOPEN_MS);
    addEventListener("pagehide", () => this.source.close());
    addEventListener("pageshow", (event) => event.persisted && this.connect());
  }

  connect() {
    this.source = new EventSource("mesh/events");
    this.source.addEventListener("snapshot", (event) => this.begin(JSON.parse(event.data)));
    this.source.addEventListener("update", (event) => this.update(JSON.parse(event.data)));
    this.source.addEventListener("error", () => this.setLive(false));
  }

  check() {
    if (performance.now() - this.heardAt > SILENT_MS) this.setLive(false);
    if (this.source.readyState === EventSource.CLOSED) this.reopen();
  }

  // A browser does not reconnect by itself after an answer that is not an event stream. After a restart, a frontend with keys answers 401:
  // then the page is loaded again, which shows the login form.
  async reopen() {
    const answer = await fetch("mesh/events", { method: "HEAD" }).catch(() => null);
    if (answer?.status === 401) location.reload();
    else if (this.source.readyState === EventSource.CLOSED) this.connect();
  }

  setLive(isLive) {
    if (isLive) this.heardAt = performance.now();
    if (isLive === this.isLive) return;
    this.isLive = isLive;
    this.tell("live", isLive);
  }

  begin(state) {
    const before = new Map(this.peers);
    this.peers = new Map(state.peers.map((peer) => [peer.id, peer]));
    this.loads = new Map(Object.entries(state.loads));
    this.latencies = new Map(Object.entries(state.latencies));
    this.rates.clear();
    this.roundTrips = state.rtt_ms;
    this.points = state.history;
    this.meshName = state.mesh;
    this.frontend = state.frontend;
    for (const story of this.stories.values()) if (!story.outcome) this.stories.delete(story.id);
    this.setLive(true);
    this.tell("peers", { changed: state.peers, before, isSnapshot: true });
    this.tell("point", null);
    this.addEvents(state.events);
  }

  update(change) {
    this.setLive(true);
    if (change.peers || change.dropped) {
      const before = new Map(this.peers);
      for (const id of change.dropped ?? []) [this.peers, this.latencies].forEach((known) => known.delete(id));
      for (const peer of change.peers ?? []) this.peers.set(peer.id, peer);
      this.tell("peers", { changed: change.peers ?? [], before, isSnapshot: false });
    }
    for (const [peer, load] of Object.entries(change.loads ?? {})) this.loads.set(peer, load);
    for (const [peer, found] of Object.entries(change.latencies ?? {})) this.latencies.set(peer, found);
    for (const [peer, counts] of Object.entries(change.counts ?? {})) this.count(peer, counts);
    if (change.rtt_ms) this.roundTrips = change.rtt_ms;
    if (change.point) {
      this.points.push(change.point);
      if (this.points.length > MAX_POINTS) this.points.shift();
      this.endSecond();
      this.tell("point", change.point);
    }
    this.addEvents(change.events ?? []);
    if (change.loads) this.tell("loads", null);
  }

  count(peer, counts) {
    const rate = this.rates.get(peer) ?? { requests: 0, lastRequests: 0 };
    rate.requests += counts.submit ?? counts.accepted ?? counts.prefill_begun ?? 0;
    this.rates.set(peer, rate);
  }

  endSecond() {
    for (const rate of this.rates.values()) {
      rate.lastRequests = rate.requests;
      rate.requests = 0;
    }
  }

  addEvents(events) {
    for (const [at, peer, kind, id, details] of events) {
      let story = this.stories.get(id);
      if (!story && kind !== "submit") continue;
      const isNew = !story;
      if (isNew) this.stories.set(id, (story = new Story(id, at)));
      story.isMine = this.mine.has(id);
      story.add({ at, peer, kind, details });
      this.tell("story", { story, isNew });
    }
    for (const id of this.stories.keys()) {
      if (this.stories.size <= MAX_STORIES) break;
      this.stories.delete(id);
    }
  }

  // A request that this page sent. Its first event may arrive before or after its answer.
  claim(id) {
    this.mine.add(id);
    for (const old of this.mine) if (this.mine.size > MAX_STORIES) this.mine.delete(old);
    const story = this.stories.get(id);
    if (story) this.tell("story", { story: Object.assign(story, { isMine: true }), isNew: false });
  }

  // Of a request that this page sent: its receipt tells its story even if no peer followed it.
  addReceipt(receipt) {
    let story = this.stories.get(receipt.request_id);
    const isNew = !story;
    if (isNew) {
      story = storyOf(receipt, this);
      this.stories.set(story.id, story);
    }
    story.isMine = true;
    story.receipt = receipt;
    this.tell("story", { story, isNew });
    return story;
  }

  nameOf(id) {
    return this.peers.get(id)?.name ?? "a peer that left";
  }

  idOf(name) {
    for (const peer of this.peers.values()) if (peer.name === name) return peer.id;
    return null;
  }
}

function storyOf(receipt, store) {
  const { peers, tokens, kv } = receipt;
  const [front, decode, prefill] = [peers.processor ?? peers.frontend, peers.decode, peers.prefill].map((name) => store.idOf(name));
  const story = new Story(receipt.request_id, 0);
  let at = 0;
  const add = (kind, peer, details) => story.add({ at: (at += 1000), peer, kind, details });
  add("submit", front, { num_tokens: tokens.prompt });
  add("routed", front, { decode, router: peers.router, policy: receipt.policy, candidates: receipt.candidates, num_candidates: receipt.candidates.length });
  if (prefill) {
    add("ticket", decode, { attempt: 1, peers: [prefill] });
    add("claim", decode, { attempt: 1, peer_claiming: prefill });
    add("blocks", decode, { count: kv.blocks, peer_sending: prefill });
  }
  add("tokens", front, { count: tokens.completion });
  add("result", front, { outcome: "ok", num_tokens: tokens.completion, num_cached_tokens: tokens.cached });
  story.totalMs = receipt.total_ms;
  return story;
}
