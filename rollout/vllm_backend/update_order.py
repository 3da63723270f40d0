"""The state machine of an engine's weight updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

State = Literal["serving", "paused", "asleep", "awake", "loaded", "cleared", "broken"]
Step = Literal["pause", "sleep", "wake", "load", "clear", "prove", "resume"]

LEGAL: dict[Step, dict[State, State]] = {
    "pause": {"serving": "paused", "broken": "paused"},
    "sleep": {"paused": "asleep"},
    "wake": {"asleep": "awake"},
    "load": {"paused": "loaded", "awake": "loaded"},
    "clear": {"loaded": "cleared"},
    "prove": {"cleared": "paused"},
    "resume": {"paused": "serving"},
}
"""Step -> state before -> state after; any other order raises:

    serving -> paused -> loaded -> cleared -> paused -> serving          an update
    serving -> paused -> asleep -> awake -> loaded -> ...                a colocated engine

Out of order each step is a silent fault on some device: loading into a running step mixes two
versions in one token, loading into sleeping weights is a device fault on an NPU and goes unnoticed
on CUDA, going on with prompts that older weights cached, or serving bytes that nobody compared, is
noticed by nobody. What woke has to be loaded and proved before it serves."""


class OrderError(RuntimeError):
    """A step of a weight update that is not allowed in the current state."""


class UpdateOrder:
    """The state of one engine. A step that fails leaves it `broken`, from which only `pause` is
    allowed."""

    def __init__(self) -> None:
        self.state: State = "serving"

    @contextmanager
    def step(self, step: Step) -> Iterator[None]:
        """Around a step: sets the state after it. Raises OrderError, before it begins, if it is not
        allowed now."""
        if self.state not in LEGAL[step]:
            allowed = " or ".join(name for name, moves in LEGAL.items() if self.state in moves)
            raise OrderError(
                f"{step!r} may not come while the engine is {self.state!r}: from here only"
                f" {allowed} may"
            )
        before = self.state
        self.state = "broken"  # for as long as the step takes, and if it raises
        yield
        self.state = LEGAL[step][before]
