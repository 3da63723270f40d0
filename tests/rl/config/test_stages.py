"""Recipes: what a stage inherits, where its inputs come from, and what is refused before anything
is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from emberl.rl.cli import app
from emberl.rl.config.load import Config, ConfigError, load_config
from emberl.rl.config.stages import Recipe, load_experiment
from typer.testing import CliRunner

CONFIGS = Path(__file__).parents[3] / "configs"
COMMON = "name: r\nmodel: {tiny: {hidden: 64}}\ndata: {source: arithmetic}\noptim: {lr: 1.0e-4}\n"
STAGES = """\
stages:
  - {name: cold, kind: sft, sft: {steps: 30}}
  - {name: think, kind: rl, optim: {lr: 1.0e-5}}
  - {name: samples, kind: reject, reject: {problems: 10}}
  - {name: again, kind: sft, model: {path: stage:base}, sft: {data: stage:samples, epochs: 2}}
  - {name: small, kind: distill, model: {tiny: {hidden: 32}}, sft: {data: stage:samples}}
  - {name: last, kind: rl, model: {path: stage:again}}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> Any:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    return load_experiment(file, overrides)


def test_a_stage_starts_from_the_model_before_it_or_from_the_one_it_names(tmp_path: Path) -> None:
    recipe = load(tmp_path, COMMON + STAGES)
    assert isinstance(recipe, Recipe)
    models = {
        s.name: (s.config.model.path, s.config.model.tiny and s.config.model.tiny.hidden)
        for s in recipe.stages
    }
    assert models == {
        "cold": (None, 64),
        "think": ("runs/r/cold/model", None),
        "samples": ("runs/r/think/model", None),
        "again": (None, 64),
        "small": (None, 32),
        "last": ("runs/r/again/model", None),
    }
    assert [s.config.stages for s in recipe.stages] == [
        ("sft",), ("rl",), ("reject",), ("sft",), ("sft",), ("rl",),
    ]  # fmt: skip
    assert {s.name: s.takes for s in recipe.stages} == {
        "cold": (),
        "think": ("cold",),
        "samples": ("think",),
        "again": ("samples",),
        "small": ("samples",),
        "last": ("again",),
    }


def test_a_stage_s_settings_go_over_the_common_ones(tmp_path: Path) -> None:
    recipe = load(tmp_path, COMMON + STAGES, "seed=3", "stages.last.optim.lr=2e-5", "run_dir=x")
    rates = {s.name: s.config.optim.lr for s in recipe.stages}
    assert rates == dict.fromkeys(rates, 1e-4) | {"think": 1e-5, "last": 2e-5}
    assert {s.config.seed for s in recipe.stages} == {3}
    again = recipe.stages[3].config
    assert again.run_dir == "x/again" and again.name == "r-again" and again.tracking.group == "r"
    assert again.sft.data is not None and again.sft.data.source == "x/samples/samples.jsonl"
    # samples have their system message in them; a second one would be another prompt
    assert (
        again.sft.data.beside(again.data.model_copy(update={"system_prompt": "Sum."})).system_prompt
        is None
    )
    assert again.sft.accuracy and not load(tmp_path, COMMON + "stages: [sft]\n").sft.accuracy


def test_a_list_of_words_is_one_run(tmp_path: Path) -> None:
    config = load(tmp_path, COMMON + "stages: [sft, rl]\n")
    assert isinstance(config, Config) and config.stages == ("sft", "rl")
    assert isinstance(load(tmp_path, COMMON + STAGES, "stages=[rl]"), Config)


def test_a_name_may_have_points_and_a_group_of_one_s_own_stays(tmp_path: Path) -> None:
    text = COMMON + "stages: [{name: a, kind: sft}, {name: a.b, kind: sft}]\n"
    recipe = load(tmp_path, text, "stages.a.b.sft.steps=3", "stages.a.sft.steps=2")
    assert [s.config.sft.steps for s in recipe.stages] == [2, 3]
    assert {s.config.tracking.group for s in recipe.stages} == {"r"}
    own = load(tmp_path, text, "tracking.group=mine")
    assert {s.config.tracking.group for s in own.stages} == {"mine"}


def test_the_file_s_own_model_may_teach(tmp_path: Path) -> None:
    stages = (
        "stages: [{name: a, kind: sft}, {name: b, kind: distill, algorithm: opd,"
        " distill: {teachers: {t: {path: stage:base}}}}]\n"
    )
    recipe = load(tmp_path, COMMON.replace("tiny: {hidden: 64}", "path: big") + stages)
    assert recipe.stages[1].config.distill.teachers["t"].path == "big"
    assert recipe.stages[1].config.model.path == "runs/r/a/model"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("{name: a, kind: sfd}", "stage a: its kind is 'sfd', not sft, rl, reject, distill; did you mean sft?"),
        ("{name: a}", "stage a: its kind is None"),
        ("{kind: rl}", "stage 1 has no name that a directory may have (name: None)"),
        ("{name: ../a, kind: rl}", "stage 1 has no name that a directory may have"),
        ("rl, {name: a, kind: rl}", "stage 1 has no name"),
        ("{name: a, kind: rl}, {name: a, kind: rl}", "stage 2: the name 'a' is another stage's, too"),
        ("{name: base, kind: rl}", "stage 1: the name 'base' stands for the file's own model"),
        (
            "{name: cold, kind: sft}, {name: b, kind: rl, model: {path: stage:clod}}",
            "stage b: model takes stage:clod, but there is no such stage; did you mean cold?",
        ),
        (
            "{name: a, kind: sft, sft: {data: stage:b}}, {name: b, kind: reject, reject: {problems: 1}}",
            "stage a: sft takes stage:b, which comes later; move b before a",
        ),
        (
            "{name: a, kind: sft, sft: {data: stage:b}}, {name: b, kind: reject, model: {path: stage:a}}",
            "stage a: sft takes stage:b, which is a circle (a -> b -> a); take an earlier one",
        ),
        (
            "{name: a, kind: rl, model: {path: stage:a}}",
            "stage a: model takes stage:a, which is a circle (a -> a); take an earlier one",
        ),
        (
            "{name: a, kind: rl}, {name: b, kind: sft, sft: {data: stage:a}}",
            "stage b: sft takes stage:a, which leaves model, where samples is to be given",
        ),
        (
            "{name: a, kind: reject, reject: {problems: 1}}, {name: b, kind: rl, model: {path: stage:a}}",
            "stage b: model takes stage:a, which leaves samples, where model is to be given",
        ),
        ("{name: stop, kind: rl}", "stage 1: the name 'stop' is that of a file of the recipe"),
        ("{name: A, kind: sft}, {name: a, kind: rl}", "stage 2: the name 'a' is as good as 'A'"),
        ("{name: a, kind: rl, run_dir: x}", "stage a: run_dir is the recipe's; leave it out"),
        ("{name: a, kind: rl, stages: [sft]}", "stage a: stages is the recipe's; leave it out"),
        ("{name: a, kind: rl, data: stage:base}", "data takes stage:base, a model, where samples"),
        (
            "{name: a, kind: distill, distill: {teachers: {t: {path: stage:base}}}}",
            "stage a: path takes stage:base, but the file's model has no path",
        ),
        (
            "{name: a, kind: sft}, {name: b, kind: distill, algorithm: opd, distill: {teachers: {t: {path: stage:a}}}}",
            "stage b: distill.teachers: runs/r/a/model is the student's own model, which has nothing to learn",
        ),
        (
            "{name: a, kind: reject, reject: {problems: 4, samples: 1, keep: 3}}",
            "stage a: reject.keep=3 is more than reject.samples=1",
        ),
        ("{name: a, kind: rl}]\nsft: {data: stage:a} #", "sft takes stage:a for all stages, which none"),
        ("{name: a, kind: distill}", "stage a: a distill stage needs a teacher"),
        ("{name: a, kind: reject}", "stage a: data.source=arithmetic makes problems without end; set reject.problems"),
        ("{name: a, kind: sft, sft: {epochs: 2}}", "stage a: sft.epochs=2 counts passes over a data set"),
        ("{name: a, kind: rl, optim: {lrr: 1}}", "stage a: unknown key optim.lrr; did you mean optim.lr?"),
        ("{name: a, kind: sft, sft: {direct: 0.5, data: x.jsonl}}", "stage a: sft.direct=0.5 takes the work out"),
        ("{name: a, kind: sft, sft: {schedule: linear, min_lr_ratio: 0.1}}", "is the end of a cosine"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, stages: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, f"{COMMON}stages: [{stages}]\n")
    assert message in str(error.value)


@pytest.mark.parametrize("override", ["stages.thnik.optim.lr=1", "stages.think=1", "stages.think"])
def test_an_override_of_no_stage(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"stages\.NAME\.KEY=value has one of cold, think"):
        load(tmp_path, COMMON + STAGES, override)


def test_stages_may_be_a_mapping_and_the_recipe_needs_a_name(tmp_path: Path) -> None:
    recipe = load(tmp_path, COMMON + "stages: {a: {kind: rl}, b: {kind: rl}}\n")
    assert [stage.name for stage in recipe.stages] == ["a", "b"]
    with pytest.raises(ConfigError, match="stage a: its kind is None"):
        load(tmp_path, COMMON + "stages: {a: rl}\n")
    with pytest.raises(ConfigError, match=r"^name is required but missing"):
        load(tmp_path, COMMON.removeprefix("name: r\n") + STAGES)


def test_where_one_run_is_wanted_a_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(COMMON + STAGES)
    with pytest.raises(ConfigError, match=r"is a recipe of 6 stages, and here one run is wanted"):
        load_config(tmp_path / "r.yaml")


def test_samples_are_taken_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reject goes alone"):
        load(tmp_path, COMMON + "reject: {problems: 1}\nstages: [rl, reject]\n")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("r1/*.yaml")), ids=lambda p: p.name)
def test_every_shipped_recipe_is_valid_and_placed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    recipe = load_experiment(path)
    assert isinstance(recipe, Recipe)
    model = recipe.stages[0].config.model.path
    if model is not None and model.startswith("models/") and not Path(model).exists():
        pytest.skip(f"{model} is not there; `make smollm2` fetches it")
    ran = CliRunner().invoke(app, ["train", str(path), "--dry-run"])
    assert ran.exit_code == 0, ran.stderr
    assert ran.stdout.count("placement on") == len(recipe.stages)
