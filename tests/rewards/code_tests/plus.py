"""Rows of HumanEval and MBPP in the form of their Plus sets, and wrong programs made of their
solutions by mutation.

The Plus sets cannot be had here, so that their form is made: inputs of the original assertions and
small changes of them, results of the reference solution, and evalplus's `assertion` with numpy in
the `test` column.
"""

from __future__ import annotations

import ast
import copy
import gzip
import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layouts import plus_check, plus_module  # type: ignore[import-not-found]

DATA = Path(__file__).parents[4] / "shared" / "data"


def humaneval() -> list[dict[str, Any]]:
    text = gzip.decompress((DATA / "humaneval" / "HumanEval.jsonl.gz").read_bytes())
    return [json.loads(line) for line in text.splitlines()]


def mbpp() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "mbpp" / "mbpp.jsonl").open()]


def _inputs(tests: str, names: set[str]) -> list[list[Any]]:
    """The arguments of the calls in assertions, as far as they are literals."""
    found = []
    for node in ast.walk(ast.parse(tests)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in names
            and not node.keywords
        ):
            try:
                found.append([ast.literal_eval(argument) for argument in node.args])
            except ValueError:
                continue
    return found


def _near(value: Any, rng: random.Random) -> Any:
    """A value of the same type, a little different."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice((-1, 1, 2))
    if isinstance(value, float):
        return value + rng.choice((-0.5, 0.25, 1.0))
    if isinstance(value, str):
        return value[1:] if len(value) > 1 else value + "a"
    if isinstance(value, list | tuple) and value:
        at = rng.randrange(len(value))
        items = (
            [*value[:at], _near(value[at], rng), *value[at + 1 :]]
            if rng.random() < 0.7
            else list(value[:-1])
        )
        return type(value)(items)
    return value


def _late(*_: object) -> None:
    raise TimeoutError("an input that the solution takes long for")


def _plus(code: str, name: str, inputs: list[list[Any]], seed: int) -> tuple[str, str] | None:
    """Texts of inputs and results; None where the solution gives no plain values."""
    rng = random.Random(seed)
    signal.signal(signal.SIGALRM, _late)
    namespace: dict[str, Any] = {"__name__": "reference"}
    exec(code, namespace)  # the data set's own solution
    more = [[_near(argument, rng) for argument in rng.choice(inputs)] for _ in range(12)]
    kept, results = [], []
    for number, arguments in enumerate([*inputs, *more]):
        if any(isinstance(a, int) and abs(a) > 10_000 for a in arguments) and number >= len(inputs):
            continue
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            try:
                result = namespace[name](*copy.deepcopy(arguments))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if (
                ast.literal_eval(repr(result)) != result
                or ast.literal_eval(repr(arguments)) != arguments
            ):
                return None
        except Exception:  # an input that the solution does not take
            if number < len(inputs):
                return None
            continue
        kept.append(arguments)
        results.append(result)
    return (repr(kept), repr(results)) if kept else None


def humaneval_plus(step: int = 1) -> Iterator[tuple[dict[str, Any], str]]:
    """Every `step`th row, with its solution."""
    for number, row in enumerate(humaneval()[::step]):
        code = row["prompt"] + row["canonical_solution"]
        inputs = _inputs(row["test"], {"candidate"})
        made = _plus(code, row["entry_point"], inputs, number) if inputs else None
        if made is not None:
            yield row | {"test": plus_check(*made)}, code


def mbpp_plus(step: int = 1) -> Iterator[tuple[dict[str, Any], str]]:
    for number, row in enumerate(mbpp()[::step]):
        if row.get("test_setup_code"):
            continue
        defined = {n.name for n in ast.parse(row["code"]).body if isinstance(n, ast.FunctionDef)}
        tests = "\n".join(row["test_list"])
        called = [
            n.func.id
            for n in ast.walk(ast.parse(tests))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        ]
        name = next((each for each in called if each in defined), None)
        inputs = _inputs(tests, {name}) if name else []
        made = _plus(row["code"], name, inputs, number) if inputs else None
        if made is not None:
            yield (
                row
                | {
                    "test": plus_module(*made, f"assertion({name}(*inp), exp, 0)"),
                    "test_imports": [],
                },
                row["code"],
            )


_SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Mod: ast.FloorDiv,
    ast.Div: ast.FloorDiv,
}


def mutants(code: str, seed: int, count: int) -> list[str]:
    """Programs with one place changed: an operator, a constant, a returned value, a condition, a
    statement left out."""
    tree = ast.parse(code)
    places = [(i, kind) for i, node in enumerate(ast.walk(tree)) for kind in _changes(node)]
    random.Random(seed).shuffle(places)
    found: list[str] = []
    for at, kind in places:
        changed = copy.deepcopy(tree)
        _change(list(ast.walk(changed))[at], kind)
        text = ast.unparse(ast.fix_missing_locations(changed))
        if text not in found and text != ast.unparse(tree):
            found.append(text)
        if len(found) == count:
            break
    return found


def _changes(node: ast.AST) -> list[str]:
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in _SWAPS:
        return ["operator"]
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
        return ["compare"]
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return ["constant"]
    if isinstance(node, ast.Return) and node.value is not None:
        return ["none", "wrapped"]
    if isinstance(node, ast.If | ast.For) and len(node.body) > 1:
        return ["shorter"]
    return []


def _change(node: Any, kind: str) -> None:
    if kind == "operator":
        node.op = _SWAPS[type(node.op)]()
    elif kind == "compare":
        node.ops[0] = _SWAPS[type(node.ops[0])]()
    elif kind == "constant":
        node.value = node.value + 1
    elif kind == "none":
        node.value = ast.Constant(None)
    elif kind == "wrapped":
        node.value = ast.List([node.value], ast.Load())
    else:
        node.body = node.body[:-1]


def plainly(code: str, columns: dict[str, Any]) -> str:
    """The program that the data set's own harness would run: solution and tests in one."""
    if columns.get("entry_point"):
        return (
            f"{columns['prompt']}\n   "
            f" pass\n{code}\n{columns['test']}\ncheck({columns['entry_point']})\n"
        )
    tests = columns.get("test") or "\n".join(columns["test_list"])
    return "\n".join(
        [*(columns.get("test_imports") or ()), code, columns.get("test_setup_code") or "", tests]
    )
