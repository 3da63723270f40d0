"""Weights of one version and the next, as real training leaves them: what the codes of bench_sync
are measured on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emberl.rl.weights.history import replay
from emberl.rollout.weights.patch import TensorBytes
from emberl.rollout.weights.transport import list_patches

Tensors = Mapping[str, TensorBytes]
QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
QWEN = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
}
"""Qwen2.5-0.5B's shape (its config.json); it has 24 layers."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One version and the next."""

    name: str
    old: Tensors
    new: Tensors


def quickstart(
    folder: Path, rates: tuple[float, ...], *, sft_steps: int, steps: int
) -> Iterator[Step]:
    """The quickstart's model after a cold start, and the last two versions of GRPO in bfloat16 at
    each learning rate, from the history of patches that the run itself kept."""
    train(folder, "stages=[sft]", f"sft.steps={sft_steps}", "eval.size=0", f"run_dir={folder}/sft")
    for lr in rates:
        run = folder / f"lr-{lr:g}"
        train(
            folder,
            "stages=[rl]",
            "model.tiny=null",
            f"model.path={folder}/sft/model",
            "model.dtype=bfloat16",
            f"optim.lr={lr}",
            "optim.schedule=constant",
            "optim.warmup_steps=0",
            f"schedule.steps={steps}",
            "eval.size=0",
            "checkpoint.every=0",
            "checkpoint.history=true",
            f"run_dir={run}",
        )
        versions = [int(path.name[:8]) for path in list_patches(run / "history")]
        old, new = (
            replay([run / "history"], version).tensors for version in (versions[-2], versions[-1])
        )
        yield Step(name=f"quickstart lr {lr:g}", old=old, new=new)


def train(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Runs the quickstart with these changes; its steps' figures. The run's directory is the last
    override."""
    command = [
        str(Path(sys.executable).with_name("emberl")),
        "train",
        str(QUICKSTART),
        "tracking.wandb=disabled",
    ]
    done = subprocess.run(
        [*command, *overrides], check=False, cwd=folder, capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        raise RuntimeError(
            f"emberl train failed: {json.loads(done.stdout.splitlines()[-1])['error']}"
        )
    metrics = Path(overrides[-1].removeprefix("run_dir="), "metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [row for row in rows if row["axis"] == "train"]


def qwen(rates: tuple[float, ...], *, layers: int, steps: int, tokens: int) -> Iterator[Step]:
    """A randomly initialised model of Qwen2.5-0.5B's shape under AdamW (0.9, 0.95): `steps` steps
    of a policy gradient (advantages of 1 and -1 on sequences of Zipf-distributed tokens),
    back-propagated through the real model, and from there one step more at each learning rate."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {**QWEN, "num_hidden_layers": layers}
    model = Qwen2ForCausalLM(Qwen2Config(**settings))
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    for step in range(steps + 1):
        _policy_gradient(model, step, tokens)
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        if step < steps:
            optimizer.step()
            optimizer.zero_grad()
    old = {name: _bf16(p) for name, p in parameters.items()}
    masters = {name: p.detach().clone() for name, p in parameters.items()}
    state = {
        name: {k: v.clone() for k, v in optimizer.state[p].items()}
        for name, p in parameters.items()
    }
    for lr in rates:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(masters[name])
                optimizer.state[parameter] = {k: v.clone() for k, v in state[name].items()}
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        yield Step(
            name=f"qwen2.5-0.5b lr {lr:g}",
            old=old,
            new={name: _bf16(p) for name, p in parameters.items()},
        )


def _policy_gradient(model: Any, seed: int, tokens: int, length: int = 64) -> None:
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.zipf(1.2, (tokens // length, length)) % QWEN["vocab_size"])
    advantages = torch.from_numpy(rng.choice([-1.0, 1.0], (tokens // length, 1))).float()
    logits = model(ids).logits[:, :-1].float()
    logp = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
    (-(advantages * logp).mean()).backward()


def _bf16(parameter: torch.Tensor) -> TensorBytes:
    data = parameter.detach().bfloat16().contiguous().view(-1).view(torch.uint8).numpy()
    return TensorBytes(dtype="BF16", shape=tuple(parameter.shape), data=data)
