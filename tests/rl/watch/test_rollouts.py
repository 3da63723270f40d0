"""Answers that a run keeps: what is in a row, that an audit reads it, that nothing stands twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emberl.rewards.audit.audit import audit, read_rows
from emberl.rewards.verdict import Status, Verdict, verifier_error
from emberl.rl.answers import AnswerReader
from emberl.rl.config.sampling import RolloutConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import tiny_tokenizer
from emberl.rl.groups import Group
from emberl.rl.watch import rollouts
from emberl.rl.watch.lengths import read_lengths, record_lengths
from emberl.rl.watch.rollouts import RolloutLog, files_of, rows_of, trim_steps
from emberl.rl.watch.tracking import few_of
from emberl.rollout.samples import Completion, Prompt, Span

TOKENIZER = tiny_tokenizer(TinyConfig(vocabulary="bytes", chat_template=True))
READER = AnswerReader(tokenizer=TOKENIZER, rollout=RolloutConfig(), stop_token_ids=(1,))
HOSTILE = 'x</script>\x00\x1b[31m \u2028"\\ \u202e{"completion": 7}\n\r'


def completion(text: str, sample: int, split: int = 0) -> Completion:
    ids = np.array(TOKENIZER.encode(text, add_special_tokens=False), np.int32)
    spans = [Span(4, 0, split or len(ids))] + ([Span(5, split, len(ids))] if split else [])
    return Completion(
        prompt_id="p", sample=sample, token_ids=ids, logprobs=np.zeros(len(ids), np.float32),
        spans=tuple(spans), finish_reason="stop", started=10.0, finished=12.5,
    )  # fmt: skip


def group(answer: str = "2", columns: Mapping[str, Any] | None = None) -> Group:
    asked = ({"role": "user", "content": "1+1?"},)
    ids = tuple(TOKENIZER.encode("1+1?", add_special_tokens=False))
    return Group(
        prompt=Prompt(
            id="p", token_ids=ids, answer=answer, source="sums", messages=asked,
            columns=columns or {},
        ),
        completions=(completion("\\boxed{2}<eos>", 0, 3), completion(f"{HOSTILE}<eos>", 1)),
        verdicts=(
            Verdict(status=Status.PARTIAL, score=0.75, parts={"answer": 1.0, "format": 0.5}),
            verifier_error("killed"),
        ),
    )  # fmt: skip


def test_a_row_has_the_graders_view_and_what_became_of_it(tmp_path: Path) -> None:
    sampled = group(columns={"level": 3})
    first, second = rows_of([sampled], READER, [sampled.with_advantages(np.array([0.5, 0.0]))])
    assert first["completion"] == "\\boxed{2}" and second["completion"] == HOSTILE
    assert (first["id"], second["id"], first["question"]) == ("p#0", "p#1", "1+1?")
    assert (first["status"], first["score"], first["advantage"]) == ("partial", 0.75, 0.5)
    assert first["parts"] == {"answer": 1.0, "format": 0.5}
    assert first["versions"] == [(4, 3), (5, first["tokens"] - 3)], "each token's version"
    assert (second["status"], second["score"], second["message"]) == (
        *("verifier_error", None, "killed"),
    )
    assert [row["advantage"] for row in rows_of([sampled], READER)] == [None, None]
    assert (first["finished"] - first["started"], first["columns"]) == (2.5, {"level": 3})


def test_an_audit_grades_what_a_run_kept(tmp_path: Path) -> None:
    """The reward sees the data set's own columns alone: neither the run's score nor its verdict."""
    log = RolloutLog(tmp_path, lambda *_: pytest.fail("nothing is to fail"))
    for step, answer in ((1, "2"), (2, "3")):
        kept = group(answer, {"score": "of the data", "level": step})
        log.put("rl", "train", step, lambda kept=kept: list(rows_of([kept], READER)))  # type: ignore[misc]
    log.close()
    folder = tmp_path / rollouts.ROLLOUTS
    rows = read_rows(folder)
    assert [row.id for row in rows] == ["p#0", "p#1"] * 2
    assert rows[0].input.columns == {"score": "of the data", "level": 1}
    assert rows[0].input.messages == ({"role": "user", "content": "1+1?"},)
    assert (rows[1].input.completion, rows[2].input.answer) == (HOSTILE, "3")
    found = audit("math", folder).figures
    assert found["rows"] == 4 and found["statuses"]["correct"] == 1
    assert len(read_rows(folder, limit=3)) == 3
    assert len(read_rows(files_of(tmp_path)[0])) == 2
    broken = folder / "rl-train-000003.jsonl.zst"
    broken.write_bytes(files_of(tmp_path)[0].read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"000003.jsonl.zst cannot be read"):
        read_rows(folder)
    assert len(list(rollouts.read_rows(tmp_path))) == 4, "a report leaves out what is broken"


def test_the_loop_waits_only_where_too_much_waits(tmp_path: Path) -> None:
    gate, log = (
        threading.Event(),
        RolloutLog(tmp_path, lambda *_: pytest.fail("nothing is to fail")),
    )

    def slow() -> list[dict[str, Any]]:
        gate.wait(20)
        return [{"completion": "x"}]

    start = time.monotonic()
    for step in range(rollouts.WAITING + 1):  # one is at work
        log.put("rl", "train", step, slow)
        time.sleep(0.05)
    assert time.monotonic() - start < 5
    late = threading.Thread(target=log.put, args=("rl", "train", 9, slow))
    late.start()
    late.join(0.2)
    assert late.is_alive(), "nothing is left out"
    gate.set()
    late.join(20)
    log.close()
    assert len(files_of(tmp_path)) == rollouts.WAITING + 2


@pytest.mark.parametrize("where", ["disk", "text"])
def test_what_fails_costs_the_files_and_not_the_run(tmp_path: Path, where: str) -> None:
    told: list[str] = []
    log = RolloutLog(tmp_path, lambda title, text: told.append(f"{title}: {text}"))
    if where == "disk":
        (tmp_path / rollouts.ROLLOUTS).write_text("no folder")
    for step in range(3 * rollouts.WAITING):
        log.put("rl", "train", step, lambda: [{"completion": "x"}] if where == "disk" else 1 / 0)  # type: ignore[arg-type,return-value]
    log.close()
    [line] = told
    assert line.startswith("answers are not kept: ")
    assert ("Exists" if where == "disk" else "ZeroDivisionError") in line


def test_a_resumed_run_drops_what_it_will_do_again(tmp_path: Path) -> None:
    stages = ("sft", "rl")
    names = ("sft-eval-000040", "rl-eval-000000", "rl-train-000002", "rl-train-000003")
    for name in names:
        rollouts.write_rows(tmp_path / "rollouts" / f"{name}.jsonl.zst", [{"completion": "x"}])
    for step in (2, 3):
        record_lengths(tmp_path, step, step, [group()])
    trim_steps(tmp_path, "rl", 2, stages)
    left = sorted(p.name.removesuffix(".jsonl.zst") for p in files_of(tmp_path))
    assert left == ["rl-eval-000000", "rl-train-000002", "sft-eval-000040"]
    assert set(read_lengths(tmp_path)["step"].to_pylist()) == {2}
    trim_steps(tmp_path, "sft", 40, stages)
    assert [p.name for p in files_of(tmp_path)] == ["sft-eval-000040.jsonl.zst"]


def test_few_are_whole_groups_of_a_step_and_first_answers_of_an_evaluation() -> None:
    groups = [group(), group(), group()]
    assert few_of(groups, 3, whole=True) == groups[:2], "two groups of two hold three answers"
    assert [len(g.completions) for g in few_of(groups, 2, whole=False)] == [1, 1]
    assert few_of([], 3, whole=True) == [] and few_of(groups, 0, whole=True) == []
