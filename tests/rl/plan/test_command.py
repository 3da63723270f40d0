"""`emberl plan`: the best split is found, settings that are wrong are named, and a data sheet's
plan follows its roofline."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from emberl.rl.cli import app
from emberl.rl.config.load import ConfigError
from emberl.rl.plan.command import PlanProgress, best_split
from emberl.rl.plan.devices import DEVICES, MODELS, decode_table, most_slots
from emberl.rl.plan.settings import load_plan, make_scenario, publication
from rich.console import Console
from typer.testing import CliRunner

SMALL = (
    "lengths.mean=500",
    "lengths.cap=2000",
    "schedule.prompts_per_step=32",
    "schedule.group_size=4",
    "steps=8",
    "warmup=4",
)


def test_the_command_searches_the_split() -> None:
    words = ["plan", "--device", "910b", "--devices", "64", "--model", "7b", "--json", *SMALL]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    rates = {int(n): rate for n, rate in found["splits_tokens_per_s"].items()}
    assert found["simulated"] and max(rates, key=rates.__getitem__) == found["learners"]
    assert rates[found["learners"]] == found["tokens_per_s"]
    assert found["engines"] == 64 - found["learners"], "a 7B model fits one card"
    assert done.stderr[10:].startswith("simulating 64 devices, ")


def test_the_keys_are_printed_with_what_they_mean_and_the_sources() -> None:
    done = CliRunner().invoke(app, ["plan", "--keys"])
    assert "link.bandwidth  number (> 0) = 25  # GB/s of one node" in done.stdout
    assert "An assumption: 8 cores at 1 GB/s." in done.stdout, "whole, as a plan's sources promise"
    assert "# H200: per_node: 8, HGX H200" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["link.bandwith=3"], "unknown key link.bandwith; did you mean link.bandwidth?"),
        (["lnk=3"], "unknown key lnk; did you mean link?"),
        (["link.bandwidth"], "must have the form key=value"),
        (["link.ratio=0.5"], "link.ratio=0.5: input should be greater than or equal to 1"),
        (["link=3"], "link=3: a group goes here; set one of its keys, link.mode"),
        (["steps=4"], "warmup=12 must be below steps=4"),
        (["device=910D"], "device='910D' is none of 910B, 910C, H200"),
    ],
)
def test_what_is_wrong_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        load_plan(words, {})


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        make_scenario(load_plan(["engine.cards=1"], {"devices": 16}), 8)
    with pytest.raises(ConfigError, match="leave no engine of 4 devices"):
        make_scenario(load_plan([], {"devices": 8}), 6)


def test_the_roofline_of_a_32b_model_on_four_910b() -> None:
    """65.6 GB of weights over 4 x 1.6 TB/s x 0.6 are 17.1 ms; 10 answers of 10,000 tokens read 10 x
    10,000 x 262,144 bytes, 6.8 ms more; 5 ms are overhead. Beside the weights 0.9 x 256 - 65.6 =
    164.8 GB are left for keys and values."""
    device, model = DEVICES["910B"], MODELS["32b"]
    table = decode_table(device, model, 4, slots=10, longest=10_000)
    assert table.seconds[-1, 0] == pytest.approx(0.005 + 0.01708, rel=1e-3)
    assert table.seconds[-1, -1] == pytest.approx(0.005 + 0.01708 + 0.00683, rel=1e-3)
    assert most_slots(device, model, 4, 10_000) == 62


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        pytest.param(
            ["link.mode=dense", "link.relay=false"],
            65.6 / 3 * 3 + 1.64,
            id="48 nodes' worth from 16: three times",
        ),
        pytest.param(
            ["link.mode=dense"],
            65.6 / 3 * (1 + 5.614 / 64) + 1.64,
            id="relayed: once, and a block for each hop",
        ),
        pytest.param(
            ["link.ratio=100"], 0.656 / 3 * (1 + 5.614 / 64) + 1.64, id="a hundredth of it"
        ),
        pytest.param(["link.bandwidth=inf"], 1.64, id="a perfect link"),
    ],
)
def test_what_a_version_costs_on_the_link(words: list[str], seconds: float) -> None:
    """512 devices: 16 learner nodes and 48 rollout nodes with 3 GB/s each; verifying takes 65.6 /
    40 s."""
    settings = load_plan(["link.bandwidth=3", *words], {"devices": 512})
    assert publication(settings, 128).transfer == pytest.approx(seconds, rel=1e-3)


def test_the_search_finds_the_peak_with_few_trials() -> None:
    tried: list[int] = []

    def evaluate(learners: int) -> dict[str, float]:
        tried.append(learners)
        return {"tokens_per_s": float(min(learners, (1000 - learners) / 2))}

    best, found = best_split(evaluate, list(range(1, 1000)), 500)
    assert best in (333, 334) and set(found) == set(tried)
    assert len(tried) == len(set(tried)) < 30


def test_the_search_says_how_many_trials_there_will_be() -> None:
    """100 candidates: strides of 12, 6, 3 and 1 with two trials each. The guess is the peak."""
    expected: list[int] = []

    def evaluate(learners: int) -> dict[str, float]:
        return {"tokens_per_s": -float(abs(learners - 50))}

    best, found = best_split(evaluate, list(range(1, 101)), 50, expected.append)
    assert best == 50 and len(found) == 9 and expected == [9, 9, 9, 9]


def test_progress_off_a_terminal_is_a_line_at_once_and_then_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three simulations of four steps, 2 s a step: an estimate after 3 s at the earliest, the next
    15 s later; at 4 s half a simulation is done and two and a half are left."""
    out, now = StringIO(), [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = PlanProgress(Console(file=out, width=200))
    with progress.bar:
        progress.expect(3)
        for name in ("a", "b", "c"):
            tell = progress.watch(name, 4)
            for step in range(1, 5):
                now[0] += 2.0
                tell(step)
    assert [line[10:] for line in out.getvalue().splitlines()] == [
        "simulating a (1 of about 3)",
        "simulating a (1 of about 3)  20 s left",
        "simulating c (3 of about 3)  4 s left",
    ]


def test_progress_on_a_terminal_is_a_bar_that_goes_away() -> None:
    out = StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    progress = PlanProgress(console)
    with progress.bar:
        progress.watch("a [b]", 2)(1)
    text = out.getvalue()
    assert "simulating a [b] " in text and "\u2501" in text and " 0 s left" in text
    assert text.endswith("\x1b[2K"), "the line is cleared"


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        # 65.6 GB: a quarter over 25 GB/s each, all hashed by every process at 10 GB/s
        pytest.param(["link.mode=dense"], 0.1 + 65.6 / 4 / 25 + 6.56, id="vllm, whole"),
        pytest.param(
            ["link.mode=dense", "link.engine=embedded", "engine.cards=8"],
            0.01 + 65.6 / 8 / 25 + 6.56,
            id="embedded, whole",
        ),
        # a quarter of 328 million elements, compared and written at 7.5 a nanosecond
        pytest.param([], 0.1 + 0.01093, id="vllm, a patch of 1 %"),
        pytest.param(["link.changed=0.1", "link.engine=embedded"], 0.01 + 0.1093, id="of 10 %"),
        pytest.param(["link.commit=1"], 1.0, id="known"),
    ],
)
def test_how_long_an_engine_stands_still_for_a_32b_model(words: list[str], seconds: float) -> None:
    settings = load_plan(words, {"devices": 512})
    assert publication(settings, 128).commit == pytest.approx(seconds, rel=2e-3)


def test_rates_that_were_measured_are_taken_and_bad_ones_refused(tmp_path: Path) -> None:
    file = tmp_path / "device.json"
    rates = {
        "copy_bytes_per_s": 1e9,
        "hash_bytes_per_s": 2e9,
        "scatter_elements_per_s": 1e8,
    }
    file.write_text(json.dumps({"device": "cpu", "commit": rates}))
    words = [f"link.rates={file}", "model=7b", "link.engine=embedded", "engine.cards=1"]
    found = publication(load_plan([*words, "link.mode=dense"], {"devices": 512}), 128)
    assert found.commit == pytest.approx(0.01 + 15.2 / 1 + 15.2 / 2)
    found = publication(load_plan(words, {"devices": 512}), 128)
    assert found.commit == pytest.approx(0.01 + 0.76)
    for text, why in (
        (json.dumps({"commit": {**rates, "hash_bytes_per_s": 0}}), "hash_bytes_per_s=0"),
        (json.dumps({"commit": {}}), "copy_bytes_per_s"),
        ("{", "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"link.rates=.*{why}"):
            publication(load_plan(words, {"devices": 512}), 128)
