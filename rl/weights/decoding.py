"""The proof that engines decode with the weights that they were sent.

`Probe` compares a prefill. Decoding may use other weights: a captured graph that goes on reading
old storage, a copy packed for small batches, keys and values of older weights. So engines decode
with a canary (`rollout.weights.canary`), on the path of all tokens, and the learners compute the
log-probs of the same tokens with it. Three comparisons, each with a bound of its own:

- with the served weights: the engine's rounding, against an absolute bound;
- with the canary, tokens read as a prompt: shows that the update reached the prefill;
- with the canary, decoded: against the difference when the same engine reads the same tokens, so
  that a single tensor that is stale only in decoding is distinguished from rounding.

The learners compute the effect of a single stale tensor, for the tensors of one layer, and a line
names those whose effect is too small to be distinguished from rounding.

At the updates in between each engine decodes a few tokens and reads them (`follow`): results that
are bit for bit those of an older version, or that differ between decoding and reading, are a fault.
This finds an engine that decodes with an older version as a whole, however near, if results repeat
bit for bit, and a stale part of the weights if its effect is larger than rounding.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...rollout.actors import ActorLostError, WorkerLostError, call
from ...rollout.engine import Request
from ...rollout.pool import RolloutPool
from ...rollout.samples import Completion, Prompt, Sampling
from ...rollout.weights.canary import DecodeProof
from ..batch import sft_batch
from ..data.sources import PromptSource
from ..learner.group import LearnerGroup
from .probe import Level, Probe, Values

LENGTHS = (24, 16, 8, 4)
"""Tokens decoded for each of four prompts, two samples each: as they end, batches of 8, 6, 4 and 2
go on, since graphs and packed copies may depend on the batch size."""
WIDE = 32
"""Most samples of one more prompt, two tokens each: a batch as large as the engine's slots."""
FOLLOWED = 8
"""Tokens of the first three prompts at each update."""
READ_FACTOR, DECODE_FACTOR, READ_SHARE = 8.0, 2.0, 0.3
"""Bounds: reading the canary may differ from the learners by `READ_FACTOR` times the difference
with the served weights, decoding it by `DECODE_FACTOR` times the difference when reading it.
Reading may in any case differ by `READ_SHARE` of the absolute tolerance: a tiny model in bfloat16
rounds nine times as much with a canary (0.009 nats) as with its own flat distribution (0.001)."""
LEAST = {"float32": 1e-3, "float64": 1e-3}
OTHER_LEAST = 5e-3
"""Nats below which no difference is a fault: engines give log-probs in float32, of rounded
weights."""
LAYER = re.compile(r"\.layers\.(\d+)\.")


def proof_requests(
    source: PromptSource, *, slots: int, longest: int, seed: int = 0
) -> tuple[Request, ...]:
    """The requests that are decoded with a canary: prompts of different lengths made of the first
    training prompts. slots, longest: the engine's `max_num_seqs` and `max_model_len`."""
    requests = []
    lengths = [*LENGTHS, 2] if slots > 2 * len(LENGTHS) else [*LENGTHS]
    for number, wanted in enumerate(lengths):
        token_ids = source.train(number).token_ids
        wanted = min(wanted, max(1, longest // 2))
        token_ids = token_ids[: max(1, min(longest - wanted, len(token_ids) - 3 * number))]
        wide = number == len(LENGTHS)
        requests.append(
            (
                Prompt(id=f"proof {number}", token_ids=token_ids[:8] if wide else token_ids,
                       answer="", source=""),
                min(slots, WIDE) if wide else 2,
                Sampling(max_tokens=wanted, temperature=1.0, seed=seed),
            )
        )  # fmt: skip
    return tuple(requests)


def followed(requests: Sequence[Request]) -> tuple[Request, ...]:
    """The part of the requests that is decoded at every update."""
    return tuple(
        (prompt, 1, replace(sampling, max_tokens=min(FOLLOWED, sampling.max_tokens)))
        for prompt, _, sampling in requests[:3]
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """The effect on the log-probs if one tensor is stale."""

    name: str
    logp: float
    """Mean |difference| in nats, as `Level.logp`."""


class DecodeCheck:
    """Checks the decoding of all engines of a run."""

    def __init__(
        self,
        requests: Sequence[Request],
        learners: LearnerGroup,
        pool: RolloutPool,
        tell: Callable[[str], None],
        *,
        dtype: str,
        tolerance: float,
        timeout: float = 600.0,
    ) -> None:
        """tolerance: as of `Probe`. dtype: as in `model.dtype`. timeout: seconds for the proof of a
        worker that replaces a lost one."""
        self._timeout = timeout
        self._requests = tuple(requests)
        self._learners = learners
        self._pool = pool
        self._tell = tell
        self._tolerance = tolerance
        self._least = LEAST.get(dtype, OTHER_LEAST)
        self.probe = Probe(tolerance)
        # half the tolerance until the first canary has measured the rounding of decoding
        self._bound = tolerance / 2
        self._effects: list[Effect] | None = None
        self._unknown = False
        self.seconds = 0.0
        """Seconds that canaries have taken so far."""

    async def prove(self, version: int) -> dict[str, float]:
        """Loads, decodes and takes back a canary on every worker; returns metrics. Raises
        ActorLostError, with the worker, if one does not decode with it, or afterwards with the
        weights that it served before."""
        start = time.perf_counter()
        canary = await asyncio.to_thread(self._learners.canary, version)
        proofs = await self._pool.prove(canary, self._requests)
        known: dict[tuple[Any, ...], Values] = {}
        figures = {"sync/canary": 1.0, "sync/canary_diff": 0.0, "sync/canary_noise": 0.0}
        for worker, proof in enumerate(proofs):
            if proof is None:
                if not self._unknown:
                    self._unknown = True
                    self._tell(
                        "rollout.engine has no canary(): that it decodes with what it was sent is"
                        " not proved, only followed"
                    )
                continue
            served = await self._say(proof.before, known)
            expected = await self._say(proof.canary, known, canary)
            fault, level, bound = self._compare(proof, served, expected)
            if fault is None:
                figures["sync/canary_diff"] = max(figures["sync/canary_diff"], level.logp)
                figures["sync/canary_noise"] = max(figures["sync/canary_noise"], bound.logp)
                self._bound = figures["sync/canary_noise"]
                if self._effects is None:
                    await self._measure(canary, proof, level, bound.logp, version)
                continue
            raise ActorLostError(
                f"rollout worker {worker} does not decode with the weights that it holds (canary of"
                f" version {version}): {fault}; a graph, a packed copy or a cache is older than the"
                " weights: try rollout.engine_args.enforce_eager=true with rollout.engine=vllm;"
                " sync.canary=false switches the proof off"
            )
        seconds = time.perf_counter() - start
        self.seconds += seconds
        return figures | {"timing_s/canary": seconds}

    async def prove_fresh(self, worker: int, actor: Any) -> None:
        """Checks a worker that replaces a lost one, without the learners, which are between two
        versions: with a canary it must decode what it reads, and other tokens than without it. The
        next version is proved with the learners. Raises WorkerLostError if it fails."""
        who, timeout = f"rollout worker {worker}", self._timeout
        work = actor.prove_alone.remote(self._pool.announced, self._requests)
        proof = await call(work, who=who, what="prove_alone", timeout=timeout)
        if proof is not None and (fault := self._alone(proof)) is not None:
            raise WorkerLostError(
                f"{who}, restarted, does not decode with the weights that it holds: {fault}"
            )

    def _alone(self, proof: DecodeProof) -> str | None:
        """The fault of an engine, found without the learners; None if there is none."""
        apart = Level.between(logprobs(proof.canary), np.concatenate(proof.read))
        limit = max(self._bound, self._least)
        if all(
            a.token_ids.tolist() == b.token_ids.tolist()
            for a, b in zip(proof.before, proof.canary, strict=True)
        ):
            return "it decodes the same tokens when all of its weights are others"
        if not apart.within(Level(logp=limit, p=self._tolerance / 2)):
            return (
                "the log-probs of the tokens that it decoded with a canary differ from what it"
                f" reads of them by {apart.logp:.3g}, where {limit:.3g} is rounding"
            )
        return other_tokens(proof)

    async def follow(self, version: int, changed: float | None) -> dict[str, float]:
        """Has each worker decode a few tokens and read them, and compares; returns metrics. Raises
        ActorLostError as of `Probe.check_pairs`."""
        requests = followed(self._requests)

        async def pairs(results: Sequence[tuple[Completion, Values]]) -> tuple[Values, Values]:
            decoded = np.concatenate([completion.logprobs for completion, _ in results])
            return decoded, np.concatenate([read for _, read in results])

        async def reload(worker: int) -> tuple[Values, Values]:
            return await pairs(await self._pool.decoded_anew(worker, requests))

        results = [await pairs(each) for each in await self._pool.decoded(requests)]
        figures = await self.probe.check_pairs(
            results,
            reload,
            version=version,
            changed=changed,
            what="decode with",
            other="what it reads of them as a prompt",
        )
        return {
            "sync/decode_noise": figures["sync/probe_noise"],
            "sync/decode_noise_p": figures["sync/probe_noise_p"],
            "sync/reloads": figures["sync/reloads"],
        }

    async def _say(
        self,
        completions: Sequence[Completion],
        known: dict[tuple[Any, ...], Values],
        canary: Any = None,
    ) -> Values:
        """The learners' log-probs of these tokens, computed once if several workers decoded the
        same."""
        key = (canary is None, *(c.token_ids.tobytes() for c in completions))
        if key not in known:
            batch = sft_batch(self._sequences(completions))
            if canary is None:
                values = await asyncio.to_thread(self._learners.logprobs, batch, 1.0)
            else:
                values = (await asyncio.to_thread(self._learners.canary_logprobs, batch, canary))[0]
            known[key] = values[batch.loss_mask_T]
        return known[key]

    def _sequences(self, completions: Sequence[Completion]) -> list[tuple[list[int], int]]:
        prompts = {prompt.id: prompt.token_ids for prompt, _, _ in self._requests}
        return [
            ([*prompts[c.prompt_id], *c.token_ids.tolist()], len(prompts[c.prompt_id]))
            for c in completions
        ]

    def _compare(
        self, proof: DecodeProof, served: Values, expected: Values
    ) -> tuple[str | None, Level, Level]:
        """(a fault or None, the difference of decoding from the learners with the canary, the bound
        on it)."""
        noise = Level.between(logprobs(proof.before), served)
        read = Level.between(np.concatenate(proof.read), expected)
        decoded = Level.between(logprobs(proof.canary), expected)
        bound = max(DECODE_FACTOR * read.logp, self._least)
        limits = Level(logp=bound, p=self._tolerance / 2)
        most = max(READ_FACTOR * noise.logp, READ_SHARE * self._tolerance)
        tokens = len(expected)
        fault = None
        if not noise.within(Level(logp=self._tolerance, p=self._tolerance / 2)):
            fault = (
                f"before it the log-probs of {tokens} tokens differ from the learners' by"
                f" {noise.logp:.3g}, where {self._tolerance:.3g} is the most"
            )
        elif not read.logp <= most:
            fault = (
                f"the log-probs that it reads of {tokens} tokens differ from the learners' by"
                f" {read.logp:.3g}, where {most:.3g} is rounding"
            )
        elif not decoded.within(limits):
            fault = (
                f"the log-probs of {tokens} tokens that it decoded differ from the learners' by"
                f" {decoded.logp:.3g}, where {bound:.3g} is rounding"
            )
        elif (back := self._back(proof, served, noise)) is not None:
            fault = back
        return fault, decoded, limits

    def _back(self, proof: DecodeProof, served: Values, noise: Level) -> str | None:
        """The fault in decoding after the canary was taken back; None if there is none."""
        if (fault := other_tokens(proof)) is not None:
            return fault
        again = Level.between(logprobs(proof.after), served)
        limit = max(DECODE_FACTOR * noise.logp, self._least)
        if again.logp <= limit:
            return None
        return (
            f"when it was taken back, the log-probs of {len(served)} tokens differ from the"
            f" learners' by {again.logp:.3g}, where {limit:.3g} is rounding"
        )

    async def _measure(
        self, canary: Any, proof: DecodeProof, level: Level, bound: float, version: int
    ) -> None:
        """Computes the effect of each single stale tensor of one layer, and reports which of them
        cannot be distinguished from rounding."""
        names = last_layer(canary.powers)
        chosen = proof.canary[: 2 * len(LENGTHS)]
        batch = sft_batch(self._sequences(chosen))
        rows = await asyncio.to_thread(self._learners.canary_logprobs, batch, canary, names)
        whole, *others = [row[batch.loss_mask_T] for row in rows]
        self._effects = sorted(
            (
                Effect(name=name, logp=Level.between(row, whole).logp)
                for name, row in zip(names, others, strict=True)
            ),
            key=lambda effect: effect.logp,
        )
        seen = np.sqrt(max(0.0, bound**2 - level.logp**2))
        hidden = [effect.name for effect in self._effects if effect.logp <= seen]
        least, most = self._effects[0], self._effects[-1]
        self._tell(
            f"canary of version {version}: {len(canary.powers) + len(canary.zeros)} tensors"
            f" changed, {len(logprobs(proof.canary))} tokens decoded in {proof.seconds:.2g} s;"
            f" engine and learners differ by {level.logp:.2g} nats, {bound:.2g} would be a fault;"
            f" one stale tensor moves {least.logp:.2g} ({least.name}) to {most.logp:.2g}"
        )
        if hidden:
            self._tell(
                f"canary of version {version} cannot tell from rounding whether one of these alone"
                f" is stale: {', '.join(hidden)}"
            )


def other_tokens(proof: DecodeProof) -> str | None:
    """A description of the first token that differs after the canary was taken back; None if all
    are the same."""
    for first, second in zip(proof.before, proof.after, strict=True):
        if first.token_ids.tolist() != second.token_ids.tolist():
            pairs = zip(first.token_ids, second.token_ids, strict=False)
            shorter = min(len(first), len(second))
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
            return (
                "when it was taken back, other tokens were decoded than before (sample"
                f" {first.sample} of {first.prompt_id!r} from token {at} on)"
            )
    return None


def logprobs(completions: Sequence[Completion]) -> Values:
    """[tokens of all completions] log-probs, in order."""
    return np.concatenate([completion.logprobs for completion in completions])


def last_layer(names: Mapping[str, Any]) -> list[str]:
    """The tensors of the last layer, each of which moves the log-probs least, and those that are in
    no layer."""
    numbers = [int(match[1]) for name in names if (match := LAYER.search(name))]
    return [
        name
        for name in names
        if (match := LAYER.search(name)) is None or int(match[1]) == max(numbers)
    ]
