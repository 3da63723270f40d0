"""What a person reads of an evaluation."""

from __future__ import annotations

from io import StringIO

from emberl.rl.evaluation.report import show
from rich.console import Console


def test_names_are_shown_as_they_are_whatever_rich_makes_of_brackets() -> None:
    row = {
        "set": "own [red]",
        "budget": None,
        "problems": 2,
        "mean@1": {"value": 0.5, "interval": [0.0, 1.0]},
        "tokens": 3.0,
        "truncated": 0.0,
        "unparseable": 0.0,
        "verifier_errors": 0.0,
    }
    out = StringIO()
    show({"model": "runs/[/a]", "sets": [row]}, Console(file=out, width=120))
    assert "runs/[/a]" in out.getvalue() and "own [red]" in out.getvalue()
