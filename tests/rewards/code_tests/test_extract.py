"""What counts as the program in a completion."""

import time

import pytest
from emberl.rewards.code_tests.extract import completed, extract_program


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
def test_extract_program(
    completion: str, language: str, source: str | None, found: str | None
) -> None:
    program = extract_program(completion, language)
    assert (program and program.source, program and program.language) == (source, found)


FIRST = "```python\nfrom math import gcd\ndef helper(a): return gcd(a, 4)\n```\n"
MAIN = "```python\ndef f(a):\n    return helper(a)\n```\n"


@pytest.mark.parametrize(
    ("completion", "entries", "source"),
    [
        ("```python\ndef f(): pass\n```\nOutput:\n```\n5\n```", ["f"], "def f(): pass\n"),
        (
            "```Python 3\ndef f(): pass\n```\nUsage:\n```python\nprint(f())\n```",
            ["f"],
            "def f(): pass\n",
        ),
        ("```\ndef f(): pass\n```\nprints\n```\n5\n```", ["f"], "def f(): pass\n"),
        (
            "```python\ndef f(): old\n```\nBetter:\n```python\ndef f(): new\n```",
            ["f"],
            "def f(): new\n",
        ),
        ("```python\nprint(input())\n```\nSample:\n```python\nx = 5\n```", [], "print(input())\n"),
        ("1. Do:\n   ```python\n   def f():\n       pass\n   ```", ["f"], "def f():\n    pass\n"),
        ("- ```py\n  def f(): pass\n  ```", ["f"], "def f(): pass\n"),
        ("```python\n    def f():\n        pass\n```", ["f"], "def f():\n    pass\n"),
        (
            '```python\ndef f():\n    """\n    ```\n    f()\n    ```\n    """\n```\n```\nout\n```',
            ["f"],
            'def f():\n    """\n    ```\n    f()\n    ```\n    """\n',
        ),
        ("````python\ndef f(): pass\n```\n````", ["f"], "def f(): pass\n```\n"),
        ("```python\nx = 1\n```python\ndef f(): pass\n```", ["f"], "def f(): pass\n"),
        ("def f():\n    pass\n```\nThis works.", ["f"], "def f():\n    pass\n"),
        ("Here is the code:\ndef f():\n    pass", ["f"], "def f():\n    pass"),
        (
            "<think>\n```python\ndef f(): no\n```\n</think>\n```python\ndef f(): yes\n```",
            ["f"],
            "def f(): yes\n",
        ),
        ("<thinking>no</thinking><answer>def f(): yes</answer>", ["f"], "def f(): yes"),
        ("[PYTHON]\ndef f(): yes\n[/PYTHON]", ["f"], "\ndef f(): yes\n"),
        ("```python\r\ndef f(): pass\r\n```\r\n", ["f"], "def f(): pass\n"),
        ("```python:solution.py\ndef f(): pass\n```", ["f"], "def f(): pass\n"),
        ("```{.python}\ndef f(): pass\n```", ["f"], "def f(): pass\n"),
    ],
)
def test_the_block_is_chosen_as_a_person_would(
    completion: str, entries: list[str], source: str
) -> None:
    program = extract_program(completion, "auto", entries)
    assert program is not None and program.source == source


def test_blocks_are_joined_where_one_uses_the_other() -> None:
    for completion in (FIRST + MAIN, MAIN + FIRST, FIRST + MAIN + "```python\nprint(f(3))\n```"):
        program = extract_program(completion, "auto", ["f"])
        assert program is not None
        namespace: dict = {}
        exec(program.source, namespace)
        assert namespace["f"](6) == 2 and "print" not in program.source


@pytest.mark.parametrize(
    ("body", "whole"),
    [
        ("    return a", "def f(a):\n    return a\n"),
        ("return a", "def f(a):\n    return a\n"),
        ("b = a\n    return b", "def f(a):\n    b = a\n    return b\n"),
        ("if a:\n    return a\nreturn 0", "def f(a):\n    if a:\n        return a\n    return 0\n"),
        ("def f(a): return a", "def f(a): return a"),
    ],
)
def test_a_body_behind_its_prompt(body: str, whole: str) -> None:
    assert completed(body, "f", "def f(a):\n") == whole


@pytest.mark.parametrize(
    "unit", ["```", "```python\n", "`", "\n", " ", "~~~\n", "<think>", '"""\n', "def f", "def f\n"]
)
def test_extraction_takes_linear_time(unit: str) -> None:
    for lead in ("", "```python\n", "```"):
        start = time.process_time()
        extract_program(lead + unit * (400_000 // len(unit)), "auto", ["f"])
        assert time.process_time() - start < 3.0
