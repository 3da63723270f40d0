"""Comparison of values and outputs, which are hostile."""

import json

import pytest
from emberl.rewards.code_tests.compare import (
    Reply,
    canonical,
    equal,
    is_plain,
    parse_reply,
    same_output,
)
from emberl.rewards.sandbox.child import encode, source_of
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        (5, 5, True),
        (5, 5.0, True),
        (5.0, 5, True),
        (5, True, False),
        (1, True, False),
        (True, True, True),
        (False, 0, True),
        (True, 2, False),
        (True, 1.0, False),
        (0.3, 0.1 + 0.2, True),
        (0.3, 0.300002, False),
        (3e9, 3e9 + 1000, True),
        (10**17, 10**17 + 1, False),
        (float("nan"), float("nan"), True),
        (1.0, float("nan"), False),
        (float("inf"), float("inf"), True),
        (float("inf"), 1e308, False),
        (10**400, 1.0, False),
        (1 << 5000, 1 << 5000, True),
        ("5", 5, False),
        ("a", "a", True),
        (None, None, True),
        (None, False, False),
        ((1, 2), (1, 2), True),
        ((1, 2), [1, 2], False),
        ([1, [2.0]], [1, [2.0000001]], True),
        ([1], [1, 2], False),
        ({1, 2}, {2, 1}, True),
        ({0.3, 1}, {0.1 + 0.2, 1}, True),
        ({1, 2}, {1, 3}, False),
        ({(1, "a"): [1]}, {(1, "a"): [1]}, True),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": 1}, {"b": 1}, False),
        (b"x", b"x", True),
        (1j, 1j, True),
    ],
)
def test_equal(expected: object, got: object, same: bool) -> None:
    assert equal(encode(expected), encode(got)) is same


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.sets(st.integers() | st.text())
    ),
    max_leaves=12,
)


@given(plain)
def test_every_plain_value_survives_the_way_and_equals_itself(value: object) -> None:
    arrived = parse_reply(json.dumps({"ok": encode(value)}).encode()).value
    assert is_plain(arrived)
    assert equal(encode(value), arrived)
    assert canonical(encode(value)) == canonical(encode(eval(source_of(value))))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"ok": NaN}',
        b'{"ok": 1, "error": "x"}',
        b'{"error": 5, "text": ""}',
        b'{"ok": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"ok": ' + b"7" * 100_000 + b"}",
    ],
)
def test_unreadable_replies(line: bytes) -> None:
    assert parse_reply(line).error == "Unreadable"


def test_texts_of_the_model_are_made_printable() -> None:
    reply = parse_reply(json.dumps({"error": "E\x1b[2J", "text": "\ud800" + "a" * 999}).encode())
    assert reply == Reply(error="E [2J", text="?" + "a" * 299)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": 1, "b": 2},
        {"dict": [[1]]},
        {"dict": 5},
        {"set": 1},
        {"complex": ["x", 1]},
        {"other": "E"},
        [{"int": 5}],
    ],
)
def test_forged_forms_are_not_plain(value: object) -> None:
    assert not is_plain(value)


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        ("1 2\n3\n", b"1 2\n3", True),
        ("1 2\n", b"1  2 \n\n", True),
        ("1\n2\n", b"1 2\n", False),
        ("YES\n", b"yes\n", False),
        ("0.5\n", b"0.5000001\n", True),
        ("0.5\n", b"0.6\n", False),
        ("0.5\n", b"nan\n", False),
        ("5\n", b"5.0\n", True),
        ("1e3\n", b"1000\n", True),
        ("", b"", True),
        ("1\n", b"", False),
        ("\u00e4\n", b"\xc3\xa4\n", True),
        ("x\n", b"\xff\n", False),
    ],
)
def test_same_output(expected: str, got: bytes, same: bool) -> None:
    assert same_output(expected, got) is same
