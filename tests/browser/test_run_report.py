"""The page of a run in a real browser: what a person finds there, and that whatever a model, a data
set or an alarm says stays text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emberl.rewards.verdict import Status, Verdict
from emberl.rl.groups import Group
from emberl.rl.watch.lengths import record_lengths
from emberl.rl.watch.report import write_report
from emberl.rl.watch.rollouts import write_rows
from emberl.rl.watch.spans import Spans
from emberl.rollout.samples import Completion, Prompt, Span

HOSTILE = (
    '</script><script>window.bad = 1</script><img src=x onerror="window.bad = 2"><!-- \u2028 ${7}'
    " $title \x00 \x1b[31m \x7f \u202e \ud800 \ufffe ]]> </style><style>body{display:none}</style>"
)
STEPS = 3


def group(number: int) -> Group:
    """Two answers, the first right, the second of the version before."""
    pairs = [
        (
            Completion(
                prompt_id=f"p/{number}",
                sample=i,
                token_ids=np.arange(5 + number + i, dtype=np.int32),
                logprobs=np.zeros(5 + number + i, np.float32),
                spans=(Span(max(0, number - i), 0, 5 + number + i),),
                finish_reason="stop",
            ),
            Verdict(status=Status.WRONG if i else Status.CORRECT, score=1.0 - i),
        )
        for i in range(2)
    ]
    return Group(
        prompt=Prompt(id=f"p/{number}", token_ids=(1,), answer="2", source=f"s{number % 2}"),
        completions=tuple(c for c, _ in pairs),
        verdicts=tuple(v for _, v in pairs),
        advantages=np.array([1.0, -1.0]),
    )


def row(number: int, sample: int, **keys: Any) -> dict[str, Any]:
    return {
        "id": f"p/{number}#{sample}",
        "problem": f"p/{number}",
        "sample": sample,
        "source": "sums",
        "question": f"What is {number} + 1?",
        "completion": f"it is {number + 1 + sample}",
        "reference": str(number + 1),
        "status": "wrong" if sample else "correct",
        "score": 1.0 - sample,
        "parts": {"answer": 1.0 - sample, "brevity": 0.25},
        "message": "",
        "advantage": 0.5 - sample,
        "tokens": 10 * number + sample,
        "finish_reason": "stop",
        "versions": [[3, 10 * number + sample]],
        "started": 1e9,
        "finished": 1e9 + 2.5,
        "grade_s": 0.01,
    } | keys


def make_run(folder: Path, rate: str, name: str) -> Path:
    folder.mkdir()
    config = (
        f'name: {json.dumps(name)}\nalgorithm: grpo\noptim:\n  lr: {rate}\nmodel:\n  path: "m"\n'
    )
    (folder / "config.yaml").write_text(config + f"schedule:\n  steps: {STEPS}\n")
    metrics = []
    spans = Spans(folder / "spans.jsonl")
    for step in range(1, STEPS + 1):
        figures = {
            "critic/score/mean": step / 4,
            "rollout/version": step,
            "sched/rollout_idle": 0.1,
        }
        metrics.append({"stage": "rl", "axis": "train", "step": step, **figures})
        spans.step, at = step, 1e9 + 10 * step
        for track, what, start, end in (
            ("loop", "step", 0, 9),
            ("loop", "waiting for answers", 0, 4),
            ("loop", "update", 4, 9),
            ("learners", "step", 5, 8),
            ("rollout 0", "decoding", 0, 4),
            ("graders", "grade", 3, 3.5),
            ("graders", "grade", 3.2, 4),
        ):
            spans.add(track, what, at + start, at + end)
        groups = [group(number) for number in range(4)]
        record_lengths(folder, step, step, groups, groups)
        write_rows(
            folder / "rollouts" / f"rl-train-{step:06}.jsonl.zst",
            [row(number, sample) for number in range(4) for sample in (0, 1)],
        )
    spans.flush()
    hostile = dict.fromkeys(("question", "completion", "reference", "message", "source"), HOSTILE)
    write_rows(
        folder / "rollouts" / f"rl-eval-{STEPS:06}.jsonl.zst",
        [row(9, 0, problem=HOSTILE, tokens=999, **hostile)],
    )
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(m)}\n" for m in metrics))
    alert = {"time": 1e9, "title": "reward stuck at 0", "text": HOSTILE}
    (folder / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run = make_run(folder / "b", "1.0e-4", HOSTILE)
    return write_report(run, against=make_run(folder / "a", "1.0e-5", "other"))


def test_what_a_person_finds(browser: Any, page: Path, tmp_path: Path) -> None:
    browser.open(page)
    assert browser.log() == []
    assert browser.choose() == f"1 to {8 * STEPS + 1} of {8 * STEPS + 1}"
    assert browser.choose(status="wrong").endswith(f"of {4 * STEPS}")
    assert browser.choose(step="2") == "1 to 4 of 4"
    assert browser.choose(status="", search="WHAT IS 3 +") == "1 to 2 of 2"
    assert browser.opened() == [
        *("question", "What is 3 + 1?", "reference", "4", "answer", "it is 4"),
        *("score and parts", "score 1, advantage 0.5\nanswer 1\nbrevity 0.25"),
        *("sampled", "30 tokens by version 3; decoded in 2.5 s, marked in 0.01 s"),
    ]
    sizes = browser.run("return [...document.images].map((i) => [i.alt, i.naturalWidth])")
    assert [name for name, _ in sizes] == ["Learning", "Rewards", "Schedule", "Spread"]
    assert min(width for _, width in sizes) > 300
    # the answers of graders overlap, and have two rows
    tracks = "return [...document.querySelectorAll('.lane > span')].map((e) => e.innerText)"
    assert browser.run(tracks) == ["loop", "learners", "rollout 0", "graders", "graders"]
    assert len(browser.run("return [...document.querySelectorAll('.lane i')]")) == 6 * STEPS
    browser.run(
        "const f = document.getElementById('when'); f.value = '1'; f.dispatchEvent(new Event('input'))"
    )
    bars = browser.run(
        "return [...document.querySelectorAll('.lane i')].map((e) => [e.title, e.style.left,"
        " e.style.width])"
    )
    assert bars[0] == ["loop: waiting for answers, 4.000 s, step 2", "0%", "44.4444%"]
    assert bars[2] == ["learners: step, 3.000 s, step 2", "55.5556%", "33.3333%"]
    assert len(bars) == 6
    ruler: str = browser.run("return document.getElementById('ruler').innerText")
    assert ruler.split("\n") == ["10.00 s", "12.25 s", "14.50 s", "16.75 s", "19.00 s"]
    cells = "return [...document.querySelectorAll('table.keys td')].map((e) => e.innerText)"
    text = browser.run(cells)
    at = text.index("optim.lr")
    assert text[at + 1 : at + 3] == ["1e-05", "0.0001"], "the other run's first"
    assert text[text.index("stage and step") + 1] == f"rl {STEPS}/{STEPS}"
    browser.screenshot(tmp_path / "page.png")


def test_foreign_text_is_text(browser: Any, page: Path) -> None:
    browser.open(page)
    assert browser.choose(axis="evaluation") == "1 to 1 of 1"
    # a browser's strings hold what JSON says, half of a surrogate pair included
    codes = browser.run(
        "const open = document.querySelector('#list details'); open.open = true;"
        "return new Promise((done) => setTimeout(() => done([...open.querySelectorAll('pre')].map("
        "(e) => Array.from({length: e.textContent.length}, (_, i) => e.textContent.charCodeAt(i)))),"
        " 100))"
    )
    assert codes[:3] == [[ord(c) for c in HOSTILE]] * 3
    state = (
        "return [window.bad === undefined, document.scripts.length, document.styleSheets.length]"
    )
    assert browser.run(state) == [True, 2, 1]
    warning: str = browser.run("return document.querySelector('.warning').textContent")
    assert "window.bad = 1" in warning and warning.split(" ", 3)[3].startswith(
        "reward stuck at 0: "
    )
    assert browser.run("return document.body.getBoundingClientRect().height") > 1000
    assert browser.log() == []
    before = page.read_text(encoding="utf-8").split("<script type")[0]
    assert "http" not in before.replace("http-equiv", "")
