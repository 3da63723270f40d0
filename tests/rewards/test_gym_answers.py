"""Exact answers to reasoning-gym's tasks, by hand: right in the ways that a person writes, and what
the package's own scorers pay though it is wrong."""

import pytest
from emberl.rewards.gym_answers import EXACT, is_right

TIME = {"task_type": "time"}
CASES = [
    # task, reference, metadata, right answers, wrong ones
    (
        "chain_sum",
        "-1204",
        {},
        ["-1204", "-1,204", "-1204.0", "$-1204$"],
        ["1204", "-12041", "-1204 or 5", "nan", "", "-120"],
    ),
    (
        "bitwise_arithmetic",
        "-0x94b",
        {},
        ["-0x94B", "-2379"],
        ["0x94b", "-0x94c", "__import__('os')"],
    ),
    ("base_conversion", "3a0", {}, ["3A0", "03a0"], ["3a", "928"]),
    ("calendar_arithmetic", "-1", {}, ["-1"], ["1", "5", "1000"]),
    ("calendar_arithmetic", "10000", {}, ["10000"], ["10001"]),
    ("calendar_arithmetic", "Friday", {}, ["Friday", "friday"], ["Monday", "Friday, Monday"]),
    (
        "complex_arithmetic",
        "-15.0 + 3.0i",
        {},
        ["-15+3i", "-15.0 + 3.0i"],
        ["nan", "NaN", "nanj", "15+3i", "-15", "inf"],
    ),
    ("complex_arithmetic", "0.0 - 1.0i", {}, ["-i", "0-i", "-1.0i"], ["i", "0", "-1"]),
    ("complex_arithmetic", "12.00", {}, ["12", "12.0 + 0.0i"], ["12i", "12.1"]),
    (
        "number_sorting",
        "['-49.0', '14.0', '52.2']",
        {},
        ["[-49, 14, 52.2]", "['-49.0', '14.0', '52.2']"],
        ["[NaN, NaN, NaN]", "[-48.1, 14.9, 52.2]", "[14, -49, 52.2]", "[-49, 14]", "[]"],
    ),
    (
        "number_filtering",
        "['30', '-81']",
        {},
        ["['30', '-81']", "30, -81"],
        ["['30']", "['-81', '30']"],
    ),
    ("spell_backward", "talps", {}, ["talps", "Talps"], ["talpstalps", "talps talps", "splat"]),
    (
        "word_sorting",
        "They, WARRANTY, niggle",
        {},
        ["They, WARRANTY, niggle", "They,WARRANTY,niggle"],
        ["They, WARRANTY, niggle, 1", "they, warranty, niggle", "WARRANTY, They, niggle"],
    ),
    (
        "time_intervals",
        "03:22:03",
        TIME,
        ["03:22:03"],
        ["03:22:04", "03:23:03", "03:22", "03:22:03 03:22:03"],
    ),
    (
        "time_intervals",
        "67 days, 01:04:00",
        TIME,
        ["67 days, 01:04:00"],
        ["67 days, 01:04:01", "66 days, 01:04:00"],
    ),
    ("decimal_arithmetic", "1.378", {}, ["1.378", "1.379", "1.3782"], ["1.38", "1.4", "nan", "1"]),
    (
        "power_function",
        "-527.9038",
        {},
        ["-528", "-527.9", "-5.28e2"],
        ["528", "-529", "NaN", "-53"],
    ),
    (
        "fraction_simplification",
        "$\\dfrac{131}{319}$",
        {},
        ["131/319", "\\frac{131}{319}", "$131/319$", "-131/-319"],
        ["262/638", "131/319 or 1/2", "131/319 1", "131", "0/0"],
    ),
    (
        "prime_factorization",
        "2 × 2 × 5",
        {},
        ["2 × 2 × 5", "5*2*2", "2 x 2 x 5"],
        ["4 × 5", "20", "2 × 5", "7 or 7"],
    ),
    (
        "binary_matrix",
        "1 0\n0 1",
        {},
        ["1 0\n0 1", "[[1, 0], [0, 1]]"],
        ["1 0 0 1", "[[1.0, 0], [0, 1]]", "[[True, 0], [0, 1]]"],
    ),
    (
        "spiral_matrix",
        "4 6 7",
        {},
        ["4 6 7", "[4, 6, 7]"],
        ["4 6 7 7", "(__import__('sys').stdout.write('1.0'))"],
    ),
    (
        "string_insertion",
        "EACAD",
        {},
        ["EACAD", "['E', 'A', 'C', 'A', 'D']"],
        ["eacad", "''.join('EACAD')", "EACADE"],
    ),
    (
        "countdown",
        "2*3",
        {"numbers": [2, 3], "target": 6},
        ["2*3", "3×2", "(3)*(2)", "3x2"],
        [
            "6",
            "2+3",
            "2*3*1",
            "2.3",
            "2**3",
            "23",
            "3*2 or 1",
            "__import__('os')",
            "(" * 300,
            "2//3",
            "2*3/0",
        ],
    ),
    ("countdown", "35/10", {"numbers": [3, 5], "target": "3.5"}, [], ["3.5"]),
    (
        "puzzle24",
        "10*(8-5)-6",
        {"numbers": [8, 5, 10, 6]},
        ["10*(8 - 5) - 6", "-6 + 10*(8-5)"],
        ["8+8+4+4", "6*4*1*1", "24", "10*(8-5)-6+0", "8*5+10-6"],
    ),
]


@pytest.mark.parametrize(("task", "reference", "metadata", "right", "wrong"), CASES)
def test_answers(
    task: str, reference: str, metadata: dict, right: list[str], wrong: list[str]
) -> None:
    entry = {"question": "", "answer": reference, "metadata": metadata}
    assert [answer for answer in right if not is_right(task, answer, entry)] == []
    assert [answer for answer in wrong if is_right(task, answer, entry)] == []


@pytest.mark.parametrize("task", sorted(EXACT))
def test_degenerate_answers_are_wrong_and_quick(task: str) -> None:
    entry = {"question": "", "answer": "5", "metadata": {"numbers": [2, 3], "target": 5}}
    for answer in (
        "9" * 20_000,
        "1e9999",
        "1" + "+1" * 190,
        "(" * 10_000,
        "[" * 9_999,
        "-" * 9_999,
        " " * 10**6,
        "\0",
        "x" * 9_999,
    ):
        assert not is_right(task, answer, entry)
