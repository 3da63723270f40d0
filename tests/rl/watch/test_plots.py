"""Pictures of a run whose names are no TeX, and whose rewards are no fractions."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from emberl.rl.watch.curve import plot_curve
from emberl.rl.watch.dashboard import SECTIONS, draw
from emberl.rl.watch.report import _bins, draw_spread
from matplotlib import image, pyplot

NAMES = ("costs $5 or $\\frac$", "$", "$x_{$", "\\$5$")
"""What matplotlib would raise for, or set in italics."""


def metrics(folder: Path, name: str, rewards: list[float], *others: str) -> Path:
    rows: list[dict[str, object]] = [
        {"stage": "rl", "axis": axis, "step": step, key: value}
        for step, reward in enumerate(rewards, 1)
        for axis, key, value in (
            ("train", "critic/score/mean", reward),
            ("train", f"reward/{name}/mean", reward),
            ("train", "response_length/mean", 9.0),
            ("eval", "val-core/accuracy", 0.5),
            *(("eval", f"val-aux/{each}/accuracy", 0.25) for each in (name, *others)),
        )
    ]
    file = folder / "metrics.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_formula(tmp_path: Path, name: str) -> None:
    file = metrics(tmp_path, name, [0.25, 0.5], "sums")
    assert plot_curve(file, tmp_path / "curve.png", name) == tmp_path / "curve.png"
    rows = [
        {"train/step": 1, "eval/step": 1, f"reward/{name}/mean": 0.5, f"val-aux/{name}/accuracy": 1}
    ]
    assert all(
        draw(section, rows) for section in SECTIONS if section.title in ("Learning", "Rewards")
    )
    answers = {"source": [name, "b"], "score": [1.0, 0.0], "advantage": [0.5, -0.5]}
    shape = {"response_length": [3, 4], "version": [1, 1], "versions": [[1], [0]]}
    assert draw_spread(pyarrow.table(answers | shape)).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("rewards", "low", "high", "label"),
    [
        ([0.0, 1.0], 0, 1.02, "fraction correct"),
        ([-2.0, 3.0], -2.25, 3.25, "reward, fraction correct"),
        ([-0.5, 0.5], -0.55, 0.55, "reward, fraction correct"),
    ],
)
def test_no_reward_is_outside_of_the_curve(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rewards: list[float],
    low: float,
    high: float,
    label: str,
) -> None:
    drawn: list[tuple[float, float, str]] = []
    monkeypatch.setattr(
        pyplot, "close", lambda f: drawn.append((*f.axes[0].get_ylim(), f.axes[0].get_ylabel()))
    )
    plot_curve(metrics(tmp_path, "sums", rewards), tmp_path / "curve.png", "t")
    assert drawn == [(pytest.approx(low), pytest.approx(high), label)]
    assert image.imread(tmp_path / "curve.png").shape[:2] == (720, 960)


@pytest.mark.parametrize(
    ("others", "lines"),
    [((), ["held-out accuracy"]), (("b",), ["held-out: a", "held-out: b", "held-out accuracy"])],
)
def test_parts_have_lines_of_their_own_where_there_is_more_than_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: tuple[str, ...], lines: list[str]
) -> None:
    labels: list[str] = []
    monkeypatch.setattr(
        pyplot, "close", lambda f: labels.extend(x.get_label() for x in f.axes[0].get_lines())
    )
    plot_curve(metrics(tmp_path, "a", [0.0, 1.0], *others), tmp_path / "curve.png", "t")
    assert labels == ["training reward (sampled answers)", *lines]


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ({0.0}, [(-0.4, 0.4)]),
        ({1.0, 0.0}, [(-0.4, 0.4), (0.6, 1.4)]),
        ({0.0, 0.5, 3.0}, [(-0.2, 0.2), (0.3, 0.7), (2.8, 3.2)]),
    ],
)
def test_few_values_have_a_bar_each(values: set[float], bars: list[tuple[float, float]]) -> None:
    assert _bins(values) == [pytest.approx(edge) for bar in bars for edge in bar]
    assert _bins({float(i) for i in range(17)}) == 40
