"""Placement: who gets which bundle, and what is said where there is too little."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import ray
from emberl.kernels import platform
from emberl.rl import joining, local_ray, placement
from emberl.rl.cluster import Cluster
from emberl.rl.config.load import Config, ConfigError, load_config, resolve
from emberl.rl.placement import check_capacity, plan_placement, wait_for_nodes

SHOWS = {
    "placement of learners and engines on 8 NPUs, colocated pairs (real Ray, NPUs that are not there)": (
        "test_the_eight_device_configuration_actor_by_actor,"
        " test_a_colocated_learner_and_engine_see_the_same_card,"
        " test_a_placement_that_does_not_fit_the_cluster"
    ),
}
CONFIGS = Path(__file__).parents[2] / "configs"


def config(rollout: dict[str, object] | None = None, **cluster: object) -> Config:
    data = {"source": "arithmetic"}
    return resolve(
        {
            "name": "t",
            "model": {"path": "x"},
            "data": data,
            "rollout": rollout or {},
            "cluster": cluster,
        }
    )


def test_on_policy_sides_take_turns_on_the_same_cores() -> None:
    placement = plan_placement(
        config(device="cpu", learners=1, rollouts=2, cpus_per_learner=1, cpus_per_rollout=0.5)
    )
    assert [(s.role, s.index, s.bundle, s.threads) for s in placement.slots] == [
        ("learner", 0, {"CPU": 1}, 2),
        ("rollout", 0, {"CPU": 0.5}, 1),
        ("rollout", 1, {"CPU": 0.5}, 1),
    ]
    assert placement.total() == {"CPU": 2}


def test_a_device_per_actor_and_threads_from_its_cpus() -> None:
    placement = plan_placement(
        config(device="npu", learners=2, rollouts=1, cpus_per_learner=4, cpus_per_rollout=8)
    )
    assert [(s.bundle, s.threads) for s in placement.slots] == [
        ({"NPU": 1, "CPU": 4}, 4),
        ({"NPU": 1, "CPU": 4}, 4),
        ({"NPU": 1, "CPU": 8}, 8),
    ]


def test_an_engine_has_a_card_for_each_parallel_rank() -> None:
    rollout = {"engine": "vllm", "engine_args": {"tensor_parallel_size": 4}}
    placement = plan_placement(config(rollout, device="npu", learners=2, rollouts=2))
    assert [slot.bundle["NPU"] for slot in placement.slots] == [1, 1, 4, 4]
    assert placement.bundles() == [{"CPU": 1, "NPU": 1}] * 2 + [{"CPU": 1, "NPU": 4}] * 2


def test_a_running_server_needs_no_card() -> None:
    rollout = {"engine": "vllm", "servers": ["http://a", "http://b", "http://c"]}
    placement = plan_placement(config(rollout, device="npu", learners=1, rollouts=1))
    assert [slot.bundle for slot in placement.slots] == [{"NPU": 1, "CPU": 1}] + [{"CPU": 1}] * 3


def test_colocated_pairs_share_a_card() -> None:
    placement = plan_placement(
        config({"engine": "vllm"}, device="npu", learners=2, rollouts=2, colocated=True)
    )
    assert [(slot.role, slot.place) for slot in placement.slots] == [
        ("learner", 0),
        ("learner", 1),
        ("rollout", 0),
        ("rollout", 1),
    ]
    assert placement.bundles() == [{"CPU": 2, "NPU": 1}] * 2


@pytest.mark.parametrize(
    ("rollout", "cluster", "words"),
    [
        ({}, {}, "rollout.engine=vllm"),
        ({"engine": "vllm"}, {"rollouts": 2}, r"cluster.rollouts=1 \(as learners\)"),
        (
            {"engine": "vllm", "engine_args": {"tensor_parallel_size": 2}},
            {},
            "tensor_parallel_size=1",
        ),
        (
            {"engine": "vllm", "engine_args": {"weight_transfer_config": {}}},
            {},
            "a card cannot send to itself",
        ),
    ],
)
def test_what_cannot_be_colocated(
    rollout: dict[str, object], cluster: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        config(rollout, colocated=True, **cluster)


def test_too_few_cpus_names_the_keys() -> None:
    placement = plan_placement(config(device="cpu", learners=2, rollouts=3))
    with pytest.raises(
        ConfigError,
        match=r"5 CPU but this machine has 2: lower cluster.learners=2 or cluster.rollouts=3",
    ) as error:
        check_capacity(placement, {"CPU": 2.0}, "this machine")
    assert "cluster.cpus_per_rollout" in str(error.value)


def test_too_little_is_known_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="this machine has"):
        Cluster(config(device="cpu", learners=1000))
    monkeypatch.setattr(platform, "detect", lambda: platform.CPU)
    little = {"cpus_per_learner": 0.1, "cpus_per_rollout": 0.1}
    with pytest.raises(ConfigError, match="2 GPU but this machine has 0"):
        Cluster(config(device="cuda", **little))
    assert not ray.is_initialized()


def test_a_local_cluster_starts_without_what_nobody_asks() -> None:
    """Names of Ray's own, which may change: then a start has these processes again."""
    node = ray._private.node.Node
    before = node.start_monitor
    with local_ray.needed_alone():
        for process in ("start_monitor", "start_log_monitor", "start_api_server"):
            assert getattr(node, process)(None, include_dashboard=False) is None
    assert node.start_monitor is before


def test_nodes_that_are_about_to_register_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    need, told = plan_placement(config(device="cpu", learners=2, rollouts=1)), list[str]()
    monkeypatch.setattr(placement, "POLL_S", 0.0)
    growing = iter([{}, {"CPU": 1.0}, {"CPU": 3.0}])
    wait_for_nodes(need, 60, lambda: next(growing), "the Ray cluster at h:1", told.append)
    [line] = told
    assert "waiting for nodes, up to cluster.join_timeout=60 s" in line
    assert "needs 3 CPU but the Ray cluster at h:1 has 0" in line
    with pytest.raises(ConfigError, match=r"needs 3 CPU but the Ray cluster at h:1 has 2: lower"):
        wait_for_nodes(need, 0.01, lambda: {"CPU": 2.0}, "the Ray cluster at h:1", told.append)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "what listens there is not Ray's"),
        (None, r"has not answered within 0\.5 s"),
    ],
)
def test_a_server_that_is_no_ray_cluster(
    answer: bytes | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A web server, such as the cluster's own dashboard, and one that takes connections alone."""
    monkeypatch.setattr(joining, "PATIENCE", 0.5)

    def serve() -> None:
        with suppress(OSError):  # it is closed
            while answer is not None:
                connection, _ = server.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        begun = time.monotonic()
        elsewhere = config(device="cpu", address=address)
        with pytest.raises(ConfigError, match=f"at {address} .*{words}"), Cluster(elsewhere):
            pass
        assert time.monotonic() - begun < 5
        server.shutdown(socket.SHUT_RDWR)


def where() -> type:
    """An actor that says where it sits, sent to its process by value: by name that would import
    this file, and torch."""

    class Where:
        def __init__(self, spec: object) -> None:
            self.spec = spec

        def look(self) -> dict[str, object]:
            context = ray.get_runtime_context()
            return {
                "resources": context.get_assigned_resources(),
                "group": context.get_placement_group_id(),
                "npu": os.environ.get("ASCEND_RT_VISIBLE_DEVICES"),
                "threads": os.environ["OMP_NUM_THREADS"],
                "queue": os.environ.get("TASK_QUEUE_ENABLE"),
            }

    return Where


@pytest.fixture(scope="module")
def npu_box() -> Iterator[None]:
    """A Ray cluster that says it is a machine with eight NPUs."""
    ray.init(
        address="local",
        num_cpus=64,
        resources={"NPU": 8},
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.mark.slow
def test_the_eight_device_configuration_actor_by_actor(npu_box: None) -> None:
    settings = load_config(CONFIGS / "gsm8k_qwen2.5_0.5b.yaml", ["cluster.device=npu"])
    with Cluster(settings) as cluster:
        slots = cluster.placement.slots
        assert len(slots) == 8
        actors = [cluster.options(where(), slot).remote(None) for slot in slots]
        found = ray.get([actor.look.remote() for actor in actors], timeout=120)
        assert len({f["group"] for f in found}) == 1
        assert sorted(int(f["npu"]) for f in found) == list(range(8)), (
            "each actor sees one card, and no two the same"
        )
        for slot, seen in zip(slots, found, strict=True):
            assert seen["threads"] == str(slot.threads)
            assert seen["queue"] == ("2" if slot.role == "learner" else "1")
            assert seen["resources"] == {"NPU": 1.0, "CPU": slot.bundle["CPU"]}
            bundles = ray.util.placement_group_table(cluster._group)["bundles"]
            assert bundles[slots.index(slot)] == {"NPU": 1.0, "CPU": slot.bundle["CPU"]}
    assert ray.is_initialized(), "a cluster that was joined is not shut down"


@pytest.mark.slow
def test_a_colocated_learner_and_engine_see_the_same_card(npu_box: None) -> None:
    with Cluster(
        config({"engine": "vllm"}, device="npu", learners=3, rollouts=3, colocated=True)
    ) as cluster:
        actors = [cluster.options(where(), slot).remote(None) for slot in cluster.placement.slots]
        cards = [
            found["npu"]
            for found in ray.get([actor.look.remote() for actor in actors], timeout=120)
        ]
        assert cards[:3] == cards[3:] and len(set(cards)) == 3


@pytest.mark.slow
def test_a_placement_that_does_not_fit_the_cluster(npu_box: None) -> None:
    nine = config(device="npu", learners=8, rollouts=1, join_timeout=0)
    with pytest.raises(ConfigError, match="needs 9 NPU but the Ray cluster has 8"), Cluster(nine):
        pass
