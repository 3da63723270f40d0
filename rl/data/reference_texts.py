"""Reference answers as texts: the final answer of a solution, the letter of a choice, and checks
for programs and tests."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from ...rewards.math_answers.extract import extract
from .layouts import Layout, given, lookup, spelled

_MARKED = re.compile(r"answer|[答选]|result", re.IGNORECASE)
_COUNTED = re.compile(r"(-?[\d.,/]+) \([A-Za-z ]+\)")
_LETTERED = re.compile(r"\s*\(?([A-Ja-j1-9])\s*[).:]")
KEYS = (
    "value",
    "answer",
    "ground_truth",
    "target",
    "solution_text_format",
    "text",
    "final_answer",
    "label",
    "spans",
)
_TEXTS = ("contexts", "sentences", "paragraphs", "text")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PROGRAM = re.compile(
    r"^\s*(?:def \w+\(|class \w+[:(]|import \w+$|from [\w.]+ import )|^\s*return [\w(\[]|```python",
    re.MULTILINE,
)


def is_program(value: Any) -> bool:
    return isinstance(value, str) and _PROGRAM.search(final_answer(value)) is not None


def holds_tests(value: Any) -> bool:
    """Whether a reference holds tests of a program: assertions, or inputs and outputs."""
    value = spelled(value) if isinstance(value, str) else value
    if isinstance(value, str):
        return re.search(r"^\s*assert .*[=(]", value, re.MULTILINE) is not None
    if isinstance(value, Sequence):
        return bool(value) and all(holds_tests(each) for each in value)
    sides = ({"inputs", "outputs"}, {"input", "output"}, {"functional"}, {"test_code"})
    return isinstance(value, Mapping) and any(side <= set(value) for side in sides)


def final_answer(text: str) -> str:
    """The final answer of a worked solution: behind `####`, in its last box, or after `The answer
    is`; a short text is its own."""
    text = text.strip()
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip()
    if "\\boxed" in text:
        return text if text.count("\\boxed") > 1 else _boxed(text) or text
    if match := _COUNTED.fullmatch(text):
        return match[1]
    if _MARKED.search(text):  # a quick check first: most references have no marker
        extracted = extract(text)
        stated = extracted.candidates[0] if len(extracted.candidates) == 1 else ""
        if extracted.how in ("marker", "answer_tag") and (
            len(text) > 40 or len(stated) == 1 or any(each.isdigit() for each in stated)
        ):
            return stated or text
    return text


def _boxed(text: str) -> str:
    """The content of the last box; "" if its braces do not close."""
    start = text.rindex("\\boxed") + len("\\boxed")
    depth = 0
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start + 1 : at].strip() if text[at] == "}" else ""
    return ""


def options_of(row: Mapping[str, Any], layout: Layout) -> tuple[list[str], list[str]]:
    """Labels and texts of a question's choices; a label is "" if the text shows one already."""
    paths = layout.options.split("|")
    value: Any = lookup(row, paths[0])
    if len(paths) > 1:
        value = [plain(lookup(row, path)) for path in paths]
        value = [text for text in value if text]
        if {*layout.answer} & {*paths}:  # the right one would always be the first
            value.sort(key=lambda text: zlib.crc32(f"{lookup(row, layout.prompt)}{text}".encode()))
    value = spelled(value) if isinstance(value, str) else value
    # ARC
    if isinstance(value, Mapping) and isinstance(value.get("text"), Sequence) and "label" in value:
        return [str(label) for label in value["label"]], [str(text) for text in value["text"]]
    if isinstance(value, Mapping):
        pairs = [(str(key), str(text)) for key, text in value.items() if text is not None]
        return [_capital(key) for key, _ in pairs], [text for _, text in pairs]
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = [each[0] if isinstance(each, list) and len(each) == 1 else each for each in value]
        if items and all(isinstance(each, Mapping) for each in items):
            options = [_label_and_text(each) for each in items]
            labels = [label for label, _ in options]
            return labels if any(labels) else list(_LETTERS[: len(options)]), [
                t for _, t in options
            ]
        texts = [str(text) for text in items]
        if re.fullmatch(r"(option|choice)_?1", paths[0]) and layout.first == 1:
            return [str(i + 1) for i in range(len(texts))], texts
        if texts and all(_LETTERED.match(text) for text in texts):
            return [""] * len(texts), texts
        return list(_LETTERS[: len(texts)]), texts[: len(_LETTERS)]
    return ([""], [plain(value)]) if plain(value) else ([], [])


def _label_and_text(choice: Mapping[str, Any]) -> tuple[str, str]:
    """The label and the text of e.g. `{"label": "A", "text": "4"}`, whatever the names: the value
    that looks like a label, and the other."""
    values = [str(value) for value in choice.values() if isinstance(value, str | int | float)]
    values = [value for value in values if value not in ("True", "False")] or values
    label = next((value for value in values if re.fullmatch("[A-Za-z0-9]", value)), "")
    return label, next((value for value in values if value != label), label)


def _capital(label: str) -> str:
    return label.upper() if len(label) == 1 else label


def letter_of(value: Any, labels: Sequence[str], texts: Sequence[str], first: int = 0) -> str:
    """The label of the right choice. value: its label, its number counted from `first`, a list with
    a 1 at its place, or its text."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in KEYS if given(value.get(key))), "")
    if isinstance(value, list) and len(value) == len(texts) and {*map(str, value)} == {"0", "1"}:
        value = value.index(1)
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        right = [at for at, each in enumerate(value) if any(v is True for v in each.values())]
        value = labels[right[0]] if right else ""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    said = str(value).strip()
    if isinstance(value, float) and value.is_integer():
        said = str(int(value))
    folded = {label.casefold(): label for label in labels if label}
    if said.casefold() in folded:
        return folded[said.casefold()]
    if said in texts:
        return labels[texts.index(said)] or _LETTERED.sub(r"\1", said)[:1]
    if said.isdecimal() and 0 <= int(said) - first < len(labels):
        at = int(said) - first
        shown = _LETTERED.match(texts[at])
        return labels[at] or (shown[1] if shown else said)
    said = final_answer(said)
    stated = _LETTERED.match(said)  # "B. Oslo"
    return folded.get(stated[1].casefold(), said) if stated else _capital(said)


def shows(prompt: Any, options: Sequence[str]) -> bool:
    """Whether a prompt lists its choices itself."""
    text = prompt if isinstance(prompt, str) else str(prompt)
    return bool(options) and all(option.strip() in text for option in options)


def plain(value: Any) -> str:
    """A text, or a list of texts as lines; "" for any other value."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in _TEXTS if key in value), None)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "\n".join(plain(each) for each in value if isinstance(each, str | list))
    return "" if value is None or isinstance(value, Mapping) else str(value).strip("\n")
