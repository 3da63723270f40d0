"""A real model, SmolLM2-135M-Instruct: the engine's tokens, the noise of bfloat16, and a run of two
steps from its GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emberl.kernels.platform import CPU, compute_dtype
from emberl.rl.config.data import DataConfig
from emberl.rl.data.templates import PromptWriter
from emberl.rl.weights.probe import Level
from emberl.rollout.embedded.engine import EmbeddedEngine
from emberl.rollout.embedded.model import Decoder
from emberl.rollout.samples import Prompt, Sampling
from small_system import Emberl, read_metrics
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

pytestmark = pytest.mark.slow

NEW, PROMPTS = 8, 64
END = 2


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    """Of about 25 tokens."""
    asked = [
        "What is {a}+{b}?",
        "Name {a} animals.",
        "Is {a} larger than {b}?",
        "Write a line about the number {a}.",
    ]
    return [
        tokenizer.apply_chat_template(
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": asked[i % 4].format(a=i + 2, b=3 * i)},
            ],
            add_generation_prompt=True,
            return_dict=False,
        )
        for i in range(PROMPTS)
    ]


def test_the_tokenizer_is_the_models_own(tokenizer: Any) -> None:
    """What its repository on the Hub says; digits stand alone, as does a run of spaces before
    them."""
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (1, END, 49152)
    pieces = tokenizer.convert_ids_to_tokens(
        tokenizer.encode("x =  12\n    3", add_special_tokens=False)
    )
    assert pieces == ["x", "Ġ=", "ĠĠ", "1", "2", "ĊĠĠĠĠ", "3"]
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert (
        shown
        == "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging"
        " Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_greedy_tokens_are_transformers_in_float32(
    smollm2: Path, reference: Any, prompts: list[list[int]]
) -> None:
    """64 prompts that the engine decodes together. Each token is the one that transformers finds
    likeliest after the tokens before it, so by induction they are its greedy answer."""
    engine = EmbeddedEngine(smollm2, dtype="float32", max_num_seqs=PROMPTS, max_model_len=96)
    sampling = Sampling(
        max_tokens=NEW, temperature=0.0, top_p=1.0, top_k=0, stop_token_ids=(END,), seed=0
    )
    for i, ids in enumerate(prompts):
        engine.submit(Prompt(id=str(i), token_ids=tuple(ids), answer="", source=""), 1, sampling)
    done = {int(completion.prompt_id): completion for completion in engine.run()}
    for i, ids in enumerate(prompts):
        answer = done[i].token_ids.tolist()
        assert len(answer) == NEW or answer[-1] == END
        with torch.no_grad():
            logits = reference(torch.tensor([ids + answer]), logits_to_keep=len(answer) + 1).logits[
                0, :-1
            ]
        assert logits.argmax(-1).tolist() == answer, f"prompt {i}"
        theirs = (
            torch.log_softmax(logits, -1).gather(-1, torch.tensor(answer)[:, None])[:, 0].numpy()
        )
        np.testing.assert_allclose(done[i].logprobs, theirs, atol=1e-4, rtol=0)


ASKED = [
    "Name two animals.",
    "What is 7+5?",
    "Write a line about rain.",
    "Is 9 larger than 4?",
    "Say hello in French.",
]
STOP = ("list. Th", "animal n", "ssic", "bé", "</answer>")


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_stops_prefixes_and_the_penalty_are_transformers(
    smollm2: Path, tokenizer: Any, reference: Any, penalty: float
) -> None:
    """Greedy answers that go on from a beginning, up to strings that begin and end within tokens,
    as `generate` has them."""
    settings = DataConfig(source="arithmetic", system_prompt="Be brief.", assistant_prefix="Well,")
    writer = PromptWriter(settings, tokenizer)
    asked = [
        writer.question(q, id=str(i), answer="", source="s", columns={})
        for i, q in enumerate(ASKED)
    ]
    engine = EmbeddedEngine(smollm2, dtype="float32", max_num_seqs=4, max_model_len=96)
    sampling = Sampling(
        max_tokens=16, temperature=0.0, repetition_penalty=penalty, stop_token_ids=(END,), stop=STOP
    )
    for prompt in asked:
        engine.submit(prompt, 1, sampling)
    done = {completion.prompt_id: completion for completion in engine.run()}
    ends = set()
    for prompt in asked:
        ids = torch.tensor([prompt.token_ids])
        said = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
            repetition_penalty=penalty,
            stop_strings=list(STOP),
            tokenizer=tokenizer,
        )[0, ids.shape[1] :]
        completion = done[prompt.id]
        assert completion.token_ids.tolist() == said.tolist(), prompt.messages
        text = tokenizer.decode(completion.token_ids)
        ends |= {stop for stop in STOP if stop in text}
        assert (completion.finish_reason == "stop") == (
            END in said or any(stop in text for stop in STOP)
        )
    assert len(ends) >= 2, "strings that ended answers"


def test_logprobs_after_min_p_and_the_penalty_are_transformers(
    smollm2: Path, reference: Any, prompts: list[list[int]]
) -> None:
    """Of sampled tokens under their warpers; every token is one that these leave."""
    warpers = [
        RepetitionPenaltyLogitsProcessor(1.15),
        TemperatureLogitsWarper(1.3),
        MinPLogitsWarper(0.1),
    ]
    sampling = Sampling(max_tokens=12, temperature=1.3, min_p=0.1, repetition_penalty=1.15, seed=11)
    engine = EmbeddedEngine(smollm2, dtype="float32", max_num_seqs=8, max_model_len=96)
    for i, ids in enumerate(prompts[:8]):
        engine.submit(Prompt(id=str(i), token_ids=tuple(ids), answer="", source=""), 1, sampling)
    for completion in engine.run():
        ids, answer = prompts[int(completion.prompt_id)], completion.token_ids.tolist()
        with torch.no_grad():
            logits = reference(torch.tensor([ids + answer]), logits_to_keep=len(answer) + 1).logits[
                0, :-1
            ]
        rows = []
        for i, row in enumerate(logits):
            for warper in warpers:
                row = warper(torch.tensor([ids + answer[:i]]), row.view(1, -1))
            rows.append(torch.log_softmax(row[0], -1)[answer[i]].item())
        np.testing.assert_allclose(completion.logprobs, rows, atol=2e-4, rtol=0)


def logprobs(model: Any, ids: Tensor) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].float()
    values: np.ndarray[Any, Any] = (
        torch.log_softmax(logits, -1).gather(-1, ids[1:, None])[:, 0].numpy()
    )
    return values


def test_logprobs_are_near_in_both_dtypes(
    smollm2: Path, reference: Any, prompts: list[list[int]]
) -> None:
    """In float32 to 1e-4 everywhere; in bfloat16 within the noise by which a probe knows right
    weights."""
    ids = torch.tensor([token for prompt in prompts[:4] for token in prompt])[:48]
    with torch.no_grad():
        single = Decoder.from_directory(smollm2, torch.float32).token_logprobs(ids[None])[0].numpy()
        half = (
            Decoder.from_directory(smollm2, torch.bfloat16)
            .token_logprobs(ids[None])[0]
            .float()
            .numpy()
        )
    np.testing.assert_allclose(single, logprobs(reference, ids), atol=1e-4, rtol=0)
    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    level = Level.between(half, logprobs(theirs, ids))
    assert 0 < level.logp < 0.05
    assert 0 < level.p < 0.02


REWARD = '''\
import re


def brief(data_source, solution_str, ground_truth, extra_info=None):
    """1 for the right number, a little less for every word; graders of verl have this signature."""
    numbers = re.findall(r"\\d+", solution_str)
    right = bool(numbers) and numbers[-1] == ground_truth
    words = len(solution_str.split())
    return {"score": right - 0.01 * words, "right": float(right), "words": words}
'''
CONFIG = """\
name: real
model: {path: MODEL}
data: {source: sums.jsonl, prompt_column: question, heldout: 4, max_prompt_length: 64}
rollout: {group_size: 4, max_response_length: 24, max_num_seqs: 16}
reward: {parts: {brief: {use: FOLDER/brief.py:brief}}}
schedule: {steps: 2, prompts_per_step: 4}
filter: {zero_variance: false}
optim: {lr: 1.0e-5, micro_batch_tokens: 1024}
eval: {every: 2, size: 4}
tracking: {wandb: disabled}
cluster: {device: cpu}
"""


def test_two_steps_on_a_real_model(emberl: Emberl, smollm2: Path) -> None:
    """With ten lines of a reward of one's own; plain transformers loads what was trained. In the
    dtype that this processor multiplies: without bfloat16 products it would take half an hour."""
    folder = emberl.folder
    (folder / "brief.py").write_text(REWARD)
    rows = [{"question": f"What is {a}+{a + 3}?", "answer": str(2 * a + 3)} for a in range(2, 22)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = folder / "real.yaml"
    config.write_text(CONFIG.replace("MODEL", str(smollm2)).replace("FOLDER", str(folder)))
    result = emberl.train(config=config)
    assert (result["status"], result["steps"]) == ("ok", 2)

    rows = read_metrics(folder / "run")
    for row in rows:
        assert row["sync/reloads"] == 0 and 0 < row["sync/probe_noise"] < 0.1
    assert all(np.isfinite(row["actor/grad_norm"]) for row in rows)
    samples = (folder / "run" / "samples.md").read_text()
    assert "| problem | answer | reference | verdict | score | parts |" in samples
    assert "im_start" not in samples and "helpful AI assistant" not in samples
    assert "| What is " in samples and "brief " in samples

    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "model", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "model")
    dtype = compute_dtype("auto", CPU)
    assert model.dtype == dtype and model.config.rope_parameters["rope_theta"] == 100000
    start = AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype)
    changed = sum(
        not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)
    )
    assert changed > 200, "of 272 tensors, some are of ones and stay"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 4+7?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    said = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip()
