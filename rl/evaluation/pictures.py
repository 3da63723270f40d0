"""The pictures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..watch.plots import plain_words
from .store import read

_COLOURS = ("#d94801", "#2171b5", "#31a354", "#756bb1", "#636363", "#dd1c77", "#8c6d31", "#17becf")


@plain_words
def draw(folder: Path, result: Mapping[str, Any]) -> list[Path]:
    """Writes the pictures for which the result has data; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")  # draws without a display
    from matplotlib import pyplot

    made = []
    for name, picture in (
        ("accuracy", _accuracy),
        ("budget", _budget),
        ("k", _by_k),
        ("lengths", _lengths),
    ):
        figure = picture(folder, result, pyplot)
        if figure is not None:
            made.append(folder / f"{name}.png")
            figure.savefig(made[-1], dpi=110)
            pyplot.close(figure)
    return made


def _accuracy(folder: Path, result: Mapping[str, Any], pyplot: Any) -> Any:
    """mean@n of each set with its interval, and that of the other model."""
    rows = [row for row in result["sets"] if row["budget"] is None]
    figure, axes = pyplot.subplots(figsize=(7, 1.4 + 0.6 * len(rows)), layout="constrained")
    other = {
        row["set"]: row["other"]
        for row in result.get("against", {}).get("sets", [])
        if row["budget"] is None
    }
    for place, row in enumerate(rows):
        _point(axes, row[f"mean@{row['n']}"], place, _COLOURS[0], result["model"], place == 0)
        if row["set"] in other:
            axes.plot(
                [other[row["set"]]],
                [place],
                marker="|",
                markersize=22,
                color=_COLOURS[1],
                linestyle="",
                label=result["against"]["model"] if place == 0 else None,
            )
    axes.set_yticks(range(len(rows)), [f"{row['set']} mean@{row['n']}" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel("fraction correct, 95 % interval over problems")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(loc="best", fontsize=9)
    return figure


def _point(
    axes: Any, figure: Mapping[str, Any], place: float, colour: str, label: str, named: bool
) -> None:
    value = figure["value"]
    low, high = figure["interval"] or (value, value)
    axes.errorbar(
        [value],
        [place],
        xerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
        fmt="o",
        color=colour,
        capsize=4,
        label=label if named else None,
    )


def _budget(folder: Path, result: Mapping[str, Any], pyplot: Any) -> Any:
    """Accuracy against the thinking budget, and against the tokens that answers really took; None
    without budgets."""
    names = [row["set"] for row in result["sets"] if row["budget"] is not None]
    if not names:
        return None
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 4), sharey=True, layout="constrained"
    )
    for name, colour in zip(dict.fromkeys(names), _COLOURS * len(names), strict=False):
        rows = [row for row in result["sets"] if row["set"] == name]
        forced = sorted((r for r in rows if r["budget"] is not None), key=lambda r: r["budget"])
        free = [row for row in rows if row["budget"] is None]
        _line(left, forced, [row["budget"] for row in forced], colour, name)
        for row in free:
            figure_free = row[f"mean@{row['n']}"]["value"]
            left.axhline(figure_free, color=colour, linestyle=":", label=f"{name}, no budget")
        ordered = sorted(rows, key=lambda row: row["tokens"])
        _line(right, ordered, [row["tokens"] for row in ordered], colour, name)
    budgets = sorted({row["budget"] for row in result["sets"] if row["budget"] is not None})
    left.set_xscale("log", base=2)
    left.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    left.set_xlabel("thinking budget (tokens)")
    right.set_xlabel("mean tokens of an answer")
    left.set_ylabel("fraction correct")
    left.set_ylim(0, 1.03)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _line(
    axes: Any, rows: Sequence[Mapping[str, Any]], places: Sequence[float], colour: str, label: str
) -> None:
    figures = [row[f"mean@{row['n']}"] for row in rows]
    axes.plot(places, [f["value"] for f in figures], marker="o", color=colour, label=label)
    bounds = [f["interval"] or (f["value"], f["value"]) for f in figures]
    axes.fill_between(
        places, [b[0] for b in bounds], [b[1] for b in bounds], color=colour, alpha=0.15
    )


def _by_k(folder: Path, result: Mapping[str, Any], pyplot: Any) -> Any:
    """pass@k and maj@k against k; None if every problem has one answer."""
    rows = [row for row in result["sets"] if row["budget"] is None and row["n"] > 1]
    if not rows:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    drawn: set[int] = set()
    for row, colour in zip(rows, _COLOURS * len(rows), strict=False):
        for kind, style in (("pass", "-"), ("maj", "--")):
            curves = {
                int(name.split("@")[1]): row[name] for name in row if name.startswith(f"{kind}@")
            }
            ks = [1, *sorted(curves)]
            drawn |= {*ks}
            values = [row[f"mean@{row['n']}"], *(curves[k] for k in ks[1:])]
            axes.plot(
                ks,
                [v["value"] for v in values],
                style,
                marker="o",
                color=colour,
                label=f"{row['set']} {kind}@k",
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(drawn), [str(k) for k in sorted(drawn)])
    axes.set_xlabel("k")
    axes.set_ylabel("fraction of problems")
    axes.set_ylim(0, 1.03)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    return figure


def _lengths(folder: Path, result: Mapping[str, Any], pyplot: Any) -> Any:
    """A histogram of the lengths, in tokens, of right and other answers."""
    table = read(folder, ("budget", "tokens", "status"))
    free = np.array([budget is None for budget in table["budget"].to_pylist()])
    tokens = table["tokens"].to_numpy()[free]
    right = np.array([status == "correct" for status in table["status"].to_pylist()])[free]
    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    step = max(1, -(-int(np.ptp(tokens)) // 40))
    edges = np.arange(tokens.min(), tokens.max() + 2 * step, step) - 0.5
    axes.hist(
        [tokens[right], tokens[~right]],
        bins=edges,
        stacked=True,
        color=[_COLOURS[2], "#bdbdbd"],
        label=["correct", "others"],
    )
    axes.set_xlabel("tokens of an answer")
    axes.set_ylabel("answers")
    axes.legend(fontsize=9)
    return figure
