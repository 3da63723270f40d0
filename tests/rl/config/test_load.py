"""The configuration: overrides, presets, and errors that name the key, the value and the fix."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from emberl.rl.config.cautions import said_at_start
from emberl.rl.config.load import ConfigError, keys, load_config, to_yaml, with_steps

MINIMAL = "name: t\nmodel: {path: somewhere}\ndata: {source: arithmetic}\n"
CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "t.yaml"
    path.write_text(MINIMAL)
    return path


def test_overrides_win_over_the_file(file: Path) -> None:
    file.write_text(MINIMAL + "optim: {lr: 1.0e-3, grad_clip: 2.0}\n")
    config = load_config(file, ["optim.lr=1e-4", "seed=7", "stages=[sft,rl]"])
    assert (config.optim.lr, config.optim.grad_clip, config.seed, config.stages) == (
        1e-4,
        2.0,
        7,
        ("sft", "rl"),
    )


def test_a_resolved_configuration_loads_to_itself(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["rollout.group_size=3"])
    again = tmp_path / "resolved.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    assert load_config(path).name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.group_sze=8", "unknown key rollout.group_sze; did you mean rollout.group_size?"),
        ("rollot.group_size=8", "unknown key rollot; did you mean rollout?"),
        ("weight_decay=0.1", "unknown key weight_decay: emberl calls it optim.weight_decay"),
        (
            "reward.parts.answer.wieght=1",
            "unknown key reward.parts.answer.wieght; did you mean reward.parts.answer.weight?",
        ),
        ("optim.lr=fast", "optim.lr='fast': input should be a valid number"),
        ("optim.lr=-1", "optim.lr=-1: input should be greater than 0"),
        (
            "schedule.prompts_per_step=0",
            "schedule.prompts_per_step=0: input should be greater than or equal to 1",
        ),
        ("model.tiny={}", "set either model.path (a Hub id or a directory) or model.tiny"),
        ("model.tiny={}", "with model.path add model.tiny=null"),
        ("algorithm=grop", "did you mean"),
        ("group_size", "override 'group_size' must have the form key=value"),
        ("cluster.device=tpu", "cluster.device='tpu'"),
        (
            "sync.transport=collective",
            (
                "into vLLM's own processes; it needs rollout.engine=vllm, or set"
                " sync.transport=object_store"
            ),
        ),
    ],
)
def test_a_wrong_key_or_value(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(file, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_key(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("name: t\nmodel: {path: x}\n")
    with pytest.raises(
        ConfigError, match=r"^data is required but missing; add it to the file or pass data=\.\.\.$"
    ):
        load_config(tmp_path / "t.yaml")


def test_a_missing_file_names_what_is_there(file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"configuration file .*tt\.yaml' does not exist; .* has t\.yaml"
    ):
        load_config(file.with_name("tt.yaml"))


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\tx: 1"])
def test_a_file_that_is_no_mapping(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"t\.yaml"):
        load_config(file)


def test_keys_lists_nested_keys() -> None:
    assert {"optim.lr", "cluster.rollouts", "data.source", "model.tiny.hidden"} <= set(keys())


@pytest.mark.parametrize(
    ("overrides", "problems", "steps", "said"),
    [
        (
            ["schedule.passes=2"],
            7473,
            234,
            "schedule.steps=234 of 64 prompts are 2 passes over 7,473 problems",
        ),
        (
            ["schedule.passes=0.5"],
            128,
            1,
            "schedule.steps=1 of 64 prompts are 0.5 passes over 128 problems",
        ),
        (
            ["schedule.passes=3", "schedule.prompts_per_step=7"],
            7,
            3,
            "are 3 passes over 7 problems",
        ),
        (
            ["schedule.steps=10"],
            640,
            10,
            "schedule.steps=10 of 64 prompts are 1 passes over 640 problems",
        ),
        (
            ["schedule.steps=10", "algorithm=dapo"],
            1000,
            10,
            "are at least 0.64 passes over 1,000 problems",
        ),
        (["schedule.steps=10"], None, 10, None),
        (["stages=[sft]", "schedule.steps=10"], 640, 10, None),
    ],
)
def test_passes_over_the_data(
    file: Path, overrides: list[str], problems: int | None, steps: int, said: str | None
) -> None:
    file.write_text(MINIMAL.replace("arithmetic", "rows.jsonl"))
    config, line = with_steps(load_config(file, overrides), problems)
    assert (config.schedule.steps, config.schedule.passes) == (steps, None)
    assert (line is None) if said is None else (line is not None and line.endswith(said))


def test_passes_are_of_a_data_set_and_are_checked_once_they_are_counted(file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data.source=arithmetic makes problems without end; set schedule.steps"
    ):
        load_config(file, ["schedule.passes=2"])
    vapo = load_config(
        file, ["data.source=rows.jsonl", "schedule.passes=1", "algorithm=vapo", "schedule.steps=10"]
    )
    assert said_at_start(vapo) == [
        "note: schedule.passes=1 decides schedule.steps once the data are counted"
    ]
    with pytest.raises(
        ConfigError, match=r"critic.warmup=50 trains the critic alone for all of schedule.steps=4"
    ):
        with_steps(vapo, 256)


@pytest.mark.slow
def test_importing_the_configuration_loads_no_torch() -> None:
    heavy = ("torch", "ray", "transformers", "datasets")
    code = f"import sys, emberl.rl.config.load; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
