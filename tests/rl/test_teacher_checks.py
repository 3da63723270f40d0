"""Teachers, sources and mixtures that do not fit, each refused by name before anything is
loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from emberl.rl.config.load import ConfigError, resolve
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from emberl.rl.preflight import check_inputs

SMALL = {"hidden": 16, "layers": 1, "heads": 1, "head_dim": 16, "intermediate": 16}
SUMS = {"source": "arithmetic", "heldout": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers, one of bytes, a student of bytes, and a table of rated problems of two
    sources."""
    found = tmp_path_factory.mktemp("teachers")
    for name, vocabulary in (("arithmetic",) * 2, ("bytes",) * 2, ("student", "bytes")):
        make_tiny(found / name, TinyConfig.model_validate({**SMALL, "vocabulary": vocabulary}), 0)
    rows = [
        {"question": f"{i}+1=?", "answer": f"{i + 1}", "data_source": "ab"[i % 2], "rate": i / 40}
        for i in range(40)
    ]
    (found / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def check(folder: Path, data: Any = SUMS, **groups: Any) -> list[str]:
    tree = json.loads(json.dumps(groups).replace("@", str(folder)))
    data = json.loads(json.dumps(data).replace("@", str(folder)))
    model = tree.pop("model", {"tiny": SMALL})
    tree = {"name": "t", "algorithm": "opd", "model": model, "data": data, **tree}
    return check_inputs(resolve(tree))


def taught(path: str = "@/arithmetic", *sources: str, **more: Any) -> dict[str, Any]:
    return {"teachers": {"big": {"path": path, "sources": sources}}, **more}


TABLE = {"source": "@/rows.jsonl", "heldout": 4, "drop": "none"}
TWO = {"heldout": 4, "mixture": {"sums": {"source": "arithmetic"}, "rows": TABLE}}


@pytest.mark.parametrize(
    ("data", "groups"),
    [
        (SUMS, {"distill": taught()}),
        (SUMS, {"distill": taught("@/arithmetic", "arithmetic")}),
        (TABLE, {"model": {"path": "@/student"}, "distill": taught("@/bytes", "a", "b")}),
        (TABLE, {"model": {"path": "@/student"}, "distill": taught("@/bytes", "a", reward_coef=1)}),
        (TWO, {"model": {"path": "@/student"}, "distill": taught("@/bytes", "sums", "rows")}),
        ({**TABLE, "curriculum": {"rate_column": "rate"}}, {"model": {"path": "@/student"}}),
    ],
)
def test_what_fits(data: Any, groups: dict[str, Any], folder: Path) -> None:
    check(folder, data, **groups)


@pytest.mark.parametrize(
    ("data", "groups", "message"),
    [
        (
            SUMS,
            {"distill": taught("@/bytes")},
            r"distill.teachers.big.path='.*/bytes': its tokens are not the student's \(260 tokens"
            r" instead of 23\)",
        ),
        (SUMS, {"distill": taught("@/none.gguf")}, "distill.teachers.big.path='.*' does not exist"),
        (SUMS, {"distill": taught("@")}, "neither config.json nor a GGUF file"),
        (
            SUMS,
            {"distill": taught("@/arithmetic", "arithmetics")},
            "distill.teachers.big.sources has 'arithmetics', which is no source of the data; these"
            " are arithmetic",
        ),
        (
            TWO,
            {"distill": taught("@/arithmetic", "a")},
            "sources has 'a', which is no source of the data; these are rows, sums",
        ),
        (
            TABLE,
            {"model": {"path": "@/student"}, "distill": taught("@/bytes", "a")},
            "distill.teachers has none for the source 'b', and distill.reward_coef=0",
        ),
        (
            SUMS,
            {"distill": {"teachers": {"x": {"path": "p"}, "y": {"path": "q"}}}},
            "distill.teachers x and y name no sources",
        ),
        (
            SUMS,
            {
                "distill": {
                    "teachers": {n: {"path": n, "sources": ["arithmetic"]} for n in ("x", "y")}
                }
            },
            "the source 'arithmetic' has 2 teachers",
        ),
        (SUMS, {"distill": {"loss": "jsd"}}, "distill has settings but no teachers"),
        (
            SUMS,
            {"distill": taught(), "filter": {"zero_variance": True}},
            "filter.zero_variance=true drops groups of equal scores",
        ),
        (SUMS, {"distill": taught(loss="jsd", beta=1.0)}, "distill.beta"),
        (
            {**SUMS, "curriculum": {"rate_column": "rate"}},
            {},
            "data.curriculum.rate_column='rate': data.source=arithmetic has no columns",
        ),
        (
            {**TABLE, "curriculum": {"rate_column": "solved"}},
            {"model": {"path": "@/student"}},
            "has no numbers there; its columns are answer, data_source, question, rate",
        ),
        (
            {**TWO, "curriculum": {"rate_column": "rate"}},
            {},
            "data.mixture.sums: data.curriculum.rate_column='rate': data.source=arithmetic has no",
        ),
        (
            {**SUMS, "curriculum": {"stages": [{"steps": 9, "rates": [0.5, 1]}]}},
            {},
            "data.curriculum.stages go by difficulty, which nobody has measured yet",
        ),
        (
            {**SUMS, "mixture": {"a": {"source": "arithmetic"}}},
            {},
            r"data.source \(one source\) or data.mixture \(several\): both are set",
        ),
    ]
    + [
        ({"mixture": {n: {"source": "arithmetic", **own} for n, own in parts.items()}}, {}, message)
        for parts, message in [
            ({"a": {"weight": 0.5}, "b": {"weight": 0.6}}, "weights of data.mixture sum to 1.1"),
            ({"a": {"weight": -1}, "b": {"weight": 2}}, "data.mixture.a.weight=-1 must be"),
            ({"a": {"weight": "1"}}, "data.mixture.a.weight=1 must be a number"),
            ({"a": {"weight": 1}, "b": {}}, "data.mixture.b has no weight, others have"),
            ({"a": {"tems": [2, 2]}}, "data.mixture.a.tems: Extra inputs"),
            ({"a": {"levels": [{"terms": [2, 1]}]}}, r"data.levels\[0\].terms: data.terms must be"),
            ({"a": {"curriculum": {}}}, "data.mixture.a.curriculum belongs to data itself"),
            ({"a": {"mixture": {}}}, "data.mixture.a.mixture belongs to data itself"),
        ]
    ],
)
def test_what_does_not_fit(data: Any, groups: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check(folder, data, **groups)


@pytest.mark.parametrize(
    "groups",
    [
        {"eval": {"sets": {"more": {"mixture": {"a": SUMS}}}}},
        {"stages": ["sft"], "sft": {"data": {"mixture": {"a": SUMS}}}},
    ],
)
def test_only_what_rl_trains_on_is_mixed(groups: dict[str, Any], folder: Path) -> None:
    with pytest.raises(
        ConfigError, match="mixture, levels and curriculum order the problems of RL"
    ):
        check(folder, **groups)


def test_a_resolved_mixture_can_be_read_again(folder: Path) -> None:
    """As `--resume` and `schedule.passes` do."""
    config = resolve({"name": "t", "model": {"tiny": {}}, "data": {"mixture": {"a": SUMS}}})
    assert resolve(config.model_dump(mode="json")) == config
