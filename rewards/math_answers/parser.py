"""The parser of final answers, and its grammar.

    answer     := choice | clock | text | items
    items      := item (("," | ";" | "and" | "or") item)*
    item       := [label] chain [modulus] [condition]
    label      := text (":" | "=")
    chain      := ratio (sign ratio)*              sign: = < > <= >= != ~ equiv in notin subset to
    modulus    := "(mod" sum ")"
    condition  := ("for" | "where" | "if" | "when" | "otherwise" | ...) any tokens up to the next ";"
    ratio      := union (":" union)*
    union      := sum (("cup" | "cap" | "setminus") sum)*
    sum        := ["+" | "-" | "+-"] term (("+" | "-" | "+-" | "-+") term)*
    term       := factor (["*" | "/"] factor)* [unit]
    factor     := "-" factor | atom postfix*
    postfix    := "^" argument | "!" | "!!" | "%" | degree | "'"
    argument   := "{" items "}" | one token         \\frac12 and x^23: one digit of LaTeX's, but x^10 is meant as written
    atom       := number | name ["_" argument] | name "(" items ")" | function | brackets | bars | "..."
                | \\frac argument argument | \\sqrt ["[" sum "]"] argument | big operator | matrix | cases | derivative
    brackets   := "(" items ")" | "[" items "]" | "(" items "]" | "\\{" items [("|" | ":") items] "\\}" | "{" items "}"
    unit       := (text | upright letter) ["^" number] (("/" | "*") ...)*

Side by side stands for a product, except that a number may follow nothing but a power, `1\\frac45` and `1 4/5` are mixed
numbers, and `f(2)` is an application (`values.py` says when it is a product). What does not fit becomes VERBATIM and equals
only the same tokens. The parser evaluates nothing, its depth and length are bounded and it takes linear time.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from .lexer import FUNCTIONS, Token, spell, tokenise
from .tree import INFINITY, Kind, Node, negative, number, number_of, walk
from .units import DEGREE, MULTIPLIERS, PERCENT, Unit, read_unit, words

MAX_CHARS = 1000
"""Longer answers are refused: no reference answer of a public data set comes near."""
MAX_DEPTH = 30
"""Brackets, arguments and signs within each other."""
MAX_EXPONENT = 4000
"""Digits that a number in e-notation may have."""
_RELATIONS = {
    "=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\approx": "~", r"\sim": "sim", r"\equiv": "equiv",
    r"\in": "in", r"\notin": "notin", r"\subset": "subset", r"\subseteq": "subseteq", r"\to": "to", r"\iff": "iff",
    r"\perp": "perp", r"\parallel": "parallel", r"\cong": "cong", r"\propto": "propto", r"\implies": "implies",
}  # fmt: skip
_GREEK = words(
    "alpha beta gamma delta epsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho varrho sigma tau "
    "upsilon varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega Pi ell hbar nabla "
    "partial Re Im aleph imath jmath"
)
_ACCENTS = words("hat bar vec dot ddot tilde overline overrightarrow underline overleftrightarrow overset")
_BIG = {
    r"\sum": "sum",
    r"\prod": "prod",
    r"\int": "int",
    r"\lim": "lim",
    r"\iint": "iint",
    r"\iiint": "iiint",
    r"\oint": "oint",
}
_CLOSERS = {"(": ")]", "[": ")]", r"\{": r"\}", r"\langle": r"\rangle"}
_DECLARING = words("if when where for unless otherwise with such provided given whenever while assuming else")
_CONDITIONS = _DECLARING | words("as because since is are was but not it can could may")
_CHOICE = re.compile(
    r"\s*(?:\\(?:text(?:bf|rm)?|mathrm|mathbf|boldsymbol|rm|bf|mbox)\s*\{\s*)?(?:(?:option|choice|选项)\s*)?"
    r"(?P<open>[(（]?)\s*(?:\\(?:text(?:bf|rm)?|mathrm|mathbf)\s*\{)?\s*(?P<letter>[A-J])\s*\}?\s*(?P<close>[)）.:：、]?)\s*\}?"
    r"(?P<mark>[)）.:：、]?)\s*\}?(?:\\[ ,;:~]|\\q?quad|[\s~])*(?P<rest>.*)\Z",
    re.DOTALL,
)
_EDGES = re.compile(r"^(?:\\[,;:! ]|[\s~])+|(?:\\[,;:! ]|\\\\|[\s~])+$")
_CHOICE_LETTER = re.compile(r"(?<![A-Za-z\\])[A-J](?![A-Za-z])")
_CLOCK = re.compile(
    r"\s*(\d{1,2})(?::(\d{2}))?\s*(?:\\[ ,;]|~)*\s*(?:\\(?:text|mathrm|mbox)\s*\{)?[\s~]*([AaPp])\.?\s*[Mm]\.?\s*\}?\s*\Z"
)


class Unreadable(ValueError):
    """The text is outside the grammar (it may still be mathematics)."""


class TooDeep(ValueError):
    """More levels than anyone writes: a degenerate text."""


@lru_cache(maxsize=32768)
def parse(text: str) -> Node:
    """The tree of an answer, VERBATIM if it is outside the grammar. Raises TooDeep, and Unreadable if it is empty or too long."""
    if len(text) > MAX_CHARS:
        raise Unreadable(f"longer than {MAX_CHARS} characters")
    if (clock := _CLOCK.match(text)) is not None and int(clock.group(1)) <= 24:
        hours = int(clock.group(1)) % 12 + (12 if clock.group(3) in "Pp" else 0)
        return Node(Kind.CLOCK, (), hours * 60 + int(clock.group(2) or 0))
    choice = _read_choice(_EDGES.sub("", spell(text))) if _CHOICE_LETTER.search(text) else None
    return choice if choice is not None else _parse_tokens(_trimmed(tokenise(text)))


def _trimmed(tokens: list[Token]) -> list[Token]:
    """Without a full stop or comma at the end, or a sign that waits for something on either side."""
    start, end = 0, len(tokens)
    while (
        end > start and tokens[end - 1].text in (".", ",", ";", "=", ":", "!", r"\\") and tokens[end - 1].kind != "text"
    ):
        if tokens[end - 1].text == ":" and end - start > 1 and tokens[end - 2].kind != "text":
            break
        if tokens[end - 1].text == "!" and end - start > 1 and tokens[end - 2].kind != "text":
            break
        end -= 1
    while start < end and tokens[start].text in ("=", ":", ",", r"\therefore", r"\Rightarrow", r"\implies"):
        start += 1
    return tokens[start:end]


def _parse_tokens(tokens: list[Token]) -> Node:
    if not tokens:
        raise Unreadable("empty")
    if (words := _words(tokens)) is not None:
        return words
    parser = _Parser(tokens)
    try:
        tree = parser.quotient_items()
        if parser.at < len(tokens):
            raise Unreadable(f"unexpected {tokens[parser.at].text!r}")
        return tree
    except Unreadable:
        return Node(Kind.VERBATIM, (), _spelled(tokens))


def _spelled(tokens: list[Token]) -> tuple[str, ...]:
    found = [t.text.casefold() if t.kind == "text" else t.text for t in tokens]
    for at in range(len(found) - 3):  # the braces of one token after ^ and _ say nothing
        if found[at] in ("^", "_") and found[at + 1] == "{" and found[at + 3] == "}":
            found[at + 1] = found[at + 3] = ""
    return tuple(text for text in found if text)


def _words(tokens: list[Token]) -> Node | None:
    """A text of words alone, or a list of such."""
    if not all(t.kind in ("text", "run") or (t.kind == "sign" and t.text in ",.'!-\"()") for t in tokens):
        return None
    if not any(t.kind == "text" for t in tokens) or tokens[0].text == "-":
        return None
    items: list[list[str]] = [[]]
    for token in tokens:
        if token.text == ",":
            items.append([])
        elif token.kind != "sign":
            first, *more = re.split(r"\s+and\s+|，|、", token.text)
            items[-1].append(first)
            items += [[words] for words in more]
    found = tuple(Node(Kind.TEXT, (), " ".join(words)) for words in items if words)
    return found[0] if len(found) == 1 else Node(Kind.LIST, found)


def _read_choice(text: str) -> Node | None:
    """`C`, `(C)`, `\\textbf{(C)} 12`, `C. 12`: the letter and what stands beside it."""
    if len(text) > 300 or (match := _CHOICE.match(text)) is None:
        return None
    marked = bool(match["close"] or match["mark"])
    rest = match["rest"].strip().strip(".").strip()
    if match["open"] and not marked:
        return None
    if not rest:
        return Node(Kind.CHOICE, (), match["letter"])
    if match["mark"] == ":" and "=" in rest:
        return None
    if not marked or re.match(
        r"[=<>+\-*/^_,|:;)]|\\(?:cdot|times|le|ge|in|cup|frac|sqrt|pm|to)\b|\(|and\b|or\b|\d*\s*[(]?[A-J][).]", rest
    ):
        return None
    if match["open"] == "" and (match["close"] or match["mark"]) in (")", "）"):
        return None if "(" in rest else Node(Kind.CHOICE, (parse(rest),), match["letter"])
    return Node(Kind.CHOICE, (parse(rest),), match["letter"])


class _Parser:
    """Recursive descent over tokens. `bars`: how many `|` are open; `depth`: levels open now."""

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

    # items and statements

    def items(self) -> Node:
        found, both = [self.item()], False
        while self.peek() in (",", ";") and self.kind() != "text":
            while self.peek() in (",", ";") and self.kind() != "text":
                both |= self.kind() == "both"
                self.at += 1
            if not self.peek() or self.peek() in (")", "]", "}", r"\}", r"\rangle", "|"):
                break
            found.append(self.item())
        return found[0] if len(found) == 1 else Node(Kind.LIST, tuple(found), "and" if both else None)

    def item(self) -> Node:
        self.enter()
        if self.kind() == "text" and self.peek(1) in (":", "=") and self.kind(1) == "sign":
            name = Node(Kind.TEXT, (), self.take())
            self.at += 1
            result = Node(Kind.RELATION, (name, self.chain()), ("=",))
        elif self.kind() == "text" and (self.starts_atom(1) or self.peek(1) in ("-", "+")) and _is_lead(self.peek()):
            self.at += 1
            result = self.chain()
        else:
            result = self.chain()
        if (modulus := self.modulus()) is not None:
            result = Node(Kind.MODULO, (result, modulus))
        if self.kind() == "text" and self.peek().split()[0].lower().strip(",.") in _CONDITIONS:
            result = Node(Kind.QUALIFIED, (result,), self.condition())
        elif self.peek() == "," and self.kind(1) == "text" and self.peek(1).split()[0].lower() in _DECLARING:
            self.at += 1
            result = Node(Kind.QUALIFIED, (result,), self.condition())
        elif self.peek() == "(" and self.kind(1) in ("name", "text"):
            result = self.remark(result)
        elif self.peek() in (r"\forall",):
            result = Node(Kind.QUALIFIED, (result,), self.condition())
        self.depth -= 1
        return result

    def remark(self, result: Node) -> Node:
        """A condition in brackets behind the answer: `k\\pi (k \\in \\mathbb{Z})`."""
        end = self.at + 1
        while end < len(self.tokens) and self.tokens[end].text not in "()":
            end += 1
        if end != len(self.tokens) - 1 or self.tokens[end].text != ")":
            return result
        condition = _spelled(self.tokens[self.at + 1 : end])
        self.at = end + 1
        return Node(Kind.QUALIFIED, (result,), condition)

    def condition(self) -> tuple[str, ...]:
        start = self.at
        while self.peek() and self.peek() not in (";", r"\\", "&", r"\end", r"\}"):
            if self.kind() in ("join", "both") and any(t.text == "=" for t in self.tokens[self.at :]):
                break
            self.at += 1
        if self.peek(-1) == ",":
            self.at -= 1
        return _spelled(self.tokens[start : self.at])

    def modulus(self) -> Node | None:
        if self.skip(r"\pmod"):
            return self.argument()
        if self.skip(r"\bmod", r"\mod"):
            return self.product()
        if self.peek() == "(" and self.peek(1) in (r"\bmod", r"\mod"):
            self.at += 2
            inner = self.sum()
            self.take(")")
            return inner
        return None

    def chain(self) -> Node:
        sides, signs = [self.ratio()], []
        while self.kind() != "text" and (sign := self.peek()) in _RELATIONS:
            self.at += 1
            signs.append(_RELATIONS[sign])
            sides.append(self.ratio())
        return Node(Kind.RELATION, tuple(sides), tuple(signs)) if signs else sides[0]

    def ratio(self) -> Node:
        found = [self.union()]
        while self.bars == 0 and self.peek() == ":" and self.kind() == "sign":
            self.at += 1
            found.append(self.union())
        return found[0] if len(found) == 1 else Node(Kind.RATIO, tuple(found))

    def union(self) -> Node:
        found, signs = [self.sum()], set()
        while (sign := self.peek()) in (r"\cup", r"\cap", r"\setminus"):
            self.at += 1
            signs.add({r"\cup": "union", r"\cap": "intersection", r"\setminus": "without"}[sign])
            found.append(self.sum())
        if len(signs) > 1:
            raise Unreadable("unions and intersections side by side")
        return found[0] if len(found) == 1 else Node(Kind.UNION, tuple(found), signs.pop())

    # sums and products

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
            terms.append(_negated(term) if sign == "-" else term)
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
                bare = self.kind() == "number" or self.peek() == "{"
                factor = self.postfix(self.atom())
                if bare and factor.kind is Kind.NUMBER and factors[-1].kind is not Kind.POWER:
                    raise Unreadable("numbers side by side")
                if factors[-1].kind is Kind.NUMBER and factor.kind is Kind.QUOTIENT and _whole(factor.args[0]):
                    raise Unreadable("a number beside a fraction")
                factors.append(factor)
            else:
                break
        return factors[0] if len(factors) == 1 else Node(Kind.PRODUCT, _flat(factors))

    def mixed(self, before: Node) -> Node | None:
        """`1\\frac45`, `1 4/5`: an integer and a proper fraction of integers."""
        if not _whole(before):
            return None
        start = self.at
        if self.skip(r"\frac"):
            fraction = Node(Kind.QUOTIENT, (self.argument(), self.argument()))
        elif self.kind() == "number" and self.spaced() and self.peek(1) == "/" and self.kind(2) == "number":
            top = self.numeral()
            self.at += 1
            fraction = Node(Kind.QUOTIENT, (top, self.numeral()))
        else:
            return None
        top, bottom = fraction.args
        if _whole(top) and _whole(bottom) and 0 < number_of(top) < number_of(bottom) and self.peek() != "/":
            return Node(Kind.MIXED, (before, fraction))
        self.at = start
        return None

    def unit(self, factors: list[Node]) -> Unit | None:
        """The unit after a number, if the text there is one."""
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
                if not _whole(value):
                    raise Unreadable("a unit with an odd exponent")
                pieces[-1] += f"^{'-' if exponent.kind is Kind.NEGATIVE else ''}{number_of(value)}"
            elif self.peek() in (r"\mu", r"\Omega", r"\degree") and self.peek(1) in ("C", "F", "m", "s", "g", ""):
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
        """Whether a plain letter with a blank before it ends the answer: `5 m`."""
        return self.spaced() and self.at == len(self.tokens) - 1 and self.peek() in "msgLNVJWKhl"

    def starts_atom(self, ahead: int = 0) -> bool:
        token, kind = self.peek(ahead), self.kind(ahead)
        if kind in ("number", "name", "run", "letter"):
            return True
        if kind == "sign":
            if token == "|":
                return self.bars == 0 and self.peek(ahead + 1) not in ("", "|")
            if token == "(":
                return self.peek(ahead + 1) not in (r"\bmod", r"\mod")
            return token in ("[", "{")
        return kind == "command" and (
            token[1:] in FUNCTIONS
            or token[1:] in _GREEK
            or token in _STARTERS
            or token[1:] in _ACCENTS
            or token in _BIG
        )

    def factor(self) -> Node:
        minus, seen = False, 0
        while self.peek() in ("-", "+") and self.kind() == "sign":
            minus ^= self.take() == "-"
            seen += 1
            if seen > 4:
                raise TooDeep("signs in a row")
        result = self.postfix(self.atom())
        return _negated(result) if minus else result

    def postfix(self, result: Node) -> Node:
        for _ in range(6):
            if self.skip("^"):
                if result.kind is Kind.POWER and self.peek(-2) != ")":
                    raise Unreadable("two exponents")
                result = Node(Kind.POWER, (result, self.argument()))
            elif self.peek() == "!" and self.peek(1) != "=":
                self.at += 1
                double = self.peek() == "!"
                self.at += double
                result = Node(Kind.CALL, (result,), "double factorial" if double else "factorial")
            elif self.peek() == "_" and _whole(result) and self.peek(-1) == ")":
                result = self.based(str(number_of(result)))
            elif self.peek() == "(" and result.kind is Kind.POWER and _is_inverse(result):
                result = Node(Kind.APPLY, (Node(Kind.NAME, (), f"{result.args[0].data}^-1"), self.brackets()))
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
        """What follows ^, _, \\frac or \\sqrt: a braced expression, or one token (`\\frac12`, `x^2`)."""
        self.enter()
        if self.skip("{"):
            inner = self.braced()
        elif self.kind() == "command" and self.peek()[1:] in FUNCTIONS:
            raise Unreadable("a function without its argument")
        elif self.kind() in ("name", "letter"):
            inner = self.name(applied=False)
        elif self.kind() == "number" and len(self.peek()) > 1 and self.peek(-1) != "^" and self.peek().isdigit():
            token = self.tokens[self.at]
            self.tokens = [
                *self.tokens[: self.at],
                *(Token("number", c) for c in token.text),
                *self.tokens[self.at + 1 :],
            ]
            inner = self.numeral()
        elif self.peek() in ("-", "+"):
            inner = _negated(self.atom()) if self.take() == "-" else self.atom()
        else:
            inner = self.atom()
        self.depth -= 1
        return inner

    # atoms

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
        if not _whole(base) or not 2 <= number_of(base) <= 36:
            raise Unreadable("a number with a subscript that is no base")
        return Node(Kind.BASED, (), (text.lstrip("0") or "0", int(number_of(base))))

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
        """`\\mathbb{R}^+`, `\\mathbb{Z}_{>0}`."""
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
        """The spelling of a subscript, without the braces around the whole."""
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
        bars, self.bars = self.bars, 0
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
                inner = Node(Kind.GROUP, inner.args, "()" if opening == r"\langle" else opening + closing)
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
        """Items, or `a \\over b` and `n \\choose k` of two such."""
        inner = self.items()
        if self.skip(r"\over"):
            return Node(Kind.QUOTIENT, (inner, self.items()))
        if self.skip(r"\choose"):
            return Node(Kind.CALL, (inner, self.items()), "binom")
        return inner

    def braces(self) -> Node:
        """A set: its items, or an element and its condition."""
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
        if name in _GREEK:
            result = Node(Kind.NAME, (), name + self.subscript())
            return (
                self.application(result)
                if self.peek() == "(" and name in ("varphi", "psi", "Phi", "Psi", "Gamma")
                else result
            )
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
        if token in _BIG:
            return self.big(_BIG[token])
        if token in (r"\angle", r"\triangle", r"\measuredangle"):
            return Node(Kind.RUN, (), f"{name} {self.braced_tokens()}")
        if name in _ACCENTS and name != "overset":
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
        if power == negative(number(1)) and name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh"):
            return Node(Kind.CALL, arguments, "arc" + name)
        return Node(Kind.POWER, (call, power))

    def function_argument(self) -> Node:
        factors = [self.postfix(self.name(applied=False)) if self.kind() in ("name", "letter") else self.factor()]
        while (
            self.kind() in ("number", "name")
            or self.peek() in (r"\pi", r"\frac", r"\sqrt")
            or self.peek()[1:] in _GREEK
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
        return _parse_tokens(words) if words else Node(Kind.TEXT, (), "")


_CASE_FILLER = frozenset(("if", "when", "for", "is", "are", "", "where", "and"))
_STARTERS = frozenset((
    r"\pi", r"\infty", r"\frac", r"\sqrt", r"\cbrt", r"\binom", r"\lfloor", r"\lceil", r"\{", r"\begin", r"\angle", r"\triangle",
    r"\langle",
    r"\ldots", r"\emptyset", r"\|",
))  # fmt: skip
_LEAD = words("only exactly 共 共有 一共 约 大约 约为 approximately about roughly exactly total 有 为 是 得")


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


def _is_inverse(node: Node) -> bool:
    return (
        node.args[0].kind is Kind.NAME
        and node.args[0].data in ("f", "g", "h", "F", "G", "H")
        and node.args[1] == negative(number(1))
    )


def _is_lead(text: str) -> bool:
    text = text.lower().strip()
    return (
        text in _LEAD
        or text.endswith((":", "："))
        or (len(text) <= 8 and not text.isascii() and text[-1] in "有是为得共约需要了于")
    )


def _whole(node: Node) -> bool:
    return (
        node.kind is Kind.NUMBER
        and isinstance(node.data, tuple)
        and node.data[1] == -1
        and node.data[0].denominator == 1
    )


def _is_numeric(factors: list[Node]) -> bool:
    """Whether these can be the amount of a unit: no variables."""
    return not any(n.kind in (Kind.NAME, Kind.RUN, Kind.TEXT, Kind.QUANTITY) for f in factors for n in walk(f))


def _negated(node: Node) -> Node:
    """The sign goes inside a quantity: -5 cm is minus five, in centimetres."""
    if node.kind is Kind.QUANTITY:
        return Node(Kind.QUANTITY, (_negated(node.args[0]),), node.data)
    return negative(node)


def _flat(factors: list[Node]) -> tuple[Node, ...]:
    found: list[Node] = []
    for factor in factors:
        found += factor.args if factor.kind is Kind.PRODUCT else (factor,)
    return tuple(found)


def _repeating(text: str, digits: str) -> Node:
    before, _, after = text.partition(".")
    period = Fraction(int(digits), (10 ** len(digits) - 1) * 10 ** len(after))
    return number(Fraction(f"{before or 0}.{after or 0}") + period)


def _fraction(top: Node, bottom: Node) -> Node:
    """A quotient, or a derivative in Leibniz's form: `\\frac{dv}{dt}`, `\\frac{\\partial^2 u}{\\partial x^2}`."""

    def is_differential(node: Node) -> bool:
        first = node.args[0] if node.kind is Kind.PRODUCT else node
        if first.kind is Kind.POWER:
            first = first.args[0]
        return first.kind is Kind.NAME and first.data in ("d", "partial")

    if is_differential(bottom) and bottom.kind is Kind.PRODUCT and is_differential(top):
        return Node(Kind.DERIVATIVE, (top, bottom))
    return Node(Kind.QUOTIENT, (top, bottom))


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


__all__ = ["INFINITY", "MAX_CHARS", "TooDeep", "Unreadable", "parse"]
