"""Plans for tests that are Python code: assertions, `check(candidate)`, modules for pytest or
unittest.

Assertions that compare a call with a literal become a `FunctionPlan`; all others go to the judge.
The model's names are those that the test uses and does not bind. Raises ValueError for tests that
are known to be ungradable.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable

from ..sandbox.child import encode
from .names import (
    BUILT_IN,
    Imports,
    asked_names,
    bound,
    free_names,
    imported,
    packages_of,
    parsed,
    parses,
)
from .plans import Call, FunctionPlan, JudgePlan, Plan

_REFUSED = {
    "subprocess",
    "socket",
    "requests",
    "tempfile",
    "multiprocessing",
    "mock",
    "shutil",
    "urllib",
    "http",
}
_FIXTURES = {
    "tmp_path",
    "tmpdir",
    "monkeypatch",
    "mocker",
    "caplog",
    "capfd",
    "request",
    "benchmark",
}


@functools.lru_cache(maxsize=4096)
def asserts_plan(
    tests: tuple[str, ...],
    imports: tuple[str, ...],
    setup: str,
    entry: str,
    defined: frozenset[str],
) -> Plan:
    """The plan for MBPP's assertions on functions that they name. The set-up runs after the model's
    code, whose classes it may use.

    `defined`: names that the row's own solution defines, since a tested function may have the name
    of a built-in one.
    """
    before, source = "\n".join(imports), "\n".join(tests)
    tree = parsed(source, "test_list")
    given = bound(parsed(before, "test_imports")) | bound(parsed(setup, "test_setup_code"))
    free = free_names(source)
    names = {entry} if entry else (free - given - BUILT_IN) | (free & defined) or _outermost(tree)
    if not names:
        raise ValueError(
            f"the tests call no function that they do not define: {source[:200]!r}; give"
            " entry_point"
        )
    if (calls := _calls(tree.body, names)) is not None:
        needs = packages_of(f"{before}\n{setup}")
        return FunctionPlan(
            calls=calls, before=before, after=setup, functions=tuple(sorted(names)), needs=needs
        )
    return judge_plan(
        source,
        before=before,
        after=setup,
        setup=(before, setup),
        hints={entry} - {""},
        defined=defined,
        what="test_list",
    )


@functools.lru_cache(maxsize=4096)
def check_plan(prompt: str, test: str, entry: str) -> Plan:
    """The plan for the function `check(candidate)` of HumanEval and LeetCode. The imports and
    helpers of the prompt run before the model's code."""
    tree = parsed(test, "test")
    check = next(
        (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check"), None
    )
    if check is None:
        raise ValueError("the column 'test' defines no function check(candidate)")
    whole = next((text for text in (prompt, f"{prompt.rstrip()}\n    pass\n") if parses(text)), "")
    prompt = prompt if whole else ""  # where it is no code but a question
    before = prompt.partition(f"def {entry}(")[0]
    needs = packages_of(before)
    calls = None if _calls_other(tree) else _calls(check.body, {check.args.args[0].arg})
    bare = entry if entry.isidentifier() else ""
    if calls is not None:
        after = f"{check.args.args[0].arg} = {entry}"
        functions = () if bare else (entry.split("(")[0],)
        return FunctionPlan(
            calls=calls,
            before=before,
            after=after,
            functions=functions,
            entry=bare,
            prompt=prompt,
            needs=needs,
        )
    return judge_plan(
        f"{test}\ncheck(candidate)\n",
        before=before,
        setup=(whole,),
        hints={entry} if bare else set(),
        entry=bare,
        prompt=prompt,
        aliases={"candidate": entry},
        what="test",
    )


@functools.lru_cache(maxsize=4096)
def module_plan(
    test: str, before: str, setup: str, entry: str, defined: frozenset[str], hints: frozenset[str]
) -> Plan:
    """The plan for a test module of KodCode, BigCodeBench or MBPP+, which tests when it runs or
    through the functions and classes that pytest or unittest collects."""
    return judge_plan(
        test,
        before=before,
        after=setup,
        setup=(before, setup),
        hints={entry} | hints if entry else set(hints),
        defined=defined,
        what="test",
    )


def judge_plan(
    source: str,
    *,
    before: str = "",
    after: str = "",
    setup: tuple[str, ...] = (),
    hints: Iterable[str] = (),
    entry: str = "",
    prompt: str = "",
    aliases: dict[str, str] | None = None,
    defined: frozenset[str] = frozenset(),
    what: str,
) -> JudgePlan:
    """The plan for test code of any form. Raises ValueError for test code that the judge cannot
    run."""
    tree = _without_runners(parsed(source, what))
    _refuse(tree)
    imports = Imports(tree, defined)
    names, modules = asked_names(tree, source, imports, setup, set(hints), defined, aliases or {})
    kept, extras, shared = _sort_classes(tree, names)
    collected = _collected(kept)
    if not collected and not _acts(kept):
        raise ValueError(
            "the tests define functions and call none, nor are they named test_...:"
            f" {source[:200]!r}"
        )
    words = {n.id for n in ast.walk(kept) if isinstance(n, ast.Name)} | {
        n.attr for n in ast.walk(kept) if isinstance(n, ast.Attribute)
    }
    for part in (before, after, prompt):
        shared |= {n.name for n in parsed(part, what).body if isinstance(n, ast.ClassDef)}
    return JudgePlan(
        test=ast.unparse(kept),
        names={name: name for name in sorted(names | {e for e, _ in extras if e})}
        | (aliases or {}),
        setup=tuple(
            part
            for part in (*(f"import {name}" for name in sorted(modules)), *setup)
            if part.strip()
        ),
        before=before,
        after=after,
        entry=entry,
        prompt=prompt,
        extras=tuple(text for _, text in extras),
        shared=tuple(sorted(shared)),
        modules=tuple(sorted(imports.modules)),
        collect=bool(collected),
        printing=bool(
            words & {"stdout", "StringIO", "capsys", "redirect_stdout"}
            or _arguments(kept) & {"capsys"}
        ),
        packages=tuple(sorted(imports.packages)),
        stubs=("pytest",) if imports.pytest or _arguments(kept) - {"self"} else (),
        needs=packages_of(f"{before}\n{after}"),
    )


# --- plain assertions


def _calls(statements: Iterable[ast.stmt], names: set[str]) -> tuple[Call, ...] | None:
    """The calls of plain assertions; None if a statement is anything else."""
    calls: list[Call] = []
    for statement in statements:
        if isinstance(statement, ast.Pass) or (
            isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        ):
            continue  # a docstring
        if not isinstance(statement, ast.Assert):
            return None
        if isinstance(statement.test, ast.Constant) and statement.test.value:
            continue  # `assert True` says nothing
        if (call := _call(statement.test, names)) is None:
            return None
        calls.append(call)
    return tuple(calls) or None


def _calls_other(tree: ast.Module) -> bool:
    """Whether a module does more at its top level than define `check`, import and assign."""
    quiet = (ast.FunctionDef, ast.Assign, ast.Import, ast.ImportFrom)
    return not all(isinstance(n, quiet) or _is_text(n) for n in tree.body)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _call(test: ast.expr, names: set[str]) -> Call | None:
    def tested(node: ast.expr) -> bool:
        return (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
        )

    def of_instance(node: ast.expr) -> bool:
        """Whether a node is a call such as `Solution().method(...)`."""
        return (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and tested(node.func.value)
        )

    if tested(test):  # only the value's truth counts, and every object has one
        return Call(source=f"not not {ast.unparse(test)}", expected=True)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) and tested(test.operand):
        return Call(source=ast.unparse(test), expected=True)
    if (
        isinstance(test, ast.Compare)
        and len(test.ops) == 1
        and isinstance(test.ops[0], ast.Eq | ast.Is)
    ):
        left, right = test.left, test.comparators[0]
        if not tested(left) and not of_instance(left):
            left, right = right, left
        if tested(left) or of_instance(left):
            try:
                expected = encode(ast.literal_eval(right))
            except (ValueError, TypeError):  # the expected side is more than a literal
                return None
            return Call(
                source=ast.unparse(left),
                expected=expected,
                identical=isinstance(test.ops[0], ast.Is),
            )
    return None


def _outermost(tree: ast.Module) -> set[str]:
    """The one function whose value every assertion compares, even if it has the name of a built-in;
    else empty."""
    sides = [
        n.test.left if isinstance(n.test, ast.Compare) else n.test
        for n in tree.body
        if isinstance(n, ast.Assert)
    ]
    names = {
        side.func.id
        for side in sides
        if isinstance(side, ast.Call) and isinstance(side.func, ast.Name)
    }
    return names if len(names) == 1 else set()


# --- modules of tests


def _refuse(tree: ast.Module) -> None:
    """Raises ValueError if a test uses anything that the judge does not support."""
    for module, names in imported(tree):
        root = module.partition(".")[0]
        if (
            root in _REFUSED
            or module == "unittest.mock"
            or (module == "unittest" and "mock" in names)
        ):
            raise ValueError(f"the tests import {module}, which the judge cannot give them")
    if fixtures := _arguments(tree) & _FIXTURES:
        raise ValueError(
            f"the tests need pytest's {', '.join(sorted(fixtures))}, which the judge does not have"
        )
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "open"
        ):
            raise ValueError("the tests open a file, and there are none in the sandbox")


def _arguments(tree: ast.AST) -> set[str]:
    tests = [
        n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test")
    ]
    return {argument.arg for test in tests for argument in test.args.args}


def _without_runners(tree: ast.Module) -> ast.Module:
    """The test without calls of `unittest.main()` and `pytest.main()`, also under `if __name__ ==
    "__main__"`."""

    def runs(node: ast.stmt) -> bool:
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            return any(
                word in ast.unparse(node) for word in ("unittest.main", "pytest.main")
            ) or _collected(tree)
        return isinstance(node, ast.Expr) and ast.unparse(node).startswith(
            ("unittest.main(", "pytest.main(")
        )

    body: list[ast.stmt] = []
    for node in tree.body:
        if runs(node):
            continue
        body += (
            node.body
            if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            else [node]
        )
    return ast.Module(body=body, type_ignores=[])


def _is_case(node: ast.ClassDef) -> bool:
    return node.name.startswith("Test") or any(
        "TestCase" in ast.unparse(base) for base in node.bases
    )


def _collected(tree: ast.Module) -> bool:
    return any(
        (isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name.startswith("test"))
        or (isinstance(n, ast.ClassDef) and _is_case(n))
        for n in tree.body
    )


def _acts(tree: ast.Module) -> bool:
    quiet = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    return not all(isinstance(node, quiet) or _is_text(node) for node in tree.body)


def _sort_classes(
    tree: ast.Module, names: set[str]
) -> tuple[ast.Module, list[tuple[str, str]], set[str]]:
    """Divides the classes of a test: one built on a class of the model's goes to the model's side,
    other helper classes to both. Returns the remaining test, the source of the classes for the
    model's side (the former with their names) and the names of the latter."""
    kept: list[ast.stmt] = []
    extras: list[tuple[str, str]] = []
    shared: set[str] = set()
    models = set(names)
    for node in tree.body:
        plain = isinstance(node, ast.ClassDef) and not _is_case(node)
        if not plain or any(isinstance(each, ast.Assert) for each in ast.walk(node)):
            kept.append(node)
            continue
        assert isinstance(node, ast.ClassDef)
        if any(isinstance(base, ast.Name) and base.id in models for base in node.bases):
            models.add(node.name)
            extras.append((node.name, ast.unparse(node)))
        else:
            kept.append(node)
            extras.append(("", ast.unparse(node)))
            shared.add(node.name)
    return ast.Module(body=kept, type_ignores=[]), extras, shared
