"""What a cold start shows the model."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from emberl.rl import recipe
from emberl.rl.answers import conversation
from emberl.rl.batch import demonstration
from emberl.rl.config.data import DataConfig
from emberl.rl.config.load import resolve
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.arithmetic import ProblemMaker
from emberl.rl.data.tiny import tiny_tokenizer
from emberl.rl.model_files import prepare_model
from emberl.rollout.samples import Prompt

WORKED = "<think>7+5=12,12-3=9</think>9"


def test_a_share_of_the_solutions_is_shown_without_its_work() -> None:
    shown = [demonstration(WORKED, i, 0.25) for i in range(4000)]
    assert set(shown) == {WORKED, "<think></think>9"}
    assert shown.count("<think></think>9") / 4000 == pytest.approx(0.25, abs=0.03)
    assert shown == [demonstration(WORKED, i, 0.25) for i in range(4000)], (
        "a resumed run is shown the same"
    )


def test_what_a_problem_is_does_not_tell_how_it_is_shown() -> None:
    """A source whose draws were those of the demonstration would show one kind of problem one
    way."""
    source = ProblemMaker(DataConfig(source="arithmetic", kinds={"chain": 1, "solve": 1}))
    for seed in range(3):
        problems = [next(source.train(seed, i)) for i in range(2000)]
        for kind in ("chain", "solve"):
            shown = [
                demonstration(p.solution, i, 0.6) for i, p in enumerate(problems) if p.kind == kind
            ]
            bare = sum(text.startswith("<think></think>") for text in shown)
            assert bare / len(shown) == pytest.approx(0.6, abs=0.06), (seed, kind)


@pytest.mark.parametrize(("direct", "expected"), [(0.0, WORKED), (1.0, "<think></think>9")])
def test_all_or_none(direct: float, expected: str) -> None:
    assert {demonstration(WORKED, i, direct) for i in range(50)} == {expected}


def test_work_over_several_lines_and_a_solution_without_any() -> None:
    assert demonstration("<think>a\nb</think>\n4", 0, 1.0) == "<think></think>\n4"
    assert demonstration("4", 0, 1.0) == "4"


def test_reward_functions_see_messages_only_where_the_model_does() -> None:
    prompt = Prompt(
        id="p",
        token_ids=(1,),
        answer="",
        source="s",
        messages=({"role": "user", "content": "1+1?"},),
    )
    assert (
        conversation(prompt, tiny_tokenizer(TinyConfig(vocabulary="bytes", chat_template=True)))
        == prompt.messages
    )
    assert conversation(prompt, tiny_tokenizer(TinyConfig())) == ()


def test_a_new_run_trains_the_model_that_its_configuration_names(tmp_path: Path) -> None:
    """A try that failed may have left a model of other settings in the folder; a resumed run keeps
    its own."""

    def hidden(size: int, *, anew: bool) -> int:
        tiny = {
            "hidden": size,
            "layers": 1,
            "heads": 1,
            "kv_heads": 1,
            "head_dim": 8,
            "intermediate": 16,
        }
        config = resolve({"name": "t", "model": {"tiny": tiny}, "data": {"source": "arithmetic"}})
        folder = prepare_model(config, tmp_path, print, anew=anew)
        made: int = json.loads((Path(folder) / "config.json").read_text())["hidden_size"]
        return made

    assert [hidden(16, anew=True), hidden(32, anew=True), hidden(16, anew=False)] == [16, 32, 32]


class RayThat:
    """In place of the cluster: says when it begins to come up, and goes on once it is told to."""

    def __init__(self, said: list[str], begun: threading.Event) -> None:
        self._said, self._begun = said, begun

    def __enter__(self) -> None:
        self._said.append("Ray begins")
        self._begun.set()

    def __exit__(self, *_: object) -> None:
        self._said.append("Ray ends")


@pytest.mark.parametrize(
    ("model", "waits", "said"),
    [
        # both take seconds, and there is nothing that could be wrong with a tiny model
        ({"tiny": {}}, True, ["Ray begins", "model", "made", "Ray ends"]),
        ({"path": "somewhere"}, False, ["model", "Ray begins", "made", "Ray ends"]),
        ({"tiny": {}, "lora": {}}, False, ["model", "Ray begins", "made", "Ray ends"]),
    ],
)
def test_a_tiny_model_is_made_while_ray_comes_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: dict[str, Any],
    waits: bool,
    said: list[str],
) -> None:
    found: list[str] = []
    begun = threading.Event()

    def ready(*_: Any) -> str:
        assert not waits or begun.wait(30)
        found.append("model")
        return "made"

    def trained(config: Any, cluster: Any, model_path: str, *_: Any) -> None:
        found.append(model_path)

    monkeypatch.setattr(recipe, "ready_model", ready)
    monkeypatch.setattr(recipe, "with_learners", trained)
    monkeypatch.setattr(recipe, "Cluster", lambda *_: RayThat(found, begun))
    monkeypatch.setattr(recipe, "check_model", lambda _: None)
    tree = {"name": "t", "model": model, "data": {"source": "arithmetic"}}
    recipe.train(resolve({**tree, "run_dir": str(tmp_path / "run")}))
    assert found == said


def test_a_model_that_cannot_be_made_ends_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.setattr(recipe, "prepare_model", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(recipe, "Cluster", lambda *_: RayThat(found, threading.Event()))
    tree = {"name": "t", "model": {"tiny": {}}, "data": {"source": "arithmetic"}}
    with pytest.raises(ZeroDivisionError):
        recipe.train(resolve({**tree, "run_dir": str(tmp_path / "run")}))
    assert found == ["Ray begins", "Ray ends"]
