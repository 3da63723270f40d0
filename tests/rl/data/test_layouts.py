"""Every layout pays a right answer and refuses a wrong one, through the checks of `--dry-run` and
the real source."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from emberl.rewards.inputs import Reward, RewardInput
from emberl.rewards.registry import load_reward
from emberl.rl.config.data import LAYOUTS, DataConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.sources import check_data, open_source
from emberl.rl.data.tiny import tiny_tokenizer

CHAT = tiny_tokenizer(TinyConfig(vocabulary="bytes", chat_template=True))


def _load(name: str) -> Any:
    """A module beside this file: tests are no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = _load("public_layouts").CASES
KNIGHTS = """
import re

def compute_score(data_source, solution_str, ground_truth, extra_info):
    wanted = set(ground_truth["solution_text_format"].splitlines())
    said = re.search(r"<answer>(.*?)</answer>", solution_str, re.DOTALL)
    return float(said is not None and set(said[1].splitlines()) == wanted)
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Rewards by name, each made once: a sandbox takes its time."""
    plugin = tmp_path_factory.mktemp("plugins") / "knights.py"
    plugin.write_text(KNIGHTS)
    made: dict[str, Reward] = {}

    def get(name: str) -> Reward:
        if name not in made:
            made[name] = load_reward(
                f"{plugin}:compute_score" if name == "plugin:knights" else name
            )
        return made[name]

    yield get
    for reward in made.values():
        getattr(reward, "close", lambda: None)()


def write(path: Path, rows: list[Any]) -> str:
    whole = path.suffix == ".json"
    path.write_text(json.dumps(rows) if whole else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_right_answer_is_paid_and_a_wrong_one_is_not(
    name: str, tmp_path: Path, rewards: Any
) -> None:
    case = CASES[name]
    file = write(tmp_path / f"rows{case.suffix}", [case.row(i) for i in range(5)])
    for layout in ("auto", case.layout):
        settings = DataConfig(source=file, heldout=0, layout=layout, max_prompt_length=4096)
        check_data(settings)
        source = open_source(settings, CHAT)
        assert source.size == 5
        assert f"layout {case.layout} (" in source.notes[0]
    prompts = sorted((source.train(i) for i in range(5)), key=lambda prompt: prompt.id)
    reward = rewards(case.reward)
    inputs = [
        RewardInput(
            completion=say(i),
            answer=p.answer,
            source=p.source,
            messages=p.messages,
            columns=p.columns,
        )
        for say in (case.right, case.wrong)
        for i, p in enumerate(prompts)
    ]
    for i, prompt in enumerate(prompts):
        said = CHAT.decode(prompt.token_ids)
        assert case.shown in said
        assert case.reward != "math" or prompt.answer not in said.split("assistant")[-1], (
            f"row {i} shows its answer"
        )
    verdicts = reward(inputs)
    assert [v.score for v in verdicts] == [1.0] * 5 + [0.0] * 5, [str(v) for v in verdicts]
    if (check := getattr(reward, "check_reference", None)) is not None:
        assert [check(row) for row in inputs[:5]] == [None] * 5


def test_the_table_has_a_case_for_every_layout() -> None:
    assert {case.layout for case in CASES.values()} == set(LAYOUTS)
