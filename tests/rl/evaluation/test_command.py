"""`emberl eval` as a user calls it: killed and gone on with, compared, and refused with a
reason."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from emberl.rl.config.load import ConfigError, resolve
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from emberl.rl.evaluation.command import evaluate_command, plan
from emberl.rl.evaluation.report import compare_folders
from emberl.rl.evaluation.settings import Named, configure, find_model
from emberl.rl.evaluation.store import SCHEMA, Store, is_evaluation, open_folder, read
from emberl.rl.run_directory import alone_in

EMBERL = str(Path(sys.executable).with_name("emberl"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = TinyConfig(hidden=32, layers=1, heads=2, head_dim=16, vocabulary="bytes")
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny", settings, seed=0)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {"prompt": f"{i}+1=?", "answer": str(i + 1), "data_source": ("odd" if i % 2 else "even")}
        for i in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def command(model: Path, *arguments: object) -> list[str]:
    fixed = ["rollout.max_num_seqs=64", "cluster.device=cpu", "model.dtype=float32"]
    return [EMBERL, "eval", str(model), *map(str, arguments), *fixed]


def run(arguments: Sequence[str], cwd: Path) -> dict[str, Any]:
    done = subprocess.run(
        arguments, cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def parts(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "samples").glob("part-*.parquet"))}


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_is_compared(
    model: Path, problems: Path, tmp_path: Path
) -> None:
    """Killed with -9 in the middle: what was written stays as it is, and every sample is there
    once. A second model on the same problems is then compared with it."""
    asked = ["--data", problems, "samples=64", "temperature=1.0", "max_response_length=24"]
    first = command(model, *asked, "--out", "one", "thinking.open=", "thinking.budgets=[4]")
    process = subprocess.Popen(
        [*first, "rollout.token_rate=60"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 150
    while len(kept := parts(tmp_path / "one")) < 2:
        assert process.poll() is None and time.monotonic() < deadline, "no part came"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = parts(tmp_path / "one")
    before = read(tmp_path / "one").num_rows
    assert 0 < before < 40 * 64 * 2, "it was in the middle"
    shutil.copy(
        tmp_path / "one/samples/part-000000.parquet", tmp_path / "one/samples/.part-000099.parquet"
    )  # as a kill in the middle of a write leaves it
    result = run(first, tmp_path)
    assert parts(tmp_path / "one").items() >= kept.items()
    rows = read(tmp_path / "one").to_pylist()
    keys = [(row["problem"], row["budget"], row["sample"]) for row in rows]
    assert len(keys) == len(set(keys)) == 40 * 64 * 2
    assert result["answers"] == 40 * 64 * 2
    assert {(row["set"], row["budget"], row["n"]) for row in result["sets"]} == {
        ("sums", None, 64),
        ("sums", 4, 64),
    }
    assert set(result["sets"][0]["sources"]) == {"even", "odd"}
    forced = [row for row in rows if row["forced_tokens"]]
    assert forced and all(row["thought_tokens"] == row["budget"] == 4 for row in forced)
    for row in result["sets"]:
        mine = [r for r in rows if r["budget"] == row["budget"]]
        right = sum(r["status"] == "correct" for r in mine) / len(mine)
        assert row["mean@64"]["value"] == pytest.approx(right)
        assert row["tokens"] == pytest.approx(sum(r["tokens"] for r in mine) / len(mine))
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert files >= {"report.html", "accuracy.png", "budget.png", "k.png", "lengths.png"}
    other = make_tiny(tmp_path / "other", TinyConfig(
        hidden=32, layers=1, heads=2, head_dim=16, vocabulary="bytes"), seed=1)  # fmt: skip
    second = command(other, *asked, "--against", "one", "thinking.open=", "thinking.budgets=[4]")
    compared = run(second, tmp_path)
    assert compared["out"] == "evals/other" and compared["against"]["model"] == "tiny"
    for found in compared["against"]["sets"]:
        assert found["problems"] == 40
        assert found["difference"] == pytest.approx(found["ours"] - found["other"])
        assert 0 < found["p_value"] <= 1
    mirrored = compare_folders(tmp_path / "one", tmp_path / "evals" / "other")
    for there, here in zip(mirrored, compared["against"]["sets"], strict=True):
        assert there["difference"] == pytest.approx(-here["difference"])
        assert (there["p_value"], there["better"]) == (here["p_value"], here["worse"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"nothing to evaluate tiny on; name a set"),
        (["--data", "gsmk8"], r"no ready set; did you mean gsm8k\?"),
        (["--data", "nowhere.jsonl"], r"no file of that name"),
        (["--data", "SUMS", "--data", "SUMS"], r"there is a set sums already"),
        (["--data", "SUMS", "sampels=4"], r"unknown key sampels.*did you mean samples"),
        (["--data", "SUMS", "samples=4"], r"samples=4 with temperature=0"),
        (["--data", "SUMS", "--k", 8], r"--k 8 .*samples=1; set samples=8"),
        (["--data", "SUMS", "--k", 0], r"--k 0: pass@k and maj@k are of 1 answer or more"),
        (["--data", "a/b=SUMS"], r"'a/b' is to be the set's name"),
        (["--data", "SUMS", "verifier=maths"], r"--data sums: .*did you mean 'math'"),
        (["--data", "SUMS", "answer_column=nope"], r"--data sums: .*nope"),
        (["--data", "BAD"], r"--data bad: 3 of 4 references .* cannot be graded"),
        (["--data", "BAD", "drop=none"], r"--data bad: .*references"),
        (["--data", "SUMS", "--step", 3], r"--step 3 is for the directory of a run"),
        (["--data", "SUMS", "--against", "nowhere"], r"'nowhere'"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_loaded(
    model: Path,
    problems: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[Any],
    message: str,
) -> None:
    bad = tmp_path / "bad.jsonl"
    answers = ["1", "\\frac{1}{", "see the picture", "\\text{Answer is omitted}"]
    bad.write_text(
        "".join(json.dumps({"question": f"{i}?", "final": a}) + "\n" for i, a in enumerate(answers))
    )
    named = {"SUMS": str(problems), "BAD": str(bad)}
    arguments = [
        named.get(e, e.replace("=SUMS", f"={problems}")) if isinstance(e, str) else e
        for e in arguments
    ]
    options: dict[str, Any] = {"data": [], "overrides": [], "ks": []}
    if str(bad) in arguments:
        arguments += ["prompt_column=question", "answer_column=final"]
    monkeypatch.chdir(tmp_path)
    rest = iter(arguments)
    against = None
    for each in rest:
        if each == "--data":
            options["data"].append(next(rest))
        elif each == "--k":
            options["ks"].append(next(rest))
        elif each == "--step":
            options["step"] = next(rest)
        elif each == "--against":
            against = next(rest)
        else:
            options["overrides"].append(each)
    with pytest.raises(ConfigError, match=message):
        plan(str(model) if against is None else against, **options)
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_answers_to_other_rows_are_not_mixed(
    model: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor those marked by another version of a function of one's own."""
    monkeypatch.chdir(tmp_path)
    file, mine = Path(shutil.copy(problems, "sums.jsonl")), Path("mine.py")
    mine.write_text("def score(solution_str, ground_truth, **_): return 1.0")

    def folder() -> str:
        settings = plan(str(model), [str(file)], ["verifier=./mine.py:score"]).settings
        assert len(settings["files"]) == 2
        return str(open_folder(None, "m", settings))

    assert [folder(), folder()] == ["evals/m", "evals/m"]
    text = file.read_text()
    file.write_text(text.replace("1+1=?", "1 + 1 = ?"))
    assert folder() == "evals/m-2"
    file.write_text(text)
    mine.write_text(mine.read_text().replace("1.0", "0.0"))
    assert folder() == "evals/m-3"
    old = json.loads(Path("evals/m/settings.json").read_text())
    del old["files"]
    Path("evals/m/settings.json").write_text(json.dumps(old))
    assert folder() == "evals/m", "of an older emberl"


def test_two_do_not_write_into_one_folder(model: Path, problems: Path, tmp_path: Path) -> None:
    job = plan(str(model), [str(problems)], [])
    out = open_folder(tmp_path / "out", job.named.label, job.settings)
    with alone_in(out), pytest.raises(ConfigError, match="is written by another run, process"):
        evaluate_command(str(model), [str(problems)], [], out=out)


def test_half_a_surrogate_pair_costs_no_answer(tmp_path: Path) -> None:
    store = Store(tmp_path)
    row = dict.fromkeys(SCHEMA.names) | {"set": "s", "problem": "p", "token_ids": [1]}
    store.add([row | {"question": "\ud83d x", "message": "\udc80"}])
    store.flush()
    [kept] = read(tmp_path).to_pylist()
    assert (kept["question"], kept["message"], kept["token_ids"]) == ("\\ud83d x", "\\udc80", [1])


def test_a_model_without_a_tokenizer_is_named(model: Path, problems: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(model, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"bare' has no tokenizer"):
        plan(str(bare), [str(problems)], [])


def test_the_models_of_a_run(model: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    tree = {"name": "r", "model": {"tiny": {}}, "data": {"source": "arithmetic"}}
    (run_dir / "config.yaml").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="has saved no model yet"):
        find_model(str(run_dir))
    recipe = tmp_path / "recipe"
    for number, stage in enumerate(("zeta", "alpha")):
        (recipe / stage / "model").mkdir(parents=True)
        (recipe / stage / "model/config.json").write_text("{}")
        os.utime(recipe / stage / "model/config.json", (number, number))
    (recipe / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"one of its stages: {recipe}/zeta, {recipe}/alpha$"):
        find_model(str(recipe))
    for name, stage, step in [("sft-000010", 0, 10), ("rl-000010", 1, 10), ("rl-000020", 1, 20)]:
        folder = shutil.copytree(model, run_dir / "checkpoints" / name)
        (folder / "progress.json").write_text(json.dumps({"stage": stage, "step": step}))
    assert find_model(str(run_dir)).label == "run-rl-000020"
    assert Path(find_model(str(run_dir), 10).path).name == "rl-000010"
    with pytest.raises(ConfigError, match="only rl-000010, rl-000020, sft-000010"):
        find_model(str(run_dir), 15)
    newest = run_dir / "checkpoints" / "rl-000020"
    os.utime(newest / "config.json", (3e9, 3e9))
    os.utime(newest / "progress.json", (3e9 + 1, 3e9 + 1))
    shutil.copytree(newest, run_dir / "model")  # as a run does at its end
    found = find_model(str(run_dir))
    assert (Path(found.path).name, found.label) == ("model", "run")
    assert found.run is not None and found.run.data.source == "arithmetic"
    os.utime(newest / "config.json", (3e9 + 2, 3e9 + 2))
    assert find_model(str(run_dir)).label == "run-rl-000020", "the run went on"


def test_a_checkpoint_to_compare_with_is_no_evaluation(model: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(model, tmp_path / "rl-000002")
    (checkpoint / "settings.json").write_text("{}")
    assert not is_evaluation(checkpoint)
    folder = open_folder(tmp_path / "done", "m", {})
    Store(folder)
    assert is_evaluation(folder)


def test_keys_of_a_set_count_for_what_a_run_holds_out(model: Path, tmp_path: Path) -> None:
    tree = {"name": "r", "model": {"path": str(model)}, "data": {"source": "arithmetic"}}
    named = Named(path=str(model), label="r", run=resolve(tree))
    asked = ["samples=8", "temperature=0.6", "size=7", "max_response_length=9", "eval.top_k=5"]
    config = configure(named, [], asked)
    assert (config.eval.samples, config.eval.temperature, config.eval.size) == (8, 0.6, 7)
    assert (config.rollout.max_response_length, config.eval.top_k) == (9, 5)
    with pytest.raises(
        ConfigError, match=r"'template=none' is for sets .* set data\.template=none"
    ):
        configure(named, [], ["template=none"])
    with pytest.raises(ConfigError, match=r"the run's own held-out problems are evaluated"):
        configure(named, [], ["thinking.budgets=[4]"])
    beside = configure(named, ["arithmetic"], asked)
    assert (beside.eval.samples, beside.eval.sets["arithmetic"].samples) == (1, 8)


def test_a_generated_set_asks_what_the_run_was_trained_on(model: Path) -> None:
    data = {"source": "arithmetic", "kinds": {"story": 1}, "terms": [3, 4], "largest_term": 20}
    tree = {"name": "r", "model": {"path": str(model)}, "data": data}
    named = Named(path=str(model), label="r", run=resolve(tree))
    own = configure(named, ["arithmetic"], ["terms=[5,5]"]).eval.sets["arithmetic"]
    assert (own.kinds, own.largest_term, own.terms) == ({"story": 1}, 20, (5, 5))
    other = configure(named, ["reasoning_gym:chain_sum"], []).eval.sets["chain_sum"]
    assert other.gym == {}
    mixture = {"sums": data, "more": {"source": "reasoning_gym:chain_sum", "gym": {"max_terms": 3}}}
    named = Named(path=str(model), label="r", run=resolve({**tree, "data": {"mixture": mixture}}))
    sets = configure(named, ["arithmetic", "reasoning_gym:chain_sum"], []).eval.sets
    assert sets["arithmetic"].terms == (3, 4) and sets["chain_sum"].gym == {"max_terms": 3}
    levels = {**data, "levels": [{"terms": [2, 2]}, {"terms": [6, 7]}]}
    named = Named(path=str(model), label="r", run=resolve({**tree, "data": levels}))
    assert configure(named, ["arithmetic"], []).eval.sets["arithmetic"].terms == (6, 7)
