"""Rows with answers as sequences to learn: which tokens, on real templates, by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from emberl.rl.config.data import DataConfig
from emberl.rl.config.supervised import SFTDataConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.demonstrations import Demonstrations, Example, RowReader, examples_of
from emberl.rl.data.rows import file_tables
from emberl.rl.data.templates import PromptWriter, end_token
from emberl.rl.data.tiny import tiny_tokenizer
from transformers import AutoTokenizer

SMOLLM2 = Path(__file__).parents[3] / "models" / "smollm2-135m"
BYTES = tiny_tokenizer(TinyConfig(vocabulary="bytes", chat_template=True))
TALK = (
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\ntwo and two\n</think>\n\n4"},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "<think>\nthree\n</think>\n\n6"},
)


@pytest.fixture(scope="module")
def smollm2() -> Any:
    if not (SMOLLM2 / "tokenizer.json").exists():
        pytest.skip("models/smollm2-135m is not there; `make smollm2` fetches it")
    return AutoTokenizer.from_pretrained(SMOLLM2)


def marked(
    tokenizer: Any, messages: Sequence[Any] = TALK, **settings: Any
) -> list[tuple[str, list[str]]]:
    """Each example as its text, and the texts of the spans that are learnt."""
    writer = PromptWriter(DataConfig(source="arithmetic", **settings), tokenizer)
    examples = examples_of(messages, writer, tokenizer, end_token(tokenizer))
    return [(tokenizer.decode(each.token_ids), spans(tokenizer, each)) for each in examples]


def spans(tokenizer: Any, example: Example) -> list[str]:
    found: list[list[int]] = []
    before = False
    for token, learnt in zip(example.token_ids, example.learnt, strict=True):
        if learnt and not before:
            found.append([])
        if learnt:
            found[-1].append(token)
        before = learnt
    return [tokenizer.decode(each) for each in found]


def test_a_template_that_shows_earlier_turns_as_they_were_gives_one_sequence(smollm2: Any) -> None:
    assert marked(smollm2, system_prompt="Sum.") == [
        (
            "<|im_start|>system\nSum.<|im_end|>\n"
            "<|im_start|>user\n2+2?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\ntwo and two\n</think>\n\n4<|im_end|>\n"
            "<|im_start|>user\nAnd 3+3?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\nthree\n</think>\n\n6<|im_end|>",
            [
                "<think>\ntwo and two\n</think>\n\n4<|im_end|>",
                "<think>\nthree\n</think>\n\n6<|im_end|>",
            ],
        )
    ]


def test_qwen3_takes_out_earlier_thinking_so_each_turn_is_a_sequence_of_its_own(
    qwen3_tokenizer: Path,
) -> None:
    """Learnt in the last turn's sequence, the first answer would be one without its thinking."""
    last, first = marked(AutoTokenizer.from_pretrained(qwen3_tokenizer))
    assert last == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\nAnd 3+3?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nthree\n</think>\n\n6<|im_end|>",
        ["<think>\nthree\n</think>\n\n6<|im_end|>"],
    )
    assert first == (
        "<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\ntwo and two\n</think>\n\n4<|im_end|>",
        ["<think>\ntwo and two\n</think>\n\n4<|im_end|>"],
    )


def test_qwen3_without_thinking_in_earlier_turns_is_one_sequence(qwen3_tokenizer: Path) -> None:
    talk = [{**turn, "content": turn["content"].rpartition("\n\n")[2]} for turn in TALK]
    [(_, learnt)] = marked(AutoTokenizer.from_pretrained(qwen3_tokenizer), talk)
    assert learnt == ["4<|im_end|>", "6<|im_end|>"]


def test_what_the_prompt_begins_of_an_answer_is_not_learnt(smollm2: Any) -> None:
    [(text, learnt)] = marked(smollm2, TALK[:2], assistant_prefix="<think>\n")
    assert text.endswith("<|im_start|>assistant\n<think>\ntwo and two\n</think>\n\n4<|im_end|>")
    assert learnt == ["two and two\n</think>\n\n4<|im_end|>"]


def test_a_greeting_answers_nothing_and_is_not_learnt(smollm2: Any) -> None:
    talk = [{"role": "assistant", "content": "Hello."}, *TALK[:2]]
    [(_, learnt)] = marked(smollm2, talk)
    assert learnt == ["<think>\ntwo and two\n</think>\n\n4<|im_end|>"]
    with pytest.raises(ValueError, match="no answer of the assistant"):
        marked(smollm2, talk[:1])


def rows_of(tmp_path: Path, *rows: Any, **settings: Any) -> list[tuple[Any, ...]]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = SFTDataConfig(source=str(file), **settings)
    reader = RowReader(data, file_tables([file], "sft.data", str(file))[0])
    return [tuple((m["role"], m["content"]) for m in reader(row)) for row in rows]


ASKED, SAID = ("user", "1+1?"), ("assistant", "One and one.\n#### 2")


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"messages": [{"role": r, "content": c} for r, c in (ASKED, SAID)]}, {}),
        ({"conversations": [{"from": "human", "value": ASKED[1]}, {"from": "gpt", "value": SAID[1]}]}, {}),
        ({"prompt": ASKED[1], "completion": SAID[1]}, {}),
        (
            {
                "prompt": [{"role": "user", "content": ASKED[1]}],
                "completion": [{"role": "assistant", "content": SAID[1]}],
            },
            {},
        ),
        ({"question": ASKED[1], "answer": SAID[1]}, {}),  # GSM8K
        ({"instruction": ASKED[1], "input": "", "output": SAID[1]}, {}),  # Alpaca
        ({"problem": ASKED[1], "solution": SAID[1], "answer": "2"}, {}),  # MATH, NuminaMath
        (
            {"q": ASKED[1], "work": "One and one.", "n": "2"},
            {
                "prompt_column": "q",
                "solution_column": "work",
                "answer_column": "n",
                "solution_template": "{solution}\n#### {answer}",
            },
        ),
    ],
)  # fmt: skip
def test_a_row_as_a_question_and_an_answer(
    tmp_path: Path, row: dict[str, Any], settings: dict[str, Any]
) -> None:
    assert rows_of(tmp_path, row, **settings) == [(ASKED, SAID)]


def test_rows_without_an_answer_say_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither messages of an assistant nor one of the columns"):
        rows_of(tmp_path, {"prompt": "1+1?", "label": "x"})


def demonstrations(
    tmp_path: Path, seed: int = 0, limit: int = 100, heldout: int = 2
) -> Demonstrations:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i}+1?", "completion": "x" * i} for i in range(1, 11)]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "?"}]))
    return Demonstrations(
        SFTDataConfig(source=str(file)), BYTES, seed, limit=limit, heldout=heldout
    )


def test_an_epoch_has_each_row_once_and_none_that_is_held_out(tmp_path: Path) -> None:
    shown = demonstrations(tmp_path)
    assert shown.size == 8 and "1 of 11 rows left out" in shown.notes[0]
    epochs = [
        [BYTES.decode(shown.examples(8 * epoch + i)[0].token_ids) for i in range(8)]
        for epoch in (0, 1)
    ]
    held = {BYTES.decode(each.token_ids) for each in shown.heldout}
    assert len(set(epochs[0])) == 8 and len(held) == 2 and not held & set(epochs[0])
    assert epochs[0] != epochs[1] and set(epochs[0]) == set(epochs[1])
    other = demonstrations(tmp_path, seed=1)
    assert {BYTES.decode(each.token_ids) for each in other.heldout} == held
    assert [BYTES.decode(other.examples(i)[0].token_ids) for i in range(8)] != epochs[0]


def test_a_row_that_is_too_long_has_no_example(tmp_path: Path) -> None:
    whole = demonstrations(tmp_path, heldout=0)
    lengths = sorted(len(whole.examples(i)[0].token_ids) for i in range(10))
    cut = demonstrations(tmp_path, limit=lengths[5], heldout=0)
    assert sum(bool(cut.examples(i)) for i in range(10)) == 6
    assert f"4 of the first 10 rows have more than {lengths[5]} tokens" in cut.notes[-1]
    with pytest.raises(ValueError, match=r"10 of the first 10 rows have more than 3 tokens, .*; r"):
        demonstrations(tmp_path, limit=3, heldout=0)
    with pytest.raises(ValueError, match=r"sft\.heldout=2: all of these rows have more than"):
        demonstrations(tmp_path, limit=lengths[0], heldout=2)


def test_more_held_out_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sft\.heldout=10 leaves nothing to learn of the 10 rows"):
        demonstrations(tmp_path, heldout=10)
