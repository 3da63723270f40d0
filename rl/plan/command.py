"""`emberl plan`: how many devices should roll out, how many should learn, and what to expect of
them.

    emberl plan --device 910B --devices 1024 link.bandwidth=3 link.mode=dense
    emberl plan --from-run runs/quickstart --also runs/large-batch schedule.max_staleness=2

The first plans from data sheets (`devices`), the second from what a run measured (`calibrate`).
Both simulate the schedule that runs really follow; the result is an expectation, not a measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..config.key_reference import entries, line_of
from .calibrate import calibrate, trace_lengths
from .devices import DEVICES, MODELS
from .progress import PlanProgress
from .settings import PlanSettings, Scenario, load_plan, make_scenario
from .simulator import Figures, figures, simulate


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer."""

    title: str
    scenario: Scenario
    figures: Figures
    sources: dict[str, str]  # where its numbers are from
    learners: int | None = None  # devices; None where a run's own layout was simulated
    splits: dict[int, Figures] = field(
        default_factory=dict
    )  # of each number of them that was tried

    def record(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "simulated": True,
            "title": self.title,
            "learners": self.learners,
            "engines": self.scenario.workers,
            "slots": self.scenario.slots,
            **self.figures,
            "splits_tokens_per_s": {str(n): f["tokens_per_s"] for n, f in self.splits.items()},
            "sources": self.sources,
        }


def plan(
    overrides: Sequence[str],
    options: Mapping[str, Any],
    from_run: Path | None = None,
    trace: Path | None = None,
    also: Sequence[Path] = (),
    *,
    console: Console | None = None,
) -> Plan:
    """The command; `ConfigError` or `ValueError` for what a person must change. console: where
    progress is shown; None: nowhere."""
    progress = PlanProgress(console)
    if from_run is None:
        if also:
            raise ValueError("--also adds to what --from-run measured: name that run, too")
        settings = load_plan(overrides, options)
        with progress.bar:
            return _plan_devices(settings, trace, progress)
    given = [name for name, value in options.items() if value is not None]
    if given or trace is not None:
        extra = ", ".join(given) or "--trace"
        raise ValueError(f"--from-run plans with the run's own devices: leave out {extra}")
    scenario, sources = calibrate(from_run, overrides, also)
    title = f"as {from_run}" + (f" with {' '.join(overrides)}" if overrides else "")
    with progress.bar:
        found = figures(simulate(scenario, progress.watch(title, scenario.steps)))
    return Plan(title=title, scenario=scenario, figures=found, sources=sources)


def _plan_devices(settings: PlanSettings, trace: Path | None, progress: PlanProgress) -> Plan:
    """Plans from data sheets; searches the best split unless `learners` is set."""
    lengths = trace_lengths(trace) if trace is not None else None
    device, devices, link = DEVICES[settings.device], settings.devices, settings.link

    def tried(learners: int) -> Figures:
        scenario = make_scenario(settings, learners, lengths)
        tell = progress.watch(f"{devices} devices, {learners} learn", scenario.steps)
        return figures(simulate(scenario, tell))

    most = max(1, devices - settings.cards)
    whole_nodes = range(device.per_node, most + 1, device.per_node)
    candidates = [settings.learners] if settings.learners else list(whole_nodes) or [most]
    context = settings.mean_context
    guess = min(candidates, key=lambda n: imbalance(make_scenario(settings, n), context))
    learners, splits = best_split(tried, candidates, guess, progress.expect)
    scenario = make_scenario(settings, learners, lengths)
    way = f"{link.engine}, {link.mode}, rates of {link.rates or 'the data sheet (assumptions)'}"
    if link.commit is not None:
        way = "link.commit"
    commit = f"{scenario.publication.commit:.3g} s in which an engine stands still: {way}"
    return Plan(
        title=(
            f"{settings.model} on {devices} x {settings.device}, {link.mode} weights at"
            f" {link.bandwidth:g} GB/s a node"
        ),
        scenario=scenario,
        figures=splits[learners],
        learners=learners,
        splits=splits,
        sources={
            **{f"{settings.device} {figure}": text for figure, text in device.sources.items()},
            "model": MODELS[settings.model].source,
            "learner.fixed, link.*, reward.*": "assumptions; see emberl plan --keys",
            "commit": commit,
        },
    )


def best_split(
    evaluate: Callable[[int], Figures],
    candidates: list[int],
    guess: int,
    expect: Callable[[int], None] = lambda trials: None,
) -> tuple[int, dict[int, Figures]]:
    """The candidate with the most tokens per second, and the figures of all that were tried.

    More learners first help (while the learners are the bottleneck), then hurt, so the search
    climbs from the guess with halving strides and tries some twenty of many hundred candidates.
    expect: is told before each round how many trials there will be in all, if the search has to
    climb no further.
    """
    tried: dict[int, Figures] = {}

    def rate(i: int) -> float:
        learners = candidates[i]
        if learners not in tried:
            tried[learners] = evaluate(learners)
        return float(tried[learners]["tokens_per_s"])

    here = candidates.index(guess)
    stride = max(1, len(candidates) // 8)
    while True:
        expect(min(len(candidates), max(1, len(tried)) + 2 * stride.bit_length()))
        near = [i for i in (here - stride, here + stride) if 0 <= i < len(candidates)]
        best = max([here, *near], key=rate)
        if best != here:
            here = best
        elif stride == 1:
            return candidates[here], dict(sorted(tried.items()))
        else:
            stride = max(1, stride // 2)


def imbalance(scenario: Scenario, context: float) -> float:
    """How far from 1 is what full engines decode over what the learners train in the same time.
    context: tokens that a running answer reads."""
    table = scenario.table
    step = table.seconds[-1, np.searchsorted(table.context, context, side="right") - 1]
    decoded = scenario.workers * scenario.slots / step
    return float(abs(decoded * scenario.learner_per_token - 1))


def describe_keys() -> str:
    """All settings with their defaults and what they mean, and the data sheets."""
    keys = [line_of(entry, whole=True).removesuffix("  # ") for entry in entries(PlanSettings)]
    sheets = [
        f"# {device}: {figure}: {text}"
        for device, sheet in DEVICES.items()
        for figure, text in sheet.sources.items()
    ]
    return "\n".join([*keys, *sheets])


def show(plan: Plan, console: Console) -> None:
    """The table for a person."""
    title = f"{escape(plan.title)} (simulated)"
    table = Table(title=title, show_header=False, title_justify="left")
    for line in _lines(plan).items():
        table.add_row(*line)
    console.print(table)
    if len(plan.splits) > 1:
        splits = Table("learner devices", "tokens/s", "step, s", "learners idle", "rollouts idle")
        for n, f in plan.splits.items():
            splits.add_row(
                f"{n} *" if n == plan.learners else str(n),
                f"{f['tokens_per_s']:,.0f}",
                f"{f['step_s']:.4g}",
                f"{f['learner_idle']:.1%}",
                f"{f['rollout_idle']:.1%}",
            )
        console.print(splits)
    for name, source in plan.sources.items():
        console.print(f"  {name}: {source}", style="dim", highlight=False, markup=False)


def _lines(plan: Plan) -> dict[str, str]:
    f, scenario = plan.figures, plan.scenario
    split = "" if plan.learners is None else f"{plan.learners} devices learn; "
    lags = [f"{lag}: {share:.1%}" for lag, share in f["staleness"].items() if share >= 5e-4]
    learners, rollouts = f["sync_exposed_learner_s"], f["sync_exposed_rollout_s"]
    return {
        "split": f"{split}{scenario.workers} engines of {scenario.slots} slots roll out",
        "step": f"{f['step_s']:.4g} s",
        "trained tokens (answers)": f"{f['tokens_per_s']:,.0f} a second",
        "rollouts idle": f"{f['rollout_idle']:.1%}; {f['slots_used']:.1%} of the slots in use",
        "learners idle": f"{f['learner_idle']:.1%}; {f['learner_busy']:.1%} training",
        "sync exposed": f"learners {learners:.3g} s, rollouts {rollouts:.3g} s a step",
        "staleness of tokens": ", ".join(lags),
        "evicted groups": f"{f['evicted_groups']:.3g} a step",
        "workers lost": f"{f['workers_lost']}, groups asked for again {f['groups_reissued']}",
    }
