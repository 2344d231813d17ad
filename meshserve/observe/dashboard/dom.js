// Makes elements and texts. Data only ever becomes text: nothing here parses HTML.

export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "data") Object.assign(made.dataset, value);
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const $ = (id) => document.getElementById(id);

export function setText(element, text) {
  // an unchanged text is not written: that would cost a layout of the page
  if (element.textContent !== text) element.textContent = text;
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenths = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

export const count = (value) => whole.format(value);

export const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

export function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms >= 10000) return `${tenths.format(ms / 1000)} s`;
  if (ms >= 1000) return `${(ms / 1000).toFixed(2)} s`;
  if (ms >= 100) return `${whole.format(ms)} ms`;
  if (ms >= 1) return `${tenths.format(ms)} ms`;
  return ms === 0 ? "0 ms" : `${ms.toFixed(2)} ms`;
}

export function bytes(size) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let rank = 0;
  while (size >= 1000 && rank < units.length - 1) {
    size /= 1000;
    rank += 1;
  }
  return `${tenths.format(size)} ${units[rank]}`;
}

export const isStill = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// Arrow keys in a list of buttons: one button is in the tab order, and the arrows move the focus to others.
export function roam(list) {
  list.addEventListener("keydown", (event) => {
    const forward = ["ArrowDown", "ArrowRight"].includes(event.key);
    if (!forward && !["ArrowUp", "ArrowLeft", "Home", "End"].includes(event.key)) return;
    const buttons = [...list.querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    if (at < 0) return;
    event.preventDefault();
    const last = buttons.length - 1;
    const next = event.key === "Home" ? 0 : event.key === "End" ? last : Math.min(last, Math.max(0, at + (forward ? 1 : -1)));
    buttons[next].focus();
  });
  list.addEventListener("focusin", (event) => {
    const button = event.target.closest("button");
    for (const other of list.querySelectorAll("button")) other.tabIndex = other === button ? 0 : -1;
  });
}

export function keepOneInTabOrder(list) {
  const buttons = [...list.querySelectorAll("button")];
  if (buttons.length && !buttons.some((button) => button.tabIndex === 0)) buttons[0].tabIndex = 0;
}
