"""Compares two trees.

Rationals are compared exactly, other scalars at sample points in 50 digits, and lists, tuples,
intervals, inequalities, equations, matrices, sets, cases and texts by their structure. What cannot
be decided is UNKNOWN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .options import Comparison, Options, all_of, outcome
from .scalars import amount, rename_parameter, same_scalar, same_value
from .shapes import (
    NO_SOLUTION,
    as_interval,
    expanded,
    independent,
    is_name,
    items_of,
    same_clock,
    same_letters,
    words_of,
)
from .statements import (
    Statement,
    agree,
    is_plain,
    names_differ,
    proportional,
    same_conditions,
    solves,
    state,
    with_same_argument,
    with_same_parameter,
    without_declarations,
)
from .tree import Kind, Node, has, rename, variables
from .values import exact

MAX_ITEMS = 64  # without an order each item is compared with each
_ORDERED = (Kind.GROUP, Kind.RATIO)
_COLLECTIONS = frozenset((*_ORDERED, Kind.LIST, Kind.SET, Kind.UNION))
_SYMMETRIC = tuple((sign,) for sign in ("equiv", "!=", "perp", "parallel", "cong", "sim", "="))


def same(gold: Node, answer: Node, policy: Options, computed: bool = False) -> Comparison:
    """Compares an answer with the reference. Raises TooBig, Undefined."""
    if gold == answer and not has(answer, Kind.RELATION):
        return Comparison.EQUAL
    if Kind.CHOICE in (gold.kind, answer.kind):
        choice = _same_choice(gold, answer, policy)
        if choice is not None:
            return choice
    if Kind.VERBATIM in (gold.kind, answer.kind):
        # outside the grammar, as the hedge `5|7` is, an answer is no plain number
        if is_plain(gold):
            return Comparison.DIFFERENT
        return Comparison.EQUAL if gold == answer else Comparison.UNKNOWN
    gold, ours = without_declarations(gold)
    answer, theirs = without_declarations(answer)
    if (outcome := same_conditions(gold, ours, theirs)) is not Comparison.EQUAL:
        return outcome
    gold, answer = with_same_argument(gold, answer)
    answer = with_same_parameter(gold, answer, (*ours, *theirs))
    if variables(gold) != variables(answer):
        answer = rename_parameter(gold, answer)
    left = state(gold, True, False)
    constant = not variables(left.body) and left.body.kind not in (
        Kind.TEXT,
        Kind.VERBATIM,
        Kind.RELATION,
    )
    right = state(answer, policy.chains == "last", constant)
    if right.false:
        return Comparison.DIFFERENT
    if right.unproved:
        return Comparison.UNKNOWN
    if left.equation or right.equation:
        return _same_equations(gold, answer, left, right)
    if names_differ(left.name, right.name):
        return Comparison.DIFFERENT
    outcome = _same_bodies(left.body, right.body, policy, computed)
    if outcome is Comparison.DIFFERENT and is_plain(gold) and _is_rounded(answer):
        return _same_bodies(left.body, answer.args[-1], policy, computed)
    return outcome


def _is_rounded(node: Node) -> bool:
    """Whether a chain ends in a rounded value: x = 300/7 = 42.857 ~ 43."""
    return node.kind is Kind.RELATION and isinstance(node.data, tuple) and node.data[-1] == "~"


def _same_choice(gold: Node, answer: Node, policy: Options) -> Comparison | None:
    """Compares choices: `C`, `(C) 12` and, where the reference has both, `12`; several letters in
    any order. None if no choice is meant."""
    if gold.kind is answer.kind is Kind.CHOICE:
        contents = [*gold.args, *answer.args]
        if (
            gold.data == answer.data
            and len(contents) == 2
            and Kind.TEXT not in {c.kind for c in contents}
        ):
            return same(contents[0], contents[1], policy)
        return outcome(gold.data == answer.data)
    if gold.kind is Kind.CHOICE:
        if answer.kind in (Kind.TEXT, Kind.RUN, Kind.VERBATIM):
            return Comparison.DIFFERENT
        if gold.args:
            return same(gold.args[0], answer, policy)
        stated = state(answer, False, False)
        body = stated.body if stated.name is not None else answer
        if body.kind is Kind.NAME:
            return outcome(body.data == gold.data)
        return same(Node(Kind.NAME, (), gold.data), answer, policy)
    letters = all(item.kind in (Kind.NAME, Kind.CHOICE) for item in gold.args)
    if gold.kind is Kind.RUN or (gold.kind is Kind.LIST and letters):
        return None
    if gold.kind is Kind.NAME:
        return outcome(gold.data == answer.data and not answer.args)
    return same(gold, answer.args[0], policy) if answer.args else Comparison.DIFFERENT


def _same_bodies(gold: Node, answer: Node, policy: Options, computed: bool = False) -> Comparison:
    if all(_is_system(n) for n in (gold, answer)) and variables(gold) != variables(answer):
        return Comparison.DIFFERENT
    intervals = as_interval(gold), as_interval(answer)
    kinds = {node.kind for node in intervals}
    if gold.kind is answer.kind is Kind.RELATION and len(kinds) == 2:
        return _same_relation(gold, answer, policy)
    gold, answer = intervals
    if kinds == {Kind.LIST, Kind.UNION}:
        items = (gold if gold.kind is Kind.LIST else answer).args
        if all(i.kind is Kind.RELATION and as_interval(i).kind is Kind.GROUP for i in items):
            return Comparison.DIFFERENT  # a > 1, b > 4 are about two things
    if Kind.RUN in kinds and (letters := same_letters(gold, answer)) is not None:
        return letters
    if Kind.MODULO in kinds:
        return _same_congruence(gold, answer, policy) if len(kinds) == 1 else Comparison.DIFFERENT
    if Kind.RELATION in kinds:
        if len(kinds) == 1:
            return _same_relation(gold, answer, policy)
        return Comparison.UNKNOWN if kinds & {Kind.GROUP, Kind.UNION} else Comparison.DIFFERENT
    if kinds & {Kind.CASES, Kind.BUILDER}:
        return _same_parts(gold, answer, policy) if len(kinds) == 1 else Comparison.UNKNOWN
    if Kind.CLOCK in kinds:
        return same_clock(gold, answer)
    if Kind.MATRIX in kinds:
        return _same_matrix(gold, answer, policy)
    if Kind.TEXT in kinds and Node(Kind.SET) in (gold, answer):
        text = gold if gold.kind is Kind.TEXT else answer
        return outcome(words_of(text) in NO_SOLUTION)
    if kinds & _COLLECTIONS or expanded(gold) is not None or expanded(answer) is not None:
        return _same_collection(gold, answer, policy)
    if Kind.TEXT in kinds:
        return outcome(len(kinds) == 1 and words_of(gold) == words_of(answer))
    if Kind.BASED in kinds:
        return outcome(gold == answer)
    return same_scalar(gold, answer, policy, computed)


def _is_system(node: Node) -> bool:
    """Whether a node is a relation, or a list of inequalities."""
    if node.kind is not Kind.LIST:
        return node.kind is Kind.RELATION
    return all(a.kind is Kind.RELATION and a.data != ("=",) for a in node.args)


def _same_congruence(gold: Node, answer: Node, policy: Options) -> Comparison:
    """Compares congruences: a = 3 and a = 10 modulo 7 are the same."""
    (ours, modulus), (theirs, other) = gold.args, answer.args
    if same(modulus, other, policy) is not Comparison.EQUAL:
        return Comparison.DIFFERENT
    if same(ours, theirs, policy) is Comparison.EQUAL:
        return Comparison.EQUAL
    relations = ours.kind is theirs.kind is Kind.RELATION
    if not relations or ours.args[:-1] != theirs.args[:-1]:
        return Comparison.UNKNOWN if variables(ours) == variables(theirs) else Comparison.DIFFERENT
    a, b, m = exact(ours.args[-1]), exact(theirs.args[-1]), exact(modulus)
    if a is None or b is None or not m:
        return Comparison.UNKNOWN
    return outcome((a - b) % m == 0)


def _same_parts(gold: Node, answer: Node, policy: Options) -> Comparison:
    """Compares cases, in any order, and set builders, part by part."""
    if len(gold.args) != len(answer.args):
        return Comparison.DIFFERENT if gold.data == "intersection" else Comparison.UNKNOWN
    if gold.kind is Kind.CASES:
        policy = replace(policy, list_order="keep")
    if gold.kind is Kind.CASES or gold.data == "intersection":
        return _same_multiset(gold.args, answer.args, policy, False)
    ours, theirs = (_declared(node.args[1]) for node in (gold, answer))
    if ours and theirs and ours not in variables(answer):
        answer = rename(answer, {theirs: ours})
    pairs = zip(gold.args, answer.args, strict=True)
    return all_of([_same_condition(a, b, policy) for a, b in pairs])


def _declared(condition: Node) -> str:
    """The variable that the condition of a set builder declares: n in `n \\in \\mathbb{Z}`."""
    is_in = condition.kind is Kind.RELATION and condition.data == ("in",)
    return str(condition.args[0].data) if is_in and condition.args[0].kind is Kind.NAME else ""


def _same_condition(a: Node, b: Node, policy: Options) -> Comparison:
    if a == b:
        return Comparison.EQUAL
    if a.kind is b.kind is Kind.RELATION:
        return _same_relation(a, b, policy)
    return same(a, b, replace(policy, unsimplified="accept"))


def _same_matrix(gold: Node, answer: Node, policy: Options) -> Comparison:
    """Compares matrices. Their bars count; a row or column may be written as a tuple."""
    if gold.kind is answer.kind:
        sizes = [[len(row.args) for row in matrix.args] for matrix in (gold, answer)]
        if gold.data != answer.data or sizes[0] != sizes[1]:
            return Comparison.DIFFERENT
        return _side_by_side(_cells(gold), _cells(answer), policy)
    matrix, other = (gold, answer) if gold.kind is Kind.MATRIX else (answer, gold)
    if matrix.data != "matrix":
        return Comparison.UNKNOWN
    is_vector = len(matrix.args) == 1 or all(len(row.args) == 1 for row in matrix.args)
    is_tuple = other.kind in (Kind.GROUP, Kind.LIST) and other.data in ("()", None, "[]")
    if not (is_vector and is_tuple):
        return Comparison.DIFFERENT
    if matrix is gold:
        return _side_by_side(_cells(matrix), other.args, policy)
    return _side_by_side(other.args, _cells(matrix), policy)


def _cells(matrix: Node) -> list[Node]:
    return [cell for row in matrix.args for cell in row.args]


def _side_by_side(gold: Sequence[Node], answers: Sequence[Node], policy: Options) -> Comparison:
    """Compares items in order; dots equal dots only."""
    if len(gold) != len(answers):
        return Comparison.DIFFERENT
    outcomes = []
    for a, b in zip(gold, answers, strict=True):
        dots = Kind.DOTS in (a.kind, b.kind)
        outcomes.append(outcome(a.kind is b.kind) if dots else same(a, b, policy))
    return all_of(outcomes)


def _same_collection(gold: Node, answer: Node, policy: Options) -> Comparison:
    kinds = {gold.kind, answer.kind}
    if Kind.RATIO in kinds and 2 in (len(gold.args), len(answer.args)) and kinds - _COLLECTIONS:
        return same_scalar(gold, answer, policy)
    if kinds == {Kind.UNION} and gold.data != answer.data:
        return Comparison.UNKNOWN
    if Kind.UNION in kinds and {gold.data, answer.data} & {"without", "intersection"}:
        return _same_parts(gold, answer, policy) if gold.data == answer.data else Comparison.UNKNOWN
    if kinds & set(_ORDERED):
        return _same_ordered(gold, answer, policy)
    ours, theirs = items_of(gold), items_of(answer)
    if ours is None or theirs is None:
        return _same_single(gold, answer, theirs if ours is None else ours, policy)
    if len(ours) != len(theirs):  # in a set, and among solutions, a repeated one says nothing
        sets = Kind.SET in kinds or all(item.kind is Kind.GROUP for item in theirs)
        theirs = list(dict.fromkeys(theirs)) if sets else theirs
    if len(ours) != len(theirs):
        return Comparison.DIFFERENT
    if len(ours) > MAX_ITEMS:
        return Comparison.EQUAL if ours == theirs else Comparison.UNKNOWN
    computed = expanded(answer) is not None or any(expanded(a) is not None for a in answer.args)
    keep = policy.list_order == "keep" and kinds == {Kind.LIST} and not computed
    if keep or has(gold, Kind.DOTS) or has(answer, Kind.DOTS):
        return _side_by_side(ours, theirs, policy)
    return _same_multiset(ours, theirs, policy, computed)


def _same_single(gold: Node, answer: Node, many: list[Node] | None, policy: Options) -> Comparison:
    """Compares a single item with a collection, which may hold only it or spellings of it."""
    assert many is not None
    if answer.kind is Kind.LIST and _are_spellings(gold, answer.args, policy):
        return Comparison.EQUAL
    if len(many) == 1:
        single = items_of(gold) is None
        return same(gold, many[0], policy) if single else same(many[0], answer, policy)
    big = Kind.BIG in (gold.kind, answer.kind) and not is_plain(gold)
    return Comparison.UNKNOWN if big else Comparison.DIFFERENT


def _are_spellings(gold: Node, items: Sequence[Node], policy: Options) -> bool:
    """Whether a list spells the reference only: `1/4 or 0.25`, `1/3, or 0.33`, `3/5, i.e. 60%`."""
    first = items[0]
    if has(first, Kind.RELATION) or len(items) > 3:
        return False
    rounded = replace(policy, rounding=1)
    for item in items[1:]:
        near = same_value(amount(first).core, amount(item).core, rounded) is Comparison.EQUAL
        if not near and agree(first, item) is not True:
            return False
    return any(same(gold, item, policy) is Comparison.EQUAL for item in items)


def _same_ordered(gold: Node, answer: Node, policy: Options) -> Comparison:
    """Compares tuples, intervals and ratios by brackets and order. A list may stand for a tuple,
    also one of equations: `a = 1, b = 2`."""
    if gold.kind is answer.kind and gold.data != answer.data:
        return Comparison.DIFFERENT
    if gold.kind is not answer.kind:
        plus_minus = expanded(gold) or expanded(answer)
        if plus_minus is not None and gold.kind is not Kind.RATIO:
            ours, theirs = items_of(gold) or [gold], items_of(answer) or [answer]
            if len(ours) != len(theirs):
                ours, theirs = independent(gold) or ours, independent(answer) or theirs
            return _same_multiset(ours, theirs, policy, True)
        other, group = (answer, gold) if gold.kind in _ORDERED else (gold, answer)
        if other.kind is not Kind.LIST or group.data not in ("()", None):
            return Comparison.DIFFERENT
    sides = [expanded(gold), expanded(answer)]
    if sides != [None, None] and gold.kind is answer.kind:
        return _same_multiset(sides[0] or [gold], sides[1] or [answer], policy, True)
    if len(gold.args) != len(answer.args):
        return Comparison.DIFFERENT
    if gold.kind is Kind.RATIO and not has(gold, Kind.DOTS) and not has(answer, Kind.DOTS):
        return _same_ratio(gold, answer)
    return _side_by_side(gold.args, answer.args, policy)


def _same_ratio(gold: Node, answer: Node) -> Comparison:
    """Compares ratios by their quotients: 4:6 is 2:3."""
    outcomes = []
    for a, b in zip(gold.args[1:], answer.args[1:], strict=True):
        ours = Node(Kind.QUOTIENT, (a, gold.args[0]))
        theirs = Node(Kind.QUOTIENT, (b, answer.args[0]))
        outcomes.append(same_value(ours, theirs, None))
    return all_of(outcomes)


def _label(node: Node) -> Node | None:
    """The name that an item `x = 1` defines, else None."""
    equation = node.kind is Kind.RELATION and node.data == ("=",)
    return node.args[0] if equation and is_name(node.args[0]) else None


def _same_multiset(
    gold: Sequence[Node], answers: Sequence[Node], policy: Options, computed: bool
) -> Comparison:
    """Compares items in any order; equations such as `a = 1, b = 2` by the names they define."""
    if len(gold) != len(answers):
        return Comparison.DIFFERENT
    names = [[_label(item) for item in side] for side in (gold, answers)]
    if None not in names[0] and set(names[0]) == set(names[1]) and len(set(names[0])) == len(gold):
        by_name = dict(zip(names[1], answers, strict=True))
        pairs = [(item, by_name[name]) for name, item in zip(names[0], gold, strict=True)]
        return all_of([same(item, other, policy, computed) for item, other in pairs])
    left, uncertain = list(answers), False
    for item in gold:
        outcomes = [same(item, other, policy, computed) for other in left]
        if Comparison.EQUAL in outcomes:
            left.pop(outcomes.index(Comparison.EQUAL))
        elif Comparison.UNKNOWN in outcomes:
            uncertain = True
        else:
            return Comparison.DIFFERENT
    return Comparison.UNKNOWN if uncertain else Comparison.EQUAL


def _same_equations(gold: Node, answer: Node, left: Statement, right: Statement) -> Comparison:
    """Compares equations: a = b is c = d if a - b is a constant multiple of c - d. A scalar may
    stand for the solution of the other side."""
    if left.equation and answer.kind not in (Kind.RELATION, Kind.LIST, Kind.GROUP, Kind.SET):
        missing = variables(gold) - variables(answer)
        if len(missing) == 1 and variables(answer):
            return outcome(solves(gold, next(iter(missing)), answer))
    if any(n.kind is not Kind.RELATION or n.data != ("=",) for n in (gold, answer)):
        return Comparison.DIFFERENT
    if not left.equation and not variables(left.body):
        return Comparison.DIFFERENT  # `2x = 10` is no answer to x = 5
    return proportional(gold, answer, False)


def _same_relation(gold: Node, answer: Node, policy: Options) -> Comparison:
    """Compares relations side by side, else by the difference of their sides."""
    gold, answer = _turned(gold), _turned(answer)
    if gold.data != answer.data or len(gold.args) != len(answer.args):
        return Comparison.DIFFERENT
    free = replace(policy, unsimplified="accept")
    outcome = _side_by_side(gold.args, answer.args, free)
    if outcome is not Comparison.EQUAL and gold.data in _SYMMETRIC:
        turned = _side_by_side(gold.args, answer.args[::-1], free)
        outcome = turned if turned is Comparison.EQUAL else outcome
    if outcome is not Comparison.EQUAL and gold.data in (("<",), ("<=",), ("!=",), ("=",)):
        return proportional(gold, answer, gold.data not in (("!=",), ("=",)))
    return outcome


def _turned(node: Node) -> Node:
    """The relation `b < a` for `a > b`; other relations unchanged."""
    if not isinstance(node.data, tuple) or not all(sign in (">", ">=") for sign in node.data):
        return node
    signs = tuple("<" + sign[1:] for sign in reversed(node.data))
    return Node(Kind.RELATION, node.args[::-1], signs)
