"""What Ascend NPUs alone have: the environment of a process that uses one, what differs between
their generations, and the fused operators of torch-npu. Loads no torch when imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

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
)
"""Set unless the user's environment has the name. Sources: vllm-ascend's Dockerfile and platform,
verl #6562, Huawei's references of HCCL 8.5 and of torch-npu. No figure of ours stands behind any of
them."""
INTERFACE_VARIABLES = ("HCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
"""The interface of the node's address goes there, as it goes to Gloo's."""
DETERMINISTIC = {"HCCL_DETERMINISTIC": "true", "LCCL_DETERMINISTIC": "1"}
"""Sums over ranks in one order; slower, and the user's to set."""


def environment(role: str, given: Mapping[str, str]) -> dict[str, str]:
    """What to add to `given` for a process of this role."""
    return {
        variable.name: variable.value
        for variable in ENVIRONMENT
        if role in variable.roles and variable.name not in given
    }


def describe(given: Mapping[str, str]) -> list[str]:
    """A line for each variable, as a run says them at its start."""
    return [
        f"{variable.name}={given.get(variable.name, variable.value)}"
        f" ({' and '.join(variable.roles)}{', yours' if variable.name in given else ''}):"
        f" {variable.reason}"
        for variable in ENVIRONMENT
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What differs between the kinds of boxes."""

    name: str
    sold_as: str
    cards: int
    """Devices of a box, as torch and Ray count them."""
    image: str
    """Ending of vllm-ascend's image tags."""
    soc: str
    """How torch's device names begin."""


A2 = Generation(name="A2", sold_as="910B", cards=8, image="", soc="Ascend910B")
A3 = Generation(name="A3", sold_as="910C", cards=16, image="-a3", soc="Ascend910_93")
GENERATIONS = (A2, A3)
