"""A run that does not learn says so: once, with its cause, and not before it has gone on for a
while. First the signs by their metrics, then the loop itself on a scripted engine, grader and
learner: what it prints, alerts and returns."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emberl.rewards.verdict import Status, Verdict
from emberl.rl.config.load import Config, resolve
from emberl.rl.groups import Group, Progress
from emberl.rl.recipe import Result, go
from emberl.rl.watch.alarms import Alarms, failures
from emberl.rl.watch.tracking import Tracker
from emberl.rollout.pool import Job
from emberl.rollout.samples import Completion, Prompt, Sampling, Span
from rich.console import Console

HEALTHY = {
    "critic/score/max": 1.0,
    "critic/score/min": 0.0,
    "training/updates": 1.0,
    "training/cut_fraction": 0.2,
    "actor/entropy_per_token": 0.4,
    "actor/grad_norm": 0.3,
    "actor/nonfinite_logp": 0.0,
    "training/accuracy": 0.5,
}


def config(**tracking: Any) -> Config:
    tree = {
        "name": "t",
        "model": {"path": "x"},
        "data": {"source": "arithmetic"},
        "tracking": {"warn_after": 3, **tracking},
    }
    return resolve(tree)


def said(*steps: dict[str, float], **tracking: Any) -> list[tuple[int, str, str]]:
    """(step, title, text) of everything that is said in a run of these steps."""
    alarms = Alarms(config(**tracking))
    found = [
        (i, a.title, a.text)
        for i, step in enumerate(steps, 1)
        for a in alarms.after(i, HEALTHY | step)
    ]
    return found + [(0, a.title, a.text) for a in alarms.at_end()]


@pytest.mark.parametrize(
    ("step", "title", "text"),
    [
        (
            {"critic/score/max": 0.0},
            "reward stuck at 0",
            "no answer has scored above 0: the problems are too hard",
        ),
        (
            {"critic/score/max": 0.0, "training/cut_fraction": 0.9},
            "reward stuck at 0",
            "90% of the answers are cut at rollout.max_response_length=512; raise it first",
        ),
        (
            {"critic/score/max": 0.45, "critic/score/min": 0.45},
            "all rewards equal",
            "every answer scores 0.45",
        ),
        (
            {"critic/score/max": 0.1 + 0.2, "critic/score/min": 0.3},
            "all rewards equal",
            "every answer scores 0.3",
        ),
        (
            {
                "training/updates": 0.0,
                "training/filter_groups/dropped": 64.0,
                "training/filter_groups/solved_all": 60.0,
                "training/filter_groups/solved_none": 4.0,
            },
            "no update",
            "all 64 groups have equal scores (60 all above 0, 4 all 0 or less)",
        ),
        ({"training/updates": 0.0}, "no update", "no token had an advantage"),
        (
            {"training/cut_fraction": 1.0},
            "answers all cut off",
            "rollout.max_response_length=512 and is cut; raise it",
        ),
        ({"actor/grad_norm": 0.0}, "no gradient", "a gradient of exactly 0"),
        ({"actor/nonfinite_logp": 0.5}, "log-probs are not finite", "50.0% of the tokens"),
        (
            {"actor/grad_norm": float("nan"), "actor/steps_skipped": 3.0},
            "gradients are not finite",
            "3 updates were left out",
        ),
    ],
)
def test_each_sign_is_said_once(step: dict[str, float], title: str, text: str) -> None:
    found = said(*[step] * 7)
    assert [(i, t) for i, t, _ in found] == [(3, title)]
    assert found[0][2].startswith("steps 1 to 3: ") and text in found[0][2]


def test_a_healthy_run_says_nothing() -> None:
    assert said(*[{}] * 9) == []


def test_a_sign_must_hold_in_a_row() -> None:
    assert (
        said({"training/updates": 0.0}, {"training/updates": 0.0}, {}, {"training/updates": 0.0})
        == []
    )


def test_a_run_that_is_shorter_says_it_at_its_end() -> None:
    assert [(i, title) for i, title, _ in said(*[{"training/updates": 0.0}] * 2)] == [
        (0, "no update")
    ]
    assert said({}, {"training/updates": 0.0}) == []


def test_the_warm_up_of_a_critic_is_no_lack_of_updates() -> None:
    assert said(*[{"training/updates": 0.0, "critic/vf_loss": 0.1}] * 5) == []


def test_it_can_be_turned_off() -> None:
    assert said(*[{"training/updates": 0.0}] * 9, warn_after=0) == []


def entropies(
    *found: float | None, accuracy: float = 0.5, **tracking: Any
) -> list[tuple[int, str]]:
    rows = [{} if e is None else {"actor/entropy_per_token": e} for e in found]
    without = {key: value for key, value in HEALTHY.items() if key != "actor/entropy_per_token"}
    alarms = Alarms(config(**tracking))
    said = [
        (i, alarm.text)
        for i, row in enumerate(rows, 1)
        for alarm in alarms.after(i, without | row | {"training/accuracy": accuracy})
    ]
    return said + [(0, alarm.text) for alarm in alarms.at_end()]


@pytest.mark.parametrize(
    ("found", "at"),
    [
        ((0.4, 0.01, 0.01, 0.01), [4]),  # 2.5 % of the start, three steps in a row
        ((0.4, 0.01, 0.03, 0.01, 0.01), []),  # 7.5 % in between
        ((0.4, 0.021, 0.021, 0.021, 0.021), []),
        ((0.004, 0.004, 0.004, 0.004), []),  # low from the start, as after a cold start on one form
        ((None, 0.4, 0.01, None, 0.01, None, 0.01), [7]),  # a step without an update does not tell
        ((None, None, None, None), []),
        ((0.4, 0.01), []),
        ((float("nan"), 0.4, 0.01, 0.01, 0.01), [5]),
    ],
)
def test_entropy_is_compared_with_that_of_the_first_step(
    found: Sequence[float | None], at: list[int]
) -> None:
    assert [step for step, _ in entropies(*found)] == at
    assert entropies(*found, accuracy=0.95) == [], "who solves the problems need not explore"
    assert entropies(*found, entropy_floor=0.0) == []


def test_what_is_said_of_entropy() -> None:
    [(_, text)] = entropies(0.4, None, 0.01, 0.01, 0.01)
    assert text.startswith(
        "steps 3 to 5: the policy's entropy is 0.01 nats a token, 2.5% of what it was at the start"
    )
    assert "(tracking.entropy_floor=0.05), and 50% of the answers are right" in text


def test_a_resumed_run_compares_with_its_first_sitting() -> None:
    alarms = Alarms(config(), entropy_start=0.4)
    low = HEALTHY | {"actor/entropy_per_token": 0.01}
    assert [alarm.title for i in range(3) for alarm in alarms.after(i + 7, low)] == [
        "entropy collapsed"
    ]
    assert alarms.entropy_start == 0.4


# The loop --------------------------------------------------------------------------------

LONGEST = 4


class Engine:
    """Answers at once with as many tokens as it is told."""

    restarts = served = 0

    def __init__(self, length: int) -> None:
        self.length = length

    def busy_spans(self) -> list[tuple[int, float, float]]:
        return []

    async def served_after(self, version: int) -> int:
        return await asyncio.get_running_loop().create_future()  # never

    def submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.finish(tuple(self.answer(job.prompt.id, i) for i in range(job.n)))

    def answer(self, prompt_id: str, sample: int) -> Completion:
        return Completion(
            prompt_id=prompt_id,
            sample=sample,
            token_ids=np.full(self.length, 5, np.int32),
            logprobs=np.full(self.length, -0.5, np.float32),
            spans=(Span(self.served, 0, self.length),),
            finish_reason="length" if self.length == LONGEST else "stop",
        )

    def cut(self, jobs: Sequence[Job]) -> None: ...

    def idle_seconds(self) -> list[float]:
        return [0.0]


def loop(
    folder: Path,
    score: Callable[[int, int], float],
    *,
    length: int = 2,
    entropy: Sequence[float] = (0.4,),
    **tree: Any,
) -> tuple[Result, str, list[dict[str, str]]]:
    """Runs the RL stage: its result, what the console shows and W&B's alerts. score: of a problem's
    number and a sample's."""
    settings = {
        "name": "t",
        "model": {"path": "x"},
        "data": {"source": "arithmetic"},
        "eval": {"size": 0},
        "rollout": {"group_size": 2, "max_response_length": LONGEST},
        "checkpoint": {"every": 0},
        "schedule": {"steps": 4, "prompts_per_step": 2},
        "tracking": {"warn_after": 3, "wandb": "disabled", "rollouts": "none", "samples": 0},
        **tree,
    }
    config = resolve(settings)
    text, alerts = io.StringIO(), []
    tracker = Tracker(config, folder, Console(file=text, soft_wrap=True))
    wandb = SimpleNamespace(
        log=lambda *_: None,
        histograms=lambda *_: None,
        alert=lambda title, text: alerts.append({"title": title, "text": text}),
    )
    tracker._sinks = [SimpleNamespace(call=lambda do, key=None: do(wandb), close=lambda: None)]  # type: ignore[list-item]
    steps = iter([*entropy, *[entropy[-1]] * 99])

    def grade(prompt: Prompt, completions: Sequence[Completion]) -> Group:
        scores = [score(int(prompt.id[1:]), completion.sample) for completion in completions]
        verdicts = tuple(
            Verdict(
                status=Status.PARTIAL if 0 < s < 1 else Status.CORRECT if s else Status.WRONG,
                score=s,
            )
            for s in scores
        )
        return Group(prompt=prompt, completions=tuple(completions), verdicts=verdicts)

    async def nothing(**_: Any) -> dict[str, float]:
        return {}

    learners = SimpleNamespace(
        begin_stage=lambda *a: None,
        skip=lambda n: None,
        step=lambda batch, objective: {
            "actor/loss": 0.0,
            "actor/entropy_per_token": next(steps),
            "actor/grad_norm": 0.3,
            "actor/nonfinite_logp": 0.0,
        },
    )
    run: Any = SimpleNamespace(
        config=config,
        run_dir=folder,
        progress=Progress(),
        answers=None,
        evaluation=None,
        evaluated=nothing,
        started=0.0,
        tracker=tracker,
        learners=learners,
        pool=Engine(length),
        suite=SimpleNamespace(finished=0, metrics=dict),
        grade=grade,
        save=nothing,
        saved=nothing,
        source=SimpleNamespace(
            train=lambda i: Prompt(id=f"p{i}", token_ids=(3,), answer="", source="s")
        ),
        publish=nothing,
        learning=nullcontext,
        stop_if_asked=nothing,
        weights=SimpleNamespace(
            under_way=None, check=lambda: None, delivered=nothing, check_step=lambda *_: {}
        ),
        sampling=lambda step: Sampling(max_tokens=LONGEST, seed=step),
    )
    result = asyncio.run(go(run, None))
    tracker.close()
    return result, text.getvalue(), alerts


ONE_RIGHT = {"score": lambda problem, sample: float(sample == 0)}


@pytest.mark.parametrize(
    ("case", "titles", "updates", "text"),
    [
        (ONE_RIGHT, [], 4, ""),
        (
            {"score": lambda problem, sample: 0.5},
            ["all rewards equal", "no update"],
            0,
            "every answer scores 0.5, so that none is better than another",
        ),
        (
            {"score": lambda problem, sample: 0.0},
            ["reward stuck at 0", "no update"],
            0,
            "all 2 groups have equal scores (0 all above 0, 2 all 0 or less)",
        ),
        (
            {"score": lambda problem, sample: float(problem % 2)},
            ["no update"],
            0,
            "all 2 groups have equal scores (1 all above 0, 1 all 0 or less)",
        ),
        (
            ONE_RIGHT | {"length": LONGEST},
            ["answers all cut off"],
            4,
            "every answer reaches rollout.max_response_length=4",
        ),
        (
            ONE_RIGHT | {"entropy": (0.4, 0.01)},
            ["entropy collapsed"],
            4,
            "2.5% of what it was at the start",
        ),
        (
            ONE_RIGHT | {"schedule": {"steps": 2, "prompts_per_step": 2}, "length": LONGEST},
            ["answers all cut off"],
            2,
            "steps 1 to 2: every answer reaches",
        ),
    ],
    ids=["learns", "equal", "zero", "no update", "cut", "entropy", "short"],
)
def test_the_loop_says_that_it_does_not_learn(
    tmp_path: Path, case: dict[str, Any], titles: list[str], updates: int, text: str
) -> None:
    result, console, alerts = loop(tmp_path, **case)
    assert [alert["title"] for alert in alerts] == titles
    assert [line.partition(": ")[0] for line in result.warnings] == titles
    assert all(f"warning: {line}\n" in console for line in result.warnings), "one line each"
    assert text in " ".join(result.warnings)
    assert (result.updates, result.steps) == (updates, case.get("schedule", {"steps": 4})["steps"])
    assert json.loads(json.dumps(result.as_json()))["warnings"] == list(result.warnings)


def test_what_failed_and_was_made_good_is_said() -> None:
    fine = {"sync/digest_failures": 0.0, "sync/reloads": 0.0, "training/verifier_errors": 0.0}
    assert failures(3, fine) == []
    said = failures(3, dict.fromkeys(fine, 2.0))
    assert [alarm.title for alarm in said] == [
        *("digest failures", "probe failures", "verifier errors"),
    ]
    assert all(alarm.text.startswith("step 3: 2 ") for alarm in said)
