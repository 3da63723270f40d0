"""`emberl doctor --live`: how it judges what its parts find, and the parts themselves on this
machine's CPU, whole and with faults planted in the processes that it starts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from emberl.kernels import platform
from emberl.rl.config.load import Config, load_config
from emberl.rl.watch import doctor, doctor_live
from emberl.rl.watch.doctor_live import LIVE, MEAN
from emberl.rl.watch.machine import Check, Machine, State, _group_ended, examined

planted: Any = sys.modules["planted"]  # `conftest.py` has loaded it
Box, FAULTS = planted.Box, planted.LIVE_FAULTS
SHOWS = {
    "doctor --live: what slow, hanging and wrong devices are told (made-up answers of a faked box)": (
        "test_a_fault_of_the_device_is_found_with_its_fix, test_a_healthy_box_has_a_line_for_each_part"
    ),
}
OK, WARNING, ERROR = State.OK, State.WARNING, State.ERROR
ROOT = Path(__file__).parents[3]


def look(machine: Machine) -> list[Check]:
    return list(examined(machine, LIVE))


def test_a_healthy_box_has_a_line_for_each_part() -> None:
    box = Box()
    lines = {check.name: check for check in look(box)}
    assert list(lines) == ["products", "collectives", "engine", "engine = learner"]
    assert all(check.state is OK and not check.fix for check in lines.values())
    # 260 of 313
    assert "260 TFLOP/s on Ascend910B3, 8 cards, 83% of the data sheet" in lines["products"].text
    assert "all_reduce 60 GB/s, broadcast 40 GB/s over 8 ranks" in lines["collectives"].text
    order, deadline, environ = box.asked["engine"]
    assert order["name"] == "vllm" and order["running"] == 256 and deadline == 1200
    assert order["deadline"] <= deadline
    assert environ["TASK_QUEUE_ENABLE"] == "1", "as an engine's actor has it"
    assert box.asked["products"][2]["TASK_QUEUE_ENABLE"] == "2", "as a learner's"


@pytest.mark.parametrize("fault", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_fault_of_the_device_is_found_with_its_fix(
    fault: tuple[str, Any, tuple[str, ...], str, State, str],
) -> None:
    _, plant, overrides, name, state, fix = fault
    box = Box(overrides=overrides)
    plant(box)
    found = [check for check in look(box) if check.state is not OK]
    assert [check.name for check in found] == [name], "and nothing else is blamed"
    assert found[0].state is state and fix in found[0].fix, str(found[0])


def test_one_card_has_nothing_to_exchange_and_servers_are_not_tried() -> None:
    box = Box(overrides=("rollout.servers=[http://a:8000]", "rollout.engine_args={}"))
    box.answers["collectives"] = {"ranks": 1}
    lines = {check.name: check for check in look(box)}
    assert "one card" in lines["collectives"].text and "not tried" in lines["engine"].text
    assert "engine" not in box.asked and all(check.state is OK for check in lines.values())


def test_without_a_configuration_the_engine_is_the_one_that_is_installed() -> None:
    box = Box(None)
    look(box)
    assert box.asked["engine"][0]["name"] == "vllm" and box.asked["engine"][0]["device"] == "npu"
    box.versions["vllm"] = None
    look(box)
    assert box.asked["engine"][0]["name"] == "embedded"


# The parts themselves, in processes of their own.


def quickstart(*overrides: str) -> Config:
    return load_config(
        ROOT / "configs" / "quickstart.yaml", ["model.path=unused", "model.tiny=null", *overrides]
    )


def here(tmp_path: Path, code: str = "", *overrides: str) -> Machine:
    """This machine, where every Python process runs `code` at its start."""
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(code))
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    return Machine(quickstart(*overrides), os.environ | {"PYTHONPATH": path})


@pytest.mark.slow
def test_this_machine_is_healthy(tmp_path: Path) -> None:
    """With real processes, gloo, the embedded engine and a learner."""
    lines = {check.name: check for check in look(here(tmp_path))}
    assert list(lines) == ["products", "collectives", "engine", "engine = learner"]
    assert all(check.state is OK for check in lines.values()), [*map(str, lines.values())]
    assert "FLOP/s on CPU" in lines["products"].text
    assert "over 2 ranks" in lines["collectives"].text
    assert "embedded up in" in lines["engine"].text
    assert MEAN in lines["engine = learner"].text


@pytest.mark.slow
def test_a_collective_that_hangs_costs_its_deadline_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_live, "COLLECTIVES", 145.0)
    monkeypatch.setattr(doctor_live, "SPARE", 120.0)
    machine = here(
        tmp_path,
        """
        import sys, time
        if any(part.endswith("bench_exchange") for part in sys.orig_argv):
            import torch.distributed
            torch.distributed.all_reduce = lambda *given, **more: time.sleep(1000)
        """,
    )
    start = time.monotonic()
    [line] = doctor_live.collectives(machine)
    assert line.state is ERROR and "no answer in 25 s from 2 ranks" in line.text, str(line)
    assert time.monotonic() - start < 150


@pytest.mark.slow
def test_a_rank_that_dies_is_named(tmp_path: Path) -> None:
    machine = here(
        tmp_path,
        """
        import sys
        at = [i for i, part in enumerate(sys.orig_argv) if part.endswith("bench_exchange")]
        if at and sys.orig_argv[at[0] + 2] == "1":
            raise SystemExit("no card for me")
        """,
    )
    environ = {**machine.environ}
    found = machine.live("collectives", {"device": "cpu", "deadline": 60.0}, 170.0, environ)
    assert found["error"].startswith("rank 1: ") and "no card for me" in found["error"], found


@pytest.mark.slow
def test_a_rate_far_below_the_data_sheet_is_found(tmp_path: Path) -> None:
    """A CPU that says it is a card."""
    machine = here(
        tmp_path,
        """
        import sys
        if any(part.endswith("watch.live") for part in sys.orig_argv):
            from emberl.kernels import platform
            platform.device_name = lambda target: "Ascend910B3"
        """,
    )
    [line] = doctor_live.products(machine)
    assert line.state is ERROR and "0% of the data sheet's 313 TFLOP/s" in line.text, str(line)


@pytest.mark.slow
def test_a_learner_that_computes_something_else_is_found(tmp_path: Path) -> None:
    """One matrix of it is zero: the engine serves the file's."""
    machine = here(
        tmp_path,
        """
        import sys
        if any(part.endswith("watch.live") for part in sys.orig_argv):
            from emberl.rl.learner import rank
            load = rank.LearnerRank.load
            def altered(self, path):
                load(self, path)
                for name, parameter in self.policy.named_parameters():
                    if name.endswith("layers.1.self_attn.v_proj.weight"):
                        parameter.detach().to_local().zero_()
            rank.LearnerRank.load = altered
        """,
    )
    up, apart = doctor_live.engine(machine)
    assert up.state is OK
    assert apart.name == "engine = learner" and apart.state is ERROR, str(apart)


def test_what_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '1000'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    with tempfile.TemporaryFile("w+") as out:
        start = time.monotonic()
        assert _group_ended([sys.executable, "-c", code], 5.0, os.environ, out, out) is None
        assert time.monotonic() - start < 30
        out.seek(0)
        child = int(out.read())
    until = time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != "zombie":
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_an_engine_that_there_is_not_is_said(tmp_path: Path) -> None:
    [line] = doctor_live.engine(here(tmp_path, "", "rollout.engine=nowhere:make"))
    assert line.state is ERROR and "did not start" in line.text and "nowhere" in line.text


@pytest.mark.parametrize(
    ("code", "error"),
    [("raise SystemExit('no driver')", "no driver"), ("import os; os._exit(3)", "status 3")],
)
def test_a_part_that_ends_without_an_answer_says_why(tmp_path: Path, code: str, error: str) -> None:
    machine = here(tmp_path, code)
    found = machine.live("products", {"device": "cpu"}, 120.0, machine.environ)
    assert error in found["error"]


def test_what_is_spawned_from_a_part_imports_nothing_of_ours_with_it() -> None:
    """Spawned processes import the file that was started; vLLM's end where numba is loaded."""
    code = "import sys, emberl.rl.watch.live; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert "emberl.rl.watch.live" in loaded
    assert not {"torch", "numba", "numpy", "ray", "transformers"} & set(loaded)


def test_the_doctor_is_quiet_about_the_device_unless_it_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "EXAMINATIONS", ())
    monkeypatch.setattr(doctor, "LIVE", (lambda machine: [Check(name="x", state=OK, text="")],))
    assert list(doctor.examine()) == []
    assert [check.name for check in doctor.examine(live=True)] == ["x"]


def test_cards_are_all_seen_by_the_parts() -> None:
    """The switch is for actors, which Ray gives one card each."""
    switch = str(platform.NPU.ray_noset)
    box = Box()
    box.environ[switch] = "1"
    look(box)
    assert all(switch not in environ for _, _, environ in box.asked.values())
