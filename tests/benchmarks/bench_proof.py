"""Faults injected into what decodes, and what finds each: python bench_proof.py [--injections
1000].

Tiny models, an engine of each kind whose decoding has weights of its own, and a fault of each kind
(`tests/faulty_engines.py`) that is there from the start, or begins at a later version. Every
injection goes through what a run does: the canary at the start, the probe, the decoded tokens at
every version, the gate over tokens that train, and the next canary. A fault that none of them finds
is silent.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import faulty_engines as faulty
from emberl.rl.algorithm.offpolicy import mismatch_metrics
from emberl.rl.batch import sft_batch
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from emberl.rl.weights.decoding import DecodeCheck, proof_requests
from emberl.rl.weights.gate import Gate
from emberl.rl.weights.probe import Level, Probe, as_batch, tolerance_of
from emberl.rollout.actors import ActorLostError
from emberl.rollout.samples import Prompt, Sampling
from emberl.rollout.weights.apply import resolve
from emberl.rollout.weights.diff import encode
from emberl.rollout.weights.patch import TensorBytes, dense_patch
from emberl.rollout.weights.tensors import dtype_name
from emberl.rollout.worker import GroupService

TINY = TinyConfig(
    hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=48, vocabulary="bytes"
)
VERSIONS, STEP = 24, 1e-5
ENGINES = ("embedded", "vllm")


class Prompts:
    """In the place of a `PromptSource`."""

    def train(self, position: int) -> Prompt:
        ids = tuple(random.Random(position).choices(range(4, 90), k=10 + position))
        return Prompt(id=str(position), token_ids=ids, answer="", source="")


@dataclass(kw_only=True)
class World:
    """A model at `VERSIONS` versions, a small step of AdamW apart, and what its learners say."""

    folder: Path
    dtype: str
    learners: faulty.LocalLearners
    versions: list[dict[str, torch.Tensor]]
    said: dict[int, dict[bytes, Any]]

    @classmethod
    def make(cls, folder: Path, dtype: str) -> World:
        made = make_tiny(folder, TINY, seed=0)
        learners = faulty.LocalLearners(made, getattr(torch, dtype))
        optimizer = torch.optim.AdamW(learners.model.parameters(), lr=STEP)
        ids = torch.from_numpy(np.random.default_rng(1).integers(4, 100, (2, 48)))
        versions = []
        for _ in range(VERSIONS):
            named = learners.model.named_parameters()
            versions.append({name: p.detach().clone() for name, p in named})
            learners.model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return cls(folder=made, dtype=dtype, learners=learners, versions=versions, said={})

    def at(self, version: int) -> None:
        """The learners stand at this version."""
        with torch.no_grad():
            for name, parameter in self.learners.model.named_parameters():
                parameter.copy_(self.versions[version][name])

    def logprobs(self, version: int, batch: Any) -> Any:
        """The learners', asked once for the same tokens."""
        known, key = self.said.setdefault(version, {}), batch.token_ids_T.tobytes()
        if key not in known:
            self.at(version)
            known[key] = self.learners.logprobs(batch)
        return known[key]

    def patch(self, version: int, held: Any = None) -> Any:
        """Whole; or, where an engine holds the version before, what changes from it."""
        tensors = {}
        for name, tensor in self.versions[version].items():
            served = tensor.to(self.learners.dtype)
            data = served.contiguous().view(-1).view(torch.uint8).numpy()
            tensors[name] = TensorBytes(
                dtype=dtype_name(served.dtype), shape=tuple(served.shape), data=data
            )
        if held is None or held.version != version - 1:
            return dense_patch("run", version, tensors.items())
        return resolve(encode(held, tensors, run_id="run", version=version), held)


class Setattr:
    """pytest's monkeypatch, as far as it is needed here."""

    def setattr(self, owner: Any, name: str, value: Any) -> None:
        setattr(owner, name, value)


def make_engine(world: World, engine: str, fault: faulty.Fault) -> Any:
    if engine == "vllm":
        return faulty.pretend_vllm(world.folder, fault, world.dtype, Setattr())
    return faulty.DecodeCopyEngine(
        world.folder, fault, max_num_seqs=8, max_model_len=128, dtype=world.dtype, run_id="run",
        version=-1,
    )  # fmt: skip


FALSE_ALARM = "FALSE ALARM"


async def play(world: World, engine: str, fault: faulty.Fault) -> str:
    """What finds the fault; empty: nothing. An honest engine is told by an empty kind; what stops
    an engine whose fault has not begun is a false alarm."""
    faults = [fault]
    if fault.kind == "one worker of two old":
        faults = [faulty.Fault(), fault]
    engines = [make_engine(world, engine, each) for each in faults]
    pool: Any = faulty.LocalPool(services=[GroupService(each) for each in engines])
    requests = proof_requests(Prompts(), slots=8, longest=128)  # type: ignore[arg-type]
    tolerance = tolerance_of(world.dtype)
    learners: Any = world.learners
    check = DecodeCheck(
        requests, learners, pool, lambda _: None, dtype=world.dtype, tolerance=tolerance
    )
    check._effects = []  # what single tensors move is not measured here
    probe, gate = Probe(tolerance), Gate(tolerance)
    batch = as_batch([t for n in range(8) for t in Prompts().train(n).token_ids][:96])
    ids = batch.token_ids_T.tolist()
    # what a run has seen by then: the history of a fault that begins later is its last versions
    first = max(0, fault.begins - (21 if fault.kind.startswith("twenty") else 2))
    stage = "canary at the start"
    before = None
    try:
        for version in range(first, fault.begins + 3):
            for each in engines:
                await each.apply(world.patch(version, each.held))
            if version < fault.begins - 2:
                continue
            expected = world.logprobs(version, batch)[1:]
            moved = 0.0 if before is None else Level.between(expected, before).p
            before = expected
            stage = "probe of the version"
            await probe.check(
                expected, await pool.probe(ids), lambda w: pool.reload(w, ids), version=version,
                changed=0.5,
            )  # fmt: skip
            stage = "tokens decoded at each version"
            await check.follow(version, 0.5)
            if version == first or version == fault.begins + 2:
                stage = "canary at the start" if version == first else "canary of later versions"
                world.at(version)
                await check.prove(version)
            stage = "gate on the tokens that train"
            gate.check(await step(world, version, engines), version=version, moved=moved)
        return ""
    except ActorLostError:
        return stage if fault.kind and version >= fault.begins else f"{FALSE_ALARM}, {stage}"
    finally:
        for each in engines:
            await each.close()


async def step(world: World, version: int, engines: list[Any]) -> dict[str, float]:
    """The figures of a step's tokens."""
    rows, behaviour = [], []
    prompt = Prompts().train(20)
    for number, each in enumerate(engines):
        sampling = Sampling(max_tokens=24, temperature=1.0, seed=version + 100 * number)
        async for done in each.generate_all([(prompt, 4, sampling)]):
            rows.append(([*prompt.token_ids, *done.token_ids.tolist()], len(prompt.token_ids)))
            behaviour.append(done.logprobs)
    batch = sft_batch(rows)
    mask = batch.loss_mask_T
    ours = world.logprobs(version, batch)
    theirs = np.zeros(len(mask), np.float32)
    theirs[mask] = np.concatenate(behaviour)
    return mismatch_metrics(ours, theirs, mask, batch.sequence_ids_T)


def faults_of(world: World, rng: random.Random) -> faulty.Fault:
    kind = rng.choice(faulty.KINDS)
    names = list(world.versions[0])
    if kind == "transposed layer":
        names = [n for n in names if world.versions[0][n].dim() == 2 and len(set(
            world.versions[0][n].shape)) == 1]  # fmt: skip
    begins = rng.choice([0, 0, rng.randrange(2, VERSIONS - 3)])
    return faulty.Fault(kind=kind, begins=begins, tensor=rng.choice(names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--injections", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng, start = random.Random(options.seed), time.time()
    found: Counter[tuple[str, str, str]] = Counter()
    honest = alarms = 0
    with tempfile.TemporaryDirectory() as scratch:
        worlds = [World.make(Path(scratch) / d, d) for d in ("float32", "bfloat16")]
        for number in range(options.injections):
            if time.time() - start > options.seconds:
                break
            world, engine = worlds[number % 2], ENGINES[number // 2 % 2]
            fault = faults_of(world, rng)
            what = asyncio.run(play(world, engine, fault))
            when = "start" if not fault.begins else "later"
            found[fault.kind, f"{engine}, {when}", what or "SILENT"] += 1
            if what.startswith(FALSE_ALARM):
                alarms += 1
                print("false alarm:", world.dtype, engine, fault, what, flush=True)
            if not what:
                print("silent:", world.dtype, engine, fault, flush=True)
            if number % 50 == 49:
                print(f"{number + 1} injected, {time.time() - start:.0f} s", flush=True)
            if number % 10 == 0:
                honest += 1
                what = asyncio.run(
                    play(world, engine, faulty.Fault(begins=rng.choice([0, 2, VERSIONS - 4])))
                )
                alarms += bool(what)
                if what:
                    print("false alarm:", world.dtype, engine, what, flush=True)
    report(found)
    print(f"{sum(found.values())} injections, {honest} honest runs with {alarms} false alarms,"
          f" {time.process_time():.0f} CPU seconds")  # fmt: skip


def report(found: Counter[tuple[str, str, str]]) -> None:
    print("| fault | engine, begins | injected | found by | silent |\n|---|---|---|---|---|")
    for kind, engine in sorted({key[:2] for key in found}):
        by = {what: n for (k, e, what), n in found.items() if (k, e) == (kind, engine)}
        silent = by.pop("SILENT", 0)
        text = ", ".join(f"{what} {n}" for what, n in sorted(by.items(), key=lambda p: -p[1]))
        print(f"| {kind} | {engine} | {sum(by.values()) + silent} | {text} | {silent} |")


if __name__ == "__main__":
    main()
