"""What every benchmark shares: records, versions, interleaved timing. Set the threads before
importing torch.

A record is one JSON line: bench, case, impl, value, unit, ratio, floor, versions, machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning pools slow a two-core machine 10-20x


def versions(*names: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", *names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def machine() -> dict[str, Any]:
    model = "unknown"
    if (info := Path("/proc/cpuinfo")).exists():
        model = next(
            (
                line.split(":", 1)[1].strip()
                for line in info.read_text().splitlines()
                if "model name" in line
            ),
            model,
        )
    return {"cpu": model, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}


class Report:
    """Prints one line per record and, with `--json FILE`, appends the same records there."""

    def __init__(self, bench: str, json_path: Path | None, *packages: str) -> None:
        self.bench, self.json_path = bench, json_path
        self.versions, self.machine = versions(*packages), machine()

    def record(
        self,
        case: str,
        impl: str,
        value: float,
        unit: str,
        *,
        ratio: float | None = None,
        floor: float | None = None,
        **extra: Any,
    ) -> None:
        row = {
            "bench": self.bench,
            "case": case,
            "impl": impl,
            "value": value,
            "unit": unit,
            "ratio": ratio,
            "floor": floor,
        }
        row |= extra | {"versions": self.versions, "machine": self.machine}
        notes = "".join(
            f"  {k}={v:.4g}" if isinstance(v, float) else f"  {k}={v}" for k, v in extra.items()
        )
        print(
            f"{self.bench:10} {case:28} {impl:28} {value:12.4g} {unit:10}"
            + (f" {ratio:6.2f}x" if ratio is not None else "")
            + (f"  floor {floor:.4g}" if floor is not None else "")
            + notes,
            flush=True,
        )
        if self.json_path is not None:
            with self.json_path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def interleave(impls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each implementation, taken in turns so that a drifting machine hits them alike;
    one warm-up each."""
    for run in impls.values():
        run()
    return in_turns(impls, rounds)


def in_turns(impls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """`interleave` for implementations that have run before."""
    seconds: dict[str, list[float]] = {name: [] for name in impls}
    for _ in range(rounds):
        for name, run in impls.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


@contextmanager
def served(
    name: str, command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[Callable[[], float]]:
    """A process that answers every line with a number: each call asks for one. It is to end when no
    more lines come."""
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | environment,
        ) as process,
    ):
        asked, answers = process.stdin, process.stdout
        assert asked is not None and answers is not None

        def answer(asked: IO[str] = asked, answers: IO[str] = answers) -> float:
            asked.write("\n")
            asked.flush()
            line = answers.readline()
            if not line:
                log.seek(0)
                sys.exit(f"{name} failed:\n{log.read()[-3000:]}")
            return float(line)

        yield answer
        asked.close()


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smoke run: small shapes, one round")
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="append one record a line"
    )
    return parser
