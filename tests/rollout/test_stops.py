"""Stop strings: token by token as in the whole text, over the tokens of real and of made-up
tokenizers, on the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emberl.kernels import platform
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny, tiny_tokenizer
from emberl.rollout.embedded.engine import EmbeddedEngine
from emberl.rollout.samples import Completion, Prompt, Sampling, Span
from emberl.rollout.stops import StopMatcher, StopStrings, cut, token_bytes
from emberl.rollout.vllm_backend.requests import Decoded, samples_of
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

# Tokens whose ends and beginnings make up many stop strings, and the bytes of characters of two to
# four bytes.
PIECES = [
    b"a",
    b"b",
    b"ab",
    b"aab",
    b"ba",
    b"\n",
    b"\n\n",
    b"",
    b"</",
    b"answer",
    b">",
    "é".encode(),
    *(bytes([byte]) for text in ("é", "中", "🙂") for byte in text.encode()),
]
STOPS = st.lists(st.text("ab\né中🙂</>answer", min_size=1, max_size=6), min_size=1, max_size=4)


def ended(matcher: StopMatcher, tokens: Sequence[int]) -> int | None:
    """How many tokens the answer has when it ends; None where it goes on."""
    tail: bytes | None = b""
    for count, token in enumerate(tokens, 1):
        assert tail is not None
        tail = matcher.step(tail, token)
        if tail is None:
            return count
    return None


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=40), STOPS)
def test_token_by_token_as_in_the_whole_text(tokens: list[int], stops: list[str]) -> None:
    texts = [b"".join(PIECES[t] for t in tokens[:count]) for count in range(len(tokens) + 1)]
    whole = (
        count for count, text in enumerate(texts) if any(stop.encode() in text for stop in stops)
    )
    assert ended(StopMatcher(stops, PIECES), tokens) == next(whole, None)


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=40), STOPS, st.data())
def test_a_tail_is_all_that_an_answer_needs_to_go_on(
    tokens: list[int], stops: list[str], data: st.DataObject
) -> None:
    matcher = StopMatcher(stops, PIECES)
    count = ended(matcher, tokens)
    edge = data.draw(st.integers(0, len(tokens) if count is None else count - 1))
    tail: bytes | None = matcher.tail(tokens[:edge])
    for token in tokens[edge:count]:
        assert tail is not None
        tail = StopMatcher(stops, PIECES).step(tail, token)
    assert (tail is None) == (count is not None)


@given(st.text("ab\né中🙂</>answer", max_size=60), STOPS, st.booleans())
def test_a_text_is_cut_at_the_first_string(text: str, stops: list[str], keep: bool) -> None:
    places = [at for at in range(len(text)) if any(text.startswith(stop, at) for stop in stops)]
    shown = cut(text, stops, keep=keep)
    if not places:
        assert shown == text
    else:
        begun = [stop for stop in stops if text.startswith(stop, places[0])]
        assert shown == text[: places[0]] + (min(begun, key=len) if keep else "")


TEXTS = [
    "</answer>",
    "12</answer>\n",
    "naïve 中文 🙂🙂\n\nQuestion:",
    "<|im_end|>\n",
    " a  b\tc",
    "\x00\x7f\u2581<0x0A>",
]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_real_tokens(text: str, qwen3: Any, smollm2_tokenizer: Any) -> None:
    for tokenizer, table in (qwen3, smollm2_tokenizer):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(table[i] for i in ids).decode() == text


def with_bytes(tokenizer: Any) -> tuple[Any, list[bytes]]:
    return tokenizer, token_bytes(tokenizer)


@pytest.fixture(scope="module")
def qwen3(qwen3_tokenizer: Path) -> tuple[Any, list[bytes]]:
    return with_bytes(AutoTokenizer.from_pretrained(qwen3_tokenizer))


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: Path) -> tuple[Any, list[bytes]]:
    return with_bytes(AutoTokenizer.from_pretrained(smollm2))


@given(st.text(max_size=12), st.text(min_size=1, max_size=5), st.text(max_size=8))
def test_any_text_ends_real_tokens_where_it_ends_the_text(
    qwen3: tuple[Any, list[bytes]], before: str, stop: str, after: str
) -> None:
    tokenizer, table = qwen3
    ids = tokenizer.encode(before + stop + after, add_special_tokens=False)
    said = [
        b"".join(table[i] for i in ids[:n]).decode(errors="replace") for n in range(len(ids) + 1)
    ]
    # Qwen's tokenizer writes some characters in another way (NFC)
    if "\ufffd" not in stop and stop in said[-1]:
        assert ended(StopMatcher([stop], table), ids) == next(
            n for n, text in enumerate(said) if stop in text
        )


SENTENCE_PIECE = [
    "<unk>",
    "<s>",
    "</s>",
    "\u2581the",
    "\u2581",
    "end",
    "<0x0A>",
    "<0xC3>",
    "<0xA9>",
    "#",
    "<|user|>",
]


def sentence_piece(*, decoder: Any = None) -> Any:
    """Llama 2's and Gemma's way: a low line block for a space, bytes by number."""
    backend = Tokenizer(
        models.WordLevel({piece: i for i, piece in enumerate(SENTENCE_PIECE)}, unk_token="<unk>")
    )
    backend.decoder = decoder or decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>", "<|user|>"])
    wrap: Any = PreTrainedTokenizerFast
    return wrap(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize(
    ("stop", "tokens", "count"),
    [
        (" the", [5, 3, 5], 2),
        ("d the", [5, 3, 5], 2),
        ("e e", [3, 4, 5], 3),
        ("\n#", [6, 9, 9], 2),
        ("é", [7, 7, 8, 8], 3),
        ("é#", [7, 8, 9], 3),
        ("<|user|>", [3, 10], 2),
        ("</s>", [3, 2, 3], 2),
        ("<0x0A>", [6, 6], None),
    ],
)
def test_sentence_piece(stop: str, tokens: list[int], count: int | None) -> None:
    assert ended(StopMatcher([stop], token_bytes(sentence_piece())), tokens) == count


def test_tokens_that_are_no_fixed_bytes_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"rollout\.stop: the tokenizer of the model reads token \d+ as .* leave"
    ):
        token_bytes(sentence_piece(decoder=decoders.Replace("e", "E")))
    with pytest.raises(ValueError, match="stop strings need a model with a tokenizer"):
        StopStrings(None).matcher(("x",))
    assert StopStrings(None).matcher(()) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = TinyConfig(hidden=64, layers=2, heads=2, head_dim=64, intermediate=128, init_std=0.2)
    return make_tiny(tmp_path_factory.mktemp("tiny") / "model", tiny, seed=1)


TOKENIZER = tiny_tokenizer(TinyConfig())
PROMPT = Prompt(id="p", token_ids=(11, 14, 13), answer="", source="s")
FREE = Sampling(max_tokens=120, seed=3)


def answers(engine: EmbeddedEngine, sampling: Sampling, n: int = 6) -> list[Completion]:
    engine.submit(PROMPT, n, sampling)
    return sorted(engine.run(), key=lambda c: c.sample)


def make_engine(folder: Path, slots: int = 4) -> EmbeddedEngine:
    return EmbeddedEngine(folder, dtype="float32", max_num_seqs=slots, max_model_len=160)


def test_answers_end_with_the_token_that_completes_a_string(folder: Path) -> None:
    """The same tokens and log-probs as without one, up to there; slots are reused, and others share
    the batch."""
    engine = make_engine(folder)
    free = answers(engine, FREE)
    texts = [TOKENIZER.decode(c.token_ids) for c in free]
    stops = (texts[0][40:43], texts[1][60:62], "</think>")
    seen = 0
    for sampling in (replace(FREE, stop=stops), replace(FREE, stop=stops, stop_token_ids=(1,))):
        engine.submit(replace(PROMPT, id="other"), 3, FREE)
        stopped = [c for c in answers(engine, sampling) if c.prompt_id == "p"]
        for whole, completion in zip(free, stopped, strict=True):
            said = [TOKENIZER.decode(whole.token_ids[:n]) for n in range(121)]
            ends = [n for n in range(121) if any(stop in said[n] for stop in stops)]
            ends += [n + 1 for n in np.flatnonzero(whole.token_ids == 1) if sampling.stop_token_ids]
            count = min(ends, default=120)
            assert completion.token_ids.tolist() == whole.token_ids[:count].tolist()
            np.testing.assert_allclose(completion.logprobs, whole.logprobs[:count], atol=1e-6)
            assert completion.finish_reason == ("stop" if ends else "length")
            seen += bool(ends)
    assert seen >= 4


def test_a_string_in_the_prompt_or_half_in_it_ends_nothing(folder: Path) -> None:
    engine = make_engine(folder)
    (free,) = answers(engine, replace(FREE, max_tokens=20), 1)
    asked, said = TOKENIZER.decode(PROMPT.token_ids), TOKENIZER.decode(free.token_ids)
    stop = asked[-1] + said[0]
    again = said.find(stop)
    (completion,) = answers(engine, replace(FREE, max_tokens=20, stop=(asked, stop)), 1)
    assert len(completion) == (20 if again < 0 else again + len(stop))


def test_a_string_at_the_very_end_is_a_stop(folder: Path) -> None:
    engine = make_engine(folder)
    (free,) = answers(engine, replace(FREE, max_tokens=10, temperature=0.0), 1)
    last = TOKENIZER.decode(free.token_ids)[-6:]
    (completion,) = answers(engine, replace(FREE, max_tokens=10, temperature=0.0, stop=(last,)), 1)
    assert (completion.finish_reason, len(completion)) == ("stop", 10)


def test_an_answer_that_goes_on_remembers_where_it_stood(folder: Path) -> None:
    """Aborted in the middle of a stop string, which its first tokens after that complete."""
    engine = make_engine(folder)
    sampling = replace(FREE, max_tokens=30)
    (free,) = answers(engine, sampling, 1)
    stop = TOKENIZER.decode(free.token_ids[8:12])
    begun = replace(
        free, token_ids=free.token_ids[:10], logprobs=free.logprobs[:10], finish_reason="abort",
        spans=(free.spans[0]._replace(stop=10),),
    )  # fmt: skip

    async def go_on() -> list[Completion]:
        request = (PROMPT, 1, replace(sampling, stop=(stop,)))
        found = [c async for c in engine.generate_all([request], {"p": [begun]})]
        await engine.close()
        return found

    (completion,) = asyncio.run(go_on())
    assert stop not in TOKENIZER.decode(free.token_ids[:11])
    assert completion.finish_reason == "stop"
    assert completion.token_ids.tolist() == free.token_ids[:12].tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_settings_of_one_answer_are_not_anothers(folder: Path, dtype: str) -> None:
    """Twelve groups with penalties, cuts and strings of their own, of which some end early: alone
    and in shared slots."""
    if dtype == "bfloat16" and not platform.supports_bf16(platform.named("cpu")):
        pytest.skip("without bfloat16 products a row's rounding depends on how many there are")
    mix = [
        replace(
            FREE,
            max_tokens=10 + 7 * (i % 5),
            seed=i,
            temperature=(1.0, 0.0, 1.4)[i % 3],
            repetition_penalty=(1.0, 1.3, 0.7)[i % 3],
            min_p=(0.0, 0.05)[i % 2],
            stop=("7",) if i % 4 == 0 else (),
        )
        for i in range(12)
    ]
    found = []
    for slots in (1, 5):
        engine = EmbeddedEngine(folder, dtype=dtype, max_num_seqs=slots, max_model_len=160)
        for i, sampling in enumerate(mix):
            token_ids = tuple(4 + (i * j) % 18 for j in range(1, 5 + i % 4))
            engine.submit(replace(PROMPT, id=f"{i:02}", token_ids=token_ids), 2, sampling)
        found.append(
            sorted(
                (c.prompt_id, c.sample, c.token_ids.tolist(), c.finish_reason) for c in engine.run()
            )
        )
    assert found[0] == found[1]
    assert {reason for *_, reason in found[0]} == {"stop", "length"}


@pytest.mark.parametrize("stop", [("",), ("a", "")])
def test_an_empty_string_is_refused(folder: Path, stop: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="an empty string would end every answer"):
        answers(make_engine(folder), replace(FREE, stop=stop))


@pytest.mark.parametrize("had", [0, 2])
@pytest.mark.parametrize("lots", [[1, 1, 1, 1, 1, 1, 1], [3, 4], [4, 3], [7]])
def test_what_vllm_decodes_beyond_a_string_is_dropped(lots: list[int], had: int) -> None:
    """Tokens come in lots, each of a version of its own; the versions of what is dropped go with
    it."""
    strings = StopStrings(None)
    strings._matchers[("abba",)] = StopMatcher(["abba"], [b"a", b"b", b"c"])
    # after a b of before
    tokens, end = ([2, 0, 1, 1, 0, 2, 0], 5) if not had else ([1, 0, 1, 0, 1, 1, 0], 2)
    before = Completion(
        prompt_id="p",
        sample=0,
        token_ids=np.arange(had, dtype=np.int32),
        logprobs=np.zeros(had, np.float32),
        spans=(Span(0, 0, had),) if had else (),
        finish_reason="abort",
    )
    request = (PROMPT, 1, Sampling(max_tokens=20, stop=("abba",)))
    (sample,) = samples_of([request], {"p": [before]} if had else {}, asyncio.Queue(), strings)
    for _ in range(2):  # as after the loss of an engine
        sample.send_as("0")
        edges = np.cumsum([0, *lots])
        found = []
        for version, (start, stop) in enumerate(pairwise(edges.tolist()), 1):
            found.append(sample.take(tokens[start:stop]))
            sample.close_span(version)
        assert found == [start < end <= stop for start, stop in pairwise(edges.tolist())]
    completion = sample.completion(Decoded(tokens, [-1.0] * 7, "abort"), 9)
    assert (
        completion.token_ids.tolist() == [*range(had), *tokens[:end]]
        and completion.finish_reason == "stop"
    )
    versions = [
        version for version, (start, _) in enumerate(pairwise(edges.tolist()), 1) if start < end
    ]
    assert [span.version for span in completion.spans] == [0] * bool(had) + versions
