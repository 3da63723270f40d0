"""A decoder of the Llama, Qwen2 and Qwen3 families, read from a Hugging Face directory without
transformers.

Weights are held fused (q, k, v in one matrix; gate and up in another). `Decoder.weights` maps
Hugging Face's names to views of them, so loading a tensor writes in place and a digest is taken
over the bytes that are really multiplied.

Shape legend: N tokens of a flat batch, E hidden, H query heads, K key/value heads, D head size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights.in_place import Place, plain
from ..weights.patch import (
    Bytes,
    DigestMismatchError,
    TensorBytes,
    TensorChange,
    check_size,
    digest,
)
from ..weights.tensors import checkpoint_tensors, dtype_name
from .architecture import Architecture, inverse_frequencies, read_architecture
from .matrix import Matrix

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [N, H, D], k [N, K, D], v [N, K, D]) -> [N, H * D]; decides what each token may see,
and what is cached."""

AUDIT = 32
"""Number of updates over which every packed copy is compared with its weights once."""
DTYPE_NAMES = {dtype: dtype_name(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)}


class Layer:
    """One block's fused weights; the norms of query and key are None where the family has none."""

    def __init__(self, arch: Architecture, dtype: torch.dtype, device: torch.device) -> None:
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def matrix(rows: int, columns: int, bias: bool) -> Matrix:
            return Matrix(empty(rows, columns), empty(rows) if bias else None)

        hidden, mlp, heads = arch.hidden_size, arch.intermediate_size, arch.num_heads
        self.attention_norm = empty(hidden)
        self.mlp_norm = empty(hidden)
        self.qkv = matrix((heads + 2 * arch.num_kv_heads) * arch.head_dim, hidden, arch.qkv_bias)
        self.q_norm = empty(arch.head_dim) if arch.qk_norm else None
        self.k_norm = empty(arch.head_dim) if arch.qk_norm else None
        self.out = matrix(hidden, heads * arch.head_dim, arch.out_bias)
        self.gate_up = matrix(2 * mlp, hidden, arch.mlp_bias)
        self.down = matrix(hidden, mlp, arch.mlp_bias)

    def named(self, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name within the layer, view of the held tensor)."""
        rows = [arch.num_heads * arch.head_dim] + 2 * [arch.num_kv_heads * arch.head_dim]
        yield "input_layernorm.weight", self.attention_norm
        yield "post_attention_layernorm.weight", self.mlp_norm
        matrices = (self.qkv, self.gate_up, self.out, self.down)
        for kind, (qkv, gate_up, out, down) in (
            ("weight", [matrix.weight for matrix in matrices]),
            ("bias", [matrix.bias for matrix in matrices]),
        ):
            if qkv is not None:
                for name, part in zip("qkv", torch.split(qkv, rows), strict=True):
                    yield f"self_attn.{name}_proj.{kind}", part
            if gate_up is not None:
                for name, part in zip(("gate", "up"), gate_up.chunk(2), strict=True):
                    yield f"mlp.{name}_proj.{kind}", part
            if out is not None:
                yield f"self_attn.o_proj.{kind}", out
            if down is not None:
                yield f"mlp.down_proj.{kind}", down
        if self.q_norm is not None and self.k_norm is not None:
            yield "self_attn.q_norm.weight", self.q_norm
            yield "self_attn.k_norm.weight", self.k_norm


class Decoder:
    """Weights and forward pass. The weights start unset: use `Decoder.from_directory`, or `load`
    every name."""

    def __init__(
        self, arch: Architecture, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        if dtype not in DTYPE_NAMES:
            raise ValueError(
                f"dtype {dtype}: the embedded engine decodes in bfloat16, float32 or float64"
            )
        self.arch = arch
        self.dtype = dtype
        self.device = torch.device(device)
        self.layers = [Layer(arch, dtype, self.device) for _ in range(arch.num_layers)]
        self.embedding = torch.empty(
            arch.vocab_size, arch.hidden_size, dtype=dtype, device=self.device
        )
        self.norm = torch.empty(arch.hidden_size, dtype=dtype, device=self.device)
        self.head = Matrix(self.embedding if arch.tied else torch.empty_like(self.embedding))
        self.weights: Mapping[str, Tensor] = dict(self._named())
        cos, sin = self._rope_tables(0)
        self._cos = cos
        self._sin = sin
        self.packings = 0
        """Number of calls of `pack`."""

    @classmethod
    def from_directory(
        cls,
        path: Path | str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Decoder:
        """Reads config.json and the safetensors files (one, or shards with an index), cast to
        `dtype`."""
        path = Path(path)
        decoder = cls(read_architecture(path), dtype, device)
        missing = set(decoder.weights)
        for name, tensor in checkpoint_tensors(path):
            held = decoder.weights.get(name)
            if held is None:  # a tied head stored twice, or buffers of old checkpoints
                continue
            if held.shape != tensor.shape:
                raise ValueError(
                    f"{path}: {name} has shape {tuple(tensor.shape)}, config.json wants"
                    f" {tuple(held.shape)}"
                )
            held.copy_(tensor)
            missing.discard(name)
        if missing:
            raise ValueError(
                f"{path}: {len(missing)} tensors are missing from the checkpoint, e.g."
                f" {min(missing)}"
            )
        decoder.pack()
        return decoder

    def check(self, name: str, tensor: TensorBytes | TensorChange) -> None:
        """Raises ValueError unless `tensor` has the dtype and shape of the weight that Hugging Face
        calls `name`, and, if it is a whole tensor, that many bytes."""
        held = self.weights.get(name)
        if held is None:
            raise ValueError(f"{name} is not a tensor of this {self.arch.family} model")
        if tensor.dtype != DTYPE_NAMES[self.dtype] or tuple(tensor.shape) != tuple(held.shape):
            raise ValueError(
                f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, "
                f"the engine serves {DTYPE_NAMES[self.dtype]} {tuple(held.shape)}"
            )
        if isinstance(tensor, TensorBytes):
            check_size(name, tensor)

    @property
    def matrices(self) -> Iterator[Matrix]:
        """Every weight matrix that activations are multiplied by."""
        yield self.head
        for layer in self.layers:
            yield from (layer.qkv, layer.out, layer.gate_up, layer.down)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor that a forward pass reads), also of a tied head."""
        yield from self._named()
        if self.arch.tied:
            yield "lm_head.weight", self.head.weight

    def pack(self) -> None:
        """Packs the matrices that `load` changed; needed before the next pass."""
        self.packings += 1
        for matrix in self.matrices:
            matrix.pack()

    def load(self, name: str, tensor: TensorBytes) -> None:
        """Overwrites one tensor, named as Hugging Face names it, with exactly these bytes; `pack`
        when all are there."""
        self.check(name, tensor)
        # Shared memory comes read-only, and torch wraps only what it could write to.
        data = tensor.data if tensor.data.flags.writeable else tensor.data.copy()
        held = self.weights[name]
        held.view(-1).view(torch.uint8).copy_(torch.from_numpy(data.reshape(-1)))

    def places(self, name: str) -> tuple[list[Place], list[Matrix]]:
        """Every place where this tensor is stored, and the matrices whose copies must be packed
        anew after a write because their layout is unknown. Valid until the next `pack`.
        Raises DigestMismatchError if such a copy differs from the held weights."""
        held = self.weights[name]
        places, stale = [plain(held, held.shape)], []
        for matrix in self.matrices if held.dim() == 2 else ():
            if matrix.weight.untyped_storage().data_ptr() != held.untyped_storage().data_ptr():
                continue
            first_row = held.storage_offset() // held.shape[1]
            copies = matrix.places(first_row, held.shape[0])
            if copies is None:
                self._check_copy(name, matrix)
                stale.append(matrix)
            else:
                places += copies
        return places, stale

    def audit(self, number: int) -> None:
        """Compares one of `AUDIT` parts of the packed copies, chosen by `number`, with the held
        weights. Raises DigestMismatchError, with a tensor's name, if one differs."""
        for matrix in list(self.matrices)[number % AUDIT :: AUDIT]:
            where = matrix.weight.untyped_storage().data_ptr()
            lies = (n for n, t in self.weights.items() if t.untyped_storage().data_ptr() == where)
            self._check_copy(next(lies, "of a matrix"), matrix)

    def _check_copy(self, name: str, matrix: Matrix) -> None:
        if not matrix.intact():
            raise DigestMismatchError(
                f"tensor {name}: the copy of its matrix that is multiplied has other bytes than the"
                " engine holds"
            )

    def tensor_bytes(self, name: str) -> TensorBytes:
        """The held bytes of one tensor (on CPU a view of them, not a copy)."""
        held = self.weights[name]
        data: Bytes = held.view(-1).view(torch.uint8).cpu().numpy()
        return TensorBytes(dtype=DTYPE_NAMES[self.dtype], shape=tuple(held.shape), data=data)

    def digest(self, name: str) -> str:
        """xxh3-128 of the bytes that are held, and multiplied, for this tensor."""
        return digest(self.tensor_bytes(name).data)

    def digests(self) -> dict[str, str]:
        """name -> `digest`, of every tensor."""
        return {name: self.digest(name) for name in self.weights}

    def reserve(self, max_len: int) -> None:
        """Makes positions 0..max_len-1 usable."""
        if max_len > len(self._cos):
            cos, sin = self._rope_tables(max_len)
            self._cos = cos
            self._sin = sin

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """ids, positions [N] int64 -> final hidden states [N, E], normalised. Positions must be
        reserved."""
        arch = self.arch
        heads, kv_heads = arch.num_heads, arch.num_kv_heads
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        x = self.embedding[ids]
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(self._rms(x, layer.attention_norm))
            qkv = qkv.view(-1, heads + 2 * kv_heads, arch.head_dim)
            qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
            if layer.q_norm is not None and layer.k_norm is not None:
                scale = torch.cat(
                    (layer.q_norm.expand(heads, -1), layer.k_norm.expand(kv_heads, -1))
                )
                qk = self._rms(qk, None) * scale
            half = arch.head_dim // 2
            qk = torch.addcmul(qk * cos, torch.cat((qk[..., half:], qk[..., :half]), -1), sin)
            x = x + layer.out(attend(number, qk[:, :heads], qk[:, heads:], v))
            gate, up = layer.gate_up(self._rms(x, layer.mlp_norm)).chunk(2, -1)
            x = x + layer.down(F.silu(gate) * up)
        return self._rms(x, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, E] -> [N, V] in float32 (float64 for a float64 decoder)."""
        logits = self.head(hidden)
        return logits if self.dtype == torch.float64 else logits.float()

    @torch.inference_mode()
    def token_logprobs(self, ids: Tensor) -> Tensor:
        """Teacher-forced log-probs of ids[:, 1:] given what precedes them: [B, T] int64 -> [B,
        T-1]."""
        batch, length = ids.shape
        self.reserve(length)
        positions = torch.arange(length, device=ids.device).repeat(batch)
        hidden = self.forward(
            ids.reshape(-1), positions, lambda _layer, q, k, v: causal_attention(q, k, v, batch)
        )
        logp = torch.log_softmax(self.logits(hidden), -1).view(batch, length, -1)
        return logp[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)

    def _rms(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if self.dtype != torch.float64:
            return F.rms_norm(x, x.shape[-1:], weight, self.arch.norm_eps)
        # Hugging Face normalises in float32 even here; the same operations in the same order give
        # the same bits.
        single = x.float()
        normed = (
            single * torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + self.arch.norm_eps)
        ).to(x.dtype)
        return normed if weight is None else weight * normed

    def rope(self, max_len: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin of positions 0..max_len-1, [max_len, D] float32, rounded as the
        decoder's dtype holds them: rotated = x * cos + swap_halves(x) * sin (RoFormer, arXiv
        2104.09864)."""
        cos, sin = self._rope_tables(max_len)
        return cos.float(), sin.float()

    def _rope_tables(self, max_len: int) -> tuple[Tensor, Tensor]:
        angles = torch.arange(max_len, dtype=torch.float32)[:, None] * inverse_frequencies(
            self.arch
        )
        cos, sin = angles.cos(), angles.sin()
        double_cos, signed_sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return double_cos.to(self.device, self.dtype), signed_sin.to(self.device, self.dtype)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        yield "model.embed_tokens.weight", self.embedding
        for number, layer in enumerate(self.layers):
            for name, tensor in layer.named(self.arch):
                yield f"model.layers.{number}.{name}", tensor
        yield "model.norm.weight", self.norm
        if not self.arch.tied:
            yield "lm_head.weight", self.head.weight


def causal_attention(q: Tensor, k: Tensor, v: Tensor, batch: int) -> Tensor:
    """Causal attention over `batch` rows of equal length; pads stand at the right, where no token
    looks."""

    def rows(x: Tensor) -> Tensor:  # [batch * length, heads, D] -> [batch, heads, length, D]
        return x.reshape(batch, -1, *x.shape[1:]).transpose(1, 2)

    group = q.shape[1] // k.shape[1]
    keys, values = rows(k).repeat_interleave(group, 1), rows(v).repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(rows(q), keys, values, is_causal=True)
    return out.transpose(1, 2).reshape(q.shape[0], -1)
