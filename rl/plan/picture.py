"""The picture of a plan: what the devices do in a few steps, how old the trained tokens are, and what other splits give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .figures import Figures
from .scenario import Trace

SHOWN_STEPS = 4
COLOURS = {"wait": "#d9d9d9", "train": "#d94801", "publish": "#6a51a3", "decode": "#3182bd"}


def draw_plan(trace: Trace, found: Figures, splits: Mapping[int, Figures], picture: Path, title: str) -> Path:
    """trace: with its timeline; splits: learner devices -> figures of the splits that were tried."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = 3 if len(splits) > 1 else 2
    figure, axes = pyplot.subplots(panels, 1, figsize=(9, 2.2 + 2.2 * panels), layout="constrained")
    _timeline(axes[0], trace)
    axes[0].set_title(f"{title} (simulated)")
    lags = {int(lag): 100 * share for lag, share in found["staleness"].items()}
    axes[1].bar(list(lags), list(lags.values()), color=COLOURS["train"])
    axes[1].set_xticks(range(max(lags) + 1))
    axes[1].set_xlabel("versions behind the trained weights")
    axes[1].set_ylabel("% of trained tokens")
    if panels == 3:
        learners = sorted(splits)
        axes[2].plot(learners, [splits[n]["tokens_per_s"] for n in learners], marker="o", color=COLOURS["decode"])
        axes[2].set_xlabel("learner devices")
        axes[2].set_ylabel("tokens/s")
        idle = axes[2].twinx()
        idle.plot(learners, [100 * splits[n]["learner_idle"] for n in learners], "--", color=COLOURS["train"])
        idle.set_ylabel("learners idle, %", color=COLOURS["train"])
        idle.set_ylim(bottom=0)
    for axis in axes[1:]:
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)
    return picture


def _timeline(axis: object, trace: Trace) -> None:
    """Bars of the last few steps; a worker's colour is as deep as its slots are full."""
    import matplotlib.axes
    from matplotlib.patches import Patch

    assert isinstance(axis, matplotlib.axes.Axes)
    steps = trace.steps[-SHOWN_STEPS:]
    first, last = steps[0].start, steps[-1].end
    lanes = list(dict.fromkeys(interval.lane for interval in trace.timeline))
    for interval in trace.timeline:
        start, end = max(interval.start, first), min(interval.end, last)
        if end > start:
            colour, level = COLOURS[interval.kind], 0.1 + 0.9 * min(1.0, interval.level)
            alpha = level if interval.kind == "decode" else 1.0
            axis.barh(lanes.index(interval.lane), end - start, left=start - first, color=colour, alpha=alpha)
    axis.set_yticks(range(len(lanes)), lanes, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    axis.legend(
        handles=[Patch(color=colour, label=kind) for kind, colour in COLOURS.items()],
        ncols=len(COLOURS),
        fontsize=8,
        loc="upper right",
    )
