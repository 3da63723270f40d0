"""The HTML page of an evaluation: figures, pictures and a browser of its samples, in one file that
loads nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..config.sampling import ThinkingConfig
from ..watch import page
from .report import comparison_lines, table_of
from .store import SAMPLES, SETTINGS, read
from .thinking import split

PAGE = "report.html"
MOST = 20_000
"""Most samples on a page; browsers grow slow beyond."""
_COLUMNS = (
    *("set", "problem", "budget", "sample", "source", "question", "reference", "text", "tokens"),
    *("finish_reason", "status", "message", "answer"),
)
_SHOWN = {
    "filters": [
        *(["status", "verdict"], ["set", "set"], ["source", "source"]),
        ["budget", "thinking budget"],
    ],
    "parts": [
        *(
            ["question", "question"],
            ["reference", "reference"],
            ["thoughts", "thoughts", "thoughts"],
        ),
        *(["text", "answer"], ["answer", "read as"], ["message", "the verifier says"]),
    ],
}


def write_page(folder: Path, result: Mapping[str, Any]) -> Path:
    """Writes `report.html`; returns its path."""
    rows = read(folder, _COLUMNS).to_pylist()
    kept = _spread(rows)
    note = (
        f"All {len(rows):,} samples."
        if len(kept) == len(rows)
        else (
            f"{len(kept):,} of {len(rows):,} samples, of problems spread over the sets; all are in"
            f" {SAMPLES}/ as Parquet."
        )
    )
    names, lines = table_of(result)
    pictures = "".join(
        page.picture(name, file.read_bytes())
        for name in ("accuracy", "budget", "k", "lengths")
        if (file := folder / f"{name}.png").is_file()
    )
    body = (
        page.table(lines, names)
        + page.paragraphs(comparison_lines(result))
        + f"<div>{pictures}</div><h2>Samples</h2><p>{escape(note)}</p>{page.SAMPLES}"
    )
    return page.write_page(
        folder / PAGE,
        title=f"{result['model']}: evaluation",
        body=body,
        data=_SHOWN | _data(folder, kept),
        scripts=["samples.js"],
    )


def _spread(rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """All rows of every m-th problem, with the least m that leaves about `MOST` rows."""
    if len(rows) <= MOST:
        return rows
    problems = list(dict.fromkeys((row["set"], row["problem"]) for row in rows))
    step = -(-len(rows) // MOST)
    wanted = set(problems[::step])
    return [row for row in rows if (row["set"], row["problem"]) in wanted]


def _data(folder: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    numbers: dict[tuple[str, str], int] = {}
    problems: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    thinking = _thinking(folder)
    for row in rows:
        key = (row["set"], row["problem"])
        if key not in numbers:
            numbers[key] = len(problems)
            problems.append(
                {"id": row["problem"]}
                | {k: row[k] for k in ("set", "source", "question", "reference")}
            )
        thoughts, answer = split(row["text"], thinking.get(row["set"], ThinkingConfig()))
        budget = "" if row["budget"] is None else f", budget {row['budget']}"
        cut = ", cut" if row["finish_reason"] == "length" else ""
        line = f"{row['problem']} #{row['sample']}, {row['tokens']} tokens{budget}{cut}"
        samples.append(
            {"problem": numbers[key], "thoughts": thoughts, "text": answer, "line": line}
            | {k: row[k] for k in ("budget", "tokens", "status", "message", "answer")}
        )
    return {"problems": problems, "samples": samples}


def _thinking(folder: Path) -> dict[str, ThinkingConfig]:
    """The settings of thoughts, with their tags, by set."""
    file = folder / SETTINGS
    if not file.is_file():
        return {}
    sets = json.loads(file.read_text())["eval"]["sets"]
    return {name: ThinkingConfig(**keys["thinking"]) for name, keys in sets.items()}
