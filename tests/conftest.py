"""Real models and tokenizers for tests that need one; skipped with a reason where it cannot be
had."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

# a call of Ray's without a cluster is an error, and does not start or join one for good
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
# No test needs a hub; one that names what is not there would wait for its retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _module(name: str, folder: str = "models") -> ModuleType:
    path = Path(__file__).parent / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# tests import it by this name: `from table_engine import TableEngine`; the environment of
# tests/ascend has the kernels' files alone
if importlib.util.find_spec("emberl") is not None:
    for name in ("table_engine", "listening"):
        sys.modules[name] = _module(name, ".")


@pytest.fixture(autouse=True)
def _no_secrets_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test's configuration took from the environment is masked in no other's texts."""
    masking = sys.modules.get("emberl.rl.config.masking")
    if masking is not None:
        monkeypatch.setattr(masking, "_known", {})
        monkeypatch.setattr(masking, "_kept", {})


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, in float32."""
    source = _module("smollm2")
    try:
        folder: Path = source.fetch(source.cached())
    except (source.UnavailableError, OSError) as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture(scope="session")
def qwen3_tokenizer() -> Path:
    """The directory of Qwen3's tokenizer."""
    source = _module("qwen3_tokenizer")
    try:
        folder: Path = source.fetch(_module("smollm2").cached().with_name(source.NAME))
    except OSError as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """emberl's own, built from a copy, so that no build folder is left in the tree."""
    pytest.importorskip("setuptools")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    root = Path(__file__).parents[1]
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tree)
    for folder in ("rl", "rollout", "rewards", "kernels", "configs"):
        shutil.copytree(root / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    done = subprocess.run(
        command, check=False, cwd=tree, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    [built] = out.glob("emberl-*.whl")
    return built
