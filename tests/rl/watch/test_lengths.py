"""What a run records of its answers: numbers written by hand come back as rows, and a repeated step
replaces its rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from emberl.rewards.verdict import Status, Verdict
from emberl.rl.groups import Group
from emberl.rl.watch.lengths import read_lengths, record_lengths
from emberl.rollout.samples import Completion, Prompt, Span


def group(name: str, lengths: tuple[int, ...], spans: tuple[tuple[Span, ...], ...]) -> Group:
    completions = tuple(
        Completion(
            prompt_id=name,
            sample=i,
            token_ids=np.zeros(length, np.int32),
            logprobs=np.zeros(length, np.float32),
            spans=own,
            finish_reason="stop",
            started=100.0,
            finished=100.0 + length / 4,
        )
        for i, (length, own) in enumerate(zip(lengths, spans, strict=True))
    )
    verdicts = tuple(
        Verdict(status=Status.WRONG, score=0.0, seconds=0.5 * i) for i in range(len(lengths))
    )
    prompt = Prompt(id=name, token_ids=(1, 2, 3), answer="", source="hand")
    return Group(prompt=prompt, completions=completions, verdicts=verdicts)


def test_each_answer_is_a_row(tmp_path: Path) -> None:
    two_versions = (Span(6, 0, 3), Span(7, 3, 8))
    sampled = group("a", (8, 2), (two_versions, (Span(7, 0, 2),)))
    record_lengths(tmp_path, 8, 7, [sampled], [sampled.with_advantages(np.array([0.5, -0.5]))])
    first, second = read_lengths(tmp_path).to_pylist()
    assert first == {
        "step": 8,
        "version": 7,
        "prompt_id": "a",
        "sample": 0,
        "prompt_length": 3,
        "response_length": 8,
        "started": 100.0,
        "decode_s": 2.0,
        "grade_s": 0.0,
        "versions": [6, 7],
        "version_tokens": [3, 5],
        "source": sampled.prompt.source,
        "status": sampled.verdicts[0].status,
        "score": sampled.verdicts[0].score,
        "advantage": 0.5,
    }
    assert second["advantage"] == -0.5
    assert (second["sample"], second["response_length"], second["grade_s"]) == (1, 2, 0.5)


def test_a_step_done_again_replaces_its_rows(tmp_path: Path) -> None:
    for step, length in ((1, 4), (2, 9), (1, 6)):
        record_lengths(
            tmp_path, step, step - 1, [group("a", (length,), ((Span(step - 1, 0, length),),))]
        )
    table = read_lengths(tmp_path)
    assert sorted(
        zip(table["step"].to_pylist(), table["response_length"].to_pylist(), strict=True)
    ) == [(1, 6), (2, 9)]


def test_what_is_no_recording_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no lengths\.parquet"):
        read_lengths(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("not a table")
    with pytest.raises(ValueError, match=r"notes\.txt is no Parquet"):
        read_lengths(tmp_path / "notes.txt")
