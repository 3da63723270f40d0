"""Conversion of GGUF, the one-file format of llama.cpp, to a Hugging Face directory.

It covers the architectures that the engines and the learner are tested with. A file that could not
be converted without loss is refused, with the reason: a tensor without a counterpart, a rotation
for long contexts, an unknown pre-tokenizer.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = ("llama", "qwen2", "qwen3")
SPLIT_FILE = re.compile(r"-\d{5}-of-\d{5}$")

# Pre-tokenizers by llama.cpp's name (`tokenizer.ggml.pre`). A GGUF file has only the name, and for
# one that it does not know transformers takes GPT-2's, which gives other tokens than the model was
# trained on.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"\p{N}" + _REST
_SINGLE_DIGITS, _GPT2 = "single digits", "gpt-2"
TEXT_SPLITS = {
    "default": _GPT2, "gpt-2": _GPT2,
    "smollm": _SINGLE_DIGITS, "starcoder": _SINGLE_DIGITS, "refact": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufHeader:
    """The header of a GGUF file, before any weight is read."""

    architecture: str
    tokenizer: str
    """`gpt2` (byte-pair merges) or `llama` (SentencePiece)."""
    text_split: str
    context_length: int
    head_dim: int | None
    """Size of a query head; None if the file does not state it."""
    tensor_types: tuple[str, ...]
    """Storage types of the weights, the commonest first, e.g. ("Q4_1", "F32")."""


def read_header(file: Path) -> GgufHeader:
    """The header of a file. Raises ValueError unless the file is whole and can be converted."""
    from gguf import GGUFReader

    if SPLIT_FILE.search(file.stem):
        raise ValueError(
            f"{file} is one part of a model split over several files; join them with"
            " llama-gguf-split"
        )
    if file.open("rb").read(4) != b"GGUF":
        raise ValueError(f"{file} is not a GGUF file: it does not begin with the letters GGUF")
    try:
        reader = GGUFReader(file)
        fields = {
            name: field.contents() for name, field in reader.fields.items() if name not in _LONG
        }
    # gguf reads a truncated or damaged file past its end, where numpy raises errors of many kinds
    except Exception as error:
        raise ValueError(f"{file} is damaged or cut short ({error}); fetch it again") from error
    arrays = {name: len(reader.fields[name].data) for name in _LONG if name in reader.fields}
    end = max((int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors), default=0)
    if end > file.stat().st_size:
        raise ValueError(
            f"{file} is cut short: {file.stat().st_size} bytes instead of {end}; fetch it again"
        )
    architecture = str(fields.get("general.architecture", "(none)"))
    _refuse(file, architecture, fields, {tensor.name for tensor in reader.tensors})
    _check_sizes(file, architecture, fields, reader.tensors)
    _check_vocabulary(file, fields, arrays, reader.tensors)
    types = [tensor.tensor_type.name for tensor in reader.tensors]
    return GgufHeader(
        architecture=architecture,
        tokenizer=str(fields["tokenizer.ggml.model"]),
        text_split=str(fields.get("tokenizer.ggml.pre", "default")),
        context_length=int(fields[f"{architecture}.context_length"]),
        head_dim=fields.get(f"{architecture}.attention.key_length"),
        tensor_types=tuple(sorted(set(types), key=types.count, reverse=True)),
    )


_LONG = (
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.scores",
)
ELSEWHERE = "give the model's Hugging Face directory or Hub id instead"


def _refuse(file: Path, architecture: str, fields: dict[str, Any], tensors: set[str]) -> None:
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file} holds a model of architecture {architecture!r}, not one of"
            f" {', '.join(ARCHITECTURES)}; {ELSEWHERE}"
        )
    if fields.get("general.type", "model") != "model" or "token_embd.weight" not in tensors:
        raise ValueError(
            f"{file} holds no whole model ({fields.get('general.type', 'no embedding')});"
            f" {ELSEWHERE}"
        )
    if fields.get(f"{architecture}.expert_count"):
        raise ValueError(f"{file} is a mixture of experts; {ELSEWHERE}")
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors or scaling != "none":
        raise ValueError(
            f"{file} stretches its rotary positions (rope scaling), which is not converted;"
            f" {ELSEWHERE}"
        )
    model = fields.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise ValueError(
            f"{file} has {f'a tokenizer of kind {model!r}' if model else 'no tokenizer'};"
            f" {ELSEWHERE}"
        )
    split = fields.get("tokenizer.ggml.pre", "default")
    if model == "gpt2" and split not in TEXT_SPLITS:
        raise ValueError(
            f"{file} splits text in a way that is not known here (tokenizer.ggml.pre={split!r});"
            f" {ELSEWHERE}"
        )


def _check_sizes(
    file: Path, architecture: str, fields: dict[str, Any], tensors: Sequence[Any]
) -> None:
    """Raises ValueError if the header's sizes are none of this architecture's, or not those of the
    tensors. A header is whatever wrote it; transformers would divide by it, or build what it
    says."""

    def size(name: str, default: int | None = None) -> int:
        value = fields.get(f"{architecture}.{name}", default)
        if value is None:
            raise ValueError(f"{file} does not say {architecture}.{name}; {ELSEWHERE}")
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{file} says {architecture}.{name}={value!r}, which is no positive number;"
                f" {ELSEWHERE}"
            )
        return value

    size("context_length")
    heads = size("attention.head_count")
    kv_heads = size("attention.head_count_kv", heads)
    width = size("embedding_length")
    stated = f"{architecture}.attention.key_length" in fields
    if stated:
        size("attention.key_length")
    if heads % kv_heads or (width % heads and not stated):
        raise ValueError(
            f"{file} says {heads} heads, {kv_heads} of keys and values, in a width of {width},"
            f" which cannot be; {ELSEWHERE}"
        )
    blocks = [int(match[1]) for tensor in tensors if (match := _LAYER.match(tensor.name))]
    if size("block_count") != max(blocks, default=-1) + 1:
        raise ValueError(
            f"{file} says {architecture}.block_count={fields[f'{architecture}.block_count']}, but"
            f" has tensors of {max(blocks, default=-1) + 1} layers; {ELSEWHERE}"
        )
    for name in ("rope.freq_base", "attention.layer_norm_rms_epsilon"):
        value = fields.get(f"{architecture}.{name}", 1.0)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{file} says {architecture}.{name}={value!r}; {ELSEWHERE}")


def _check_vocabulary(
    file: Path, fields: dict[str, Any], arrays: Mapping[str, int], tensors: Sequence[Any]
) -> None:
    """Raises ValueError if the tokenizer's tables are not there or not of one size, or if weights
    are stored in a way that cannot be read. arrays: the lengths of the tables."""
    from gguf import dequantize

    count = arrays.get("tokenizer.ggml.tokens", 0)
    rows = next(int(t.data.shape[0]) for t in tensors if t.name == "token_embd.weight")
    if not 0 < count <= rows:
        raise ValueError(
            f"{file} has {count} tokens for the {rows} rows of its embedding; {ELSEWHERE}"
        )
    wanted = "merges" if fields["tokenizer.ggml.model"] == "gpt2" else "scores"
    if not arrays.get(f"tokenizer.ggml.{wanted}"):
        raise ValueError(f"{file} has a tokenizer without {wanted}; {ELSEWHERE}")
    # others, of fill-in-the-middle say, are not read, and may be -1 for none
    for kind in ("bos", "eos", "unknown", "padding"):
        name = f"tokenizer.ggml.{kind}_token_id"
        value = fields.get(name, 0)
        if not (isinstance(value, int) and 0 <= value < count):
            raise ValueError(f"{file} says {name}={value}, but has {count} tokens; {ELSEWHERE}")
    for tensor in {tensor.tensor_type: tensor for tensor in tensors}.values():
        try:
            dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{file} stores {tensor.name} as {tensor.tensor_type.name}, which cannot be read;"
                f" {ELSEWHERE}"
            ) from error


class _RefusedError(ValueError):
    """A refusal with words of its own, unlike what libraries raise over a file's contents."""


def convert(file: Path, folder: Path, dtype: str = "float32") -> str:
    """Writes weights in `dtype`, config and tokenizer to `folder`, which appears whole or not at
    all. Returns a line that describes the conversion. Raises ValueError for a file that cannot be
    converted."""
    header = read_header(file)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _save_tokenizer(file, header, draft)
        _save_model(file, header, draft, dtype)
        if not (folder / "config.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            draft.chmod(0o755)  # mkdtemp lets nobody else read it
            draft.rename(folder)
    except (_RefusedError, OSError):
        raise
    except Exception as error:  # of any kind: gguf, tokenizers and transformers read what is there
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{file} cannot be converted ({said:.300}); {ELSEWHERE}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    kinds = ", ".join(header.tensor_types)
    return f"{file} ({header.architecture}, {kinds}) was converted to {folder}, weights in {dtype}"


def _save_model(file: Path, header: GgufHeader, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from .learner.checkpoint import save_tensors

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    vars(config).pop("_model_name_or_path", None)  # the file's title, which is no path
    if header.head_dim is not None:  # which transformers does not read for Qwen3
        config.head_dim = header.head_dim
    with torch.device("meta"):
        wanted = {
            name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()
        }
    tensors = {}
    for name, tensor in _tensors(file, config):
        if name not in wanted or tensor.shape != wanted[name]:
            place = (
                f"where {tuple(wanted[name])} is expected"
                if name in wanted
                else "which has no place"
            )
            raise _RefusedError(
                f"{file} has {name} of shape {tuple(tensor.shape)}, {place} in the model;"
                f" {ELSEWHERE}"
            )
        tensors[name] = tensor.to(getattr(torch, dtype))
        if not bool(tensors[name].isfinite().all()):
            raise _RefusedError(
                f"{file} has {name} with values that are no numbers in {dtype}; fetch it again"
            )
    if missing := sorted(set(wanted) - set(tensors)):
        raise _RefusedError(
            f"{file} lacks {len(missing)} tensors of the model, e.g. {missing[0]}; {ELSEWHERE}"
        )
    save_tensors(tensors, folder)
    config.architectures = [_CLASSES[config.model_type]]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def _tensors(file: Path, config: Any) -> Iterator[tuple[str, Any]]:
    """(Hugging Face's name, float32 tensor) of each tensor; a name without a counterpart stays."""
    import torch
    from gguf import GGUFReader, dequantize

    for stored in GGUFReader(file).tensors:
        tensor = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        stem, _, kind = stored.name.rpartition(".")
        block = _BLOCK.fullmatch(stem)
        if block is None:
            yield f"{_WHOLE.get(stem, stem)}.{kind}", tensor
            continue
        layer, part = block.groups()
        if config.model_type == "llama" and part in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
            tensor = _halves(tensor, heads)
        yield f"model.layers.{layer}.{_PARTS.get(part, part)}.{kind}", tensor


def _halves(tensor: Any, heads: int) -> Any:
    """Rows [H * D, ...] of query or key heads in Hugging Face's order, which rotates the halves of
    a head against each other, from llama.cpp's, which rotates neighbours."""
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()


_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)")
_LAYER = re.compile(r"blk\.(\d+)\.")
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def _save_tokenizer(file: Path, header: GgufHeader, folder: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    backend = read.backend_tokenizer
    if header.tokenizer == "gpt2":
        backend.pre_tokenizer = _splitter(TEXT_SPLITS[header.text_split])
        if TEXT_SPLITS[header.text_split] == _QWEN2:
            from tokenizers import normalizers

            backend.normalizer = normalizers.NFC()
    special = {
        name: getattr(read, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    wrap: Any = PreTrainedTokenizerFast  # transformers leaves it untyped
    tokenizer = wrap(
        tokenizer_object=backend,
        model_max_length=header.context_length,
        clean_up_tokenization_spaces=False,
        chat_template=read.chat_template,
        **{name: token for name, token in special.items() if token is not None},
    )
    tokenizer.save_pretrained(folder)


def _splitter(split: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    whole = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=split in (_GPT2, _SINGLE_DIGITS)
    )
    if split == _GPT2:
        return whole
    if split == _SINGLE_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), behavior="isolated"), whole])
