"""The learning curve: one picture that shows whether the run learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..run_directory import read_metrics
from .plots import plain_words


@plain_words
def plot_curve(metrics: Path, picture: Path, title: str) -> Path | None:
    """Accuracy, reward and answer length over RL steps, from `metrics.jsonl`; None without data."""
    rows = read_metrics(metrics)
    train = [r for r in rows if r["axis"] == "train" and r["stage"] == "rl"]
    held_out = [r for r in rows if r["axis"] == "eval" and r["stage"] == "rl"]
    if not train or not held_out:
        return None
    import matplotlib

    matplotlib.use("Agg")  # draws without a display
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 6), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    top.plot(
        *_series(train, "critic/score/mean"),
        color="#9ecae1",
        linewidth=1.2,
        label="training reward (sampled answers)",
    )
    parts = sorted(
        {k for r in held_out for k in r if k.startswith("val-aux/") and k.endswith("/accuracy")}
    )
    for name in parts if len(parts) > 1 else ():  # a single one is the held-out accuracy
        top.plot(
            *_series(held_out, name),
            linewidth=1,
            linestyle=":",
            marker=".",
            label=f"held-out: {name.split('/')[1]}",
        )
    top.plot(
        *_series(held_out, "val-core/accuracy"),
        color="#d94801",
        linewidth=2,
        marker="o",
        label="held-out accuracy",
    )
    low, high = top.get_ylim()  # not 0 to 1 always: a reward need not be a fraction
    shares = low >= -0.06 and high <= 1.06
    top.set_ylim(*((0, 1.02) if shares else (low, high)))
    top.set_ylabel("fraction correct" if shares else "reward, fraction correct")
    top.grid(alpha=0.3)
    top.legend(loc="best", fontsize=9)
    top.set_title(title)
    bottom.plot(*_series(train, "response_length/mean"), color="#31a354", linewidth=1.2)
    bottom.set_ylabel("tokens per answer")
    bottom.set_xlabel("RL step")
    bottom.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    return picture


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(r["step"], r[name]) for r in rows if name in r]
    return [step for step, _ in points], [value for _, value in points]
