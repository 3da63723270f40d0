"""Answers to a set of problems from the rollout engines, and from there answers whose thoughts are
cut at budgets."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...rollout.actors import ActorLostError
from ...rollout.environments import GroupEpisodes, whole
from ...rollout.jobs import Job, Outcome
from ...rollout.pool import RolloutPool
from ...rollout.samples import Completion, Prompt, Sampling
from .thinking import Thoughts

Key = tuple[int, int | None]
"""(index of a prompt, thinking budget)."""


def sampled(
    pool: RolloutPool,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    thoughts: Thoughts | None = None,
) -> Iterator[tuple[int, int | None, tuple[Completion, ...]]]:
    """Yields (index of the prompt, thinking budget, its n completions) as groups become complete,
    in no particular order: each prompt without a budget (None), and once for each of `thoughts`.

    Answers without a budget are sampled first. At a budget, those that thought for longer are cut
    there and decoded from there on, under a prompt id of its own; the others stay what they are.
    """
    outcomes: queue.SimpleQueue[tuple[Key, Outcome]] = queue.SimpleQueue()
    kept: dict[Key, list[Completion]] = {}
    begun: dict[Key, dict[int, Completion]] = {}

    def job(key: Key, prompt: Prompt, parts: Sequence[Completion] = ()) -> Job:
        return Job(
            prompt=prompt,
            n=len(parts) or n,
            sampling=sampling,
            deliver=lambda outcome: outcomes.put((key, outcome)),
            episodes=GroupEpisodes(going_on=tuple(parts)),
        )

    pool.submit([job((index, None), prompt) for index, prompt in enumerate(prompts)])
    left = len(prompts)
    while left:
        # each request has a deadline of its own, and then an outcome
        (index, budget), outcome = outcomes.get()
        left -= 1
        if isinstance(outcome, ActorLostError):
            raise outcome
        if budget is not None:
            yield index, budget, _joined(prompts[index].id, outcome, (index, budget), kept, begun)
            continue
        yield index, None, outcome
        for budget in () if thoughts is None else thoughts.settings.budgets:
            assert thoughts is not None
            key, prompt = (
                (index, budget),
                replace(prompts[index], id=f"{prompts[index].id}#{budget}"),
            )
            cuts = [thoughts.cut(prompt, completion, budget) for completion in outcome]
            kept[key] = [c for c, cut in zip(outcome, cuts, strict=True) if cut is None]
            begun[key] = {cut.sample: cut for cut in cuts if cut is not None}
            if begun[key]:
                pool.submit([job(key, prompt, tuple(begun[key].values()))])
                left += 1
            else:
                yield index, budget, _joined(prompts[index].id, (), key, kept, begun)


def _joined(
    prompt_id: str,
    decoded: Sequence[Completion],
    key: Key,
    kept: dict[Key, list[Completion]],
    begun: dict[Key, dict[int, Completion]],
) -> tuple[Completion, ...]:
    """The group of one budget, in sample order."""
    before = begun.pop(key)
    cut = [replace(whole(c, before[c.sample]), prompt_id=prompt_id) for c in decoded]
    return tuple(sorted([*kept.pop(key), *cut], key=lambda completion: completion.sample))
