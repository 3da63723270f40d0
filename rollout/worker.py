"""The rollout worker: a Ray actor around one engine, on a device of its own.

`RolloutWorker` is the actor, `GroupService` makes whole groups of the engine's completions, and
`Receiver` brings it new weights; all on one event loop.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from ..kernels import platform
from .actors import own_cards, use_node_interface
from .engine import Engine, InFlight, Partials, Request, WorkerSpec, make_engine
from .environments import whole
from .receiver import Receiver
from .samples import Completion
from .tracing import ProcessTrace
from .weights.canary import Canary, DecodeProof, canary_of, squares_of
from .weights.patch import Bytes, WeightPatch
from .weights.transport import WeightUpdate

Finished = list[tuple[int, tuple[Completion, ...]]]
"""Prompts (by their index in the request) whose samples are all there, each with its completions in
sample order."""

LINGER = 0.05
"""Seconds that a finished group waits for others to come along: little enough to grade early, and
messages cost time."""

NOTHING = -1
"""The version of an engine that serves none."""


class RolloutWorker:
    """Decodes prompts with the newest weights that it was given; all methods but `__init__` run on
    one event loop."""

    def __init__(self, spec: WorkerSpec) -> None:
        platform.set_threads(spec.threads)
        use_node_interface()  # for the processes that an engine starts
        self.engine = make_engine(spec, own_cards(platform.named(spec.device)))
        self.service = GroupService(self.engine, spec.in_flight)
        self._trace = ProcessTrace()
        self.receiver = Receiver(
            self.engine, spec.link(), threads=spec.threads, apply=self.service.apply
        )

    async def ready(self) -> int:
        """The process id, once the engine is up."""
        return os.getpid()

    async def generate(
        self,
        requests: Sequence[Request],
        partials: Partials | None = None,
    ) -> AsyncIterator[Finished]:
        """Groups as they become complete; partials: as of `GroupService.generate`."""
        async for groups in self.service.generate(requests, partials):
            yield groups

    async def cut(self, prompt_ids: Collection[str]) -> list[tuple[Completion, ...]]:
        """Ends these groups; returns their partial samples."""
        return await self.service.cut(prompt_ids)

    async def reset(self) -> None:
        """Ends all groups, after whoever asked for them is gone."""
        await self.service.cut_all()

    async def prepare(self, update: WeightUpdate) -> None:
        """Makes a version ready while decoding goes on (`Receiver.prepare`)."""
        await self.receiver.prepare(update)

    async def commit(self, version: int) -> dict[str, float]:
        """Serves what was prepared; returns the `receiver.Report`, with the version that is served
        from now on and the engine's restarts."""
        return self._with_restarts(await self.receiver.commit(version))

    async def catch_up(self, update: WeightUpdate) -> dict[str, float]:
        """`prepare` and `commit` at once, for a worker that was restarted or joins late; returns
        what `commit` does."""
        return self._with_restarts(await self.receiver.catch_up(update))

    def _with_restarts(self, report: dict[str, float]) -> dict[str, float]:
        return report | {"engine_restarts": float(getattr(self.engine, "restarts", 0))}

    async def offer(self) -> tuple[str, int]:
        """(node id, version) of this worker, by which a new worker's source is chosen."""
        node: str = ray.get_runtime_context().get_node_id()
        return node, self.receiver.version

    async def export(self) -> Bytes:
        """The bytes of an anchor of what it serves."""
        return await asyncio.to_thread(self.receiver.export)

    async def probe(self, token_ids: Sequence[int], reload: bool = False) -> NDArray[np.float32]:
        """[T] tokens -> [T-1] log-probs of all but the first; `reload`: after the engine has loaded
        everything once more."""
        if reload:
            await self.engine.reload()
        return await self.engine.probe(token_ids)

    async def prove(self, canary: Canary, requests: Sequence[Request]) -> DecodeProof | None:
        """`GroupService.prove`."""
        return await self.service.prove(canary, requests)

    async def prove_alone(self, seed: int, requests: Sequence[Request]) -> DecodeProof | None:
        """`GroupService.prove_alone`."""
        return await self.service.prove_alone(seed, requests)

    async def decoded(self, requests: Sequence[Request]) -> list[tuple[Completion, Any]]:
        """`GroupService.decoded`."""
        return await self.service.decoded(requests)

    async def sleep(self, level: int) -> None:
        """Frees the device for the learners."""
        await self.engine.sleep(level)

    async def wake(self) -> None:
        """Serves again what it served before `sleep`."""
        await self.engine.wake()

    async def digests(self) -> dict[str, str]:
        """name -> xxh3-128 of the bytes that are served."""
        return self.engine.digests()

    async def trace(self, begin: bool) -> bytes:
        """Begins a trace of this process, or ends it and returns it."""
        if begin:
            self._trace.begin()
            return b""
        return await asyncio.to_thread(self._trace.end)

    async def close(self) -> None:
        await self.engine.close()


class _Group:
    """One group in one turn: its finished samples, and partial ones that wait to go on."""

    def __init__(self, given: Sequence[Completion]) -> None:
        self.finished: list[Completion] = []
        self.partials = list(given)
        self._given = {completion.sample: completion for completion in given}

    def take(self) -> list[Completion]:
        partials = self.partials
        self.partials = []
        return partials

    def park(self, part: Completion) -> None:
        """Keeps a partial sample as an aborting engine returns it, without a loss mask."""
        self.partials.append(whole(part, self._given.get(part.sample)))


class GroupService:
    """Makes whole groups of an engine's completions, and treats those in flight when new weights
    come; all on one event loop.

    `schedule.in_flight` decides:
    - `update`: they go on with the new weights at the next token (PipelineRL, arXiv 2509.19128).
    - `finish`: they are finished with the old ones; the update waits for that, and new groups wait
      for the update.
    - `park`: they are set aside, and go on from where they stood, read anew by the new weights.
    Either way every token keeps the version and the log-prob that it was drawn with.
    """

    def __init__(self, engine: Engine, in_flight: InFlight = "update") -> None:
        self.engine = engine
        self._in_flight = in_flight
        self._groups: dict[str, _Group] = {}  # those under way, by their prompt's id
        self._streams = 0
        self._quiet = asyncio.Condition()
        self._updates = 0
        self._open = asyncio.Condition()
        self._updating = asyncio.Lock()

    async def generate(
        self,
        requests: Sequence[Request],
        partials: Partials | None = None,
    ) -> AsyncIterator[Finished]:
        """All samples of every request, submitted at once; yields groups as they become complete,
        those together that do so within `LINGER`. A group that is cut does not come. partials: of a
        prompt as many samples as are asked for, which are to go on from where they stand; none:
        from the prompt."""
        given = partials or {}
        mine = {prompt.id: _Group(given.get(prompt.id, ())) for prompt, _, _ in requests}
        self._groups |= mine
        ready: Finished = []
        some = asyncio.Event()
        work = asyncio.create_task(self._decode(requests, mine, ready, some))
        try:
            while not work.done() or ready:
                await asyncio.wait(
                    {work, waiting := asyncio.create_task(some.wait())},
                    return_when="FIRST_COMPLETED",
                )
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
            for name, group in mine.items():
                if self._groups.get(name) is group:  # not its next turn, which may have begun
                    del self._groups[name]

    async def _decode(
        self,
        requests: Sequence[Request],
        mine: Mapping[str, _Group],
        ready: Finished,
        some: asyncio.Event,
    ) -> None:
        index = {prompt.id: i for i, (prompt, _, _) in enumerate(requests)}

        def under_way(name: str) -> bool:
            return self._groups.get(name) is mine[name]

        while left := [request for request in requests if under_way(request[0].id)]:
            async with self._open:
                await self._open.wait_for(lambda: not self._updates)
            self._streams += 1
            try:
                partials = {prompt.id: mine[prompt.id].take() for prompt, _, _ in left}
                async for completion in self.engine.generate_all(left, partials):
                    name = completion.prompt_id
                    if not under_way(name):
                        continue  # it was cut
                    finished = mine[name].finished
                    finished.append(completion)
                    if len(finished) == requests[index[name]][1]:
                        del self._groups[name]
                        ready.append((index[name], tuple(sorted(finished, key=lambda c: c.sample))))
                        some.set()
            finally:
                self._streams -= 1
                async with self._quiet:
                    self._quiet.notify_all()

    async def apply(self, patch: WeightPatch) -> int:
        """Applies a patch by the rule of `in_flight`; returns the version served from now on.
        Raises the errors of `Engine.apply`."""
        if self._in_flight == "update":
            return await self.engine.apply(patch)
        async with self._alone(park=self._in_flight == "park"):
            return await self.engine.apply(patch)

    @asynccontextmanager
    async def _alone(self, *, park: bool) -> AsyncIterator[None]:
        """A context in which nothing is decoded for running groups; `park`: they are set aside
        instead of finished."""
        self._updates += 1
        try:
            async with self._updating:
                if park:
                    for parked in await self.engine.abort(list(self._groups)):
                        if (group := self._groups.get(parked.prompt_id)) is not None:
                            group.park(parked)
                async with self._quiet:
                    await self._quiet.wait_for(lambda: not self._streams)
                yield
        finally:
            self._updates -= 1
            async with self._open:
                self._open.notify_all()

    async def prove(self, canary: Canary, requests: Sequence[Request]) -> DecodeProof | None:
        """The engine's tokens for these before the canary is loaded, with it, and when it is taken
        back; groups under way are set aside meanwhile. None: the engine, a user's, knows no
        canaries."""
        load = getattr(self.engine, "canary", None)
        if load is None:
            return None
        async with self._alone(park=True):
            start = time.perf_counter()
            before = await self._all(requests)
            await load(canary)
            try:
                changed = await self._all(requests)
                read = [await self._read(requests, completion) for completion in changed]
            finally:
                await load(None)
            after = await self._all(requests)
            return DecodeProof(
                before=before,
                canary=changed,
                read=tuple(read),
                after=after,
                seconds=time.perf_counter() - start,
            )

    async def prove_alone(self, seed: int, requests: Sequence[Request]) -> DecodeProof | None:
        """`prove` with a canary made of the weights that are held here, without a learner. None
        also where nothing is held."""
        held = self.engine.held
        if held is None:
            return None
        squares = await asyncio.to_thread(squares_of, held.tensors)
        return await self.prove(canary_of(seed, squares), requests)

    async def decoded(self, requests: Sequence[Request]) -> list[tuple[Completion, Any]]:
        """The samples of these requests, each with the log-probs [n] that the engine gives the same
        tokens as a prompt."""
        done = await self._all(requests)
        return [(completion, await self._read(requests, completion)) for completion in done]

    async def _all(self, requests: Sequence[Request]) -> tuple[Completion, ...]:
        done = [completion async for completion in self.engine.generate_all(requests)]
        return tuple(sorted(done, key=lambda c: (c.prompt_id, c.sample)))

    async def _read(
        self, requests: Sequence[Request], completion: Completion
    ) -> NDArray[np.float32]:
        [prompt] = [p.token_ids for p, _, _ in requests if p.id == completion.prompt_id]
        logps = await self.engine.probe([*prompt, *completion.token_ids.tolist()])
        return logps[len(prompt) - 1 :]

    async def cut(self, prompt_ids: Collection[str]) -> list[tuple[Completion, ...]]:
        """Ends these groups; returns the samples of each that was still under way, as far as they
        had come."""
        groups = {name: self._groups.pop(name) for name in prompt_ids if name in self._groups}
        for completion in await self.engine.abort(list(groups)):
            groups[completion.prompt_id].park(completion)
        return [(*group.finished, *group.partials) for group in groups.values()]

    async def cut_all(self) -> None:
        """Ends everything that is under way."""
        await self.cut(list(self._groups))
