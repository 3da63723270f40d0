"""Plans: a row's tests in one of three forms, all of which keep the expected answers out of the
model's sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call, e.g. `Call(source="add(2, 3)", expected=5)`."""

    source: str
    expected: Any
    """In the plain JSON form of `child.encode`."""
    identical: bool = False
    """The test compares by identity (`is True`), so that 1 does not pass."""
    wrapped: bool = False
    """The data may hold the value in a list of one; the value and the list pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionPlan:
    """Calls that are evaluated after the model's code; this process compares their values."""

    calls: tuple[Call, ...]
    before: str = ""
    after: str = ""
    """Code before and after the model's, e.g. imports and a test's set-up."""
    from_json: bool = False
    """The expected values come from JSON, which has no tuples: a list passes for a tuple and the
    reverse."""
    usual: bool = False
    """Whether the imports that the data set's own harness makes are added."""
    functions: tuple[str, ...] = ()
    """Names that the model's code has to define."""
    entry: str = ""
    prompt: str = ""
    """The text that a bare function body continues, as in HumanEval."""
    needs: tuple[str, ...] = ()
    """Installed packages that `before` and `after` import."""

    @property
    def entries(self) -> tuple[str, ...]:
        return self.functions or ((self.entry,) if self.entry else ())


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgePlan:
    """Test code for the judge (`judge.py`), and its names for the model's functions and classes."""

    test: str
    names: Mapping[str, str]
    """From the name in the test to the name or expression in the model's code."""
    setup: tuple[str, ...] = ()
    before: str = ""
    after: str = ""
    entry: str = ""
    prompt: str = ""
    extras: tuple[str, ...] = ()
    """Source of classes of the test that the model's code may receive."""
    shared: tuple[str, ...] = ()
    """Names of classes that both sides have, so that their instances are sent by value."""
    modules: tuple[str, ...] = ()
    """Names under which the test imports the model's code."""
    collect: bool = False
    """Whether the test's functions are collected and run as by pytest."""
    printing: bool = False
    """Whether the test reads what the model's code prints."""
    packages: tuple[str, ...] = ()
    """Installed packages that the test imports."""
    stubs: tuple[str, ...] = ()
    """Stand-ins for modules that the sandbox does not show: pytest."""
    needs: tuple[str, ...] = ()
    usual: bool = False

    @property
    def entries(self) -> tuple[str, ...]:
        """Names that the model's code has to define."""
        return (
            (self.entry,)
            if self.entry
            else tuple(name.split("(")[0] for name in self.names.values())
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramPlan:
    """Inputs and expected outputs of a whole program."""

    cases: tuple[tuple[str, str], ...]

    @property
    def entries(self) -> tuple[str, ...]:
        return ()


Plan = FunctionPlan | JudgePlan | ProgramPlan
