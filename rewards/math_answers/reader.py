"""The token reader that all levels of the grammar share, and the reading of numerals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from fractions import Fraction

from .lexer import Token
from .tree import Kind, Node, negative, number, number_of

# An answer of 500 nested signs once raised RecursionError and so ended a whole run.
MAX_DEPTH = 30
"""Deepest nesting of brackets, arguments and signs."""
MAX_EXPONENT = 4000
"""Largest exponent of a number in e-notation; its power of ten is computed exactly."""
_BASES = {
    **{"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9},
    **{"ten": 10, "twelve": 12, "sixteen": 16},
}


class Unreadable(ValueError):
    """The text is outside the grammar (it may still be mathematics)."""


class TooDeep(ValueError):
    """The text is nested more deeply than any answer is."""


class Reader(ABC):
    """A position in a list of tokens. `bars`: number of open `|`; `depth`: number of open
    levels."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.bars = 0

    def peek(self, ahead: int = 0) -> str:
        index = self.at + ahead
        return self.tokens[index].text if index < len(self.tokens) else ""

    def kind(self, ahead: int = 0) -> str:
        index = self.at + ahead
        return self.tokens[index].kind if index < len(self.tokens) else ""

    def spaced(self) -> bool:
        return self.at < len(self.tokens) and self.tokens[self.at].spaced

    def take(self, *expected: str) -> str:
        text = self.peek()
        if not text or (expected and text not in expected):
            raise Unreadable(f"expected {expected!r}, found {text!r}")
        self.at += 1
        return text

    def skip(self, *texts: str) -> bool:
        """Consumes the next token if it is one of `texts` and not a word; returns whether it
        was."""
        skipped = self.kind() not in ("text", "") and self.peek() in texts
        self.at += skipped
        return skipped

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooDeep("nested too deeply")

    # numeral := digits ["." digits] ["e" digits] | digits "." "\\overline" digits | digits "_" base

    def numeral(self) -> Node:
        text = self.take()
        mantissa, _, exponent = text.lower().partition("e")
        # 58 of Minerva's 272 references are written like 3.83e35
        if exponent:
            if abs(int(exponent)) > MAX_EXPONENT:
                raise TooDeep("a number of too many digits")
            return Node(Kind.NUMBER, (), (Fraction(mantissa) * Fraction(10) ** int(exponent), -1))
        digits = len(text.split(".")[1]) if "." in text else -1
        if (repeating := self.repeating(text)) is not None:
            return repeating
        if self.peek() == "_" and digits < 0:
            return self.based(text)
        if self.kind() == "text" and self.peek() == "th" and not self.tokens[self.at].spaced:
            self.at += 1
        return Node(Kind.NUMBER, (), (Fraction(text), digits))

    def repeating(self, text: str) -> Node | None:
        """The value of a repeating decimal, else None: `0.\\overline{3}`, `0.1\\dot{6}`,
        `0.\\dot{1}4285\\dot{7}`, `0.(3)`."""
        start, sign = self.at, self.peek()
        if sign == "." and self.peek(1) in (r"\overline", r"\dot", r"\bar"):
            self.at += 1
            text += "."
        elif sign not in (r"\overline", r"\dot", r"\bar") or "." not in text:
            bracketed = sign == "(" and self.kind(1) == "number" and self.peek(2) == ")"
            if not bracketed or "." not in text or self.spaced():
                return None
            digits = self.peek(1)
            self.at += 3
            return _repeating(text, digits) if digits.isdigit() else None
        opening = self.take()
        digits = self.digits()
        if opening == r"\dot" and self.kind() == "number" and self.peek(1) == r"\dot":
            digits += self.take()
            self.at += 1
            digits += self.digits()
        elif opening == r"\dot" and self.peek() == r"\dot":
            self.at += 1
            digits += self.digits()
        if not digits.isdigit():
            self.at = start
            return None
        return _repeating(text, digits)

    def digits(self) -> str:
        if self.skip("{"):
            token = self.take()
            self.take("}")
            return token
        token = self.take()
        if len(token) > 1 and token.isdigit():
            self.at -= 1
            self.tokens = [
                *self.tokens[: self.at],
                Token("number", token[1:]),
                *self.tokens[self.at + 1 :],
            ]
            return token[0]
        return token

    def based(self, text: str) -> Node:
        self.take("_")
        base = self.argument()
        if base.kind is Kind.TEXT and str(base.data).lower() in _BASES:
            base = number(_BASES[str(base.data).lower()])
        if not whole(base) or not 2 <= number_of(base) <= 36:
            raise Unreadable("a number with a subscript that is no base")
        return Node(Kind.BASED, (), (text.lstrip("0") or "0", int(number_of(base))))

    # the higher levels of the grammar, which the lower ones call

    @abstractmethod
    def items(self) -> Node: ...

    @abstractmethod
    def chain(self) -> Node: ...

    @abstractmethod
    def sum(self) -> Node: ...

    @abstractmethod
    def product(self) -> Node: ...

    @abstractmethod
    def factor(self) -> Node: ...

    @abstractmethod
    def postfix(self, result: Node) -> Node: ...

    @abstractmethod
    def argument(self) -> Node: ...

    @abstractmethod
    def inner(self, tokens: list[Token]) -> Node:
        """The tree of these tokens, parsed by themselves."""


def whole(node: Node) -> bool:
    """Whether a node is an integer written without a decimal point."""
    if node.kind is not Kind.NUMBER or not isinstance(node.data, tuple):
        return False
    value, digits = node.data
    return bool(digits == -1 and value.denominator == 1)


def negated(node: Node) -> Node:
    """Minus a node. In a quantity the number is negated, so that -5 cm is minus five, in
    centimetres."""
    if node.kind is Kind.QUANTITY:
        return Node(Kind.QUANTITY, (negated(node.args[0]),), node.data)
    return negative(node)


def _repeating(text: str, digits: str) -> Node:
    before, _, after = text.partition(".")
    period = Fraction(int(digits), (10 ** len(digits) - 1) * 10 ** len(after))
    return number(Fraction(f"{before or 0}.{after or 0}") + period)
