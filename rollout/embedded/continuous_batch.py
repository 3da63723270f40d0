"""Continuous batching: the synchronous core of the embedded engine.

A step admits waiting samples to free slots, then decodes one token of every slot in use. A sample
that ends frees its slot within the step; the last slot in use moves there, so that every tensor of
a step is a view 0..n-1. Requests are admitted in the order of `submit`, and no draw depends on the
batch, so the same calls give the same tokens.

Shape legend: S slots, n in use, M longest sequence, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..samples import Completion, FinishReason, Prompt, Sampling, Span, merge_spans
from ..stops import StopStrings
from .cpu_step import CPUStep, supports
from .kv_cache import (
    ActiveSequence,
    Counters,
    Deliver,
    KVCache,
    PromptState,
    WaitingRequest,
    unstarted,
)
from .model import Decoder, causal_attention
from .sampling import SlotSampling, check_request, penalised, sample, stream_key, uniforms

PREFILL_TOKENS = 4096
"""Padded prompt tokens of one prefill pass: enough to fill the matrix units, little enough to stay
in cache."""

SHAPES = 8
"""Batches and prompts are padded to a multiple of this: oneDNN compiles a kernel per shape and
keeps about a thousand."""


class ContinuousBatch:
    """Decodes submitted requests over `max_num_seqs` slots. Not thread-safe: one call at a time."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_num_seqs: int,
        max_model_len: int,
        threads: int = 1,
        stop_strings: StopStrings | None = None,
    ) -> None:
        self.decoder = decoder
        self.max_model_len = max_model_len
        self._stop_strings = stop_strings or StopStrings(None)
        self.version = 0
        self.counters = Counters()
        slots, device = max_num_seqs, decoder.device
        decoder.reserve(_rounded(max_model_len))
        self._cache = KVCache(decoder.arch, slots, max_model_len, decoder.dtype, device)
        self._step: CPUStep | None = None
        if supports(decoder):
            self._step = CPUStep(decoder, self._cache, slots, max_model_len, threads)
        self._waiting: deque[WaitingRequest] = deque()
        self._active: list[ActiveSequence] = []
        real = torch.float64 if decoder.dtype == torch.float64 else torch.float32

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        # where each slot's newest token stands; its keys come next step
        self._positions = zeros(dtype=torch.int64)
        self._last = zeros(dtype=torch.int64)  # the position of the last token allowed
        self._stops = zeros(1, dtype=torch.int64)
        self._tokens = zeros(max_model_len, dtype=torch.int64)  # by position, prompts left out
        self._logprobs = zeros(max_model_len, dtype=real)
        self._uniforms = zeros(max_model_len, dtype=torch.float64)
        self._sampling = SlotSampling.empty(slots, real, device)
        # [S, V] tokens of prompts and answers, once a repetition penalty needs them
        self._seen: Tensor | None = None
        self._any_stop_string = False
        self._rows = torch.arange(slots, device=device)

    @property
    def slots(self) -> int:
        return len(self._rows)

    @property
    def idle(self) -> bool:
        return not self._active and not self._waiting

    def submit(
        self,
        prompt: Prompt,
        n: int,
        sampling: Sampling,
        deliver: Deliver,
        partials: Sequence[Completion] = (),
    ) -> None:
        """Queues n samples, or instead the completions `partials` to go on from; `deliver` is
        called with each as it ends, within `step`. A partial completion keeps its tokens, log-probs
        and spans, and its next draws are those that it would have had."""
        self.check(prompt, n, sampling)
        stop = self._stop_strings.matcher(sampling.stop)
        if not partials:
            self._waiting.append(WaitingRequest(prompt, range(n), sampling, deliver, stop))
        for part in partials:
            assert part.prompt_id == prompt.id and len(part) < sampling.max_tokens
            self._waiting.append(
                WaitingRequest(prompt, (part.sample,), sampling, deliver, stop, part)
            )

    def check(self, prompt: Prompt, n: int, sampling: Sampling) -> None:
        """Raises ValueError for a request that cannot be served."""
        vocab_size = self.decoder.arch.vocab_size
        check_request(prompt, n, sampling, max_model_len=self.max_model_len, vocab_size=vocab_size)
        self._stop_strings.matcher(sampling.stop)

    @torch.inference_mode()
    def step(self) -> None:
        """Admits what fits and decodes one token of each sequence."""
        self._admit()
        n = len(self._active)
        if n == 0:
            return
        # slots past n stand at position 0, and what they compute is dropped
        padded = min(_rounded(n), self.slots)
        positions = self._positions[:padded]
        self._cache.fit(int(positions.max()) + 1, n)
        logits = self._next_logits(self._tokens[self._rows[:padded], positions], positions, n)
        self.counters.decode_steps += 1
        self.counters.decode_tokens += n
        positions[:n] += 1
        self._emit(0, logits[:n])

    def _next_logits(self, ids: Tensor, positions: Tensor, n: int) -> Tensor:
        """[m, V] after the newest tokens ids [m], of which the first n are sequences."""
        self._cache.open(positions)
        if self._step is not None:
            return self._step.logits(ids, positions, n)
        return self.decoder.logits(self.decoder.forward(ids, positions, self._cache.attend))

    def weights_changed(self, version: int) -> None:
        """Attributes tokens from here on to `version`. Running sequences keep the keys and values
        of the old weights; prompts that wait are computed anew."""
        for slot, sequence in enumerate(self._active):
            start = sequence.spans[-1].stop if sequence.spans else 0
            count = self._count(slot)
            if count > start:
                sequence.spans.append(Span(self.version, start, count))
        for request in self._waiting:
            request.state = None
        self.version = version

    @torch.inference_mode()
    def abort(self, select: Callable[[Prompt, Deliver], bool]) -> list[Completion]:
        """Ends every sample of the selected requests; delivers and returns the partial
        completions."""

        def hit(request: WaitingRequest) -> bool:
            return select(request.prompt, request.deliver)

        partial: list[Completion] = []
        gone = [slot for slot, sequence in enumerate(self._active) if hit(sequence.request)]
        for slot in gone:
            partial.append(self._completion(slot, "abort"))
            self._active[slot].request.deliver(partial[-1])
        self._free(gone)
        for request in filter(hit, list(self._waiting)):
            self._waiting.remove(request)
            for index in request.left:
                partial.append(request.partial or unstarted(request.prompt.id, index))
                request.deliver(partial[-1])
        return partial

    def so_far(self) -> list[Completion]:
        """Partial completions of the samples in slots."""
        return [self._completion(slot, "abort") for slot in range(len(self._active))]

    def _admit(self) -> None:
        """Fills free slots from the queue; a sample may end with its first token, so more may
        fit."""
        while self._waiting and len(self._active) < self.slots:
            first, logits = len(self._active), []
            while self._waiting and len(self._active) < self.slots:
                request = self._waiting[0]
                if request.state is None:
                    self._prefill()
                assert request.state is not None
                start = len(self._active)
                count = min(self.slots - start, len(request.left))
                self._cache.fit(max(self._cache.width, len(request.token_ids)), len(self._active))
                self._cache.fill(start, start + count, request.state)
                logits.append(request.state.logits.expand(count, -1))
                self._place(request, start, start + count)
                if not request.left:
                    request.state = None
                    self._waiting.popleft()
            self._emit(first, torch.cat(logits))

    def _place(self, request: WaitingRequest, start: int, stop: int) -> None:
        """Writes the settings of the request's next samples into slots start..stop-1."""
        sampling, length = request.sampling, len(request.prompt.token_ids)
        now = time.time()
        indices = request.left[: stop - start]
        request.placed += stop - start
        self._active += [ActiveSequence(request, index, now) for index in indices]
        keys = np.array(
            [stream_key(sampling.seed, request.prompt.id, index) for index in indices], np.uint64
        )
        draws = uniforms(keys, length, length + sampling.max_tokens)
        rows = slice(start, stop)
        have = 0
        if (part := request.partial) is not None:
            have = len(part)
            self._active[start].spans = list(part.spans)
            self._active[start].started = part.started
            self._tokens[start, length : length + have] = torch.from_numpy(part.token_ids)
            self._logprobs[start, length : length + have] = torch.from_numpy(part.logprobs)
            if request.stop is not None:
                self._active[start].tail = request.stop.tail(part.open_turn)
        self._uniforms[rows, length : length + sampling.max_tokens] = torch.from_numpy(draws)
        self._positions[rows] = length + have
        self._last[rows] = length + sampling.max_tokens - 1
        self._sampling.fill(start, stop, sampling, self.decoder.arch.vocab_size)
        self._note_settings()
        if sampling.repetition_penalty != 1:
            if self._seen is None:
                size = (self.slots, self.decoder.arch.vocab_size)
                self._seen = torch.zeros(size, dtype=torch.bool, device=self.decoder.device)
            self._seen[rows] = False
            self._seen[rows, list(request.token_ids)] = True
        stops = sampling.stop_token_ids
        if len(stops) > self._stops.shape[1]:
            self._stops = torch.nn.functional.pad(
                self._stops, (0, len(stops) - self._stops.shape[1]), value=-1
            )
        self._stops[rows] = -1
        self._stops[rows, : len(stops)] = torch.tensor(
            stops, dtype=torch.int64, device=self._stops.device
        )

    def _prefill(self) -> None:
        """Computes the prompts at the head of the queue, as many as fit one pass, whether or not a
        slot is free yet."""
        batch: list[WaitingRequest] = []
        longest = 0
        for request in self._waiting:
            length = max(longest, len(request.token_ids))
            if batch and (length * (len(batch) + 1) > PREFILL_TOKENS or len(batch) == self.slots):
                break
            if request.state is None:
                batch.append(request)
                longest = length
        longest = _rounded(longest)
        device = self.decoder.device
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, request in enumerate(batch):
            ids[row, : len(request.token_ids)] = torch.tensor(request.token_ids)
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys.append(k.reshape(len(batch), longest, *k.shape[1:]).transpose(1, 2))
            values.append(v.reshape(len(batch), longest, *v.shape[1:]).transpose(1, 2))
            return causal_attention(q, k, v, len(batch))

        positions = torch.arange(longest, device=device).repeat(len(batch))
        hidden = self.decoder.forward(ids.view(-1).to(device), positions, attend).view(
            len(batch), longest, -1
        )
        lengths = torch.tensor([len(request.token_ids) for request in batch], device=device)
        logits = self.decoder.logits(hidden[self._rows[: len(batch)], lengths - 1])
        all_keys, all_values = torch.stack(keys, 1), torch.stack(values, 1)
        for row, request in enumerate(batch):
            length = len(request.token_ids)
            request.state = PromptState(
                keys=all_keys[row, :, :, :length],
                values=all_values[row, :, :, :length],
                logits=logits[row],
            )
            self.counters.prefill_tokens += length

    def _emit(self, start: int, logits: Tensor) -> None:
        """Draws the token at `positions` of slots start..n-1 and retires those that end with it."""
        stop = len(self._active)
        span, rows, positions = (
            slice(start, stop),
            self._rows[start:stop],
            self._positions[start:stop],
        )
        settings = self._sampling.slots(start, stop)
        seen = self._seen if settings.any_penalty else None
        if seen is not None:
            logits = penalised(logits, seen[span], settings)
        whole = seen is None and not settings.any_cut
        draw = self._step.draw if self._step is not None and whole else sample
        tokens, logprobs = draw(logits, self._uniforms[rows, positions], settings)
        self._tokens[rows, positions] = tokens
        self._logprobs[rows, positions] = logprobs
        if seen is not None:
            seen[rows, tokens] = True
        stopped = (tokens[:, None] == self._stops[span]).any(1)
        if self._any_stop_string:
            stopped |= torch.tensor(
                self._complete_stop_strings(start, tokens.tolist()), device=stopped.device
            )
        ended = stopped | (positions == self._last[span])
        if bool(ended.any()):
            slots = (ended.nonzero().squeeze(1) + start).tolist()
            reasons = stopped.tolist()
            for slot in slots:
                completion = self._completion(slot, "stop" if reasons[slot - start] else "length")
                self._active[slot].request.deliver(completion)
            self._free(slots)

    def _complete_stop_strings(self, start: int, tokens: Sequence[int]) -> list[bool]:
        """Whether each of the newest tokens, of slots start, start + 1, ..., completes a stop
        string."""
        ended = []
        for sequence, token in zip(self._active[start:], tokens, strict=True):
            if (stop := sequence.request.stop) is not None:
                assert sequence.tail is not None
                sequence.tail = stop.step(sequence.tail, token)
            ended.append(sequence.tail is None)
        return ended

    def _note_settings(self) -> None:
        """Records which sampling settings the sequences in slots use."""
        used = {sequence.request.sampling for sequence in self._active}
        self._sampling.note(used)
        self._any_stop_string = any(sampling.stop for sampling in used)

    def _count(self, slot: int) -> int:
        """Tokens drawn so far by the sequence in `slot`."""
        return int(self._positions[slot]) - len(self._active[slot].request.prompt.token_ids) + 1

    def _completion(self, slot: int, reason: FinishReason) -> Completion:
        sequence = self._active[slot]
        count, begin = self._count(slot), len(sequence.request.prompt.token_ids)
        fresh = sequence.spans[-1].stop if sequence.spans else 0
        return Completion(
            prompt_id=sequence.request.prompt.id,
            sample=sequence.sample,
            token_ids=self._tokens[slot, begin : begin + count].cpu().numpy().astype(np.int32),
            logprobs=self._logprobs[slot, begin : begin + count].cpu().numpy().astype(np.float32),
            spans=merge_spans(
                [*sequence.spans, *([Span(self.version, fresh, count)] if count > fresh else [])]
            ),
            finish_reason=reason,
            started=sequence.started,
            finished=time.time(),
        )

    def _free(self, slots: list[int]) -> None:
        """Frees these slots, and moves the last slots in use into the gaps."""
        # from the highest down, so that the slot that moves is never one still to be freed
        for slot in sorted(slots, reverse=True):
            last = len(self._active) - 1
            if slot != last:
                self._cache.move(last, slot, int(self._positions[last]))
                for held in (
                    self._positions,
                    self._last,
                    self._stops,
                    self._tokens,
                    self._logprobs,
                    self._uniforms,
                ):
                    held[slot] = held[last]
                self._sampling.move(last, slot)
                if self._seen is not None:
                    self._seen[slot] = self._seen[last]
                self._active[slot] = self._active[last]
            self._active.pop()
            self._positions[last] = 0
        self._note_settings()


def _rounded(count: int) -> int:
    return -(-count // SHAPES) * SHAPES
