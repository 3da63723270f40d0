"""The checks of `emberl doctor --live`, which use the device: products, collectives, an engine, and
an engine against a learner.

Each runs in a process of its own (`live.py`) that is killed at its deadline, so that a card that
hangs costs one line. Loads no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from ...kernels import platform as accelerators
from .doctor_ascend import present
from .machine import Check, Examination, Machine, State

PRODUCTS, COLLECTIVES = 180.0, 180.0
"""Deadlines in seconds, the start of the processes included."""
ENGINE = 300.0
"""Seconds for an engine and a learner, without a configuration's `cluster.start_timeout`."""
SPARE = 60.0
"""Seconds by which the ranks' deadline, which names the fault, is before that of the whole."""
GOOD, BAD = 0.4, 0.1
"""Shares of a data sheet's figure, below which a rate is a warning and an error. A product of 8192
usually reaches 0.6 to 0.9."""
ALIKE = 0.8
"""Share of the cards' median rate below which a card counts as slow: every step waits for it."""
LINK = 0.25
"""Share of one link's rate that an all-reduce over all cards must reach."""
APART = {"bfloat16": (0.02, 0.05), "float32": (0.001, 0.01)}
"""`MEAN` of the small model for a warning and for an error; rounding stays far below."""
MEAN = "training/rollout_probs_diff_mean"


def device(machine: Machine) -> str:
    """The device as in `cluster.device`; `auto` only without NPUs."""
    config = machine.config
    if config is not None and config.cluster.device != "auto":
        return config.cluster.device
    return accelerators.NPU.device if present(machine) else "auto"


def ask(
    machine: Machine, part: str, deadline: float, role: str, order: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The result of a part of `live_parts`, run as an actor of this role that sees all cards."""
    where = device(machine)
    environ = dict(machine.environ)
    if where in accelerators.PLATFORMS:
        environ |= accelerators.actor_environment(where, role, environ)
        environ.pop(accelerators.named(where).ray_noset or "", None)
    return machine.live(part, {"device": where, **order}, deadline, environ)


def products(machine: Machine) -> Iterator[Check]:
    """Whether every card multiplies, at a rate near its data sheet's and like the others'."""
    name = "products"
    measured = ask(machine, name, PRODUCTS, "learner", {})
    if "error" in measured:
        yield Check(name=name, state=State.ERROR, text=measured["error"], fix=_mend(machine))
        return
    rates, peak = measured["rates"], measured["peak"]
    middle, slowest = statistics.median(rates.values()), min(rates, key=rates.__getitem__)
    text = f"{measured['dtype']} at {_si(middle)}FLOP/s on {measured['device']}"
    if len(rates) > 1:
        text = f"{text}, {len(rates)} cards"
    share = 1.0 if peak is None else middle / peak
    if peak is not None:
        text += f", {share:.0%} of the data sheet's {_si(peak)}FLOP/s"
    state = State.ERROR if share < BAD else State.WARNING if share < GOOD else State.OK
    fix = "" if state is State.OK else _slow(machine)
    yield Check(name=name, state=state, text=text, fix=fix)
    if rates[slowest] < ALIKE * middle:
        text = f"{_si(rates[slowest])}FLOP/s, the others {_si(middle)}FLOP/s: all wait for it"
        yield Check(
            name=f"card {slowest}", state=State.WARNING, text=text, fix=_slow(machine, slowest)
        )


def collectives(machine: Machine) -> Iterator[Check]:
    """Whether an all-reduce and a broadcast over all cards end, are right, and are fast enough."""
    name = "collectives"
    measured = ask(machine, name, COLLECTIVES, "learner", {"deadline": COLLECTIVES - SPARE})
    if "error" in measured:
        fix = "HCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME: an interface that is up; free ports;"
        fix += " no process of an earlier run (ps); then NCCL_DEBUG=INFO, ASCEND_GLOBAL_LOG_LEVEL=1"
        yield Check(name=name, state=State.ERROR, text=measured["error"], fix=fix)
    elif measured["ranks"] < 2:
        yield Check(name=name, state=State.OK, text="one card: nothing to exchange")
    else:
        summed, link = measured["all_reduce"], measured["link"]
        text = f"all_reduce {_si(summed)}B/s, broadcast {_si(measured['broadcast'])}B/s"
        text += f" over {measured['ranks']} ranks"
        if link is not None and summed < LINK * link:
            text += f"; one link between two cards has {_si(link)}B/s"
            yield Check(name=name, state=State.WARNING, text=text, fix=_links(machine))
        else:
            yield Check(name=name, state=State.OK, text=text)


def engine(machine: Machine) -> Iterator[Check]:
    """Whether an engine of the configuration's kind starts and decodes a tiny model, and whether
    the learner gives its tokens the same probabilities."""
    config = machine.config
    if config is not None and config.rollout.servers:
        yield Check(name="engine", state=State.OK, text="rollout.servers decode: not tried here")
        return
    if config is None:
        has_vllm = present(machine) and machine.version("vllm") is not None
        order: dict[str, Any] = {"name": "vllm" if has_vllm else "embedded", "dtype": "auto"}
        order["engine_args"], deadline = {}, ENGINE
    else:
        order = {"name": config.rollout.engine, "dtype": config.model.dtype}
        order["engine_args"] = dict(config.rollout.engine_args)
        order["running"] = config.rollout.max_num_seqs  # so that it captures the run's graphs
        deadline = config.cluster.start_timeout
    order["deadline"] = deadline
    measured = ask(machine, "engine", deadline, "rollout", order)
    yield from judged(measured, order["name"], deadline)


def judged(measured: Mapping[str, Any], name: str, deadline: float) -> Iterator[Check]:
    """Checks of the part `engine`'s result: the engine, and its distance from the learner."""
    if "error" in measured and measured.get("at") != "learner":
        ends = {"start": "did not start", "decoding": "did not decode"}
        what = ends.get(measured.get("at", ""), "did not come to decode")
        fix = f"the lines above first; a start may need more than {deadline:g} s"
        fix += " (cluster.start_timeout); VLLM_LOGGING_LEVEL=INFO says more, and"
        fix += " rollout.engine_args.enforce_eager=true leaves graphs out"
        text = f"{name} {what}: {measured['error']}"
        yield Check(name="engine", state=State.ERROR, text=text, fix=fix)
        return
    text = f"{name} up in {measured['start_seconds']:.1f} s"
    text += f", {measured['tokens_per_second']:,.0f} tokens/s of a tiny model"
    yield Check(name="engine", state=State.OK, text=text)
    what = "engine = learner"
    if "error" in measured:
        fix = "the lines above first; model.dtype and model.attention may be set by hand"
        text = f"the learner failed: {measured['error']}"
        yield Check(name=what, state=State.ERROR, text=text, fix=fix)
        return
    apart, (warn, stop) = measured[MEAN], APART.get(measured["dtype"], APART["float32"])
    text = f"{MEAN} {apart:.2g} in {measured['dtype']} over {measured['tokens']} tokens"
    # NaN is below nothing, so it is an error
    state = State.OK if apart < warn else State.WARNING if apart < stop else State.ERROR
    fix = "" if state is State.OK else (
        "find the side that is off: rollout.engine=embedded, enforce_eager=true,"
        " EMBERL_FUSED=none, model.attention=sdpa, model.dtype=float32 one after the other"
    )  # fmt: skip
    yield Check(name=what, state=state, text=text, fix=fix)


def _si(value: float) -> str:
    """A number with an SI prefix, e.g. `310 T` for 3.1e14."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


def _on_npus(machine: Machine) -> bool:
    return device(machine) == accelerators.NPU.device


def _mend(machine: Machine) -> str:
    if _on_npus(machine):
        return "the lines above first: driver, CANN's set_env.sh, torch-npu; then npu-smi info"
    return "the lines above first; python -c 'import torch; print(torch.ones(2) @ torch.ones(2))'"


def _slow(machine: Machine, card: str = "N") -> str:
    if _on_npus(machine):
        return (
            f"npu-smi info: somebody on it? npu-smi info -t power -i {card} and -t temp: throttled?"
            " unset ASCEND_LAUNCH_BLOCKING"
        )
    return f"nvidia-smi -i {card} -q -d PERFORMANCE,POWER: throttled, or somebody on it?"


def _links(machine: Machine) -> str:
    if _on_npus(machine):
        return "npu-smi info -t topo: HCCS between all cards? unset HCCL_BUFFSIZE, HCCL_ALGO"
    return "nvidia-smi topo -m: NVLink between all cards?"


LIVE: tuple[Examination, ...] = (products, collectives, engine)
"""In this order, since a fault of one explains those of the following."""
