"""Which rows a tracker has had, over all attempts of a run, so that a step which a resumed run does
again stands there once, as it was first done."""

from __future__ import annotations

from pathlib import Path

SENT = "sent"
"""`<run_dir>/<tracker>_sent`: a line for each row."""
TABLE = "table"
"""How the key of a table's rows begins: these may wait in the tracker."""


class Sent:
    """The rows of one tracker; a row's key is of its stage, axis, step and kind."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self._file = run_dir / f"{name}_{SENT}"
        known = self._file.read_text().splitlines() if self._file.is_file() else []
        self._earlier = frozenset(known)
        self._waiting: list[str] = []

    def __contains__(self, key: str) -> bool:
        """Whether an earlier attempt sent it."""
        return key in self._earlier

    def add(self, key: str | None, rows_waiting: bool) -> None:
        """A row was given to the tracker (None: none was). rows_waiting: rows of its table are kept
        back; theirs are noted once they are not, as a kill would lose them."""
        self._waiting += [] if key is None else [key]
        now = [k for k in self._waiting if not (rows_waiting and k.startswith(TABLE))]
        if now:
            self._waiting = [k for k in self._waiting if k not in now]
            with self._file.open("a") as file:
                file.write("".join(f"{k}\n" for k in now))


def forget_sent(run_dir: Path) -> None:
    """Has trackers get what is done again, too, since it will be another thing."""
    for file in run_dir.glob(f"*_{SENT}"):
        file.unlink()
