"""A run from configuration to result: puts the parts together and goes through the stages."""

from __future__ import annotations

import re
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from ..rewards.inputs import RewardInput
from ..rewards.suite import RewardSuite, build_suite
from ..rollout.actors import ActorLostError
from ..rollout.engines import check_engine
from ..rollout.samples import Prompt
from ..rollout.stops import token_bytes
from ..rollout.vllm_backend.compat import transfer_backend
from .algorithm.losses import Objective
from .batch import sft_batch
from .checkpoints import (
    PROGRESS,
    SETTINGS,
    Progress,
    check_resumed,
    latest_checkpoint,
    open_run_dir,
    read_progress,
    trim_metrics,
)
from .cluster import Cluster
from .config.cautions import cautions, said_at_start
from .config.load import Config, ConfigError, user_errors
from .data.sources import PromptSource, check_data, open_source
from .data.table import TableSource
from .data.templates import end_token, supervised_ids
from .model_files import check_adapters, check_model, load_tokenizer, prepare_model, stop_tokens
from .run import Interrupted, Run, conversation, stop_on_signal
from .trainer import train_rl
from .watch.tracking import Tracker, make_console
from .weights.sync import WeightSync

_WORK = re.compile(r"(?<=<think>).*(?=</think>)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The JSON line with which a run ends."""

    status: str
    accuracy_start: float | None
    """Held-out accuracy before the first RL step."""
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
    """Doubtful settings, and what was said of a run that does not learn."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def train(config: Config, *, resume: bool = False, override: bool = False) -> Result:
    """Runs all stages. Raises `ConfigError` before Ray starts where the fault can be known by then."""
    started = time.time()
    console = make_console()
    for line in said_at_start(config):
        console.print(line, highlight=False, markup=False)
    with user_errors():
        check_data(config.data)
        check_engine(config.rollout.engine, config.rollout.engine_args, config.rollout.servers)
        Objective.of(config.loss, config.kl, config.offpolicy)  # tries a user's own loss on a tiny batch
    check_model(config)
    cluster = Cluster(config)
    run_dir, checkpoint = open_run_dir(config, resume)
    if checkpoint is not None:
        for line in check_resumed(config, checkpoint, override):
            console.print(f"resumed with {line}", highlight=False, markup=False)
        started -= read_progress(checkpoint).seconds
    restarts = config.cluster.max_restarts
    while True:
        try:
            return sitting(config, cluster, run_dir, checkpoint, started)
        except ActorLostError as error:
            checkpoint = latest_checkpoint(run_dir)
            if not restarts or checkpoint is None:
                raise
            restarts -= 1
            make_console().print(f"{error}; all actors are started anew from {checkpoint.name}", markup=False)
            cluster = Cluster(config)


def sitting(config: Config, cluster: Cluster, run_dir: Path, checkpoint: Path | None, started: float) -> Result:
    """The run from a checkpoint, or from the beginning, to its end, with actors of its own. started: when the run began, less
    the time in which it did not run."""
    progress = read_progress(checkpoint) if checkpoint else Progress()
    if checkpoint and progress.stage < len(config.stages):
        trim_metrics(run_dir, config.stages[progress.stage], progress.step, config.stages)
    console = make_console()
    model_path = prepare_model(config, run_dir, lambda text: console.print(text, markup=False), anew=checkpoint is None)
    check_adapters(config, model_path)
    with cluster, stop_on_signal() as stop:  # in this order: Ray's start sets a SIGTERM handler of its own
        # the actors load while this process reads the data: both take seconds
        learners, pool = cluster.spawn(model_path, run_id := uuid.uuid4().hex)
        tokenizer = load_tokenizer(model_path, config.data)
        with user_errors():
            if config.rollout.stop:
                token_bytes(tokenizer)  # says whether the engines can find these in its tokens
            source = open_source(config.data, tokenizer, config.seed)
        with ExitStack() as opened:
            suite = build_rewards(config, source, tokenizer)
            opened.callback(suite.close)
            tracker = Tracker(config, run_dir, console)
            opened.callback(tracker.close)
            for note in source.notes:
                tracker.note(note)
            cluster.wait()
            sync = WeightSync(
                config.sync, learners, pool, run_id=run_id, run_dir=run_dir, history=config.checkpoint.history,
                fabric=cluster.placement.device != "cpu", tell=tracker.note,
                backend=transfer_backend(config.rollout.engine_args), ranks=config.rollout.cards,
            )  # fmt: skip
            run = Run(
                config=config, run_id=run_id, run_dir=run_dir, tokenizer=tokenizer, source=source, suite=suite,
                learners=learners, pool=pool, sync=sync, tracker=tracker, stop=stop, started=started,
                progress=progress, stop_token_ids=stop_tokens(tokenizer, model_path),
            )  # fmt: skip
            return go(run, checkpoint)


def go(run: Run, checkpoint: Path | None) -> Result:
    """All stages from where `run.progress` stands."""
    stages: dict[str, Callable[[Run], None]] = {"sft": train_sft, "rl": train_rl}
    names = run.config.stages
    status, published = "ok", False
    try:
        while run.progress.stage < len(names):
            name = names[run.progress.stage]
            if name == "rl":
                critic = run.config.critic if run.config.advantage.needs_critic else None
                run.learners.begin_stage(run.config.optim, run.config.updates, critic, run.config.kl.active)
            else:
                run.learners.begin_stage(run.config.sft_optim, run.config.sft.steps)
            if checkpoint is not None:
                run.learners.restore(str(checkpoint))
                checkpoint = None
            if published:
                run.probe.begin_stage()
            run.publish(new_version=published)  # an earlier stage of this sitting has changed the weights
            published = True
            stages[name](run)
            run.progress = run.progress.advance(
                stage=run.progress.stage + 1, step=0 if name != "rl" else run.progress.step
            )
    except Interrupted:
        status = "interrupted"
    run.tracker.end()
    finish(run)
    progress = run.progress
    return Result(
        status=status,
        accuracy_start=progress.accuracy_start,
        accuracy_end=progress.accuracy_end,
        steps=progress.step if "rl" in names[: progress.stage + 1] else 0,
        seconds=round(time.time() - run.started, 1),
        tokens_per_second=round(progress.tokens / progress.train_seconds, 1) if progress.train_seconds else 0.0,
        run_dir=str(run.run_dir),
        updates=progress.updates,
        warnings=(*cautions(run.config), *progress.warnings),
    )


def finish(run: Run) -> None:
    """The model that a user takes away, and the picture."""
    newest = latest_checkpoint(run.run_dir)
    if newest is not None:
        model = run.run_dir / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(newest, model, ignore=shutil.ignore_patterns("learner", PROGRESS, SETTINGS))
    run.tracker.curve()


def train_sft(run: Run) -> None:
    """The cold start: supervised steps on worked solutions, each problem once."""
    config = run.config.sft
    with user_errors():
        end = end_token(run.tokenizer)
    run.tracker.begin("sft", run.progress.step, config.steps)
    while run.progress.step < config.steps:
        run.stop_if_asked()
        position = run.progress.position
        examples = []
        for i in range(position, position + config.batch_size):
            prompt = run.source.train(i)
            solution = run.source.solution(prompt)
            if solution is None:
                raise ConfigError(
                    f"stages has sft, but problem {prompt.id} of data.source={run.config.data.source!r} has no worked solution; "
                    "set data.solution_column, or leave sft out of stages"
                )
            shown = demonstration(solution, i, config.direct)
            examples.append((supervised_ids(prompt, shown, run.tokenizer, end), len(prompt.token_ids)))
        metrics = run.learners.step(sft_batch(examples), Objective.sft())
        run.progress = run.progress.advance(step=run.progress.step + 1, position=position + config.batch_size)
        run.tracker.log(
            run.progress.step,
            {"sft/loss": metrics["actor/loss"], **metrics},
            show={"loss": f"{metrics['actor/loss']:.3f}"},
        )
    run.save()


def demonstration(solution: str, position: int, direct: float) -> str:
    """The solution as it is shown: a share `direct` of all positions gets an empty `<think></think>` and the answer."""
    draw = Random(f"demonstration {position}").random()  # of a stream of its own: what a problem is must not tell
    return _WORK.sub("", solution) if draw < direct else solution


def build_rewards(config: Config, source: PromptSource, tokenizer: Any) -> RewardSuite:
    """The reward suite, tried on one problem, with every reference of a finite data set checked before training."""
    if config.eval.size and not source.heldout:
        raise ConfigError(
            f"eval.size={config.eval.size}, but data.heldout={config.data.heldout} leaves no held-out problems; "
            "raise data.heldout, name data.eval_path or data.eval_split, or set eval.size=0"
        )
    with user_errors():
        suite = build_suite({name: part.model_dump() for name, part in config.reward.parts.items()})
        suite.trial(_as_input(source.train(0), "0", tokenizer))
    rows = [*source.heldout, *(source.train(i) for i in range(source.size or 0))]
    bad = suite.check_references([_as_input(prompt, "", tokenizer) for prompt in rows])
    if bad:
        ids = {rows[b.row].id for b in bad}
        shown = "; ".join(f"{rows[b.row].id}: {b}" for b in bad[:3])
        message = f"{len(ids)} of {len(rows)} references of data.source={config.data.source!r} cannot be graded against: {shown}"
        if config.data.bad_references == "error" or not isinstance(source, TableSource) or 2 * len(ids) > len(rows):
            suite.close()
            fix = (
                "mend them, or set data.bad_references=drop" if 2 * len(ids) <= len(rows) else "is it the right column?"
            )
            raise ConfigError(f"{message}; {fix}")
        source.leave_out(ids)
        source.notes = (*source.notes, f"left out: {message}")
    return suite


def _as_input(prompt: Prompt, completion: str, tokenizer: Any) -> RewardInput:
    return RewardInput(
        completion=completion,
        answer=prompt.answer,
        messages=conversation(prompt, tokenizer),
        source=prompt.source,
        columns=prompt.columns,
    )
