"""vLLM's processes as holders of the weights: the steps of a change, in the order of `LEGAL`, and
new processes where the old ones are lost.

Nothing here knows which version is served; `ServedWeights` does.
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
    """The requests under way, as far as a change of weights concerns them."""

    sent: dict[str, LiveSample]
    """By request id, those that vLLM has."""

    def count(self, request_id: str, token_ids: Sequence[int]) -> None:
        """These tokens have come."""
        ...

    async def fail(self, error: Exception) -> None:
        """Ends every stream."""
        ...


class Processes:
    """One engine's. To be used on one event loop."""

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
        """The group in which the learners and these processes are."""
        self.salt = 0
        """Prompts are looked up in vLLM's cache under it."""
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
        await asyncio.to_thread(self._start, version)

    def give_up_graphs(self, error: MovedError) -> None:
        """The processes that are started next capture none: a load of theirs would move tensors
        again. Nobody lost these, so the start counts for nothing. `error` where that is no help."""
        if self._server or self._settings.engine_args.get("enforce_eager"):
            raise error
        warnings.warn(
            f"vLLM is started anew, and decodes without captured graphs from now on: {error}",
            stacklevel=2,
        )
        own = {**self._settings.engine_args, "enforce_eager": True}
        self._settings = replace(self._settings, engine_args=own)
        self._max_restarts += 1

    async def pause(self) -> None:
        with self.order.step("pause"):
            await self._within("pause", self.llm.pause())

    async def resume(self) -> None:
        with self.order.step("resume"):
            await self._within("resume", self.llm.resume())

    async def sleep(self, level: int) -> None:
        """Nothing may be under way."""
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
        """Awake, paused and with all that `target` says. before: the version of tokens so far."""
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
            if slept:  # the cache's memory is asked for only when what loading needed is free again
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
        """Paused and with the changes that were found (`InPlace.find`), and with these tensors of
        some layers, of which `whole` changed."""
        loaded: list[dict[str, str]] = []
        await self.pause()
        with self.order.step("load"):
            await self.in_place.write()
            if layers:
                await asyncio.to_thread(self._mirror.write, whole)
                loaded = await self._load(layers, part=True)
        with self.order.step("clear"):
            await self._clear(before)
        with self.order.step("prove"):  # each process has compared what it wrote over
            for digests in loaded:
                verify(digests, target.of(layers))
            await self._within("label", self.llm.label(target.version))

    async def call(self, what: str, method: str, *arguments: Any) -> list[Any]:
        """One result of each process; TimeoutError, and EngineLostError if they are gone."""
        return await self._within(what, self.llm.call_workers(method, *arguments))

    async def _load(self, names: Collection[str], *, part: bool = False) -> list[dict[str, str]]:
        """The digests of what each process has loaded. MovedError: `graphs.check_in_place`."""
        arguments = (self._mirror.path, self._mirror.listed(names), part)
        try:
            return await self.call("load", "emberl_load", *arguments)
        except (EngineLostError, TimeoutError):
            raise
        except Exception as error:  # vLLM hands on the words of what its processes raise
            if MOVED not in str(error):
                raise
            raise MovedError(f"{MOVED}{str(error).rpartition(MOVED)[2]}") from error

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
        """No prompt may be continued from what the old weights cached. vLLM empties its cache only
        while no request holds a block of it, so later prompts get another salt, and those on their
        way that have no token yet are sent anew."""
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
