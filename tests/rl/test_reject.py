"""Rejection sampling: which answers become rows, and what is said where none does."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emberl.rewards.verdict import Status, Verdict, verifier_error
from emberl.rl.checkpoints import latest_checkpoint
from emberl.rl.config.load import ConfigError
from emberl.rl.config.supervised import RejectConfig
from emberl.rl.groups import Group, Progress
from emberl.rl.reject import accepted, figures_of, gather_samples, sample_accepted
from emberl.rollout.samples import Completion, Episode, Prompt, Span

PROMPT = Prompt(
    id="p", token_ids=(5,), answer="2", source="s", messages=({"role": "user", "content": "1+1?"},)
)
ANSWERS = ("<a>2", "<b>2", "<a>2", "<c>3", "<d>2", "<e>2", "<f>?")
VERDICTS = ("correct", "correct", "correct", "wrong", "correct", "correct", "partial")


def group(*, cut: Sequence[int] = (4,), episode: Episode | None = None) -> Group:
    """Seven answers; number 4 is right, but was cut."""
    completions = [
        Completion(
            prompt_id="p", sample=i, token_ids=np.arange(i + 1, dtype=np.int32),
            logprobs=np.zeros(i + 1, np.float32), spans=(Span(0, 0, i + 1),),
            finish_reason="length" if i in cut else "stop", episode=episode,
        )
        for i in range(len(ANSWERS))
    ]  # fmt: skip
    verdicts = [
        Verdict(status=Status(status), score=float(status == "correct")) for status in VERDICTS
    ]
    return Group(prompt=PROMPT, completions=tuple(completions), verdicts=tuple(verdicts))


def run(keep: int) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(reject=RejectConfig(keep=keep, samples=16)),
        answers=SimpleNamespace(text=lambda prompt, completion: ANSWERS[completion.sample]),
    )


@pytest.mark.parametrize(
    ("keep", "kept"), [(1, ["<a>2"]), (2, ["<a>2", "<b>2"]), (9, ["<a>2", "<b>2", "<e>2"])]
)
def test_right_answers_that_differ_and_were_not_cut_are_kept(keep: int, kept: list[str]) -> None:
    rows = accepted(run(keep), group())
    assert [row["messages"] for row in rows] == [
        [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": text}]
        for text in kept
    ]
    assert rows[0] | {"messages": []} == {
        "id": "p", "source": "s", "messages": [], "reference": "2", "tokens": 1,
    }  # fmt: skip


def test_of_an_episode_all_turns_are_kept() -> None:
    turns = tuple({"role": role, "content": role[0]} for role in ("assistant", "tool", "assistant"))
    episode = Episode(turns=(0,), messages=turns, reward=None, status="done")
    [row] = accepted(run(1), group(episode=episode))
    assert row["messages"] == [*PROMPT.messages, *turns]


def sampling(folder: Path, *, right: bool) -> tuple[Any, list[int]]:
    """A run that stands after two steps of two problems each, of eight problems in all, and is now
    to take three at a time; and the numbers of those that it is asked for."""
    asked: list[int] = []

    async def sample_groups(prompts: Sequence[int], n: int, how: Any) -> list[Group]:
        asked.extend(prompts)
        status = Status("correct" if right else "wrong")
        verdict = Verdict(status=status, score=float(right))
        one = Group(prompt=PROMPT, completions=group().completions[:1], verdicts=(verdict,))
        return [one] * len(prompts)

    made = run(1)
    made.config = SimpleNamespace(
        reject=RejectConfig(keep=1, problems=8),
        schedule=SimpleNamespace(prompts_per_step=3),
        reward=SimpleNamespace(max_error_fraction=0.01),
        checkpoint=SimpleNamespace(keep=2),
    )
    made.run_dir, made.stop, made.started = folder, threading.Event(), 0.0
    made.source = SimpleNamespace(size=None, train=lambda i: i)
    made.progress = Progress(step=2, position=4)
    made.sampling, made.sample_groups = (lambda step: None), sample_groups
    made.suite = SimpleNamespace(metrics=dict)
    logged = (folder / "metrics.jsonl").open("a", buffering=1)
    made.tracker = SimpleNamespace(
        begin=lambda *_: None,
        log=lambda step, figures, show: logged.write(
            json.dumps({"stage": "reject", "axis": "train", "step": step, **figures}) + "\n"
        ),
    )
    return made, asked


def test_no_problem_is_left_out_where_a_step_takes_other_numbers_than_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emberl.rl.checkpoints.shown_tree", lambda config: {})
    (tmp_path / "samples").mkdir()
    for step in (1, 2):
        (tmp_path / f"samples/{step:06}.jsonl").write_text("{}\n{}\n")
    made, asked = sampling(tmp_path, right=True)
    asyncio.run(sample_accepted(made))
    assert asked == [4, 5, 6, 7] and made.progress.position == 8
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 8
    assert latest_checkpoint(tmp_path) is not None


def test_where_nothing_was_accepted_another_start_samples_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emberl.rl.checkpoints.shown_tree", lambda config: {})
    (tmp_path / "samples").mkdir()
    for step in (1, 2):
        (tmp_path / f"samples/{step:06}.jsonl").write_text("")
    made, _ = sampling(tmp_path, right=False)
    with pytest.raises(ConfigError, match="rejection sampling accepted none of 4 answers: 4 wrong"):
        asyncio.run(sample_accepted(made))
    assert latest_checkpoint(tmp_path) is None


def test_the_figures_of_a_step() -> None:
    broken = verifier_error("killed")
    one = group()
    two = Group(prompt=PROMPT, completions=one.completions[:1], verdicts=(broken,))
    assert figures_of([one, two], rows=3) == {
        "reject/accuracy": 4 / 8,
        "reject/answers": 8.0,
        "reject/rows": 3.0,
        "reject/tokens": 29.0,  # 1 + 2 + ... + 7, and 1
        "response_length/mean": 29 / 8,
        "reject/correct": 4.0,
        "reject/wrong": 1.0,
        "reject/cut": 1.0,
        "reject/partial": 1.0,
        "reject/verifier_error": 1.0,
    }


def test_parts_become_one_file_or_an_error_with_counts(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for step, rows in ((1, '{"id": "a"}\n'), (2, ""), (3, '{"id": "b"}\n'), (4, "of another run")):
        (tmp_path / "samples" / f"{step:06}.jsonl").write_text(rows)
    gather_samples(tmp_path, 3)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["a", "b"]

    logged = [
        {"stage": "reject", "axis": "train", "reject/answers": 600.0, "reject/wrong": 590.0, "reject/over_limit": 10.0},
        {"stage": "reject", "axis": "train", "reject/answers": 600.0, "reject/cut": 600.0, "reject/accuracy": 0.0},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    (tmp_path / "samples" / "000001.jsonl").write_text("")
    with pytest.raises(
        ConfigError,
        match="accepted none of 1,200 answers: 590 wrong, 10 over limit, 600 cut; take a better",
    ):
        gather_samples(tmp_path, 2)
