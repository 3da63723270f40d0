"""What is made of a job server that goes while a job is followed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from emberl.rl import submit


class Server:
    """One that prints a line, then nothing; `lost`: how a question fails after that."""

    def __init__(self, lost: Exception | None) -> None:
        self.lost, self.asked = lost, 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "step 1\n"
        while self.lost is not None or self.asked < 3:
            await asyncio.sleep(0.01)

    def get_job_status(self, job: str) -> None:
        self.asked += 1
        if self.lost is not None:
            raise self.lost

    def get_job_info(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(status=SimpleNamespace(value="SUCCEEDED"))


def test_a_machine_that_is_gone_closes_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "SILENCE", 0.05)
    told: list[str] = []
    gone = Server(ConnectionError("no route to host"))
    assert submit.follow(gone, "job_1", told.append) == 1  # type: ignore[arg-type]
    assert told[0] == "step 1" and "job_1: its job server was lost" in told[1]
    assert "ConnectionError: no route to host" in told[1]


def test_a_job_may_be_silent_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "SILENCE", 0.05)
    told: list[str] = []
    silent = Server(None)
    assert submit.follow(silent, "job_1", told.append) == 0  # type: ignore[arg-type]
    assert told == ["step 1"] and silent.asked >= 3
