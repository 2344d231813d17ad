// Where a request's time went, from its receipt; or, without one, what was seen of it.

import { bytes, count, duration, el, plural } from "./dom.js";

const PHASES = {
  http: "HTTP",
  process: "process",
  route: "route",
  network: "network",
  queue: "queue",
  prefill: "prefill",
  kv_transfer: "KV transfer",
  decode: "decode",
  other: "other",
};

function bar(name, phase, offset, share, words) {
  const fill = el("i", { data: { phase } });
  fill.style.left = `${(offset * 100).toFixed(2)}%`;
  fill.style.width = `${(share * 100).toFixed(2)}%`;
  return el("li", {}, el("span", { className: "phase" }, name), el("span", { className: "track" }, fill), el("span", { className: "ms" }, words));
}

// Brief: phases that took next to nothing are summed up in one line.
export function waterfall(receipt, isBrief = false) {
  const phases = isBrief ? briefly(receipt) : receipt.phases_ms;
  const names = [...Object.keys(PHASES).filter((name) => name in phases), ...Object.keys(phases).filter((name) => !(name in PHASES))];
  const total = Math.max(0.001, receipt.total_ms);
  let offset = 0;
  const bars = names.map((name) => {
    const share = Math.min(1 - offset, Math.max(0, phases[name] / total));
    const made = bar(PHASES[name] ?? name, name, offset, share, duration(phases[name]));
    offset += share;
    return made;
  });
  return el("ol", { className: "waterfall", ariaLabel: `Where ${duration(receipt.total_ms)} went` }, ...bars);
}

function briefly({ phases_ms: phases, total_ms: total }) {
  const small = Object.keys(phases).filter((name) => phases[name] < total * 0.02);
  if (small.length < 2) return phases;
  const kept = Object.fromEntries(Object.entries(phases).filter(([name]) => !small.includes(name)));
  return { ...kept, [`${small.length} others`]: small.reduce((sum, name) => sum + phases[name], 0) };
}

export function pathOf(receipt) {
  const { frontend, processor, router, decode, prefill } = receipt.peers;
  const steps = [["front", frontend ?? processor], ...(router && router !== frontend ? [["front", router]] : []), ["decode", decode]];
  if (prefill) steps.push(["prefill", prefill]);
  return el("p", { className: "path" }, ...steps.flatMap(([group, name], rank) => [rank ? el("span", { className: "arrow" }, group === "prefill" ? "←KV–" : "→") : null, el("span", { className: `who ${group}` }, name ?? "?")]));
}

export function summary(receipt) {
  const { tokens, kv } = receipt;
  const parts = [`${duration(receipt.total_ms)} in total`, `${count(tokens.prompt)} → ${plural(tokens.completion, "token")}`, `${count(tokens.cached)} cached`];
  if (kv.blocks) parts.push(`${plural(kv.blocks, "KV block")} moved (${bytes(kv.bytes)})`);
  return el("p", { className: "muted" }, parts.join(" · "));
}

// The request's id, for `meshserve trace`, logs and clients.
export function nameOf(id, label) {
  return el("p", { className: "muted name" }, el("code", {}, id), label ? ` · the client's label: ${label}` : null);
}

// The error that the request ended in.
export function failure({ outcome, error }) {
  if (!outcome || outcome === "ok") return null;
  return el("p", { className: "failure" }, el("b", {}, outcome), error && error !== outcome ? `: ${error}` : null);
}

// Why comes second: a phone shows the first columns, and scrolls to the rest.
export function candidatesTable(candidates, title) {
  const head = el("tr", {}, ...["Worker", "Why", "Cached", "Load", "Wait", "Cost"].map((text) => el("th", { scope: "col" }, text)));
  const rows = candidates.map((candidate, rank) =>
    el("tr", { className: rank ? "" : "best" }, el("th", { scope: "row" }, candidate.peer), ...[candidate.reason, `${count(candidate.overlap_blocks)} blocks`, String(candidate.load), duration(candidate.wait_ms), duration(candidate.cost_ms)].map((text) => el("td", {}, text))),
  );
  return el("section", {}, el("h3", {}, title), el("div", { className: "scroll", tabIndex: 0, role: "group", ariaLabel: title }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows))));
}

export function attemptsList(attempts) {
  const words = (attempt) => [attempt.peer, attempt.role, attempt.outcome, duration(attempt.ms), attempt.blocks ? plural(attempt.blocks, "block") : null, attempt.tokens ? plural(attempt.tokens, "token") : null].filter(Boolean).join(" · ");
  return el("section", {}, el("h3", {}, "Attempts"), el("ol", { className: "plain" }, ...attempts.map((attempt) => el("li", {}, words(attempt)))));
}

const SEEN = {
  submit: (event) => `arrived with ${plural(event.details.num_tokens, "token")}`,
  routed: (event) => `routed to ${event.details.candidates[0].peer}: ${event.details.candidates[0].reason}`,
  accepted: () => "accepted by its decode worker",
  ticket: (event, store) => `ticket to ${event.details.peers.map((id) => store.nameOf(id)).join(", ")}`,
  claim: (event, store) => `claimed by ${store.nameOf(event.details.peer_claiming)}`,
  prefill_begun: (event) => `prefill of ${plural(event.details.num_tokens, "token")} began`,
  blocks: (event, store) => `${plural(event.details.count, "KV block")} from ${store.nameOf(event.details.peer_sending)}`,
  attempt_failed: (event) => `attempt ${event.details.attempt} failed: ${event.details.outcome}`,
  handoff_ended: (event) => (event.details.state === "done" ? "the KV cache is complete" : `handoff: ${event.details.state}`),
  tokens: (event) => plural(event.details.count, "token"),
  result: (event) => (event.details.outcome === "ok" ? "complete" : event.details.outcome),
};

// Without a receipt: the events of the request, by the clock of the frontend that received them.
export function seen(story, store) {
  const last = Math.max(...story.events.map((event) => event.at), story.at + 0.001);
  const rows = [];
  for (const event of story.events) {
    const before = rows.at(-1);
    if (before && before.kind === event.kind && event.kind === "tokens") continue;
    rows.push({ kind: event.kind, event });
  }
  const items = rows.slice(0, 40).map(({ kind, event }) => {
    const mark = el("i", { data: { phase: kind } });
    mark.style.left = `${(((event.at - story.at) / (last - story.at)) * 98).toFixed(2)}%`;
    mark.style.width = "2%";
    return el("li", {}, el("span", { className: "ms" }, `+${duration(Math.max(0, event.at - story.at))}`), el("span", { className: "track" }, mark), el("span", {}, SEEN[kind]?.(event, store) ?? kind));
  });
  return el("section", {}, el("h3", {}, "Events, as they arrived"), el("ol", { className: "waterfall seen" }, ...items));
}
