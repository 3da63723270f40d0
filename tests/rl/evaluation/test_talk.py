"""`emberl chat` and `emberl sample` on a real model, from a pipe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from emberl.rl.evaluation.talk import Part, Talker, _lines, _Voice, ctrl_c_stops, lenient
from rich.console import Console

FRANCE, PARIS = "What is the capital of France?", "The capital of France is Paris."
EMBERL = str(Path(sys.executable).with_name("emberl"))


def run(
    *arguments: str | Path, said: str = "", status: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [EMBERL, *map(str, arguments)],
        input=said,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == status, done.stderr[-2000:]
    return done


@pytest.mark.slow
def test_a_real_model_answers_from_a_pipe(smollm2: Path) -> None:
    """Greedy, so that the second turn shows that it has the first in view."""
    short = ("temperature=0", "max_response_length=24", "model.dtype=float32")
    done = run("chat", smollm2, *short, said=f"{FRANCE}\n\nAnd of Italy?\n")
    assert done.stdout.splitlines() == [PARIS, "The capital of Italy is Rome."]
    asked = ("--prompt", FRANCE, "--prompt", "-")
    done = run("sample", smollm2, *asked, "-n", "2", *short, said="And of Italy?\n")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["prompt"][-6:], row["sample"]) for row in rows] == [
        *(("rance?", 0), ("rance?", 1), ("Italy?", 0), ("Italy?", 1))
    ]
    assert [row["answer"] for row in rows[:2]] == [PARIS, PARIS]
    assert "Rome" not in rows[2]["answer"], "a prompt of its own, without what was said before"
    assert all(0 < row["tokens"] <= 24 and row["logprob"] < 0 for row in rows)


def test_a_budget_is_kept_to_the_token_and_thoughts_stand_apart(tmp_path: Path) -> None:
    settings = TinyConfig(hidden=32, layers=1, heads=2, head_dim=16, vocabulary="bytes")
    model = make_tiny(tmp_path / "tiny", settings, seed=0)
    overrides = ["samples=12", "temperature=1", "max_response_length=40", "thinking.mode=slow"]
    overrides += ["thinking.budgets=[10]", "thinking.ending= so</think>!", "model.dtype=float32"]
    talker = Talker(str(model), overrides, print)
    try:
        prompt = talker.prompt([{"role": "user", "content": "1+1?"}])
        [answers] = talker.answers([prompt], talker.n)
        assert [c.sample for c in answers] == list(range(12))
        forced = [c for c in answers if not c.mask.all()]
        assert len(forced) > 6
        for completion in forced:
            text = talker.read(prompt, completion.token_ids.tolist(), completion.finish_reason)
            assert (~completion.mask).nonzero()[0].tolist() == list(range(10, 15))
            assert text.thoughts.endswith(" so") and text.text.startswith("!")
            assert len(completion) <= 40
        heard: list[int] = []
        talker.answers([prompt], 1, lambda tokens: heard.append(len(tokens)))
        assert heard == sorted(heard) and len(set(heard)) > 10, "it streams"

        def stopping(tokens: Sequence[int]) -> None:
            if len(tokens) == 3:
                os.kill(os.getpid(), signal.SIGINT)

        with ctrl_c_stops(talker):
            [[cut]] = talker.answers([prompt], 1, stopping)
        assert 0 < len(cut) <= 4 and cut.finish_reason == "abort", "one Ctrl-C ended it"
        [[whole]] = talker.answers([prompt], 1)
        assert len(whole) == 40 or whole.finish_reason == "stop", "the next one is answered"
        with pytest.raises(ValueError, match=r"\d+ tokens are more than max_prompt_length=1024"):
            talker.prompt([{"role": "user", "content": "1" * 2000}])
    finally:
        talker.close()


def test_a_voice_never_takes_back_what_it_said(capsys: pytest.CaptureFixture[str]) -> None:
    voice = _Voice("</think>")
    for thoughts, text in [("so 1+1", ""), ("so 1+1 is 2</thi", ""), ("so 1+1 is 2", "")]:
        voice.hear(Part(thoughts=thoughts, text=text))
    assert "</" not in capsys.readouterr().err
    voice.hear(Part(thoughts="so 1+1 is 2", text="caf\ufffd"))
    voice.hear(Part(thoughts="so 1+1 is 2", text="café"))
    voice.hear(Part(thoughts="so 1+1 is 2", text="café"), done=True)
    shown = capsys.readouterr()
    assert shown.out == "café\n"


def test_an_answer_does_not_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for terminal, said in (
        (True, "\u241b]52;c;x\u2407\n\ta\ufffd"),
        (False, "\x1b]52;c;x\x07\n\ta\x9b"),
    ):
        voice = _Voice("</think>")
        voice._answer = Console(soft_wrap=True, force_terminal=terminal, no_color=True)
        voice.hear(Part(thoughts="", text="\x1b]52;c;x\x07\n\ta\x9b"))
        assert capsys.readouterr().out.replace(" " * 8, "\t") == said


def test_bytes_that_are_no_text_are_read_as_such() -> None:
    said = TextIOWrapper(BytesIO(b"1+\xff1?\n\n \xe2\x82\n"), encoding="utf-8")
    lenient(said, None)
    assert list(_lines(said)) == ["1+\ufffd1?", "\ufffd"]


def test_what_cannot_be_answered_is_one_line(tmp_path: Path) -> None:
    done = run("sample", "nowhere", "--prompt", "x", status=2)
    assert "'nowhere'" in json.loads(done.stdout)["error"]
