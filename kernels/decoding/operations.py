"""The operations of a decoding step between its matrix products, on a CPU: one pass over memory
each.

torch has an operator for every addition and cast; at a few dozen rows a step of a real model spends
more time on these than on its products. Arrays are C-contiguous float32, or bfloat16 as uint16;
sums are float32 or better. Every function does rows start..stop-1 and releases the GIL, so that
threads may share a step.

Shape legend: n sequences, E hidden, H query heads, K key/value heads, D head size, W longest
sequence, I MLP, V vocabulary.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# (numba infers the types of what it compiles)
from __future__ import annotations

import numpy as np

from ..compiled_loops import UNIT, compiled, dot_rows, exp, load, mix_rows, store

BLOCK = 512
"""Vocabulary entries whose probability is summed before a draw looks inside."""


@compiled
def add_norm(x, delta, weight, eps, out, start, stop):
    """x [n, E] += delta, rounded; out = RMSNorm(x) * weight (arXiv 1910.07467), rounded as
    transformers does, before and after the product with the weight. `delta` with 0 columns adds
    nothing."""
    size = x.shape[1]
    for i in range(start, stop):
        row, result = x[i], out[i]
        if delta.shape[1]:
            for j in range(size):
                store(row, j, load(row[j]) + load(delta[i, j]))
        square = np.float32(0)
        for j in range(size):
            square += load(row[j]) * load(row[j])
        scale = np.float32(1) / np.sqrt(square / np.float32(size) + np.float32(eps))
        for j in range(size):
            store(result, j, load(row[j]) * scale)
        for j in range(size):
            store(result, j, load(result[j]) * load(weight[j]))


@compiled
def silu_product(gate_up, out, start, stop):
    """gate_up [n, 2 I] -> out [n, I] = silu(gate) * up, silu rounded as transformers does."""
    size = out.shape[1]
    for i in range(start, stop):
        row, result = gate_up[i], out[i]
        for j in range(size):
            gate = load(row[j])
            store(result, j, gate / (np.float32(1) + exp(-gate)))
        for j in range(size):
            store(result, j, load(result[j]) * load(row[size + j]))


@compiled
def _rotated(head, norm, eps, cos, sin, into):
    """into [D] float32 = the head, normalised where `norm` has a weight, then rotated (arXiv
    2104.09864)."""
    size = head.shape[0]
    half = size // 2
    scale = np.float32(1)
    if norm.shape[0]:
        square = np.float32(0)
        for d in range(size):
            square += load(head[d]) * load(head[d])
        scale = np.float32(1) / np.sqrt(square / np.float32(size) + np.float32(eps))
    for d in range(half):
        a, b = load(head[d]) * scale, load(head[half + d]) * scale
        if norm.shape[0]:
            a *= load(norm[d])
            b *= load(norm[half + d])
        into[d] = a * cos[d] + b * sin[d]
        into[half + d] = b * cos[half + d] + a * sin[half + d]


@compiled
def _scores(query, keys, length, scores):
    """scores [W] = keys [W, D] . query [D] up to `length`."""
    for w in range(length):
        row, total = keys[w], np.float32(0)
        for d in range(len(query)):
            total += query[d] * load(row[d])
        scores[w] = total


@compiled
def _mix(shares, values, length, mixed):
    """mixed [D] = shares [W] . values [W, D] up to `length`."""
    for d in range(len(mixed)):
        mixed[d] = 0
    for w in range(length):
        row, share = values[w], shares[w]
        for d in range(len(mixed)):
            mixed[d] += share * load(row[d])


@compiled
def _softmax(scores, length):
    top = scores[0]
    for w in range(1, length):
        top = scores[w] if scores[w] > top else top
    total = np.float32(0)
    for w in range(length):
        scores[w] = exp(scores[w] - top)
        total += scores[w]
    for w in range(length):
        scores[w] /= total


@compiled
def attend(qkv, q_norm, k_norm, eps, cos, sin, keys, values, positions, out, start, stop):
    """One new token of each sequence: stores its key and value at its position and attends to all
    up to it.

    qkv [n, (H + 2 K) D], before norm and rotation; q_norm, k_norm [D], or empty; cos, sin [longest,
    D] float32 with the sign of the rotation in `sin`; keys, values [S, K, W, D]; positions [n]
    int64; out [n, H D].
    """
    kv_heads, size = values.shape[1], values.shape[3]
    heads = out.shape[1] // size
    group = heads // kv_heads
    scale = np.float32(1) / np.sqrt(np.float32(size))
    turned = np.empty(size, np.float32)
    mixed = np.empty(size, np.float32)
    scores = np.empty(values.shape[2], np.float32)
    for i in range(start, stop):
        place = positions[i]
        row, turn, turn_sin = qkv[i], cos[place], sin[place]
        for h in range(kv_heads):
            key, value = keys[i, h], values[i, h]
            begin = (heads + h) * size
            _rotated(row[begin : begin + size], k_norm, eps, turn, turn_sin, turned)
            begin += kv_heads * size
            for d in range(size):
                store(key[place], d, turned[d])
                value[place, d] = row[begin + d]
            for g in range(h * group, (h + 1) * group):
                begin = g * size
                _rotated(row[begin : begin + size], q_norm, eps, turn, turn_sin, turned)
                for d in range(size):
                    turned[d] *= scale
                if size % UNIT == 0:
                    dot_rows(turned, key, place + 1, scores)
                    _softmax(scores, place + 1)
                    mix_rows(scores, value, place + 1, mixed)
                else:
                    _scores(turned, key, place + 1, scores)
                    _softmax(scores, place + 1)
                    _mix(scores, value, place + 1, mixed)
                for d in range(size):
                    store(out[i], begin + d, mixed[d])


@compiled
def draw(logits, temperature, greedy, uniform, tokens, logprobs, start, stop):
    """One token of each distribution: logits [n, V] -> tokens [n] int64 and their log-probs [n]
    float32.

    temperature [n] float32 divides the logits; uniform [n] float64 in [0, 1) is where in the
    cumulated probabilities the token lies; greedy [n] bool takes the likeliest, whose log-prob is
    that of the untempered model. A row whose logits are not finite gives a NaN.
    """
    size = logits.shape[1]
    blocks = (size + BLOCK - 1) // BLOCK
    mass = np.empty(blocks, np.float64)
    for i in range(start, stop):
        row = logits[i]
        factor = np.float32(1) if greedy[i] else np.float32(1) / temperature[i]
        top = load(row[0])
        for v in range(1, size):
            top = max(top, load(row[v]))
        total = np.float64(0)
        for b in range(blocks):
            part = np.float32(0)
            for v in range(b * BLOCK, min(size, (b + 1) * BLOCK)):
                part += exp((load(row[v]) - top) * factor)
            mass[b] = part
            total += part
        token = size - 1
        if greedy[i]:
            # backwards: of equal logits the first is taken
            for v in range(size - 1, -1, -1):
                if load(row[v]) == top:
                    token = v
        else:
            target = uniform[i] * total
            below = np.float64(0)
            b = 0
            while b < blocks - 1 and below + mass[b] <= target:
                below += mass[b]
                b += 1
            for v in range(b * BLOCK, min(size, (b + 1) * BLOCK)):
                below += exp((load(row[v]) - top) * factor)
                if below > target:
                    token = v
                    break
        tokens[i] = token
        logprobs[i] = (load(row[token]) - top) * factor - np.log(total)
