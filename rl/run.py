"""The parts of a run that its stages share, and the operations that all of them use."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from ..rewards.suite import RewardSuite
from ..rollout.actors import ActorLostError, CallFailedError
from ..rollout.pool import RolloutPool
from ..rollout.samples import Completion, Prompt, Sampling
from .answers import AnswerReader
from .checkpoints import (
    add_evaluation,
    begin_checkpoint,
    finish_checkpoint,
    latest_checkpoint,
    read_progress,
)
from .config.load import Config
from .data.sources import PromptSource
from .groups import Group, Progress
from .learner.group import LearnerGroup, LearnersLostError
from .run_directory import asked_to_stop
from .watch.tracking import Tracker
from .weights.sync import WeightSync

if TYPE_CHECKING:
    from .eval_sets import EvalSet

T = TypeVar("T")

GRADERS = 8
"""Groups graded at the same time, of training and of evaluation each; rewards have processes of
their own."""
CLOSE_S = 5.0
"""Seconds that cancelled tasks get to end."""
THREADS = 32
"""The driver's threads for blocking calls: grading, learners, starting actors."""


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint."""


@dataclass(kw_only=True)
class Run:
    """The parts of a running run that all stages use, and its progress, which alone changes."""

    config: Config
    run_id: str
    run_dir: Path
    tokenizer: Any
    source: PromptSource
    suite: RewardSuite
    learners: LearnerGroup
    pool: RolloutPool
    weights: WeightSync
    tracker: Tracker
    stop: threading.Event
    started: float
    progress: Progress
    eval_sets: tuple[EvalSet, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """As `model_files.stop_tokens` finds them."""
    failed_saves: int = 0
    """Checkpoints in a row that could not be written."""
    held: Progress | None = None
    """The progress of the learners' weights; None while a step changes these."""
    _writing: asyncio.Task[None] | None = None
    evaluation: asyncio.Task[None] | None = None
    """The evaluation that runs beside the training; None once it was awaited."""

    def sampling(self, step: int) -> Sampling:
        """The sampling parameters of a step, whose seed fixes, with the prompt and the sample's
        index, every draw."""
        rollout = self.config.rollout
        return Sampling(
            max_tokens=rollout.max_response_length,
            temperature=rollout.temperature,
            **rollout.cuts,
            stop_token_ids=self.stop_token_ids,
            stop=rollout.stop,
            # distinct for every (seed, step), up to a million steps
            seed=self.config.seed * 1_000_003 + step,
        )

    async def sample_groups(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: Sampling,
        suite: RewardSuite | None = None,
    ) -> list[Group]:
        """The groups of n answers to each prompt, in the prompts' order, graded by `suite` (None:
        the run's) while others are still decoded."""
        groups: dict[int, Group] = {}
        async for index, completions in self.pool.generate(prompts, n, sampling):
            groups[index] = await asyncio.to_thread(
                self.grade, prompts[index], completions, suite, sampling.max_tokens
            )
        assert len(groups) == len(prompts), (
            f"{len(prompts)} prompts went out, {len(groups)} groups came back"
        )
        return [groups[i] for i in range(len(prompts))]

    def grade(
        self,
        prompt: Prompt,
        completions: Sequence[Completion],
        suite: RewardSuite | None = None,
        max_tokens: int = 0,
        step: int | None = None,
    ) -> Group:
        """`AnswerReader.grade` by `suite` (None: the run's reward), at `step` (None: the current
        one)."""
        with self.tracker.spans.span("graders", "grade"):
            return self.answers.grade(
                prompt,
                completions,
                suite or self.suite,
                max_tokens=max_tokens or self.config.rollout.max_response_length,
                step=self.progress.step if step is None else step,
                max_steps=self.config.schedule.steps,
            )

    @cached_property
    def answers(self) -> AnswerReader:
        """The reader of sampled answers."""
        return AnswerReader(
            tokenizer=self.tokenizer,
            rollout=self.config.rollout,
            stop_token_ids=self.stop_token_ids,
        )

    async def publish(self, *, new_version: bool = True, wait: bool = True) -> dict[str, float]:
        """Makes every worker serve the learners' weights (`WeightSync.publish`)."""
        version = self.progress.version + new_version
        figures = await self.weights.publish(version, wait=wait)
        self.progress = self.progress.advance(version=version)
        return figures

    @asynccontextmanager
    async def learning(self) -> AsyncIterator[None]:
        """A context in which the learners work; engines on the same devices sleep meanwhile."""
        level = self.config.cluster.sleep_level if self.config.cluster.colocated else 0
        if level:
            await self.pool.sleep(level)
        yield
        if level:
            await self.pool.wake()  # which changes nothing where a new version has woken them

    async def evaluated(self) -> None:
        """Waits for the running evaluation, if there is one; raises its error."""
        evaluation = self.evaluation
        self.evaluation = None
        if evaluation is not None:
            await evaluation

    def checkpoint(self, step: int) -> str:
        """The name of this stage's checkpoint after `step` steps."""
        return f"{self.config.stages[self.progress.stage]}-{step:06}"

    async def save(self, *, needed: bool = False) -> None:
        """Begins a checkpoint of the current state, which is written while the run goes on; waits
        for the one before it, and if it is `needed` for this one too (`saved`)."""
        await self.saved()
        if self.progress.evaluating not in (None, self.progress.step):
            await self.evaluated()  # from this checkpoint it could not be done again
        name = self.checkpoint(self.progress.step)
        # an SFT stage publishes what it starts from; its end is another model
        noise = (
            self.weights.probe.level if self.config.stages[self.progress.stage] == "rl" else None
        )
        self.progress = self.progress.advance(
            seconds=time.time() - self.started,
            probe_noise_logp=None if noise is None else noise.logp,
            probe_noise_p=None if noise is None else noise.p,
        )
        try:
            with self.tracker.doing(f"saving {name}"):
                await asyncio.to_thread(self.learners.snapshot)
        except CallFailedError as error:  # no memory for it, for example
            self._could_not(name, error, needed)
            return
        self._writing = asyncio.create_task(self._write(name, self.progress, needed))
        # retrieves its error: if the run fails otherwise first nobody awaits it
        self._writing.add_done_callback(lambda task: task.cancelled() or task.exception())
        if needed:
            await self.saved()

    async def saved(self) -> None:
        """Waits until the checkpoint that is being written is on the disk. A failure is reported
        and the run goes on; raises OSError if it was `needed`, or after `checkpoint.max_failures`
        in a row."""
        writing = self._writing
        self._writing = None
        if writing is not None:
            await writing  # the ranks' part has a deadline

    async def _write(self, name: str, progress: Progress, needed: bool) -> None:
        settings, folder = self.config.checkpoint, None
        try:
            folder = begin_checkpoint(self.run_dir, name)
            await asyncio.to_thread(self.learners.write, str(folder.absolute()))
            done = await asyncio.to_thread(
                finish_checkpoint,
                folder,
                progress,
                settings.keep,
                self.config,
                keep_best=settings.keep_best,
            )
            if progress.evaluating not in (None, self.progress.evaluating):
                add_evaluation(done, self.progress)  # it has ended meanwhile
        except (OSError, CallFailedError) as error:  # the disk, ours or a rank's
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            self._could_not(name, error, needed)
        else:
            self.failed_saves = 0

    def _could_not(self, name: str, error: Exception, needed: bool) -> None:
        self.failed_saves += 1
        free = shutil.disk_usage(self.run_dir).free
        text = f"{error}; the disk of {self.run_dir} has {free / 1e9:.1f} GB free"
        if needed or self.failed_saves >= self.config.checkpoint.max_failures:
            raise OSError(f"checkpoint {name} could not be written: {text}") from error
        self.tracker.alert(f"checkpoint {name} could not be written", text)

    async def rescue(self, error: Exception) -> None:
        """Saves the learners' weights after an error that ends the run, or this attempt, if they
        are the state after some step that is not on the disk yet."""
        with suppress(OSError, ActorLostError):  # reported already, or the cause of `error`
            await self.saved()
        held, newest = self.held, latest_checkpoint(self.run_dir)
        if isinstance(error, LearnersLostError | CallFailedError | OSError) or held is None:
            return
        done = None if newest is None else read_progress(newest)
        if not held.step or (done and (done.stage, done.step) >= (held.stage, held.step)):
            return
        try:
            reached = self.progress  # an evaluation may have ended meanwhile
            self.progress = held.advance(
                evaluating=reached.evaluating,
                accuracy_start=reached.accuracy_start,
                accuracy_end=reached.accuracy_end,
            )
            await self.save(needed=True)
        except Exception as failure:  # the run is to end by the first error
            self.tracker.note(f"the step before could not be saved: {failure}")
            return
        self.tracker.note(f"saved {self.config.stages[held.stage]} step {held.step}")

    async def stop_if_asked(self) -> None:
        """To be called between two steps: saves and raises `Interrupted` if a signal or
        `emberl stop` came. Raises OSError for a checkpoint that failed (`saved`)."""
        self.held = self.progress
        if self._writing is not None and self._writing.done():
            await self.saved()
        if self.stop.is_set() or asked_to_stop(self.run_dir):
            await self.weights.delivered()
            await self.save(needed=True)
            raise Interrupted


def on_loop(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on a new event loop. Unlike `asyncio.run` it does not wait for threads at
    the end: after a failure one may wait for an actor that the caller is about to end."""
    loop = asyncio.new_event_loop()
    loop.set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="driver"))
    try:
        return loop.run_until_complete(work)
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=CLOSE_S))
        loop.close()


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """A context with an event that the first Ctrl-C or SIGTERM sets; a second one raises
    KeyboardInterrupt."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print("saving after this step; once more ends at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
