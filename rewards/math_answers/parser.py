"""The parser of final answers, and its grammar.

    answer     := choice | clock | text | items
    items      := item (("," | ";" | "and" | "or") item)*
    item       := [label] chain [modulus] [condition]
    label      := text (":" | "=")
    chain      := ratio (sign ratio)*              sign: = < > <= >= != ~ equiv in notin subset to
    modulus    := "(mod" sum ")"
    condition  := ("for" | "where" | "if" | "when" | "otherwise" | ...) any tokens up to ";"
    ratio      := union (":" union)*
    union      := sum (("cup" | "cap" | "setminus") sum)*
    sum        := ["+" | "-" | "+-"] term (("+" | "-" | "+-" | "-+") term)*
    term       := factor (["*" | "/"] factor)* [unit]
    factor     := "-" factor | atom postfix*
    postfix    := "^" argument | "!" | "!!" | "%" | degree | "'"
    argument   := "{" items "}" | one token     (of \\frac12 one digit, but x^10 as written)
    atom       := number | name ["_" argument] | name "(" items ")" | function
                | brackets | bars | "..." | \\frac argument argument
                | \\sqrt ["[" sum "]"] argument | big operator | matrix | cases | derivative
    brackets   := "(" items ")" | "[" items "]" | "(" items "]" | "{" items "}"
                | "\\{" items [("|" | ":") items] "\\}"
    unit       := (text | upright letter) ["^" number] (("/" | "*") ...)*

Factors side by side are a product, except that a number may only follow a power, `1\\frac45` and
`1 4/5` are mixed numbers, and `f(2)` is an application (`values.py` says when it is a product).
A text outside the grammar becomes VERBATIM and equals only the same tokens. The parser evaluates
nothing; its depth and length are bounded, and it takes linear time.
"""

from __future__ import annotations

import re
from functools import lru_cache

from .expressions import MODULO, Terms
from .lexer import Token, tokenise
from .number_words import read_number
from .reader import TooDeep, Unreadable
from .spelling import spell
from .tree import Kind, Node
from .units import words

MAX_CHARS = 1000
"""Longer answers are refused: no reference answer of a public data set comes near."""
_RELATIONS = {
    "=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\approx": "~",
    r"\sim": "sim", r"\equiv": "equiv", r"\in": "in", r"\notin": "notin", r"\subset": "subset",
    r"\subseteq": "subseteq",
    r"\to": "to", r"\iff": "iff",
    r"\perp": "perp", r"\parallel": "parallel", r"\cong": "cong", r"\propto": "propto",
    r"\implies": "implies",
}  # fmt: skip
_DECLARING = words(
    "if when where for unless otherwise with such provided given whenever while assuming else"
)
_CONDITIONS = _DECLARING | words("as because since is are was but not it can could may")
_CHOICE = re.compile(
    r"\s*(?:\\(?:text(?:bf|rm)?|mathrm|mathbf|boldsymbol|rm|bf|mbox)\s*\{\s*)?"
    r"(?:(?:option|choice|选项)\s*)?"
    r"(?P<open>[(（]?)\s*(?:\\(?:text(?:bf|rm)?|mathrm|mathbf)\s*\{)?\s*(?P<letter>[A-J])"
    r"\s*\}?\s*(?P<close>[)）.:：、]?)\s*\}?"
    r"(?P<mark>[)）.:：、]?)\s*\}?(?:\\[ ,;:~]|\\q?quad|[\s~])*(?P<rest>.*)\Z",
    re.DOTALL,
)
_EDGES = re.compile(r"^(?:\\[,;:! ]|[\s~])+|(?:\\[,;:! ]|\\\\|[\s~])+$")
_PROSE = re.compile(r"(?:(?:[A-Za-z]{2,}|[aA])\s+){2,30}[A-Za-z]{2,}\.?")
_SAYING = frozenset(
    ("the", "is", "are", "has", "have", "than", "not", "no", "never", "always", "a")
)
"""Words that tell a sentence from a list of names. A sentence is compared word by word."""
_JOINS = frozenset(("and", "or"))
_CHOICE_LETTER = re.compile(r"(?<![A-Za-z\\])[A-J](?![A-Za-z])")
_CLOCK = re.compile(
    r"\s*(\d{1,2})(?::(\d{2}))?\s*(?:\\[ ,;]|~)*\s*"
    r"(?:\\(?:text|mathrm|mbox)\s*\{)?[\s~]*([AaPp])\.?\s*[Mm]\.?\s*\}?\s*\Z"
)


@lru_cache(maxsize=32768)
def parse(text: str) -> Node:
    """Returns the tree of an answer, VERBATIM if it is outside the grammar. Raises TooDeep if it is
    nested too deeply, and Unreadable if it is empty or longer than MAX_CHARS."""
    if len(text) > MAX_CHARS:
        raise Unreadable(f"longer than {MAX_CHARS} characters")
    if (clock := _CLOCK.match(text)) is not None and int(clock.group(1)) <= 24:
        hours = int(clock.group(1)) % 12 + (12 if clock.group(3) in "Pp" else 0)
        return Node(Kind.CLOCK, (), hours * 60 + int(clock.group(2) or 0))
    if _PROSE.fullmatch(text) is not None and _is_sentence(text.lower().split()):
        return Node(Kind.TEXT, (), " ".join(text.rstrip(".").split()))
    choice = _read_choice(_EDGES.sub("", spell(text))) if _CHOICE_LETTER.search(text) else None
    return choice if choice is not None else _parse_tokens(_trimmed(tokenise(text)))


def _is_sentence(words: list[str]) -> bool:
    return not _SAYING.isdisjoint(words) and _JOINS.isdisjoint(words)


_LOOSE_ENDS = frozenset((".", ",", ";", "=", ":", "!", r"\\"))
_LOOSE_STARTS = frozenset(("=", ":", ",", r"\therefore", r"\Rightarrow", r"\implies"))


def _trimmed(tokens: list[Token]) -> list[Token]:
    """The tokens without signs at either end that lack an operand there, such as a full stop or a
    comma."""
    start, end = 0, len(tokens)
    while end > start and tokens[end - 1].text in _LOOSE_ENDS and tokens[end - 1].kind != "text":
        # `5!` is a factorial, and `2:`, half a ratio, must not be read as 2.
        meant = end - start > 1 and tokens[end - 2].kind != "text"
        if tokens[end - 1].text in (":", "!") and meant:
            break
        end -= 1
    while start < end and tokens[start].text in _LOOSE_STARTS:
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
    texts = [t.text.casefold() if t.kind == "text" else t.text for t in tokens]
    for at in range(len(texts) - 3):  # the braces of one token after ^ and _ say nothing
        if texts[at] in ("^", "_") and texts[at + 1] == "{" and texts[at + 3] == "}":
            texts[at + 1] = texts[at + 3] = ""
    return tuple(text for text in texts if text)


def _words(tokens: list[Token]) -> Node | None:
    """The TEXT of tokens that are words alone, or the LIST of such texts; None for other tokens."""
    if not all(
        t.kind in ("text", "run") or (t.kind == "sign" and t.text in ",.'!-\"()") for t in tokens
    ):
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
    if len(items) == 1 and (digits := read_number(" ".join(items[0]))) is not None:
        return parse(digits)
    nodes = tuple(Node(Kind.TEXT, (), " ".join(words)) for words in items if words)
    return nodes[0] if len(nodes) == 1 else Node(Kind.LIST, nodes)


def _read_choice(text: str) -> Node | None:
    """The CHOICE node of `C`, `(C)`, `\\textbf{(C)} 12` or `C. 12`, with the text beside the
    letter; None for other texts."""
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
    # `A = 5`, `B + C` and `A, B` begin with a letter but choose nothing.
    if not marked or re.match(
        r"[=<>+\-*/^_,|:;)]|\\(?:cdot|times|le|ge|in|cup|frac|sqrt|pm|to)\b|\("
        r"|and\b|or\b|\d*\s*[(]?[A-J][).]",
        rest,
    ):
        return None
    if match["open"] == "" and (match["close"] or match["mark"]) in (")", "）"):
        return None if "(" in rest else Node(Kind.CHOICE, (parse(rest),), match["letter"])
    return Node(Kind.CHOICE, (parse(rest),), match["letter"])


class _Parser(Terms):
    """The top levels of the grammar: items, statements and their conditions."""

    def inner(self, tokens: list[Token]) -> Node:
        return _parse_tokens(tokens)

    def items(self) -> Node:
        items, both = [self.item()], False
        while self.peek() in (",", ";") and self.kind() != "text":
            while self.peek() in (",", ";") and self.kind() != "text":
                both |= self.kind() == "both"
                self.at += 1
            if not self.peek() or self.peek() in (")", "]", "}", r"\}", r"\rangle", "|"):
                break
            items.append(self.item())
        if len(items) == 1:
            return items[0]
        return Node(Kind.LIST, tuple(items), "and" if both else None)

    def item(self) -> Node:
        self.enter()
        if self.kind() == "text" and self.peek(1) in (":", "=") and self.kind(1) == "sign":
            name = Node(Kind.TEXT, (), self.take())
            if self.take() == "=":
                result = self.chain(name)
            else:
                result = Node(Kind.RELATION, (name, self.chain()), ("=",))
        else:
            starts = self.starts_atom(1) or self.peek(1) in ("-", "+")
            self.at += self.kind() == "text" and starts and _is_lead(self.peek())
            result = self.chain()
        if (modulus := self.modulus()) is not None:
            result = Node(Kind.MODULO, (result, modulus))
        # kept with the answer: `5 if the coin is fair, otherwise 7` is not 5
        if self.kind() == "text" and self.peek().split()[0].lower().strip(",.") in _CONDITIONS:
            result = Node(Kind.QUALIFIED, (result,), self.condition())
        elif self.peek() == "," and self._declares_after():
            self.at += 1
            result = Node(Kind.QUALIFIED, (result,), self.condition())
        elif self.peek() == "(" and self.kind(1) in ("name", "text"):
            result = self.remark(result)
        elif self.peek() in (r"\forall",):
            result = Node(Kind.QUALIFIED, (result,), self.condition())
        self.depth -= 1
        return result

    def _declares_after(self) -> bool:
        return self.kind(1) == "text" and self.peek(1).split()[0].lower() in _DECLARING

    def remark(self, result: Node) -> Node:
        """The statement with a condition in brackets behind it, as in `k\\pi (k \\in
        \\mathbb{Z})`."""
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
            if self.kind() in ("join", "both") and any(
                t.text == "=" for t in self.tokens[self.at :]
            ):
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
        if self.peek() == "(" and self.peek(1) in MODULO:
            self.at += 2
            inner = self.sum()
            self.take(")")
            return inner
        return None

    def chain(self, label: Node | None = None) -> Node:
        """A chain of sides and the signs between them. `label`: its first side, e.g. Area in `Area
        = 2 + 3 = 5`."""
        sides, signs = ([self.ratio()], []) if label is None else ([label, self.ratio()], ["="])
        while self.kind() != "text" and (sign := self.peek()) in _RELATIONS:
            self.at += 1
            signs.append(_RELATIONS[sign])
            sides.append(self.ratio())
        return Node(Kind.RELATION, tuple(sides), tuple(signs)) if signs else sides[0]

    def ratio(self) -> Node:
        parts = [self.union()]
        while self.bars == 0 and self.peek() == ":" and self.kind() == "sign":
            self.at += 1
            parts.append(self.union())
        return parts[0] if len(parts) == 1 else Node(Kind.RATIO, tuple(parts))

    def union(self) -> Node:
        parts, signs = [self.sum()], set()
        while (sign := self.peek()) in (r"\cup", r"\cap", r"\setminus"):
            self.at += 1
            signs.add({r"\cup": "union", r"\cap": "intersection", r"\setminus": "without"}[sign])
            parts.append(self.sum())
        if len(signs) > 1:
            raise Unreadable("unions and intersections side by side")
        return parts[0] if len(parts) == 1 else Node(Kind.UNION, tuple(parts), signs.pop())


_LEAD = words(
    "only exactly 共 共有 一共 约 大约 约为 approximately about roughly exactly total 有 为 是 得"
)


def _is_lead(text: str) -> bool:
    text = text.lower().strip()
    return (
        text in _LEAD
        or text.endswith((":", "："))
        or (len(text) <= 8 and not text.isascii() and text[-1] in "有是为得共约需要了于")
    )


__all__ = ["MAX_CHARS", "TooDeep", "Unreadable", "parse"]
