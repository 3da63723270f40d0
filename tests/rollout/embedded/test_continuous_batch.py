"""Continuous batching: exact log-probs, slots, prefill once, the same tokens whatever the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from emberl.rollout.embedded.engine import EmbeddedEngine
from emberl.rollout.embedded.kv_cache import KVCache, PromptState
from emberl.rollout.embedded.model import Decoder
from emberl.rollout.samples import Completion, Prompt, Sampling, Span

MakeDecoder = Callable[..., Decoder]
MakePrompt = Callable[..., Prompt]


def by_sample(completions: list[Completion]) -> list[Completion]:
    return sorted(completions, key=lambda completion: (completion.prompt_id, completion.sample))


def teacher_forced(decoder: Decoder, prompt: Prompt, completion: Completion) -> np.ndarray:
    ids = torch.tensor([[*prompt.token_ids, *completion.token_ids.tolist()]])
    return decoder.token_logprobs(ids)[0, len(prompt.token_ids) - 1 :].numpy()


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_logprobs_are_those_of_a_full_forward_in_float64(
    make_decoder: MakeDecoder, make_prompt: MakePrompt, slots: int
) -> None:
    decoder = make_decoder()
    engine = EmbeddedEngine(decoder, max_num_seqs=slots, max_model_len=70)
    prompts = {f"p{i}": make_prompt(f"p{i}", length) for i, length in enumerate((1, 2, 9, 17, 33))}
    for i, prompt in enumerate(prompts.values()):
        engine.submit(prompt, 2, Sampling(max_tokens=6 * i + 1, stop_token_ids=(5,)))
    completions = engine.run()
    assert len(completions) == 10
    for completion in completions:
        exact = teacher_forced(decoder, prompts[completion.prompt_id], completion)
        # The engine's own values are float64; a completion stores float32.
        np.testing.assert_array_max_ulp(completion.logprobs, exact.astype(np.float32), 1)


def test_decode_equals_full_forward_to_1e_9(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder(num_key_value_heads=1)
    decoder.reserve(40)
    ids = torch.randint(1, 24, (3, 40), generator=torch.Generator().manual_seed(4))
    cache = KVCache(decoder.arch, 3, 40, torch.float64, torch.device("cpu"))
    empty = torch.zeros(2, 1, 0, 16, dtype=torch.float64)
    for slot in range(3):
        cache.fill(slot, slot + 1, PromptState(keys=empty, values=empty, logits=empty))
    rows = []
    with torch.inference_mode():
        for position in range(39):
            positions = torch.full((3,), position)
            cache.fit(position + 1, 3)
            cache.open(positions)
            logits = decoder.logits(decoder.forward(ids[:, position], positions, cache.attend))
            rows.append(torch.log_softmax(logits, -1).gather(1, ids[:, position + 1, None]))
    assert (torch.cat(rows, 1) - decoder.token_logprobs(ids)).abs().max() < 1e-9


def test_float32_logprobs_agree_with_transformers(make_prompt: MakePrompt, tmp_path: Path) -> None:
    config = transformers.Qwen3Config(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.4,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    engine = EmbeddedEngine(tmp_path, max_num_seqs=5, max_model_len=64, dtype="float32")
    prompts = {f"p{i}": make_prompt(f"p{i}", 3 + 5 * i) for i in range(4)}
    for i, prompt in enumerate(prompts.values()):
        engine.submit(prompt, 3, Sampling(max_tokens=30 - 5 * i))
    for completion in engine.run():
        prompt = prompts[completion.prompt_id]
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids.tolist()]])
        with torch.inference_mode():
            logp = torch.log_softmax(model(ids).logits, -1)[0, len(prompt.token_ids) - 1 : -1]
        expected = logp.gather(1, ids[0, len(prompt.token_ids) :, None]).squeeze(1).numpy()
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4, rtol=0)

    greedy = Sampling(max_tokens=20, temperature=0)
    for prompt in prompts.values():
        engine.submit(prompt, 1, greedy)
    for completion in engine.run():
        ids = torch.tensor([prompts[completion.prompt_id].token_ids])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            min_new_tokens=20,
            eos_token_id=None,
        )
        assert completion.token_ids.tolist() == out[0, ids.shape[1] :].tolist()


def test_the_same_run_gives_the_same_bits(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    def run(slots: int, dtype: torch.dtype) -> list[Completion]:
        engine = EmbeddedEngine(make_decoder(dtype=dtype), max_num_seqs=slots, max_model_len=64)
        for i in range(6):
            engine.submit(
                make_prompt(f"p{i}", 3 + 2 * i),
                3,
                Sampling(max_tokens=5 + 3 * i, stop_token_ids=(3,), seed=1),
            )
        return engine.run()

    for first, second in zip(run(7, torch.bfloat16), run(7, torch.bfloat16), strict=True):
        assert (first.prompt_id, first.sample) == (second.prompt_id, second.sample)
        np.testing.assert_array_equal(first.token_ids, second.token_ids)
        np.testing.assert_array_equal(first.logprobs, second.logprobs)
    few, many = by_sample(run(2, torch.float64)), by_sample(run(32, torch.float64))
    for first, second in zip(few, many, strict=True):
        np.testing.assert_array_equal(first.token_ids, second.token_ids)
        np.testing.assert_allclose(first.logprobs, second.logprobs, atol=1e-6)


def test_samples_of_a_group_and_seeds_differ(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    engine = EmbeddedEngine(make_decoder(), max_num_seqs=16, max_model_len=64)
    for seed in (0, 1):
        engine.submit(make_prompt("p"), 8, Sampling(max_tokens=12, seed=seed))
    assert len({tuple(completion.token_ids) for completion in engine.run()}) == 16


def test_a_prompt_is_computed_once_for_its_group(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    engine = EmbeddedEngine(make_decoder(), max_num_seqs=3, max_model_len=64)
    for name, length, n in (("a", 11, 8), ("b", 4, 5)):
        engine.submit(make_prompt(name, length), n, Sampling(max_tokens=7))
    assert len(engine.run()) == 13
    assert engine.counters.prefill_tokens == 11 + 4
    # The first token of a sample comes from its prompt's pass, each other one from a decode step.
    assert engine.counters.decode_tokens == 13 * 6


def test_a_freed_slot_is_taken_at_once(make_decoder: MakeDecoder, make_prompt: MakePrompt) -> None:
    engine = EmbeddedEngine(make_decoder(), max_num_seqs=2, max_model_len=64)
    lengths = [9, 3, 4, 5, 1]
    for i, length in enumerate(lengths):
        engine.submit(make_prompt(f"p{i}"), 1, Sampling(max_tokens=length))
    finished = [completion.prompt_id for completion in engine.run()]
    # Steps beside p0's eight: p1 two, then p2 three, then p3 three of its four; p4 needs none, and
    # takes the slot that p0 leaves. Static batches of two would take 8 + 4 + 0 steps.
    assert engine.counters.decode_steps == 9
    assert engine.counters.decode_tokens == sum(length - 1 for length in lengths)
    assert finished == ["p1", "p2", "p0", "p4", "p3"]


def test_stop_token_is_the_last_token_and_the_reason(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    engine = EmbeddedEngine(make_decoder(), max_num_seqs=8, max_model_len=100)
    engine.submit(make_prompt("p"), 40, Sampling(max_tokens=6, stop_token_ids=(2, 7, 9)))
    engine.submit(make_prompt("q"), 4, Sampling(max_tokens=50))
    reasons = set()
    for completion in engine.run():
        hits = np.isin(completion.token_ids, (2, 7, 9))
        if completion.prompt_id == "q":
            assert completion.finish_reason == "length" and len(completion) == 50
            assert hits.any()  # another request's end tokens end nothing here
        elif completion.finish_reason == "stop":
            assert hits[-1] and not hits[:-1].any()
        else:
            assert not hits.any() and len(completion) == 6
        reasons.add(completion.finish_reason)
        assert completion.started <= completion.finished
    assert reasons == {"stop", "length"}


def test_engine_frequencies_match_the_model(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    decoder = make_decoder()
    engine = EmbeddedEngine(decoder, max_num_seqs=4000, max_model_len=16)
    prompt = make_prompt("p", 4)
    engine.submit(prompt, 4000, Sampling(max_tokens=2, top_k=4))
    completions = engine.run()
    first, second = np.array([completion.token_ids for completion in completions]).T
    ids = torch.tensor([[*prompt.token_ids, token, 0] for token in range(24)])
    logps = torch.stack(
        [decoder.token_logprobs(ids.index_fill(1, torch.tensor(5), t)) for t in range(24)], -1
    )
    top = torch.softmax(decoder.token_logprobs(ids)[:, 3].topk(4).values, 0).numpy()
    favourites = decoder.token_logprobs(ids)[:, 3].topk(4).indices.numpy()
    wanted, found = 4000 * top, np.array([(first == token).sum() for token in favourites])
    assert found.sum() == 4000
    assert ((found - wanted) ** 2 / wanted).sum() < 16.3  # 3 degrees of freedom: one in a thousand
    for token in favourites[:2]:  # the second token's distribution given the first
        chosen = second[first == token]
        best = logps[token, 4].topk(4)
        expected = len(chosen) * torch.softmax(best.values, 0).numpy()
        counted = np.array([(chosen == other).sum() for other in best.indices.numpy()])
        assert counted.sum() == len(chosen)
        assert ((counted - expected) ** 2 / expected).sum() < 16.3


def test_requests_that_cannot_be_served_are_refused(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    engine = EmbeddedEngine(make_decoder(), max_num_seqs=2, max_model_len=20)
    with pytest.raises(
        ValueError, match=r"p: 15 prompt tokens \+ max_tokens=6 is 21, above max_model_len=20"
    ):
        engine.submit(make_prompt("p", 15), 1, Sampling(max_tokens=6))
    with pytest.raises(ValueError, match="no tokens"):
        engine.submit(make_prompt("p", 0), 1, Sampling(max_tokens=6))
    with pytest.raises(ValueError, match="n=0"):
        engine.submit(make_prompt("p", 3), 0, Sampling(max_tokens=6))
    with pytest.raises(ValueError, match="token 24"):
        engine.submit(
            Prompt(id="p", token_ids=(3, 24), answer="", source=""), 1, Sampling(max_tokens=6)
        )
    engine.submit(make_prompt("p", 15), 1, Sampling(max_tokens=5))
    (completion,) = engine.run()
    assert completion.spans == (Span(0, 0, 5),)
