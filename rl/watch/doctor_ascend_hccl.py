"""Checks of HCCL's settings on a machine with Ascend NPUs: timeouts, buffers, ports and interfaces,
for `doctor_ascend.py`. Their values are those of Huawei's reference of CANN's environment
variables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from itertools import pairwise

from ...kernels import ascend
from ...kernels.platform import NPU
from .doctor_ascend_box import generation
from .machine import Check, Machine, State

PORTS = (60000, 60015)
"""HCCL's default range."""
TIMEOUTS = (120, 7200)
"""The least and the most seconds of HCCL_CONNECT_TIMEOUT."""
PATIENT = 600
"""Least seconds for a rank to wait for another, which may still pass over long sequences."""
BUFFER = 1024
"""MB of HCCL_BUFFSIZE above which passes lack memory: each communicator takes it twice."""
RANGES = ("HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_NPU_SOCKET_PORT_RANGE")


def collectives(machine: Machine) -> Iterator[Check]:
    """HCCL's timeouts, buffers, ports and interfaces."""
    yield from _timeouts(machine.environ)
    yield from _values(machine.environ)
    yield from _fused(machine)
    yield from _ports(machine)
    yield from _interfaces(machine)
    several = machine.config is not None and machine.config.cluster.address is not None
    link = machine.output("hccn_tool", "-i", "0", "-link", "-g") if several else None
    if link is not None and "UP" not in link.upper():
        text = f"card 0: {' '.join(link.split())}"
        fix = "check cable and switch of every card: hccn_tool -i N -link -g, -ip -g, -ping -g"
        yield Check(name="card network", state=State.ERROR, text=text, fix=fix)


def _timeouts(env: Mapping[str, str]) -> Iterator[Check]:
    name = "HCCL_CONNECT_TIMEOUT"
    given = env.get(name)
    least, most = TIMEOUTS
    if given is not None and not (given.isdigit() and least <= int(given) <= most):
        text = f"{given}: HCCL takes {least} to {most} seconds"
        yield Check(name=name, state=State.ERROR, text=text, fix=f"export {name}=1800")
    elif given is not None and int(given) < PATIENT:
        text = f"{given} s: less than a large model takes to load"
        yield Check(name=name, state=State.WARNING, text=text, fix="unset it; emberl sets 1800")
    name = "HCCL_EXEC_TIMEOUT"
    given = env.get(name)
    if given is not None and not given.isdigit():
        text = f"{given!r} is no number of seconds"
        yield Check(name=name, state=State.ERROR, text=text, fix="unset it; emberl sets 3600")
    elif given is not None and 0 < int(given) < PATIENT:  # 0: for ever
        text = f"{given} s: a rank may wait longer for another's pass, and the run would end"
        yield Check(name=name, state=State.WARNING, text=text, fix="unset it; emberl sets 3600")


def _values(env: Mapping[str, str]) -> Iterator[Check]:
    name = "HCCL_BUFFSIZE"
    given = env.get(name)
    if given is not None and not (given.isdigit() and int(given) > 0):
        text = f"{given!r} is no number of MB"
        yield Check(name=name, state=State.ERROR, text=text, fix=f"unset {name}")
    elif given is not None and int(given) > BUFFER:
        text = f"{given} MB, twice, for each communicator of a card: memory that passes lack"
        yield Check(name=name, state=State.WARNING, text=text, fix=f"unset {name} (200 MB)")
    name = ascend.DETERMINISTIC
    given = env.get(name)
    if given is not None and given.lower() not in ("true", "false", "strict"):
        text = f"{given}: HCCL knows true, false and strict"
        yield Check(name=name, state=State.ERROR, text=text, fix=f"export {name}=true, or unset it")


FUSED = ("VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE", "VLLM_ASCEND_ENABLE_FLASHCOMM1")
"""Switches for vllm-ascend's operators that fuse a product with its communication."""


def _fused(machine: Machine) -> Iterator[Check]:
    """Whether fused operators are on with A2 cards, where emberl's ranges of ports exclude them."""
    for name in FUSED if generation(machine) is ascend.A2 else ():
        if machine.environ.get(name, "0") not in ("", "0"):
            text = f"on: its operators do not go with {' and '.join(RANGES)} on A2"
            yield Check(name=name, state=State.WARNING, text=text, fix=f"unset {name}")


def _ports(machine: Machine) -> Iterator[Check]:
    """Whether the kernel may give HCCL's ports away: without a range these are 60000 to 60015."""
    env = machine.environ
    for name in RANGES:
        listed = env.get(name, "auto")
        if listed != "auto":
            yield from _range(name, listed)
    base, given = env.get("HCCL_IF_BASE_PORT"), env.get(RANGES[0])
    if base is not None and not (base.isdigit() and 1024 <= int(base) <= 65520):
        text = f"{base}: must be 1024 to 65520"
        yield Check(name="HCCL_IF_BASE_PORT", state=State.ERROR, text=text, fix="unset it")
        return
    if given == "auto" or (given is None and base is None):
        return  # emberl sets the ranges itself
    first = int(base) if base is not None else PORTS[0]
    taken = _ranges(given) if given is not None else [(first, first + PORTS[1] - PORTS[0])]
    drawn = (machine.read("/proc/sys/net/ipv4/ip_local_port_range") or "0 0").split()
    kept = _ranges(machine.read("/proc/sys/net/ipv4/ip_local_reserved_ports") or "") or []
    for first, last in taken or []:
        overlaps = first <= int(drawn[1]) and int(drawn[0]) <= last
        if overlaps and not any(low <= first and last <= high for low, high in kept):
            text = f"ports {first} to {last} may be given to others by the kernel"
            fix = f"sysctl -w net.ipv4.ip_local_reserved_ports={first}-{last}"
            yield Check(name="HCCL ports", state=State.WARNING, text=text, fix=fix)
            return


def _range(name: str, given: str) -> Iterator[Check]:
    """Whether a list such as `61000,61050-61100` is valid, free of overlaps and long enough."""
    fix = f"unset {name}; emberl sets auto"
    ranges = _ranges(given)
    if ranges is None or any(not 1 <= first <= last <= 65535 for first, last in ranges):
        text = f"{given!r} is no list of ports: 61000-61050, or 61000,61050-61100"
        yield Check(name=name, state=State.ERROR, text=text, fix=fix)
        return
    ordered = sorted(ranges)
    crossing = [
        (a, b) for a, b in pairwise(ordered) if b[0] <= a[1]
    ]  # fmt: skip
    if crossing:
        (first, last), (other, end) = crossing[0]
        text = f"{given}: {first}-{last} and {other}-{end} overlap, which HCCL refuses"
        yield Check(name=name, state=State.ERROR, text=text, fix=fix)
    elif ordered[0][0] < 1024:
        text = f"{given}: ports to 1023 are the system's"
        yield Check(name=name, state=State.ERROR, text=text, fix=fix)
    elif sum(last - first + 1 for first, last in ordered) < 2:
        text = f"{given}: a learner and an engine on one card need a port each"
        yield Check(name=name, state=State.ERROR, text=text, fix=fix)


def _ranges(text: str) -> list[tuple[int, int]] | None:
    """(first, last) of each part of a list of ports; None if one is neither a port nor a range."""
    ranges = []
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            return None
        ranges.append((int(first), int(last) if dash else int(first)))
    return ranges


def _interfaces(machine: Machine) -> Iterator[Check]:
    """Whether the interfaces and the address in variables exist, and reach other machines."""
    here = machine.listing("/sys/class/net")
    config = machine.config
    several = config is not None and config.cluster.address is not None
    for name in NPU.interface_variables:
        given = machine.environ.get(name)
        if not given or not here:
            continue
        chosen = _chosen(given, here, prefixes=name in ascend.INTERFACE_VARIABLES)
        fix = f"unset {name}, or name the one of Ray's address"
        if not chosen:
            text = f"{given}: there is no such interface ({', '.join(here)})"
            yield Check(name=name, state=State.ERROR, text=text, fix=fix)
        elif several and all(each == "lo" for each in chosen):
            text = f"{given}: other machines cannot be reached through loopback"
            yield Check(name=name, state=State.ERROR, text=text, fix=fix)
    name, own = "HCCL_IF_IP", machine.environ.get("HCCL_IF_IP")
    if own is None:
        return
    try:
        parsed = ip_address(own)
    except ValueError:
        text = f"{own!r} is no address"
        yield Check(name=name, state=State.ERROR, text=text, fix=f"unset {name}")
        return
    if several and parsed.is_loopback:
        text = f"{own}: other machines cannot be reached through loopback"
        yield Check(name=name, state=State.ERROR, text=text, fix=f"unset {name}")
    elif parsed.version == 4 and not machine.can_listen(host=own):
        text = f"{own} is no address of this machine, and goes before HCCL_SOCKET_IFNAME"
        fix = f"unset {name}: set for all machines at once it is right on one of them at most"
        yield Check(name=name, state=State.ERROR, text=text, fix=fix)


def _chosen(given: str, here: list[str], *, prefixes: bool) -> list[str]:
    """The interfaces in `here` that HCCL would take: `eth,enp` are prefixes, `=eth0` is a name, `^`
    negates; Gloo takes names alone (prefixes=False)."""
    if not prefixes:
        return [each for each in here if each in given.split(",")]
    others, rest = given.startswith("^"), given.removeprefix("^")
    exact, names = rest.startswith("="), rest.removeprefix("=").split(",")

    def named(each: str) -> bool:
        return each in names if exact else any(each.startswith(n) for n in names if n)

    return [each for each in here if named(each) != others]
