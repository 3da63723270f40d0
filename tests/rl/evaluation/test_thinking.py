"""Thoughts ended by force: exact to the token, on the real engine; modes and tags as data."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emberl.rl.config.data import DataConfig
from emberl.rl.config.sampling import ThinkingConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.templates import render, template_of
from emberl.rl.data.tiny import END_THINK, THINK, make_tiny, tiny_tokenizer
from emberl.rl.evaluation.generation import sampled
from emberl.rl.evaluation.thinking import Thoughts, in_mode, split
from emberl.rollout.crew import Job
from emberl.rollout.embedded.engine import EmbeddedEngine
from emberl.rollout.samples import Completion, Prompt, Sampling
from pydantic import ValidationError
from transformers import AutoTokenizer

TINY = TinyConfig(hidden=32, layers=1, heads=2, head_dim=16, intermediate=32, init_std=0.5)
TOKENIZER = tiny_tokenizer(TINY)
CLOSE = TOKENIZER.convert_tokens_to_ids(END_THINK)
LONGEST = 48


class Pool:
    """One engine in this process, in the place of the workers."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self.engine = engine
        self.tokens = 0

    def submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            begun = job.episodes.going_on
            self.engine.submit(job.prompt, job.n, job.sampling, begun)
            answers = sorted(self.engine.run(), key=lambda completion: completion.sample)
            self.tokens += sum(map(len, answers)) - sum(map(len, begun))
            job.finish(tuple(answers))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedEngine:
    folder = make_tiny(tmp_path_factory.mktemp("tiny"), TINY, seed=3)
    return EmbeddedEngine(folder, max_num_seqs=16, max_model_len=96, dtype="float32")


def prompt(i: int, text: str) -> Prompt:
    ids = tuple(TOKENIZER.encode(text, add_special_tokens=False))
    return Prompt(id=f"p/{i}", token_ids=ids, answer="", source="s")


def answers(
    engine: EmbeddedEngine, thinking: ThinkingConfig, prompts: Sequence[Prompt]
) -> tuple[dict[tuple[int, int | None], tuple[Completion, ...]], Pool]:
    pool: Any = Pool(engine)
    sampling = Sampling(max_tokens=LONGEST, stop_token_ids=(1,))

    async def collect() -> dict[tuple[int, int | None], tuple[Completion, ...]]:
        found = sampled(pool, prompts, 8, sampling, Thoughts(thinking, TOKENIZER))
        return {(index, budget): group async for index, budget, group in found}

    return asyncio.run(collect()), pool


@pytest.mark.parametrize("ending", [None, f",{END_THINK}7"])
def test_a_thought_is_cut_at_exactly_its_budget(engine: EmbeddedEngine, ending: str | None) -> None:
    budgets = (3, 9, 24)
    thinking = ThinkingConfig(budgets=budgets, ending=ending)
    forced = TOKENIZER.encode(ending or END_THINK, add_special_tokens=False)
    prompts = [prompt(i, f"{i}+2=?{THINK}") for i in range(6)]
    found, pool = answers(engine, thinking, prompts)
    assert found.keys() == {(i, b) for i in range(6) for b in (None, *budgets)}
    cuts, spent = 0, 0
    for (index, budget), group in found.items():
        assert [c.sample for c in group] == list(range(8)), "none lost, none twice"
        if budget is None:
            spent += sum(map(len, group))
            continue
        for free, cut in zip(found[index, None], group, strict=True):
            tokens = free.token_ids.tolist()
            thought = tokens.index(CLOSE) + 1 if CLOSE in tokens else len(tokens)
            if thought <= budget:
                assert cut is free
                continue
            cuts += 1
            edge = budget + len(forced)
            assert cut.token_ids[:budget].tolist() == tokens[:budget]
            assert cut.token_ids[budget:edge].tolist() == forced
            assert np.flatnonzero(~cut.mask).tolist() == list(range(budget, edge))
            assert edge < len(cut) <= LONGEST
            assert cut.num_sampled == len(cut) - len(forced)
            assert cut.prompt_id == free.prompt_id
            assert cut.finish_reason == ("stop" if cut.token_ids[-1] == 1 else "length")
            assert (cut.finish_reason == "length") == (len(cut) == LONGEST)
            spent += len(cut) - edge
    assert 20 < cuts < 6 * 8 * 3, "some were cut, and some had ended"
    assert pool.tokens == spent, "what was thought already is not decoded again"


def test_what_does_not_think_is_left_alone(engine: EmbeddedEngine) -> None:
    found, _ = answers(engine, ThinkingConfig(budgets=(2,)), [prompt(0, "1+2=?")])
    kept = [
        free is cut
        for free, cut in zip(found[0, None], found[0, 2], strict=True)
        if free.token_ids[0] != TOKENIZER.convert_tokens_to_ids(THINK)
    ]
    assert kept and all(kept)
    everything = ThinkingConfig(budgets=(2,), open="")
    found, _ = answers(engine, everything, [prompt(0, "1+2=?")])
    assert any(c.token_ids[2] == CLOSE and not c.mask[2] for c in found[0, 2])


def test_the_length_of_a_thought_counts_its_closing_tag() -> None:
    thoughts = Thoughts(ThinkingConfig(), TOKENIZER)
    asked, opened = prompt(0, "1+2=?"), prompt(0, f"1+2=?{THINK}")

    def length(where: Prompt, text: str) -> int:
        return thoughts.length(where, TOKENIZER.encode(text, add_special_tokens=False))

    assert length(asked, "<think>1+2=3</think>3") == 7
    assert length(opened, "1+2=3</think>3") == 6
    assert length(opened, "1+2") == 3, "all of it, where nothing closes it"
    assert length(asked, "3") == 0
    assert length(asked, "3<think></think>") == 0, "an answer that begins otherwise has none"


def test_tags_are_data() -> None:
    tags = ThinkingConfig(open="[", close="]")
    assert split("[1+2]3", tags) == ("1+2", "3")
    assert split("<think>1</think>3", tags) == ("", "<think>1</think>3")
    plain = ThinkingConfig()
    assert split("<think>\n1\n</think>\n\n3", plain) == ("1", "3")
    assert split("1</think>3", plain, opened=True) == ("1", "3")
    assert split("<think>1", plain) == ("1", "")
    assert split("1, so ] 3", ThinkingConfig(open="", close="]")) == ("1, so ", " 3")


def test_modes_of_a_template_without_a_switch() -> None:
    data = DataConfig(source="arithmetic")
    assert in_mode(data, ThinkingConfig(mode="slow"), None).assistant_prefix == "<think>"
    assert in_mode(data, ThinkingConfig(mode="fast"), None).assistant_prefix == "<think></think>"
    assert in_mode(data, ThinkingConfig(), None) is data
    begun = data.model_copy(update={"assistant_prefix": "So: "})
    with pytest.raises(ValueError, match=r"thinking\.mode=fast .*assistant_prefix='So: '"):
        in_mode(begun, ThinkingConfig(mode="fast"), None)


def test_modes_of_qwen3(qwen3_tokenizer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen3_tokenizer)
    data = DataConfig(source="arithmetic")
    template = template_of(data, tokenizer)
    messages = [{"role": "user", "content": "1+1?"}]

    def end(mode: Any) -> str:
        found = in_mode(data, ThinkingConfig(mode=mode), template)
        assert found.assistant_prefix == ""
        return render(messages, tokenizer, template, found.chat_template_kwargs)[-30:]

    assert end("fast").endswith("<think>\n\n</think>\n\n")
    assert "<think>" not in end("slow")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"budgets": [0]}, "1 or more"),
        ({"budgets": [4, 4]}, "once"),
        ({"ending": "so"}, r"does not hold close='</think>'"),
        ({"mode": "quick"}, "slow"),
    ],
)
def test_bad_settings(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ThinkingConfig(**keys)
    assert ThinkingConfig(budgets=7).budgets == (7,)  # type: ignore[arg-type]


def test_an_ending_that_cannot_be_tokenised_is_named() -> None:
    with pytest.raises(ValueError, match=r"thinking\.ending='\\n</think>'"):
        Thoughts(ThinkingConfig(ending="\n</think>"), TOKENIZER)
