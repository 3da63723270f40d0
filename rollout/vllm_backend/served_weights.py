"""The weights that a vLLM engine serves, and the processes that hold them: updates, restarts, and
the verification of both.

Only one of these runs at a time (`VLLMEngine` holds the lock), in the order of `LEGAL`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ...kernels import platform
from ..weights.canary import Canary, altered, written_in_place
from ..weights.changes import patched
from ..weights.patch import (
    DigestMismatchError,
    MovedError,
    TensorBytes,
    TensorChange,
    Transfer,
    VersionError,
    Views,
    WeightPatch,
    Weights,
    check_base,
    check_names,
    digest,
    is_next,
    verify,
)
from . import compat as vllm_compat
from .engine_processes import Processes, Requests
from .process import EngineLostError
from .shared_memory import Mirror, checkpoint_bytes, copied
from .update_order import State


class ServedWeights:
    """The weights of one engine. To be used on one event loop."""

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
        self._requests = requests
        self.pause_s = 0.0
        """Seconds for which decoding was paused by the last update."""
        self.run_id = run_id
        self.version = version
        self.mirror = Mirror(vllm_compat.DTYPES[settings.dtype], servers_directory)
        self.processes = Processes(
            settings,
            requests,
            self.mirror,
            version=version,
            deadline_s=deadline_s,
            max_restarts=max_restarts,
            server=server,
            servers_directory=servers_directory,
        )
        if version >= 0:
            self.mirror.write(checkpoint_bytes(Path(settings.model), settings.dtype))
        self._proved: WeightPatch | None = None
        """The verified version, without its tensors; None: the weights of the model's directory."""
        self._canary: Canary | None = None
        self._served: WeightPatch | None = None
        """The version before the canary, while `_proved` is a canary."""
        self.open = asyncio.Event()
        """Set while samples may be sent to vLLM."""
        self.open.set()
        self.audited = asyncio.Event()
        """Set while samples that ended may be handed out, i.e. their weights are verified."""
        self.audited.set()
        self.corrupt: Exception | None = None
        """The reason why nothing is served; None: it is."""

    @property
    def held(self) -> Weights | None:
        """As of `Engine`: the mirror's bytes; None if they are not a verified version."""
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
                names = patch.tensors.keys() | patch.changes.keys()
                whole = await asyncio.to_thread(self._whole, patch, names)
                await self.reconcile(target, whole, transfer=patch.transfer)
            self.run_id = patch.run_id
            self.version = patch.version
            self._proved = target
            self._canary = None
            self._served = None
            await asyncio.to_thread(platform.give_back_memory)

    async def load_canary(self, canary: Canary | None) -> None:
        """As of `Engine.canary`. Until the canary is taken back it is the verified version, so that
        processes which are restarted meanwhile load it. Some of its tensors are written in place
        and the others loaded whole; when it is taken back, all are loaded whole."""
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
            target = replace(here, digests=digests)
            self._served = here

        def read(name: str) -> TensorBytes:
            # after a restart it is read a second time, and the mirror holds the target already
            held = self.mirror.tensor(name)
            return held if digest(held.data) == target.digests[name] else changed(name)

        self._canary = change
        written = [] if back else await self._written_in_place(change)
        if written and await self._write_canary(here, target, written, read):
            await asyncio.to_thread(self.mirror.write, Views(written, read))
        else:
            await self.reconcile(target, Views(names, read), stale=True)
        self._proved = target
        if back:
            self._canary = self._served = None

    async def _written_in_place(self, canary: Canary) -> list[str]:
        if self.state != "serving" or not await self.processes.in_place.known():
            return []
        sizes = {
            name: math.prod(entry.shape)
            for name, entry in self.mirror.entries.items()
            if name not in (self.processes.in_place.elsewhere or {})
        }
        return written_in_place(sizes, canary)

    async def _write_canary(
        self,
        here: WeightPatch,
        target: WeightPatch,
        written: Sequence[str],
        read: Callable[[str], TensorBytes],
    ) -> bool:
        """Loads the other tensors whole, then writes `written` in place; False if that failed.
        Raises DigestMismatchError if other bytes lay there than the verified ones, since the engine
        decoded with them."""
        change = self._canary
        assert change is not None
        rest = [name for name in self.mirror.entries if name not in written]
        if rest:
            kept = {name: here.digests[name] for name in written}
            mixed = replace(here, digests={**target.digests, **kept})
            await self.reconcile(mixed, Views(rest, read), stale=True)
            self._proved = mixed
        writing = False
        try:
            if not await self.processes.in_place.known():
                return False
            for changes in self.processes.in_place.canary(written, change):
                writing = False
                await self.processes.in_place.find(changes)
                writing = True
                await self._stand_still(target, {})
                await self.processes.in_place.prove(target.version)
        except (EngineLostError, TimeoutError):
            return False
        except Exception as error:
            if writing and isinstance(error, DigestMismatchError):
                self.corrupt = error
                await self._requests.fail(error)
                raise
            self.processes.in_place.give_up(error)
            return False
        return True

    def _whole(self, patch: WeightPatch, names: Collection[str]) -> dict[str, TensorBytes]:
        """name -> whole tensor after the patch, made of the mirror's bytes and the changes."""
        return {
            name: patch.tensors[name]
            if name in patch.tensors
            else patched(self.mirror.tensor(name), patch.changes[name])
            for name in names
        }

    async def _writable(self, patch: WeightPatch) -> bool:
        """Whether the engine's processes can write at least one of the patch's tensors in place."""
        if patch.base_version is None or patch.transfer is not None or self._proved is None:
            return False
        if self.state != "serving" or not await self.processes.in_place.known():
            return False
        elsewhere = self.processes.in_place.elsewhere or {}
        return not (patch.tensors.keys() | patch.changes.keys()) <= elsewhere.keys()

    async def _write(self, target: WeightPatch, patch: WeightPatch) -> None:
        """Writes a patch in place. Raises DigestMismatchError if it does not fit, after which the
        old version is served; after any other failure, the new one is loaded whole."""
        names = patch.tensors.keys() | patch.changes.keys()
        layers = self.processes.in_place.come_whole(names)
        whole = await asyncio.to_thread(self._whole, patch, names & set(layers))
        changes = await asyncio.to_thread(self._as_changes, patch, names - set(layers))
        before = {name: copied(self.mirror.tensor(name)) for name in whole}
        try:
            await self.processes.in_place.find(changes)
            self.open.clear()
            self.audited.clear()
            await self._stand_still(target, whole, layers)
            self.open.set()
            await asyncio.to_thread(self.mirror.write_changes, changes)
            await self.processes.in_place.prove(target.version)
        except (DigestMismatchError, MovedError) as error:
            if self.version == target.version:  # found by the audit: it decodes with wrong weights
                self.corrupt = error
                await self._requests.fail(error)
            elif self.state != "serving":  # some processes may have written it
                await self.reconcile(self._proved, before, stale=True)
            raise
        except Exception as error:  # e.g. a process has ended, or does not answer
            lost = error if isinstance(error, EngineLostError | TimeoutError) else None
            await asyncio.to_thread(self.mirror.write_changes, changes)
            await self.reconcile(target, whole, lost=lost)
        except BaseException:
            if self.state == "serving" and self.version != target.version:  # nothing was written
                raise
            self.corrupt = RuntimeError("a weight update was interrupted")
            await self._requests.fail(self.corrupt)
            raise
        finally:
            self.open.set()
            self.audited.set()

    async def _stand_still(
        self,
        target: WeightPatch,
        whole: Mapping[str, TensorBytes],
        layers: Collection[str] = (),
    ) -> None:
        """Pauses decoding for `Processes.write`, and measures the pause."""
        start = time.perf_counter()
        await self.processes.write(target, whole, layers, before=self.version)
        # before `resume`, so that the first token is counted as the new version's
        self.run_id = target.run_id
        self.version = target.version
        await self.processes.resume()
        self.pause_s = time.perf_counter() - start

    def _as_changes(self, patch: WeightPatch, names: Collection[str]) -> dict[str, TensorChange]:
        come = {name: change for name, change in patch.changes.items() if name in names}
        return come | self.mirror.as_changes({n: t for n, t in patch.tensors.items() if n in names})

    async def reconcile_served(self, *, stale: bool = False, lost: Exception | None = None) -> None:
        """`reconcile` with the version that is served already."""
        await self.reconcile(self._proved, {}, stale=stale, lost=lost)

    async def sleep(self, level: int) -> None:
        """As `Processes.sleep`."""
        await self.processes.sleep(level)

    @property
    def state(self) -> State:
        return self.processes.order.state

    @property
    def can_wake(self) -> bool:
        return self.state == "asleep" and self._proved is not None

    async def reconcile(
        self,
        target: WeightPatch | None,
        tensors: Mapping[str, TensorBytes],
        *,
        transfer: Transfer | None = None,
        stale: bool = False,
        lost: Exception | None = None,
    ) -> None:
        """Makes the engine serve `target` by writing `tensors`, with as many restarts as are
        allowed. A final failure ends every stream, and is raised.

        transfer: vLLM's own processes receive the tensors; if that fails, they are fetched by its
        fallback. stale: load even if `target` is the verified version. lost: the error for which
        the engine has to be restarted first.
        """
        self.open.clear()
        stale, differed = stale or target is not self._proved, False
        start = time.perf_counter()
        try:
            while True:
                try:
                    if lost is not None:
                        await self.processes.restart(lost, self.version)
                        stale, lost = target is not None, None
                    if stale and target is not None:
                        start = time.perf_counter()
                        await self.processes.exchange(
                            target, tensors, transfer, before=self.version
                        )
                        self.corrupt = None
                        stale = False
                    if self.state == "paused":
                        await self.processes.resume()
                        self.pause_s = time.perf_counter() - start
                    return
                except (EngineLostError, TimeoutError) as error:
                    lost = error
                except MovedError as error:
                    self.processes.give_up_graphs(error)
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
        """Whether a patch has to be applied, rather than being the served version already. Raises
        VersionError, ValueError or DigestMismatchError for any fault, before anything changes."""
        if self._canary is not None and self.corrupt is None:
            raise VersionError("a canary is being decoded")
        if not is_next(patch, self.run_id, self.version, served=self.corrupt is None):
            verify(self.mirror.digests(), patch)
            return False
        check_base(patch, None if self._proved is None else self._proved.root)
        if patch.transfer is None:
            self.mirror.check(patch)
        else:
            self.mirror.expect(patch.transfer.version.tensors)
            check_names(patch, self.mirror.entries or patch.digests)
        return True
