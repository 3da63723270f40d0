"""What `--dry-run` and `emberl data` find out and say of data and rewards, before anything is
started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from emberl.rl.cli import app
from emberl.rl.config.load import ConfigError, resolve
from emberl.rl.preflight import check_inputs
from typer.testing import CliRunner

SUMS = [{"question": f"{i}+0=?", "answer": str(i)} for i in range(600)]


def one_for_all(*_: Any) -> list[float]:
    """No advantage and no loss."""
    return [1.0]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def checked(source: Any, **groups: Any) -> list[str]:
    data = {"source": source, "heldout": 4, **groups.pop("data", {})}
    tree = {"name": "t", "model": {"tiny": {"vocabulary": "bytes"}}, "data": data, **groups}
    return check_inputs(resolve(tree))


def test_sound_data_is_one_line(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", SUMS)
    assert checked(file) == [f"{file}: layout auto (prompt question, answer answer)"]


@pytest.mark.parametrize(
    ("rows", "groups", "said"),
    [
        (600, {"data": {"heldout": 400}}, "data.heldout=400 takes 66 % of 600 problems"),
        (
            40,
            {},
            "36 problems to train on are fewer than schedule.prompts_per_step=64: every step has each of them 1.8 times",
        ),
        (
            100,
            {"data": {"eval_path": "rows.jsonl"}, "eval": {"size": 8}},
            "eval.size=8 takes the first 8 of 100 held-out",
        ),
    ],
)
def test_doubtful_sizes_are_said(
    rows: int, groups: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = checked(write(tmp_path / "rows.jsonl", SUMS[:rows]), **groups)
    assert any(said in line for line in lines), lines


@pytest.mark.parametrize(
    ("rows", "groups", "message"),
    [
        (None, {}, "data.source='.*rows.jsonl' does not exist"),
        ([], {}, "has no rows"),
        (SUMS[:4], {}, "data.heldout=4 leaves nothing to train on of the 4 problems"),
        ([{"a": 1}], {}, "no column is known to be the prompt, there is only a"),
        (
            SUMS[:9],
            {"reward": {"parts": {"answer": {"use": "maths"}}}},
            "there is no 'maths'; did you mean 'math'",
        ),
        (SUMS[:9], {"data": {"heldout": 0}}, "there is nothing to evaluate on: data.heldout=0"),
        (SUMS[:9], {"reward": {"parts": {"answer": {"use": "./gone.py:score"}}}}, "no file"),
        (
            SUMS[:9],
            {"reward": {"parts": {"answer": {"use": "code"}}}},
            "the tests are neither JSON nor packed JSON",
        ),
        (
            [{"question": "Q", "test_list": ["assert f(1) == 1"]}] * 9,
            {"data": {"heldout": 0}, "eval": {"size": 0}},
            "references .* cannot be graded against: .*it is empty; is it the right column, and the right reward.*use=code",
        ),
        (
            SUMS[:9],
            {"advantage": {"kind": f"{__file__}:one_for_all"}},
            r"returned \[\(\)\] for groups of .*; return a list of these shapes",
        ),
        (
            SUMS[:9],
            {"loss": {"kind": f"{__file__}:one_for_all"}},
            r"returned list for 8 tokens; return one loss per token",
        ),
        (
            SUMS[:9],
            {"eval": {"sets": {"aime": {"path": "gone.jsonl"}}}},
            "eval.sets.aime: data.source='gone.jsonl'",
        ),
    ],
)
def test_what_would_end_a_run_is_found(
    rows: Any, groups: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    if rows is not None:
        write(file, rows)
    with pytest.raises(ConfigError, match=message):
        checked(str(file), **groups)


@pytest.mark.parametrize("mixed", [False, True])
def test_an_evaluation_set_is_looked_at_beforehand(mixed: bool, tmp_path: Path) -> None:
    """By the verifier that the set has, or else by the run's reward."""
    rows = write(tmp_path / "rows.jsonl", SUMS[:9])
    unreadable = [{"question": f"Q{i}", "answer": a} for i, a in enumerate(["\\frac{1", "\\frac{"])]
    bad = write(tmp_path / "bad.jsonl", [*unreadable, {"question": "Q", "answer": "3"}])
    half = write(tmp_path / "half.jsonl", [unreadable[0], {"question": "Q", "answer": "3"}])
    source: dict[str, Any] = {
        "mixture": {"a": {"source": rows}, "b": {"source": rows, "heldout": 5}}
    }
    data = {"source": "", "data": source} if mixed else {"source": rows}
    with pytest.raises(
        ConfigError, match=r"eval\.sets\.x: 2 of 3 references of .*bad\.jsonl cannot"
    ):
        checked(**data, eval={"sets": {"x": {"path": bad}}})
    said = checked(**data, eval={"sets": {"x": {"path": half, "verifier": "math"}}})
    assert sum("eval.sets.x: 1 of 2 references" in line for line in said) == 1
    prose = {"path": half, "verifier": {"use": "format", "options": {"pattern": ".*"}}}
    assert not any("eval.sets" in line for line in checked(**data, eval={"sets": {"x": prose}}))


def test_one_part_of_a_mixture_with_held_out_problems_is_enough(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", SUMS[:9])

    def mixture(heldout: int) -> dict[str, Any]:
        parts = {"a": {"source": rows, "heldout": heldout}, "b": {"source": rows, "heldout": 0}}
        return {"source": "", "data": {"mixture": parts}}

    assert checked(**mixture(3))
    with pytest.raises(ConfigError, match="there is nothing to evaluate on"):
        checked(**mixture(0))
    alone = {"size": None, "sets": {"x": {"path": rows}}}
    assert checked(**mixture(0), eval=alone), "sets of its own are something to evaluate on"


def test_the_data_command_shows_rows_verdicts_and_lengths(tmp_path: Path) -> None:
    rows = [
        {"question": "Find 1+1.", "answer": "#### 2"},
        {"question": "Find 2+2.", "answer": "#### notfound"},
    ]
    found = CliRunner().invoke(app, ["data", write(tmp_path / "rows.jsonl", rows * 2)])
    assert found.exit_code == 0, found.output
    assert "layout gsm8k (prompt question, answer answer)" in found.stdout
    assert "4 rows: 2 problems, 2 repeated, 0 left out" in found.stdout
    assert "user: Find 1+1.\n--- reference 2\n--- math: correct" in found.stdout
    assert "'notfound' says that there is no answer" in found.stdout
    assert "prompts have 9 to 9 bytes" in found.stdout
    wrong = CliRunner().invoke(app, ["data", str(tmp_path / "rows.jsonl"), "layout=gsm8"])
    assert wrong.exit_code == 2
    assert "did you mean gsm8k?" in wrong.stdout
