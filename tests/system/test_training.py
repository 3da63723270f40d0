"""The system end to end: it learns, resumes bit for bit, stops cleanly, and fails with a reason in
its last line."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from emberl.rl.run import stop_on_signal
from emberl.rl.watch.rollouts import read_rows
from small_system import Emberl, read_metrics, timeless

pytestmark = pytest.mark.slow


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_reward_rises_and_anybody_can_load_the_model(emberl: Emberl) -> None:
    result = emberl.train(
        "sft.steps=150",
        "schedule.steps=90",
        "schedule.prompts_per_step=32",
        "rollout.group_size=8",
        "eval.every=45",
        "data.heldout=20",
        "eval.size=20",
        "filter.zero_variance=true",
        "optim.lr=5e-4",
        "run_dir=run",
        "tracking.wandb=offline",
        WANDB_API_KEY="",
        fresh=True,
    )
    run_dir = emberl.folder / "run"
    rows = read_metrics(run_dir)
    first = sum(r["critic/score/mean"] for r in rows[:5]) / 5
    last = sum(r["critic/score/mean"] for r in rows[-5:]) / 5
    assert last > first + 0.1, f"reward went from {first:.2f} to {last:.2f}"
    assert (result["status"], result["steps"]) == ("ok", 90)
    assert 0 <= result["accuracy_start"] <= 1 and 0 <= result["accuracy_end"] <= 1
    assert result["tokens_per_second"] > 0
    assert (run_dir / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "| problem | answer | reference | verdict | score | parts |"
        in (run_dir / "samples.md").read_text()
    )
    assert list((run_dir / "wandb").glob("offline-run-*/*.wandb"))

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    ids = torch.tensor([tokenizer.encode("3+4=?", add_special_tokens=False)])
    answer = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0])
    assert answer.startswith("3+4=?<think>")


def answers(run_dir: Path) -> list[tuple[object, ...]]:
    """Of what a run kept all but times."""
    keys = ("stage", "axis", "step", "id", "completion", "score", "advantage", "versions")
    found = [tuple(str(row[key]) for key in keys) for row in read_rows(run_dir)]
    assert len(found) > 16, "of four steps and three evaluations"
    return sorted(found)


PPO = (
    "algorithm=ppo",
    "critic.warmup=1",
    "critic.lr=1e-3",
    "schedule.minibatches=2",
    "kl.place=reward",
    "kl.estimator=k1",
    "kl.coef=0.01",
    "kl.ref_refresh_steps=2",
    "model.lora.rank=4",
)


@pytest.mark.parametrize("algorithm", [(), PPO], ids=["grpo", "ppo with adapters"])
def test_a_resumed_run_is_the_uninterrupted_run(emberl: Emberl, algorithm: tuple[str, ...]) -> None:
    """Invariant 3, from a checkpoint in the middle of RL as if the run had died in its last step,
    in a process and on a cluster of its own; and the ratio of invariant 4 on the way."""
    if algorithm:
        pytest.importorskip("peft", reason="peft (the extra `lora`) is not installed")
    emberl.train(*algorithm, "run_dir=whole")
    whole, part = emberl.folder / "whole", emberl.folder / "part"
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns("rl-000004", "model"))
    done = json.loads((part / "checkpoints/rl-000002/progress.json").read_text())
    assert (done["stage"], done["step"]) == (1, 2)
    for change, line in {} if algorithm else ANOTHER_RUN.items():
        refused = emberl.train("run_dir=part", "--resume", change, status=2)
        assert line in refused["error"], "before Ray or any actor starts"
    result = emberl.train(*algorithm, "run_dir=part", "--resume", fresh=True)
    assert result["steps"] == 4
    assert weights(whole / "model") == weights(part / "model")
    assert timeless(read_metrics(whole)) == timeless(read_metrics(part))
    assert timeless(read_metrics(whole, "eval")) == timeless(read_metrics(part, "eval"))
    assert answers(whole) == answers(part), "nothing stands twice"
    assert (whole / "samples.md").read_text() == (part / "samples.md").read_text()
    trained = [row for row in read_metrics(whole) if "actor/pg_clipfrac" in row]
    assert len(trained) >= 2
    if algorithm == PPO:
        assert [row["step"] for row in trained] == [2, 3, 4], "the first step is the critic's alone"
        assert all("critic/vf_loss" in row for row in read_metrics(whole))
        return
    for row in trained:
        assert row["training/rollout_probs_diff_max"] < 1e-4, (
            "engine and learner disagree at the first step of a version"
        )
        assert row["actor/pg_clipfrac"] == 0.0
    further = emberl.train(
        "run_dir=part",
        "--resume",
        "--override",
        "seed=5",
        "data.terms=[2,3]",
        "schedule.steps=5",
        "optim.lr=2e-3",
    )
    said = (emberl.folder / "stderr.txt").read_text()
    for line in (
        "seed: 0, now 5",
        "data.terms: [2, 2], now [2, 3]",
        "schedule.steps: 4, now 5",
        "optim.lr: 0.001, now 0.002",
    ):
        assert f"resumed with {line}\n" in said
    assert (further["steps"], further["updates"]) == (5, result["updates"] + 1)
    again = emberl.train(
        "run_dir=part",
        "--resume",
        "seed=5",
        "data.terms=[2,3]",
        "schedule.steps=5",
        "optim.lr=2e-3",
    )
    assert again["steps"] == 5, "the newest checkpoint is of the new settings"


ANOTHER_RUN = {
    "seed=5": "rl-000002 is of another run (seed: 0, now 5); give its settings, add --override",
    "data.terms=[2,3]": "data.terms: [2, 2], now [2, 3]",
    "stages=[rl]": 'stages: ["sft", "rl"], now ["rl"]',
    "model.tiny.hidden=32": "the model of rl-000002 is another (model.tiny.hidden: 64, now 32)",
}


def check_profile(folder: Path) -> None:
    """A trace of each process, of its working threads too, and a timeline of all."""
    traces = {
        file.name: json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        for file in folder.glob("*.json.gz")
    }
    assert sorted(traces) == [
        f"{role}-{i}-step-000002.json.gz" for role in ("learner", "rollout") for i in (0, 1)
    ]
    named = {name: {event.get("name") for event in events} for name, events in traces.items()}
    for name, events in named.items():
        assert events & {"aten::mm", "aten::_fused_rms_norm"}, f"{name} shows no layer"
    assert any("Backward" in str(event) for event in named["learner-0-step-000002.json.gz"])
    timeline = json.loads((folder / "timeline.json").read_text())["traceEvents"]
    threads = {e["args"]["name"].split(" (")[0] for e in timeline if e["name"] == "thread_name"}
    assert {"loop", "learners", "rollout 0", "rollout 1"} <= threads
    names = {(e["cat"], e["name"]) for e in timeline if e["ph"] == "X"}
    assert {("loop", "update"), ("learners", "step"), ("loop", "waiting for answers")} <= names


def test_two_workers_and_two_ranks_run_the_same_problem(emberl: Emberl) -> None:
    result = emberl.train(
        "cluster.learners=2",
        "cluster.rollouts=2",
        "cluster.cpus_per_learner=0.25",
        "cluster.cpus_per_rollout=0.25",
        "profile.steps=[2]",
        "run_dir=run",
    )
    assert result["steps"] == 4
    check_profile(emberl.folder / "run/profile")
    versions = [
        row["sync/version"] for row in read_metrics(emberl.folder / "run") if "sync/version" in row
    ]
    assert versions == sorted(set(versions)), "each step serves a version of its own"


def wait_for(file: Path, text: str, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not (file.exists() and text in file.read_text()):
        assert time.monotonic() < deadline, f"{text!r} never appeared in {file}"
        time.sleep(0.2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_asks_and_a_second_interrupts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signal() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_signal_to_the_whole_process_group_saves_and_exits_cleanly(emberl: Emberl) -> None:
    """As `timeout` sends it: the driver is asked to stop, and Ray stays up until it has saved."""
    process = emberl.start(
        "schedule.steps=1000", "checkpoint.every=0", "eval.every=0", "run_dir=run"
    )
    wait_for(emberl.folder / "run/metrics.jsonl", '"stage": "rl", "step": 3')
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    result = json.loads(out.strip().splitlines()[-1])
    assert process.returncode == 130, err[-2000:]
    assert result["status"] == "interrupted"
    assert "Failed to connect" not in err and "Traceback" not in err
    assert (emberl.folder / f"run/checkpoints/rl-{result['steps']:06}/progress.json").exists()
    again = emberl.train(f"schedule.steps={result['steps'] + 1}", "run_dir=run", "--resume")
    assert again["steps"] == result["steps"] + 1


def test_a_resumed_run_asks_again_for_what_was_in_flight(emberl: Emberl) -> None:
    """Neither lost nor doubled: every problem that was admitted before the checkpoint trains once,
    and an evaluation that was under way beside the training is done once more, by the same
    weights."""
    import pyarrow.parquet

    asynchronous = ("schedule.max_staleness=2", "eval.every=2", "run_dir=run")
    emberl.train("schedule.steps=4", *asynchronous)
    run_dir = emberl.folder / "run"
    checkpoints, before = run_dir / "checkpoints", read_metrics(run_dir, "eval")
    # as after a kill in the middle of the evaluation of step 2, which may have been faster
    shutil.rmtree(checkpoints / "rl-000004")
    (checkpoints / "rl-000002/evaluation.json").unlink(missing_ok=True)
    file = checkpoints / "rl-000002/progress.json"
    file.write_text(file.read_text().replace('"evaluating": null', '"evaluating": 2   '))
    progress = json.loads(file.read_text())
    assert progress["evaluating"] == 2
    pending = [position for position, _ in progress["pending"]]
    assert len(pending) in (16, 32), (
        "one or two steps ahead, as the last version was served already or not"
    )
    emberl.train("schedule.steps=8", *asynchronous, "--resume")
    rows = pyarrow.parquet.read_table(emberl.folder / "run/lengths.parquet").to_pylist()
    asked = [row["prompt_id"] for row in rows if row["sample"] == 0]
    assert len(asked) == len(set(asked)) == 8 * 16
    first = progress["position"] - len(pending) - 2 * 16
    trained = {int(name.rsplit("/", 1)[1]) for name in asked}
    assert trained >= set(range(first, progress["position"])), (
        "all that was admitted before the checkpoint"
    )
    evaluations = read_metrics(emberl.folder / "run", "eval")
    assert [row["step"] for row in evaluations] == [0, 2, 4, 6, 8]
    assert evaluations[:2] == before[:2]
    for row in evaluations:
        # what a stage starts from is a version, too
        assert row["val-aux/version/oldest"] == row["val-aux/version/newest"] == row["step"] + 1


def test_a_run_that_ends_by_its_graders_saves_the_step_before(emberl: Emberl) -> None:
    (emberl.folder / "late.py").write_text(
        "def score(completions, trainer_state, **_):\n"
        "    if trainer_state.global_step >= 2:\n"
        "        raise KeyError('answer')\n"
        "    return [float(len(c) % 2) for c in completions]\n"
    )
    late = "reward.parts={late: {use: ./late.py:score}}"
    brief = ("stages=[rl]", "eval.size=0", "checkpoint.every=0")
    emberl.train(late, *brief, status=1)
    run_dir = emberl.folder / "run"
    assert "late.py:3" in (emberl.folder / "stderr.txt").read_text()
    assert [row["step"] for row in read_metrics(run_dir)] == [1, 2]
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["rl-000002"]
    emberl.train(late, *brief, "reward.max_error_fraction=1", "--resume", "schedule.steps=3")
    assert [row["step"] for row in read_metrics(run_dir)] == [1, 2, 3]
