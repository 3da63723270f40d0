"""A user's own loss and advantage: one function in one file, tried out at start-up."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rl.algorithm import plugins
from emberl.rl.algorithm.advantages import group_advantages
from emberl.rl.algorithm.losses import Objective
from emberl.rl.config.algorithm import AdvantageConfig, LossConfig

SOURCE = '''
import torch

def mine(logp, batch, bound=1.2):
    """PPO with one bound, differentiated by autograd."""
    ratio = (logp - batch.old_logp).exp()
    return -torch.minimum(batch.advantages * ratio, batch.advantages * ratio.clamp(0.8, bound))

def stated(logp, batch):
    return -batch.advantages * logp, -batch.advantages

def gspo(logp, batch):
    ratio = batch.means(logp - batch.old_logp).exp()
    return torch.maximum(-batch.advantages * ratio, -batch.advantages * ratio.clamp(0.97, 1.04))

gspo.whole_sequences = True

def detached(logp, batch):
    weight = (logp - batch.old_logp).exp().clamp(max=1.2).detach()
    return -weight * batch.advantages * logp

def averaged(logp, batch):
    return -batch.advantages * logp / len(logp)

def shifted(logp, batch):
    return -batch.advantages * logp + logp.mean().detach()

def coupled(logp, batch):
    return -batch.advantages * batch.means(logp - batch.old_logp).exp()

def scalar(logp, batch):
    return (-batch.advantages * logp).mean()

def infinite(logp, batch):
    return -batch.advantages / torch.zeros_like(logp)

def broken(logp, batch):
    return batch.advantage * logp

def wrong_slope(logp, batch):
    return -batch.advantages * logp, batch.advantages

def surrogate(logp, batch):
    return -batch.advantages * logp, -2 * batch.advantages

surrogate.stop_gradient = True

def best(scores, above=0.5):
    return [(s > above) * 1.0 - 0.5 for s in scores]

def centred(scores):
    return [s - s[~np.isnan(s)].mean() if len(s) > 1 else s - s for s in scores]

def flat(scores):
    return [1.0 for s in scores]

def nans(scores):
    return [s / 0.0 * 0.0 for s in scores]

import numpy as np
'''


@pytest.fixture
def at(tmp_path: Path) -> Callable[[str], str]:
    file = tmp_path / "algorithms.py"
    file.write_text(SOURCE)
    return lambda name: f"{file}:{name}"


@pytest.mark.parametrize(
    ("name", "built_in"),
    [
        ("mine", {"kind": "ppo_clip"}),
        ("stated", {"kind": "reinforce"}),
        (
            "gspo",
            {"kind": "ppo_clip", "ratio_level": "sequence", "clip_low": 0.03, "clip_high": 0.04},
        ),
        ("detached", {"kind": "cispo", "clip_low": 1.0, "clip_high": 0.2}),
    ],
)
def test_a_loss_of_ones_own_is_the_built_in_one(
    ragged: Callable[..., Any],
    objective: Callable[..., Objective],
    at: Callable[[str], str],
    name: str,
    built_in: dict[str, Any],
) -> None:
    kl = {"place": "loss", "coef": 0.1}
    for seed in range(5):
        step = ragged(seed, "seq-mean-token-mean")
        mine, theirs = (
            step.terms(objective(kl=kl, kind=at(name))),
            step.terms(objective(kl=kl, **built_in)),
        )
        torch.testing.assert_close(mine.loss, theirs.loss, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(mine.dlogp, theirs.dlogp, rtol=1e-12, atol=1e-15)


def test_options_reach_the_function(
    ragged: Callable[..., Any], objective: Callable[..., Objective], at: Callable[[str], str]
) -> None:
    step = ragged(4)
    mine = step.terms(objective(kind=at("mine"), options={"bound": 1.05}))
    torch.testing.assert_close(mine.loss, step.terms(objective(clip_high=0.05)).loss)


def test_a_stated_derivative_may_be_meant_so(at: Callable[[str], str]) -> None:
    plugins.load_loss(at("surrogate"), {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("averaged", "do not sum, average or normalise over tokens"),
        ("shifted", "do not sum, average or normalise over tokens"),
        ("coupled", "set whole_sequences = True on the function"),
        ("scalar", "returned () for 8 tokens; return one loss per token, shape [8]"),
        ("infinite", "gave a loss that is not finite"),
        (
            "broken",
            (
                "failed on a tiny batch: AttributeError: 'TokenBatch' object has no attribute"
                " 'advantage'"
            ),
        ),
        ("broken", " in broken)"),  # the place
        ("wrong_slope", "is not the numerical derivative"),
        ("absent", "has no function 'absent'; it has mine, stated"),
    ],
)
def test_a_loss_that_cannot_be_trained_with_ends_the_run_at_its_start(
    objective: Callable[..., Objective], at: Callable[[str], str], name: str, message: str
) -> None:
    with pytest.raises(ValueError) as error:
        objective(kind=at(name))
    assert message in str(error.value)


def test_a_learner_in_another_folder_has_the_file_of_where_the_run_was_started(
    ragged: Callable[..., Any],
    objective: Callable[..., Objective],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (here / "own.py").write_text("def f(logp, batch):\n    return -2 * logp\n")
    monkeypatch.chdir(here)
    sent = pickle.dumps(objective(kind="./own.py:f"))
    (there / "own.py").write_text("def f(logp, batch):\n    return -3 * logp\n")
    (here / "own.py").unlink()
    monkeypatch.chdir(there)
    plugins._load_loss.cache_clear()  # as in another process
    step = ragged(4)
    twice = step.terms(pickle.loads(sent)).dlogp
    thrice = step.terms(objective(kind="./own.py:f")).dlogp
    torch.testing.assert_close(1.5 * twice, thrice)
    assert thrice.abs().sum() > 0


def test_an_option_that_does_not_exist(
    objective: Callable[..., Objective], at: Callable[[str], str]
) -> None:
    with pytest.raises(ValueError, match=r"failed on a tiny batch: TypeError: .*'bond'"):
        objective(kind=at("mine"), options={"bond": 1.0})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("./nowhere.py:f", "there is no file"),
        ("no_such_package.module:f", "cannot be imported: ModuleNotFoundError"),
        ("math:tau", "math has no function 'tau'"),
    ],
)
def test_a_function_that_is_not_there(
    objective: Callable[..., Objective], kind: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        objective(kind=kind)


def test_a_file_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f(:\n")
    with pytest.raises(ValueError, match="cannot be imported: SyntaxError"):
        plugins.load_loss(f"{tmp_path}/bad.py:f", {})


def test_an_entry_point(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ragged: Callable[..., Any],
    objective: Callable[..., Objective],
) -> None:
    """An installed distribution is a folder with metadata on the path."""
    (tmp_path / "their_package.py").write_text(
        "def theirs(logp, batch):\n    return -batch.advantages * logp\n"
    )
    metadata = tmp_path / "theirs-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[emberl.losses]\ntheir_loss = their_package:theirs\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    step = ragged(1)
    terms = step.terms(objective(kind="their_loss"))
    torch.testing.assert_close(terms.loss, step.terms(objective(kind="reinforce")).loss)
    with pytest.raises(ValueError, match="there is no loss 'their_los'; did you mean 'their_loss'"):
        LossConfig(kind="their_los")


def test_an_advantage_of_ones_own(at: Callable[[str], str]) -> None:
    groups = [np.array([1.0, 0.0, np.nan]), np.array([0.6])]
    found = group_advantages(groups, AdvantageConfig(kind=at("best"), options={"above": 0.7}))
    assert [a.tolist() for a in found] == [[0.5, -0.5, 0.0], [-0.5]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flat", "return a list of these shapes"),
        ("nans", "all must be finite"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_an_advantage_that_is_wrong(at: Callable[[str], str], name: str, message: str) -> None:
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=message):
        group_advantages([np.array([1.0, 0.0])], AdvantageConfig(kind=at(name)))


def test_a_result_that_goes_bad_later_is_caught_too(at: Callable[[str], str]) -> None:
    config = AdvantageConfig(kind=at("nans"))
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="all must be finite"):
        group_advantages([np.array([2.0, 1.0])], config)
