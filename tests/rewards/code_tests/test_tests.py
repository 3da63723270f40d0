"""The forms of tests that data sets have, as plans; what cannot be graded is named."""

import ast
import base64
import json
import os
import pickle
import zlib

import pytest
from emberl.rewards.code_tests.plans import Call, FunctionPlan, JudgePlan, ProgramPlan
from emberl.rewards.code_tests.tests import plan_of


def test_assertions_become_calls() -> None:
    columns = {
        "test_list": [
            "assert f(1, [2]) == (3, 'x')",
            "assert (-4) == f(2)",
            "assert f(3)",
            "assert not f(4)",
        ]
    }
    plan = plan_of(columns | {"test_imports": ["import math"], "test_setup_code": "y = 1"})
    assert plan == FunctionPlan(
        calls=(
            Call(source="f(1, [2])", expected={"tuple": [3, "x"]}),
            Call(source="f(2)", expected=-4),
            Call(source="not not f(3)", expected=True),
            Call(source="not f(4)", expected=True),
        ),
        functions=("f",),
        before="import math",
        after="y = 1",
    )
    assert "3, 'x'" not in str([call.source for call in plan.calls])


@pytest.mark.parametrize(
    "test",
    [
        "assert math.isclose(f(2), 3.5, rel_tol=0.1)",
        "assert set(f(1)) == set((1, 2))",
        "assert abs(f(1) - 2) < 3",
        "assert f(2) == sys.getsizeof(3)",
        "x = f(1)\nassert x == 2",
        "assert f(1) == 2 and f(3) == 4",
        "assert f(1) != 2",
    ],
)
def test_other_test_code_goes_to_the_judge(test: str) -> None:
    plan = plan_of({"test_list": [test], "test_imports": ["import math"]})
    assert isinstance(plan, JudgePlan)
    assert plan.names == {"f": "f"}


def test_a_tested_function_may_be_named_like_a_builtin() -> None:
    plan = plan_of({"test_list": ["assert sum(1, 2) == 3", "assert sum(2, 2) == 4"]})
    assert isinstance(plan, FunctionPlan) and plan.calls[0] == Call(source="sum(1, 2)", expected=3)


def test_humaneval() -> None:
    prompt = 'import math\n\ndef f(x):\n    """Doubles."""\n'
    test = (
        "METADATA = {}\ndef check(candidate):\n    assert candidate(2) == 4, 'two'\n    assert"
        " True\n"
    )
    plan = plan_of({"prompt": prompt, "test": test, "entry_point": "f"})
    assert isinstance(plan, FunctionPlan)
    assert plan.calls == (Call(source="candidate(2)", expected=4),)
    assert (plan.before, plan.after) == ("import math\n\n", "candidate = f")
    loop = "def check(candidate):\n    for i in range(3):\n        assert candidate(i) == 2 * i\n"
    judged = plan_of({"prompt": prompt, "test": loop, "entry_point": "f"})
    assert isinstance(judged, JudgePlan) and judged.names == {"candidate": "f", "f": "f"}


CASES = (("1\n", "2\n"), ("3\n", "6\n"))
APPS = {"inputs": ["1\n", "3\n"], "outputs": ["2\n", "6\n"]}


def packed(value: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


@pytest.mark.parametrize(
    "columns",
    [
        {"tests": [{"input": "1\n", "output": "2\n"}, {"input": "3\n", "output": "6\n"}]},
        {"test": json.dumps([{"input": {"stdin": g}, "output": {"stdout": w}} for g, w in CASES])},
        {"input_output": json.dumps(APPS)},
        {"test": packed({"input_output": json.dumps(APPS | {"fn_name": None})})},
        {
            "public_tests": {"input": ["1\n"], "output": ["2\n"]},
            "private_tests": {"input": ["3\n"], "output": ["6\n"]},
        },
        {
            "public_test_cases": json.dumps(
                [{"input": "1\n", "output": "2\n", "testtype": "stdin"}]
            ),
            "private_test_cases": packed(
                json.dumps([{"input": "3\n", "output": "6\n", "testtype": "stdin"}])
            ),
        },
    ],
)
def test_forms_of_inputs_and_outputs(columns: dict) -> None:
    assert plan_of(columns) == ProgramPlan(cases=CASES)


def test_the_answer_may_hold_the_tests() -> None:
    assert plan_of({}, json.dumps(APPS)) == ProgramPlan(cases=CASES)


def test_functional_form() -> None:
    metadata = json.dumps({"func_name": "f"})
    plan = plan_of({"tests": [{"input": '[1, 2]\n"x"', "output": "[3]"}], "metadata": metadata})
    assert isinstance(plan, FunctionPlan) and plan.from_json
    assert plan.calls[0].source.endswith("([1, 2], 'x')") and plan.calls[0].expected == [3]


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/emberl-evil",)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "no tests"),
        ({"test_list": ["assert f(1 == 2"]}, "test_list"),
        ({"test_list": ["assert 1 == 1"]}, "entry_point"),
        ({"test": "x = 1", "entry_point": "f"}, "check"),
        ({"tests": "[1"}, "no JSON"),
        ({"tests": [1]}, "unknown form"),
        ({"input_output": {"inputs": ["1"], "outputs": []}}, "1 inputs but 0 outputs"),
        ({"tests": [{"input": "x", "output": "1"}], "fn_name": "f"}, "no JSON"),
        ({"tests": [{"input": "1", "output": "1"}], "fn_name": "f(); g"}, "no name"),
        ({"private_test_cases": packed(Evil())}, "only plain values"),
        ({"private_test_cases": "%%%"}, "packed JSON"),
        ({"test": "def helper():\n    assert f(1) == 1\n"}, "call none"),
        (
            {"test": "from solution import f\ndef test_a(tmp_path):\n    assert f(tmp_path)\n"},
            "tmp_path",
        ),
        (
            {"test": "from unittest.mock import patch\ndef test_a():\n    assert f(1)\n"},
            "unittest.mock",
        ),
        ({"test": "def test_a():\n    assert f(1) == open('x').read()\n"}, "open a file"),
        ({"test_list": ["assert np.allclose(f(1), 1)"]}, "nobody defines"),
        ({"tests": [{"input": 5, "output": {"a": 1}}]}, "neither text nor lines"),
    ],
)
def test_tests_that_cannot_be_read(columns: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(columns)


def test_a_parser_that_another_thread_disturbs_is_asked_again(monkeypatch) -> None:
    parse, failures = ast.parse, iter([SystemError("recursion depth mismatch")] * 3)

    def disturbed(*arguments, **keywords):
        if (error := next(failures, None)) is not None:
            raise error
        return parse(*arguments, **keywords)

    monkeypatch.setattr(ast, "parse", disturbed)
    plan = plan_of({"test_list": ["assert disturbed_once(2) == [4]"]})
    assert [(call.source, call.expected) for call in plan.calls] == [("disturbed_once(2)", [4])]
    assert next(failures, None) is None
