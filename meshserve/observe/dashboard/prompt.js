// The prompt box: a completion as any client would ask for it, its text as it comes, then its receipt.

import { $, el, isStill } from "./dom.js";
import { pathOf, summary, waterfall } from "./waterfall.js";

const BURST = 20;
const SHORT = "What is a mesh?";

function longPrompt() {
  const topic = ["harbours", "rivers", "bridges", "lighthouses", "railways", "orchards"][Math.floor(Math.random() * 6)];
  const lines = Array.from({ length: 14 }, (_, rank) => `Paragraph ${rank + 1} of report ${Math.floor(Math.random() * 900) + 100} on ${topic}, with all that was seen and said.`);
  return lines.join(" ");
}

export class Prompt {
  constructor(store) {
    Object.assign(this, { store, running: null, last: longPrompt() });
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.running ? this.running.abort() : this.send();
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
    });
    for (const chip of document.querySelectorAll("[data-example]")) chip.addEventListener("click", () => this.example(chip.dataset.example));
    $("burst").addEventListener("click", () => this.burst());
    store.addEventListener("peers", () => this.listModels());
  }

  example(kind) {
    const text = kind === "short" ? SHORT : kind === "long" ? longPrompt() : this.last;
    $("prompt").value = text;
    $("prompt").focus({ preventScroll: true });
    $("prompt").setSelectionRange(0, 0);
  }

  listModels() {
    const names = [...new Set([...this.store.peers.values()].filter((peer) => peer.roles.includes("decode") && peer.model).map((peer) => peer.model))].sort();
    const select = $("model");
    if (names.join() === [...select.options].map((option) => option.value).join()) return;
    const chosen = select.value;
    select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    if (names.includes(chosen)) select.value = chosen;
    select.hidden = names.length < 2;
  }

  body(prompt, more) {
    return JSON.stringify({ model: $("model").value || "dummy", prompt, max_tokens: Math.max(1, Number($("max-tokens").value) || 32), ...more });
  }

  async send() {
    const prompt = $("prompt").value;
    if (!prompt.trim()) return;
    this.last = prompt;
    this.running = new AbortController();
    this.showRunning(true);
    $("answer").hidden = false;
    $("answer").textContent = "";
    delete $("answer").dataset.state;
    $("answer-receipt").replaceChildren();
    try {
      await this.stream(prompt, this.running.signal);
    } catch (error) {
      this.fail(error.name === "AbortError" ? "Stopped." : error.message);
    }
    this.running = null;
    this.showRunning(false);
  }

  async stream(prompt, signal) {
    const body = this.body(prompt, { stream: true, meshserve: { receipt: true } });
    const response = await fetch("/v1/completions", { method: "POST", headers: { "content-type": "application/json" }, body, signal });
    if (!response.ok) throw new Error(await errorOf(response));
    let isFirst = true;
    for await (const chunk of chunksOf(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (isFirst) this.store.claim(chunk.id.replace(/^cmpl-/, ""));
      isFirst = false;
      for (const choice of chunk.choices) $("answer").append(choice.text ?? "");
      $("answer").scrollTop = $("answer").scrollHeight;
      if (chunk.meshserve) this.showReceipt(chunk.meshserve);
    }
  }

  showReceipt(receipt) {
    $("answer-receipt").replaceChildren(pathOf(receipt), waterfall(receipt, true), summary(receipt));
    if (!isStill()) $("answer-receipt").animate([{ opacity: 0 }, { opacity: 1 }], 300);
    this.store.addReceipt(receipt);
  }

  showRunning(isRunning) {
    $("send").textContent = isRunning ? "Stop" : "Send";
  }

  fail(message) {
    $("answer").hidden = false;
    $("answer").dataset.state = "failed";
    $("answer").textContent = message;
  }

  async burst() {
    const prompt = $("prompt").value.trim() || this.last;
    $("burst").disabled = true;
    const ask = (rank) => fetch("/v1/completions", { method: "POST", headers: { "content-type": "application/json" }, body: this.body(`Copy ${rank}. ${prompt}`) }).then(async (response) => {
      if (!response.ok) throw new Error(await errorOf(response));
      return response.text();
    });
    const answers = await Promise.allSettled(Array.from({ length: BURST }, (_, rank) => ask(rank + 1)));
    $("burst").disabled = false;
    const failed = answers.filter((answer) => answer.status === "rejected");
    if (failed.length) this.fail(`${failed.length} of ${BURST} prompts were not answered: ${failed[0].reason.message}`);
  }
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The frontend answered ${response.status}.`;
  }
}

async function* chunksOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}
