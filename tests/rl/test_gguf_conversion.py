"""GGUF files of tiny models, written as llama.cpp's converter writes them, there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from emberl.rl.gguf_conversion import convert, read_header
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.convert_slow_tokenizer import bytes_to_unicode

SIZES = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 50000.0,
    "initializer_range": 0.2,
}
CONFIGS: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
BYTES = sorted(bytes_to_unicode().values())
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", *BYTES, "Ġ1", "ĠĠ", "Ġa", "12"]
MERGES = ["Ġ 1", "Ġ Ġ", "Ġ a", "1 2"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def make(architecture: str, tied: bool = True) -> Any:
    config = CONFIGS[architecture](**SIZES, tie_word_embeddings=tied, head_dim=16)
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def write(
    file: Path,
    model: Any,
    *,
    kind: Any = gguf.GGMLQuantizationType.F32,
    split: str = "smollm",
    tokenizer: str = "gpt2",
    architecture: str | None = None,
    extra: dict[str, np.ndarray[Any, Any]] | None = None,
    sizes: dict[str, Any] | None = None,
    tables: dict[str, Any] | None = None,
    **fields: str | int,
) -> Path:
    """As llama.cpp's converter does: its names, and the rows of Llama's q and k in its order of
    rotation. sizes, tables: other values of the header, None for none."""
    name = model.config.model_type
    writer = gguf.GGUFWriter(file, architecture or name)
    header = {
        "context_length": 128,
        "block_count": 2,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "head_count": 4,
        "head_count_kv": 2,
        "rope_dimension_count": 16,
        "key_length": 16,
        "value_length": 16,
        "rope_freq_base": SIZES["rope_theta"],
        "layer_norm_rms_eps": 1e-6,
        "vocab_size": len(TOKENS),
        **(sizes or {}),
    }
    for key, value in header.items():
        if isinstance(value, str):
            writer.add_string(f"{architecture or name}.attention.{key}", value)
        elif value is not None:
            getattr(writer, f"add_{key}")(value)
    if tokenizer:
        vocabulary = {
            "tokenizer_model": tokenizer,
            "tokenizer_pre": split,
            "token_list": TOKENS,
            "token_types": [3, 3, 3, 4] + [1] * (len(TOKENS) - 4),
            "token_merges": MERGES,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "chat_template": TEMPLATE,
            **(tables or {}),
        }
        for key, value in vocabulary.items():
            if value is not None:
                getattr(writer, f"add_{key}")(value)
    for key, value in fields.items():
        key = key.replace("__", ".")
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], 2)
    for hf_name, tensor in model.named_parameters():
        rows = tensor.detach().numpy()
        if name == "llama" and ("q_proj" in hf_name or "k_proj" in hf_name):
            heads = 4 if "q_proj" in hf_name else 2
            rows = rows.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(rows.shape)
        stored = kind if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            names.get_name(hf_name, (".weight", ".bias")),
            gguf.quantize(rows, stored),
            raw_dtype=stored,
        )
    for tensor_name, array in (extra or {}).items():
        writer.add_tensor(tensor_name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False)]
)
def test_there_and_back(tmp_path: Path, architecture: str, tied: bool) -> None:
    """The same bits, under the same names, in a directory that plain transformers loads."""
    model = make(architecture, tied)
    convert(write(tmp_path / "m.gguf", model), tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert type(back) is type(model)
    assert not hasattr(back.config, "quantization_config")
    want, have = dict(model.named_parameters()), dict(back.named_parameters())
    assert set(want) == set(have)
    assert all(torch.equal(want[name], have[name]) for name in want)
    ids = torch.arange(40).view(1, -1)
    assert torch.equal(model(ids).logits, back(ids).logits), (
        "rotation, norms and head sizes came over, too"
    )


def test_quantised_weights_become_what_they_stand_for(tmp_path: Path) -> None:
    model = make("llama")
    said = convert(
        write(tmp_path / "m.gguf", model, kind=gguf.GGMLQuantizationType.Q8_0), tmp_path / "out"
    )
    assert "Q8_0" in said and "float32" in said
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert back.dtype == torch.float32
    want, have = dict(model.named_parameters()), dict(back.named_parameters())
    furthest = max(float((want[name] - have[name]).detach().abs().max()) for name in want)
    assert 0 < furthest < 1 / 127, "half a step of 8 bits, of weights within 1"


@pytest.mark.parametrize(
    ("split", "text", "pieces"),
    [
        # a vocabulary of single digits was made with digits apart, before any merge
        ("smollm", "a  12", ["a", "ĠĠ", "1", "2"]),
        ("gpt-2", "a  12", ["a", "Ġ", "Ġ1", "2"]),
        ("llama-bpe", "a  12", ["a", "Ġ", "Ġ", "12"]),
        ("qwen2", "a  12", ["a", "Ġ", "Ġ", "1", "2"]),
        ("smollm", "<think> a<|im_end|>", ["<think>", "Ġa", "<|im_end|>"]),
    ],
)
def test_text_is_cut_as_the_file_says(
    tmp_path: Path, split: str, text: str, pieces: list[str]
) -> None:
    convert(write(tmp_path / "m.gguf", make("llama"), split=split), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix("<|im_end|>"), (
        "tags stay"
    )
    assert (
        tokenizer.apply_chat_template([{"content": "x"}], tokenize=False)
        == "<|im_start|>x<|im_end|>"
    )


BAD: list[tuple[dict[str, Any], str]] = [
    ({"architecture": "mamba"}, r"architecture 'mamba', not one of llama, qwen2, qwen3"),
    ({"split": "martian"}, r"tokenizer.ggml.pre='martian'"),
    ({"tokenizer": ""}, "has no tokenizer"),
    ({"tokenizer": "bert"}, "kind 'bert'"),
    ({"llama__expert_count": 8}, "mixture of experts"),
    ({"llama__rope__scaling__type": "yarn"}, "rope scaling"),
    ({"extra": {"rope_freqs.weight": np.ones(8, np.float32)}}, "rope scaling"),
    ({"sizes": {"head_count": 7, "key_length": None}}, "7 heads, 2 of keys and values"),
    ({"sizes": {"head_count": 0}}, r"llama.attention.head_count=0, which is no positive"),
    ({"sizes": {"head_count": "four"}}, r"head_count='four', which is no positive"),
    ({"sizes": {"head_count": None}}, r"does not say llama.attention.head_count"),
    ({"sizes": {"head_count_kv": 3}}, "4 heads, 3 of keys and values"),
    ({"sizes": {"head_count_kv": 0}}, r"head_count_kv=0, which is no positive"),
    ({"sizes": {"key_length": 0}}, r"key_length=0, which is no positive"),
    ({"sizes": {"context_length": 0}}, r"context_length=0, which is no positive"),
    ({"sizes": {"context_length": None}}, r"does not say llama.context_length"),
    ({"sizes": {"block_count": 3000}}, r"block_count=3000, but has tensors of 2 layers"),
    ({"sizes": {"block_count": 1}}, r"block_count=1, but has tensors of 2 layers"),
    ({"sizes": {"rope_freq_base": 0.0}}, r"rope.freq_base=0.0"),
    ({"sizes": {"layer_norm_rms_eps": float("nan")}}, r"layer_norm_rms_epsilon=nan"),
    ({"tables": {"token_list": None}}, "0 tokens for the 264 rows"),
    ({"tables": {"token_list": [*TOKENS, "more"]}}, "265 tokens for the 264 rows"),
    ({"tables": {"token_merges": None}}, "a tokenizer without merges"),
    ({"tokenizer": "llama"}, "a tokenizer without scores"),
    ({"tables": {"eos_token_id": 999_999}}, r"eos_token_id=999999, but has 264 tokens"),
    ({"extra": {"blk.0.odd.weight": np.ones((2, 8))}}, "blk.0.odd.weight as F64"),
    ({"extra": {"blk.0.odd.weight": np.ones((2, 8), np.int8)}}, "blk.0.odd.weight as I8"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_cannot_come_over_is_refused_by_name(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    file = write(tmp_path / "m.gguf", make("llama"), **options)
    with pytest.raises(ValueError, match=message) as error:
        read_header(file)
    assert str(file) in str(error.value)


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    """Biases that a plain Llama has not: without them it would be another model."""
    file = write(
        tmp_path / "m.gguf", make("llama"), extra={"blk.0.attn_q.bias": np.ones(64, np.float32)}
    )
    with pytest.raises(ValueError, match=r"self_attn.q_proj.bias .* no place"):
        convert(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"], "nothing half made is left"


@pytest.mark.parametrize(
    "tables",
    [
        {"token_merges": [*MERGES, "nospace"]},
        {"token_list": TOKENS[:200], "token_types": [1] * 200},
    ],
)
def test_a_tokenizer_that_libraries_refuse_is_named(tmp_path: Path, tables: dict[str, Any]) -> None:
    """What only they notice, with errors of many kinds."""
    file = write(tmp_path / "m.gguf", make("llama"), tables=tables)
    with pytest.raises(ValueError, match=r"cannot be converted .* Hugging Face directory") as error:
        convert(file, tmp_path / "out")
    assert str(file) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"], "nothing half made is left"


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = make("llama")
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"model.norm.weight with values that are no numbers"):
        convert(write(tmp_path / "m.gguf", model), tmp_path / "out")


def test_a_token_that_is_not_read_may_be_none(tmp_path: Path) -> None:
    fields = {"tokenizer__ggml__fim_pre_token_id": 2**32 - 1}
    read_header(write(tmp_path / "m.gguf", make("llama"), **fields))


def test_anyone_may_read_what_was_converted(tmp_path: Path) -> None:
    convert(write(tmp_path / "m.gguf", make("llama")), tmp_path / "out")
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {"0o644"}, modes


@pytest.mark.parametrize("keep", [0, 3, 20, 300, 5000, -1])
def test_a_file_cut_anywhere_is_named(tmp_path: Path, keep: int) -> None:
    whole = write(tmp_path / "m.gguf", make("llama")).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:keep])
    with pytest.raises(
        ValueError, match=r"cut\.gguf (is damaged or cut short|is cut short|is not a GGUF)"
    ):
        read_header(tmp_path / "cut.gguf")


def test_another_kind_of_file_and_a_part_of_one(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="does not begin with"):
        read_header(tmp_path / "m.gguf")
    part = tmp_path / "m-00001-of-00002.gguf"
    part.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="one part of a model"):
        read_header(part)
