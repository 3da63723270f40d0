"""Checks of driver, firmware and CANN of a machine with Ascend NPUs, by Huawei's statements on
which go together, and the dated tables of versions that `doctor_ascend.py` also uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

from .doctor_ascend_box import smi
from .machine import Check, Machine, State

DATED = "2026-08-16"


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
"""As of `DATED`; the first row is the one that emberl is made for."""
OLDEST_DRIVER = "25.3.rc1"
"""The first driver whose cards share memory between processes (verl requires it)."""
DRIVERS: dict[tuple[int, ...], tuple[int, int]] = {
    (8, 5): (25, 0),
    (9, 0): (25, 0),
    (9, 1): (25, 2),
    (9, 2): (25, 3),
}
"""CANN -> the oldest driver (Ascend HDK) that goes with it, by the tables "CANN and Ascend HDK
version compatibility" of the release notes of CANN 9.1.0, 9.1.1 and 9.2.0."""
NEWEST_DRIVER = (26, 2)
"""The last column of those tables: nothing is known here of later drivers."""
DRIVER_INFO = "/usr/local/Ascend/driver/version.info"
FIRMWARE_INFO = "/usr/local/Ascend/firmware/version.info"
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


def release(machine: Machine) -> Release:
    """The row of the installed vllm-ascend; the first if there is none, or an unknown one."""
    installed = number(machine.version("vllm-ascend") or "")
    return next(
        (
            row
            for row in MATRIX
            if installed is not None and installed.release == Version(row.vllm_ascend).release
        ),
        MATRIX[0],
    )


def number(text: str) -> Version | None:
    """The version in texts such as `25.3.rc1`, `25.0.rc1.1`, `25.5.0.b061` and `8.5.1`; parts after
    a candidate's number, and those that are no numbers, are ignored. None if it has none."""
    match = re.match(r"(\d+(?:\.\d+)*)(?:\.?(rc\d+))?", text.strip().lower())
    if match is None:
        return None
    try:
        return Version(text.strip())
    except InvalidVersion:
        return Version(match[1] + (match[2] or ""))


def field(text: str | None, name: str) -> str | None:
    """The value of a field of an info file, e.g. of `Version=25.2.3`; of `[7.5.0.1.129:8.0.RC3]`
    the second part, since the first is Huawei's internal version. None if there is none."""
    match = re.search(
        rf"^\s*{name}\s*[=:]\s*\[?(?:[\w.+-]+:)?([\w.+-]+)", text or "",
        re.MULTILINE | re.IGNORECASE,
    )  # fmt: skip
    return match[1] if match else None


def driver_version(machine: Machine) -> str | None:
    """The driver's version from its file, which containers mount, or from npu-smi."""
    said = field(machine.read(DRIVER_INFO), "Version")
    return said or (re.findall(r"npu-smi\s+([\w.]+)", smi(machine) or "") or [None])[0]


def driver(machine: Machine) -> Iterator[Check]:
    """Whether npu-smi answers, and the driver's version, by itself and for this CANN."""
    if smi(machine) is None:
        fix = "install driver and firmware, or give the container npu-smi, /usr/local/dcmi and"
        fix += " /usr/local/Ascend/driver (configs/ascend/Dockerfile)"
        text = "npu-smi does not answer"
        yield Check(name="driver", state=machine.lacking(True), text=text, fix=fix)
        return
    version = driver_version(machine)
    installed, made_for = number(version or ""), cann_version(machine) or release(machine).cann
    toolkit = number(made_for)
    oldest = DRIVERS.get(toolkit.release[:2]) if toolkit is not None else None
    if installed is None:
        fix = f"mount {DRIVER_INFO} of the host"
        yield Check(name="driver", state=State.WARNING, text="of unknown version", fix=fix)
    elif oldest is not None and installed.release[:2] < oldest:
        least = ".".join(map(str, oldest))
        text = f"{version}: CANN {made_for} goes with {least} and later (Huawei's release notes)"
        fix = f"install driver and firmware {OLDEST_DRIVER} or later on the host"
        yield Check(name="driver", state=State.ERROR, text=text, fix=fix)
    elif installed < Version(OLDEST_DRIVER.replace(".rc", "rc")):
        fix = f"install driver {OLDEST_DRIVER} or later on the host"
        text = f"{version}, older than {OLDEST_DRIVER}: cards cannot share memory between processes"
        yield Check(name="driver", state=State.WARNING, text=text, fix=fix)
    elif oldest is None or installed.release[:2] > NEWEST_DRIVER:
        text = f"{version}; no table here says whether CANN {made_for} goes with it"
        yield Check(name="driver", state=State.OK, text=text)
    else:
        yield Check(name="driver", state=State.OK, text=f"{version}, which CANN {made_for} takes")


def firmware(machine: Machine) -> Iterator[Check]:
    """Whether the firmware goes with the driver: by npu-smi's verdict, else by the range in the
    driver's own file; a warning if there is neither."""
    if smi(machine) is None:
        return
    board = machine.output("npu-smi", "info", "-t", "board", "-i", "0")
    version = field(machine.read(FIRMWARE_INFO), "Version") or field(board, "Firmware Version")
    held = driver_version(machine)
    again = f"install the firmware of the driver's own release (HDK {held}) on the host, reboot"
    verdict = (field(board, "Compatibility") or "").upper()
    ranges = re.findall(r"\[([\d.]+),([\d.]+)\]", _accepted(machine))
    said = ", ".join(f"{first} to {last}" for first, last in ranges)
    installed = number(version or "")
    if verdict == "NOK":
        text = f"{version or 'of unknown version'} does not go with driver {held} (npu-smi)"
        yield Check(name="firmware", state=State.ERROR, text=text, fix=again)
    elif verdict == "OK":
        text = f"{version or 'of unknown version'}: npu-smi says that the driver takes it"
        yield Check(name="firmware", state=State.OK, text=text)
    elif installed is None:
        text = "of unknown version: whether it goes with the driver cannot be judged here"
        fix = "npu-smi info -t board -i 0 on the host: Compatibility must be OK"
        yield Check(name="firmware", state=State.WARNING, text=text, fix=fix)
    elif not ranges:
        text = f"{version}: cannot be judged, the driver's version.info names no range"
        text += " (compatible_version_fw) and npu-smi gives no verdict"
        fix = f"npu-smi info -t board -i 0 on the host; mount its {DRIVER_INFO}"
        yield Check(name="firmware", state=State.WARNING, text=text, fix=fix)
    elif not any(Version(first) <= installed <= Version(last) for first, last in ranges):
        text = f"{version}: driver {held} takes {said} (its version.info)"
        yield Check(name="firmware", state=State.ERROR, text=text, fix=again)
    else:
        text = f"{version}, which the driver takes ({said})"
        yield Check(name="firmware", state=State.OK, text=text)


def _accepted(machine: Machine) -> str:
    match = re.search(r"^compatible_version_fw=(.*)$", machine.read(DRIVER_INFO) or "", re.M)
    return match[1] if match else ""


def cann_home(machine: Machine) -> str | None:
    return machine.environ.get("ASCEND_HOME_PATH") or machine.environ.get("ASCEND_TOOLKIT_HOME")


def cann_version(machine: Machine) -> str | None:
    """The version of the toolkit whose environment was sourced; None if its files do not tell."""
    home = cann_home(machine)
    for name in VERSION_FILES if home is not None else ():
        read = machine.read(f"{home}/{name}")
        for key in ("version_dir", "version", "runtime_running_version"):
            version = field(read, key)
            if version is not None:
                return version
    return None


def cann(machine: Machine) -> Iterator[Check]:
    """Whether CANN's toolkit is there, its environment sourced and intact, and its version."""
    home = cann_home(machine)
    lies = next((place for place in TOOLKITS if machine.listing(place)), None)
    source = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
    if home is None and lies is None:
        fix = "install CANN 9.1.0, or start from quay.io/ascend/cann:9.1.0-910b-ubuntu22.04-py3.12"
        yield Check(name="CANN", state=machine.lacking(True), text="absent", fix=fix)
        return
    if home is None:
        text = f"in {lies}, but its environment is not set: importing torch would fail"
        fix = f"{source} before Ray and emberl start"
        yield Check(name="CANN", state=machine.lacking(True), text=text, fix=fix)
        return
    if not machine.listing(home):
        text = f"ASCEND_HOME_PATH={home}: there is no such folder"
        yield Check(name="CANN", state=machine.lacking(True), text=text, fix=f"{source} anew")
        return
    yield _toolkit(machine, home)
    yield from _libraries(machine, home, source)


def _toolkit(machine: Machine, home: str) -> Check:
    row, version = release(machine), cann_version(machine)
    wanted, installed = Version(row.cann), number(version or "")
    if installed is None:
        fix = f"check that {home} is CANN {wanted}"
        return Check(name="CANN", state=State.WARNING, text=f"{home}, of unknown version", fix=fix)
    if installed.release[:2] == wanted.release[:2]:
        return Check(name="CANN", state=State.OK, text=f"{version} in {home}")
    fix = f"install CANN {wanted}, or the vllm-ascend that was made for {version}"
    if installed.release[:2] < wanted.release[:2]:
        npu = machine.version("torch-npu") or row.torch_npu
        text = f"{version}, older than the {wanted} for which vllm-ascend {row.vllm_ascend} and"
        text += f" torch-npu {npu} were built"
        return Check(name="CANN", state=machine.lacking(True), text=text, fix=fix)
    text = f"{version}, where vllm-ascend {row.vllm_ascend} was made for {wanted}"
    return Check(name="CANN", state=State.WARNING, text=text, fix=fix)


def _libraries(machine: Machine, home: str, source: str) -> Iterator[Check]:
    """Whether set_env.sh's paths are still set, and are for the C++ ABI of the installed torch."""
    paths = machine.environ.get("LD_LIBRARY_PATH", "").split(":")
    if not any(path == home or path.startswith(f"{home}/") for path in paths):
        text = f"has nothing of {home}: libhccl.so and libascendcl.so will not be found"
        fix = f"{source} last, and append to LD_LIBRARY_PATH instead of setting it"
        yield Check(name="LD_LIBRARY_PATH", state=machine.lacking(True), text=text, fix=fix)
    atb, again = (
        machine.environ.get("ATB_HOME_PATH"),
        "source /usr/local/Ascend/nnal/atb/set_env.sh",
    )
    if atb is None:
        text = "ATB_HOME_PATH is not set: vllm-ascend's operators will not load"
        fix = f"{again} (it is in vllm-ascend's images)"
        yield Check(name="NNAL/ATB", state=State.WARNING, text=text, fix=fix)
    elif "cxx_abi_0" in atb:
        text = f"{atb} is for the old C++ names, torch {release(machine).torch} has the new ones:"
        text += " undefined symbols"
        fix = f"{again} --cxx_abi=1, or in a shell where python has torch"
        yield Check(name="NNAL/ATB", state=State.ERROR, text=text, fix=fix)
