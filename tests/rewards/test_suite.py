"""The suite: weights, gates, failed parts, deadlines, figures, and what a configuration may say."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import pytest
from emberl.rewards.inputs import Reward, RewardInput
from emberl.rewards.suite import Part, RewardSuite, TooManyErrors, build_suite, check_errors
from emberl.rewards.verdict import Status, Verdict, not_applicable, verifier_error


class Calls(Reward):
    """A function of a batch as a reward."""

    def __init__(self, function: Callable[[Sequence[RewardInput]], list[Verdict]]) -> None:
        self.function = function

    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        return self.function(batch)


NA = "not applicable"


def fixed(*scores: float | str | None) -> Reward:
    """A reward that gives these scores in turn; None is a failure, and NA does not apply."""

    def grade(batch: Sequence[RewardInput]) -> list[Verdict]:
        found = []
        for score in scores[: len(batch)]:
            if score is None:
                found.append(verifier_error("broke"))
            elif isinstance(score, str):
                found.append(not_applicable("not mine"))
            else:
                status = (
                    Status.CORRECT if score >= 1 else Status.WRONG if score <= 0 else Status.PARTIAL
                )
                found.append(Verdict(status=status, score=score, seconds=0.5))
        return found

    return Calls(grade)


ROWS = [RewardInput(completion=str(i)) for i in range(3)]


def suite(**parts: tuple) -> RewardSuite:
    return RewardSuite(
        [
            Part(name=n, reward=p[0], weight=p[1], gate=p[2] if len(p) > 2 else None)
            for n, p in parts.items()
        ]
    )


def test_scores_are_weighted_sums_and_the_first_part_gives_the_status() -> None:
    verdicts = suite(answer=(fixed(1, 0, 1), 1.0), format=(fixed(0.5, 1, 0), 0.2)).grade(ROWS)
    assert [v.score for v in verdicts] == pytest.approx([1.1, 0.2, 1.0])
    assert [v.status for v in verdicts] == [Status.CORRECT, Status.WRONG, Status.CORRECT]
    assert verdicts[0].parts == {"answer": 1, "format": 0.5}


def test_a_gate_shuts_a_part_out_where_the_other_scores_nothing() -> None:
    verdicts = suite(answer=(fixed(1, 0, 1), 1.0), brevity=(fixed(1, 1, 0.5), 0.3, "answer")).grade(
        ROWS
    )
    assert [v.score for v in verdicts] == pytest.approx([1.3, 0.0, 1.15])


def test_a_failed_part_leaves_no_score_unless_it_does_not_count() -> None:
    weighed = suite(answer=(fixed(1, 0), 1.0), extra=(fixed(None, 1), 0.5)).grade(ROWS[:2])
    assert [v.score for v in weighed] == [None, 0.5]
    assert "extra: broke" in weighed[0].message
    unweighed = suite(answer=(fixed(1), 1.0), extra=(fixed(None), 0.0)).grade(ROWS[:1])
    assert unweighed[0].score == 1.0
    shut_out = suite(answer=(fixed(0), 1.0), extra=(fixed(None), 0.5, "answer")).grade(ROWS[:1])
    assert shut_out[0].score == 0.0
    broken_gate = suite(
        answer=(fixed(1), 1.0), gate=(fixed(None), 0.0), extra=(fixed(1), 1.0, "gate")
    ).grade(ROWS[:1])
    assert broken_gate[0].score is None


def test_a_part_that_raises_or_miscounts_costs_only_its_samples() -> None:
    def raises(batch: Sequence[RewardInput]) -> list[Verdict]:
        raise RuntimeError("no more")

    verdicts = suite(answer=(Calls(raises), 1.0)).grade(ROWS)
    assert [v.status for v in verdicts] == [Status.VERIFIER_ERROR] * 3
    assert "RuntimeError: no more" in verdicts[0].message
    assert "1 verdicts for 3" in suite(answer=(fixed(1), 1.0)).grade(ROWS)[0].message


def test_a_stuck_part_is_left_behind_at_its_deadline() -> None:
    release = threading.Event()

    def stuck(batch: Sequence[RewardInput]) -> list[Verdict]:
        release.wait(30)
        return list(fixed(1, 1, 1)(batch))

    held = RewardSuite([Part(name="answer", reward=Calls(stuck), deadline=0.2)])
    start = time.perf_counter()
    verdicts = held.grade(ROWS)
    release.set()
    assert time.perf_counter() - start < 5
    assert all("deadline of 0.2 s" in v.message for v in verdicts)


def test_calls_do_not_pile_up_behind_a_stuck_part() -> None:
    release, calls = threading.Event(), []

    def stuck(batch: Sequence[RewardInput]) -> list[Verdict]:
        calls.append(1)
        release.wait(30)
        return list(fixed(1)(batch))

    held = RewardSuite([Part(name="answer", reward=Calls(stuck), deadline=0.05)])
    messages = [held.grade(ROWS[:1])[0].message for _ in range(6)]
    assert len(calls) == 4
    assert "4 earlier calls are stuck" in messages[-1]
    release.set()
    end = time.monotonic() + 5
    while held.grade(ROWS[:1])[0].score is None and time.monotonic() < end:
        time.sleep(0.02)
    assert held.grade(ROWS[:1])[0].score == 1  # it works again once the stuck calls are over


def test_parts_run_side_by_side() -> None:
    meeting = threading.Barrier(2, timeout=10)  # breaks unless both parts are under way at once

    def meets(batch: Sequence[RewardInput]) -> list[Verdict]:
        meeting.wait()
        return list(fixed(1, 1, 1)(batch))

    assert [v.score for v in suite(a=(Calls(meets), 1.0), b=(Calls(meets), 1.0)).grade(ROWS)] == [
        2.0
    ] * 3


def test_figures_are_per_part_and_start_anew() -> None:
    graded = suite(answer=(fixed(1, 0, None), 1.0))
    graded.grade(ROWS)
    figures = graded.metrics()
    assert figures["reward/answer/mean"] == 0.5
    assert figures["reward/answer/std"] == 0.5
    assert figures["reward/answer/status/correct"] == 1
    assert figures["reward/answer/status/verifier_error"] == 1
    assert figures["reward/answer/seconds_max"] == 0.5
    assert "reward/answer/mean" not in graded.metrics()


def test_the_share_of_errors_aborts_with_the_cause() -> None:
    good = [Verdict(status=Status.WRONG, score=0.0)] * 198
    check_errors([*good, verifier_error("a"), verifier_error("a")])  # exactly 1 %
    with pytest.raises(TooManyErrors, match=r"3 of 201 .* 2 x oom; 1 x lost"):
        check_errors([*good, verifier_error("oom"), verifier_error("oom"), verifier_error("lost")])
    check_errors([*good[:10], verifier_error("one in a small batch")])
    with pytest.raises(TooManyErrors):
        check_errors([*good, verifier_error("a")], limit=0.0)


def test_references_that_cannot_be_used_are_named_with_their_row() -> None:
    graded = build_suite({"answer": {"use": "math"}})
    bad = graded.check_references(["7", " ", "\\frac{1}{2}", "(1, 2]"])
    assert [(b.row, b.part) for b in bad] == [(1, "answer")]
    assert "row 1" in str(bad[0])
    graded.close()


def test_a_batch_that_raises_is_graded_row_by_row() -> None:
    class Fragile(Reward):
        def __call__(self, batch: Sequence[RewardInput]) -> list[Verdict]:
            if any(row.completion == "bad" for row in batch):
                raise RecursionError("too deep")
            return [Verdict(status=Status.CORRECT, score=1.0) for _ in batch]

    rows = [RewardInput(completion=text, answer="7") for text in ("7", "bad", "7")]
    graded = RewardSuite([Part(name="answer", reward=Fragile())])
    assert [v.status for v in graded.grade(rows)] == [
        Status.CORRECT,
        Status.VERIFIER_ERROR,
        Status.CORRECT,
    ]


def test_a_suite_from_a_configuration() -> None:
    built = build_suite(
        {
            "answer": {
                "use": "math",
                "timeout": 2.0,
                "concurrency": 1,
                "options": {"units": "ignore"},
            },
            "format": {
                "use": "format",
                "weight": 0.25,
                "gate": "answer",
                "options": {"pattern": "think"},
            },
        }
    )
    rows = [
        RewardInput(completion="<think>7+5=12,12-3=9</think>9", answer="9"),
        RewardInput(completion="9", answer="9"),
        RewardInput(completion="<think>hm</think>8", answer="9"),
    ]
    assert [v.score for v in built.grade(rows)] == [1.25, 1.0, 0.0]
    built.close()


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({}, "at least one part"),
        ({"a": {}}, "reward.a.use is missing"),
        ({"a": {"use": "maths"}}, "did you mean 'math'"),
        ({"a": {"use": "math", "wieght": 1}}, "unknown keys .*wieght"),
        ({"a": {"use": "math", "weight": float("nan")}}, "must be finite"),
        ({"a": {"use": "math", "gate": "b"}}, "must name another part"),
        ({"a": {"use": "math", "gate": "b"}, "b": {"use": "nope"}}, "there is no 'nope'"),
        ({"a": {"use": "math", "deadline": 0}}, "positive seconds"),
        ({"a": {"use": "math", "timeout": 0}}, "positive seconds"),
        ({"a": {"use": "math", "options": {"percnt": 1}}}, "no option 'percnt'"),
        ({"a": {"use": "math", "options": {"percent": "maybe"}}}, "percent is 'maybe'"),
        ({"a": {"use": "math", "style": "verl"}}, "takes no style"),
        ({"a": {"use": "overlong"}}, "needs the option buffer"),
        ({"a": {"use": "judge"}}, "needs the option base_url, model"),
        (
            {"a": {"use": "code", "options": {"partail": True}}},
            "'code' has no option partail; it takes timeout, memory_mb, output_bytes, concurrency",
        ),
        ({"a": {"use": "code", "options": {"language": "rust"}}}, "language is 'rust'"),
        ({"a": {"use": "format", "options": {"pattern": "("}}}, "nor a regular expression"),
    ],
)
def test_bad_configurations_are_named(specs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_suite(specs)


def test_a_long_queue_is_no_stuck_grader() -> None:
    """Slow programs of the model's own making take long; only a grader that stands still loses its
    samples."""

    class Slow(Reward):
        def __call__(self, batch):
            for _ in range(10):
                time.sleep(0.1)
                self.count += self.moves
            return [Verdict(status=Status.OVER_LIMIT, score=0.0) for _ in batch]

        def __init__(self, moves: int) -> None:
            self.moves, self.count = moves, 0

        @property
        def finished(self) -> int:
            return self.count

    for moves, status in ((1, Status.OVER_LIMIT), (0, Status.VERIFIER_ERROR)):
        suite = RewardSuite([Part(name="slow", reward=Slow(moves), deadline=0.4)])
        assert suite.grade([RewardInput(completion="")])[0].status is status


def test_a_row_that_raises_costs_no_neighbour() -> None:
    def grade(batch):
        if any(row.completion == "bomb" for row in batch):
            raise RecursionError("too deep")
        for text, error in others.items():
            if any(row.completion == text for row in batch):
                raise error
        return [Verdict(status=Status.CORRECT, score=1.0) for _ in batch]

    # the time limits of libraries are of this kind, so that `except Exception` lets them pass
    others = {
        "exit": SystemExit(3),
        "limit": asyncio.CancelledError(),
        "interrupt": KeyboardInterrupt(),
    }
    suite = RewardSuite([Part(name="p", reward=Calls(grade))])
    texts = ("a", "bomb", "b", *others)
    found = suite.grade([RewardInput(completion=text) for text in texts])
    assert [verdict.score for verdict in found] == [1.0, None, 1.0, None, None, None]
    for verdict, name in zip(
        (found[1], *found[3:]),
        ("RecursionError", "SystemExit", "CancelledError", "KeyboardInterrupt"),
        strict=True,
    ):
        assert f"raised {name}" in verdict.message


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((1e308, 1e308), None),
        ((1e300, 0.0), None),
        ((-1.1e9, 0.0), None),
        ((1e9, 0.0), 1e9),
        ((1e308, -1e308), 0.0),
    ],
)
def test_a_sum_beyond_reason_is_no_score(
    scores: tuple[float, float], expected: float | None
) -> None:
    """Its square would overflow in the deviation of its group."""
    [verdict] = suite(a=(fixed(scores[0]), 1.0), b=(fixed(scores[1]), 1.0)).grade(ROWS[:1])
    assert verdict.score == expected
    assert expected is not None or "is not within +-1e+09; set other weights" in verdict.message


@pytest.mark.parametrize(
    ("parts", "scores"),
    [
        # (each part's scores, weight, gate); TRL passes over None in the sum and does not rescale
        # the weights
        ({"math": (fixed(1, NA), 1.0), "code": (fixed(NA, 0.5), 2.0)}, [1.0, 1.0]),
        ({"math": (fixed(NA, 1), 1.0), "form": (fixed(0.5, 0.5), 0.2)}, [0.1, 1.1]),
        ({"math": (fixed(NA, NA), 1.0), "code": (fixed(1, NA), 1.0)}, [1.0, None]),
        ({"math": (fixed(NA, 1), 1.0), "seen": (fixed(1, 1), 0.0)}, [None, 1.0]),
        (
            {
                "math": (fixed(NA, 1), 1.0),
                "short": (fixed(1, 1), 0.5, "math"),
                "any": (fixed(1, 1), 1.0),
            },
            [1.0, 2.5],
        ),
        ({"math": (fixed(NA, 1), 1.0), "short": (fixed(1, 1), 0.5, "math")}, [None, 1.5]),
        ({"math": (fixed(NA, NA), 1.0), "code": (fixed(None, 1), 1.0)}, [None, 1.0]),
    ],
)
def test_a_part_that_does_not_apply_leaves_the_sample_to_the_others(
    parts: dict, scores: list
) -> None:
    verdicts = suite(**parts).grade(ROWS[:2])
    assert [v.score for v in verdicts] == [None if s is None else pytest.approx(s) for s in scores]
    assert all(v.status is Status.VERIFIER_ERROR for v in verdicts if v.score is None)


def test_where_nothing_applies_the_sample_is_named() -> None:
    nothing = suite(math=(fixed(NA), 1.0))
    (verdict,) = nothing.grade([RewardInput(completion="x", source="apps")])
    assert (
        "no part of the reward applies to this sample of source 'apps'; not mine" in verdict.message
    )
    with pytest.raises(
        ValueError,
        match=r"no part of the reward applies to the first problem: reward\.math: not mine",
    ):
        nothing.trial(ROWS[0])
    first = suite(math=(fixed(NA), 1.0), code=(fixed(0.5), 1.0)).grade(ROWS[:1])[0]
    assert first.status is Status.PARTIAL, "the first part that applies gives the status"


BY_SOURCE = {
    "openai/gsm8k": "math",
    "dapo*": {"use": "math"},
    "*": {"use": "format", "options": {"pattern": "boxed"}},
}


def of(source: str, completion: str = "\\boxed{7}", answer: str = "7") -> RewardInput:
    return RewardInput(completion=completion, answer=answer, source=source)


def test_each_source_has_its_reward() -> None:
    graded = build_suite({"answer": {"by_source": BY_SOURCE}})
    rows = [of("openai/gsm8k"), of("dapo_17k", answer="8"), of("else", answer="8"), of("else", "7")]
    assert [v.score for v in graded.grade(rows)] == [1.0, 0.0, 1.0, 0.0]
    metrics = graded.metrics()
    assert metrics["reward/answer/extra/openai/gsm8k"] == 1.0
    assert metrics["reward/answer/extra/*"] == 0.5
    assert graded.check_references(rows) == []
    graded.close()


def test_a_source_without_a_reward_is_named_before_training() -> None:
    graded = build_suite({"answer": {"by_source": {"math*": "math"}}})
    with pytest.raises(
        ValueError,
        match=r"reward.answer: by_source has no pattern for the data source 'taco' \(2 rows\)",
    ):
        graded.check_references([of("math500"), of("taco"), of("taco")])
    with pytest.raises(ValueError, match="'taco'"):
        graded.trial(of("taco"))
    assert graded.grade([of("taco")])[0].status is Status.VERIFIER_ERROR
    with pytest.raises(
        ValueError,
        match=r"reward.answer.by_source\['\*'\]: there is no 'maths'; did you mean 'math'",
    ):
        build_suite({"answer": {"by_source": {"*": "maths"}}})
