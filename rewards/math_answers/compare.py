"""Whether two answers are the same, decided in this process in microseconds where that is certain.

Trees are compared by what they are: rationals exactly, other scalars at sample points in 50 digits, lists, tuples, intervals,
inequalities, equations, matrices, sets, cases and texts by their structure. What cannot be decided is UNKNOWN.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from .lexer import squeeze
from .options import Outcome, Policy
from .parser import TooDeep, Unreadable, parse
from .scalars import amount, is_literal, outcome, rename_parameter, same_scalar, same_value
from .shapes import Statement, as_interval, expanded, independent, is_name, items_of, state, without_declarations
from .tree import Kind, Node, has, negative, number, number_of, rename, substitute, variables
from .units import words
from .values import Reading, TooBig, Undefined, exact, signature

MAX_ITEMS = 64
MAX_TEXT = 4000
"""Characters up to which a text outside the grammar is compared by its tokens."""
_ORDERED = (Kind.GROUP, Kind.RATIO)


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference answer, parsed once. `tree` is None where it cannot be read at all, and `problem` says why."""

    text: str
    tree: Node | None
    problem: str = ""
    number: Fraction | None = None
    """Its value if it is a plain integer or decimal."""


_PLAIN = re.compile(r"[-+]?(?:\d+|[1-9]\d{0,2}(?:,\d{3})+)(?:\.\d+)?\Z")


def plain_number(text: str) -> Fraction | None:
    """An integer or decimal, thousands separators allowed, else None."""
    if len(text) > 400 or _PLAIN.match(text) is None:
        return None
    return Fraction(text.replace(",", ""))


def read_reference(text: str) -> Reference:
    if not (stripped := text.strip()):
        return Reference(text, None, "it is empty")
    try:
        return Reference(text, parse(stripped), number=plain_number(stripped))
    except (Unreadable, TooDeep) as error:
        return Reference(text, None, f"it cannot be read: {error}")


def compare(gold: Reference, answer: str, policy: Policy) -> Outcome:
    """Whether `answer` is the reference. A degenerate answer is TOO_BIG, and never raises."""
    answer = answer.strip()
    if gold.number is not None and (number := plain_number(answer)) is not None:
        if number == gold.number:
            return Outcome.EQUAL
        if "." not in answer or "." not in gold.text:
            return Outcome.DIFFERENT  # no decimal that could round the other
    if not answer:
        return Outcome.DIFFERENT
    try:
        if gold.tree is None:
            return _same_text(gold.text, answer)
        tree = parse(answer)
        return same(gold.tree, tree, policy)
    except (TooBig, TooDeep, RecursionError, MemoryError, OverflowError):
        return Outcome.TOO_BIG
    except Unreadable:
        return _same_text(gold.text, answer) if gold.number is None else Outcome.DIFFERENT
    except Undefined:
        return Outcome.UNKNOWN


def _same_text(gold: str, answer: str) -> Outcome:
    """What is outside the grammar equals only what is spelled with the same tokens."""
    if len(answer) > MAX_TEXT or len(gold) > MAX_TEXT:
        return outcome(gold.split() == answer.split()) if len(answer) == len(gold) else Outcome.UNKNOWN
    return Outcome.EQUAL if squeeze(gold) == squeeze(answer) else Outcome.UNKNOWN


def same(gold: Node, answer: Node, policy: Policy, computed: bool = False) -> Outcome:
    """Raises TooBig, Undefined."""
    if gold == answer and not has(answer, Kind.RELATION):
        return Outcome.EQUAL
    if Kind.CHOICE in (gold.kind, answer.kind) and (found := _same_choice(gold, answer, policy)) is not None:
        return found
    if Kind.VERBATIM in (gold.kind, answer.kind):
        if is_plain(gold):
            return Outcome.DIFFERENT
        return Outcome.EQUAL if gold == answer else Outcome.UNKNOWN
    gold, ours = without_declarations(gold)
    answer, theirs = without_declarations(answer)
    if (found := _conditions(gold, ours, theirs)) is not Outcome.EQUAL:
        return found
    gold, answer = _align_arguments(gold, answer)
    answer = _same_parameter(gold, answer, (*ours, *theirs))
    if variables(gold) != variables(answer):
        answer = rename_parameter(gold, answer)
    left = state(gold, _agree, True, False)
    constant = not variables(left.body) and left.body.kind not in (Kind.TEXT, Kind.VERBATIM, Kind.RELATION)
    right = state(answer, _agree, policy.chains == "last", constant)
    if right.false:
        return Outcome.DIFFERENT
    if right.unproved:
        return Outcome.UNKNOWN
    if left.equation or right.equation:
        return _same_equations(gold, answer, left, right)
    if _names_differ(left.name, right.name):
        return Outcome.DIFFERENT
    found = _same_bodies(left.body, right.body, policy, computed)
    if found is Outcome.DIFFERENT and is_plain(gold) and _is_rounded(answer):  # x = 300/7 = 42.857 ~ 43
        return _same_bodies(left.body, answer.args[-1], policy, computed)
    return found


def _is_rounded(node: Node) -> bool:
    """Whether a chain ends in what it rounds to."""
    return node.kind is Kind.RELATION and isinstance(node.data, tuple) and node.data[-1] == "~"


def is_plain(node: Node) -> bool:
    """Whether a reference is a plain number, with or without a unit."""
    return is_literal(amount(node).core)


def _agree(a: Node, b: Node) -> bool | None:
    """Whether two sides of a chain are equal, a rounded last side included; None if that cannot be told."""
    try:
        ours, theirs = amount(a), amount(b)
        found = same_value(ours.core, theirs.core, Policy())
        if found is Outcome.DIFFERENT and ours.unit != theirs.unit:
            found = same_scalar(a, b, Policy(unsimplified="accept"))
    except Undefined:
        return None
    return None if found is Outcome.UNKNOWN else found is Outcome.EQUAL


def _conditions(gold: Node, ours: tuple[tuple[str, ...], ...], theirs: tuple[tuple[str, ...], ...]) -> Outcome:
    """Conditions must be the same. One that only says what a letter stands for may be left out, or said."""
    if ours == theirs:
        return Outcome.EQUAL
    if ours and theirs and sorted(map(_essence, ours)) == sorted(map(_essence, theirs)):
        return Outcome.EQUAL
    if is_plain(gold):
        return Outcome.DIFFERENT
    if ours and theirs and len({tuple(sorted(_number_sets(side))) for side in (ours, theirs)}) > 1:
        return Outcome.DIFFERENT
    return Outcome.EQUAL if all(_is_declaration(condition) for condition in (*ours, *theirs)) else Outcome.UNKNOWN


def _same_parameter(gold: Node, answer: Node, conditions: Sequence[tuple[str, ...]]) -> Node:
    """The answer with its parameter named as the reference's, where a condition declares it: `for some integer t`."""
    free, theirs = variables(gold) - variables(answer), variables(answer) - variables(gold)
    if len(free) != 1 or len(theirs) != 1:
        return answer
    (name,), (other,) = free, theirs
    declared = any(n in token.split() for condition in conditions for token in condition for n in (name, other))
    return rename(answer, {other: name}) if declared else answer


def _number_sets(conditions: Sequence[object]) -> list[str]:
    return re.findall(r"mathbb [A-Z]|integers?|naturals?|reals?|rationals?", str(conditions))


_FILLER = words("for all any every each some where with when if is are a an the , such that given")


def _essence(condition: tuple[str, ...]) -> list[str]:
    return [word for token in condition for word in token.split() if word not in _FILLER]


def _is_declaration(condition: Sequence[str]) -> bool:
    """`where n is an integer`, `for all k in Z`: no number, no inequality, no case."""
    words = [word for token in condition for word in token.split()]
    if any(
        word in ("if", "when", "unless", "otherwise", "else", "but", "not", "is", "could", "can", "may")
        for word in words[:1]
    ):
        return False
    return not any(
        re.search(r"\d|[<>=|]|\\(?:le|ge|ne|notin)\b|^(?:if|otherwise|but|not|or|odd|even)$", w) for w in words
    )


def _names_differ(gold: Node | None, answer: Node | None) -> bool:
    """Whether two statements are about different things: y = 5 for x = 5, f'(x) for f(x). Words may differ."""
    if gold is None or answer is None or gold == answer:
        return False
    kinds = {gold.kind, answer.kind}
    if kinds == {Kind.NAME}:  # the solutions of an equation in x are x_1, x_2, ...
        short, long = sorted((str(gold.data), str(answer.data)), key=len)
        return re.fullmatch(rf"{re.escape(short)}_\d", long) is None
    if kinds == {Kind.NAME, Kind.APPLY}:  # y = 2x and f(x) = 2x
        return "y" not in (gold.data, answer.data)
    return Kind.TEXT not in kinds


def _align_arguments(gold: Node, answer: Node) -> tuple[Node, Node]:
    """f(z) = z and f(x) = x are the same: the argument is renamed where both sides define a function of one variable."""

    def argument(node: Node) -> str | None:
        if node.kind is Kind.RELATION and node.data == ("=",) and node.args[0].kind is Kind.APPLY:
            inner = node.args[0].args[1]
            return str(inner.data) if inner.kind is Kind.NAME else None
        return None

    old, new = argument(answer), argument(gold)
    if old is None or new is None or old == new or new in variables(answer):
        return gold, answer
    return gold, rename(answer, {old: new})


def _same_choice(gold: Node, answer: Node, policy: Policy) -> Outcome | None:
    """`C`, `(C) 12` and, where the reference has both, `12`; several letters in any order."""
    if gold.kind is answer.kind is Kind.CHOICE:
        if (
            gold.data != answer.data
            or not gold.args
            or not answer.args
            or Kind.TEXT in (gold.args[0].kind, answer.args[0].kind)
        ):
            return outcome(gold.data == answer.data)
        return same(gold.args[0], answer.args[0], policy)
    if gold.kind is Kind.CHOICE:
        if answer.kind is Kind.TEXT or answer.kind is Kind.RUN or answer.kind is Kind.VERBATIM:
            return Outcome.DIFFERENT
        if gold.args:
            return same(gold.args[0], answer, policy)
        right = state(answer, _agree, False, False)
        if right.name is not None and right.body.kind is Kind.NAME:
            return outcome(right.body.data == gold.data)
        if answer.kind is Kind.NAME:
            return outcome(answer.data == gold.data)
        return same(Node(Kind.NAME, (), gold.data), answer, policy)
    if gold.kind is Kind.RUN or (gold.kind is Kind.LIST and all(i.kind in (Kind.NAME, Kind.CHOICE) for i in gold.args)):
        return None
    if gold.kind is Kind.NAME:
        return outcome(gold.data == answer.data and not answer.args)
    return same(gold, answer.args[0], policy) if answer.args and not is_plain(gold) else Outcome.DIFFERENT


def _same_bodies(gold: Node, answer: Node, policy: Policy, computed: bool = False) -> Outcome:
    systems = all(n.kind is Kind.RELATION or (n.kind is Kind.LIST and _is_system(n)) for n in (gold, answer))
    if systems and variables(gold) != variables(answer):
        return Outcome.DIFFERENT
    if gold.kind is answer.kind is Kind.RELATION and as_interval(gold).kind is not as_interval(answer).kind:
        return _same_relation(gold, answer, policy)
    gold, answer = as_interval(gold), as_interval(answer)
    kinds = {gold.kind, answer.kind}
    if kinds == {Kind.LIST, Kind.UNION}:
        items = (gold if gold.kind is Kind.LIST else answer).args
        if all(i.kind is Kind.RELATION and as_interval(i).kind is Kind.GROUP for i in items):
            return Outcome.DIFFERENT  # a > 1, b > 4 are about two things
    if Kind.RUN in kinds and (found := _same_letters(gold, answer)) is not None:
        return found
    if Kind.MODULO in kinds:
        return _same_congruence(gold, answer, policy) if len(kinds) == 1 else Outcome.DIFFERENT
    if Kind.RELATION in kinds:
        if len(kinds) == 1:
            return _same_relation(gold, answer, policy)
        return Outcome.UNKNOWN if kinds & {Kind.GROUP, Kind.UNION} else Outcome.DIFFERENT
    if kinds & {Kind.CASES, Kind.BUILDER}:
        return _same_parts(gold, answer, policy) if len(kinds) == 1 else Outcome.UNKNOWN
    if Kind.CLOCK in kinds:
        return _same_clock(gold, answer)
    if Kind.MATRIX in kinds:
        return _same_matrix(gold, answer, policy)
    if (
        kinds & {*_ORDERED, Kind.LIST, Kind.SET, Kind.UNION}
        or expanded(gold) is not None
        or expanded(answer) is not None
    ):
        return _same_collection(gold, answer, policy)
    if Kind.TEXT in kinds:
        return outcome(len(kinds) == 1 and _words(gold) == _words(answer))
    if Kind.BASED in kinds:
        return outcome(gold == answer)
    return same_scalar(gold, answer, policy, computed)


def _is_system(node: Node) -> bool:
    """Inequalities in a list."""
    return all(a.kind is Kind.RELATION and a.data != ("=",) for a in node.args)


def _words(node: Node) -> list[str]:
    words = re.findall(r"[^\W_]+", str(node.data).casefold())
    return [word for word in words if word not in ("the", "a", "an", "only")]


def _same_letters(gold: Node, answer: Node) -> Outcome | None:
    """AB for A, B; AB is no other order of letters. None: compare by value."""
    if gold.kind is Kind.RUN and answer.kind is Kind.RUN:
        return outcome(gold.data == answer.data)
    run, other = (gold, answer) if gold.kind is Kind.RUN else (answer, gold)
    if other.kind is Kind.TEXT:
        return outcome(str(other.data).casefold() == str(run.data).casefold())
    if other.kind is Kind.LIST and all(i.kind in (Kind.NAME, Kind.CHOICE, Kind.CONSTANT) for i in other.args):
        letters = [str(i.data) for i in other.args]
        choices = all("A" <= c <= "H" for c in letters) and sorted(letters) == letters
        return outcome(choices and "".join(letters) == run.data)
    return None


def _same_clock(gold: Node, answer: Node) -> Outcome:
    """10:30 AM and, with less said, 10:30."""
    if gold.kind is answer.kind is Kind.CLOCK:
        return outcome(gold.data == answer.data)
    clock, other = (gold, answer) if gold.kind is Kind.CLOCK else (answer, gold)
    if other.kind is not Kind.RATIO or len(other.args) != 2 or not isinstance(clock.data, int):
        return Outcome.DIFFERENT
    hours, minutes = (exact(a) for a in other.args)
    if hours is None or minutes is None:
        return Outcome.DIFFERENT
    return outcome(minutes == clock.data % 60 and hours in (clock.data // 60, (clock.data // 60 - 1) % 12 + 1))


def _same_congruence(gold: Node, answer: Node, policy: Policy) -> Outcome:
    """a = 3 and a = 10 modulo 7 are the same."""
    (ours, modulus), (theirs, other) = gold.args, answer.args
    if same(modulus, other, policy) is not Outcome.EQUAL:
        return Outcome.DIFFERENT
    if same(ours, theirs, policy) is Outcome.EQUAL:
        return Outcome.EQUAL
    if ours.kind is not Kind.RELATION or theirs.kind is not Kind.RELATION or ours.args[:-1] != theirs.args[:-1]:
        return Outcome.UNKNOWN if variables(ours) == variables(theirs) else Outcome.DIFFERENT
    a, b, m = exact(ours.args[-1]), exact(theirs.args[-1]), exact(modulus)
    if a is None or b is None or not m:
        return Outcome.UNKNOWN
    return outcome((a - b) % m == 0)


def _same_parts(gold: Node, answer: Node, policy: Policy) -> Outcome:
    """Cases in any order, and set builders: part by part."""
    if gold.kind is Kind.CASES:
        if len(gold.args) != len(answer.args):
            return Outcome.UNKNOWN
        return _same_multiset(list(gold.args), list(answer.args), replace(policy, list_order="keep"), False)
    if gold.data == "intersection":
        return _same_multiset(list(gold.args), list(answer.args), policy, False)
    if len(gold.args) != len(answer.args):
        return Outcome.UNKNOWN
    return _all([_same_condition(a, b, policy) for a, b in zip(gold.args, answer.args, strict=True)])


def _same_condition(a: Node, b: Node, policy: Policy) -> Outcome:
    if a == b:
        return Outcome.EQUAL
    if a.kind is b.kind is Kind.RELATION:
        return _same_relation(a, b, policy)
    return same(a, b, replace(policy, unsimplified="accept"))


def _same_matrix(gold: Node, answer: Node, policy: Policy) -> Outcome:
    """The kind of bars counts; a row or column may be written as a tuple."""
    if gold.kind is answer.kind:
        if gold.data != answer.data or [len(r.args) for r in gold.args] != [len(r.args) for r in answer.args]:
            return Outcome.DIFFERENT
        return _all(
            [
                same(a, b, policy)
                for r, s in zip(gold.args, answer.args, strict=True)
                for a, b in zip(r.args, s.args, strict=True)
            ]
        )
    matrix, other = (gold, answer) if gold.kind is Kind.MATRIX else (answer, gold)
    cells = [cell for row in matrix.args for cell in row.args]
    vector = len(matrix.args) == 1 or all(len(row.args) == 1 for row in matrix.args)
    if (
        matrix.data != "matrix"
        or not vector
        or other.kind not in (Kind.GROUP, Kind.LIST)
        or other.data not in ("()", None, "[]")
    ):
        return Outcome.UNKNOWN if matrix.data != "matrix" else Outcome.DIFFERENT
    if len(cells) != len(other.args):
        return Outcome.DIFFERENT
    pairs = zip(cells, other.args, strict=True) if matrix is gold else zip(other.args, cells, strict=True)
    return _all([same(a, b, policy) for a, b in pairs])


def _same_collection(gold: Node, answer: Node, policy: Policy) -> Outcome:
    ordered = [n.kind in _ORDERED for n in (gold, answer)]
    if Kind.RATIO in (gold.kind, answer.kind) and (len(gold.args) == 2 or len(answer.args) == 2):
        other = answer if gold.kind is Kind.RATIO else gold
        if other.kind not in (Kind.RATIO, Kind.GROUP, Kind.LIST, Kind.SET, Kind.UNION):
            return same_scalar(gold, answer, policy)
    if Kind.UNION in (gold.kind, answer.kind) and gold.kind is answer.kind and gold.data != answer.data:
        return Outcome.UNKNOWN
    if Kind.UNION in (gold.kind, answer.kind) and {gold.data, answer.data} & {"without", "intersection"}:
        return _same_parts(gold, answer, policy) if gold.data == answer.data else Outcome.UNKNOWN
    if any(ordered):
        return _same_ordered(gold, answer, policy)
    ours, theirs = items_of(gold), items_of(answer)
    if ours is None or theirs is None:  # a single item and a collection of one
        many = theirs if ours is None else ours
        assert many is not None
        if ours is None and answer.kind is Kind.LIST and _are_spellings(gold, answer.args, policy):
            return Outcome.EQUAL
        if len(many) != 1:
            return Outcome.DIFFERENT if is_plain(gold) or Kind.BIG not in (gold.kind, answer.kind) else Outcome.UNKNOWN
        return same(gold, many[0], policy) if ours is None else same(many[0], answer, policy)
    if len(ours) != len(theirs):
        distinct = list(dict.fromkeys(theirs))
        solutions = all(item.kind is Kind.GROUP for item in theirs)
        if not (solutions or Kind.SET in (gold.kind, answer.kind)) or len(distinct) != len(ours):
            return Outcome.DIFFERENT
        theirs = distinct
    if len(ours) > MAX_ITEMS:
        return outcome(ours == theirs) if ours == theirs else Outcome.UNKNOWN
    if has(gold, Kind.DOTS) or has(answer, Kind.DOTS):
        return _all(
            [
                outcome(a.kind is b.kind) if Kind.DOTS in (a.kind, b.kind) else same(a, b, policy)
                for a, b in zip(ours, theirs, strict=True)
            ]
        )
    computed = expanded(answer) is not None or any(expanded(a) is not None for a in answer.args)
    keep = policy.list_order == "keep" and gold.kind is answer.kind is Kind.LIST and not computed
    if keep:
        return _all([same(a, b, policy) for a, b in zip(ours, theirs, strict=True)])
    return _same_multiset(ours, theirs, policy, computed)


def _are_spellings(gold: Node, items: Sequence[Node], policy: Policy) -> bool:
    """Whether `1/4 or 0.25`, `1/3, or 0.33`, `3/5, i.e. 60%` all say the same, which is the reference."""
    first = items[0]
    if has(first, Kind.RELATION) or len(items) > 3:
        return False
    rounded = replace(policy, rounding=1)
    agree = all(
        _agree(first, item) is True or same_value(amount(first).core, amount(item).core, rounded) is Outcome.EQUAL
        for item in items[1:]
    )
    return agree and any(same(gold, item, policy) is Outcome.EQUAL for item in items)


def _same_ordered(gold: Node, answer: Node, policy: Policy) -> Outcome:
    """Tuples, intervals and ratios: the brackets and the order count. A list may stand for a tuple, `a = 1, b = 2` too."""
    if gold.kind is answer.kind and gold.data != answer.data:
        return Outcome.DIFFERENT
    if gold.kind is not answer.kind:
        plus_minus = expanded(gold) or expanded(answer)
        if plus_minus is not None and gold.kind is not Kind.RATIO:
            ours, theirs = items_of(gold) or [gold], items_of(answer) or [answer]
            if len(ours) != len(theirs):
                ours, theirs = (independent(n) or side for n, side in ((gold, ours), (answer, theirs)))
            return _same_multiset(ours, theirs, policy, True)
        other, group = (answer, gold) if gold.kind in _ORDERED else (gold, answer)
        if other.kind is not Kind.LIST or group.data not in ("()", None):
            return Outcome.DIFFERENT
    sides = [expanded(gold), expanded(answer)]
    if sides != [None, None] and gold.kind is answer.kind:
        return _same_multiset(sides[0] or [gold], sides[1] or [answer], policy, True)
    if len(gold.args) != len(answer.args):
        return Outcome.DIFFERENT
    if gold.kind is Kind.RATIO and not has(gold, Kind.DOTS) and not has(answer, Kind.DOTS):
        return _same_ratio(gold, answer)
    return _all(
        [
            outcome(a.kind is b.kind) if Kind.DOTS in (a.kind, b.kind) else same(a, b, policy)
            for a, b in zip(gold.args, answer.args, strict=True)
        ]
    )


def _same_ratio(gold: Node, answer: Node) -> Outcome:
    """4:6 is 2:3."""
    found = []
    for a, b in zip(gold.args[1:], answer.args[1:], strict=True):
        found.append(same_value(Node(Kind.QUOTIENT, (a, gold.args[0])), Node(Kind.QUOTIENT, (b, answer.args[0])), None))
    return _all(found)


def _all(outcomes: Sequence[Outcome]) -> Outcome:
    if Outcome.DIFFERENT in outcomes:
        return Outcome.DIFFERENT
    return Outcome.UNKNOWN if Outcome.UNKNOWN in outcomes else Outcome.EQUAL


def _label(node: Node) -> Node | None:
    """What an item `x = 1` names."""
    return node.args[0] if node.kind is Kind.RELATION and node.data == ("=",) and is_name(node.args[0]) else None


def _same_multiset(gold: list[Node], answers: list[Node], policy: Policy, computed: bool) -> Outcome:
    if len(gold) != len(answers):
        return Outcome.DIFFERENT
    names = [[_label(item) for item in side] for side in (gold, answers)]
    if (
        None not in names[0]
        and set(map(str, names[0])) == set(map(str, names[1]))
        and len({*map(str, names[0])}) == len(gold)
    ):
        by_name = {str(name): item for name, item in zip(names[1], answers, strict=True)}
        return _all(
            [same(item, by_name[str(name)], policy, computed) for name, item in zip(names[0], gold, strict=True)]
        )
    left, uncertain = list(answers), False
    for item in gold:
        outcomes = [same(item, other, policy, computed) for other in left]
        if Outcome.EQUAL in outcomes:
            left.pop(outcomes.index(Outcome.EQUAL))
        elif Outcome.UNKNOWN in outcomes:
            uncertain = True
        else:
            return Outcome.DIFFERENT
    return Outcome.UNKNOWN if uncertain else Outcome.EQUAL


def _same_equations(gold: Node, answer: Node, left: Statement, right: Statement) -> Outcome:
    """a = b and c = d are the same if a - b is a constant multiple of c - d. A scalar may stand for what the other solves for."""
    if left.equation and answer.kind not in (Kind.RELATION, Kind.LIST, Kind.GROUP, Kind.SET):
        missing = variables(gold) - variables(answer)
        if len(missing) == 1 and variables(answer):
            return outcome(_solves(gold, next(iter(missing)), answer))
    if any(n.kind is not Kind.RELATION or n.data != ("=",) for n in (gold, answer)):
        return Outcome.DIFFERENT
    if not left.equation and not variables(left.body):
        return Outcome.DIFFERENT  # `2x = 10` is no answer to x = 5
    return _proportional(gold, answer, False)


def _solves(equation: Node, name: str, solution: Node) -> bool:
    """Whether an equation, which is of the first degree in a name, says that it is `solution`: xy = 6 and 6/x."""
    sides = []
    for shift in range(3):
        value = Node(Kind.SUM, (solution, number(shift)))
        left, right = (substitute(side, name, value) for side in equation.args)
        sides.append(Node(Kind.SUM, (left, negative(right))))
    bend = Node(Kind.SUM, (sides[0], Node(Kind.PRODUCT, (number(-2), sides[1])), sides[2]))
    zero = number(0)
    return same_value(sides[0], zero, None) is same_value(bend, zero, None) is Outcome.EQUAL


def _proportional(gold: Node, answer: Node, positive: bool) -> Outcome:
    """Whether left minus right of one is a (positive) constant times that of the other."""
    if variables(gold) != variables(answer):
        return Outcome.DIFFERENT
    sides = [Node(Kind.SUM, (n.args[0], negative(n.args[1]))) for n in (gold, answer)]
    reading = Reading.of(gold, answer)
    ratios: list[complex] = []
    for a, b in zip(signature(sides[0], reading), signature(sides[1], reading), strict=True):
        if a is None or b is None:
            continue
        x, y = complex(a), complex(b)
        if abs(x) < 1e-9 or abs(y) < 1e-9:
            if abs(x) > 1e-6 or abs(y) > 1e-6:
                return Outcome.DIFFERENT
            continue
        ratios.append(x / y)
    if len(ratios) < 2:
        return Outcome.UNKNOWN
    if any(abs(r - ratios[0]) > 1e-9 * abs(ratios[0]) for r in ratios):
        return Outcome.UNKNOWN if has(gold, Kind.BIG) or has(answer, Kind.BIG) else Outcome.DIFFERENT
    return outcome(not positive or ratios[0].real > 0)


def _same_relation(gold: Node, answer: Node, policy: Policy) -> Outcome:
    """Inequalities, memberships, chains of them: side by side, or as one difference that is above 0."""
    gold, answer = _turned(gold), _turned(answer)
    if gold.data != answer.data or len(gold.args) != len(answer.args):
        return Outcome.DIFFERENT
    free = replace(policy, unsimplified="accept")
    sides = [same(a, b, free) for a, b in zip(gold.args, answer.args, strict=True)]
    found = _all(sides)
    if found is not Outcome.EQUAL and gold.data in (
        ("equiv",),
        ("!=",),
        ("perp",),
        ("parallel",),
        ("cong",),
        ("sim",),
        ("=",),
    ):
        found = (
            Outcome.EQUAL
            if _all([same(a, b, free) for a, b in zip(gold.args, answer.args[::-1], strict=True)]) is Outcome.EQUAL
            else found
        )
    if found is not Outcome.EQUAL and gold.data in (("<",), ("<=",), ("!=",), ("=",)):
        return _proportional(gold, answer, gold.data not in (("!=",), ("=",)))
    return found


def _turned(node: Node) -> Node:
    if isinstance(node.data, tuple) and all(sign in (">", ">=") for sign in node.data):
        return Node(Kind.RELATION, node.args[::-1], tuple("<" + sign[1:] for sign in reversed(node.data)))
    return node


__all__ = ["Outcome", "Reference", "compare", "number_of", "plain_number", "read_reference", "same"]
