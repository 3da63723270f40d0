"""What a person reads of sampled answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emberl.rewards.verdict import Status, Verdict, verifier_error
from emberl.rl.answers import AnswerReader
from emberl.rl.config.sampling import RolloutConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import tiny_tokenizer
from emberl.rl.groups import Group
from emberl.rl.watch.tracking import HALF_CELL, Tracker, sample_rows
from emberl.rollout.samples import Completion, Prompt, Span

PROMPT = Prompt(id="p", token_ids=(5,), answer="2", source="s")
TOKENIZER = tiny_tokenizer(TinyConfig(vocabulary="bytes", chat_template=True))


def reader(**rollout: Any) -> AnswerReader:
    return AnswerReader(tokenizer=TOKENIZER, rollout=RolloutConfig(**rollout), stop_token_ids=(1,))


def completion(text: str, reason: Any = "stop") -> Completion:
    ids = np.array(TOKENIZER.encode(text, add_special_tokens=False), np.int32)
    return Completion(
        prompt_id="p", sample=0, token_ids=ids, logprobs=np.zeros(len(ids), np.float32),
        spans=(Span(0, 0, len(ids)),), finish_reason=reason,
    )  # fmt: skip


def test_an_answer_keeps_its_thinking_and_loses_what_frames_it() -> None:
    assert reader().text(PROMPT, completion("<think>1+1</think>2<eos>")) == "<think>1+1</think>2"
    assert reader().text(PROMPT, completion("2<pad><eos>3", "length")) == "23"


def test_an_answer_begins_in_its_prompt() -> None:
    begun = replace(PROMPT, prefix="<think>\n")
    assert reader().text(begun, completion("1+1</think>2<eos>")) == "<think>\n1+1</think>2"


@pytest.mark.parametrize(
    ("said", "reason", "kept", "cut"),
    [
        ("1+1</a>", "stop", "1+1</a>", "1+1"),
        ("1\nQ:</a>", "stop", "1\nQ:", "1"),  # the first of two
        # the end token came before the string was whole
        ("1+1</a<eos>", "stop", "1+1</a", "1+1</a"),
        ("1+1</a", "length", "1+1</a", "1+1</a"),
        ("</a>", "stop", "</a>", ""),
    ],
)
def test_an_answer_ends_with_or_before_the_string_that_stopped_it(
    said: str, reason: str, kept: str, cut: str
) -> None:
    stop = ("</a>", "\nQ:")
    assert reader(stop=stop).text(PROMPT, completion(said, reason)) == kept
    assert reader(stop=stop, include_stop=False).text(PROMPT, completion(said, reason)) == cut


def test_the_problem_is_what_was_asked() -> None:
    asked = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"})
    prompt = Prompt(id="p", token_ids=(1, 5), answer="2", source="s", messages=asked)
    assert reader().problem(prompt) == "1+1?"
    ids = tuple(TOKENIZER.encode("1+1?<eos>", add_special_tokens=False))
    assert reader().problem(Prompt(id="p", token_ids=ids, answer="2", source="s")) == "1+1?"


def test_rows_say_the_score_and_its_parts(tmp_path: Path) -> None:
    verdicts = [
        Verdict(status=Status.PARTIAL, score=0.75, parts={"answer": 1.0, "format": 0.5}),
        verifier_error("killed"),
    ]
    groups = [
        Group(
            prompt=Prompt(id="p", token_ids=(1,), answer="2", source="s"),
            completions=(completion("2"),),
            verdicts=(v,),
        )
        for v in verdicts
    ]
    rows = sample_rows(groups, ["a" * 2000 + "|end", "2"], ["1+1?", "1+1?"])
    assert [row["score"] for row in rows] == ["0.75", ""]
    assert rows[0]["parts"] == "answer 1, format 0.5"
    tracker: Any = SimpleNamespace(_stage="rl", run_dir=tmp_path, _sinks=[])
    Tracker.samples(tracker, 3, rows)
    table = (tmp_path / "samples.md").read_text()
    assert "| problem | answer | reference | verdict | score | parts |" in table
    assert "a" * HALF_CELL + " [...] " in table and "\\|end |" in table, (
        "the end of a long answer is shown"
    )
