"""Files in every form that people have, rows as problems, and what is kept of large tables."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from emberl.rl.config.data import DataConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data import prepared
from emberl.rl.data.files import pieces
from emberl.rl.data.hub import within_reach
from emberl.rl.data.messages import read_messages, split_off_reply
from emberl.rl.data.reference_texts import final_answer
from emberl.rl.data.rows import train_tables
from emberl.rl.data.sources import check_data, open_source
from emberl.rl.data.table import TableSource
from emberl.rl.data.tiny import tiny_tokenizer
from pyarrow import parquet

CHAT = tiny_tokenizer(TinyConfig(vocabulary="bytes", chat_template=True))
ROWS = [{"prompt": f"{i}+0=?", "answer": str(i)} for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "prompt,answer\r\n" + "".join(f'"{row["prompt"]}",{row["answer"]}\r\n' for row in ROWS)


def opened(source: Any, **options: Any) -> TableSource:
    settings = DataConfig(source=source, **{"heldout": 0, "max_prompt_length": 4096, **options})
    check_data(settings)
    found = open_source(settings, CHAT)
    assert isinstance(found, TableSource)
    return found


def answers(source: TableSource) -> dict[str, str]:
    return {p.messages[-1]["content"]: p.answer for p in map(source.train, range(source.size))}


def one(tmp_path: Path, row: Any, **options: Any) -> tuple[str, str]:
    """Prompt and answer of a file of one row."""
    path = tmp_path / "row.jsonl"
    path.write_text(json.dumps(row) + "\n")
    prompt = opened(str(path), **options).train(0)
    return prompt.messages[-1]["content"], prompt.answer


WRITERS: dict[str, Callable[[Path], Any]] = {
    "bom.jsonl": lambda p: p.write_bytes(b"\xef\xbb\xbf" + LINES.encode()),
    "crlf.jsonl": lambda p: p.write_bytes(LINES.replace("\n", "\r\n").encode()),
    "blank.jsonl": lambda p: p.write_text("\n" + LINES.replace("\n", "\n\n")),
    "list.json": lambda p: p.write_text(json.dumps(ROWS, indent=1)),
    "list.jsonl": lambda p: p.write_text(json.dumps(ROWS)),
    "lines.json": lambda p: p.write_text(LINES),
    "lines.ndjson": lambda p: p.write_text(LINES),
    "in_data.json": lambda p: p.write_text(json.dumps({"version": 1, "data": ROWS})),
    "by_id.json": lambda p: p.write_text(json.dumps({f"id{i}": row for i, row in enumerate(ROWS)})),
    "pairs.json": lambda p: p.write_text(
        json.dumps([[row["prompt"], row["answer"]] for row in ROWS])
    ),
    "no_suffix": lambda p: p.write_text(LINES),
    "table.csv": lambda p: p.write_bytes(b"\xef\xbb\xbf" + CSV.encode()),
    "table.tsv": lambda p: p.write_text(CSV.replace(",", "\t")),
    "table.csv.gz": lambda p: p.write_bytes(gzip.compress(CSV.encode())),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(LINES.encode())),
    "a.jsonl.zst": lambda p: p.write_bytes(zstandard.compress(LINES.encode())),
    "a.json.zst": lambda p: p.write_bytes(zstandard.compress(json.dumps(ROWS).encode())),
    "a.jsonl.bz2": lambda p: p.write_bytes(bz2.compress(LINES.encode())),
    "a.json.xz": lambda p: p.write_bytes(lzma.compress(json.dumps(ROWS).encode())),
    "a.parquet": lambda p: parquet.write_table(pyarrow.Table.from_pylist(ROWS), p),
    "stream.arrow": lambda p: write_arrow(p, pyarrow.ipc.new_stream),
    "file.arrow": lambda p: write_arrow(p, pyarrow.ipc.new_file),
}


def write_arrow(path: Path, writer: Any) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with writer(str(path), table.schema) as file:
        file.write_table(table)


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_every_form(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    source = opened(str(tmp_path / name))
    assert answers(source) == {row["prompt"]: row["answer"] for row in ROWS}
    assert {p.id.rpartition("/")[2] for p in map(source.train, range(4))} == {"0", "1", "2", "3"}


def test_several_files_folders_globs_and_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "shards").mkdir()
    for i, row in enumerate(ROWS):
        (tmp_path / "shards" / f"train-{i:05}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "shards" / "test-00000.jsonl").write_text('{"prompt": "5?", "answer": "5"}\n')
    (tmp_path / "shards" / "README.md").write_text("-")
    code = tmp_path / "code.json"
    code.write_text(json.dumps([{"question": "Add.", "test_list": ["assert add(1, 2) == 3"]}]))
    everything = {row["prompt"]: row["answer"] for row in ROWS}
    assert answers(opened("~/shards")) == everything
    assert opened("~/shards").name == "shards"
    assert answers(opened("~/shards/train-*.jsonl")) == everything
    assert answers(opened("~/shards", split="test")) == {"5?": "5"}
    assert [p.answer for p in opened("~/shards", eval_split="test").heldout] == ["5"]
    assert [
        p.answer for p in opened("~/shards", eval_path=["~/shards/test-00000.jsonl"]).heldout
    ] == ["5"]
    with pytest.raises(
        ValueError,
        match=(
            r"data\.split='validation' is no split of '.*shards', which has test, train; name one"
        ),
    ):
        opened("~/shards", split="validation")
    mixed = opened(["~/shards", "~/code.json"])
    assert mixed.size == 5
    assert {p.source for p in map(mixed.train, range(5))} == {"shards", "code"}
    assert "tests test_list" in " ".join(mixed.notes)
    twice = opened(
        [str(tmp_path / "shards/train-00000.jsonl"), str(tmp_path / "shards/train-00001.jsonl")],
        name="x",
    )
    assert len({twice.train(i).id for i in range(2)}) == 2


@pytest.mark.slow
def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    assert answers(opened(str(tmp_path / "one"))) == {row["prompt"]: row["answer"] for row in ROWS}
    datasets.DatasetDict(train=rows, test=rows.select([2])).save_to_disk(tmp_path / "two")
    source = opened(str(tmp_path / "two"), eval_split="test")
    assert (source.size, [p.answer for p in source.heldout]) == (3, ["2"])
    with pytest.raises(
        ValueError,
        match=r"data\.split='dev' is no split of '.*two', which has train, test; name one",
    ):
        opened(str(tmp_path / "two"), split="dev")


TURNS = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "6*7?"},
    {"from": "gpt", "value": "\\boxed{42}"},
]


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"conversations": TURNS}, "6*7?", "42"),
        ({"conversations": TURNS, "answer": 41}, "6*7?", "41"),
        (
            {
                "messages": [{"role": "user", "content": [{"type": "text", "text": "6*7?"}]}],
                "answer": "42",
            },
            "6*7?",
            "42",
        ),
        (
            {"prompt": json.dumps([{"role": "user", "content": "6*7?"}]), "answer": "42"},
            "6*7?",
            "42",
        ),
        ({"prompt": str([{"role": "user", "content": "6*7?"}]), "answer": "42"}, "6*7?", "42"),
        ({"prompt": "[1, 2] has how many?", "answer": "2"}, "[1, 2] has how many?", "2"),
        ({"prompt": "a", "answer": 1234567890123456789012}, "a", "1234567890123456789012"),
        ({"prompt": "a", "answer": 0.1}, "a", "0.1"),
        ({"prompt": "a", "answer": 7.0}, "a", "7.0"),
        ({"prompt": "a", "answer": "007"}, "a", "007"),
        ({"prompt": "a", "answer": ["5"]}, "a", "5"),
        ({"prompt": "a", "answer": ["5", "-5"]}, "a", '["5", "-5"]'),
        ({"prompt": "a", "extra_info": {"answer": 3}}, "a", "3"),
        (
            {"prompt": "a", "reward_model": {"ground_truth": {"target": ["Paris", "paris"]}}},
            "a",
            '["Paris", "paris"]',
        ),
        ({"task": "a", "verification_info": '{"ground_truth": "5"}'}, "a", "5"),
        ({"Question": "Is it?", "Answer": True}, "Is it?\n\nAnswer yes or no.", "yes"),
        (
            {"Body": "Tom has 3.", "Question": "How many?", "Answer": 3.0},
            "Tom has 3.\n\nHow many?",
            "3.0",
        ),
        ({"body": "A.", "question": "B?", "answer": "9 (apples)"}, "A.\n\nB?", "9"),
        ({"question": "Q?", "choices": ["x", "y"], "answer": 1}, "Q?\n\nA. x\nB. y", "B"),
        ({"question": "Q?", "options": ["A)x", "B)y"], "correct": "B"}, "Q?\n\nA)x\nB)y", "B"),
        (
            {
                "question": "Q?",
                "choices": {"text": ["x", "y"], "label": ["1", "2"]},
                "answerKey": "2",
            },
            "Q?\n\n1. x\n2. y",
            "2",
        ),
        (
            {"question": "Q?", "options": {"A": "x", "B": "y"}, "answer": "y"},
            "Q?\n\nA. x\nB. y",
            "B",
        ),
        (
            {"question": "Q?", "opa": "x", "opb": "y", "opc": "z", "opd": "w", "cop": 2},
            "Q?\n\nA. x\nB. y\nC. z\nD. w",
            "C",
        ),
        ({"question": "Q? A. x B. y", "options": ["x", "y"], "answer": "B"}, "Q? A. x B. y", "B"),
        ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, "Add.\n\n1 and 2", "3"),
        (
            {"query": "Q", "response": "Some words that lead to it. So the answer is: $6$."},
            "Q",
            "6",
        ),
    ],
)
def test_rows_as_problems(row: dict[str, Any], prompt: str, answer: str, tmp_path: Path) -> None:
    assert one(tmp_path, row) == (prompt, answer)


def test_explicit_keys_come_before_the_layout(tmp_path: Path) -> None:
    row = {
        "problem": "P",
        "question": "Q",
        "answer": "#### 1",
        "solution": "2",
        "cases": '{"inputs": ["1"], "outputs": ["1"]}',
    }
    assert one(tmp_path, row) == ("P", "1")
    assert one(tmp_path, row, prompt_column="question", answer_column="answer") == ("Q", "#### 1")
    assert one(tmp_path, row, prompt_template="{question}: {solution}") == ("Q: 2", "1")
    assert one(tmp_path, row, answer_column="") == ("P", "")
    path = tmp_path / "row.jsonl"
    assert opened(str(path), tests_column="cases").train(0).columns["tests"] == row["cases"]


def test_a_mapping_reaches_a_function_as_it_is(tmp_path: Path) -> None:
    truth = {"target": 98, "numbers": [44, 19, 35]}
    row = {
        "prompt": [{"role": "user", "content": "?"}],
        "reward_model": {"ground_truth": truth, "style": "rule"},
    }
    for name, write in (
        ("a.jsonl", lambda p: p.write_text(json.dumps(row))),
        ("a.parquet", lambda p: parquet.write_table(pyarrow.Table.from_pylist([row]), p)),
    ):
        write(tmp_path / name)
        prompt = opened(str(tmp_path / name)).train(0)
        assert prompt.columns["reward_model"]["ground_truth"] == truth
        assert prompt.answer == "98"


def test_the_assistant_s_last_words_are_no_part_of_the_prompt() -> None:
    turns = read_messages(TURNS)
    assert not isinstance(turns, str)
    asked, reply = split_off_reply(turns)
    assert [turn["role"] for turn in asked] == ["system", "user"]
    assert reply == "\\boxed{42}"
    with pytest.raises(ValueError, match="parts of image; only text"):
        read_messages([{"role": "user", "content": [{"type": "image", "image": "x"}]}])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("72", "72"),
        ("He has 3.\n#### 1,200", "1,200"),
        ("So \\boxed{\\frac{1}{2}} it is.", "\\frac{1}{2}"),
        ("Either \\boxed{1} or \\boxed{2}.", "Either \\boxed{1} or \\boxed{2}."),
        ("Broken \\boxed{1", "Broken \\boxed{1"),
        ("The capital of the country in question is well known.\nThe answer is: Paris.", "Paris"),
        ("the answer is short", "the answer is short"),
    ],
)
def test_final_answers(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_bad_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    bad = [{"prompt": "x", "answer": None}, {"prompt": "", "answer": "1"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, *bad]))
    source = opened(str(path))
    assert source.size == 4
    assert (
        f"2 of 6 rows of {path} left out: data.source='{path}', row 5: no answer in the column"
        " 'answer'" in source.notes[1]
    )
    with pytest.raises(ValueError, match=r"row 5: no answer .* set data\.drop=bad"):
        opened(str(path), drop="none")


def write_repeated(path: Path, rows: int, distinct: int) -> None:
    made = [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": f"no. {i % distinct}"}],
            "reward_model": {"ground_truth": str(i % distinct), "style": "rule"},
            "extra_info": {"index": str(i)},
        }
        for i in range(rows)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(made), path, row_group_size=100)


def test_large_tables_are_folded_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepared, "CACHED_BYTES", 1)
    file = tmp_path / "rows.parquet"
    write_repeated(file, 500, 20)
    first = opened(str(file))
    assert first.size == 20
    assert f"500 rows of {file} hold 20 problems; each counts once" in first.notes
    folder = tmp_path / "cache" / "emberl" / "data"
    kept = sorted(path.name for path in folder.iterdir())
    assert [Path(name).suffix for name in kept] == [".arrow", ".json"]
    monkeypatch.setattr(prepared._Fold, "parts", lambda self: pytest.fail("read anew"))
    again = TableSource(DataConfig(source=str(file), heldout=0), CHAT, 0)
    assert again.notes == first.notes
    assert [again.train(i) for i in range(40)] == [first.train(i) for i in range(40)]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepared, "CACHED_BYTES", 1)
    write_repeated(file, 500, 21)  # other content under the same name
    assert opened(str(file)).size == 21
    for path in folder.iterdir():
        path.write_bytes(b"broken")
    assert opened(str(file)).size == 21
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert opened(str(file)).size == 21


@pytest.mark.slow
def test_two_processes_prepare_the_same_table(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    write_repeated(file, 20_000, 5_000)
    code = (
        "import sys; from emberl.rl.config.data import DataConfig; from emberl.rl.config.tiny import"
        " TinyConfig; from emberl.rl.data import prepared; from emberl.rl.data.table import TableSource; from emberl.rl.data.tiny"
        " import tiny_tokenizer;prepared.CACHED_BYTES = 1; t ="
        " tiny_tokenizer(TinyConfig(vocabulary='bytes'));s ="
        " TableSource(DataConfig(source=sys.argv[1], heldout=0), t, 0); print(s.size,"
        " s.train(7).answer)"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(file)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [run.communicate(timeout=300)[0] for run in runs]
    assert said[0] == said[1]
    assert said[0].startswith("5000 ")
    assert sorted(path.suffix for path in (tmp_path / "cache/emberl/data").iterdir()) == [
        ".arrow",
        ".json",
    ]


def test_a_table_is_read_in_pieces(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(LINES * 5)
    assert [len(piece) for piece in pieces(file, 8)] == [8, 8, 4]
    write_repeated(tmp_path / "rows.parquet", 250, 10)
    assert max(len(piece) for piece in pieces(tmp_path / "rows.parquet", 64)) <= 64


TEMPLATE = "Add.\n{question} {hint}"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "2+2=?", "hint": "even"}, "Add.\n2+2=? even"),
        ({"question": "2+2=?", "hint": None}, "Add.\n2+2=? "),
        ({"question": "2+2=?", "hint": float("nan")}, "Add.\n2+2=? "),
        ({"question": "2+2=?", "hint": ""}, "Add.\n2+2=? "),
        ({"question": "2+2=?", "hint": 0}, "Add.\n2+2=? 0"),
        ({"question": "2+2=?", "hint": [1, 2]}, "Add.\n2+2=? [1, 2]"),
    ],
)
def test_what_a_template_makes_of_a_column(tmp_path: Path, row: Any, prompt: str) -> None:
    options = {"prompt_template": TEMPLATE, "answer_column": "answer"}
    assert one(tmp_path, {**row, "answer": "4"}, **options) == (prompt, "4")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"question": None, "hint": None}, "the columns question, hint of the template are empty"),
        ({"question": " ", "hint": ""}, "the columns question, hint of the template are empty"),
        (
            {"question": {"text": "2+2", "id": 3}, "hint": ""},
            "the column 'question' of the template holds a mapping of text, id; name one of these",
        ),
    ],
)
def test_a_template_s_columns_must_say_something(tmp_path: Path, row: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        one(
            tmp_path,
            {**row, "answer": "4"},
            prompt_template=TEMPLATE,
            answer_column="answer",
            drop="none",
        )


@pytest.mark.parametrize(
    ("role", "near"), [("usr", "user"), ("assitant", "assistant"), ("Sytem", "system")]
)
def test_a_slip_in_a_role_is_seen(role: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"role '{role.lower()}'; is '{near}' meant"):
        read_messages([{"role": role, "content": "2+2=?"}])


@pytest.mark.parametrize("role", ["tool", "Developer", "human", "context", "environment"])
def test_roles_that_some_templates_know(role: str) -> None:
    assert read_messages([{"role": role, "content": "x"}])


@pytest.mark.parametrize("answer", [float("nan"), None, "", [], {}, {"value": None}])
def test_no_answer(tmp_path: Path, answer: Any) -> None:
    with pytest.raises(ValueError, match="no answer in the column 'answer'"):
        one(tmp_path, {"prompt": "2+2=?", "answer": answer}, drop="none")


def test_half_a_surrogate_pair_costs_no_row(tmp_path: Path) -> None:
    """JSON can hold one; a whole pair is the character that it is."""
    for name, text in {
        "a.jsonl": '{"problem": "x \\ud83d", "answer": ["\\uDE00"]}\n{"problem": "\\ud83d\\ude00"}\n',
        "a.json": '[{"problem": "x \\ud83d", "answer": ["\\uDE00"]}, {"problem": "\\ud83d\\ude00"}]',
    }.items():
        (tmp_path / name).write_text(text)
        rows = [row for piece in pieces(tmp_path / name) for row in piece]
        assert rows == [{"problem": "x \ufffd", "answer": ["\ufffd"]}, {"problem": "\U0001f600"}]


def test_without_a_way_to_the_hub_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with pytest.raises(ValueError, match=r"'who/knows' cannot be loaded from the Hub .*Offline"):
        train_tables(DataConfig(source="who/knows"))
    assert constants.HF_HUB_OFFLINE, "its clients are not to try again"
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    within_reach.cache_clear()
    assert within_reach("http://127.0.0.1:9"), "a proxy may know the way"
    within_reach.cache_clear()
