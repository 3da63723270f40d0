"""A checkpoint that cannot be written, and one that somebody else wrote."""

from __future__ import annotations

import asyncio
import pickle
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from emberl.rl.checkpoints import Progress, latest_checkpoint
from emberl.rl.config.load import resolve
from emberl.rl.learner.checkpoint import _reader
from emberl.rl.run import Run
from emberl.rollout.actors import ActorLostError, CallFailedError

SETTINGS = {
    "name": "run",
    "model": {"path": "somewhere"},
    "data": {"source": "arithmetic"},
    "checkpoint": {"max_failures": 3},
}
FULL = CallFailedError("learner rank 0 failed in 'save': OSError: No space left on device")


class Learners:
    """Ranks whose `save` goes by a list: an error to raise, or None."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes = list(outcomes)

    def save(self, folder: str) -> None:
        (Path(folder) / "half").write_text("half")
        outcome = self.outcomes.pop(0)
        if outcome is not None:
            raise outcome


def run(folder: Path, learners: Learners, alerts: list[str]) -> Run:
    unused: dict[str, Any] = dict.fromkeys(
        ("run_id", "tokenizer", "source", "suite", "pool", "stop")
    )
    weights = SimpleNamespace(probe=SimpleNamespace(level=None))
    tracker: Any = SimpleNamespace(
        alert=lambda title, text: alerts.append(f"{title}: {text}"),
        doing=lambda what: nullcontext(),
    )
    return Run(
        **unused,
        config=resolve(SETTINGS),
        run_dir=folder,
        learners=learners,  # type: ignore[arg-type]
        tracker=tracker,
        weights=weights,  # type: ignore[arg-type]
        started=time.time(),
        progress=Progress(stage=0, step=3),
    )


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path: Path) -> None:
    alerts: list[str] = []
    made = run(tmp_path, Learners(FULL, FULL, None, OSError("gone"), FULL, FULL), alerts)
    asyncio.run(made.save())
    asyncio.run(made.save())
    assert len(alerts) == 2 and "the disk of" in alerts[0] and "GB free" in alerts[0]
    assert latest_checkpoint(tmp_path) is None
    assert not list((tmp_path / "checkpoints").iterdir()), "a half one would keep the disk full"
    asyncio.run(made.save())
    assert latest_checkpoint(tmp_path) is not None
    asyncio.run(made.save())
    asyncio.run(made.save())
    with pytest.raises(OSError, match=r"could not be written: .*No space left.*the disk of"):
        asyncio.run(made.save())
    assert latest_checkpoint(tmp_path) is not None, "the one before stays"


def test_what_is_needed_must_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(run(tmp_path, Learners(FULL), []).save(needed=True))


def test_a_lost_rank_is_not_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ActorLostError, match="rank 1"):
        asyncio.run(run(tmp_path, Learners(ActorLostError("learner rank 1 died")), []).save())


class Touch:
    """What runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_foreign_checkpoint_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(pickle.UnpicklingError, match=r"a checkpoint names \w+\.\w+"):
        _reader(tmp_path).read_metadata()
    assert not (tmp_path / "ran").exists()
