"""Numbers as they are written: decimals, e-notation, repeating decimals, other bases."""

from __future__ import annotations

from fractions import Fraction

from .lexer import Token
from .reader import Reader, TooDeep, Unreadable, whole
from .tree import Kind, Node, number, number_of

MAX_EXPONENT = 4000
"""Digits that a number in e-notation may have."""
_BASES = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "twelve": 12,
    "sixteen": 16,
}


class Numerals(Reader):
    """numeral := digits ["." digits] ["e" digits] | digits "." "\\overline" digits | digits "_" base"""

    def numeral(self) -> Node:
        text = self.take()
        mantissa, _, exponent = text.lower().partition("e")
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
        """`0.\\overline{3}`, `0.1\\dot{6}`, `0.\\dot{1}4285\\dot{7}`, `0.(3)`."""
        start, sign = self.at, self.peek()
        if sign == "." and self.peek(1) in (r"\overline", r"\dot", r"\bar"):
            self.at += 1
            text += "."
        elif sign not in (r"\overline", r"\dot", r"\bar") or "." not in text:
            if sign != "(" or "." not in text or self.kind(1) != "number" or self.peek(2) != ")" or self.spaced():
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
            found = self.take()
            self.take("}")
            return found
        found = self.take()
        if len(found) > 1 and found.isdigit():
            self.at -= 1
            self.tokens = [*self.tokens[: self.at], Token("number", found[1:]), *self.tokens[self.at + 1 :]]
            return found[0]
        return found

    def based(self, text: str) -> Node:
        self.take("_")
        base = self.argument()
        if base.kind is Kind.TEXT and str(base.data).lower() in _BASES:
            base = number(_BASES[str(base.data).lower()])
        if not whole(base) or not 2 <= number_of(base) <= 36:
            raise Unreadable("a number with a subscript that is no base")
        return Node(Kind.BASED, (), (text.lstrip("0") or "0", int(number_of(base))))


def _repeating(text: str, digits: str) -> Node:
    before, _, after = text.partition(".")
    period = Fraction(int(digits), (10 ** len(digits) - 1) * 10 ** len(after))
    return number(Fraction(f"{before or 0}.{after or 0}") + period)
