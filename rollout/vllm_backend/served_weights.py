"""The weights that a vLLM engine serves, and the processes that hold them: updates, restarts, and
the proof of both.

Everything here happens in one turn after the other (`VLLMEngine` holds the lock), in the order of
`LEGAL`.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..weights.canary import Canary, altered
from ..weights.changes import patched
from ..weights.engine_transfer import BroadcastGroup
from ..weights.patch import (
    DigestMismatchError,
    TensorBytes,
    TensorChange,
    Transfer,
    VersionError,
    Views,
    WeightPatch,
    Weights,
    digest,
    verify,
)
from . import compat as vllm_compat
from . import transfer_api
from .process import EngineLostError, RunningLLM, start
from .requests import LiveSample
from .server import RunningServer, connect
from .shared_memory import Mirror, Parcel, checkpoint_bytes
from .update_order import LEGAL, OrderError, State, Step, UpdateOrder

T = TypeVar("T")


class Requests(Protocol):
    """The requests under way, as far as a change of weights concerns them."""

    sent: dict[str, LiveSample]
    """By request id, those that vLLM has."""

    def count(self, request_id: str, token_ids: Sequence[int]) -> None:
        """These tokens have come."""
        ...

    async def fail(self, error: Exception) -> None:
        """Ends every stream."""
        ...


class ServedWeights:
    """One engine's. To be used on one event loop."""

    def __init__(
        self,
        settings: vllm_compat.EngineSettings,
        requests: Requests,
        *,
        run_id: str,
        version: int,
        deadline_s: float,
        max_restarts: int,
        server: str,
        servers_directory: str | None,
    ) -> None:
        """As of `VLLMEngine`."""
        self._settings = settings
        self._requests = requests
        self._deadline = deadline_s
        self._max_restarts = max_restarts
        self.restarts = 0
        self.pause_s = 0.0
        """Seconds for which decoding stood still at the last update."""
        self._stopped = 0.0
        self._directory = servers_directory
        # why tensors cannot be written in place; None: nobody has asked the processes yet
        self._elsewhere: dict[str, str] | None = None
        self._told: frozenset[str] = frozenset()
        self.run_id = run_id
        self.version = version
        self._server = server
        self.joined: BroadcastGroup | None = None
        """The group in which the learners and these processes are."""
        self._start()
        self.mirror = Mirror(vllm_compat.DTYPES[settings.dtype], servers_directory)
        if version >= 0:
            self.mirror.write(checkpoint_bytes(Path(settings.model), settings.dtype))
        # of the version served, without its tensors; None: those of `model`
        self._proved: WeightPatch | None = None
        self._canary: Canary | None = None
        self._served: WeightPatch | None = None  # while `_proved` is a canary
        self.open = asyncio.Event()
        """Whether samples are sent to vLLM."""
        self.open.set()
        self.corrupt: Exception | None = None
        """Why nothing is served."""
        self.salt = 0
        """Prompts are looked up in vLLM's cache under it."""

    @property
    def held(self) -> Weights | None:
        """As of `Engine`: the mirror's bytes."""
        if self._proved is None or self.corrupt is not None or self._canary is not None:
            return None
        return Weights(
            run_id=self.run_id,
            version=self.version,
            tensors=Views(self.mirror.entries, self.mirror.tensor),
            digests=self._proved.digests,
        )

    async def apply(self, patch: WeightPatch) -> None:
        if await asyncio.to_thread(self._is_new, patch):
            target = replace(patch, tensors={}, changes={}, transfer=None)
            if await self._writable(patch):
                await self._write(target, patch)
            else:
                whole = await asyncio.to_thread(self._whole, patch)
                await self.reconcile(target, whole, transfer=patch.transfer)
            self.run_id = patch.run_id
            self.version = patch.version
            self._proved, self._canary, self._served = target, None, None

    async def load_canary(self, canary: Canary | None) -> None:
        """As of `Engine.canary`. What is proved is the canary until it is taken back, so that
        processes which are started anew meanwhile load that."""
        here, change = self._proved, canary or self._canary
        if change is None:
            return
        assert here is not None, "there is a canary of what was proved only"
        back = canary is None
        names = list(self.mirror.entries)

        def changed(name: str) -> TensorBytes:
            return altered(name, self.mirror.tensor(name), change, back=back)

        if back:
            target = self._served
            assert target is not None
        else:
            digests = {name: digest(changed(name).data) for name in names}
            target, self._served = replace(here, digests=digests), here

        def read(name: str) -> TensorBytes:  # a second time, after a restart, it is there already
            held = self.mirror.tensor(name)
            return held if digest(held.data) == target.digests[name] else changed(name)

        self._canary = change
        await self.reconcile(target, Views(names, read), stale=True)
        self._proved = target
        if back:
            self._canary = self._served = None

    def _whole(self, patch: WeightPatch) -> dict[str, TensorBytes]:
        """The tensors that a patch changes, from what lies in the mirror."""
        return dict(patch.tensors) | {
            name: patched(self.mirror.tensor(name), change)
            for name, change in patch.changes.items()
        }

    async def _writable(self, patch: WeightPatch) -> bool:
        """Whether the engine's processes can write what changes into their own memory. What they
        have to know for it is learnt once, before anything waits."""
        whole = patch.base_version is None or patch.transfer is not None
        if whole or self._proved is None or self.order.state != "serving":
            return False
        if self._elsewhere is None:
            try:
                found = await self._within("place", self._call_workers("emberl_place"))
            except Exception:  # of a lost engine, or a server of another version: whole, then
                return False
            self._elsewhere = {name: why for reasons in found for name, why in reasons.items()}
        stays = {
            name: self._elsewhere[name]
            for name in sorted(patch.tensors.keys() | patch.changes.keys())
            if name in self._elsewhere
        }
        if stays and stays.keys() != self._told:
            self._told = frozenset(stays)
            first = next(iter(stays))
            warnings.warn(
                f"vLLM loads versions whole: {len(stays)} tensors cannot be written in place, e.g."
                f" {first} ({stays[first]})",
                stacklevel=2,
            )
        return not stays

    async def _write(self, target: WeightPatch, patch: WeightPatch) -> None:
        """Writes what changed. DigestMismatchError with what was wrong, after which the old version
        is served; whatever else goes wrong, the new one is loaded whole."""
        changes = await asyncio.to_thread(self._as_changes, patch)
        parcel = await asyncio.to_thread(Parcel, changes, self._directory)
        self.open.clear()
        try:
            await self._write_parcel(target, parcel)
            await asyncio.to_thread(self.mirror.write_changes, changes)
        except DigestMismatchError:  # some processes may have written it: all load what was served
            await self.reconcile_served(stale=True)
            raise
        except Exception as error:  # a process that ended, or that vLLM says nothing more of
            lost = error if isinstance(error, EngineLostError | TimeoutError) else None
            await asyncio.to_thread(self.mirror.write_changes, changes)
            await self.reconcile(target, {}, lost=lost)
        except BaseException:
            self.corrupt = RuntimeError("a weight update was interrupted")
            await self._requests.fail(self.corrupt)
            raise
        finally:
            parcel.close()
            self.open.set()

    async def _write_parcel(self, target: WeightPatch, parcel: Parcel) -> None:
        start = time.perf_counter()
        await self._pause()
        with self.order.step("load"):
            arguments = (parcel.path, parcel.entries, target.version)
            work = self.llm.call_workers("emberl_write", *arguments)
            problems = [problem for problem in await self._within("write", work) if problem]
            if problems:
                raise DigestMismatchError(problems[0])
        with self.order.step("clear"):
            await self._clear()
        with self.order.step("prove"):  # each process has compared what it wrote
            await self._within("label", self.llm.label(target.version))
        await self._resume()
        self.pause_s = time.perf_counter() - start

    def _as_changes(self, patch: WeightPatch) -> dict[str, TensorChange]:
        return dict(patch.changes) | self.mirror.as_changes(patch.tensors)

    async def reconcile_served(self, *, stale: bool = False, lost: Exception | None = None) -> None:
        """Brings the engine to what is served already: `reconcile`."""
        await self.reconcile(self._proved, {}, stale=stale, lost=lost)

    async def sleep(self, level: int) -> None:
        """Nothing may be under way."""
        if self.order.state == "serving":
            await self._pause()
        with self.order.step("sleep"):
            await self._within("sleep", self.llm.sleep(level))

    @property
    def can_wake(self) -> bool:
        return self.order.state == "asleep" and self._proved is not None

    async def reconcile(
        self,
        target: WeightPatch | None,
        tensors: Mapping[str, TensorBytes],
        *,
        transfer: Transfer | None = None,
        stale: bool = False,
        lost: Exception | None = None,
    ) -> None:
        """Until the engine serves what `target` says after writing `tensors`, through as many
        restarts as are allowed. What fails for good ends every stream.

        transfer: the tensors are received by vLLM's own processes; should that fail, they are had
        another way. stale: it has to be loaded in any case. lost: the engine has to be replaced.
        """
        self.open.clear()
        stale, differed = stale or target is not self._proved, False
        try:
            while True:
                try:
                    if lost is not None:
                        await self._restart(lost)
                        stale, lost = target is not None, None
                    if stale and target is not None:
                        await self._exchange(target, tensors, transfer)
                        self.corrupt = None
                        stale = False
                    if self.order.state == "paused":
                        await self._resume()
                        self.pause_s = time.perf_counter() - self._stopped
                    return
                except (EngineLostError, TimeoutError) as error:
                    lost = error
                except DigestMismatchError:
                    if differed:
                        raise
                    differed = True
                if transfer is not None:
                    tensors, transfer = await asyncio.to_thread(transfer.fallback), None
        except BaseException as error:
            failure = (
                error
                if isinstance(error, Exception)
                else RuntimeError("a weight update was interrupted")
            )
            self.corrupt = self.corrupt or failure
            await self._requests.fail(failure)
            raise
        finally:
            self.open.set()

    def _is_new(self, patch: WeightPatch) -> bool:
        """Whether it has to be applied. All that can be wrong with it is found here, before
        anything changes."""
        if self._canary is not None and self.corrupt is None:
            raise VersionError("a canary is being decoded")
        if self.run_id and patch.run_id != self.run_id:
            raise VersionError(
                f"a patch of run {patch.run_id}, but this engine serves run {self.run_id}"
            )
        if patch.version < self.version:
            raise VersionError(f"version goes backwards: {patch.version} after {self.version}")
        if patch.version == self.version and self.corrupt is None:
            verify(self.mirror.digests(), patch)
            return False
        if patch.base_version not in (None, self.version):
            raise VersionError(
                f"patch {patch.version} builds on {patch.base_version}, the engine serves"
                f" {self.version}"
            )
        if patch.transfer is None:
            self.mirror.check(patch)
        else:
            self.mirror.expect(patch.transfer.version.tensors)
        return True

    async def _exchange(
        self, target: WeightPatch, tensors: Mapping[str, TensorBytes], transfer: Transfer | None
    ) -> None:
        slept = self.order.state == "asleep"
        self._elsewhere, self._stopped = None, time.perf_counter()
        if slept:
            with self.order.step("wake"):
                await self._within("wake", self.llm.wake("weights"))
        elif self.order.state != "paused":
            await self._pause()
        with self.order.step("load"):
            if transfer is None:
                await asyncio.to_thread(self.mirror.write, tensors)
                served = await self._within("load", self._call_workers("emberl_load"))
            else:
                served = await self._receive(transfer)
        with self.order.step("clear"):
            if slept:  # the cache's memory is asked for only when what loading needed is free again
                await self._within("wake", self.llm.wake("kv_cache"))
            await self._clear()
        with self.order.step("prove"):
            for digests in served:
                verify(digests, target)
            await self._within("label", self.llm.label(target.version))

    async def _receive(self, transfer: Transfer) -> list[dict[str, str]]:
        """The digests of what each process received; EngineLostError if it did not go well: then
        layers are half loaded."""
        version = transfer.version
        group = version.broadcast.group
        try:
            if self.joined != group:
                size = 1 + group.workers * group.ranks
                joining = transfer_api.transfer_init(
                    group.backend, group.host, group.engine_port, transfer.rank, size
                )
                await self._within("join", self.llm.call_workers("emberl_join", joining))
                self.joined = group
            await asyncio.to_thread(self.mirror.lay_out, version.tensors)
            update = transfer_api.transfer_update(group.backend, version.described)
            return await self._within("receive", self._call_workers("emberl_receive", update))
        except Exception as error:
            raise EngineLostError(
                f"the weight transfer into vLLM's processes failed: {error}"
            ) from error

    def _call_workers(self, method: str, *arguments: Any) -> Awaitable[list[dict[str, str]]]:
        entries = [[name, *entry] for name, entry in self.mirror.entries.items()]
        return self.llm.call_workers(method, self.mirror.path, entries, *arguments)

    async def _clear(self) -> None:
        """No prompt may be continued from what the old weights cached. vLLM empties its cache only
        while no request holds a block of it, so later prompts get another salt, and those on their
        way that have no token yet are sent anew."""
        sent = self._requests.sent
        for sample in sent.values():
            sample.close_span(self.version)
            sample.restart = sample.tokens == 0
        self.salt += 1
        await self.llm.abort([i for i, sample in sent.items() if sample.restart])
        if not self._server and all(sample.restart for sample in sent.values()):
            cleared = await self._within("clear", self.llm.clear_prefix_cache())
            assert cleared, "vLLM kept its prefix cache though no request is in flight"

    async def _pause(self) -> None:
        with self.order.step("pause"):
            await self._within("pause", self.llm.pause())

    async def _resume(self) -> None:
        with self.order.step("resume"):
            await self._within("resume", self.llm.resume())

    async def _within(self, what: str, work: Awaitable[T]) -> T:
        return await self.llm.within(what, work, self._deadline)

    def _start(self) -> None:
        if self._server:
            self.llm: RunningLLM | RunningServer = connect(
                self._server, self._settings, self.version, self._deadline
            )
        else:
            self.llm = start(self._settings)
        self.llm.on_tokens(self._requests.count)
        self._elsewhere = None
        self.order = UpdateOrder()
        self.joined = None

    async def _restart(self, error: Exception) -> None:
        """New processes, which hold what `model` holds; RuntimeError with the old ones' last words
        if none are allowed."""
        for sample in list(self._requests.sent.values()):
            sample.take_back()
        last = " | ".join(self.llm.last_lines())
        await self.llm.shutdown()
        self.restarts += 1
        if self.restarts > self._max_restarts:
            raise RuntimeError(
                f"vLLM was lost {self.restarts} times, more than"
                f" rollout.max_restarts={self._max_restarts}: {error}; its last lines: {last}"
            )
        await asyncio.to_thread(self._start)


__all__ = ["LEGAL", "OrderError", "Requests", "ServedWeights", "State", "Step", "UpdateOrder"]
