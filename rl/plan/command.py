"""`emberl plan`: how many devices should roll out, how many should learn, and what to expect of
them.

    emberl plan --device 910B --devices 1024 link.bandwidth=3 link.mode=dense
    emberl plan --from-run runs/quickstart --also runs/large-batch schedule.max_staleness=2

The first plans from data sheets (`devices`), the second from what a run measured (`calibrate`).
Both simulate the schedule that runs really follow; the result is an expectation, not a measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from ..config.key_reference import entries, line_of
from ..watch.console import duration, say
from .calibrate import calibrate, trace_lengths
from .devices import DEVICES, MODELS
from .settings import PlanSettings, Scenario, load_plan, make_scenario
from .simulator import Figures, figures, simulate

FIRST, EVERY = 3.0, 15.0  # seconds until a line with an estimate, and between two, off a terminal
LINES = {  # of a plan
    "split": "{split}{engines} engines of {slots} slots roll out",
    "step": "{step_s:.4g} s",
    "trained tokens (answers)": "{tokens_per_s:,.0f} a second",
    "rollouts idle": "{rollout_idle:.1%}; {slots_used:.1%} of the slots in use",
    "learners idle": "{learner_idle:.1%}; {learner_busy:.1%} training",
    "sync exposed": (
        "learners {sync_exposed_learner_s:.3g} s, rollouts {sync_exposed_rollout_s:.3g} s a step"
    ),
    "staleness of tokens": "{lags}",
    "evicted groups": "{evicted_groups:.3g} a step",
    "workers lost": "{workers_lost}, groups asked for again {groups_reissued}",
}
COLUMNS = {  # of the splits that were tried
    "tokens/s": "{tokens_per_s:,.0f}",
    "step, s": "{step_s:.4g}",
    "learners idle": "{learner_idle:.1%}",
    "rollouts idle": "{rollout_idle:.1%}",
}


@dataclass(frozen=True)
class Plan:
    """The answer."""

    title: str
    scenario: Scenario
    figures: Figures
    sources: dict[str, str]  # where its numbers are from
    learners: int | None = None  # devices; None where a run's own layout was simulated
    splits: dict[int, Figures] = field(default_factory=dict)  # by the numbers that were tried

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
    given = [name for name, value in options.items() if value is not None]
    if from_run is None and also:
        raise ValueError("--also adds to what --from-run measured: name that run, too")
    if from_run is not None and (given or trace is not None):
        extra = ", ".join(given) or "--trace"
        raise ValueError(f"--from-run plans with the run's own devices: leave out {extra}")
    progress = PlanProgress(console)
    if from_run is None:
        settings = load_plan(overrides, options)
        with progress.bar:
            return _plan_devices(settings, trace, progress)
    scenario, sources = calibrate(from_run, overrides, also)
    title = f"as {from_run}" + (f" with {' '.join(overrides)}" if overrides else "")
    with progress.bar:
        found = figures(simulate(scenario, progress.watch(title, scenario.steps)))
    return Plan(title, scenario, found, sources)


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
    rates = f"{link.engine}, {link.mode}, rates of {link.rates or 'the data sheet (assumptions)'}"
    way = rates if link.commit is None else "link.commit"
    sources = {
        **{f"{settings.device} {figure}": text for figure, text in device.sources.items()},
        "model": MODELS[settings.model].source,
        "learner.fixed, link.*, reward.*": "assumptions; see emberl plan --keys",
        "commit": f"{scenario.publication.commit:.3g} s in which an engine stands still: {way}",
    }
    name = f"{settings.model} on {devices} x {settings.device}"
    title = f"{name}, {link.mode} weights at {link.bandwidth:g} GB/s a node"
    return Plan(title, scenario, splits[learners], sources, learners, splits)


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
        if best == here and stride == 1:
            return candidates[here], dict(sorted(tried.items()))
        if best == here:
            stride //= 2
        here = best


def imbalance(scenario: Scenario, context: float) -> float:
    """The distance from 1 of what full engines decode over what the learners train in the same
    time. context: tokens that a running answer reads."""
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
    """The tables for a person."""
    lags = [f"{k}: {share:.1%}" for k, share in plan.figures["staleness"].items() if share >= 5e-4]
    split = "" if plan.learners is None else f"{plan.learners} devices learn; "
    shown = {**plan.record(), "lags": ", ".join(lags), "split": split}
    title = f"{escape(plan.title)} (simulated)"
    table = Table(title=title, show_header=False, title_justify="left")
    for name, text in LINES.items():
        table.add_row(name, text.format(**shown))
    console.print(table)
    if len(plan.splits) > 1:
        splits = Table("learner devices", *COLUMNS)
        for n, found in plan.splits.items():
            mark = " *" if n == plan.learners else ""
            splits.add_row(f"{n}{mark}", *(text.format(**found) for text in COLUMNS.values()))
        console.print(splits)
    for name, source in plan.sources.items():
        console.print(f"  {name}: {source}", style="dim", highlight=False, markup=False)


class PlanProgress:
    """The progress of simulations, on stderr: a bar on a terminal, elsewhere lines. `watch` follows
    one after another, in the context of `bar`."""

    def __init__(self, console: Console | None) -> None:
        """console: None says nothing."""
        self._console, self._begun = console, time.monotonic()
        self._next = self._begun + FIRST
        self._at, self._total = -1, 1
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(10),
            TextColumn("{task.fields[left]}"),
            console=console,
            refresh_per_second=2,
            transient=True,
            disable=console is None or not console.is_terminal,
        )
        self._task = self.bar.add_task("preparing", total=None, left="")

    def expect(self, simulations: int) -> None:
        """So many at the least, with those that are done."""
        self._total = max(simulations, self._at + 1)

    def watch(self, what: str, steps: int) -> Callable[[int], None]:
        """Another simulation begins; what is returned is told how many of its steps are done."""
        self._at += 1
        self.expect(self._total)
        self._show(what, 0.0)
        return lambda done: self._show(what, done / steps)

    def _show(self, what: str, part: float) -> None:
        done, now = self._at + part, time.monotonic()
        text, left = f"simulating {what}", ""
        if self._total > 1:
            text += f" ({self._at + 1} of about {self._total})"
        if done:
            left = f"{duration((now - self._begun) * (self._total - done) / done)} left"
        self.bar.update(self._task, description=text, left=left, completed=done, total=self._total)
        if self.bar.disable and self._console is not None and (not done or now >= self._next):
            self._next = now + (EVERY if done else FIRST)
            say(self._console, "  ".join(filter(None, [time.strftime("%H:%M:%S"), text, left])))
