"""`emberl train` with rollouts on real vLLM: the same run as on the embedded engine, as far as it is greedy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from emberl.rollout.vllm_compat import installed_version

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(installed_version() is None, reason="vLLM is not installed here; make test-vllm has it"),
]

CONFIG = """\
name: small
stages: [sft, rl]
model: {tiny: {hidden: 64, layers: 2, heads: 2, kv_heads: 1, head_dim: 64, intermediate: 128}, dtype: float32}
data:
  {source: arithmetic, kinds: {chain: 1}, terms: [2, 2], largest_total: 20, steps: short, heldout: 16, max_prompt_length: 16}
sft: {steps: 60, batch_size: 64, lr: 5.0e-3, warmup_steps: 5}
rollout: {group_size: 4, max_response_length: 12, max_num_seqs: 64}
schedule: {steps: 3, prompts_per_step: 16}
filter: {zero_variance: false}
optim: {lr: 1.0e-3, micro_batch_tokens: 1024}
eval: {every: 0, size: 16}
tracking: {wandb: disabled}
cluster: {device: cpu, learners: 1, rollouts: 1, cpus_per_learner: 0.5, cpus_per_rollout: 0.5}
"""


def train(folder: Path, *arguments: str, status: int = 0) -> dict[str, Any]:
    """The JSON line with which the run ends."""
    (folder / "small.yaml").write_text(CONFIG)
    command = [str(Path(sys.executable).with_name("emberl")), "train", "small.yaml", *arguments]
    done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def test_a_run_on_vllm_is_the_run_on_the_embedded_engine(tmp_path: Path) -> None:
    on_vllm = train(tmp_path, "rollout.engine=vllm", "rollout.engine_args.enforce_eager=true", "run_dir=vllm")
    embedded = train(tmp_path, "run_dir=embedded")
    assert on_vllm["status"] == embedded["status"] == "ok" and on_vllm["steps"] == 3
    # the same seed, so after the same supervised steps the same weights answer greedily
    first = [
        (tmp_path / name / "samples.md").read_text().partition("### rl step 3")[0] for name in ("vllm", "embedded")
    ]
    assert first[0] == first[1] and first[0].count("&lt;/think>") >= 4
    rows = [json.loads(line) for line in (tmp_path / "vllm" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["axis"] == "train" and row["stage"] == "rl"]
    assert [row["sync/version"] for row in steps] == [2, 3, 4]
    for row in steps:  # the learners give every sampled token the log-prob that vLLM drew it with
        assert row["rollout_corr/log_ppl_abs_diff"] < 1e-4 and row["training/rollout_probs_diff_max"] < 1e-4
        assert 0 < row["sync/probe_diff_max"] < 1e-4 and row["sync/reloads"] == 0


def test_a_slip_in_engine_args_ends_the_run_before_it_starts(tmp_path: Path) -> None:
    result = train(tmp_path, "rollout.engine=vllm", "rollout.engine_args.max_num_seq=3", status=2)
    assert "did you mean rollout.engine_args.max_num_seqs?" in result["error"]
    assert not (tmp_path / "runs").exists()
    result = train(tmp_path, "rollout.engine_args.enforce_eager=true", status=2)
    assert "set rollout.engine=vllm or leave them out" in result["error"]
