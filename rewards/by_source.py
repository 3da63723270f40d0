"""`BySource`: a reward for each kind of problem, chosen by the row's data source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from .inputs import Reward, RewardInput
from .verdict import Verdict, verifier_error


class BySource(Reward):
    """Grades each row with the reward of the first pattern (`*`, `?`, `[...]`) that its source
    matches.

    An exact name goes before patterns, and `*` comes last, whatever their order. A row of another
    source is `verifier_error`; `check_references` raises ValueError for it before training.
    """

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        self._rewards = dict(rewards)
        self._patterns = sorted(self._rewards, key=lambda pattern: pattern == "*")

    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        verdicts: list[Verdict | None] = [None] * len(batch)
        for pattern, numbers in self._split(batch).items():
            if pattern is None:
                for i in numbers:
                    verdicts[i] = verifier_error(
                        f"by_source has no pattern for {batch[i].source!r}"
                    )
                continue
            graded = self._rewards[pattern]([batch[i] for i in numbers])
            for i, verdict in zip(numbers, graded, strict=True):
                shown = {} if verdict.score is None else {pattern: verdict.score}
                verdicts[i] = replace(verdict, parts={**verdict.parts, **shown})
        return [verdict for verdict in verdicts if verdict is not None]

    @property
    def finished(self) -> int:
        return sum(reward.finished for reward in self._each())

    def check_references(self, rows: Sequence[RewardInput]) -> list[str | None]:
        """The results of each reward for its rows, after a trial on the first of them."""
        split = self._split(rows)
        if None in split:
            counts = Counter(rows[i].source for i in split[None])
            named = ", ".join(
                f"{source!r} ({count} rows)" for source, count in counts.most_common(5)
            )
            raise ValueError(
                f"by_source has no pattern for the data source {named}; it has"
                f" {', '.join(self._patterns)}: add it, or '*' for all others"
            )
        messages: list[str | None] = [None] * len(rows)
        for pattern, numbers in split.items():
            assert pattern is not None
            reward = self._rewards[pattern]
            reward.trial(replace(rows[numbers[0]], completion="0"))
            for i, message in zip(
                numbers, reward.check_references([rows[i] for i in numbers]), strict=True
            ):
                messages[i] = message
        return messages

    def trial(self, example: RewardInput) -> None:
        self.check_references([example])

    def close(self) -> None:
        for reward in self._each():
            reward.close()

    def _each(self) -> list[Reward]:
        # patterns with equal specifications share a reward
        return list({id(reward): reward for reward in self._rewards.values()}.values())

    def _split(self, rows: Sequence[RewardInput]) -> dict[str | None, list[int]]:
        """The indices of the rows by the pattern of their source; None: no pattern matches."""
        named: dict[str, str | None] = {}
        split: dict[str | None, list[int]] = {}
        for i, row in enumerate(rows):
            if row.source not in named:
                named[row.source] = self._pattern_of(row.source)
            split.setdefault(named[row.source], []).append(i)
        return split

    def _pattern_of(self, source: str) -> str | None:
        if source in self._rewards:
            return source
        return next((p for p in self._patterns if fnmatchcase(source, p)), None)
