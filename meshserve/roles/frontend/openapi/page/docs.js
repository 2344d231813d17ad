// Shows /openapi.json. Data only ever becomes text: nothing here parses HTML.

const main = document.getElementById("main");
const filter = document.getElementById("filter");

function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "data") Object.assign(made.dataset, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// Words with `code` in them.
const words = (text) => text.split("`").map((part, index) => (index % 2 ? el("code", {}, part) : part));
const paragraph = (text, className = "") => el("p", { className }, ...words(text));

let root = {};

function resolved(schema) {
  let found = schema;
  while (found && found.$ref) {
    const target = found.$ref.slice(2).split("/").reduce((place, key) => place[key], root);
    const { $ref, ...own } = found;
    found = { ...target, ...own };
  }
  return found ?? {};
}

const nameOf = (schema) => (schema.$ref ? schema.$ref.split("/").pop() : "");
const shown = (value) => JSON.stringify(value);

// --- kinds, in a line

function bounds(schema) {
  const parts = [];
  if (schema.minimum !== undefined) parts.push(`≥ ${schema.minimum}`);
  if (schema.exclusiveMinimum !== undefined) parts.push(`> ${schema.exclusiveMinimum}`);
  if (schema.maximum !== undefined) parts.push(`≤ ${schema.maximum}`);
  if (schema.minLength) parts.push("not empty");
  if (schema.maxLength !== undefined) parts.push(`≤ ${schema.maxLength} characters`);
  if (schema.minItems) parts.push(`≥ ${schema.minItems}`);
  if (schema.maxItems !== undefined) parts.push(`≤ ${schema.maxItems}`);
  if (schema.maxProperties !== undefined) parts.push(`≤ ${schema.maxProperties} members`);
  if (schema.pattern) parts.push(schema.pattern);
  return parts.length ? ` (${parts.join(", ")})` : "";
}

function kindOf(schema, depth = 0) {
  const found = resolved(schema);
  if (found.const !== undefined) return shown(found.const);
  if (found.enum) return found.enum.map(shown).join(" | ");
  if (found.type === undefined && found.anyOf) {
    if (depth && nameOf(schema)) return nameOf(schema);
    return depth > 2 ? "..." : [...new Set(found.anyOf.map((way) => kindOf(way, depth + 1)))].join(" | ");
  }
  const types = [found.type ?? "any"].flat();
  return types
    .map((type) => {
      if (type === "array") return `[${depth > 2 || !found.items ? "..." : kindOf(found.items, depth + 1)}]`;
      if (type === "object") return nameOf(schema) || "object";
      return type;
    })
    .join(" | ") + bounds(found);
}

// --- what is inside

function insides(schema, trail) {
  const found = resolved(schema);
  const name = nameOf(schema);
  if (name && trail.includes(name)) return null;
  const inner = name ? [...trail, name] : trail;
  if (found.properties && (found.type || !found.anyOf)) return { found, trail: inner };
  if (found.items) return insides(found.items, inner);
  if (found.anyOf) return { ways: found.anyOf, trail: inner };
  if (found.allOf) return insides(found.allOf[0], inner);
  return null;
}

function content(inside) {
  if (inside.found) return fields(inside.found, inside.trail);
  const ways = inside.ways.map((way) => [way, insides(way, inside.trail)]).filter(([, found]) => found);
  if (ways.length === 1) return content(ways[0][1]);
  return el("div", {}, ...ways.map(([way, found]) => nested(nameOf(way) || titleOf(resolved(way)), found, resolved(way).description)));
}

// What a way is called that has no name: by what tells it apart.
function titleOf(schema) {
  const told = ["type", "role"].map((key) => schema.properties?.[key]).find((property) => property?.const ?? property?.enum);
  if (told) return [told.const ?? told.enum].flat().filter((value) => value !== null).join(", ");
  return (schema.required ?? []).join(", ") || kindOf(schema);
}

// Made when it is opened: the document repeats itself without end.
function nested(title, inside, description) {
  const made = el("details", { className: "nested" }, el("summary", {}, title));
  made.addEventListener("toggle", () => {
    if (made.childElementCount > 1) return;
    if (description) made.append(paragraph(description, "muted"));
    made.append(content(inside));
  });
  return made;
}

function row(name, schema, must, trail, description = resolved(schema).description) {
  const found = resolved(schema);
  const inside = insides(schema, trail);
  const isPlain = !inside || (inside.ways && inside.ways.every((way) => !insides(way, trail)));
  const kind = kindOf(schema) + (found.default !== undefined ? `, default ${shown(found.default)}` : "");
  return el(
    "li",
    {},
    el("span", { className: "name" }, name, must ? el("span", { className: "must", title: "required" }, " *") : null),
    el(
      "div",
      { className: "what" },
      el("span", { className: "kind" }, kind),
      description ? paragraph(description) : null,
      isPlain ? null : nested("inside", inside),
    ),
  );
}

const isRefused = (schema) => resolved(schema).description?.startsWith("Not supported");

function fields(schema, trail) {
  const must = schema.required ?? [];
  const all = Object.entries(schema.properties);
  const first = all.filter(([name]) => must.includes(name));
  const rest = all.filter(([name, property]) => !must.includes(name) && !isRefused(property));
  const refused = all.filter(([, property]) => isRefused(property));
  const list = el("ul", { className: "fields" }, ...[...first, ...rest].map(([name, property]) => row(name, property, must.includes(name), trail)));
  if (!refused.length) return list;
  const others = el("ul", { className: "fields" }, ...refused.map(([name, property]) => row(name, property, false, trail, "")));
  const more = el("details", { className: "nested" }, el("summary", {}, `${refused.length} fields that are taken with these values only`), others);
  return el("div", {}, list, more);
}

// --- operations

function command(method, path, operation) {
  const parts = [`curl ${location.origin}${path}`];
  if (method !== "get" && method !== "post") parts.push(`-X ${method.toUpperCase()}`);
  if ((operation.security ?? root.security ?? []).length) parts.push("-H 'authorization: Bearer KEY'");
  const [type, body] = Object.entries(operation.requestBody?.content ?? {})[0] ?? [];
  if (type === "application/json") parts.push(`-d '${shown(body.example).replaceAll("'", "'\\''")}'`);
  else if (type) parts.push("-d key=KEY");
  else if (method === "post") parts.push("-X POST");
  return parts.join(" \\\n    ");
}

function responses(operation) {
  return Object.entries(operation.responses).map(([status, given]) => {
    const response = resolved(given);
    const kinds = Object.entries(response.content ?? {}).map(([type, { schema }]) => {
      const inside = schema ? insides(schema, []) : null;
      return inside ? nested(type, inside) : el("span", { className: "muted" }, type);
    });
    return el("div", { className: "response" }, el("b", {}, status), el("div", {}, ...words(response.description), ...kinds.map((kind) => el("div", {}, kind))));
  });
}

function bodyOf(method, path, operation) {
  const parts = [el("pre", {}, command(method, path, operation))];
  const parameters = (operation.parameters ?? []).map(resolved);
  if (parameters.length) {
    const rows = parameters.map(({ name, in: place, schema, required, description }) => row(`${name} (${place})`, schema, required, [], description));
    parts.push(el("h3", {}, "Parameters"), el("ul", { className: "fields" }, ...rows));
  }
  const [, body] = Object.entries(operation.requestBody?.content ?? {})[0] ?? [];
  if (body) parts.push(el("h3", {}, "Body"), content(insides(body.schema, [])));
  parts.push(el("h3", {}, "Answers"), ...responses(operation));
  return el("div", { className: "body" }, ...parts);
}

function operationOf(method, path, operation) {
  const title = el(
    "summary",
    {},
    el("span", { className: "method" }, method),
    el("span", { className: "path" }, path),
    el("span", { className: "muted" }, operation.summary),
  );
  const made = el("details", { className: "operation", id: operation.operationId, data: { method, text: `${method} ${path} ${operation.summary}`.toLowerCase() } }, title);
  made.addEventListener("toggle", () => {
    if (made.open && made.childElementCount === 1) made.append(bodyOf(method, path, operation));
    if (made.open) history.replaceState(null, "", `#${operation.operationId}`);
  });
  return made;
}

function show() {
  document.getElementById("version").textContent = root.info.version;
  const all = Object.entries(root.paths).flatMap(([path, item]) => Object.entries(item).map(([method, operation]) => [method, path, operation]));
  const sections = root.tags.map(({ name, description }) =>
    el("section", {}, el("h2", {}, name), paragraph(description, "muted"), ...all.filter(([, , { tags }]) => tags.includes(name)).map((found) => operationOf(...found))),
  );
  const raw = el("p", {}, "The document itself: ", el("a", { href: "openapi.json" }, "/openapi.json"), ` (OpenAPI ${root.openapi}).`);
  const about = root.info.description.split("\n\n").map((text) => paragraph(text));
  main.replaceChildren(el("div", { className: "about" }, ...about, raw), ...sections);
  main.removeAttribute("aria-busy");
}

function openNamed() {
  const named = document.getElementById(location.hash.slice(1));
  if (named?.classList.contains("operation")) {
    named.open = true;
    named.scrollIntoView();
  }
}

filter.addEventListener("input", () => {
  const asked = filter.value.trim().toLowerCase();
  for (const section of main.querySelectorAll("section")) {
    const operations = [...section.querySelectorAll(".operation")];
    for (const operation of operations) operation.hidden = !operation.dataset.text.includes(asked);
    section.hidden = operations.every((operation) => operation.hidden);
  }
});

document.getElementById("theme").addEventListener("click", () => {
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme ?? (isDark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
});

addEventListener("hashchange", openNamed);

try {
  const response = await fetch("openapi.json");
  if (!response.ok) throw new Error(`status ${response.status}`);
  root = await response.json();
  show();
  openNamed();
} catch (error) {
  document.getElementById("state")?.replaceChildren(`/openapi.json could not be read: ${error.message}`);
}
