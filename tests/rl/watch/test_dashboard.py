"""What stands together: every name is one that runs log, W&B's workspace without its server, and
pictures of a run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from emberl.rl.watch import dashboard
from emberl.rl.watch.dashboard import SECTIONS, Panel, as_regex, curves, draw_all, matching
from emberl.rl.watch.sinks import AXES

SOURCES = Path(__file__).parents[3] / "rl"
LOGGED = json.loads((Path(__file__).parent / "logged_metrics.json").read_text())
"""Names of a run of `configs/quickstart.yaml` in small, with `schedule.max_staleness=1`."""
ELSEWHERE = {
    "actor/pg_clipfrac_lower": "learner/training_step.py",
    "actor/kl_loss": "learner/training_step.py",
    "actor/reward_kl_penalty": "watch/step_metrics.py",
    "sft/heldout_loss": "sft.py",
    "num_turns/mean": "watch/step_metrics.py",
    "system/*/device_*": "watch/system.py",
}
"""Of other runs: the file that logs each."""


def test_every_name_is_one_that_a_run_logs() -> None:
    missing = [
        name
        for section in SECTIONS
        for panel in section.panels
        for name in panel.metrics
        if not matching([name], LOGGED) and name not in ELSEWHERE
    ]
    assert missing == []
    for name, file in ELSEWHERE.items():
        last = name.split("/")[1] if name.startswith("num_turns") else name.split("/")[-1]
        stem = last.removesuffix("*") if "*" in last else last
        text = (SOURCES / file).read_text()
        assert stem in text or name.split("/")[0] in text, f"{file} logs no {name}"


def test_every_panel_has_the_axis_that_wandb_gives_its_names() -> None:
    def axis_of(name: str) -> str:
        [found] = [axis for axis, own in AXES.items() if matching(own, [name])]
        return found

    wrong = [
        (name, panel.axis)
        for section in SECTIONS
        for panel in section.panels
        for name in panel.metrics
        if axis_of(name.replace("*", "x")) != panel.axis
    ]
    assert wrong == []
    for name in LOGGED:
        if name not in AXES:
            axis_of(name)  # one, and only one: of several, W&B would take any
    assert [section.title for section in SECTIONS] == [
        *("Learning", "Rollouts", "Rewards", "Weight sync", "Schedule", "System"),
    ]


def test_a_pattern_is_the_same_for_wandb_and_for_a_picture() -> None:
    names = ["reward/a/mean", "reward/a/std", "reward/a.b/mean", "xreward/a/mean", "loss"]
    patterns = ("reward/*/mean", "loss")
    assert matching(patterns, names) == ["reward/a.b/mean", "reward/a/mean", "loss"]
    found = [name for name in names if re.search(as_regex(patterns), name)]
    assert sorted(found) == sorted(matching(patterns, names))


def test_the_workspace_has_the_sections_and_their_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package's names, as of wandb-workspaces 0.4.13: `LinePlot(title, x, y,
    metric_regex)`, `Section(name, panels, is_open)`, `Workspace(name, project, entity,
    sections)`."""

    def keys(**given: Any) -> dict[str, Any]:
        return given

    reports: Any = ModuleType("wandb_workspaces.reports.v2")
    reports.LinePlot = keys
    spaces: Any = ModuleType("wandb_workspaces.workspaces")
    spaces.Section = spaces.Workspace = keys
    for name in ("wandb_workspaces", "wandb_workspaces.reports"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", reports)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", spaces)
    sys.modules["wandb_workspaces.reports"].v2 = reports  # type: ignore[attr-defined]
    sys.modules["wandb_workspaces"].workspaces = spaces  # type: ignore[attr-defined]
    made = dashboard.workspace("p", "me", "n")
    assert (made["project"], made["entity"], made["name"]) == ("p", "me", "n")
    assert [len(s["panels"]) for s in made["sections"]] == [len(s.panels) for s in SECTIONS]
    reward = made["sections"][0]["panels"][1]
    assert reward == {"title": "reward", "x": "train/step", "y": ["critic/score/mean"]}
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://nowhere.invalid")
    with pytest.raises(ValueError, match="W&B has no key here"):
        dashboard.save(made)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    with pytest.raises(ValueError, match="did not take the workspace: AttributeError"):
        dashboard.save(made)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(ValueError, match="pip install wandb-workspaces"):
        dashboard.workspace("p", None, "n")


def test_a_picture_has_the_points_of_the_run(tmp_path: Path) -> None:
    rows = [
        {"stage": "sft", "axis": "train", "step": 1, "actor/loss": 2.0, "sft/loss": 2.0},
        {
            "stage": "rl",
            "axis": "train",
            "step": 1,
            "rollout/version": 0,
            "sched/rollout_idle": 0.5,
        },
        {
            "stage": "rl",
            "axis": "train",
            "step": 2,
            "rollout/version": 1,
            "sched/rollout_idle": None,
        },
        {"stage": "rl", "axis": "eval", "step": 2, "val-core/accuracy": 0.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "config.yaml").write_text("name: t\n")
    system = [{"time": 100.0, "system/0/cpu": 0.5}, {"time": 115.0, "system/0/cpu": 0.75}]
    (tmp_path / "system.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in system))
    all_rows = dashboard.all_rows(rows, system)

    def points(axis: str, name: str) -> Any:
        return curves(all_rows, Panel(title="", metrics=(name,), axis=axis))

    assert points("sft/step", "sft/loss") == {"sft/loss": [(1, 2.0)]}
    assert points("train/step", "actor/loss") == {}, "SFT has an axis of its own"
    assert points("rollout/version", "sched/*") == {"sched/rollout_idle": [(0, 0.5)]}
    assert points("eval/step", "val-core/*") == {"val-core/accuracy": [(2, 0.25)]}
    assert points("system/seconds", "system/*/cpu") == {"system/0/cpu": [(0, 0.5), (15, 0.75)]}
    assert draw_all(tmp_path, tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "system.jsonl").unlink()
    with pytest.raises(ValueError, match="has logged nothing yet"):
        draw_all(tmp_path, tmp_path / "d.png")
