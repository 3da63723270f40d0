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
  answers with the digests of the bytes that it loaded. Between the two nothing is decoded.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from . import vllm_compat
from .decoder import checkpoint_tensors
from .engine import Request
from .mirror import Mirror
from .patches import DigestMismatchError, TensorBytes, VersionError, WeightPatch, verify
from .samples import Completion, FinishReason, Prompt, Sampling, Span, merge_spans
from .sampling import check_request, stream_key
from .update_order import UpdateOrder

T = TypeVar("T")

REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}
ABORT_AGAIN = 0.1
"""Seconds after which an abort is repeated for requests that were still on their way to vLLM."""


@dataclass(kw_only=True, eq=False)
class _Sample:
    """One sample on its way."""

    prompt: Prompt
    number: int
    sampling: Sampling
    outcomes: asyncio.Queue[Completion | BaseException]
    request_id: str = ""
    tokens: int = 0
    """Decoded so far, as far as this process has heard."""
    spans: list[Span] = field(default_factory=list)
    """Of the tokens of versions that are no longer served."""
    started: float = field(default_factory=time.time)
    restart: bool = False
    """It had no token when the weights changed."""
    unwanted: bool = False
    """Somebody aborted it."""
    partial: Completion | None = None

    def close_span(self, version: int) -> None:
        """The tokens that no span covers yet are of `version`."""
        start = self.spans[-1].stop if self.spans else 0
        if self.tokens > start:
            self.spans.append(Span(version, start, self.tokens))

    def completion(self, decoded: vllm_compat.Decoded, version: int) -> Completion:
        """`version` is of the tokens that no span covers."""
        reason = REASONS.get(decoded.finish_reason)
        if reason is None:
            raise RuntimeError(f"vLLM ended a sample of prompt {self.prompt.id} with {decoded.finish_reason!r}")
        count = len(decoded.token_ids)
        start = self.spans[-1].stop if self.spans else 0
        assert start <= count <= self.tokens, (
            f"{count} tokens arrived, {self.tokens} were counted, {start} before an update"
        )
        rest = [Span(version, start, count)] if count > start else []
        return Completion(
            prompt_id=self.prompt.id,
            sample=self.number,
            token_ids=np.array(decoded.token_ids, np.int32),
            logprobs=np.array(decoded.logprobs, np.float32),
            spans=merge_spans([*self.spans, *rest]),
            finish_reason=reason,
            started=self.started,
            finished=time.time(),
        )


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
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        """`model` is a Hugging Face directory, or a Hub id with version -1.

        run_id, version: as of `EmbeddedEngine`. deadline_s: the longest that one step of a weight update, a pause or an
        abort may take. The rest: `vllm_compat.EngineSettings`. ValueError and RuntimeError: `vllm_compat.start`.
        """
        if max_num_seqs < 1 or max_model_len < 2:
            raise ValueError(f"max_num_seqs={max_num_seqs}, max_model_len={max_model_len}: at least 1 and 2 are needed")
        settings = vllm_compat.EngineSettings(
            model=str(model),
            dtype=dtype,
            device=device,
            threads=threads,
            cards=cards,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            engine_args=engine_args or {},
        )
        self._llm = vllm_compat.start(settings)
        self._llm.on_tokens(self._count)
        self._max_model_len, self._deadline = max_model_len, deadline_s
        self._run_id, self._version = run_id, version
        self._mirror = Mirror(vllm_compat.DTYPES[dtype])
        if version >= 0:
            self._mirror.write(_checkpoint(Path(model), dtype))
        self._order = UpdateOrder()
        self._turn = asyncio.Lock()  # who may pause, resume, abort or update; first come, first served
        self._open = asyncio.Event()  # whether requests are handed to vLLM
        self._open.set()
        self._held = False  # somebody asked for a pause
        self._corrupt: str | None = None
        self._closed = False
        self._salt = self._tokens_decoded = 0
        self._ids = itertools.count()
        self._sent: dict[str, _Sample] = {}  # by request id, those that vLLM has
        self._tasks: dict[asyncio.Task[None], _Sample] = {}

    @property
    def version(self) -> int:
        return self._version

    @property
    def run_id(self) -> str:
        return self._run_id

    @property
    def tokens_decoded(self) -> int:
        """Of all requests so far."""
        return self._tokens_decoded

    def digests(self) -> dict[str, str]:
        """name -> xxh3-128 of the bytes that the engine was given to serve."""
        return self._mirror.digests()

    # The protocol `Engine`.

    async def generate(self, prompt: Prompt, n: int, sampling: Sampling) -> AsyncIterator[Completion]:
        async for completion in self.generate_all([(prompt, n, sampling)]):
            yield completion

    async def generate_all(self, requests: Sequence[Request]) -> AsyncIterator[Completion]:
        """Submits all requests at once and yields their completions as they finish; ValueError before any is taken."""
        self._check_serving()
        for request in requests:
            check_request(*request, max_model_len=self._max_model_len, vocab_size=self._llm.vocab_size)
        outcomes: asyncio.Queue[Completion | BaseException] = asyncio.Queue()
        tasks = []
        for prompt, n, sampling in requests:
            for number in range(n):
                sample = _Sample(prompt=prompt, number=number, sampling=sampling, outcomes=outcomes)
                tasks.append(task := asyncio.create_task(self._serve(sample)))
                self._tasks[task] = sample
                task.add_done_callback(self._tasks.pop)
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
            if self._order.state == "serving":
                await self._pause()

    async def resume(self) -> None:
        async with self._turn:
            self._held = False
            if self._order.state == "paused":
                await self._resume()

    async def apply(self, patch: WeightPatch) -> int:
        async with self._turn:
            self._check_open()
            if await asyncio.to_thread(self._is_new, patch):
                await self._update(patch)
        return self._version

    async def abort(self, prompt_ids: Collection[str]) -> list[Completion]:
        wanted = set(prompt_ids)
        async with self._turn:
            chosen = {task: sample for task, sample in self._tasks.items() if sample.prompt.id in wanted}
            for sample in chosen.values():
                sample.unwanted = True
            deadline = time.monotonic() + self._deadline
            left = set(chosen)
            while left:
                await self._within("abort", self._llm.abort([chosen[task].request_id for task in left]))
                _, left = await asyncio.wait(left, timeout=ABORT_AGAIN)
                if left and time.monotonic() > deadline:
                    raise TimeoutError(f"vLLM engine: {len(left)} samples were not aborted within {self._deadline:g} s")
        return [sample.partial for sample in chosen.values() if sample.partial is not None]

    async def probe(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """[T] tokens -> [T-1] log-probs of all but the first, by the weights that are served, without a temperature."""
        self._check_serving()
        logprobs = self._llm.prompt_logprobs(f"p{next(self._ids)}", list(token_ids), str(self._salt))
        return np.array(await self._within("probe", logprobs), np.float32)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._fail(RuntimeError("the engine was closed"))
        await self._within("shutdown", self._llm.shutdown())
        self._mirror.close()

    # One sample.

    async def _serve(self, sample: _Sample) -> None:
        try:
            outcome: Completion | BaseException = await self._decode(sample)
        except Exception as error:  # it belongs to those who wait for the tokens
            outcome = error
        if isinstance(outcome, Completion) and outcome.finish_reason == "abort":
            sample.partial = outcome
        sample.outcomes.put_nowait(outcome)

    async def _decode(self, sample: _Sample) -> Completion:
        while True:
            await self._open.wait()
            self._check_serving()
            sample.request_id, sample.tokens, sample.spans, sample.restart = str(next(self._ids)), 0, [], False
            if sample.unwanted:
                return sample.completion(vllm_compat.Decoded([], [], "abort"), self._version)
            decoded = await self._submit(sample)
            if not sample.restart:
                return sample.completion(decoded, self._version)

    async def _submit(self, sample: _Sample) -> vllm_compat.Decoded:
        seed = stream_key(sample.sampling.seed, sample.prompt.id, sample.number) >> 1  # torch takes 63 bits
        prompt = list(sample.prompt.token_ids)
        self._sent[sample.request_id] = sample
        try:
            return await self._llm.decode(sample.request_id, prompt, sample.sampling, seed, str(self._salt))
        finally:
            del self._sent[sample.request_id]

    def _count(self, request_id: str, tokens: int) -> None:
        sample = self._sent.get(request_id)
        if sample is not None:
            sample.tokens += tokens
            self._tokens_decoded += tokens

    # A weight update, in its turn.

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

    async def _update(self, patch: WeightPatch) -> None:
        self._open.clear()
        try:
            if self._order.state != "paused":
                await self._pause()
            self._corrupt = f"the update to version {patch.version} did not complete"
            served = await self._load(patch)
            await self._clear()
            self._prove(served, patch)
            self._corrupt = None
            self._run_id, self._version = patch.run_id, patch.version
            if not self._held:
                await self._resume()
        except BaseException as error:
            await self._fail(error if isinstance(error, Exception) else RuntimeError(self._corrupt))
            raise
        finally:
            self._open.set()

    async def _pause(self) -> None:
        with self._order.step("pause"):
            await self._within("pause", self._llm.pause())

    async def _load(self, patch: WeightPatch) -> list[dict[str, str]]:
        """What each process of the engine says that it loaded: name -> digest."""
        with self._order.step("load"):
            await asyncio.to_thread(self._mirror.write, patch.tensors)
            entries = [[name, *entry] for name, entry in self._mirror.entries.items()]
            return await self._within("load", self._llm.call_workers("emberl_load", self._mirror.path, entries))

    async def _clear(self) -> None:
        """No prompt may be continued from what the old weights cached. vLLM empties its cache only while no request holds a
        block of it, so later prompts get another salt, and those on their way that have no token yet are sent anew."""
        with self._order.step("clear"):
            for sample in self._sent.values():
                sample.close_span(self._version)
                sample.restart = sample.tokens == 0
            self._salt += 1
            await self._within("abort", self._llm.abort([i for i, sample in self._sent.items() if sample.restart]))
            if all(sample.restart for sample in self._sent.values()):
                cleared = await self._within("clear", self._llm.clear_prefix_cache())
                assert cleared, "vLLM kept its prefix cache though no request is in flight"

    def _prove(self, served: Sequence[Mapping[str, str]], patch: WeightPatch) -> None:
        with self._order.step("prove"):
            for digests in served:
                verify(digests, patch)

    async def _resume(self) -> None:
        with self._order.step("resume"):
            await self._within("resume", self._llm.resume())

    async def _fail(self, error: Exception) -> None:
        """Ends every stream with `error` and takes its requests back from vLLM."""
        tasks = list(self._tasks.items())
        for task, sample in tasks:
            sample.outcomes.put_nowait(error)
            task.cancel()
        if tasks:
            await asyncio.wait([task for task, _ in tasks], timeout=self._deadline)

    async def _within(self, what: str, work: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(work, self._deadline)
        except TimeoutError:
            raise TimeoutError(f"vLLM engine: {what!r} took longer than {self._deadline:g} s (deadline_s)") from None

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine was closed")

    def _check_serving(self) -> None:
        self._check_open()
        if self._corrupt is not None:
            raise DigestMismatchError(f"the vLLM engine serves nothing: {self._corrupt}")


def _checkpoint(path: Path, dtype: str) -> dict[str, TensorBytes]:
    """The tensors of a Hugging Face directory in the bytes that an engine of `dtype` makes of them."""
    tied = json.loads((path / "config.json").read_text()).get("tie_word_embeddings", False)
    tensors = {}
    for name, tensor in checkpoint_tensors(path):
        if name != "lm_head.weight" or not tied:
            data = tensor.to(getattr(torch, dtype)).contiguous().view(-1).view(torch.uint8).numpy()
            tensors[name] = TensorBytes(dtype=vllm_compat.DTYPES[dtype], shape=tuple(tensor.shape), data=data)
    return tensors


__all__ = ["VLLMEngine"]
