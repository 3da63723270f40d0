"""Finds the program in a completion: the fenced blocks that make it up, or the part of a text
without fences that is code.

Fences are read by lines, in linear time, as CommonMark has them (indented, longer, of `~~~`, with
an info string). Beyond CommonMark, as models write: a fence inside a docstring ends nothing, a new
tagged fence ends an open block, the last block may stay open, and the prompt may have opened the
first.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass

_FENCE = re.compile(r"([ \t]*(?:[-*>][ \t]+|\d{1,3}[.)][ \t]+)?)(`{3,}|~{3,})[ \t]*([^`\n]*)")
_QUOTED = re.compile(r"[ \t]*>[ \t]?")
_PYTHON = re.compile(r"\{?[.:]?(i?python|py|pycon|cpython|sage)[\d.]*\b", re.I)
_CPP = re.compile(r"\{?[.:]?(c\+\+|cpp|cc|cxx|c)[\d.]*(?![\w+#])", re.I)
_UNTAGGED = re.compile(r"(code|solution|answer|program)?$", re.I)
# Ends of a model's thoughts; the first word opens them. Sources: DeepSeek-R1 and Qwen; Kimi;
# Sky-T1; Seed; Magistral.
_THOUGHTS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
)
# Tags that some prompts ask for around code. Sources: R1-Zero; CodeLlama and CRUXEval; MBPP's own
# few-shot prompt.
_WRAPPERS = (
    ("<answer>", "</answer>"),
    ("[PYTHON]", "[/PYTHON]"),
    ("[BEGIN]", "[DONE]"),
    ("<code>", "</code>"),
    ("<python>", "</python>"),
)
_CODE_LINE = re.compile(
    r"(?:import |from \w[\w.]* import |(?:async )?def \w|class \w|@\w|#!|#include)"
)
_READS = re.compile(
    r"\binput\s*\(|\bstdin\b|\bopen\s*\(\s*0|\bos\.read\b|\bfileinput\b|\braw_input\b"
)
_PRINTS = re.compile(r"\bprint\b|\bstdout\b|\bos\.write\b")
_QUOTES = re.compile(r'"""|\'\'\'')
_DEFINED = re.compile(r"^(?:async[ \t]+def|def|class)[ \t]+(\w+)", re.M)
_IMPORTED = re.compile(r"^(?:from[ \t]+[\w.]+[ \t]+)?import[ \t]+([^\n#]+)", re.M)
_WORD = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class Program:
    """The program in a completion. `language`: "python" or "cpp"; `fenced`: whether it stood in
    fences."""

    source: str
    language: str
    fenced: bool


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: `kind` is "python", "cpp", "untagged" or "other"."""

    kind: str
    source: str


def extract_program(
    completion: str, language: str = "auto", entries: Collection[str] = ()
) -> Program | None:
    """Returns the program in the final answer of a completion, None if there is none.

    `language`: "python", "cpp" or "auto" (by the tag of the fence). `entries`: names that the tests
    use; without them a program on stdin is searched for. The last block that defines such a name,
    or reads its input, is taken; other blocks are joined to it only if they define what it uses. A
    tagged block goes before an untagged one. Without fences the text from its first line of code on
    is the program.
    """
    answer = _after_thoughts(completion.replace("\r\n", "\n"))
    if answer is None:
        return None
    answer = _unwrapped(answer)
    blocks = fenced_blocks(answer)
    if not blocks:
        source = _bare_code(answer)
        return (
            Program(source, "cpp" if language == "cpp" else _guess(source, language), False)
            if source
            else None
        )
    wanted = {"python": ("python",), "cpp": ("cpp",), "auto": ("python", "cpp")}[language]
    fitting = [block for block in blocks if block.kind in wanted and block.source.strip()]
    fitting = fitting or [
        block for block in blocks if block.kind == "untagged" and block.source.strip()
    ]
    if not fitting:
        return None
    chosen = _choose(fitting, entries)
    kind = chosen.kind
    if kind == "untagged":
        kind = "cpp" if language == "cpp" else _guess(chosen.source, language)
    if kind == "cpp":
        return Program(chosen.source, "cpp", True)
    same = [block for block in fitting if block.kind == chosen.kind]
    return Program(_joined(same, chosen, entries), kind, True)


def _after_thoughts(text: str) -> str | None:
    """The text behind the thoughts; None if they do not end."""
    for opening, closing in _THOUGHTS:
        _, closed, answer = text.rpartition(closing)
        if closed:
            return answer
        if text.lstrip().startswith(opening) or (opening == "<think>" and opening in text):
            return None
    return text


def _unwrapped(text: str) -> str:
    for opening, closing in _WRAPPERS:
        before, opened, rest = text.rpartition(opening)
        if opened and ("```" in rest or "```" not in before):
            return rest.partition(closing)[0]
    return text


def _kind(info: str) -> str:
    if _UNTAGGED.match(info):
        return "untagged"
    if _PYTHON.match(info):
        return "python"
    return "cpp" if _CPP.match(info) else "other"


def fenced_blocks(text: str) -> list[Block]:
    """The fenced blocks in order. A block that is never closed ends with the text."""
    lines = text.split("\n")
    fences = {number: match for number, line in enumerate(lines) if (match := _FENCE.match(line))}
    blocks: list[Block] = []
    number = 0
    if fences:
        first = min(fences)
        head = next((line for line in lines[:first] if line.strip()), "")
        bare = not fences[first][3].strip()
        # the prompt opened it
        if bare and len(fences) % 2 and (_CODE_LINE.match(head) or head[:4].isspace()):
            blocks.append(Block("python", "\n".join(lines[:first]) + "\n"))
            number = first + 1
    while number < len(lines):
        opening = fences.get(number)
        if opening is None:
            number += 1
            continue
        end = _end(lines, fences, number)
        body = lines[number + 1 : end]
        if ">" in opening[1]:  # the block stands in a quotation
            body = [_QUOTED.sub("", line) for line in body]
        elif (indent := len(opening[1].expandtabs())) and body:
            body = [line[min(indent, len(line) - len(line.lstrip())) :] for line in body]
        text = "\n".join(body) + ("\n" if body and end < len(lines) else "")
        blocks.append(Block(_kind(opening[3].strip()), text))
        closed = end < len(lines) and not fences[end][3].strip()
        number = end + closed
    return blocks


def _end(lines: Sequence[str], fences: dict[int, re.Match[str]], start: int) -> int:
    """The line of the fence that ends the block opened at `start`: the first outside a docstring,
    or the first of all if every one is inside."""
    mark = fences[start][2]
    quote, first = "", None
    for number in range(start + 1, len(lines)):
        fence = fences.get(number)
        if fence is not None and fence[2][0] == mark[0] and len(fence[2]) >= len(mark):
            info = fence[3].strip()
            if (not info and not fence[1].strip(" \t>")) or _kind(info) in ("python", "cpp"):
                if not quote:
                    return number
                first = number if first is None else first
        else:
            for quoting in _QUOTES.findall(lines[number]):
                quote = "" if quoting == quote else quote or quoting
    return len(lines) if first is None else first


def _guess(source: str, language: str) -> str:
    return "cpp" if language == "auto" and "#include" in source and "main" in source else "python"


def _bare_code(text: str) -> str:
    """The code in a text without fences: from its first line of code on, if the lines before are
    prose, else all of it."""
    lines = text.strip("\n").split("\n")
    if lines[0][:1].isspace() or _CODE_LINE.match(lines[0]):
        return text if text.strip() else ""
    start = next((i for i, line in enumerate(lines) if _CODE_LINE.match(line)), 0)
    prose = all(re.search(r"[.:!?]\s*$|^\s*$", line) for line in lines[:start])
    return "\n".join(lines[start:] if prose else lines).strip() and "\n".join(
        lines[start:] if prose else lines
    )


def defines(source: str, name: str) -> bool:
    """Whether code defines a name with def or class, or assigns it at the start of a line."""
    # `[ \t]*`, as `\s*` also matches newlines: 20,000 blank lines took 29 s and held the GIL.
    word = re.escape(name)
    return bool(
        re.search(
            rf"^[ \t]*(?:(?:async[ \t]+)?def|class)[ \t]+{word}\b|^{word}[ \t]*[=:]", source, re.M
        )
    )


def _choose(blocks: Sequence[Block], entries: Collection[str]) -> Block:
    """The last block that defines the most of the names, or that reads and prints, else the last
    block."""
    tests: list[list[bool]] = []
    if entries:
        count = [sum(defines(block.source, name) for name in entries) for block in blocks]
        tests = [[n == max(count) and n > 0 for n in count]]
    else:
        reads = [bool(_READS.search(block.source)) for block in blocks]
        prints = [bool(_PRINTS.search(block.source)) for block in blocks]
        tests = [[r and p for r, p in zip(reads, prints, strict=True)], reads, prints]
    for hits in tests:
        if any(hits):
            return blocks[len(hits) - 1 - hits[::-1].index(True)]
    return blocks[-1]


def _joined(blocks: Sequence[Block], chosen: Block, entries: Collection[str]) -> str:
    """The chosen block, joined with those that define names which it uses and does not define."""
    sources = [_dedented(block.source, entries) for block in blocks]
    main = next(i for i, block in enumerate(blocks) if block is chosen)
    taken, have = {main}, _bound(sources[main])
    uses = set(_WORD.findall(sources[main]))
    grown = True
    while grown:
        grown = False
        for i in (*range(main - 1, -1, -1), *range(main + 1, len(sources))):
            bound = _bound(sources[i])
            again = bound & have & set(_DEFINED.findall(sources[i]))
            if (
                i in taken
                or not (bound - have) & uses
                or again
                or (not entries and _READS.search(sources[i]))
            ):
                continue
            taken.add(i)
            have |= bound
            uses |= set(_WORD.findall(sources[i]))
            grown = True
    return "\n".join(sources[i] for i in sorted(taken))


def _bound(source: str) -> set[str]:
    """The names that code defines or imports at the start of a line."""
    bound_names = set(_DEFINED.findall(source))
    for names in _IMPORTED.findall(source):
        for part in names.strip("()\\ ").split(","):
            words = part.split()
            if words:
                bound_names.add(words[-1].partition(".")[0])
    return bound_names


def _dedented(source: str, entries: Collection[str]) -> str:
    """A program without the indentation of all its lines; unchanged if it continues the function of
    a prompt."""
    first = next((line for line in source.split("\n") if line.strip()), "")
    if not first[:1].isspace():
        return source
    plain = textwrap.dedent(source)
    return plain if not entries or any(defines(plain, name) for name in entries) else source


def completed(source: str, entry: str, prompt: str) -> str:
    """The program as it is run: a bare function body is put behind the prompt that it continues,
    with its indentation restored."""
    if not entry or not prompt or defines(source, entry):
        return source
    lines = source.strip("\n").split("\n")
    head, rest = lines[0], [line for line in lines[1:] if line.strip()]
    if not head[:1].isspace():
        depths = [len(line) - len(line.lstrip()) for line in rest]
        lost = (
            bool(depths)
            and min(depths) >= 4
            and (not head.rstrip().endswith(":") or depths[0] >= 8)
        )
        lines = (
            [f"    {head}", *lines[1:]]
            if lost
            else [f"    {line}" if line.strip() else line for line in lines]
        )
    return f"{prompt.rstrip()}\n" + "\n".join(lines) + "\n"
