"""The files for clusters say what Ray takes, and have room for the runs that they start."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from emberl.rl.config.load import load_config
from emberl.rl.placement import plan_placement
from typer.testing import CliRunner

CONFIGS = Path(__file__).parents[3] / "configs"


def read(name: str) -> Any:
    return yaml.safe_load((CONFIGS / "cluster" / name).read_text())


def test_ray_takes_its_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    file = read("ray.yaml")
    validate_config(prepare_config(dict(file)))
    assert file["min_workers"] == len(file["provider"]["worker_ips"])
    for commands in (file["head_start_ray_commands"], file["worker_start_ray_commands"]):
        assert "ray start" in commands[-1]


def test_the_kubernetes_job_has_room_for_its_run() -> None:
    spec = read("rayjob.yaml")["spec"]
    emberl, train, config, *overrides, resume, auto = shlex.split(spec["entrypoint"])
    assert (emberl, train) == ("emberl", "train")
    assert (resume, auto) == ("--resume", "auto") or spec["backoffLimit"] == 0
    settings = load_config(CONFIGS.parent / config, [*overrides, "cluster.device=cuda"])
    needed = plan_placement(settings).total()
    [group] = spec["rayClusterSpec"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert needed["GPU"] <= group["replicas"] * limits["nvidia.com/gpu"]
    assert needed["CPU"] <= group["replicas"] * float(limits["cpu"])
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    for pod in (head, group["template"]["spec"]):
        claimed = {volume["name"] for volume in pod["volumes"]}
        mounts = {
            mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]
        }
        assert set(mounts) == claimed and str(settings.run_dir).startswith(mounts["runs"])


def test_the_image_runs_a_command_that_there_is() -> None:
    from emberl.rl.cli import app

    text = (CONFIGS / "cluster/Dockerfile").read_text()
    [entry] = re.findall(r"^ENTRYPOINT \[\"(\w+)\"\]", text, re.MULTILINE)
    [command] = re.findall(
        r"^#   docker run .* emberl (\w+) configs/(?:\w+)\.yaml", text, re.MULTILINE
    )
    assert entry == "emberl" and CliRunner().invoke(app, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize("name", ["ray.yaml", "rayjob.yaml", "Dockerfile"])
def test_configurations_that_are_named_are_there(name: str) -> None:
    named = re.findall(r"configs/[\w./-]+", (CONFIGS / "cluster" / name).read_text())
    assert named and all((CONFIGS.parent / path.rstrip(".,")).exists() for path in named)
