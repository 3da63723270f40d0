"""configs/ascend: requirements that resolve against the recorded metadata of the wheels, runs that
are placed and fit their cards, files for containers that agree with them, and practice results."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from emberl.rl.config.load import Config, load_config
from emberl.rl.learner import memory
from emberl.rl.learner.flops import ModelFlops
from emberl.rl.placement import plan_placement
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

SHOWS = {
    "requirements.txt and the extra resolve, Python 3.11 and 3.12, x86-64 and aarch64 (recorded metadata)": (
        "test_the_requirements_resolve, test_ours_and_theirs_agree_on_what_is_not_recorded,"
        " test_what_the_readme_says_does_not_resolve_does_not,"
        " test_the_extra_names_the_same_versions"
    ),
    "the three runs are placed on their boxes, and their learners' memory fits (estimated)": (
        "test_a_run_is_placed_on_its_box, test_a_learner_fits_its_card"
    ),
    "practice: each command is a run of that algorithm, results are judged (made-up curves)": (
        "test_each_practice_is_a_run, test_practice_says_what_the_file_has,"
        " test_a_practice_that_learns_is_accepted_and_is_one_file, test_what_is_not_accepted"
    ),
}
ROOT = Path(__file__).parents[2]
ASCEND = ROOT / "configs" / "ascend"
WHEELS = json.loads((Path(__file__).parent / "ascend_wheels.json").read_text())["packages"]
RUNS = ("8x910b_qwen2.5_7b", "16x910b_qwen3_32b", "2x16_910c_qwen3_30b")
UNRECORDED = {name for name, wheel in WHEELS.items() if wheel["requires_dist"] is None}
"""Whose requirements are not known, so that a conflict that they bring would not be seen."""
MACHINES = [(python, arch) for python in ("3.11", "3.12") for arch in ("x86_64", "aarch64")]


def required(lines: list[str]) -> dict[str, Requirement]:
    wanted = [line.split("#")[0].strip() for line in lines]
    found = [Requirement(line) for line in wanted if line and not line.startswith("--")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def requirements() -> dict[str, Requirement]:
    return required((ASCEND / "requirements.txt").read_text().splitlines())


def chosen(name: str, arch: str) -> Version:
    """What pip takes of a recorded package; on x86-64 PyTorch's index, which is named, has torch
    for CPUs."""
    version = WHEELS[name]["version"]
    return Version(f"{version}+cpu" if name == "torch" and arch == "x86_64" else version)


def demands(python: str, arch: str, names: set[str]) -> Iterator[tuple[str, Requirement]]:
    """(who, what) for every requirement between recorded packages, and of emberl's own."""
    target = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": arch,
        "platform_system": "Linux",
        "sys_platform": "linux",
        "extra": "",
    }
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {"emberl": own["dependencies"]} | {
        name: WHEELS[name]["requires_dist"].get(arch, WHEELS[name]["requires_dist"].get("any"))
        for name in names - UNRECORDED
    }
    for who, lines in lists.items():
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate(target):
                yield who, requirement


def conflicts(python: str, arch: str, names: set[str]) -> list[str]:
    return [
        f"{who} {WHEELS[who]['version'] if who in WHEELS else ''} needs {wanted}"
        for who, wanted in demands(python, arch, names)
        if (name := canonicalize_name(wanted.name)) in names
        and not wanted.specifier.contains(chosen(name, arch), prereleases=True)
    ]


@pytest.mark.parametrize(("python", "arch"), MACHINES)
def test_the_requirements_resolve(python: str, arch: str) -> None:
    wanted = requirements()
    pinned = wanted.keys() & WHEELS.keys()
    assert {"torch", "torch-npu", "vllm-ascend", "transformers", "triton-ascend"} <= pinned
    for name in pinned:
        assert wanted[name].specifier.contains(chosen(name, arch), prereleases=True), name
        needs = WHEELS[name]["requires_python"]
        assert needs is None or Requirement(f"x{needs}").specifier.contains(python), name
    assert conflicts(python, arch, set(pinned)) == []


def test_what_is_not_known_is_said() -> None:
    """triton-ascend 3.2.2 is on Huawei's index alone. It is installed last and without what it
    requires, so that only its version counts."""
    assert {"triton-ascend"} == UNRECORDED
    readme = (ASCEND / "README.md").read_text()
    assert "pip install --no-deps triton-ascend==3.2.2" in readme
    assert "What triton-ascend 3.2.2 requires is not checked" in readme


@pytest.mark.parametrize(("python", "arch"), MACHINES)
def test_ours_and_theirs_agree_on_what_is_not_recorded(python: str, arch: str) -> None:
    """numpy, numba and others: there is a version that everybody takes."""
    candidates = {"numpy": "2.2.6", "numba": "0.65.0", "setuptools": "80.9.0", "pydantic": "2.12.5"}
    for who, wanted in demands(python, arch, {*requirements()} & WHEELS.keys() | {"vllm"}):
        version = candidates.get(canonicalize_name(wanted.name))
        assert version is None or wanted.specifier.contains(version), f"{who} needs {wanted}"
    assert requirements()["numpy"].specifier.contains(candidates["numpy"])


def test_what_the_readme_says_does_not_resolve_does_not() -> None:
    pinned = {*requirements()} & WHEELS.keys()
    found = conflicts("3.11", "aarch64", pinned | {"vllm"})
    assert len(found) == 3 and all("vllm 0.23.0 needs torch" in line for line in found), found
    general = Version(WHEELS["torch"]["version"])  # without PyTorch's index
    [wanted] = map(Requirement, WHEELS["torch-npu"]["requires_dist"]["x86_64"])
    assert not wanted.specifier.contains(general)
    assert "vllm" not in requirements()


def test_the_extra_names_the_same_versions() -> None:
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = requirements()
    for name, requirement in required(own["optional-dependencies"]["ascend"]).items():
        assert requirement.specifier == wanted[name].specifier, name
    assert required(own["dependencies"])["ray"].specifier == wanted["ray"].specifier


SHAPES = {
    "Qwen/Qwen2.5-7B-Instruct": ModelFlops(
        layers=28, hidden=3584, heads=28, kv_heads=4, head_dim=128, intermediate=18944,
        vocabulary=152064,
    ),
    "Qwen/Qwen3-32B": ModelFlops(
        layers=64, hidden=5120, heads=64, kv_heads=8, head_dim=128, intermediate=25600,
        vocabulary=151936,
    ),
}  # fmt: skip
CARD = 61e9
"""Bytes that a process finds free of an Ascend's 64 GB (65,536 MB, of which 3 to 4 GB are taken)."""


def parameters(model: ModelFlops) -> int:
    """Untied embedding and head; norms and biases are nothing beside them."""
    return model.token // 2 + 2 * model.vocabulary * model.hidden


def card(config: Config) -> tuple[float, float]:
    """(bytes of a learner's card in a pass of the longest sequence, those left for other tokens)"""
    model = SHAPES[str(config.model.path)]
    count = parameters(model)
    lora = config.model.lora
    # adapters of rank r on the seven linear layers
    rows = 2 * (model.hidden + model.heads * model.head_dim) + 2 * (
        model.hidden + model.kv_heads * model.head_dim
    )
    rows += 3 * (model.hidden + model.intermediate)
    trained = count if lora is None else lora.rank * rows * model.layers
    world = config.cluster.learners
    need = memory.need(
        model, parameters=count, trained=trained, world=world, dtype=torch.bfloat16,
        attention="flash_attention_2", checkpointing=config.model.gradient_checkpointing,
        resident=True, gathered=memory.gathered_at_once(model, count),
    )  # fmt: skip
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    resident = 4 * count / world
    return resident + need.of_pass(longest, longest), (CARD - resident) * memory.SPARE


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_placed_on_its_box(name: str) -> None:
    config = load_config(ASCEND / f"{name}.yaml", [])
    boxes, cards = (int(n) for n in re.findall(r"(\d+)x(\d+)_", name)[0]) if "x16" in name else (
        1, int(name.split("x")[0]),
    )  # fmt: skip
    total = plan_placement(config).total()
    assert total["NPU"] == boxes * cards, "no card is left idle, and none is asked for twice"
    machines = max(1, total["NPU"] // (16 if "910c" in name else 8))
    assert total["CPU"] <= 192 * machines
    size = config.rollout.engine_args.get("tensor_parallel_size", 1)
    model = SHAPES[str(config.model.path)]
    assert model.kv_heads % size == 0 and 8 % size == 0, "an engine stays within one machine"
    weights = 2 * parameters(model) / size
    share = config.rollout.engine_args["gpu_memory_utilization"]
    assert weights < 0.6 * share * CARD, "room for keys and values"
    sizes = config.rollout.engine_args["compilation_config"]["cudagraph_capture_sizes"]
    assert sizes == sorted(set(sizes)) and sizes[-1] == config.rollout.max_num_seqs


@pytest.mark.parametrize("name", RUNS)
def test_a_learner_fits_its_card(name: str) -> None:
    config = load_config(ASCEND / f"{name}.yaml", [])
    used, _ = card(config)
    assert used < 0.9 * CARD
    if isinstance(config.optim.micro_batch_tokens, int):
        longest = config.data.max_prompt_length + config.rollout.max_response_length
        assert config.optim.micro_batch_tokens >= longest
    else:  # what `auto` would find at the start
        model = SHAPES[str(config.model.path)]
        left = card(config)[1] - (used - 4 * parameters(model) / config.cluster.learners)
        assert left > 0, "auto would refuse the longest sequence"


def test_all_weights_of_32b_do_not_fit_twelve_cards() -> None:
    """Why the file for sixteen 910B trains adapters."""
    config = load_config(
        ASCEND / "16x910b_qwen3_32b.yaml", ["model.lora=null", "cluster.learners=12"]
    )
    assert card(config)[0] > CARD


@pytest.mark.parametrize("name", RUNS)
def test_every_tuned_argument_has_its_reason(name: str) -> None:
    text = (ASCEND / f"{name}.yaml").read_text()
    first = (ASCEND / "8x910b_qwen2.5_7b.yaml").read_text()
    for key in load_config(ASCEND / f"{name}.yaml", []).rollout.engine_args:
        [line] = [line for line in text.splitlines() if line.strip().startswith(f"{key}:")]
        explained = "#" in line or re.search(rf"{key}:.*\n?.*#", first)
        assert explained, f"{name}: {key} has no reason here or in the first file"


def practices() -> dict[str, list[str]]:
    rows = re.findall(r"^\| [\w -]+ \| `(algorithm=\S+(?: \S+=\S+)*)` \|", page(), re.MULTILINE)
    return {row.split()[0].removeprefix("algorithm="): shlex.split(row) for row in rows}


def page() -> str:
    return (ASCEND / "practice.md").read_text()


def test_each_practice_is_a_run() -> None:
    assert [*practices()] == ["grpo", "dapo", "gspo", "sapo", "cispo", "gpg", "opd"]
    [base] = set(re.findall(r"`emberl train (\S+) run_dir=", page()))
    for name, overrides in practices().items():
        config = load_config(ROOT / base, [*overrides, f"run_dir=runs/{name}"])
        assert config.algorithm == name and config.schedule.steps == 100
        assert plan_placement(config).total()["NPU"] == 8
        assert config.distill.active == (name == "opd")


def test_practice_says_what_the_file_has() -> None:
    """Every figure of the page that the configuration or the judge has, too."""
    config = load_config(ASCEND / "8x910b_qwen2.5_7b.yaml", [])
    cluster, judge = config.cluster, practice_result()
    words = f"(Qwen2.5-7B-Instruct, DAPO-Math-17k, {cluster.learners} learners, {cluster.rollouts}"
    words += f" engines, {config.schedule.prompts_per_step} prompts of {config.rollout.group_size}"
    assert f"{words} answers)" in page()
    assert str(config.model.path).endswith("Qwen2.5-7B-Instruct")
    assert str(config.data.source).endswith("DAPO-Math-17k")
    assert f"{judge.STEPS} steps or {judge.HOURS:g} hours" in page()
    assert config.schedule.steps == judge.STEPS and judge.WINDOW == 10
    assert f"under {judge.LARGEST_ERROR:.0%}".replace("%", " %") in page()
    assert f"{judge.LEAST_SHARE} of an A100's" in page()
    assert f"over {judge.LEAST_SPEED:g} tokens/s a card" in page()
    gspo = load_config(ASCEND / "8x910b_qwen2.5_7b.yaml", ["algorithm=gspo"])
    assert (gspo.loss.clip_low, gspo.loss.clip_high) == (3e-4, 4e-4) and "3e-4 and 4e-4" in page()
    assert gspo.schedule.minibatches == 4 and "four updates a step" in page()
    for name in re.findall(r"`((?:actor|sched|distill|critic|training)/[^`*]*)\*?`", page()):
        assert name.startswith(judge.KEPT), f"{name} is not in the file that is sent back"


def test_commands_of_the_readme_are_runs() -> None:
    found = re.findall(r"`emberl train (configs/\S+\.yaml)((?: [\w.]+=\S+)*)", _readme())
    assert len(found) >= 2
    for path, overrides in found:
        config = load_config(ROOT / path, overrides.split())
        assert plan_placement(config).total()["NPU"] <= 8, f"{path}{overrides}"


def _readme() -> str:
    return (ASCEND / "README.md").read_text()


def test_what_a_practice_asks_to_look_at_is_logged() -> None:
    logged = json.loads((ROOT / "tests" / "rl" / "watch" / "logged_metrics.json").read_text())
    judge = practice_result()
    asked = re.findall(r"`((?:actor|sched|critic|training)/[^`*]*)\*?`", page())
    for name in (*asked, judge.REWARD, judge.SPEED):
        assert any(each.startswith(name) for each in logged), name


def practice_result() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("practice_result", ASCEND / "practice_result.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recorded(folder: Path, rewards: list[float], speed: float) -> Path:
    folder.mkdir()
    rows = [
        {"step": i + 1, "critic/score/mean": reward, "perf/throughput": speed, "timing_s/step": 60,
         "sync/wire_bytes": 3}
        for i, reward in enumerate(rewards)
    ]  # fmt: skip
    rows.insert(5, {"step": 5, "val-core/accuracy": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text("name: x\n")
    return folder


def test_a_practice_that_learns_is_accepted_and_is_one_file(tmp_path: Path) -> None:
    result = practice_result().result
    run = recorded(tmp_path / "run", [0.2] * 50 + [0.4] * 50, 240.0)
    found = result(run, None, {"device": None, "doctor": None})
    assert found["acceptance"]["passed"]
    assert found["acceptance"]["reward_rises"] == {
        "first": pytest.approx(0.2),
        "last": 0.4,
        "holds": True,
    }
    assert found["acceptance"]["throughput"]["tokens_per_second_per_device"] == 240.0
    assert len(found["steps"]) == 100 and "sync/wire_bytes" not in found["steps"][0]
    # a GPU's rewards of 0.21 and 0.42: 0.01 of 0.21, 0.02 of 0.42 off; 240 of 300 tokens/s
    other = recorded(tmp_path / "other", [0.21] * 50 + [0.42] * 50, 300.0)
    found = result(run, other, {})
    assert found["acceptance"]["error"]["mean_relative"] == pytest.approx(0.02 / 0.42)
    assert found["acceptance"]["throughput"]["share"] == pytest.approx(0.8)
    assert found["acceptance"]["passed"]


@pytest.mark.parametrize(
    ("rewards", "speed", "broken"),
    [
        ([0.2] * 40 + [0.4] * 40, 240.0, "long_enough"),
        ([0.4] * 50 + [0.2] * 50, 240.0, "reward_rises"),
        ([0.2] * 50 + [0.4] * 50, 90.0, "throughput"),
    ],
)
def test_what_is_not_accepted(
    tmp_path: Path, rewards: list[float], speed: float, broken: str
) -> None:
    found = practice_result().accept(
        practice_result().steps_of(recorded(tmp_path / "run", rewards, speed)), None
    )
    assert not found.pop("passed")
    assert [name for name, part in found.items() if not part["holds"]] == [broken]


def test_the_kubernetes_job_has_room_for_its_run() -> None:
    spec = yaml.safe_load((ASCEND / "rayjob.yaml").read_text())["spec"]
    emberl, train, config, *rest = shlex.split(spec["entrypoint"])
    assert (emberl, train, rest[1:]) == ("emberl", "train", ["--resume", "auto"])
    settings = load_config(ROOT / config, rest[:1])
    needed = plan_placement(settings).total()
    [group] = spec["rayClusterSpec"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert needed["NPU"] <= group["replicas"] * limits["huawei.com/Ascend910"]
    assert needed["CPU"] <= group["replicas"] * float(limits["cpu"])
    # what `ray start --resources=...` is given by a shell
    said = json.loads(shlex.split(group["rayStartParams"]["resources"])[0])
    assert said == {"NPU": limits["huawei.com/Ascend910"]}
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    for pod in (head, group["template"]["spec"]):
        mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
        assert str(settings.run_dir).startswith(mounts["runs"])


def test_the_image_and_the_readme_keep_the_versions() -> None:
    wanted = {name: str(r.specifier) for name, r in requirements().items()}
    image = (ASCEND / "Dockerfile").read_text()
    readme = (ASCEND / "README.md").read_text()
    for text in (image, readme):
        assert f"triton-ascend{wanted['triton-ascend']}" in text
        assert (
            f"vllm-ascend:v{wanted['vllm-ascend'].removeprefix('==')}" in text
            or "TAG=v0.23.0" in text
        )
    assert f"'ray[default]{wanted['ray']}'" in image
    for name in ("torch", "torch-npu", "transformers"):
        assert f"{name} {wanted[name].removeprefix('==')}" in readme
    indexes = re.findall(r"--extra-index-url (\S+)", (ASCEND / "requirements.txt").read_text())
    assert len(indexes) == 2 and all(index in readme for index in indexes)


@pytest.mark.parametrize(
    "name", ["README.md", "practice.md", "Dockerfile", "rayjob.yaml", "requirements.txt"]
)
def test_files_that_are_named_are_there(name: str) -> None:
    named = re.findall(r"configs/[\w./-]+\w", (ASCEND / name).read_text())
    assert named and all((ROOT / path).exists() for path in named)
