"""Files and runs of earlier versions are read with today's keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from emberl.rl import checkpoints
from emberl.rl.config.earlier import REMOVED, RENAMED
from emberl.rl.config.load import ConfigError, keys, load_config, resolve, to_yaml
from emberl.rl.config.stages import load_experiment
from emberl.rl.evaluation.settings import find_model
from emberl.rl.groups import Progress

PLAIN: dict[str, Any] = {
    "name": "old",
    "model": {"path": "somewhere"},
    "data": {"source": "arithmetic"},
}
OLD = """
schedule: {stream_parts: 4, steps: 7}
data: {source: arithmetic, template_args: {enable_thinking: false}, bad_references: error}
"""


def test_no_key_is_old_and_new() -> None:
    known = set(keys())
    assert not known & {*REMOVED, *RENAMED} and set(RENAMED.values()) <= known


def test_a_file_with_old_keys_is_read_and_each_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("name: old\nmodel: {path: somewhere}" + OLD)
    config = load_config(file)
    assert config.schedule.steps == 7
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
    assert config.data.drop == "none"
    assert capsys.readouterr().err.splitlines() == [
        (
            f"{file}: schedule.stream_parts=4 is left out, emberl has no such key now: a step"
            " trains whole"
        ),
        f"{file}: data.template_args is data.chat_template_kwargs now, here"
        " {'enable_thinking': False}",
        f"{file}: data.bad_references is data.drop now, here none",
    ]


def test_a_recipe_with_an_old_key_in_a_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "old.yaml"
    stage = "{name: one, kind: sft, sft: {steps: 3, stop_accuracy: 0.5}}"
    file.write_text(
        f"name: old\nmodel: {{path: somewhere}}\ndata: {{source: arithmetic}}\nstages: [{stage}]\n"
    )
    recipe: Any = load_experiment(file)
    assert recipe.stages[0].config.sft.steps == 3
    assert "stage one: sft.stop_accuracy=0.5 is left out" in capsys.readouterr().err


def test_a_key_on_the_command_line_must_be_known(tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    file.write_text(to_yaml(resolve(PLAIN)))
    with pytest.raises(ConfigError, match=r"unknown key schedule\.stream_parts"):
        load_config(file, ["schedule.stream_parts=2"])


def test_an_old_run_can_be_evaluated_and_resumed(tmp_path: Path) -> None:
    """Its directory has a key that was removed, another name of one, and not those that came
    later."""
    config = resolve(PLAIN)
    tree = config.model_dump(mode="json")
    tree["schedule"]["stream_parts"] = 1
    tree["data"]["template_args"] = tree["data"].pop("chat_template_kwargs")
    tree["data"].pop("levels", None)
    del tree["model"]["packing"], tree["data"]["drop"]
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    named = find_model(str(tmp_path))
    assert named.path == str(model) and named.run == config

    folder = checkpoints.begin_checkpoint(tmp_path, "rl-000001")
    done = checkpoints.finish_checkpoint(folder, Progress(step=1), keep=1)
    (done / "settings.json").write_text(json.dumps(tree))
    assert checkpoints.check_resumed(config, done, override=False) == []
    other = resolve({**PLAIN, "data": {"source": "arithmetic", "drop": "none"}})
    with pytest.raises(ConfigError, match=r'data\.drop: unset, now "none"'):
        checkpoints.check_resumed(other, done, override=False)
