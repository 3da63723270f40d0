"""The order of problems: shares, drops, revisits, levels and stages by hand, and that nothing but
settings, seed and history decides it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from emberl.rewards.verdict import Status, Verdict
from emberl.rl.config.curriculum import CurriculumConfig
from emberl.rl.config.data import DataConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.curriculum import Choice, Curriculum, Source, bin_of
from emberl.rl.data.sources import open_source
from emberl.rl.data.tiny import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st


def make(
    *sizes: int | None, weights: Sequence[float] | None = None, seed: int = 0, **keys: Any
) -> Curriculum:
    """Sources a, b, ... of one level each."""
    shares = weights or [1 / len(sizes)] * len(sizes)
    sources = [
        Source(name=chr(97 + i), weight=share, sizes=[size])
        for i, (size, share) in enumerate(zip(sizes, shares, strict=True))
    ]
    return Curriculum(CurriculumConfig(**keys), sources, seed)


def step(
    curriculum: Curriculum, number: int, prompts: int, solved: Callable[[Choice], int]
) -> list[Choice]:
    """One RL step of groups of 8 from the position where the curriculum stands."""
    start = curriculum.next
    drawn = [curriculum.at(start + i) for i in range(prompts)]
    choices = [choice for choice in drawn if choice is not None]
    curriculum.observe([(c, solved(c), 8) for c in choices], number)
    curriculum.forget(start + prompts, [])
    return choices


def test_counts_follow_the_weights_at_every_moment() -> None:
    curriculum = make(10, None, 7, weights=[0.5, 0.3, 0.2])
    first = [curriculum.at(i) for i in range(10)]
    # what each lacks: .5 .3 .2 -> a; 0 .6 .4 -> b; .5 -.1 .6 -> c; 1 .2 -.2 -> a; .5 .5 0 -> a; ...
    assert [c.source for c in first if c] == [0, 1, 2, 0, 0, 1, 0, 2, 1, 0]


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    draws=st.integers(1, 300),
    seed=st.integers(0, 3),
)
def test_no_share_is_ever_off_by_as_much_as_the_number_of_sources(
    weights: list[int], draws: int, seed: int
) -> None:
    shares = np.array(weights) / sum(weights)
    curriculum = make(*[5] * len(weights), weights=shares.tolist(), seed=seed)
    counts = np.zeros(len(weights))
    for i in range(draws):
        choice = curriculum.at(i)
        assert choice is not None
        counts[choice.source] += 1
        assert np.abs(counts - shares * (i + 1)).max() < max(1, len(weights) - 1)


def test_an_epoch_has_every_problem_once_and_an_order_of_its_own() -> None:
    curriculum = make(9)
    order = [choice.index for choice in (curriculum.at(i) for i in range(27)) if choice]
    epochs = [order[:9], order[9:18], order[18:]]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [c.times for c in (curriculum.at(i) for i in (0, 26)) if c] == [0, 2]


def test_what_is_always_or_never_solved_is_dropped_and_comes_back() -> None:
    """Problems 0 and 1 of six are always solved, 2 never; they come back five steps later."""
    curriculum = make(6, drop=True, revisit=5)

    def solved(c: Choice) -> int:
        return {0: 8, 1: 8, 2: 0}.get(c.index, 4)

    assert {c.index for c in step(curriculum, 1, 6, solved)} == set(range(6))
    found = curriculum.metrics([])
    assert found["sched/dropped/always_solved"] == 2 and found["sched/dropped/never_solved"] == 1
    for number in range(2, 7):
        seen = step(curriculum, number, 3, solved)
        assert {c.index for c in seen} == {3, 4, 5} and {c.why for c in seen} == {"order"}
    back = step(curriculum, 7, 6, solved)  # step 1 is five steps behind
    assert {c.index for c in back} == set(range(6))
    assert Counter(c.why for c in back)["revisit"] == 3
    assert curriculum.metrics(back)["sched/picked/revisit"] == 3
    assert {bin_of(c.rate) for c in back if c.index < 3} == {"always", "never"}


def test_where_everything_is_dropped_training_goes_on() -> None:
    curriculum = make(3, drop=True, revisit=0)
    step(curriculum, 1, 3, lambda c: 8)
    again = step(curriculum, 2, 3, lambda c: 8)
    assert {c.index for c in again} == {0, 1, 2} and {c.why for c in again} == {"exhausted"}


def test_a_stated_share_is_of_hard_ones() -> None:
    """Of 20 problems 0 to 3 are solved once in eight times, and no problem is drawn twice at a
    time."""
    curriculum = make(20, hard_share=0.25, hard_below=0.2)

    def solved(c: Choice) -> int:
        return 1 if c.index < 4 else 5

    step(curriculum, 1, 20, solved)
    later = [c for n in range(2, 32) for c in step(curriculum, n, 10, solved)]
    hard = [c for c in later if c.why == "hard"]
    assert {c.index for c in hard} == {0, 1, 2, 3}
    share = len(hard) / len(later)
    assert share == pytest.approx(0.25, abs=0.03)


def test_a_share_that_nobody_could_have_had_is_not_made_up_for() -> None:
    """Forty steps in which no problem is known to be hard, then eight that are; and no more of
    these at a time than there are."""
    curriculum = make(400, hard_share=0.5, hard_below=0.4)
    for n in range(1, 41):
        assert all(c.why != "hard" for c in step(curriculum, n, 10, lambda c: 4))
    step(curriculum, 41, 8, lambda c: 1)
    for n in range(42, 52):
        drawn = [c.why for c in step(curriculum, n, 10, lambda c: 1 if c.why == "hard" else 4)]
        assert drawn.count("hard") == 5
    for n in range(52, 55):
        hard = [c.index for c in step(curriculum, n, 40, lambda c: 4) if c.why == "hard"]
        assert len(hard) == len(set(hard)) <= 8


def test_a_rate_is_the_last_group_and_what_was_before_by_halves() -> None:
    curriculum = make(1)
    for number, (solved, rate) in enumerate([(8, 1.0), (4, 0.75), (0, 0.375)], 1):
        step(curriculum, number, 1, lambda c, s=solved: s)  # type: ignore[misc]
        assert curriculum.pools[0][0].rates[0] == rate


@pytest.mark.parametrize("pick", ["rate", "thompson"])
def test_even_problems_are_drawn_more_often_than_sure_ones(pick: str) -> None:
    curriculum = make(20, pick=pick)

    def solved(c: Choice) -> int:
        return 4 if c.index < 10 else 8

    seen = [c for n in range(1, 61) for c in step(curriculum, n, 5, solved)][100:]
    even = sum(c.index < 10 for c in seen) / len(seen)
    assert even > 0.8, even
    assert even < 1, "sure ones are looked at again now and then"


def test_rate_draws_with_the_weights_it_says() -> None:
    """Pass rates 1/2 and 1/8 weigh 1/4 and 7/64: shares 16 : 7."""
    curriculum = make(2, pick="rate", seed=5)
    curriculum.pools[0][0].rates[:] = [0.5, 0.125]
    counts: Counter[int] = Counter()
    for i in range(4000):
        choice = curriculum.at(i)
        assert choice is not None
        counts[choice.index] += 1
        curriculum.forget(i + 1, [])
    assert counts[0] / 4000 == pytest.approx(16 / 23, abs=0.025)


def test_stages_go_by_what_is_known_beforehand_until_it_is_measured() -> None:
    stages = [{"steps": 2, "rates": [0.5, 1.0]}, {"steps": 1, "rates": [0.0, 0.5]}]
    keys = CurriculumConfig.model_validate({"rate_column": "rate", "stages": stages})
    rates = np.array([0.9, 0.6, 0.1, 0.2, 0.3])
    source = Source(name="a", weight=1, sizes=[5], rates=rates)
    curriculum = Curriculum(keys, [source], 0)
    for number in (1, 2):
        assert {c.index for c in step(curriculum, number, 2, lambda c: 6)} == {0, 1}
    hard = step(curriculum, 3, 3, lambda c: 6)
    assert {c.index for c in hard} == {2, 3, 4} and {bin_of(c.rate) for c in hard} == {
        "hard",
        "medium",
    }
    assert curriculum.stage == (0.0, 0.5), "the last stage goes on"


def test_a_level_is_raised_at_the_stated_success() -> None:
    keys = CurriculumConfig(raise_at=0.75, raise_after=32)
    curriculum = Curriculum(keys, [Source(name="a", weight=1, sizes=[None] * 3)], 0)
    rights = iter([5, 6, 6, 6, 6, 8])  # of 8 answers, four prompts a step: 0.625, 0.75, ...
    levels = []
    for number in range(1, 6):
        right = next(rights)
        drawn = step(curriculum, number, 4, lambda c, r=right: r)  # type: ignore[misc]
        levels.append({c.level for c in drawn}.pop())
    assert levels == [0, 0, 1, 2, 2]
    assert curriculum.metrics([])["sched/level/a"] == 2


HISTORY = st.lists(st.integers(0, 8), min_size=8, max_size=8)


@settings(max_examples=40, deadline=None)
@given(
    keys=st.fixed_dictionaries(
        {
            "pick": st.sampled_from(["order", "rate", "thompson"]),
            "drop": st.booleans(),
            "revisit": st.integers(0, 3),
            "hard_share": st.sampled_from([0.0, 0.3]),
        }
    ),
    rights=HISTORY,
    cut=st.integers(1, 7),
    late=st.integers(0, 3),
)
def test_a_state_that_went_through_a_file_goes_on_as_if_it_had_not(
    keys: dict[str, Any], rights: list[int], cut: int, late: int
) -> None:
    """Also with draws that were under way: they are the same when they are asked for again."""

    def solved(c: Choice) -> int:
        return (rights[c.index % 8] + c.times) % 9

    whole, part = make(8, None, 3, **keys), make(8, None, 3, **keys)
    for curriculum in (whole, part):
        for number in range(1, cut + 1):
            step(curriculum, number, 6, solved)
        for i in range(late):
            curriculum.at(curriculum.next + i)
    open_ = dict(part.plan)
    again = make(8, None, 3, **keys)
    again.at(4)  # as a trial of the reward does before the state is there
    again.restore(json.loads(json.dumps(part.state())))
    assert {p: again.at(p) for p in open_} == open_
    for number in range(cut + 1, 10):
        assert step(whole, number, 6, solved) == step(again, number, 6, solved)
    assert whole.state() == again.state()


def test_a_state_of_other_data_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"of sources with \[\[3\]\] problems, the data have \[\[4\]"
    ):
        make(4).restore(make(3).state())


TOKENIZER = tiny_tokenizer(TinyConfig())
MIXED = {
    "heldout": 4,
    "mixture": {
        "sums": {"source": "arithmetic", "terms": [2, 2], "weight": 0.75},
        "longer": {"source": "arithmetic", "weight": 0.25, "levels": [{"terms": [3, 3]}, {}]},
    },
    "terms": (5, 5),
    "curriculum": {"raise_after": 4, "raise_at": 0.7},
}


def graded(prompt: Any, right: bool) -> tuple[Any, list[Verdict]]:
    status = Status.CORRECT if right else Status.WRONG
    return prompt, [Verdict(status=status, score=float(right))] * 4


def test_a_mixture_is_a_source() -> None:
    source: Any = open_source(DataConfig.model_validate(MIXED), TOKENIZER, 3)
    prompts = [source.train(i) for i in range(8)]
    assert Counter(p.source for p in prompts) == {"sums": 6, "longer": 2}
    assert len({p.id for p in prompts}) == 8 and source.size is None
    assert prompts == [source.train(i) for i in range(8)], "a position keeps its problem"
    assert Counter(p.source for p in source.heldout) == {"sums": 4, "longer": 4}
    found = source.observe([graded(p, True) for p in prompts], 1, 8, [])
    assert (found["sched/source/sums"], found["sched/source/longer"]) == (6, 2)
    assert found["sched/level/longer"] == 1 and found["sched/picked/new"] == 8
    hard = [p for p in (source.train(i) for i in range(8, 12)) if p.source == "longer"]
    assert [p.id.endswith("/level1") for p in hard] == [True]


def test_a_resumed_mixture_gives_the_same_prompts() -> None:
    """Cut after three steps, with two groups still under way."""
    whole: Any = open_source(DataConfig.model_validate(MIXED), TOKENIZER, 3)
    states = []
    for number in range(1, 6):
        first = 8 * (number - 1)
        prompts = [whole.train(i) for i in range(first, first + 8)]
        back = [graded(p, i % 2 == 0) for i, p in enumerate(prompts[:6])]
        pending = [(first + 6, number), (first + 7, number)]
        whole.observe(back, number, first + 8, pending)
        states.append((whole.state(), prompts))
    again: Any = open_source(DataConfig.model_validate(MIXED), TOKENIZER, 3)
    again.restore(json.loads(json.dumps(states[2][0])))
    assert [again.train(i) for i in (22, 23)] == states[2][1][6:]
    assert [again.train(i) for i in range(24, 32)] == states[3][1]
