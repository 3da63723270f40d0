"""Pictures of an evaluation, by what is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from emberl.rl.evaluation.pictures import _by_k


def row(name: str, values: dict[str, float]) -> dict[str, Any]:
    return {"set": name, "budget": None} | {
        key: value if key == "n" else {"value": value} for key, value in values.items()
    }


def test_every_set_has_its_ticks() -> None:
    """Two sets with another number of answers to a problem: 1, 2 and 8 are drawn."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    many = {"n": 8, "mean@8": 0.25, "pass@2": 0.4, "maj@2": 0.25, "pass@8": 0.75, "maj@8": 0.5}
    few = {"n": 2, "mean@2": 0.5, "pass@2": 0.75, "maj@2": 0.5}
    figure = _by_k(Path(), {"sets": [row("a", many), row("b", few)]}, pyplot)
    (axes,) = figure.axes
    assert axes.get_xticks().tolist() == [1, 2, 8]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "8"]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["a pass@k"] == [[1, 0.25], [2, 0.4], [8, 0.75]]
    assert drawn["b maj@k"] == [[1, 0.5], [2, 0.5]]
    pyplot.close(figure)
