"""Votes for maj@k: answers to a problem grouped by what they say.

All correct answers count as one, whatever their wording. Wrong ones count as one if the final
answers that the verifier reads in them are the same text, or if the reward accepts one for the
other. An answer without a verdict, or without anything to parse, does not vote.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from ...rewards.inputs import RewardInput
from ...rewards.math_answers.extract import extract, final_text
from ...rewards.suite import RewardSuite
from ...rewards.verdict import Status
from ..groups import Group
from .measures import Outcome

Pair = tuple[Group, str, str]
"""A problem, and two final answers to it."""
Same = Callable[[Sequence[Pair]], Sequence[bool]]
"""A function that returns, for each pair, whether it is the same answer in other words."""
MOST_PAIRS = 28
"""Pairs of wrong answers to one problem that a reward is asked about: all of 8 different ones."""
_LONGEST_ANSWER = 200
_VOTES = (Status.CORRECT, Status.WRONG, Status.PARTIAL)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def outcomes(
    groups: Sequence[Group],
    texts: Sequence[Sequence[str]],
    same: Same | None = None,
    *,
    any_k: bool = False,
) -> list[Outcome]:
    """The outcomes of each problem's answers. `same` is called only if the majority of all answers,
    or with `any_k` of some of them, depends on whether wrong answers are the same."""
    if len(groups[0].completions) == 1:
        same = None  # one answer is its own majority
    numbers = vote_numbers(groups, texts, same, any_k=any_k)
    return [
        Outcome(
            problem=group.prompt.id,
            source=group.prompt.source,
            statuses=tuple(v.status for v in group.verdicts),
            scores=tuple(v.score for v in group.verdicts),
            votes=tuple(votes),
            tokens=tuple(c.num_sampled for c in group.completions),
            thoughts=(0,) * len(group.completions),
            cut=tuple(c.finish_reason == "length" for c in group.completions),
            kind=str(group.prompt.columns["kind"]) if "kind" in group.prompt.columns else None,
        )
        for group, votes in zip(groups, numbers, strict=True)
    ]


def vote_numbers(
    groups: Sequence[Group],
    texts: Sequence[Sequence[str]],
    same: Same | None,
    *,
    any_k: bool = False,
) -> list[list[int | None]]:
    """The votes of each group's completions, as in `Outcome.votes`."""
    answers: list[list[str | None]] = []
    asked: list[tuple[int, str, str]] = []
    for i, (group, said) in enumerate(zip(groups, texts, strict=True)):
        numbers = [
            (final_answer(text) if v.status is not Status.CORRECT else "")
            if v.status in _VOTES
            else None
            for text, v in zip(said, group.verdicts, strict=True)
        ]
        answers.append(numbers)
        right = sum(v.status is Status.CORRECT for v in group.verdicts)
        wrong = Counter(
            answer
            for answer, v in zip(numbers, group.verdicts, strict=True)
            if answer is not None and v.status is not Status.CORRECT
        )
        # else the right answer has lost or won the majority however the wrong ones are grouped
        if same is not None and right > 0 and (any_k or right <= sum(wrong.values())):
            names = [name for name, _ in wrong.most_common()]
            pairs = [(a, b) for j, b in enumerate(names) for a in names[:j]]
            asked += [(i, a, b) for a, b in pairs[:MOST_PAIRS]]
    equal = same([(groups[i], a, b) for i, a, b in asked]) if same is not None and asked else []
    leaders: list[dict[str, str]] = [{} for _ in groups]
    for (i, a, b), is_same in zip(asked, equal, strict=True):
        if is_same:
            one, other = _leader(leaders[i], a), _leader(leaders[i], b)
            if one != other:
                leaders[i][other] = one
    return [
        _numbered(numbers, [v.status is Status.CORRECT for v in group.verdicts], leader)
        for numbers, group, leader in zip(answers, groups, leaders, strict=True)
    ]


def _leader(leaders: dict[str, str], answer: str) -> str:
    """The representative of an answer's class (union-find)."""
    while answer in leaders:
        answer = leaders[answer]
    return answer


def _numbered(
    answers: Sequence[str | None], right: Sequence[bool], leaders: dict[str, str]
) -> list[int | None]:
    numbers: dict[str, int] = {}
    votes: list[int | None] = []
    for answer, is_right in zip(answers, right, strict=True):
        if answer is None:
            votes.append(None)
        elif is_right:
            votes.append(0)
        else:
            votes.append(numbers.setdefault(_leader(leaders, answer), len(numbers) + 1))
    return votes


def by_reward(suite: RewardSuite) -> Same:
    """A `Same` by the reward: two answers are the same if either is correct with the other as its
    reference, and each with itself. The latter leaves answers that cannot be a reference (a
    program, a piece of prose) to the comparison of texts."""

    def same(pairs: Sequence[Pair]) -> list[bool]:
        directions = [[(g, a, b), (g, b, a), (g, a, a), (g, b, b)] for g, a, b in pairs]
        verdicts = suite.grade([_as_input(*one) for four in directions for one in four])
        right = [verdict.status == Status.CORRECT for verdict in verdicts]
        fours = [right[i : i + 4] for i in range(0, len(right), 4)]
        return [(ab or ba) and aa and bb for ab, ba, aa, bb in fours]

    return same


def _as_input(group: Group, answer: str, reference: str) -> RewardInput:
    prompt = group.prompt
    return RewardInput(
        completion=f"\\boxed{{{answer}}}",
        answer=reference,
        messages=prompt.messages,
        source=prompt.source,
        columns=prompt.columns,
    )


def final_answer(text: str) -> str:
    """The normalised final answer by which votes are compared first: the final answers that the
    math verifier reads in a text, or else the last number of a sentence, or all that follows the
    thoughts; without dollar signs, spaces and a full stop, at most `_LONGEST_ANSWER` characters."""
    said = ", ".join(extract(text).candidates)
    if not said:
        said = (final_text(text) or "").strip()
        if len(said.split()) > 1 and (numbers := _NUMBER.findall(said)):
            said = numbers[-1]
    said = re.sub(r"\s+", "", said.strip().strip("$")).rstrip(".,")
    return re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", said)[:_LONGEST_ANSWER]
