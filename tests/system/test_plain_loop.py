"""Invariants 1 and 5: the actors give what `rl/minimal.py` gives, token by token and byte by
byte."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from emberl.kernels import platform
from emberl.rl import minimal, trainer
from emberl.rl.config.load import Config, load_config
from emberl.rl.groups import Group
from emberl.rl.model_files import prepare_model
from emberl.rollout.weights.patch import digest
from safetensors.numpy import load_file
from small_system import Emberl, read_metrics
from torch import distributed

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_process_group() -> Iterator[None]:
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


async def one_page(config: Config, folder: Path) -> tuple[list[list[Group]], dict[str, str]]:
    """Each step's groups, and the digests of the weights after the last one."""
    steps = []
    digests: dict[str, str] = {}
    async for groups, weights in minimal.train(config, prepare_model(config, folder, print)):
        steps.append(groups)
        digests = dict(weights.digests)
    return steps, digests


def tokens(groups: Sequence[Group]) -> list[tuple[str, list[int], list[float]]]:
    return [
        (group.prompt.id, answer.token_ids.tolist(), answer.logprobs.tolist())
        for group in groups
        for answer in group.completions
    ]


def test_the_actors_are_the_page(emberl: Emberl, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[Sequence[Group]] = []

    def record(_dir: Path, _step: int, _version: int, groups: Sequence[Group], _: object) -> None:
        sampled.append(groups)

    monkeypatch.setattr(trainer, "record_lengths", record)
    emberl.train("run_dir=actors", "schedule.steps=3", "eval.size=0")
    platform.set_threads(1)
    config = load_config(emberl.config, ["schedule.steps=3"])
    steps, digests = asyncio.run(one_page(config, emberl.folder / "page"))
    assert [tokens(groups) for groups in steps] == [tokens(groups) for groups in sampled]
    scores = [float(np.mean([group.scores for group in groups])) for groups in steps]
    rows = read_metrics(emberl.folder / "actors")
    assert scores == [row["critic/score/mean"] for row in rows]
    assert 0 < sum(scores) < 3, "the steps had something to learn from"
    assert [row["training/updates"] for row in rows] == [1.0] * 3
    saved = load_file(emberl.folder / "actors/model/model.safetensors")
    held = {name: digest(value.reshape(-1).view(np.uint8)) for name, value in saved.items()}
    assert held == digests
