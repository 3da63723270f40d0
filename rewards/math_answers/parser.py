"""A small parser for final answers.

It runs in the trainer's process on text that a model wrote, so it evaluates nothing, bounds its length and depth, and
takes linear time. What it cannot read raises `Unreadable` and is left to the symbolic back end.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from .lexer import FUNCTIONS, Token, Unreadable, clean, tokenise

MAX_CHARS = 1000
"""Longer answers are refused: no reference answer of a public data set comes near."""
MAX_DEPTH = 40
_GREEK = frozenset((
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "kappa", "lambda", "mu", "nu", "xi",
    "rho", "sigma", "tau", "phi", "varphi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Sigma", "Phi",
    "Psi", "Omega", "ell",
))  # fmt: skip
_RELATIONS = {
    "=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\approx": "~", r"\equiv": "=",
}  # fmt: skip
_CLOSERS = {"(": ")]", "[": ")]", r"\{": r"\}"}


class Node(NamedTuple):
    """`kind` with `args`: child nodes, and for leaves the payload.

    num(Fraction, digits after the point or -1) var(name) const(name) text(words) add(..) mul(..) neg(a) div(a, b)
    pow(a, b) call(name, a[, b]) fact(a) pm(a, b) deg(a) pct(a) unit(a, words) base(digits, radix) apply(name, arg)
    group(open + close, items..) set(items..) list(items..) union(items..) ratio(items..) matrix(rows of items..)
    rel(ops, sides..) member(a, b) such(a, b)
    """

    kind: str
    args: tuple[object, ...]


def parse(text: str) -> Node:
    """The tree of an answer, e.g. `parse("x=5, y=2")` is a list of two relations. Raises Unreadable."""
    if len(text) > MAX_CHARS:
        raise Unreadable(f"longer than {MAX_CHARS} characters")
    tokens = tokenise(clean(text))
    if not tokens:
        raise Unreadable("empty")
    if all(token.kind == "text" or (token.kind == "op" and token.text in ",.'!-") for token in tokens):
        phrases = re.split(r"\s*,\s*|\band\b", " ".join(t.text for t in tokens))
        found = tuple(Node("text", (phrase.strip(),)) for phrase in phrases if phrase.strip())
        if found:
            return found[0] if len(found) == 1 else Node("list", found)
    parser = _Parser(tokens)
    tree = parser.items()
    if parser.at < len(tokens):
        raise Unreadable(f"unexpected {tokens[parser.at].text!r}")
    return tree


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        self.tokens, self.at, self.depth, self.bars = tokens, 0, 0, 0

    def peek(self, ahead: int = 0) -> str:
        index = self.at + ahead
        return self.tokens[index].text if index < len(self.tokens) else ""

    def kind(self, ahead: int = 0) -> str:
        index = self.at + ahead
        return self.tokens[index].kind if index < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        text = self.peek()
        if not text or (expected is not None and text != expected):
            raise Unreadable(f"expected {expected!r}, found {text!r}")
        self.at += 1
        return text

    def skip(self, *texts: str) -> bool:
        """Whether the next token is one of these, which is then taken."""
        found = self.peek() in texts
        self.at += found
        return found

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")

    def items(self) -> Node:
        """statement (sep statement)*"""
        found = [self.statement()]
        while self.skip(",", ";"):
            while self.skip(",", ";"):
                pass
            if not self.peek() or self.peek() in (")", "]", "}", r"\}"):
                break
            found.append(self.statement())
        return found[0] if len(found) == 1 else Node("list", tuple(found))

    def statement(self) -> Node:
        """[label:] union (relation union)*, or `x in S`, or a ratio."""
        if self.kind() == "text" and self.peek(1) in (":", "="):
            label = self.take()
            self.at += 1
            return Node("rel", ("=", Node("var", (label.lower(),)), self.union()))
        sides, ops = [self.ratio()], []
        while (op := self.peek()) in _RELATIONS:
            self.at += 1
            ops.append(_RELATIONS[op])
            sides.append(self.ratio())
        if ops:
            return Node("rel", (",".join(ops), *sides))
        if self.skip(r"\in"):
            return Node("member", (sides[0], self.union()))
        return sides[0]

    def ratio(self) -> Node:
        found = [self.union()]
        while self.skip(":"):
            found.append(self.union())
        return found[0] if len(found) == 1 else Node("ratio", tuple(found))

    def union(self) -> Node:
        found = [self.sum()]
        while self.skip(r"\cup", r"\bigcup"):
            found.append(self.sum())
        return found[0] if len(found) == 1 else Node("union", tuple(found))

    def sum(self) -> Node:
        self.enter()
        result: Node | None = None
        while True:
            sign = self.peek()
            if not self.skip("+", "-", r"\pm", r"\mp") and result is not None:
                break
            term = self.product()
            if sign in (r"\pm", r"\mp"):
                result = Node("pm", (result, term) if result is not None else (Node("num", (Fraction(0), -1)), term))
                continue
            term = Node("neg", (term,)) if sign == "-" else term
            result = term if result is None else Node("add", (result, term))
        self.depth -= 1
        return result

    def product(self) -> Node:
        result = self.factor()
        while True:
            token, kind = self.peek(), self.kind()
            if self.skip("*", r"\cdot", r"\times", r"\ast"):
                result = Node("mul", (result, self.factor()))
            elif self.skip("/", r"\div"):
                result = Node("div", (result, self.factor()))
            elif kind == "text":
                self.at += 1
                result = Node("unit", (result, token))
                if self.skip("^"):
                    self.argument()
            elif token == "(" and result.kind == "var" and not self.tokens[self.at].spaced:
                result = Node("apply", (result, self.brackets()))
            elif self.starts_factor(result):
                factor = self.factor()
                mixed = _is_integer(result) and factor.kind == "div" and all(_is_integer(a) for a in factor.args)
                result = Node("mixed" if mixed else "mul", (result, factor))
            else:
                return result

    def starts_factor(self, before: Node) -> bool:
        token, kind = self.peek(), self.kind()
        if kind == "num":  # `6 1/64` is a mixed number; other juxtaposed numbers are not a product
            if _is_integer(before) and self.tokens[self.at].spaced and self.peek(1) == "/" and self.kind(2) == "num":
                numerator, denominator = Fraction(token), Fraction(self.peek(2))
                self.tokens[self.at : self.at + 3] = [Token("fraction", f"{numerator}/{denominator}", True)]
                return True
            return before.kind not in ("num", "div", "mixed")
        if kind in ("var", "fraction"):
            return True
        if token in ("(", "[", "{"):
            return True
        if token == "|":
            return self.bars == 0 and self.peek(1) != "" and self.peek(1) != "|"
        return kind == "cmd" and (token[1:] in FUNCTIONS or token[1:] in _GREEK or token in _ATOMS)

    def factor(self) -> Node:
        self.enter()
        if self.peek() in ("-", "+"):
            sign = self.take()
            inner = self.factor()
            self.depth -= 1
            return Node("neg", (inner,)) if sign == "-" else inner
        result = self.postfix(self.atom())
        self.depth -= 1
        return result

    def postfix(self, result: Node) -> Node:
        while True:
            if self.skip("^"):
                result = Node("pow", (result, self.argument()))
            elif self.skip("!"):
                result = Node("fact", (result,))
            elif self.skip("%", r"\%"):
                result = Node("pct", (result,))
            elif self.skip(r"\deg"):
                result = Node("deg", (result,))
            elif result.kind in ("num", "var") and self.skip("_"):
                result = self.subscript(result)
            else:
                return result

    def subscript(self, before: Node) -> Node:
        braced = self.peek() == "{"
        start = self.at
        if braced:
            depth = 0
            while True:
                depth += {"{": 1, "}": -1}.get(self.take(), 0)
                if depth == 0:
                    break
        else:
            self.take()
        name = "".join(t.text for t in self.tokens[start : self.at]).strip("{}")
        if before.kind == "num":
            value = before.args[0]
            assert isinstance(value, Fraction)
            if value.denominator != 1 or not name.isdigit():
                raise Unreadable("a number with a subscript that is no base")
            return Node("base", (value.numerator, int(name)))
        return Node("var", (f"{before.args[0]}_{name}",))

    def argument(self) -> Node:
        """What follows ^, \\frac or \\sqrt: a braced expression or one token (`\\frac12`, `x^2`)."""
        self.enter()
        if self.skip("{"):
            inner = self.items()
            self.take("}")
        elif self.kind() == "num" and len(self.peek()) > 1 and self.peek(-1) != "^" and self.peek().isdigit():
            token = self.tokens[self.at]
            self.tokens[self.at : self.at + 1] = [Token("num", c, False) for c in token.text]
            inner = self.atom()
        elif self.peek() in ("-", "+"):
            sign = self.take()
            inner = self.atom()
            inner = Node("neg", (inner,)) if sign == "-" else inner
        else:
            inner = self.atom()
        self.depth -= 1
        return inner

    def atom(self) -> Node:
        token, kind = self.peek(), self.kind()
        if kind == "num":
            self.at += 1
            digits = len(token.split(".")[1]) if "." in token else -1
            return Node("num", (Fraction(token.rstrip(".")), digits))
        if kind == "fraction":
            self.at += 1
            top, bottom = token.split("/")
            return Node("div", (Node("num", (Fraction(top), -1)), Node("num", (Fraction(bottom), -1))))
        if kind == "var":
            self.at += 1
            return Node("const", (token,)) if token in ("e", "i") else Node("var", (token,))
        if kind == "text":
            self.at += 1
            return Node("text", (token,))
        if token in ("(", "[", "{", r"\{"):
            return self.brackets()
        if token in ("|", r"\|"):
            return self.absolute()
        if kind == "cmd":
            return self.command()
        raise Unreadable(f"unexpected {token!r}" if token else "ends too early")

    def brackets(self) -> Node:
        opening = self.take()
        bars, self.bars = self.bars, 0
        if opening == "{":
            inner = self.items()
            self.take("}")
            self.bars = bars
            return inner
        self.enter()
        if opening == r"\{":
            self.bars = 1  # a bar inside a set means `such that`
        inner = self.items()
        if opening == r"\{" and self.skip("|", ":", r"\mid"):
            inner = Node("such", (inner, self.items()))
        closing = self.take()
        if closing not in _CLOSERS[opening]:
            raise Unreadable(f"{opening!r} closed by {closing!r}")
        self.depth -= 1
        self.bars = bars
        if opening == r"\{":
            if inner.kind == "such":
                return inner
            return Node("set", inner.args if inner.kind == "list" else (inner,))
        if inner.kind == "list":
            return Node("group", (opening + closing, *inner.args))
        if opening + closing in ("()", "[]"):
            return inner
        raise Unreadable("unbalanced brackets")

    def absolute(self) -> Node:
        bar = self.take()
        self.bars += 1
        inner = self.sum()
        self.bars -= 1
        self.take(bar)
        return Node("call", ("abs", inner))

    def command(self) -> Node:
        token = self.take()
        name = token[1:]
        if token in (r"\pi", r"\infty"):
            return Node("const", (name,))
        if name in _GREEK:
            return Node("var", (name,))
        if token == r"\frac":
            return Node("div", (self.argument(), self.argument()))
        if token == r"\binom":
            return Node("call", ("binom", self.argument(), self.argument()))
        if token == r"\sqrt":
            if self.skip("["):
                degree = self.sum()
                self.take("]")
                return Node("pow", (self.argument(), Node("div", (Node("num", (Fraction(1), -1)), degree))))
            return Node("call", ("sqrt", self.argument()))
        if token in (r"\lfloor", r"\lceil"):
            inner = self.sum()
            self.take(r"\rfloor" if token == r"\lfloor" else r"\rceil")
            return Node("call", ("floor" if token == r"\lfloor" else "ceil", inner))
        if token == r"\begin":
            return self.matrix()
        if token in (r"\emptyset", r"\varnothing"):
            return Node("set", ())
        if name in FUNCTIONS:
            return self.function(name)
        raise Unreadable(f"unknown command {token}")

    def function(self, name: str) -> Node:
        base: Node | None = None
        power: Node | None = None
        while self.peek() in ("^", "_"):
            if self.take() == "_":
                base = self.argument()
            else:
                power = self.argument()
        if self.peek() in ("(", "[", "{"):
            inner = self.brackets()
        else:  # \sin 2x \cos y: the argument is the product up to the next function
            inner = self.factor()
            while self.kind() in ("num", "var") or self.peek() in (r"\pi", r"\frac", "/") or self.peek()[1:] in _GREEK:
                if self.skip("/"):
                    inner = Node("div", (inner, self.factor()))
                else:
                    inner = Node("mul", (inner, self.factor()))
        if inner.kind in ("list", "group"):
            call = Node("call", (name, *(a for a in inner.args if isinstance(a, Node))))
        else:
            call = Node("call", (name, inner) if base is None else (name, inner, base))
        if power is not None:
            if power == Node("neg", (Node("num", (Fraction(1), -1)),)):
                return Node("call", ("arc" + name, inner))
            return Node("pow", (call, power))
        return call

    def matrix(self) -> Node:
        self.take("{")
        name = ""
        while self.peek() != "}":
            name += self.take()
        self.take("}")
        if not name.endswith("matrix"):
            raise Unreadable(f"environment {name}")
        rows: list[tuple[Node, ...]] = []
        row: list[Node] = []
        while self.peek() != r"\end":
            if self.skip(r"\\"):
                rows.append(tuple(row))
                row = []
            elif not self.skip("&"):
                row.append(self.sum())
        self.take(r"\end")
        while self.take() != "}":
            pass
        if row:
            rows.append(tuple(row))
        return Node("matrix", tuple(rows))


_ATOMS = frozenset((r"\pi", r"\infty", r"\frac", r"\sqrt", r"\binom", r"\lfloor", r"\lceil", r"\{", r"\begin"))


def _is_integer(node: object) -> bool:
    return isinstance(node, Node) and node.kind == "num" and node.args[1] == -1
