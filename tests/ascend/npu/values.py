"""Values on an `npu` device that computes nothing: each aten operation is done by the CPU on copies,
and all else (memory, copies, streams, autograd's formulas and dispatch) is torch-npu's own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

THREAD = ThreadPoolExecutor(max_workers=1)
ALLOWED = frozenset(
    {
        "empty", "empty_strided", "set_", "resize_", "record_stream", "is_pinned", "_pin_memory",
        "detach", "alias", "lift_fresh",
    }
)  # fmt: skip
"""What the stand-ins can do themselves."""
COLLECTIVES = frozenset({"c10d", "_c10d_functional", "c10d_functional"})


Reference = Callable[[dict[str, Any]], Any]
"""From an operator's arguments by name, defaults included, to its result."""


def gather_backward(given: dict[str, Any]) -> Tensor:
    out = torch.zeros(given["self_size"], dtype=given["grad"].dtype)
    return out.scatter_add_(given["dim"], given["index"], given["grad"])


def slopes(run: Callable[..., Tensor], given: tuple[Tensor, ...], slope: Tensor) -> Any:
    """Gradients by torch's autograd: in a thread of its own, as below a dispatch mode there is
    none."""

    def differentiate() -> Any:
        leaves = [x.detach().requires_grad_() for x in given]
        return torch.autograd.grad(run(*leaves), leaves, slope)

    return THREAD.submit(differentiate).result(timeout=60)


def matmul_backward(given: dict[str, Any]) -> Any:
    found = slopes(torch.matmul, (given["self"], given["other"]), given["grad"])
    return tuple(x if wanted else None for x, wanted in zip(found, given["mask"], strict=True))


OWN: dict[str, Reference] = {
    "matmul_backward": matmul_backward,
    "_npu_dtype_cast": lambda given: given["input"].to(given["dtype"]),
    "_npu_dtype_cast_backward": lambda given: given["grad"].to(given["dtype"]),
    "npu_gather_backward": gather_backward,
}
"""What torch-npu's autograd makes of `.to(dtype)`, `gather` and `matmul`."""


def bound(func: Any) -> Callable[..., dict[str, Any]]:
    """Arguments by their names in the schema."""
    arguments = func._schema.arguments

    def bind(*args: Any, **kwargs: Any) -> dict[str, Any]:
        given = {a.name: a.default_value for a in arguments if a.has_default_value()}
        return given | {a.name: v for a, v in zip(arguments, args, strict=False)} | kwargs

    return bind


def whole_storage(tensor: Tensor) -> Tensor:
    """All of what lies under a tensor, as one row of its dtype."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    row = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return row.set_(tensor.untyped_storage(), 0, (count,), (1,))


class ByTheCPU(TorchDispatchMode):
    """Views and memory go to torch-npu, computations to the CPU. `references`: for operators of
    torch-npu itself, by name. `seen` counts what was computed."""

    def __init__(self, references: dict[str, Reference] | None = None) -> None:
        super().__init__()
        self.references = OWN | (references or {})
        self.seen: dict[str, int] = {}
        self.float64: list[str] = []
        """Operations that had a float64 tensor on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[1]
        tensors: list[Tensor] = []
        tree_map_only(Tensor, tensors.append, (args, kwargs))
        device = kwargs.get("device")
        onto = device is not None and torch.device(device).type == "npu"
        there = [t for t in tensors if t.device.type == "npu"]
        view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        )
        if not (onto or there) or name in ALLOWED or view or func.namespace in COLLECTIVES:
            return func(*args, **kwargs)
        self.seen[func._schema.name] = self.seen.get(func._schema.name, 0) + 1
        if any(t.dtype == torch.float64 for t in there) or kwargs.get("dtype") == torch.float64:
            self.float64.append(name)
        if func.namespace not in ("aten", "fsdp") or name in self.references:
            if name not in self.references:
                raise NotImplementedError(f"the CPU has no {func}")
            reference, bind = self.references[name], bound(func)
            run = lambda *a, **k: reference(bind(*a, **k))  # noqa: E731
            return _Call(run, func, name).on_copies(args, kwargs, onto=True)
        return _Call(func, func, name).on_copies(args, kwargs, onto=onto)


class _Call:
    """One operation, done on copies of what its arguments share their memory with."""

    def __init__(self, run: Callable[..., Any], func: Any, name: str) -> None:
        self.run, self.func, self.name = run, func, name
        self.storages: dict[int, tuple[Tensor, Tensor]] = {}
        self.originals: dict[int, Tensor] = {}
        self.here: list[Tensor] = []  # keeps ids unique

    def on_copies(self, args: Any, kwargs: Any, *, onto: bool) -> Any:
        a, k = (tree_map_only(Tensor, self._down, part) for part in (args, kwargs))
        device = kwargs.get("device")
        to_cpu = self.name == "_to_copy" and device is not None and not onto
        if "device" in k and onto:
            k["device"] = torch.device("cpu")
        if self.name == "_to_copy":
            k.pop("pin_memory", None)
        result = self.run(*a, **k)
        for i, argument in enumerate(self.func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                tree_map_only(
                    Tensor, self._back, args[i] if i < len(args) else kwargs.get(argument.name)
                )
        return tree_map_only(
            Tensor, lambda t: args[0] if self.name == "copy_" else self._up(t, to_cpu), result
        )

    def _down(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "npu":
            return tensor
        key = tensor.untyped_storage()._cdata
        if key not in self.storages:
            row = whole_storage(tensor)
            copy = torch.empty(row.shape, dtype=row.dtype)
            if row.numel():
                copy.copy_(row)
            self.storages[key] = row, copy
        copy = self.storages[key][1]
        copy = copy if copy.dtype == tensor.dtype else copy.view(tensor.dtype)
        found = copy.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        self.originals[id(found)] = tensor
        self.here.append(found)
        return found

    def _back(self, tensor: Tensor) -> None:
        if tensor.device.type == "npu":
            row, copy = self.storages[tensor.untyped_storage()._cdata]
            if row.numel():
                row.copy_(copy)

    def _up(self, tensor: Tensor, to_cpu: bool) -> Tensor:
        if id(tensor) in self.originals:
            return self.originals[id(tensor)]
        if to_cpu or tensor.device.type != "cpu":
            return tensor
        device = torch.device("npu", torch.npu.current_device())
        out = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
        if tensor.numel():
            row = whole_storage(out)
            count, offset = row.numel(), tensor.storage_offset()
            room = tensor.untyped_storage().nbytes() // tensor.element_size() - offset
            flat = (
                tensor.as_strided((count,), (1,), offset)
                if room >= count
                else tensor.contiguous().flatten()
            )
            row.copy_(flat)
        return out
