"""Plans: what a data set's tests ask for, in three forms that keep every expected answer out of the
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
    """The test asks for the very object (`is True`), so that 1 will not do."""
    wrapped: bool = False
    """The data may have put the value into a list of one: either will do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionPlan:
    """Calls to evaluate after the model's code; the parent compares their values."""

    calls: tuple[Call, ...]
    before: str = ""
    after: str = ""
    """Code in front of and behind the model's, e.g. imports and a test's set-up."""
    from_json: bool = False
    """The expected values come from JSON, which has no tuples: a list will do for one and the
    reverse."""
    usual: bool = False
    """With the imports that the data set's own harness puts in front."""
    functions: tuple[str, ...] = ()
    """Names that the model's code is to define."""
    entry: str = ""
    prompt: str = ""
    """The text that a bare function body continues, as in HumanEval."""
    needs: tuple[str, ...] = ()
    """Installed packages that the code in front or behind imports."""

    @property
    def entries(self) -> tuple[str, ...]:
        return self.functions or ((self.entry,) if self.entry else ())


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgePlan:
    """Test code for the judge (`judge.py`), and the names in it that stand for the model's
    functions and classes."""

    test: str
    names: Mapping[str, str]
    """From the name in the test to the name, or the expression, in the model's code."""
    setup: tuple[str, ...] = ()
    before: str = ""
    after: str = ""
    entry: str = ""
    prompt: str = ""
    extras: tuple[str, ...] = ()
    """Classes of the test's that the model's code may get to see."""
    shared: tuple[str, ...] = ()
    """Names of classes that both sides have: their instances go by value."""
    modules: tuple[str, ...] = ()
    """Names under which the test imports the model's code."""
    collect: bool = False
    """The test's functions are to be run as pytest does."""
    printing: bool = False
    """The test looks at what the model's code prints."""
    packages: tuple[str, ...] = ()
    """Installed packages that the test imports."""
    stubs: tuple[str, ...] = ()
    """Stand-ins for modules that are not in sight: pytest."""
    needs: tuple[str, ...] = ()
    usual: bool = False

    @property
    def entries(self) -> tuple[str, ...]:
        """Names that the model's code is to define."""
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
