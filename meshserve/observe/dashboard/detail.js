// One request, or one peer, in a dialog. The browser keeps the focus inside, and Escape closes it.

import { $, count, duration, el, plural } from "./dom.js";
import { kvWords } from "./topology.js";
import { attemptsList, candidatesTable, failure, nameOf, pathOf, seen, summary, waterfall } from "./waterfall.js";

export class Detail {
  constructor(store) {
    this.store = store;
    this.dialog = $("detail");
    this.shownPeer = null;
    $("detail-close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
    this.dialog.addEventListener("close", () => (this.shownPeer = this.shownStory = null));
    store.addEventListener("story", ({ detail }) => this.follow(detail.story));
    for (const name of ["peers", "loads", "point"]) store.addEventListener(name, () => this.shownPeer && this.renderPeer());
  }

  open(title, ...body) {
    $("detail-title").textContent = title;
    $("detail-body").replaceChildren(...body);
    if (this.dialog.open) return;
    this.dialog.showModal();
    $("detail-body").scrollTop = 0;
  }

  async openStory(story) {
    this.shownPeer = null;
    this.shownStory = story;
    this.renderStory(story);
    if (story.receipt || !story.outcome) return;
    const receipt = await fetchReceipt(story.id);
    if (!receipt) return;
    story.receipt = receipt;
    if (this.dialog.open && this.shownStory === story) this.renderStory(story);
  }

  // While a running request is shown, each of its events shows it anew.
  follow(story) {
    if (story !== this.shownStory || !this.dialog.open || this.isDue) return;
    this.isDue = true;
    requestAnimationFrame(() => {
      this.isDue = false;
      if (story === this.shownStory) this.openStory(story);
    });
  }

  renderStory(story) {
    const { receipt } = story;
    if (receipt) {
      const attempts = receipt.attempts.length ? attemptsList(receipt.attempts) : null;
      const candidates = receipt.candidates.length ? candidatesTable(receipt.candidates, `Candidates (policy ${receipt.policy})`) : null;
      const forPrefill = receipt.prefill_candidates?.length ? candidatesTable(receipt.prefill_candidates, "Candidates for prefill") : null;
      const parts = [failure(receipt), pathOf(receipt), summary(receipt), nameOf(receipt.request_id, receipt.client_id), waterfall(receipt), attempts, candidates, forPrefill];
      this.open(`Request ${story.number}`, ...parts.filter(Boolean));
      return;
    }
    const words = [story.promptTokens === null ? null : plural(story.promptTokens, "prompt token"), plural(story.tokens, "token"), story.outcome ?? "running", story.totalMs ? duration(story.totalMs) : null];
    const candidates = story.candidates.length ? [candidatesTable(story.candidates, `Candidates (policy ${story.policy})`)] : [];
    this.open(`Request ${story.number}`, el("p", { className: "muted" }, words.filter(Boolean).join(" · ")), nameOf(story.id), seen(story, this.store), ...candidates);
  }

  openPeer(id) {
    Object.assign(this, { shownPeer: id, shownStory: null });
    this.renderPeer();
  }

  renderPeer() {
    const peer = this.store.peers.get(this.shownPeer);
    if (!peer) return;
    const load = this.store.loads.get(peer.id);
    const rtt = this.store.roundTrips[peer.id];
    const rows = [["State", peer.state], ["Roles", peer.roles.join(", ")], ["Model", peer.model ?? "–"], ["Address", peer.address], ["Round trip", peer.id === this.store.frontend ? "this peer serves the page" : duration(rtt)], ["Version", peer.version], ["Instance id", peer.id]];
    if (load) rows.splice(3, 0, ["Running", count(load.num_running)], ["Waiting", count(load.num_waiting)], ["Tickets queued", count(load.num_tickets)], ["KV blocks", kvWords(peer, load)]);
    if (peer.roles.includes("decode")) rows.splice(load ? 7 : 3, 0, ["Time to first token", medianAndHigh(this.store.latencies.get(peer.id)?.ttft_ms)], ["Between tokens", medianAndHigh(this.store.latencies.get(peer.id)?.itl_ms)]);
    const served = [...this.store.stories.values()].filter((story) => [story.front, story.decode, story.prefill].includes(peer.id)).slice(-5).reverse();
    const lines = served.map((story) => el("li", {}, `${story.number} · ${plural(story.tokens, "token")} · ${story.outcome ?? "running"}`));
    const recent = lines.length ? [el("h3", {}, "Requests served here"), el("ol", { className: "plain" }, ...lines)] : [];
    this.open(peer.name, el("dl", { className: "facts" }, ...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])), ...recent);
  }
}

function medianAndHigh(found) {
  if (!found) return "–";
  const [median, high] = found.map((ms) => duration(ms).replace(" ", "\u00a0"));
  return `p50\u00a0${median}, p99\u00a0${high}`;
}

async function fetchReceipt(id) {
  try {
    const response = await fetch(`mesh/requests/${encodeURIComponent(id)}`);
    return response.ok ? await response.json() : null;
  } catch {
    return null;
  }
}
