"""The engine on vLLM, and so, with its platform plugin vllm-ascend, on NPUs.

    engine = VLLMEngine(model_dir, max_num_seqs=128, max_model_len=512, dtype="bfloat16", run_id=run_id, version=0)

The same protocol as `EmbeddedEngine`. Choices that a user can see:

- Every sample is a request of its own, with a seed of its own; vLLM's prefix cache computes the whole blocks of a prompt
  once for its group (`rollout.engine_args.block_size`), the tokens after the last whole block for each sample.
- Log-probs are `processed_logprobs`: of the distribution really sampled, after temperature, top-k and top-p. A temperature
  of 0 is greedy; the log-prob is then that of the untempered model.
- An update in flight keeps the key-value cache: a sequence goes on with what the old weights made of its older tokens (as
  in PipelineRL, arXiv 2509.19128). What has no token yet starts anew, and each version looks prompts up under a salt of its
  own, so no prompt is ever continued from another version's cache.
- What is served is proved twice: a patch's digests are compared before anything changes, and each process of the engine
  answers with the digests of the bytes that it loaded. Between the two nothing is decoded. Bytes that differ are loaded
  once more; if they differ again the engine serves nothing until a whole patch comes.
- An engine whose processes end, or from which nothing comes within its deadline, is started anew, loads the version that
  was served, and gets the unfinished samples again, up to `max_restarts` times.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import vllm_compat
from .engine import Request
from .live_samples import NOTHING, Decoded, LiveSample, samples_of
from .mirror import Mirror, checkpoint_bytes
from .patches import DigestMismatchError, TensorBytes, VersionError, WeightPatch, verify
from .samples import Completion, Prompt, Sampling
from .sampling import check_request
from .update_order import UpdateOrder
from .vllm_process import EngineLostError, RunningLLM, start
from .vllm_server import RunningServer, connect

ABORT_AGAIN = 0.1
"""Seconds after which an abort is repeated for requests that were still on their way to vLLM."""
LOOK = 0.5
"""Seconds between two looks at whether tokens come."""
SLOWEST = 1.0
"""Seconds that a token of a sample which is being decoded may take on average."""


class VLLMEngine:
    """Implements `Engine`. To be used on one event loop."""

    def __init__(
        self,
        model: Path | str,
        *,
        max_num_seqs: int = 128,
        max_model_len: int = 1024,
        dtype: str = "bfloat16",
        device: str = "cpu",
        threads: int = 1,
        cards: tuple[str, ...] = (),
        run_id: str = "",
        version: int = 0,
        deadline_s: float = 120.0,
        max_restarts: int = 0,
        engine_args: Mapping[str, Any] | None = None,
        server: str = "",
        servers_directory: str | None = None,
    ) -> None:
        """`model` is a Hugging Face directory, or a Hub id with version -1.

        run_id, version: as of `EmbeddedEngine`. deadline_s: the longest that one step of a weight update, a pause or an
        abort may take, and that no token may come while some are asked for; a sample has that and a second for each token
        it asks, from its first. server: the address of a running vLLM to use instead of starting one (`vllm_server`), with
        a directory that both see, if they are on two machines.
        The rest: `vllm_compat.EngineSettings`. ValueError and EngineLostError: `vllm_process.start`, `vllm_server.connect`.
        """
        if max_num_seqs < 1 or max_model_len < 2:
            raise ValueError(f"max_num_seqs={max_num_seqs}, max_model_len={max_model_len}: at least 1 and 2 are needed")
        self._settings = vllm_compat.EngineSettings(
            model=str(model),
            dtype=dtype,
            device=device,
            threads=threads,
            cards=cards,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            engine_args=engine_args or {},
        )
        self._deadline, self._max_restarts, self.restarts = deadline_s, max_restarts, 0
        self._run_id, self._version = run_id, version
        self._server = server
        self._start()
        self._mirror = Mirror(vllm_compat.DTYPES[dtype], servers_directory)
        if version >= 0:
            self._mirror.write(checkpoint_bytes(Path(model), dtype))
        self._proved: WeightPatch | None = None  # of the version served, without its tensors; None: those of `model`
        self._turn = asyncio.Lock()  # who may pause, resume, update or restart; first come, first served
        self._open = asyncio.Event()  # whether samples are sent to vLLM
        self._open.set()
        self._held = False  # somebody asked for a pause
        self._corrupt: Exception | None = None
        self._closed = False
        self._salt = 0
        self._ids = itertools.count()
        self._sent: dict[str, LiveSample] = {}  # by request id, those that vLLM has
        self._tasks: dict[asyncio.Task[None], LiveSample] = {}
        self._watch: asyncio.Task[None] | None = None
        self._rescue: asyncio.Task[None] | None = None
        self._served_s = 0.0
        self.tokens_decoded = 0
        """Of all samples so far."""

    @property
    def version(self) -> int:
        return self._version

    @property
    def run_id(self) -> str:
        return self._run_id

    def digests(self) -> dict[str, str]:
        """name -> xxh3-128 of the bytes that the engine was given to serve."""
        return self._mirror.digests()

    # The protocol `Engine`.

    async def generate(self, prompt: Prompt, n: int, sampling: Sampling) -> AsyncIterator[Completion]:
        async for completion in self.generate_all([(prompt, n, sampling)]):
            yield completion

    async def generate_all(
        self, requests: Sequence[Request], begun: Mapping[str, Sequence[Completion]] | None = None
    ) -> AsyncIterator[Completion]:
        self._check_serving()
        for request in requests:
            check_request(*request, max_model_len=self._settings.max_model_len, vocab_size=self._llm.vocab_size)
        outcomes: asyncio.Queue[Completion | BaseException] = asyncio.Queue()
        tasks = []
        for sample in samples_of(requests, begun or {}, outcomes):
            tasks.append(task := asyncio.create_task(self._serve(sample)))
            self._tasks[task] = sample
            task.add_done_callback(self._tasks.pop)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._look())
        try:
            for _ in tasks:
                outcome = await outcomes.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                if outcome.finish_reason != "abort":
                    yield outcome
        finally:
            for task in tasks:  # if the consumer went away, decode no further for it
                task.cancel()

    async def pause(self) -> None:
        async with self._turn:
            self._held = True
            if self._order.state != "asleep":
                await self._bring(self._proved, {})

    async def resume(self) -> None:
        async with self._turn:
            self._held = False
            if self._order.state != "asleep":
                await self._bring(self._proved, {})

    async def apply(self, patch: WeightPatch) -> int:
        async with self._turn:
            self._check_open()
            if await asyncio.to_thread(self._is_new, patch):
                target = replace(patch, tensors={})
                await self._bring(target, patch.tensors)
                self._run_id, self._version, self._proved = patch.run_id, patch.version, target
        return self._version

    async def abort(self, prompt_ids: Collection[str]) -> list[Completion]:
        wanted = set(prompt_ids)
        chosen = {task: sample for task, sample in self._tasks.items() if sample.prompt.id in wanted}
        for sample in chosen.values():
            sample.unwanted = True
        deadline = time.monotonic() + self._deadline
        left = set(chosen)
        while left:
            await self._llm.abort([chosen[task].request_id for task in left])
            _, left = await asyncio.wait(left, timeout=ABORT_AGAIN)
            if left and time.monotonic() > deadline:
                raise TimeoutError(f"vLLM engine: {len(left)} samples were not aborted within {self._deadline:g} s")
        return [sample.partial for sample in chosen.values() if sample.partial is not None]

    async def probe(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        self._check_serving()
        work = self._llm.prompt_logprobs(f"p{next(self._ids)}", list(token_ids), str(self._salt))
        return np.array(await self._llm.within("probe", work, self._deadline), np.float32)

    async def sleep(self, level: int) -> None:
        async with self._turn:
            self._check_serving()
            if self._order.state == "asleep":
                return
            self._open.clear()
            if self._tasks:
                _, left = await asyncio.wait(list(self._tasks), timeout=self._deadline)
                if left:
                    raise TimeoutError(f"vLLM engine: {len(left)} samples kept it awake for {self._deadline:g} s")
            if self._order.state == "serving":
                await self._pause()
            with self._order.step("sleep"):
                await self._llm.within("sleep", self._llm.sleep(level), self._deadline)

    async def wake(self) -> None:
        async with self._turn:
            if self._order.state == "asleep" and self._proved is not None:
                await self._bring(self._proved, {}, stale=True)

    async def reload(self) -> None:
        async with self._turn:
            self._check_serving()
            await self._bring(self._proved, {}, stale=True)

    async def close(self) -> None:
        async with self._turn:
            if not self._closed:
                self._closed = True
                await self._fail(RuntimeError("the engine was closed"))
                await self._llm.shutdown()
                self._mirror.close()

    # One sample.

    async def _serve(self, sample: LiveSample) -> None:
        try:
            outcome: Completion | BaseException = await self._decode(sample)
        except Exception as error:  # it belongs to those who wait for the tokens
            outcome = error
        if isinstance(outcome, Completion) and outcome.finish_reason == "abort":
            sample.partial = outcome
        sample.outcomes.put_nowait(outcome)

    async def _decode(self, sample: LiveSample) -> Completion:
        while True:
            await self._open.wait()
            self._check_serving()
            sample.send_as(str(next(self._ids)))
            if sample.unwanted:
                return sample.completion(NOTHING, self._version)
            llm = self._llm
            try:
                decoded = await self._send(sample)
            except EngineLostError as error:
                await self._lost(llm, error)
                continue
            if not sample.restart:
                return sample.completion(decoded, self._version)

    async def _send(self, sample: LiveSample) -> Decoded:
        self._sent[sample.request_id] = sample
        sampling = replace(sample.sampling, max_tokens=sample.wanted, seed=sample.seed)
        work = self._llm.decode(sample.request_id, sample.token_ids, sampling, str(self._salt))
        sample.work = asyncio.ensure_future(work)
        try:
            return await sample.work
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if me is not None and me.cancelling():  # the consumer went away, not the engine
                raise
            return NOTHING
        finally:
            del self._sent[sample.request_id]

    def _count(self, request_id: str, tokens: int) -> None:
        sample = self._sent.get(request_id)
        if sample is not None:
            if sample.tokens == 0:
                sample.came = self._served_s
            sample.tokens += tokens
            self.tokens_decoded += tokens

    async def _look(self) -> None:
        """While there is something to decode: does it go on?"""
        came, since = self.tokens_decoded, self._served_s
        while self._tasks:
            await asyncio.sleep(LOOK)
            if self._order.state == "serving":
                self._served_s += LOOK
            if self.tokens_decoded != came or not self._sent:
                came, since = self.tokens_decoded, self._served_s
            late = [s for s in self._sent.values() if s.tokens and self._served_s - s.came > self._allowed(s)]
            if late:
                why = f"a sample of {late[0].sampling.max_tokens} tokens took longer than {self._allowed(late[0]):g} s"
                await self._lost(self._llm, EngineLostError(why))
            elif self._served_s - since > self._deadline:
                await self._lost(self._llm, EngineLostError(f"no token came within {self._deadline:g} s"))

    def _allowed(self, sample: LiveSample) -> float:
        return self._deadline + SLOWEST * sample.sampling.max_tokens

    # Weights and processes, in their turn.

    def _is_new(self, patch: WeightPatch) -> bool:
        """Whether it has to be applied. All that can be wrong with it is found here, before anything changes."""
        if self._run_id and patch.run_id != self._run_id:
            raise VersionError(f"a patch of run {patch.run_id}, but this engine serves run {self._run_id}")
        if patch.version < self._version:
            raise VersionError(f"version goes backwards: {patch.version} after {self._version}")
        if patch.version == self._version and self._corrupt is None:
            verify(self._mirror.digests(), patch)
            return False
        if patch.base_version not in (None, self._version):
            raise VersionError(
                f"patch {patch.version} builds on {patch.base_version}, the engine serves {self._version}"
            )
        self._mirror.check(patch)
        return True

    async def _lost(self, llm: RunningLLM | RunningServer, error: EngineLostError) -> None:
        """Returns when `llm` has been replaced, or cannot be."""
        if self._rescue is None or self._rescue.done():
            self._rescue = asyncio.create_task(self._replace(llm, error))
        await asyncio.shield(self._rescue)  # a consumer that goes away must not stop it half-way

    async def _replace(self, llm: RunningLLM | RunningServer, error: EngineLostError) -> None:
        async with self._turn:
            if llm is self._llm and not self._closed and self._corrupt is None:
                with suppress(Exception):  # every stream has it by now
                    await self._bring(self._proved, {}, lost=error)

    async def _bring(
        self,
        target: WeightPatch | None,
        tensors: Mapping[str, TensorBytes],
        *,
        stale: bool = False,
        lost: Exception | None = None,
    ) -> None:
        """Until the engine holds what `target` says after writing `tensors`, and is paused exactly if somebody asked for it;
        through as many restarts as are allowed. What fails for good ends every stream. stale: it has to be loaded in any
        case. lost: the engine has to be replaced."""
        self._open.clear()
        stale, differed = stale or target is not self._proved, False
        try:
            while True:
                try:
                    if lost is not None:
                        await self._restart(lost)
                        stale, lost = target is not None, None
                    if stale and target is not None:
                        await self._exchange(target, tensors)
                        self._corrupt, stale = None, False
                    if self._held and self._order.state == "serving":
                        await self._pause()
                    if not self._held and self._order.state == "paused":
                        await self._resume()
                    return
                except (EngineLostError, TimeoutError) as error:
                    lost = error
                except DigestMismatchError:
                    if differed:
                        raise
                    differed = True
        except BaseException as error:
            failure = error if isinstance(error, Exception) else RuntimeError("a weight update was interrupted")
            self._corrupt = self._corrupt or failure
            await self._fail(failure)
            raise
        finally:
            self._open.set()

    async def _exchange(self, target: WeightPatch, tensors: Mapping[str, TensorBytes]) -> None:
        slept = self._order.state == "asleep"
        if slept:
            with self._order.step("wake"):
                await self._llm.within("wake", self._llm.wake("weights"), self._deadline)
        elif self._order.state != "paused":
            await self._pause()
        with self._order.step("load"):
            await asyncio.to_thread(self._mirror.write, tensors)
            entries = [[name, *entry] for name, entry in self._mirror.entries.items()]
            work = self._llm.call_workers("emberl_load", self._mirror.path, entries)
            served = await self._llm.within("load", work, self._deadline)
        with self._order.step("clear"):
            if slept:  # the cache's memory is asked for only when what loading needed is free again
                await self._llm.within("wake", self._llm.wake("kv_cache"), self._deadline)
            await self._clear()
        with self._order.step("prove"):
            for digests in served:
                verify(digests, target)
            await self._llm.within("label", self._llm.label(target.version), self._deadline)

    async def _clear(self) -> None:
        """No prompt may be continued from what the old weights cached. vLLM empties its cache only while no request holds a
        block of it, so later prompts get another salt, and those on their way that have no token yet are sent anew."""
        for sample in self._sent.values():
            sample.close_span(self._version)
            sample.restart = sample.tokens == 0
        self._salt += 1
        await self._llm.abort([i for i, sample in self._sent.items() if sample.restart])
        if not self._server and all(sample.restart for sample in self._sent.values()):
            cleared = await self._llm.within("clear", self._llm.clear_prefix_cache(), self._deadline)
            assert cleared, "vLLM kept its prefix cache though no request is in flight"

    async def _pause(self) -> None:
        with self._order.step("pause"):
            await self._llm.within("pause", self._llm.pause(), self._deadline)

    async def _resume(self) -> None:
        with self._order.step("resume"):
            await self._llm.within("resume", self._llm.resume(), self._deadline)

    def _start(self) -> None:
        if self._server:
            self._llm: RunningLLM | RunningServer = connect(self._server, self._settings, self._version, self._deadline)
        else:
            self._llm = start(self._settings)
        self._llm.on_tokens(self._count)
        self._order = UpdateOrder()

    async def _restart(self, error: Exception) -> None:
        """New processes, which hold what `model` holds; EngineLostError with the old ones' last words if none are allowed."""
        for sample in list(self._sent.values()):
            sample.take_back()
        last = " | ".join(self._llm.last_lines())
        await self._llm.shutdown()
        self.restarts += 1
        if self.restarts > self._max_restarts:
            raise RuntimeError(
                f"vLLM was lost {self.restarts} times, more than rollout.max_restarts={self._max_restarts}: {error}; "
                f"its last lines: {last}"
            )
        await asyncio.to_thread(self._start)

    async def _fail(self, error: Exception) -> None:
        """Ends every stream with `error` and takes its requests back from vLLM."""
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
        if self._corrupt is not None:
            kind = DigestMismatchError if isinstance(self._corrupt, DigestMismatchError) else RuntimeError
            raise kind(f"the vLLM engine serves nothing: {self._corrupt}")


__all__ = ["VLLMEngine"]
