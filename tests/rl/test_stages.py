"""Running recipes, with a run that only leaves what a run leaves: what is skipped, redone and
refused, and the table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from emberl.rl.checkpoints import latest_checkpoint
from emberl.rl.config.load import Config, ConfigError
from emberl.rl.config.stages import Recipe, load_experiment
from emberl.rl.recipe import Result
from emberl.rl.stages import run_recipe

TEXT = """\
name: r
model: {tiny: {hidden: 64}}
data: {source: arithmetic, heldout: 16}
optim: {lr: 1.0e-4}
stages:
  - {name: cold, kind: sft, sft: {steps: 30}}
  - {name: think, kind: rl, schedule: {steps: 7}}
  - {name: samples, kind: reject, reject: {problems: 10}}
  - {name: small, kind: distill, model: {tiny: {hidden: 32}}, sft: {data: stage:samples}}
"""
LOGGED: dict[str, list[dict[str, Any]]] = {
    "cold": [
        {"stage": "sft", "step": 0, "axis": "eval", "sft/heldout_loss": 2.0},
        {"stage": "sft", "step": 0, "axis": "eval", "val-core/accuracy": 0.0, "val-aux/response_length/mean": 90.0},
        {"stage": "sft", "step": 30, "axis": "train", "sft/loss": 0.3},
        {"stage": "sft", "step": 30, "axis": "eval", "val-core/accuracy": 0.25, "val-aux/response_length/mean": 20.4},
    ],
    "think": [
        {"stage": "rl", "step": 0, "axis": "eval", "val-core/accuracy": 0.25, "val-aux/a/response_length/mean": 20.0},
        {"stage": "rl", "step": 7, "axis": "train", "critic/score/mean": 0.5},
        # two sets: the mean of their lengths
        {"stage": "rl", "step": 7, "axis": "eval", "val-core/accuracy": 0.75, "val-aux/a/response_length/mean": 30.0,
         "val-aux/b/response_length/mean": 50.0, "val-aux/b@8/response_length/mean": 9.0},
    ],
    "samples": [
        {"stage": "reject", "step": 1, "axis": "train", "reject/answers": 32.0, "reject/correct": 24.0,
         "reject/wrong": 8.0, "reject/rows": 8.0, "reject/accuracy": 0.75},
        {"stage": "reject", "step": 2, "axis": "train", "reject/answers": 8.0, "reject/correct": 2.0, "reject/cut": 6.0,
         "reject/rows": 2.0, "reject/accuracy": 0.25},
    ],
    "small": [{"stage": "sft", "step": 2, "axis": "train", "sft/loss": 0.3}],
}  # fmt: skip
TABLE = """\
| stage   | kind    | before | after | tokens | steps | minutes |                                           |
| ------- | ------- | ------ | ----- | ------ | ----- | ------- | ----------------------------------------- |
| cold    | sft     | 0.0%   | 25.0% | 20     | 30    | 1.5     |                                           |
| think   | rl      | 25.0%  | 75.0% | 40     | 7     | 1.5     |                                           |
| samples | reject  |        |       |        | 2     | 1.5     | 26 of 40 answers accepted (65.0%), 10 kept |
| small   | distill |        |       |        | 2     | 1.5     |                                           |
"""


def cells(line: str) -> list[str]:
    return [cell.strip().strip("-") for cell in line.split("|")]


class Runs:
    """Leaves what a run leaves, and counts."""

    def __init__(self) -> None:
        self.done: list[tuple[str, bool]] = []
        self.killed = ""
        self.interrupted = ""

    def __call__(self, config: Config, *, resume: str, override: bool) -> Result:
        folder = config.output
        name = folder.name
        self.done.append((name, latest_checkpoint(folder) is not None))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in LOGGED[name]))
        status = "ok"
        if name in (self.killed, self.interrupted):
            checkpoint = folder / "checkpoints" / "rl-000003"
            checkpoint.mkdir(parents=True)
            (checkpoint / "progress.json").write_text('{"stage": 0, "step": 3}')
            if name == self.killed:
                raise KeyboardInterrupt
            status = "interrupted"
        elif config.stages == ("reject",):
            (folder / "samples.jsonl").write_text("{}\n")
        else:
            (folder / "model").mkdir(exist_ok=True)
        return Result(
            status=status, accuracy_start=None, accuracy_end=None, steps=0, seconds=90.0,
            tokens_per_second=0.0, run_dir=str(folder),
        )  # fmt: skip

    def take(self) -> list[tuple[str, bool]]:
        done, self.done = self.done, []
        return done


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(TEXT)
    return Runs()


def recipe(*overrides: str) -> Recipe:
    found = load_experiment("r.yaml", overrides)
    assert isinstance(found, Recipe)
    return found


ALL = [("cold", False), ("think", False), ("samples", False), ("small", False)]


def test_the_table_is_what_the_stages_logged(runs: Runs) -> None:
    summary = run_recipe(recipe(), run=runs)
    assert runs.take() == ALL
    text = Path("runs/r/summary.md").read_text()
    assert [cells(line) for line in text.splitlines()[2:]] == [
        cells(line) for line in TABLE.splitlines()
    ]
    assert summary["accuracy_start"] == 0.0 and summary["accuracy_end"] == 0.75
    assert summary["status"] == "ok" and summary["stages"][1]["length"] == 40.0


def test_what_is_done_is_skipped_and_from_redoes_it_and_what_follows(runs: Runs) -> None:
    run_recipe(recipe(), run=runs)
    runs.take()
    run_recipe(recipe("tracking.project=other"), run=runs)
    assert runs.take() == []
    run_recipe(recipe(), start="samples", run=runs)
    assert runs.take() == ALL[2:]
    run_recipe(recipe("stages.small.sft.lr=1e-3"), start="small", run=runs)
    assert runs.take() == ALL[3:]


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_stage_that_was_stopped_goes_on(runs: Runs, how: str) -> None:
    setattr(runs, how, "think")
    if how == "killed":
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(), run=runs)
    else:
        assert run_recipe(recipe(), run=runs)["status"] == "interrupted"
    assert runs.take() == ALL[:2]
    runs.killed = runs.interrupted = ""
    run_recipe(recipe(), run=runs)
    assert runs.take() == [("think", True), *ALL[2:]]


def test_a_stage_that_cannot_go_on_says_how_it_begins_anew(runs: Runs) -> None:
    runs.interrupted = "think"
    run_recipe(recipe(), run=runs)

    def refusing(config: Config, **options: Any) -> Result:
        raise ConfigError("rl-000003 is of another run (seed: 0, now 1)")

    with pytest.raises(ConfigError, match=r"stage think: .* \(--from think does the stage anew\)$"):
        run_recipe(recipe(), run=refusing)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.think.schedule.steps=9"], "stage think is done, with other settings or inputs: schedule.steps: 7, now 9;"),
        (["optim.lr=2e-4"], "stage cold is done, with other settings or inputs: optim.lr: 0.0001, now 0.0002;"),
        (["seed=1"], "redo it with --from cold, which redoes what follows too, give them back, or take another run_dir"),
    ],
)  # fmt: skip
def test_other_settings_of_a_stage_that_is_done_are_refused(
    runs: Runs, overrides: list[str], message: str
) -> None:
    run_recipe(recipe(), run=runs)
    runs.take()
    with pytest.raises(ConfigError) as error:
        run_recipe(recipe(*overrides), run=runs)
    assert message in str(error.value) and runs.take() == []


def test_an_input_that_changed_or_went_is_refused(runs: Runs) -> None:
    Path("own.jsonl").write_text('{"prompt": "1+1?", "completion": "2"}\n' * 3)
    own = "stages.cold.sft.data=own.jsonl"
    run_recipe(recipe(own), run=runs)
    Path("own.jsonl").write_text('{"prompt": "1+1?", "completion": "3"}\n' * 3)
    with pytest.raises(ConfigError, match=r"stage cold is done, .*own\.jsonl: "):
        run_recipe(recipe(own), run=runs)
    Path("own.jsonl").write_text('{"prompt": "1+1?", "completion": "2"}\n' * 3)
    # an earlier stage was done anew behind its back
    shutil.rmtree("runs/r/samples")
    with pytest.raises(
        ConfigError, match=r'stage small is done, .*stage:samples: .*, now "not done"'
    ):
        run_recipe(recipe(own), run=runs)
    shutil.rmtree("runs/r/cold/model")
    with pytest.raises(ConfigError, match=r"stage cold is done, but runs/r/cold/model is gone"):
        run_recipe(recipe(own), run=runs)


def test_a_function_of_one_s_own_that_changed_is_refused(runs: Runs) -> None:
    """And a teacher's weights; not what only a newer emberl asks for."""
    Path("brief.py").write_text("def brief(completions): return [0.5] * len(completions)\n")
    Path("r.yaml").write_text(
        "name: r\nmodel: {tiny: {hidden: 64}}\ndata: {source: arithmetic, heldout: 16}\n"
        "reward: {parts: {brief: {use: ./brief.py:brief, style: trl}}}\n"
        "stages: [{name: think, kind: rl}]\n"
    )
    run_recipe(recipe(), run=runs)
    Path("brief.py").write_text("def brief(completions): return [0.7] * len(completions)\n")
    with pytest.raises(ConfigError, match=r"stage think is done, .*: (\./)?brief\.py: "):
        run_recipe(recipe(), run=runs)
    Path("brief.py").write_text("def brief(completions): return [0.5] * len(completions)\n")
    file = Path("runs/r/think/done.json")
    said = json.loads(file.read_text())
    del said["settings"]["rollout.max_num_seqs"]
    file.write_text(json.dumps(said | {"hash": "of fewer keys"}))
    runs.take()
    run_recipe(recipe(), run=runs)
    assert runs.take() == []
    with pytest.raises(ConfigError, match=r"rollout\.max_num_seqs: unset, now 7"):
        run_recipe(recipe("rollout.max_num_seqs=7"), run=runs)


def test_from_needs_what_is_before_it(runs: Runs) -> None:
    with pytest.raises(ConfigError, match="--from samples: stage cold before it is not done"):
        run_recipe(recipe(), start="samples", run=runs)
    with pytest.raises(ConfigError, match="--from smal: there is no such stage; there are cold"):
        run_recipe(recipe(), start="smal", run=runs)


def test_a_file_of_a_later_stage_is_looked_at_before_the_first(runs: Runs) -> None:
    with pytest.raises(ConfigError, match=r"stage small: sft\.data: .*nowhere\.jsonl"):
        run_recipe(recipe("stages.small.sft.data=nowhere.jsonl"), run=runs)
    with pytest.raises(ConfigError, match=r"stage think: model\.path='./nowhere' does not exist"):
        run_recipe(recipe("stages.think.model.path=./nowhere"), run=runs)
    assert runs.take() == []


def test_a_teacher_that_a_stage_makes_is_waited_for(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With teachers a distill stage is reinforcement learning on the student's own samples."""
    student = "  - {name: student, kind: distill, algorithm: opd, model: {path: stage:base},"
    teachers = "distill: {teachers: {t: {path: stage:think}}}}\n"
    Path("r.yaml").write_text(f"{TEXT}{student} {teachers}")
    found = recipe()
    stage = found.stages[-1]
    assert stage.config.stages == ("rl",) and stage.takes == ("think",)
    assert stage.config.distill.teachers["t"].path == "runs/r/think/model"
    monkeypatch.setitem(LOGGED, "student", LOGGED["think"])
    run_recipe(found, run=runs)
    assert runs.take()[-1] == ("student", False)
    with pytest.raises(ConfigError, match=r"stage student: .*distill.*nowhere"):
        run_recipe(recipe("stages.student.distill.teachers.t.path=./nowhere"), run=runs)
