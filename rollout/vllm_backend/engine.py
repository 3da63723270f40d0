"""The engine on vLLM, and so, with its platform plugin vllm-ascend, on NPUs.

    settings = EngineSettings(model=model_dir, max_num_seqs=128, max_model_len=512)
    engine = VLLMEngine(settings, run_id=run_id, version=0)

The same protocol as `EmbeddedEngine`. Choices that a user can see:

- Every sample is a request of its own, with a seed of its own; vLLM's prefix cache computes the
  whole blocks of a prompt once for its group (`rollout.engine_args.block_size`), the tokens after
  the last whole block for each sample.
- Log-probs are `processed_logprobs`: of the distribution really sampled (`samples.Sampling`). A
  temperature of 0 is greedy; the log-prob is then that of the untempered model.
- Stop strings are matched here, in the tokens as they come, by the embedded engine's rule; the
  request is then aborted, and tokens that vLLM decoded beyond the string are dropped.
- An update in flight keeps the key-value cache: a sequence goes on with the keys and values that
  the old weights computed for its older tokens (as in PipelineRL, arXiv 2509.19128). Samples
  without a token yet are restarted, and each version looks prompts up under a salt of its own, so
  no prompt is ever continued from another version's cache.
- The served weights are verified twice: a patch's digests are compared before anything changes, and
  each process of the engine answers with the digests of the bytes that it loaded. Between the two
  nothing is decoded. Bytes that differ are loaded once more; if they differ again the engine serves
  nothing until a whole patch comes. Elements written in place are compared and read back while
  decoding is paused; an audit runs beside decoding afterwards, and samples that end meanwhile are
  handed out after it.
- Weights reach vLLM's processes through shared memory (`shared_memory.Mirror`), or whole from the
  learners by vLLM's own weight transfer (`transfer`).
- An engine whose processes end, or from which no token comes within its deadline, is restarted: it
  loads the version that was served, and its unfinished requests are re-submitted, up to
  `max_restarts` times.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..embedded.sampling import check_request
from ..engine import Partials, Request
from ..samples import Completion
from ..stops import StopStrings
from ..weights.canary import Canary
from ..weights.engine_transfer import BroadcastGroup
from ..weights.patch import DigestMismatchError, WeightPatch, Weights
from . import compat as vllm_compat
from .process import EngineLostError, RunningLLM
from .requests import NOTHING, Decoded, LiveSample, samples_of
from .served_weights import ServedWeights
from .server import RunningServer

ABORT_AGAIN = 0.1
"""Seconds after which an abort is repeated for requests that were still on their way to vLLM."""
POLL_S = 0.5
"""Seconds between two checks of the watchdog."""
MAX_TOKEN_S = 1.0
"""Most seconds that a token of a running sample may take on average."""


class VLLMEngine:
    """Implements `Engine` on vLLM. To be used on one event loop."""

    takes_changes = True

    def __init__(
        self,
        settings: vllm_compat.EngineSettings,
        *,
        run_id: str = "",
        version: int = 0,
        deadline_s: float = 120.0,
        max_restarts: int = 0,
        server: str = "",
        servers_directory: str | None = None,
    ) -> None:
        """A Hub id as `settings.model` needs version -1.

        run_id, version: as of `EmbeddedEngine`. deadline_s: the longest time for one step of a
        weight update, a pause or an abort, and without any token while samples run; a sample has,
        from its first token, that and `MAX_TOKEN_S` for each token it may have. server: the address
        of a running vLLM to use instead of starting one (`server.py`), with a directory that both
        see if they are on two machines. Raises ValueError and EngineLostError as of `process.start`
        and `server.connect`.
        """
        self._settings = settings
        self._deadline = deadline_s
        self.sent: dict[str, LiveSample] = {}
        """Request id -> sample, of the requests that vLLM has now."""
        self._weights = ServedWeights(
            self._settings,
            self,
            run_id=run_id,
            version=version,
            deadline_s=deadline_s,
            max_restarts=max_restarts,
            server=server,
            servers_directory=servers_directory,
        )
        # held by an update or a restart, so that only one changes the weights at a time
        self._turn = asyncio.Lock()
        self._closed = False
        self._ids = itertools.count()
        self._tasks: dict[asyncio.Task[None], LiveSample] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._stop_strings = StopStrings(settings.model)
        self._watch: asyncio.Task[None] | None = None
        self._rescue: asyncio.Task[None] | None = None
        self._served_s = 0.0
        self.tokens_decoded = 0
        """Tokens of all samples so far."""

    @property
    def version(self) -> int:
        return self._weights.version

    @property
    def run_id(self) -> str:
        return self._weights.run_id

    @property
    def held(self) -> Weights | None:
        return self._weights.held

    @property
    def restarts(self) -> int:
        """Number of restarts of vLLM's processes."""
        return self._weights.processes.restarts

    @property
    def joined(self) -> BroadcastGroup | None:
        """The group through which the learners can send weights into vLLM's processes."""
        return self._weights.processes.joined

    @property
    def pause_s(self) -> float:
        """Seconds for which decoding was paused by the last update."""
        return self._weights.pause_s

    @property
    def _llm(self) -> RunningLLM | RunningServer:
        return self._weights.processes.llm

    def digests(self) -> dict[str, str]:
        """name -> xxh3-128 of the bytes in the mirror, from which the processes load."""
        return self._weights.mirror.digests()

    # The protocol `Engine`.

    async def generate_all(
        self,
        requests: Sequence[Request],
        partials: Partials | None = None,
    ) -> AsyncIterator[Completion]:
        self._check_serving()
        for request in requests:
            check_request(
                *request,
                max_model_len=self._settings.max_model_len,
                vocab_size=self._llm.vocab_size,
            )
        outcomes: asyncio.Queue[Completion | BaseException] = asyncio.Queue()
        tasks = []
        for sample in samples_of(requests, partials or {}, outcomes, self._stop_strings):
            tasks.append(task := asyncio.create_task(self._serve(sample)))
            self._tasks[task] = sample
            task.add_done_callback(self._tasks.pop)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watchdog())
        try:
            for _ in tasks:
                outcome = await outcomes.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                if outcome.finish_reason != "abort":
                    yield outcome
        finally:
            for task in tasks:  # still running only if the consumer went away: decode no further
                task.cancel()

    async def apply(self, patch: WeightPatch) -> int:
        async with self._turn:
            self._check_open()
            await self._weights.apply(patch)
        return self.version

    async def abort(self, prompt_ids: Collection[str]) -> list[Completion]:
        wanted = set(prompt_ids)
        chosen = {
            task: sample for task, sample in self._tasks.items() if sample.prompt.id in wanted
        }
        for sample in chosen.values():
            sample.unwanted = True
        deadline = time.monotonic() + self._deadline
        left = set(chosen)
        while left:
            await self._llm.abort([chosen[task].request_id for task in left])
            _, left = await asyncio.wait(left, timeout=ABORT_AGAIN)
            if left and time.monotonic() > deadline:
                raise TimeoutError(
                    f"vLLM engine: {len(left)} samples were not aborted within {self._deadline:g} s"
                )
        return [sample.aborted for sample in chosen.values() if sample.aborted is not None]

    async def probe(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        self._check_serving()
        work = self._llm.prompt_logprobs(
            f"p{next(self._ids)}", list(token_ids), str(self._weights.processes.salt)
        )
        return np.array(await self._llm.within("probe", work, self._deadline), np.float32)

    async def canary(self, canary: Canary | None) -> None:
        async with self._turn:
            self._check_serving()
            if self._tasks:  # only those that have just ended: a canary runs without other samples
                await asyncio.wait(list(self._tasks), timeout=self._deadline)
            assert not self._tasks, "a canary is decoded by itself"
            await self._weights.load_canary(canary)

    async def sleep(self, level: int) -> None:
        async with self._turn:
            self._check_serving()
            if self._weights.state == "asleep":
                return
            self._weights.open.clear()
            if self._tasks:
                _, left = await asyncio.wait(list(self._tasks), timeout=self._deadline)
                if left:
                    raise TimeoutError(
                        f"vLLM engine: {len(left)} samples kept it awake for {self._deadline:g} s"
                    )
            await self._weights.sleep(level)

    async def wake(self) -> None:
        async with self._turn:
            if self._weights.can_wake:
                await self._weights.reconcile_served(stale=True)

    async def reload(self) -> None:
        async with self._turn:
            self._check_serving()
            await self._weights.reconcile_served(stale=True)

    async def close(self) -> None:
        async with self._turn:
            if not self._closed:
                self._closed = True
                await self.fail(RuntimeError("the engine was closed"))
                await self._llm.shutdown()
                self._weights.mirror.close()

    # One sample.

    async def _serve(self, sample: LiveSample) -> None:
        try:
            outcome: Completion | BaseException = await self._decode(sample)
        except Exception as error:  # raised in `generate_all`, which waits for the tokens
            outcome = error
        await self._weights.audited.wait()
        if isinstance(outcome, Completion) and outcome.finish_reason == "abort":
            sample.aborted = outcome
        sample.outcomes.put_nowait(outcome)

    async def _decode(self, sample: LiveSample) -> Completion:
        while True:
            await self._weights.open.wait()
            self._check_serving()
            sample.send_as(str(next(self._ids)))
            if sample.unwanted:
                return sample.completion(NOTHING, self.version)
            llm = self._llm
            try:
                decoded = await self._send(sample)
            except EngineLostError as error:
                await self._lost(llm, error)
                continue
            if not sample.restart:
                return sample.completion(decoded, self.version)

    async def _send(self, sample: LiveSample) -> Decoded:
        self.sent[sample.request_id] = sample
        sampling = replace(sample.sampling, max_tokens=sample.wanted, seed=sample.seed)
        work = self._llm.decode(
            sample.request_id, sample.token_ids, sampling, str(self._weights.processes.salt)
        )
        sample.work = asyncio.ensure_future(work)
        try:
            return await sample.work
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if me is not None and me.cancelling():  # the consumer went away, not the engine
                raise
            return NOTHING
        finally:
            del self.sent[sample.request_id]

    def count(self, request_id: str, token_ids: Sequence[int]) -> None:
        sample = self.sent.get(request_id)
        if sample is not None:
            if sample.tokens == 0:
                sample.came = self._served_s
            self.tokens_decoded += len(token_ids)
            if sample.take(token_ids):
                ending = asyncio.create_task(self._end_early(request_id))
                self._endings.add(ending)
                ending.add_done_callback(self._endings.discard)

    async def _end_early(self, request_id: str) -> None:
        """Aborts a sample that has its stop string. An error is left to the request itself, which
        fails too."""
        with suppress(EngineLostError, RuntimeError):
            await self._llm.abort([request_id])

    async def _watchdog(self) -> None:
        """The watchdog: replaces an engine from which no token comes, or of which a sample takes
        too long. Time counts only while the engine serves. Ends when there are no samples."""
        came, since = self.tokens_decoded, self._served_s
        while self._tasks:
            await asyncio.sleep(POLL_S)
            if self._weights.state == "serving":
                self._served_s += POLL_S
            if self.tokens_decoded != came or not self.sent:
                came, since = self.tokens_decoded, self._served_s
            late = [
                s
                for s in self.sent.values()
                if s.tokens and self._served_s - s.came > self._allowed(s)
            ]
            if late:
                why = (
                    f"a sample of {late[0].sampling.max_tokens} tokens took longer than"
                    f" {self._allowed(late[0]):g} s"
                )
                await self._lost(self._llm, EngineLostError(why))
            elif self._served_s - since > self._deadline:
                await self._lost(
                    self._llm, EngineLostError(f"no token came within {self._deadline:g} s")
                )

    def _allowed(self, sample: LiveSample) -> float:
        return self._deadline + MAX_TOKEN_S * sample.sampling.max_tokens

    # Losses.

    async def _lost(self, llm: RunningLLM | RunningServer, error: EngineLostError) -> None:
        """Has `llm` replaced once, whoever reports its loss; returns when that is done or has
        failed."""
        if self._rescue is None or self._rescue.done():
            self._rescue = asyncio.create_task(self._replace(llm, error))
        # shielded: a consumer that goes away must not cancel a restart that others wait for
        await asyncio.shield(self._rescue)

    async def _replace(self, llm: RunningLLM | RunningServer, error: EngineLostError) -> None:
        async with self._turn:
            if llm is self._llm and not self._closed and self._weights.corrupt is None:
                with suppress(Exception):  # `reconcile` has ended every stream with it
                    await self._weights.reconcile_served(lost=error)

    async def fail(self, error: Exception) -> None:
        """Ends every stream with `error` and cancels its requests."""
        for task, sample in list(self._tasks.items()):
            sample.outcomes.put_nowait(error)
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=self._deadline)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine was closed")

    def _check_serving(self) -> None:
        self._check_open()
        why = self._weights.corrupt
        if why is not None:
            kind = DigestMismatchError if isinstance(why, DigestMismatchError) else RuntimeError
            raise kind(f"the vLLM engine serves nothing: {why}")
