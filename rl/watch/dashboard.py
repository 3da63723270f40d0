"""The layout of a run's metrics in sections of panels, for the W&B workspace of `emberl dashboard`,
for `emberl report`, and for a picture of a run's own `metrics.jsonl`."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .plots import plain_words

ACROSS = 3
"""Panels side by side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """Lines of one picture, e.g. `Panel(title="Reward", metrics=("critic/score/mean",))`."""

    title: str
    metrics: tuple[str, ...]
    """Names as they are logged; `*` stands for any text."""
    axis: str = "train/step"
    """As in `sinks.AXES`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    title: str
    panels: tuple[Panel, ...]


def _panels(axis: str, **metrics: str) -> tuple[Panel, ...]:
    """A panel for each keyword: its name is the title, its value the metrics, split at spaces."""
    return tuple(
        Panel(title=title.replace("_", " "), metrics=tuple(names.split()), axis=axis)
        for title, names in metrics.items()
    )


SECTIONS = (
    Section(
        title="Learning",
        panels=(
            *_panels("eval/step", held_out_accuracy="val-core/accuracy val-aux/*/accuracy"),
            *_panels(
                "train/step",
                reward="critic/score/mean",
                accuracy="training/accuracy",
                loss="actor/loss",
                gradient_norm="actor/grad_norm",
                entropy="actor/entropy_per_token",
                clipped_tokens="actor/pg_clipfrac actor/pg_clipfrac_lower",
                KL="actor/ppo_kl actor/kl_loss actor/reward_kl_penalty",
                learning_rate="actor/lr",
            ),
            *_panels("sft/step", supervised_loss="sft/loss sft/heldout_loss"),
        ),
    ),
    Section(
        title="Rollouts",
        panels=_panels(
            "rollout/version",
            length="response_length/mean response_length/max",
            cut_answers="response_length/clip_ratio",
            turns="num_turns/mean",
        )
        + _panels(
            "train/step",
            engine_and_learner="training/rollout_probs_diff_mean training/rollout_probs_diff_max",
            groups_without_signal=(
                "training/filter_groups/solved_all training/filter_groups/solved_none"
            ),
        ),
    ),
    Section(
        title="Rewards",
        panels=_panels(
            "train/step",
            score="critic/score/mean critic/score/max critic/score/min",
            advantages="critic/advantages/max critic/advantages/min",
            parts="reward/*/mean",
            verifier_errors="training/verifier_errors",
            seconds_of_a_verdict="reward/*/seconds_mean reward/*/seconds_max",
        ),
    ),
    Section(
        title="Weight sync",
        panels=_panels(
            "rollout/version",
            bytes="sync/wire_bytes",
            changed_weights="sync/changed_fraction",
            exposed_seconds="sync/exposed_s",
            phases="sync/diff_s sync/encode_s sync/transfer_s sync/prepare_s sync/apply_s",
            digest_failures="sync/digest_failures",
        ),
    ),
    Section(
        title="Schedule",
        panels=_panels(
            "rollout/version",
            idle="sched/rollout_idle sched/learner_idle",
            staleness="sched/staleness/mean sched/staleness/max",
            groups="sched/groups_running sched/groups_ready sched/groups_evicted",
            workers_restarted="sched/workers_restarted",
        ),
    ),
    Section(
        title="System",
        panels=_panels(
            "train/step",
            seconds_of_a_step="timing_s/step timing_s/gen timing_s/update_actor",
            tokens_a_second="perf/sampled_tokens_per_second perf/throughput",
        )
        + _panels(
            "system/seconds",
            CPU="system/*/cpu",
            memory="system/*/memory",
            devices="system/*/device_*",
        ),
    ),
)


def matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names that match any pattern, in the patterns' order."""
    known = sorted(names)
    return list(dict.fromkeys(n for p in patterns for n in known if fnmatchcase(n, p)))


def curves(rows: Sequence[Mapping[str, Any]], panel: Panel) -> dict[str, list[tuple[float, float]]]:
    """Name -> (x, y) points of each line of a panel, from rows of `all_rows`."""
    names = matching(panel.metrics, {name for row in rows for name in row})
    lines = {
        name: [
            (row[panel.axis], row[name]) for row in rows if panel.axis in row and _known(row, name)
        ]
        for name in names
    }
    return {name: points for name, points in lines.items() if points}


def _known(row: Mapping[str, Any], name: str) -> bool:
    return isinstance(row.get(name), int | float)


def all_rows(
    logged: Sequence[Mapping[str, Any]], system: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` and `system.jsonl` with W&B's names and axes."""
    rows: list[dict[str, Any]] = []
    for row in logged:
        figures = {k: v for k, v in row.items() if k not in ("stage", "axis", "step")}
        axis = row["axis"]
        if row["stage"] == "sft":
            axis = "sft"
            figures = {k if k.startswith("sft/") else f"sft/{k}": v for k, v in figures.items()}
        rows.append({**figures, f"{axis}/step": row["step"]})
    start = system[0]["time"] if system else 0.0
    rows += [
        {**{k: v for k, v in row.items() if k != "time"}, "system/seconds": row["time"] - start}
        for row in system
    ]
    return rows


def draw(section: Section, rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """A PNG of the panels of a section that have data; None if none has."""
    drawn = [(panel, lines) for panel in section.panels if (lines := curves(rows, panel))]
    if not drawn:
        return None
    return _png(section.title, drawn)


@plain_words
def _png(title: str, drawn: Sequence[tuple[Panel, Mapping[str, Any]]]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    down = -(-len(drawn) // ACROSS)
    across = min(ACROSS, len(drawn))
    figure = Figure(figsize=(4.2 * across, 2.5 * down + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    plots = figure.subplots(down, across, squeeze=False).flat
    for plot, (panel, lines) in zip(plots, drawn, strict=False):
        for name, points in lines.items():
            mark = "." if len(points) < 40 else None
            plot.plot(*zip(*points, strict=True), linewidth=1.2, marker=mark, label=name)
        if not any(y for points in lines.values() for _, y in points):
            plot.set_ylim(0, 1)  # all are 0: matplotlib's own range would show negative counts
        plot.set_title(panel.title, fontsize=10)
        plot.set_xlabel(panel.axis, fontsize=8)
        plot.tick_params(labelsize=8)
        plot.grid(alpha=0.3)
        plot.ticklabel_format(axis="y", useOffset=False)
        plot.legend(fontsize=7)
    for plot in list(figure.axes)[len(drawn) :]:
        plot.set_visible(False)
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()


def draw_all(run_dir: Path, file: Path) -> Path:
    """Writes a picture of all sections of a run. Raises ValueError if there is nothing to draw."""
    import numpy as np
    from matplotlib import image

    from .records import logged_rows

    rows = logged_rows(run_dir)
    pictures = [png for section in SECTIONS if (png := draw(section, rows)) is not None]
    if not pictures:
        raise ValueError(f"{run_dir} has logged nothing yet")
    arrays = [image.imread(io.BytesIO(png)) for png in pictures]
    width = max(array.shape[1] for array in arrays)
    padded = [
        np.pad(a, ((0, 0), (0, width - a.shape[1]), (0, 0)), constant_values=1.0) for a in arrays
    ]
    image.imsave(file, np.ascontiguousarray(np.concatenate(padded)))
    return file


def as_regex(patterns: Sequence[str]) -> str:
    """One regular expression that matches any of these patterns, in which `*` is any text."""
    each = (pattern.replace(".", r"\.").replace("*", ".*") for pattern in patterns)
    return f"^({'|'.join(each)})$"


def workspace(project: str, entity: str | None, name: str) -> Any:
    """The sections as a W&B workspace, not yet saved. Raises ValueError without the package."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ValueError(
            "a W&B workspace needs the package wandb-workspaces: pip install wandb-workspaces (or"
            " 'emberl[dashboard]'); --png draws a run without it"
        ) from error

    def plot(panel: Panel) -> Any:
        wild = any("*" in name for name in panel.metrics)
        what = {"metric_regex": as_regex(panel.metrics)} if wild else {"y": list(panel.metrics)}
        return reports.LinePlot(title=panel.title, x=panel.axis, **what)

    return workspaces.Workspace(
        name=name,
        project=project,
        entity=entity or "",
        sections=[
            workspaces.Section(
                name=section.title, panels=[plot(p) for p in section.panels], is_open=True
            )
            for section in SECTIONS
        ],
    )


def save(made: Any) -> str:
    """Saves a workspace at W&B; returns its address. Raises ValueError if W&B does not take it."""
    from .sinks import has_wandb_key

    if not has_wandb_key():
        raise ValueError(
            "W&B has no key here: run `wandb login`, or set WANDB_API_KEY; --png draws a run"
            " without it"
        )
    try:
        return str(made.save().url)
    except Exception as error:  # anything: foreign code and the network
        line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"W&B did not take the workspace: {line}") from error
