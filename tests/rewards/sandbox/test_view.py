"""Which installed packages a sandboxed program can see: those that were asked for, and what they
depend on."""

import os
from pathlib import Path

import pytest
from emberl.rewards.sandbox.pool import Sandbox, SandboxUnavailable
from emberl.rewards.sandbox.view import view_of

SEEN = ["asked", "asked-1.dist-info", "asked_data", "needed.py", "needed-1.dist-info", "space/mine"]
PROGRAM = """
import os, sys
for name in ("asked", "needed", "space.mine", "other", "extra", "space.theirs", "answers"):
    try:
        __import__(name)
        print(name)
    except ImportError:
        pass
for path in PATHS:
    try:
        print(os.listdir(path) if os.path.isdir(path) else open(path).read())
    except OSError:
        pass
print(*sorted(os.listdir(sys.modules["asked"].folder())))
"""


def _install(folder: Path, name: str, files: dict[str, str], requires: str = "") -> None:
    record = [f"{name}-1.dist-info/METADATA", f"{name}-1.dist-info/RECORD", *files]
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n{requires}"
    files = files | {record[0]: metadata, record[1]: "".join(f"{each},,\n" for each in record)}
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "site-packages"
    asked = {
        "asked/__init__.py": (
            "import os\ndef folder(): return os.path.dirname(os.path.dirname(__file__))\n"
        ),
        "asked_data/table.txt": "1",
        "space/mine/__init__.py": "",
    }
    requires = (
        'Requires-Dist: Needed (>=1)\nRequires-Dist: extra; extra == "all"\nRequires-Dist: absent;'
        ' python_version<"3"\n'
    )
    _install(folder, "asked", asked, requires)
    _install(folder, "needed", {"needed.py": ""})
    _install(folder, "extra", {"extra/__init__.py": ""})
    _install(folder, "other", {"other/__init__.py": "secret", "space/theirs/__init__.py": ""})
    (folder / "answers").mkdir()
    (folder / "answers" / "__init__.py").write_text("secret")  # belongs to no distribution
    monkeypatch.syspath_prepend(folder)
    view_of.cache_clear()
    return folder


def test_named_packages_and_their_dependencies(installed: Path) -> None:
    packages = view_of(("asked",)).packages
    assert sorted(packages) == sorted(
        (f"{installed}/{name}", f"/packages/0/{name}") for name in SEEN
    )
    assert view_of(("asked",)).search_path == ["/packages/0"]
    assert view_of(()).packages == view_of(("json",)).packages == ()


def test_a_module_of_no_distribution(installed: Path) -> None:
    assert view_of(("answers",)).packages == ((f"{installed}/answers", "/packages/0/answers"),)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zygote", "bubblewrap", "landlock"])
def test_other_packages_cannot_be_imported_or_read(installed: Path, backend: str) -> None:
    paths = [
        str(installed),
        *(str(each) for each in sorted(installed.rglob("*")) if "secret" in _text(each)),
    ]
    assert len(paths) == 3
    try:
        sandbox = Sandbox(workers=1, backend=backend, preload=["asked"])
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    with sandbox:
        run = sandbox.run_program(PROGRAM.replace("PATHS", repr(paths)))
    seen = sorted({name.split("/")[0] for name in SEEN})
    assert run.stdout.decode().split("\n")[:-1] == [
        "asked",
        "needed",
        "space.mine",
        " ".join(seen),
    ], run.stderr
    assert os.listdir(installed)


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
