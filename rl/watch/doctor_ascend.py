"""What `emberl doctor` says of a machine with Ascend NPUs: versions, against a dated table, and
what shadows what. `doctor_ascend_box.py` looks at cards, settings and networks.

Read in tools' output and in files; nothing is imported and no card is touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

from ...kernels import ascend
from .doctor_ascend_box import BOX, smi
from .machine import Check, Examination, Machine, State

DATED = "2026-08-16"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu/"
INDEX = "https://mirrors.huaweicloud.com/ascend/repos/pypi"


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """The versions that one vllm-ascend was made for (its versioning policy)."""

    vllm_ascend: str
    vllm: str
    torch: str
    torch_npu: str
    triton_ascend: str
    cann: str
    transformers: str = ""


MATRIX = (
    Release(
        vllm_ascend="0.23.0", vllm="0.23.0", torch="2.10.0", torch_npu="2.10.0.post4",
        triton_ascend="3.2.2", cann="9.1.0", transformers="5.5.4",
    ),
    Release(
        vllm_ascend="0.26.0rc1", vllm="0.26.0", torch="2.10.0", torch_npu="2.10.0.post4",
        triton_ascend="3.2.2", cann="9.1.0", transformers="5.14.1",
    ),
    Release(
        vllm_ascend="0.18.0", vllm="0.18.0", torch="2.9.0", torch_npu="2.9.0.post1",
        triton_ascend="3.2.0", cann="8.5.1",
    ),
    Release(
        vllm_ascend="0.13.0", vllm="0.13.0", torch="2.8.0", torch_npu="2.8.0.post2",
        triton_ascend="3.2.0", cann="8.5.0",
    ),
)  # fmt: skip
"""As of `DATED`; the first is what emberl is made for."""
OLDEST_DRIVER = "25.3.rc1"
"""From there on cards share memory between processes (what verl asks for)."""
INSTALLED = ("torch-npu", "vllm", "vllm-ascend", "triton-ascend")
"""Packages whose lines `versions` has, on a machine with NPUs."""
SOURCE = "VLLM_TARGET_DEVICE=empty pip install ./vllm (v{}, configs/ascend/README.md)"


def present(machine: Machine) -> bool:
    """Whether this is about NPUs at all."""
    if machine.config is not None and machine.config.cluster.device not in ("auto", "npu"):
        return False
    named = machine.config is not None and machine.config.cluster.device == "npu"
    traces = "davinci_manager" in machine.listing("/dev") or machine.version("torch-npu")
    return named or bool(traces) or machine.which("npu-smi") is not None


def ascend_only(examination: Examination) -> Examination:
    """Says nothing on other machines."""

    def look(machine: Machine) -> Iterator[Check]:
        if present(machine):
            yield from examination(machine)

    look.__name__ = getattr(examination, "__name__", "look")
    return look


def release(machine: Machine) -> Release:
    """The row of the installed vllm-ascend; the first where there is none, or an unknown one."""
    found = number(machine.version("vllm-ascend") or "")
    return next(
        (
            row
            for row in MATRIX
            if found is not None and found.release == Version(row.vllm_ascend).release
        ),
        MATRIX[0],
    )


def number(text: str) -> Version | None:
    """`25.3.rc1`, `8.5.1` and the like."""
    try:
        return Version(text.strip().replace(".rc", "rc").replace(".RC", "rc"))
    except InvalidVersion:
        return None


def field(text: str | None, name: str) -> str | None:
    """`Version=25.2.3` of an info file."""
    found = re.search(rf"^\s*{name}\s*=\s*\[?([\w.+-]+)", text or "", re.MULTILINE | re.IGNORECASE)
    return found[1] if found else None


def driver(machine: Machine) -> Iterator[Check]:
    """`npu-smi`, and the versions of driver and firmware."""
    said = smi(machine)
    if said is None:
        fix = "install driver and firmware, or give the container npu-smi, /usr/local/dcmi and"
        fix += " /usr/local/Ascend/driver (configs/ascend/Dockerfile)"
        text = "npu-smi does not answer"
        yield Check(name="driver", state=machine.lacking(True), text=text, fix=fix)
        return
    version = field(machine.read("/usr/local/Ascend/driver/version.info"), "Version")
    version = version or (re.findall(r"npu-smi\s+([\w.]+)", said) or [None])[0]
    found = number(version or "")
    if found is None:
        fix = "mount /usr/local/Ascend/driver/version.info of the host"
        yield Check(name="driver", state=State.WARNING, text="of unknown version", fix=fix)
    elif found < Version(OLDEST_DRIVER.replace(".rc", "rc")):
        fix = f"install driver {OLDEST_DRIVER} or later on the host"
        text = f"{version}, older than {OLDEST_DRIVER}: cards cannot share memory between processes"
        yield Check(name="driver", state=State.WARNING, text=text, fix=fix)
    else:
        yield Check(name="driver", state=State.OK, text=str(version))
    firmware = field(machine.read("/usr/local/Ascend/firmware/version.info"), "Version")
    if firmware is not None:
        short = re.match(r"\d+\.\d+", firmware)
        yield Check(name="firmware", state=State.OK, text=firmware if short else f"{firmware} (?)")


TOOLKITS = (
    "/usr/local/Ascend/ascend-toolkit/latest",
    "/usr/local/Ascend/cann",
    "/usr/local/Ascend/latest",
)


VERSION_FILES = (
    "ascend_toolkit_install.info",
    "aarch64-linux/ascend_toolkit_install.info",
    "x86_64-linux/ascend_toolkit_install.info",
    "version.cfg",
    "version.info",
)


def cann(machine: Machine) -> Iterator[Check]:
    """The toolkit, whether its environment was sourced, and its version."""
    home = machine.environ.get("ASCEND_HOME_PATH") or machine.environ.get("ASCEND_TOOLKIT_HOME")
    lies = next((place for place in TOOLKITS if machine.listing(place)), None)
    if home is None and lies is None:
        fix = "install CANN 9.1.0, or start from quay.io/ascend/cann:9.1.0-910b-ubuntu22.04-py3.12"
        yield Check(name="CANN", state=machine.lacking(True), text="absent", fix=fix)
        return
    if home is None:
        fix = "source /usr/local/Ascend/ascend-toolkit/set_env.sh before Ray and emberl start"
        text = f"in {lies}, but its environment is not set: importing torch would fail"
        yield Check(name="CANN", state=machine.lacking(True), text=text, fix=fix)
        return
    wanted = release(machine).cann
    version = None
    for name in VERSION_FILES:
        read = machine.read(f"{home}/{name}")
        version = version or field(read, "version") or field(read, "runtime_running_version")
    found = number(version or "")
    if found is None:
        fix = f"check that {home} is CANN {wanted}"
        yield Check(name="CANN", state=State.WARNING, text=f"{home}, of unknown version", fix=fix)
    elif found.release[:2] != Version(wanted).release[:2]:
        fix = f"install CANN {wanted}, or the vllm-ascend that was made for {version}"
        text = f"{version}, where vllm-ascend {release(machine).vllm_ascend} was made for {wanted}"
        yield Check(name="CANN", state=State.WARNING, text=text, fix=fix)
    else:
        yield Check(name="CANN", state=State.OK, text=f"{version} in {home}")
    if "ATB_HOME_PATH" not in machine.environ:
        fix = "source /usr/local/Ascend/nnal/atb/set_env.sh (it is in vllm-ascend's images)"
        text = "ATB_HOME_PATH is not set: vllm-ascend's operators will not load"
        yield Check(name="NNAL/ATB", state=State.WARNING, text=text, fix=fix)


def same(wanted: str) -> Callable[[Version], bool]:
    return lambda found: found.release == Version(wanted).release


def versions(machine: Machine) -> Iterator[Check]:
    """torch, torch-npu, vLLM, vllm-ascend, transformers and triton-ascend against one row."""
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
    """torch-npu loads into the torch of its own release only."""
    torch, ours = machine.version("torch"), machine.version("torch-npu")
    if torch and ours and Version(torch).release[:2] != Version(ours).release[:2]:
        made_for = ".".join(map(str, Version(ours).release))
        text = f"torch {torch} beside torch-npu {ours}, which is built for {made_for}"
        fix = f"pip install torch=={made_for} --extra-index-url {TORCH_INDEX}"
        yield Check(name="torch pair", state=State.ERROR, text=text, fix=fix)


def python(machine: Machine) -> Iterator[Check]:
    """vllm-ascend's wheels are for CPython 3.10 to 3.12 and glibc 2.34."""
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
    """triton and triton-ascend own the same folder."""
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
    """vllm-ascend is built for one generation, with or without operators of its own."""
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


def generation(machine: Machine) -> ascend.Generation | None:
    """By the names that npu-smi prints: `910B3` on A2, `Ascend910` on A3."""
    said = smi(machine) or ""
    if re.search(r"\b910B\d", said):
        return ascend.A2
    return ascend.A3 if re.search(r"\bAscend910\b|\b910_93", said) else None


def _decodes_with_vllm(machine: Machine) -> bool:
    config = machine.config
    return config is None or (config.rollout.engine == "vllm" and not config.rollout.servers)


ASCEND: tuple[Examination, ...] = tuple(
    map(ascend_only, (driver, cann, versions, pair, python, triton, build, *BOX))
)
"""In reading order."""
