"""Evaluation sets: their own rows, prompts, sampling and verifiers; whole unless it is said."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emberl.rewards.inputs import RewardInput
from emberl.rewards.suite import RewardSuite, build_suite
from emberl.rl.config.load import Config, ConfigError, resolve
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.sources import open_source
from emberl.rl.data.tiny import tiny_tokenizer
from emberl.rl.eval_sets import HELD_OUT, EvalSet, open_eval_sets
from emberl.rl.evaluate import evaluate
from emberl.rl.groups import Group
from emberl.rollout.crew import Job
from emberl.rollout.samples import Completion, Prompt, Sampling, Span

CHAT = tiny_tokenizer(TinyConfig(vocabulary="bytes", chat_template=True))


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return {
        "train": write(
            tmp_path / "train.jsonl", [{"prompt": f"{i}+0=?", "answer": str(i)} for i in range(30)]
        ),
        "aime": write(
            tmp_path / "aime.jsonl", [{"Problem": f"find {i}", "Answer": i} for i in range(5)]
        ),
        "code": write(
            tmp_path / "code.jsonl",
            [{"prompt": f"say {i}", "answer": "x", "data_source": "taco"} for i in range(3)],
        ),
    }


def config(files: dict[str, str], sets: dict[str, Any], **groups: Any) -> Config:
    tree: dict[str, Any] = {
        "name": "t",
        "model": {"tiny": {"vocabulary": "bytes", "chat_template": True}},
        "data": {"source": files["train"], "heldout": 6, "system_prompt": "Think."},
        "rollout": {"max_response_length": 32},
        "eval": {"sets": sets},
    }
    return resolve(tree | groups)


def opened(settings: Config) -> tuple[dict[str, EvalSet], list[str]]:
    source = open_source(settings.data, CHAT, 0)
    suite = build_suite({name: part.model_dump() for name, part in settings.reward.parts.items()})
    said: list[str] = []
    with ExitStack() as stack:
        stack.callback(suite.close)
        sets = open_eval_sets(settings, source, suite, lambda _: CHAT, said.append, stack)
        return {each.name: each for each in sets}, [line for line in said if "layout" not in line]


AIME = {"prompt_column": "Problem", "answer_column": "Answer"}


def test_each_set_has_its_columns_sampling_and_verifier(files: dict[str, str]) -> None:
    own = {
        "samples": 4,
        "temperature": 0.6,
        "top_p": 0.9,
        "max_response_length": 64,
        "system_prompt": "Hard.",
    }
    settings = config(
        files, {"aime": {"path": files["aime"], **AIME, **own}, "code": files["code"]}
    )
    sets, said = opened(settings)
    assert list(sets) == [HELD_OUT, "aime", "code"]
    assert [len(each.prompts) for each in sets.values()] == [6, 5, 3]
    aime = sets["aime"]
    assert [p.answer for p in aime.prompts] == ["0", "1", "2", "3", "4"], "in the order of the rows"
    assert [m["content"] for m in aime.prompts[1].messages] == ["Hard.", "find 1"]
    assert sets["code"].prompts[0].messages[0]["content"] == "Think.", (
        "what a set does not say is as in data"
    )
    drawn = aime.sampled(Sampling(max_tokens=32, temperature=1.0, top_p=0.5, seed=9))
    assert (drawn.max_tokens, drawn.temperature, drawn.top_p, drawn.seed) == (64, 0.6, 0.9, 0)
    assert (aime.samples, sets[HELD_OUT].samples) == (4, 1)
    assert sets[HELD_OUT].sampled(drawn).temperature == 0.0
    assert settings.max_model_length == 1024 + 64
    assert said == []


def test_a_verifier_of_its_own(files: dict[str, str]) -> None:
    verifier = {"use": "format", "options": {"pattern": "boxed"}}
    sets, _ = opened(
        config(
            files,
            {
                "code": {"path": files["code"], "verifier": verifier},
                "aime": {"path": files["aime"], **AIME},
            },
        )
    )
    (verdict,) = sets["code"].suite.grade([RewardInput(completion="\\boxed{anything}", answer="x")])
    assert verdict.score == 1.0
    assert sets["aime"].suite is sets[HELD_OUT].suite


def test_a_cut_is_said_and_nothing_else_is_cut(files: dict[str, str]) -> None:
    sets, said = opened(config(files, {"aime": {"path": files["aime"], **AIME, "size": 2}}))
    assert [p.answer for p in sets["aime"].prompts] == ["0", "1"]
    assert said == ["eval.sets.aime.size=2: the first 2 of 5 problems of aime are evaluated"]
    many = files | {
        "train": write(
            Path(files["train"]), [{"prompt": str(i), "answer": str(i)} for i in range(700)]
        )
    }
    sets, said = opened(config(many, {}, data={"source": many["train"], "heldout": 600}))
    assert (len(sets[HELD_OUT].prompts), said) == (600, [])
    sets, said = opened(
        config(many, {}, data={"source": many["train"], "heldout": 600}, eval={"size": 10})
    )
    assert said == ["eval.size=10: the first 10 of 600 held-out problems are evaluated"]
    sets, _ = opened(config(files, {"aime": {"path": files["aime"], **AIME}}, eval={"size": 0}))
    assert sets == {}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"a": {"path": "nowhere.jsonl"}}, r"eval\.sets\.a: .*nowhere\.jsonl"),
        ({"a": {"path": "AIME", "prompt_column": "nope"}}, r"eval\.sets\.a: .*nope"),
        ({"train": {"path": "AIME", **AIME}}, r"eval\.sets\.train has the name of a data source"),
        ({"a": {"path": "CODE", "verifier": "maths"}}, r"eval\.sets\.a: .*did you mean 'math'"),
        (
            {"a": {"path": "CODE", "verifier": {"by_source": {"math*": "math"}}}},
            r"eval\.sets\.a: .*no pattern.*'taco'",
        ),
        ({"a": {"path": "CODE", "eval_path": "x.jsonl"}}, "a set is evaluated whole"),
        ({"a": {"path": "CODE", "source": "x"}}, "path is another word for source"),
        ({"a": {"path": "CODE", "wieght": 1}}, r"unknown key eval\.sets\.a\.wieght"),
        ({"a": {"path": "CODE", "verifier": {"options": {}}}}, "either use"),
    ],
)
def test_a_set_that_cannot_be_used_is_named(
    files: dict[str, str], sets: dict[str, Any], message: str
) -> None:
    real = {"AIME": files["aime"], "CODE": files["code"]}
    named = {k: {**v, "path": real.get(v["path"], v["path"])} for k, v in sets.items()}

    def start() -> None:
        opened(config(files, named))

    with pytest.raises((ConfigError, ValueError), match=message):
        start()


def completion(prompt: Prompt, sample: int) -> Completion:
    return Completion(
        prompt_id=prompt.id,
        sample=sample,
        token_ids=np.array([5, 1], np.int32),
        logprobs=np.zeros(2, np.float32),
        spans=(Span(0, 0, 2),),
        finish_reason="stop",
    )


def answered(job: Job) -> None:
    job.finish(tuple(completion(job.prompt, i) for i in range(job.n)))


def grade(
    prompt: Prompt,
    completions: Sequence[Completion],
    suite: RewardSuite,
    max_tokens: int,
    step: int,
) -> Group:
    """The first answer is the reference, and the others are nonsense."""
    texts = [f"\\boxed{{{prompt.answer if c.sample == 0 else 77}}}" for c in completions]
    verdicts = suite.grade([RewardInput(completion=t, answer=prompt.answer) for t in texts])
    return Group(prompt=prompt, completions=tuple(completions), verdicts=tuple(verdicts))


@pytest.mark.parametrize("size", [None, 0])
def test_every_set_is_in_the_metrics_by_its_name(files: dict[str, str], size: int | None) -> None:
    half = {"parts": {"half": {"use": "math", "weight": 0.5}}}
    sets = {"aime": {"path": files["aime"], **AIME, "samples": 2}}
    settings = config(files, {}, eval={"sets": sets, "size": size}, reward=half)
    source = open_source(settings.data, CHAT, 0)
    suite = build_suite({name: part.model_dump() for name, part in settings.reward.parts.items()})
    logged: list[tuple[Any, ...]] = []
    kept: list[int] = []

    async def delivered() -> dict[str, float]:
        return {}

    with ExitStack() as stack:
        stack.callback(suite.close)
        run = SimpleNamespace(
            config=settings,
            eval_sets=open_eval_sets(settings, source, suite, lambda _: CHAT, print, stack),
            weights=SimpleNamespace(delivered=delivered),
            progress=SimpleNamespace(step=7),
            sampling=lambda step: Sampling(max_tokens=32),
            pool=SimpleNamespace(submit=lambda jobs: [answered(job) for job in jobs]),
            grade=grade,
            answers=SimpleNamespace(
                text=lambda prompt, completion: "\\boxed{1}",
                problem=lambda prompt: prompt.messages[-1]["content"],
            ),
            tracker=SimpleNamespace(
                log=lambda *a: logged.append(a),
                samples=lambda *a: logged.append(a),
                doing=lambda what: nullcontext(),
                keep=lambda axis, step, groups, reader: kept.append(len(groups)),
            ),
        )
        result = asyncio.run(evaluate(run))  # type: ignore[arg-type]
    (step, metrics, axis, show), (_, rows) = logged
    assert len(kept) == 1 and kept[0] >= len(rows), "the answers to all sets are kept"
    assert (step, axis, len(rows)) == (7, "eval", 11 if size is None else 5)
    assert metrics["val-core/aime/acc/mean@2"] == 0.5
    assert metrics["val-aux/aime/reward/mean@2"] == 0.25
    assert metrics["val-core/aime/acc/pass@2"] == 1.0
    assert show["aime accuracy"] == "50.0%" and show["aime reward"] == "0.250"
    assert ("val-core/train/acc/mean@1" in metrics) == (size is None)
    expected = (1.0, 0.5) if size is None else (0.5, 0.25)
    assert (result.accuracy, result.reward) == expected, (
        "of the held-out problems; without them, over the sets"
    )
    assert (metrics["val-core/accuracy"], metrics["val-core/reward"]) == expected
