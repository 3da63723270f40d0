"""Observations as tokens by the chat template's own markers, and what of an episode trains, is
marked and is counted."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rewards.episode import EnvironmentReward
from emberl.rewards.inputs import RewardInput
from emberl.rewards.suite import build_suite
from emberl.rewards.verdict import Status, Verdict
from emberl.rl.algorithm.losses import Objective
from emberl.rl.answers import AnswerReader, reward_input
from emberl.rl.batch import make_batch
from emberl.rl.config.algorithm import AdvantageConfig, LossConfig
from emberl.rl.config.data import DataConfig
from emberl.rl.config.load import ModelConfig, OptimConfig, resolve
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny, tiny_tokenizer
from emberl.rl.groups import Batch, Group
from emberl.rl.learner.model_loader import RankSpec
from emberl.rl.learner.rank import LearnerRank
from emberl.rl.trainer import staleness
from emberl.rl.user_environment import load_environment, observer
from emberl.rl.watch.lengths import read_lengths, record_lengths
from emberl.rl.watch.step_metrics import sample_metrics
from emberl.rollout.samples import Completion, Episode, Prompt, Span
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parents[1] / "plugins/example_environments.py"
SMALL = TinyConfig(
    hidden=32,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=16,
    intermediate=48,
    vocabulary="bytes",
    chat_template=True,
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}{% if"
    " add_generation_prompt %}<|im_start|>assistant\n{% if think is defined %}<think>{% endif %}{%"
    " endif %}"
)
LLAMA = (
    "{% for m in messages %}<h>{{ m.role }}</h>\n\n{{ m.content | trim }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}<h>assistant</h>\n\n{% endif %}"
)
GEMMA = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no such"
    " role') }}{% endif %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content |"
    " trim }}<end>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
TOOLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}<s>user\n<tool_response>{{ m.content"
    " }}</tool_response><eos>{% else %}<s>{{ m.role }}\n{{ m.content }}<eos>{% endif %}{% endfor"
    " %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
ANSWERS_ONLY = (
    "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}\n{% endif %}{% endfor %}"
)


def given(arguments: dict[str, Any] | None = None, **more: Any) -> DataConfig:
    return DataConfig(source="arithmetic", chat_template_kwargs=arguments or {}, **more)


@pytest.mark.parametrize(
    ("template", "role", "arguments", "last", "expected"),
    [
        (CHATML, "user", {}, "<eos>", "\n<|im_start|>user\nNOW<eos>\n<|im_start|>assistant\n"),
        (
            CHATML,
            "user",
            {"think": 1},
            "<eos>",
            "\n<|im_start|>user\nNOW<eos>\n<|im_start|>assistant\n<think>",
        ),
        (CHATML, "tool", {}, "x", "<eos>\n<|im_start|>tool\nNOW<eos>\n<|im_start|>assistant\n"),
        (LLAMA, "user", {}, "<eos>", "<eot><h>user</h>\n\nNOW<eot><h>assistant</h>\n\n"),
        (GEMMA, "user", {}, "<eos>", "<end>\n<turn>user\nNOW<end>\n<turn>model\n"),
        (
            TOOLS,
            "tool",
            {},
            "<eos>",
            "<s>user\n<tool_response>NOW</tool_response><eos><s>assistant\n",
        ),
        (None, "user", {}, "<eos>", "NOW"),
    ],
    ids=[
        "chatml",
        "arguments",
        "a turn without its end",
        "another end token",
        "gemma",
        "tools",
        "no template",
    ],
)
def test_an_observation_stands_between_the_templates_own_markers(
    template: str | None, role: str, arguments: dict[str, Any], last: str, expected: str
) -> None:
    tokenizer = tiny_tokenizer(SMALL)
    tokenizer.chat_template = template
    ids = observer(tokenizer, role, given(arguments))("NOW", tokenizer.encode(last)[0])
    assert tokenizer.decode(ids) == expected and ids == tokenizer.encode(
        expected, add_special_tokens=False
    )


def test_every_turn_begins_as_answers_begin() -> None:
    tokenizer = tiny_tokenizer(SMALL)
    tokenizer.chat_template = GEMMA
    end = tokenizer.encode("<eos>")[0]
    ids = observer(tokenizer, "user", given(assistant_prefix="<think>\n"))("NOW", end)
    assert tokenizer.decode(ids).endswith("<turn>model\n<think>\n")
    tokenizer.chat_template = CHATML
    written = given({"think": 1}, assistant_prefix="<think>")
    assert tokenizer.decode(observer(tokenizer, "user", written)("NOW", end)).count("<think>") == 1


@pytest.mark.parametrize(("template", "role"), [(GEMMA, "tool"), (ANSWERS_ONLY, "tool")])
def test_a_template_without_a_place_for_observations_is_refused_at_once(
    template: str, role: str
) -> None:
    tokenizer = tiny_tokenizer(SMALL)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="the chat template"):
        observer(tokenizer, role, given())


def test_qwen3s_own_template(qwen3_tokenizer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen3_tokenizer)
    if tokenizer.chat_template is None:
        pytest.skip("this copy of the tokenizer has no chat template")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = observer(tokenizer, "tool", given({"enable_thinking": False}))("42", end)
    assert (
        tokenizer.decode(ids)
        == "\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert ids.count(end) == 1, "its special tokens are tokens"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.such:Thing", "cannot be imported"),
        (f"{EXAMPLES}:Missing", "has no function 'Missing'"),
        ("emberl.rollout.samples:Span", "missing 3 required positional arguments"),
        ("builtins:dict", "has no method reset"),
    ],
)
def test_what_is_no_environment_is_said_before_the_run(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"rollout.environment={name}.*{message}"):
        load_environment(name)


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ("is it <calc>12*(3+4)</calc>?", ("84", None, False)),
        ("<calc>1/4</calc>", ("0.25", None, False)),
        ("<calc>1/0</calc>", ("error: float division by zero", None, False)),
        ("<calc>__import__('os')</calc>", ("error: only + - * / and brackets", None, False)),
        ("<calc>2**9**9</calc>", ("error: only + - * / and brackets", None, False)),
        ("so it is 84", ("", None, True)),
    ],
)
def test_the_calculator(says: str, expected: Any) -> None:
    assert load_environment(f"{EXAMPLES}:Calculator")().step(says) == expected


def test_the_guess_game() -> None:
    prompt = Prompt(id="a", token_ids=(3,), answer="6", source="t")
    played = []
    for turns in (["6"], ["2", "6"], ["9", "4"], ["none", "none"]):
        game = load_environment(f"{EXAMPLES}:GuessGame")()
        game.reset(prompt)
        played.append([game.step(text) for text in turns])
    assert played == [
        [("", 1.0, True)],
        [("+", None, False), ("", 0.8, True)],
        [("-", None, False), ("", 0.4, True)],
        [("-", None, False), ("", 0.0, True)],
    ]


def answer(
    tokens: list[int], mask: list[int], sample: int = 0, turns: tuple[int, ...] = (0,), **more: Any
) -> Completion:
    known = np.array(mask, bool)
    return Completion(
        prompt_id="a",
        sample=sample,
        token_ids=np.array(tokens, np.int32),
        logprobs=np.where(known, -1.0 - np.arange(len(tokens)), 0.0).astype(np.float32),
        spans=more.pop("spans", (Span(0, 0, len(tokens)),)),
        finish_reason="stop",
        loss_mask=known,
        episode=Episode(
            turns=turns,
            messages=({"role": "assistant", "content": "x"},) * (2 * len(turns) - 1),
            **more,
        ),
    )


DONE: dict[str, Any] = {"reward": 1.0, "status": "done"}
PROMPT = Prompt(id="a", token_ids=(30, 31), answer="4", source="t")


def two_turns() -> Group:
    """Three sampled tokens, two of an observation, two sampled; and one of a single turn of two."""
    return Group(
        prompt=PROMPT,
        completions=(
            answer([40, 41, 1, 50, 51, 42, 1], [1, 1, 1, 0, 0, 1, 1], turns=(0, 5), **DONE),
            answer([43, 1], [1, 1], 1, **DONE),
        ),
        verdicts=(
            Verdict(status=Status.CORRECT, score=1.0),
            Verdict(status=Status.WRONG, score=0.0),
        ),
        advantages=np.array([0.5, -2.0]),
    )


@pytest.mark.parametrize(
    ("aggregation", "long", "short"),
    [
        ("token-mean", 1 / 7, 1 / 7),
        ("seq-mean-token-mean", 1 / 10, 1 / 4),
        ("seq-mean-token-sum", 1 / 2, 1 / 2),
        ("seq-mean-token-sum-norm", 1 / 16, 1 / 16),
    ],
)
def test_observations_have_no_weight_in_any_denominator(
    aggregation: Any, long: float, short: float
) -> None:
    loss = LossConfig(aggregation=aggregation)
    batch = make_batch([two_turns()], loss, AdvantageConfig(), max_length=8)
    assert batch is not None
    assert batch.loss_mask_T.astype(int).tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1]
    assert batch.token_ids_T.tolist() == [30, 31, 40, 41, 1, 50, 51, 42, 1, 30, 31, 43, 1]
    assert batch.behaviour_logp_T.tolist() == [0, 0, -1, -2, -3, 0, 0, -6, -7, 0, 0, -1, -2]
    np.testing.assert_allclose(
        batch.weights_T, [0, 0, long, long, long, 0, 0, long, long, 0, 0, short, short]
    )
    assert batch.num_loss_tokens == 7


def learner_gradient(folder: Path, batch: Batch, loss: LossConfig) -> dict[str, torch.Tensor]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = ModelConfig(path=str(folder), dtype="float64")
    learner = LearnerRank(
        RankSpec(rank=0, world=1, device="cpu", threads=1, model=model, timeout=60.0)
    )
    learner.connect(f"127.0.0.1:{port}")
    try:
        learner.load(str(folder))
        learner.begin_stage(OptimConfig(micro_batch_tokens=64), 1)
        learner.backward(batch, Objective.of(loss, resolve_empty().kl, resolve_empty().offpolicy))
        named = learner.policy.model.named_parameters()
        return {name: p.grad.full_tensor() for name, p in named if p.grad is not None}
    finally:
        learner.close()


def resolve_empty() -> Any:
    return resolve({"name": "t", "model": {"path": "x"}, "data": {"source": "arithmetic"}})


def test_the_gradient_is_plain_torchs_with_the_mask(tmp_path: Path) -> None:
    """REINFORCE on both sequences, whose tokens are in one context each: the observation is read,
    and never predicted."""
    folder = make_tiny(tmp_path, SMALL, seed=3)
    loss = LossConfig(kind="reinforce", aggregation="token-mean", entropy_coef=0.01)
    batch = make_batch([two_turns()], loss, AdvantageConfig(), max_length=8)
    assert batch is not None
    found = learner_gradient(folder, batch, loss)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for completion, advantage in zip(two_turns().completions, (0.5, -2.0), strict=True):
        ids = torch.tensor([[*PROMPT.token_ids, *completion.token_ids.tolist()]])
        logp = model(ids).logits[0, :-1].log_softmax(-1)
        for t in np.flatnonzero(completion.mask) + len(PROMPT.token_ids):
            entropy = -(logp[t - 1].exp() * logp[t - 1]).sum()
            total = total - (advantage * logp[t - 1, ids[0, t]] + 0.01 * entropy) / 7
    total.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        np.testing.assert_allclose(
            found[name].numpy(), gradient.numpy(), rtol=0, atol=1e-9, err_msg=name
        )
    assert max(float(g.abs().max()) for g in expected.values() if g is not None) > 1e-3


def test_observations_are_in_no_figure_but_their_own(tmp_path: Path) -> None:
    group = two_turns()
    spans = (Span(1, 0, 5), Span(3, 5, 7))
    group = replace(
        group, completions=(replace(group.completions[0], spans=spans), group.completions[1])
    )
    found = sample_metrics([group], [group], [group.scores], longest=7, longest_prompt=9)
    assert (found["response_length/mean"], found["response_length/max"]) == (3.5, 5)
    assert found["response_length/clip_ratio"] == 0.5, "the limit is of the whole episode"
    assert (found["num_turns/mean"], found["observation_length/max"]) == (1.5, 2)
    assert found["perf/total_num_tokens"] == 2 * 2 + 7 + 2
    assert (found["episode/done"], found["episode/error"]) == (1.0, 0.0)
    ages = staleness(
        [replace(group, completions=group.completions[:1], verdicts=group.verdicts[:1])], 3, 2
    )
    assert ages == {"sched/staleness/mean": 2 * 3 / 5, "sched/staleness/max": 2.0}, (
        "of the sampled tokens"
    )
    rows = read_lengths(record_lengths(tmp_path, 1, 3, [group])).to_pylist()
    assert [row["response_length"] for row in rows] == [5, 2]
    assert (rows[0]["versions"], rows[0]["version_tokens"]) == ([1, 3], [3, 2])


@pytest.mark.parametrize(
    ("reward", "ended", "status", "score"),
    [
        (1.0, "done", Status.CORRECT, 1.0),
        (2.5, "max_turns", Status.CORRECT, 2.5),
        (0.4, "done", Status.PARTIAL, 0.4),
        (-1.0, "length", Status.WRONG, -1.0),
        (None, "length", Status.OVER_LIMIT, 0.0),
        (None, "max_turns", Status.OVER_LIMIT, 0.0),
        (None, "done", Status.VERIFIER_ERROR, None),
        ("no episode", "done", Status.VERIFIER_ERROR, None),
    ],
)
def test_the_environments_reward(
    reward: Any, ended: str, status: Status, score: float | None
) -> None:
    column = {} if reward == "no episode" else {"episode": {"reward": reward, "status": ended}}
    (verdict,) = EnvironmentReward()([RewardInput(completion="", columns=column)])
    assert (verdict.status, verdict.score) == (status, score)


def test_the_last_turn_is_marked_and_the_environment_may_be_a_part() -> None:
    """Both at once: half the environment's reward, half the verifier's; a failed environment has no
    verdict."""
    tokenizer = tiny_tokenizer(SMALL)
    said = ("is it 3?", "more", "\\boxed{4}")
    turns = [tokenizer.encode(text, add_special_tokens=False) for text in said]
    tokens = [*turns[0], *turns[1], *turns[2]]
    roles = ("assistant", "user", "assistant")
    messages = tuple(
        {"role": role, "content": text} for role, text in zip(roles, said, strict=True)
    )
    mask = [1] * len(turns[0]) + [0] * len(turns[1]) + [1] * len(turns[2])
    last = len(turns[0]) + len(turns[1])
    good = answer(tokens, mask, turns=(0, last), reward=0.5, status="done")
    assert good.episode is not None
    good = replace(good, episode=replace(good.episode, messages=messages))
    bad = answer(
        tokens, mask, 1, turns=(0, last), reward=0.5, status="timeout", message="no step within 1 s"
    )
    prompt = replace(PROMPT, messages=({"role": "user", "content": "which number?"},))
    parts = {
        "answer": {"use": "math", "weight": 0.5},
        "game": {"use": "environment", "weight": 0.5},
    }
    suite = build_suite(parts)
    reader = AnswerReader(tokenizer=tokenizer, rollout=resolve_empty().rollout, stop_token_ids=(1,))
    row = reader.marked(reward_input(prompt, tokenizer, ""), prompt, good)
    assert row.completion == "\\boxed{4}" and row.token_ids == tuple(turns[2])
    assert [m["content"] for m in row.messages] == ["which number?", "is it 3?", "more"]
    assert row.prompt == tokenizer.decode([30, 31, *turns[0], *turns[1]])
    assert row.columns["episode"] == {"reward": 0.5, "turns": 2, "status": "done"}
    group = reader.grade(prompt, [good, bad], suite, max_tokens=64)
    suite.close()
    assert (group.verdicts[0].status, group.verdicts[0].score) == (Status.CORRECT, 0.75)
    assert group.verdicts[1].status == Status.VERIFIER_ERROR
    assert group.verdicts[1].message == "rollout.environment, timeout: no step within 1 s"
