"""The lowest level of the grammar: names, brackets, functions, big operators, matrices, cases."""

from __future__ import annotations

import re

from .lexer import FUNCTIONS, Token
from .reader import Reader, Unreadable
from .tree import Kind, Node, negative, number
from .units import read_unit, words

GREEK = words(
    "alpha beta gamma delta epsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho varrho "
    "sigma tau upsilon varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi "
    "Omega Pi ell hbar nabla partial Re Im aleph imath jmath"
)
_CASE_FILLER = frozenset(("if", "when", "for", "is", "are", "", "where", "and"))
GREEK_FUNCTIONS = ("varphi", "psi", "Phi", "Psi", "Gamma")
_INVERTED = words("sin cos tan cot sec csc sinh cosh tanh")
ACCENTS = words(
    "hat bar vec dot ddot tilde overline overrightarrow underline overleftrightarrow overset"
)
BIG = {"\\" + name: name for name in ("sum", "prod", "int", "lim", "iint", "iiint", "oint")}
_CLOSERS = {"(": ")]", "[": ")]", r"\{": r"\}", r"\langle": r"\rangle"}


class Atoms(Reader):
    """atom := number | name | brackets | bars | command"""

    def atom(self) -> Node:
        token, kind = self.peek(), self.kind()
        if kind == "number":
            return self.numeral()
        if kind in ("name", "letter"):
            return self.name()
        if kind == "run":
            self.at += 1
            return Node(Kind.RUN, (), token + self.subscript())
        if kind == "text":
            self.at += 1
            return Node(Kind.TEXT, (), token)
        if kind == "sign" and token in "$€£¥₹" and self.kind(1) == "number":
            self.at += 1
            return Node(Kind.QUANTITY, (self.numeral(),), read_unit(token))
        if token in ("(", "[", "{", r"\{", r"\langle"):
            return self.brackets()
        if token in ("|", r"\|"):
            return self.absolute()
        if kind == "command":
            return self.command()
        if token == "." and self.peek(1) == "." and self.peek(2) == ".":
            self.at += 3
            return Node(Kind.DOTS)
        raise Unreadable(f"unexpected {token!r}" if token else "ends too early")

    def name(self, applied: bool = True) -> Node:
        token = self.take()
        if token in ("mathbb R", "mathbb Z", "mathbb N", "mathbb Q", "mathbb C"):
            return Node(Kind.NAME, (), token + self.superscript_sign())
        if token in ("e", "i") and self.peek() != "_":
            return Node(Kind.CONSTANT, (), token)
        result = Node(Kind.NAME, (), token + self.subscript())
        return self.application(result) if applied and self.peek() == "(" else result

    def superscript_sign(self) -> str:
        """The sign of a number set, as in `\\mathbb{R}^+` and `\\mathbb{Z}_{>0}`; empty if there is
        none."""
        start = self.at
        if self.peek() in ("^", "_"):
            self.at += 1
            self.braced_tokens()
        return "".join(t.text for t in self.tokens[start : self.at])

    def subscript(self) -> str:
        if self.peek() != "_":
            return ""
        self.at += 1
        return "_" + self.braced_tokens()

    def braced_tokens(self) -> str:
        """The tokens of a subscript joined, without the braces around all of them."""
        if self.peek() != "{":
            return self.take()
        start, depth = self.at, 0
        while True:
            depth += {"{": 1, "}": -1}.get(self.take(), 0)
            if depth == 0:
                return "".join(t.text for t in self.tokens[start + 1 : self.at - 1])

    def application(self, name: Node) -> Node:
        if self.peek(1) in (r"\bmod", r"\mod") or self.peek(1) == ")":
            return name
        inner = self.brackets()
        if inner.kind is Kind.GROUP and inner.data != "()":
            raise Unreadable("a half-open bracket after a name")
        return Node(Kind.APPLY, (name, inner))

    def brackets(self) -> Node:
        opening = self.take()
        bars = self.bars
        self.bars = 0
        self.enter()
        if opening == "{":
            inner = self.braced()
        elif opening == r"\{":
            inner = self.braces()
        else:
            if opening in "([" and self.peek() in (")", "]"):
                raise Unreadable("empty brackets")
            inner = self.items()
            self.skip(".")
            closing = self.take()
            if closing not in (_CLOSERS[opening] if opening != r"\langle" else (r"\rangle",)):
                raise Unreadable(f"{opening!r} closed by {closing!r}")
            if inner.kind is Kind.LIST:
                inner = Node(
                    Kind.GROUP, inner.args, "()" if opening == r"\langle" else opening + closing
                )
            elif opening + closing not in ("()", "[]"):
                raise Unreadable("unbalanced brackets")
            elif inner.kind is Kind.RELATION and opening == "[":
                raise Unreadable("a relation in square brackets")
        self.depth -= 1
        self.bars = bars
        return inner

    def braced(self) -> Node:
        inner = self.quotient_items()
        self.take("}")
        return inner

    def quotient_items(self) -> Node:
        """Items, or the quotient `a \\over b` or binomial `n \\choose k` of two."""
        inner = self.items()
        if self.skip(r"\over"):
            return Node(Kind.QUOTIENT, (inner, self.items()))
        if self.skip(r"\choose"):
            return Node(Kind.CALL, (inner, self.items()), "binom")
        return inner

    def braces(self) -> Node:
        """A set by its items, or by an element and its condition."""
        self.bars = 1  # a bar or a colon inside means `such that`
        if self.skip(r"\}"):
            return Node(Kind.SET)
        inner = self.items()
        if self.skip("|", ":"):
            self.bars = 0
            inner = Node(Kind.BUILDER, (inner, self.items()))
        self.take(r"\}")
        if inner.kind is Kind.BUILDER:
            return inner
        return Node(Kind.SET, inner.args if inner.kind is Kind.LIST else (inner,))

    def absolute(self) -> Node:
        bar = self.take()
        self.bars += 1
        inner = self.sum()
        self.bars -= 1
        self.take(bar)
        return Node(Kind.CALL, (inner,), "abs" if bar == "|" else "norm")

    def command(self) -> Node:
        token = self.take()
        name = token[1:]
        if token in (r"\pi", r"\infty"):
            return Node(Kind.CONSTANT, (), name)
        if name in GREEK:
            result = Node(Kind.NAME, (), name + self.subscript())
            applied = self.peek() == "(" and name in GREEK_FUNCTIONS
            return self.application(result) if applied else result
        if token == r"\frac":
            return _fraction(self.argument(), self.argument())
        if token == r"\binom":
            return Node(Kind.CALL, (self.argument(), self.argument()), "binom")
        if token in (r"\sqrt", r"\cbrt"):
            return self.root(token)
        if token in (r"\lfloor", r"\lceil"):
            inner = self.sum()
            self.take(r"\rfloor" if token == r"\lfloor" else r"\rceil")
            return Node(Kind.CALL, (inner,), "floor" if token == r"\lfloor" else "ceil")
        if token == r"\begin":
            return self.environment()
        if token == r"\emptyset":
            return Node(Kind.SET)
        if token == r"\ldots":
            return Node(Kind.DOTS)
        if token in BIG:
            return self.big(BIG[token])
        if token in (r"\angle", r"\triangle", r"\measuredangle"):
            letters = self.braced_tokens()
            corners = letters.split() if " " in letters else list(letters)
            if token != r"\triangle" and len(corners) == 3:  # either side may come first
                letters = " ".join(min(corners, corners[::-1]))
            return Node(Kind.RUN, (), f"{name} {letters}")
        if name in ACCENTS and name != "overset":
            return Node(Kind.NAME, (), f"{name} {self.braced_tokens()}{self.subscript()}")
        if name in FUNCTIONS:
            return self.function(name)
        raise Unreadable(f"unknown command {token}")

    def root(self, token: str) -> Node:
        if token == r"\cbrt":
            return Node(Kind.POWER, (self.argument(), Node(Kind.QUOTIENT, (number(1), number(3)))))
        if self.skip("["):
            degree = self.sum()
            self.take("]")
            return Node(Kind.POWER, (self.argument(), Node(Kind.QUOTIENT, (number(1), degree))))
        return Node(Kind.CALL, (self.argument(),), "sqrt")

    def function(self, name: str) -> Node:
        base: Node | None = None
        power: Node | None = None
        while self.peek() in ("^", "_"):
            if self.take() == "_":
                base = self.argument()
            else:
                power = self.argument()
        if self.peek() in ("(", "[", "{", r"\{"):
            inner = self.brackets()
        else:  # \sin 2x \cos y: the argument is the product up to the next function
            inner = self.function_argument()
        arguments = inner.args if inner.kind in (Kind.LIST, Kind.GROUP, Kind.SET) else (inner,)
        call = Node(
            Kind.CALL,
            arguments if base is None else (*arguments, base),
            name if base is None or name == "log" else f"{name}_",
        )
        if power is None:
            return call
        if power == negative(number(1)) and name in _INVERTED:
            return Node(Kind.CALL, arguments, "arc" + name)
        return Node(Kind.POWER, (call, power))

    def function_argument(self) -> Node:
        named = self.kind() in ("name", "letter")
        factors = [self.postfix(self.name(applied=False)) if named else self.factor()]
        while self._goes_on():
            if self.kind() == "number" and factors[-1].kind is not Kind.POWER:
                raise Unreadable("numbers side by side")
            part = self.name(applied=False) if self.kind() == "name" else self.atom()
            factors.append(self.postfix(part))
        simple = all(f.kind in (Kind.NUMBER, Kind.NAME, Kind.CONSTANT) for f in factors)
        if simple and self.kind(1) == "number" and self.skip("/"):
            factors.append(Node(Kind.INVERSE, (self.factor(),)))
        return factors[0] if len(factors) == 1 else Node(Kind.PRODUCT, tuple(factors))

    def _goes_on(self) -> bool:
        """Whether the argument of a function without brackets goes on, as in `\\sin 2x`."""
        token = self.peek()
        starts = token in (r"\pi", r"\frac", r"\sqrt") or token[1:] in GREEK
        return starts or self.kind() in ("number", "name")

    def big(self, name: str) -> Node:
        """\\sum_{k=1}^{n} body, \\int_a^b body dx, \\lim_{x \\to a} body; the body is the product
        that follows."""
        lower = upper = Node(Kind.LIST)
        variable = ""
        while self.peek() in ("_", "^"):
            if self.take() == "^":
                upper = self.argument()
                continue
            lower = self.argument()
            bound = lower.kind is Kind.RELATION and lower.data in (("=",), ("to",))
            if bound and lower.args[0].kind is Kind.NAME:
                variable, lower = str(lower.args[0].data), lower.args[1]
        self.enter()
        if name in ("int", "iint", "iiint", "oint"):
            body = self.sum()
            body, variable = _integrand(body)
        else:
            body = self.product()
        self.depth -= 1
        return Node(Kind.BIG, (body, lower, upper), (name, variable))

    def environment(self) -> Node:
        self.take("{")
        name = ""
        while self.peek() != "}":
            name += self.take()
        self.take("}")
        if name == "array" and self.peek() == "{":
            self.braced_tokens()
        if not name.endswith("matrix") and name not in ("cases", "array", "rcases", "dcases"):
            raise Unreadable(f"environment {name}")
        self.enter()
        rows: list[list[Node]] = [[]]
        while self.peek() != r"\end":
            if not self.peek():
                raise Unreadable("an environment without its end")
            if self.skip(r"\\"):
                rows.append([])
            elif name.endswith("cases") and rows[-1]:
                rows[-1].append(self.case_condition())
            elif not self.skip("&"):
                rows[-1].append(self.chain() if name.endswith("cases") else self.sum())
        self.take(r"\end")
        while self.take() != "}":
            pass
        self.depth -= 1
        lists = tuple(Node(Kind.LIST, tuple(row)) for row in rows if row)
        if name.endswith("cases"):
            if all(len(row.args) == 1 and row.args[0].kind is Kind.RELATION for row in lists):
                return Node(Kind.LIST, tuple(row.args[0] for row in lists))
            return Node(Kind.CASES, lists)
        return Node(Kind.MATRIX, lists, name if name in ("vmatrix", "Vmatrix") else "matrix")

    def case_condition(self) -> Node:
        """The condition in a row of cases: a relation, or its words without fillers such as `if`
        and `is`."""
        words: list[Token] = []
        while self.peek() and self.peek() not in (r"\\", r"\end"):
            token = self.tokens[self.at]
            self.at += 1
            if token.kind == "text":
                kept = [
                    w for w in re.split(r"[\s,.]+", token.text) if w.lower() not in _CASE_FILLER
                ]
                words += [Token("text", word) for word in kept]
            elif token.text not in ("&", ",", "."):
                words.append(token)
        return self.inner(words) if words else Node(Kind.TEXT, (), "")


def _fraction(top: Node, bottom: Node) -> Node:
    """A quotient, or a derivative in Leibniz's form: `\\frac{dv}{dt}`, `\\frac{\\partial^2
    u}{\\partial x^2}`."""

    def is_differential(node: Node) -> bool:
        first = node.args[0] if node.kind is Kind.PRODUCT else node
        if first.kind is Kind.POWER:
            first = first.args[0]
        return first.kind is Kind.NAME and first.data in ("d", "partial")

    if is_differential(bottom) and bottom.kind is Kind.PRODUCT and is_differential(top):
        return Node(Kind.DERIVATIVE, (top, bottom))
    return Node(Kind.QUOTIENT, (top, bottom))


def _integrand(body: Node) -> tuple[Node, str]:
    """The integrand without its `dx`, and the variable. Raises Unreadable if there is no `dx`."""
    terms = body.args if body.kind is Kind.SUM else (body,)
    last = terms[-1]
    factors = last.args if last.kind is Kind.PRODUCT else (last,)
    differential = len(factors) > 1 and factors[-2] == Node(Kind.NAME, (), "d")
    if not differential or factors[-1].kind is not Kind.NAME:
        raise Unreadable("an integral without its variable")
    rest = factors[:-2]
    last = number(1) if not rest else rest[0] if len(rest) == 1 else Node(Kind.PRODUCT, rest)
    body = last if len(terms) == 1 else Node(Kind.SUM, (*terms[:-1], last))
    return body, str(factors[-1].data)
