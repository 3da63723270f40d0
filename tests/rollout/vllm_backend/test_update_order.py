"""The order of a weight update, against a list written by hand."""

from __future__ import annotations

from typing import get_args

import pytest
from emberl.rollout.vllm_backend.update_order import OrderError, State, Step, UpdateOrder

LEGAL = {
    ("serving", "pause", "paused"),
    ("broken", "pause", "paused"),
    ("paused", "sleep", "asleep"),
    ("asleep", "wake", "awake"),
    ("paused", "load", "loaded"),
    ("awake", "load", "loaded"),
    ("loaded", "clear", "cleared"),
    ("cleared", "prove", "paused"),
    ("paused", "resume", "serving"),
}


@pytest.mark.parametrize("state", get_args(State))
@pytest.mark.parametrize("step", get_args(Step))
def test_every_step_from_every_state(state: State, step: Step) -> None:
    order = UpdateOrder()
    order.state = state
    after = [end for start, name, end in LEGAL if (start, name) == (state, step)]
    if after:
        with order.step(step):
            assert order.state == "broken"  # nobody knows what is held before it is done
        assert order.state == after[0]
    else:
        with (
            pytest.raises(OrderError, match=f"'{step}' may not come while the engine is '{state}'"),
            order.step(step),
        ):
            pytest.fail("the step was taken")
        assert order.state == state


def test_a_failed_step_leads_back_through_pause_alone() -> None:
    order = UpdateOrder()
    for step in ("pause", "load"):
        with order.step(step):
            pass
    with pytest.raises(RuntimeError, match="lost"), order.step("clear"):
        raise RuntimeError("lost")
    with pytest.raises(OrderError, match="from here only pause may"), order.step("resume"):
        pass
    for step in ("pause", "load", "clear", "prove", "resume"):
        with order.step(step):
            pass
    assert order.state == "serving"
