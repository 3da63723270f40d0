"""Copies of files between the driver's disk and those of nodes that do not share it.

Actors read the model and write their part of a checkpoint under paths of the run. Where such a path
is another disk on another node, the files travel through Ray: before they are read (`push`), and
after they are written (`pull`). The driver's own disk then has all files of the run.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import xxhash
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..rollout.actors import gather

CHUNK = 1 << 26
"""Bytes of one message."""


class NodeFiles:
    """An actor that reads and writes the files of the node it runs on."""

    def has(self, path: str) -> bool:
        return Path(path).exists()

    def hashes(self, folder: str, nested: bool) -> dict[str, str]:
        """The function `hashes` on this node."""
        return hashes(Path(folder), nested)

    def read(self, path: str, offset: int) -> bytes:
        """At most `CHUNK` bytes from `offset` on; b"" at the end of the file."""
        with Path(path).open("rb") as file:
            file.seek(offset)
            return file.read(CHUNK)

    def write(self, path: str, offset: int, data: bytes) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("wb" if offset == 0 else "ab") as file:
            file.write(data)

    def remove(self, folder: str) -> None:
        """Removes the folder, and those above it that become empty."""
        shutil.rmtree(folder, ignore_errors=True)
        for parent in Path(folder).parents:
            try:
                parent.rmdir()
            except OSError:  # it holds something else
                return


class Disks:
    """The nodes of a run's actors that do not share the driver's disk at `run_dir`."""

    def __init__(self, nodes: Sequence[str], run_dir: Path, timeout: float) -> None:
        """nodes: Ray's ids of the actors' nodes. timeout: seconds for one call
        (`cluster.step_timeout`)."""
        self._timeout = timeout
        here = ray.get_runtime_context().get_node_id()
        others = [node for node in dict.fromkeys(nodes) if node != here]
        actors = [_actor_on(node) for node in others]
        self._run_dir = run_dir.absolute()
        marker = self._run_dir / f".disk-{uuid.uuid4().hex}"
        marker.touch()
        try:
            seen = self._each(actors, "has", str(marker))
        finally:
            marker.unlink()
        self._apart = [actor for actor, shared in zip(actors, seen, strict=True) if not shared]
        for actor, shared in zip(actors, seen, strict=True):
            if shared:
                ray.kill(actor)

    @property
    def shared(self) -> bool:
        """Whether every node sees the files that the driver writes."""
        return not self._apart

    def push(self, folder: Path, *, nested: bool = True) -> None:
        """Copies the files of the folder, `nested` with those of its folders, to every other node.
        Raises ValueError if a node has a different file in a path outside the run directory."""
        if not self._apart:
            return
        folder = folder.absolute()
        ours = hashes(folder, nested)
        for actor, theirs in self._hashes(folder, nested):
            missing = [name for name in ours if theirs.get(name) != ours[name]]
            foreign = [name for name in missing if name in theirs]
            if foreign and not folder.is_relative_to(self._run_dir):
                raise ValueError(
                    f"{folder / foreign[0]} is another file on another node of the cluster; make"
                    " them the same on all, or remove it there (it is then copied)"
                )
            for name in missing:
                for offset, data in _chunks(folder / name):
                    self._each([actor], "write", str(folder / name), offset, ray.put(data))

    def pull(self, folder: Path) -> None:
        """Moves the files that other nodes have in the folder here. Raises OSError if one did not
        arrive as it was."""
        folder = folder.absolute()
        for actor, theirs in self._hashes(folder, True):
            for name, digest in theirs.items():
                self._fetch(actor, folder / name)
                if _hash(folder / name) != digest:
                    raise OSError(f"{folder / name} did not arrive as it was written")
        self.drop(folder)

    def drop(self, folder: Path) -> None:
        """Removes the folder on the other nodes."""
        self._each(self._apart, "remove", str(folder.absolute()))

    def close(self) -> None:
        for actor in self._apart:
            ray.kill(actor)
        self._apart = []

    def _hashes(self, folder: Path, nested: bool) -> Iterator[tuple[Any, dict[str, str]]]:
        """(actor, `hashes` of its folder) of each other node."""
        answers = self._each(self._apart, "hashes", str(folder), nested)
        return zip(self._apart, answers, strict=True)

    def _fetch(self, actor: Any, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            while data := self._each([actor], "read", str(path), file.tell())[0]:
                file.write(data)

    def _each(self, actors: Sequence[Any], method: str, *arguments: Any) -> list[Any]:
        return gather(
            [getattr(actor, method).remote(*arguments) for actor in actors],
            who="the files of node",
            what=method,
            timeout=self._timeout,
            key="cluster.step_timeout",
        )


def _actor_on(node: str) -> Any:
    return (
        ray.remote(NodeFiles)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote()
    )


def hashes(folder: Path, nested: bool) -> dict[str, str]:
    """relative path -> xxh3-128 of each file in the folder, `nested` also of those in its folders;
    empty if there is no folder."""
    files = (path for path in sorted(folder.glob("**/*" if nested else "*")) if path.is_file())
    return {str(path.relative_to(folder)): _hash(path) for path in files}


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    for _, data in _chunks(path):
        digest.update(data)
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of each piece of the file; an empty file has one piece."""
    offset = 0
    with path.open("rb") as file:
        while (data := file.read(CHUNK)) or offset == 0:
            yield offset, data
            offset += len(data)
            if not data:
                return
