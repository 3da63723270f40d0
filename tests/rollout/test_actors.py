"""What is said of an actor that failed."""

from __future__ import annotations

import asyncio

import pytest
import ray
from emberl.rollout.actors import (
    ActorLostError,
    WorkerLostError,
    call,
    cause,
    check_reachable,
    node_address,
)

PAGE = """Task was killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.1, ID: 1) where the task was running was 22.36GB / 23.48GB.
Refer to the documentation on how to address the out of memory issue."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ray.exceptions.OutOfMemoryError(PAGE), "optim.micro_batch_tokens"),
        (RuntimeError(f"The actor died. {PAGE}"), "memory was nearly full"),
        (
            RuntimeError("Traceback:\n  File x\nValueError: temperature\n\n"),
            "ValueError: temperature",
        ),
        (RuntimeError(""), "RuntimeError"),
    ],
)
def test_the_cause_of_a_failure_in_one_line(error: Exception, said: str) -> None:
    text = cause(error)
    assert said in text
    assert "\n" not in text
    assert len(text) < 250


@pytest.mark.parametrize(
    "address", ["127.0.0.1:4000", "127.0.1.1:4000", "localhost:1", "[::1]:4000"]
)
def test_a_loopback_address_is_refused_where_there_are_other_nodes(address: str) -> None:
    with pytest.raises(ValueError, match="--node-ip-address"):
        check_reachable(address, {"10.0.0.1", "10.0.0.2"})
    check_reachable(address, {"127.0.0.1"})


def test_an_address_that_others_reach() -> None:
    check_reachable("10.0.0.1:4000", {"10.0.0.1", "10.0.0.2"})
    check_reachable("1270::1:4000", {"10.0.0.1", "10.0.0.2"})


def test_the_address_is_ray_s_not_the_host_name_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian writes the machine's own name beside 127.0.1.1 in /etc/hosts."""
    assert node_address() == "127.0.0.1"
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    assert node_address() == "10.0.0.7"


def test_a_worker_that_rays_memory_monitor_ended_may_be_replaced() -> None:
    """It is gone as one that was killed; a refusal is final."""

    async def fails(error: Exception) -> None:
        raise error

    with pytest.raises(WorkerLostError, match=r"worker 1 failed in 'prove': Ray's memory monitor"):
        asyncio.run(
            call(
                fails(ray.exceptions.OutOfMemoryError(PAGE)),
                who="worker 1",
                what="prove",
                timeout=9,
            )
        )
    with pytest.raises(ActorLostError) as refused:
        asyncio.run(
            call(fails(ray.exceptions.RayError("no")), who="worker 1", what="prove", timeout=9)
        )
    assert not isinstance(refused.value, WorkerLostError)
