"""The levels of the grammar for sums, products with their units, powers and signs."""

from __future__ import annotations

from .atoms import ACCENTS, BIG, GREEK, GREEK_FUNCTIONS, Atoms
from .lexer import FUNCTIONS, Token
from .reader import TooDeep, Unreadable, negated, whole
from .tree import Kind, Node, negative, number, number_of, walk
from .units import DEGREE, MULTIPLIERS, PERCENT, Unit, read_unit

_STARTERS = frozenset((
    r"\pi", r"\infty", r"\frac", r"\sqrt", r"\cbrt", r"\binom", r"\lfloor", r"\lceil", r"\{",
    r"\begin", r"\angle", r"\triangle", r"\langle", r"\ldots", r"\emptyset", r"\|",
))  # fmt: skip


_FUNCTION_NAMES = ("f", "g", "h", "F", "G", "H")
MODULO = (r"\bmod", r"\mod", "mod")


class Terms(Atoms):
    """sum := [sign] term ((sign) term)*, term := factor (["*" | "/"] factor)* [unit]"""

    def sum(self) -> Node:
        self.enter()
        terms: list[Node] = []
        while True:
            sign = self.peek() if self.kind() != "text" else ""
            if not self.skip("+", "-", r"\pm", r"\mp") and terms:
                break
            if not terms and sign == "+" and not self.peek():
                raise Unreadable("a sign alone")
            term = self.product()
            if sign in (r"\pm", r"\mp"):
                term = Node(Kind.PLUS_MINUS, (term,), "+-" if sign == r"\pm" else "-+")
            terms.append(negated(term) if sign == "-" else term)
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Node(Kind.SUM, tuple(terms))

    def product(self) -> Node:
        factors = [self.factor()]
        while True:
            if self.skip("*"):
                factors.append(self.factor())
            elif self.skip("/"):
                bottom = self.factor()
                if len(factors) == 1:
                    factors = [Node(Kind.QUOTIENT, (factors[0], bottom))]
                else:
                    factors.append(Node(Kind.INVERSE, (bottom,)))
            elif (unit := self.unit(factors)) is not None:
                body = factors[0] if len(factors) == 1 else Node(Kind.PRODUCT, tuple(factors))
                factors = [Node(Kind.QUANTITY, (body,), unit)]
            elif (mixed := self.mixed(factors[-1])) is not None:
                factors[-1] = mixed
            elif self.starts_atom():
                bare, fraction = self.kind() == "number" or self.peek() == "{", self.peek() != "("
                factor = self.postfix(self.atom())
                # `4 5` is neither 45 nor 20, and as a hedge must equal neither.
                if bare and factor.kind is Kind.NUMBER and factors[-1].kind is not Kind.POWER:
                    raise Unreadable("numbers side by side")
                # a mixed number or a product: the text does not say
                if (
                    fraction
                    and factors[-1].kind is Kind.NUMBER
                    and factor.kind is Kind.QUOTIENT
                    and whole(factor.args[0])
                ):
                    raise Unreadable("a number beside a fraction")
                factors.append(factor)
            else:
                break
        return factors[0] if len(factors) == 1 else Node(Kind.PRODUCT, _flat(factors))

    def mixed(self, before: Node) -> Node | None:
        """The mixed number `1\\frac45` or `1 4/5`, of the integer `before` and a proper fraction;
        None if none follows."""
        if not whole(before):
            return None
        start = self.at
        if self.skip(r"\frac"):
            fraction = Node(Kind.QUOTIENT, (self.argument(), self.argument()))
        elif (
            self.kind() == "number"
            and self.spaced()
            and self.peek(1) == "/"
            and self.kind(2) == "number"
        ):
            top = self.numeral()
            self.at += 1
            fraction = Node(Kind.QUOTIENT, (top, self.numeral()))
        else:
            return None
        top, bottom = fraction.args
        if (
            whole(top)
            and whole(bottom)
            and 0 < number_of(top) < number_of(bottom)
            and self.peek() != "/"
        ):
            return Node(Kind.MIXED, (before, fraction))
        self.at = start
        return None

    def unit(self, factors: list[Node]) -> Unit | None:
        """The unit of the number before; None if the next tokens are no unit."""
        if self.kind() not in ("text", "letter", "run", "sign", "name") or len(factors) > 8:
            return None
        text = self.peek()
        if self.kind() == "text":
            if self.peek().lower() in MULTIPLIERS:
                self.at += 1
                factors.append(number(MULTIPLIERS[text.lower()]))
                if len(factors) == 2 and factors[0].kind is Kind.NUMBER:
                    factors[:] = [number(number_of(factors[0]) * number_of(factors[1]))]
                return None if not self.peek() else self.unit(factors)
        elif self.kind() == "sign":
            if text not in "$€£¥₹" or not _is_numeric(factors):
                return None
        elif not _is_numeric(factors) or (self.kind() == "name" and not self._last_letter()):
            return None
        start, pieces, noun = self.at, list[str](), True
        while self.peek():
            if self.kind() in ("text", "letter", "run", "name"):
                noun &= self.kind() == "text"
                pieces.append(self.take())
            elif self.peek() in "$€£¥₹" or (
                self.peek() in ("/", "*") and self.kind(1) in ("text", "letter", "run", "name")
            ):
                pieces.append(self.take())
            elif self.peek() == "^" and pieces and pieces[-1] not in "/*":
                self.at += 1
                exponent = self.argument()
                value = exponent.args[0] if exponent.kind is Kind.NEGATIVE else exponent
                if not whole(value):
                    raise Unreadable("a unit with an odd exponent")
                pieces[-1] += f"^{'-' if exponent.kind is Kind.NEGATIVE else ''}{number_of(value)}"
            elif self.peek() in (r"\mu", r"\Omega", r"\degree") and self.peek(1) in (
                "C",
                "F",
                "m",
                "s",
                "g",
                "",
            ):
                symbol = {r"\mu": "µ", r"\Omega": "Ω", r"\degree": "°"}[self.take()]
                pieces.append(symbol + (self.take() if self.peek() else ""))
            else:
                break
        unit = read_unit(" ".join(pieces))
        if unit is None or not (noun or unit.measures):
            self.at = start
            return None
        return unit

    def _last_letter(self) -> bool:
        """Whether the current token is a letter of a unit, preceded by a blank, that ends the
        answer: `5 m`."""
        return self.spaced() and self.at == len(self.tokens) - 1 and self.peek() in "msgLNVJWKhl"

    def starts_atom(self, ahead: int = 0) -> bool:
        """Whether an atom begins `ahead` tokens from here, so that it is a factor of a product."""
        token, kind = self.peek(ahead), self.kind(ahead)
        if kind in ("number", "name", "run", "letter"):
            return True
        if kind == "sign":
            if token == "|":
                return self.bars == 0 and self.peek(ahead + 1) not in ("", "|")
            if token == "(":
                return self.peek(ahead + 1) not in MODULO and self.peek(ahead + 2) != r"\in"
            return token in ("[", "{")
        return kind == "command" and (
            token[1:] in FUNCTIONS
            or token[1:] in GREEK
            or token in _STARTERS
            or token[1:] in ACCENTS
            or token in BIG
        )

    def factor(self) -> Node:
        minus, seen = False, 0
        while self.peek() in ("-", "+") and self.kind() == "sign":
            minus ^= self.take() == "-"
            seen += 1
            if seen > 4:
                raise TooDeep("signs in a row")
        result = self.postfix(self.atom())
        return negated(result) if minus else result

    def postfix(self, result: Node) -> Node:
        raised = False
        # Bounded, as every sign is one level of the tree: `5%%%...` with 490 of them overflowed the
        # stack.
        for _ in range(6):
            if self.skip("^"):
                if _is_product(result):  # a(x - y)^2 raises the bracket alone
                    name, inner = result.args
                    result = Node(Kind.PRODUCT, (name, Node(Kind.POWER, (inner, self.argument()))))
                    continue
                if raised:
                    raise Unreadable("two exponents")
                result, raised = Node(Kind.POWER, (result, self.argument())), True
            elif self.skip("!"):
                double = self.peek() == "!"
                self.at += double
                result = Node(Kind.CALL, (result,), "double factorial" if double else "factorial")
            elif self.peek() == "_" and whole(result) and self.peek(-1) == ")":
                result = self.based(str(number_of(result)))
            elif self.peek() == "(" and result.kind is Kind.POWER and _is_inverse(result):
                result = Node(
                    Kind.APPLY, (Node(Kind.NAME, (), f"{result.args[0].data}^-1"), self.brackets())
                )
            elif self.skip("%"):
                result = Node(Kind.QUANTITY, (result,), PERCENT)
            elif self.peek() == r"\degree":
                result = self.degree(result)
            elif self.skip("'") and result.kind in (Kind.NAME, Kind.RUN):
                result = Node(result.kind, (), f"{result.data}'")
            elif self.peek() == "(" and result.kind is Kind.NAME and str(result.data).endswith("'"):
                result = Node(Kind.APPLY, (result, self.brackets()))
            else:
                return result
        raise TooDeep("signs in a row")

    def degree(self, result: Node) -> Node:
        self.at += 1
        if self.peek() in ("C", "F") and self.kind() in ("letter", "name"):
            return Node(Kind.QUANTITY, (result,), read_unit("°" + self.take()))
        return Node(Kind.QUANTITY, (result,), DEGREE)

    def argument(self) -> Node:
        """The operand of ^, _, \\frac or \\sqrt: a braced expression, or one token (`\\frac12`,
        `x^2`)."""
        self.enter()
        if self.skip("{"):
            inner = self.braced()
        elif self.kind() == "command" and self.peek()[1:] in FUNCTIONS:
            raise Unreadable("a function without its argument")
        elif self.kind() in ("name", "letter"):
            inner = self.name(applied=False)
        elif self.peek().isdigit() and self.peek(-1) != "^":  # \\frac12
            digits = [Token("number", digit) for digit in self.peek()]
            self.tokens = [*self.tokens[: self.at], *digits, *self.tokens[self.at + 1 :]]
            inner = self.numeral()
        elif self.peek() in ("-", "+"):  # x^-2; but e^-{2t} is e to the minus sign, beside 2t
            minus = self.take() == "-"
            if self.peek() == "{" or self.peek()[1:] in FUNCTIONS:
                raise Unreadable("a sign as an argument")
            inner = negated(self.atom()) if minus else self.atom()
        else:
            inner = self.atom()
        self.depth -= 1
        return inner


def _is_product(node: Node) -> bool:
    """Whether `name(argument)` looks like a quantity times a bracket: a(x + 1), not f(x + 1) nor
    a(2)."""
    single = (Kind.NUMBER, Kind.NAME, Kind.NEGATIVE, Kind.GROUP)
    if node.kind is not Kind.APPLY or node.args[1].kind in single:
        return False
    return str(node.args[0].data) not in (*_FUNCTION_NAMES, *GREEK_FUNCTIONS)


def _is_inverse(node: Node) -> bool:
    """Whether a power is f^{-1}, the inverse of a function."""
    base, exponent = node.args
    return (
        base.kind is Kind.NAME and base.data in _FUNCTION_NAMES and exponent == negative(number(1))
    )


def _is_numeric(factors: list[Node]) -> bool:
    """Whether these factors can be the amount of a unit: they hold no variable, word or unit."""
    return not any(
        n.kind in (Kind.NAME, Kind.RUN, Kind.TEXT, Kind.QUANTITY) for f in factors for n in walk(f)
    )


def _flat(factors: list[Node]) -> tuple[Node, ...]:
    nodes: list[Node] = []
    for factor in factors:
        nodes += factor.args if factor.kind is Kind.PRODUCT else (factor,)
    return tuple(nodes)
