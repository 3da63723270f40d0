"""vLLM's processes on this machine, behind a few calls that raise an error with the cause if one of
them ends or hangs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from ..samples import Sampling
from . import compat as vllm_compat
from .compat import EngineSettings
from .log_tail import LogTail
from .requests import Count, Decoded, parameters

T = TypeVar("T")

SHUTDOWN_S = 60.0
"""Seconds for vLLM's processes to end; vLLM kills them itself after a few."""


class EngineLostError(RuntimeError):
    """vLLM's processes have ended, do not start, or do not answer; new ones may work."""


def start(settings: EngineSettings) -> RunningLLM:
    """Starts vLLM's processes and returns once they hold the model; minutes for a large one.

    Raises ValueError for settings that vLLM does not take, and EngineLostError, with the last error
    line of its log, if it does not start.
    """
    vllm_compat.check_installed()
    vllm_compat.check_engine_args(settings.engine_args)
    if settings.dtype not in vllm_compat.DTYPES:
        raise ValueError(
            f"model.dtype={settings.dtype}: vLLM decodes in {', '.join(vllm_compat.DTYPES)}; set"
            " rollout.engine=embedded"
        )
    variables, of_platform = vllm_compat.prepare(settings, os.environ)
    os.environ.update(variables)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    vllm_compat.check_signatures(AsyncLLM)
    tail = LogTail()
    try:
        with tail.inherited():
            args = AsyncEngineArgs(**vllm_compat.engine_arguments(settings, of_platform))
            # rollouts are a batch, not a service: this takes vLLM's defaults for offline use, e.g.
            # for the tokens of a step
            llm = AsyncLLM.from_engine_args(args, usage_context=UsageContext.LLM_CLASS)
    # the error itself says only "see root cause above", which went to the log
    except (RuntimeError, TimeoutError) as error:
        raise EngineLostError(f"vLLM did not start: {tail.cause()}") from error
    return RunningLLM(llm, tail)


class RunningLLM:
    """A running vLLM engine. Every method must be called on one event loop."""

    def __init__(self, llm: Any, tail: LogTail) -> None:
        self._llm = llm
        self._tail = tail
        self.vocab_size: int = llm.model_config.get_vocab_size()
        self._count: Count = lambda _request_id, _tokens: None
        self._waiting = False
        self._ended = asyncio.Event()
        self._down = False
        self._watch()

    def on_tokens(self, count: Count) -> None:
        """From now on, `count(request id, new tokens)` is called for all tokens from the engine's
        process, in their order."""
        self._count = count

    async def decode(
        self, request_id: str, token_ids: list[int], sampling: Sampling, salt: str
    ) -> Decoded:
        """Decodes one sample to its end; if it is aborted, its finish reason is "abort" and it has
        the tokens so far.

        request_id: without a hyphen. salt: prompts share cached blocks only with prompts of the
        same salt.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        wanted = SamplingParams(
            **parameters(sampling), flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY
        )
        sample = (await self._final(request_id, token_ids, wanted, salt)).outputs[0]
        return Decoded(
            list(sample.token_ids), list(sample.logprobs.logprobs), str(sample.finish_reason)
        )

    async def prompt_logprobs(
        self, request_id: str, token_ids: list[int], salt: str
    ) -> list[float]:
        """The log-prob of every token but the first, given those before it, at temperature 1."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        wanted = SamplingParams(
            max_tokens=1,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return list(
            (await self._final(request_id, token_ids, wanted, salt)).prompt_logprobs.logprobs
        )

    async def abort(self, request_ids: Collection[str]) -> None:
        """Aborts requests: they end with the tokens that have been counted. Ids that vLLM does not
        know are ignored."""
        await self._handled()
        with suppress(EngineLostError), self._alive():
            await self._llm.abort(list(request_ids))

    async def pause(self) -> None:
        """Pauses decoding and keeps all requests; returns once no step runs and every token of
        earlier steps has been counted."""
        with self._alive():
            await self._llm.pause_generation(mode="keep", clear_cache=False)
        # the answer came through the same socket after those tokens, so they are at most in the
        # handler's queue
        await self._handled()

    async def resume(self) -> None:
        with self._alive():
            await self._llm.resume_generation()

    async def sleep(self, level: int) -> None:
        """Frees the device's memory; vLLM must be paused and without requests. Does nothing on a
        CPU."""
        with self._alive():
            await self._llm.sleep(level)

    async def wake(self, what: str) -> None:
        """Allocates `weights` or `kv_cache` again; the cache is empty. vLLM stays paused."""
        with self._alive():
            await self._llm.wake_up([what])
            # vLLM resumes by itself once it has both
            await self._llm.pause_generation(mode="keep", clear_cache=False)

    async def label(self, version: int) -> None:
        """Does nothing: `pause` counts all tokens, so their versions are known here."""

    async def clear_prefix_cache(self) -> bool:
        """Empties the prefix cache; False, and nothing is done, while requests hold blocks of
        it."""
        with self._alive():
            return bool(await self._llm.reset_prefix_cache())

    async def call_workers(self, method: str, *arguments: Any) -> list[Any]:
        """One result of each worker process."""
        with self._alive():
            return list(await self._llm.collective_rpc(method, args=arguments))

    async def within(self, what: str, work: Awaitable[T], deadline: float) -> T:
        """The result of `work`. Raises TimeoutError after `deadline` seconds, and EngineLostError
        as soon as vLLM's processes end."""
        working, ended = asyncio.ensure_future(work), asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait(
                (working, ended), timeout=deadline, return_when=asyncio.FIRST_COMPLETED
            )
            if working.done():
                return working.result()
            if ended.done():
                raise self._end()
            raise TimeoutError(f"vLLM engine: {what!r} took longer than {deadline:g} s")
        finally:
            working.cancel()
            ended.cancel()

    def last_lines(self) -> list[str]:
        """The last lines of the engine's log."""
        return self._tail.lines()

    async def shutdown(self) -> None:
        """Ends vLLM's processes, by force if they do not end by themselves; takes seconds.
        Idempotent."""
        if not self._down:
            self._down = True
            if self._llm.output_handler is not None:
                # it would take the end of the processes for a failure
                self._llm.output_handler.cancel()
            await asyncio.wait_for(asyncio.to_thread(self._llm.shutdown), SHUTDOWN_S)
            self._tail.close()

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Turns vLLM's EngineDeadError into an EngineLostError with the cause."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError:
            raise self._end() from None

    async def _handled(self) -> None:
        """Returns once vLLM's own handler, which starts with the first request, has processed all
        outputs that have come."""
        handler = self._llm.output_handler
        while handler is not None and not handler.done() and not self._waiting:
            await asyncio.sleep(0)

    def _end(self) -> EngineLostError:
        return EngineLostError(f"vLLM's engine process has ended: {self._tail.cause()}")

    async def _final(
        self, request_id: str, token_ids: list[int], parameters: Any, salt: str
    ) -> Any:
        # of type "token", which vLLM takes as rendered: it has no tokenizer here
        prompt = {"type": "token", "prompt_token_ids": token_ids, "cache_salt": salt}
        final = None
        with self._alive():
            async for output in self._llm.generate(prompt, parameters, request_id):
                final = output
        assert final is not None and final.finished, (
            f"vLLM ended request {request_id} without its result"
        )
        return final

    def _watch(self) -> None:
        """Wraps vLLM's receiver, so that tokens are counted before vLLM's own handler takes them.
        The handler asks for more only after it has processed all that came before."""
        core = self._llm.engine_core
        receive = core.get_output_async

        async def receive_and_count() -> Any:
            self._waiting = True
            try:
                outputs = await receive()
            except Exception:  # anything: vLLM's handler ends with it, and so does the engine
                self._ended.set()
                raise
            self._waiting = False
            for output in outputs.outputs:
                if output.new_token_ids:
                    # vLLM makes its own id of ours, a hyphen and random letters
                    self._count(output.request_id.partition("-")[0], output.new_token_ids)
            return outputs

        core.get_output_async = receive_and_count
