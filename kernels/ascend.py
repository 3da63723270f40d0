"""Everything specific to Ascend NPUs: environment variables of processes that use one, the hardware
generations, and torch-npu's fused operators. Loads no torch when imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Role = Literal["learner", "rollout"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variable:
    """One environment variable of a learner's or an engine's process."""

    name: str
    value: str
    roles: tuple[Role, ...]
    reason: str


BOTH: tuple[Role, ...] = ("learner", "rollout")
ENVIRONMENT = (
    Variable(
        name="TASK_QUEUE_ENABLE",
        value="2",
        roles=("learner",),
        reason="kernels are launched by a second thread, workspaces too: eager training is bound by"
        " the host",
    ),
    Variable(
        name="TASK_QUEUE_ENABLE",
        value="1",
        roles=("rollout",),
        reason="level 2 and ACL graphs exclude each other",
    ),
    Variable(
        name="PYTORCH_NPU_ALLOC_CONF",
        value="expandable_segments:True",
        roles=("learner",),
        reason="passes of many lengths would fragment the memory; not for engines, whose sleep mode"
        " has a pool of its own",
    ),
    Variable(
        name="HCCL_CONNECT_TIMEOUT",
        value="1800",
        roles=BOTH,
        reason="ranks meet within 120 s otherwise, and a large model takes longer to load",
    ),
    Variable(
        name="HCCL_EXEC_TIMEOUT",
        value="3600",
        roles=BOTH,
        reason="a rank may wait for another's long pass; emberl's own deadlines end the run",
    ),
    Variable(
        name="HCCL_HOST_SOCKET_PORT_RANGE",
        value="auto",
        roles=BOTH,
        reason="a learner and an engine of one machine would want the same ports from 60000 on",
    ),
    Variable(
        name="HCCL_NPU_SOCKET_PORT_RANGE",
        value="auto",
        roles=BOTH,
        reason="the same on the card, where processes share one",
    ),
    Variable(
        name="VLLM_ASCEND_ENABLE_NZ",
        value="0",
        roles=("rollout",),
        reason="matrices in FRACTAL_NZ have another layout, into which vllm-ascend refuses to write"
        " new weights",
    ),
)
"""Set unless the user's environment has the name. Sources: vllm-ascend's Dockerfile and platform,
verl #6562, Huawei's references of HCCL 8.5 and of torch-npu. No figure of ours stands behind any of
them."""
INTERFACE_VARIABLES = ("HCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
"""The interface of the node's address goes there, as it goes to Gloo's."""
DETERMINISTIC = "HCCL_DETERMINISTIC"
"""`true` or `strict`: sums over ranks in one order; slower, and the user's to set, once for all
nodes."""
SAME_OF_LCCL = "LCCL_DETERMINISTIC"


def environment(role: str, given: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for a process of this role: those of `ENVIRONMENT` that `given` lacks,
    and the switches that `given` has, which processes on other nodes would not inherit."""
    own = {name: given[name] for name in (SWITCH, DETERMINISTIC, SAME_OF_LCCL) if name in given}
    if given.get(DETERMINISTIC, "").lower() in ("true", "strict"):
        own.setdefault(SAME_OF_LCCL, "1")
    return own | {
        variable.name: variable.value
        for variable in ENVIRONMENT
        if role in variable.roles and variable.name not in given
    }


def additional_config(has_rl_config: bool, sleeps: bool) -> dict[str, Any]:
    """Entries of vllm-ascend's `additional_config` that an engine with changing weights needs.

    has_rl_config: vllm-ascend is 0.27.1 or later. sleeps: the engine frees its memory for learners.
    """
    if has_rl_config:
        return {"rl_config": {"enabled": True, "sleep_mode_extra_cleanup": sleeps}}
    return {"weight_nz_mode": 0}


ENGINES = (
    f"additional_config={additional_config(False, False)} (rollout, before vllm-ascend 0.27.1): as"
    " VLLM_ASCEND_ENABLE_NZ; and enforce_eager, as its graphs would read old weights",
    f"additional_config={additional_config(True, False)} (rollout, from 0.27.1 on): format,"
    " allocator, graphs for weights that change; sleep_mode_extra_cleanup with enable_sleep_mode",
)
"""Arguments that engines get, and why."""


def describe(given: Mapping[str, str]) -> list[str]:
    """A line for each variable, those of engines' arguments, and one for the layers, as a run says
    them at its start."""
    on = switched_on(given)
    parts = [f"{n} {OPERATORS[n] if n in on else 'in plain torch'}" for n in OPERATORS]
    layers = f"layers: {', '.join(parts)} ({SWITCH} chooses)"
    return [
        f"{variable.name}={given.get(variable.name, variable.value)}"
        f" ({' and '.join(variable.roles)}{', yours' if variable.name in given else ''}):"
        f" {variable.reason}"
        for variable in ENVIRONMENT
    ] + [
        f"{', '.join(INTERFACE_VARIABLES)}: the interface of Ray's address of each node, unless"
        " given",
        f"{DETERMINISTIC}={given.get(DETERMINISTIC, '')} (learner and rollout): yours to set; true"
        f" sums over ranks in one order, slower, and sets {SAME_OF_LCCL}=1",
        *ENGINES,
        layers,
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One generation of Ascend servers."""

    name: str
    sold_as: str
    cards: int
    """Devices of a box, as torch and Ray count them."""
    image: str
    """Ending of vllm-ascend's image tags."""
    soc: str
    """Prefix of torch's device names."""
    link: float
    """Bytes a second one way between two cards of a box. A2: one of seven HCCS links of 56 GB/s
    both ways; A3: a die's share of its package's (arXiv 2506.12708). Neither was measured by us."""


A2 = Generation(name="A2", sold_as="910B", cards=8, image="", soc="Ascend910B", link=28e9)
A3 = Generation(name="A3", sold_as="910C", cards=16, image="-a3", soc="Ascend910_93", link=196e9)
GENERATIONS = (A2, A3)


def generation_of(device_name: str) -> Generation | None:
    """The generation of a device by torch's name for it, such as `Ascend910B3`; None if unknown."""
    return next((each for each in GENERATIONS if device_name.startswith(each.soc)), None)


OPERATORS = {
    "norm": "npu::npu_rms_norm",
    "gate": "npu::npu_swiglu",
    "rotary": "npu::npu_rotary_mul",
    "attention": "npu::npu_fusion_attention",
}
"""Called by position: torch-npu 2.10 and 2.13 name their first argument differently."""
SWITCH = "EMBERL_FUSED"
"""Environment variable: names of the parts of a layer that use these, separated by commas; `none`:
none of them, all in plain torch; unset: all."""
MASK = 2048
"""Side of the square mask that `sparse_mode` 3 takes, whatever the sequences' lengths."""
CAUSAL = 3
"""`sparse_mode` of such a mask, aligned at the lower right corner."""


def switched_on(environ: Mapping[str, str]) -> frozenset[str]:
    """Names of the parts of a layer that use an operator, by `SWITCH`. Raises ValueError for an
    unknown name."""
    given = environ.get(SWITCH)
    if given is None:
        return frozenset(OPERATORS)
    names = {name.strip() for name in given.split(",")} - {"", "none"}
    if unknown := names - OPERATORS.keys():
        raise ValueError(
            f"{SWITCH}={given}: {', '.join(sorted(unknown))} is no part of a layer; choose of"
            f" {', '.join(OPERATORS)}, or none"
        )
    return frozenset(names)


def _operator(name: str) -> Any:
    import torch

    return getattr(torch.ops.npu, OPERATORS[name].rpartition(":")[2])


def rms_norm(x_TH: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [T, H]; `weight` [H] is cast, as the operator wants both of one dtype."""
    out: Tensor = _operator("norm")(x_TH, weight.to(x_TH.dtype), eps)[0]
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. The operator takes both as the halves of one tensor."""
    import torch

    out: Tensor = _operator("gate")(torch.cat((gate, up), dim=-1), -1)
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D], cos and sin [T, D]: the operator takes them as [1, T, heads or 1, D]."""
    out: Tensor = _operator("rotary")(x[None], cos[None, :, None], sin[None, :, None])
    return out[0]


@lru_cache(maxsize=4)
def _triangle(device: str) -> Tensor:
    import torch

    return torch.ones(MASK, MASK, dtype=torch.bool, device=device).triu(1)


def attention(q: Tensor, k: Tensor, v: Tensor, ends: tuple[int, ...], scale: float) -> Tensor:
    """Causal attention within each sequence of a packed row (layout TND). `ends` are numbers of the
    host, cumulative and without the leading 0: the device is not waited for."""
    lengths = list(ends)
    out: Tensor = _operator("attention")(
        q, k, v, q.shape[1], "TND", atten_mask=mask(q.device), scale=scale,
        actual_seq_qlen=lengths, actual_seq_kvlen=lengths, sparse_mode=CAUSAL,
    )[0]  # fmt: skip
    return out


def mask(device: torch.device) -> Tensor:
    """True above the diagonal, where nothing is seen."""
    return _triangle(str(device))
