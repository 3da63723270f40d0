"""A checkpoint that cannot be written, and one that somebody else wrote."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from emberl.rewards.suite import TooManyErrors
from emberl.rl.checkpoints import latest_checkpoint, read_progress
from emberl.rl.config.load import resolve
from emberl.rl.groups import Progress
from emberl.rl.learner.checkpoint import _reader
from emberl.rl.learner.group import LearnersLostError
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
    """Ranks whose `write` goes by a list: an error to raise, or None."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes = list(outcomes)

    def snapshot(self) -> None:
        pass

    def write(self, folder: str) -> None:
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
        note=lambda text: None,
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


async def saved(run: Run) -> None:
    await run.save()
    await run.saved()


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path: Path) -> None:
    alerts: list[str] = []
    made = run(tmp_path, Learners(FULL, FULL, None, OSError("gone"), FULL, FULL), alerts)

    def save() -> None:
        asyncio.run(saved(made))

    save()
    save()
    assert len(alerts) == 2 and "the disk of" in alerts[0] and "GB free" in alerts[0]
    assert latest_checkpoint(tmp_path) is None
    assert not list((tmp_path / "checkpoints").iterdir()), "a half one would keep the disk full"
    save()
    assert latest_checkpoint(tmp_path) is not None
    save()
    save()
    with pytest.raises(OSError, match=r"could not be written: .*No space left.*the disk of"):
        save()
    assert latest_checkpoint(tmp_path) is not None, "the one before stays"


def test_what_is_needed_must_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(run(tmp_path, Learners(FULL), []).save(needed=True))


def test_a_lost_rank_is_not_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ActorLostError, match="rank 1"):
        asyncio.run(saved(run(tmp_path, Learners(ActorLostError("learner rank 1 died")), [])))


class Slow(Learners):
    """Ranks that write only when they are let."""

    def __init__(self) -> None:
        super().__init__(None, None, None)
        self.go_on = threading.Event()
        self.writing = 0
        self.most = 0

    def write(self, folder: str) -> None:
        self.writing += 1
        self.most = max(self.most, self.writing)
        assert self.go_on.wait(20)
        super().write(folder)
        self.writing -= 1


def test_the_run_goes_on_while_one_checkpoint_is_written(tmp_path: Path) -> None:
    slow = Slow()
    made = run(tmp_path, slow, [])

    async def work() -> None:
        await asyncio.wait_for(made.save(), 10)  # returns with nothing written
        assert latest_checkpoint(tmp_path) is None
        made.progress = made.progress.advance(step=4)
        second = asyncio.create_task(made.save())
        await asyncio.sleep(0.2)
        assert not second.done(), "it waits for the first"
        slow.go_on.set()
        await asyncio.wait_for(second, 10)
        made.progress = made.progress.advance(step=5)  # not of the one under way
        await made.saved()

    asyncio.run(work())
    assert slow.most == 1
    found = {f.name: read_progress(f).step for f in (tmp_path / "checkpoints").iterdir()}
    assert found == {"rl-000003": 3, "rl-000004": 4}


@pytest.mark.parametrize(
    ("held", "error", "found"),
    [
        (3, TooManyErrors("graders"), "rl-000003"),
        (3, ActorLostError("rollout worker 0"), "rl-000003"),
        (None, ValueError("in the middle of a step"), None),
        (0, ValueError("before the first step"), None),
        (3, LearnersLostError("learner rank 1"), None),
        (3, OSError("the disk"), None),
    ],
)
def test_an_error_saves_the_step_before(
    tmp_path: Path, held: int | None, error: Exception, found: str | None
) -> None:
    made = run(tmp_path, Learners(None), [])
    made.progress = made.progress.advance(position=99)  # of the step that failed
    made.held = None if held is None else Progress(stage=0, step=held, position=7)
    asyncio.run(made.rescue(error))
    newest = latest_checkpoint(tmp_path)
    assert (None if newest is None else newest.name) == found
    if newest is not None:
        assert read_progress(newest).position == 7
        asyncio.run(made.rescue(error))  # it is there: nothing is written again


def names(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls `module.name(argument)`."""
    texts = [
        pickle.SHORT_BINUNICODE + bytes([len(t)]) + t.encode() for t in (module, name, argument)
    ]
    called = texts[0] + texts[1] + pickle.STACK_GLOBAL + texts[2] + pickle.TUPLE1 + pickle.REDUCE
    return pickle.PROTO + bytes([4]) + called + pickle.STOP


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("torch", "os.system"),
        # what the module of a checkpoint's own classes has imported
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "os"),
        ("torch.distributed.checkpoint.metadata", "torch.os.system"),
        ("pathlib", "Path.touch"),
        ("collections", "_sys.exit"),
    ],
)
def test_a_foreign_checkpoint_runs_nothing(tmp_path: Path, module: str, name: str) -> None:
    (tmp_path / ".metadata").write_bytes(names(module, name, f"touch {tmp_path}/ran"))
    with pytest.raises(pickle.UnpicklingError, match="a checkpoint names "):
        _reader(tmp_path).read_metadata()
    assert not (tmp_path / "ran").exists()
