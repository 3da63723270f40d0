"""Reading LaTeX answers without any code of the package: the referee of the mutation tests.

It reads little and strictly. An answer becomes a nested form whose scalars are values at fixed
points; two answers are the same if their forms are. Whatever it does not know is `None`: no
opinion.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath as mp

POINTS = 6
Env = dict[str, Any]
Scalar = Callable[[Env], Any]


class Unknown(Exception):
    """Not a form that this referee has an opinion on."""


@dataclass(frozen=True)
class Form:
    """`kind` with its parts: values of a scalar at the points, items of a collection, or words."""

    kind: str
    parts: tuple[Any, ...]


_TOKEN = re.compile(
    r"\\\\|\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|!|,|;|:| |quad|qquad)(?![a-zA-Z])|~"
    r"|\\[a-zA-Z]+|\\[{}|%$]|\d+(?:(?:,\\!\s*|\{,\}|,(?=\d{3}(?!\d)))\d{3})*(?:\.\d+)?|\.\d+"
    r"|[a-zA-Z]|<=|>=|[^\s]"
)
_SKIP = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|!|,|;|:| |quad|qquad)\Z|~\Z")
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "\\sin": mp.sin, "\\cos": mp.cos, "\\tan": mp.tan, "\\cot": mp.cot, "\\sec": mp.sec,
    "\\csc": mp.csc, "\\arcsin": mp.asin, "\\arccos": mp.acos, "\\arctan": mp.atan, "\\ln": mp.log,
    "\\sinh": mp.sinh, "\\cosh": mp.cosh, "\\tanh": mp.tanh, "\\exp": mp.exp,
}  # fmt: skip
_GREEK = re.compile(
    r"\\(?:alpha|beta|gamma|delta|epsilon|varepsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|varphi"
    r"|omega|Omega|Delta|Gamma|Phi|psi|Psi|hbar|ell|eta|kappa|xi|zeta|chi)\Z"
)
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|textrm|operatorname|mathbf)\s*\{([^{}]*)\}")
_RELATIONS = {
    "=": "=", "<": "<", ">": ">", "\\le": "<=", "\\leq": "<=", "<=": "<=", "\\ge": ">=",
    "\\geq": ">=", ">=": ">=", "\\ne": "!=", "\\neq": "!=", "\\lt": "<", "\\gt": ">",
}  # fmt: skip
_OPEN, _CLOSE = "([", ")]"


def _scalar(value: Scalar) -> Form:
    found = []
    for point in range(POINTS):
        try:
            result = mp.mpc(value(_Points(point)))
        except (ZeroDivisionError, ValueError, OverflowError):
            result = None
        if result is not None and (mp.isnan(result.real) or mp.isnan(result.imag)):
            result = None
        found.append(result)
    return Form("scalar", tuple(found))


class _Points(dict[str, Any]):
    def __init__(self, point: int) -> None:
        super().__init__()
        self.point = point

    def __missing__(self, name: str) -> Any:
        seed = sum((i + 3) * ord(c) * 7919 for i, c in enumerate(name)) + 104729 * (self.point + 1)
        return mp.mpf(300 + seed % 1709) / 997 * (1 if self.point % 2 else 13)


class Reader:
    """One pass over the tokens of an answer."""

    def __init__(self, text: str, applies: bool) -> None:
        text = text.strip().replace("\\$", "").strip("$").rstrip(".").strip()
        text = re.sub(r"\\[dtc]frac", r"\\frac", text)
        text = text.replace("\\lbrace", "\\{").replace("\\rbrace", "\\}").replace("−", "-")
        self.words: list[str] = []
        text = _TEXT.sub(self._word, text)
        self.tokens = [t for t in _TOKEN.findall(text) if not _SKIP.match(t)]
        self.at = 0
        self.applies = applies

    def _word(self, match: re.Match[str]) -> str:
        word = re.sub(r"[\s.]+", " ", match.group(1)).strip().lower()
        if not word:
            return " "
        self.words.append(word)
        return " \x00 "

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ""

    def take(self, wanted: str = "") -> str:
        token = self.peek()
        if not token or (wanted and token != wanted):
            raise Unknown(token)
        self.at += 1
        return token

    def whole(self) -> Form:
        if not self.tokens:
            raise Unknown("empty")
        form = self.collection()
        if self.peek():
            raise Unknown(self.peek())
        if self.words and form.kind != "words":
            return Form("noted", (form, *self.words))
        return form

    def collection(self) -> Form:
        items = [self.union()]
        while self.peek() in (",", ";"):
            self.take()
            items.append(self.union())
        return items[0] if len(items) == 1 else Form("list", tuple(items))

    def union(self) -> Form:
        parts = [self.statement()]
        while self.peek() == "\\cup":
            self.take()
            parts.append(self.statement())
        return parts[0] if len(parts) == 1 else Form("union", tuple(parts))

    def statement(self) -> Form:
        if self.peek() == "\x00" and len(self.tokens) == 1:
            self.take()
            return Form("words", (self.words[0],))
        sides = [self.side()]
        ops: list[str] = []
        first = self.at
        while self.peek() in _RELATIONS:
            ops.append(_RELATIONS[self.take()])
            sides.append(self.side())
        if not ops:
            return sides[0][0]
        if ops == ["="]:
            before = self.tokens[:first]
            if len(before) == 1 and re.match(r"[a-zA-Z]\Z", before[0]) and sides[1][1] is None:
                return Form("value", (before[0], sides[1][0]))
            free = any(re.match(r"[a-df-hj-zA-Z]\Z", t) for t in self.tokens[first:])
            if len(before) == 1 and re.match(r"[a-zA-Z]\Z", before[0]) and not free:
                return Form("value", (before[0], sides[1][0]))
            return self._equation(sides)
        if all(op[0] == ">" for op in ops):
            ops, sides = ["<" + op[1:] for op in reversed(ops)], sides[::-1]
        return Form("relation", (*ops, *(form for form, _ in sides)))

    @staticmethod
    def _equation(sides: list[tuple[Form, Scalar | None]]) -> Form:
        (left, a), (right, b) = sides
        if a is None or b is None:
            return Form("named", (left, right))
        difference = _scalar(lambda env: a(env) - b(env))
        return Form("equation", difference.parts)

    def side(self) -> tuple[Form, Scalar | None]:
        token = self.peek()
        if token == "\\{":
            self.take()
            items = self.collection()
            self.take("\\}")
            return Form("set", items.parts if items.kind == "list" else (items,)), None
        if token == "\\begin":
            return self.matrix(), None
        if token in _OPEN and (group := self.group()) is not None:
            return group, None
        value = self.sum()
        if self.peek() in ("\\pm", "\\mp"):
            self.take()
            other = self.sum()
            both = (
                _scalar(lambda env: value(env) + other(env)),
                _scalar(lambda env: value(env) - other(env)),
            )
            return Form("list", both), None
        return _scalar(value), value

    def group(self) -> Form | None:
        """A tuple or an interval; None (nothing taken) for plain parentheses."""
        start, opening = self.at, self.take()
        try:
            items = self.collection()
            closing = self.take()
        except Unknown:
            self.at = start
            return None
        if closing not in _CLOSE or items.kind != "list":
            if (opening, closing) in (("(", ")"), ("[", "]")):
                self.at = start
                return None
            raise Unknown(closing)
        if self.peek() not in ("", ",", ";", "\\cup", "\\}", ")", "]"):
            raise Unknown("a product of a tuple")
        return Form("group", (opening, closing, *items.parts))

    def matrix(self) -> Form:
        self.take("\\begin")
        self.take("{")
        name = ""
        while self.peek() != "}":
            name += self.take()
        self.take("}")
        if name not in ("pmatrix", "bmatrix", "vmatrix", "matrix"):
            raise Unknown(name)
        rows: list[list[Form]] = [[]]
        while True:
            rows[-1].append(self.side()[0])
            token = self.take()
            if token == "\\\\":
                rows.append([])
            elif token == "\\end":
                break
            elif token != "&":
                raise Unknown(token)
        for letter in "{" + name + "}":
            self.take(letter)
        return Form(
            "det" if name == "vmatrix" else "matrix", tuple(Form("row", tuple(r)) for r in rows)
        )

    def sum(self) -> Scalar:
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        total = self.product()
        if sign < 0:
            total = self._negated(total)
        while self.peek() in ("+", "-"):
            total = self._added(total, self.take(), self.product())
        return total

    @staticmethod
    def _negated(value: Scalar) -> Scalar:
        return lambda env: -value(env)

    @staticmethod
    def _added(a: Scalar, sign: str, b: Scalar) -> Scalar:
        return (lambda env: a(env) + b(env)) if sign == "+" else (lambda env: a(env) - b(env))

    def product(self) -> Scalar:
        value, mixed = self.factor(), re.fullmatch(r"\d+", self.tokens[self.at - 1]) is not None
        while True:
            token = self.peek()
            if token in ("\\cdot", "\\times", "*"):
                self.take()
                value = self._times(value, self.signed())
            elif token in ("/", "\\div", ":"):
                if token == ":":
                    raise Unknown("a ratio")
                self.take()
                value = self._over(value, self.signed())
            elif token == "{" and self.peek(1) == "}":
                self.at += 2
            elif self._starts_factor(token):
                numbers = token == "\\frac" and self._plain_fraction()
                if mixed and numbers:
                    value = self._added(value, "+", self.factor())
                elif re.match(r"[\d.]", token):
                    raise Unknown("two numbers side by side")
                else:
                    value = self._times(value, self.factor())
            else:
                return value
            mixed = False

    def signed(self) -> Scalar:
        if self.peek() == "-":
            self.take()
            return self._negated(self.factor())
        return self.factor()

    def _plain_fraction(self) -> bool:
        rest = "".join(self.tokens[self.at : self.at + 9])
        return re.match(r"\\frac(?:\{\d+\}|\d)(?:\{\d+\}|\d)", rest) is not None

    @staticmethod
    def _times(a: Scalar, b: Scalar) -> Scalar:
        return lambda env: a(env) * b(env)

    @staticmethod
    def _over(a: Scalar, b: Scalar) -> Scalar:
        return lambda env: a(env) / b(env)

    @staticmethod
    def _starts_factor(token: str) -> bool:
        if token in (
            "(",
            "{",
            "\\frac",
            "\\sqrt",
            "\\binom",
            "\\pi",
            "\\log",
            "\\infty",
            "\\lfloor",
            "\\lceil",
        ):
            return True
        return bool(
            re.match(r"[\d.]|[a-zA-Z]\Z", token) or _GREEK.match(token) or token in _FUNCTIONS
        )

    def factor(self) -> Scalar:
        value = self.atom()
        while self.peek() in ("^", "!", "%", "\\%", "\x00"):
            token = self.take()
            if token == "^" and (self.peek() == "\\circ" or self._is_braced_degree()):
                while self.take() not in ("\\circ",):
                    pass
                if self.peek() == "}":
                    self.take()
                value = self._times(value, lambda env: mp.pi / 180)
            elif token == "^":
                value = self._power(value, self.argument())
            elif token == "!":
                if self.peek() == "!":
                    raise Unknown("double factorial")
                value = self._called(mp.factorial, value)
            elif token in ("%", "\\%"):
                value = self._over(value, lambda env: mp.mpf(100))
        return value

    def _is_braced_degree(self) -> bool:
        return self.peek() == "{" and self.peek(1) == "\\circ" and self.peek(2) == "}"

    @staticmethod
    def _power(base: Scalar, exponent: Scalar) -> Scalar:
        def power(env: Env) -> Any:
            a, b = mp.mpc(base(env)), mp.mpc(exponent(env))
            if a.imag == 0 and a.real < 0 and b.real != int(b.real):
                raise ValueError("n may be an integer here")
            if abs(b) * abs(mp.log(abs(a) + 2)) > 9000:
                raise OverflowError
            return mp.power(a, b)

        return power

    @staticmethod
    def _called(function: Callable[[Any], Any], argument: Scalar) -> Scalar:
        return lambda env: function(argument(env))

    def argument(self) -> Scalar:
        """What a command or `^` takes: a group in braces or one token."""
        if self.peek() == "{":
            return self._braced()
        token = self.take()
        if re.fullmatch(r"\d+", token) and len(token) > 1:
            self.tokens[self.at - 1 : self.at] = list(token)
            token = token[0]
        if re.fullmatch(r"\d", token):
            number = mp.mpf(token)
            return lambda env: number
        self.at -= 1
        if (
            token in ("\\frac", "\\sqrt", "\\pi")
            or re.fullmatch(r"[a-zA-Z]", token)
            or _GREEK.match(token)
        ):
            return self.atom()
        raise Unknown(token)

    def _braced(self) -> Scalar:
        self.take("{")
        value = self.sum()
        self.take("}")
        return value

    def atom(self) -> Scalar:
        token = self.take()
        if re.match(r"[\d.]", token):
            number = mp.mpf(re.sub(r"[^\d.]", "", token))
            return self._based(number, token)
        if token == "{":
            self.at -= 1
            return self._braced()
        if token in ("(", "["):
            value = self.sum()
            self.take(")" if token == "(" else "]")
            return value
        if token == "|":
            value = self.sum()
            self.take("|")
            return self._called(abs, value)
        if token in ("\\lfloor", "\\lceil"):
            value = self.sum()
            self.take("\\rfloor" if token == "\\lfloor" else "\\rceil")
            return self._called(mp.floor if token == "\\lfloor" else mp.ceil, value)
        return self._named(token)

    def _based(self, number: Any, token: str) -> Scalar:
        if self.peek() != "_":
            return lambda env: number
        self.take()
        base = self.subscript()
        if not base.isdigit() or "." in token or not 2 <= int(base) <= 36:
            raise Unknown("a base")
        try:
            found = mp.mpf(int(token, int(base)))
        except ValueError as error:
            raise Unknown("a digit beyond its base") from error
        marker = mp.mpf(base)
        return lambda env: found + marker / 1000

    def subscript(self) -> str:
        if self.peek() != "{":
            return self.take()
        depth, name = 0, ""
        while True:
            token = self.take()
            depth += (token == "{") - (token == "}")
            name += token
            if depth == 0:
                return name[1:-1]

    def _named(self, token: str) -> Scalar:
        if token == "\\frac":
            return self._over(self.argument(), self.argument())
        if token == "\\binom":
            top, bottom = self.argument(), self.argument()
            return lambda env: mp.binomial(top(env), bottom(env))
        if token == "\\sqrt":
            return self._root()
        if token == "\\pi":
            return lambda env: +mp.pi
        if token == "\\infty":
            return lambda env: mp.mpf("1.2345e3000")
        if token == "\\log":
            return self._logarithm()
        if token in _FUNCTIONS:
            return self._function(_FUNCTIONS[token])
        if re.fullmatch(r"[a-zA-Z]", token) or _GREEK.match(token):
            return self._variable(token)
        raise Unknown(token)

    def _root(self) -> Scalar:
        degree: Scalar = lambda env: mp.mpf(2)  # noqa: E731
        if self.peek() == "[":
            self.take()
            degree = self.sum()
            self.take("]")
        inner = self.argument()
        return lambda env: mp.power(mp.mpc(inner(env)), 1 / degree(env))

    def _logarithm(self) -> Scalar:
        base: Scalar = lambda env: mp.e  # noqa: E731
        if self.peek() == "_":
            self.take()
            base = self.argument()
        inner = self._operand()
        return lambda env: mp.log(mp.mpc(inner(env))) / mp.log(mp.mpc(base(env)))

    def _function(self, function: Callable[[Any], Any]) -> Scalar:
        power: Scalar | None = None
        if self.peek() == "^":
            self.take()
            if self.peek() == "{" and self.peek(1) == "-":
                raise Unknown("an inverse function")
            power = self.argument()
        value = self._called(function, self._operand())
        return value if power is None else self._power(value, power)

    def _operand(self) -> Scalar:
        """What a function without braces takes: a bracketed group, or a run of plain factors."""
        if self.peek() in ("(", "{", "|"):
            opened = self.peek() == "("
            value = self.factor()
            if opened and self._starts_factor(self.peek()):
                raise Unknown("a factor after a function")
            return value
        value = self.factor()
        if self.peek() == "/":
            raise Unknown("a slash after a function")
        while re.match(r"[a-zA-Z]\Z|\\pi\Z|\\frac\Z", self.peek()) or _GREEK.match(self.peek()):
            value = self._times(value, self.factor())
        return value

    def _variable(self, name: str) -> Scalar:
        if self.peek() == "_":
            self.take()
            name += "_" + self.subscript()
        while self.peek() in ("'", "\\prime"):
            name += self.take()
        followed = re.match(r"[a-zA-Z]\Z", self.peek()) and re.match(r"[a-zA-Z]\Z", self.peek(1))
        if followed and name.isalpha() and len(name) == 1 and name not in "xyzabcnmktr":
            raise Unknown("a word")
        if name == "e":
            return lambda env: +mp.e
        if name == "i":
            return lambda env: mp.mpc(0, 1)
        opened = self.peek() == "("
        if opened and self.applies and re.match(r"[fghFGHPTVI]", name):
            self.take()
            inner = self.sum()
            self.take(")")
            return lambda env: mp.cos(env[name] * inner(env) + env[name + "@"]) + env[name + "+"]
        return lambda env: env[name]
