"""Every backend against float64 autograd, at 1e-10, over the options, shapes and shifts that a head
can have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emberl.kernels.loss import shifted_exp
from emberl.kernels.loss.fused_loss import logits_logprob, logits_loss
from forced_loss import linear_logprob, linear_loss

CHUNKS = {"one chunk": 1 << 30, "ragged chunks": 37 * 8 * 5, "one token each": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.6},
    "temperature per token": {"temperature": torch.linspace(0.5, 1.5, 23, dtype=torch.float64)},
    "logit scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 1.5},
    "all": {"bias": True, "temperature": 0.8, "logit_scale": 1.7, "softcap": 3.0},
}


def close(a: torch.Tensor, b: torch.Tensor, bound: float = 1e-10) -> bool:
    return bool((a - b).norm() <= bound * (1 + b.norm()))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("bonus", [0.0, 0.3], ids=["", "entropy"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS.keys())
def test_loss_and_gradients_equal_autograd(
    kit: SimpleNamespace, backend: str, bonus: float, options: dict[str, Any], chunk_bytes: int
) -> None:
    case = kit.make(**options)
    loss = kit.clipped(case, bonus=bonus)
    value, grads = kit.oracle_gradients(case, loss)
    hidden, weight, bias = case.operands()
    got, stats, metrics = linear_loss(
        hidden,
        weight,
        case.targets,
        loss,
        bias=bias,
        shift=loss.old,
        chunk_bytes=chunk_bytes,
        backend=backend,
        **case.options,
    )
    got.backward()
    assert close(got, value)
    for mine, theirs in zip((hidden, weight, bias), grads, strict=False):
        assert close(mine.grad, theirs)
    logp, entropy = kit.oracle(case, case.hidden, case.weight, case.bias)
    assert close(stats.logp, logp)
    assert close(stats.one_minus_p, 1 - logp.exp())
    assert (stats.entropy is None) == (bonus == 0)
    if stats.entropy is not None:
        assert close(stats.entropy, entropy)
    assert 0 < metrics["clipped"].sum() < 23


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_logprob_is_differentiable(
    kit: SimpleNamespace, backend: str, options: dict[str, Any]
) -> None:
    case = kit.make(**options)
    hidden, weight, bias = case.operands()
    stats = linear_logprob(
        hidden,
        weight,
        case.targets,
        bias=bias,
        entropy=True,
        chunk_bytes=37 * 8 * 5,
        backend=backend,
        **case.options,
    )
    up = torch.linspace(-1, 1, 23, dtype=torch.float64)
    (stats.logp @ up + stats.entropy @ up.flip(0)).backward()
    other = [
        None if x is None else x.detach().requires_grad_()
        for x in (case.hidden, case.weight, case.bias)
    ]
    logp, entropy = kit.oracle(case, *other)
    (logp @ up + entropy @ up.flip(0)).backward()
    for mine, theirs in zip((hidden, weight, bias), other, strict=True):
        assert (mine is None and theirs is None) or close(mine.grad, theirs.grad)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(kit: SimpleNamespace, backend: str) -> None:
    case = kit.make(5, 4, 7, bias=True, softcap=4.0, temperature=0.7)

    def f(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        stats = linear_logprob(
            hidden,
            weight,
            case.targets,
            bias=bias,
            entropy=True,
            chunk_bytes=120,
            backend=backend,
            **case.options,
        )
        return stats.logp, stats.entropy

    assert torch.autograd.gradcheck(f, case.operands())


SHIFTS = {
    "none": None,
    "exact": 0.0,
    "+3": 3.0,
    "-3": -3.0,
    "-50": -50.0,
    "-300": -300.0,
    "nan": float("nan"),
    "+inf": float("inf"),
    "-inf": float("-inf"),
}


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("offset", SHIFTS.values(), ids=SHIFTS.keys())
def test_the_shift_never_changes_the_result(
    kit: SimpleNamespace, offset: float | None, softcap: float | None
) -> None:
    case = kit.make(softcap=softcap)
    loss = kit.clipped(case, bonus=0.1)
    _, grads = kit.oracle_gradients(case, loss)
    logp, _ = kit.oracle(case, case.hidden, case.weight, None)
    shift = None if offset is None else logp + offset
    hidden, weight, _ = case.operands()
    value, stats, metrics = linear_loss(
        hidden,
        weight,
        case.targets,
        loss,
        shift=shift,
        softcap=softcap,
        chunk_bytes=37 * 8 * 9,
        backend="chunked",
    )
    value.backward()
    assert close(stats.logp, logp) and close(hidden.grad, grads[0]) and close(weight.grad, grads[1])
    assert metrics["actor/head_recomputed"].sum() == (23 if offset in (-50.0, -300.0) else 0)


def test_many_useless_shifts_are_recomputed_a_few_at_a_time(
    kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many they are, what they take beside the chunk's own tile stays small."""
    tiles, plain = [], shifted_exp._forward
    monkeypatch.setattr(
        shifted_exp,
        "_forward",
        lambda job, index, *rest: tiles.append(len(index)) or plain(job, index, *rest),
    )
    monkeypatch.setattr(shifted_exp, "RECOMPUTE_ROWS", 5)
    case = kit.make()
    loss = kit.clipped(case)
    _, grads = kit.oracle_gradients(case, loss)
    logp, _ = kit.oracle(case, case.hidden, case.weight, None)
    hidden, weight, _ = case.operands()
    shift = torch.where(torch.arange(23) % 2 == 0, logp - 90, logp)  # 12 of 23
    linear_loss(hidden, weight, case.targets, loss, shift=shift, backend="chunked")[0].backward()
    assert tiles == [23, 5, 5, 2] and close(hidden.grad, grads[0]) and close(weight.grad, grads[1])


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("sign", ["mixed", "negative"])
def test_large_and_all_negative_logits(kit: SimpleNamespace, scale: float, sign: str) -> None:
    case = kit.make()
    hidden, weight = case.hidden, case.weight * scale
    if sign == "negative":
        hidden, weight = hidden.abs(), -weight.abs()
    stats = linear_logprob(hidden, weight, case.targets, backend="chunked", entropy=True)
    logs = torch.log_softmax(hidden @ weight.T, -1)
    expected = logs[torch.arange(23), case.targets]
    assert close(stats.logp, expected)
    assert stats.logp.max() <= 0 and bool(torch.isfinite(stats.logp).all())
    assert close(stats.entropy, torch.special.entr(logs.exp()).sum(-1), 1e-9)


@pytest.mark.parametrize(
    ("n", "v"), [(0, 37), (1, 37), (1, 1), (23, 1), (3, 2), (33, 4097), (5, 8193)]
)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_shapes(kit: SimpleNamespace, n: int, v: int, backend: str) -> None:
    case = kit.make(n, 8, v)
    loss = kit.clipped(case)
    value, grads = kit.oracle_gradients(case, loss)
    hidden, weight, _ = case.operands()
    got, stats, _ = linear_loss(hidden, weight, case.targets, loss, backend=backend)
    got.backward()
    assert close(got, value) and close(hidden.grad, grads[0]) and close(weight.grad, grads[1])
    assert stats.logp.shape == (n,)


def test_non_contiguous_operands_and_gradients(kit: SimpleNamespace) -> None:
    case = kit.make()
    wide = torch.stack([case.hidden, torch.full_like(case.hidden, float("nan"))], -1)
    tall = case.weight.T.contiguous().T
    out: list[torch.Tensor] = []
    for hidden, weight in ((case.hidden, case.weight), (wide[..., 0], tall)):
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        logp = linear_logprob(hidden, weight, case.targets, backend="chunked").logp
        upstream = torch.arange(46, dtype=torch.float64)[::2]
        out += torch.autograd.grad(logp, (hidden, weight), upstream)
    assert close(out[0], out[2], 1e-14) and close(out[1], out[3], 1e-14)


def test_backward_scales_repeats_and_accumulates(kit: SimpleNamespace) -> None:
    case = kit.make()
    loss = kit.clipped(case)
    _, grads = kit.oracle_gradients(case, loss)
    hidden, weight, _ = case.operands()
    value, *_ = linear_loss(hidden, weight, case.targets, loss, backend="chunked")
    (value * -2.5).backward(retain_graph=True)
    assert close(weight.grad, -2.5 * grads[1])
    value.backward(retain_graph=True)
    value.backward()
    assert close(weight.grad, -0.5 * grads[1]) and close(hidden.grad, -0.5 * grads[0])


def test_clipped_tokens_get_exactly_no_gradient(kit: SimpleNamespace) -> None:
    case = kit.make()
    # most tokens are clipped: their rows are cut out of the products
    loss = kit.clipped(case, noise=2.0)
    _, grads = kit.oracle_gradients(case, loss)
    hidden, weight, _ = case.operands()
    got, _, metrics = linear_loss(
        hidden, weight, case.targets, loss, shift=loss.old, backend="chunked"
    )
    got.backward()
    clipped = metrics["clipped"] == 1
    assert clipped.sum() > 23 * 0.3
    assert hidden.grad[clipped].abs().max() == 0
    assert close(hidden.grad, grads[0]) and close(weight.grad, grads[1])


def test_frozen_head_and_frozen_hidden(kit: SimpleNamespace) -> None:
    case = kit.make()
    loss = kit.clipped(case)
    _, grads = kit.oracle_gradients(case, loss)
    for frozen in (0, 1):
        operands = list(case.operands()[:2])
        operands[frozen].requires_grad_(False)
        linear_loss(*operands, case.targets, loss, backend="chunked")[0].backward()
        assert operands[frozen].grad is None
        assert close(operands[1 - frozen].grad, grads[1 - frozen])
    with torch.no_grad():
        value, *_ = linear_loss(*case.operands()[:2], case.targets, loss, backend="chunked")
    assert not value.requires_grad and close(value, kit.oracle_gradients(case, loss)[0])


@pytest.mark.parametrize(
    "tokens", [40, 6, 3], ids=["all fit", "several chunks", "a sequence longer than a chunk"]
)
def test_coupled_sequences(kit: SimpleNamespace, tokens: int) -> None:
    case = kit.make()
    ids = torch.tensor([0] * 4 + [1] * 2 + [2] * 5 + [3] * 1 + [4] * 6 + [5] * 5)
    logp, _ = kit.oracle(case, case.hidden, case.weight, None)
    loss = kit.Sequences(
        old=logp + 0.1, advantage=torch.tensor([1.0, -1, 0.5, 2, -0.3, 1]).double(), ids=ids
    )
    value, grads = kit.oracle_gradients(case, loss)
    hidden, weight, _ = case.operands()
    got, *_ = linear_loss(
        hidden,
        weight,
        case.targets,
        loss,
        sequence_ids=ids,
        chunk_bytes=tokens * 37 * 8,
        backend="chunked",
    )
    got.backward()
    assert close(got, value) and close(hidden.grad, grads[0]) and close(weight.grad, grads[1])
    assert loss.sizes == {40: [23], 6: [6, 6, 6, 5], 3: [4, 2, 5, 1, 6, 5]}[tokens]


def test_permuting_and_splitting_the_batch_changes_nothing(kit: SimpleNamespace) -> None:
    case = kit.make()
    loss = kit.clipped(case)
    _, grads = kit.oracle_gradients(case, loss)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(3))
    hidden, weight, _ = case.operands()
    for part in (order[:10], order[10:]):
        piece = kit.Clipped(
            old=loss.old[part], advantage=loss.advantage[part], weight=loss.weight[part]
        )
        linear_loss(hidden[part], weight, case.targets[part], piece, backend="chunked")[
            0
        ].backward()
    assert close(hidden.grad, grads[0]) and close(weight.grad, grads[1])


def test_logits_of_another_head(kit: SimpleNamespace) -> None:
    case = kit.make(temperature=0.7)
    loss = kit.clipped(case, bonus=0.2)
    logits = (case.hidden @ case.weight.T).requires_grad_()
    value, stats, _ = logits_loss(logits, case.targets, loss, temperature=0.7)
    value.backward()
    expected, grads = kit.oracle_gradients(case, loss)
    assert close(value, expected) and close(logits.grad @ case.weight, grads[0])
    whole = logits_logprob(
        logits, case.targets, temperature=torch.full((23,), 0.7, dtype=torch.float64)
    )
    assert close(whole.logp, stats.logp)


def test_autocast_takes_the_products_in_bfloat16(kit: SimpleNamespace) -> None:
    case = kit.make().to(torch.float32)
    loss = kit.clipped(kit.make())
    hidden, weight, _ = case.operands()
    plain, *_ = linear_loss(
        hidden.bfloat16(), weight.bfloat16(), case.targets, loss, backend="chunked"
    )
    with torch.autocast("cpu", torch.bfloat16):
        value, stats, _ = linear_loss(hidden, weight, case.targets, loss, backend="chunked")
    value.backward()
    assert value == plain
    assert stats.logp.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 8)}, r"hidden has shape \(2, 3, 8\).*\[N, H\]"),
        ({"weight": torch.zeros(37, 9)}, r"weight \(37, 9\)"),
        (
            {"weight": torch.zeros(37, 8).bfloat16()},
            "weight has dtype torch.bfloat16; wanted torch.float32",
        ),
        (
            {"hidden": torch.zeros(23, 8).int(), "weight": torch.zeros(37, 8).int()},
            "hidden has dtype torch.int32",
        ),
        ({"targets": torch.zeros(22).long()}, r"targets has shape \(22,\); wanted \(23,\)"),
        ({"targets": torch.zeros(23).int()}, "targets has dtype torch.int32"),
        ({"targets": torch.full((23,), 37)}, r"targets\[0\] is 37; wanted an id from 0 to 36"),
        ({"targets": torch.full((23,), -1)}, r"targets\[0\] is -1"),
        ({"bias": torch.zeros(36)}, r"bias has shape \(36,\); wanted \(37,\)"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": torch.zeros(23)}, "temperature is 0.0"),
        ({"softcap": -1.0}, "softcap is -1"),
        ({"shift": torch.zeros(1)}, "shift has shape"),
        ({"hidden": torch.full((23, 8), float("nan"))}, "hidden is not finite.*row 0"),
        ({"weight": torch.full((37, 8), float("inf"))}, "weight or bias is not finite"),
    ],
)
def test_bad_input_is_named(
    kit: SimpleNamespace, backend: str, change: dict[str, Any], message: str
) -> None:
    case = kit.make().to(torch.float32)
    arguments = {
        "hidden": case.hidden,
        "weight": case.weight,
        "targets": case.targets,
        "backend": backend,
    } | change
    with pytest.raises(ValueError, match=message):
        linear_loss(loss=kit.clipped(kit.make()), **arguments)


def test_one_broken_weight_row_is_found_although_no_target_uses_it(kit: SimpleNamespace) -> None:
    case = kit.make()
    weight = case.weight.clone()
    free = next(v for v in range(37) if v not in case.targets.tolist())
    weight[free] = float("nan")
    with pytest.raises(ValueError, match="weight or bias is not finite"):
        linear_logprob(case.hidden, weight, case.targets, backend="chunked")


def test_missing_sequence_ids(kit: SimpleNamespace) -> None:
    case = kit.make()
    loss = kit.Sequences(old=torch.zeros(23), advantage=torch.ones(1), ids=torch.zeros(23).long())
    with pytest.raises(ValueError, match="sequence_ids is None"):
        linear_loss(case.hidden, case.weight, case.targets, loss)
