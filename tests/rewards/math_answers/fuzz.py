"""Hostile and random answers: nothing may raise, hang, be lost or change a neighbour's verdict.
Deterministic."""

from __future__ import annotations

import random
from collections.abc import Iterator

_TEXT = (
    r"\frac { } ( ) [ ] ^ _ + - * / = < > , ; : ! | & % $ # ' ~ \\ \left \right \sqrt \sum \int "
    r"\lim \prod \infty \pi \theta \sin \cos \log \ln \exp \text \mathrm \begin{pmatrix} "
    r"\end{pmatrix} \begin{cases} \end{cases} \cup \cap \in \le \ge \ne \pm \mp \cdot \times "
    r"\div \to \circ \overline \binom \lfloor \rceil \mid \{ \} \boxed{ \boxed{5} x y n e i f( 0 "
    r"1 2 5 7 12 3.5 1e5 1e999 9^9 5! !! .. ... \ldots \dots ** #### <think> </think> <answer> "
    r"</answer> \mathbb{R} \equiv \pmod \bmod \angle \vec \dot \prime 1,234 cm m/s km^2 答案 是"
    r" 。 、 "
    r"元 或 ½ ² √ ∞ π − ≤ ∈ ∪ （ ） 【 】 and or if otherwise Answer: the is not 😀 "
)
PIECES = [*_TEXT.split(), *["\x00", "\u200b", "\u202e", "\ud800", "\n", " ", "\t", "\ufeff"]]


def soups(count: int, seed: int = 1) -> Iterator[str]:
    """Random texts of pieces, half of them in a box."""
    rng = random.Random(seed)
    for _ in range(count):
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 24)))
        yield f"\\boxed{{{text}}}" if rng.random() < 0.5 else text


def repetitions(size: int = 100_000) -> Iterator[tuple[str, str]]:
    """(name, text): one piece many times, opened, closed, or in a box."""
    units = {
        "open brace": "{",
        "close brace": "}",
        "open bracket": "(",
        "square": "[",
        "frac": "\\frac",
        "frac open": "\\frac{",
        "sqrt": "\\sqrt",
        "sqrt open": "\\sqrt{",
        "left": "\\left(",
        "power": "^",
        "power 9": "9^",
        "power open": "2^{",
        "minus": "-",
        "plus": "1+",
        "times": "2*",
        "factorial": "!",
        "prime": "'",
        "percent": "%",
        "dollar": "$",
        "double dollar": "$$",
        "blank": " ",
        "newline": "\n",
        "tab": "\t",
        "backslash": "\\",
        "double backslash": "\\\\",
        "hash": "####",
        "hash line": "#### \n",
        "answer": "answer ",
        "answer is": "The answer is ",
        "answer colon": "Answer: ",
        "answer lines": "Answer: 5\n",
        "box": "\\boxed{5}",
        "box open": "\\boxed{",
        "fbox": "\\fbox{5} ",
        "boxed word": "\\boxed",
        "tag": "<answer>",
        "tag pair": "<answer>5</answer>",
        "think": "<think>",
        "think end": "</think>",
        "comma": ",",
        "numbers": "5,",
        "number lines": "5\n",
        "equation": "5=",
        "chain": "1+1=2=",
        "or": "5 or ",
        "and": "x and ",
        "text": "\\text{a}",
        "text open": "\\text{",
        "begin": "\\begin{cases}",
        "matrix": "\\begin{pmatrix}",
        "ampersand": "1&",
        "row": "1\\\\",
        "bar": "|",
        "bars": "|x",
        "binom": "\\binom{",
        "sum": "\\sum_{",
        "int": "\\int_0^1 ",
        "sin": "\\sin ",
        "log": "\\log_2 ",
        "f(": "f(",
        "sub": "a_",
        "dots": "\\ldots,",
        "cup": "[0,1]\\cup",
        "set": "\\{",
        "inequality": "x<",
        "pm": "\\pm ",
        "degree": "^\\circ",
        "unit": "cm ",
        "slash": "1/",
        "colon": "1:",
        "star": "**",
        "bold": "**5** ",
        "Chinese": "答案是",
        "Chinese stop": "5。",
        "Chinese list": "5、",
        "wide": "５",
        "zero width": "\u200b",
        "nul": "\x00",
        "surrogate": "\ud800",
        "right to left": "\u202e",
        "emoji": "\U0001f600",
        "digits": "7",
        "nines power": "9^{9^{",
        "letters": "x",
        "words": "word ",
        "sentence": "It is 5. ",
        "not": "not ",
        "fence": "```\n",
        "over": "\\over ",
        "overline": "\\overline{",
        "square math": "\\[",
        "math pair": "\\(5\\)",
        "thousands": "1,000,",
        "e": "1e5",
        "point": ".",
        "question": "?",
        "vulgar": "½",
        "superscript": "²",
        "open quote": "（",
        "lenticular": "【5】",
        "mod": "\\pmod{",
        "mathbb": "\\mathbb{",
        "color": "\\color{red}{",
        "mixed": "1\\frac{",
        "quad": "\\quad",
        "phantom": "\\phantom{",
        "if": "5 if ",
        "where": "5 where x=",
    }
    for name, unit in units.items():
        many = unit * (size // len(unit))
        yield f"{name}: bare", many
        yield f"{name}: then 5", many + "5"
        yield f"{name}: boxed", "\\boxed{" + many + "5}"
        yield f"{name}: after an answer", "The answer is 5." + many


def nests(depth: int) -> Iterator[tuple[str, str]]:
    """Deep nesting that is well formed."""
    pairs = {
        "brackets": ("(", ")"),
        "braces": ("{", "}"),
        "sqrt": ("\\sqrt{", "}"),
        "frac": ("\\frac{1}{", "}"),
        "power": ("2^{", "}"),
        "left": ("\\left(", "\\right)"),
        "sets": ("\\{", "\\}"),
        "abs": ("|", "|"),
        "f": ("f(", ")"),
        "sin": ("\\sin(", ")"),
        "text": ("\\text{", "}"),
        "box": ("\\boxed{", "}"),
        "matrix": ("\\begin{pmatrix}", "\\end{pmatrix}"),
        "minus": ("-(", ")"),
        "floor": ("\\lfloor ", "\\rfloor"),
        "tuple": ("(1,", ")"),
        "interval": ("[0,", "]"),
        "log": ("\\log_2(", ")"),
        "overline": ("\\overline{", "}"),
    }
    for name, (opening, closing) in pairs.items():
        yield f"nest {name}", "\\boxed{" + opening * depth + "5" + closing * depth + "}"
    yield "nest prefix minus", "\\boxed{" + "-" * depth + "5}"
    yield "nest right power", "\\boxed{" + "2^" * depth + "5}"
    yield "nest factorial", "\\boxed{5" + "!" * depth + "}"
    yield "nest sums", "\\boxed{" + "+1" * depth + "}"
    yield "nest mixed", "\\boxed{" + "\\frac{\\sqrt{(" * depth + "5" + ")}}{2}" * depth + "}"


HUGE: list[tuple[str, str]] = [
    ("power tower", r"\boxed{9^{9^{9^{9}}}}"),
    ("factorials", r"\boxed{((9!)!)!}"),
    ("big factorial", r"\boxed{10^{8}!}"),
    ("binomial", r"\boxed{\binom{10^{9}}{5\cdot 10^{8}}}"),
    ("long integer", "\\boxed{" + "7" * 50_000 + "}"),
    ("long fraction", "\\boxed{\\frac{" + "7" * 4000 + "}{" + "3" * 4000 + "}}"),
    ("long decimal", "\\boxed{0." + "7" * 50_000 + "}"),
    ("exponent letter", r"\boxed{1e999999999}"),
    ("exponent letter small", r"\boxed{1e-999999999}"),
    ("power of ten", r"\boxed{10^{999999999}}"),
    ("negative power", r"\boxed{2^{-99999999999}}"),
    ("root of huge", r"\boxed{\sqrt[99999999]{7}}"),
    ("sum", r"\boxed{\sum_{k=1}^{10^{9}} k^{k}}"),
    ("product", r"\boxed{\prod_{k=1}^{10^{6}} (x+k)}"),
    ("expansion", r"\boxed{(x+y+z+1)^{5000}}"),
    ("polynomial", "\\boxed{" + "+".join(f"x^{{{k}}}" for k in range(2000)) + "}"),
    ("nested radicals", "\\boxed{" + "\\sqrt{1+" * 200 + "x" + "}" * 200 + "}"),
    ("trigonometric", "\\boxed{" + "\\sin(\\cos(" * 100 + "x" + "))" * 100 + "}"),
    ("integral", r"\boxed{\int_0^1 \frac{\sin(x^x)}{\sqrt{1+x^5+e^{x}}} dx}"),
    ("gcd", r"\boxed{\gcd(10^{5000}, 7^{5000})}"),
    ("base", "\\boxed{" + "1" * 3000 + "_{36}}"),
    ("repeating", r"\boxed{0.\overline{" + "7" * 5000 + "}}"),
    ("list", "\\boxed{" + ",".join(map(str, range(20_000))) + "}"),
    ("matrix", r"\boxed{\begin{pmatrix}" + "&".join(["1"] * 5000) + r"\end{pmatrix}}"),
    ("chain", "\\boxed{" + "=".join(["x"] * 5000) + "}"),
    ("union", "\\boxed{" + "\\cup".join(["[0,1]"] * 3000) + "}"),
    ("plus-minus", "\\boxed{" + "\\pm 1" * 60 + "}"),
    ("plus-minus products", "\\boxed{" + "(1\\pm x)" * 60 + "}"),
    ("code", r"\boxed{__import__('os').system('touch /tmp/PWNED')}"),
    ("variables", "\\boxed{" + "+".join(f"x_{{{k}}}" for k in range(3000)) + "}"),
]


def distinct_boxes(count: int) -> str:
    """Boxes with a different content each, the reference last."""
    return " ".join(f"\\boxed{{{k}}}" for k in range(10, 10 + count)) + " \\boxed{5}"
