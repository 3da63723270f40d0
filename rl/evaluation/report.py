"""The report of an evaluation: figures as JSON, tables for a terminal, lines of a comparison."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...rewards.verdict import Status
from ..config.load import ConfigError
from .measures import Outcome, accuracy, compare, interval, mean_tokens, reward
from .store import Cell, outcomes_of, read

Figures = dict[str, Any]
_ACROSS = 4
"""Most sets that fit side by side on a terminal."""


def figures(outcomes: Sequence[Outcome], ks: Sequence[int]) -> Figures:
    """The figures of one set at one budget; means over problems come with their intervals."""
    n = outcomes[0].n
    figures_of_set: Figures = {"problems": len(outcomes), "n": n}

    def mean(name: str, of: Callable[[Outcome], float]) -> None:
        values = [of(outcome) for outcome in outcomes]
        figures_of_set[name] = {"value": sum(values) / len(values), "interval": interval(values)}

    mean(f"mean@{n}", lambda o: o.mean)
    for k in ks:
        if k > 1:
            mean(f"pass@{k}", lambda o, k=k: o.passed(k))  # type: ignore[misc]
            mean(f"maj@{k}", lambda o, k=k: o.majority(k))  # type: ignore[misc]
    answers = sum(o.n for o in outcomes)

    def share(status: Status) -> float:
        return sum(s is status for o in outcomes for s in o.statuses) / answers

    return figures_of_set | {
        "reward": reward(outcomes),
        "tokens": mean_tokens(outcomes),
        "thought_tokens": sum(t for o in outcomes for t in o.thoughts) / answers,
        "truncated": sum(cut for o in outcomes for cut in o.cut) / answers,
        "unparseable": share(Status.UNPARSEABLE),
        "unknown": share(Status.UNKNOWN),
        "over_limit": share(Status.OVER_LIMIT),
        "verifier_errors": round(share(Status.VERIFIER_ERROR) * answers),
    }


def by_source(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    by_name: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_name[outcome.source].append(outcome)
    return by_name


def sets_of(cells: Mapping[Cell, Sequence[Outcome]], ks: Sequence[int]) -> list[Figures]:
    """A row of figures for each set and budget; with `sources` if there are several."""
    rows = []
    for (name, budget), outcomes in cells.items():
        row: Figures = {"set": name, "budget": budget} | figures(outcomes, ks)
        sources = by_source(outcomes)
        if len(sources) > 1:
            row["sources"] = {each: figures(part, ks) for each, part in sources.items()}
        rows.append(row)
    return rows


def compare_folders(ours: Path, others: Path) -> list[dict[str, Any]]:
    """A comparison for each set and budget that both have, on the problems that both have.

    Raises ConfigError if they have none in common, or other questions under the same ids.
    """
    questions = [
        dict(zip(zip(t["set"].to_pylist(), t["problem"].to_pylist(), strict=True),
                 zip(t["question"].to_pylist(), t["reference"].to_pylist(), strict=True),
                 strict=True))
        for t in (read(folder, ("set", "problem", "question", "reference"))
                  for folder in (ours, others))
    ]  # fmt: skip
    shared = questions[0].keys() & questions[1].keys()
    if differing := [key for key in shared if questions[0][key] != questions[1][key]]:
        raise ConfigError(
            f"--against: {len(differing)} of {len(shared)} problems have another question or"
            f" reference there, e.g. {differing[0][1]}; evaluate both on the same data"
        )
    cells, theirs = outcomes_of(ours), outcomes_of(others)
    compared = []
    for cell in (cell for cell in cells if cell in theirs):
        known = {outcome.problem: outcome for outcome in theirs[cell]}
        both = [outcome for outcome in cells[cell] if outcome.problem in known]
        if both:
            other = [known[outcome.problem] for outcome in both]
            result = compare(both, other)
            compared.append(
                {
                    "set": cell[0],
                    "budget": cell[1],
                    "ours": accuracy(both),
                    "other": accuracy(other),
                }
                | asdict(result)
            )
    if not compared:
        raise ConfigError("--against: the two evaluations have no set and problem in common")
    return compared


def show(result: Mapping[str, Any], console: Console) -> None:
    """Prints the table and the comparisons."""
    names, lines = table_of(result)
    # escaped: rich would take brackets in a path for its markup
    table = Table(title=escape(result["model"]), title_justify="left")
    for place, name in enumerate(names):
        table.add_column(escape(name.strip()), justify="right" if place else "left", no_wrap=True)
    for line in lines:
        table.add_row(*map(escape, line))
    console.print(table)
    for text in comparison_lines(result):
        console.print(text, highlight=False, markup=False)


def table_of(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The names of the columns, and a line for each set, budget and source; transposed if these are
    few, into a line for each figure."""
    rows = [line for row in result["sets"] for line in _with_sources(row)]
    budgets = any(row["budget"] is not None for row in result["sets"])
    names = ["set", *(["budget"] if budgets else []), "problems"]
    measured = [key for row in result["sets"] for key in row if "@" in key]
    names += [*dict.fromkeys(measured), "tokens", "truncated", "unparseable", "no verdict"]
    lines = [[_cell(row, name) for name in names] for row in rows]
    if len(lines) <= _ACROSS:  # many figures of few sets read better from top to bottom
        names, *lines = (list(line) for line in zip(names, *lines, strict=True))
    return names, lines


def _with_sources(row: Figures) -> list[Figures]:
    parts = row.get("sources", {}).items()
    return [row, *({"set": f"  {name}", "budget": row["budget"]} | part for name, part in parts)]


def _cell(row: Figures, name: str) -> str:
    if name == "set":
        return str(row["set"])
    if name == "budget":
        return "none" if row["budget"] is None else f"{row['budget']:,}"
    if name == "problems":
        return f"{row['problems']:,}"
    if name == "tokens":
        return f"{row['tokens']:,.1f}"
    if name == "no verdict":
        return str(row["verifier_errors"])
    if "@" not in name:
        return f"{row[name]:.1%}"
    return shown(row[name]) if name in row else ""


def shown(figure: Mapping[str, Any]) -> str:
    """A figure with its interval, e.g. `12.3% [10.1, 14.6]`."""
    text = f"{figure['value']:.1%}"
    if figure["interval"] is not None:
        low, high = figure["interval"]
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return text


def comparison_lines(result: Mapping[str, Any]) -> list[str]:
    """A line for each comparison of `--against`."""
    lines = []
    for each in result.get("against", {}).get("sets", []):
        at = "" if each["budget"] is None else f" at a budget of {each['budget']}"
        interval = each["interval"]
        within = (
            "" if interval is None else f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
        )
        lines.append(
            f"{each['set']}{at}: {each['ours']:.1%} against {each['other']:.1%} of"
            f" {result['against']['model']}, {100 * each['difference']:+.1f} points{within},"
            f" p={each['p_value']:.3g} ({each['problems']} problems, {each['better']} better,"
            f" {each['worse']} worse)"
        )
    return lines
