"""A run that does not learn says so: once, with its cause, and not before it has gone on for a while."""

from __future__ import annotations

from typing import Any

import pytest
from emberl.rl.config.load import Config, resolve
from emberl.rl.watch.alarms import Alarms

HEALTHY = {
    "critic/score/max": 1.0, "critic/score/min": 0.0, "training/updates": 1.0, "training/cut_fraction": 0.2,
    "actor/entropy_per_token": 0.4, "actor/grad_norm": 0.3, "actor/nonfinite_logp": 0.0,
}  # fmt: skip


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
    found = [(i, a.title, a.text) for i, step in enumerate(steps, 1) for a in alarms.after(i, HEALTHY | step)]
    return found + [(0, a.title, a.text) for a in alarms.at_end()]


@pytest.mark.parametrize(
    ("step", "title", "text"),
    [
        ({"critic/score/max": 0.0}, "reward stuck at 0", "no answer has scored above 0: the problems are too hard"),
        (
            {"critic/score/max": 0.0, "training/cut_fraction": 0.9},
            "reward stuck at 0",
            "90% of the answers are cut at rollout.max_response_length=512; raise it first",
        ),
        ({"critic/score/max": 0.45, "critic/score/min": 0.45}, "all rewards equal", "every answer scores 0.45"),
        ({"critic/score/max": 0.1 + 0.2, "critic/score/min": 0.3}, "all rewards equal", "every answer scores 0.3"),
        (
            {
                "training/updates": 0.0, "training/filter_groups/dropped": 64.0, "training/filter_groups/solved_all": 60.0,
                "training/filter_groups/solved_none": 4.0,
            },
            "no update",
            "all 64 groups have equal scores (60 solved by every answer, 4 by none)",
        ),
        ({"training/updates": 0.0}, "no update", "no token had an advantage"),
        ({"training/cut_fraction": 1.0}, "answers all cut off", "rollout.max_response_length=512 and is cut; raise it"),
        ({"actor/entropy_per_token": 1e-4}, "entropy collapsed", "0.0001 nats a token, below tracking.entropy_floor=0.003"),
        ({"actor/grad_norm": 0.0}, "no gradient", "a gradient of exactly 0"),
        ({"actor/nonfinite_logp": 0.5}, "log-probs are not finite", "50.0% of the tokens"),
        ({"actor/grad_norm": float("nan"), "actor/steps_skipped": 3.0}, "gradients are not finite", "3 updates were left out"),
    ],
)  # fmt: skip
def test_each_sign_is_said_once(step: dict[str, float], title: str, text: str) -> None:
    found = said(*[step] * 7)
    assert [(i, t) for i, t, _ in found] == [(3, title)]
    assert found[0][2].startswith("steps 1 to 3: ") and text in found[0][2]


def test_a_healthy_run_says_nothing() -> None:
    assert said(*[{}] * 9) == []


def test_a_sign_must_hold_in_a_row() -> None:
    assert said({"training/updates": 0.0}, {"training/updates": 0.0}, {}, {"training/updates": 0.0}) == []


def test_a_run_that_is_shorter_says_it_at_its_end() -> None:
    assert [(i, title) for i, title, _ in said(*[{"training/updates": 0.0}] * 2)] == [(0, "no update")]
    assert said({}, {"training/updates": 0.0}) == []


def test_the_warm_up_of_a_critic_is_no_lack_of_updates() -> None:
    assert said(*[{"training/updates": 0.0, "critic/vf_loss": 0.1}] * 5) == []


def test_it_can_be_turned_off() -> None:
    assert said(*[{"training/updates": 0.0}] * 9, warn_after=0) == []
