"""Episodes of several turns on one loop: the pool, a worker without Ray, and the embedded engine or
one that says what it is told; which tokens are whose, what a broken environment costs, and that one
turn is the plain case."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny, tiny_tokenizer
from emberl.rollout.crew import Job
from emberl.rollout.embedded.engine import EmbeddedEngine
from emberl.rollout.embedded.model import Decoder
from emberl.rollout.engine import Partials, Request
from emberl.rollout.environments import Environment, Episodes, Step, whole
from emberl.rollout.pool import RolloutPool
from emberl.rollout.samples import Completion, Prompt, Sampling, Span, merge_spans
from emberl.rollout.stops import StopStrings
from emberl.rollout.vllm_backend.requests import Decoded, samples_of
from emberl.rollout.weights.patch import WeightPatch, dense_patch
from emberl.rollout.worker import GroupService
from hypothesis import given, settings
from hypothesis import strategies as st

END, ASK = 1, 9
"""Tokens that end a turn, and that begin an observation here."""
MakeDecoder = Callable[..., Decoder]
MakePrompt = Callable[..., Prompt]


class Scripted:
    """An engine that gives each sample what `script` has for it next, token by token, and looks at
    what it is to go on from."""

    joined = None

    def __init__(self, script: Mapping[int, Sequence[Sequence[int]]]) -> None:
        self.script, self.version, self.read = script, 0, list[tuple[int, ...]]()

    async def generate_all(
        self,
        requests: Sequence[Request],
        partials: Partials | None = None,
    ) -> AsyncIterator[Completion]:
        for prompt, n, sampling in requests:
            parts = (partials or {}).get(prompt.id) or [empty(prompt, i) for i in range(n)]
            assert len(parts) == n
            for part in parts:
                self.read.append((*prompt.token_ids, *part.token_ids.tolist()))
                had = len(part)
                turn = sum(t == ASK for t in part.token_ids.tolist())
                fresh = list(self.script[part.sample][turn])[: sampling.max_tokens - had]
                total = had + len(fresh)
                yield replace(
                    part,
                    token_ids=np.append(part.token_ids, np.array(fresh, np.int32)),
                    logprobs=np.append(part.logprobs, np.full(len(fresh), -0.5 - turn, np.float32)),
                    spans=merge_spans([*part.spans, Span(self.version, had, total)]),
                    finish_reason="stop" if fresh[-1] == END else "length",
                    loss_mask=None,  # engines know of no masks
                )
            self.version += 1  # weights change between any two groups

    async def abort(self, prompt_ids: Any) -> list[Completion]:
        return []


def empty(prompt: Prompt, sample: int) -> Completion:
    none = np.zeros(0)
    return Completion(
        prompt_id=prompt.id,
        sample=sample,
        token_ids=none.astype(np.int32),
        logprobs=none.astype(np.float32),
        spans=(),
        finish_reason="abort",
    )


class Remote:
    """A worker's actor, without Ray."""

    def __init__(self, service: GroupService) -> None:
        self.service = service

    @property
    def generate(self) -> Remote:
        return self

    def options(self, **_: Any) -> Remote:
        return self

    async def remote(self, requests: Any, partials: Any) -> AsyncIterator[Any]:
        async for groups in self.service.generate(requests, partials):
            reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            reply.set_result(groups)
            yield reply


def pool_of(engine: Any, **settings: Any) -> RolloutPool:
    return RolloutPool(
        [Remote(GroupService(engine))], timeout=120.0, sync_timeout=120.0, **settings
    )


def episodes(make: Callable[[], Any], *, max_turns: int = 4, timeout: float = 60.0) -> Episodes:
    return Episodes(
        make,
        text=lambda tokens, reason: " ".join(map(str, tokens[:-1] if reason == "stop" else tokens)),
        observe=lambda observation, last: (
            [ASK, *map(int, observation.split())] if observation else []
        ),
        max_turns=max_turns,
        timeout=timeout,
    )


class Listener(Environment):
    """Goes on as long as the turn holds a 7, answering with how many tokens it had."""

    heard: list[str] = []  # noqa: RUF012

    def step(self, text: str) -> Step:
        self.heard.append(text)
        tokens = text.split()
        return str(len(tokens)), 0.25, "7" not in tokens


def play(
    engine: Any,
    make: Callable[[], Any],
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    **more: Any,
) -> Any:
    pool = pool_of(engine)
    pool.episodes = episodes(make, **more)
    return asyncio.run(generated(pool, prompts, n, sampling))


async def generated(
    pool: RolloutPool, prompts: Sequence[Prompt], n: int, sampling: Sampling
) -> list[tuple[Completion, ...]]:
    """The groups, in the order of the prompts."""
    found = [(number, group) async for number, group in pool.generate(prompts, n, sampling)]
    return [group for _, group in sorted(found, key=lambda pair: pair[0])]


def test_a_two_turn_episode_token_by_token(make_prompt: MakePrompt) -> None:
    engine = Scripted({0: [[7, 5, END], [4, END]], 1: [[8, END]]})
    Listener.heard = []
    prompt = make_prompt("a", 3)
    [(long, short)] = play(
        engine, Listener, [prompt], 2, Sampling(max_tokens=20, stop_token_ids=(END,))
    )
    assert long.token_ids.tolist() == [7, 5, END, ASK, 2, 4, END]
    assert long.mask.tolist() == [True, True, True, False, False, True, True]
    assert long.logprobs.tolist() == [-0.5, -0.5, -0.5, 0, 0, -1.5, -1.5]
    assert long.spans == (Span(0, 0, 5), Span(1, 5, 7)), (
        "each turn its weights; an observation those before it"
    )
    assert (
        long.sampled_by_version == [(0, 3), (1, 2)]
        and long.num_sampled == 5
        and long.last_turn == 5
    )
    assert long.finish_reason == "stop" and long.episode is not None
    assert (long.episode.turns, long.episode.reward, long.episode.status) == ((0, 5), 0.5, "done")
    said = [(m["role"], m["content"]) for m in long.episode.messages]
    assert said == [("assistant", "7 5"), ("user", "2"), ("assistant", "4")]
    assert engine.read[-1] == (*prompt.token_ids, 7, 5, END, ASK, 2), (
        "the sample's own tokens, and the observation's"
    )
    assert sorted(Listener.heard) == ["4", "7 5", "8"]
    assert short.token_ids.tolist() == [8, END] and short.mask.all() and short.episode is not None
    assert (short.episode.turns, short.episode.reward) == ((0,), 0.25)


def test_a_turn_may_begin_before_the_one_before_has_left_the_worker(
    make_prompt: MakePrompt,
) -> None:
    prompt, limit = make_prompt("a"), Sampling(max_tokens=20, stop_token_ids=(END,))

    async def two_turns() -> tuple[list[Any], Any]:
        service = GroupService(Scripted({0: [[8, END]], 1: [[7, END], [4, END]]}))
        first = service.generate([(prompt, 2, limit)])
        [(_, group)] = await anext(first)
        asked = replace(
            group[1],
            token_ids=np.append(group[1].token_ids, np.int32(ASK)),
            logprobs=np.append(group[1].logprobs, np.float32(0)),
            spans=(Span(0, 0, 3),),
            loss_mask=np.array([True, True, False]),
        )
        second = service.generate([(prompt, 1, limit)], {"a": [asked]})
        turn = asyncio.create_task(anext(second))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        left = [groups async for groups in first]
        return left, await turn

    left, [(_, (went_on,))] = asyncio.run(asyncio.wait_for(two_turns(), 60))
    assert left == [] and went_on.sample == 1
    assert went_on.token_ids.tolist() == [7, END, ASK, 4, END]


def test_vllm_reads_the_same_tokens_and_keeps_them(make_prompt: MakePrompt) -> None:
    """What is sent to its processes for a second turn, and what is made of their answer; a turn has
    draws of its own."""
    prompt, sampling = make_prompt("a", 3), Sampling(max_tokens=20, seed=3)
    first = replace(
        empty(prompt, 1),
        token_ids=np.array([7, END, ASK, 2], np.int32),
        logprobs=np.array([-1, -2, 0, 0], np.float32),
        spans=(Span(4, 0, 4),),
        loss_mask=np.array([True, True, False, False]),
    )
    none: asyncio.Queue[Any] = asyncio.Queue()
    (second,) = samples_of([(prompt, 1, sampling)], {"a": [first]}, none, StopStrings(None))
    fresh = next(iter(samples_of([(prompt, 2, sampling)], {}, none, StopStrings(None))))
    assert (
        second.token_ids == [*prompt.token_ids, 7, END, ASK, 2]
        and second.wanted == 16
        and second.number == 1
    )
    assert second.seed != fresh.seed
    second.tokens = 2
    made = second.completion(Decoded([5, END], [-0.5, -0.25], "stop"), 6)
    assert made.token_ids.tolist() == [7, END, ASK, 2, 5, END]
    assert made.logprobs.tolist() == [-1, -2, 0, 0, -0.5, -0.25]
    assert made.spans == (Span(4, 0, 4), Span(6, 4, 6))
    assert whole(made, first).mask.tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize(
    ("first", "max_tokens", "max_turns", "tokens", "reason", "status"),
    [
        ([7, END], 20, 1, [7, END], "stop", "max_turns"),
        ([7, 7, 7], 3, 4, [7, 7, 7], "length", "length"),
        ([7, END], 4, 4, [7, END], "length", "length"),
        ([7, END], 5, 4, [7, END, ASK, 1, 7], "length", "length"),
        ([6, END], 2, 1, [6, END], "stop", "done"),
    ],
    ids=["turns", "cut", "no room for the observation", "room for one token", "done"],
)
def test_every_end_of_an_episode(
    first: list[int],
    max_tokens: int,
    max_turns: int,
    tokens: list[int],
    reason: str,
    status: str,
    make_prompt: MakePrompt,
) -> None:
    engine = Scripted({0: [first, [7, 7, 7]]})
    limit = Sampling(max_tokens=max_tokens, stop_token_ids=(END,))
    [(completion,)] = play(engine, Listener, [make_prompt("a")], 1, limit, max_turns=max_turns)
    assert completion.token_ids.tolist() == tokens and completion.finish_reason == reason
    assert completion.episode is not None and completion.episode.status == status


class Bad(Environment):
    """Does what the row's answer says."""

    def reset(self, prompt: Prompt) -> None:
        self.how = prompt.answer
        if self.how == "reset":
            raise KeyError("no such row")

    def step(self, text: str) -> Any:
        match self.how:
            case "raises":
                raise RuntimeError("the tool is down")
            case "exits":
                raise SystemExit(3)
            case "sleeps":
                time.sleep(60)
        return {
            "none": None,
            "two": ("a", 1.0),
            "nan": ("", float("nan"), True),
            "text": ("", "1.0", True),
            "array": ("", np.ones(3), True),
            "done": ("", 1.0, "yes"),
            "number": (5, 1.0, False),
            "unreadable": ("x", None, False),
            "silent": ("", None, False),
            "numpy": ("", np.float32(1.0), np.bool_(True)),
            "fine": ("", 1.0, True),
        }[self.how]


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ("reset", "error", "KeyError: 'no such row'"),
        ("raises", "error", "RuntimeError: the tool is down"),
        ("exits", "error", "SystemExit: 3"),
        ("sleeps", "timeout", "no step within 0.3 s"),
        ("none", "bad_reply", "step must return (observation, reward, done), not None"),
        ("two", "bad_reply", "step must return (observation, reward, done), not ('a', 1.0)"),
        ("nan", "bad_reply", "a reward must be a finite number or None, not nan"),
        ("text", "bad_reply", "a reward must be a finite number or None, not '1.0'"),
        ("array", "bad_reply", "a reward must be a finite number or None"),
        ("done", "bad_reply", "done must be true or false, not 'yes'"),
        ("number", "bad_reply", "an observation must be a text, not 5"),
        ("unreadable", "bad_reply", "invalid literal"),
        ("silent", "bad_reply", "an observation without any token"),
        ("numpy", "done", ""),
    ],
)
def test_a_broken_environment_costs_its_own_episode(
    how: str, status: str, message: str, make_prompt: MakePrompt
) -> None:
    engine = Scripted({0: [[5, END]], 1: [[5, END]]})
    prompts = [replace(make_prompt("bad"), answer=how), replace(make_prompt("fine"), answer="fine")]
    limit = Sampling(max_tokens=20, stop_token_ids=(END,))
    bad, fine = play(engine, Bad, prompts, 2, limit, timeout=0.3 if how == "sleeps" else 60.0)
    for completion in bad:
        assert completion.episode is not None and completion.episode.status == status
        assert completion.episode.message.startswith(message) and completion.token_ids.tolist() == [
            5,
            END,
        ]
    assert [c.episode.status for c in fine if c.episode] == ["done", "done"]


def test_environments_that_hang_stop_being_called(
    make_prompt: MakePrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emberl.rollout.environments.AT_ONCE", 2)
    engine = Scripted({i: [[5, END]] for i in range(6)})
    prompt = replace(make_prompt("a"), answer="sleeps")
    start = time.monotonic()
    [group] = play(
        engine, Bad, [prompt], 6, Sampling(max_tokens=9, stop_token_ids=(END,)), timeout=0.2
    )
    assert time.monotonic() - start < 5
    assert {c.episode.message for c in group if c.episode} == {
        "no step within 0.2 s",
        "2 earlier steps are stuck",
    }


class Talks(Environment):
    """Three turns, whatever is said."""

    def reset(self, prompt: Prompt) -> None:
        self.turn = 0

    def step(self, text: str) -> Step:
        self.turn += 1
        return "3 4", 1.0, self.turn == 3


SEEDED = Sampling(max_tokens=40, stop_token_ids=tuple(range(12)), seed=5)
"""Half of all tokens end a turn."""


def embedded(make_decoder: MakeDecoder) -> EmbeddedEngine:
    return EmbeddedEngine(make_decoder(0), max_num_seqs=8, max_model_len=64, run_id="run")


def test_the_embedded_engine_goes_on_as_one_long_sequence(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    prompts = [make_prompt(name) for name in "abc"]
    groups = play(embedded(make_decoder), Talks, prompts, 4, SEEDED)
    again = play(embedded(make_decoder), Talks, prompts, 4, SEEDED)
    decoder = make_decoder(0)
    seen = 0
    for prompt, group, other in zip(prompts, groups, again, strict=True):
        for completion, repeated in zip(group, other, strict=True):
            assert np.array_equal(completion.token_ids, repeated.token_ids), (
                "a run repeats, whatever the clock says"
            )
            assert np.array_equal(completion.logprobs, repeated.logprobs)
            whole = torch.tensor([[*prompt.token_ids, *completion.token_ids.tolist()]])
            expected = decoder.token_logprobs(whole)[0, len(prompt.token_ids) - 1 :].numpy()
            mask = completion.mask
            np.testing.assert_allclose(completion.logprobs[mask], expected[mask], atol=1e-6)
            assert not completion.logprobs[~mask].any()
            seen += int((~mask).sum())
    assert seen > 30, "observations were among them"


def test_a_stop_string_ends_its_own_turn_only(tmp_path: Path) -> None:
    """Also where the observation has one, or the beginning of one; its last token is part of the
    turn."""
    model = make_tiny(
        tmp_path, TinyConfig(hidden=32, head_dim=16, intermediate=48, layers=2), seed=2
    )
    tokenizer = tiny_tokenizer(TinyConfig())
    digits = set(tokenizer.encode("0123456789"))

    class Asks(Talks):
        def step(self, text: str) -> Step:
            said = tokenizer.encode("12+")
            return " ".join(map(str, said)), *super().step(text)[1:]

    engine = EmbeddedEngine(model, max_num_seqs=8, max_model_len=64, dtype="float32")
    sampling = Sampling(max_tokens=50, stop=tuple("0123456789"), stop_token_ids=(END,), seed=1)
    [group] = play(
        engine, Asks, [Prompt(id="a", token_ids=(4, 5), answer="", source="t")], 6, sampling
    )
    turns = 0
    for completion in group:
        assert completion.episode is not None
        tokens, mask = completion.token_ids.tolist(), completion.mask
        for start, stop in pairwise([*completion.episode.turns, len(tokens)]):
            turn = [
                t for t, known in zip(tokens[start:stop], mask[start:stop], strict=True) if known
            ]
            assert not digits & set(turn[:-1]), "none ended late"
            turns += turn[-1] in digits
    assert turns > 6, "several turns of a sample ended so"


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 4),
    groups=st.integers(1, 4),
    max_tokens=st.integers(1, 30),
)
def test_one_turn_is_the_plain_case(
    seed: int,
    n: int,
    groups: int,
    max_tokens: int,
    make_decoder: MakeDecoder,
    make_prompt: MakePrompt,
) -> None:
    sampling = Sampling(max_tokens=max_tokens, stop_token_ids=(END, 2, 3), seed=seed)
    prompts = [make_prompt(f"p{i}", 3 + i) for i in range(groups)]
    plain = asyncio.run(generated(pool_of(embedded(make_decoder)), prompts, n, sampling))
    played = play(embedded(make_decoder), Environment, prompts, n, sampling)
    for one, other in zip(
        [c for g in plain for c in g], [c for g in played for c in g], strict=True
    ):
        assert np.array_equal(one.token_ids, other.token_ids) and np.array_equal(
            one.logprobs, other.logprobs
        )
        assert (
            one.spans == other.spans
            and one.finish_reason == other.finish_reason
            and other.mask.all()
        )
        assert (
            other.episode is not None
            and other.episode.turns == (0,)
            and other.episode.reward is None
        )


def patch_of(decoder: Decoder, version: int) -> WeightPatch:
    copied = {name: decoder.tensor_bytes(name) for name in decoder.weights}
    return dense_patch(
        "run", version, [(n, replace(t, data=t.data.copy())) for n, t in copied.items()]
    )


def test_weights_that_change_between_turns_are_recorded_for_each_turn(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    engine = embedded(make_decoder)
    pool = pool_of(engine, max_samples=100)

    async def play() -> Completion:
        loop = asyncio.get_running_loop()

        class Updates(Talks):
            def step(self, text: str) -> Step:
                reply = super().step(text)
                patch = patch_of(make_decoder(self.turn), self.turn)
                asyncio.run_coroutine_threadsafe(engine.apply(patch), loop).result(10)
                return reply

        pool.episodes = episodes(Updates)
        [(completion,)] = await generated(pool, [make_prompt("a")], 1, SEEDED)
        return completion

    completion = asyncio.run(play())
    assert completion.episode is not None
    _, second, third = completion.episode.turns
    assert [span.version for span in completion.spans] == [0, 1, 2]
    assert [span.start for span in completion.spans] == [
        0,
        second,
        third,
    ] and completion.oldest_version == 0


class Dies(Remote):
    """Is lost with its second request, once."""

    requests = 0

    async def remote(self, requests: Any, partials: Any) -> AsyncIterator[Any]:
        Dies.requests += 1
        if Dies.requests == 2:
            raise TimeoutError("gone")
        async for reply in super().remote(requests, partials):
            yield reply


def test_a_lost_worker_costs_one_turn_which_is_drawn_again(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    [undisturbed] = play(embedded(make_decoder), Talks, [make_prompt("a")], 3, SEEDED)
    Dies.requests = 0
    service = GroupService(embedded(make_decoder))
    pool = RolloutPool(
        [Dies(service)],
        timeout=20.0,
        sync_timeout=20.0,
        respawn=lambda i: Remote(service),
        max_restarts=1,
    )
    pool.episodes = episodes(Talks)
    [group] = asyncio.run(generated(pool, [make_prompt("a")], 3, SEEDED))
    assert pool.restarts == 1
    for one, other in zip(undisturbed, group, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids) and one.episode == other.episode


def test_a_group_is_cut_while_its_environments_answer(make_prompt: MakePrompt) -> None:
    engine = Scripted({0: [[7, END], [8, END]], 1: [[8, END]]})
    pool = pool_of(engine)
    answering: list[float] = []

    class Slow(Environment):
        def step(self, text: str) -> Step:
            answering.append(time.monotonic())
            time.sleep(0.5)
            return "1", None, text == "8"

    pool.episodes = episodes(Slow)
    came: list[Any] = []
    limit = Sampling(max_tokens=20, stop_token_ids=(END,))

    async def play() -> list[tuple[Completion, ...]]:
        job = Job(prompt=make_prompt("a"), n=2, sampling=limit, was_cut=came.append)
        pool.submit([job])
        while len(answering) < 2:
            await asyncio.sleep(0.01)
        pool.cut([job])
        await asyncio.sleep(1.0)
        assert job.outcome.cancelled()
        return await generated(pool, [make_prompt("b")], 2, limit)

    [other] = asyncio.run(play())
    assert came == [()], "told once that it was cut, with no turn that is over"
    assert [c.token_ids.tolist() for c in other] == [[7, END, ASK, 1, 8, END], [8, END]], (
        "the pool goes on"
    )
