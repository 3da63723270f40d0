"use strict";
// The browser of samples. `data.problems` and `data.samples` are objects of values; a sample has the values of its problem, too.
// `data.filters` and `data.parts` say which of them are filtered by, and shown of an open sample, each with its name.
const data = JSON.parse(document.getElementById("data").textContent);
const field = (id) => document.getElementById(id);
const SHOWN = 50;
let found = [], first = 0;

// Whatever a model or a data set says is text here: nothing is ever parsed as HTML.
function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}
function valueOf(sample, key) { return key in sample ? sample[key] : data.problems[sample.problem][key]; }
function shown(sample, key) { const value = valueOf(sample, key); return value === null ? "none" : String(value); }
function labelled(name, made) { const label = element("label", name); label.append(made); return label; }
function input(id, type) { const made = element("input"); made.id = id; made.type = type; return made; }

function build() {
  const form = field("filters");
  for (const [key, name] of data.filters) {
    const counts = new Map(), select = element("select");
    for (const sample of data.samples) counts.set(shown(sample, key), (counts.get(shown(sample, key)) || 0) + 1);
    select.id = key;
    select.append(new Option("all", ""));
    const sorted = [...counts].sort((a, b) => typeof valueOf(data.samples[0], key) === "number" ? a[0] - b[0] : b[1] - a[1]);
    for (const [value, count] of sorted) select.append(new Option(`${value} (${count})`, value));
    const label = labelled(name, select);
    label.hidden = counts.size < 2 && key !== "status";
    form.append(label);
  }
  form.append(labelled("tokens from", input("from", "number")), labelled("to", input("to", "number")));
  const search = input("search", "search"), turns = element("span");
  search.placeholder = "in question, answer, id";
  const [back, next] = [["back", "\u2039", -SHOWN], ["next", "\u203a", SHOWN]].map(([id, text, by]) => {
    const button = element("button", text);
    button.id = id;
    button.type = "button";
    button.addEventListener("click", () => turn(by));
    return button;
  });
  const count = element("span");
  count.id = "count";
  turns.append(back, " ", count, " ", next);
  form.append(labelled("search", search), turns);
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
}
function matches(sample) {
  for (const [key] of data.filters) if (field(key).selectedIndex > 0 && shown(sample, key) !== field(key).value) return false;
  const from = field("from").value, to = field("to").value;
  if ((from !== "" && sample.tokens < +from) || (to !== "" && sample.tokens > +to)) return false;
  const words = field("search").value.toLowerCase();
  return !words || ["id", "question", "thoughts", "text"].some((key) => String(valueOf(sample, key) || "").toLowerCase().includes(words));
}
function fill(body, sample) {
  for (const [key, name, style] of data.parts) {
    const text = valueOf(sample, key);
    if (text) body.append(element("h4", name), element("pre", text, style));
  }
}
function show() {
  const list = field("list");
  list.replaceChildren();
  for (const sample of found.slice(first, first + SHOWN)) {
    const item = element("details"), line = element("summary");
    const question = valueOf(sample, "question").trim().split("\n")[0];
    line.append(element("span", sample.status, "badge " + sample.status), element("span", question, "what"));
    line.append(element("span", sample.line, "number"));
    item.append(line);
    item.addEventListener("toggle", () => { if (item.open && item.children.length === 1) { const body = element("div"); fill(body, sample); item.append(body); } });
    list.append(item);
  }
  field("count").textContent = found.length ? `${first + 1} to ${Math.min(first + SHOWN, found.length)} of ${found.length}` : "none";
}
function filter() { found = data.samples.filter(matches); first = 0; show(); }
function turn(by) { if (first + by >= 0 && first + by < found.length) { first += by; show(); } }
build();
filter();
