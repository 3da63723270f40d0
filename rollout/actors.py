"""Waiting for Ray actors: always with a deadline, and the first failure ends the wait."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray


class ActorLostError(RuntimeError):
    """An actor died, failed or did not answer within its deadline; the message names it and the cause."""


def gather(refs: Sequence[Any], *, who: str, what: str, timeout: float, key: str) -> list[Any]:
    """The results of one call to each actor of a group, in order.

    who: how the message calls an actor ("learner rank"); what: the call; key: the setting that holds `timeout` (seconds).
    Raises `ActorLostError`. A failure is raised at once, though its peers may wait in a collective for the one that failed.
    """
    deadline = time.monotonic() + timeout
    results: dict[Any, Any] = {}
    pending = list(refs)
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            late = ", ".join(str(i) for i, ref in enumerate(refs) if ref not in results)
            raise ActorLostError(f"{who} {late}: no answer to {what!r} within {key}={timeout:g} s")
        for ref in done:
            try:
                results[ref] = ray.get(ref, timeout=timeout)
            except ray.exceptions.RayError as error:
                raise ActorLostError(f"{who} {list(refs).index(ref)} failed in {what!r}: {cause(error)}") from error
    return [results[ref] for ref in refs]


def cause(error: Exception) -> str:
    """The last line that says something: Ray wraps an actor's own traceback around it. Where Ray ended
    the actor because memory ran out, which it says on a page of advice, the settings that need less."""
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "running low on memory" in str(error):
        return (
            "Ray's memory monitor ended it, since this machine's memory was nearly full; set a smaller "
            "optim.micro_batch_tokens, rollout.max_num_seqs or cluster.learners, or end other programs"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
