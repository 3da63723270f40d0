"""Spans of time, a few dozen in a step: the driver's phases, the calls to the learners, the work of
each rollout worker and of the graders.

`<run_dir>/spans.jsonl` has a line for each; `trace_of` makes a file of them that Perfetto and
chrome://tracing load.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SPANS = "spans.jsonl"
STEP = "step"
"""The name of the span that holds the phases of a step, on the track of the loop."""
LOOP = "loop"


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One piece of work, e.g.
    `Span(track="learners", name="step", start=1.7e9, end=1.7e9 + 2, step=12)`."""

    track: str
    """`loop`, `learners`, `rollout 0`, ..., `graders`, `weights`."""
    name: str
    start: float
    """Seconds since 1970."""
    end: float
    step: int
    """The RL or SFT step that was under way."""


class Spans:
    """Collects spans; `add` may be called from any thread."""

    def __init__(self, file: Path | None) -> None:
        """file: None: nothing is written, but `summary` works all the same."""
        self._file = file
        self._new: list[Span] = []  # without a lock: appending is atomic
        self.step = 0
        self._totals: dict[str, float] = defaultdict(float)
        self.steps = 0
        """Steps whose phases were counted."""

    def add(self, track: str, name: str, start: float, end: float) -> None:
        if self._file is not None:
            self._new.append(Span(track=track, name=name, start=start, end=end, step=self.step))
        if track == LOOP:
            self._totals[name] += end - start
            self.steps += name == STEP

    @contextmanager
    def span(self, track: str, name: str) -> Iterator[None]:
        """Adds a span of the duration of its block, also if that raises."""
        start = time.time()
        try:
            yield
        finally:
            self.add(track, name, start, time.time())

    def flush(self) -> None:
        """Appends the new spans to the file; after an error of the disk nothing more is written."""
        new = self._new
        self._new = []
        if self._file is None or not new:
            return
        try:
            with self._file.open("a") as file:
                file.write("".join(f"{json.dumps(asdict(span))}\n" for span in new))
        except OSError:
            self._file = None

    def summary(self) -> str | None:
        """The shares of an RL step's time, e.g. `a step took 4.1 s: waiting for answers 61 %,
        update 30 %, publish 5 %, other 4 %`; None before the first."""
        whole = self._totals[STEP]
        if not self.steps or whole <= 0:
            return None
        parts = {name: s for name, s in self._totals.items() if name in PHASES}
        parts["other"] = max(0.0, whole - sum(parts.values()))
        shares = ", ".join(
            f"{name} {seconds / whole:.0%}"
            for name, seconds in sorted(parts.items(), key=lambda item: -item[1])
        )
        return f"a step took {whole / self.steps:.3g} s: {shares}"


PHASES = ("waiting for answers", "estimates", "update", "publish")
"""The phases of a step, which do not overlap."""


def read_spans(run_dir: Path) -> list[Span]:
    """A run's spans, sorted by start; lines that are incomplete are left out."""
    file = run_dir / SPANS
    spans = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            spans.append(Span(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return sorted(spans, key=lambda span: (span.start, -span.end))


def in_lanes(spans: Iterable[Span]) -> dict[str, list[list[Span]]]:
    """Track -> its spans in lanes, in which spans are disjoint or one contains the other."""
    tracks: dict[str, list[list[Span]]] = {}
    under_way: dict[str, list[list[float]]] = {}  # for each lane the ends of its open spans
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        lanes, ends = tracks.setdefault(span.track, []), under_way.setdefault(span.track, [])
        for stack in ends:
            while stack and stack[-1] <= span.start:
                stack.pop()
        free = next((i for i, stack in enumerate(ends) if not stack or span.end <= stack[-1]), None)
        if free is None:
            free = len(lanes)
            lanes.append([])
            ends.append([])
        lanes[free].append(span)
        ends[free].append(span.end)
    return dict(sorted(tracks.items(), key=lambda item: _order(item[0])))


def _order(track: str) -> tuple[int, str]:
    first = ("loop", "learners", "weights", "rollout", "graders")
    return next((i for i, name in enumerate(first) if track.startswith(name)), len(first)), track


def trace_of(spans: Sequence[Span]) -> dict[str, Any]:
    """The spans in Chrome's trace event format: a thread for each lane, times in microseconds."""
    events: list[dict[str, Any]] = []
    start = min((span.start for span in spans), default=0.0)
    number = 0
    for track, lanes in in_lanes(spans).items():
        for i, lane in enumerate(lanes):
            number += 1
            name = track if len(lanes) == 1 else f"{track} ({i + 1})"
            which = {"pid": 1, "tid": number}
            events.append({"ph": "M", "name": "thread_name", "args": {"name": name}, **which})
            events.append(
                {"ph": "M", "name": "thread_sort_index", "args": {"sort_index": number}, **which}
            )
            events += [
                {"ph": "X", "name": span.name, "cat": track, "args": {"step": span.step}}
                | {"ts": (span.start - start) * 1e6, "dur": (span.end - span.start) * 1e6}
                | which
                for span in lane
            ]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"start": start}}
