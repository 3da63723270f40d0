"""The learner's step on `npu:0`: loading, FSDP2, passes, the fused loss, AdamW. Its values are the
CPU's, as `values.py` computes them; memory, copies, dispatch and autograd are torch-npu's.

That the result is the CPU's bit for bit shows that nothing on the way (casts, views, layouts, an
operation that only the device's autograd has) changes what is computed. It shows nothing of a
card's own arithmetic.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_npu  # noqa: F401 -- registers the device
from emberl.kernels import ascend
from emberl.rewards.verdict import Status, Verdict
from emberl.rl.algorithm.advantages import group_advantages
from emberl.rl.algorithm.losses import Objective
from emberl.rl.batch import make_batch, sft_batch
from emberl.rl.config.algorithm import LossConfig
from emberl.rl.config.load import Config, ModelConfig, OptimConfig, load_config
from emberl.rl.data.sources import open_source
from emberl.rl.data.tiny import make_tiny, tiny_tokenizer
from emberl.rl.groups import Batch, Group
from emberl.rl.learner import memory
from emberl.rl.learner.rank import LearnerRank, RankSpec
from emberl.rollout.samples import Completion, Span
from references import REFERENCES, SDPA, alone
from values import ByTheCPU

SHOWS = {
    "the quickstart's learner step with its full settings on npu:0 equals the CPU's, bit for bit": (
        "test_the_quickstarts_steps_are_the_cpus, test_a_step_is_the_cpus"
    ),
    "no float64 tensor on npu in a learner step": "test_a_step_is_the_cpus",
    "a learner step through the fused operators, bfloat16 (references of the CPU)": "test_a_step_by_the_operators",
}
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    tiny = load_config(ROOT / "configs" / "quickstart.yaml", []).model.tiny
    assert tiny is not None
    return str(make_tiny(tmp_path_factory.mktemp("model"), tiny, seed=0))


def batch() -> Batch:
    """Five answers of unlike lengths, from a fixed seed."""
    rng = np.random.default_rng(3)
    lengths = [9, 21, 14, 6, 17]
    behaviour = -2.5 + 0.3 * rng.standard_normal(sum(lengths))
    tokens = rng.integers(4, 20, sum(lengths))
    found = sft_batch([(part.tolist(), 3) for part in np.split(tokens, np.cumsum(lengths)[:-1])])
    return replace(
        found,
        behaviour_logp_T=np.where(found.loss_mask_T, behaviour, np.nan),
        advantages_T=np.repeat(rng.standard_normal(len(lengths)), lengths),
    )


def answers(config: Config) -> list[Group]:
    """The groups of the quickstart's first RL step, but that nothing was sampled: every answer is
    the worked solution, whole or cut somewhere, which gives unlike lengths, and scores."""
    assert config.model.tiny is not None
    tokenizer = tiny_tokenizer(config.model.tiny)
    source, rng = open_source(config.data, tokenizer, config.seed), np.random.default_rng(5)
    groups = []
    for position in range(config.schedule.prompts_per_step):
        prompt = source.train(position)
        solution = source.solution(prompt)
        assert solution is not None
        whole = np.array(tokenizer.encode(solution)[: config.rollout.max_response_length - 1])
        completions, verdicts = [], []
        for sample in range(config.rollout.group_size):
            length = len(whole) if rng.random() < 0.4 else int(rng.integers(1, len(whole)))
            right = length == len(whole)
            completions.append(
                Completion(
                    prompt_id=prompt.id, sample=sample, spans=(Span(0, 0, length),),
                    token_ids=whole[:length].astype(np.int32), finish_reason="stop",
                    logprobs=rng.normal(-2.5, 0.4, length).astype(np.float32),
                )
            )  # fmt: skip
            status = Status.CORRECT if right else Status.WRONG
            verdicts.append(Verdict(status=status, score=float(right)))
        groups.append(
            Group(prompt=prompt, completions=tuple(completions), verdicts=tuple(verdicts))
        )
    return groups


def steps(
    device: str, model: str, dtype: str, attention: str, count: int = 2,
    given: tuple[Batch, Objective, OptimConfig, int] | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Metrics of so many steps, and the weights after them. given: batch, objective, optimiser and
    the run's updates; by default small ones."""
    batch_, objective, optim, total = given or (
        batch(),
        Objective(loss=LossConfig(clip_high=0.28, entropy_coef=0.01)),
        OptimConfig(lr=1e-3, micro_batch_tokens=48),
        10,
    )
    spec = RankSpec(
        rank=0, world=1, device=device, threads=1, timeout=60.0,
        model=ModelConfig.model_validate({"path": model, "dtype": dtype, "attention": attention}),
    )  # fmt: skip
    learner = LearnerRank(spec)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    learner.connect(f"127.0.0.1:{port}")
    try:
        learner.load(model)
        learner.begin_stage(optim, total)
        found = [learner.step(batch_, objective) for _ in range(count)]
        weights = {
            name: parameter.to_local().detach().cpu().clone()
            for name, parameter in learner.policy.named_parameters()
        }
    finally:
        learner.close()
    return found, weights


@pytest.fixture(autouse=True)
def by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch)


def test_a_step_is_the_cpus(model: str) -> None:
    equal_on_both(model, None)


def test_the_quickstarts_steps_are_the_cpus(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 prompts of 8 answers, GRPO's advantages and weights, optimiser, schedule and passes of the
    file; `auto` dtype and attention, which differ between the two, are float32 and eager."""
    # on a CPU passes are cut further where that is quicker, which changes the order of sums
    monkeypatch.setattr(memory, "worth_keeping", lambda need, given, target: given)
    config = load_config(ROOT / "configs" / "quickstart.yaml", [])
    objective = Objective.of(
        config.loss, config.kl, config.offpolicy, temperature=config.rollout.temperature
    )
    groups = [group for group in answers(config) if group.has_signal]
    advantages = group_advantages([group.scores for group in groups], config.advantage)
    groups = [g.with_advantages(a) for g, a in zip(groups, advantages, strict=True)]
    rows = make_batch(
        groups, config.loss, config.advantage, max_length=config.rollout.max_response_length,
        keep_all=objective.needs_all_tokens,
    )  # fmt: skip
    assert rows is not None and rows.num_tokens > config.optim.micro_batch_tokens, "several passes"
    equal_on_both(model, (rows, objective, config.optim, config.schedule.steps))


def equal_on_both(model: str, given: tuple[Batch, Objective, OptimConfig, int] | None) -> None:
    expected, weights = steps("cpu", model, "float32", "eager", given=given)
    with ByTheCPU() as mode:
        found, ours = steps("npu", model, "float32", "eager", given=given)
    assert mode.seen["aten::_fused_adamw_"] == 2, "AdamW as one operator"
    assert mode.float64 == [], "float64 on the device"
    for name in ("actor/loss", "actor/grad_norm", "actor/entropy", "actor/ppo_kl", "actor/lr"):
        assert [row.get(name) for row in found] == [row.get(name) for row in expected], name
    assert found[0]["actor/grad_norm"] > 0
    assert ours.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(ours[name], value), name
    start = dict(steps("cpu", model, "float32", "eager", 0)[1].items())
    assert any(not torch.equal(start[k], weights[k]) for k in start), "the steps changed something"


def test_a_step_by_the_operators(model: str) -> None:
    """In bfloat16 the learner takes the fused layers by itself, after comparing one with
    transformers' own on the device; loss and gradient are those of plain layers, but for
    rounding."""
    ascend._triangle.cache_clear()
    with ByTheCPU(REFERENCES) as mode:
        found, _ = steps("npu", model, "bfloat16", "auto", 1)
    with ByTheCPU(SDPA) as plain:
        expected, _ = steps("npu", model, "bfloat16", "sdpa", 1)
    for operator in ascend.OPERATORS.values():
        # once each layer at least, beside the two of the comparison
        assert mode.seen.get(operator, 0) > 4 and operator not in plain.seen
    assert mode.seen["npu::npu_fusion_attention_grad"] > 0
    assert mode.float64 == [], "float64 on the device"
    for name in ("actor/loss", "actor/grad_norm"):
        assert found[0][name] == pytest.approx(expected[0][name], rel=0.05), name
