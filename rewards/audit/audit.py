"""Audits a reward: grades recorded completions and a corpus of hacks with it, and reports its
disagreements.

`audit(use, data)` implements `emberl audit`. The data is JSONL, JSONL.gz or JSONL.zst, or a folder
of such files, as the `rollouts` of a run. A row has the completion (`pred`, `completion` or
`response`), the reference (`gold`, `answer`, `reference` or `ground_truth`), and optionally `label`
(whether the completion is right), `prompt`, `messages`, `source`, `id`. The reward receives the
other columns by name, or in a row of a run those in its `columns`.
"""

from __future__ import annotations

import gzip
import html
import io
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import zstandard

from ..inputs import Reward, RewardInput
from ..registry import load_reward
from ..suite import grade_each
from ..verdict import Status, Verdict
from .hacks import HACKS

_COMPLETION = ("pred", "completion", "response")
_REFERENCE = ("gold", "answer", "reference", "ground_truth")
_SHOWN = 500
"""Most disagreements in the HTML report; the figures count all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row to audit; `label` is None if it has none."""

    id: str
    input: RewardInput
    label: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Disagreement:
    """A row on which the reward disagrees with the label or the second grader."""

    row: Row
    verdict: Verdict
    second: Verdict | None
    kind: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """The figures (plain JSON values), the disagreements, and the names of the hacks that were
    rewarded."""

    figures: Mapping[str, Any]
    disagreements: tuple[Disagreement, ...]
    paid_hacks: tuple[str, ...] = field(default=())


def audit(
    use: str,
    data: Path | str | None,
    *,
    second: str | None = "math",
    html_path: Path | str | None = None,
    style: str | None = None,
    options: Mapping[str, Any] | None = None,
    limit: int = 0,
) -> Audit:
    """Audits the reward `use` on a file (None: only on the hacks) and writes the HTML report.

    `second`: another reward to compare with, None for none. Raises ValueError for a bad file, row
    or reward.
    """
    rows = read_rows(data, limit) if data is not None else []
    reward = load_reward(use, style=style, options=options)
    other = load_reward(second) if second and second != use else None
    try:
        result = audit_reward(reward, rows, second=other, hacks=True)
    finally:
        for graded in (reward, other):
            if (close := getattr(graded, "close", None)) is not None:
                close()
    named = {
        "reward": use,
        "second": second if other is not None else None,
        "data": str(data) if data else None,
    }
    result = Audit(
        figures=named | dict(result.figures),
        disagreements=result.disagreements,
        paid_hacks=result.paid_hacks,
    )
    if html_path is not None:
        Path(html_path).write_text(to_html(result), encoding="utf-8")
    return result


def read_rows(path: Path | str, limit: int = 0) -> list[Row]:
    """The rows of a JSONL, JSONL.gz or JSONL.zst file, or of all such files in a folder. Raises
    ValueError naming the line that is invalid."""
    path = Path(path)
    files = (
        [f for f in sorted(path.glob("[!.]*.jsonl*")) if f.is_file()] if path.is_dir() else [path]
    )
    rows: list[Row] = []
    for file in files:
        rows += _read_file(file, limit - len(rows) if limit else 0)
        if limit and len(rows) == limit:
            break
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _read_file(path: Path, limit: int) -> list[Row]:
    if not path.is_file():
        raise ValueError(f"no file {path}")
    rows: list[Row] = []
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_read_row(line, f"{path}:{number}", str(number)))
                if limit and len(rows) == limit:
                    break
    except (OSError, EOFError, UnicodeDecodeError, zstandard.ZstdError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return rows


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        return io.TextIOWrapper(io.BytesIO(unpacked(path.read_bytes())), encoding="utf-8")
    return path.open(encoding="utf-8")


def unpacked(data: bytes) -> bytes:
    """Decompresses one or more zstandard frames. Raises EOFError if the last one is cut off, which
    zstandard's own readers ignore."""
    parts = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        parts.append(frame.decompress(data))
        if not frame.eof:
            raise EOFError("the file ends in the middle")
        data = frame.unused_data
    return b"".join(parts)


def _read_row(line: str, place: str, name: str) -> Row:
    try:
        columns = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON: {error}") from error
    if not isinstance(columns, dict):
        raise ValueError(f"{place} is no JSON object")
    completion = next(
        (columns.pop(key) for key in _COMPLETION if isinstance(columns.get(key), str)), None
    )
    if completion is None:
        raise ValueError(f"{place} has no completion: a text under one of {', '.join(_COMPLETION)}")
    reference = next((columns.pop(key) for key in _REFERENCE if key in columns), "")
    label = columns.pop("label", None)
    if label is not None and not isinstance(label, (bool, int, float)):
        raise ValueError(f"{place}: label is {label!r}; it must be true or false")
    prompt = columns.pop("prompt", "")
    chat = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
    source = str(columns.pop("source", columns.pop("data_source", "")))
    name = str(columns.get("id", name))
    messages = prompt if chat else ()
    if isinstance(columns.get("columns"), dict):  # of a run, whose own figures are no columns
        messages, columns = columns.get("messages", ()), columns["columns"]
    row = RewardInput(
        messages=tuple(messages),
        completion=completion,
        answer=reference if isinstance(reference, str) else json.dumps(reference),
        prompt=prompt if isinstance(prompt, str) else json.dumps(prompt),
        source=source,
        columns=columns,
    )
    return Row(id=name, input=row, label=None if label is None else bool(label))


def audit_reward(
    reward: Reward,
    rows: Sequence[Row],
    *,
    second: Reward | None = None,
    hacks: bool = True,
    batch: int = 256,
) -> Audit:
    """Grades the rows with a reward; a score above 0.5 counts as accepted."""
    start = time.perf_counter()
    verdicts = _grade(reward, rows, batch)
    seconds = time.perf_counter() - start
    others = _grade(second, rows, batch) if second is not None else [None] * len(rows)
    disagreements = tuple(
        Disagreement(row=row, verdict=verdict, second=other, kind=kind)
        for row, verdict, other in zip(rows, verdicts, others, strict=True)
        if (kind := _kind(row, verdict, other))
    )
    figures: dict[str, Any] = {
        "rows": len(rows),
        "per_second": round(len(rows) / seconds, 1) if rows else None,
        "seconds_max": max((v.seconds for v in verdicts), default=0.0),
        "statuses": {s.value: n for s, n in Counter(v.status for v in verdicts).items()},
        "errors": dict(
            Counter(
                v.message[:200] for v in verdicts if v.status is Status.VERIFIER_ERROR
            ).most_common(5)
        ),
        **_agreement(rows, verdicts),
    }
    if second is not None:
        accepted = [
            (_accepted(v), _accepted(o))
            for v, o in zip(verdicts, others, strict=True)
            if o is not None
        ]
        figures["second"] = {
            "agreement": sum(a == b for a, b in accepted) / max(len(accepted), 1),
            "only_first_accepts": sum(a and not b for a, b in accepted),
            "only_second_accepts": sum(b and not a for a, b in accepted),
        }
    paid: tuple[str, ...] = ()
    if hacks:
        graded = _grade(reward, [Row(id=h.name, input=h.input, label=False) for h in HACKS], batch)
        paid = tuple(
            hack.name for hack, verdict in zip(HACKS, graded, strict=True) if _accepted(verdict)
        )
        figures["hacks"] = {"tried": len(HACKS), "paid": list(paid)}
    return Audit(figures=figures, disagreements=disagreements, paid_hacks=paid)


def _grade(reward: Reward, rows: Sequence[Row], batch: int) -> list[Verdict]:
    inputs = [row.input for row in rows]
    return [
        v for at in range(0, len(rows), batch) for v in grade_each(reward, inputs[at : at + batch])
    ]


def _accepted(verdict: Verdict) -> bool:
    return verdict.score is not None and verdict.score > 0.5


def _kind(row: Row, verdict: Verdict, other: Verdict | None) -> str:
    if verdict.status is Status.VERIFIER_ERROR:
        return "no verdict"
    if row.label is not None:
        if _accepted(verdict) != row.label:
            return "false accept" if not row.label else "false reject"
        return ""
    if other is not None and _accepted(other) != _accepted(verdict):
        return "only the first accepts" if _accepted(verdict) else "only the second accepts"
    return ""


def _agreement(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    labelled = [
        (row, _accepted(v)) for row, v in zip(rows, verdicts, strict=True) if row.label is not None
    ]
    if not labelled:
        return {"labelled": 0}
    by_source: dict[str, list[tuple[bool, bool]]] = {}
    for row, accepted in labelled:
        by_source.setdefault(row.input.source, []).append((bool(row.label), accepted))
    return {
        "labelled": len(labelled),
        **_rates([(bool(row.label), accepted) for row, accepted in labelled]),
        "sources": {
            source: {"rows": len(pairs), **_rates(pairs)}
            for source, pairs in sorted(by_source.items())
        },
    }


def _rates(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    right, wrong = [a for label, a in pairs if label], [a for label, a in pairs if not label]
    return {
        "agreement": sum(label == accepted for label, accepted in pairs) / len(pairs),
        "accepted_of_right": sum(right) / len(right) if right else None,
        "accepted_of_wrong": sum(wrong) / len(wrong) if wrong else None,
        "false_rejects": len(right) - sum(right),
        "false_accepts": sum(wrong),
    }


def to_text(audit: Audit) -> str:
    """The figures for a terminal."""
    figures = audit.figures
    named = figures.get("reward", "reward")
    lines = [f"{named} without rows: --data FILE has graded pairs or recorded completions"]
    if figures["rows"]:
        counts = ", ".join(f"{name} {count}" for name, count in figures["statuses"].items())
        lines = [
            f"{named} on {figures['rows']} rows, {figures['per_second'] or 0:,} a second",
            f"  statuses: {counts}",
        ]
    for source, rates in (
        {"all": figures, **figures["sources"]} if figures.get("labelled") else {}
    ).items():
        right, wrong = rates["accepted_of_right"], rates["accepted_of_wrong"]
        shown = [
            f"{name} {rate:.2%}"
            for name, rate in (("right", right), ("wrong", wrong))
            if rate is not None
        ]
        lines.append(
            f"  {source:24} agreement {rates['agreement']:8.3%}   accepted of "
            + ", of ".join(shown)
            + f"   false accepts {rates['false_accepts']}, false rejects {rates['false_rejects']}"
        )
    if isinstance(second := figures.get("second"), Mapping):
        lines.append(
            f"  second grader: agreement {second['agreement']:.3%}, only the first accepts "
            f"{second['only_first_accepts']}, only the second {second['only_second_accepts']}"
        )
    for message, count in figures["errors"].items():
        lines.append(f"  no verdict, {count} x: {message}")
    if "hacks" in figures:
        paid = figures["hacks"]["paid"]
        lines.append(
            f"  hacks paid: {len(paid)} of {figures['hacks']['tried']}"
            + "".join(f"\n    {p}" for p in paid)
        )
    return "\n".join(lines)


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;"
    "color:#222}\n"
    "table{border-collapse:collapse;width:100%}td,th{border-top:1px solid #ddd;padding:.4rem .6rem;"
    "text-align:left;vertical-align:top}\n"
    "pre{white-space:pre-wrap;word-break:break-word;margin:0;max-height:16rem;overflow:auto;"
    "font-size:13px}\n"
    "summary{cursor:pointer;font-weight:600}.kind{white-space:nowrap;font-weight:600}"
)


def to_html(audit: Audit) -> str:
    """One page without scripts or outside resources: the figures, then each disagreement for a
    person to judge."""
    escape = html.escape
    rows = []
    for item in audit.disagreements[:_SHOWN]:
        completion = item.row.input.completion
        text = (
            completion
            if len(completion) <= 3000
            else completion[:1000] + "\n[...]\n" + completion[-2000:]
        )
        said = (
            f"{item.verdict.status} {item.verdict.score if item.verdict.score is not None else ''}"
        )
        if item.second is not None:
            said += f" / second: {item.second.status}"
        cells = (
            f"<td class=kind>{escape(item.kind)}<br>{escape(item.row.id)}</td>",
            f"<td><pre>{escape(item.row.input.answer)}</pre></td>",
            f"<td><pre>{escape(text)}</pre></td>",
            f"<td>{escape(said)}<br>{escape(item.verdict.message)}</td>",
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    hidden = len(audit.disagreements) - len(rows)
    note = f"<p>{hidden} more are not shown.</p>" if hidden else ""
    title = f"Audit of {audit.figures.get('reward', 'a reward')}"
    return (
        "<!doctype html><html lang=en><meta"
        f" charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{escape(title)}</h1><pre>{escape(to_text(audit))}</pre>"
        f"<h2>Disagreements ({len(audit.disagreements)})</h2>{note}"
        "<table><tr><th>What</th><th>Reference</th><th>Completion</th><th>Verdict</th></tr>"
        f"{''.join(rows)}</table>"
        "<details><summary>Figures as"
        f" JSON</summary><pre>{escape(json.dumps(audit.figures, indent=1))}</pre></details></html>"
    )
