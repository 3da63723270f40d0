"""Log-probs of a probe, engines beside learners: hand-made differences, and a real engine with
weights that are wrong."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from emberl.rl.weights.probe import Level, Probe, as_batch, probe_ids, tolerance_of
from emberl.rollout.actors import ActorLostError
from emberl.rollout.embedded.model import Decoder
from emberl.rollout.samples import Prompt
from torch import Tensor
from transformers import AutoModelForCausalLM

EXPECTED = np.array([-1.0, -2.0, -0.5, -4.0], np.float32)


@dataclass
class Prompts:
    def train(self, position: int) -> Prompt:
        return Prompt(id=str(position), token_ids=(position, 7, 8), answer="", source="")


def test_probe_tokens_are_those_of_the_first_prompts() -> None:
    source: Any = Prompts()
    assert probe_ids(source, 7) == (0, 7, 8, 1, 7, 8, 2)


def test_all_but_the_first_token_count() -> None:
    batch = as_batch((5, 6, 7))
    assert batch.loss_mask_T.tolist() == [False, True, True] and batch.num_loss_tokens == 2
    assert batch.token_ids_T.tolist() == [5, 6, 7] and batch.positions_T.tolist() == [0, 1, 2]


def check(
    probe: Probe,
    expected: Any,
    found: Sequence[Any],
    reload: Callable[[int], Any],
    **settings: Any,
) -> dict[str, float]:
    async def again(worker: int) -> Any:
        return reload(worker)

    return asyncio.run(probe.check(expected, found, again, **settings))


def never(worker: int) -> Any:
    raise AssertionError(f"worker {worker} was loaded anew")


def test_levels_by_hand() -> None:
    level = Level.between(EXPECTED + np.array([0.01, 0.02, 0, 0.4], np.float32), EXPECTED)
    assert level.logp == pytest.approx((0.01 + 0.02 + 0) / 3, rel=1e-4), (
        "the three that differ least"
    )
    moved = (
        math.exp(-0.99) - math.exp(-1),
        math.exp(-1.98) - math.exp(-2),
        0,
        math.exp(-3.6) - math.exp(-4),
    )
    assert level.p == pytest.approx(sum(moved) / 4, rel=1e-4)


def test_figures_are_of_the_worker_that_differs_most() -> None:
    found = [EXPECTED + np.array([0, 0, 0, 0.004], np.float32), EXPECTED + np.float32(0.002)]
    figures = check(Probe(0.01), EXPECTED, found, never, version=3)
    assert figures["sync/probe_diff_max"] == pytest.approx(0.004, rel=1e-3)
    assert figures["sync/probe_diff_mean"] == pytest.approx(0.002, rel=1e-3)
    assert figures["sync/probe_noise"] == pytest.approx(0.002, rel=1e-3)
    assert figures["sync/reloads"] == 0


def test_a_worker_that_differs_is_loaded_anew_once() -> None:
    loaded: list[int] = []

    def reload(worker: int) -> Any:
        loaded.append(worker)
        return EXPECTED

    figures = check(Probe(0.01), EXPECTED, [EXPECTED, EXPECTED + 1], reload, version=3)
    assert loaded == [1]
    assert figures["sync/probe_diff_max"] == 0 and figures["sync/reloads"] == 1


WRONG = [
    EXPECTED + np.array([0, 0, 0.1, 0]),
    EXPECTED + np.array([0, 0, 0, 3.5]),
    np.full(4, math.nan, np.float32),
    np.array([-1.0, -2.0, -0.5, -math.inf], np.float32),
]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("before", [0, 1, 20])
def test_a_worker_that_differs_still_ends_the_run(wrong: Any, before: int) -> None:
    """Whether it is the first version or not."""
    probe = Probe(0.01)
    for version in range(before):
        check(probe, EXPECTED, [EXPECTED], never, version=version)
    with pytest.raises(
        ActorLostError, match=r"worker 0 does not compute with version 30 .* 4 tokens differ"
    ):
        check(probe, EXPECTED, [wrong], lambda worker: wrong, version=30)


def test_tolerance_follows_the_dtype() -> None:
    assert (
        tolerance_of("float32") == 0.01 and tolerance_of("bfloat16") == tolerance_of("auto") == 0.1
    )


def noisy(rng: np.random.Generator, scale: float, size: int = 127) -> tuple[Any, Any]:
    """(learners', engine's) with noise as bfloat16 gives it: more for rare tokens."""
    expected = -rng.gamma(0.8, 3.0, size).astype(np.float32)
    noise = rng.standard_normal(size) * scale * (1 + 0.3 * np.abs(expected))
    return expected, np.minimum(expected + noise.astype(np.float32), -1e-6).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_the_first_versions_noise_is_no_alarm_later(seed: int) -> None:
    rng, probe = np.random.default_rng(seed), Probe(0.1)
    for version in range(300):
        expected, found = noisy(rng, 0.02)
        assert (
            check(probe, expected, [found], never, version=version, changed=0.01)["sync/reloads"]
            == 0
        )


@pytest.mark.parametrize("resumed", [False, True])
def test_three_times_the_noise_is_an_alarm(resumed: bool) -> None:
    """Also in a run that goes on, which has measured no version of its own yet; far below the
    absolute bound."""
    rng, probe = np.random.default_rng(0), Probe(0.1)
    for version in range(8):
        expected, found = noisy(rng, 0.02)
        check(probe, expected, [found], never, version=version)
    if resumed:
        probe = Probe(0.1, probe.level)
    expected, found = noisy(rng, 0.06)
    with pytest.raises(ActorLostError, match=r"are noise \(most at token"):
        check(probe, expected, [found], lambda worker: found, version=8)
    probe.begin_stage()
    check(probe, expected, [found], never, version=8)


def test_an_engine_that_stayed_behind_is_known_by_its_own_results() -> None:
    """However near the versions are to each other."""
    rng, probe = np.random.default_rng(0), Probe(0.1)
    expected, found = noisy(rng, 0.01)
    stale = []
    for version in range(4):
        stale.append((expected + np.float32(1e-6) * version, found + np.float32(1e-6) * version))
        check(probe, stale[-1][0], [stale[-1][1]], never, version=version, changed=0.01)
    now = expected + np.float32(5e-6)
    for version in range(4):
        old = stale[version][1]
        with pytest.raises(ActorLostError, match=rf"those of version {version} bit for bit"):
            check(probe, now, [old], lambda worker, old=old: old, version=4, changed=0.01)
    old = stale[3][1]
    check(probe, now, [old], never, version=4, changed=0.0)  # nothing to stay behind
    # what changed does not show in these tokens
    check(probe, stale[3][0], [old], never, version=5, changed=0.01)


# A real engine in float32, after one optimizer step, with weights that are wrong in one way.

TINY = TinyConfig(
    hidden=64, layers=3, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocabulary="bytes"
)
Weights = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Weights], list[Any]]:
    """The model's directory, its weights at five versions, and the learners' log-probs of each."""
    folder = make_tiny(tmp_path_factory.mktemp("probe"), TINY, seed=0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    versions, expected = [], []
    for _ in range(5):
        versions.append({name: p.detach().clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            logits = model(IDS[None]).logits[0, :-1]
        expected.append(torch.log_softmax(logits, -1).gather(-1, IDS[1:, None])[:, 0].numpy())
        loss = model(IDS[None], labels=IDS[None]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return folder, versions, expected


IDS = torch.from_numpy(np.random.default_rng(1).integers(4, 100, 64))


def only(name: str) -> Callable[[Weights, Weights], Weights]:
    return lambda now, old: {n: old[n] for n in now if name in n}


def heads_swapped(now: Weights, old: Weights) -> Weights:
    name = "model.layers.1.self_attn.q_proj.weight"
    heads = now[name].view(4, 16, 64)[[1, 0, 2, 3]]
    return {name: heads.reshape(now[name].shape)}


def layers_swapped(now: Weights, old: Weights) -> Weights:
    others = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    return {
        n: now[n.replace(part, other)] for part, other in others.items() for n in now if part in n
    }


INJECTED: dict[str, Callable[[Weights, Weights], Weights]] = {
    "all weights of an older version": lambda now, old: old,
    "one stale layer": only("model.layers.1."),
    "the stale first layer": only("model.layers.0."),
    "one stale tensor": only("layers.2.mlp.down_proj.weight"),
    "a stale embedding": only("embed_tokens"),
    "a stale q": only("layers.0.self_attn.q_proj.weight"),
    "swapped heads": heads_swapped,
    "swapped layers": layers_swapped,
    "a zero tensor": lambda now, old: {"model.layers.1.mlp.up_proj.weight": torch.zeros(96, 64)},
}


@pytest.mark.parametrize("age", [1, 4])
@pytest.mark.parametrize("wrong", INJECTED)
def test_wrong_weights_in_a_real_engine(
    pair: tuple[Path, list[Weights], list[Any]], wrong: str, age: int
) -> None:
    folder, versions, expected = pair
    engine = Decoder.from_directory(folder, torch.float32)

    def serve(weights: Weights) -> Any:
        for name, tensor in weights.items():
            engine.weights[name].copy_(tensor)
        engine.pack()
        with torch.no_grad():
            return engine.token_logprobs(IDS[None])[0].numpy()

    probe = Probe(tolerance_of("float32"))
    for version, weights in enumerate(versions[:-1]):
        check(probe, expected[version], [serve(weights)], never, version=version, changed=0.9)
    now, old = versions[-1], versions[-1 - age]
    serve(now)
    bad = serve(INJECTED[wrong](now, old))
    with pytest.raises(ActorLostError, match=r"worker 0 does not compute with version 4"):
        check(probe, expected[-1], [bad], lambda worker: bad, version=4, changed=0.9)
    check(probe, expected[-1], [serve(now)], never, version=4, changed=0.9)
