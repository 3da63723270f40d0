"""vLLM's processes as holders of the weights: the steps of an update, in the order of `LEGAL`, and
their restart.

Which version is served is known to `ServedWeights` alone.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Awaitable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from ..weights.engine_transfer import BroadcastGroup
from ..weights.patch import MovedError, TensorBytes, Transfer, WeightPatch, verify
from . import compat as vllm_compat
from . import transfer_api
from .graphs import MOVED
from .process import EngineLostError, RunningLLM, start
from .requests import LiveSample
from .server import RunningServer, connect
from .shared_memory import Mirror
from .update_order import UpdateOrder
from .worker_memory import InPlace

T = TypeVar("T")


class Requests(Protocol):
    """The interface of the engine's requests that an update needs."""

    sent: dict[str, LiveSample]
    """Request id -> sample, of the requests that vLLM has now."""

    def count(self, request_id: str, token_ids: Sequence[int]) -> None:
        """Notes tokens that have come."""
        ...

    async def fail(self, error: Exception) -> None:
        """Ends every stream with `error`."""
        ...


class Processes:
    """The processes of one engine. To be used on one event loop."""

    def __init__(
        self,
        settings: vllm_compat.EngineSettings,
        requests: Requests,
        mirror: Mirror,
        *,
        version: int,
        deadline_s: float,
        max_restarts: int,
        server: str,
        servers_directory: str | None,
    ) -> None:
        """As of `VLLMEngine`. version: of the weights in the model's directory."""
        self._settings = settings
        self._requests = requests
        self._mirror = mirror
        self._deadline = deadline_s
        self._max_restarts = max_restarts
        self._server = server
        self.in_place = InPlace(mirror, servers_directory, self.call, deadline_s)
        self.restarts = 0
        self.joined: BroadcastGroup | None = None
        """The broadcast group that these processes have joined; None: none."""
        self.salt = 0
        """The salt under which prompts are looked up in vLLM's prefix cache; one for each
        version."""
        self._start(version)

    def _start(self, version: int) -> None:
        if self._server:
            self.llm: RunningLLM | RunningServer = connect(
                self._server, self._settings, version, self._deadline
            )
        else:
            self.llm = start(self._settings)
        self.llm.on_tokens(self._requests.count)
        self.in_place.forget()
        self.order = UpdateOrder()
        self.joined = None

    async def restart(self, error: Exception, version: int) -> None:
        """Starts new processes, which hold the weights in the model's directory. Raises
        RuntimeError, with the last lines of the old ones' log, if no more restarts are allowed."""
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
        await asyncio.to_thread(self._start, version)

    def give_up_graphs(self, error: MovedError) -> None:
        """Makes the next processes capture no graphs, since their loads would move tensors again.
        Raises `error` if that does not help: the engine runs eagerly already, or is a server."""
        if self._server or self._settings.engine_args.get("enforce_eager"):
            raise error
        warnings.warn(
            f"vLLM is started anew, and decodes without captured graphs from now on: {error}",
            stacklevel=2,
        )
        own = {**self._settings.engine_args, "enforce_eager": True}
        self._settings = replace(self._settings, engine_args=own)
        self._max_restarts += 1  # these processes were not lost, so their restart is not counted

    async def pause(self) -> None:
        with self.order.step("pause"):
            await self._within("pause", self.llm.pause())

    async def resume(self) -> None:
        with self.order.step("resume"):
            await self._within("resume", self.llm.resume())

    async def sleep(self, level: int) -> None:
        """Puts the processes to sleep; no request may be running."""
        if self.order.state == "serving":
            await self.pause()
        with self.order.step("sleep"):
            await self._within("sleep", self.llm.sleep(level))

    async def exchange(
        self,
        target: WeightPatch,
        tensors: Mapping[str, TensorBytes],
        transfer: Transfer | None,
        *,
        before: int,
    ) -> None:
        """Loads `tensors`, or receives them by `transfer`, and verifies `target`; leaves the
        processes awake and paused. before: the version of the tokens so far."""
        slept = self.order.state == "asleep"
        self.in_place.forget()
        if slept:
            with self.order.step("wake"):
                await self._within("wake", self.llm.wake("weights"))
        elif self.order.state != "paused":
            await self.pause()
        with self.order.step("load"):
            if transfer is None:
                await asyncio.to_thread(self._mirror.write, tensors)
                served = await self._load(self._mirror.entries)
            else:
                served = await self._receive(transfer)
        with self.order.step("clear"):
            if slept:  # only now: loading may need memory that the cache takes
                await self._within("wake", self.llm.wake("kv_cache"))
            await self._clear(before)
        with self.order.step("prove"):
            for digests in served:
                verify(digests, target)
            await self._within("label", self.llm.label(target.version))

    async def write(
        self,
        target: WeightPatch,
        whole: Mapping[str, TensorBytes],
        layers: Collection[str],
        *,
        before: int,
    ) -> None:
        """Writes in place the changes of `InPlace.find`, and loads `layers` whole, after `whole` is
        written to the mirror; leaves the processes paused. before: the version of the tokens so
        far."""
        loaded: list[dict[str, str]] = []
        await self.pause()
        with self.order.step("load"):
            await self.in_place.write()
            if layers:
                await asyncio.to_thread(self._mirror.write, whole)
                loaded = await self._load(layers, part=True)
        with self.order.step("clear"):
            await self._clear(before)
        with self.order.step("prove"):  # of the loaded tensors; those in place were compared
            for digests in loaded:
                verify(digests, target.of(layers))
            await self._within("label", self.llm.label(target.version))

    async def call(self, what: str, method: str, *arguments: Any) -> list[Any]:
        """Calls a method in the workers: one result of each process. Raises TimeoutError after the
        deadline, and EngineLostError if they are gone."""
        return await self._within(what, self.llm.call_workers(method, *arguments))

    async def _load(self, names: Collection[str], *, part: bool = False) -> list[dict[str, str]]:
        """Has each process load these tensors of the mirror; returns, for each, name -> digest.
        Raises MovedError as of `graphs.check_in_place`."""
        arguments = (self._mirror.path, self._mirror.listed(names), part)
        try:
            return await self.call("load", "emberl_load", *arguments)
        except (EngineLostError, TimeoutError):
            raise
        except Exception as error:  # vLLM passes on only the text of its processes' errors
            if MOVED not in str(error):
                raise
            raise MovedError(f"{MOVED}{str(error).rpartition(MOVED)[2]}") from error

    async def _receive(self, transfer: Transfer) -> list[dict[str, str]]:
        """Has each process receive a version by broadcast; returns, for each, name -> digest.
        Raises EngineLostError if it fails, since layers are then half loaded."""
        version = transfer.version
        group = version.broadcast.group
        try:
            if self.joined != group:
                size = 1 + group.workers * group.ranks
                joining = transfer_api.transfer_init(
                    group.backend, group.host, group.engine_port, transfer.rank, size
                )
                await self.call("join", "emberl_join", joining)
                self.joined = group
            await asyncio.to_thread(self._mirror.lay_out, version.tensors)
            update = transfer_api.transfer_update(group.backend, version.described)
            arguments = (self._mirror.path, self._mirror.listed(), update)
            return await self.call("receive", "emberl_receive", *arguments)
        except Exception as error:
            raise EngineLostError(
                f"the weight transfer into vLLM's processes failed: {error}"
            ) from error

    async def _clear(self, before: int) -> None:
        """Makes sure that no prompt is continued from the old weights' cache. vLLM empties its
        cache only while no request holds a block of it, so later prompts get another salt, and
        requests without a token yet are restarted."""
        sent = self._requests.sent
        for sample in sent.values():
            sample.close_span(before)
            sample.restart = sample.tokens == 0
        self.salt += 1
        await self.llm.abort([i for i, sample in sent.items() if sample.restart])
        if not self._server and all(sample.restart for sample in sent.values()):
            cleared = await self._within("clear", self.llm.clear_prefix_cache())
            assert cleared, "vLLM kept its prefix cache though no request is in flight"

    async def _within(self, what: str, work: Awaitable[T]) -> T:
        return await self.llm.within(what, work, self._deadline)
