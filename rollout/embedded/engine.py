"""The embedded engine: in-process PyTorch with continuous batching, where no vLLM is installed.

    engine = EmbeddedEngine(model_dir, max_num_seqs=128, dtype="bfloat16", run_id=run_id, version=0)
    async for completion in engine.generate_all([(prompt, 8, sampling), ...]): ...
    await engine.apply(patch)         # at the next token boundary; requests in flight go on
    partial = await engine.abort([prompt.id])
    await engine.close()

    engine.submit(prompt, 8, sampling); completions = engine.run()       # without asyncio

Choices that a user can see:

- An update in flight keeps the key-value cache: a sequence goes on with the keys and values that
  the old weights made of its older tokens (as in PipelineRL, arXiv 2509.19128), and its log-probs
  are those it was really drawn with. Prompts not yet admitted are computed anew, so a completion of
  one version never sees another's weights.
- Everything submitted before the first step is admitted in that order. `generate_all` submits all
  its requests at once, and a draw depends on (seed, prompt id, sample index, position) alone, so
  such a run repeats bit for bit.
- A temperature of 0 is greedy; the log-prob is then that of the untempered model.
- It takes as many of torch's threads, which are the caller's to set before the engine is made, as a
  step is worth.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..engine import Partials, Request
from ..samples import Completion, Prompt, Sampling
from ..stops import StopStrings
from ..weights.canary import Canary
from ..weights.patch import WeightPatch, Weights
from .continuous_batch import ContinuousBatch
from .kv_cache import Counters, Deliver
from .model import Decoder
from .versions import ServedVersion

T = TypeVar("T")

BURST = 32
"""Most steps in one call to the compute thread: enough to hide the hand-over. New requests are
taken in before every step."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


SHARE = 1 << 29
"""Multiply-adds of a step that are worth a thread: about one core's work in the time that it takes
to wake others for each of a layer's operators. A model of 4.8M parameters made 4.6k tokens/s on two
threads, fewer than on one."""


def worth(weights: int, rows: int, most: int) -> int:
    """Number of threads, at most `most`, for a step of `rows` tokens through `weights` weights.
    It depends on nothing that changes while an engine runs, so neither does the order of sums."""
    return max(1, min(most, weights * rows // SHARE))


@contextmanager
def at_most(count: int) -> Iterator[None]:
    """Runs torch's operators of the calling thread on `count` threads."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Stream:
    """Carries completions from the compute thread to one consumer on the event loop."""

    def __init__(self) -> None:
        self.outcomes: asyncio.Queue[Completion | BaseException] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def deliver(self, outcome: Completion | BaseException) -> None:
        """Called from any thread."""
        self._loop.call_soon_threadsafe(self.outcomes.put_nowait, outcome)


class EmbeddedEngine:
    """Implements `Engine`. `submit`/`run` and the coroutines must not be mixed while requests are
    in flight."""

    joined = None  # weights come through the worker alone
    takes_changes = True

    def __init__(
        self,
        model: Path | str | Decoder,
        *,
        max_num_seqs: int = 128,
        max_model_len: int = 1024,
        dtype: str | torch.dtype = torch.bfloat16,
        device: str = "cpu",
        run_id: str = "",
        version: int = 0,
        deadline_s: float = 120.0,
        token_rate: float | None = None,
    ) -> None:
        """`model` is a Hugging Face directory (or a decoder, which brings its own dtype and device,
        and has no tokenizer).

        run_id: patches of other runs are refused; empty adopts the first patch's. version: of the
        weights in `model`; -1 says that nobody published them, so the first patch is taken whatever
        it holds. deadline_s: the longest that one burst of steps or one weight update may take.
        token_rate: steps a second of the coroutines at most; None: free.
        """
        if max_num_seqs < 1 or max_model_len < 2:
            raise ValueError(
                f"max_num_seqs={max_num_seqs}, max_model_len={max_model_len}: at least 1 and 2 are"
                " needed"
            )
        if isinstance(dtype, str):
            if dtype not in DTYPES:
                raise ValueError(f"dtype={dtype}: one of {', '.join(DTYPES)}")
            dtype = DTYPES[dtype]
        self.decoder = (
            model if isinstance(model, Decoder) else Decoder.from_directory(model, dtype, device)
        )
        self._threads = torch.get_num_threads()
        if self.decoder.device.type == "cpu":
            weights = sum(tensor.numel() for tensor in self.decoder.weights.values())
            self._threads = worth(weights, max_num_seqs, self._threads)
        self._batch = ContinuousBatch(
            self.decoder,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            threads=self._threads,
            stop_strings=StopStrings(None if isinstance(model, Decoder) else model),
        )
        self._batch.version = version
        self._weights = ServedVersion(self._batch, run_id, self._threads)
        self._deadline = deadline_s
        self._pace = 0.0 if token_rate is None else 1 / token_rate
        self._due = 0.0
        self._finished: list[Completion] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedded-engine")
        self._turn = asyncio.Lock()  # who may touch the batch; first come, first served
        # who may change the weights; held from the check of a patch until it is served
        self._updating = asyncio.Lock()
        self._knocking = 0  # callers that want a turn: a burst ends at its next token boundary
        self._streams: set[_Stream] = set()
        self._inbox: deque[tuple[Request, Sequence[Completion], _Stream]] = deque()
        self._driver: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def version(self) -> int:
        return self._batch.version

    @property
    def run_id(self) -> str:
        return self._weights.run_id

    @property
    def held(self) -> Weights | None:
        return self._weights.held

    @property
    def pause_s(self) -> float:
        """Seconds for which the last update paused decoding."""
        return self._weights.pause_s

    @property
    def counters(self) -> Counters:
        """Work done so far."""
        return self._batch.counters

    def digests(self) -> dict[str, str]:
        """name -> xxh3-128 of the bytes that are served."""
        return self.decoder.digests()

    # The synchronous way.

    def submit(
        self, prompt: Prompt, n: int, sampling: Sampling, partials: Sequence[Completion] = ()
    ) -> None:
        """Queues n samples for `run` or `step`, or instead the partial completions `partials`."""
        self._batch.submit(prompt, n, sampling, self._finished.append, partials)

    def so_far(self) -> list[Completion]:
        """Partial completions of the samples in slots, to be shown while they are decoded."""
        return self._batch.so_far()

    def step(self) -> list[Completion]:
        """Decodes one token of each sequence; returns what finished."""
        self._check_serving()
        with at_most(self._threads):
            self._batch.step()
        finished, self._finished[:] = list(self._finished), []
        return finished

    def stop(self) -> list[Completion]:
        """Ends everything that was submitted; returns the partial completions."""
        self._batch.abort(lambda prompt, deliver: True)
        finished, self._finished[:] = list(self._finished), []
        return finished

    def run(self) -> list[Completion]:
        """Decodes until nothing is left; returns the completions in the order in which they
        finished."""
        finished: list[Completion] = []
        while not self._batch.idle:
            finished += self.step()
        return finished

    # The protocol `Engine`.

    async def generate_all(
        self,
        requests: Sequence[Request],
        partials: Partials | None = None,
    ) -> AsyncIterator[Completion]:
        partials = partials or {}
        self._check_serving()
        for request in requests:
            self._batch.check(*request)
        stream = _Stream()
        self._streams.add(stream)
        self._inbox.extend(
            (request, partials.get(request[0].id, ()), stream) for request in requests
        )
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        left = sum(len(partials.get(prompt.id, ())) or n for prompt, n, _ in requests)
        try:
            while left:
                outcome = await stream.outcomes.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                left -= 1
                if outcome.finish_reason != "abort":
                    yield outcome
        finally:
            self._streams.discard(stream)
            if left and not self._closed:  # the consumer went away: decode no further for it
                await self._at_boundary(
                    lambda: self._abort(lambda _, deliver: deliver == stream.deliver)
                )

    async def apply(self, patch: WeightPatch) -> int:
        async with self._updating:
            update = await asyncio.to_thread(self._weights.check, patch)
            await self._at_boundary(lambda: self._weights.apply(patch, update))
        return self.version

    async def probe(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        self._check_serving()
        ids = torch.tensor([list(token_ids)], device=self.decoder.device)
        return await self._at_boundary(
            lambda: self.decoder.token_logprobs(ids)[0].float().cpu().numpy()
        )

    async def canary(self, canary: Canary | None) -> None:
        self._check_serving()
        async with self._updating:
            await self._at_boundary(lambda: self._weights.load_canary(canary))

    async def sleep(self, level: int) -> None:
        """Does nothing: on a CPU engine and learners use the same memory anyway."""
        self._check_serving()

    async def wake(self) -> None:
        self._check_serving()

    async def reload(self) -> None:
        """Does nothing: the digests are of the very tensors that it computes with."""
        self._check_serving()

    async def abort(self, prompt_ids: Collection[str]) -> list[Completion]:
        ids = set(prompt_ids)
        return await self._at_boundary(lambda: self._abort(lambda prompt, _: prompt.id in ids))

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._fail(RuntimeError("the engine was closed"))
        self._knocking += 1
        if self._driver is not None:
            self._driver.cancel()
            await asyncio.gather(self._driver, return_exceptions=True)
        self._thread.shutdown(wait=False)  # a burst in progress ends at its next token boundary

    # Below, every access to the batch runs in the compute thread, while `_turn` is held.

    async def _drive(self) -> None:
        """Runs bursts until nothing is left; an error ends every stream with it."""
        try:
            while self._inbox or not self._batch.idle:
                async with self._turn:
                    await self._compute(self._burst)
        except Exception as error:  # a decoding error belongs to those who wait for its tokens
            self._weights.corrupt = self._weights.corrupt or f"decoding failed: {error!r}"
            self._fail(error)

    async def _at_boundary(self, work: Callable[[], T]) -> T:
        self._knocking += 1
        try:
            async with self._turn:
                return await self._compute(work)
        finally:
            self._knocking -= 1

    async def _compute(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.wait_for(
                asyncio.get_running_loop().run_in_executor(self._thread, work), self._deadline
            )
        except TimeoutError:
            why = f"no token boundary within {self._deadline:g} s (deadline_s)"
            self._weights.corrupt = why
            raise TimeoutError(f"embedded engine: {why}") from None

    def _burst(self) -> None:
        self._check_serving()
        with at_most(self._threads):
            for _ in range(BURST):
                self._take_inbox()
                if self._batch.idle:
                    return
                self._wait_for_turn()
                self._batch.step()
                if self._knocking:
                    return

    def _wait_for_turn(self) -> None:
        """Sleeps until the next step is due by `token_rate`; a late step is not caught up."""
        if self._pace:
            time.sleep(max(0.0, self._due - time.monotonic()))
            self._due = max(time.monotonic(), self._due) + self._pace

    def _take_inbox(self) -> None:
        while self._inbox:
            (prompt, n, sampling), partials, stream = self._inbox.popleft()
            self._batch.submit(prompt, n, sampling, stream.deliver, partials)

    def _abort(self, select: Callable[[Prompt, Deliver], bool]) -> list[Completion]:
        self._take_inbox()
        return self._batch.abort(select)

    def _fail(self, error: Exception) -> None:
        for stream in self._streams:
            stream.deliver(error)

    def _check_serving(self) -> None:
        if self._closed:
            raise RuntimeError("the engine was closed")
        self._weights.check_serving()
