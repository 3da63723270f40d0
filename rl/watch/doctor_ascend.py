"""The checks of `emberl doctor` on a machine with Ascend NPUs: versions, against a dated table, and
packages that shadow each other. `doctor_ascend_driver.py` checks driver, firmware and CANN,
`doctor_ascend_box.py` cards, settings and disks, `doctor_ascend_hccl.py` networks.

They read tools' output and files; nothing is imported and no card is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from packaging.version import Version

from .doctor_ascend_box import BOX, generation
from .doctor_ascend_driver import DATED, MATRIX, cann, driver, firmware, release
from .doctor_ascend_hccl import collectives
from .machine import Check, Examination, Machine, State

TORCH_INDEX = "https://download.pytorch.org/whl/cpu/"
INDEX = "https://mirrors.huaweicloud.com/ascend/repos/pypi"
INSTALLED = ("torch-npu", "vllm", "vllm-ascend", "triton-ascend")
"""Packages that `versions` checks on a machine with NPUs."""
SOURCE = "VLLM_TARGET_DEVICE=empty pip install ./vllm (v{}, configs/ascend/README.md)"


def present(machine: Machine) -> bool:
    """Whether the machine has NPUs, or the configuration names them."""
    if machine.config is not None and machine.config.cluster.device not in ("auto", "npu"):
        return False
    named = machine.config is not None and machine.config.cluster.device == "npu"
    traces = "davinci_manager" in machine.listing("/dev") or machine.version("torch-npu")
    return named or bool(traces) or machine.which("npu-smi") is not None


def ascend_only(examination: Examination) -> Examination:
    """The examination, made to yield nothing on machines without NPUs."""

    def look(machine: Machine) -> Iterator[Check]:
        if present(machine):
            yield from examination(machine)

    look.__name__ = getattr(examination, "__name__", "look")
    return look


def same(wanted: str) -> Callable[[Version], bool]:
    return lambda version: version.release == Version(wanted).release


def versions(machine: Machine) -> Iterator[Check]:
    """The versions of torch, vLLM, transformers and their NPU packages, by one row of `MATRIX`."""
    row, uses_vllm = release(machine), _decodes_with_vllm(machine)
    tied = uses_vllm or machine.version("vllm-ascend") is not None
    install = f"pip install {{}}=={{}} --extra-index-url {INDEX}"
    wanted = {
        "torch": (
            row.torch,
            True,
            "pip install torch=={} --extra-index-url https://download.pytorch.org/whl/cpu/",
        ),
        "torch-npu": (row.torch_npu, True, install.format("torch-npu", "{}")),
        "vllm-ascend": (row.vllm_ascend, uses_vllm, install.format("vllm-ascend", "{}")),
        "vllm": (row.vllm, uses_vllm, SOURCE),
        "transformers": (row.transformers, True, "pip install transformers=={}"),
        "triton-ascend": (row.triton_ascend, True, install.format("--no-deps triton-ascend", "{}")),
    }
    for name, (version, needed, fix) in wanted.items():
        if not version:
            continue
        have = machine.version(name)
        how = fix.format(version)
        if have is None:
            if needed:
                yield Check(name=name, state=machine.lacking(True), text="absent", fix=how)
        elif name == "torch" and "+cu" in have:
            text = f"{have} is a build for CUDA"
            yield Check(name=name, state=State.ERROR, text=text, fix=how)
        elif not same(version)(Version(have)) or _older_post(have, version):
            text = f"{have}; vllm-ascend {row.vllm_ascend} goes with {version} ({DATED})"
            held = tied and name in ("torch", "torch-npu", "vllm")
            state = State.ERROR if held else State.WARNING
            yield Check(name=name, state=state, text=text, fix=how)
        else:
            yield Check(name=name, state=State.OK, text=f"{have}, as of {DATED}")


def _older_post(have: str, wanted: str) -> bool:
    return (Version(have).post or 0) < (Version(wanted).post or 0)


def pair(machine: Machine) -> Iterator[Check]:
    """Whether torch-npu and torch are of one release: it loads into that one only."""
    torch, ours = machine.version("torch"), machine.version("torch-npu")
    if torch and ours and Version(torch).release[:2] != Version(ours).release[:2]:
        made_for = ".".join(map(str, Version(ours).release))
        text = f"torch {torch} beside torch-npu {ours}, which is built for {made_for}"
        fix = f"pip install torch=={made_for} --extra-index-url {TORCH_INDEX}"
        yield Check(name="torch pair", state=State.ERROR, text=text, fix=fix)


def python(machine: Machine) -> Iterator[Check]:
    """Python and glibc: vllm-ascend's wheels are for CPython 3.10 to 3.12 and glibc 2.34."""
    running = machine.python()
    if Version(running).release[:2] > (3, 12):
        text = f"{running}: vllm-ascend has wheels to 3.12"
        yield Check(
            name="python for NPUs", state=State.WARNING, text=text, fix="use Python 3.12 or 3.11"
        )
    libc = re.findall(
        r"(\d+\.\d+)\s*$", (machine.output("getconf", "GNU_LIBC_VERSION") or "").strip()
    )
    if libc and Version(libc[0]) < Version("2.34"):
        text = f"{libc[0]}: vllm-ascend's wheels need 2.34"
        fix = "use Ubuntu 22.04, Debian 12, openEuler 24.03 or later, or vllm-ascend's image"
        yield Check(name="glibc", state=State.ERROR, text=text, fix=fix)


def triton(machine: Machine) -> Iterator[Check]:
    """Whether stock triton shares triton-ascend's folder; triton-ascend's numpy and clang."""
    stock, ours = machine.version("triton"), machine.version("triton-ascend")
    again = (
        "pip uninstall -y triton triton-ascend; pip install --no-deps"
        f" triton-ascend=={release(machine).triton_ascend} --extra-index-url {INDEX}"
    )
    folder = machine.package("triton")
    if stock is not None:
        text = (
            f"stock triton {stock} lies in the folder of triton-ascend"
            if ours
            else f"stock triton {stock}: it has no NPU back end"
        )
        yield Check(name="triton", state=State.ERROR, text=text, fix=again)
    elif ours is not None and (
        folder is None or "ascend" not in machine.listing(f"{folder}/backends")
    ):
        text = (
            f"triton-ascend {ours} is listed, its files are gone (an uninstalled triton took them)"
        )
        yield Check(name="triton", state=State.ERROR, text=text, fix=again)
    have = machine.version("numpy")
    if ours is not None and have is not None and Version(have) >= Version("2.3"):
        text = f"{have}: triton-ascend's front end fails from 2.3 on"
        yield Check(name="numpy", state=State.ERROR, text=text, fix="pip install 'numpy>=2,<2.3'")
    if ours is not None and machine.which("clang") is None:
        text = "absent: triton-ascend compiles its launchers with it"
        fix = "apt install clang-15 and link it as clang, as vllm-ascend's image does"
        yield Check(name="clang", state=State.WARNING, text=text, fix=fix)


def build(machine: Machine) -> Iterator[Check]:
    """Whether vllm-ascend is built for this generation of cards, and with its own operators."""
    folder = machine.package("vllm_ascend")
    if folder is None:
        return
    info = machine.read(f"{folder}/_build_info.py") or ""
    made = (re.findall(r"__device_type__\s*=\s*['\"]_?(\w+)", info) or [None])[0]
    here = generation(machine)
    if made is not None and here is not None and made != here.name:
        text = f"vllm-ascend is built for {made}, this box is an {here.name} ({here.sold_as})"
        fix = (
            f"use the image vllm-ascend:v{MATRIX[0].vllm_ascend}{here.image}, or build from source"
        )
        yield Check(name="vllm-ascend for", state=State.ERROR, text=text, fix=fix)
    if not any(name.startswith("vllm_ascend_C") for name in machine.listing(folder)):
        text = "without compiled operators (COMPILE_CUSTOM_KERNELS=0): no sleep mode"
        fix = "reinstall vllm-ascend with CANN's environment sourced"
        sleeps = machine.config is not None and machine.config.cluster.colocated
        yield Check(name="vllm-ascend C", state=machine.lacking(sleeps), text=text, fix=fix)


def _decodes_with_vllm(machine: Machine) -> bool:
    config = machine.config
    return config is None or (config.rollout.engine == "vllm" and not config.rollout.servers)


ASCEND: tuple[Examination, ...] = tuple(
    map(
        ascend_only,
        (driver, firmware, cann, versions, pair, python, triton, build, *BOX, collectives),
    )
)
"""In reading order."""
