"""Gradients of supervised learning and of every distillation against a plain implementation in
float64: whole logits, autograd, one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rewards.verdict import Status, Verdict
from emberl.rl.algorithm.losses import Objective
from emberl.rl.batch import flat_batch, sft_batch, updates_of, with_teachers
from emberl.rl.config.algorithm import KLConfig, LossConfig, OffPolicyConfig
from emberl.rl.config.distill import DistillConfig
from emberl.rl.config.load import ModelConfig, OptimConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from emberl.rl.groups import Batch, Group
from emberl.rl.learner.model_loader import RankSpec
from emberl.rl.learner.rank import LearnerRank
from emberl.rl.watch.step_metrics import teacher_metrics
from emberl.rollout.samples import Completion, Prompt, Span
from torch import Tensor
from transformers import AutoModelForCausalLM

SHAPES = {"student": 16, "first": 24, "second": 32}
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A student and two teachers of other widths."""
    folder = tmp_path_factory.mktemp("models")
    return {
        name: str(
            make_tiny(
                folder / name,
                TinyConfig(hidden=w, layers=1, heads=2, kv_heads=1, head_dim=8, intermediate=24),
                seed=number,
            )
        )
        for number, (name, w) in enumerate(SHAPES.items())
    }


def settings(models: dict[str, str], **keys: Any) -> DistillConfig:
    teachers = {
        "sums": {"path": models["first"], "sources": ["sums"]},
        "rest": {"path": models["second"], "sources": ["words"]},
    }
    return DistillConfig.model_validate({"teachers": teachers, **keys})


@pytest.fixture(scope="module")
def rank(models: dict[str, str]) -> Iterator[LearnerRank]:
    model = ModelConfig.model_validate({"path": models["student"], "dtype": "float64"})
    made = LearnerRank(
        RankSpec(rank=0, world=1, device="cpu", threads=1, model=model, timeout=60.0)
    )
    made.connect(made.address())
    made.load(models["student"])
    made.begin_stage(OptimConfig(lr=1e-2, micro_batch_tokens=64), 10)
    made.load_teachers(settings(models))
    yield made
    made.close()


def groups() -> list[Group]:
    """Of both teachers' sources in turn and of one that has none, two answers each; only those of
    the second group differ in score."""
    rng = np.random.default_rng(0)
    found = []
    for number, source in enumerate(("sums", "words", "sums", "other", "words")):
        prompt = Prompt(id=f"p{number}", token_ids=(3, 4 + number), answer="", source=source)
        answers = tuple(
            Completion(
                prompt_id=prompt.id,
                sample=i,
                token_ids=rng.integers(4, 20, 3 + number + i).astype(np.int32),
                logprobs=(-2 - rng.random(3 + number + i)).astype(np.float32),
                spans=(Span(0, 0, 3 + number + i),),
                finish_reason="stop",
            )
            for i in range(2)
        )
        scores = (1.0, 0.0) if number == 1 else (0.0, 0.0)
        verdicts = tuple(Verdict(status=Status.PARTIAL, score=s) for s in scores)
        advantages = np.array([0.5, -0.5]) if number == 1 else np.zeros(2)
        found.append(
            Group(prompt=prompt, completions=answers, verdicts=verdicts, advantages=advantages)
        )
    return found


def made(rank: LearnerRank, distill: DistillConfig, objective: Objective) -> Batch:
    loss = LossConfig(kind="reinforce", aggregation="token-mean")
    whole = flat_batch(groups(), loss, max_length=20, distill=distill)
    assert whole is not None
    if distill.on_samples:
        whole = replace(whole, teacher_logp_T=rank.teacher_logprobs(whole, TEMPERATURE))
    whole = with_teachers(whole, distill)
    keep_all = objective.needs_all_tokens
    (batch,) = updates_of(whole, groups(), loss, max_length=20, keep_all=keep_all)
    return batch


def logits(path: str, group: Group, answer: Completion) -> tuple[Any, Tensor, Tensor]:
    """A model, [n, V] its log-probs where each token of the answer is predicted, and [n] tokens."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    return (model, *log_probs(model, group, answer))


def log_probs(model: Any, group: Group, answer: Completion) -> tuple[Tensor, Tensor]:
    start = len(group.prompt.token_ids)
    ids = torch.tensor([[*group.prompt.token_ids, *answer.token_ids.tolist()]])
    found = model(input_ids=ids).logits[0, start - 1 : -1] / TEMPERATURE
    return found.log_softmax(-1), ids[0, start:]


def compared(p: Tensor, q: Tensor, distill: DistillConfig) -> Tensor:
    """[n] of log-probs [n, V], by the definition."""
    if distill.top_k:
        ids = q.topk(distill.top_k).indices
        p, q = p.gather(1, ids), q.gather(1, ids)
        p, q = (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1) for x in (p, q))
    if distill.loss == "forward_kl":
        return (q.exp() * (q - p)).sum(-1)
    if distill.loss == "reverse_kl":
        return (p.exp() * (p - q)).sum(-1)
    m = (distill.beta * q.exp() + (1 - distill.beta) * p.exp()).log()
    teacher, student = (x.exp() * (x - m) for x in (q, p))
    return (distill.beta * teacher + (1 - distill.beta) * student).sum(-1)


CASES = {
    "policy gradient": {"coef": 0.7},
    "with rewards": {"coef": 0.7, "reward_coef": 2.0},
    "forward": {"loss": "forward_kl"},
    "reverse with rewards": {"loss": "reverse_kl", "reward_coef": 0.5, "coef": 0.3},
    "jsd": {"loss": "jsd", "beta": 0.3},
    "top": {"loss": "reverse_kl", "top_k": 5},
    "top forward": {"loss": "forward_kl", "top_k": 5},
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_a_plain_implementation_s(
    case: str, rank: LearnerRank, models: dict[str, str]
) -> None:
    distill = settings(models, **CASES[case])
    objective = Objective.of(
        LossConfig(kind="reinforce"),
        KLConfig(),
        OffPolicyConfig(),
        distill=distill,
        temperature=TEMPERATURE,
    )
    batch = made(rank, distill, objective)
    loss, metrics = rank.backward(batch, objective)
    found = torch.cat([p.grad.full_tensor().flatten() for p in rank.policy.parameters()])
    rank.policy.zero_grad(set_to_none=True)

    student = AutoModelForCausalLM.from_pretrained(models["student"], dtype=torch.float64)
    teachers = {
        source: AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float64)
        for source, name in (("sums", "first"), ("words", "second"))
    }
    total, apart, tokens = torch.zeros((), dtype=torch.float64), 0.0, 0
    for group in groups():
        assert group.advantages is not None
        for answer, advantage in zip(group.completions, group.advantages, strict=True):
            p, ids = log_probs(student, group, answer)
            logp = p.gather(1, ids[:, None])[:, 0]
            gain = torch.full_like(logp, distill.reward_coef * float(advantage))
            tokens += len(ids)
            if group.prompt.source in teachers:
                with torch.no_grad():
                    q, _ = log_probs(teachers[group.prompt.source], group, answer)
                if distill.on_samples:
                    old = torch.from_numpy(answer.logprobs).double()
                    gain += distill.coef * (q.gather(1, ids[:, None])[:, 0] - old)
                else:
                    divergence = compared(p, q, distill).sum()
                    total = total + distill.coef * divergence
                    apart += float(divergence)
            total = total - (gain * logp).sum()
    total = total / tokens
    total.backward()  # type: ignore[no-untyped-call]
    expected = torch.cat([p.grad.flatten() for p in student.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    assert loss == pytest.approx(float(total.detach()), rel=1e-10)
    if distill.on_distributions:
        assert metrics["actor/distill_loss"] == pytest.approx(apart / tokens)


def test_the_gradient_of_supervised_learning_is_a_plain_implementation_s(
    rank: LearnerRank, models: dict[str, str]
) -> None:
    examples = [([3, 5, 9, 8, 1], 2), ([4, 4, 7, 1], 1), ([6, 5, 5, 5, 5, 1], 3)]
    loss, metrics = rank.backward(sft_batch(examples), Objective.sft())
    found = torch.cat([p.grad.full_tensor().flatten() for p in rank.policy.parameters()])
    rank.policy.zero_grad(set_to_none=True)
    student = AutoModelForCausalLM.from_pretrained(models["student"], dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for ids, start in examples:
        logp = student(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        total = total - logp[start - 1 :].gather(1, torch.tensor(ids[start:])[:, None]).sum()
    total = total / sum(len(ids) - start for ids, start in examples)
    total.backward()  # type: ignore[no-untyped-call]
    expected = torch.cat([p.grad.flatten() for p in student.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    assert loss == pytest.approx(float(total.detach()), rel=1e-12)
    assert metrics["actor/nonfinite_logp"] == 0


def test_each_sequence_s_teacher_says_what_it_says_alone(
    rank: LearnerRank, models: dict[str, str]
) -> None:
    distill = settings(models)
    batch = made(rank, distill, Objective(loss=LossConfig()))
    assert batch.teacher_logp_T is not None and batch.teacher_ids_T is not None
    whole = [(group, answer) for group in groups() for answer in group.completions]
    taught = [(g, a) for g, a in whole if g.prompt.source != "other"]
    assert len(batch.sequence_lengths) == len(taught), "without a teacher and rewards: no gradient"
    for number, (group, answer) in enumerate(taught):
        here = (batch.sequence_ids_T == number) & batch.loss_mask_T
        name = "first" if group.prompt.source == "sums" else "second"
        _, q, ids = logits(models[name], group, answer)
        expected = q.gather(1, ids[:, None])[:, 0].detach().numpy()
        np.testing.assert_allclose(batch.teacher_logp_T[here], expected, rtol=1e-10)
        assert set(batch.teacher_ids_T[here]) == {0 if name == "first" else 1}


def test_advantages_and_figures_by_hand() -> None:
    """Three tokens; the teacher has -1, -2 and (of a token that was not sampled) nothing."""
    batch = Batch(
        token_ids_T=np.arange(4, dtype=np.int32),
        positions_T=np.arange(4, dtype=np.int32),
        sequence_ids_T=np.zeros(4, np.int32),
        loss_mask_T=np.array([False, True, True, True]),
        behaviour_logp_T=np.array([0.0, -1.5, -0.5, -3.0]),
        advantages_T=np.full(4, 0.25),
        weights_T=np.full(4, 1 / 3),
        num_loss_tokens=3,
        teacher_ids_T=np.zeros(4, np.int32),
        teacher_logp_T=np.array([0.0, -1.0, -2.0, -np.inf]),
    )
    distill = DistillConfig.model_validate(
        {"teachers": {"t": {"path": "p"}}, "coef": 2.0, "reward_coef": 4.0}
    )
    taught = with_teachers(batch, distill)
    assert taught.advantages_T.tolist() == [1.0, 2.0, -2.0, 1.0]
    assert teacher_metrics([taught], distill) == {
        "distill/untaught_tokens": 0.0,
        "distill/tokens/t": 3.0,
        "distill/reverse_kl/t": pytest.approx((-0.5 + 1.5) / 2),
    }
    # a step of two updates: the second's tokens count, too, of which none has a teacher's figure
    unseen = replace(taught, teacher_logp_T=np.full(4, -np.inf))
    without = replace(taught, teacher_ids_T=np.full(4, -1))
    assert teacher_metrics([taught, unseen, without], distill) == {
        "distill/untaught_tokens": 3.0,
        "distill/tokens/t": 6.0,
        "distill/reverse_kl/t": pytest.approx((-0.5 + 1.5) / 2),
    }
    assert "distill/reverse_kl/t" not in teacher_metrics([unseen], distill), "not NaN"


def test_a_teacher_that_is_the_student_has_nothing_to_say(
    rank: LearnerRank, models: dict[str, str]
) -> None:
    rank.load_teachers(
        DistillConfig.model_validate({"teachers": {"same": {"path": models["student"]}}})
    )
    distill = DistillConfig.model_validate(
        {"teachers": {"same": {"path": models["student"]}}, "loss": "reverse_kl"}
    )
    objective = Objective.of(LossConfig(), KLConfig(), OffPolicyConfig(), distill=distill)
    batch = made(rank, distill, objective)
    _, metrics = rank.backward(batch, objective)
    assert metrics["actor/distill_loss"] == pytest.approx(0, abs=1e-14)
    assert max(float(p.grad.full_tensor().abs().max()) for p in rank.policy.parameters()) < 1e-14
    rank.policy.zero_grad(set_to_none=True)
    rank.load_teachers(settings(models))
