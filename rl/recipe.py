"""A run from configuration to result: creates the parts and runs the stages."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..rollout.actors import ActorLostError, CallFailedError
from ..rollout.engine import Request, check_engine
from ..rollout.pool import RolloutPool
from .checkpoints import (
    EVALUATED,
    PROGRESS,
    SETTINGS,
    check_resumed,
    latest_checkpoint,
    nothing_left,
    read_progress,
)
from .cluster import Cluster
from .config.cautions import cautions, said_at_start
from .config.load import Config, user_errors
from .eval_sets import open_eval_sets
from .groups import Progress
from .learner.group import LearnerGroup, LearnersLostError
from .model_files import check_adapters, check_model, load_tokenizer, prepare_model, stop_tokens
from .preflight import check_inputs
from .problems import Problems, open_problems
from .reject import sample_accepted
from .run import Interrupted, Run, on_loop, stop_on_signal
from .run_directory import (
    RESULT,
    Resume,
    alone_in,
    forget_earlier,
    forget_figures,
    is_stage,
    open_run_dir,
    trim_metrics,
    trim_samples,
)
from .sft import Imitated, train_sft
from .trainer import train_rl
from .user_environment import episodes_of, load_environment
from .watch.console import make_console, say
from .watch.profiles import write_timeline
from .watch.rollouts import trim_steps
from .watch.sinks import forget_tracked
from .watch.system import SystemWatch
from .watch.tracking import Tracker
from .weights.decoding import proof_requests
from .weights.probe import Level, Probe, probe_ids, tolerance_of
from .weights.sync import WeightSync


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The JSON line with which a run ends."""

    status: str
    accuracy_start: float | None
    """Held-out accuracy before the first RL step; without RL, before the first supervised one."""
    accuracy_end: float | None
    steps: int
    """RL steps done."""
    seconds: float
    tokens_per_second: float
    """Completion tokens sampled per second of RL steps, evaluation and set-up left out."""
    run_dir: str
    updates: int = 0
    """Optimizer steps of the policy in RL."""
    warnings: tuple[str, ...] = ()
    """Doubtful settings, and warnings about a run that does not learn."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def train(config: Config, *, resume: Resume = "never", override: bool = False) -> Result:
    """Runs all stages. resume: go on from the last checkpoint, `auto` if there is one. Raises
    `ConfigError`, before Ray starts if the fault can be known by then."""
    started = time.time()
    tell = partial(say, make_console())
    for line in said_at_start(config):
        tell(line)
    check_inputs(config, hub=True)
    with user_errors():
        check_engine(config.rollout.engine, config.rollout.engine_args, config.rollout.servers)
        if config.rollout.environment is not None:
            load_environment(config.rollout.environment)
    check_model(config)
    cluster = Cluster(config, tell)
    run_dir, checkpoint = open_run_dir(config, resume, tell)
    changed = [] if checkpoint is None else check_resumed(config, checkpoint, override)
    for line in changed:
        tell(f"resumed with {line}")
    if checkpoint is not None:
        progress = read_progress(checkpoint)
        started -= progress.seconds
        if (done := nothing_left(config, progress)) is not None:
            tell(done)
    with alone_in(run_dir), ThreadPoolExecutor(1, thread_name_prefix="model") as beside:
        forget_earlier(run_dir, anew=checkpoint is None, tell=tell)
        if checkpoint is None or changed:
            forget_tracked(run_dir, anew=checkpoint is None)
        model = beside.submit(ready_model, config, run_dir, tell, checkpoint is None)
        if config.model.path is not None or config.model.lora is not None:
            model.result()  # raises what is wrong with it before Ray starts
        attempts = Attempts(run_dir, config.cluster.max_restarts, checkpoint, tell)
        while True:
            try:
                # in this order: Ray's start sets a SIGTERM handler of its own
                with cluster, stop_on_signal() as stop:
                    return with_learners(config, cluster, model.result(), attempts, stop, started)
            except ActorLostError as error:
                attempts.another(error, "all actors are started")
                cluster = Cluster(config, tell)


def ready_model(config: Config, run_dir: Path, tell: Callable[[str], None], anew: bool) -> str:
    """`prepare_model`, with adapters that fit it. A tiny model is made while Ray comes up: both
    take seconds."""
    path = prepare_model(config, run_dir, tell, anew=anew)
    check_adapters(config, path)
    return path


class Attempts:
    """The checkpoint from which a run resumes after a failure, and the number of attempts left:
    `cluster.max_restarts` in a row, counted anew after every new checkpoint."""

    def __init__(
        self, run_dir: Path, most: int, checkpoint: Path | None, tell: Callable[[str], None]
    ) -> None:
        self.run_dir = run_dir
        self.checkpoint = checkpoint
        self._most = most
        self._left = most
        self._tell = tell

    def another(self, error: Exception, what: str) -> None:
        """Allows one more attempt, or raises the error if none is left. what: the beginning of the
        message for the user, e.g. `all actors are started`."""
        newest = latest_checkpoint(self.run_dir, self._tell)
        if newest != self.checkpoint:
            self._left = self._most
        if not self._left:
            raise error
        self._left -= 1
        self.checkpoint = newest
        if newest is None:
            forget_figures(self.run_dir)
        where = "the beginning" if newest is None else newest.name
        self._tell(f"{error}; {what} anew from {where}")


def with_learners(
    config: Config,
    cluster: Cluster,
    model_path: str,
    attempts: Attempts,
    stop: threading.Event,
    started: float,
) -> Result:
    """Runs to the end; lost learners are replaced while the engines stay."""
    while True:
        try:
            return run_attempt(config, cluster, model_path, attempts, stop, started)
        except (LearnersLostError, CallFailedError) as error:
            attempts.another(error, "the learners are started")
            cluster.restart_learners()


def run_attempt(
    config: Config,
    cluster: Cluster,
    model_path: str,
    attempts: Attempts,
    stop: threading.Event,
    started: float,
) -> Result:
    """Runs from a checkpoint, or from the beginning, to the end. started: `time.time()` of the
    run's beginning, moved on by the time in which it did not run."""
    run_dir, checkpoint = attempts.run_dir, attempts.checkpoint
    progress = stand_of(config, run_dir, checkpoint)
    # engines refuse a version below one that they have served
    progress = progress.advance(version=max(progress.version, cluster.next_version))
    console = make_console()
    with ExitStack() as opened:
        # the actors load while this process reads the data: both take seconds
        learners, pool = cluster.spawn(model_path, run_dir)
        problems = open_problems(config, model_path, opened)
        config = problems.config
        tracker = Tracker(config, run_dir, console)
        opened.callback(tracker.close)
        opened.callback(SystemWatch(config.tracking.system_every, tracker.system).close)
        learners.record = partial(tracker.spans.add, "learners")
        for note in problems.notes:
            tracker.note(note)
        tokenizer_of = partial(load_tokenizer, model_path)
        sets = open_eval_sets(
            config, problems.source, problems.suite, tokenizer_of, tracker.note, opened
        )
        cluster.wait()
        run = Run(
            config=config,
            run_id=cluster.run_id,
            run_dir=run_dir,
            tokenizer=problems.tokenizer,
            source=problems.source,
            suite=problems.suite,
            learners=learners,
            pool=pool,
            weights=open_sync(problems, cluster, (learners, pool), tracker, progress),
            tracker=tracker,
            stop=stop,
            started=started,
            progress=progress,
            eval_sets=sets,
            stop_token_ids=stop_tokens(problems.tokenizer, model_path),
        )
        with user_errors():
            pool.episodes = episodes_of(config, problems.tokenizer, run.answers.said)
        return on_loop(go(run, checkpoint, problems.imitated))


def stand_of(config: Config, run_dir: Path, checkpoint: Path | None) -> Progress:
    """The checkpoint's progress (None: the beginning); removes metrics and samples of later
    steps."""
    if checkpoint is None:
        return Progress()
    progress = read_progress(checkpoint)
    if progress.stage < len(config.stages):
        stage = config.stages[progress.stage]
        evaluates = progress.step == 0 or progress.evaluating is not None
        for trim in (trim_metrics, trim_samples):
            trim(run_dir, stage, progress.step, config.stages, evaluates=evaluates)
        trim_steps(run_dir, stage, progress.step, config.stages)
    return progress


def open_sync(
    problems: Problems,
    cluster: Cluster,
    actors: tuple[LearnerGroup, RolloutPool],
    tracker: Tracker,
    progress: Progress,
) -> WeightSync:
    """The weight sync from these learners to these engines, with its probe and proof requests."""
    config = problems.config
    longest = config.max_model_length
    logp, p = progress.probe_noise_logp, progress.probe_noise_p
    earlier = None if logp is None or p is None else Level(logp=logp, p=p)
    proved: tuple[Request, ...] = ()
    if config.sync.canary:
        slots = config.rollout.max_num_seqs
        proved = proof_requests(problems.source, slots=slots, longest=longest)
    return WeightSync(
        config,
        *actors,
        run_id=cluster.run_id,
        run_dir=tracker.run_dir,
        fabric=cluster.placement.device != "cpu",
        tell=tracker.note,
        probe=Probe(tolerance_of(config.model.dtype), earlier),
        probe_ids=probe_ids(problems.source, min(config.sync.probe_tokens, longest - 1)),
        proof_requests=proved,
    )


async def go(run: Run, checkpoint: Path | None, imitated: Imitated | None = None) -> Result:
    """Runs all stages from `run.progress` on. imitated: the data of a supervised stage."""
    stages: dict[str, Callable[[Run], Awaitable[None]]]
    stages = {"rl": train_rl, "reject": sample_accepted}
    if imitated is not None:
        stages["sft"] = partial(train_sft, imitated=imitated)
    names = run.config.stages
    status, published = "ok", False
    try:
        while run.progress.stage < len(names):
            name = names[run.progress.stage]
            begin_stage(run, checkpoint)
            checkpoint = None
            if published:
                run.weights.begin_stage()
            # an earlier stage of this attempt has changed the weights
            await run.publish(new_version=published)
            published = True
            run.held = run.progress
            try:
                await stages[name](run)
            except Interrupted:
                raise
            except Exception as error:
                await run.rescue(error)
                raise
            await run.saved()
            run.held = None
            run.progress = run.progress.advance(
                stage=run.progress.stage + 1, step=0 if name != "rl" else run.progress.step
            )
    except Interrupted:
        status = "interrupted"
        again = (
            "the same command again goes"
            if is_stage(run.run_dir)
            else (f"add --resume run_dir={run.run_dir} to go")
        )
        run.tracker.note(f"saved; {again} on")
    except Exception as error:  # also for those who see only the trackers
        run.tracker.alert("this attempt ended by an error", f"{type(error).__name__}: {error}")
        raise
    run.tracker.end()
    if spent := run.tracker.spans.summary():
        run.tracker.note(spent)
    if run.config.profile.steps:
        run.tracker.note(f"where time went: {write_timeline(run.run_dir).parent}")
    finish(run)
    result = result_of(run, status)
    (run.run_dir / RESULT).write_text(json.dumps(result.as_json() | {"step_time": spent}))
    return result


def begin_stage(run: Run, checkpoint: Path | None) -> None:
    """Makes new optimizers for the next stage, or restores weights and optimizers of the
    checkpoint."""
    config = run.config
    name = config.stages[run.progress.stage]
    if name == "rl":
        critic = config.critic if config.advantage.needs_critic else None
        run.learners.begin_stage(config.optim, config.updates, critic, config.kl.active)
    else:
        run.learners.begin_stage(config.sft_optim, config.sft.steps)
    if checkpoint is not None and name != "reject":  # which changes no weight
        run.learners.restore(str(checkpoint))


def result_of(run: Run, status: str) -> Result:
    progress = run.progress
    rate = progress.tokens / progress.train_seconds if progress.train_seconds else 0.0
    return Result(
        status=status,
        accuracy_start=progress.accuracy_start,
        accuracy_end=progress.accuracy_end,
        steps=progress.step if "rl" in run.config.stages[: progress.stage + 1] else 0,
        seconds=round(time.time() - run.started, 1),
        tokens_per_second=round(rate, 1),
        run_dir=str(run.run_dir),
        updates=progress.updates,
        warnings=(*cautions(run.config), *progress.warnings),
    )


def finish(run: Run) -> None:
    """Copies the newest checkpoint's model to `model/` and draws the learning curve."""
    newest = latest_checkpoint(run.run_dir)
    if newest is not None and (newest / "config.json").is_file():
        model = run.run_dir / "model"
        not_of_model = ("learner", PROGRESS, SETTINGS, EVALUATED)
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(newest, model, ignore=shutil.ignore_patterns(*not_of_model))
    run.tracker.curve()
