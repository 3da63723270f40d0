"""Finds the final answer in a completion, in linear time.

Only the text behind the last closed thought counts. `RULES` lists the ways in which answers are
stated; they are tried in order, and the first that yields a candidate decides. All but the first
two look only at the end of the text (`TAIL` characters).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .clauses import names_choice
from .number_words import in_digits
from .prose import VERB, announced, hedge_after, last_statement
from .sentences import FORMULA, GROUPED_TEXT, NUMBER, TAIL, WORD, bare, sentences, tail

# Each candidate is parsed and compared: 100,000 different boxes took 5 s of processor time.
MAX_ANSWERS = 64
"""Most distinct candidates; a completion with more is wrong."""


@dataclass(frozen=True, slots=True)
class Extracted:
    """The distinct candidates of a completion in order, and the name of the rule that yielded them.
    Several candidates must all equal the reference, or be its items."""

    candidates: tuple[str, ...]
    how: str


@dataclass(frozen=True, slots=True)
class Rule:
    """A way of stating an answer: its name, the models and data sets that write so, and the
    function from a text to its candidates (empty where it states none)."""

    name: str
    source: str
    find: Callable[[str], list[str]]


NOTHING = Extracted((), "none")
_THOUGHT = re.compile(
    r"<(?P<close>/?)"
    r"(?P<tag>think|thinking|thought|thoughts|reasoning|reflection|scratchpad|seed:think)>"
    r"|(?P<open2>\[THINK\]|<\|begin_of_thought\|>|◁think▷)"
    r"|(?P<close2>\[/THINK\]|<\|end_of_thought\|>|◁/think▷)",
    re.IGNORECASE,
)
_THOUGHT_PARTS = (
    *("hink", "HINK", "hought", "HOUGHT", "reasoning>", "reflection>", "scratchpad>"),
    *("easoning>", "REASONING>", "_of_thought"),
)
"""Substrings of thought tags. Looking for them is cheaper than the regular expression, which runs
only where one occurs."""
_MARKER_PARTS = (
    *("nswer", "NSWER", "esult", "olution", "ption", "hoice", "A:", "A：", "答", "选", "结果"),
)
_BARE_LINE = re.compile(r"(?:A:|####)?[ \t]*(-?[\d,]*\.?\d+)")
_BOX = re.compile(
    r"\\(?:boxed|fbox)\s{0,8}\{"
    r"|\\(?:boxed|fbox)\s{0,8}(?P<bare>\d+|[A-Za-z](?![A-Za-z]))|\\[{}\\]|[{}]"
)
_BOX_DENIED = re.compile(
    r"\\f?box(?:ed)?\s*\{[^{}]*\}[\s$\\)\]]*(?:is|was)\s(?:wrong|incorrect|not)\b"
)
_FINAL = re.compile(r"final answer|最终答案", re.IGNORECASE)
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_PLACEHOLDER = re.compile(
    r"(?:(?:your|the|final|short)\s)*answer(?:\s(?:goes\s)?here)?\.?", re.IGNORECASE
)
_MARKER = re.compile(
    r"\*{0,2}\b(?:final\s+|correct\s+)?(?:answers?|result|solution)\b(?:\s+to\s+[^.:\n=]{1,60}?)?"
    r"\*{0,2}(?:\s{0,4}[:=：]+\*{0,2}"
    r"|\s+(?:is|are|was|would be|must be|should be)\b\s{0,4}[:：]?|\*{0,2}[ \t]{0,4}\n)"
    r"|\b(?:correct\s+)?(?:option|choice)\s+is\b\s{0,4}[:：]?|^[ \t]{0,4}A[:：]"
    r"|【(?:答案|解答结果)】"
    r"|(?:最终|正确|最后)?(?:答案|结果)(?:应该|应)?(?:是|为|：|:|＝|=)+"
    r"|故(?:答案)?(?:应?选|为)[:：]?"
    r"|(?:因此|所以)?(?:应|本题)?选(?:择)?[:：]?(?=\s{0,4}[(（]?[A-J])"
    r"|^[ \t]{0,4}答[:：]|(?<=[。\n])答[:：]",
    re.IGNORECASE | re.MULTILINE,
)
_NUMBERED = re.compile(
    r"^\W{0,4}(?:answer|答案)\s?\(?\d{1,2}\)?\*{0,2}[:：](.*)$", re.IGNORECASE | re.MULTILINE
)
_END_TOKENS = re.compile(r"(?:\s?(?:<\|[\w-]+\|>|</s>|<end_of_turn>|<eos>))+\s*\Z")
_JSON = re.compile(
    r'"(?:final_?|correct_?)?(?:answer|result|solution)"\s{0,4}:\s{0,4}'
    r'(?:"((?:[^"\\]|\\.){1,400})"|(-?\d[\d.,eE/]{0,40}))\s{0,4}(?=[,}\n])',
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"[A-Za-z]{3,}|(?:[Ss]o|[Ww]e|[Ii]t|[Hh]e|[Ii]s|[Aa]s|[Bb]y|[Tt]o|[Ii]n|[Ii]f)\b"
    r"|[\u4e00-\u9fff]"
)
_RANGE_WORD = re.compile(r"\d\s(?:to|through)\s\d")
_LETTERED_PARTS = re.compile(r"^\s*\([a-e]\)\s+(\S.{0,200})$", re.MULTILINE)
"""`(a) 2` on one line and `(b) 3` on the next."""
_LETTERED = re.compile(r"[(（]?[A-J][)）.]")
_COUNTED = re.compile(r"(?<=\d)\s?[(（][\u4e00-\u9fff]{1,3}[)）]")
"""A counted noun in brackets behind its number, e.g. `5（个）`."""
_BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*|__([^_\n]{1,200})__")
_HEADING = re.compile(r"(?::\*\*|\*\*:)[^*]*\d[^*]*$")
"""A bold heading with its answer behind it, e.g. `**2. Total:** 7 pens`."""
_REVISED = re.compile(
    r"\b(?:wait|actually|correction|sorry|hold on|in fact|no,|however"
    r"|re-?check(?:ing|ed)?|mistake|second thought)|不对|更正|等等",
    re.IGNORECASE,
)
_PHANTOM = re.compile(r"\\(?:[hv]?phantom|hspace|vspace)\*?\s?\{[^{}]*\}|\\q?quad")
_MATH_WORDS = frozenset(("sqrt", "pi", "sin", "cos", "tan", "log", "ln", "infinity", "exp"))
_CONTENT = re.compile(r"[^\W_]|\\[a-z]|\\\{\s*\\\}")
"""A letter, a digit, a command or the empty set. A box without any of them, such as `\\boxed{?}` or
one of blanks, is part of the problem and no answer."""


def extract(completion: str, opened: bool = False) -> Extracted:
    """Returns the candidates for the final answer of a completion. `opened`: the prompt ended
    inside a thought."""
    text = final_text(completion, opened)
    if text is None:
        return NOTHING
    if ">" in text[-20:]:
        text = text[:-200] + _END_TOKENS.sub("", text[-200:])
    for rule in RULES:
        if answers := list(dict.fromkeys(rule.find(text))):
            return Extracted(tuple(answers[: MAX_ANSWERS + 1]), rule.name)
        # A truncated completion may end in `\boxed{1`; no later rule may read that half as an
        # answer.
        if rule is RULES[0]:
            text = _without_cut_off_box(text)
    return NOTHING


def _without_cut_off_box(text: str) -> str:
    """The text before a box that is never closed; the whole text if there is none."""
    at = text.rfind("\\boxed")
    return text[:at] if at >= 0 and text.count("{", at) > text.count("}", at) else text


def final_text(completion: str, opened: bool = False) -> str | None:
    """The text behind the last closed thought; None if a thought is still open at the end."""
    if not opened and not (
        ("<" in completion and any(part in completion for part in _THOUGHT_PARTS))
        or "THINK]" in completion
        or "◁" in completion
    ):
        return completion
    open_now, after = opened, 0
    # The last tag decides: in `<think></think><think>\boxed{5}` the box is a thought.
    for tag in _THOUGHT.finditer(completion):
        if tag["close"] == "/" or tag["close2"]:
            open_now, after = False, tag.end()
        else:
            open_now = True
    return None if open_now else completion[after:]


def boxes(text: str) -> list[str]:
    """The contents of the balanced boxes in order; of nested boxes only the outermost."""
    at = text.find("\\boxed")
    if at < 0 or (0 <= text.find("\\fbox") < at):
        at = text.find("\\fbox")
    if at < 0:
        return []
    spans: list[tuple[int, int]] = []
    stack: list[int] = []  # for each open brace: where its content starts if it is a box's, else -1
    for match in _BOX.finditer(text, at):
        token = match.group()
        if token == "{":
            stack.append(-1)
        elif token == "}":
            if stack and (start := stack.pop()) >= 0:
                while spans and spans[-1][0] > start:
                    spans.pop()
                spans.append((start, match.start()))
        elif match["bare"]:
            spans.append(match.span("bare"))
        elif len(token) > 2:
            stack.append(match.end())
    return [text[start:end] for start, end in spans]


def _in_boxes(text: str) -> list[str]:
    """The contents of the boxes, with what an answer tag or a marker behind the last box states."""
    contents: list[str] = []
    for box in dict.fromkeys(boxes(text)):
        if _CONTENT.search(_PHANTOM.sub("", box[:TAIL])):
            contents.append(_box_content(box))
            if len(contents) > MAX_ANSWERS:
                return contents
    if not contents:
        return []
    if "<" in text:
        # A tag counts like a box, so that `<answer>4</answer> \boxed{5}` is not paid for either.
        contents += [tag for tag in _in_tag(text) if "\\boxed" not in tag]
    after = text[max(text.rfind("\\boxed"), text.rfind("\\fbox"), len(text) - TAIL) :]
    # `\boxed{6} is wrong` takes the box back.
    if _BOX_DENIED.match(after) is not None:
        contents.pop()
    if "nswer" not in after and "NSWER" not in after and "答案" not in after:
        return contents
    stated = _after_marker(after[after.find("}") + 1 :])
    if len(contents) > 1 and stated and _FINAL.search(after) is not None:
        return stated  # boxes around what was found on the way
    return contents + stated


def _box_content(box: str) -> str:
    """The content of a box. Of a sentence such as `the answer is 5`, the answer that it states; of
    an `align` environment with one line, that line."""
    if "{align" in box and "\\\\" not in box:
        return re.sub(r"\\(?:begin|end)\{align(?:ed)?\*?\}|(?<!\\)&", " ", box).strip()
    stating = any(part in box for part in ("nswer is", "答案", "答：", "答:"))
    marker = _MARKER.search(box) if stating and len(box) < 400 else None
    if marker is not None:
        rest = box[marker.end() :].lstrip(" :：").rstrip(" 。.")
        rest = rest if rest.count("{") == rest.count("}") else rest.strip("{} ")
        few = len(WORD.findall(GROUPED_TEXT.sub("", rest))) <= 2 and len(rest) < 60
        return (rest if few else announced(rest)[0]) or box
    return box


def _in_tag(text: str) -> list[str]:
    """The contents of the `<answer>...</answer>` tags; of a sentence in one, the answer that it
    states."""
    if "nswer>" not in text and "NSWER>" not in text:
        return []
    start, contents = -1, list[str]()
    for tag in _TAG.finditer(text):
        if not tag.group(1):
            start = tag.end()
        elif start >= 0:
            inner, start = text[start : tag.start()].strip(), -1
            if _CONTENT.search(inner[:TAIL]) and _PLACEHOLDER.fullmatch(inner) is None:
                contents.append(inner)
                if len(contents) > MAX_ANSWERS:
                    break
    return [stated for inner in dict.fromkeys(contents) for stated in _of_text(inner)]


def _of_text(text: str) -> list[str]:
    """The candidates of a text outside boxes and tags, by the first of the other rules that has
    any."""
    # Stripped before it is cut: `5` followed by a million blanks is an answer.
    text = text[:20_000].strip() if len(text) <= 20_000 else text.rstrip()[-TAIL:]
    for rule in RULES[2:]:
        if answers := rule.find(text):
            return answers
    return []


def _in_last_line(text: str) -> list[str]:
    """A number alone on the last line (all of them if every line is one), lettered parts one to a
    line, or the text behind the last `####`."""
    text = text[-TAIL:].strip()
    if (number := _BARE_LINE.fullmatch(text, text.rfind("\n") + 1)) is not None:
        lines = [_BARE_LINE.fullmatch(line.strip()) for line in text.split("\n") if line.strip()]
        alone = [line.group(1) for line in lines if line is not None]  # one answer above the other
        return alone if len(alone) == len(lines) else [number.group(1)]
    if len(parts := _LETTERED_PARTS.findall(text)) > 1:
        return [announced(part)[0] for part in parts]
    if (at := text.rfind("####")) < 0:
        return []
    line = tail(text[at:].lstrip("#")).partition("\n")[0].strip()
    return [line] if line else []


def _in_json(text: str) -> list[str]:
    """The answer in the last `"answer": ...`."""
    if '"' not in text[-TAIL:] or not (values := _JSON.findall(text[-TAIL:])):
        return []
    return _of_text(next(value for value in values[-1] if value)) if any(values[-1]) else []


def _after_marker(text: str) -> list[str]:
    """The answer behind the last marker, such as `The answer is`; further ones if it is numbered,
    hedged or revised."""
    text = tail(text)
    if not (parts := [at for part in _MARKER_PARTS if (at := text.find(part)) >= 0]):
        return []
    if len(numbered := _NUMBERED.findall(text)) > 1:
        return [announced(rest)[0] for rest in numbered if rest.strip()]
    # The last eight only: a text may repeat `answer is` to its end, and each try takes linear time.
    for marker in reversed(list(_MARKER.finditer(text, max(0, min(parts) - 80)))[-8:]):
        rest = text[marker.end() :]
        stated, end = announced(rest)
        if not stated:
            continue
        after = rest[end:]
        # `The answer is 5. Or maybe 6.` states both, so that 5 is not paid.
        if hedge_after(after):
            return [stated, *last_statement(after)]
        revised = _REVISED.search(after)
        if revised is not None and NUMBER.search(after, revised.end()):
            return last_statement(after)
        return [stated]
    return []


def _whole(text: str) -> list[str]:
    """The text itself, where it is an answer rather than a sentence."""
    text = _COUNTED.sub("", bare(tail(text)))
    if (word := re.match(r"(Yes|No)\b\s?,", text)) is not None and "\n" not in text:
        return [word.group(1)]
    if not text or "\n" in text or len(text) > 400:
        return [] if not text or re.search(r"\d|\$|\\|[\u4e00-\u9fff]", text) else [text]
    if (formula := FORMULA.fullmatch(text.rstrip("."))) is not None:
        return [formula.group(formula.lastindex or 0)]
    if "=" in text and re.search(
        r"[\d%] (?:of|times|by|plus|minus) |\d, \d|\d\s?[A-Za-z]{3,}[^=]*\Z", text
    ):
        return []  # `15% of 200 = 30`, `3 * 4 = 12 pens`, one equation after the other
    # Sentences are for the rules below: `She makes $18.`, parsed as algebra, was refused.
    if names_choice(text) or (len(sentences(text)) > 1 and _LETTERED.match(text) is None):
        return []
    plain = FORMULA.sub(" ", GROUPED_TEXT.sub("", text))
    words = [word for word in WORD.findall(plain) if word.lower() not in ("and", "or")]
    if not re.search(r"\d|\$|\\", text):
        if in_digits(text) != text:
            return last_statement(in_digits(text))
        if "solution" in text and (none := last_statement(text)):
            return none
        clause = len(words) > 3 and VERB.search(text) is not None
        return last_statement(text) or [text] if clause else [text]
    return [text] if not words or _is_plain(text, words) else []


def _is_plain(text: str, words: list[str]) -> bool:
    """Whether a short text with a number is an answer by itself, such as `5 cm` or `x: 5`, and not
    part of a sentence, such as `in 5 days`."""
    lead = _LEAD.match(text)
    one_sign = not ("=" in text and ":" in text)
    named = one_sign and re.match(r"\w+\s?[:：=]\s?[-\d]", text) is not None
    starts = text[0] in "+-−.([\\" or text[0].isdigit() or named
    if not starts and (len(words) > 1 or (lead is not None and lead.group() not in _MATH_WORDS)):
        return False
    return (
        len([word for word in words if word.isascii()]) <= 2 + text.count(":") + text.count("=")
        and len("".join(word for word in words if not word.isascii())) <= 3
        and VERB.search(" ".join(words)) is None
        and _RANGE_WORD.search(text) is None
        and FORMULA.search(text) is None
    )


def _in_bold(text: str) -> list[str]:
    """The last bold text on the last line that is not blank, if it can be an answer."""
    lines = [line for line in tail(text).split("\n") if line.strip()]
    bold = _BOLD.findall(lines[-1]) if lines else []
    if not bold or _HEADING.search(lines[-1]) is not None:
        return []
    inner = next(part for part in bold[-1] if part).strip().strip(":：")
    words = WORD.findall(GROUPED_TEXT.sub("", inner))
    if len(words) > 3 or not re.search(r"\d|\\|\$|^\(?[A-J]\)?$", inner):
        return []
    worded_equation = "=" in inner and words and FORMULA.search(inner) is None
    return last_statement(inner) if worded_equation else [bare(inner)]


RULES = (
    Rule(
        "box",
        "MATH, NuminaMath, Qwen2.5-Math, DeepSeek-R1: \\boxed{x}, \\fbox{x}; all of them",
        _in_boxes,
    ),
    Rule("answer_tag", "R1-Zero, TinyZero, Open-Reasoner-Zero: <answer>x</answer>", _in_tag),
    Rule("json", 'prompts for structured output: {"answer": x}', _in_json),
    Rule(
        "last_line",
        "GSM8K and what is tuned on it: #### x, A: x, or x alone in the last line",
        _in_last_line,
    ),
    Rule(
        "marker",
        "Minerva, Llama 3, OLMo, GLM, Qwen: Final Answer:, The answer is, Answer:, 答案, 故选, 答",
        _after_marker,
    ),
    Rule("whole", "short completions: the text is the answer", _whole),
    Rule("bold", "Gemma, GPT-4o, Llama 3: **x** in the last line", _in_bold),
    Rule(
        "sentence",
        "SmolLM2, Qwen2.5 without a prompt for boxes: the last sentence, `So there are x left.`",
        last_statement,
    ),
)
"""The ways of stating an answer, the strongest first."""
