"""Functions written for other trainers load unchanged and give the values they give at home; broken
ones are verdicts."""

import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from emberl.rewards import RewardInput, reward
from emberl.rewards.plugins.results import result
from emberl.rewards.plugins.reward import PluginReward
from emberl.rewards.plugins.styles import adapt, recognise
from emberl.rewards.registry import load_reward
from emberl.rewards.suite import Part, RewardSuite, build_suite
from emberl.rewards.verdict import Status, Verdict

PACKAGE = Path(__file__).parents[1] / "plugins"
EXAMPLES = "example_rewards"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(PACKAGE))


def row(completion: str, answer: str = "18", **fields) -> RewardInput:
    return RewardInput(completion=completion, answer=answer, **fields)


CHAT = ({"role": "user", "content": "6*3?"},)
STYLES = [
    (
        "verl_style:compute_score",
        "verl",
        [row("#### 18"), row("#### 17"), row("18")],
        [1.0, 0.1, 0.0],
    ),
    (
        "verl_style:compute_score",
        "verl",
        [row("#### 18", columns={"extra_info": {"bonus": 0.5}})],
        [1.5],
    ),
    ("verl_style:compute_score_async", "verl", [row("is 18"), row("is 17")], [1.0, 0.0]),
    ("verl_style:compute_score_batch", "verl_batch", [row("is 18"), row("is 17")], [1.0, -1.0]),
    (
        "trl_style:accuracy_reward",
        "trl",
        [row("is 18", messages=CHAT), row("17", messages=CHAT)],
        [1.0, 0.0],
    ),
    (
        "trl_style:length_reward",
        "trl",
        [row("x", token_ids=(1,) * 5), row("x", token_ids=(1,))],
        [-0.5, -0.1],
    ),
    (
        "trl_style:difficulty_reward",
        "trl",
        [row("x", columns={"difficulty": d}) for d in (2, 7)],
        [2.0, 7.0],
    ),
    (
        "openrlhf_style:reward_func",
        "openrlhf",
        [row(" 18", prompt="6*3="), row("1", prompt="18")],
        [1.0, 0.0],
    ),
    (
        "slime_style:reward",
        "slime",
        [row("18"), row("17"), row("18", finish_reason="length")],
        [1.0, -0.5, 0.0],
    ),
    (
        "verifiers_style:exact_match",
        "verifiers",
        [row(" 18", messages=CHAT), row("17")],
        [1.0, 0.0],
    ),
    ("verifiers_style:by_info", "verifiers", [row("x", columns={"info": {"points": 4}})], [0.4]),
    (
        "native:short_enough",
        "native",
        [row("short"), row("short", columns={"limit": 3})],
        [1.0, 0.0],
    ),
    ("native:best_of_batch", "native_batch", [row("ab"), row("abcd")], [0.5, 1.0]),
]


@pytest.mark.parametrize(("target", "style", "rows", "values"), STYLES)
def test_values_of_each_style(
    target: str, style: str, rows: list[RewardInput], values: list[float]
) -> None:
    plugin = PluginReward(f"{EXAMPLES}.{target}", isolation="inline")
    assert plugin.style == style
    assert [v.score for v in plugin(rows)] == pytest.approx(values)


def test_components_and_statuses() -> None:
    plugin = PluginReward(f"{EXAMPLES}.verl_style:compute_score", isolation="inline")
    right, wrong = plugin([row("#### 18"), row("#### 17")])
    assert (right.status, wrong.status) == (Status.CORRECT, Status.PARTIAL)
    assert right.parts == {"acc": 1.0}


def test_a_trl_none_is_no_verdict() -> None:
    plugin = PluginReward(f"{EXAMPLES}.trl_style:accuracy_reward", isolation="inline")
    verdicts = plugin([row("is 18", messages=CHAT), row("x", "", messages=CHAT)])
    assert [v.score for v in verdicts] == [1.0, None]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, 1.0),
        (0.25, 0.25),
        ({"score": 2, "acc": True}, 2.0),
        ({"reward": 1}, 1.0),
        (float("nan"), None),
        (float("inf"), None),
        (None, None),
        ("1.0", None),
        ({"acc": 1}, None),
        ([1.0], None),
        (object(), None),
        (Verdict(status=Status.PARTIAL, score=0.5), 0.5),
        (10**400, None),
    ],
)
def test_what_counts_as_a_score(value: object, expected: float | None) -> None:
    assert result(value).get("score") == expected


def test_styles_are_recognised_or_forced() -> None:
    @reward
    def marked(row): ...

    def trl(completions, **kwargs): ...

    def lengths(completion_ids, **kwargs): ...

    def unknown(alpha): ...

    assert (recognise(marked), recognise(trl), recognise(lengths)) == ("native", "trl", "trl")
    with pytest.raises(ValueError, match=r"no known style has the parameters \(alpha\)"):
        recognise(unknown)
    assert adapt(lambda x: 0.5, "native")([row("x")]) == [
        {"score": 0.5, "parts": {}, "message": ""}
    ]
    with pytest.raises(ValueError, match="style is 'vrl'"):
        adapt(unknown, "vrl")


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("no_such_package.rewards:f", "cannot be imported: ModuleNotFoundError"),
        ("example_rewards.verl_style:nothing", "has no function 'nothing'"),
        (
            "example_rewards.broken:odd_signature",
            r"no known style has the parameters \(alpha, beta\)",
        ),
        ("./no/such/file.py:f", "no file"),
        ("./no/such/file.py", "names no function and cannot be imported: .*there is no file"),
        ("maths", "did you mean 'math'"),
        ("example_rewards.broken:", "must be package.module:function"),
    ],
)
def test_what_cannot_be_loaded_is_an_error_at_once(use: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward(use, isolation="inline") if ":" in use else load_reward(use)


@pytest.mark.slow
def test_the_same_errors_come_out_of_the_process() -> None:
    with pytest.raises(
        ValueError, match=r"reward\.x: example_rewards\.broken:odd_signature: .*no known style"
    ):
        build_suite({"x": {"use": "example_rewards.broken:odd_signature"}})
    with pytest.raises(ValueError, match="ModuleNotFoundError"):
        load_reward("no_such_package.rewards:f")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "KeyError"),
        ("returns_nan", "nan, which is no finite number"),
        ("returns_none", "returned None"),
        ("returns_text", "str '1.0', which is no finite number"),
        ("wrong_count", "returned 1 scores for 2"),
    ],
)
def test_a_trial_call_finds_a_broken_function(function: str, message: str) -> None:
    suite = build_suite({"mine": {"use": f"example_rewards.broken:{function}"}})
    try:
        with pytest.raises(ValueError, match=f"reward.mine: .*{message}"):
            suite.trial(row("x"))
        verdicts = suite.grade([row("x"), row("y")])
        assert [v.status for v in verdicts] == [Status.VERIFIER_ERROR] * 2
        assert message in verdicts[0].message
    finally:
        suite.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises_on_bad", "ZeroDivision"),
        ("hangs_on_bad", "limit of 1 s"),
        ("dies_on_bad", "status -6"),
    ],
)
def test_a_fault_costs_its_own_sample(function: str, message: str) -> None:
    plugin = PluginReward(f"example_rewards.broken:{function}", timeout=1.0)
    start = time.perf_counter()
    try:
        verdicts = plugin([row("good"), row("bad"), row("good")])
    finally:
        plugin.close()
    assert [v.score for v in verdicts] == [1.0, None, 1.0]
    assert message in verdicts[1].message
    assert time.perf_counter() - start < 20


@pytest.mark.slow
def test_a_plugin_runs_in_its_own_process_and_may_print(capfd, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "example_rewards.broken", raising=False)
    plugin = load_reward("example_rewards.broken:prints", concurrency=1)
    assert [v.score for v in plugin([row("x")])] == [1.0]
    assert "example_rewards.broken" not in sys.modules
    assert capfd.readouterr().out == ""
    plugin.close()


@pytest.mark.slow
def test_a_file_is_a_plugin_and_finds_its_neighbours(tmp_path, monkeypatch) -> None:
    (tmp_path / "helper.py").write_text("BONUS = 0.25\n")
    (tmp_path / "mine.py").write_text(
        "from helper import BONUS\ndef score(data_source, solution_str, ground_truth):\n    return"
        " BONUS + (solution_str == ground_truth)\n"
    )
    monkeypatch.chdir(tmp_path)
    plugin = load_reward("./mine.py:score")
    assert [v.score for v in plugin([row("18"), row("17")])] == [1.25, 0.25]
    plugin.close()


@pytest.mark.slow
def test_the_package_installs_and_its_entry_points_are_found(tmp_path, monkeypatch) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
    ]
    source = tmp_path / "source"
    subprocess.run(["cp", "-r", str(PACKAGE), str(source)], check=True)
    subprocess.run([*command, str(tmp_path / "site"), str(source)], check=True, timeout=120)
    monkeypatch.setattr(
        sys, "path", [str(tmp_path / "site"), *[p for p in sys.path if p != str(PACKAGE)]]
    )
    assert "example-verl" in {point.name for point in entry_points(group="emberl.rewards")}
    suite = RewardSuite([Part(name="score", reward=load_reward("example-verl"))])
    assert [v.score for v in suite.grade([row("#### 18"), row("#### 1")])] == [1.0, 0.1]
    suite.close()
