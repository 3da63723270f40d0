"""One HTML page of an evaluation: its figures, pictures and a browser of its samples, all in one
file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from ..config.sampling import ThinkingConfig
from .report import comparison_lines, table_of
from .store import SAMPLES, SETTINGS, read
from .thinking import split

PAGE = "report.html"
MOST = 20_000
"""Samples that a page holds; browsers grow slow beyond."""
_COLUMNS = (
    *("set", "problem", "budget", "sample", "source", "question", "reference", "text", "tokens"),
    *("finish_reason", "status", "message", "answer"),
)


def write_page(folder: Path, result: Mapping[str, Any]) -> Path:
    """Writes `report.html`."""
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
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines
    )
    pictures = "".join(
        f'<img alt="{name}" src="data:image/png;base64,'
        f'{base64.b64encode(file.read_bytes()).decode()}">'
        for name in ("accuracy", "budget", "k", "lengths")
        if (file := folder / f"{name}.png").is_file()
    )
    text = Template(Path(__file__).with_suffix(".html").read_text()).substitute(
        title=escape(f"{result['model']}: evaluation"),
        table=f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>",
        comparison="".join(f"<p>{escape(line)}</p>" for line in comparison_lines(result)),
        pictures=pictures,
        note=escape(note),
        data=_as_script(_data(folder, kept)),
    )
    page = folder / PAGE
    page.write_text(text, encoding="utf-8")
    return page


def _spread(rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """All rows of every m-th problem, so that there are not too many."""
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
        samples.append(
            {"problem": numbers[key], "thoughts": thoughts, "text": answer}
            | {"finish": row["finish_reason"]}
            | {k: row[k] for k in ("budget", "sample", "tokens", "status", "message", "answer")}
        )
    return {"problems": problems, "samples": samples}


def _thinking(folder: Path) -> dict[str, ThinkingConfig]:
    """The tags of each set."""
    file = folder / SETTINGS
    if not file.is_file():
        return {}
    sets = json.loads(file.read_text())["eval"]["sets"]
    return {name: ThinkingConfig(**keys["thinking"]) for name, keys in sets.items()}


def _as_script(value: Any) -> str:
    """JSON that a script element can hold: no `<` ends it."""
    text = json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
