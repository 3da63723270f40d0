"""A run's parts, put together: what the stages share, and the few things that all of them do."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..rewards.suite import RewardSuite
from ..rollout.pool import RolloutPool
from ..rollout.samples import Completion, Prompt, Sampling
from .answers import AnswerReader
from .checkpoints import Progress, asked_to_stop, begin_checkpoint, finish_checkpoint
from .config.load import Config
from .data.sources import PromptSource
from .groups import Group
from .learner.group import LearnerGroup
from .watch.tracking import Tracker
from .weights.probe import Level, Probe, as_batch, probe_ids, tolerance_of
from .weights.sync import WeightSync

if TYPE_CHECKING:
    from .eval_sets import EvalSet


class Interrupted(Exception):
    """The run was asked to stop and has saved what it goes on from."""


@dataclass(kw_only=True)
class Run:
    """The parts of a run that is under way. Only `progress` changes."""

    config: Config
    run_id: str
    run_dir: Path
    tokenizer: Any
    source: PromptSource
    suite: RewardSuite
    learners: LearnerGroup
    pool: RolloutPool
    sync: WeightSync
    tracker: Tracker
    stop: threading.Event
    started: float
    progress: Progress
    eval_sets: tuple[EvalSet, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """As `model_files.stop_tokens` finds them."""
    _delivery: Future[dict[str, float]] | None = None
    _publish_executor: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="publish")
    )

    def sampling(self, step: int) -> Sampling:
        """How this step's answers are drawn: with the prompt and the sample's index the step fixes
        every draw."""
        rollout = self.config.rollout
        return Sampling(
            max_tokens=rollout.max_response_length,
            temperature=rollout.temperature,
            **rollout.cuts,
            stop_token_ids=self.stop_token_ids,
            stop=rollout.stop,
            seed=self.config.seed * 1_000_003 + step,
        )

    def grade(
        self,
        prompt: Prompt,
        completions: Sequence[Completion],
        suite: RewardSuite | None = None,
        max_tokens: int = 0,
    ) -> Group:
        """As of `AnswerReader`, by `suite` (None: the run's reward)."""
        return self.answers.grade(
            prompt,
            completions,
            suite or self.suite,
            max_tokens=max_tokens or self.config.rollout.max_response_length,
            step=self.progress.step,
            max_steps=self.config.schedule.steps,
        )

    @cached_property
    def answers(self) -> AnswerReader:
        """How sampled answers are read."""
        return AnswerReader(
            tokenizer=self.tokenizer,
            rollout=self.config.rollout,
            stop_token_ids=self.stop_token_ids,
        )

    def publish(self, *, new_version: bool = True, wait: bool = True) -> dict[str, float]:
        """Has every worker serve the learners' weights, proved by digest; returns the figures of
        the transfer. Without `wait`, where rollouts run ahead, it goes on while the learners make
        their next step, and the figures are those of the version before."""
        schedule, version = self.config.schedule, self.progress.version + new_version
        start = time.perf_counter()  # to wait for the version before is the learners' loss, too
        figures = self.wait_published()
        self.sync.begin(version)
        ahead = not wait and schedule.max_staleness > 0
        later = ahead and schedule.in_flight == "finish"
        probe = None if later or not self.config.sync.probe_tokens else self._expected()
        self.progress = self.progress.advance(version=version)
        if not ahead:
            return self._deliver(version, probe, later)
        self._delivery = self._publish_executor.submit(self._deliver, version, probe, later)
        self._delivery.add_done_callback(lambda _: self.pool.on_served())
        return figures | {"sync/exposed_s": time.perf_counter() - start}

    def wait_published(self) -> dict[str, float]:
        """Waits until the workers have what was published, if that is under way; returns its
        figures and raises its errors."""
        delivery, self._delivery = self._delivery, None
        return {} if delivery is None else delivery.result()  # every wait inside has a deadline

    def check_delivery(self) -> None:
        """Raises what made the delivery under way fail."""
        if self._delivery is not None and self._delivery.done():
            self._delivery.result()

    def _deliver(
        self, version: int, probe: tuple[tuple[int, ...], NDArray[np.float32]] | None, later: bool
    ) -> dict[str, float]:
        start = time.perf_counter()
        figures = self.sync.deliver(later=later)
        if probe is not None:
            figures |= self._compare(
                *probe, version=version, changed=figures.get("sync/changed_fraction")
            )
        return figures | {"sync/exposed_s": time.perf_counter() - start}

    @contextmanager
    def learning(self) -> Iterator[None]:
        """While the learners work on devices that they share with engines, these sleep."""
        level = self.config.cluster.sleep_level if self.config.cluster.colocated else 0
        if level:
            self.pool.sleep(level)
        yield
        if level:
            self.pool.wake()  # which changes nothing where a new version has woken them

    def _expected(self) -> tuple[tuple[int, ...], NDArray[np.float32]]:
        """Tokens to probe with, and what the learners say of all but the first before they make
        their next step."""
        count = min(self.config.sync.probe_tokens, self.config.max_model_length - 1)
        token_ids = probe_ids(self.source, count)
        return token_ids, self.learners.logprobs(as_batch(token_ids), temperature=1.0)[1:]

    def _compare(
        self,
        token_ids: tuple[int, ...],
        expected: NDArray[np.float32],
        version: int,
        changed: float | None,
    ) -> dict[str, float]:
        """Engines and learners side by side on the same tokens."""
        return self.probe.check(
            expected,
            self.pool.probe(token_ids),
            partial(self.pool.reload, token_ids=token_ids),
            version=version,
            changed=changed,
        )

    @cached_property
    def probe(self) -> Probe:
        """Knows how far engines and learners were apart before, also in the run's earlier
        attempts."""
        logp, p = self.progress.probe_noise_logp, self.progress.probe_noise_p
        level = None if logp is None or p is None else Level(logp=logp, p=p)
        return Probe(tolerance_of(self.config.model.dtype), level)

    def save(self) -> None:
        """A checkpoint of this moment."""
        name = f"{self.config.stages[self.progress.stage]}-{self.progress.step:06}"
        # an SFT stage publishes what it starts from; its end is another model
        noise = self.probe.level if self.config.stages[self.progress.stage] == "rl" else None
        self.progress = self.progress.advance(
            seconds=time.time() - self.started,
            probe_noise_logp=None if noise is None else noise.logp,
            probe_noise_p=None if noise is None else noise.p,
        )
        folder = begin_checkpoint(self.run_dir, name)
        self.learners.save(str(folder.absolute()))
        finish_checkpoint(folder, self.progress, self.config.checkpoint.keep, self.config)

    def stop_if_asked(self) -> None:
        """Between two steps: saves and raises `Interrupted` if a signal or `emberl stop` came."""
        if self.stop.is_set() or asked_to_stop(self.run_dir):
            self.wait_published()
            self.save()
            raise Interrupted


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one interrupts whatever is
    running."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
