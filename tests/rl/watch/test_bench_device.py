"""`emberl bench device`: figures follow from sizes and times, a broken part costs no other, a
collective that hangs ends."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from emberl.kernels import platform
from emberl.rl.watch import bench_device
from emberl.rl.watch.bench_device import QUICK, Sizes
from emberl.rl.watch.bench_timing import seconds
from typer.testing import CliRunner

CPU, HERE = platform.CPU, torch.device("cpu")
SHOWS = {
    "bench device: its figures, its file, and that emberl plan reads it (a CPU's figures)": (
        "test_figures_are_sizes_over_times, test_a_broken_part_costs_no_other,"
        " test_decoding_is_a_table_of_steps, test_the_command_writes_what_a_plan_reads"
    ),
}
SMALL = Sizes(gemm=(8,), moved=1000, reduced=4096, elements=10, running=(1, 2), context=(4,),
              steps=3, rounds=1, deadline=90.0)  # fmt: skip


def test_a_time_is_the_median_without_the_first_and_with_the_waiting() -> None:
    naps = iter([0.2, 0.01, 0.03, 0.02])
    waited = []
    taken = seconds(lambda: time.sleep(next(naps)), lambda: waited.append(1), rounds=3)
    assert 0.02 <= taken < 0.03
    assert len(waited) == 8, "before and after each of four runs"


def test_figures_are_sizes_over_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_device, "seconds", lambda run, wait, rounds: (run(), 2.0)[1])
    assert bench_device.gemm(CPU, HERE, SMALL)["float32 8"] == 2 * 8**3 / 2.0
    assert bench_device.memory(CPU, HERE, SMALL) == {"copy": 1000.0}, "read and written"
    assert bench_device.link(CPU, HERE, SMALL) == {"to_device": 500.0, "to_host": 500.0}
    assert bench_device.commit(CPU, HERE, SMALL) == {
        "copy_bytes_per_s": 500.0, "hash_bytes_per_s": 500.0, "scatter_elements_per_s": 5.0,
    }  # fmt: skip


def test_a_broken_part_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such operator")

    for part in ("gemm", "collective", "decode"):
        monkeypatch.setattr(bench_device, part, broken)
    found = bench_device.measure("cpu", SMALL)
    assert found["gemm"] == {"error": "RuntimeError: no such operator"}
    assert found["memory"]["copy"] > 0 and found["commit"]["hash_bytes_per_s"] > 0
    assert found["platform"] == "cpu" and found["versions"]["torch"].startswith("2.")


def test_decoding_is_a_table_of_steps(tmp_path: Path) -> None:
    found = bench_device.decode(CPU, HERE, SMALL, None)
    assert found["running"] == [1, 2] and found["context"] == [4]
    assert [len(row) for row in found["seconds"]] == [1, 1]
    assert all(0 < step < 60 for row in found["seconds"] for step in row)


def test_one_device_has_nothing_to_exchange() -> None:
    assert "one device" in bench_device.collective(platform.NPU, 1, SMALL)["error"]


@pytest.mark.slow
def test_the_command_writes_what_a_plan_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With real processes for the collective; and one that hangs is ended at its deadline."""
    from emberl.rl.cli import app

    file = tmp_path / "device.json"
    done = CliRunner().invoke(
        app, ["bench", "device", "--device", "cpu", "--quick", "--json", str(file)]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert found["collective"]["ranks"] == 2
    assert found["collective"]["all_reduce"] > 0 and found["collective"]["broadcast"] > 0
    assert all(found["commit"][name] > 0 for name in
               ("copy_bytes_per_s", "hash_bytes_per_s", "scatter_elements_per_s"))  # fmt: skip
    late = Sizes(reduced=4096, deadline=0.3)
    start = time.monotonic()
    assert "no answer in 0.3 s" in bench_device.collective(CPU, 2, late)["error"]
    assert time.monotonic() - start < 10
    assert QUICK.deadline > late.deadline
