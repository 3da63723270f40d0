"""The settings `stages` make a recipe: named stages in one file, each a run of its own over the
file's common settings. Loads no torch.

    stages:
      - {name: cold_start, kind: sft, sft: {steps: 100}}
      - {name: reasoning, kind: rl}                            # of cold_start's model
      - {name: samples, kind: reject, reject: {samples: 4}}    # by reasoning's
      - {name: second, kind: sft, model: {path: stage:base}, sft: {data: stage:samples}}

A stage's keys go over the file's. It starts from the model of the stage before it, unless it sets
one. `stage:NAME` stands for what an earlier stage left, a model or samples, and `stage:base` for
the file's own model. `stages.NAME.optim.lr=1e-5` changes a stage on the command line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .load import Config, ConfigError, read_tree, resolve
from .overrides import merged, tree_of

Output = Literal["model", "samples"]
BASE, REFERENCE = "base", "stage:"
TAKEN = ("summary.json", "summary.md", "stop", ".lock")
"""Names of files in a recipe's directory, which no stage may have."""
OF_RECIPE = ("name", "run_dir", "stages")
"""Keys that a stage takes from its recipe."""
OUTPUTS: Mapping[Output, str] = {"model": "model", "samples": "samples.jsonl"}
"""The path of a stage's output within its directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of stage."""

    runs: str
    """Its name in `Config.stages`; of distillation, that with samples of a teacher."""
    makes: Output


KINDS: Mapping[str, Kind] = {
    "sft": Kind(runs="sft", makes="model"),
    "rl": Kind(runs="rl", makes="model"),
    "reject": Kind(runs="reject", makes="samples"),
    "distill": Kind(runs="sft", makes="model"),
}
ON_POLICY = "distill"
"""The group whose keys make a `distill` stage reinforcement learning on the student's own
samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage with all of its settings."""

    name: str
    kind: str
    config: Config
    takes: tuple[str, ...]
    """The earlier stages whose output it uses."""

    @property
    def output(self) -> Path:
        return self.config.output / OUTPUTS[KINDS[self.kind].makes]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Stages in the order in which they run."""

    name: str
    folder: Path
    """Holds a directory for each stage, and the summary."""
    stages: tuple[Stage, ...]


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Config | Recipe:
    """The configuration or the recipe of a YAML file with `key=value` overrides; raises
    `ConfigError`."""
    tree = read_tree(path, overrides, _named, _tree_of)
    sections = tree.get("stages")
    if not isinstance(sections, Mapping):
        return resolve(tree)
    common = {key: value for key, value in tree.items() if key != "stages"}
    if not common.get("name"):
        raise ConfigError("name is required but missing; add it to the file or pass name=...")
    folder = Path(common.get("run_dir") or f"runs/{common['name']}")
    for group, other in _references(common):
        raise ConfigError(
            f"{group} takes {REFERENCE}{other} for all stages, which none before it has left; give"
            " it to the stages that take it"
        )
    _check_references(sections)
    stages: list[Stage] = []
    for name, section in sections.items():
        try:
            stages.append(_stage(name, section, common, folder, stages))
        except ConfigError as error:
            raise ConfigError(f"stage {name}: {error}") from error
    return Recipe(name=str(common["name"]), folder=folder, stages=tuple(stages))


def _named(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with a recipe's list of stages as a mapping of their names."""
    listed = tree.get("stages")
    if isinstance(listed, dict):
        listed = [{"name": name, **_group(listed, name)} for name in listed]
    if not isinstance(listed, list) or not any(isinstance(each, dict) for each in listed):
        return tree
    by_name: dict[str, Any] = {}
    for number, section in enumerate(listed, 1):
        name = section.get("name") if isinstance(section, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise ConfigError(
                f"stage {number} has no name that a directory may have (name: {name!r}); in a"
                " recipe each stage is a section such as {name: cold_start, kind: sft}"
            )
        if why := _refused(name, by_name):
            raise ConfigError(f"stage {number}: the name {name!r} {why}; give it another")
        kind = section.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            near = difflib.get_close_matches(str(kind), KINDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"stage {name}: its kind is {kind!r}, not {', '.join(KINDS)}{hint}")
        by_name[name] = {key: value for key, value in section.items() if key != "name"}
        for key in OF_RECIPE:
            if key in by_name[name]:
                raise ConfigError(
                    f"stage {name}: {key} is the recipe's; leave it out, or set it for the whole"
                    " file"
                )
    return {**tree, "stages": by_name}


def _refused(name: str, others: Mapping[str, Any]) -> str | None:
    """The reason why a stage cannot have this name, e.g. `is that of a file of the recipe`; None if
    it can."""
    if name == BASE:
        return "stands for the file's own model"
    if name in TAKEN:
        return "is that of a file of the recipe"
    # the names become directories, and some file systems ignore case
    same = [other for other in others if other.casefold() == name.casefold()]
    if not same:
        return None
    return "is another stage's, too" if same == [name] else f"is as good as {same[0]!r}"


def _tree_of(override: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """An override as a tree, also `stages.NAME.KEY=value`. Raises ConfigError if there is no such
    stage."""
    sections = tree.get("stages")
    group, _, rest = override.partition(".")
    if group != "stages" or not isinstance(sections, Mapping):
        return tree_of(override, Config)
    # a name may have dots: of the stages `a` and `a.b` the longer one is meant by `a.b.KEY`
    named = [each for each in sections if rest.startswith(f"{each}.")]
    name = max(named, key=len, default="")
    inner = rest.removeprefix(f"{name}.")
    if not name or not inner:
        raise ConfigError(
            f"override {override!r}: there is no such stage; stages.NAME.KEY=value has one of"
            f" {', '.join(sections)} for NAME"
        )
    return {"stages": {name: tree_of(inner, Config)}}


def _check_references(sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that every `stage:NAME` names an earlier stage with the right kind of output. Raises
    ConfigError otherwise."""
    taken = {name: [ref for _, ref in _references(section)] for name, section in sections.items()}
    order = list(sections)
    for name, section in sections.items():
        for group, other in _references(section):
            said = f"stage {name}: {group} takes {REFERENCE}{other}"
            if other == BASE:
                if group not in ("model", "distill"):
                    raise ConfigError(f"{said}, a model, where samples are to be given")
                continue
            if other not in sections:
                near = difflib.get_close_matches(other, order, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(order)}"
                raise ConfigError(f"{said}, but there is no such stage; {hint}")
            if order.index(other) >= order.index(name):
                if circle := _path(other, name, taken):
                    shown = " -> ".join([name, *circle])
                    raise ConfigError(f"{said}, which is a circle ({shown}); take an earlier one")
                raise ConfigError(f"{said}, which comes later; move {other} before {name}")
            makes = KINDS[sections[other]["kind"]].makes
            wanted = "samples" if group in ("sft", "data", "eval") else "model"
            if makes != wanted:
                raise ConfigError(f"{said}, which leaves {makes}, where {wanted} is to be given")


def _path(
    start: str, goal: str, taken: Mapping[str, Sequence[str]], seen: tuple[str, ...] = ()
) -> list[str]:
    """The names on a path from `start` to `goal` along the references in `taken`; [] if there is
    none."""
    if start == goal:
        return [goal]
    for other in taken.get(start, ()):
        if other not in seen and (way := _path(other, goal, taken, (*seen, start))):
            return [start, *way]
    return []


def _references(tree: Any, group: str = "") -> Iterator[tuple[str, str]]:
    """(top group of settings, name) of every `stage:NAME` in a section."""
    if isinstance(tree, str) and tree.startswith(REFERENCE):
        yield group, tree.removeprefix(REFERENCE)
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _references(value, group or str(key))
    elif isinstance(tree, list):
        for value in tree:
            yield from _references(value, group)


def _stage(
    name: str,
    section: Mapping[str, Any],
    common: Mapping[str, Any],
    folder: Path,
    earlier: Sequence[Stage],
) -> Stage:
    kind = str(section["kind"])
    own = {key: value for key, value in section.items() if key != "kind"}
    models = [stage.name for stage in earlier if KINDS[stage.kind].makes == "model"]
    model = _group(own, "model")
    if models and not model.get("path") and not model.get("tiny"):
        own["model"] = {**model, "path": REFERENCE + models[-1]}
    takes = tuple(dict.fromkeys(ref for _, ref in _references(own) if ref != BASE))
    tree = merged(common, own)
    given = _group(own, "model")
    # a model has either a path or tiny, but `merged` has kept the file's beside the stage's
    if given.get("path") == REFERENCE + BASE:
        base = _group(common, "model")
        tree["model"] = {**tree["model"], "path": base.get("path"), "tiny": base.get("tiny")}
    elif given.get("path"):
        tree["model"] = {**tree["model"], "tiny": None}
    elif given.get("tiny"):
        tree["model"] = {**tree["model"], "path": None}
    runs = "rl" if kind == "distill" and tree.get(ON_POLICY) else KINDS[kind].runs
    if kind == "distill" and runs == "sft" and not _group(tree, "sft").get("data"):
        raise ConfigError(
            "a distill stage needs a teacher: samples of one in sft.data, e.g. stage:NAME of a"
            " reject stage"
        )
    if runs == "sft":
        tree = merged({"sft": {"accuracy": True}}, tree)
    outputs = {stage.name: str(stage.output) for stage in earlier}
    if own_path := _group(common, "model").get("path"):
        outputs[BASE] = str(own_path)
    tree = _filled(tree, outputs)
    tree |= {
        "name": f"{common['name']}-{name}",
        "run_dir": str(folder / name),
        "stages": [runs],
    }
    tree["tracking"] = {"group": str(common["name"]), **_group(tree, "tracking")}
    return Stage(name=name, kind=kind, config=resolve(tree), takes=takes)


def _group(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A group of settings; {} if it is no mapping, which validation refuses later."""
    group = tree.get(name)
    return group if isinstance(group, Mapping) else {}


def _filled(tree: Any, outputs: Mapping[str, str], key: str = "") -> Any:
    """The tree with paths in place of references. As `data`, samples get no system prompt: it is in
    their messages already."""
    if isinstance(tree, str) and tree.startswith(REFERENCE):
        path = outputs.get(tree.removeprefix(REFERENCE))
        if path is None:
            raise ConfigError(
                f"{key} takes {tree}, but the file's model has no path: it is made anew from"
                " model.tiny; name a stage"
            )
        return {"source": path, "system_prompt": None} if key == "data" else path
    if isinstance(tree, Mapping):
        return {name: _filled(value, outputs, name) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_filled(value, outputs) for value in tree]
    return tree
