"""Who was busy when: rows without overlaps, Perfetto's file, and where a step's time went."""

from __future__ import annotations

import json
import time
from pathlib import Path

from emberl.rl.watch.spans import SPANS, Span, Spans, in_lanes, read_spans, trace_of
from emberl.rollout.crew import WorkerState


def span(track: str, start: float, end: float, name: str = "x") -> Span:
    return Span(track=track, name=name, start=start, end=end, step=1)


def test_what_overlaps_has_rows_of_its_own() -> None:
    inner, outer, beside, after = (
        *(span("loop", 2, 3), span("loop", 1, 5), span("loop", 4, 6), span("loop", 5, 7)),
    )
    assert in_lanes([inner, outer, beside, after]) == {"loop": [[outer, inner, after], [beside]]}
    both = in_lanes([span("graders", 0, 1), span("rollout 0", 0, 1), span("loop", 0, 1)])
    assert list(both) == ["loop", "rollout 0", "graders"]


def test_the_trace_has_a_thread_for_each_row() -> None:
    trace = trace_of([span("loop", 10.0, 10.5, "step"), span("graders", 10.1, 10.2, "grade")])
    events = trace["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {1: "loop", 2: "graders"}
    drawn = [
        (e["tid"], e["name"], round(e["ts"]), round(e["dur"])) for e in events if e["ph"] == "X"
    ]
    assert drawn == [(1, "step", 0, 500_000), (2, "grade", 100_000, 100_000)]
    assert json.loads(json.dumps(trace)) == trace


def test_where_a_steps_time_went(tmp_path: Path) -> None:
    spans = Spans(tmp_path / SPANS)
    assert spans.summary() is None
    for step in (1, 2):
        spans.step = step
        spans.add("loop", "waiting for answers", 0, 6)
        spans.add("loop", "update", 6, 9)
        spans.add("learners", "step", 6, 9)
        spans.add("loop", "saving", 20, 30)  # is no part of a step
        spans.add("loop", "step", 0, 10)
    assert (
        spans.summary()
        == "a step took 10 s: waiting for answers 60 %, update 30 %, other 10 %".replace(" %", "%")
    )
    spans.flush()
    spans.add("loop", "step", 10, 20)
    spans.flush()
    with (tmp_path / SPANS).open("a") as file:
        file.write('{"track": "loop", "na')
    found = read_spans(tmp_path)
    assert len(found) == 11 and {s.step for s in found} == {1, 2}


def test_off_they_write_nothing_and_cost_next_to_nothing(tmp_path: Path) -> None:
    spans = Spans(None)
    start = time.process_time()
    for _ in range(10_000):
        with spans.span("graders", "grade"):
            pass
    assert time.process_time() - start < 1.0, "a step has a few dozen"
    spans.flush()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_says_when_it_had_jobs() -> None:
    state = WorkerState(worker=None)
    before = time.time()
    state.busy(2)
    state.busy(0)
    state.busy(1)
    first, second = state.busy_spans()
    assert before <= first[0] <= first[1] <= second[0] <= second[1] <= time.time()
    [third] = state.busy_spans()
    assert third[0] == second[1], "what goes on is told in pieces without a gap"
    state.busy(0)
    state.busy_spans()
    assert state.busy_spans() == []
