"""Whole groups from an engine, and what becomes of those in flight when new weights come.

`schedule.in_flight` decides:
- `update`: they go on with the new weights at the next token (PipelineRL, arXiv 2509.19128).
- `finish`: they are finished with the old ones; the update waits for that, and new groups wait for the update.
- `park`: they are set aside, and go on from where they stood, read anew by the new weights.
Either way every token keeps the version and the log-prob that it was drawn with.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Literal

from .engine import Engine, Request
from .samples import Completion
from .weights.patch import WeightPatch

InFlight = Literal["update", "finish", "park"]

Finished = list[tuple[int, tuple[Completion, ...]]]
"""Prompts (by their index in the request) whose samples are all there, each with its completions in sample order."""

LINGER = 0.05
"""Seconds that a finished group waits for others to come along: little enough to grade early, and messages cost time."""


class GroupService:
    """Everything runs on one event loop."""

    def __init__(self, engine: Engine, in_flight: InFlight = "update") -> None:
        self.engine, self._in_flight = engine, in_flight
        self._samples: dict[str, list[Completion]] = {}  # of each unfinished group by its prompt's id: what is finished
        self._begun: dict[str, list[Completion]] = {}  # of each group that was parked: what was not
        self._streams = 0
        self._quiet = asyncio.Condition()
        self._updates = 0
        self._open = asyncio.Condition()
        self._updating = asyncio.Lock()

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[Finished]:
        """All samples of every request, submitted at once; yields groups as they become complete, those together that do so
        within `LINGER`. A group that is cut does not come."""
        ready: Finished = []
        some = asyncio.Event()
        work = asyncio.create_task(self._decode(requests, ready, some))
        try:
            while not work.done() or ready:
                await asyncio.wait({work, waiting := asyncio.create_task(some.wait())}, return_when="FIRST_COMPLETED")
                waiting.cancel()
                if not work.done():
                    await asyncio.wait({work}, timeout=LINGER)
                some.clear()
                if ready:
                    groups = list(ready)
                    ready.clear()
                    yield groups
            work.result()
        finally:
            work.cancel()
            for prompt, _, _ in requests:
                self._samples.pop(prompt.id, None)
                self._begun.pop(prompt.id, None)

    async def _decode(self, requests: Sequence[Request], ready: Finished, some: asyncio.Event) -> None:
        index = {prompt.id: i for i, (prompt, _, _) in enumerate(requests)}
        self._samples |= {name: [] for name in index}
        while left := [request for request in requests if request[0].id in self._samples]:
            async with self._open:
                await self._open.wait_for(lambda: not self._updates)
            self._streams += 1
            try:
                begun = {prompt.id: self._begun.pop(prompt.id, []) for prompt, _, _ in left}
                async for completion in self.engine.generate_all(left, begun):
                    name = completion.prompt_id
                    if (group := self._samples.get(name)) is None:
                        continue  # it was cut
                    group.append(completion)
                    if len(group) == requests[index[name]][1]:
                        del self._samples[name]
                        ready.append((index[name], tuple(sorted(group, key=lambda c: c.sample))))
                        some.set()
            finally:
                self._streams -= 1
                async with self._quiet:
                    self._quiet.notify_all()

    async def apply(self, patch: WeightPatch) -> int:
        """The version served from now on; raises if a single byte differs from what the learners hold."""
        if self._in_flight == "update":
            return await self.engine.apply(patch)
        self._updates += 1
        try:
            async with self._updating:
                if self._in_flight == "park":
                    for completion in await self.engine.abort(list(self._samples)):
                        self._begun.setdefault(completion.prompt_id, []).append(completion)
                async with self._quiet:
                    await self._quiet.wait_for(lambda: not self._streams)
                return await self.engine.apply(patch)
        finally:
            self._updates -= 1
            async with self._open:
                self._open.notify_all()

    async def cut(self, prompt_ids: Collection[str]) -> list[tuple[Completion, ...]]:
        """Ends these groups; returns the samples of each that was still under way, as far as they had come."""
        groups = {name: group for name in prompt_ids if (group := self._samples.pop(name, None)) is not None}
        parts = [*await self.engine.abort(list(groups)), *(c for name in groups for c in self._begun.pop(name, ()))]
        for completion in parts:
            groups[completion.prompt_id].append(completion)
        return [tuple(group) for group in groups.values()]


__all__ = ["Finished", "GroupService", "InFlight"]
