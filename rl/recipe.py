"""A run from configuration to result: puts the parts together and goes through the stages."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..rewards.inputs import RewardInput
from ..rewards.suite import RewardSuite, build_suite
from ..rollout.samples import Prompt
from .algorithm.losses import Objective
from .batch import sft_batch
from .cluster import Cluster
from .config import Config, ConfigError
from .evaluate import glance
from .progress import Progress, latest_checkpoint, open_run_dir, read_progress, trim_metrics
from .prompts import PromptSource, check_data, open_source
from .run import Interrupted, Run, stop_on_signal
from .tokens import supervised_ids
from .trainer import train_rl
from .watch.tracking import Tracker, make_console

_GLANCE = 256
"""Problems that tell whether a cold start is over: their accuracy is known to about 3 points."""


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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def train(config: Config, *, resume: bool = False) -> Result:
    """Runs all stages. Raises `ConfigError` before Ray starts where the fault can be known by then."""
    started = time.time()
    with user_errors():
        check_data(config.data)
        Objective.of(config.loss, config.kl, config.offpolicy)  # tries a user's own loss on a tiny batch
    cluster = Cluster(config)
    run_dir, checkpoint = open_run_dir(config, resume)
    progress = read_progress(checkpoint) if checkpoint else Progress()
    if checkpoint and progress.stage < len(config.stages):
        trim_metrics(run_dir, config.stages[progress.stage], progress.step, config.stages)
    console = make_console()
    with cluster, stop_on_signal() as stop:  # in this order: Ray's start sets a SIGTERM handler of its own
        model_path = prepare_model(config, run_dir)
        # the actors load while this process reads the data: both take seconds
        learners, pool = cluster.spawn(str(checkpoint or model_path), run_id := uuid.uuid4().hex)
        tokenizer = load_tokenizer(model_path)
        with user_errors():
            source = open_source(config.data, tokenizer, config.seed)
        with ExitStack() as opened:
            suite = build_rewards(config, source)
            opened.callback(suite.close)
            tracker = Tracker(config, run_dir, console)
            opened.callback(tracker.close)
            for note in source.notes:
                tracker.note(note)
            cluster.wait()
            run = Run(
                config=config, run_id=run_id, run_dir=run_dir, tokenizer=tokenizer, source=source, suite=suite,
                learners=learners, pool=pool, tracker=tracker, stop=stop, started=started - progress.seconds, progress=progress,
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
            settings = run.config.sft_optim if name == "sft" else run.config.optim
            run.learners.begin_stage(settings, run.config.sft.steps if name == "sft" else run.config.updates)
            if checkpoint is not None:
                run.learners.restore(str(checkpoint))
                checkpoint = None
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
    )


def finish(run: Run) -> None:
    """The model that a user takes away, and the picture."""
    newest = latest_checkpoint(run.run_dir)
    if newest is not None:
        model = run.run_dir / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(newest, model, ignore=shutil.ignore_patterns("learner", "progress.json"))
    run.tracker.curve()


def train_sft(run: Run) -> None:
    """The cold start: supervised steps on worked solutions, each problem once."""
    config = run.config.sft
    run.tracker.begin("sft", run.progress.step, config.steps)
    while run.progress.step < config.steps:
        run.stop_if_asked()
        if solves_enough(run):
            break
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
            examples.append((supervised_ids(prompt, solution, run.tokenizer), len(prompt.token_ids)))
        metrics = run.learners.step(sft_batch(examples), Objective.sft())
        run.progress = run.progress.advance(step=run.progress.step + 1, position=position + config.batch_size)
        run.tracker.log(
            run.progress.step,
            {"sft/loss": metrics["actor/pg_loss"], **metrics},
            show={"loss": f"{metrics['actor/pg_loss']:.3f}"},
        )
    run.save()


def solves_enough(run: Run) -> bool:
    """Whether `sft.stop_accuracy` is reached, looked at every `sft.check_every` steps on problems not trained on yet (of a
    finite data set only within its first pass)."""
    config, progress = run.config.sft, run.progress
    if not config.stop_accuracy or not progress.step or progress.step % config.check_every:
        return False
    run.publish()
    ahead = range(progress.position, progress.position + _GLANCE)
    return glance(run, [run.source.train(i) for i in ahead]) >= config.stop_accuracy


def prepare_model(config: Config, run_dir: Path) -> Path | str:
    """The model that the run starts from: the one named, or a tiny one made in the run's directory."""
    if config.model.tiny is None:
        assert config.model.path is not None
        return config.model.path
    from .tiny import make_tiny

    folder = run_dir / "model_init"
    if not (folder / "config.json").exists():
        make_tiny(folder, config.model.tiny, config.seed)
    return folder


def load_tokenizer(model_path: Path | str) -> Any:
    """The model's tokenizer; `ConfigError` where there is no such model."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:  # what transformers raises for a missing model, and for a broken one
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.path={str(model_path)!r} cannot be loaded: {reason}; give a Hub id or a local directory"
        ) from error


def build_rewards(config: Config, source: PromptSource) -> RewardSuite:
    """The reward suite, tried on one problem, with every reference of a finite data set checked before training."""
    if config.eval.size and not source.heldout:
        raise ConfigError(
            f"eval.size={config.eval.size}, but data.heldout={config.data.heldout} leaves no held-out problems; "
            "raise data.heldout, name data.eval_path or data.eval_split, or set eval.size=0"
        )
    with user_errors():
        suite = build_suite({name: part.model_dump() for name, part in config.reward.parts.items()})
        suite.trial(_as_input(source.train(0), "0"))
    rows = [*source.heldout, *(source.train(i) for i in range(source.size or 0))]
    bad = suite.check_references([_as_input(prompt, "") for prompt in rows])
    if bad:
        suite.close()
        shown = "; ".join(f"{rows[b.row].id}: {b}" for b in bad[:3])
        raise ConfigError(
            f"{len(bad)} references of data.source={config.data.source!r} cannot be graded against: {shown}"
        )
    return suite


def _as_input(prompt: Prompt, completion: str) -> RewardInput:
    return RewardInput(
        completion=completion,
        answer=prompt.answer,
        messages=prompt.messages,
        source=prompt.source,
        columns=prompt.columns,
    )


@contextmanager
def user_errors() -> Iterator[None]:
    """What these parts report as a ValueError is for the user to mend, and is told without a traceback."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
