// The prompt box: sends a prompt as any client would, shows the text as it arrives, then the receipt. Real models get a chat: they were
// trained to answer one, not to continue a text.

import { $, el, isStill } from "./dom.js";
import { pathOf, summary, waterfall } from "./waterfall.js";

const BURST = 20;
const SHORT = { dummy: "What is a mesh?", real: "What is photosynthesis?" };
const NUM_TOKENS = { dummy: "32", real: "100" };

function pick(...found) {
  return found[Math.floor(Math.random() * found.length)];
}

function longChat() {
  const [keeper, island, dog, captain] = [pick("Marta", "Ingrid", "Clara", "Nora"), pick("Gull", "Seal", "Fern", "Stone"), pick("Otto", "Bruno", "Max"), pick("Henrik", "Johan", "Peter")];
  return `${keeper} keeps the lighthouse on ${island} Island. She lives there with a brown dog named ${dog}. The island is small, and nobody else lives there. Every Tuesday a boat brings bread, milk and letters. The captain of the boat is a quiet man called ${captain}. He drinks a cup of coffee in her kitchen, tells her the news of the town, and sails home before it gets dark.

In the winter of the great storm the boat did not come for three weeks. The waves were higher than the house, and the wind broke two windows of the tower. ${keeper} had no bread left. She ate fish and potatoes, and she burned old chairs to keep warm. But every evening she climbed the ninety steps of the tower and lit the lamp. On the last night of the storm she saw a small red light far out on the water. It was a fishing boat with five men, and its engine had stopped. ${keeper} rang the bell of the lighthouse all night long, so that the men could hear where the rocks were. In the morning the sea was calm, and all five men came safely to the beach. They were cold and hungry, and she cooked soup for them.

The men never forgot her. Each year, on the first day of spring, they sail to ${island} Island with a basket of apples and a new chair for her kitchen.

What do the men bring each year? Answer in one sentence.`;
}

function longPrompt() {
  const topic = pick("harbours", "rivers", "bridges", "lighthouses", "railways", "orchards");
  const lines = Array.from({ length: 14 }, (_, rank) => `Paragraph ${rank + 1} of report ${Math.floor(Math.random() * 900) + 100} on ${topic}, with all that was seen and said.`);
  return lines.join(" ");
}

export class Prompt {
  constructor(store) {
    Object.assign(this, { store, running: null, last: "" });
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
    const long = () => (this.isReal ? longChat() : longPrompt());
    const text = kind === "short" ? SHORT[this.kind] : kind === "long" ? long() : (this.last ||= long());
    $("prompt").value = text;
    $("prompt").focus({ preventScroll: true });
    $("prompt").setSelectionRange(0, 0);
  }

  get model() {
    return $("model").value || "dummy";
  }

  get isReal() {
    return this.model !== "dummy";
  }

  get kind() {
    return this.isReal ? "real" : "dummy";
  }

  listModels() {
    const names = [...new Set([...this.store.peers.values()].filter((peer) => peer.roles.includes("decode") && peer.model).map((peer) => peer.model))].sort();
    const select = $("model");
    if (names.join() === [...select.options].map((option) => option.value).join()) return;
    const chosen = select.value;
    select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    if (names.includes(chosen)) select.value = chosen;
    select.hidden = names.length < 2;
    if (Object.values(NUM_TOKENS).includes($("max-tokens").value)) $("max-tokens").value = NUM_TOKENS[this.kind];
  }

  request(prompt, more, signal) {
    const asked = this.isReal ? { messages: [{ role: "user", content: prompt }] } : { prompt };
    const body = JSON.stringify({ model: this.model, ...asked, max_tokens: Math.max(1, Number($("max-tokens").value) || 32), ...more });
    return fetch(this.isReal ? "v1/chat/completions" : "v1/completions", { method: "POST", headers: { "content-type": "application/json" }, body, signal });
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
    const response = await this.request(prompt, { stream: true, meshserve: { receipt: true } }, signal);
    if (!response.ok) throw new Error(await errorOf(response));
    let isFirst = true;
    for await (const chunk of chunksOf(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (isFirst) this.store.claim(chunk.id.replace(/^(chat)?cmpl-/, ""));
      isFirst = false;
      for (const choice of chunk.choices) $("answer").append(choice.text ?? choice.delta?.content ?? "");
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
    const prompt = $("prompt").value.trim() || this.last || SHORT[this.kind];
    $("burst").disabled = true;
    const ask = (rank) => this.request(`Copy ${rank}. ${prompt}`).then(async (response) => {
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
