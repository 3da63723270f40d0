"""configs/ascend/doctor.md: what the doctor says of a faked box, and each planted fault with the line
that found it. `EMBERL_WRITE=1 pytest tests/rl/watch/test_doctor_page.py` writes both anew."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from emberl.rl.watch.doctor_ascend import ASCEND
from emberl.rl.watch.doctor_live import LIVE
from emberl.rl.watch.machine import Check, State, examined

PAGE = Path(__file__).parents[3] / "configs" / "ascend" / "doctor.md"
BEGIN, END = "<!-- planted: begin -->", "<!-- planted: end -->"
TOGETHER = (
    "set_env.sh was not sourced", "stock triton shadows it", "a wheel for A2 on an A3",
    "the task queue against graphs", "an interface that there is not", "no jemalloc",
)  # fmt: skip
TOGETHER_LIVE = ("one slow card of eight", "a collective that hangs")


planted: Any = sys.modules["planted"]  # `conftest.py` has loaded it
COMMAND = "    $ emberl doctor configs/ascend/8x910b_qwen2.5_7b.yaml --live"


def transcript(box: Any) -> list[str]:
    return [COMMAND, *(f"    {check}" for check in examined(box, (*ASCEND, *LIVE)))]


def row(fault: Any, examinations: Any) -> str:
    what, plant, overrides, name, *_ = fault
    box = planted.Box(overrides=overrides)
    plant(box)
    found: list[Check] = [
        check
        for check in examined(box, examinations)
        if check.name == name and check.state is not State.OK
    ]
    return f"| {what} | `{name}`, {found[0].state} | {found[0].text} | {found[0].fix} |".replace(
        "\n", " "
    )


def generated() -> str:
    sick = planted.Box()
    for faults, names in (
        (planted.FAULTS, TOGETHER),
        (planted.LIVE_FAULTS, TOGETHER_LIVE),
    ):
        plants = {fault[0]: fault[1] for fault in faults}
        for name in names:
            plants[name](sick)
    rows = [row(fault, ASCEND) for fault in planted.FAULTS]
    live = [row(fault, LIVE) for fault in planted.LIVE_FAULTS]
    head = ["| planted | found by | what it says | its fix |", "|---|---|---|---|"]
    return "\n".join(
        [
            BEGIN, "## A healthy box, faked", "", *transcript(planted.Box()), "",
            f"## The same box with {len(TOGETHER) + len(TOGETHER_LIVE)} faults at once", "",
            *transcript(sick), "",
            f"## {len(rows) + len(live)} planted faults, and what found them", "",
            f"Of settings, versions, cards and the network ({len(rows)}):", "", *head, *rows, "",
            f"Of the device at work, with `--live` ({len(live)}):", "", *head, *live, END,
        ]
    )  # fmt: skip


def test_the_page_says_what_the_doctor_says() -> None:
    text = PAGE.read_text()
    held = re.search(rf"{BEGIN}.*{END}", text, re.DOTALL)
    assert held is not None, f"no {BEGIN} ... {END} in {PAGE}"
    if os.environ.get("EMBERL_WRITE"):
        PAGE.write_text(text.replace(held[0], generated()))
    else:
        assert held[0] == generated(), "EMBERL_WRITE=1 pytest of this file writes it anew"
