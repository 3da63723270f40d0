"""Reward functions as people bring them, each with the scores that it gives at home or the words of
its fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from emberl.rewards.inputs import RewardInput
from emberl.rewards.plugins.results import batch_results, result
from emberl.rewards.suite import build_suite
from emberl.rewards.verdict import Status, Verdict

FILE = Path(__file__).with_name("user_functions.py")
CHAT = ({"role": "user", "content": "6*3?"},)
TEMPLATE = "<|im_start|>user\n6*3?<|im_end|>\n<|im_start|>assistant\n"


def r(completion: str, answer: str = "18", **fields: Any) -> RewardInput:
    return RewardInput(completion=completion, answer=answer, prompt=TEMPLATE, **fields)


def chat(completion: str, answer: str = "18", **fields: Any) -> RewardInput:
    """Of a row of messages."""
    return r(completion, answer, messages=CHAT, **fields)


def plain(completion: str, answer: str = "18", **fields: Any) -> RewardInput:
    """Of a row whose prompt is a text."""
    return r(completion, answer, messages=CHAT, plain_prompt="6*3?", **fields)


TRUTH = {"reward_model": {"ground_truth": {"target": 24, "numbers": [6, 4]}, "style": "rule"}}
CASES: list[tuple[str, dict[str, Any], list[RewardInput], Any]] = [
    ("verl_plain", {}, [r("18"), r("17")], [1, 0]),
    ("verl_kw", {"kwargs": {"scale": 3, "bias": 0.5}}, [r("18"), r("17")], [3.5, 0.5]),
    ("verl_kw", {}, [r("18")], "scale"),
    ("verl_kw", {"kwargs": {"scale": 3, "nope": 1}}, [r("18")], "kwargs has nope"),
    ("verl_dict", {}, [r("18"), r("17")], [1, -1]),
    ("verl_shaped", {}, [r("18")], [1.4]),
    (
        "tinyzero",
        {"style": "verl_full"},
        [
            r("<answer>6*4</answer>", '{"target":24}', columns=TRUTH),
            r("<answer>6+4</answer>", columns=TRUTH),
            r("x", columns=TRUTH),
        ],
        [1, 0.1, 0],
    ),
    (
        "logic_rl",
        {"style": "verl_full"},
        [r("(1) A", columns={"reward_model": {"ground_truth": {"solution_text_format": "(1) A"}}})],
        [2],
    ),
    (
        "search_r1",
        {},
        [
            r(
                "it is Paris",
                columns={"reward_model": {"ground_truth": {"target": ["Paris", "paris, france"]}}},
            )
        ],
        [1],
    ),
    ("verl_batch", {"kwargs": {"threshold": 2}}, [r("18"), r("17")], [1, 0]),
    ("verl_dict_of_lists", {}, [r("18"), r("17")], [1, 0]),
    ("dispatch", {}, [r("18", source="math_x"), r("1", source="apps")], [1, "NotImplementedError"]),
    ("verl_async", {}, [r("18"), r("17")], [1, 0]),
    ("verl_column", {}, [r("18", columns={"difficulty": 4})], [4]),
    ("trl_acc", {}, [chat("is 18"), chat("17")], [1, 0]),
    ("trl_str", {}, [plain("is 18"), plain("17")], [1, 0]),
    ("trl_len", {}, [plain("x" * 20), plain("x" * 10)], [0, -10]),
    (
        "trl_none",
        {},
        [plain("x", columns={"task": "math"}), plain("x", columns={"task": "code"})],
        [1, "no part of the reward applies"],
    ),
    ("trl_logs", {}, [plain("abcd")], [0.5]),
    ("trl_state", {}, [plain("x", step=5, max_steps=10)], [0.5]),
    ("trl_tensor", {}, [plain("abc")], [3]),
    ("trl_column_tensor", {}, [plain("abc")], [1]),
    ("trl_generator", {}, [plain("abc")], [3]),
    ("trl_numpy", {}, [plain("abc"), plain("d")], [1, 0]),
    ("trl_ids", {}, [plain("abc", token_ids=(1, 2))], [3]),
    ("trl_required", {}, [plain("abc", columns={"difficulty": 4})], [4]),
    ("trl_required", {}, [plain("abc")], "difficulty"),
    ("trl_scalar", {}, [plain("abc")], "instead of a list of 2"),
    ("trl_kwargs_gt", {}, [plain("18"), plain("1")], [1, 0]),
    ("think_format", {}, [chat("<think>a</think>\n<answer>b</answer>")], [1]),
    ("tag_count", {}, [chat("<think>\na\n</think>\n\n<answer>\nb\n</answer>")], [1]),
    ("len_reward", {}, [chat("a"), chat("abc")], [0.5, -0.5]),
    ("get_cosine", {"kwargs": {"max_len": 10}}, [chat("18" + "x" * 8)], [0.5]),
    ("get_cosine", {}, [chat("18")], [0.9999]),
    (
        "code_reward",
        {"kwargs": {"num_parallel": 4}},
        [chat("x", columns={"verification_info": {"test_cases": [1]}})],
        [4],
    ),
    ("mv_swallow", {}, [plain("\\boxed{18}", "$18$")], [1]),
    ("mv_raise", {}, [r("\\boxed{18}"), r("\\boxed{17}")], [1, 0]),
    ("orlhf", {}, [r("18"), r("17")], [1.5, -0.5]),
    ("orlhf_list", {}, [r("18")], [1]),
    ("vf_acc", {}, [chat("18")], [1]),
    ("vf_state", {}, [chat("18", columns={"info": {"points": 4}})], [0.4]),
    ("vf_parser", {}, [chat("18")], [1]),
    ("vf_group", {}, [chat("18"), chat("1")], [0, 1]),
    ("slime", {}, [r("18")], [1]),
    ("Cls", {}, [plain("x")], [1]),
    ("Cls", {"kwargs": {"weight": 4}}, [plain("x")], [4]),
    ("NeedsArg", {}, [r("x")], "cannot be called with kwargs"),
    ("NeedsArg", {"kwargs": {"weight": 4}}, [r("x")], [4]),
    ("AsyncCls", {}, [r("x")], [0.75]),
    ("instance", {}, [plain("x")], [2]),
    ("Holder.score", {}, [r("x")], [3]),
    ("lam", {}, [plain("x")], [0.1]),
    ("part", {}, [r("18")], [5]),
    ("wrapped", {}, [r("18")], [1]),
    ("unwrapped", {}, [r("18")], "no known style"),
    ("unwrapped", {"style": "verl"}, [r("18")], [1]),
    ("posonly", {}, [r("18")], [0.25]),
    ("cached", {}, [r("18")], [1]),
    ("noisy", {}, [r("18")], [1]),
    ("raises", {}, [plain("x")], "user_functions.py:"),
    ("exits", {}, [r("x")], "SystemExit: 3"),
    ("none", {}, [r("x")], "returned None"),
    ("tup", {}, [r("x")], "no finite number"),
    ("text", {}, [r("x")], "no finite number"),
    ("nan", {}, [r("x")], "no finite"),
    ("dec", {}, [r("x")], [0.5]),
    ("frac", {}, [r("x")], [0.25]),
    ("cplx", {}, [r("x")], "no finite"),
    ("npbool", {}, [r("x")], [1]),
    ("torch0", {}, [r("x")], [0.5]),
    ("nested", {}, [r("x")], [1]),
    ("badrepr", {}, [r("x")], "no finite"),
    ("recursion", {}, [r("x")], "RecursionError"),
    ("base", {}, [r("x")], "Base: limit"),
    ("toomany", {}, [plain("x")], "returned 7 scores for 2"),
    ("alpha", {}, [r("x")], "no known style"),
    ("makes_float", {}, [r("x")], "instead of a reward function"),
]


def outcome(
    name: str, rows: list[RewardInput], **part: Any
) -> tuple[list[Verdict] | str, dict[str, float]]:
    """The suite's verdicts and what was logged; or the words with which it refused."""
    try:
        suite = build_suite({"p": {"use": f"{FILE}:{name}", "concurrency": 1, **part}})
    except ValueError as error:
        return str(error), {}
    try:
        suite.trial(rows[0])
        return suite.grade(rows), {k: v for k, v in suite.metrics().items() if "/extra/" in k}
    except ValueError as error:
        return str(error), {}
    finally:
        suite.close()


def check(found: list[Verdict] | str, expected: Any) -> None:
    if isinstance(expected, str):
        assert isinstance(found, str) and expected in found
        return
    assert not isinstance(found, str), found
    for verdict, value in zip(found, expected, strict=True):
        if isinstance(value, str):
            assert verdict.status is Status.VERIFIER_ERROR and value in verdict.message
        else:
            assert verdict.score == pytest.approx(value, abs=0.06)


@pytest.mark.parametrize(("name", "part", "rows", "expected"), CASES)
def test_a_function_gives_what_it_gives_at_home(
    name: str, part: dict[str, Any], rows: list[RewardInput], expected: Any
) -> None:
    check(outcome(name, rows, isolation="inline", **part)[0], expected)


IN_A_PROCESS = (
    "tinyzero",
    "trl_none",
    "raises",
    "exits",
    "mv_raise",
    "get_cosine",
    "noisy",
    "base",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part", "rows", "expected"), [c for c in CASES if c[0] in IN_A_PROCESS]
)
def test_and_the_same_in_a_process(
    name: str, part: dict[str, Any], rows: list[RewardInput], expected: Any
) -> None:
    check(outcome(name, rows, timeout=60.0, **part)[0], expected)


@pytest.mark.parametrize(
    ("name", "rows", "logged", "statuses", "said"),
    [
        (
            "verl_dict",
            [r("18"), r("17")],
            {"acc": 0.5, "format": 0.5},
            ["correct", "wrong"],
            "pred: 18",
        ),
        ("verl_shaped", [r("18")], {"acc": 0.0}, ["partial"], ""),
        ("trl_logs", [plain("abcd")], {"my/acc": 0.25, "n": 4.0}, ["partial"], "pred: abc"),
        (
            "orlhf",
            [r("18"), r("17")],
            {"scores": 0.5, "len": 56.0, "const": 3.0},
            ["correct", "wrong"],
            "",
        ),
    ],
)
def test_what_is_given_beside_the_score_is_logged(
    name: str, rows: list[RewardInput], logged: dict[str, float], statuses: list[str], said: str
) -> None:
    verdicts, metrics = outcome(name, rows, isolation="inline")
    assert metrics == {
        f"reward/p/extra/{key}": pytest.approx(value) for key, value in logged.items()
    }
    assert not isinstance(verdicts, str)
    assert [v.status for v in verdicts] == statuses
    assert verdicts[0].message == said


@pytest.mark.parametrize(
    "value", [float("nan"), "1", b"1", [1.0, 2.0], {"acc": 1}, 10**400, object()]
)
def test_what_is_no_score(value: object) -> None:
    assert "error" in result(value)
    assert "error" in batch_results([value], 1, {})[0]
