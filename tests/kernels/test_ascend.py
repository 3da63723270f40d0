"""The environment of processes that use an NPU."""

from __future__ import annotations

import pytest
from emberl.kernels import ascend, platform

SHOWS = {
    "environment of learners and engines, each variable with its reason (names and values)": (
        "test_learners_and_engines_get_their_own, test_what_the_user_set_stays_and_is_said,"
        " test_engines_get_what_keeps_weights_that_change_right,"
        " test_one_order_of_sums_is_for_all_nodes,"
        " test_every_variable_has_a_reason_and_one_value_for_each_role"
    ),
}


def test_learners_and_engines_get_their_own() -> None:
    learner, rollout = (ascend.environment(role, {}) for role in ("learner", "rollout"))
    assert learner["TASK_QUEUE_ENABLE"] == "2" and rollout["TASK_QUEUE_ENABLE"] == "1"
    assert learner["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_NPU_ALLOC_CONF" not in rollout, "vllm-ascend's sleep mode refuses it"
    shared = {"HCCL_CONNECT_TIMEOUT": "1800", "HCCL_EXEC_TIMEOUT": "3600",
              "HCCL_HOST_SOCKET_PORT_RANGE": "auto", "HCCL_NPU_SOCKET_PORT_RANGE": "auto"}  # fmt: skip
    assert shared.items() <= learner.items() and shared.items() <= rollout.items()
    assert 120 <= int(learner["HCCL_CONNECT_TIMEOUT"]) <= 7200, "what HCCL takes"


def test_what_the_user_set_stays_and_is_said() -> None:
    given = {"HCCL_CONNECT_TIMEOUT": "600", "TASK_QUEUE_ENABLE": "1"}
    added = ascend.environment("learner", given)
    assert not added.keys() & given.keys()
    lines = platform.describe_environment("npu", given)
    more = (
        "HCCL_SOCKET_IFNAME",
        "HCCL_DETERMINISTIC",
        "additional_config",
        "additional_config",
        "layers",
    )
    assert [line.startswith(name) for line, name in zip(lines[-5:], more, strict=True)] == [
        True
    ] * 5
    assert len(lines) == len(ascend.ENVIRONMENT) + len(more)
    [line] = [line for line in lines if line.startswith("HCCL_CONNECT")]
    assert line.startswith("HCCL_CONNECT_TIMEOUT=600 (learner and rollout, yours): ")


def test_engines_get_what_keeps_weights_that_change_right() -> None:
    """As `rollout.vllm_backend` gives it to them, and as it is listed."""
    assert ascend.environment("rollout", {})["VLLM_ASCEND_ENABLE_NZ"] == "0"
    assert "VLLM_ASCEND_ENABLE_NZ" not in ascend.environment("learner", {})
    assert ascend.additional_config(False, True) == {"weight_nz_mode": 0}
    assert ascend.additional_config(True, True)["rl_config"]["sleep_mode_extra_cleanup"] is True
    text = " ".join(platform.describe_environment("npu", {}))
    assert "weight_nz_mode" in text and "rl_config" in text


def test_one_order_of_sums_is_for_all_nodes() -> None:
    added = ascend.environment("learner", {"HCCL_DETERMINISTIC": "true"})
    assert added["HCCL_DETERMINISTIC"] == "true" and added["LCCL_DETERMINISTIC"] == "1"
    assert "LCCL_DETERMINISTIC" not in ascend.environment("learner", {})
    assert "LCCL_DETERMINISTIC" not in ascend.environment(
        "learner", {"HCCL_DETERMINISTIC": "false"}
    )


def test_every_variable_has_a_reason_and_one_value_for_each_role() -> None:
    pairs = [(v.name, role) for v in ascend.ENVIRONMENT for role in v.roles]
    assert len(set(pairs)) == len(pairs)
    assert all(len(v.reason) > 20 for v in ascend.ENVIRONMENT)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_other_devices_get_nothing(device: str) -> None:
    assert platform.actor_environment(device, "learner", {}) == {}
    assert platform.describe_environment(device, {}) == []


def test_collectives_of_npus_are_told_the_interface_too() -> None:
    assert set(platform.NPU.interface_variables) == {
        "GLOO_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME",
    }  # fmt: skip
    assert platform.CUDA.interface_variables == ("GLOO_SOCKET_IFNAME",)
