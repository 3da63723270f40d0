// Who was busy when: `data.timeline` has rows, each a track's name and spans [name, begin, end, step] in seconds from the run's
// beginning; `data.steps` has [step, begin, end]. One step, or all, is drawn at a time.
const COLOURS = ["#4e79a7", "#59a14f", "#b07aa1", "#e08a1e", "#d04a4c", "#499894", "#9c755f", "#86668a", "#5a7d2a", "#9d5d8e"];
const colourOf = new Map();
for (const [, spans] of data.timeline) for (const [name] of spans) if (!colourOf.has(name)) colourOf.set(name, COLOURS[colourOf.size % COLOURS.length]);

function draw() {
  const chosen = data.steps[+field("when").value], lanes = field("lanes");
  const from = chosen ? chosen[1] : data.extent[0], to = chosen ? chosen[2] : data.extent[1], width = Math.max(to - from, 1e-9);
  lanes.replaceChildren();
  for (const [track, spans] of data.timeline) {
    const lane = element("div", undefined, "lane"), bars = element("div");
    lane.append(element("span", track), bars);
    for (const [name, begin, end, step] of spans) {
      if (end < from || begin > to) continue;
      const bar = element("i", (end - begin) / width > 0.04 ? name : "");
      bar.style.left = `${100 * (begin - from) / width}%`;
      bar.style.width = `${100 * (end - begin) / width}%`;
      bar.style.background = colourOf.get(name);
      bar.title = `${track}: ${name}, ${(end - begin).toFixed(3)} s, step ${step}`;
      bars.append(bar);
    }
    if (bars.children.length) lanes.append(lane);
  }
  field("ruler").replaceChildren(...[0, 0.25, 0.5, 0.75, 1].map((at) => element("span", `${(from + at * width).toFixed(width < 20 ? 2 : 0)} s`)));
}
if (data.timeline.length) {
  field("when").append(new Option("the whole run", "-1"));
  data.steps.forEach(([step], number) => field("when").append(new Option(`step ${step}`, String(number))));
  field("when").addEventListener("input", draw);
  draw();
}
