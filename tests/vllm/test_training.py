"""`emberl train` with rollouts on real vLLM: the same run as on the embedded engine, as far as it
is greedy; on a server that runs already; and with engines that sleep while the learner works. What
is served at the end is always what was learned."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from emberl.rollout.vllm_backend.compat import EngineSettings, installed_version
from listening import beyond_loopback, watched

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        installed_version() is None, reason="vLLM is not installed here; make test-vllm has it"
    ),
]

CONFIG = """\
name: small
stages: [sft, rl]
model: {MODEL, dtype: float32}
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


TINY = {"hidden": 64, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 64, "intermediate": 128}
ON_VLLM = ("rollout.engine=vllm", "rollout.engine_args.enforce_eager=true")


def train(
    folder: Path, *arguments: str, model: Path | None = None, status: int = 0
) -> dict[str, Any]:
    """The JSON line with which the run ends. model: where to begin instead of with a tiny model of
    the seed's."""
    begin = f"tiny: {json.dumps(TINY)}" if model is None else f"path: {model}"
    (folder / "small.yaml").write_text(CONFIG.replace("MODEL", begin))
    command = [str(Path(sys.executable).with_name("emberl")), "train", "small.yaml", *arguments]
    done = subprocess.run(
        command, check=False, cwd=folder, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == status, (
        f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def check_steps(run: Path) -> list[dict[str, Any]]:
    """The RL steps' metrics, after a look at what they say of engine and learner in float32."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["axis"] == "train" and row["stage"] == "rl"]
    assert [row["sync/version"] for row in steps] == [2, 3, 4]
    for row in steps:  # the learners give every sampled token the log-prob that vLLM drew it with
        assert (
            row["rollout_corr/log_ppl_abs_diff"] < 1e-4
            and row["training/rollout_probs_diff_max"] < 1e-4
        )
        assert 0 < row["sync/probe_diff_max"] < 1e-4 and row["sync/reloads"] == 0
        assert 0 < row["critic/score/mean"] <= 1
    return steps


@torch.no_grad()
def check_served_at_the_end(run: Path) -> None:
    """The greedy answers with which the run ended are those of the model that it saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(run / "model"),
        AutoTokenizer.from_pretrained(run / "model"),
    )
    table = (run / "samples.md").read_text().rpartition("### rl step 3")[2]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][
        1:
    ]
    assert len(rows) >= 4
    for problem, answer, *_ in rows:
        ids = tokenizer(problem, return_tensors="pt").input_ids
        drawn = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        assert tokenizer.decode(
            drawn[0, ids.shape[1] :], skip_special_tokens=True
        ) == answer.replace("&lt;", "<")


PLAIN = """\
import json, sys
from vllm import LLM, SamplingParams

folder, prompts = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(folder, enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=1 << 27)
greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy)
print("\\ntokens", json.dumps([list(each.outputs[0].token_ids) for each in found]))
"""


@torch.no_grad()
def check_loads_in_vllm(model: Path) -> None:
    """vLLM by itself, without anything of emberl's, decodes of what a run leaves what transformers
    does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(text).input_ids for text in ("3+4=?", "12+5=?", "9+9=?")]
    reference, expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), []
    for ids in prompts:
        drawn = reference.generate(
            torch.tensor([ids]),
            min_new_tokens=12,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=-1,
        )
        expected.append(drawn[0, len(ids) :].tolist())
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(model), json.dumps(prompts)],
        check=False,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    # among what vLLM itself prints
    [line] = [line for line in done.stdout.splitlines() if line.startswith("tokens ")]
    assert json.loads(line.removeprefix("tokens ")) == expected


def test_a_run_on_vllm_is_the_run_on_the_embedded_engine(tmp_path: Path) -> None:
    on_vllm = train(tmp_path, *ON_VLLM, "run_dir=vllm")
    embedded = train(tmp_path, "run_dir=embedded")
    assert on_vllm["status"] == embedded["status"] == "ok" and on_vllm["steps"] == 3
    # the same seed, so after the same supervised steps the same weights answer greedily
    first = [
        (tmp_path / name / "samples.md").read_text().partition("### rl step 3")[0]
        for name in ("vllm", "embedded")
    ]
    assert first[0] == first[1] and first[0].count("&lt;/think>") >= 4
    check_steps(tmp_path / "vllm")
    check_served_at_the_end(tmp_path / "vllm")
    check_loads_in_vllm(tmp_path / "vllm/model")


def test_colocated_engines_sleep_while_the_learner_works(tmp_path: Path) -> None:
    """vLLM on a CPU keeps its memory, but refuses to decode while it sleeps: a run out of order
    would not end."""
    ran = train(
        tmp_path, *ON_VLLM, "cluster.colocated=true", "cluster.sleep_level=2", "run_dir=run"
    )
    assert ran["status"] == "ok" and ran["steps"] == 3
    check_steps(tmp_path / "run")
    check_served_at_the_end(tmp_path / "run")


def test_a_run_on_a_server_leaves_what_it_learned_there(
    serve_vllm: Callable[..., AbstractContextManager[str]], tmp_path: Path
) -> None:
    from emberl.rollout.vllm_backend.engine import VLLMEngine

    start, learned = (
        make_tiny(tmp_path / "start", TinyConfig(**TINY), seed=5),
        tmp_path / "run" / "model",
    )
    with serve_vllm(start, tmp_path / "log", "--max-num-seqs", "64") as url:
        ran = train(
            tmp_path,
            "rollout.engine=vllm",
            f"rollout.servers=[{url}]",
            "sync.mode=patch",
            "run_dir=run",
            model=start,
        )
        assert ran["status"] == "ok" and ran["steps"] == 3
        assert all(row["sync/ratio"] > 1 for row in check_steps(tmp_path / "run"))
        check_served_at_the_end(tmp_path / "run")
        assert httpx.get(f"{url}/weight_info").json()["weight_version"] == "4"
        tokens, loop = list(range(4, 23)), asyncio.new_event_loop()
        settings = EngineSettings(model=str(learned), max_model_len=28, dtype="float32")
        engine = VLLMEngine(settings, server=url, version=4)
        served = loop.run_until_complete(engine.probe(tokens))
        loop.run_until_complete(engine.close())
    np.testing.assert_allclose(served, logprobs(learned, tokens), atol=1e-4, rtol=0)
    assert np.abs(served - logprobs(start, tokens)).max() > 0.1


@torch.no_grad()
def logprobs(model: Path, tokens: list[int]) -> np.ndarray:
    """Of all but the first, by transformers."""
    from transformers import AutoModelForCausalLM

    logits = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([tokens])).logits[0]
    return (
        logits.log_softmax(-1)[:-1]
        .gather(-1, torch.tensor(tokens[1:])[:, None])
        .squeeze(-1)
        .numpy()
    )


def test_a_run_on_vllm_listens_on_loopback_alone(tmp_path: Path) -> None:
    """Two ranks of vLLM, which meet; what they listen at by themselves is where the machine's own
    route leads."""
    (tmp_path / "small.yaml").write_text(CONFIG.replace("MODEL", f"tiny: {json.dumps(TINY)}"))
    process = subprocess.Popen(
        [
            *(str(Path(sys.executable).with_name("emberl")), "train", "small.yaml", *ON_VLLM),
            *("stages=[rl]", "schedule.steps=1", "run_dir=run"),
            "rollout.engine_args.tensor_parallel_size=2",
        ],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        names, seen = watched(process)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    assert any(name.startswith("VLLM::Worker_TP1") for name in names), names
    assert beyond_loopback(seen) == []


def test_a_slip_in_engine_args_ends_the_run_before_it_starts(tmp_path: Path) -> None:
    result = train(tmp_path, "rollout.engine=vllm", "rollout.engine_args.max_num_seq=3", status=2)
    assert "did you mean rollout.engine_args.max_num_seqs?" in result["error"]
    assert not (tmp_path / "runs").exists()
    result = train(tmp_path, "rollout.engine_args.enforce_eager=true", status=2)
    assert "set rollout.engine=vllm or leave them out" in result["error"]
