"""The page of an evaluation in a real browser: what it shows, what its filters find, and that a
model's answer is text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from emberl.rl.evaluation.page import write_page
from emberl.rl.evaluation.pictures import draw
from emberl.rl.evaluation.report import sets_of
from emberl.rl.evaluation.store import Store, outcomes_of

HOSTILE = (
    '</script><script>window.bad = 1</script><img src=x onerror="window.bad = 2">'
    "<!-- \u2028 ${7*7} $title &lt;b&gt; <b>bold</b> ﷽ \u202e"
)
ODD = f"a\x00b\x1b[31m \r\n \ud83d مرحبا \u202e {'x' * 300_000} \U0001f600"
"""What a page cannot hold as it is, and a line longer than any window."""
STATUSES = ("correct", "wrong", "unparseable")


def row(number: int, sample: int, **keys: Any) -> dict[str, Any]:
    return {
        "set": "maths" if number % 2 else "code",
        "problem": f"p/{number}",
        "budget": None,
        "sample": sample,
        "source": f"s{number % 3}",
        "question": f"What is {number} + 1?",
        "reference": str(number + 1),
        "text": f"<think>count {number}</think>it is {number + sample}",
        "token_ids": [1],
        "prompt_tokens": 5,
        "tokens": 10 * number + sample,
        "forced_tokens": 0,
        "thought_tokens": 3,
        "finish_reason": "stop",
        "status": STATUSES[(number + sample) % 3],
        "score": float((number + sample) % 3 == 0),
        "parts": "{}",
        "message": "",
        "answer": str(number + sample),
        "vote": 0 if (number + sample) % 3 == 0 else 1,
        "grade_s": 0.0,
    } | keys


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    store = Store(folder)
    for number in range(40):
        store.add([row(number, 0), row(number, 1)])
    hostile = {"question": HOSTILE, "text": HOSTILE, "message": HOSTILE, "answer": HOSTILE}
    hostile |= {"set": "foreign", "source": HOSTILE, "problem": HOSTILE, "tokens": 9999}
    store.add([row(1, 0, **hostile), row(1, 1, **hostile)])
    odd = dict.fromkeys(("question", "text", "message", "source", "problem"), ODD) | {"set": "odd"}
    store.add([row(1, 0, **odd), row(1, 1, **odd)])
    store.flush()
    result = {"model": f"m {HOSTILE}", "sets": sets_of(outcomes_of(folder), [2])}
    assert [p.name for p in draw(folder, result)] == ["accuracy.png", "k.png", "lengths.png"]
    return write_page(folder, result)


def test_the_browser_of_samples(browser: Any, page: Path, tmp_path: Path) -> None:
    browser.open(page)
    assert browser.choose() == "1 to 50 of 84"
    assert len(browser.listed()) == 50
    browser.run("document.getElementById('next').click()")
    assert browser.choose(search="") == "1 to 50 of 84", "a change begins at the first page"
    browser.run("document.getElementById('next').click()")
    assert len(browser.listed()) == 34
    expected = sum((n + s) % 3 == 1 for n in range(40) for s in (0, 1)) + 2
    assert browser.choose(status="wrong").endswith(f"of {expected}")
    assert all(line.startswith("wrong") for line in browser.listed())
    both = sum((n + s) % 3 == 1 for n in range(0, 40, 2) for s in (0, 1))
    assert browser.choose(set="code").endswith(f"of {both}")
    assert browser.choose(status="", set="", source="s1").endswith("of 26")
    assert browser.choose(source="", **{"from": "100", "to": "121"}) == "1 to 6 of 6"
    assert browser.choose(search="IS 11 +") == "1 to 2 of 2", "the question, in any case"
    assert browser.choose(search="count 12") == "1 to 2 of 2", "the thoughts"
    shown = browser.opened()
    assert shown == [
        *("question", "What is 12 + 1?", "reference", "13", "thoughts", "count 12"),
        *("answer", "it is 12", "read as", "12"),
    ]
    assert browser.choose(search="nowhere") == "none"
    browser.screenshot(tmp_path / "page.png")
    sizes = browser.run("return [...document.images].map((i) => i.naturalWidth)")
    assert len(sizes) == 3 and min(sizes) > 300, "pictures are in the page"
    assert browser.log() == []


def test_foreign_text_is_text(browser: Any, page: Path) -> None:
    browser.open(page)
    assert browser.choose(set="foreign") == "1 to 2 of 2"
    assert browser.opened()[1] == HOSTILE
    state = "return [window.bad === undefined, document.images.length, document.scripts.length]"
    assert browser.run(state) == [True, 3, 2]
    assert HOSTILE in browser.run("return document.querySelector('h1').textContent")
    assert browser.run("return document.querySelectorAll('b').length") == 0
    assert browser.log() == []
    assert "http" not in page.read_text().split("<script type")[0].replace("http-equiv", "")


def test_odd_text_is_shown_and_wrapped(browser: Any, page: Path) -> None:
    browser.open(page)
    assert browser.choose(set="odd") == "1 to 2 of 2"
    shown = browser.opened()
    assert shown[1] == ODD.replace("\ud83d", "\\ud83d")
    wide = (
        "return [...document.querySelectorAll('body *')].filter((e) => !e.closest('.scroll') &&"
        " e.getBoundingClientRect().right > window.innerWidth).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert browser.run(wide) == [], "nothing stands out of the window"
    assert browser.log() == []
