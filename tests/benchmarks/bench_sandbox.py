"""Sandboxed runs a second and core, beside plain Python processes and bubblewrap's own, in one
interleaved run.

    python tests/benchmarks/bench_sandbox.py [--quick] [--json FILE]

One run: the function `add`, three calls with plain values back (`calls`), or a script on stdin
(`program`). The process and everything that it starts are pinned to one core, so that a run a
second is a run a second and core. `cpu_ms`: the processor time of one run, of all processes that
take part, this one included; on a loaded machine it says more.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

from emberl.rewards.processes import descendants, stat_of
from emberl.rewards.sandbox.pool import Limits, Sandbox, SandboxUnavailable
from harness import Report, arguments, interleave

FLOOR = 500.0
ADD = "def add(a, b):\n    return a + b\n"
SCRIPT = "a, b = map(int, input().split())\nprint(a + b)\n"
_WALLS = (
    "--unshare-all --clearenv --die-with-parent --ro-bind / / --tmpfs /tmp --proc /proc --dev /dev"
)
BWRAP = _WALLS.split()


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    count, rounds = (20, 2) if options.quick else (200, 9)
    report = Report("sandbox", options.json)
    boxes = [
        box for name in ("zygote", "bubblewrap", "landlock") if (box := _box(name)) is not None
    ]
    runs: dict[str, Callable[[], None]] = {}
    for box in boxes:
        runs[f"calls/emberl {box.backend}"] = lambda b=box: _calls(b, count)
        runs[f"program/emberl {box.backend}"] = lambda b=box: _programs(b, count)
    few = max(count // 20, 2)  # these are slow
    python = [os.path.realpath(sys.executable)]
    runs["program/python"] = lambda: _processes(python, few)
    runs["program/python -I -S"] = lambda: _processes([*python, "-I", "-S"], few)
    if shutil.which("bwrap"):
        runs["program/bwrap python -I -S"] = lambda: _processes(
            ["bwrap", *BWRAP, *python, "-I", "-S"], few
        )
    seconds = interleave(runs, rounds)
    for name, times in seconds.items():
        case, _, impl = name.partition("/")
        each = sorted(times)[len(times) // 2] / (count if "emberl" in name else few)
        best = min(times) / (count if "emberl" in name else few)
        base = sorted(seconds["program/python"])[rounds // 2] / few
        floor = FLOOR if name == "calls/emberl zygote" else None
        report.record(case, impl, 1 / each, "runs/s", ratio=base / each, floor=floor, best=1 / best)
    for box in boxes:
        for case, run in (("calls", _calls), ("program", _programs)):
            start = _processor_seconds()
            run(box, count)
            each = (_processor_seconds() - start) / count
            floor = FLOOR if (case, box.backend) == ("calls", "zygote") else None
            report.record(
                f"{case}, CPU",
                f"emberl {box.backend}",
                1 / each,
                "runs/CPU s",
                floor=floor,
                cpu_ms=each * 1e3,
            )
        box.close()


def _processor_seconds() -> float:
    """Of this process, those below it, and those that these have outlived."""
    total = time.process_time()
    for pid in descendants(os.getpid()):
        words = stat_of(pid)
        total += sum(map(int, words[11:15])) / os.sysconf("SC_CLK_TCK") if words else 0.0
    return total


def _box(backend: str) -> Sandbox | None:
    try:
        return Sandbox(workers=1, backend=backend)
    except SandboxUnavailable as error:
        print(f"# {error}", file=sys.stderr)
        return None


def _calls(box: Sandbox, count: int) -> None:
    limits = Limits()
    for _ in range(count):
        with box.session(
            {"task": "calls", "code": [ADD]}, limits, first={"eval": "add(0, 2)"}
        ) as talk:
            talk.receive()
            for a in range(3):
                if a:
                    talk.send({"eval": f"add({a}, 2)"})
                assert json.loads(talk.receive()) == {"ok": a + 2}


def _programs(box: Sandbox, count: int) -> None:
    for _ in range(count):
        assert box.run_program(SCRIPT, b"2 3\n").stdout == b"5\n"


def _processes(command: list[str], count: int) -> None:
    for _ in range(count):
        done = subprocess.run(
            [*command, "-c", SCRIPT], input=b"2 3\n", stdout=subprocess.PIPE, check=True
        )
        assert done.stdout == b"5\n"


if __name__ == "__main__":
    main()
