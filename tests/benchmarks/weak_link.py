"""A learner and a worker on two sides of a real link: two network namespaces, a veth pair, and
`tc tbf` on both ends.

    python tests/benchmarks/weak_link.py learner|worker JSON        what
    `bench_sync.py --only network` starts in them

One version ahead: the worker decodes batch b once version b - 1 is served; the learner begins step
v once batch v is there, "computes" for a fixed time (it sleeps), and publishes v + 1 by a gloo
broadcast over the link. Commands and figures go through pipes of the parent, beside the link.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

HOST, FAR = "10.77.9.1", "10.77.9.2"
PORT = 29471
NEAR_NS, FAR_NS = "emberl-near", "emberl-far"


@contextmanager
def namespaces(rate: str | None) -> Iterator[None]:
    """rate: as tc writes it, e.g. 160mbit; None: no limit."""
    _ip(f"netns add {NEAR_NS}", f"netns add {FAR_NS}")
    try:
        _ip(f"link add near netns {NEAR_NS} type veth peer name far netns {FAR_NS}")
        for space, device, address in ((NEAR_NS, "near", HOST), (FAR_NS, "far", FAR)):
            _ip(
                f"-n {space} addr add {address}/24 dev {device}",
                f"-n {space} link set {device} up",
                f"-n {space} link set lo up",
            )
            if rate is not None:
                limit = f"tc qdisc add dev {device} root tbf rate {rate} burst 64kb latency 100ms"
                subprocess.run(["ip", "netns", "exec", space, *limit.split()], check=True)
        yield
    finally:
        for space in (NEAR_NS, FAR_NS):
            subprocess.run(["ip", "netns", "del", space], check=False)


def _ip(*commands: str) -> None:
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)


def measure(settings: dict[str, Any], rate: str | None) -> dict[str, float]:
    """Runs both sides; the figures of `worker`."""
    with namespaces(rate):
        sides = {}
        for role, space, device in (("learner", NEAR_NS, "near"), ("worker", FAR_NS, "far")):
            command = [
                "ip",
                "netns",
                "exec",
                space,
                sys.executable,
                __file__,
                role,
                json.dumps(settings),
            ]
            environment = os.environ | {"GLOO_SOCKET_IFNAME": device}
            sides[role] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
                env=environment,
            )
        learner, worker = sides["learner"], sides["worker"]
        try:
            to_learner = threading.Thread(target=_pump, args=(worker, learner), daemon=True)
            to_learner.start()
            for line in learner.stdout or ():
                worker.stdin.write(line)  # type: ignore[union-attr]
            worker.stdin.close()  # type: ignore[union-attr]
            to_learner.join(timeout=60)
            return worker.figures  # type: ignore[attr-defined,no-any-return]
        finally:
            for process in sides.values():
                process.kill()
                process.wait()


def _pump(worker: Any, learner: Any) -> None:
    for line in worker.stdout:
        if line.startswith("{"):
            worker.figures = json.loads(line)
        else:
            learner.stdin.write(line)


@dataclass(frozen=True)
class OverLink:
    """The next gloo broadcast over the link."""

    size: int
    group: ClassVar[Any] = None

    def fetch(self, link: Any) -> np.ndarray[Any, Any]:
        import torch
        from emberl.kernels import platform

        if OverLink.group is None:
            OverLink.group = platform.meet(platform.CPU, HOST, PORT, 1, 2, 120.0)
        data = torch.empty(self.size, dtype=torch.uint8)
        platform.broadcast(OverLink.group, data, 120.0)
        found: np.ndarray[Any, Any] = data.numpy()
        return found


def learner(settings: dict[str, Any]) -> None:
    import torch
    from emberl.kernels import platform
    from emberl.rollout.weights.diff import encode
    from emberl.rollout.weights.patch import TensorBytes, Weights, dense_patch
    from emberl.rollout.weights.tensors import checkpoint_tensors
    from emberl.rollout.weights.transport import PatchRef, WeightUpdate
    from emberl.rollout.weights.wire_format import pieces

    torch.set_num_threads(1)
    model = Path(settings["model"])
    masters = {name: tensor.float() for name, tensor in checkpoint_tensors(model)}
    generator = torch.Generator().manual_seed(0)
    heard: set[str] = set()

    def wait_for(line: str) -> None:
        while line not in heard:
            heard.add(sys.stdin.readline().strip())

    group, base = None, None
    for version in range(settings["steps"] + 1):
        if version:
            wait_for(f"batch {version - 1}")
            start = time.monotonic()
            for tensor in masters.values():  # steps of AdamW with gradients that are noise
                tensor += (
                    settings["lr"]
                    * torch.randn(tensor.shape, generator=generator).clamp(-1.5, 1.5)
                    * 0.25
                )
            time.sleep(max(0.0, settings["step_s"] - (time.monotonic() - start)))
        tensors = {
            name: TensorBytes(
                dtype="BF16",
                shape=tuple(t.shape),
                data=t.bfloat16().view(-1).view(torch.uint8).numpy(),
            )
            for name, t in masters.items()
        }
        begun = time.monotonic()
        patched = base is not None and settings["mode"] == "patch"
        patch = (
            encode(base, tensors, run_id="link", version=version)
            if patched
            else dense_patch("link", version, tensors.items())
        )
        data = np.frombuffer(b"".join(pieces(patch)), np.uint8)
        base = Weights(run_id="link", version=version, tensors=tensors, digests=patch.digests)
        place = OverLink(size=data.nbytes)
        parcel = PatchRef(
            version=version, base_version=patch.base_version, size=data.nbytes, places=(place,)
        )
        sent = {"patches": (parcel,)} if patched else {"anchors": (parcel,)}
        notice = WeightUpdate(run_id="link", attempt=0, version=version, root=patch.root, **sent)
        encoded = time.monotonic() - begun
        print(base64.b64encode(pickle.dumps((notice, encoded))).decode(), flush=True)
        group = group or platform.meet(platform.CPU, HOST, PORT, 0, 2, 120.0)
        platform.broadcast(group, torch.from_numpy(data.copy()), 120.0)
        wait_for(f"served {version}")


async def worker(settings: dict[str, Any]) -> None:
    import torch
    from emberl.rollout.embedded.engine import EmbeddedEngine
    from emberl.rollout.receiver import Receiver
    from emberl.rollout.samples import Prompt, Sampling
    from emberl.rollout.weights.transport import FetchContext

    torch.set_num_threads(1)
    engine = EmbeddedEngine(
        settings["model"],
        max_num_seqs=settings["slots"],
        max_model_len=160,
        run_id="link",
        version=-1,
    )
    updates = Receiver(engine, FetchContext(timeout=120.0))
    served = [asyncio.Event() for _ in range(settings["steps"] + 1)]
    sums = dict.fromkeys(("encode_s", "transfer_s", "prepare_s", "apply_s", "wire_bytes"), 0.0)
    marks: list[tuple[float, int]] = []

    async def decode() -> None:
        tokens = 0
        for batch in range(settings["steps"]):
            await served[max(0, batch - 1)].wait()
            marks.append((time.monotonic(), tokens))
            sampling = Sampling(
                max_tokens=settings["length"], temperature=1.0, seed=batch, stop_token_ids=()
            )
            prompts = [
                Prompt(id=f"{batch}-{i}", token_ids=(5, 6, 7), answer="", source="")
                for i in range(settings["slots"])
            ]
            async for completion in engine.generate_all(
                [(prompt, 1, sampling) for prompt in prompts]
            ):
                tokens += len(completion)
            print(f"batch {batch}", flush=True)
        marks.append((time.monotonic(), tokens))

    decoding = asyncio.create_task(decode())
    for version in range(settings["steps"] + 1):
        line = await asyncio.to_thread(sys.stdin.readline)
        notice, encoded = pickle.loads(base64.b64decode(line))
        await updates.prepare(notice)
        report = await updates.commit(version)
        if version >= 2:  # the first of each kind compiles
            sums["encode_s"] += encoded
            for name in ("transfer_s", "prepare_s", "apply_s", "wire_bytes"):
                sums[name] += report[name]
        served[version].set()
        print(f"served {version}", flush=True)
    await decoding
    (start, before), (stop, after) = marks[2], marks[-1]
    count = settings["steps"] - 1
    figures = {name: value / count for name, value in sums.items()}
    figures |= {
        "tokens_s": (after - before) / (stop - start),
        "step_s": (stop - start) / (settings["steps"] - 2),
    }
    print(json.dumps(figures), flush=True)
    await engine.close()


if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    if sys.argv[1] == "learner":
        learner(options)
    else:
        asyncio.run(worker(options))
