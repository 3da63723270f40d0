"""Supervised learning as a stage: its data, its steps, and its evaluation on held-out data."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .algorithm.losses import Objective
from .batch import demonstrations, example_batch
from .config.load import Config, ConfigError, user_errors
from .data.demonstrations import Demonstrations, Example
from .data.sources import PromptSource
from .data.templates import end_token, supervised_ids
from .evaluate import evaluate
from .groups import Batch
from .run import Run

_PASS = 64
"""Held-out sequences whose loss is computed at a time."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Imitated:
    """The worked solutions of supervised steps: rows of `sft.data`, or the worked solutions of a
    source."""

    config: Config
    source: PromptSource
    tokenizer: Any
    rows: Demonstrations | None
    heldout: Sequence[Example]

    @property
    def size(self) -> int | None:
        """Rows in an epoch; None for a source that never repeats."""
        return self.source.size if self.rows is None else self.rows.size

    @property
    def notes(self) -> Sequence[str]:
        """Remarks for a person about the rows."""
        if self.rows is None:
            return ()
        return (*self.rows.notes, f"sft.data: {self.rows.size:,} rows to learn")

    def batch(self, position: int) -> Batch:
        """The `sft.batch_size` rows from `position` on."""
        if self.rows is None:
            return demonstrations(self.source, self.tokenizer, self.config, position)
        size = self.config.sft.batch_size
        examples = [e for i in range(position, position + size) for e in self.rows.examples(i)]
        if not examples:
            raise ConfigError(
                f"all of the {size} rows of sft.data from number {position} on have more than"
                f" {self.config.max_model_length} tokens, the longest prompt and answer; raise"
                " rollout.max_response_length"
            )
        return example_batch(examples)


def open_imitated(config: Config, source: PromptSource, tokenizer: Any) -> Imitated:
    """Reads the worked solutions: `sft.data` if it is set, else those of `source`. Raises
    `ConfigError` for faulty data."""
    sft, rows = config.sft, None
    with user_errors():
        if sft.data is not None:
            try:
                rows = Demonstrations(
                    sft.data.beside(config.data),
                    tokenizer,
                    config.seed if sft.data.seed is None else sft.data.seed,
                    limit=config.max_model_length,
                    heldout=sft.heldout,
                )
            except ValueError as error:
                raise ValueError(f"sft.data: {error}") from error
            heldout = rows.heldout
        else:
            heldout = _heldout_solutions(source, tokenizer, sft.heldout)
    return Imitated(config=config, source=source, tokenizer=tokenizer, rows=rows, heldout=heldout)


def _heldout_solutions(source: PromptSource, tokenizer: Any, count: int) -> list[Example]:
    solutions = []
    for prompt in source.heldout[:count]:
        solution = source.solution(prompt)
        if solution is not None:
            ids = supervised_ids(prompt, solution, tokenizer, end_token(tokenizer))
            learnt = np.arange(len(ids)) >= len(prompt.token_ids)
            solutions.append(Example(token_ids=ids, learnt=learnt))
    if len(solutions) < count:
        raise ValueError(
            f"sft.heldout={count}, but only {len(solutions)} of the {len(source.heldout)} held-out"
            " problems have a worked solution; lower it, or raise data.heldout"
        )
    return solutions


def with_sft_steps(config: Config, rows: int | None) -> Config:
    """The configuration with the steps that `sft.epochs` asks for."""
    sft = config.sft
    if sft.epochs is None or rows is None:
        return config
    # a little less, or the rounding of a product that should be whole would add a step
    steps = max(1, math.ceil(sft.epochs * rows / sft.batch_size - 1e-9))
    return config.model_copy(update={"sft": sft.model_copy(update={"steps": steps})})


async def train_sft(run: Run, imitated: Imitated) -> None:
    """Runs supervised steps from the run's progress to `sft.steps`, each row once an epoch."""
    sft = run.config.sft
    run.tracker.begin("sft", run.progress.step, sft.steps)
    if run.progress.step == 0:
        await look(run, imitated)
    while run.progress.step < sft.steps:
        await run.stop_if_asked()
        position = run.progress.position
        batch = imitated.batch(position)
        run.held = None
        metrics = await asyncio.to_thread(run.learners.step, batch, Objective.sft())
        step = run.progress.step + 1
        run.progress = run.progress.advance(step=step, position=position + sft.batch_size)
        run.held = run.progress
        loss = metrics["actor/loss"]
        passes = (
            {} if not imitated.size else {"sft/epoch": (position + sft.batch_size) / imitated.size}
        )
        run.tracker.log(step, {"sft/loss": loss, **passes, **metrics}, show={"loss": f"{loss:.3f}"})
        run.tracker.spans.step = step + 1
        last = step == sft.steps
        if last or (sft.eval_every and step % sft.eval_every == 0):
            await look(run, imitated)
        if sft.save_every and step % sft.save_every == 0 and not last:
            await run.save()
    await run.save(needed=True)


async def look(run: Run, imitated: Imitated) -> None:
    """Logs the held-out loss of the current weights and, with `sft.accuracy`, their accuracy on
    held-out problems."""
    step = run.progress.step
    if imitated.heldout:
        loss = await asyncio.to_thread(heldout_loss, run, imitated.heldout)
        run.tracker.log(step, {"sft/heldout_loss": loss}, "eval", {"held-out loss": f"{loss:.3f}"})
    if not run.config.sft.accuracy or not run.config.eval.active:
        return
    if step:  # before the first step the engines serve what the stage starts from
        run.weights.begin_stage()
        await run.publish()
    accuracy = (await evaluate(run)).accuracy
    changed = {"accuracy_end": accuracy} if step else {"accuracy_start": accuracy}
    run.progress = run.progress.advance(**changed)


def heldout_loss(run: Run, examples: Sequence[Example]) -> float:
    """The mean negative log-likelihood, in nats, of a learnt token of these examples."""
    total, count = 0.0, 0
    for at in range(0, len(examples), _PASS):
        batch = example_batch(examples[at : at + _PASS])
        logp_T = run.learners.logprobs(batch, temperature=1.0)
        total -= float(logp_T[batch.loss_mask_T].sum(dtype=np.float64))
        count += batch.num_loss_tokens
    return total / count
