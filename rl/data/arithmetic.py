"""The built-in source: arithmetic with worked solutions, small enough for a model that is trained
in minutes.

    chain     7+5-3+8=?          <think>7+5=12,12-3=9,9+8=17</think>17
    products  3*7-4+2*5=?        <think>3*7=21,2*5=10,21-4=17,17+10=27</think>27
    brackets  (3+4)*2-(9-5)=?    <think>3+4=7,7*2=14,9-5=4,14-4=10</think>10
    solve     x+7-3=11,x=?       <think>11+3=14,14-7=7</think>7
    story     Mia has 7 apples, then gets 5 more, then gives 3 away. How many apples does Mia have
    now?
              7 + 5 = 12. 12 - 3 = 9. The answer is 9.
    compare   Which number is the largest: 35, 82 or 7?
              The answer is 82.

`story` and `compare` are for a model that speaks English already, the others are for one that
starts from nothing. Nothing is ever negative. A hash of a problem's text, or of the chain that a
story tells, or of the numbers that are compared, says whether it is held out: no run, whatever its
seed, trains on a problem that any run is evaluated on, nor on the same numbers in other words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate
from random import Random

from ...rollout.samples import Prompt
from ..config.data import DataConfig
from .templates import PromptWriter, Tokenizer

HELD_OUT_SHARE = 8
"""One problem in this many is held out."""
_HELD_OUT_STREAM = -1
_TRIES = 400

_NAMES = ("Anna", "Ben", "Lily", "Mia", "Sam", "Tom")
_THINGS = ("apples", "books", "coins", "marbles", "pencils", "stickers")
_GAINS = ("gets {} more", "finds {} more", "buys {} more")
_LOSSES = ("gives {} away", "loses {}", "sells {}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """e.g. kind "chain", text and bare "7+5-3=?", solution "<think>7+5=12,12-3=9</think>9", answer
    "9"."""

    kind: str
    text: str
    solution: str
    answer: str
    bare: str
    """The text; of a story the chain that it tells, of a comparison its sorted numbers. Decides
    whether a problem is held out, and whether it is new."""


@dataclass(slots=True)
class _Work:
    """One problem in the making: its random draws, its limits, and the steps taken so far."""

    random: Callable[[], float]
    largest_term: int
    largest_total: int
    short: bool
    steps: list[str] = field(default_factory=list)
    bare: str = ""
    """`Problem.bare`, if that is not the text."""

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def step(self, left: int, sign: str, right: int) -> int:
        result = left + right if sign == "+" else left - right if sign == "-" else left * right
        self.steps.append(str(result) if self.short else f"{left}{sign}{right}={result}")
        return result

    def pick(self, words: Sequence[str]) -> str:
        return words[self.below(len(words))]

    def sign(self, total: int, value: int) -> str:
        """`+` or `-`, whichever keeps the total within its limits; empty if neither does."""
        can_add, can_take = total + value <= self.largest_total, value <= total
        if can_add and can_take:
            return "+" if self.random() < 0.5 else "-"
        return "+" if can_add else "-" if can_take else ""


def _chain(work: _Work, terms: int) -> tuple[str, int]:
    total = 1 + work.below(work.largest_term)
    text = str(total)
    for _ in range(terms - 1):
        term = 1 + work.below(work.largest_term)
        sign = work.sign(total, term)
        text += f"{sign}{term}"
        total = work.step(total, sign, term)
    return text + "=?", total


def _solve(work: _Work, terms: int) -> tuple[str, int]:
    """A chain whose first number is hidden and whose result is given: the steps undo it from its
    end."""
    hidden = total = work.below(work.largest_term + 1)
    moves = []
    for _ in range(terms - 1):
        term = 1 + work.below(work.largest_term)
        sign = work.sign(total, term)
        total = total + term if sign == "+" else total - term
        moves.append((sign, term))
    text = "x" + "".join(f"{sign}{term}" for sign, term in moves) + f"={total},x=?"
    for sign, term in reversed(moves):
        total = work.step(total, "-" if sign == "+" else "+", term)
    assert total == hidden, f"{text}: {total} is not {hidden}"
    return text, total


def _story(work: _Work, terms: int) -> tuple[str, int]:
    """A chain in words."""
    name, things = work.pick(_NAMES), work.pick(_THINGS)
    total = 2 + work.below(work.largest_term - 1)  # `1 apples` would be wrong
    text = f"{name} has {total} {things}"
    work.bare = str(total)
    for _ in range(terms - 1):
        term = 1 + work.below(work.largest_term)
        sign = work.sign(total, term)
        text += ", then " + work.pick(_GAINS if sign == "+" else _LOSSES).format(term)
        work.bare += f"{sign}{term}"
        total = work.step(total, sign, term)
    work.bare += "=?"
    return f"{text}. How many {things} does {name} have now?", total


def _compare(work: _Work, terms: int) -> tuple[str, int]:
    numbers: list[int] = []
    while len(numbers) < terms:
        number = 1 + work.below(work.largest_term)
        if number not in numbers:
            numbers.append(number)
    word, choose = (("largest", max), ("smallest", min))[work.below(2)]
    work.bare = " ".join(map(str, sorted(numbers)))
    *first, last = map(str, numbers)
    return f"Which number is the {word}: {', '.join(first)} or {last}?", choose(numbers)


def _products(work: _Work, terms: int) -> tuple[str, int]:
    return _sum_of_parts(work, _sizes(work, terms, 2), _product)


def _brackets(work: _Work, terms: int) -> tuple[str, int]:
    return _sum_of_parts(work, _sizes(work, terms, 3), _bracket)


def _product(work: _Work, size: int) -> tuple[str, list[tuple[int, str, int]], int]:
    left = 2 + work.below(8)
    if size == 1:
        return str(left), [], left
    right = 2 + work.below(8)
    return f"{left}*{right}", [(left, "*", right)], left * right


def _bracket(work: _Work, size: int) -> tuple[str, list[tuple[int, str, int]], int]:
    """(a+b) or (a-b), with three numbers multiplied by the third; both factors have one digit."""
    a, b = 1 + work.below(9), 1 + work.below(9)
    if size == 1:
        return str(a), [], a
    sign = "+" if a < b or (work.random() < 0.5 and (size == 2 or a + b <= 9)) else "-"
    if size == 3 and sign == "+" and a + b > 9:
        a, b, sign = b, a, "-"
    value = a + b if sign == "+" else a - b
    if size == 2:
        return f"({a}{sign}{b})", [(a, sign, b)], value
    c = 2 + work.below(8)
    if work.random() < 0.5:
        return f"{c}*({a}{sign}{b})", [(a, sign, b), (c, "*", value)], c * value
    return f"({a}{sign}{b})*{c}", [(a, sign, b), (value, "*", c)], value * c


_Part = Callable[[_Work, int], tuple[str, list[tuple[int, str, int]], int]]


def _sum_of_parts(work: _Work, sizes: Sequence[int], make: _Part) -> tuple[str, int]:
    """Parts with plus or minus between them; each part is worked out first, in order, and then
    their sum."""
    text, total, moves = "", 0, []
    for size in sizes:
        sign = ""
        while not sign:  # a part of at most half the largest total always fits, so this ends
            part, steps, value = make(work, size)
            sign = work.sign(total, value) if text else "+" if value <= work.largest_total else ""
        text += (sign if text else "") + part
        moves.append((sign, value))
        total = total + value if sign == "+" else total - value
        for left, operator, right in steps:
            work.step(left, operator, right)
    total = moves[0][1]
    for sign, value in moves[1:]:
        total = work.step(total, sign, value)
    return text + "=?", total


def _sizes(work: _Work, terms: int, most: int) -> list[int]:
    """The count of numbers in each part: 1 to `most`, summing to `terms`, at least one above 1."""
    sizes = []
    left = terms
    while left:
        sizes.append(1 + work.below(min(most, left)))
        left -= sizes[-1]
    if max(sizes) == 1:
        at = work.below(len(sizes) - 1)
        sizes[at : at + 2] = [2]
    return sizes


_MAKE: dict[str, Callable[[_Work, int], tuple[str, int]]] = {
    "chain": _chain,
    "products": _products,
    "brackets": _brackets,
    "solve": _solve,
    "story": _story,
    "compare": _compare,
}
IN_ENGLISH = ("story", "compare")
"""Kinds whose problems and solutions are sentences."""


def _solution(kind: str, steps: Sequence[str], total: int) -> str:
    if kind not in IN_ENGLISH:
        return f"<think>{','.join(steps)}</think>{total}"
    spaced = [re.sub(r"[+=-]", r" \g<0> ", step) for step in steps]
    return ". ".join([*spaced, f"The answer is {total}."])


def is_heldout(text: str) -> bool:
    """Whether a problem is held out: a pure function of its text, whatever seed and settings are.

    text: `Problem.bare`.
    """
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest()) % HELD_OUT_SHARE == 0


class ProblemMaker:
    """Problems of the mix that `data.kinds` asks for, as a pure function of (stream, position)."""

    def __init__(self, settings: DataConfig) -> None:
        self.settings = settings
        self._kinds = [kind for kind, weight in settings.kinds.items() if weight > 0]
        self._edges = list(accumulate(settings.kinds[kind] for kind in self._kinds))

    def draw(self, random: Random) -> Problem:
        settings = self.settings
        work = _Work(
            random.random, settings.largest_term, settings.largest_total, settings.steps == "short"
        )
        at = random.random() * self._edges[-1]
        kind = next(
            (k for k, edge in zip(self._kinds, self._edges, strict=True) if at < edge),
            self._kinds[-1],
        )
        fewest, most = settings.terms
        text, total = _MAKE[kind](work, fewest + work.below(most - fewest + 1))
        solution = _solution(kind, work.steps, total)
        return Problem(
            kind=kind, text=text, solution=solution, answer=str(total), bare=work.bare or text
        )

    def train(self, seed: int, i: int) -> Iterator[Problem]:
        """Candidates for position `i` of a seed's stream, none of them held out, at most `_TRIES`;
        the caller takes the first that fits."""
        random = Random((seed << 64) + i)  # no two pairs of seed and position share a stream
        for _ in range(_TRIES):
            problem = self.draw(random)
            if not is_heldout(problem.bare):
                yield problem

    def heldout(self) -> Iterator[Problem]:
        """Held-out problems, each once, the same for every seed; ends after
        `_TRIES * HELD_OUT_SHARE` draws without a new one."""
        random, seen, misses = Random(_HELD_OUT_STREAM), set[str](), 0
        while misses < _TRIES * HELD_OUT_SHARE:
            problem = self.draw(random)
            misses += 1
            if is_heldout(problem.bare) and problem.bare not in seen:
                seen.add(problem.bare)
                misses = 0
                yield problem


class ArithmeticSource:
    """`data.source: arithmetic`."""

    size = None

    def __init__(self, settings: DataConfig, tokenizer: Tokenizer, seed: int) -> None:
        self.name = settings.name or "arithmetic"
        self.notes: Sequence[str] = ()
        self._seed = seed
        self._maker = ProblemMaker(settings)
        self._writer = PromptWriter(settings, tokenizer)
        self.heldout: Sequence[Prompt] = self._heldout(settings)

    def train(self, i: int) -> Prompt:
        for problem in self._maker.train(self._seed, i):
            prompt = self._prompt(problem, f"{self.name}/{i}")
            if self._writer.fits(prompt):
                return prompt
        raise ValueError(self._writer.too_long(f"none of {_TRIES} problems", None))

    def examples(self) -> Sequence[Prompt]:
        return self.heldout

    def solution(self, prompt: Prompt) -> str | None:
        return str(prompt.columns["solution"])

    def _prompt(self, problem: Problem, name: str) -> Prompt:
        columns = {"question": problem.text, "kind": problem.kind, "solution": problem.solution}
        return self._writer.question(
            problem.text, id=name, answer=problem.answer, source=self.name, columns=columns
        )

    def _heldout(self, settings: DataConfig) -> list[Prompt]:
        prompts = self._writer.first_fitting(
            self._maker.heldout(),
            settings.heldout,
            lambda problem, i: self._prompt(problem, f"{self.name}/heldout/{i}"),
            lambda problem: f"the problem {problem.text!r}",
        )
        if len(prompts) == settings.heldout:
            return prompts
        raise ValueError(
            f"data.heldout={settings.heldout}, but these settings give only {len(prompts)} held-out"
            f" problems; raise data.terms={list(settings.terms)} or data.largest_term, or lower"
            " data.heldout"
        )
