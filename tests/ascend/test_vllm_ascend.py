"""What emberl relies on in vllm-ascend 0.23.0, in the newest wheel and in the newest source
distribution, read in their sources: importing them needs CANN, reading does not. Names, signatures,
switches and entries are shown, not what they do."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SHOWS = {
    "vllm-ascend 0.23.0, 0.26.0rc1, 0.30.0rc2: switches, sleep and wake, worker, graphs, rl_config (sources)": (
        "test_what_is_set_on_an_npu_has_the_names_and_values_that_it_reads,"
        " test_the_format_that_is_switched_off_is_refused_where_weights_change,"
        " test_workers_sleep_and_wake_as_is_asked,"
        " test_expandable_segments_and_the_memory_pool_exclude_each_other,"
        " test_cards_are_chosen_by_the_variable_that_it_reads,"
        " test_graphs_are_used_where_rl_config_is, test_rl_config_takes_what_emberl_gives"
    ),
    "vllm-ascend 0.23.0, 0.26.0rc1, 0.30.0rc2: weight transfer by HCCL (sources)": (
        "test_weight_transfer_entries_keep_vllms_names,"
        " test_its_transfer_engine_takes_what_emberl_gives, test_learners_send_as_it_says,"
        " test_its_workers_take_the_steps_of_a_transfer,"
        " test_a_communicator_without_its_library_does_nothing_and_says_nothing"
    ),
}
ROOT = Path(__file__).parents[2]


def installed() -> bool:
    """Whether emberl is; another file of these tests may have put a module of that name there by
    hand."""
    loaded = sys.modules.get("emberl")
    return (
        importlib.util.find_spec("emberl") is not None
        if loaded is None
        else loaded.__spec__ is not None
    )


if not installed():  # this environment has torch and Triton only
    for name in ("emberl", "emberl.kernels", "emberl.rollout", "emberl.rollout.vllm_backend"):
        module = sys.modules.setdefault(name, types.ModuleType(name))
        module.__path__ = [str(ROOT.joinpath(*name.split(".")[1:]))] if "." in name else []

vllm_compat = importlib.import_module("emberl.rollout.vllm_backend.compat")
transfer_api = importlib.import_module("emberl.rollout.vllm_backend.transfer_api")
platform = importlib.import_module("emberl.kernels.platform")


@dataclass(frozen=True)
class Release:
    """One vllm-ascend's sources."""

    version: str

    @property
    def folder(self) -> Path:
        return Path(sys.prefix) / f"vllm-ascend-{self.version}" / "vllm_ascend"

    @property
    def newer(self) -> bool:
        """Whether it has `rl_config`, and weight transfer by its own name."""
        return self.version == VERSIONS[-1]

    def source(self, path: str) -> str:
        return (self.folder / path).read_text()

    def class_of(self, path: str, name: str) -> ast.ClassDef:
        [found] = [
            n
            for n in ast.walk(ast.parse(self.source(path)))
            if isinstance(n, ast.ClassDef) and n.name == name
        ]
        return found


VERSIONS = ("0.23.0", "0.26.0rc1", "0.30.0rc2")
"""What emberl is made for, the newest wheel, and the newest source distribution."""


@pytest.fixture(params=VERSIONS)
def release(request: pytest.FixtureRequest) -> Release:
    found = Release(request.param)
    if not found.folder.exists():
        pytest.skip(f"vllm-ascend {found.version} could not be had; tests/ascend/setup.sh says why")
    return found


def methods(of: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in of.body if isinstance(node, ast.FunctionDef)}


def parameters(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in function.args.args]


def fields(of: ast.ClassDef) -> list[str]:
    return [
        n.target.id
        for n in of.body
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    ]


def settings(**engine_args: Any) -> Any:
    return vllm_compat.EngineSettings(
        model="m",
        dtype="bfloat16",
        device="npu",
        threads=1,
        max_num_seqs=8,
        max_model_len=64,
        engine_args=engine_args,
    )


def test_what_is_set_on_an_npu_has_the_names_and_values_that_it_reads(release: Release) -> None:
    variables, arguments = vllm_compat.prepare(settings(), {})
    [key] = arguments["additional_config"]
    assert variables["VLLM_ASCEND_ENABLE_NZ"] == "0" == str(arguments["additional_config"][key])
    if release.newer:  # a field of the configuration, and the variable is gone
        assert "weight_nz_mode: int = 1" in release.source("ascend_config.py"), "it is on by itself"
        return
    assert '"VLLM_ASCEND_ENABLE_NZ", 1' in release.source("envs.py"), "it is on by itself"
    assert f'"{key}",' in release.source("ascend_config.py")


def test_the_format_that_is_switched_off_is_refused_where_weights_change(release: Release) -> None:
    worker = methods(release.class_of("worker/worker.py", "NPUWorker"))
    assert "weight_nz_mode" in ast.unparse(worker["wake_up"]) and "raise ValueError" in ast.unparse(
        worker["wake_up"]
    )
    assert "self._check_nz_disabled()" in ast.unparse(worker["start_weight_update"])
    check = ast.unparse(worker["_check_nz_disabled"])
    switch = "weight_nz_mode" if release.newer else "envs_ascend.VLLM_ASCEND_ENABLE_NZ"
    assert switch in check and "raise ValueError" in check


def test_workers_sleep_and_wake_as_is_asked(release: Release) -> None:
    worker = methods(release.class_of("worker/worker.py", "NPUWorker"))
    assert parameters(worker["sleep"]) == ["self", "level"] and parameters(worker["wake_up"]) == [
        "self",
        "tags",
    ]
    pools = ast.unparse(worker["load_model"]) + "".join(map(ast.unparse, worker.values()))
    assert all(f"tag='{tag}'" in pools for tag in ("weights", "kv_cache")), (
        "the tags that are woken one after another"
    )


def test_expandable_segments_and_the_memory_pool_exclude_each_other(release: Release) -> None:
    assert 'assert "expandable_segments:True" not in conf' in release.source(
        "device_allocator/camem.py"
    )
    with pytest.raises(ValueError, match="expandable segments"):
        vllm_compat.prepare(
            settings(enable_sleep_mode=True), {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
        )


def test_cards_are_chosen_by_the_variable_that_it_reads(release: Release) -> None:
    npu = release.class_of("platform.py", "NPUPlatform")
    assigned = {
        ast.unparse(n.target): ast.unparse(n.value)
        for n in npu.body
        if isinstance(n, ast.AnnAssign) and n.value
    }
    assert assigned["device_control_env_var"].strip("'") == platform.NPU.visible_devices


def test_the_worker_takes_an_extension_and_reloads_weights_as_vllm_does(release: Release) -> None:
    worker = release.class_of("worker/worker.py", "NPUWorker")
    assert "WorkerBase" in [ast.unparse(base) for base in worker.bases]
    runner = release.class_of("worker/model_runner_v1.py", "NPUModelRunner")
    assert "GPUModelRunner" in [ast.unparse(base) for base in runner.bases]
    assert "reload_weights" not in methods(runner), "vLLM's own is what was tested"
    extension = ast.parse((ROOT / "rollout" / "vllm_backend" / "extension.py").read_text())
    [added] = [
        n for n in extension.body if isinstance(n, ast.ClassDef) and n.name == "WeightExtension"
    ]
    assert methods(added) and not methods(added).keys() & methods(worker).keys()


def test_weight_transfer_entries_keep_vllms_names(release: Release) -> None:
    if release.newer:
        added = release.source("distributed/weight_transfer/__init__.py")
        assert f'register_engine(\n        "{platform.NPU.weight_transfer_later}",' in added
    else:
        replaced = release.source("patch/platform/patch_weight_transfer_engine.py")
        entry = f'_registry["{platform.NPU.weight_transfer}"] = lambda: HCCLWeightTransferEngine'
        assert entry in replaced
    assert fields(release.class_of(HCCL, "HCCLWeightTransferInitInfo")) == [
        "master_address", "master_port", "rank_offset", "world_size",
    ]  # fmt: skip
    assert fields(release.class_of(HCCL, "HCCLWeightTransferUpdateInfo")) == [
        "names",
        "dtype_names",
        "shapes",
        "packed",
        "packed_buffer_size_bytes",
        "packed_num_buffers",
    ]
    engine = methods(release.class_of(HCCL, "HCCLWeightTransferEngine"))
    assert parameters(engine["trainer_init"]) == ["init_info"]
    assert parameters(engine["trainer_send_weights"]) == ["iterator", "trainer_args"]


HCCL = "distributed/weight_transfer/hccl_engine.py"


def test_its_transfer_engine_takes_what_emberl_gives(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its infos are dataclasses made of these dictionaries: an unknown key would be refused, and
    tensors that one side packs and the other does not would hang both."""
    infos = {
        f"{kind}_info_cls": types.SimpleNamespace(
            __dataclass_fields__=dict.fromkeys(
                fields(release.class_of(HCCL, f"HCCLWeightTransfer{kind.title()}Info"))
            )
        )
        for kind in ("init", "update")
    }
    monkeypatch.setattr(
        transfer_api, "_worker_engine", lambda backend: types.SimpleNamespace(**infos)
    )
    backend = platform.NPU.weight_transfer
    assert transfer_api.transfer_init(backend, "host", 1, 3, 9) == {
        "master_address": "host", "master_port": 1, "rank_offset": 3, "world_size": 9,
    }  # fmt: skip
    assert transfer_api.transfer_update(backend, {"a": ("bfloat16", (2, 3))}) == {
        "names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]], "packed": True,
    }  # fmt: skip


def test_learners_send_as_it_says(release: Release) -> None:
    engine = methods(release.class_of(HCCL, "HCCLWeightTransferEngine"))
    assert {"group", "packed"} <= set(fields(release.class_of(HCCL, "HCCLTrainerSendWeightsArgs")))
    sending, meeting = (
        ast.unparse(engine["trainer_send_weights"]),
        ast.unparse(engine["trainer_init"]),
    )
    assert "HCCLTrainerSendWeightsArgs(**trainer_args)" in sending, "a dictionary will do"
    for key in ("master_address", "master_port", "world_size"):
        assert f"init_info['{key}']" in meeting
    assert "PyHcclCommunicator(pg, device=device)" in ast.unparse(
        engine["_stateless_init_process_group"]
    )
    assert "self.model_update_group: PyHcclCommunicator | None = None" in ast.unparse(
        engine["__init__"]
    )
    assert "rank = worker_rank + init_info.rank_offset" in ast.unparse(
        engine["init_transfer_engine"]
    )


def test_its_workers_take_the_steps_of_a_transfer(release: Release) -> None:
    worker = methods(release.class_of("worker/worker.py", "NPUWorker"))
    assert parameters(worker["init_weight_transfer_engine"]) == ["self", "init_info"]
    start = worker["start_weight_update"]
    assert parameters(start)[2:] == []
    assert {ast.unparse(d) for d in start.args.defaults} <= {"True"}, "as a checkpoint"
    assert parameters(worker["update_weights"]) == ["self", "update_info"]
    loads = "self.weight_transfer_engine.update_weights" if release.newer else "model.load_weights"
    assert loads in ast.unparse(worker["update_weights"]), "looked up when the tensors come"
    assert parameters(worker["finish_weight_update"]) == ["self"]
    assert "self.weight_transfer_engine = None" in ast.unparse(worker["__init__"])


def test_its_engines_are_in_the_factory_once_the_platform_is_known(release: Release) -> None:
    """A learner that sends asks for vLLM's `current_platform` first."""
    start = methods(release.class_of("platform.py", "NPUPlatform"))["pre_register_and_update"]
    assert "adapt_patch(is_global_patch=True)" in ast.unparse(start)
    if release.newer:  # which `compat` has vLLM load
        general = ast.unparse(ast.parse(release.source("__init__.py")))
        assert "weight_transfer import register_engine" in general
    else:
        assert "patch_weight_transfer_engine" in release.source("patch/platform/__init__.py")


def test_a_communicator_without_its_library_does_nothing_and_says_nothing(release: Release) -> None:
    """Whoever uses it must look at `disabled` first."""
    pyhccl = methods(
        release.class_of("distributed/device_communicators/pyhccl.py", "PyHcclCommunicator")
    )
    [handler] = [n for n in ast.walk(pyhccl["__init__"]) if isinstance(n, ast.ExceptHandler)]
    assert "self.disabled = True" in [ast.unparse(node) for node in handler.body]
    for name in ("all_reduce", "broadcast"):
        first = next(n for n in pyhccl[name].body if isinstance(n, ast.If))
        assert ast.unparse(first.test) == "self.disabled" and isinstance(first.body[0], ast.Return)
    with pytest.raises(RuntimeError, match="is disabled"):
        transfer_api.check_communicator(types.SimpleNamespace(disabled=True))


def test_graphs_are_used_where_rl_config_is(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it tensors are made anew after loading, and graphs read the old ones."""
    graphs = importlib.import_module("emberl.rollout.vllm_backend.graphs")
    spec = types.SimpleNamespace(submodule_search_locations=[str(release.folder)])
    monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda name: spec)
    has_it = release.newer
    assert graphs.has_rl_config() == has_it
    assert graphs.choice("npu").eager != has_it


def test_rl_config_takes_what_emberl_gives(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses unknown keys."""
    if "class RlConfig" not in release.source("ascend_config.py"):
        assert "rl_config" not in release.source("ascend_config.py")
        return
    monkeypatch.setattr(vllm_compat, "has_rl_config", lambda: True)
    given = vllm_compat.prepare(settings(enable_sleep_mode=True), {})[1]["additional_config"]
    config = release.class_of("ascend_config.py", "RlConfig")
    assert set(given["rl_config"]) <= set(fields(config))
    assert "weight_nz_mode = 0" in ast.unparse(config), "it keeps the plain format by itself"
    assert "_disable_expandable_segments()" in ast.unparse(config)
