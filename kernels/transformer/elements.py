"""Element-wise parts of a transformer layer on a CPU, each in one pass over bfloat16 rows with
float32 arithmetic.

torch takes a pass, and a float32 copy, for every cast, product and sum of these. bfloat16 arrays
are passed as uint16.

What is compiled is kept between processes; see `kernels/compiled_loops.py`.
Shape legend: T tokens, H features of a row, I features of the MLP, D features of a head, N
sequences of at most L tokens.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (numba infers the types of what it compiles)
from __future__ import annotations

import math

import numpy as np
from numba import float32, uint16

from ..compiled_loops import LANES, compiled, exp, larger, transpose_square
from ..compiled_loops import from_bfloat16 as widen
from ..compiled_loops import to_bfloat16 as narrow


@compiled
def add_to(total, part):
    """total += part, of float32 and bfloat16."""
    for i in range(len(total)):
        total[i] += widen(part[i])


@compiled
def norm(x, weight, eps, out, scales):
    """x / rms(x) * weight of every row; `scales` [T] receives 1 / rms."""
    rows, width = x.shape
    for t in range(rows):
        squares = float32(0.0)
        for i in range(width):
            v = widen(x[t, i])
            squares += v * v
        scale = float32(1.0) / float32(math.sqrt(squares / float32(width) + float32(eps)))
        scales[t] = scale
        for i in range(width):
            out[t, i] = narrow(widen(x[t, i]) * scale * widen(weight[i]))


@compiled
def scaled(x, weight, scales, out):
    """`norm` by the `scales` that it gave."""
    rows, width = x.shape
    for t in range(rows):
        scale = scales[t]
        for i in range(width):
            out[t, i] = narrow(widen(x[t, i]) * scale * widen(weight[i]))


@compiled
def add_norm(x, y, weight, eps, total, out, scales):
    """`norm` of x + y, which `total` receives."""
    rows, width = x.shape
    for t in range(rows):
        squares = float32(0.0)
        for i in range(width):
            # of the rounded sum, which is what backward has
            bits = narrow(widen(x[t, i]) + widen(y[t, i]))
            total[t, i] = bits
            v = widen(bits)
            squares += v * v
        scale = float32(1.0) / float32(math.sqrt(squares / float32(width) + float32(eps)))
        scales[t] = scale
        for i in range(width):
            out[t, i] = narrow(widen(total[t, i]) * scale * widen(weight[i]))


@compiled
def norm_backward(x, weight, scales, dout, dx, dweight):
    """Adds x's gradient to `dx` and the weight's to the float32 row `dweight`."""
    rows, width = x.shape
    for t in range(rows):
        scale = scales[t]
        dot = float32(0.0)
        for i in range(width):
            dot += widen(dout[t, i]) * widen(weight[i]) * widen(x[t, i])
        factor = dot * scale * scale * scale / float32(width)
        for i in range(width):
            v = widen(x[t, i])
            d = widen(dout[t, i])
            dweight[i] += d * v * scale
            dx[t, i] = narrow(widen(dx[t, i]) + d * widen(weight[i]) * scale - v * factor)


@compiled
def gated(gate, up, out):
    """silu(gate) * up."""
    rows, width = gate.shape
    for t in range(rows):
        for i in range(width):
            g = widen(gate[t, i])
            out[t, i] = narrow(g / (float32(1.0) + exp(-g)) * widen(up[t, i]))


@compiled
def gated_backward(gate, up, dout, out, dgate, dup):
    """The gradients `dgate` and `dup`; `out` receives silu(gate) * up once more, which is not kept
    between the passes."""
    rows, width = gate.shape
    for t in range(rows):
        for i in range(width):
            g = widen(gate[t, i])
            u = widen(up[t, i])
            d = widen(dout[t, i])
            s = float32(1.0) / (float32(1.0) + exp(-g))
            silu = g * s
            out[t, i] = narrow(silu * u)
            dup[t, i] = narrow(d * silu)
            dgate[t, i] = narrow(d * u * (s + silu * (float32(1.0) - s)))


@compiled
def rotate(x, cos, sin, rows, out):
    """out [N, heads, L, D] = the rotary embedding, by `cos` and `sin` [T, D / 2], of the rows of x
    [T, heads * D] that have the indices `rows` [N, L]; zeros where an index is below 0."""
    count, heads, length, width = out.shape
    half = width // 2
    for n in range(count):
        for h in range(heads):
            for t in range(length):
                row = rows[n, t]
                target = out[n, h, t]
                if row < 0:
                    target[:] = uint16(0)
                    continue
                source = x[row]
                cosines = cos[row]
                sines = sin[row]
                for i in range(half):
                    a = widen(source[h * width + i])
                    b = widen(source[h * width + half + i])
                    c = cosines[i]
                    s = sines[i]
                    target[i] = narrow(a * c - b * s)
                    target[half + i] = narrow(b * c + a * s)


@compiled
def rotate_back(x, before, cos, sin, rows, out):
    """The inverse of `rotate`, into the rows of out [T, heads * D]; x is [N, heads, before + L, D],
    of which the first rows are left out."""
    count, length = rows.shape
    heads, width = x.shape[1], x.shape[3]
    half = width // 2
    for n in range(count):
        for h in range(heads):
            for t in range(length):
                row = rows[n, t]
                if row < 0:
                    continue
                source = x[n, h, before + t]
                cosines = cos[row]
                sines = sin[row]
                target = out[row]
                for i in range(half):
                    a = widen(source[i])
                    b = widen(source[half + i])
                    c = cosines[i]
                    s = sines[i]
                    target[h * width + i] = narrow(a * c + b * s)
                    target[h * width + half + i] = narrow(b * c - a * s)


@compiled
def gather_heads(x, rows, block):
    """Copies the rows with indices `rows` [N, L] of x [T, heads * D] to `block` [N, heads, L, D];
    zeros where an index is below 0."""
    count, heads, length, width = block.shape
    for n in range(count):
        for h in range(heads):
            for t in range(length):
                row = rows[n, t]
                target = block[n, h, t]
                if row < 0:
                    target[:] = uint16(0)
                    continue
                source = x[row]
                for i in range(width):
                    target[i] = source[h * width + i]


@compiled
def scatter_heads(block, before, rows, out):
    """The inverse of `gather_heads`; block is [N, heads, before + L, D], of which the first rows
    are left out."""
    count, length = rows.shape
    heads, width = block.shape[1], block.shape[3]
    for n in range(count):
        for h in range(heads):
            for t in range(length):
                row = rows[n, t]
                if row < 0:
                    continue
                source = block[n, h, before + t]
                target = out[row]
                for i in range(width):
                    target[h * width + i] = source[i]


@compiled
def products_of_rows(block, out, rows, deltas):
    """deltas [N, heads, L] = the dot products, over each head's features, of `block` [N, heads, L,
    D] with the rows of `out` [T, heads * D] that have the indices `rows` [N, L]; zero where an
    index is below 0."""
    count, heads, length, width = block.shape
    for n in range(count):
        for h in range(heads):
            for t in range(length):
                row = rows[n, t]
                total = float32(0.0)
                if row >= 0:
                    one = block[n, h, t]
                    other = out[row]
                    for i in range(width):
                        total += widen(one[i]) * widen(other[h * width + i])
                deltas[n, h, t] = total


@compiled
def causal_softmax(scores, before, scale, sums):
    """Softmax over the first before + t + 1 of a row's scores, in place, for scores [heads, L,
    before + L]; `sums` [heads, L] receives the logarithm of the denominators, scores taken times
    `scale`."""
    heads, length, width = scores.shape
    powers = np.empty(width, np.float32)
    for h in range(heads):
        for t in range(length):
            row = scores[h, t]
            seen = before + t + 1
            top = float32(-3.0e38)
            for j in range(seen):
                top = larger(top, widen(row[j]))
            total = float32(0.0)
            for j in range(seen):
                power = exp((widen(row[j]) - top) * scale)
                powers[j] = power
                total += power
            sums[h, t] = top * scale + float32(math.log(total))
            share = float32(1.0) / total
            for j in range(seen):
                row[j] = narrow(powers[j] * share)
            for j in range(seen, width):
                row[j] = uint16(0)


@compiled
def causal_softmax_backward(scores, dprobs, before, scale, sums, deltas):
    """In place: `scores` become the probabilities again, and `dprobs` the scores' gradient;
    `deltas` [heads, L] is the sum of out * dout of each query."""
    heads, length, width = scores.shape
    for h in range(heads):
        for t in range(length):
            row = scores[h, t]
            slope = dprobs[h, t]
            log_sum = sums[h, t]
            delta = deltas[h, t]
            seen = before + t + 1
            for j in range(seen):
                p = exp(widen(row[j]) * scale - log_sum)
                row[j] = narrow(p)
                slope[j] = narrow(p * (widen(slope[j]) - delta) * scale)
            for j in range(seen, width):
                row[j] = uint16(0)
                slope[j] = uint16(0)


@compiled
def sum_of_copies(block, total):
    """Adds over n the first P of each head's rows of `block` [N, heads, L, D] to `total` [heads, P,
    D] in float32."""
    count = block.shape[0]
    heads, length, width = total.shape
    for h in range(heads):
        for t in range(length):
            target = total[h, t]
            for n in range(count):
                source = block[n, h, t]
                for i in range(width):
                    target[i] += widen(source[i])


@compiled
def add_heads(total, first, out):
    """Adds float32 `total` [heads, P, D] to the P rows of out [T, heads * D] from `first` on."""
    heads, length, width = total.shape
    for h in range(heads):
        for t in range(length):
            source = total[h, t]
            target = out[first + t]
            for i in range(width):
                at = h * width + i
                target[at] = narrow(widen(target[at]) + source[i])


@compiled
def add_rotated_back(total, cos, sin, first, out):
    """As `add_heads`, rotated back by those rows' angles."""
    heads, length, width = total.shape
    half = width // 2
    for h in range(heads):
        for t in range(length):
            source = total[h, t]
            cosines = cos[first + t]
            sines = sin[first + t]
            target = out[first + t]
            for i in range(half):
                a = source[i]
                b = source[half + i]
                c = cosines[i]
                s = sines[i]
                at = h * width + i
                target[at] = narrow(widen(target[at]) + a * c + b * s)
                target[at + half] = narrow(widen(target[at + half]) + b * c - a * s)


TILE = 64
"""Rows and columns of a transposition's tile, a multiple of `LANES`: the 8 KiB that are read and
the 8 KiB that are written fit in the first-level cache."""


@compiled
def transpose(x, first, last, out):
    """Transposes columns first..last-1 of x [T, H] (16-bit elements) into rows first..last-1 of
    `out` [H, T]."""
    rows, width = x.shape
    whole_rows, whole_width = rows - rows % LANES, last - (last - first) % LANES
    for top in range(0, whole_rows, TILE):
        for left in range(first, whole_width, TILE):
            for j in range(left, min(left + TILE, whole_width), LANES):
                for i in range(top, min(top + TILE, whole_rows), LANES):
                    transpose_square(x, i * width + j, width, out, j * rows + i, rows)
    for i in range(rows):
        for j in range(whole_width if i < whole_rows else first, last):
            out[j, i] = x[i, j]
