"""Whether two answers are the same: a table of pairs, the policies, and that nothing grows without
bound."""

import time
from fractions import Fraction
from pathlib import Path

import pytest
from emberl.rewards.math_answers.compare import compare
from emberl.rewards.math_answers.options import Comparison, Options
from emberl.rewards.math_answers.parser import TooDeep, Unreadable, parse
from emberl.rewards.math_answers.references import plain_number, read_reference
from emberl.rewards.math_answers.values import Reading, signature
from hypothesis import given
from hypothesis import strategies as st

DEFAULT = Options()
PAIRS = [
    line
    for line in (Path(__file__).parent / "pairs.txt").read_text().splitlines()
    if line[:2] in ("= ", "! ")
]
EQUAL = [
    ("9", "9"),
    ("10{,}000", "10000"),
    ("1,000.50", "1000.5"),
    ("11,\\! 111", "11111"),
    ("58,500", "58500"),
    ("-5", "-5.0"),
    ("\\$32,\\!348", "32348"),
    ("\\frac12", "0.5"),
    ("\\frac{14}{3}", "14/3"),
    ("1\\frac{4}{5}", "9/5"),
    ("6 1/64", "385/64"),
    ("90^\\circ", "90"),
    ("\\frac{2\\pi}{3}", "120^\\circ"),
    ("10\\%", "10"),
    ("28\\%", "28 percent"),
    ("x=5", "5"),
    ("5", "n = 5"),
    ("864 \\mbox{ inches}^2", "864"),
    ("\\text{Evelyn}", "evelyn"),
    ("\\text{(C)}", "C"),
    ("52_8", "52_{8}"),
    ("3\\sqrt{13}", "\\sqrt{117}"),
    ("11\\sqrt2", "11 \\sqrt{2}"),
    ("\\sqrt[3]{-8}", "-2"),
    ("6 - 5i", "-5i+6"),
    ("(a+5)(b+2)", "ab+2a+5b+10"),
    ("x^2+2x+1", "(x+1)^2"),
    ("y = 2x + 3", "2x+3"),
    ("f(z)=z", "f(x)=x"),
    ("2 \\sin b \\cos a", "\\sin(a+b)-\\sin(a-b)"),
    ("\\tan^{-1}(x)", "\\arctan x"),
    ("\\log_2 8", "3"),
    ("1 \\pm \\sqrt{19}", "1+\\sqrt{19}, 1-\\sqrt{19}"),
    ("1,-2", "-2, 1"),
    ("3, 5, 7", "\\{3, 5, 7\\}"),
    ("a=2, b=3", "b=3, a=2"),
    ("1,3", "1 \\text{ and } 3"),
    ("(6,31,-1)", "(6, 31, -1)"),
    ("(1,2),(3,4)", "(3,4), (1,2)"),
    ("[-2,7]", "-2 \\le x \\le 7"),
    ("x \\in [-2,7]", "[-2, 7]"),
    ("(-\\infty, 0]", "a \\leq 0"),
    ("x \\geq 5", "5 \\leq x"),
    ("(0,9) \\cup (9,36)", "(9, 36) \\cup (0, 9)"),
    ("20<P<30", "(20, 30)"),
    ("\\{x|-1<x<1\\}", "(-1,1)"),
    ("5x - 7y = -4", "10x - 14y + 8 = 0"),
    ("2x+4y-3=0", "y=-\\frac{1}{2}x+\\frac{3}{4}"),
    ("5:8", "\\frac{5}{8}"),
    (
        "\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}",
        "\\begin{pmatrix} -\\frac13 \\\\ \\frac23 \\end{pmatrix}",
    ),
    ("\\begin{pmatrix} -7 \\\\ 16 \\end{pmatrix}", "(-7, 16)"),
    ("\\frac{600}{7}", "85.71"),
    ("0.458", "\\frac{27}{59}"),
    ("\\frac{d!}{k!(d-k)!}", "\\binom{d}{k}"),
    ("\\lceil n/2 \\rceil", "\\lceil \\frac{n}{2} \\rceil"),
    ("k\\pi", "n\\pi"),
    ("2 × 10^(-10)", "2 \\times 10^{-10}"),
    ("2^{10}", "1024"),
    ("\\frac{\\sqrt{3}}{3}", "\\frac{\\sqrt{3}}{3} \\approx 0.577"),
    ("x=\frac{1}{2}", "\\frac{1}{2}"),
    ("\\\\frac{1}{2}", "1/2"),
    ("[\\frac{1}{2}, 8]", "0.5 \\leq x \\leq 8"),
]
DIFFERENT = [
    ("9", "8"),
    ("9", ""),
    ("9", "x"),
    ("9", "9.0001"),
    ("2", "\\frac{1+\\sqrt5}{2}"),
    ("1/2004!", "1/2006!"),
    ("5", "-5"),
    ("1-\\frac{1}{e}", "1+\\frac{1}{e}"),
    ("3\\sqrt5", "3"),
    ("10\\pi", "10"),
    ("2x+3", "2"),
    ("4", "4\\sqrt{2}"),
    ("5", "2+3"),
    ("391", "17 \\cdot 23"),
    ("1024", "2^{10}"),
    ("120", "5!"),
    ("5", "4 = 5"),
    ("5", "x = 4 = 5"),
    ("5", "x = 5+5+1 = 7 = 5"),
    ("5", "4 \\text{ or } 5"),
    ("5", "4, 5"),
    ("5", "\\pm 5"),
    ("5", "x \\ge 5"),
    ("5", "[4, 6]"),
    ("5", "500"),
    ("5", "0.05"),
    ("(1,3)", "(3,1)"),
    ("[0,1)", "(0,1)"),
    ("(3,1)", "\\{1,3\\}"),
    ("1,2", "1,2,2"),
    ("a=2, b=3", "a=3, b=2"),
    ("f(x)", "f(y)"),
    ("\\text{east}", "west"),
    ("\\text{east}", "5"),
    ("52_8", "52_9"),
    ("32349", "32, 349"),
    ("5\\text{ cm}", "5\\text{ km}"),
    ("(-\\infty,-5)", "k > -5"),
    ("x+2n+1", "x+1"),
    ("0", "0.001"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&5\\end{pmatrix}"),
    ("a^2+b=0", "0"),
    ("E", "5"),
    ("x^2", "x^3"),
    ("y=2x+3", "y=2x+4"),
    ("100", "10^{1000}"),
    ("0.33", "\\frac{1}{3}"),
    ("7 = 11a+c", "11a+c"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal(gold: str, answer: str) -> None:
    assert compare(read_reference(gold), answer, DEFAULT) is Comparison.EQUAL


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(gold: str, answer: str) -> None:
    assert compare(read_reference(gold), answer, DEFAULT) is not Comparison.EQUAL


@pytest.mark.parametrize("line", PAIRS)
def test_pairs(line: str) -> None:
    gold, answer = line[2:].split(" <- ")
    assert (compare(read_reference(gold), answer, DEFAULT) is Comparison.EQUAL) == line.startswith(
        "="
    )


@pytest.mark.parametrize(
    ("gold", "answer", "policy"),
    [
        ("10\\%", "10", {"percent": "exact"}),
        ("5", "2+3", {"unsimplified": "accept"}),
        ("5", "x = 4 = 5", {"chains": "last"}),
        ("5\\text{ cm}", "5\\text{ km}", {"units": "ignore"}),
        ("1,2", "2,1", {"list_order": "keep"}),
        ("\\frac{600}{7}", "85.71", {"rounding": 0}),
    ],
)
def test_a_policy_turns_a_verdict(gold: str, answer: str, policy: dict[str, object]) -> None:
    verdicts = {compare(read_reference(gold), answer, p) for p in (DEFAULT, Options(**policy))}  # type: ignore[arg-type]
    assert verdicts == {Comparison.EQUAL, Comparison.DIFFERENT}


@pytest.mark.parametrize(
    "answer",
    ["9^{9^{9^{9}}}", "99999999!", "10^{8}!", "\\binom{10^9}{5\\cdot10^8}", "e^{e^{e^{99}}}"],
)
def test_what_would_not_fit_is_not_computed(answer: str) -> None:
    start = time.process_time()
    assert compare(read_reference("\\sqrt{2}"), answer, DEFAULT) is Comparison.TOO_BIG
    # it is no plain number
    assert compare(read_reference("5"), answer, DEFAULT) is Comparison.DIFFERENT
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    "text",
    [
        "(" * 400 + "1" + ")" * 400,
        "\\sqrt{" * 100 + "1" + "}" * 100,
        "1+" * 600 + "1",
        "-" * 900 + "1",
    ],
)
def test_depth_and_length_are_bounded(text: str) -> None:
    with pytest.raises((TooDeep, Unreadable)):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "+".join("1" * 500),
        "1" + "!" * 499,
        "5" + "%" * 499,
        "2-1" * 300,
        "-" * 900 + "1",
        "x" * 900,
    ],
)
def test_repetitions_cost_one_answer_only(text: str) -> None:
    assert compare(read_reference("500"), text, DEFAULT) is not Comparison.EQUAL


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_rationals_are_compared_exactly(a: Fraction, b: Fraction) -> None:
    gold, answer = f"\\frac{{{a.numerator}}}{{{a.denominator}}}", f"{b.numerator}/{b.denominator}"
    assert (compare(read_reference(gold), answer, DEFAULT) is Comparison.EQUAL) == (a == b)


@given(st.text(alphabet="0123456789+-*/^_!(){}[]|<>=,;:%&.\\ abxpife$√π∞'\"", max_size=60))
def test_any_text_gives_an_outcome(text: str) -> None:
    for gold in ("5", "x^2+1", "(1, 2]"):
        assert compare(read_reference(gold), text, DEFAULT) in Comparison


@given(st.text(alphabet="0123456789+-*/^(){}, abx", min_size=1, max_size=30))
def test_a_readable_reference_verifies_itself(text: str) -> None:
    reference = read_reference(text)
    if reference.tree is not None and text.strip():
        assert compare(reference, text, DEFAULT) is Comparison.EQUAL


def test_values_are_exact_where_they_can_be() -> None:
    assert signature(parse("\\frac{1}{3}+\\frac{1}{6}"), Reading()) == (Fraction(1, 2),)
    assert signature(parse("\\sqrt{\\frac{4}{9}}"), Reading()) == (Fraction(2, 3),)
    assert signature(parse("\\binom{10}{3}"), Reading()) == (Fraction(120),)


def test_plain_numbers() -> None:
    assert plain_number("1,200.5") == Fraction("1200.5")
    assert plain_number("1,20") is None
    assert plain_number("9" * 500) is None
