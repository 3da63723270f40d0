"""Replaced decoder layers beside transformers' own, in bfloat16 on a CPU, and both beside
float32."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rl.batch import sft_batch
from emberl.rl.learner.flops import ModelFlops
from emberl.rl.learner.layers import ATTENTION, layer_forward, replace_layers
from emberl.rl.learner.memory import need
from emberl.rl.learner.policy import hidden_states, takes_packed, to_tensors
from small_models import CONFIGS, SMALL
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig


def states_and_gradients(model: Any, packed: bool) -> tuple[Tensor, dict[str, Tensor]]:
    rng = np.random.default_rng(0)
    batch = sft_batch([(tuple(rng.integers(1, 50, n).tolist()), 1) for n in (17, 2, 40, 9)])
    states = hidden_states(
        model.model, to_tensors(batch, (0, 1, 2, 3), torch.device("cpu"), packed=packed)
    ).float()
    (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
    return states.detach(), {
        n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None
    }


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_replaced_layers_err_no_more_than_plain_ones(name: str, packed: bool) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name], dtype=torch.float32, attn_implementation="eager"
    )
    exact, exact_gradients = states_and_gradients(copy.deepcopy(model), False)
    plain, plain_gradients = states_and_gradients(copy.deepcopy(model).bfloat16(), False)
    replaced = copy.deepcopy(model)
    assert replace_layers(replaced, replaced.model.layers)
    found, gradients = states_and_gradients(replaced.bfloat16(), packed)
    assert distance(found, exact) < 1.5 * distance(plain, exact)
    assert gradients.keys() == exact_gradients.keys()
    for weight, gradient in exact_gradients.items():
        if gradient.norm() > 1e-3:  # a key's bias moves no softmax: its gradient is rounding
            bound = 1.5 * distance(plain_gradients[weight], gradient) + 0.01
            assert distance(gradients[weight], gradient) < bound, weight


def test_what_is_not_known_stays_plain() -> None:
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**SMALL, mlp_bias=True), dtype=torch.float32
    )
    assert not replace_layers(model, model.model.layers)
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_a_layer_that_computes_something_else_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, hidden_states: Tensor, **given: Any) -> Any:
        return 1.1 * layer_forward(self, hidden_states, **given)

    monkeypatch.setattr("emberl.rl.learner.layers.layer_forward", wrong)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32)
    assert not replace_layers(model, model.model.layers)


def test_replaced_layers_take_packed_rows() -> None:
    assert takes_packed(ATTENTION)


def test_a_layer_keeps_what_the_planned_memory_counts() -> None:
    """Bytes that a token of a pass keeps for the backward pass, beside `memory.need`'s: the
    two normed rows, once kept, would be a sixth more that nobody plans with."""
    config = LlamaConfig(**SMALL)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert replace_layers(model, model.model.layers)
    model.bfloat16()
    tokens = 40
    batch = sft_batch([(tuple(range(1, tokens + 1)), 1)])
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = hidden_states(
            model.model, to_tensors(batch, (0,), torch.device("cpu"), packed=True)
        )
    width = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = 2 * (2 * config.hidden_size + 2 * width + 2 * keys + 2 * config.intermediate_size)
    scales = 4 * (2 + config.num_attention_heads)
    # the final norm, the rows that predict, and the rotary embedding once for all layers
    outside = 4 * 8 * config.hidden_size + 4 * config.head_dim
    counted = sum(kept.values()) / tokens - config.num_hidden_layers * scales
    assert states.requires_grad
    assert config.num_hidden_layers * layer <= counted
    assert counted <= config.num_hidden_layers * layer + outside
    planned = need(
        ModelFlops.of(model.config),
        parameters=0,
        trained=0,
        world=1,
        dtype=torch.bfloat16,
        attention=ATTENTION,
        fused=True,
    )
    assert planned.token == config.num_hidden_layers * layer + 16 * config.hidden_size
