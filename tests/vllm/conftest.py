"""Two small models, transformers' view of them, and an engine of each kind on the first:
`make test-vllm` runs these with vLLM; without it only the embedded engine is tested."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from emberl.rollout.embedded.engine import EmbeddedEngine
from emberl.rollout.embedded.model import DTYPE_NAMES
from emberl.rollout.samples import Prompt
from emberl.rollout.vllm_backend.compat import (
    EngineSettings,
    installed_version,
    labels_tokens,
)
from emberl.rollout.weights.patch import TensorBytes, WeightPatch, dense_patch
from emberl.rollout.weights.tensors import checkpoint_tensors

T = TypeVar("T")

# tests import it by this name
_spec = importlib.util.spec_from_file_location(
    "faulty_engines", Path(__file__).parents[1] / "faulty_engines.py"
)
assert _spec is not None and _spec.loader is not None
sys.modules["faulty_engines"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["faulty_engines"])

MAX_MODEL_LEN = 256
MAX_NUM_SEQS = 4
BLOCK = 32
"""Tokens of a block of vLLM's cache, small enough that prompts of a test fill some."""
BUDGET = 2 * MAX_MODEL_LEN
"""Tokens of one step of vLLM."""
STEP_S = 0.03
"""Seconds of a step of a server that is held back."""
NO_VLLM = installed_version() is None
NEEDS_VLLM = pytest.mark.skipif(NO_VLLM, reason="vLLM is not installed here; make test-vllm has it")


@dataclass(frozen=True)
class Model:
    """One of the two: its folder and transformers' model of it in float32."""

    folder: Path
    reference: Any

    def patch(self, version: int, run_id: str = "run") -> WeightPatch:
        return dense_patch(run_id, version, self.tensors().items())

    def tensors(self) -> dict[str, TensorBytes]:
        found = {}
        for name, tensor in checkpoint_tensors(self.folder):
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            found[name] = TensorBytes(
                dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape), data=data
            )
        return found

    @torch.no_grad()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[T, V] float32."""
        logits: torch.Tensor = self.reference(torch.tensor([token_ids])).logits[0].float()
        return logits


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    from transformers import AutoModelForCausalLM

    made = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp(f"model{seed}")
        make_tiny(
            folder,
            TinyConfig(hidden=64, layers=2, heads=2, head_dim=64, intermediate=128, init_std=0.2),
            seed,
        )
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        made.append(Model(folder, reference))
    return made[0], made[1]


def vllm_processes() -> list[Any]:
    if NO_VLLM:
        return []
    import psutil

    return [p for p in psutil.Process().children(recursive=True) if p.name().startswith("VLLM")]


@dataclass
class Rig:
    """An engine, and the event loop that it lives on."""

    kind: str
    engine: Any
    loop: asyncio.AbstractEventLoop
    old: Model
    new: Model
    foreign: frozenset[int]
    """vLLM's processes of other engines."""

    def processes(self) -> list[Any]:
        """vLLM's processes (psutil) of this engine."""
        return [process for process in vllm_processes() if process.pid not in self.foreign]

    def run(self, work: Awaitable[T], timeout: float = 120) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, timeout))

    def tokens(self) -> int:
        """Decoded so far."""
        return (
            self.engine.counters.decode_tokens
            if self.kind == "embedded"
            else self.engine.tokens_decoded
        )

    async def until_tokens(self, more: int) -> None:
        """Waits until `more` tokens have been decoded, and every slot that can be is in use
        (requests reach a server one after another)."""
        wanted = self.tokens() + more
        while self.tokens() < wanted or (self.kind == "server" and not self._full()):
            await asyncio.sleep(0.001)

    def _full(self) -> bool:
        sent = self.engine.sent.values()
        return sum(sample.tokens > 0 for sample in sent) >= min(MAX_NUM_SEQS, len(sent))

    @asynccontextmanager
    async def unhurried(self) -> AsyncIterator[None]:
        """Within, no answer of hundreds of tokens ends before the test acts: over HTTP a server
        runs ahead of what the test has heard of it, and on a busy machine far."""
        if self.kind == "server":
            await self.engine._llm.call_workers("emberl_pace", STEP_S)
        yield
        if self.kind == "server":
            await self.engine._llm.call_workers("emberl_pace", 0.0)

    def serve(self, model: Model) -> int:
        """Has the engine serve these weights, as the next version."""
        return self.run(self.engine.apply(model.patch(self.engine.version + 1)))


def make_embedded(model: Model) -> Any:
    return EmbeddedEngine(
        model.folder,
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=MAX_MODEL_LEN,
        dtype="float32",
        run_id="run",
    )


def make_vllm(
    model: Model,
    *,
    dtype: str = "float32",
    deadline_s: float = 120.0,
    max_restarts: int = 0,
    **engine_args: Any,
) -> Any:
    from emberl.rollout.vllm_backend.engine import VLLMEngine

    own = {"enforce_eager": True, "block_size": BLOCK, "max_num_batched_tokens": BUDGET}
    settings = EngineSettings(
        model=str(model.folder),
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=MAX_MODEL_LEN,
        dtype=dtype,
        engine_args=own | engine_args,
    )
    return VLLMEngine(settings, run_id="run", deadline_s=deadline_s, max_restarts=max_restarts)


def make_on_server(
    model: Model, *, server: str, dtype: str = "float32", max_restarts: int = 0
) -> Any:
    from emberl.rollout.vllm_backend.engine import VLLMEngine

    settings = EngineSettings(model=str(model.folder), max_model_len=MAX_MODEL_LEN, dtype=dtype)
    return VLLMEngine(settings, run_id="run", server=server, max_restarts=max_restarts)


MAKERS: dict[str, Callable[..., Any]] = {
    "embedded": make_embedded,
    "vllm": make_vllm,
    "server": make_on_server,
}
MakeRig = Callable[..., AbstractContextManager[Rig]]


@pytest.fixture(scope="session")
def make_rig(models: tuple[Model, Model]) -> MakeRig:
    """make_rig(kind, **settings) -> a context with an engine of this kind that serves the first
    model as version 0."""
    torch.set_num_threads(1)

    @contextmanager
    def make(kind: str, **settings: Any) -> Iterator[Rig]:
        loop = asyncio.new_event_loop()
        foreign = frozenset(process.pid for process in vllm_processes())
        made = Rig(kind, MAKERS[kind](models[0], **settings), loop, *models, foreign)
        try:
            yield made
        finally:
            made.run(made.engine.close())
            loop.close()

    return make


@contextmanager
def vllm_server(
    model: Path, log: Path, *arguments: str, port: int = 0, **environment: str
) -> Iterator[str]:
    """`vllm serve` with emberl's extension in a process of its own; its address at once, before it
    is up."""
    if not port:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--enable-scale-out",
        "--no-enable-chunked-prefill",
        "--max-num-batched-tokens",
        str(BUDGET),
        "--dtype",
        "float32",
        "--max-model-len",
        str(MAX_MODEL_LEN),
        "--max-num-seqs",
        str(MAX_NUM_SEQS),
        "--block-size",
        str(BLOCK),
        "--enforce-eager",
        "--skip-tokenizer-init",
        "--kv-cache-memory-bytes",
        str(1 << 27),
        "--worker-extension-cls",
        "paced_extension.PacedExtension",
        "--logprobs-mode",
        "processed_logprobs",
        "--generation-config",
        "vllm",
        *arguments,
    ]
    settings = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    } | environment
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, stdout=file, stderr=file, env=os.environ | settings, start_new_session=True
        ) as process,
    ):
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def need_labels() -> None:
    if not labels_tokens():
        pytest.skip(
            f"a server of vLLM {installed_version()} does not say by which weights a token was"
            " sampled"
        )


VLLM_MARKS = [pytest.mark.slow, NEEDS_VLLM]


@pytest.fixture(
    scope="module",
    params=["embedded", *(pytest.param(kind, marks=VLLM_MARKS) for kind in ("vllm", "server"))],
)
def rig(
    request: pytest.FixtureRequest,
    make_rig: MakeRig,
    models: tuple[Model, Model],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Rig]:
    with ExitStack() as opened:
        settings = {}
        if request.param == "server":
            need_labels()
            log = tmp_path_factory.mktemp("server") / "log"
            settings["server"] = opened.enter_context(vllm_server(models[0].folder, log))
        yield opened.enter_context(make_rig(request.param, **settings))


@pytest.fixture(scope="session")
def serve_vllm() -> Callable[..., AbstractContextManager[str]]:
    need_labels()
    return vllm_server


@pytest.fixture(scope="session")
def make_prompt() -> Callable[..., Prompt]:
    """make_prompt(id, length) -> a prompt whose tokens follow from its id."""

    def make(name: str, length: int = 5) -> Prompt:
        tokens = tuple((7 * i * i + 3 * i + sum(map(ord, name))) % 19 + 4 for i in range(length))
        return Prompt(id=name, token_ids=tokens, answer="", source="test")

    return make
