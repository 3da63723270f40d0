"""`View`: the files of the host that a sandboxed program can see, all of them read-only."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_INSTALLED = ("site-packages", "dist-packages")


def compiler() -> str | None:
    """The path of g++, or None."""
    return shutil.which("g++", path="/usr/bin:/usr/local/bin")


@dataclass(frozen=True, slots=True)
class View:
    """Pairs of paths: on the host, and in the sandbox if the back end has a root of its own."""

    binds: tuple[tuple[str, str], ...]
    masks: tuple[tuple[str, str], ...]
    """Folders hidden inside the binds, since installed packages may hold a benchmark's answers."""
    packages: tuple[tuple[str, str], ...]
    """Files and folders of the requested packages."""
    moved: tuple[str, str]
    """The interpreter's prefix, which in the sandbox reveals no user's name."""

    @property
    def readable(self) -> tuple[str, ...]:
        """The visible paths on the host. Devices are listed one by one."""
        pairs = (*self.binds, *self.packages)
        return (*(path for path, _ in pairs if not os.path.islink(path)), *_DEVICES)

    @property
    def search_path(self) -> list[str]:
        """Entries to add to `sys.path` so that the packages are found in the sandbox."""
        return sorted({"/".join(target.split("/")[:3]) for _, target in self.packages})


@functools.cache
def view_of(preload: tuple[str, ...]) -> View:
    """The view of the standard library, shared libraries, the compiler, and the packages in
    `preload` with their dependencies."""
    triple = str(sysconfig.get_config_var("MULTIARCH") or "none")
    wanted = ["/lib64", "/usr/lib64"]
    for library in ("/lib", "/usr/lib"):
        narrow = os.path.exists(f"/usr/lib/{triple}") and not os.path.islink(library)
        wanted += [f"{library}/{triple}"] if narrow else [library]
    if compiler() is not None:
        wanted += ["/bin", "/usr/bin", "/usr/include", "/usr/lib/gcc", "/usr/libexec/gcc"]
        wanted += ["/usr/local"] if str(compiler()).startswith("/usr/local") else []
    stdlib = os.path.realpath(sysconfig.get_path("stdlib"))
    library = os.path.dirname(stdlib)
    prefix, place = os.path.dirname(library), "/python"
    pairs = {path: path for path in wanted if os.path.exists(path)}
    if prefix == "/usr":
        place = prefix
        more = (stdlib, "/usr/lib/python3", f"{stdlib}/lib-dynload")
        pairs |= {path: path for path in more if os.path.isdir(path)}
    else:
        pairs[library] = place + "/lib"
    binds = tuple(
        (path, target)
        for path, target in sorted(pairs.items())
        if os.path.islink(path)
        or path != target
        or not any(path.startswith(f"{above}/") for above in pairs if above != path)
    )
    masks = tuple(
        (str(folder), target + str(folder)[len(path) :])
        for path, target in binds
        if not os.path.islink(path)
        for pattern in (*_INSTALLED, *(f"python*/{name}" for name in _INSTALLED))
        for folder in sorted(Path(path).glob(pattern))
        if folder.is_dir() and not folder.is_symlink()
    )
    roots: dict[str, str] = {}
    packages: dict[str, str] = {}
    for root, entry in _package_entries(preload):
        roots.setdefault(root, f"/packages/{len(roots)}")
        packages[f"{root}/{entry}"] = f"{roots[root]}/{entry}"
    return View(binds, masks, tuple(packages.items()), (prefix, place))


def _package_entries(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields folder and entry, e.g. `(".../site-packages", "numpy.libs")`, of all files that the
    modules `names` need: those of their distributions and their dependencies, without extras."""
    names = [name for name in names if name not in sys.stdlib_module_names]
    if not names:
        return
    owners = importlib.metadata.packages_distributions()
    waiting = [owner for name in names for owner in owners.get(name, ())]
    seen: set[str] = set()
    entries: dict[tuple[str, str], None] = {}
    while waiting:
        key = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if key in seen:
            continue
        seen.add(key)
        try:
            distribution = importlib.metadata.distribution(key)
        except importlib.metadata.PackageNotFoundError:  # a dependency of another platform
            continue
        entries |= dict.fromkeys(_files(distribution, owners))
        for requirement in distribution.requires or ():
            match = re.match(r"[\w.-]+", requirement)
            if match and "extra ==" not in requirement.partition(";")[2]:
                waiting.append(match[0])
    for name in names:  # one that was not installed, or only linked to its source
        spec = importlib.util.find_spec(name)
        places = spec and (spec.submodule_search_locations or [str(spec.origin)])
        entries |= dict.fromkeys(os.path.split(os.path.realpath(place)) for place in places or ())
    yield from entries


def _files(
    distribution: importlib.metadata.Distribution, owners: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, str]]:
    root = os.path.realpath(str(distribution.locate_file("")))
    for file in distribution.files or ():
        if file.parts[0] in ("..", "__pycache__") or file.suffix == ".pth":
            continue
        shared = len(set(owners.get(file.parts[0], ()))) > 1  # a namespace package of several
        entry = "/".join(file.parts[: 2 if shared else 1])
        if os.path.exists(f"{root}/{entry}"):
            yield root, entry
