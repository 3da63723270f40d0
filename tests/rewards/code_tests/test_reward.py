"""Verdicts of code: layouts of data sets, limits, and the reference solutions."""

import gzip
import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from emberl.rewards.code_tests import running
from emberl.rewards.code_tests.reward import CodeReward
from emberl.rewards.code_tests.tests import plan_of
from emberl.rewards.inputs import RewardInput
from emberl.rewards.processes import descendants
from emberl.rewards.sandbox.pool import SandboxUnavailable
from emberl.rewards.sandbox.view import compiler
from emberl.rewards.verdict import Status

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from layouts import Layout, layouts  # noqa: E402
from plus import humaneval_plus, mbpp_plus, mutants, plainly  # noqa: E402

DATA = Path(__file__).parents[4] / "shared" / "data"
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


@slow
def test_verdicts(reward) -> None:
    double = {"tests": [{"input": "1\n", "output": "2\n"}, {"input": "5\n", "output": "10\n"}]}
    judged = {
        "test_list": ["assert math.isclose(f(2), 1.4142, rel_tol=1e-3)"],
        "test_imports": ["import math"],
    }
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
        (
            "def f(x):\n    x = []\n    for _ in range(800): x = [x]\n    return x",
            judged,
            Status.WRONG,
        ),
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
        item(
            "def f(x): return 1", {"test_list": ["class G: pass\nx = f\nassert f(object()) == 1"]}
        ),
    ]
    statuses = [v.status for v in reward(rows)]
    assert statuses[:4] == [
        Status.UNPARSEABLE,
        Status.UNPARSEABLE,
        Status.CORRECT,
        Status.VERIFIER_ERROR,
    ]
    assert statuses[4:] == [Status.VERIFIER_ERROR] * 2  # the tests themselves do not work
    assert reward.check_reference(rows[3]) and reward.check_reference(rows[0]) is None
    with pytest.raises(ValueError, match="no tests"):
        reward.trial(rows[3])


@slow
def test_a_judge_that_does_not_come_up_is_no_verdict(reward, monkeypatch) -> None:
    library = running._library

    def broken(*names: str):
        return library(*names[:1]) if "judge" in names else library(*names)  # it has no `main`

    monkeypatch.setattr(running, "_library", broken)
    row = item("def f(x): return x", {"test_list": ["assert f(1) in (1, 2)"]})
    assert [v.status for v in reward([row])] == [Status.VERIFIER_ERROR]


@slow
def test_a_machine_out_of_processes_is_not_the_programs_fault(reward, monkeypatch) -> None:
    """Threads up to the sandbox's own limit, then beyond it; then as if the machine gave none."""
    code = (
        "import threading, time\ndef add(a, b):\n    for _ in range({}):\n       "
        " threading.Thread(target=time.sleep, args=(0.2,)).start()\n    return a + b"
    )
    few, many = item(code.format(12), ADD), item(code.format(200), ADD)
    assert [v.status for v in reward([few, many])] == [Status.CORRECT, Status.WRONG]
    monkeypatch.setattr(running, "_CONTROL", "raise SystemExit(1)")
    assert [v.status for v in reward([few, many])] == [Status.CORRECT, Status.VERIFIER_ERROR]


STACK = (
    "import os, sys, signal\nclass Stack(list):\n    def push(self, x):\n        {}\n    pop ="
    " list.pop\n"
)
IN_THE_CALL = [
    "os.write(3, b'x' * 70000 + b'\\n')",
    "os.write(3, bytes(range(128, 256)) + b'\\n')",
    "os.write(3, b'[' * 100000 + b'\\n')",
    'os.write(3, b\'{"broken": {"error": "x", "text": "y"}}\\n\')',
    'os.write(3, b\'{"verdict": {"passed": 1, "total": 1, "failed": {}, "asked": 1}}\\n\')',
    "os.closerange(0, 64)",
    "os.dup2(os.open('/dev/null', os.O_RDONLY), 3)",
    "[os.kill(pid, 9) for pid in (os.getppid(), 1, -1)]",
    "os.fork()",
    "os._exit(137)",
    "os.abort()",
    "signal.raise_signal(signal.SIGSTOP)",
    "raise type('E', (Exception,), {'__str__': lambda e: 1 / 0, '__repr__': lambda e: 1 / 0})",
    "sys.modules.clear(); os.write = os.read = None",
    "self.append([0] * (1 << 40))",
    "return 1 << (1 << 24)",
    "y = []\n        for _ in range(100000): y = [y]\n        return y",
]


@slow
@pytest.mark.parametrize("code", [*(STACK.format(each) for each in IN_THE_CALL), *IN_THE_CALL[:10]])
def test_whatever_a_program_does_in_front_of_the_judge_is_its_own_doing(reward, code: str) -> None:
    """At its start, and in a call: it is scored, with nothing."""
    tests = {
        "test_list": [
            "s = Stack()",
            "s.push(1)",
            "s.push(2)",
            "assert s.pop() == 2 and len(s) == 1",
        ]
    }
    code = code if "Stack" in code else f"import os, sys, signal\n{code}"
    assert [verdict.score for verdict in reward([item(code, tests)])] == [0]


@slow
def test_partial_and_stop_at_the_first_failure() -> None:
    tests = {
        "test_list": [
            "assert f(1) == 1",
            "assert f(2) == 0",
            "assert f(3) == 3",
            "assert f(4) == 4",
        ]
    }
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
    verdicts = reward(
        [item("    return 2 * x", columns), item("def f(x):\n    return 2 * x", columns)]
    )
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
def test_killed_fork_servers_lose_no_sample(reward) -> None:
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
@pytest.mark.skipif(compiler() is None, reason="g++ is not installed (apt install g++)")
def test_cpp(reward) -> None:
    columns = {"tests": [{"input": "1 2\n", "output": "3\n"}]}
    head = '#include <cstdio>\nint main(){long a,b;scanf("%ld %ld",&a,&b);'
    codes = [
        head + 'printf("%ld\\n",a+b);}',
        head + 'printf("%ld\\n",a);}',
        head + "for(;;);}",
        "int main(){",
    ]
    verdicts = reward(
        [RewardInput(completion=fenced(code, "cpp"), columns=columns) for code in codes]
    )
    assert [v.status for v in verdicts] == [
        Status.CORRECT,
        Status.WRONG,
        Status.OVER_LIMIT,
        Status.WRONG,
    ]
    assert "does not compile" in verdicts[3].message
    assert reward([RewardInput(completion=fenced(codes[0], "cpp"), columns=ADD)])[0].score == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"language": "rust"}, "rust"),
        ({"timeout": 0}, "seconds"),
        ({"float_tolerance": -1}, "float_tolerance"),
    ],
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
    # one reference computes for seconds, more on a loaded machine
    patient = CodeReward(timeout=60.0)
    rows = references(name)
    try:
        verdicts = patient([item(code, columns) for code, columns in rows])
    finally:
        patient.close()
    rejected = [
        (row.get("task_id"), v) for (_, row), v in zip(rows, verdicts, strict=True) if v.score != 1
    ]
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
    seniors = (
        "class Solution:\n    def countSeniors(self, details): return sum(int(d[11:13]) > 60 for d"
        " in details)"
    )
    winner = (
        "input(); s = input(); a, t = s.count('A'), s.count('T')\nprint('A' if a > t or a == t and"
        " s[-1] == 'T' else 'T')"
    )
    solved = [item(code, row) for code, row in zip([cards, seniors, winner], rows, strict=True)]
    assert [v.score for v in reward(solved)] == [1, 1, 1]
    assert [v.score for v in reward([item("print('YES')", row) for row in rows])] == [0, 0, 0]
    contests = [json.loads(line) for line in (path.parent / "code_eval_code_contests.jsonl").open()]
    assert all(len(plan_of(row).cases) >= 30 for row in contests)


# --- layouts of public data sets


@slow
@pytest.mark.parametrize("group", ["programs", "cases", "python", "more", "numpy"])
def test_layouts(group: str) -> None:
    """Every right program is paid, no wrong one, and every one has a verdict."""
    table: list[Layout] = layouts()[group]
    graded = CodeReward(timeout=20.0, packages=["numpy"] if group == "numpy" else [])
    cases = [
        (each, code, code in each.right) for each in table for code in [*each.right, *each.wrong]
    ]
    columns = [
        {key: value for key, value in each.columns.items() if key != "answer"} for each, *_ in cases
    ]
    answers = [str(each.columns.get("answer", "")) for each, *_ in cases]
    try:
        rows = zip(cases, columns, answers, strict=True)
        verdicts = graded(
            [
                RewardInput(
                    completion=code if each.whole else fenced(code), columns=row, answer=answer
                )
                for (each, code, _), row, answer in rows
            ]
        )
    finally:
        graded.close()
    wrong = [
        (each.name, code, verdict)
        for (each, code, right), verdict in zip(cases, verdicts, strict=True)
        if verdict.score != float(right)
    ]
    assert not wrong


@slow
def test_the_plus_sets_and_mutants_of_their_solutions() -> None:
    """The verdict is that of the plain harness: solution and tests in one interpreter."""
    if not (DATA / "humaneval").exists():
        pytest.skip("../shared/data/humaneval is not here")
    items, wanted = [], []
    for number, (row, code) in enumerate([*humaneval_plus(12), *mbpp_plus(60)]):
        for program in [code, *mutants(code, number, 2)]:
            items.append(item(program, row))
            wanted.append(_passes(plainly(program, row)))
    graded = CodeReward(timeout=3.0)
    try:
        verdicts = graded(items)
    finally:
        graded.close()
    assert len(wanted) > 60 and sum(wanted) > 20
    assert [v.score for v in verdicts] == [float(each) for each in wanted]


def _passes(text: str) -> bool:
    """Whether a program made of the data set's own solution, in a process of its own, ends without
    an error."""
    if (pid := os.fork()) == 0:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, 2.0)  # of its own time, however loaded the machine
        try:
            exec(compile(text, "<plain>", "exec"), {"__name__": "plain"})
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


@slow
def test_references_are_proved_before_training(reward) -> None:
    own = "def add(a, b): return a + b"
    rows = [
        {"test_list": ["assert add(2, 3) == 5"], "code": own},
        {"test_list": ["assert add(2, 3) == 6"], "code": own},
        {"test_list": ["assert add(2, 3) == 5"]},
        {
            "input_output": json.dumps({"inputs": ["2"], "outputs": ["4"]}),
            "solutions": json.dumps(["x", "print(4)"]),
        },
        {"test_list": ["import pandas\nassert pandas.f(add(2, 3))"], "code": own},
        {},
    ]
    found = reward.check_references([RewardInput(completion="", columns=row) for row in rows])
    assert [bool(each) for each in found] == [False, True, False, False, True, True]
    assert "its own solution is refused" in found[1] and "options.packages" in found[4]


@slow
def test_only_the_packages_that_are_named_are_importable(reward) -> None:
    assert reward([item("import numpy\ndef add(a, b): return a + b", ADD)])[0].score == 0
    with pytest.raises(ValueError, match="packages"):
        CodeReward(packages=["no_such_package"])
