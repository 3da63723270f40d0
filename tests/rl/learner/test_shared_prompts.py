"""A prompt computed once for its answers: the same log-probs and gradients as each with its own."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from emberl.kernels.transformer.fused import Parts
from emberl.rl.batch import sft_batch
from emberl.rl.config.load import ModelConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from emberl.rl.groups import Batch
from emberl.rl.learner import fused_layers
from emberl.rl.learner.flops import ModelFlops
from emberl.rl.learner.layers import replace_layers, use_packed_attention
from emberl.rl.learner.model_loader import ModelLoader, RankSpec
from emberl.rl.learner.policy import hidden_states, to_tensors
from emberl.rl.learner.rank import LearnerRank
from emberl.rl.learner.shared_prompts import (
    KEYS,
    SharedRows,
    SharingSequences,
    over_sequences,
    plan_sharing,
    repeated_tokens,
    share_in_attention,
    sharing_sequences,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CONFIGS
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

CPU = torch.device("cpu")
ONE, TWO = (5, 6, 7, 8, 9, 10, 11), (12, 13, 14)
ANSWERS = [(ONE, (20, 21)), (ONE, (22,)), (TWO, (23, 24, 25)), (ONE, (26, 27)), (ONE, (28,) * 30)]


def batch_of(answers: Any = ANSWERS) -> Batch:
    return sft_batch([((*prompt, *answer), len(prompt)) for prompt, answer in answers])


def test_neighbours_with_the_same_prompt_share_it() -> None:
    batch = batch_of()
    assert sharing_sequences(batch, range(5)) == [
        SharingSequences((0, 1), 7),
        SharingSequences((2,), 3),
        SharingSequences((3, 4), 7),
    ]
    assert sharing_sequences(batch, (4, 0, 2)) == [
        SharingSequences((4, 0), 7),
        SharingSequences((2,), 3),
    ]
    assert repeated_tokens(batch) == 14


def test_what_trains_is_no_prompt() -> None:
    """Of an answer whose first tokens are those of another prompt only its own prompt counts."""
    batch = batch_of([((5, 6), (7, 1)), ((5, 6, 7), (1,)), ((5, 6), (7, 2))])
    assert [run.prompt for run in sharing_sequences(batch, range(3))] == [2, 3, 2]
    untrained = replace(batch, loss_mask_T=np.zeros_like(batch.loss_mask_T))
    assert [run.sequences for run in sharing_sequences(untrained, (0, 1, 2))] == [(0, 1), (2,)]


def test_the_layout_of_a_row() -> None:
    """[a b c | x y | z] from abcxy and abcz, and what fills it up to 8."""
    micro = to_tensors(
        batch_of([((1, 2, 3), (8, 9)), ((1, 2, 3), (7,))]), (0, 1), CPU,
        packed=True, share_prompts=True,
    )  # fmt: skip
    assert micro.token_ids_BL[0, :7].tolist() == [1, 2, 3, 8, 9, 7, 0]
    assert micro.positions_BL is not None and micro.borders is not None
    assert micro.positions_BL[0, :8].tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    assert micro.rows_n.tolist() == [2, 3, 2], "both answers' first tokens are predicted at c"
    assert micro.targets_n.tolist() == [8, 9, 7]
    assert micro.borders.tolist() == [0, 5, 9, 11], "the sequences as attention sees them"
    assert micro.shared is not None
    assert micro.shared.rows_E[:9].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5]
    assert micro.shared.first_R[:7].tolist() == [0, 1, 2, 3, 4, 8, 9]
    assert micro.shared.spans == ((0, 5, 0, 0), (5, 1, 0, 3), (6, 2, 0, 0))
    [(rows, tokens)] = micro.shared.copies
    assert (rows.tolist(), tokens.tolist()) == ([0, 1, 2], [[0, 5], [1, 6], [2, 7]])


def test_prompts_that_differ_make_a_plain_row() -> None:
    batch = batch_of([((1, 2), (3,)), ((1, 4), (3,))])
    micro = to_tensors(batch, (0, 1), CPU, packed=True, share_prompts=True)
    assert micro.shared is None and "shared" not in micro.layout()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_a_gradient_is_the_sum_over_copies(rows: list[int]) -> None:
    rows_E = np.unique(rows, return_inverse=True)[1].astype(np.int64)
    shared = SharedRows.of([rows_E], CPU)
    x = torch.randn(int(rows_E.max()) + 1, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(rows_E), 3, dtype=torch.float64)
    out = over_sequences(shared, lambda each: each * weight, x)
    first = [rows_E.tolist().index(r) for r in range(len(x))]
    assert torch.equal(out, x * weight[first])
    (slope,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(slope, weight[first]), "of the other copies nothing goes on"


def test_sums_over_copies_are_formed_in_float32() -> None:
    """1 + 257 x 2^-8 in bfloat16, one by one, would stay 1 plus what its 8 bits hold."""
    shared = SharedRows.of([np.zeros(258, np.int64)], CPU)
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    scales = torch.full((258, 1), 2.0**-8, dtype=torch.bfloat16)
    scales[0] = 1.0

    def mixed(spread: Tensor) -> Tensor:
        return (spread * scales).sum(0, dtype=torch.float32).bfloat16().expand(258, 1)

    (slope,) = torch.autograd.grad(over_sequences(shared, mixed, x).sum(), x)
    assert float(slope) == 2.0


def states(model: Any, batch: Batch, shared: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Where the loss tokens are predicted, in the batch's order, and the gradients of a sum."""
    order = tuple(range(len(batch.sequence_lengths)))
    micro = to_tensors(batch, order, CPU, packed=True, share_prompts=shared)
    assert (micro.shared is not None) == shared
    found = hidden_states(model.model, micro)
    found = found.double() if found.dtype == torch.float64 else found.float()
    (
        found * torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    ).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found.detach(), gradients


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_and_gradients_are_those_of_whole_sequences(name: str) -> None:
    """By plain layers with an attention of packed sequences."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float64)
    use_packed_attention(model)
    batch = batch_of()
    expected, expected_gradients = states(copy.deepcopy(model), batch, False)
    found, gradients = states(copy.deepcopy(model), batch, True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert gradients.keys() == expected_gradients.keys()
    for weight, gradient in expected_gradients.items():
        # transformers' norms round to float32 whatever the model computes in
        if gradient.norm() > 1e-3:
            assert (gradients[weight] - gradient).norm() < 1e-6 * gradient.norm(), weight


def test_also_by_the_layers_of_a_cpu_and_of_an_npu() -> None:
    """In bfloat16, as near to float64 as without sharing."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"], dtype=torch.float32)
    plain = copy.deepcopy(model).double()
    use_packed_attention(plain)
    batch = batch_of()
    exact, exact_gradients = states(plain, batch, False)
    npu = lambda self, hidden, position_embeddings=None, **given: fused_layers.layer(  # noqa: E731
        self, hidden, position_embeddings, fused_layers.ends(hidden, given),
        Parts(frozenset()), given.get("shared"),
    )  # fmt: skip
    for forward in (None, npu):
        errors = []
        for shared in (False, True):
            replaced = copy.deepcopy(model)
            assert replace_layers(replaced, replaced.model.layers, forward)
            found, gradients = states(replaced.bfloat16(), batch, shared)
            by_weight = [
                float((gradients[n].double() - g).norm() / g.norm())
                for n, g in exact_gradients.items()
                if g.norm() > 1e-3
            ]
            errors.append((float((found.double() - exact).norm() / exact.norm()), max(by_weight)))
        assert errors[1][0] < 1.2 * errors[0][0] + 0.002, errors
        assert errors[1][1] < 1.2 * errors[0][1] + 0.01, errors


def test_any_attention_of_packed_sequences_can_share() -> None:
    """One of transformers' own form, which knows nothing of it; without sharing it is called as it
    was."""
    calls: list[dict[str, Any]] = []

    def packed_try(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
    ) -> tuple[Tensor, None]:
        from emberl.rl.learner.layers import packed_attention

        calls.append(given)
        return packed_attention(module, query, key, value, mask, **given)

    AttentionInterface.register("packed_try", packed_try)
    share_in_attention("packed_try")
    share_in_attention("packed_try")  # once
    model = AutoModelForCausalLM.from_config(
        CONFIGS["llama"], dtype=torch.float64, attn_implementation="packed_try"
    )
    expected, _ = states(copy.deepcopy(model), batch_of(), False)
    found, _ = states(copy.deepcopy(model), batch_of(), True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert len(calls) == 2 * 3
    assert all("shared" not in given for given in calls)


def test_an_attention_with_a_mask_does_not_share() -> None:
    """Its mask would be of the rows, while queries and keys are of the sequences."""

    def loader(attention: str, share: str) -> ModelLoader:
        settings = ModelConfig.model_validate(
            {"path": "m", "dtype": "float32", "attention": attention, "packing": "on"}
            | {"share_prompts": share}
        )
        return ModelLoader(
            RankSpec(rank=0, world=1, device="cpu", threads=1, model=settings, timeout=1)
        )

    model = SimpleNamespace(config=CONFIGS["llama"])
    for attention in ("eager", "sdpa", "flex_attention"):
        assert not loader(attention, "auto")._may_share(model)
        with pytest.raises(ValueError, match=f"model.attention={attention} "):
            loader(attention, "on")._may_share(model)


def test_answers_to_a_prompt_go_through_together() -> None:
    batch = batch_of(
        [(ONE, (20 + i,) * 3) for i in range(4)] + [(TWO, (30 + i,)) for i in range(4)]
    )
    # 7 + 4 x 3 and 3 + 4 tokens: 26, of which a rank's quarter, 6.5, is less than any pair's
    [passes] = plan_sharing(batch, 1, 10_000, None)
    assert sorted(i for one in passes for i in one) == list(range(8))
    flat = [i for one in passes for i in one]
    assert [run.sequences for run in sharing_sequences(batch, flat)] == [
        tuple(sorted(run.sequences)) for run in sharing_sequences(batch, flat)
    ]
    plan = plan_sharing(batch_of([(ONE * 10, (i,)) for i in range(20, 36)]), 2, 10_000, None)
    assert [[len(one) for one in rank] for rank in plan] == [[8], [8]]
    tight = plan_sharing(batch_of([(ONE * 10, (i,)) for i in range(20, 36)]), 2, 290, None)
    assert all(len(one) <= 4 for rank in tight for one in rank), "71 tokens each"


def test_keys_alone_of_a_copy_take_less_room() -> None:
    """Four prompts of 70 tokens with eight answers of one each: 568 tokens with all copies, 140
    where those of 7 of them take an eighth."""
    rows = [((p, *ONE * 10)[:70], (i,)) for p in range(90, 94) for i in range(20, 28)]
    batch = batch_of(rows)
    for share, budget, expected in (
        (1.0, 568, 4),
        (1 / 8, 140, 4),
        (1 / 8, 280, 2),
        (1 / 8, 568, 1),
    ):
        [passes] = plan_sharing(batch, 1, budget, None, copy=share)
        assert [len(one) for one in passes] == [32 // expected] * expected
    [passes] = plan_sharing(batch, 1, 139, None, copy=1 / 8)
    assert max(map(len, passes)) < 8


def test_a_model_that_makes_copies_is_planned_with_room_for_them(tmp_path: Path) -> None:
    """A teacher whose layers stay transformers' own (its MLP has another activation) beside a
    policy whose layers read prompts where they stand: one plan of passes serves both."""
    tiny = TinyConfig(hidden=64, layers=1, heads=2, kv_heads=1, head_dim=32, intermediate=96)
    for name in ("policy", "alike", "other"):
        make_tiny(tmp_path / name, tiny, seed=0)
    described = tmp_path / "other" / "config.json"
    config = json.loads(described.read_text())
    described.write_text(json.dumps(config | {"hidden_act": "gelu"}))
    model = ModelConfig.model_validate({"path": str(tmp_path / "policy"), "dtype": "bfloat16"})
    rank = LearnerRank(
        RankSpec(rank=0, world=1, device="cpu", threads=1, model=model, timeout=60.0)
    )
    rank.connect(rank.address())
    try:
        rank.load(str(tmp_path / "policy"))
        kept = [rank.models.copied_prompt]
        for name in ("alike", "other"):
            rank.models.load_teacher(str(tmp_path / name))
            kept.append(rank.models.copied_prompt)
    finally:
        rank.close()
    assert kept == [KEYS, KEYS, 1.0]


def test_a_pass_is_balanced_by_what_it_computes() -> None:
    """Eight answers of 4 tokens to a prompt of 96, and eight of 100 tokens to one of none but a
    token: 128 and 801 tokens, both 800 without sharing."""
    long, short = (ONE * 14)[:96], (50,)
    batch = batch_of(
        [(long, (i,) * 4) for i in range(20, 28)] + [(short, (i,) * 99) for i in range(20, 28)]
    )
    plan = plan_sharing(batch, 2, 100_000, None)
    computed = []
    for rank in plan:
        runs = [sharing_sequences(batch, one) for one in rank]
        lengths = batch.sequence_lengths
        computed.append(
            sum(
                sum(int(lengths[s]) for s in run.sequences) - (len(run.sequences) - 1) * run.prompt
                for one in runs
                for run in one
            )
        )
    assert max(computed) < 1.3 * min(computed), computed


def test_flops_count_a_shared_prompt_once() -> None:
    flops = ModelFlops.of(CONFIGS["llama"])
    apart = flops.update([9, 8], 3)
    assert apart - flops.update([9, 8], 3, repeated=7) == 3 * 7 * flops.token
