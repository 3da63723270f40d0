"""`emberl plan`: how many devices should roll out, how many should learn, and what to expect of
them.

    emberl plan --device 910B --devices 1024 link.bandwidth=3 link.mode=dense
    emberl plan --from-run runs/quickstart --also runs/large-batch schedule.max_staleness=2

The first plans from data sheets (`devices`), the second from what a run measured (`calibrate`).
Both simulate the schedule that runs really follow; the result is an expectation, not a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..config.key_reference import entries, line_of
from .calibrate import calibrate, trace_lengths
from .devices import DEVICES
from .figures import Figures, best_split, figures, imbalance
from .progress import PlanProgress
from .scenario import Scenario
from .settings import PlanSettings, commit_seconds, load_plan, make_scenario
from .simulator import simulate


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The answer."""

    title: str
    scenario: Scenario
    figures: Figures
    sources: dict[str, str]
    """Where its numbers are from."""
    learners: int | None = None
    """Devices; None where a run's own layout was simulated."""
    splits: dict[int, Figures] = field(default_factory=dict)
    """Of each number of learner devices that was tried."""

    def record(self) -> dict[str, Any]:
        """For `--json`."""
        rates = {str(n): tried["tokens_per_s"] for n, tried in self.splits.items()}
        return {
            "simulated": True,
            "title": self.title,
            "learners": self.learners,
            "engines": self.scenario.workers,
            "slots": self.scenario.slots,
            **self.figures,
            "splits_tokens_per_s": rates,
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
    settings.check_split(settings.learners or 1)

    def tried(learners: int) -> Figures:
        scenario = make_scenario(settings, learners, lengths)
        what = f"{settings.devices} devices, {learners} learn"
        return figures(simulate(scenario, progress.watch(what, scenario.steps)))

    if settings.learners is not None:
        candidates = [settings.learners]
    else:
        node, most = settings.hardware.per_node, settings.devices - settings.cards
        candidates = list(range(node, most + 1, node)) or [most]
    context = settings.mean_context
    guess = min(candidates, key=lambda n: imbalance(make_scenario(settings, n), context))
    learners, splits = best_split(tried, candidates, guess, progress.expect)
    name, link = settings.hardware.name, settings.link
    title = f"{settings.model} on {settings.devices} x {name}"
    return Plan(
        title=f"{title}, {link.mode} weights at {link.bandwidth:g} GB/s a node",
        scenario=make_scenario(settings, learners, lengths),
        figures=splits[learners],
        learners=learners,
        splits=splits,
        sources=_sources(settings),
    )


def _sources(settings: PlanSettings) -> dict[str, str]:
    name, link = settings.hardware.name, settings.link
    rates = f"rates of {link.rates or 'the data sheet (assumptions)'}"
    way = "link.commit" if link.commit is not None else f"{link.engine}, {link.mode}, {rates}"
    commit = f"{commit_seconds(settings):.3g} s in which an engine stands still: {way}"
    return {
        **{f"{name} {figure}": text for figure, text in settings.hardware.sources.items()},
        "model": settings.shape.source,
        "learner.fixed, link.*, reward.*": "assumptions; see emberl plan --keys",
        "commit": commit,
    }


def describe_keys() -> str:
    """All settings with their defaults and what they mean, and the data sheets."""
    keys = [line_of(entry, whole=True).removesuffix("  # ") for entry in entries(PlanSettings)]
    sheets = [
        f"# {d.name}: {name}: {text}" for d in DEVICES.values() for name, text in d.sources.items()
    ]
    return "\n".join([*keys, *sheets])


def show(plan: Plan, console: Console) -> None:
    """The table for a person."""
    table = Table(
        title=f"{escape(plan.title)} (simulated)", show_header=False, title_justify="left"
    )
    for name, value in _lines(plan).items():
        table.add_row(name, value)
    console.print(table)
    if len(plan.splits) > 1:
        splits = Table("learner devices", "tokens/s", "step, s", "learners idle", "rollouts idle")
        for n, tried in plan.splits.items():
            splits.add_row(
                f"{n} *" if n == plan.learners else str(n),
                f"{tried['tokens_per_s']:,.0f}",
                f"{tried['step_s']:.4g}",
                f"{tried['learner_idle']:.1%}",
                f"{tried['rollout_idle']:.1%}",
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
