"""Code rewards: what counts as the program, the forms of tests, comparison, verdicts, and the reference solutions."""

import base64
import gzip
import json
import os
import pickle
import signal
import threading
import zlib
from pathlib import Path

import pytest
from emberl.rewards.code_tests.compare import Reply, canonical, equal, is_plain, parse_reply, same_output
from emberl.rewards.code_tests.extract import extract_program
from emberl.rewards.code_tests.plans import Call, FunctionPlan, JudgePlan, ProgramPlan
from emberl.rewards.code_tests.reward import CodeReward
from emberl.rewards.code_tests.tests import plan_of
from emberl.rewards.inputs import RewardInput
from emberl.rewards.processes import descendants
from emberl.rewards.sandbox import backends as walls
from emberl.rewards.sandbox.child import encode, source_of
from emberl.rewards.sandbox.pool import SandboxUnavailable
from emberl.rewards.verdict import Status
from hypothesis import given
from hypothesis import strategies as st

DATA = Path(__file__).parents[3] / "shared" / "data"
slow = pytest.mark.slow
ADD = {"test_list": ["assert add(2, 3) == 5", "assert add(0, 0) == 0"]}


@pytest.fixture(scope="module")
def reward():
    try:
        found = CodeReward(timeout=1.0, memory_mb=256)
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield found
    found.close()


def fenced(code: str, tag: str = "python") -> str:
    return f"Here you are:\n```{tag}\n{code}\n```\n"


def item(code: str, columns: dict, **more) -> RewardInput:
    return RewardInput(completion=fenced(code), columns=columns, **more)


# --- the program


@pytest.mark.parametrize(
    ("completion", "language", "source", "found"),
    [
        ("```python\na\n```", "auto", "a\n", "python"),
        ("```\na\n```\nor\n```py\nb\n```", "auto", "b\n", "python"),
        ("```python\na\n```\n```text\noutput\n```", "auto", "a\n", "python"),
        ("```cpp\na\n```", "auto", "a\n", "cpp"),
        ("```C++\na\n```", "auto", "a\n", "cpp"),
        ("```\na\n```", "cpp", "a\n", "cpp"),
        ("```python\na\n```", "cpp", None, None),
        ("```java\na\n```", "auto", None, None),
        ("<think>```python\na\n```</think>```python\nb\n```", "auto", "b\n", "python"),
        ("<think>```python\na\n```", "auto", None, None),
        ("~~~python\na\n```\nb\n~~~", "auto", "a\n```\nb\n", "python"),
        ("```python\nunclosed", "auto", "unclosed", "python"),
        ("x = 1", "auto", "x = 1", "python"),
        ("  \n", "auto", None, None),
    ],
)
def test_extract_program(completion: str, language: str, source: str | None, found: str | None) -> None:
    program = extract_program(completion, language)
    assert (program and program.source, program and program.language) == (source, found)


# --- the tests


def test_assertions_become_calls() -> None:
    columns = {"test_list": ["assert f(1, [2]) == (3, 'x')", "assert (-4) == f(2)", "assert f(3)", "assert not f(4)"]}
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
    test = "METADATA = {}\ndef check(candidate):\n    assert candidate(2) == 4, 'two'\n    assert True\n"
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
        {"public_tests": {"input": ["1\n"], "output": ["2\n"]}, "private_tests": {"input": ["3\n"], "output": ["6\n"]}},
        {
            "public_test_cases": json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}]),
            "private_test_cases": packed(json.dumps([{"input": "3\n", "output": "6\n", "testtype": "stdin"}])),
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
    ],
)
def test_tests_that_cannot_be_read(columns: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(columns)


# --- comparison


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        (5, 5, True),
        (5, 5.0, True),
        (5.0, 5, True),
        (5, True, False),
        (1, True, False),
        (True, True, True),
        (False, 0, True),
        (True, 2, False),
        (True, 1.0, False),
        (0.3, 0.1 + 0.2, True),
        (0.3, 0.300002, False),
        (3e9, 3e9 + 1000, True),
        (10**17, 10**17 + 1, False),
        (float("nan"), float("nan"), True),
        (1.0, float("nan"), False),
        (float("inf"), float("inf"), True),
        (float("inf"), 1e308, False),
        (10**400, 1.0, False),
        (1 << 5000, 1 << 5000, True),
        ("5", 5, False),
        ("a", "a", True),
        (None, None, True),
        (None, False, False),
        ((1, 2), (1, 2), True),
        ((1, 2), [1, 2], False),
        ([1, [2.0]], [1, [2.0000001]], True),
        ([1], [1, 2], False),
        ({1, 2}, {2, 1}, True),
        ({0.3, 1}, {0.1 + 0.2, 1}, True),
        ({1, 2}, {1, 3}, False),
        ({(1, "a"): [1]}, {(1, "a"): [1]}, True),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": 1}, {"b": 1}, False),
        (b"x", b"x", True),
        (1j, 1j, True),
    ],
)
def test_equal(expected: object, got: object, same: bool) -> None:
    assert equal(encode(expected), encode(got)) is same


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.sets(st.integers() | st.text())
    ),
    max_leaves=12,
)


@given(plain)
def test_every_plain_value_survives_the_way_and_equals_itself(value: object) -> None:
    arrived = parse_reply(json.dumps({"ok": encode(value)}).encode()).value
    assert is_plain(arrived)
    assert equal(encode(value), arrived)
    assert canonical(encode(value)) == canonical(encode(eval(source_of(value))))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"ok": NaN}',
        b'{"ok": 1, "error": "x"}',
        b'{"error": 5, "text": ""}',
        b'{"ok": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"ok": ' + b"7" * 100_000 + b"}",
    ],
)
def test_unreadable_replies(line: bytes) -> None:
    assert parse_reply(line).error == "Unreadable"


def test_texts_of_the_model_are_made_printable() -> None:
    reply = parse_reply(json.dumps({"error": "E\x1b[2J", "text": "\ud800" + "a" * 999}).encode())
    assert reply == Reply(error="E [2J", text="?" + "a" * 299)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": 1, "b": 2},
        {"dict": [[1]]},
        {"dict": 5},
        {"set": 1},
        {"complex": ["x", 1]},
        {"other": "E"},
        [{"int": 5}],
    ],
)
def test_forged_forms_are_not_plain(value: object) -> None:
    assert not is_plain(value)


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        ("1 2\n3\n", b"1 2\n3", True),
        ("1 2\n", b"1  2 \n\n", True),
        ("1\n2\n", b"1 2\n", False),
        ("YES\n", b"yes\n", False),
        ("0.5\n", b"0.5000001\n", True),
        ("0.5\n", b"0.6\n", False),
        ("0.5\n", b"nan\n", False),
        ("5\n", b"5.0\n", True),
        ("1e3\n", b"1000\n", True),
        ("", b"", True),
        ("1\n", b"", False),
        ("\u00e4\n", b"\xc3\xa4\n", True),
        ("x\n", b"\xff\n", False),
    ],
)
def test_same_output(expected: str, got: bytes, same: bool) -> None:
    assert same_output(expected, got) is same


# --- verdicts


@slow
def test_verdicts(reward) -> None:
    double = {"tests": [{"input": "1\n", "output": "2\n"}, {"input": "5\n", "output": "10\n"}]}
    judged = {"test_list": ["assert math.isclose(f(2), 1.4142, rel_tol=1e-3)"], "test_imports": ["import math"]}
    cases = [
        ("def add(a, b): return a + b", ADD, Status.CORRECT),
        ("def add(a, b): return 5", ADD, Status.WRONG),
        ("def add(a, b): return '5'", ADD, Status.WRONG),
        ("def add(a, b) return 5", ADD, Status.WRONG),
        ("def sub(a, b): return 5", ADD, Status.WRONG),
        ("def add(a, b):\n    while True: pass", ADD, Status.OVER_LIMIT),
        ("def add(a, b): return bytearray(1 << 30)", ADD, Status.OVER_LIMIT),
        ("def add(a, b): return 'x' * (9 << 20)", ADD, Status.OVER_LIMIT),
        ("import os; os._exit(125)", ADD, Status.WRONG),
        ("print(2 * int(input()))", double, Status.CORRECT),
        ("print(2)", double, Status.WRONG),
        ("print(2 * int(input()))\nexit(1)", double, Status.WRONG),
        ("while True: pass", double, Status.OVER_LIMIT),
        ("def f(x): return x ** 0.5", judged, Status.CORRECT),
        ("def f(x): return x", judged, Status.WRONG),
        ("def f(x): raise SystemExit", judged, Status.WRONG),
        ("def f(x):\n    while True: pass", judged, Status.OVER_LIMIT),
        ("class E:\n    def __eq__(s, o): return True\ndef f(x): return E()", judged, Status.WRONG),
        ("def f(x):\n    x = []\n    for _ in range(800): x = [x]\n    return x", judged, Status.WRONG),
    ]
    verdicts = reward([item(code, columns) for code, columns, _ in cases])
    assert [v.status for v in verdicts] == [status for *_, status in cases]
    assert [v.score for v in verdicts] == [float(status is Status.CORRECT) for *_, status in cases]


@slow
def test_what_is_no_program_and_what_is_no_test(reward) -> None:
    rows = [
        RewardInput(completion="I do not know.", columns=ADD),
        RewardInput(completion="<think>hm", columns=ADD),
        RewardInput(completion="def add(a, b): return a + b", columns=ADD),
        item("def add(a, b): return a + b", {}),
        item("def f(x): return 1", {"test_list": ["for i in [1]:\n    assert nonsense.x == f(1)"]}),
        item("def f(x): return 1", {"test_list": ["class G: pass\nx = f\nassert f(object()) == 1"]}),
    ]
    statuses = [v.status for v in reward(rows)]
    assert statuses[:4] == [Status.UNPARSEABLE, Status.UNPARSEABLE, Status.CORRECT, Status.VERIFIER_ERROR]
    assert statuses[4:] == [Status.VERIFIER_ERROR] * 2  # the tests themselves do not work
    assert reward.check_reference(rows[3]) and reward.check_reference(rows[0]) is None
    with pytest.raises(ValueError, match="no tests"):
        reward.trial(rows[3])


@slow
def test_partial_and_stop_at_the_first_failure() -> None:
    tests = {"test_list": ["assert f(1) == 1", "assert f(2) == 0", "assert f(3) == 3", "assert f(4) == 4"]}
    programs = {"tests": [{"input": str(n), "output": str(n % 3)} for n in range(4)]}
    some = CodeReward(timeout=1.0, partial=True, concurrency=1)
    try:
        first, second, none = some(
            [item("def f(x): return x", tests), item("print(input())", programs), item("", tests)]
        )
    finally:
        some.close()
    assert (first.status, first.score) == (Status.PARTIAL, 0.75)
    assert (second.status, second.score) == (Status.PARTIAL, 0.75)
    assert none.score == 0


@slow
def test_a_bare_body_continues_the_prompt(reward) -> None:
    columns = {
        "prompt": "def f(x):\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4",
        "entry_point": "f",
    }
    verdicts = reward([item("    return 2 * x", columns), item("def f(x):\n    return 2 * x", columns)])
    assert [v.score for v in verdicts] == [1, 1]


@slow
def test_functions_with_json_tests(reward) -> None:
    columns = {"tests": [{"input": "[3, 1]", "output": "[1, 3]"}], "fn_name": "order"}
    codes = [
        "class Solution:\n    def order(self, xs): return sorted(xs)",
        "def order(xs): return tuple(sorted(xs))",
        "def order(xs): return xs",
    ]
    assert [v.score for v in reward([item(code, columns) for code in codes])] == [1, 1, 0]


@slow
def test_killed_mother_processes_lose_no_sample(reward) -> None:
    code = "import time\ndef add(a, b):\n    time.sleep(0.15)\n    return a + b"

    def kill() -> None:
        for pid in list(descendants(os.getpid())):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    timer = threading.Timer(0.5, kill)
    timer.start()
    verdicts = reward([item(code, ADD) for _ in range(8)])
    timer.join()
    assert [v.status for v in verdicts] == [Status.CORRECT] * 8


@slow
@pytest.mark.skipif(walls.compiler() is None, reason="g++ is not installed (apt install g++)")
def test_cpp(reward) -> None:
    columns = {"tests": [{"input": "1 2\n", "output": "3\n"}]}
    head = '#include <cstdio>\nint main(){long a,b;scanf("%ld %ld",&a,&b);'
    codes = [head + 'printf("%ld\\n",a+b);}', head + 'printf("%ld\\n",a);}', head + "for(;;);}", "int main(){"]
    verdicts = reward([RewardInput(completion=fenced(code, "cpp"), columns=columns) for code in codes])
    assert [v.status for v in verdicts] == [Status.CORRECT, Status.WRONG, Status.OVER_LIMIT, Status.WRONG]
    assert "does not compile" in verdicts[3].message
    assert reward([RewardInput(completion=fenced(codes[0], "cpp"), columns=ADD)])[0].score == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [({"language": "rust"}, "rust"), ({"timeout": 0}, "seconds"), ({"float_tolerance": -1}, "float_tolerance")],
)
def test_bad_options(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CodeReward(**options)


# --- reference solutions: none may be rejected


def references(name: str) -> list[tuple[str, dict]]:
    folder = DATA / ("humaneval" if name == "humaneval" else "mbpp")
    if not folder.exists():
        pytest.skip(f"../shared/data/{folder.name} is not here")
    if name == "mbpp":
        rows = [json.loads(line) for line in (folder / "mbpp.jsonl").open()]
    elif name == "sanitized":
        rows = json.loads((folder / "sanitized-mbpp.json").read_text())
    else:
        text = gzip.decompress((folder / "HumanEval.jsonl.gz").read_bytes())
        rows = [json.loads(line) for line in text.splitlines()]
        return [(row["prompt"] + row.pop("canonical_solution"), row) for row in rows]
    return [(row.pop("code"), row) for row in rows]


@slow
@pytest.mark.parametrize(("name", "count"), [("mbpp", 974), ("sanitized", 427), ("humaneval", 164)])
def test_reference_solutions(name: str, count: int) -> None:
    patient = CodeReward(timeout=60.0)  # one reference computes for seconds, more on a loaded machine
    rows = references(name)
    try:
        verdicts = patient([item(code, columns) for code, columns in rows])
    finally:
        patient.close()
    rejected = [(row.get("task_id"), v) for (_, row), v in zip(rows, verdicts, strict=True) if v.score != 1]
    assert not rejected and len(verdicts) == count


@slow
def test_programs_of_the_contests(reward) -> None:
    path = DATA / "code_contests_sample" / "code_eval_live_code_bench_v1.jsonl"
    if not path.exists():
        pytest.skip("../shared/data/code_contests_sample is not here")
    rows = [json.loads(line) for line in path.open()]
    cards = (
        "for _ in range(int(input())):\n    wrong = sum(a != b for a, b in zip(input(), 'abc'))\n"
        "    print('YES' if wrong < 3 else 'NO')"
    )
    seniors = "class Solution:\n    def countSeniors(self, details): return sum(int(d[11:13]) > 60 for d in details)"
    winner = "input(); s = input(); a, t = s.count('A'), s.count('T')\nprint('A' if a > t or a == t and s[-1] == 'T' else 'T')"
    solved = [item(code, row) for code, row in zip([cards, seniors, winner], rows, strict=True)]
    assert [v.score for v in reward(solved)] == [1, 1, 1]
    assert [v.score for v in reward([item("print('YES')", row) for row in rows])] == [0, 0, 0]
    contests = [json.loads(line) for line in (path.parent / "code_eval_code_contests.jsonl").open()]
    assert all(len(plan_of(row).cases) >= 30 for row in contests)
