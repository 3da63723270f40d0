"""Functions, big operators, matrices and cases."""

from __future__ import annotations

import re

from .lexer import Token
from .numerals import Numerals
from .reader import Unreadable
from .tree import Kind, Node, negative, number
from .units import words

GREEK = words(
    "alpha beta gamma delta epsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho varrho sigma tau "
    "upsilon varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega Pi ell hbar nabla "
    "partial Re Im aleph imath jmath"
)
_CASE_FILLER = frozenset(("if", "when", "for", "is", "are", "", "where", "and"))


class Functions(Numerals):
    """function := "\\sin" ["^" argument] argument | "\\sum_{k=1}^{n}" product | "\\begin{...}" rows "\\end{...}" """

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
        if power == negative(number(1)) and name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh"):
            return Node(Kind.CALL, arguments, "arc" + name)
        return Node(Kind.POWER, (call, power))

    def function_argument(self) -> Node:
        factors = [self.postfix(self.name(applied=False)) if self.kind() in ("name", "letter") else self.factor()]
        while (
            self.kind() in ("number", "name") or self.peek() in (r"\pi", r"\frac", r"\sqrt") or self.peek()[1:] in GREEK
        ):
            if self.kind() == "number" and factors[-1].kind is not Kind.POWER:
                raise Unreadable("numbers side by side")
            factors.append(self.postfix(self.name(applied=False) if self.kind() == "name" else self.atom()))
        if (
            self.peek() == "/"
            and all(f.kind in (Kind.NUMBER, Kind.NAME, Kind.CONSTANT) for f in factors)
            and self.kind(1) == "number"
        ):
            self.at += 1
            factors.append(Node(Kind.INVERSE, (self.factor(),)))
        return factors[0] if len(factors) == 1 else Node(Kind.PRODUCT, tuple(factors))

    def big(self, name: str) -> Node:
        """\\sum_{k=1}^{n} body, \\int_a^b body dx, \\lim_{x \\to a} body; the body is the product that follows."""
        lower = upper = Node(Kind.LIST)
        variable = ""
        while self.peek() in ("_", "^"):
            if self.take() == "^":
                upper = self.argument()
                continue
            lower = self.argument()
            if lower.kind is Kind.RELATION and lower.args[0].kind is Kind.NAME and lower.data in (("=",), ("to",)):
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
        found = tuple(Node(Kind.LIST, tuple(row)) for row in rows if row)
        if name.endswith("cases"):
            if all(len(row.args) == 1 and row.args[0].kind is Kind.RELATION for row in found):
                return Node(Kind.LIST, tuple(row.args[0] for row in found))
            return Node(Kind.CASES, found)
        return Node(Kind.MATRIX, found, name if name in ("vmatrix", "Vmatrix") else "matrix")

    def case_condition(self) -> Node:
        """The rest of a row of cases: a relation, or words without `if`, `is` and the like."""
        words: list[Token] = []
        while self.peek() and self.peek() not in (r"\\", r"\end"):
            token = self.tokens[self.at]
            self.at += 1
            if token.kind == "text":
                kept = [w for w in re.split(r"[\s,.]+", token.text) if w.lower() not in _CASE_FILLER]
                words += [Token("text", word) for word in kept]
            elif token.text not in ("&", ",", "."):
                words.append(token)
        return self.inner(words) if words else Node(Kind.TEXT, (), "")


def _integrand(body: Node) -> tuple[Node, str]:
    """The body without its `dx`, and x."""
    terms = body.args if body.kind is Kind.SUM else (body,)
    last = terms[-1]
    factors = last.args if last.kind is Kind.PRODUCT else (last,)
    if len(factors) < 2 or factors[-2] != Node(Kind.NAME, (), "d") or factors[-1].kind is not Kind.NAME:
        raise Unreadable("an integral without its variable")
    rest = factors[:-2]
    last = number(1) if not rest else rest[0] if len(rest) == 1 else Node(Kind.PRODUCT, rest)
    body = last if len(terms) == 1 else Node(Kind.SUM, (*terms[:-1], last))
    return body, str(factors[-1].data)
