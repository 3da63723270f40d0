"""`View`: the files that stay in sight behind the walls."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


def compiler() -> str | None:
    """The path of g++, or None."""
    return shutil.which("g++", path="/usr/bin:/usr/local/bin")


@dataclass(frozen=True, slots=True)
class View:
    """What stays in sight behind the walls, all of it read-only."""

    binds: tuple[tuple[str, str], ...]
    """Path on the host and behind the walls."""
    masks: tuple[str, ...]
    """Folders hidden inside the binds: installed packages may hold a benchmark's answers."""
    packages: tuple[str, ...]
    """Additions to sys.path."""
    moved: tuple[str, str]
    """The interpreter's prefix on the host and behind the walls, which show no user's name."""

    @property
    def readable(self) -> tuple[str, ...]:
        """The same for walls that move nothing: paths on the host. Devices are files of their own."""
        paths = tuple(path for path, _ in self.binds if not os.path.islink(path))
        return (*paths, "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

    @property
    def host_masks(self) -> tuple[str, ...]:
        """The masks, but for packages that are to be seen, as paths on the host."""
        found = (
            path + mask[len(target) :]
            for path, target in self.binds
            for mask in self.masks
            if mask.startswith(f"{target}/") and not os.path.islink(path)
        )
        return tuple(mask for mask in found if mask not in self.host_packages)

    @property
    def host_packages(self) -> tuple[str, ...]:
        return tuple(path for path, target in self.binds if target in self.packages)


def view_of(preload: Sequence[str]) -> View:
    """The standard library, shared libraries and the compiler; with `preload`, the installed packages as well."""
    triple = str(sysconfig.get_config_var("MULTIARCH") or "none")
    wanted = ["/lib64", "/usr/lib64"]
    for library in ("/lib", "/usr/lib"):
        narrow = os.path.exists(f"/usr/lib/{triple}") and not os.path.islink(library)
        wanted += [f"{library}/{triple}"] if narrow else [library]
    if compiler() is not None:
        wanted += ["/bin", "/usr/bin", "/usr/include", "/usr/lib/gcc", "/usr/libexec/gcc"]
        wanted += ["/usr/local"] if str(compiler()).startswith("/usr/local") else []
    stdlib = os.path.realpath(sysconfig.get_path("stdlib"))
    prefix, place = os.path.dirname(os.path.dirname(stdlib)), "/python"
    library = os.path.dirname(stdlib)
    pairs = {path: path for path in wanted if os.path.exists(path)}
    if prefix == "/usr":
        place = prefix
        pairs[stdlib] = stdlib
        pairs |= {path: path for path in ("/usr/lib/python3", f"{stdlib}/lib-dynload") if os.path.isdir(path)}
    else:
        pairs[library] = place + "/lib"
    packages: list[str] = []
    for number, path in enumerate(p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")):
        if preload and os.path.isdir(path):
            packages.append(f"/packages/{number}")
            pairs[os.path.realpath(path)] = packages[-1]
    binds = tuple(
        (path, target)
        for path, target in sorted(pairs.items())
        if os.path.islink(path)
        or path != target
        or not any(path.startswith(f"{above}/") for above in pairs if above != path)
    )
    masks = tuple(
        target + str(found)[len(path) :]
        for path, target in binds
        if not os.path.islink(path) and not target.startswith("/packages/")
        for pattern in ("site-packages", "dist-packages", "python*/site-packages", "python*/dist-packages")
        for found in sorted(Path(path).glob(pattern))
        if found.is_dir() and not found.is_symlink()
    )
    return View(binds, masks, tuple(packages), (prefix, place))
