"""Real data takes the same path: GSM8K's file through a chat template, two GRPO steps; and verl's
layout as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_system import Emberl, read_metrics

pytestmark = pytest.mark.slow
GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k/train.jsonl"


@pytest.mark.skipif(
    not GSM8K.exists(), reason="the GSM8K training file is not beside the repository"
)
def test_two_steps_on_gsm8k(emberl: Emberl) -> None:
    config = emberl.folder / "gsm8k.yaml"
    config.write_text(f"""
name: gsm8k
model:
  tiny: {{hidden: 64, layers: 2, kv_heads: 1, head_dim: 32, intermediate: 128, vocabulary: bytes, chat_template: true}}
data:
  source: {GSM8K}
  prompt_column: question
  answer_column: answer
  answer_pattern: '#### (.+)'
  prompt_template: "{{question}}\\nPut your final answer within \\\\boxed{{{{}}}}."
  max_prompt_length: 1200
  heldout: 16
rollout: {{group_size: 2, max_response_length: 16}}
filter: {{zero_variance: false}}
reward: {{parts: {{answer: {{use: math}}}}}}
schedule: {{steps: 2, prompts_per_step: 4}}
eval: {{size: 4}}
tracking: {{wandb: disabled}}
cluster: {{device: cpu, cpus_per_learner: 0.5, cpus_per_rollout: 0.5}}
""")
    result = emberl.train("run_dir=run", config=config)
    assert result["steps"] == 2
    rows = read_metrics(emberl.folder / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["prompt_length/mean"] > 100 for row in rows), (
        "byte-level prompts of real problems are long"
    )
    shown = (emberl.folder / "run/samples.md").read_text()
    problems = [line.split(" | ")[0] for line in shown.splitlines() if line.startswith("| ")]
    assert len(problems) > 2 and not any("user: " in problem for problem in problems), (
        "the question, without its template"
    )


def test_two_layouts_in_one_run(emberl: Emberl) -> None:
    """Mathematics of verl's layout and programs with assertions, each graded by its own reward, for
    two steps."""
    sums = [
        {
            "prompt": [{"role": "user", "content": f"What is {a}+1?"}],
            "reward_model": {"ground_truth": str(a + 1), "style": "rule"},
            "data_source": "sums",
            "extra_info": {"index": a},
        }
        for a in range(12)
    ]
    programs = [
        {
            "question": f"Write add{a}(x).",
            "test_list": [f"assert add{a}(1) == {a + 1}"],
            "code": "-",
        }
        for a in range(12)
    ]
    for name, rows in (("verl.jsonl", sums), ("programs.jsonl", programs)):
        (emberl.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    emberl.train(
        "stages=[rl]", "model.tiny.vocabulary=bytes",
        "data={source: [verl.jsonl, programs.jsonl], heldout: 8, max_prompt_length: 96}",
        "reward={by_source: {sums: math, programs: code}}",
        "schedule.steps=2", "schedule.prompts_per_step=4", "eval.size=8", "run_dir=run",
    )  # fmt: skip
    evaluation, *_ = read_metrics(emberl.folder / "run", "eval")
    assert {"val-core/sums/acc/mean@1", "val-core/programs/acc/mean@1"} <= set(evaluation)
    assert [row["step"] for row in read_metrics(emberl.folder / "run")] == [1, 2]
