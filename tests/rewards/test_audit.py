"""The audit's figures on rows counted by hand, its report, and bad files."""

import gzip
import json
from collections.abc import Sequence

import pytest
from emberl.rewards.audit.audit import audit, audit_reward, read_rows, to_html, to_text
from emberl.rewards.inputs import RewardInput
from emberl.rewards.verdict import Status, Verdict, verifier_error

ROWS = [
    {"id": "a", "source": "s", "gold": "5", "pred": "\\boxed{5}", "label": True},
    {"id": "b", "source": "s", "gold": "5", "pred": "\\boxed{4}", "label": False},
    {"id": "c", "source": "t", "gold": "5", "pred": "\\boxed{<script>}", "label": True},
    {"id": "d", "source": "t", "gold": "5", "pred": "\\boxed{5.0}", "label": False},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    return path


def test_figures(file, tmp_path) -> None:
    found = audit("math", file, html_path=tmp_path / "report.html")
    figures = found.figures
    assert (figures["rows"], figures["labelled"], figures["agreement"]) == (4, 4, 0.5)
    assert (figures["accepted_of_right"], figures["accepted_of_wrong"]) == (0.5, 0.5)
    assert (figures["false_accepts"], figures["false_rejects"]) == (1, 1)
    assert figures["sources"]["s"]["agreement"] == 1.0
    assert figures["statuses"] == {"correct": 2, "wrong": 2}
    assert figures["hacks"]["paid"] == []
    assert [(d.row.id, d.kind) for d in found.disagreements] == [
        ("c", "false reject"),
        ("d", "false accept"),
    ]
    report = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt;" in report
    assert "<script" not in report
    assert "false accepts 1, false rejects 1" in to_text(found)
    assert json.loads(json.dumps(figures)) == figures


def test_a_second_grader_without_labels() -> None:
    def says(*scores: float | None):
        def grade(batch: Sequence[RewardInput]) -> list[Verdict]:
            return [
                verifier_error("gone") if s is None else Verdict(status=Status.PARTIAL, score=s)
                for s in scores[: len(batch)]
            ]

        return grade

    rows = [r.__class__(id=r.id, input=r.input, label=None) for r in _rows(3)]
    found = audit_reward(says(1, 0.6, None), rows, second=says(1, 0, 1), hacks=False)
    assert found.figures["second"] == {
        "agreement": 1 / 3,
        "only_first_accepts": 1,
        "only_second_accepts": 1,
    }
    assert [d.kind for d in found.disagreements] == ["only the first accepts", "no verdict"]
    assert found.figures["errors"] == {"gone": 1}
    assert found.figures["labelled"] == 0
    assert "no verdict, 1 x: gone" in to_text(found)
    assert "only the first accepts" in to_html(found)


def test_an_audit_without_rows_says_where_they_come_from() -> None:
    first, second = to_text(audit("math", None)).splitlines()
    assert first == "math without rows: --data FILE has graded pairs or recorded completions"
    assert second.startswith("  hacks paid: 0 of ")


def _rows(count: int):
    from emberl.rewards.audit.audit import Row

    return [Row(id=str(i), input=RewardInput(completion=str(i)), label=True) for i in range(count)]


def test_hacks_that_a_lenient_reward_pays_are_named() -> None:
    def lenient(batch: Sequence[RewardInput]) -> list[Verdict]:
        return [
            Verdict(status=Status.PARTIAL, score=float(r.answer in r.completion)) for r in batch
        ]

    paid = audit_reward(lenient, []).paid_hacks
    assert "hedge in words" in paid
    assert "nothing" not in paid


def test_compressed_rows_and_other_names(tmp_path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as out:
        out.write(json.dumps({"completion": "9", "answer": "9", "prompt": "p", "level": 3}) + "\n")
    (row,) = read_rows(path)
    assert (row.input.completion, row.input.answer, row.input.prompt, row.label) == (
        "9",
        "9",
        "p",
        None,
    )
    assert row.input.columns == {"level": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("{", "rows.jsonl:1 is no JSON"),
        ("[1]", "no JSON object"),
        ('{"gold": "5"}', "has no completion"),
        ('{"pred": "5", "label": "yes"}', "label is 'yes'"),
    ],
)
def test_bad_files_name_the_line(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(path)
    with pytest.raises(ValueError, match="no file"):
        read_rows(tmp_path / "absent.jsonl")
