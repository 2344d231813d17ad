// Puts the page together: the store, and the parts that show what is in it.

import { Charts } from "./charts.js";
import { Detail } from "./detail.js";
import { $, count, el, setText } from "./dom.js";
import { Player } from "./player.js";
import { Prompt } from "./prompt.js";
import { Requests } from "./requests.js";
import { Store } from "./store.js";
import { Topology } from "./topology.js";

const MAX_LOG = 30;
const WORDS = { alive: "is back", suspect: "is silent: it gets no new work until it answers", draining: "is draining: it takes no new work", dead: "died", left: "left" };

const store = new Store();
const detail = new Detail(store);
const topology = new Topology(store, (id) => detail.openPeer(id));
const player = new Player(store, topology);
const charts = new Charts(store);
new Requests(store, (story) => detail.openStory(story));
new Prompt(store);

function renderTop() {
  const able = (role) => [...store.peers.values()].filter((peer) => peer.state === "alive" && peer.roles.includes(role)).length;
  setText($("num-decode"), String(able("decode")));
  setText($("num-prefill"), String(able("prefill")));
  setText($("mesh-name"), store.meshName);
  document.title = `meshserve · ${store.meshName}`;
}

function log(peer, words) {
  const time = new Date().toLocaleTimeString("en-GB");
  $("log").prepend(el("li", { data: { state: peer.state } }, el("time", {}, time), el("span", {}, el("b", {}, peer.name), ` ${words}`)));
  while ($("log").children.length > MAX_LOG) $("log").lastChild.remove();
}

store.addEventListener("peers", ({ detail: { changed, before, isSnapshot } }) => {
  renderTop();
  for (const peer of changed) {
    const known = before.get(peer.id);
    if (known?.state === peer.state) continue;
    if (peer.state === "joining" || (isSnapshot && !before.size)) continue;
    const isNew = !known || known.state === "joining";
    log(peer, peer.state === "alive" && isNew ? `joined as ${peer.roles.join(", ")}` : (WORDS[peer.state] ?? peer.state));
  }
  if (isSnapshot) {
    const gone = [...before.values()].filter((peer) => !store.peers.has(peer.id) && !["dead", "left"].includes(peer.state));
    for (const peer of gone) log({ ...peer, state: "left" }, "is gone");
  }
  if ($("caption").textContent === "Waiting for the mesh.") setText($("caption"), idleWords());
});

function idleWords() {
  const prefill = [...store.peers.values()].filter((peer) => peer.roles.includes("prefill")).length;
  const how = prefill ? "Long prompts are prefilled on one machine, decoded on another." : "Without a prefill worker, decode workers prefill for themselves.";
  return `${how} Send a prompt to see it pass through.`;
}

const rate = (perS) => (perS >= 10000 ? `${count(perS / 1000)}k` : perS > 0 && perS < 10 ? perS.toFixed(1) : count(perS));

store.addEventListener("point", ({ detail: point }) => {
  setText($("requests-per-s"), point ? rate(point.requests_per_s) : "–");
  setText($("tokens-per-s"), point ? rate(point.tokens_per_s) : "–");
});

store.addEventListener("live", ({ detail: isLive }) => {
  $("connection").dataset.state = isLive ? "live" : "lost";
  setText($("connection"), isLive ? "live" : "reconnecting…");
  document.body.classList.toggle("stale", !isLive);
});

$("theme").addEventListener("click", () => {
  const isDark = getComputedStyle(document.documentElement).colorScheme.includes("dark");
  setTheme(isDark ? "light" : "dark");
});

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("meshserve-theme", theme);
  } catch {
    // without storage the browser's own preference decides next time
  }
  player.readColours();
  charts.draw();
}

try {
  const kept = localStorage.getItem("meshserve-theme");
  if (kept === "light" || kept === "dark") setTheme(kept);
} catch {
  // no storage
}

document.documentElement.dataset.ready = "";
store.open();
