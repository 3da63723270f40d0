"""The built-in problems: their arithmetic is right, their limits hold, and no held-out one is ever
trained on."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice
from random import Random
from typing import Any

import pytest
from emberl.rl.config.data import KINDS, DataConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.arithmetic import (
    IN_ENGLISH,
    ArithmeticSource,
    Problem,
    ProblemMaker,
    is_heldout,
)
from emberl.rl.data.sources import open_source
from emberl.rl.data.tiny import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

TOKENIZER = tiny_tokenizer(TinyConfig())
SYMBOLIC = tuple(kind for kind in KINDS if kind not in IN_ENGLISH)
"""What the character tokenizer can spell."""
MIX = dict.fromkeys(SYMBOLIC, 1.0)


def data(**options: Any) -> DataConfig:
    return DataConfig(source="arithmetic", **{"heldout": 0, **options})


def problems(n: int, seed: int = 0, **options: Any) -> list[Problem]:
    maker = ProblemMaker(data(**options))
    return [next(maker.train(seed, i)) for i in range(n)]


def value(problem: Problem) -> int:
    """What Python's own evaluation says."""
    if problem.kind == "compare":
        numbers = [int(number) for number in re.findall(r"\d+", problem.text)]
        return max(numbers) if "largest" in problem.text else min(numbers)
    text = told(problem).removesuffix("=?")
    if problem.kind != "solve":
        return int(eval(text))
    left, right = text.removesuffix(",x").split("=")
    [x] = [x for x in range(1000) if eval(left, {"x": x}) == int(right)]
    return x


def told(problem: Problem) -> str:
    """`Problem.bare` by another way: a story's sum read by its verbs, the sorted numbers that are
    compared, otherwise the text."""
    if problem.kind == "compare":
        return " ".join(sorted(re.findall(r"\d+", problem.text), key=int))
    if problem.kind != "story":
        return problem.text
    story = problem.text
    start, *events = story.split(".")[0].split(", then ")
    [total] = re.findall(r"^[A-Z][a-z]+ has (\d+) [a-z]+s$", start)
    signs = {"gets": "+", "finds": "+", "buys": "+", "gives": "-", "loses": "-", "sells": "-"}
    told = [signs[event.split()[0]] + event.split()[1] for event in events]
    return f"{total}{''.join(told)}=?"


any_settings = st.builds(
    lambda kind, fewest, more, term, total, steps: data(
        kinds={kind: 1},
        terms=(fewest, fewest + more),
        largest_term=max(term, fewest + more) if kind == "compare" else term,
        largest_total=max(total, 2 * term),
        steps=steps,
    ),
    st.sampled_from(KINDS),
    st.integers(2, 6),
    st.integers(0, 3),
    st.integers(2, 40),
    st.integers(20, 120),
    st.sampled_from(["full", "short"]),
)


@settings(max_examples=200, deadline=None)
@given(any_settings, st.integers(0, 2**40))
def test_every_problem_is_right_and_within_its_limits(config: DataConfig, seed: int) -> None:
    problem = ProblemMaker(config).draw(Random(seed))
    assert problem.answer == str(value(problem))
    assert problem.bare == told(problem)
    numbers = re.findall(r"\d+|x", problem.bare.removesuffix(",x=?"))
    count = len(numbers) - (problem.kind == "solve")  # the result that is given
    assert config.terms[0] <= count <= config.terms[1]
    if problem.kind == "compare":
        assert problem.solution == f"The answer is {problem.answer}."
        assert len(set(numbers)) == count
        assert all(1 <= int(number) <= config.largest_term for number in numbers)
        return
    if problem.kind == "story":
        work, answer = re.fullmatch(r"(.*)\. The answer is (\d+)\.", problem.solution).groups()  # type: ignore[union-attr]
        steps = work.replace(" ", "").split(".")
    else:
        work, answer = re.fullmatch(r"<think>(.*)</think>(\d+)", problem.solution).groups()  # type: ignore[union-attr]
        steps = work.split(",")
    assert answer == problem.answer == re.split("=", steps[-1])[-1]
    assert len(steps) == count - 1
    for step in steps:
        left, _, result = step.rpartition("=")
        assert not left or eval(left) == int(result)
        assert (left == "") == (config.steps == "short")
        assert 0 <= int(result) <= config.largest_total


@pytest.mark.parametrize(
    ("kind", "terms", "draws", "text", "solution"),
    [
        # 7, then 5 and plus, 3 and minus, 8 and plus
        ("chain", 4, [0.7, 0.5, 0.1, 0.25, 0.9, 0.8, 0.1], "7+5-3+8=?", "7+5=12,12-3=9,9+8=17"),
        # sizes 2, 1, 2; then 3*7, 4 and minus, 2*5 and plus
        (
            "products",
            5,
            [0.9, 0.1, 0.9, 0.15, 0.65, 0.25, 0.9, 0.0, 0.4, 0.1],
            "3*7-4+2*5=?",
            "3*7=21,2*5=10,21-4=17,17+10=27",
        ),
        # sizes 3, 2; then 3+4 (no choice of sign), times 2, behind; 9-5, and minus
        (
            "brackets",
            5,
            [0.9, 0.9, 0.25, 0.35, 0.0, 0.9, 0.95, 0.5, 0.9, 0.9],
            "(3+4)*2-(9-5)=?",
            "3+4=7,7*2=14,9-5=4,14-4=10",
        ),
        # x is 7, then 7 and plus, 3 and minus: undone from the end
        ("solve", 3, [0.75, 0.7, 0.1, 0.25, 0.9], "x+7-3=11,x=?", "11+3=14,14-7=7"),
    ],
)
def test_a_problem_by_hand(
    kind: str, terms: int, draws: list[float], text: str, solution: str
) -> None:
    maker = ProblemMaker(data(kinds={kind: 1}, terms=(terms, terms)))
    # the first two draws choose the kind and the number of terms
    problem = maker.draw(FakeRandom([0.0, 0.0, *draws]))
    answer = re.split("=", solution)[-1]
    assert problem == Problem(
        kind=kind,
        text=text,
        solution=f"<think>{solution}</think>{answer}",
        answer=answer,
        bare=text,
    )


def test_a_story_by_hand() -> None:
    maker = ProblemMaker(data(kinds={"story": 1}, terms=(3, 3)))
    # Mia, apples, 7; 5, plus, the first way to gain; 3, minus, the first way to lose
    problem = maker.draw(FakeRandom([0.0, 0.0, 0.5, 0.0, 0.7, 0.5, 0.1, 0.0, 0.25, 0.9, 0.0]))
    assert problem == Problem(
        kind="story",
        text=(
            "Mia has 7 apples, then gets 5 more, then gives 3 away. How many apples does Mia have"
            " now?"
        ),
        solution="7 + 5 = 12. 12 - 3 = 9. The answer is 9.",
        answer="9",
        bare="7+5-3=?",
    )


def test_a_comparison_by_hand() -> None:
    maker = ProblemMaker(data(kinds={"compare": 1}, terms=(3, 3), largest_term=99))
    # 35, 82, 82 again (drawn anew), 7; then the largest
    draws = [0.0, 0.0, 34 / 99, 81.5 / 99, 81.5 / 99, 6.5 / 99, 0.4]
    problem = maker.draw(FakeRandom(draws))
    assert problem == Problem(
        kind="compare",
        text="Which number is the largest: 35, 82 or 7?",
        solution="The answer is 82.",
        answer="82",
        bare="7 35 82",
    )
    assert maker.draw(FakeRandom([*draws[:-1], 0.5])).answer == "7"


def test_as_many_different_numbers_as_are_compared() -> None:
    with pytest.raises(ValueError, match=r"data\.largest_term=5 .* data\.terms=\[3, 6\]"):
        data(kinds={"compare": 1}, terms=(3, 6), largest_term=5)


@pytest.mark.parametrize(("kind", "largest"), [("story", 9), ("compare", 40)])
def test_a_held_out_sum_is_trained_on_in_no_words(kind: str, largest: int) -> None:
    options: dict[str, Any] = {"kinds": {kind: 1}, "terms": (3, 3), "largest_term": largest}
    maker = ProblemMaker(data(**options))
    heldout = [problem.bare for problem in islice(maker.heldout(), 200)]
    assert len(set(heldout)) == 200
    trained = {problem.bare for problem in problems(4000, **options)}
    assert not trained & set(heldout)


def test_a_story_needs_a_tokenizer_that_spells_it() -> None:
    with pytest.raises(ValueError, match=r"cannot encode '.* has "):
        open_source(data(kinds={"story": 1}), TOKENIZER).train(0)


class FakeRandom(Random):
    """Draws what it is told, and no more."""

    def __new__(cls, draws: list[float]) -> FakeRandom:
        return super().__new__(cls)

    def __init__(self, draws: list[float]) -> None:
        super().__init__(0)
        self.draws = iter(draws)

    def random(self) -> float:
        return next(self.draws)


def test_short_steps_are_the_results_of_the_full_ones() -> None:
    for kind in SYMBOLIC:
        full, short = problems(50, kinds={kind: 1}), problems(50, kinds={kind: 1}, steps="short")
        for a, b in zip(full, short, strict=True):
            assert a.text == b.text
            assert re.sub(r"[\d+*-]+=", "", a.solution) == b.solution


def test_a_position_is_a_problem_whatever_was_asked_before() -> None:
    source = open_source(data(kinds=MIX), TOKENIZER, seed=5)
    forwards = [source.train(i) for i in range(100)]
    again = open_source(data(kinds=MIX), TOKENIZER, seed=5)
    assert [again.train(i) for i in reversed(range(100))] == forwards[::-1]
    assert len({p.id for p in forwards}) == 100
    other = [open_source(data(kinds=MIX), TOKENIZER, seed=6).train(i) for i in range(100)]
    assert (
        sum(
            a.columns["question"] == b.columns["question"]
            for a, b in zip(forwards, other, strict=True)
        )
        < 3
    )


def test_data_seed_goes_before_the_seed_of_the_run() -> None:
    fixed = [open_source(data(seed=9), TOKENIZER, seed=s).train(4).answer for s in (0, 1, 9)]
    assert fixed == [open_source(data(), TOKENIZER, seed=9).train(4).answer] * 3


def test_no_seed_trains_on_a_held_out_problem() -> None:
    # small problems, so that chance alone would repeat many
    config = data(kinds=MIX, terms=(3, 4), heldout=1024)
    heldout = [p.columns["question"] for p in open_source(config, TOKENIZER, seed=0).heldout]
    assert len(set(heldout)) == 1024
    trained = {p.text for seed in range(3) for p in problems(6000, seed, kinds=MIX, terms=(3, 4))}
    assert not trained & set(heldout)
    assert all(map(is_heldout, heldout)) and not any(map(is_heldout, trained))


def test_held_out_problems_are_the_same_for_every_seed_and_cover_the_mix() -> None:
    sets = [open_source(data(kinds=MIX, heldout=400), TOKENIZER, seed=s).heldout for s in (0, 1, 2)]
    assert sets[0] == sets[1] == sets[2]
    assert all(60 < n < 140 for n in Counter(p.columns["kind"] for p in sets[0]).values())
    smaller = open_source(data(kinds=MIX, heldout=100), TOKENIZER, seed=0).heldout
    assert smaller == sets[0][:100]


def test_the_side_of_a_problem_never_changes() -> None:
    """Frozen: a model trained yesterday must not have been trained on what is held out tomorrow."""
    held_out = ["1+1=?", "1+3=?", "3+5=?", "4+3=?", "9+7=?"]
    trained = [
        "7+5-3=?",
        "x+7-3=25,x=?",
        "3*7-4+2*5=?",
        "(3+4)*2-(9-5)=?",
        "9-5=?",
        "8*8=?",
        "6+6+6=?",
    ]
    assert [text for text in held_out + trained if is_heldout(text)] == held_out
    share = sum(is_heldout(f"{a}+{b}=?") for a in range(100) for b in range(100)) / 10_000
    assert share == pytest.approx(1 / 8, abs=0.01)


def test_kinds_are_drawn_by_weight() -> None:
    counts = Counter(p.kind for p in problems(8000, kinds={"chain": 3, "solve": 1, "products": 0}))
    assert set(counts) == {"chain", "solve"}
    assert counts["chain"] / 8000 == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_problems_hardly_ever_repeat(kind: str) -> None:
    texts = [p.text for p in problems(10_000, kinds={kind: 1}, terms=(5, 7), largest_term=20)]
    assert len(set(texts)) > 9_900


def test_a_prompt_is_the_problem_and_carries_its_solution() -> None:
    source = open_source(data(), TOKENIZER)
    prompt = source.train(0)
    problem = problems(1)[0]
    assert TOKENIZER.decode(prompt.token_ids) == problem.text == prompt.messages[0]["content"]
    assert (prompt.answer, source.solution(prompt), prompt.source) == (
        problem.answer,
        problem.solution,
        "arithmetic",
    )


def test_too_few_held_out_problems_is_an_error_that_says_how_many_there_are() -> None:
    with pytest.raises(
        ValueError,
        match=r"data\.heldout=512.* only \d+ held-out problems; raise data\.terms=\[2, 2\]",
    ):
        open_source(data(terms=(2, 2), heldout=512), TOKENIZER)


def test_too_long_problems_are_an_error_or_drawn_again() -> None:
    with pytest.raises(
        ValueError, match=r"data\.max_prompt_length=13; raise it, or set data\.overlong=drop"
    ):
        open_source(data(kinds=MIX, max_prompt_length=13, heldout=50), TOKENIZER)
    source = open_source(
        data(kinds=MIX, max_prompt_length=13, heldout=50, overlong="drop"), TOKENIZER
    )
    lengths = [len(p.token_ids) for p in [*source.heldout, *(source.train(i) for i in range(200))]]
    assert max(lengths) == 13
    with pytest.raises(
        ValueError, match=r"none of 400 problems fits data\.max_prompt_length=3; raise it$"
    ):
        ArithmeticSource(data(max_prompt_length=3, overlong="drop"), TOKENIZER, 0).train(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": {"chian": 1}}, r"data\.kinds has no kind 'chian'.*did you mean chain"),
        ({"kinds": {"chain": -1}}, r"data\.kinds\.chain=-1.* must be 0 or more"),
        ({"kinds": {"chain": 0}}, r"data\.kinds needs one kind"),
        ({"terms": (5, 4)}, r"data\.terms must be \[fewest, most\]"),
        (
            {"largest_term": 60, "largest_total": 99},
            r"data\.largest_total=99 must be at least twice data\.largest_term=60",
        ),
    ],
)
def test_bad_settings_name_their_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(**options)


def test_held_out_problems_end_rather_than_search_for_ever() -> None:
    maker = ProblemMaker(data(terms=(2, 2)))
    found = [p.text for p in islice(maker.heldout(), 10_000)]
    every = {f"{a}+{b}=?" for a in range(1, 10) for b in range(1, 10)}
    every |= {f"{a}-{b}=?" for a in range(1, 10) for b in range(1, a + 1)}
    assert sorted(found) == sorted(filter(is_heldout, every))
