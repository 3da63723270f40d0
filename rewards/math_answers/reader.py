"""Reading tokens one after the other: what every level of the grammar shares."""

from __future__ import annotations

from abc import ABC, abstractmethod

from .lexer import Token
from .tree import Kind, Node, negative

MAX_DEPTH = 30
"""Brackets, arguments and signs within each other."""


class Unreadable(ValueError):
    """The text is outside the grammar (it may still be mathematics)."""


class TooDeep(ValueError):
    """More levels than anyone writes: a degenerate text."""


class Reader(ABC):
    """A place in a list of tokens. `bars`: how many `|` are open; `depth`: levels open now."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens, self.at, self.depth, self.bars = tokens, 0, 0, 0

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
        """Whether the next token is one of these, which is then taken."""
        found = self.kind() not in ("text", "") and self.peek() in texts
        self.at += found
        return found

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooDeep("nested too deeply")

    # what a lower level asks of a higher one

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
    def atom(self) -> Node: ...

    @abstractmethod
    def name(self, applied: bool = True) -> Node: ...

    @abstractmethod
    def brackets(self) -> Node: ...

    @abstractmethod
    def braced_tokens(self) -> str: ...

    @abstractmethod
    def inner(self, tokens: list[Token]) -> Node:
        """The tree of tokens by themselves."""


def whole(node: Node) -> bool:
    return (
        node.kind is Kind.NUMBER
        and isinstance(node.data, tuple)
        and node.data[1] == -1
        and node.data[0].denominator == 1
    )


def negated(node: Node) -> Node:
    """The sign goes inside a quantity: -5 cm is minus five, in centimetres."""
    if node.kind is Kind.QUANTITY:
        return Node(Kind.QUANTITY, (negated(node.args[0]),), node.data)
    return negative(node)
