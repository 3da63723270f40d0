"""How many files, and lines of them, one thing crosses on its way: python walks.py

Runs `configs/quickstart.yaml` for three small steps on its real actors; every process notes which
functions of which files run, and when. A walk is the files of a stretch of the second step:

- prompt to gradient: from the request for the step's groups to the end of its optimizer step, but
  for the files of `rewards/`;
- completion to verdict: the files of `rewards/` in the same stretch, and the two that call them;
- version to engine: from there to the next step.

Files that only look on (`rl/watch/`) or were done before (`rl/config/`) do not count. Lines are
those of whole files. Compiled functions cannot note anything: a file of nothing else is not seen.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOOK = """
import ast, importlib.machinery as machinery, os, sys, time
FOLDER, ROOT = os.environ["EMBERL_WALKS"].split(":")
seen = {}
def note(place):
    now = time.time()
    if now - seen.get(place, 0.0) > 0.02:
        seen[place] = now
        with open(f"{FOLDER}/{os.getpid()}", "a") as file:
            file.write(f"{now} {place}\\n")
class Loader(machinery.SourceFileLoader):
    def get_code(self, fullname):
        path = os.path.realpath(self.get_filename(fullname))
        if not path.startswith((ROOT + "/rl/", ROOT + "/rollout/", ROOT + "/rewards/", ROOT + "/kernels/")):
            return super().get_code(fullname)
        if path.endswith("/compiled_loops.py"):  # numba compiles what it returns
            return super().get_code(fullname)
        tree = ast.parse(self.get_data(path))
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if any(word in ast.unparse(d) for d in node.decorator_list for word in ("compiled", "jit", "intrinsic")):
                continue
            place = f"{path[len(ROOT) + 1:]} {node.name}"
            at = 0 if ast.get_docstring(node, clean=False) is None else 1
            node.body[at:at] = ast.parse(f"__import__('sitecustomize').note({place!r})").body
        return compile(ast.fix_missing_locations(tree), path, "exec")
kinds = (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES), (Loader, [".py"])
sys.path_hooks.insert(0, machinery.FileFinder.path_hook(*kinds))
sys.path_importer_cache.clear()
"""
SETTINGS = (
    "stages=[sft,rl]",
    "sft.steps=20",
    "schedule.steps=3",
    "schedule.prompts_per_step=16",
    "filter.zero_variance=false",
    "eval.size=0",
    "sync.mode=patch",
    "checkpoint.every=0",
    "tracking.wandb=disabled",
)
LOOKING_ON = ("rl/watch/", "rl/config/")
CALLERS = {"rl/answers.py"}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        notes = folder / "notes"
        notes.mkdir()
        (folder / "sitecustomize.py").write_text(HOOK)
        given = {"PYTHONPATH": str(folder), "EMBERL_WALKS": f"{notes}:{ROOT}"}
        config = str(ROOT / "configs" / "quickstart.yaml")
        command = [sys.executable, "-c", "from emberl.rl.cli import main; main()", "train", config]
        arguments = [*SETTINGS, f"run_dir={folder / 'run'}", *sys.argv[1:]]
        subprocess.run(
            [*command, *arguments], env=os.environ | given, cwd=folder, check=True, timeout=1800
        )
        noted = sorted(line for file in notes.iterdir() for line in lines_of(file))
    for walk, files in walks(noted).items():
        lines = sum(len((ROOT / file).read_text().splitlines()) for file in files)
        print(f"{walk}: {len(files)} files, {lines:,} lines")
        print("   ", *sorted(files))


def lines_of(file: Path) -> Iterator[tuple[float, str, str]]:
    """(time, file, function)"""
    for line in file.read_text().splitlines():
        when, path, function = line.split(" ")
        yield float(when), path, function


def walks(noted: list[tuple[float, str, str]]) -> dict[str, set[str]]:
    begun = [when for when, *place in noted if place == ["rl/feed.py", "take"]]
    updated = [when for when, *place in noted if place == ["rl/learner/trainable.py", "update"]]
    trained = max(when for when in updated if when < begun[2])

    def within(start: float, end: float) -> set[str]:
        files = {file for when, file, _ in noted if start <= when < end}
        return {file for file in files if not file.startswith(LOOKING_ON)}

    step = within(begun[1], trained)
    marks = {file for file in step if file.startswith("rewards/")}
    return {
        "prompt to gradient": step - marks,
        "completion to verdict": marks | (step & CALLERS),
        "version to engine": within(trained, begun[2]),
    }


if __name__ == "__main__":
    main()
