"""The decoder against transformers, and its weights by their Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from emberl.rollout.embedded.architecture import inverse_frequencies, parse_architecture
from emberl.rollout.embedded.model import Decoder
from emberl.rollout.weights.patch import digest
from safetensors.torch import save_file

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    (
        "Qwen3",
        {
            "head_dim": 20,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "num_key_value_heads": 1,
        },
    ),
    ("Qwen2", {"tie_word_embeddings": True}),
    ("Qwen2", {"tie_word_embeddings": False, "rope_theta": 500.0}),
    ("Llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    (
        "Llama",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": LLAMA3,
        },
    ),
]


def random_model(family: str, extra: dict[str, Any]) -> Any:
    """A transformers model whose every tensor, norms and biases too, is random enough to matter."""
    config = getattr(transformers, f"{family}Config")(**SMALL | extra)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.3 * noise if "norm" in name else 0.25 * noise
    return model


def reference_logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(ids).logits
    return torch.log_softmax(logits, -1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)


@pytest.mark.parametrize(
    ("family", "extra"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_logprobs_agree_with_transformers(
    family: str, extra: dict[str, Any], tmp_path: Path
) -> None:
    model = random_model(family, extra)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 40, (3, 60), generator=torch.Generator().manual_seed(2))
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        expected = reference_logprobs(model.to(dtype), ids)
        assert expected.std() > 0.5  # not the log-probs of a uniform guess
        got = Decoder.from_directory(tmp_path, dtype).token_logprobs(ids)
        assert (got - expected).abs().max() < bound


def test_bfloat16_logprobs_are_as_close_to_float32_as_those_of_transformers(tmp_path: Path) -> None:
    model = random_model("Qwen3", CASES[0][1])
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 40, (4, 60), generator=torch.Generator().manual_seed(3))
    exact = reference_logprobs(model.bfloat16().float(), ids)
    theirs = (reference_logprobs(model.bfloat16(), ids).float() - exact).abs().mean()
    ours = (
        (Decoder.from_directory(tmp_path, torch.bfloat16).token_logprobs(ids) - exact).abs().mean()
    )
    assert ours < 1.3 * theirs


def test_sharded_checkpoints_and_names(tmp_path: Path) -> None:
    model = random_model("Qwen2", {"tie_word_embeddings": False})
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    decoder = Decoder.from_directory(tmp_path)
    state = model.state_dict()
    assert set(decoder.weights) == set(state)
    for name, tensor in state.items():
        assert torch.equal(decoder.weights[name], tensor), name
        assert decoder.digests()[name] == digest(
            tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
        ), name


def test_a_tied_head_stored_twice_is_no_error(tmp_path: Path) -> None:
    model = random_model("Qwen3", CASES[0][1])
    model.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    assert "lm_head.weight" in state
    assert "lm_head.weight" not in Decoder.from_directory(tmp_path).weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_load_replaces_exactly_one_tensor_of_the_fused_matrix(
    make_decoder: Callable[..., Decoder], dtype: torch.dtype
) -> None:
    decoder, donor = make_decoder(0, dtype), make_decoder(1, dtype)
    ids = torch.arange(1, 9)[None]
    for name in decoder.weights:
        before, served = decoder.digests(), decoder.token_logprobs(ids)
        tensor = donor.tensor_bytes(name)
        frozen = tensor.data.copy()
        frozen.flags.writeable = False  # as shared memory hands it over
        decoder.load(name, replace(tensor, data=frozen))
        changed = {key for key, value in decoder.digests().items() if value != before[key]}
        assert changed == {name}
        assert decoder.digest(name) == donor.digest(name)
        assert not torch.equal(decoder.token_logprobs(ids), served), (
            f"{name} is held but not multiplied"
        )
    assert torch.equal(decoder.token_logprobs(ids), donor.token_logprobs(ids))


def test_load_refuses_what_does_not_fit(make_decoder: Callable[..., Decoder]) -> None:
    decoder = make_decoder(0, torch.float32)
    tensor = decoder.tensor_bytes("model.norm.weight")
    with pytest.raises(ValueError, match="lm_head"):
        decoder.load("lm_head.weight", tensor)
    with pytest.raises(ValueError, match=r"got F32 \(16,\).*serves F32 \(32,\)"):
        decoder.load("model.norm.weight", replace(tensor, shape=(16,), data=tensor.data[:64]))
    with pytest.raises(ValueError, match="got BF16"):
        decoder.load("model.norm.weight", replace(tensor, dtype="BF16"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        ({"architectures": None}, "none"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "dynamic"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"use_sliding_window": True}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
    ],
)
def test_what_is_not_supported_is_named_with_the_way_out(
    change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=rf"{words}.*rollout\.engine=vllm"):
        parse_architecture(SMALL | {"architectures": ["LlamaForCausalLM"]} | change)


def test_rope_is_read_from_both_layouts_of_transformers() -> None:
    base = SMALL | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 4}
    old = inverse_frequencies(
        parse_architecture(base | {"rope_theta": 100.0, "rope_scaling": None})
    )
    new = inverse_frequencies(
        parse_architecture(
            base | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
        )
    )
    # 100 ** -(0 / 4), 100 ** -(2 / 4)
    np.testing.assert_allclose(old.numpy(), [1.0, 0.1], rtol=1e-6)
    assert torch.equal(old, new)


def test_a_directory_without_weights_or_with_too_few_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        Decoder.from_directory(tmp_path)
    model = random_model("Qwen3", CASES[0][1])
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if name != "model.norm.weight"
    }
    save_file(state, file)
    with pytest.raises(ValueError, match=r"1 tensors are missing.*model\.norm\.weight"):
        Decoder.from_directory(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        Decoder.from_directory(tmp_path)
