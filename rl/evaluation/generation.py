"""Sampling of a set's answers by the rollout engines, and of continuations of those whose thoughts
are ended at a budget."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from ...rollout.crew import Job
from ...rollout.environments import GroupEpisodes, whole
from ...rollout.pool import RolloutPool
from ...rollout.samples import Completion, Prompt, Sampling
from .thinking import Thoughts

Key = tuple[int, int | None]
"""(index of a prompt, thinking budget)."""


async def sampled(
    pool: RolloutPool,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    thoughts: Thoughts | None = None,
) -> AsyncIterator[tuple[int, int | None, tuple[Completion, ...]]]:
    """Yields (index of the prompt, thinking budget, its n completions) as groups become complete,
    in no particular order: each prompt without a budget (None), and once for each of `thoughts`.

    Answers without a budget are sampled first. At a budget, those that thought for longer are cut
    there and decoded from there on, under a prompt id of its own; the others stay what they are.
    """
    budgets = () if thoughts is None else thoughts.settings.budgets
    kept: dict[Key, list[Completion]] = {}
    partials: dict[Key, dict[int, Completion]] = {}
    jobs = [Job(prompt=prompt, n=n, sampling=sampling) for prompt in prompts]
    pending: dict[asyncio.Future[tuple[Completion, ...]], Key] = {
        job.outcome: (index, None) for index, job in enumerate(jobs)
    }
    pool.submit(jobs)
    while pending:  # without a deadline here: the pool gives every job an outcome by its own
        done, _ = await asyncio.wait(pending, return_when="FIRST_COMPLETED")
        for outcome in done:
            (index, budget), decoded = pending.pop(outcome), outcome.result()
            if budget is not None:
                yield (
                    index,
                    budget,
                    _joined(prompts[index].id, decoded, (index, budget), kept, partials),
                )
                continue
            yield index, None, decoded
            for budget in budgets:
                assert thoughts is not None
                key = (index, budget)
                prompt = replace(prompts[index], id=f"{prompts[index].id}#{budget}")
                cuts = [thoughts.cut(prompt, completion, budget) for completion in decoded]
                kept[key] = [c for c, cut in zip(decoded, cuts, strict=True) if cut is None]
                partials[key] = {cut.sample: cut for cut in cuts if cut is not None}
                if not (parts := tuple(partials[key].values())):
                    yield index, budget, _joined(prompts[index].id, (), key, kept, partials)
                    continue
                episodes = GroupEpisodes(going_on=parts)
                job = Job(prompt=prompt, n=len(parts), sampling=sampling, episodes=episodes)
                pending[job.outcome] = key
                pool.submit([job])


def _joined(
    prompt_id: str,
    decoded: Sequence[Completion],
    key: Key,
    kept: dict[Key, list[Completion]],
    partials: dict[Key, dict[int, Completion]],
) -> tuple[Completion, ...]:
    """The group of one budget, in sample order: answers that kept within it, and continuations of
    the others. Removes the group from `kept` and `partials`."""
    before = partials.pop(key)
    cut = [replace(whole(c, before[c.sample]), prompt_id=prompt_id) for c in decoded]
    return tuple(sorted([*kept.pop(key), *cut], key=lambda completion: completion.sample))
