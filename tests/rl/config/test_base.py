"""YAML's booleans, infinities and sizes beyond reason, wherever a key may hold them."""

from __future__ import annotations

from pathlib import Path

import pytest
from emberl.rl.config.load import ConfigError, load_config

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "rollout.group_size=yes",
            "rollout.group_size=True: a boolean does not go here (YAML reads yes and on as true)",
        ),
        (
            "seed=no",
            (
                "seed=False: a boolean does not go here (YAML reads no and off as false); write a"
                " number"
            ),
        ),
        ("loss.clip_low=true", "loss.clip_low=True: a boolean"),
        ("optim.betas=[yes,0.9]", "optim.betas=[True, 0.9]: a boolean"),
        ("data.terms=[4,on]", "data.terms=[4, True]: a boolean"),
        (
            "data.kinds.chain=yes",
            (
                "data.kinds: a boolean does not go here (YAML reads yes and on as true); write a"
                " number"
            ),
        ),
        ("reward.parts.answer.weight=yes", "reward.parts.answer.weight=True: a boolean"),
        ("model.tiny.layers=yes", "model.tiny.layers=True: a boolean"),
        ("rollout.group_size=8.5", "rollout.group_size=8.5: input should be a valid integer"),
        ("rollout.timeout=inf", "rollout.timeout='inf': input should be a finite number"),
        ("optim.lr=.inf", "optim.lr=inf: input should be a finite number"),
        ("optim.lr=.nan", "optim.lr=nan: input should be a finite number"),
        ("optim.lr=10", "optim.lr=10: input should be less than or equal to 1"),
        ("optim.betas=[0.9,1.0]", "optim.betas.1=1.0: input should be less than 1"),
        (
            "optim.betas=[-0.1,0.9]",
            "optim.betas.0=-0.1: input should be greater than or equal to 0",
        ),
        (
            "rollout.group_size=1000000000",
            "rollout.group_size=1000000000: input should be less than or equal to 65536",
        ),
        (
            "schedule.steps=1e12",
            "schedule.steps=1000000000000.0: input should be less than or equal to 100000000",
        ),
        (
            "rollout.max_response_length=99999999999",
            "input should be less than or equal to 10000000",
        ),
        (
            "sync.timeout=1e12",
            "sync.timeout=1000000000000.0: input should be less than or equal to 31536000",
        ),
    ],
)
def test_a_value_that_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(QUICKSTART, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("model.packing=on", "packing", "on"),
        ("model.packing=off", "packing", "off"),
        ("model.packing='off'", "packing", "off"),
        ("model.packing=auto", "packing", "auto"),
        ("model.gradient_checkpointing=yes", "gradient_checkpointing", True),
        ("model.gradient_checkpointing=off", "gradient_checkpointing", False),
    ],
)
def test_words_that_yaml_takes_for_booleans(override: str, key: str, value: object) -> None:
    assert getattr(load_config(QUICKSTART, [override]).model, key) == value


def test_a_file_may_say_off(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(
        "name: t\nmodel: {path: x, packing: off}\ndata: {source: arithmetic}\nschedule: {steps:"
        " 1e2}\n"
    )
    config = load_config(file)
    assert (config.model.packing, config.schedule.steps) == ("off", 100)


def test_a_file_must_quote_a_word_that_yaml_takes_for_a_boolean(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("name: on\nmodel: {path: 5}\ndata: {source: arithmetic}\n")
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert (
        "name=True: a boolean does not go here (YAML reads yes and on as true); put the word in"
        " quotes" in str(error.value)
    )
    assert "model.path=5: a text goes here; put it in quotes" in str(error.value)
