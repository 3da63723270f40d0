"""The step as the learners see it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
from emberl.rewards.verdict import Status, Verdict
from emberl.rl.algorithm.losses import Objective
from emberl.rl.config.load import resolve
from emberl.rl.groups import Group, Progress
from emberl.rl.trainer import update
from emberl.rollout.samples import Completion, Prompt, Span


def group(number: int, lengths: Sequence[int], scores: Sequence[float | None]) -> Group:
    rng = np.random.default_rng(number)
    prompt = Prompt(id=f"p{number}", token_ids=(3, 4 + number % 5), answer="", source="test")
    completions = tuple(
        Completion(
            prompt_id=prompt.id,
            sample=i,
            token_ids=rng.integers(4, 18, n).astype(np.int32),
            logprobs=(-2.5 + 0.3 * rng.standard_normal(n)).astype(np.float32),
            spans=(Span(0, 0, n),),
            finish_reason="stop",
        )
        for i, n in enumerate(lengths)
    )
    verdicts = tuple(
        Verdict(
            status=Status.VERIFIER_ERROR if s is None else Status.CORRECT if s else Status.WRONG,
            score=s,
            parts={},
        )
        for s in scores
    )
    return Group(prompt=prompt, completions=completions, verdicts=verdicts)


GROUPS = [
    group(0, (3, 9, 5, 2), (1.0, 0.0, 0.0, 1.0)),
    # no signal: it trains nothing
    group(1, (4, 4, 12, 7), (0.0, 0.0, 0.0, 0.0)),
]


def test_parts_without_a_signal_are_told_to_the_learners() -> None:
    """Of two minibatches over two epochs one had a signal: two updates, and two that count without
    being made."""
    tree = {"name": "x", "model": {"path": "m"}, "data": {"source": "arithmetic"}}
    config = resolve(
        {**tree, "schedule": {"minibatches": 2, "epochs": 2}, "filter": {"zero_variance": False}}
    )
    calls: list[object] = []
    learners = SimpleNamespace(
        step=lambda batch, objective: calls.append("step") or {},
        logprobs=lambda batch, temperature: batch.behaviour_logp_T,
        skip=calls.append,
    )

    async def publish(*, wait: bool) -> dict[str, float]:
        return {}

    run: Any = SimpleNamespace(
        config=config,
        learners=learners,
        progress=Progress(),
        publish=publish,
        tracker=SimpleNamespace(spans=SimpleNamespace(span=lambda *_: nullcontext())),
    )
    scored = [
        g.with_advantages(a)
        for g, a in zip(GROUPS, ([1.0, -1.0, -1.0, 1.0], [0.0] * 4), strict=True)
    ]
    objective = Objective.of(config.loss, config.kl, config.offpolicy)
    assert asyncio.run(update(run, scored, objective))["training/updates"] == 2
    assert calls == ["step", "step", 2]
    calls.clear()
    assert asyncio.run(update(run, [], objective))["training/updates"] == 0
    assert calls == [4]
