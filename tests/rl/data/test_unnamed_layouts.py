"""Rows in layouts that are on no list: a right answer is paid and a wrong one is not, or the file
is refused with its columns and the key to set."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from emberl.rewards.inputs import Reward, RewardInput
from emberl.rewards.registry import load_reward
from emberl.rl.config.data import DataConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.rows import train_tables
from emberl.rl.data.sources import check_data, open_source
from emberl.rl.data.table import read_head
from emberl.rl.data.tiny import tiny_tokenizer
from pyarrow import parquet

CASES = [
    json.loads(line)
    for line in Path(__file__).with_name("unnamed_layouts.jsonl").read_text("utf-8").splitlines()
]
CHAT = tiny_tokenizer(TinyConfig(vocabulary="bytes", chat_template=True))


@pytest.fixture(scope="module")
def rewards() -> Iterator[Any]:
    """Rewards by name, each made once."""
    made: list[Reward] = []

    @cache
    def get(name: str) -> Reward:
        made.append(load_reward(name))
        return made[-1]

    yield get
    for reward in made:
        getattr(reward, "close", lambda: None)()


def write(path: Path, rows: list[dict[str, Any]]) -> DataConfig:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(json.dumps(rows) if path.suffix == ".json" else lines)
    return DataConfig(source=str(path), heldout=0, max_prompt_length=4096)


def cases(*, refused: bool) -> list[Any]:
    return [
        pytest.param(case, id=case["name"], marks=[pytest.mark.slow] * (case["reward"] == "code"))
        for case in CASES
        if ("refused" in case) == refused
    ]


@pytest.mark.parametrize("case", cases(refused=False))
def test_a_right_answer_is_paid_and_a_wrong_one_is_not(
    case: dict[str, Any], tmp_path: Path, rewards: Any
) -> None:
    settings = write(tmp_path / f"rows{case['suffix']}", case["rows"])
    check_data(settings)
    assert read_head(settings, train_tables(settings)[0]).mapper.task == case["reward"]
    source = open_source(settings, CHAT)
    prompts = sorted((source.train(i) for i in range(source.size)), key=lambda prompt: prompt.id)
    assert len(prompts) == 3
    assert all(case["shown"] in CHAT.decode(prompt.token_ids) for prompt in prompts)
    inputs = [
        RewardInput(
            completion=completion,
            answer=prompt.answer,
            source=prompt.source,
            messages=prompt.messages,
            columns=prompt.columns,
        )
        for said in (case["right"], case["wrong"])
        for completion, prompt in zip(said, prompts, strict=True)
    ]
    reward = rewards(case["reward"])
    verdicts = reward(inputs)
    assert [v.score for v in verdicts] == [1.0] * 3 + [0.0] * 3, [str(v) for v in verdicts]
    assert [reward.check_reference(row) for row in inputs[:3]] == [None] * 3


@pytest.mark.parametrize("case", cases(refused=True))
def test_what_cannot_be_known_is_refused_by_name(case: dict[str, Any], tmp_path: Path) -> None:
    settings = write(tmp_path / f"rows{case['suffix']}", case["rows"])
    with pytest.raises(ValueError, match=case["refused"]):
        check_data(settings)
