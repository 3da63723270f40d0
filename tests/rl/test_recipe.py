"""The end of a cold start: when it is looked at, on which problems, and what ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from emberl.rewards.verdict import Status, Verdict
from emberl.rl.config import Config, resolve
from emberl.rl.groups import Group
from emberl.rl.progress import Progress
from emberl.rl.recipe import solves_enough
from emberl.rollout.samples import Completion, Prompt, Sampling, Span


def config(stop_accuracy: float) -> Config:
    return resolve(
        {
            "name": "t", "model": {"tiny": {}}, "data": {"source": "arithmetic"},
            "sft": {"stop_accuracy": stop_accuracy, "check_every": 10}, "reward": {"parts": {"answer": {"use": "math"}}},
        }
    )  # fmt: skip


@dataclass
class Looked:
    """What `solves_enough` takes of a run; problems with an even number are solved."""

    config: Config
    progress: Progress
    asked: list[int] = field(default_factory=list)
    published: int = 0

    @property
    def source(self) -> Any:
        return self

    @property
    def suite(self) -> Any:
        return self

    def metrics(self) -> dict[str, float]:
        return {}

    def train(self, i: int) -> Prompt:
        return Prompt(id=str(i), token_ids=(1,), answer="", source="s")

    def publish(self) -> None:
        self.published += 1

    def sampling(self, step: int) -> Sampling:
        return Sampling(max_tokens=4, temperature=1.0)

    def sample_groups(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> list[Group]:
        assert (n, sampling.temperature) == (1, 0.0), "one greedy answer each"
        self.asked += [int(p.id) for p in prompts]
        done = Completion(
            prompt_id="p", sample=0, token_ids=np.zeros(1, np.int32), logprobs=np.zeros(1, np.float32),
            spans=(Span(0, 0, 1),), finish_reason="stop",
        )  # fmt: skip
        marks = {0: Verdict(status=Status.CORRECT, score=1.0), 1: Verdict(status=Status.WRONG, score=0.0)}
        return [Group(prompt=p, completions=(done,), verdicts=(marks[int(p.id) % 2],)) for p in prompts]


@pytest.mark.parametrize(("stop", "ends"), [(0.5, True), (0.51, False)])
def test_it_ends_at_the_accuracy_on_problems_that_come_next(stop: float, ends: bool) -> None:
    run: Any = Looked(config(stop), Progress(step=20, position=1280))
    assert solves_enough(run) is ends
    assert run.asked == list(range(1280, 1280 + 256)), "none of them trained on yet"
    assert run.published == 1, "with the weights of this moment"


@pytest.mark.parametrize(("stop", "step"), [(0.5, 0), (0.5, 19), (0.0, 20)])
def test_it_is_looked_at_only_every_few_steps_and_only_if_asked_for(stop: float, step: int) -> None:
    run: Any = Looked(config(stop), Progress(step=step, position=64 * step))
    assert not solves_enough(run)
    assert not run.asked
