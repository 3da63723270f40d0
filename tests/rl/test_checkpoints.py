"""Checkpoints are whole or absent, and what of a run may change when it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from emberl.rl import checkpoints as p
from emberl.rl.config.load import Config, ConfigError, resolve


def config(**extra: object) -> Config:
    return resolve(
        {"name": "run", "model": {"path": "somewhere"}, "data": {"source": "arithmetic"}, **extra}
    )


def save(run_dir: Path, name: str, **changes: int) -> Path:
    folder = p.begin_checkpoint(run_dir, name)
    (folder / "weights").write_text(name)
    return p.finish_checkpoint(folder, p.Progress(**changes), keep=2)


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path: Path) -> None:
    done = save(tmp_path, "rl-000001", stage=1, step=1)
    p.begin_checkpoint(tmp_path, "rl-000002")
    assert p.latest_checkpoint(tmp_path) == done


def test_a_crash_while_one_is_removed_or_replaced_leaves_no_half_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, "rl-000001", step=1)
    second = save(tmp_path, "rl-000002", step=2)

    def crash(folder: Path, **_: object) -> None:
        if folder.exists():
            (folder / "weights").unlink()
            (folder / "files.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(p.shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, "rl-000002", step=2)  # again, as after a resumed run's first step
    assert p.latest_checkpoint(tmp_path) == second and p.broken(second) is None
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, "rl-000003", step=3)  # which drops the first
    assert sorted(f.name for f in second.parent.glob("[!.]*")) == ["rl-000002", "rl-000003"]
    monkeypatch.undo()
    p.begin_checkpoint(tmp_path, "rl-000004")
    told: list[str] = []
    p.remove_halves(tmp_path, told.append)
    assert told == ["checkpoint rl-000004 is passed over: the run ended while it was written"]
    assert not list(second.parent.glob(".*"))


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, f"rl-{step:06}", stage=1, step=step)
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == [
        "rl-000002",
        "rl-000003",
    ]


@pytest.mark.parametrize(
    ("keep_best", "left"), [(0, [5]), (2, [2, 4, 5]), (3, [2, 4, 5]), (9, [1, 2, 3, 4, 5])]
)
def test_the_best_stay_beside_the_newest(tmp_path: Path, keep_best: int, left: list[int]) -> None:
    for step, accuracy in enumerate((0.2, 0.9, None, 0.5, 0.4), 1):
        folder = p.begin_checkpoint(tmp_path, f"rl-{step:06}")
        progress = p.Progress(step=step, accuracy_end=accuracy)
        p.finish_checkpoint(folder, progress, keep=1, keep_best=keep_best)
    names = sorted(f.name for f in (tmp_path / "checkpoints").iterdir())
    assert names == [f"rl-{step:06}" for step in left]


def test_an_accuracy_that_is_not_known_yet_makes_no_checkpoint_the_best(tmp_path: Path) -> None:
    """Step 3 has the accuracy of step 2's evaluation while its own is under way: 0.3."""
    for step, accuracy, evaluating in ((1, 0.5, None), (2, 0.9, None), (3, 0.9, 3), (4, 0.2, None)):
        progress = p.Progress(step=step, accuracy_end=accuracy, evaluating=evaluating)
        folder = p.begin_checkpoint(tmp_path, f"rl-{step:06}")
        done = p.finish_checkpoint(folder, progress, keep=1, keep_best=2)
        if step == 3:
            assert sorted(f.name[-1] for f in done.parent.iterdir()) == ["1", "2", "3"]
            p.add_evaluation(done, p.Progress(accuracy_end=0.3))
            assert p.read_progress(done) == p.Progress(step=3, accuracy_end=0.3)
            assert p.latest_checkpoint(tmp_path) == done
    assert sorted(f.name[-1] for f in (tmp_path / "checkpoints").iterdir()) == ["1", "2", "4"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: (c / "weights").write_text("rl"), "weights has 2 bytes of 9"),
        (lambda c: (c / "weights").unlink(), "No such file"),
        (lambda c: (c / "progress.json").write_text('{"stage": 1, "st'), "Unterminated string"),
        (lambda c: (c / "progress.json").write_text('{"foreign": 1}'), "foreign"),
        (lambda c: (c / "progress.json").write_text("[1]"), ""),
        (lambda c: (c / "files.json").write_text(""), "Expecting value"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_by_name(
    tmp_path: Path, damage: Any, reason: str
) -> None:
    sound = save(tmp_path, "rl-000001", stage=1, step=1)
    damage(save(tmp_path, "rl-000002", stage=1, step=2))
    told: list[str] = []
    assert p.latest_checkpoint(tmp_path, told.append) == sound
    [line] = told
    assert line.startswith("checkpoint rl-000002 is passed over: ") and reason in line


def kept(where: Path, **extra: object) -> Path:
    """A checkpoint of a run with these settings."""
    folder = p.begin_checkpoint(where, "rl-000003")
    progress = p.Progress(stage=0, step=3, updates=3, warnings=("no update: step 1",))
    return p.finish_checkpoint(folder, progress, keep=2, config=config(**extra))


def test_what_was_said_and_done_goes_on_with_the_run(tmp_path: Path) -> None:
    progress = p.read_progress(kept(tmp_path))
    assert (progress.updates, progress.warnings) == (3, ("no update: step 1",))


def test_an_unchanged_run_is_resumed_without_a_word(tmp_path: Path) -> None:
    checkpoint = kept(tmp_path, optim={"betas": [0.9, 0.99]}, run_dir="a")
    assert (
        p.check_resumed(
            config(optim={"betas": [0.9, 0.99]}, run_dir="b"), checkpoint, override=False
        )
        == []
    )


def test_what_is_not_the_checkpoints_is_printed(tmp_path: Path) -> None:
    checkpoint = kept(tmp_path, optim={"lr": 1e-6})
    found = p.check_resumed(
        config(optim={"lr": 1e-5}, schedule={"steps": 7}, reward={"parts": {"x": {"use": "math"}}}),
        checkpoint,
        override=False,
    )
    assert "optim.lr: 1e-06, now 1e-05" in found and "schedule.steps: 100, now 7" in found
    assert 'reward.parts.x.use: unset, now "math"' in found


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"stages": ["sft", "rl"]}, 'stages: ["rl"], now ["sft", "rl"]'),
        ({"data": {"source": "arithmetic", "terms": [2, 3]}}, "data.terms: [4, 6], now [2, 3]"),
        ({"model": {"path": "elsewhere"}}, 'model.path: "somewhere", now "elsewhere"'),
        ({"seed": 1}, "seed: 0, now 1"),
    ],
)
def test_another_run_is_resumed_only_when_asked(
    tmp_path: Path, change: dict[str, object], line: str
) -> None:
    checkpoint = kept(tmp_path)
    with pytest.raises(ConfigError) as error:
        p.check_resumed(config(**change), checkpoint, override=False)
    assert f"rl-000003 is of another run ({line})" in str(error.value) and "--override" in str(
        error.value
    )
    assert p.check_resumed(config(**change), checkpoint, override=True) == [line]


def test_how_a_model_is_computed_may_change(tmp_path: Path) -> None:
    change = {"model": {"path": "somewhere", "packing": "off", "gradient_checkpointing": True}}
    assert len(p.check_resumed(config(**change), kept(tmp_path), override=False)) == 2


@pytest.mark.parametrize(
    "changed", [{"tiny": {"hidden": 32}}, {"tiny": {"hidden": 64}, "lora": {"rank": 4}}]
)
def test_a_model_of_another_shape_is_never_resumed(
    tmp_path: Path, changed: dict[str, object]
) -> None:
    """The run would go on with the checkpoint's, and its configuration would name another."""
    checkpoint = kept(tmp_path, model={"tiny": {"hidden": 64}})
    with pytest.raises(ConfigError, match="the model of rl-000003 is another"):
        p.check_resumed(config(model=changed), checkpoint, override=True)


def test_an_older_checkpoint_cannot_be_compared(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, "rl-000007", stage=0, step=7)
    assert "nothing can be compared" in p.check_resumed(config(), checkpoint, override=False)[0]


@pytest.mark.parametrize(
    ("progress", "settings", "said"),
    [
        ({"stage": 1, "step": 9}, {}, True),  # more than is asked for now, too
        ({"stage": 1, "step": 7}, {}, False),
        ({"stage": 0, "step": 9}, {}, False),  # a supervised stage's
        ({"stage": 1, "step": 8, "evaluating": 8}, {}, False),
        (
            {"stage": 1, "step": 200},
            {"schedule": {"passes": 1}, "data": {"source": "a.jsonl"}},
            False,
        ),
    ],
)
def test_whether_a_run_has_anything_left_to_train(
    progress: dict[str, int], settings: dict[str, object], said: bool
) -> None:
    asked = config(**{"stages": ["sft", "rl"], "schedule": {"steps": 8}, **settings})
    line = p.nothing_left(asked, p.Progress(**progress))
    assert (line is not None) == said
    if line is not None:
        assert "of schedule.steps=8 is done: nothing is left to train" in line
