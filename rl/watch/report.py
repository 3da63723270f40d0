"""`emberl report`: a run in one self-contained HTML file.

Its outcome, warnings, curves, histograms, a timeline of processes, sampled answers, and the
configuration with its differences from another run's.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from time import localtime, strftime
from typing import Any

import pyarrow as pa

from ..checkpoints import differences, leaves
from . import page
from .console import duration
from .dashboard import SECTIONS, draw
from .lengths import LENGTHS, read_lengths
from .plots import plain_words
from .records import Record, logged_rows, read_record
from .rollouts import files_of, read_rows
from .spans import LOOP, STEP, Span, in_lanes, read_spans

PAGE = "report.html"
MOST_SAMPLES = 10_000
MOST_CHARACTERS = 40_000_000
"""Most characters of a page's samples together; browsers grow slow beyond."""
MOST_SPANS = 20_000
FEW, RANGES = 16, 40
"""Of a histogram: up to `FEW` distinct values have a bar each, more are counted in `RANGES`."""
_SHOWN = {
    "filters": [
        *(["status", "verdict"], ["axis", "sampled for"], ["step", "step"]),
        ["source", "source"],
    ],
    "parts": [
        *(["question", "question"], ["reference", "reference"], ["text", "answer"]),
        *(["parts", "score and parts"], ["message", "the verifier says"], ["how", "sampled"]),
    ],
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """The answers of a run for the page: data for `samples.js`, and a note on their number."""

    data: dict[str, Any]
    note: str


def write_report(folder: Path, out: Path | None = None, against: Path | None = None) -> Path:
    """Writes the page (`report.html` in the run's directory). Raises ConfigError if it is none."""
    record = read_record(folder)
    other = read_record(against) if against is not None else None
    samples, spans = samples_of(folder), read_spans(folder)
    parts = [
        page.table(summary(record), name="keys"),
        _alerts(record),
        f'<h2>Curves</h2><div class="wide">{_curves(folder)}</div>',
        _spread(folder),
        _timeline(spans),
        f"<h2>Samples</h2><p>{escape(samples.note)}</p>{page.SAMPLES}",
        _settings(record, other),
    ]
    return page.write_page(
        out or folder / PAGE,
        title=f"{record.config.get('name', folder.name)}: {folder.name}",
        body="\n".join(parts),
        data=samples.data | timeline(spans),
        scripts=["samples.js", "timeline.js"],
    )


def summary(record: Record) -> list[tuple[str, str]]:
    """(label, text) rows for the top of the page: state, step, accuracy, time, model."""
    result, config = record.result or {}, record.config
    steps = [row for row in record.logged if row["axis"] == "train"]
    lines = [("state", record.state)]
    if steps:
        last = steps[-1]
        planned = config.get("schedule" if last["stage"] == "rl" else last["stage"], {})
        lines.append(("stage and step", f"{last['stage']} {last['step']}/{planned.get('steps')}"))
    lines += [
        (f"held-out {name.replace('_', ' at the ')}", f"{result[name]:.1%}")
        for name in ("accuracy_start", "accuracy_end")
        if result.get(name) is not None
    ]
    if result:
        lines.append(("time", duration(float(result["seconds"]))))
        lines.append(("tokens sampled a second", f"{result['tokens_per_second']:,.0f}"))
    if result.get("step_time"):
        lines.append(("where the time went", result["step_time"]))
    model = config.get("model", {})
    lines.append(("model", str(model.get("path") or "tiny")))
    lines.append(("algorithm", str(config.get("algorithm"))))
    return lines


def _alerts(record: Record) -> str:
    said = [
        f"{strftime('%d %b %H:%M:%S', localtime(alert['time']))} {alert['title']}: {alert['text']}"
        for alert in record.alerts
    ]
    known = {f"{alert['title']}: {alert['text']}" for alert in record.alerts}
    said += [text for text in (record.result or {}).get("warnings", ()) if text not in known]
    return "<h2>Warnings</h2>" + (page.paragraphs(said, "warning") or "<p>none</p>")


def _curves(folder: Path) -> str:
    rows = logged_rows(folder)
    pictures = [(s.title, png) for s in SECTIONS if (png := draw(s, rows)) is not None]
    return "".join(page.picture(title, png) for title, png in pictures)


def _spread(folder: Path) -> str:
    if not (folder / LENGTHS).exists():
        return ""
    png = draw_spread(read_lengths(folder))
    shown = f'<div class="wide">{page.picture("Spread", png)}</div>'
    return f"<h2>Spread</h2><p>All answers that came to a step.</p>{shown}"


@plain_words
def draw_spread(answers: pa.Table) -> bytes:
    """A PNG of histograms of lengths and staleness, and by source of scores and advantages."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = answers.to_pydict()
    count = answers.num_rows
    source = columns.get("source", [""] * count)
    one = [""] * count
    ages = [
        trained - min(sampled) if sampled else None
        for trained, sampled in zip(columns["version"], columns["versions"], strict=True)
    ]
    panels = {
        "response length, tokens": (columns["response_length"], one),
        "staleness, versions": (ages, one),
        "score": (columns.get("score", []), source),
        "advantage": (columns.get("advantage", []), source),
    }
    figure = Figure(figsize=(12, 2.8), layout="constrained")
    for plot, (title, (values, by)) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        known = [(v, s) for v, s in zip(values, by, strict=False) if v is not None]
        names = sorted({s for _, s in known})
        if known:
            plot.hist(
                [[v for v, s in known if s == name] for name in names],
                bins=_bins({float(v) for v, _ in known}),
                stacked=True,
                label=names,
            )
        plot.set_title(title, fontsize=10)
        plot.tick_params(labelsize=8)
        if any(names):
            plot.legend(fontsize=7)
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()


def _bins(values: Collection[float]) -> int | list[float]:
    """The bins of a histogram: edges around each of few values, else a number of ranges."""
    if len(values) > FEW:
        return RANGES
    ordered = sorted(values)
    gap = min((b - a for a, b in pairwise(ordered)), default=1.0)
    return [edge for value in ordered for edge in (value - 0.4 * gap, value + 0.4 * gap)]


def _timeline(spans: Sequence[Span]) -> str:
    if not spans:
        return ""
    return (
        '<h2>Who was busy when</h2><form><label>shown<select id="when"></select></label></form>'
        '<div id="lanes"></div><div id="ruler"></div>'
    )


def timeline(spans: Sequence[Span]) -> dict[str, Any]:
    """Rows of spans in seconds from the first one's beginning, the newest `MOST_SPANS`."""
    spans = spans[-MOST_SPANS:]
    start = min((span.start for span in spans), default=0.0)

    def at(time: float) -> float:
        return round(time - start, 4)

    rows = [
        [
            track,
            [
                [s.name, at(s.start), at(s.end), s.step]
                for s in lane
                if (s.track, s.name) != (LOOP, STEP)
            ],
        ]
        for track, lanes in in_lanes(spans).items()
        for lane in lanes
    ]
    steps = [[s.step, at(s.start), at(s.end)] for s in spans if (s.track, s.name) == (LOOP, STEP)]
    extent = [0.0, at(max((span.end for span in spans), default=0.0))]
    return {"timeline": [row for row in rows if row[1]], "steps": steps, "extent": extent}


def samples_of(folder: Path) -> Samples:
    """The answers that the run kept; the newest of them if they are too many for a page."""
    files = len(files_of(folder))
    problems: list[dict[str, Any]] = []
    numbers: dict[tuple[str, str], int] = {}
    samples: list[dict[str, Any]] = []
    size, used = 0, 0
    for count in range(files):
        rows = list(read_rows(folder, newest=count))
        size += sum(len(row["completion"]) for row in rows)
        if samples and (len(samples) + len(rows) > MOST_SAMPLES or size > MOST_CHARACTERS):
            break
        samples[:0] = [_sample(row, problems, numbers) for row in rows]
        used += 1
    what = "all" if used == files else f"those of the newest {used} of {files} files"
    note = f"{len(samples):,} answers, {what} in rollouts/."
    if not files:
        note = "This run kept no answers (tracking.rollouts)."
    return Samples(data=_SHOWN | {"problems": problems, "samples": samples}, note=note)


def _sample(
    row: Mapping[str, Any], problems: list[dict[str, Any]], numbers: dict[tuple[str, str], int]
) -> dict[str, Any]:
    key = (str(row["problem"]), row["question"])
    if key not in numbers:
        numbers[key] = len(problems)
        problems.append(
            {"id": key[0], "question": key[1]} | {k: row[k] for k in ("reference", "source")}
        )
    score = "no score" if row["score"] is None else f"score {row['score']:.4g}"
    advantage = "" if row["advantage"] is None else f", advantage {row['advantage']:.3g}"
    parts = [f"{name} {value:.4g}" for name, value in row["parts"].items()]
    versions = ", ".join(f"{count} tokens by version {v}" for v, count in row["versions"])
    cut = ", cut" if row["finish_reason"] == "length" else ""
    seconds = row["finished"] - row["started"]
    return {
        "problem": numbers[key],
        "axis": "training" if row["axis"] == "train" else "evaluation",
        "step": row["step"],
        "status": row["status"],
        "tokens": row["tokens"],
        "text": row["completion"],
        "message": row["message"],
        "parts": f"{score}{advantage}\n" + "\n".join(parts),
        "how": f"{versions or 'no token'}; decoded in {seconds:.3g} s, marked in"
        f" {row['grade_s']:.3g} s",
        "line": f"step {row['step']}, {row['problem']} #{row['sample']}, {row['tokens']} tokens,"
        f" {score}{advantage}{cut}",
    }


def _settings(record: Record, other: Record | None) -> str:
    here = leaves(record.config)
    text = ""
    if other is not None:
        changed = differences(leaves(other.config), here)
        lines = [line.split(": ", 1) for line in changed.values()]
        rows = [(key, *values.rsplit(", now ", 1)) for key, values in lines]
        title = f"Differences from {other.folder}"
        text = f"<h2>{escape(title)}</h2>" + (
            page.table(rows, ("key", str(other.folder), str(record.folder)), "keys")
            if rows
            else "<p>none</p>"
        )
    every = page.table([(key, json.dumps(value)) for key, value in here.items()], name="keys")
    return f"{text}<h2>Configuration</h2><details><summary>every key</summary>{every}</details>"
