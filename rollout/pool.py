"""The rollout pool: deals prompts to the workers and gathers their groups, with a deadline on every wait."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from .samples import Completion, Prompt, Sampling
from .waiting import ActorLostError, cause, gather


class RolloutPool:
    """Prompts are dealt in turn, so the same prompts go to the same workers in the same order: a synchronous run repeats
    bit for bit."""

    def __init__(self, workers: Sequence[Any], *, timeout: float, sync_timeout: float) -> None:
        self.workers = tuple(workers)
        self._timeout, self._sync_timeout = timeout, sync_timeout

    def generate(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        """Yields (index of the prompt, its n completions) as groups become complete, in no particular order."""
        deadline = time.monotonic() + self._timeout
        width = len(self.workers)
        streams: dict[Any, int] = {}
        for i, worker in enumerate(self.workers):
            if share := list(prompts[i::width]):
                streams[worker.generate.options(num_returns="streaming").remote(share, n, sampling)] = i
        while streams:
            ready, _ = ray.wait(list(streams), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(str(i) for i in sorted(streams.values()))
                raise ActorLostError(
                    f"rollout worker {late} has not finished its answers within rollout.timeout={self._timeout:g} s; "
                    "raise it, or lower rollout.max_response_length"
                )
            for stream in ready:
                assert isinstance(stream, ray.ObjectRefGenerator)
                i = streams[stream]
                try:
                    finished = ray.get(next(stream), timeout=self._sync_timeout)
                except StopIteration:
                    del streams[stream]
                    continue
                except ray.exceptions.RayError as error:
                    raise ActorLostError(f"rollout worker {i}: {cause(error)}") from error
                for index, completions in finished:
                    yield i + index * width, completions

    def apply(self, patch: Any) -> int:
        """Gives every worker this patch (or a Ray reference to one); returns the version that all of them now serve."""
        versions = self._all("apply", patch)
        assert len(set(versions)) == 1, f"workers serve different versions: {versions}"
        return int(versions[0])

    def digests(self) -> list[dict[str, str]]:
        """What each worker holds: name -> xxh3-128 of the bytes."""
        return self._all("digests")

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        refs = [getattr(worker, method).remote(*arguments) for worker in self.workers]
        return gather(refs, who="rollout worker", what=method, timeout=self._sync_timeout, key="sync.timeout")
