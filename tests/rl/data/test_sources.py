"""Data sets as prompts: layouts, the held-out side, the order, and one clear error for each bad
input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from emberl.rewards.suite import build_suite
from emberl.rl.answers import reward_input
from emberl.rl.config.data import DataConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.columns import fill
from emberl.rl.data.sources import PromptSource, check_data, open_source
from emberl.rl.data.tiny import tiny_tokenizer

CHAT = tiny_tokenizer(TinyConfig(vocabulary="bytes", chat_template=True))
PLAIN = tiny_tokenizer(TinyConfig(vocabulary="bytes"))
GSM8K = Path(__file__).parents[4] / "shared" / "data" / "gsm8k"

GSM8K_ROWS = [
    {
        "question": "Tom has 3 pens and buys 4. How many?",
        "answer": "He has 3+4=<<3+4=7>>7.\n#### 7",
    },
    {"question": "A box holds 1,200. How many in 2?", "answer": "2*1200 #### done\n#### 2,400"},
    {"question": "What is 5-5?", "answer": "Nothing.\n#### 0"},
]
GSM8K_MAPPING = {
    "prompt_column": "question",
    "answer_column": "answer",
    "answer_pattern": r"#### (.+)",
    "solution_column": "answer",
}


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(n: int) -> list[dict[str, str]]:
    return [{"prompt": f"{i}+0=?", "answer": str(i)} for i in range(n)]


def opened(source: str, tokenizer: Any = PLAIN, seed: int = 0, **options: Any) -> PromptSource:
    config = DataConfig(source=source, **{"heldout": 0, **options})
    if not config.source.startswith("reasoning_gym"):
        check_data(config)
    return open_source(config, tokenizer, seed)


def questions(source: PromptSource, n: int) -> list[str]:
    return [source.train(i).messages[-1]["content"] for i in range(n)]


def test_gsm8k_layout(tmp_path: Path) -> None:
    file = write(tmp_path / "gsm.jsonl", GSM8K_ROWS)
    source = opened(
        file,
        CHAT,
        prompt_template="{question}\nAnswer in \\boxed{}.",
        system_prompt="Think.",
        **GSM8K_MAPPING,
    )
    prompts = {p.answer: p for p in map(source.train, range(3))}
    assert set(prompts) == {"7", "2,400", "0"}
    prompt = prompts["7"]
    text = (
        "system: Think.\nuser: Tom has 3 pens and buys 4. How many?\nAnswer in"
        " \\boxed{}.\nassistant: "
    )
    assert CHAT.decode(prompt.token_ids) == text
    assert (prompt.source, prompt.id, prompt.columns) == ("gsm", "gsm/0", GSM8K_ROWS[0])
    assert source.solution(prompt) == GSM8K_ROWS[0]["answer"]
    assert (source.size, source.heldout, source.name) == (3, [], "gsm")


def test_a_solution_is_put_into_its_template(tmp_path: Path) -> None:
    file = write(tmp_path / "gsm.jsonl", GSM8K_ROWS[2:])
    source = opened(file, solution_template="<think>{solution}</think>{answer}", **GSM8K_MAPPING)
    assert source.solution(source.train(0)) == "<think>Nothing.\n#### 0</think>0"
    assert (
        opened(file, **(GSM8K_MAPPING | {"solution_column": None})).solution(source.train(0))
        is None
    )


VERL_ROW = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6*7?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"split": "train", "index": 0, "answer": "6*7=42", "question": "6*7?"},
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_verl_layout_needs_no_mapping(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"verl{suffix}"
    if suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(sys.modules["pyarrow"].Table.from_pylist([VERL_ROW]), path)
    else:
        path.write_text(json.dumps([VERL_ROW] if suffix == ".json" else VERL_ROW))
    source = opened(
        str(path), CHAT, solution_column="extra_info.answer", system_prompt="has one already"
    )
    prompt = source.train(0)
    assert CHAT.decode(prompt.token_ids) == "system: Be brief.\nuser: 6*7?\nassistant: "
    assert (prompt.answer, prompt.source, source.name) == ("42", "openai/gsm8k", "verl")
    assert prompt.columns == VERL_ROW
    assert source.solution(prompt) == "6*7=42"
    assert opened(str(path), CHAT, name="mine").train(0).source == "mine"


def test_answers_of_other_types_become_text(tmp_path: Path) -> None:
    rows = [
        {"prompt": str(i), "answer": value}
        for i, value in enumerate([72, 0.5, ["a", 1], {"tests": [2]}, " x "])
    ]
    source = opened(write(tmp_path / "a.jsonl", rows))
    answers = {p.messages[0]["content"]: p.answer for p in map(source.train, range(5))}
    assert [answers[str(i)] for i in range(5)] == ["72", "0.5", '["a", 1]', '{"tests": [2]}', "x"]
    assert (
        opened(write(tmp_path / "b.jsonl", [{"prompt": "hi"}]), answer_column="").train(0).answer
        == ""
    )


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{q}?", "7?"),
        ("\\boxed{} {q}", "\\boxed{} 7"),
        ("{{q}} {q}", "{q} 7"),
        ("{a.b} { q }", "8 { q }"),
        ("f(x)={x in R: {q}}", "f(x)={x in R: 7}"),
    ],
)
def test_templates(template: str, text: str) -> None:
    assert fill(template, {"q": 7, "a": {"b": 8}}) == text


def test_each_epoch_is_all_rows_in_an_order_of_its_own(tmp_path: Path) -> None:
    file = write(tmp_path / "n.jsonl", numbered(50))
    source = opened(file, seed=3)
    seen = questions(source, 150)
    epochs = [seen[:50], seen[50:100], seen[100:]]
    assert [sorted(epoch) for epoch in epochs] == [
        sorted(row["prompt"] for row in numbered(50))
    ] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert len({source.train(i).id for i in range(150)}) == 150
    assert source.train(7).id == f"n/{source.train(7).answer}"
    again = opened(file, seed=3)
    assert [again.train(i).answer for i in (149, 0, 60)] == [
        source.train(i).answer for i in (149, 0, 60)
    ]
    assert questions(opened(file, seed=4), 50) != epochs[0]


def test_held_out_rows_are_the_same_for_every_seed_and_never_trained_on(tmp_path: Path) -> None:
    rows = numbered(60)
    # half of the problems stand there twice
    file = write(tmp_path / "n.jsonl", [*rows, *rows[:30]])
    sources = [opened(file, seed=s, heldout=20) for s in (0, 1)]
    heldout = [p.messages[0]["content"] for p in sources[0].heldout]
    assert sources[0].heldout == sources[1].heldout
    assert len(set(heldout)) == 20
    for source in sources:
        assert source.size is not None
        assert not set(questions(source, source.size)) & set(heldout)
    assert sources[0].size == 60 - 20
    assert sources[0].notes[1:] == (f"90 rows of {file} hold 60 problems; each counts once",)


def test_more_rows_move_few_held_out_problems(tmp_path: Path) -> None:
    """Chosen by the smallest hashes, so a data set that grows keeps nearly all of its held-out
    set."""
    sets = []
    for n in (1000, 1010):
        source = opened(write(tmp_path / f"{n}.jsonl", numbered(n)), heldout=100)
        sets.append({p.answer for p in source.heldout})
    assert len(sets[0] & sets[1]) >= 95


def test_an_evaluation_file_is_taken_out_of_training(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", numbered(10))
    leak = [{"prompt": " 3+0=? ", "answer": "3"}, {"prompt": "9+9=?", "answer": "18"}]
    source = opened(train, eval_path=write(tmp_path / "test.jsonl", leak), heldout=512)
    assert [p.answer for p in source.heldout] == ["3", "18"]
    assert sorted(p.answer for p in map(source.train, range(9))) == [
        "0",
        "1",
        "2",
        "4",
        "5",
        "6",
        "7",
        "8",
        "9",
    ]
    assert source.size == 9
    assert source.notes[2:] == (
        f"1 rows of {train} left out of training: they are held-out problems too",
    )


def test_overlong_prompts_are_an_error_or_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * n, "answer": "1"} for n in (3, 9, 4, 8, 5)]
    file = write(tmp_path / "long.jsonl", rows)
    message = (
        r"long\.jsonl', row 2: the prompt has 9 tokens, more than data\.max_prompt_length=8; raise"
        r" it, or set "
        r"data\.overlong=drop$"
    )
    with pytest.raises(ValueError, match=message):
        opened(file, max_prompt_length=8)
    source = opened(file, max_prompt_length=8, overlong="drop")
    assert sorted(map(len, questions(source, 4))) == [3, 4, 5, 8]
    assert source.notes[1:] == (f"1 of 5 rows of {file} dropped: more than 8 tokens",)
    with pytest.raises(ValueError, match="none is left to train on"):
        opened(file, max_prompt_length=2, overlong="drop")


def test_rows_that_cannot_be_graded_are_left_out(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "rows.jsonl", numbered(5)))
    bad = {source.train(i).id for i in range(5) if source.train(i).answer in ("1", "3")}
    source.leave_out(bad)
    assert source.size == 3
    assert sorted(source.train(i).answer for i in range(3)) == ["0", "2", "4"]


ROWS = [{"question": "1+1=?", "answer": "2"}, {"question": "1+2=?", "answer": ""}]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("d.jsonl", None, {}, r"data\.source='.*d\.jsonl' does not exist; '.*' has near\.jsonl"),
        ("nowhere/d.jsonl", None, {}, r"data\.source='.*' does not exist; nor does its folder"),
        ("d.jsonl", [], {}, r"data\.source='.*' has no rows"),
        ("d.csv", "a,b", {}, r"data\.source='.*' has no rows"),
        ("d.csv", "prompt,answer\na,b,c", {}, r"line 2 has more values than the header has names"),
        (
            "d.md",
            "a,b",
            {},
            r"data\.source='.*d\.md' is of no known format; it must end in \.parquet, \.arrow",
        ),
        ("d*.jsonl", None, {}, r"data\.source='.*' matches no file"),
        ("d.jsonl", b"\xff\xfe{\x00", {}, r"data\.source='.*': it is not UTF-8"),
        ("d.jsonl", '{"prompt": 1}\n{"prompt"', {}, r"data\.source='.*': line 2 is not JSON"),
        ("d.jsonl", '{"prompt": 1}\n7', {}, r"line 2 must be an object"),
        ("d.json", '[{"prompt": "a"},\n{]', {}, r"line 2 is not JSON .*; correct or remove it"),
        (
            "d.json",
            '{"prompt": "a"}',
            {},
            r"no column is known to be the answer, there is only prompt; set data\.answer",
        ),
        ("d.json", '["a", "b"]', {}, r"line 1 must be an object"),
        ("d.parquet", "no parquet", {}, r"it is no readable Parquet file"),
        (
            "d.jsonl",
            [{"a": "x", "b": {"c": 1}}],
            {},
            (
                r"no column is known to be the prompt, there is only a, b \(c\); set"
                r" data\.prompt_column"
            ),
        ),
        (
            "d.jsonl",
            ROWS,
            {"prompt_column": "qestion"},
            r"data\.prompt_column='qestion'.*; did you mean question\?",
        ),
        (
            "d.jsonl",
            ROWS,
            {"prompt_column": "question", "answer_column": "anser"},
            r"data\.answer_column='anser'.*only question, answer; did you mean answer\?",
        ),
        (
            "d.jsonl",
            [{"prompt": "a", "reward_model": {"ground_trut": "1"}}],
            {"answer_column": "reward_model.ground_truth"},
            (
                r"data\.answer_column='reward_model\.ground_truth'.*only ground_trut; did you mean"
                r" ground_trut\?"
            ),
        ),
        (
            "d.jsonl",
            ROWS,
            {"prompt_template": "{questions}"},
            r"data\.prompt_template='questions'.*did you mean question\?",
        ),
        (
            "d.jsonl",
            ROWS,
            {"prompt_template": "{question} {answer}"},
            r"prompt_template shows the model \{answer\}",
        ),
        (
            "d.jsonl",
            ROWS,
            {"prompt_column": "question", "solution_column": "cot"},
            r"data\.solution_column='cot'",
        ),
        (
            "d.jsonl",
            ROWS,
            {"prompt_column": "question", "drop": "none"},
            (
                r"row 2: no answer in the column 'answer' \(data\.answer_column\); .* or set"
                r" data\.drop=bad"
            ),
        ),
        ("d.jsonl", [{"prompt": "a", "answer": None}], {}, r"row 1: no answer"),
        ("d.jsonl", [{"prompt": "a", "answer": " "}], {}, r"row 1: no answer"),
        (
            "d.jsonl",
            [{"prompt": "a", "answer": "1"}, {"prompt": "b"}],
            {"drop": "none"},
            r"row 2: no answer in the column",
        ),
        (
            "d.jsonl",
            [{"prompt": "a", "answer": "1"}, {"prompt": "b"}, {"prompt": "c"}],
            {},
            r"2 of 3 rows have no prompt or no answer; is it the right layout\? .*row 2: no answer",
        ),
        (
            "d.jsonl",
            ROWS,
            {"layout": "openr1"},
            r"data\.layout=openr1 needs the columns problem, answer, generations",
        ),
        (
            "d.jsonl",
            [{"prompt": " ", "answer": "1"}],
            {},
            r"row 1: the column 'prompt' \(data\.prompt_column\) is empty",
        ),
        (
            "d.jsonl",
            [{"prompt": 5, "answer": "1"}],
            {},
            r"row 1: .* must be text or a list of messages .* got 5",
        ),
        (
            "d.jsonl",
            [{"prompt": [{"role": "user"}], "answer": "1"}],
            {},
            r"row 1: .* list of messages with role and content",
        ),
        (
            "d.jsonl",
            [{"prompt": "a", "answer": "x 7"}],
            {"answer_pattern": "#### (.+)"},
            r"answer_pattern='.*' finds nothing",
        ),
        (
            "d.jsonl",
            [{"prompt": "a", "answer": "1"}],
            {"eval_path": "gone.jsonl"},
            r"data\.eval_path='gone\.jsonl' does not",
        ),
        (
            "d.jsonl",
            [{"prompt": "a", "answer": "1"}],
            {"eval_split": "test"},
            r"data\.eval_split='test' needs a Hub data set",
        ),
    ],
)
def test_bad_data_is_one_clear_error_before_a_tokenizer_is_needed(
    tmp_path: Path, name: str, content: Any, options: dict[str, Any], message: str
) -> None:
    write(tmp_path / "near.jsonl", [])
    if content is not None:
        path = tmp_path / name
        if isinstance(content, list):
            write(path, content)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message) as caught:
        check_data(DataConfig(source=str(tmp_path / name), **options))
    assert "\n" not in str(caught.value)


def test_holding_out_everything_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "n.jsonl", numbered(5) * 2)
    with pytest.raises(
        ValueError, match=r"data\.heldout=5 leaves nothing to train on of the 5 problems"
    ):
        opened(file, heldout=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer_pattern": "("}, r"data\.answer_pattern is no regular expression"),
        ({"answer_pattern": "#### .+"}, r"data\.answer_pattern needs a group"),
        (
            {"eval_path": "a.jsonl", "eval_split": "test"},
            r"set data\.eval_path .* or data\.eval_split .* not both",
        ),
        ({"prompt_colum": "q"}, r"prompt_colum"),
        ({"layout": "gsm8"}, r"data\.layout is auto or one of .*; did you mean gsm8k\?"),
        ({"bad_references": "drop"}, r"data\.bad_references is data\.drop now"),
    ],
)
def test_bad_settings_name_their_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(source="a/b", **options)


@pytest.mark.parametrize("source", ["arithmatic", "gsm8k", "two words/x"])
def test_an_unknown_source_says_what_there_is(source: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.source='{source}' is neither arithmetic, a file"):
        check_data(DataConfig(source=source))
    if source == "arithmatic":
        with pytest.raises(ValueError, match=r"did you mean arithmetic\?"):
            check_data(DataConfig(source=source))


def test_negative_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="seed=-1 must be 0 or more"):
        open_source(DataConfig(source="arithmetic", heldout=0), PLAIN, seed=-1)


@pytest.mark.slow
def test_a_hub_data_set_with_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local directory in the Hub's layout goes through the same loader as an id of the Hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    write(folder / "train.jsonl", GSM8K_ROWS)
    write(folder / "test.jsonl", [GSM8K_ROWS[1], {"question": "1+1?", "answer": "#### 2"}])
    source = opened(str(folder), CHAT, eval_split="test", **GSM8K_MAPPING)
    assert (source.name, source.size) == ("gsm8k", 2)
    assert [p.answer for p in source.heldout] == ["2,400", "2"]
    assert {source.train(0).answer, source.train(1).answer} == {"7", "0"}
    assert source.train(0).columns in (GSM8K_ROWS[0], GSM8K_ROWS[2])
    with pytest.raises(ValueError, match=r"data\.eval_split='tset' is no split of"):
        opened(str(folder), CHAT, eval_split="tset", **GSM8K_MAPPING)
    with pytest.raises(ValueError, match=r"data\.prompt_column='text'.*only question, answer"):
        opened(str(folder), CHAT, prompt_column="text")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(path: str, name: str | None, split: str, revision: str) -> None:
        assert (path, name, split, revision) == ("openai/gsm8k", "main", "train", "v1")
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError,
        match=r"data\.source='openai/gsm8k' cannot be loaded .*no route to host.* give a file",
    ):
        opened("openai/gsm8k", subset="main", revision="v1")


@pytest.mark.skipif(find_spec("reasoning_gym") is not None, reason="reasoning-gym is installed")
def test_a_missing_extra_is_named() -> None:
    with pytest.raises(
        ValueError,
        match=r"reasoning_gym:chain_sum' needs reasoning-gym: pip install 'emberl\[gym\]'",
    ):
        check_data(DataConfig(source="reasoning_gym:chain_sum"))


@pytest.mark.skipif(
    find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed (emberl[gym])"
)
class TestReasoningGym:
    def test_prompts(self) -> None:
        import reasoning_gym

        source = opened(
            "reasoning_gym:chain_sum",
            CHAT,
            heldout=50,
            gym={"max_terms": 3},
            system_prompt="Digits only.",
        )
        prompts = [source.train(i) for i in range(300)]
        assert len({p.columns["question"] for p in prompts}) > 290
        for prompt in [*prompts, *source.heldout]:
            expression = prompt.columns["metadata"]["expression"]
            assert prompt.answer == str(eval(expression))
            assert prompt.messages == (
                {"role": "system", "content": "Digits only."},
                {"role": "user", "content": prompt.columns["question"]},
            )
            scorer = reasoning_gym.get_score_answer_fn(prompt.columns["metadata"]["source_dataset"])
            assert scorer(prompt.answer, prompt.columns) == 1.0
        assert (source.name, source.size, prompts[5].id) == ("chain_sum", None, "chain_sum/5")

    def test_position_seed_and_held_out_side(self) -> None:
        sources = [opened("reasoning_gym:chain_sum", seed=s, heldout=40) for s in (0, 0, 1)]
        runs = [[s.train(i).columns["question"] for i in (600, 3, 255, 256)] for s in sources]
        assert runs[0] == runs[1] != runs[2]
        assert sources[0].heldout == sources[2].heldout
        heldout = {p.columns["question"] for p in sources[0].heldout}
        assert len(heldout) == 40
        assert not heldout & {s.train(i).columns["question"] for s in sources for i in range(400)}

    def test_levels_rise_at_measured_success(self) -> None:
        """Answers are marked by the task's own scorer; 12 of 16 right is 75 %."""
        levels = [{"gym": {"max_terms": 1}}, {"gym": {"min_terms": 2, "max_terms": 2}}]
        source: Any = opened(
            "reasoning_gym:chain_sum",
            CHAT,
            heldout=4,
            gym={"min_terms": 1, "min_digits": 1, "max_digits": 1},
            levels=levels,
            curriculum={"raise_at": 0.75, "raise_after": 16},
        )
        suite = build_suite({"answer": {"use": "gym"}})

        def step(number: int, right: int) -> tuple[set[int], float]:
            """The terms of the problems of a step, and the level after it."""
            prompts = [source.train(16 * number + i) for i in range(16)]
            answers = [p.answer if i < right else "no" for i, p in enumerate(prompts)]
            rows = [
                replace(reward_input(p, None, ""), completion=f"<answer>{a}</answer>")
                for p, a in zip(prompts, answers, strict=True)
            ]
            marks = [[verdict] for verdict in suite.grade(rows)]
            graded = list(zip(prompts, marks, strict=True))
            found = source.observe(graded, number + 1, 16 * (number + 1), [])
            terms = {len(p.columns["metadata"]["expression"].split()) // 2 + 1 for p in prompts}
            return terms, found["sched/level/chain_sum"]

        try:
            assert step(0, right=11) == ({1}, 0)
            assert step(1, right=12) == ({1}, 1)
            assert step(2, right=16) == ({2}, 1), "the last level stays"
        finally:
            suite.close()
        assert {len(p.columns["metadata"]["expression"].split()) for p in source.heldout} == {3}

    def test_a_task_laid_out_in_advance(self) -> None:
        source = opened("reasoning_gym:gsm_symbolic", heldout=8, max_prompt_length=4096)
        assert len({source.train(i).columns["question"] for i in range(520)}) > 500

    @pytest.mark.parametrize(
        ("task", "gym", "message"),
        [
            ("chain_sun", {}, r"has no task 'chain_sun'; did you mean chain_sum"),
            (
                "chain_sum",
                {"min_term": 1},
                r"data\.gym=\{'min_term': 1\} does not suit the task chain_sum: .*min_term",
            ),
            (
                "chain_sum",
                {"min_terms": -1},
                r"data\.gym=\{'min_terms': -1\} does not suit the task chain_sum",
            ),
        ],
    )
    def test_errors(self, task: str, gym: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            check_data(DataConfig(source=f"reasoning_gym:{task}", gym=gym))


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"{GSM8K} is absent")
def test_gsm8k_itself() -> None:
    mapping = GSM8K_MAPPING | {"eval_path": str(GSM8K / "test.jsonl"), "name": "gsm8k"}
    source = opened(str(GSM8K / "train.jsonl"), CHAT, overlong="drop", **mapping)
    assert (source.size, len(source.heldout)) == (7473, 1319)
    natalia = next(p for p in map(source.train, range(7473)) if p.id == "gsm8k/0")
    assert natalia.answer == "72"
    assert natalia.messages[0]["content"].startswith("Natalia sold clips to 48 of her friends")


def test_settings_and_their_check_load_no_heavy_library() -> None:
    code = (
        "import sys, emberl.rl.config.data as s, emberl.rl.data.sources as"
        " p\np.check_data(s.DataConfig(source='arithmetic'))\nprint([m for m in ('torch',"
        " 'transformers', 'datasets', 'pyarrow', 'ray') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
