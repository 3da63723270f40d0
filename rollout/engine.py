"""The protocol `Engine`: what a rollout worker asks of whatever decodes its prompts.

Every coroutine runs on one event loop; an engine does its computing elsewhere, so the loop stays free.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .samples import Completion, Prompt, Sampling
from .weights.patch import WeightPatch

Request = tuple[Prompt, int, Sampling]
"""A prompt, how many samples of it, and how they are drawn."""


class Engine(Protocol):
    """Decodes prompts with versioned weights that can be changed while it decodes."""

    @property
    def version(self) -> int:
        """The version of the weights that the next token is sampled from."""
        ...

    def generate(self, prompt: Prompt, n: int, sampling: Sampling) -> AsyncIterator[Completion]:
        """Yields the n completions of `prompt` as they finish (samples 0..n-1, in any order), the prompt computed once.

        ValueError if the request cannot be served (prompt and `max_tokens` beyond the engine's length, a bad sampling
        value). Requests that are aborted leave the stream: it ends after those that were not.
        """
        ...

    def generate_all(
        self, requests: Sequence[Request], begun: Mapping[str, Sequence[Completion]] | None = None
    ) -> AsyncIterator[Completion]:
        """As `generate`, of many requests submitted at once; ValueError before any of them is taken.

        begun: prompt id -> aborted completions of it. Of such a request only these samples are decoded, from where they
        stand (none of them at `max_tokens`): what they have keeps its log-probs and spans, and is read with the weights of
        now. They come back whole.
        """
        ...

    async def pause(self) -> None:
        """Returns at the next token boundary; requests are kept where they are until `resume`. Idempotent."""
        ...

    async def resume(self) -> None:
        """Goes on with the kept requests. Idempotent."""
        ...

    async def apply(self, patch: WeightPatch) -> int:
        """Swaps the weights at a token boundary, paused or not, and returns the version now served.

        Tokens sampled before keep the old version in their spans, those after carry the new one. A patch of the version
        already served changes nothing. VersionError: another run, a version that goes backwards, or a patch on another
        base. DigestMismatchError: the bytes are not those of the learners; such bytes are never served.
        """
        ...

    async def abort(self, prompt_ids: Collection[str]) -> list[Completion]:
        """Ends every unfinished sample of these prompts; returns what each had decoded (`finish_reason` "abort").

        They come from here only, not from the streams of `generate`. A sample not yet started comes without a token.
        """
        ...

    async def probe(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """[T] tokens -> [T-1] log-probs of all but the first, by the weights that are served, without a temperature.

        An end-to-end proof that digests cannot give: an engine that goes on multiplying by a packed copy of old weights
        holds the right bytes. Not while paused.
        """
        ...

    async def sleep(self, level: int) -> None:
        """Leaves the device to the learners once nothing is decoded: level 1 keeps the weights in the machine's memory,
        level 2 drops them. Requests wait; the next `apply` wakes it, or `wake`. Idempotent."""
        ...

    async def wake(self) -> None:
        """Serves what it served before it slept, loaded and proved anew. Nothing to do where it does not sleep."""
        ...

    async def reload(self) -> None:
        """Loads all that it was given to serve once more, where a probe says that it computes with something else."""
        ...

    def digests(self) -> dict[str, str]:
        """name -> xxh3-128 of the bytes that the engine was given to serve."""
        ...

    async def close(self) -> None:
        """Ends all streams and frees the device. Idempotent."""
        ...


__all__ = ["Engine", "Request"]
