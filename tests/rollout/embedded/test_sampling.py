"""The distribution that is drawn from, its log-probs, and draws that depend on nothing but their
key and position."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from emberl.rollout.embedded.sampling import (
    SlotSampling,
    check_sampling,
    penalised,
    sample,
    stream_key,
    uniforms,
)
from emberl.rollout.samples import Sampling
from transformers import RepetitionPenaltyLogitsProcessor

PROBS = (0.4, 0.3, 0.15, 0.1, 0.05)
LOGITS = torch.tensor([[math.log(p) + 3 for p in PROBS]])


def draw(sampling: Sampling, count: int) -> tuple[np.ndarray, np.ndarray]:
    settings = SlotSampling.empty(count, torch.float32, torch.device("cpu"))
    settings.fill(0, count, sampling, len(PROBS))
    settings.note([sampling])
    keys = np.array([stream_key(sampling.seed, "p", index) for index in range(count)], np.uint64)
    tokens, logprobs = sample(
        LOGITS.expand(count, -1), torch.from_numpy(uniforms(keys, 9, 10)[:, 0]), settings
    )
    return tokens.numpy(), logprobs.numpy()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({}, PROBS),
        # squares of the probabilities, over their sum 0.285
        (
            {"temperature": 0.5},
            (0.16 / 0.285, 0.09 / 0.285, 0.0225 / 0.285, 0.01 / 0.285, 0.0025 / 0.285),
        ),
        ({"top_k": 2}, (4 / 7, 3 / 7, 0, 0, 0)),
        ({"top_k": 5}, PROBS),
        # 0.4 + 0.3 falls short of 0.75, so the third token is in
        ({"top_p": 0.75}, (0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0)),
        # of the top three (0.85) the first two hold 82 %
        ({"top_k": 3, "top_p": 0.8}, (4 / 7, 3 / 7, 0, 0, 0)),
        ({"top_p": 1e-6}, (1, 0, 0, 0, 0)),
        # 0.1 is a quarter of 0.4, 0.05 an eighth
        ({"min_p": 0.2}, (0.4 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.1 / 0.95, 0)),
        ({"min_p": 1.0}, (1, 0, 0, 0, 0)),
        # squared, the second has 9/16 of the first, the third 9/64
        ({"temperature": 0.5, "min_p": 0.2}, (16 / 25, 9 / 25, 0, 0, 0)),
        # of what min-p leaves (0.85) the first two hold 82 %; of all they hold 70 %
        ({"min_p": 0.3, "top_p": 0.8}, (4 / 7, 3 / 7, 0, 0, 0)),
        ({"min_p": 0.3, "top_k": 4}, (0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0)),
    ],
)
def test_frequencies_and_logprobs_are_of_the_same_distribution(
    setting: dict[str, float], expected: tuple[float, ...]
) -> None:
    count = 20_000
    tokens, logprobs = draw(Sampling(max_tokens=1, seed=3, **setting), count)
    support = [token for token, p in enumerate(expected) if p > 0]
    assert set(tokens) <= set(support)
    for token in support:
        np.testing.assert_allclose(logprobs[tokens == token], math.log(expected[token]), atol=2e-6)
    wanted = count * np.array([expected[token] for token in support])
    found = np.array([(tokens == token).sum() for token in support])
    chi_square = ((found - wanted) ** 2 / wanted).sum()
    assert chi_square < 20  # at most 4 degrees of freedom: exceeded by chance once in 2,000


def test_greedy_takes_the_likeliest_with_the_untempered_logprob() -> None:
    tokens, logprobs = draw(Sampling(max_tokens=1, temperature=0, top_k=1, min_p=0.9), 4)
    assert tokens.tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(logprobs, math.log(0.4), atol=1e-6)


def test_a_batch_may_mix_settings() -> None:
    settings = SlotSampling.empty(4, torch.float32, torch.device("cpu"))
    mix = [
        Sampling(max_tokens=1),
        Sampling(max_tokens=1, temperature=0),
        Sampling(max_tokens=1, temperature=0.5, top_k=2),
        Sampling(max_tokens=1, min_p=0.5),
    ]
    for row, sampling in enumerate(mix):
        settings.fill(row, row + 1, sampling, len(PROBS))
    settings.note(mix)
    tokens, logprobs = sample(
        LOGITS.expand(4, -1), torch.full((4,), 0.8, dtype=torch.float64), settings
    )
    # 0.4 + 0.3 < 0.8 <= 0.85; the argmax; 16 / 25 < 0.8; 4 / 7 < 0.8
    assert tokens.tolist() == [2, 0, 1, 1]
    np.testing.assert_allclose(logprobs.numpy(), np.log([0.15, 0.4, 9 / 25, 3 / 7]), atol=1e-6)


def test_the_ends_of_the_unit_interval_never_draw_an_impossible_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    settings = SlotSampling.empty(2, torch.float32, torch.device("cpu"))
    tokens, _ = sample(logits, torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64), settings)
    assert tokens.tolist() == [1, 2]


def test_uniforms_are_splitmix64() -> None:
    # The generator's published first output from state 0 is 0xE220A8397B1DCDAF; the position counts
    # its steps.
    first = uniforms(np.array([0], np.uint64), 0, 3)
    assert first[0, 0] == (0xE220A8397B1DCDAF >> 12) / 2**52
    assert first[0, 1] == (0x6E789E6AA1B965F4 >> 12) / 2**52
    assert first[0, 2] == (0x06C45D188009454F >> 12) / 2**52
    assert uniforms(np.array([0], np.uint64), 2, 3)[0, 0] == first[0, 2]


def test_streams_differ_by_seed_prompt_and_sample() -> None:
    keys = {
        stream_key(seed, prompt, index)
        for seed in (0, 1)
        for prompt in ("a", "b/1", "b/11")
        for index in range(3)
    }
    assert len(keys) == 18
    draws = uniforms(np.array(sorted(keys), np.uint64), 0, 500)
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 * math.sqrt(1 / 12 / draws.size)
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 0.2  # 4.5 standard deviations of independent streams


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"top_k": -1}, "top_k=-1"),
        ({"min_p": -0.1}, r"min_p=-0\.1"),
        ({"min_p": 1.01}, r"min_p=1\.01"),
        ({"min_p": math.nan}, "min_p=nan"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0\.0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty=nan"),
        ({"repetition_penalty": math.inf}, "repetition_penalty=inf"),
    ],
)
def test_bad_settings_are_named(setting: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_sampling(Sampling(**{"max_tokens": 4} | setting))


def test_the_repetition_penalty_is_transformers() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, 40, generator=generator)
    ids = torch.randint(0, 40, (6, 30), generator=generator)
    seen = torch.zeros(6, 40, dtype=torch.bool).scatter_(1, ids, True)
    for penalty in (1.3, 0.8, 1.0):
        sampling = Sampling(max_tokens=1, repetition_penalty=penalty)
        settings = SlotSampling.empty(6, torch.float32, torch.device("cpu"))
        settings.fill(0, 6, sampling, 40)
        settings.note([sampling])
        assert settings.any_penalty == (penalty != 1)
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        torch.testing.assert_close(penalised(logits, seen, settings), theirs, rtol=0, atol=0)
