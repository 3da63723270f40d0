"""The coding loops of weight patches: positions and sizes of a tensor's changes as a stream of
bits.

    stream = encode_changes(old, new)
    decode_changes(stream, old, out)           # out == new

The stream is specified in `rollout/weights/wire_format.py`. Three things make it small. An
optimizer's steps are about equally large everywhere, so whether a weight reaches the next
representable number depends on the spacing of these at its magnitude: elements are split into four
classes by their old magnitude, each with its own density of changes. Changes are coded as
differences of the bit patterns read as integers, which are nearly always 1 or -1. And every number
is a Golomb-Rice code whose parameter follows the running mean (Rice 1979; adapted as in JPEG-LS,
ITU-T T.87, with an exponential window), so there are no tables, and a list costs about its entropy
also if its numbers cluster.

It is fast because each side passes over the elements once, 64 at a time (`classes.py`), and
everything else is done for changes only. The loops are compiled by numba on first use and run
without the interpreter's lock. `_put` and `_get` functions extend those of `bitstream.py`; a `_get`
returns -1 as the position if a stream is not valid. Streams may be hostile: whatever they hold,
nothing outside the arrays is read or written.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (numba infers the types of what it compiles)
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .bitstream import (
    LARGEST_PARAMETER,
    SLACK,
    WINDOW,
    adapt,
    first_parameter,
    get,
    get_number,
    get_rice,
    put,
    put_number,
    put_rice,
)
from .classes import CLASS_BITS, CLASSES, by_class, choose_thresholds, find_changes, place_changes
from .lanes import compiled

Elements = NDArray[np.unsignedinteger]

CHANGE_WORDS = 5
"""Most words of one change: three of the longest codes (24 + 6 + 63 bits) and its sign."""
CLASS_WORDS = 6
"""Most words of a class beside its changes."""


def encode_changes(old: Elements, new: Elements) -> NDArray[np.uint8]:
    """The stream, as [bytes] uint8, that takes `old` to `new`, both [n] unsigned integers of one
    width."""
    thresholds = choose_thresholds(old, new)
    keys, differences, totals = find_changes(old, new, thresholds)
    ranks, differences, bounds = by_class(keys, differences)
    words = np.empty(SLACK + CHANGE_WORDS * len(keys) + CLASS_WORDS * (CLASSES + 1), np.int64)
    at = _put_head(words, len(keys), thresholds, 8 * old.itemsize - 1)
    at = _put_classes(words, at, thresholds, totals, ranks, differences, bounds)
    return words.view(np.uint8)[: -(-at // 8)].copy()


def decode_changes(stream: NDArray[np.uint8], old: Elements, out: Elements) -> bool:
    """Fills `out` with `old` after the changes, both [n]; False, with `out` in any state, if this
    is no valid stream for them."""
    words, end = np.zeros(SLACK + -(-len(stream) // 8), np.int64), 8 * len(stream)
    words.view(np.uint8)[: len(stream)] = stream
    count, at, thresholds = _get_head(words, 8 * old.itemsize - 1)
    if count > len(old) or at > end:
        return False
    ranks, differences, bounds = (
        np.empty(count, np.int64),
        np.empty(count, np.int64),
        np.zeros(CLASSES + 1, np.int64),
    )
    at = _get_classes(words, at, end, len(old), thresholds, ranks, differences, bounds)
    if at < 0 or -(-at // 8) != len(stream):
        return False
    return bool(place_changes(old, out, thresholds, bounds, ranks, differences))


@compiled
def _put_head(words, count, thresholds, width):
    words[0] = 0
    used = thresholds[_unused(thresholds) :]
    at = put(words, put_number(words, 0, count), len(used), CLASS_BITS)
    for threshold in used:
        at = put(words, at, threshold, width)
    return at


@compiled
def _get_head(words, width):
    """(number of changes, position of the head's end or -1, [3] thresholds)."""
    count, at = get_number(words, 0)
    used, at = get(words, at, CLASS_BITS)
    thresholds = np.zeros(CLASSES - 1, np.int64)
    for number in range(CLASSES - 1 - used, CLASSES - 1):
        thresholds[number], at = get(words, at, width)
        if thresholds[number] <= (thresholds[number - 1] if number else 0):
            return count, -1, thresholds
    return count, at, thresholds


@compiled
def _unused(thresholds):
    """The number of thresholds that are 0, and so of first classes without elements."""
    return np.sum(thresholds == 0)


@compiled
def _put_gaps(words, at, ranks, parameter):
    """Appends ascending ranks, each as the number of elements since the one before."""
    mean, last = 1 << parameter << WINDOW, -1
    for i in range(len(ranks)):
        gap = ranks[i] - last - 1
        at = put_rice(words, at, gap, parameter)
        mean, parameter = adapt(mean, parameter, gap)
        last = ranks[i]
    return at


@compiled
def _get_gaps(words, at, end, total, ranks, parameter):
    mean, last = 1 << parameter << WINDOW, -1
    for i in range(len(ranks)):
        gap, at = get_rice(words, at, parameter)
        if at > end or gap >= total - last - 1:
            return -1
        last += gap + 1
        ranks[i] = last
        mean, parameter = adapt(mean, parameter, gap)
    return at


@compiled
def _fill_others(ranks, others):
    """Fills `others` with the lowest numbers that are not in `ranks`; both ascend."""
    rank, passed = 0, 0
    for i in range(len(others)):
        while passed < len(ranks) and ranks[passed] == rank:
            passed += 1
            rank += 1
        others[i] = rank
        rank += 1


@compiled
def _steps(difference):
    """|difference| - 1, without overflow at the most negative one."""
    return ~difference if difference < 0 else difference - 1


@compiled
def _run(differences, first):
    """The number of consecutive differences, from `first` on, that are 1 or -1."""
    last = first
    while last < len(differences) and _steps(differences[last]) == 0:
        last += 1
    return last - first


@compiled
def _put_differences(words, at, differences):
    """Appends a bit `wide`, two parameters, and the differences. Wide: each with a sign and
    |difference| - 1. Not wide, if most are 1 or -1: each with a sign, and those that are neither
    also with |difference| - 2 and the length of the run of 1 and -1 after it."""
    others, beyond = 0, 0.0  # a float, since the sum may not fit into 64 bits
    for i in range(len(differences)):
        others += _steps(differences[i]) > 0
        beyond += max(0, _steps(differences[i]) - 1)
    wide = 2 * others > len(differences)
    run_parameter = first_parameter(len(differences) - others, others + 1)
    parameter = first_parameter(
        np.int64(min(beyond, 1e18)) + (others if wide else 0), max(1, others)
    )
    at = put(words, put(words, put(words, at, wide, 1), run_parameter, 6), parameter, 6)
    mean, run_mean, run = 1 << parameter << WINDOW, 1 << run_parameter << WINDOW, 0
    if not wide:
        run = _run(differences, 0)
        at = put_rice(words, at, run, run_parameter)
        run_mean, run_parameter = adapt(run_mean, run_parameter, run)
    for i in range(len(differences)):
        at = put(words, at, differences[i] < 0, 1)
        if run > 0:
            run -= 1
            continue
        beyond_this = _steps(differences[i]) - (0 if wide else 1)
        at = put_rice(words, at, beyond_this, parameter)
        mean, parameter = adapt(mean, parameter, beyond_this)
        if not wide:
            run = _run(differences, i + 1)
            at = put_rice(words, at, run, run_parameter)
            run_mean, run_parameter = adapt(run_mean, run_parameter, run)
    return at


@compiled
def _get_differences(words, at, end, differences):
    wide, at = get(words, at, 1)
    run_parameter, at = get(words, at, 6)
    parameter, at = get(words, at, 6)
    if max(run_parameter, parameter) > LARGEST_PARAMETER:
        return -1
    mean, run_mean, run = 1 << parameter << WINDOW, 1 << run_parameter << WINDOW, 0
    if not wide:
        run, at = get_rice(words, at, run_parameter)
        run_mean, run_parameter = adapt(run_mean, run_parameter, run)
    for i in range(len(differences)):
        negative, at = get(words, at, 1)
        steps = 0
        if run > 0:
            run -= 1
        else:
            beyond, at = get_rice(words, at, parameter)
            mean, parameter = adapt(mean, parameter, beyond)
            steps = beyond + (0 if wide else 1)
            if not wide:
                run, at = get_rice(words, at, run_parameter)
                run_mean, run_parameter = adapt(run_mean, run_parameter, run)
        if at > end:
            return -1
        differences[i] = ~steps if negative else steps + 1
    return at


@compiled
def _put_classes(words, at, thresholds, totals, ranks, differences, bounds):
    """Appends every class that is used: the number of its changes, whether the unchanged elements
    are marked instead (and their number), the gaps of those marked, and the differences. The
    changes of class c are at `bounds[c]:bounds[c + 1]`."""
    for number in range(_unused(thresholds), CLASSES):
        changes = slice(bounds[number], bounds[number + 1])
        marks, total, count = ranks[changes], totals[number], bounds[number + 1] - bounds[number]
        unchanged = 2 * count > total
        at = put(words, put_number(words, at, count), unchanged, 1)
        if unchanged:
            marks = np.empty(total - count, np.int64)
            _fill_others(ranks[changes], marks)
            at = put_number(words, at, len(marks))
        if len(marks):
            parameter = first_parameter(total - len(marks), len(marks))
            at = _put_gaps(words, put(words, at, parameter, 6), marks, parameter)
        if count:
            at = _put_differences(words, at, differences[changes])
    return at


@compiled
def _get_classes(words, at, end, size, thresholds, ranks, differences, bounds):
    """Fills `ranks` and `differences` [number of changes] and `bounds` [5]; returns the position of
    the end, or -1. size: number of elements of the tensor."""
    if at < 0:
        return -1
    for number in range(_unused(thresholds), CLASSES):
        done = bounds[number]
        count, at = get_number(words, at)
        unchanged, at = get(words, at, 1)
        # not `done + count > len(ranks)`: a hostile count could make the sum overflow
        if at > end or count > len(ranks) - done:
            return -1
        changes, marked, total = slice(done, done + count), count, size
        marks = ranks[changes]
        if unchanged:
            marked, at = get_number(words, at)
            if at > end or marked > size - count:
                return -1
            marks, total = np.empty(marked, np.int64), count + marked
        if marked:
            parameter, at = get(words, at, 6)
            if parameter > LARGEST_PARAMETER:
                return -1
            at = _get_gaps(words, at, end, total, marks, parameter)
        if at >= 0 and unchanged:
            _fill_others(marks, ranks[changes])
        if at >= 0 and count:
            at = _get_differences(words, at, end, differences[changes])
        if at < 0:
            return -1
        bounds[number + 1] = done + count
    return at if bounds[-1] == len(ranks) else -1
