"""Layers in parts, in plain torch, against those of transformers; and which part uses an
operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emberl.kernels import ascend, platform
from emberl.kernels.ascend import switched_on
from emberl.kernels.transformer import fused
from emberl.kernels.transformer.fused import Parts
from emberl.rl.learner.fused_layers import fused_forward
from emberl.rl.learner.layers import replace_layers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

SHOWS = {
    "layers in the parts that the operators replace give what transformers' give, packed (plain torch, CPU)": (
        "test_a_packed_row_gives_what_transformers_gives_each_sequence,"
        " test_padded_rows_are_sequences_of_one_length, test_layers_that_differ_are_not_used"
    ),
}
SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def model(family: str) -> Any:
    torch.manual_seed(3)
    made = AutoModelForCausalLM.from_config(FAMILIES[family](**SIZES), attn_implementation="sdpa")
    for parameter in made.parameters():  # norms and biases that are not 1 and 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_gives_what_transformers_gives_each_sequence(family: str) -> None:
    """Values and every gradient, in float32."""
    own, ours = model(family), model(family)
    lengths = (5, 9, 2)
    ids = torch.randint(0, 40, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    expected = torch.cat(
        [own.model(input_ids=part[None]).last_hidden_state[0] for part in ids.split(lengths)]
    )
    assert replace_layers(ours, ours.model.layers, fused_forward(torch.device("cpu")))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    borders = torch.tensor([0, 5, 14, 16], dtype=torch.int32)
    found = ours.model(
        input_ids=ids[None], position_ids=positions, use_cache=False, ends=(5, 14, 16),
        cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=9, max_length_k=9,
    ).last_hidden_state[0]  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    expected.backward(slope)
    found.backward(slope)
    for (name, a), b in zip(own.model.named_parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_padded_rows_are_sequences_of_one_length() -> None:
    own, ours = model("qwen3"), model("qwen3")
    ids = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    expected = own.model(input_ids=ids).last_hidden_state
    assert replace_layers(ours, ours.model.layers, fused_forward(torch.device("cpu")))
    found = ours.model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_layers_that_differ_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an operator that computes something else would."""
    wrong = fused.Part(
        name="gate", operator="x", fused=fused.gated_reference,
        reference=lambda gate, up: torch.relu(gate) * up,
    )  # fmt: skip
    monkeypatch.setitem(fused.PARTS, "gate", wrong)  # type: ignore[arg-type]
    ours = model("qwen2")
    assert not replace_layers(ours, ours.model.layers, fused_forward(torch.device("cpu")))
    assert "forward" not in ours.model.layers[0].__dict__, "transformers' own"


@pytest.mark.parametrize(
    ("given", "on"),
    [
        ({}, {"norm", "gate", "rotary", "attention"}),
        ({"EMBERL_FUSED": "none"}, set()),
        ({"EMBERL_FUSED": "norm, attention"}, {"norm", "attention"}),
    ],
)
def test_the_switch(given: dict[str, str], on: set[str]) -> None:
    assert switched_on(given) == on
    assert Parts.of(torch.device("cpu"), given).on == frozenset(), "a CPU has none of them"
    said = platform.describe_environment("npu", given)[-1]
    assert all((f"{n} npu::npu_" in said) == (n in on) for n in fused.PARTS), said
    added = ascend.environment("learner", given)
    assert added.get("EMBERL_FUSED") == given.get("EMBERL_FUSED"), "other nodes hear of it"


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="EMBERL_FUSED=norms: norms is no part"):
        switched_on({"EMBERL_FUSED": "norms"})


def test_npus_have_the_operators_and_sum_in_float32() -> None:
    assert platform.NPU.fused_layers and not platform.CUDA.fused_layers
    assert platform.sum_dtype("npu") == torch.float32
    assert platform.sum_dtype("cpu") == platform.sum_dtype("cuda") == torch.float64
