"""What every engine must do, on the embedded one and on real vLLM: the same tests, against
transformers in float32."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rollout.samples import Completion, Prompt, Sampling, Span
from emberl.rollout.weights.changes import between
from emberl.rollout.weights.patch import (
    CorruptPatchError,
    DigestMismatchError,
    VersionError,
    WeightPatch,
    dense_patch,
)
from transformers import AutoTokenizer, RepetitionPenaltyLogitsProcessor

MakePrompt = Callable[..., Prompt]
GREEDY = Sampling(max_tokens=40, temperature=0.0)
LONG = Sampling(max_tokens=200)
CLOSE = 1e-4


async def collect(engine: Any, prompt: Prompt, n: int, sampling: Sampling) -> list[Completion]:
    return sorted(
        [c async for c in engine.generate_all([(prompt, n, sampling)])], key=lambda c: c.sample
    )


def started(
    engine: Any, prompt: Prompt, n: int, sampling: Sampling
) -> asyncio.Task[list[Completion]]:
    return asyncio.create_task(collect(engine, prompt, n, sampling))


def tokens(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.token_ids.tolist() for completion in completions]


def sampled_logprobs(
    logits: torch.Tensor, token_ids: list[int], sampling: Sampling, before: Sequence[int] = ()
) -> np.ndarray:
    """[T, V] -> [T] log-prob of each token after repetition penalty, temperature, min-p, top-k and
    top-p; `before` are the prompt's tokens."""
    logits = logits.double()
    if sampling.repetition_penalty != 1:
        ids = [[*before, *token_ids[:i]] for i in range(len(token_ids))]
        penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        logits = torch.cat(
            [penalty(torch.tensor([i]), row[None]) for i, row in zip(ids, logits, strict=True)]
        )
    logits = logits / (sampling.temperature or 1.0)
    if sampling.min_p:
        probabilities = logits.softmax(-1)
        unlikely = probabilities < sampling.min_p * probabilities.max(-1, keepdim=True).values
        logits = logits.masked_fill(unlikely, -torch.inf)
    if sampling.top_k:
        logits = logits.masked_fill(
            logits < logits.topk(sampling.top_k, -1).values[:, -1:], -torch.inf
        )
    if sampling.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(
            -1, order, before >= sampling.top_p
        )
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits.log_softmax(-1).gather(-1, torch.tensor(token_ids)[:, None]).squeeze(-1).numpy()


def expected_logprobs(
    model: Any, prompt: Prompt, completion: Completion, sampling: Sampling
) -> np.ndarray:
    ids = completion.token_ids.tolist()
    logits = model.logits([*prompt.token_ids, *ids])[len(prompt.token_ids) - 1 : -1]
    return sampled_logprobs(logits, ids, sampling, prompt.token_ids)


@torch.no_grad()
def continued_logprobs(old: Any, new: Any, prompt: Prompt, completion: Completion) -> np.ndarray:
    """Log-probs where the first span is by `old` and the rest by `new` on the keys and values that
    `old` made."""
    ids = [*prompt.token_ids, *completion.token_ids.tolist()]
    # the last old token was drawn, but not yet read
    seen = len(prompt.token_ids) + completion.spans[0].stop - 1
    first = old.reference(torch.tensor([ids[:seen]]), use_cache=True)
    rest = new.reference(torch.tensor([ids[seen:]]), past_key_values=first.past_key_values)
    logits = torch.cat((first.logits[0], rest.logits[0])).float()[len(prompt.token_ids) - 1 : -1]
    return sampled_logprobs(logits, completion.token_ids.tolist(), Sampling(max_tokens=1))


def test_greedy_tokens_are_those_of_transformers(rig: Any, make_prompt: MakePrompt) -> None:
    rig.serve(rig.old)
    for length in (1, 5, 40, 100):
        prompt = make_prompt(f"greedy{length}", length)
        [completion] = rig.run(collect(rig.engine, prompt, 1, GREEDY))
        ids = torch.tensor([prompt.token_ids])
        mask = torch.ones_like(ids)
        generated = rig.old.reference.generate(
            ids, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=None
        )
        assert completion.token_ids.tolist() == generated[0, length:].tolist()
        assert completion.finish_reason == "length"
        expected = expected_logprobs(rig.old, prompt, completion, GREEDY)
        np.testing.assert_allclose(completion.logprobs, expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=60),
        Sampling(max_tokens=60, temperature=0.7),
        Sampling(max_tokens=60, temperature=1.3, top_k=5),
        Sampling(max_tokens=60, temperature=1.1, top_p=0.8),
        Sampling(max_tokens=60, top_k=8, top_p=0.7),
        Sampling(max_tokens=60, temperature=1.2, min_p=0.1),
        Sampling(max_tokens=60, min_p=0.05, top_k=9, top_p=0.9, repetition_penalty=1.3),
        Sampling(max_tokens=60, temperature=0.0, repetition_penalty=1.1),
    ],
)
def test_logprobs_are_of_the_distribution_that_was_sampled(
    sampling: Sampling, rig: Any, make_prompt: MakePrompt
) -> None:
    rig.serve(rig.old)
    prompt = make_prompt("sampled", 12)
    for completion in rig.run(collect(rig.engine, prompt, 4, sampling)):
        expected = expected_logprobs(rig.old, prompt, completion, sampling)
        np.testing.assert_allclose(completion.logprobs, expected, atol=CLOSE, rtol=0)


def test_a_group_is_n_samples_fixed_by_seed_prompt_and_index(
    rig: Any, make_prompt: MakePrompt
) -> None:
    rig.serve(rig.old)
    prompt, sampling = make_prompt("group"), Sampling(max_tokens=20, seed=3)
    group = rig.run(collect(rig.engine, prompt, 6, sampling))
    assert [completion.sample for completion in group] == list(range(6))
    assert len({tuple(t) for t in tokens(group)}) == 6
    assert tokens(rig.run(collect(rig.engine, prompt, 6, sampling))) == tokens(group)
    assert tokens(rig.run(collect(rig.engine, prompt, 2, sampling))) == tokens(group)[:2]
    for other in (replace(sampling, seed=4), sampling):
        renamed = replace(prompt, id="other") if other is sampling else prompt
        assert not {tuple(t) for t in tokens(rig.run(collect(rig.engine, renamed, 6, other)))} & {
            tuple(t) for t in tokens(group)
        }


def test_draws_follow_the_probabilities(rig: Any, make_prompt: MakePrompt) -> None:
    rig.serve(rig.old)
    prompt = make_prompt("draws", 7)
    drawn = Counter(
        c.token_ids[0] for c in rig.run(collect(rig.engine, prompt, 600, Sampling(max_tokens=1)))
    )
    probabilities = rig.old.logits(list(prompt.token_ids))[-1].softmax(-1).numpy()
    frequencies = np.array([drawn[i] for i in range(len(probabilities))]) / 600
    assert np.abs(frequencies - probabilities).sum() < 0.25  # expected about 0.12


def test_prompts_beyond_one_step(rig: Any, make_prompt: MakePrompt) -> None:
    """More tokens than vLLM reads at a time: on a CPU, reading a prompt in pieces would end it."""
    rig.serve(rig.old)
    prompts = [make_prompt(f"long{i}", 210 + i) for i in range(4)]
    sampling = Sampling(max_tokens=4, seed=1)

    async def scenario() -> list[Completion]:
        return [
            c async for c in rig.engine.generate_all([(prompt, 1, sampling) for prompt in prompts])
        ]

    for completion in rig.run(scenario()):
        expected = expected_logprobs(
            rig.old, prompts[int(completion.prompt_id[-1])], completion, sampling
        )
        np.testing.assert_allclose(completion.logprobs, expected, atol=CLOSE, rtol=0)


def test_only_the_given_tokens_stop(rig: Any, make_prompt: MakePrompt) -> None:
    rig.serve(rig.old)
    prompt = make_prompt("stop")
    [free] = rig.run(collect(rig.engine, prompt, 1, LONG))
    assert free.finish_reason == "length" and len(free) == 200
    assert 1 in free.token_ids  # <eos> is a token like any other unless it is asked to stop
    for stop in ((1,), (9, 1)):
        [completion] = rig.run(collect(rig.engine, prompt, 1, replace(LONG, stop_token_ids=stop)))
        end = min(free.token_ids.tolist().index(token) for token in stop) + 1
        assert completion.finish_reason == "stop"
        assert completion.token_ids.tolist() == free.token_ids[:end].tolist()
    [completion] = rig.run(
        collect(
            rig.engine, prompt, 1, Sampling(max_tokens=1, stop_token_ids=(int(free.token_ids[0]),))
        )
    )
    assert completion.finish_reason == "stop" and len(completion) == 1


STOPPED = [
    ({"temperature": 0.0, "repetition_penalty": 1.2}, (8, 11), ()),
    ({"seed": 5}, (60, 64), ()),
    ({"seed": 6, "min_p": 0.02}, (120, 123), (1,)),
    ({"seed": 7}, (197, 200), ()),
]


@pytest.mark.parametrize(("changes", "stops_at", "stop_token_ids"), STOPPED)
def test_strings_stop_where_the_text_has_them(
    changes: dict[str, Any],
    stops_at: tuple[int, int],
    stop_token_ids: tuple[int, ...],
    rig: Any,
    make_prompt: MakePrompt,
) -> None:
    """The tokens are those of answers without a stop string, up to the one that completes it, over
    characters and a tag."""
    rig.serve(rig.old)
    tokenizer = AutoTokenizer.from_pretrained(rig.old.folder)
    prompt, sampling = make_prompt("string", 9), replace(LONG, **changes)
    free = rig.run(collect(rig.engine, prompt, 4, sampling))
    said = [[tokenizer.decode(c.token_ids[:n]) for n in range(201)] for c in free]
    start, end = stops_at
    stop = (
        tokenizer.decode(free[0].token_ids[start:end]),
        tokenizer.decode(prompt.token_ids) + "x",
        "</think>",
    )
    wanted = replace(sampling, stop=stop, stop_token_ids=stop_token_ids)
    for whole, texts, completion in zip(
        free, said, rig.run(collect(rig.engine, prompt, 4, wanted)), strict=True
    ):
        ends = [n for n in range(201) if any(string in texts[n] for string in stop)]
        ends += [n + 1 for n in np.flatnonzero(whole.token_ids == 1) if stop_token_ids]
        count = min(ends, default=200)
        assert completion.token_ids.tolist() == whole.token_ids[:count].tolist()
        assert completion.finish_reason == ("stop" if ends else "length")
        np.testing.assert_allclose(completion.logprobs, whole.logprobs[:count], atol=CLOSE, rtol=0)
        assert completion.spans == (Span(rig.engine.version, 0, count),)
        assert completion.sample or (completion.finish_reason == "stop" and count <= end)


BAD_REQUESTS: list[tuple[dict[str, Any], int, Sampling, str]] = [
    ({}, 1, Sampling(max_tokens=252), "above max_model_len=256"),
    ({"token_ids": ()}, 1, GREEDY, "has no tokens"),
    ({"token_ids": (4, 23)}, 1, GREEDY, "token 23 is outside the vocabulary"),
    ({}, 0, GREEDY, "n=0"),
    ({}, 1, replace(GREEDY, temperature=-1.0), "temperature=-1"),
    ({}, 1, replace(GREEDY, top_p=0.0), "top_p=0"),
    ({}, 1, replace(GREEDY, min_p=2.0), "min_p=2"),
    ({}, 1, replace(GREEDY, repetition_penalty=0.0), "repetition_penalty=0"),
    ({}, 1, replace(GREEDY, stop=("a", "")), "an empty string would end every answer"),
]


@pytest.mark.parametrize(("changes", "n", "sampling", "words"), BAD_REQUESTS)
def test_what_cannot_be_served_is_refused(
    changes: dict[str, Any],
    n: int,
    sampling: Sampling,
    words: str,
    rig: Any,
    make_prompt: MakePrompt,
) -> None:
    with pytest.raises(ValueError, match=words):
        rig.run(collect(rig.engine, replace(make_prompt("bad"), **changes), n, sampling))


def test_an_update_in_flight_keeps_requests_and_cache(rig: Any, make_prompt: MakePrompt) -> None:
    before = rig.serve(rig.old)
    prompts = [make_prompt(f"flight{i}", 40) for i in range(2)]

    async def scenario() -> list[Completion]:
        async with rig.unhurried():
            groups = [started(rig.engine, prompt, 3, LONG) for prompt in prompts]
            await rig.until_tokens(40)
            assert await rig.engine.apply(rig.new.patch(before + 1)) == before + 1
        return [completion for group in groups for completion in await group]

    completions = rig.run(scenario())
    assert len(completions) == 6
    both = [completion for completion in completions if completion.spans[0].version == before]
    assert len(both) == 4  # as many as are decoded at a time; the others had not begun
    for completion in completions:
        prompt = prompts[int(completion.prompt_id[-1])]
        if completion in both:
            edge = completion.spans[0].stop
            assert (
                completion.spans == (Span(before, 0, edge), Span(before + 1, edge, 200))
                and 1 < edge < 200
            )
            expected = continued_logprobs(rig.old, rig.new, prompt, completion)
        else:
            assert completion.spans == (Span(before + 1, 0, 200),)
            expected = expected_logprobs(rig.new, prompt, completion, LONG)
        np.testing.assert_allclose(completion.logprobs, expected, atol=CLOSE, rtol=0)


def test_versions_follow_one_another_without_a_pause(rig: Any, make_prompt: MakePrompt) -> None:
    before = rig.serve(rig.old)

    async def scenario() -> list[Completion]:
        async with rig.unhurried():
            task = started(rig.engine, make_prompt("several"), 4, LONG)
            for version in range(before + 1, before + 4):
                await rig.until_tokens(12)
                model = rig.new if (version - before) % 2 else rig.old
                assert await rig.engine.apply(model.patch(version)) == version == rig.engine.version
        return await task

    for completion in rig.run(scenario()):
        versions = [span.version for span in completion.spans]
        assert versions == list(range(before, before + 4))


def test_what_is_asked_during_an_update_waits_for_it(rig: Any, make_prompt: MakePrompt) -> None:
    before = rig.serve(rig.old)

    async def scenario() -> list[Completion]:
        update = asyncio.create_task(rig.engine.apply(rig.new.patch(before + 1)))
        groups = []
        while not update.done():
            groups.append(
                started(rig.engine, make_prompt(f"during{len(groups)}"), 1, Sampling(max_tokens=3))
            )
            await asyncio.sleep(0.002)
        await update
        return [completion for group in groups for completion in await group]

    completions = rig.run(scenario())
    assert completions and {c.spans[-1].version for c in completions} <= {before, before + 1}
    assert completions[-1].spans == (Span(before + 1, 0, 3),)


def test_no_prompt_is_continued_from_older_weights(rig: Any, make_prompt: MakePrompt) -> None:
    """The prompt is cached by the old weights, and asked for again by others, which are then taken
    back."""
    prompt = make_prompt("cached", 100)
    results = []
    for model in (rig.old, rig.new, rig.old):
        rig.serve(model)
        for _ in range(2):
            group = rig.run(collect(rig.engine, prompt, 3, Sampling(max_tokens=20)))
            for completion in group:
                expected = expected_logprobs(model, prompt, completion, Sampling(max_tokens=20))
                np.testing.assert_allclose(completion.logprobs, expected, atol=CLOSE, rtol=0)
        results.append(tokens(group))
    assert results[0] == results[2] != results[1]


def test_abort_returns_what_was_decoded_and_ends_the_stream(
    rig: Any, make_prompt: MakePrompt
) -> None:
    before = rig.serve(rig.old)
    gone, kept = make_prompt("gone"), make_prompt("kept")

    async def scenario() -> tuple[list[Completion], list[Completion], list[Completion]]:
        async with rig.unhurried():
            cut, whole = started(rig.engine, gone, 6, LONG), started(rig.engine, kept, 2, LONG)
            await rig.until_tokens(40)
            await rig.engine.apply(rig.new.patch(before + 1))
            await rig.until_tokens(40)
            partial = await rig.engine.abort(["gone", "unknown"])
        assert await rig.engine.abort(["gone"]) == []
        return partial, await cut, await whole

    partial, cut, whole = rig.run(scenario())
    assert cut == []
    assert [len(completion) for completion in whole] == [200, 200]
    assert sorted(completion.sample for completion in partial) == list(range(6))
    assert {completion.finish_reason for completion in partial} == {"abort"}
    begun = [completion for completion in partial if len(completion)]
    assert len(begun) == 4  # as many as are decoded at a time
    for completion in begun:
        assert len(completion) < 200 and [span.version for span in completion.spans] == [
            before,
            before + 1,
        ]
        expected = continued_logprobs(rig.old, rig.new, gone, completion)
        np.testing.assert_allclose(completion.logprobs, expected, atol=CLOSE, rtol=0)


def test_aborted_samples_go_on_from_where_they_stood(rig: Any, make_prompt: MakePrompt) -> None:
    """Aborted under one version, continued under the next, which reads what there is anew; then cut
    and continued again."""
    before = rig.serve(rig.old)
    prompt, other = make_prompt("parked", 40), make_prompt("fresh")
    sampling = replace(LONG, seed=5)

    async def go_on(parts: Sequence[Completion]) -> list[Completion]:
        requests = [(prompt, 99, sampling), (other, 1, Sampling(max_tokens=3))]
        found = [c async for c in rig.engine.generate_all(requests, {"parked": parts})]
        assert sorted((c.prompt_id, c.sample) for c in found)[0] == ("fresh", 0) and len(
            found
        ) == 1 + len(parts)
        return sorted([c for c in found if c.prompt_id == "parked"], key=lambda c: c.sample)

    async def scenario() -> tuple[list[Completion], list[Completion], list[Completion]]:
        async with rig.unhurried():
            task = started(rig.engine, prompt, 6, sampling)
            await rig.until_tokens(40)
            first = sorted(await rig.engine.abort(["parked"]), key=lambda c: c.sample)
            assert await task == []
            await rig.engine.apply(rig.new.patch(before + 1))
            again = asyncio.create_task(go_on(first))
            await rig.until_tokens(40)
            second = sorted(await rig.engine.abort(["parked"]), key=lambda c: c.sample)
            again.cancel()
        return first, second, await go_on(second)

    first, second, whole = rig.run(scenario())
    assert [c.sample for c in whole] == list(range(6)) and {
        c.finish_reason for c in first + second
    } == {"abort"}
    for one, two, three in zip(first, second, whole, strict=True):
        assert len(three) == 200 and three.finish_reason == "length"
        edge = len(one)
        assert three.token_ids.tolist()[: len(two)] == two.token_ids.tolist()
        assert two.token_ids.tolist()[:edge] == one.token_ids.tolist()
        old_span = (Span(before, 0, edge),) if edge else ()
        assert three.spans == (*old_span, Span(before + 1, edge, 200))
        expected = expected_logprobs(rig.old, prompt, one, sampling)
        np.testing.assert_allclose(three.logprobs[:edge], expected, atol=CLOSE, rtol=0)
        expected = expected_logprobs(rig.new, prompt, three, sampling)
        np.testing.assert_allclose(three.logprobs[edge:], expected[edge:], atol=CLOSE, rtol=0)
        drawn = three.token_ids.tolist()
        assert edge == 0 or drawn[edge : 2 * edge] != drawn[:edge], "the same draws came twice"


def test_a_consumer_that_leaves_frees_its_slots(rig: Any, make_prompt: MakePrompt) -> None:
    rig.serve(rig.old)

    async def scenario() -> list[Completion]:
        async for _ in rig.engine.generate_all(
            [(make_prompt("short"), 1, Sampling(max_tokens=2)), (make_prompt("left"), 3, LONG)]
        ):
            break
        async with rig.unhurried():
            task = started(rig.engine, make_prompt("left"), 4, LONG)
            await rig.until_tokens(20)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return await collect(rig.engine, make_prompt("next"), 4, Sampling(max_tokens=3))

    assert [len(completion) for completion in rig.run(scenario())] == [3] * 4


def test_what_is_refused_leaves_the_old_weights_served(rig: Any, make_prompt: MakePrompt) -> None:
    before = rig.serve(rig.old)
    good = rig.new.patch(before + 1)
    name = "model.layers.1.self_attn.k_proj.weight"
    flipped = good.tensors[name].data.copy()
    flipped[100] ^= 1
    cases: list[tuple[WeightPatch, type[Exception], str]] = [
        (
            replace(
                good, tensors={**good.tensors, name: replace(good.tensors[name], data=flipped)}
            ),
            DigestMismatchError,
            name,
        ),
        (
            replace(good, tensors={k: t for k, t in good.tensors.items() if k != name}),
            DigestMismatchError,
            name,
        ),
        (
            replace(good, digests={**good.digests, "lm_head.weight": "0" * 32}),
            DigestMismatchError,
            "lm_head",
        ),
        (replace(good, run_id="other"), VersionError, "run other.*run run"),
        (replace(good, version=before - 1), VersionError, f"{before - 1} after {before}"),
        (
            replace(good, base_version=before - 1),
            VersionError,
            f"builds on {before - 1}.*serves {before}",
        ),
        (replace(good, version=before), DigestMismatchError, f"version {before}"),
        (
            replace(
                good, tensors={**good.tensors, name: replace(good.tensors[name], dtype="BF16")}
            ),
            ValueError,
            "got BF16",
        ),
    ]
    prompt = make_prompt("refused")
    [served] = rig.run(collect(rig.engine, prompt, 1, GREEDY))

    async def scenario() -> list[Completion]:
        async with rig.unhurried():
            task = started(rig.engine, make_prompt("meanwhile"), 4, LONG)
            await rig.until_tokens(20)
            for patch, error, words in cases:
                with pytest.raises(error, match=words):
                    await rig.engine.apply(patch)
        assert rig.engine.version == before
        return await task

    assert {completion.spans for completion in rig.run(scenario())} == {(Span(before, 0, 200),)}
    assert rig.engine.digests() == rig.old.patch(0).digests
    assert tokens(rig.run(collect(rig.engine, prompt, 1, GREEDY))) == tokens([served])
    assert rig.run(rig.engine.apply(rig.old.patch(before))) == before
    assert rig.run(rig.engine.apply(good)) == before + 1
    assert rig.engine.digests() == good.digests


def test_a_patch_of_some_tensors(rig: Any, make_prompt: MakePrompt) -> None:
    before = rig.serve(rig.old)
    whole = rig.new.patch(before + 1)
    changed = {k: t for k, t in whole.tensors.items() if "norm" in k or "layers.1" in k}
    rest = {k: t for k, t in whole.tensors.items() if k not in changed}
    mixed = {k: d for k, d in rig.old.patch(0).digests.items() if k in rest} | {
        k: whole.digests[k] for k in changed
    }
    assert (
        rig.run(
            rig.engine.apply(replace(whole, tensors=changed, digests=mixed, base_version=before))
        )
        == before + 1
    )
    last = replace(whole, version=before + 2, tensors=rest, base_version=before + 1)
    assert rig.run(rig.engine.apply(last)) == before + 2
    prompt = make_prompt("some", 10)
    [completion] = rig.run(collect(rig.engine, prompt, 1, GREEDY))
    np.testing.assert_allclose(
        completion.logprobs,
        expected_logprobs(rig.new, prompt, completion, GREEDY),
        atol=CLOSE,
        rtol=0,
    )


def test_positions_and_values(rig: Any, make_prompt: MakePrompt) -> None:
    """They are written in place: what it decodes then is what it decodes of the same weights loaded
    whole, bit for bit; what is bad among them is refused, and the old weights go on."""
    before = rig.serve(rig.old)
    old, new = rig.old.tensors(), rig.new.tensors()
    after = {}
    for key, held in old.items():
        data = held.data.copy()
        data.view(np.uint32)[::7] = new[key].data.view(np.uint32)[::7]
        after[key] = replace(held, data=data)
    good = replace(
        dense_patch("run", before + 1, after.items()),
        tensors={},
        changes={key: between(old[key], after[key]) for key in old},
        base_version=before,
        verified=True,
    )
    name = "model.layers.1.self_attn.k_proj.weight"
    change = good.changes[name]

    def bad(**what: Any) -> WeightPatch:
        return replace(good, changes={**good.changes, name: replace(change, **what)})

    stray = {**good.changes, "model.stray.weight": change}
    meant = between(after[name], old[name])
    cases: list[tuple[WeightPatch, type[Exception], str]] = [
        (bad(positions=change.positions + 100_000), CorruptPatchError, f"{name}: .*outside"),
        (bad(positions=change.positions[::-1].copy()), CorruptPatchError, f"{name}: .*ascend"),
        (bad(positions=change.positions // 14 * 14), CorruptPatchError, f"{name}: .*repeating"),
        (bad(checksum=change.checksum + 1), CorruptPatchError, f"{name}: .*checksum"),
        (replace(good, changes=stray), ValueError, r"model\.stray\.weight is not a tensor of this"),
    ]
    ids = list(make_prompt("written", 40).token_ids)
    served = rig.run(rig.engine.probe(ids))

    async def scenario() -> tuple[list[Completion], Any]:
        for patch, error, words in cases:
            with pytest.raises(error, match=words):
                await rig.engine.apply(patch)
        assert rig.engine.version == before
        np.testing.assert_array_equal(await rig.engine.probe(ids), served)
        if rig.kind != "embedded":  # whose memory would then be damaged
            other = replace(good, changes={**good.changes, name: meant})
            with pytest.raises(DigestMismatchError, match=f"{name}: element .* is not what"):
                await rig.engine.apply(other)
            np.testing.assert_array_equal(await rig.engine.probe(ids), served)
        async with rig.unhurried():
            task = started(rig.engine, make_prompt("meanwhile"), 4, LONG)
            await rig.until_tokens(20)
            assert await rig.engine.apply(good) == before + 1
        return await task, await rig.engine.probe(ids)

    decoded, written = rig.run(scenario())
    seen = {tuple(span.version for span in completion.spans) for completion in decoded}
    assert seen <= {(before,), (before, before + 1)}, "each token has the version it was drawn with"
    assert rig.engine.digests() == good.digests
    if rig.kind != "embedded":
        assert rig.engine._weights.processes.in_place.elsewhere == {}, (
            "every tensor of this model has a place"
        )
    rig.run(rig.engine.apply(dense_patch("run", before + 2, after.items())))
    np.testing.assert_array_equal(rig.run(rig.engine.probe(ids)), written)
    assert np.abs(written - served).max() > 0.1


def test_probe(rig: Any, make_prompt: MakePrompt) -> None:
    prompt = list(make_prompt("probe", 70).token_ids)
    for model in (rig.old, rig.new):
        rig.serve(model)
        expected = sampled_logprobs(model.logits(prompt)[:-1], prompt[1:], Sampling(max_tokens=1))
        np.testing.assert_allclose(rig.run(rig.engine.probe(prompt)), expected, atol=CLOSE, rtol=0)
