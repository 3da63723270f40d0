"""A whole step, from scores to new weights, is the step that a paper's formulas give in plain
PyTorch (float64).

Adam's eps is of the size of the gradients: with the usual one a factor on the loss would not show.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rewards.verdict import Status, Verdict
from emberl.rl.algorithm.losses import Objective
from emberl.rl.config.load import Config, ModelConfig, resolve
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from emberl.rl.groups import Group, Progress
from emberl.rl.learner.model_loader import RankSpec
from emberl.rl.learner.rank import LearnerRank
from emberl.rl.trainer import update, with_advantages
from emberl.rl.watch.spans import Spans
from emberl.rollout.samples import Completion, Prompt, Span
from torch import Tensor
from transformers import AutoModelForCausalLM

LONGEST = 9
SCORES = [(1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 0.0), (1.0, None, 0.25, 0.0), (0.5, 1.0, 1.0, 1.0)]
LENGTHS = [(3, 9, 5, 2), (4, 4, 6, 7), (6, 1, 3, 8), (5, 5, 2, 9)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    tiny = TinyConfig(hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate=48)
    return str(make_tiny(tmp_path_factory.mktemp("model"), tiny, seed=1))


@contextmanager
def learner(path: str, config: Config) -> Iterator[LearnerRank]:
    settings = ModelConfig.model_validate({"path": path, "dtype": "float64"})
    rank = LearnerRank(
        RankSpec(rank=0, world=1, device="cpu", threads=1, model=settings, timeout=60.0)
    )
    rank.connect(rank.address())
    try:
        rank.load(path)
        rank.begin_stage(config.optim, config.updates, None, config.kl.active)
        yield rank
    finally:
        rank.close()


def sampled(path: str) -> list[Group]:
    """Four groups of four answers whose log-probs are the model's own but for an engine's
    rounding."""
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    rng = np.random.default_rng(0)
    groups = []
    for number, (scores, lengths) in enumerate(zip(SCORES, LENGTHS, strict=True)):
        prompt = Prompt(id=f"p{number}", token_ids=(3, 4 + number), answer="", source="test")
        answers = []
        for i, length in enumerate(lengths):
            ids = rng.integers(4, 18, length).astype(np.int32)
            with torch.no_grad():
                logp = logprobs(policy, prompt.token_ids, ids).numpy()
            answers.append(
                Completion(
                    prompt_id=prompt.id,
                    sample=i,
                    token_ids=ids,
                    logprobs=(logp + 0.02 * rng.standard_normal(length)).astype(np.float32),
                    spans=(Span(0, 0, length),),
                    finish_reason="length" if length == LONGEST else "stop",
                )
            )
        verdicts = tuple(
            Verdict(status=Status.VERIFIER_ERROR if s is None else Status.PARTIAL, score=s)
            for s in scores
        )
        groups.append(Group(prompt=prompt, completions=tuple(answers), verdicts=verdicts))
    return groups


def logprobs(policy: Any, prompt: Sequence[int], answer: np.ndarray) -> Tensor:
    """[n] of an answer's tokens, by a pass over this sequence alone."""
    ids = torch.tensor([[*prompt, *answer.tolist()]])
    logits = policy(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    return torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0]


Answers = list[tuple[Group, Completion, float]]
"""Answers with a score, and that score."""


def plain_step(path: str, groups: Sequence[Group], config: Config, plan: Plan) -> dict[str, Tensor]:
    """The parameters after all updates of the step."""
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    optim = config.optim
    adam = torch.optim.AdamW(
        policy.parameters(),
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    advantages = plan.advantages(groups)
    with torch.no_grad():
        frozen = {
            id(c): logprobs(reference, g.prompt.token_ids, c.token_ids)
            for g in groups
            for c in g.completions
        }
    for _ in range(config.schedule.epochs):
        for part in np.array_split(np.arange(len(groups)), config.schedule.minibatches):
            rows = [(groups[i], c, a) for i in part for c, a in advantages[i]]
            if not any(float(torch.as_tensor(a).abs().max()) for _, _, a in rows):
                continue
            terms, lengths = [], []
            for group, answer, advantage in rows:
                logp = logprobs(policy, group.prompt.token_ids, answer.token_ids)
                old = (
                    frozen[id(answer)]
                    if plan.recompute
                    else torch.from_numpy(answer.logprobs).double()
                )
                terms.append(plan.loss(logp, old, frozen[id(answer)], torch.as_tensor(advantage)))
                lengths.append(len(logp))
            adam.zero_grad()
            plan.mean(terms, lengths).backward()
            adam.step()
    return {name: parameter.detach() for name, parameter in policy.named_parameters()}


def token_mean(terms: list[Tensor], lengths: list[int]) -> Tensor:
    return torch.stack([t.sum() for t in terms]).sum() / sum(lengths)


def sequence_mean(terms: list[Tensor], lengths: list[int]) -> Tensor:
    return torch.stack([t.sum() / n for t, n in zip(terms, lengths, strict=True)]).mean()


def sequence_sum(terms: list[Tensor], lengths: list[int]) -> Tensor:
    return torch.stack([t.sum() for t in terms]).mean()


def over_longest(terms: list[Tensor], lengths: list[int]) -> Tensor:
    return sequence_sum(terms, lengths) / LONGEST


def clipped(low: float, high: float, sequence: bool = False) -> Callable[..., Tensor]:
    def loss(logp: Tensor, old: Tensor, reference: Tensor, advantage: Tensor) -> Tensor:
        log_ratio = (logp - old).mean().expand(len(logp)) if sequence else logp - old
        ratio = log_ratio.exp()
        return -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - low, 1 + high))

    return loss


def cispo(logp: Tensor, old: Tensor, reference: Tensor, advantage: Tensor) -> Tensor:
    return -(logp - old).exp().clamp(0, 5).detach() * advantage * logp


def reinforce(logp: Tensor, old: Tensor, reference: Tensor, advantage: Tensor) -> Tensor:
    return -advantage * logp


def with_kl(logp: Tensor, old: Tensor, reference: Tensor, advantage: Tensor) -> Tensor:
    gap = reference - logp
    return clipped(0.2, 0.2)(logp, old, reference, advantage) + 0.1 * (gap.exp() - 1 - gap)


def normalised(
    divide: bool, others: bool = False, penalty: bool = False
) -> Callable[..., list[Any]]:
    """Score minus the mean of its group, over the deviation, or minus the mean of the others;
    groups without a signal out."""

    def advantages(groups: Sequence[Group]) -> list[list[tuple[Completion, float]]]:
        found = []
        for group in groups:
            scored = [
                (c, v.score)
                for c, v in zip(group.completions, group.verdicts, strict=True)
                if v.score is not None
            ]
            if penalty:  # the last fifth of LONGEST tokens is 2: 8 tokens cost half a point, 9 one
                scored = [(c, s - max(0.0, (len(c) - (LONGEST - 2)) / 2)) for c, s in scored]
            values = torch.tensor([s for _, s in scored], dtype=torch.float64)
            mean = (values.sum() - values) / (len(values) - 1) if others else values.mean()
            result = (values - mean) / (values.std() + 1e-6 if divide else 1.0)
            found.append([(c, float(a)) for (c, _), a in zip(scored, result, strict=True)])
        return found

    return advantages


def whitened_returns(groups: Sequence[Group]) -> list[list[tuple[Completion, Tensor]]]:
    """REINFORCE++ without discount: every token of an answer has its score, shifted and scaled over
    all tokens."""
    rows = [
        [
            (c, v.score)
            for c, v in zip(g.completions, g.verdicts, strict=True)
            if v.score is not None
        ]
        for g in groups
    ]
    tokens = torch.tensor(
        [s for row in rows for c, s in row for _ in range(len(c))], dtype=torch.float64
    )
    white = [
        [(c, (s - tokens.mean()) / (tokens.var() + 1e-8).sqrt()) for c, s in row] for row in rows
    ]
    return [[(c, a.expand(len(c))) for c, a in row] for row in white]


class Plan(SimpleNamespace):
    """How plain PyTorch goes about it."""

    advantages: Callable[..., list[Any]]
    loss: Callable[..., Tensor]
    mean: Callable[[list[Tensor], list[int]], Tensor]
    recompute: bool = False


CASES: dict[str, tuple[dict[str, Any], Plan]] = {
    "grpo": ({}, Plan(advantages=normalised(True), loss=clipped(0.2, 0.2), mean=sequence_mean)),
    "dr_grpo": ({}, Plan(advantages=normalised(False), loss=clipped(0.2, 0.2), mean=over_longest)),
    "dapo": (
        {"filter": {"dynamic_sampling": False}},
        Plan(advantages=normalised(True, penalty=True), loss=clipped(0.2, 0.28), mean=token_mean),
    ),
    "gspo": (
        {"filter": {"zero_variance": False}, "schedule": {"epochs": 2}},
        Plan(
            advantages=normalised(True),
            loss=clipped(3e-4, 4e-4, sequence=True),
            mean=sequence_mean,
            recompute=True,
        ),
    ),
    "cispo": (
        {"schedule": {"minibatches": 2}},
        Plan(advantages=normalised(True), loss=cispo, mean=token_mean),
    ),
    "rloo": (
        {},
        Plan(advantages=normalised(False, others=True), loss=reinforce, mean=sequence_sum),
    ),
    "reinforce_pp": (
        {"schedule": {"minibatches": 2, "epochs": 2}},
        Plan(advantages=whitened_returns, loss=clipped(0.2, 0.2), mean=token_mean),
    ),
    "grpo with kl": (
        {"kl": {"place": "loss", "coef": 0.1, "bound": None}, "schedule": {"epochs": 2}},
        Plan(advantages=normalised(True), loss=with_kl, mean=sequence_mean),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_plain_pytorch(model: str, name: str) -> None:
    changes, plan = CASES[name]
    tree = {
        "name": "t",
        "model": {"path": model},
        "data": {"source": "arithmetic"},
        "algorithm": name.split()[0],
        "rollout": {"group_size": 4, "max_response_length": LONGEST},
        "optim": {"lr": 1e-2, "eps": 0.1, "grad_clip": 1e9, "weight_decay": 0.1},
        **changes,
    }
    config = resolve(tree)
    groups = sampled(model)
    trained = with_advantages(config, groups)
    objective = Objective.of(config.loss, config.kl, config.offpolicy)
    with learner(model, config) as rank:

        async def publish(wait: bool) -> dict[str, float]:
            return {}

        run: Any = SimpleNamespace(
            config=config,
            learners=rank,
            progress=Progress(),
            publish=publish,
            tracker=SimpleNamespace(spans=Spans(None)),
        )
        metrics = asyncio.run(update(run, trained, objective))
        found = {
            key.removeprefix("model."): value.full_tensor().clone()
            for key, value in rank.policy.state_dict().items()
        }
    kept = {group.prompt.id for group in trained}
    expected = plain_step(
        model, [group for group in groups if group.prompt.id in kept], config, plan
    )
    start = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).state_dict()
    moved = max(float((expected[key] - start[key]).abs().max()) for key in expected)
    assert moved > 1e-4 and metrics["training/updates"] > 0
    apart = max(float((found[key] - expected[key]).abs().max()) for key in expected)

    assert apart < 1e-6 * moved, f"apart by {apart:.1e} after a move of {moved:.1e}"


def test_the_deviation_of_a_step_is_of_all_its_scores() -> None:
    """Of 16 scores, 8 of them 1: mean .5, deviation with N - 1 .5164; the groups without a signal
    count in it and leave."""

    def group(number: int, scores: str) -> Group:
        answers = tuple(
            Completion(
                prompt_id="",
                sample=i,
                token_ids=np.array([5], np.int32),
                logprobs=np.zeros(1, np.float32),
                spans=(Span(0, 0, 1),),
                finish_reason="stop",
            )
            for i in range(4)
        )
        verdicts = tuple(Verdict(status=Status.PARTIAL, score=float(s)) for s in scores)
        prompt = Prompt(id=str(number), token_ids=(3,), answer="", source="s")
        return Group(prompt=prompt, completions=answers, verdicts=verdicts)

    groups = [group(i, scores) for i, scores in enumerate(("1111", "0000", "1110", "0001"))]
    tree = {
        "name": "t",
        "model": {"path": "x"},
        "data": {"source": "arithmetic"},
        "advantage": {"std": "batch", "eps": 0},
    }
    third, fourth = with_advantages(resolve(tree), groups)
    deviation = (16 * 0.25 / 15) ** 0.5
    assert third.advantages == pytest.approx([0.25 / deviation] * 3 + [-0.75 / deviation])
    assert fourth.advantages == pytest.approx([-0.25 / deviation] * 3 + [0.75 / deviation])
