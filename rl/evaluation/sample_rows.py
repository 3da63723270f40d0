"""The rows that an evaluation stores of its sampled answers."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ...rollout.pool import RolloutPool
from ...rollout.samples import Completion, Prompt, Sampling
from ..answers import AnswerReader
from ..config.sampling import ThinkingConfig
from ..eval_sets import EvalSet
from .generation import sampled
from .thinking import Thoughts
from .votes import by_reward, final_answer, outcomes

_MOST_PENDING = 16
"""Problems that may wait for their verdicts before the oldest is awaited."""


def counter_of(settings: ThinkingConfig, tokenizer: Any) -> Thoughts | None:
    """The counter of thoughts' tokens; None if the tokenizer cannot spell the tags."""
    try:
        return Thoughts(settings, tokenizer)
    except ValueError:
        return None


class Rows:
    """Makes the rows of one set's problems."""

    def __init__(
        self, name: str, problems: EvalSet, reader: AnswerReader, thoughts: Thoughts | None
    ) -> None:
        self._name = name
        self._problems = problems
        self._reader = reader
        self._thoughts = thoughts
        self._same = by_reward(problems.suite)

    async def sampled(
        self, pool: RolloutPool, prompts: Sequence[Prompt], sampling: Sampling
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """Yields all rows of one problem at a time, graded in threads while others are decoded."""
        problems = self._problems
        budgets = 1 + len(problems.thinking.settings.budgets if problems.thinking else ())
        parts: dict[int, list[asyncio.Task[list[dict[str, Any]]]]] = {}
        complete: deque[list[asyncio.Task[list[dict[str, Any]]]]] = deque()
        async for index, budget, completions in sampled(
            pool, prompts, problems.samples, sampling, problems.thinking
        ):
            work = asyncio.to_thread(
                self._rows, prompts[index], budget, completions, sampling.max_tokens
            )
            parts.setdefault(index, []).append(asyncio.create_task(work))
            if len(parts[index]) == budgets:
                complete.append(parts.pop(index))
            while complete and (
                len(complete) > _MOST_PENDING or all(part.done() for part in complete[0])
            ):
                yield [row for part in complete.popleft() for row in await part]
        for tasks in complete:
            yield [row for part in tasks for row in await part]

    def _rows(
        self,
        prompt: Prompt,
        budget: int | None,
        completions: Sequence[Completion],
        max_tokens: int,
    ) -> list[dict[str, Any]]:
        reader = self._reader
        group = reader.grade(prompt, completions, self._problems.suite, max_tokens=max_tokens)
        texts = [reader.text(prompt, completion) for completion in completions]
        [outcome] = outcomes([group], [texts], self._same, any_k=True)
        shared = {
            "set": self._name,
            "problem": prompt.id,
            "budget": budget,
            "source": prompt.source,
            "kind": outcome.kind,
            "question": reader.problem(prompt),
            "reference": prompt.answer,
            "prompt_tokens": len(prompt.token_ids),
        }
        rows = []
        for completion, verdict, text, vote in zip(
            completions, group.verdicts, texts, outcome.votes, strict=True
        ):
            tokens = completion.token_ids.tolist()
            thought = 0 if self._thoughts is None else self._thoughts.length(prompt, tokens)
            forced = len(completion) - completion.num_sampled
            rows.append(
                shared
                | {
                    "sample": completion.sample,
                    "text": text,
                    "token_ids": tokens,
                    "tokens": completion.num_sampled,
                    "forced_tokens": forced,
                    "thought_tokens": min(thought, budget) if budget and forced else thought,
                    "finish_reason": completion.finish_reason,
                    "status": verdict.status.value,
                    "score": verdict.score,
                    "parts": json.dumps(dict(verdict.parts)),
                    "message": verdict.message,
                    "answer": final_answer(text),
                    "vote": vote,
                    "grade_s": verdict.seconds,
                }
            )
        return rows
