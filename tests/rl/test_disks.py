"""What travels between disks, with folders of this machine as the disks of other nodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from emberl.rl import disks
from emberl.rl.disks import Disks, NodeFiles


class Node:
    """The actor of a node that has `root` where the driver has `here`."""

    def __init__(self, here: Path, root: Path) -> None:
        self._here, self._root, self._files = str(here), str(root), NodeFiles()

    def __getattr__(self, method: str) -> Any:
        def remote(path: str, *arguments: Any) -> Any:
            there = path.replace(self._here, self._root)
            return getattr(self._files, method)(there, *arguments)

        return type("Method", (), {"remote": staticmethod(remote)})


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Disks]:
    """Disks of nodes `a` and `b`, of which those not named share the driver's."""
    here = tmp_path / "here"
    (here / "run").mkdir(parents=True)
    context = type("Context", (), {"get_node_id": staticmethod(lambda: "driver")})
    monkeypatch.setattr(disks.ray, "get_runtime_context", context)
    monkeypatch.setattr(disks.ray, "put", lambda data: data)
    monkeypatch.setattr(disks.ray, "kill", lambda actor: None)
    monkeypatch.setattr(disks, "gather", lambda refs, **_: list(refs))
    monkeypatch.setattr(disks, "CHUNK", 4)

    def make(*apart: str) -> Disks:
        roots = {n: tmp_path / n if n in apart else here for n in ("a", "b")}
        monkeypatch.setattr(disks, "_actor_on", lambda node: Node(here, roots[node]))
        return Disks(["driver", "a", "b", "a"], here / "run", 1.0)

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_one_disk_for_all_moves_nothing(cluster: Callable[..., Disks], tmp_path: Path) -> None:
    every = cluster()
    assert every.shared
    (tmp_path / "here/run/x").write_bytes(b"12345")
    every.push(tmp_path / "here/run")
    every.pull(tmp_path / "here/run")
    every.drop(tmp_path / "here/run")
    assert contents(tmp_path / "here/run") == {"x": b"12345"}


def test_files_go_there_in_pieces(cluster: Callable[..., Disks], tmp_path: Path) -> None:
    files = {"empty": b"", "four": b"1234", "nine": b"123456789", "in/it": b"12345"}
    for name, data in files.items():
        path = tmp_path / "here/run/model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    every = cluster("b")
    assert not every.shared
    every.push(tmp_path / "here/run/model", nested=False)
    assert contents(tmp_path / "b/run/model") == {n: d for n, d in files.items() if n != "in/it"}
    (tmp_path / "b/run/model/nine").write_bytes(b"cut")
    every.push(tmp_path / "here/run/model")
    assert contents(tmp_path / "b/run/model") == files
    assert not (tmp_path / "a").exists()
    every.drop(tmp_path / "here/run/model")
    assert not (tmp_path / "b/run").exists(), "nor empty folders above"


def test_files_come_here_and_go_there(cluster: Callable[..., Disks], tmp_path: Path) -> None:
    parts = {"a": {"state/0": b"", "state/1": b"12345678"}, "b": {"state/2": b"123", "x": b"1"}}
    for node, files in parts.items():
        for name, data in files.items():
            path = tmp_path / node / "run/saved" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    (tmp_path / "here/run/saved").mkdir()
    (tmp_path / "here/run/saved/mine").write_bytes(b"0")
    cluster("a", "b").pull(tmp_path / "here/run/saved")
    assert contents(tmp_path / "here/run/saved") == {"mine": b"0", **parts["a"], **parts["b"]}
    assert not contents(tmp_path / "a") and not contents(tmp_path / "b")


def test_a_users_file_is_not_written_over(cluster: Callable[..., Disks], tmp_path: Path) -> None:
    for root, data in (("here", b"ours"), ("a", b"other")):
        path = tmp_path / root / "models/weights"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    with pytest.raises(ValueError, match=r"models/weights is another file on another node"):
        cluster("a").push(tmp_path / "here/models")
    assert contents(tmp_path / "a/models") == {"weights": b"other"}
