"""Loads a user's code by name: `package.module:function`, `./file.py:function`, or an installed
entry point.

The only loader of rewards, losses and advantages. Modules of the working directory are found after
installed ones.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

Function = Callable[..., Any]
_HOUSE = tuple(
    os.path.join(root, name) + os.sep
    for root in (Path(__file__).parents[2], Path(__file__).resolve().parents[2])
    for name in ("rewards", "rl", "rollout", "kernels")
)
"""The folders of emberl's own code, by the path of their import and by their real path."""
_LIBRARIES = tuple(
    sysconfig.get_paths()[name] + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginFile:
    """A user's file as it was where the run was started; other machines may have another version,
    or none."""

    path: str
    """Absolute path."""
    source: bytes
    """Its bytes, in the encoding that the file declares."""

    @staticmethod
    def of(name: str) -> PluginFile | None:
        """The file of `./file.py:function`; None for other names, and if there is no such file."""
        place = name.rpartition(":")[0]
        path = Path(place).expanduser().resolve()
        if not place.endswith(".py") or not path.is_file():
            return None
        return PluginFile(path=str(path), source=path.read_bytes())


def load_function(name: str, group: str, built_in: Sequence[str] = ()) -> Function:
    """The function (or class) of this name; `group`: of entry points. Raises ValueError that says
    what is missing."""
    return import_function(resolve(name, group, built_in))


def resolve(name: str, group: str, built_in: Sequence[str] = ()) -> str:
    """`place:attribute` for a name of this form or of an entry point. Raises ValueError for other
    names."""
    if ":" in name:
        return name
    if name.endswith(".py"):
        raise ValueError(f"{name!r} names no function{_offers(name)}; write {name}:function")
    points = {point.name: point.value for point in entry_points(group=group)}
    if name in points:
        return points[name]
    known = sorted({*built_in, *points})
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"there is no {name!r}{hint} (known: {', '.join(known) or 'none'}; an entry point of"
        f" {group}, package.module:function or ./file.py:function is found too)"
    )


def import_function(target: str, file: PluginFile | None = None) -> Function:
    """Loads the object `place:attribute`; `file`: its code in place of the file on this machine.
    Raises ValueError that says what is missing, with the user's file and line."""
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise ValueError(f"{target!r} must be package.module:function or ./file.py:function")
    try:
        module = _import_file(place, file) if place.endswith(".py") else _import_module(place)
    except (Exception, SystemExit) as error:  # a user's module may do anything when it is imported
        raise ValueError(f"{place} cannot be imported: {describe(error)}") from error
    try:
        loaded: Any = functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        loaded = None
    if not callable(loaded):
        raise ValueError(f"{place} has no function {name!r}{_offered(module)}")
    function: Function = loaded
    return function


def describe(error: BaseException) -> str:
    """An error in one line, with its place in the user's code: `KeyError: 'answer' (mine.py:12 in
    score)`."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [
        f
        for f in frames
        if not f.filename.startswith((*_HOUSE, "<")) and not _in_library(f.filename)
    ]
    # a plugin may be installed itself
    others = [f for f in frames if f"{os.sep}site-packages{os.sep}" in f.filename]
    others = [f for f in others if not f.filename.startswith(_HOUSE)]
    text = f"{type(error).__name__}: {str(error)[:1000]}"
    if not (users or others):
        return text
    last = (users or others)[-1]
    return f"{text} ({last.filename}:{last.lineno} in {last.name})"


def _in_library(filename: str) -> bool:
    return filename.startswith(_LIBRARIES) or f"{os.sep}site-packages{os.sep}" in filename


def _import_module(place: str) -> ModuleType:
    if "" not in sys.path and os.getcwd() not in sys.path:
        # as `python -m` has it; last, so that it hides no installed package
        sys.path.append(os.getcwd())
    return importlib.import_module(place)


def _import_file(place: str, file: PluginFile | None = None) -> ModuleType:
    path = Path(place if file is None else file.path).expanduser().resolve()
    if file is None and not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = f"_emberl_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # it may import its neighbours
    if file is None:
        spec.loader.exec_module(module)
    else:
        exec(compile(file.source, file.path, "exec"), vars(module))
    return module


def _offers(place: str) -> str:
    try:
        return _offered(_import_file(place))
    except (Exception, SystemExit) as error:  # as above
        return f" and cannot be imported: {describe(error)}"


def _offered(module: ModuleType) -> str:
    own = [
        n
        for n, v in vars(module).items()
        if callable(v) and getattr(v, "__module__", "") == module.__name__
    ]
    return f"; it has {', '.join(own) or 'none'}"
