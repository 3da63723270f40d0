"""Episodes through the whole system: a game that is learnt, a tool, and one turn as the plain
run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow.parquet
import pytest
from safetensors.numpy import load_file
from small_system import Emberl, read_metrics, timeless

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[1] / "plugins/example_environments.py"
PLAYED = ("num_turns/", "observation_length/", "episode/")


def test_the_guess_game_is_learnt(emberl: Emberl) -> None:
    """From a random model: an answer that ends and has a digit in it, then a second guess."""
    draw = random.Random(0)
    rows = [{"prompt": f"{i}?", "answer": str(draw.randint(2, 7))} for i in range(200)]
    (emberl.folder / "guess.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = emberl.train(
        "stages=[rl]",
        "data={source: guess.jsonl, heldout: 0, max_prompt_length: 8}",
        "eval.size=0",
        f"rollout.environment={EXAMPLES}:GuessGame",
        "rollout.max_response_length=24",
        "rollout.group_size=8",
        "reward={parts: {game: {use: environment}}}",
        "schedule.steps=25",
        "optim.lr=5.0e-3",
        "checkpoint.every=0",
        "run_dir=run",
    )
    steps = read_metrics(emberl.folder / "run")
    scores = [step["critic/score/mean"] for step in steps]
    assert sum(scores[-5:]) > sum(scores[:5]) + 5 * 0.1, scores
    assert (
        steps[-1]["num_turns/mean"] > 1.5 > steps[0]["num_turns/min"]
        and steps[-1]["num_turns/max"] == 2
    )
    assert all(step["observation_length/max"] == 1 for step in steps), "`+` or `-`"
    assert steps[-1]["episode/done"] == 1.0 and result["updates"] > 20
    table = pyarrow.parquet.read_table(emberl.folder / "run/lengths.parquet")
    assert max(table["response_length"].to_pylist()) <= 24
    for row in table.to_pylist():
        assert sum(row["version_tokens"]) == row["response_length"] and len(row["versions"]) == 1


def test_one_turn_is_the_plain_run_byte_for_byte(emberl: Emberl) -> None:
    plain = ("schedule.steps=3", "eval.every=0")
    emberl.train(*plain, "run_dir=plain")
    environment = "rollout.environment=emberl.rollout.environments:Environment"
    emberl.train(*plain, environment, "run_dir=played")
    rows = [
        [
            {k: v for k, v in row.items() if not k.startswith(PLAYED)}
            for row in timeless(read_metrics(emberl.folder / run))
        ]
        for run in ("plain", "played")
    ]
    assert rows[0] == rows[1]
    one, other = (
        load_file(emberl.folder / run / "model/model.safetensors") for run in ("plain", "played")
    )
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def test_rollouts_ahead_a_lost_environment_and_a_checkpoint(emberl: Emberl) -> None:
    """Two workers, weights that change between turns, environments of which some fail, and a run
    that goes on."""
    (emberl.folder / "mine.py").write_text(
        "import time\n"
        "class Mine:\n"
        "    def reset(self, prompt):\n"
        "        self.bad, self.turns = prompt.id.endswith('7'), 0\n"
        "    def step(self, text):\n"
        "        self.turns += 1\n"
        "        time.sleep(0.02)\n"
        "        if self.bad and self.turns == 2:\n"
        "            raise RuntimeError('the tool is down')\n"
        "        return '?', float(len(text)) / 10, self.turns == 3\n"
    )
    settings = (
        f"rollout.environment={emberl.folder}/mine.py:Mine",
        "rollout.max_response_length=24",
        "eval.size=0",
        "reward={parts: {mine: {use: environment}}, max_error_fraction: 0.9}",
        "schedule.max_staleness=2",
        "cluster.rollouts=2",
        "cluster.cpus_per_rollout=0.25",
        "run_dir=run",
    )
    emberl.train("schedule.steps=4", *settings)
    emberl.train("schedule.steps=8", *settings, "--resume")
    steps = read_metrics(emberl.folder / "run")
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert max(step["sched/staleness/max"] for step in steps) <= 2
    assert 0 < sum(step["episode/error"] for step in steps) < 4, "problems whose number ends in 7"
    for step in steps:
        assert step["training/verifier_errors"] == round(step["episode/error"] * 64)
    assert max(step["num_turns/max"] for step in steps) == 3
