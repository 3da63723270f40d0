"""`emberl keys` and `emberl presets`: read from the models, and what they print is valid."""

from __future__ import annotations

from pathlib import Path

import pytest
from emberl.rl.config.cautions import describe_presets
from emberl.rl.config.key_reference import entries, line_of, table
from emberl.rl.config.load import Config, load_config
from emberl.rl.config.presets import PAPERS, PRESETS

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(
    "line",
    [
        "seed  int (>= 0, < 4294967296) = 0  # Fixes every draw: the data's order, sampled tokens,",
        "stages  [sft|rl|reject, ...] = [rl]  # What is done, in this order: a cold start on worked solutions (`sft`), "
        "reinforcement learning (`rl`);",
        'sft.data.source  text or [text, ...] = ""',
        "optim.lr  number (> 0, <= 1) = 1e-06  # The largest learning rate",
        'data.source  text or [text, ...] = ""',
        "model.lora.targets  text or [text, ...] = all-linear  # Names of the adapted layers, e.g. [q_proj, v_proj]; "
        "`all-linear`: every linear layer but the output head",
        "reward.parts.NAME.weight  number (>= -1e+06, <= 1e+06) = 1  # How often the part counts in the score",
        "cluster.sleep_level  1|2 = 1",
        "kl.bound  number or null (> 0) = 10",
        'data.kinds  {name: number} = {"chain": 1.0}',
        "optim  # AdamW over float32 master weights",
    ],
)
def test_a_line_of_the_reference(line: str) -> None:
    assert [found for found in table(Config) if found.startswith(line)]


def test_every_key_has_a_meaning_in_a_line() -> None:
    for entry in entries(Config):
        assert entry.meaning, f"{entry.key} has no docstring"
        assert len(line_of(entry)) < 400 and "\n" not in line_of(entry), entry.key


def test_within_a_group_all_is_said() -> None:
    assert table(Config, "optim.warmup_steps") == [
        "optim.warmup_steps  int (>= 0) = 0  # Updates over which the rate rises from 0 to `lr`."
        " The first has the rate 0, as in transformers, verl and TRL, and changes no weight."
    ]
    assert {line.split()[0] for line in table(Config, "kl")} == {
        "kl", *(f"kl.{name}" for name in type(load_config(QUICKSTART).kl).model_fields)
    }  # fmt: skip
    with pytest.raises(ValueError, match="there is no key 'optm'"):
        table(Config, "optm")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_s_line_is_its_overrides(name: str) -> None:
    """On the plainest algorithm they give what the name gives, but for the name."""
    lines = describe_presets()
    at = lines.index(f"{name}  # {PAPERS[name]}")
    given = load_config(
        QUICKSTART,
        ["algorithm=ppo", "advantage.kind=group", "advantage.whiten=false", *lines[at + 1].split()],
    )
    meant = load_config(QUICKSTART, [f"algorithm={name}"])
    for group, values in PRESETS[name].items():
        assert {key: getattr(getattr(given, group), key) for key in values} == values
        assert {key: getattr(getattr(meant, group), key) for key in values} == values
