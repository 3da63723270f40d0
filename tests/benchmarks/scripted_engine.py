"""An embedded engine whose answers have prescribed lengths: a long-tailed mix, whatever the model
says.

    rollout.engine=scripted_engine:make    (with this folder on PYTHONPATH)
    rollout.engine_args={mean: 48, cv: 1.0}

A length is lognormal, cut at `max_tokens`, and depends on (seed, prompt id, sample) alone, so every
run sees the same ones. Answers end by length; log-probs are the model's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from emberl.rollout import engine as engines
from emberl.rollout.embedded.continuous_batch import ContinuousBatch
from emberl.rollout.embedded.engine import EmbeddedEngine
from emberl.rollout.embedded.sampling import stream_key


def length(seed: int, prompt_id: str, sample: int, *, mean: float, cv: float, limit: int) -> int:
    sigma = math.sqrt(math.log(1 + cv * cv))
    draw = np.random.default_rng(stream_key(seed, prompt_id, sample)).lognormal(
        math.log(mean) - sigma**2 / 2, sigma
    )
    return max(1, min(limit, round(draw)))


class ScriptedBatch(ContinuousBatch):
    mean, cv = 48.0, 1.0

    def _place(self, request: Any, start: int, stop: int) -> None:
        super()._place(request, start, stop)
        begin, sampling = len(request.prompt.token_ids), request.sampling
        for slot in range(start, stop):
            sample = self._active[slot].sample
            tokens = length(
                sampling.seed,
                request.prompt.id,
                sample,
                mean=self.mean,
                cv=self.cv,
                limit=sampling.max_tokens,
            )
            self._last[slot] = begin + tokens - 1
            self._stops[slot] = -1


def make(spec: engines.WorkerSpec, cards: tuple[str, ...]) -> EmbeddedEngine:
    engine = engines.BUILT_IN["embedded"](spec, cards)
    assert isinstance(engine, EmbeddedEngine)
    batch = ScriptedBatch(
        engine.decoder, max_num_seqs=spec.max_num_seqs, max_model_len=spec.max_model_len
    )
    batch.version, batch.mean, batch.cv = (
        engine.version,
        spec.engine_args["mean"],
        spec.engine_args["cv"],
    )
    engine._batch = batch
    return engine
