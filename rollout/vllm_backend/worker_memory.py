"""Updates that a vLLM engine's processes write into their own memory: placing tensors, locating
changes and auditing them beside decoding, and writing them while it is paused."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from ..weights.canary import Canary, altered
from ..weights.changes import piecewise
from ..weights.patch import DigestMismatchError, MovedError, TensorChange
from .graphs import MOVED
from .placed import layer_of
from .shared_memory import Mirror, SharedChanges

FIRST_LOOK, LAST_LOOK = 0.005, 0.1
"""Seconds between two checks whether the processes are done; they double from the first to the
last."""
PARCEL = 1 << 22
"""Elements of a canary that are sent at a time."""
Call = Callable[..., Awaitable[list[Any]]]
"""(what, method, *arguments) -> one result of each process, within the engine's deadline."""


class InPlace:
    """In-place updates of one engine's processes."""

    def __init__(self, mirror: Mirror, directory: str | None, call: Call, deadline: float) -> None:
        """directory: as of `Mirror`."""
        self._mirror = mirror
        self._directory = directory
        self._call = call
        self._deadline = deadline
        self.elsewhere: dict[str, str] | None = None
        """name -> reason, of tensors that cannot be written in place; None: not asked yet."""
        self._off = False
        self._told: frozenset[str] = frozenset()

    def forget(self) -> None:
        """Forgets the places, since the processes are new ones or have loaded everything."""
        self.elsewhere = None

    def give_up(self, why: object) -> None:
        """Switches in-place updates off, with a warning: versions are loaded whole from now on."""
        self._off = True
        warnings.warn(f"vLLM loads versions whole from now on: {why}", stacklevel=2)

    async def known(self) -> bool:
        """Whether the processes know the places of tensors; has them learn these at first."""
        if self._off:
            return False
        if self.elsewhere is None:
            arguments = (self._mirror.path, self._mirror.listed())
            try:
                by_process = await self._call("place", "emberl_place", *arguments)
            except Exception as error:  # e.g. a lost engine, or a server of another version
                warnings.warn(
                    f"vLLM loads this version whole: its processes cannot tell where tensors lie"
                    f" ({type(error).__name__}: {error})",
                    stacklevel=2,
                )
                return False
            self.elsewhere = {name: why for reasons in by_process for name, why in reasons.items()}
        return True

    def come_whole(self, names: Collection[str]) -> list[str]:
        """The tensors that have to be loaded whole if `names` change: those of the layers in which
        one of these cannot be written in place."""
        assert self.elsewhere is not None, "known before"
        first = sorted(name for name in names if name in self.elsewhere)
        layers = {layer_of(name) for name in first}
        if first and not self._told.issuperset(first):
            self._told |= frozenset(first)
            warnings.warn(
                f"vLLM loads {len(layers)} layers whole when they change: {len(first)} tensors"
                f" cannot be written in place, e.g. {first[0]} ({self.elsewhere[first[0]]})",
                stacklevel=2,
            )
        return [name for name in self.elsewhere if layer_of(name) in layers]

    async def find(self, changes: Mapping[str, TensorChange]) -> None:
        """Has every process check and locate the changes. Raises DigestMismatchError or MovedError,
        with the tensor's name, if one refuses; nothing has changed then."""
        shared = await asyncio.to_thread(SharedChanges, changes, self._directory)
        try:
            problems = await self._call("find", "emberl_find", shared.path, shared.entries)
            for problem in filter(None, problems):
                self.forget()
                if problem.startswith(MOVED):
                    raise MovedError(problem)
                raise RuntimeError(problem)
            await self._done("find")
        finally:
            shared.close()

    async def write(self) -> None:
        """Writes the changes of `find`. Raises DigestMismatchError if some process refuses; others
        may have written."""
        for problem in filter(None, await self._call("write", "emberl_write")):
            raise DigestMismatchError(problem)

    async def prove(self, version: int) -> None:
        """Has every process audit its weights. Raises DigestMismatchError if they are not those
        that were written."""
        await self._call("prove", "emberl_prove", version)
        await self._done("prove")

    async def _done(self, what: str) -> None:
        deadline, pause = time.monotonic() + self._deadline, FIRST_LOOK
        while None in (outcomes := await self._call(what, "emberl_outcome")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"vLLM engine: {what!r} took longer than {self._deadline:g} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_LOOK)
        for problem in filter(None, outcomes):
            raise DigestMismatchError(problem)

    def canary(self, names: Iterable[str], canary: Canary) -> Iterator[dict[str, TensorChange]]:
        """Yields the changes that turn these tensors of the mirror into the canary, a part at a
        time."""
        part: dict[str, TensorChange] = {}
        for name in names:
            before = self._mirror.tensor(name)
            for change in piecewise(before, altered(name, before, canary)):
                size = sum(len(other.positions) for other in part.values())
                if part and (name in part or size + len(change.positions) > PARCEL):
                    yield part
                    part = {}
                part[name] = change
        if part:
            yield part
