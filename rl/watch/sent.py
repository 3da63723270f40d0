"""The rows that a tracker has received over all attempts of a run, so that a step which a resumed
run repeats is logged once, as it was first done."""

from __future__ import annotations

from pathlib import Path

SENT = "sent"
"""Suffix of `<run_dir>/<tracker>_sent`, which has a line for each row."""
TABLE = "table"
"""The beginning of the keys of a table's rows, which the tracker may hold back."""


class Sent:
    """The rows of one tracker; a row's key is of its stage, axis, step and kind."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self._file = run_dir / f"{name}_{SENT}"
        known = self._file.read_text().splitlines() if self._file.is_file() else []
        self._earlier = frozenset(known)
        self._waiting: list[str] = []

    def __contains__(self, key: str) -> bool:
        """Whether an earlier attempt sent this row."""
        return key in self._earlier

    def add(self, key: str | None, rows_waiting: bool) -> None:
        """Notes a row as sent (None: no row). rows_waiting: the tracker holds rows of its table
        back, so their keys are noted later: a kill would lose the rows."""
        self._waiting += [] if key is None else [key]
        now = [k for k in self._waiting if not (rows_waiting and k.startswith(TABLE))]
        if now:
            self._waiting = [k for k in self._waiting if k not in now]
            with self._file.open("a") as file:
                file.write("".join(f"{k}\n" for k in now))


def forget_sent(run_dir: Path) -> None:
    """Forgets all rows, for an attempt that does other things in the same steps."""
    for file in run_dir.glob(f"*_{SENT}"):
        file.unlink()
