"""The house: which folder imports which, what an installed package looks like, and where device
names may stand."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("rl", "rollout", "rewards", "kernels", "configs")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "rewards": {"rewards"},
    "rollout": {"rollout", "kernels"},
    "rl": {"rl", "rollout", "rewards", "kernels", "configs"},
    "configs": set[str](),
}
SOURCES = sorted(
    path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
)


def imports(path: Path, source: str) -> Iterator[tuple[int, str, bool]]:
    """(line, absolute name of what is imported, whether it was written relatively) for every import
    in a file."""
    package = ["emberl", *path.parent.parts]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            yield from (
                (node.lineno, ".".join([*module, alias.name]), node.level > 0)
                for alias in node.names
            )


def broken_arrows(path: Path, source: str) -> list[str]:
    found = []
    for line, name, relative in imports(path, source):
        first, *rest = name.split(".")
        if first in FOLDERS and not relative:
            found.append(f"{path}:{line} imports {name} by its bare name")
        elif first == "emberl" and not relative:
            found.append(f"{path}:{line} imports {name}; inside the package imports are relative")
        elif first == "emberl" and (not rest or rest[0] not in MAY_IMPORT[path.parts[0]]):
            found.append(f"{path}:{line} imports {name}; {path.parts[0]} may not")
    return found


def test_arrows_run_downwards_only() -> None:
    assert [
        problem for path in SOURCES for problem in broken_arrows(path, (ROOT / path).read_text())
    ] == []


@pytest.mark.parametrize(
    ("path", "line", "problem"),
    [
        ("kernels/a.py", "from ..rl import groups", "emberl.rl.groups; kernels may not"),
        (
            "rollout/a.py",
            "from ..rewards.verdict import Verdict",
            "emberl.rewards.verdict.Verdict; rollout may not",
        ),
        ("rewards/a.py", "from .. import kernels", "emberl.kernels; rewards may not"),
        ("rl/learner/a.py", "from emberl.rollout import samples", "imports are relative"),
        ("rl/a.py", "import kernels.terms", "by its bare name"),
        ("rl/learner/a.py", "from ...rollout.samples import Prompt", None),
        ("rollout/a.py", "from ..kernels import platform", None),
        ("rl/learner/a.py", "from ..groups import Batch", None),
    ],
)
def test_the_arrow_check_itself(path: str, line: str, problem: str | None) -> None:
    found = broken_arrows(Path(path), line)
    assert found == [] if problem is None else len(found) == 1 and problem in found[0]


LAYERS: dict[str, tuple[set[str], ...]] = {
    "rl": (
        {"start"},
        {"cli"},
        {"stages", "job_commands", "train_commands", "watch_commands"},
        {"recipe", "data_command", "submit"},
        {"trainer", "minimal", "sft", "reject", "problems"},
        {"feed", "evaluate"},
        {"run", "evaluation", "eval_sets"},
        {"cluster", "weights", "plan", "data_command"},
        {
            "model_files",
            "gguf_conversion",
            "user_environment",
            "preflight",
            "placement",
            "teacher_checks",
        },
        {"learner", "batch", "watch", "answers"},
        {"data", "checkpoints", "run_directory", "disks"},
        {"algorithm", "groups"},
        {"config", "exits", "local_ray", "contents", "joining"},
    ),
    "rollout": (
        {"worker", "vllm_extension", "receiver"},
        {"pool", "crew"},
        {"environments"},
        {"vllm_backend", "embedded", "engine", "model_directory"},
        {"weights", "samples", "stops", "tracing", "actors", "schedule"},
    ),
    "rewards": (
        {"audit"},
        {"suite"},
        {"registry", "by_source"},
        {"math_answers", "code_tests", "plugins", "shaping", "gym", "judge_model"},
        {"sandbox", "worker_pool", "worker_process", "gym_answers"},
        {"processes"},
        {"inputs", "episode"},
        {"verdict", "syntax"},
    ),
    "kernels": (
        {"loss", "decoding", "transformer", "patch_coding"},
        {"platform", "compiled_loops", "ascend"},
        {"kept"},
    ),
}
"""Of each folder, its files and sub-folders from the top down. Imports go to the same layer or to
one below."""
MODULES = {
    ".".join(path.with_suffix("").parts): path for path in SOURCES if path.parts[0] in LAYERS
}


def module_imports(module: str) -> set[str]:
    """Our modules that this one imports when it is loaded, and under `TYPE_CHECKING`. What a
    function loads on demand, as the factories of the engines do, is no arrow."""
    path = MODULES[module]
    tree = ast.parse((ROOT / path).read_text())
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom | ast.If | ast.Try)
    ]
    names = [name.split(".")[1:] for _, name, _ in imports(path, ast.unparse(tree))]
    known = [".".join(name) for name in names] + [".".join(name[:-1]) for name in names]
    return {name for name in known if name in MODULES} - {module}


def layer(folder: str, unit: str) -> int:
    """0: the top, with what `__init__` hands on."""
    return next((i for i, units in enumerate(LAYERS[folder]) if unit in units), 0)


def test_every_file_and_folder_has_its_layer() -> None:
    units = {
        folder: {m.split(".")[1] for m in MODULES if m.split(".")[0] == folder} for folder in LAYERS
    }
    named = {folder: set().union(*layers) for folder, layers in LAYERS.items()}
    assert {folder: own - {"__init__"} for folder, own in units.items()} == named


def test_arrows_run_downwards_within_a_folder_too() -> None:
    upwards = [
        f"{module} imports {other}; give both their place in LAYERS, or turn the arrow round"
        for module in MODULES
        for other in module_imports(module)
        if (folder := module.split(".")[0]) == other.split(".")[0]
        and layer(folder, module.split(".")[1]) > layer(folder, other.split(".")[1])
    ]
    assert upwards == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: module_imports(module) for module in MODULES}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the modules


BUDGET = {
    "configs/ascend": 101,
    "kernels": 865,
    "kernels/decoding": 201,
    "kernels/loss": 1_962,
    "kernels/patch_coding": 908,
    "kernels/transformer": 1_010,
    "rewards": 2_383,
    "rewards/audit": 783,
    "rewards/code_tests": 3_676,
    "rewards/math_answers": 5_397,
    "rewards/plugins": 855,
    "rewards/sandbox": 2_755,
    "rl": 6_319,
    "rl/algorithm": 1_713,
    "rl/config": 4_041,
    "rl/data": 4_618,
    "rl/evaluation": 2_396,
    "rl/learner": 3_560,
    "rl/plan": 1_391,
    "rl/watch": 4_891,
    "rl/weights": 1_614,
    "rollout": 2_808,
    "rollout/embedded": 2_138,
    "rollout/vllm_backend": 3_734,
    "rollout/weights": 2_371,
}
"""Lines of a folder's own Python files, or of a sub-folder's; `rl` and so on are the files at the
top."""
ROOM = 1.1


def test_no_folder_outgrows_its_budget() -> None:
    lines = dict.fromkeys(BUDGET, 0)
    for path in MODULES.values():
        folder = "/".join(path.parts[:2]) if len(path.parts) > 2 else path.parts[0]
        assert folder in BUDGET, f"{folder} has no budget; give it one"
        lines[folder] += len((ROOT / path).read_text().splitlines())
    for folder, count in lines.items():
        print(f"{folder:24}{count:7,} of {BUDGET[folder]:,} lines")
    assert [folder for folder, count in lines.items() if count > ROOM * BUDGET[folder]] == []


LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 400, 60, 10


def functions(tree: ast.AST, within: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """(dotted name, node) of every function and method, those inside others too."""
    for node in ast.iter_child_nodes(tree):
        name = within
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{within}.{node.name}" if within else node.name
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node  # type: ignore[misc]
        yield from functions(node, name)


def too_large(path: Path, source: str) -> list[str]:
    """What of a file is beyond the bounds: its lines, a function's lines, a function's
    parameters."""
    lines = len(source.splitlines())
    problems = [f"{path} has {lines} lines"] if lines > LONGEST_FILE else []
    for name, node in functions(ast.parse(source)):
        assert node.end_lineno is not None
        length = node.end_lineno - node.lineno + 1
        if length > LONGEST_FUNCTION:
            problems.append(f"{path}:{name} has {length} lines")
        given = [arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)]
        count = len([arg for arg in given if arg not in ("self", "cls")])
        if count > MOST_PARAMETERS and path.parts[0] != "kernels":
            problems.append(f"{path}:{name} has {count} parameters")
    return problems


def test_files_functions_and_signatures_are_short() -> None:
    large = [problem for path in SOURCES for problem in too_large(path, (ROOT / path).read_text())]
    assert large == []


def test_the_check_of_sizes_itself() -> None:
    many = ", ".join(f"a{i}" for i in range(11))
    body = "    x = 1\n" * 60
    source = f"class A:\n def f(self, {many}): ...\nasync def g():\n{body}" + "#\n" * 400
    problems = ["rl/a.py has 463 lines", "rl/a.py:A.f has 11 parameters", "rl/a.py:g has 61 lines"]
    assert too_large(Path("rl/a.py"), source) == problems
    assert too_large(Path("kernels/a.py"), f"def f({many}): ...") == []


SAME_KIND = {
    "canary": "makes a canary's weights of the served ones: a tensor's, and a learner's model's",
    "command": "a command of `emberl`",
    "compare": "a model's answer against the expected one",
    "engine": "what decodes: the protocol, and each engine",
    "extract": "the answer in a completion",
    "page": "an HTML page: its parts, and an evaluation's",
    "pool": "hands work to workers that it keeps",
    "report": "what a run or an evaluation came to, for a person",
    "reward": "a reward",
    "settings": "what a user may set",
}
"""Names that files of several folders have, and what each of these files is."""
CONFIG = Path("rl/config")
"""Its X.py holds the settings of X, and may have the name of the file that has X itself."""


def repeated_names(paths: Iterable[Path]) -> set[str]:
    """Names of several files, `CONFIG` and every `__init__` left out."""
    stems = [path.stem for path in paths if path.stem != "__init__" and path.parent != CONFIG]
    return {stem for stem in stems if stems.count(stem) > 1}


def test_files_of_one_name_are_of_one_kind() -> None:
    assert repeated_names(SOURCES) == SAME_KIND.keys()


def test_a_file_of_the_configuration_that_shares_its_name_holds_settings() -> None:
    others = {path.stem for path in SOURCES if path.parent != CONFIG} - {"__init__"}
    shared = [path for path in SOURCES if path.parent == CONFIG and path.stem in others]
    docs = {path: ast.get_docstring(ast.parse((ROOT / path).read_text())) for path in shared}
    assert shared
    assert [path for path, doc in docs.items() if not (doc or "").startswith("The settings ")] == []


def test_the_check_of_names_itself() -> None:
    paths = map(Path, ["rl/a.py", "kernels/loss/a.py", "rl/config/b.py", "rl/b.py", "rl/c.py"])
    assert repeated_names(paths) == {"a"}


DEVICE_NAMES = {"cuda", "npu", "nccl", "hccl", "torch_npu"}
DEVICE_TEXT = re.compile(rf"\b(?:{'|'.join(sorted(DEVICE_NAMES))})\b|VISIBLE_DEVICES")
PLATFORM = Path("kernels/platform.py")
NAMING = {
    PLATFORM: "how devices are called",
    Path("kernels/ascend.py"): "the environment and the operators that NPUs alone have",
    Path("rl/watch/doctor_ascend.py"): "packages and versions of NPUs are what it looks at",
    Path("rl/watch/doctor_ascend_driver.py"): "their driver and CANN are what it looks at",
    Path("rl/watch/doctor_ascend_hccl.py"): "their collectives are what it looks at",
    Path("rl/watch/doctor_ascend_box.py"): "their tools and settings are what it looks at",
    Path("rl/watch/doctor_live.py"): "its fixes name the tools of each device",
}
"""Files that may name devices, and why; what runs a model asks `PLATFORM`."""


def device_names(source: str) -> list[int]:
    """Lines with a device's or a collective's name in a string, an attribute or an import.
    Docstrings are prose, and `Literal[...]` is a type: neither does anything."""
    tree = ast.parse(source)
    prose = {id(part) for node in ast.walk(tree) for part in _prose(node)}
    return [
        node.lineno for node in ast.walk(tree) if id(node) not in prose and _names_a_device(node)
    ]  # type: ignore[attr-defined]


def _prose(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        yield node.value
    if (
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id == "Literal"
    ):
        yield from ast.walk(node.slice)


def _names_a_device(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=str(text)):
            return DEVICE_TEXT.search(text) is not None
        case ast.Attribute(attr=name):
            return name in DEVICE_NAMES
        case ast.alias(name=name) | ast.ImportFrom(module=str(name)):
            return not DEVICE_NAMES.isdisjoint(name.split("."))
    return False


def test_few_files_name_devices_and_collectives() -> None:
    strays = {
        str(path): device_names((ROOT / path).read_text()) for path in SOURCES if path not in NAMING
    }
    assert {path: lines for path, lines in strays.items() if lines} == {}
    assert device_names((ROOT / PLATFORM).read_text())


@pytest.mark.parametrize(
    ("source", "stray"),
    [
        ('x.to("cuda")', True),
        ('f"npu:{rank}"', True),
        ("x.cuda()", True),
        ("torch.cuda.synchronize()", True),
        ("import torch_npu", True),
        ("from torch.cuda import Stream", True),
        ('init(backend="nccl")', True),
        ('environ["ASCEND_RT_VISIBLE_DEVICES"]', True),
        ('def f():\n    "Works on cuda and npu."', False),
        ('device: Literal["auto", "cuda"] = "auto"', False),
        ("# cuda", False),
        ('"input"', False),
        ("x.to(platform.device())", False),
    ],
)
def test_the_device_check_itself(source: str, stray: bool) -> None:
    assert bool(device_names(source)) == stray


def test_kernels_is_no_regular_package() -> None:
    """With an `__init__.py` it would beat Hugging Face's `kernels` wherever the repository's root
    is on the path."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    ours = {path.stem for path in SOURCES if path.stem != "__init__"}
    # `platform` is imported as emberl.kernels.platform only, and nothing runs with kernels/ itself
    # on its path
    assert ours & sys.stdlib_module_names <= {"platform"}


def run(code: str, cwd: Path, **environment: str) -> str:
    """What a fresh interpreter prints; as with any `-c`, its directory is on the path."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONSAFEPATH")
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=cwd,
        env=env | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_configuration_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, emberl.rl.config.load; print([m for m in ('torch', 'ray', 'transformers') if m"
        " in sys.modules])"
    )
    assert run(code, tmp_path) == "[]"


@pytest.mark.slow
def test_transformers_works_with_our_root_on_the_path() -> None:
    code = (
        "from transformers import Qwen3Config, Qwen3ForCausalLM as M\n"
        "c = Qwen3Config(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,"
        " num_attention_heads=1, num_key_value_heads=1, head_dim=8)\n"
        "import kernels\n"
        "print(M(c).num_parameters() > 0, getattr(kernels, '__file__', None))"
    )
    built, file = run(code, ROOT).split(" ", 1)
    assert built == "True"
    assert not file.startswith(str(ROOT))


@pytest.mark.slow
def test_the_wheel_has_every_file_and_one_top_level_name(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"emberl"}
    data = [path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")]
    assert {f"emberl/{path.as_posix()}" for path in [*SOURCES, *data]} <= names
    assert {f"emberl/{folder}/py.typed" for folder in FOLDERS} <= names


@pytest.mark.slow
def test_an_installed_package_has_no_bare_names(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["install", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, cwd=elsewhere, timeout=300)
    code = (
        f"from importlib.util import find_spec\nfor name in {FOLDERS}:\n    ours, bare ="
        " find_spec('emberl.' + name), find_spec(name)\n   "
        " print(next(iter(ours.submodule_search_locations)), *(bare.submodule_search_locations or"
        " () if bare else ()))"
    )
    for folder, line in zip(
        FOLDERS, run(code, elsewhere, PYTHONPATH=str(site)).splitlines(), strict=True
    ):
        ours, *bare = line.split(" ")
        assert ours == str(site / "emberl" / folder)
        assert not [place for place in bare if place.startswith((str(site), str(ROOT / folder)))]


MACHINE = re.compile("/" + r"(?:work|home|root)/(?!\.\.)|\bpypi" + r"\.org|python" + r"hosted\.org")


def test_no_file_knows_one_machine_or_a_package_index() -> None:
    top = [
        path
        for path in ROOT.iterdir()
        if path.suffix in (".md", ".toml") or path.name == "Makefile"
    ]
    texts = [
        p
        for f in (*FOLDERS, "tests", ".ci")
        for p in (ROOT / f).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    ]
    found = []
    for path in [*top, *texts]:
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue  # an image
        found += [
            f"{path.relative_to(ROOT)}:{n}: {line.strip()}"
            for n, line in enumerate(lines, 1)
            if MACHINE.search(line)
        ]
    assert found == []
