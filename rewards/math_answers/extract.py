"""Finding the final answer in a completion, as a person reads it, in linear time.

Only what stands after the thoughts counts. `RULES` is the table of the ways in which an answer is stated, in the order in which
they are tried; the first that finds something decides. Every rule but the first two looks at the end of the text only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from .clauses import as_equations, choices, main_clause, names_choice, without_labels
from .units import read_unit

TAIL = 4000
"""Characters at the end of a text in which the rules after the first two look."""
MAX_ANSWERS = 64
"""More different final answers than this are not looked at: no list of answers is that long."""


@dataclass(frozen=True, slots=True)
class Extracted:
    """Every distinct candidate in order (more than one means that all must be right, or be a list), and the rule's name."""

    candidates: tuple[str, ...]
    how: str


@dataclass(frozen=True, slots=True)
class Rule:
    """A way of stating an answer: its name, who writes so, and the function that finds it (an empty list: not there)."""

    name: str
    source: str
    find: Callable[[str], list[str]]


NOTHING = Extracted((), "none")
_THOUGHT = re.compile(
    r"<(?P<close>/?)(?P<tag>think|thinking|thought|thoughts|reasoning|reflection|scratchpad|seed:think)>"
    r"|(?P<open2>\[THINK\]|<\|begin_of_thought\|>|◁think▷)|(?P<close2>\[/THINK\]|<\|end_of_thought\|>|◁/think▷)",
    re.IGNORECASE,
)
_THOUGHT_PARTS = (
    "hink",
    "HINK",
    "hought",
    "HOUGHT",
    "reasoning>",
    "reflection>",
    "scratchpad>",
    "easoning>",
    "REASONING>",
    "_of_thought",
)
"""What a text with thoughts has in it: looking for these costs less than the expression."""
_MARKER_PARTS = ("nswer", "NSWER", "esult", "olution", "ption", "hoice", "A:", "A：", "答", "选", "结果")
_BARE_LINE = re.compile(r"(?:A:|####)?[ \t]*(-?[\d,]*\.?\d+)")
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,8}\{|\\(?:boxed|fbox)\s{0,8}(?P<bare>\d+|[A-Za-z](?![A-Za-z]))|\\[{}\\]|[{}]")
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"(?:(?:your|the|final|short)\s)*answer(?:\s(?:goes\s)?here)?\.?", re.IGNORECASE)
_FORMULA = re.compile(
    r"(?<!\\)\$\$([^$]+)\$\$|(?<!\\)\$([^$]+)(?<!\\)\$|\\\(((?:(?!\\\(|\\\)).)+)\\\)|\\\[((?:(?!\\\[|\\\]).)+)\\\]"
    r"|\\begin\{(?:equation|align|gather)\*?\}((?:(?!\\end|\\begin).)+)\\end\{(?:equation|align|gather)\*?\}",
    re.DOTALL,
)
_MARKER = re.compile(
    r"\*{0,2}\b(?:final\s+|correct\s+)?(?:answers?|result|solution)\b(?:\s+to\s+[^.:\n=]{1,60}?)?"
    r"\*{0,2}(?:\s{0,4}[:=：]+\*{0,2}|\s+(?:is|are|was|would be|must be)\b\s{0,4}[:：]?|\*{0,2}[ \t]{0,4}\n)"
    r"|\b(?:correct\s+)?(?:option|choice)\s+is\b\s{0,4}[:：]?|^[ \t]{0,4}A[:：]"
    r"|【(?:答案|解答结果)】|(?:最终|正确|最后)?(?:答案|结果)(?:应该|应)?(?:是|为|：|:|＝|=)+|故(?:答案)?(?:应?选|为)[:：]?|(?:因此|所以)?(?:应|本题)?选(?:择)?[:：]?(?=\s{0,4}[(（]?[A-J])"
    r"|^[ \t]{0,4}答[:：]|(?<=[。\n])答[:：]",
    re.IGNORECASE | re.MULTILINE,
)
_NUMBERED = re.compile(r"^\W{0,4}(?:answer|答案)\s?\(?\d{1,2}\)?\*{0,2}[:：](.*)$", re.IGNORECASE | re.MULTILINE)
_END_TOKENS = re.compile(r"(?:\s?(?:<\|[\w-]+\|>|</s>|<end_of_turn>|<eos>))+\s*\Z")
_ASIDE = re.compile(
    r"(?<=[\w$%)}])\s?[(（](?!\s?(?:or|或))[^()（）$\\]*(?:[A-Za-z]{2}|[\u4e00-\u9fff])[^()（）$\\]*[)）]"
)
_NEGATED = re.compile(
    r",?\s*\b(?:and\s+)?(?:not|rather than|instead of)\s+\\?\$?[\d.,]*\d%?(?:\s+but\b)?|(?:，|,)?而?不是\s?\d+"
)
_DENIED = re.compile(
    r"\b(?:is|are|be)\s+(?:not|false|less than|more than|greater than|at least|at most|incorrect|wrong)\b"
    r"|不是|不等于|大于|小于|\bcannot be\b|\b(?:do not|don't|cannot) (?:know|say|tell)|give up|\bno answer\b",
    re.I,
)
_EXCLUDED = re.compile(
    r"(\d\s?[-+*/×÷–]\s?\d[^=]{0,80}=\s?\$?\d.{0,80}?)\b(?:is|are)\snot\s(?!right|correct|true|the\b|possible|equal|valid|an?\b)"
    r"(?=[a-z])"
)
"""`12 - 8 = 4 girls are not in the team` denies nothing."""
_GAP = re.compile(r"[^\S\n]{3,}")
_CONDITIONAL = re.compile(r"\bif\b.*\b(?:otherwise|else)\b|如果.*否则", re.I)
_CASE = re.compile(r"\d\S{0,20}\s(?:if|when)\b|当[^当时\d]{1,40}时[^当\d]{0,40}\d", re.I)
"""`3 when n is even`: two of these are no single answer."""
_UNFINISHED = re.compile(r"\b(?:and|then|but|the|of|to|from|with|or|so|a|an|is|that|we|he|she|they|it|I)\s*$", re.I)
_COUNTED = re.compile(r"(?<=\d)\s?[(（][\u4e00-\u9fff]{1,3}[)）]")
"""What is counted, as it is noted in brackets behind a number."""
_LISTED = re.compile(r"^\s*\d{1,2}[.)、]\s+(?=\D)", re.M)
_ASSIGNED = re.compile(
    r"(?<![A-Za-z])[A-Za-z]\s?=\s?[-−]?[\d./]+(?:\s?(?:,|，|、|and|or|或|和)\s?[A-Za-z]\s?=\s?[-−]?[\d./]+)+"
)
_BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*|__([^_\n]{1,200})__")
_HEADING = re.compile(r"(?::\*\*|\*\*:)[^*]*\d[^*]*$")
"""`**2. Total:** 7 pens`: the answer stands behind the bold."""
_NUMBER = re.compile(
    r"\b(?:Jan|Febr|Septem|Octo|Novem|Decem)[a-z]*\s\d{1,2}(?:,?\s\d{4})?(?!\d)"  # a date
    r"|\b(?:March|April|May|June|July|August)\s\d{1,2}(?:,?\s\d{4})?(?!\d)|"
    r"\d+(?:\.\d+)?\s?(?:[x×]|\\times)\s?10\s?\^\s?\{?-?\d+\}?"  # scientific notation
    r"|(?<![\d:])\d+(?::\d+)+(?:\s?[AaPp]\.?[Mm]\b)?"  # a ratio or a time
    r"|(?:(?<![\w)\]}])[-−])?\d+\s\d+/\d+(?![\w/])"  # a mixed number
    r"|(?<![A-Za-z_])(?:(?<![\w)\]}])[-−])?(?:\\?[$€£¥￥]\s?)?(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+(?!\w))?"
    r"(?:\s?/\s?\d+(?![\w.]))?[½⅓⅔¼¾]?(?:\s?(?:\\?%|°|％))?|(?<!\d)[-−]?\.\d+"
)
_EQUATION = re.compile(r"[\d .,()\[\]+*/×÷·^%$−–=xX-]+")
_SENTENCE = re.compile(r"(?:[.!?](?=[\s*_)\"]|$)|[。！？])[*_)\"]*")
_LINES = re.compile(r"\n+")
_VERB = re.compile(
    r"\b(?:is|are|was|equals?|equal to|gives?|becomes?|get|to be|as|=)(?:\s+exactly|\s+equal\s+to)?"
    r"\b[:\s]*|[=＝]|(?:是|为|等于|得)[:：]?"
)
_CONTINUED = re.compile(r"\b(?:then|plus|minus|add|subtract|multiply|divide|times)\b", re.IGNORECASE)
_REASON = re.compile(r",?\s+(?:because|since|where|so that|as (?:we|the|it)|which|for)\b|(?:，|,)\s*(?:因为|由于|其中)")
_REVISED = re.compile(r"\b(?:wait|actually|correction|sorry|hold on|in fact|no,)|不对|更正|等等", re.IGNORECASE)
_HEDGED = re.compile(
    r"\b(?:maybe|perhaps|possibly|alternatively|could also|or it|or,|^or)\b"
    r"|\bor\b(?=\s+(?:maybe|perhaps|possibly))|或者|也许|可能",
    re.IGNORECASE,
)
_JOINED = re.compile(r"[\s,;、，；]*(?:and|or|和|或|与)?[\s,;、，；]*", re.IGNORECASE)
_CHOICE = re.compile(r"(?:option|choice)?\s*[(（]?([A-J])(?:[)）](?=\W|$)|[.:：、](?=\s|$)|(?=\s*[,.。;；!]?\s*$|，))")
_GROUPED_TEXT = re.compile(r"\\(?:text|mathrm|mbox|operatorname|begin|end)\s?\{[^{}]*\}")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}|[\u4e00-\u9fff]+")
_PHANTOM = re.compile(r"\\(?:[hv]?phantom|hspace|vspace)\*?\s?\{[^{}]*\}|\\q?quad")
_MATH_WORDS = frozenset(("sqrt", "pi", "sin", "cos", "tan", "log", "ln", "infinity", "exp"))
_CONTENT = re.compile(r"[^\W_]|\\[a-z]|\\\{\s*\\\}")
"""An empty box, `\\boxed{?}` or a box of blanks belongs to the problem; it is no answer."""


def extract(completion: str, opened: bool = False) -> Extracted:
    """The candidates for the final answer of a completion. `opened`: the prompt opened a thought."""
    text = final_text(completion, opened)
    if text is None:
        return NOTHING
    text = text[:-200] + _END_TOKENS.sub("", text[-200:])
    for rule in RULES:
        if found := list(dict.fromkeys(rule.find(text))):
            return Extracted(tuple(found[: MAX_ANSWERS + 1]), rule.name)
    return NOTHING


def final_text(completion: str, opened: bool = False) -> str | None:
    """What follows the last thought; None if one was opened and never closed."""
    if not opened and not (
        ("<" in completion and any(part in completion for part in _THOUGHT_PARTS))
        or "THINK]" in completion
        or "◁" in completion
    ):
        return completion
    open_now, after = opened, 0
    for tag in _THOUGHT.finditer(completion):
        if tag["close"] == "/" or tag["close2"]:
            open_now, after = False, tag.end()
        else:
            open_now = True
    return None if open_now else completion[after:]


def boxes(text: str) -> list[str]:
    """The contents of the balanced boxes in order; of a box within a box only the outer one."""
    at = text.find("\\boxed")
    if at < 0 or (0 <= text.find("\\fbox") < at):
        at = text.find("\\fbox")
    if at < 0:
        return []
    found: list[tuple[int, int]] = []
    stack: list[int] = []  # for each open brace: where its content starts if it is a box's, else -1
    for match in _BOX.finditer(text, at):
        token = match.group()
        if token == "{":
            stack.append(-1)
        elif token == "}":
            if stack and (start := stack.pop()) >= 0:
                while found and found[-1][0] > start:
                    found.pop()
                found.append((start, match.start()))
        elif match["bare"]:
            found.append(match.span("bare"))
        elif len(token) > 2:
            stack.append(match.end())
    return [text[start:end] for start, end in found]


def _in_boxes(text: str) -> list[str]:
    found: list[str] = []
    for box in dict.fromkeys(boxes(text)):
        if _CONTENT.search(_PHANTOM.sub("", box[:TAIL])):
            found.append(_box_content(box))
            if len(found) > MAX_ANSWERS:
                return found
    if found and "<" in text:
        found += [tag for tag in _in_tag(text) if "\\boxed" not in tag]
    return found


def _box_content(box: str) -> str:
    """What a box says; of a sentence in it, such as `the answer is 5`, what it states; an aligned line by itself."""
    if "{align" in box and "\\\\" not in box:
        return re.sub(r"\\(?:begin|end)\{align(?:ed)?\*?\}|(?<!\\)&", " ", box).strip()
    if (
        len(box) < 400
        and any(part in box for part in ("nswer is", "答案", "答：", "答:"))
        and (marker := _MARKER.search(box)) is not None
    ):
        rest = box[marker.end() :].lstrip(" :：").rstrip(" 。.")
        few = len(_WORD.findall(_GROUPED_TEXT.sub("", rest))) <= 2 and len(rest) < 60
        return (rest if few else _stated(rest)[0].strip("{} ")) or box
    return box


def _in_tag(text: str) -> list[str]:
    """What every `<answer>...</answer>` holds; of a sentence in it, what it states."""
    if "nswer>" not in text and "NSWER>" not in text:
        return []
    start, found = -1, list[str]()
    for tag in _TAG.finditer(text):
        if not tag.group(1):
            start = tag.end()
        elif start >= 0:
            inner, start = text[start : tag.start()].strip(), -1
            if _CONTENT.search(inner[:TAIL]) and _PLACEHOLDER.fullmatch(inner) is None:
                found.append(inner)
                if len(found) > MAX_ANSWERS:
                    break
    return [stated for inner in dict.fromkeys(found) for stated in _of_text(inner)]


def _of_text(text: str) -> list[str]:
    """The answer that a text without a box states."""
    text = text[:20_000].strip() if len(text) <= 20_000 else text.rstrip()[-TAIL:]
    for rule in RULES[2:]:
        if found := rule.find(text):
            return found
    return []


def _tail(text: str) -> str:
    """The end of a text, its dollars of money told from those around formulas, and no long gaps in it."""
    text = _GAP.sub("  ", text.rstrip()[-TAIL:].strip())
    return _money_told(text) if "$" in text else text


def _money_told(text: str) -> str:
    """The text with `\\$` for every dollar of money: one before a number, where the next dollar closes no formula, for it
    stands before a number too (`$20 / 4 = $5`) or has words in front."""
    pieces = re.split(r"(?<!\\)\$", text)
    told, at = pieces[0], 1
    while at < len(pieces):
        inside = pieces[at]
        words = re.search(r"\s[A-Za-z]{2,}", inside) is not None and re.search(r"[\\^]", inside) is None
        last = at == len(pieces) - 1
        if re.match(r"\.?\d", inside) is not None and (last or words or re.match(r"\.?\d", pieces[at + 1]) is not None):
            told += "\\$" + inside
            at += 1
        else:  # a formula, with what follows it
            told += "$" + inside + ("$" + pieces[at + 1] if at + 1 < len(pieces) else "")
            at += 2
    return told


def _in_last_line(text: str) -> list[str]:
    text = _tail(text)
    if (number := _BARE_LINE.fullmatch(text, text.rfind("\n") + 1)) is not None:
        return [number.group(1)]
    at = text.rfind("####")
    if at < 0:
        return []
    line = text[at:].lstrip("#").strip().split("\n")[0].strip()
    return [line] if line else []


def _after_marker(text: str) -> list[str]:
    text = _tail(text)
    if not (parts := [at for part in _MARKER_PARTS if (at := text.find(part)) >= 0]):
        return []
    if len(numbered := _NUMBERED.findall(text)) > 1:
        return [_stated(rest)[0] for rest in numbered if rest.strip()]
    for marker in reversed(list(_MARKER.finditer(text, max(0, min(parts) - 80)))[-8:]):
        rest = text[marker.end() :]
        stated, end = _stated(rest)
        if not stated:
            continue
        tail = rest[end:]
        if (hedge := _HEDGED.search(tail)) is not None and _NUMBER.search(tail, hedge.end()):
            return [stated, *_last_statement(tail)]
        if (revised := _REVISED.search(tail)) is not None and _NUMBER.search(tail, revised.end()):
            return _last_statement(tail)
        return [stated]
    return []


def _whole(text: str) -> list[str]:
    """A text that is the answer itself."""
    text = _tail(text)
    bare = _COUNTED.sub("", _unbold(text))
    if (word := re.match(r"(Yes|No)\b\s?,", bare)) is not None and "\n" not in bare:
        return [word.group(1)]
    if not bare or "\n" in bare or len(bare) > 400:
        return [] if not bare or re.search(r"\d|\$|\\|[\u4e00-\u9fff]", bare) else [bare]
    if (formula := _FORMULA.fullmatch(bare.rstrip("."))) is not None:
        return [formula.group(formula.lastindex or 0)]
    if "=" in bare and re.search(r"[\d%] (?:of|times|by|plus|minus) |\d, \d", bare):
        return []  # `15% of 200 = 30`, and one equation after the other
    words = [w for w in _WORD.findall(_FORMULA.sub(" ", _GROUPED_TEXT.sub("", bare))) if w.lower() not in ("and", "or")]
    latin = [w for w in words if w.isascii()]
    if names_choice(bare):
        return []
    if not re.search(r"\d|\$|\\", bare):
        return [bare] if len(words) <= 3 or not _VERB.search(bare) else _last_statement(bare) or [bare]
    lead = re.match(
        r"[A-Za-z]{3,}|(?:[Ss]o|[Ww]e|[Ii]t|[Hh]e|[Ii]s|[Aa]s|[Bb]y|[Tt]o|[Ii]n|[Ii]f)\b|[\u4e00-\u9fff]", bare
    )
    plain = (
        (lead is None and len(words) <= 1)
        or bare[0] in "+-−.([\\"
        or bare[0].isdigit()
        or (lead is not None and lead.group() in _MATH_WORDS and len(words) <= 1)
        or (re.match(r"\w+\s?[:：=]\s?[-\d]", bare) is not None and not ("=" in bare and ":" in bare))
    )
    short = (
        plain
        and len(latin) <= 2 + bare.count(":") + bare.count("=")
        and len("".join(w for w in words if not w.isascii())) <= 3
        and not _VERB.search(" ".join(words))
        and _FORMULA.search(bare) is None
    )
    return [bare] if not words or short else []


def _in_bold(text: str) -> list[str]:
    """Bold at the end: in the last line that has content."""
    lines = [line for line in _tail(text).split("\n") if line.strip()]
    if not lines or not (bold := _BOLD.findall(lines[-1])) or _HEADING.search(lines[-1]) is not None:
        return []
    inner = next(part for part in bold[-1] if part).strip().strip(":：")
    if not re.search(r"\d|\\|\$|^\(?[A-J]\)?$", inner) or (len(_WORD.findall(_GROUPED_TEXT.sub("", inner))) > 3):
        return []
    return (
        _last_statement(inner)
        if "=" in inner and _FORMULA.search(inner) is None and _WORD.search(inner)
        else [_bare(inner)]
    )


def _is_denied(sentence: str) -> bool:
    """Whether a sentence says only what the answer is not: `it is less than 5`, but not `what is not used is 16`."""
    ends = [match.end() for match in _DENIED.finditer(_EXCLUDED.sub(r"\1", sentence))]
    return bool(ends) and re.search(r"(?:=|\b(?:is|are|has|have)\b|是)[^=]{0,80}\d", sentence[ends[-1] :]) is None


def _last_statement(text: str) -> list[str]:
    """What the last sentence with a number, a formula or a choice states."""
    text = _tail(text)
    sentences = _sentences(_LISTED.sub("", text))
    last = sentences[-1] if sentences else ""
    if last.endswith(("?", "？")) or (_is_denied(_NEGATED.sub("", last)) and not choices(last)):
        return []
    for sentence in reversed(sentences):
        if sentence is sentences[-1] and _UNFINISHED.search(sentence):
            return []  # the text was cut off
        if names_choice(sentence):
            if found := choices(sentence):
                return [", ".join(found)]
            continue
        if re.search(r"\d|\$[^$]|\\", sentence) and (stated := _of_sentence(sentence)):
            return [stated]
    if re.search(r"\d|\\", text) or len(text) > 400:
        return []
    cut = _VERB.split(last)[-1].strip().strip("*.。") if len(_WORD.findall(last)) > 3 else text
    return [cut] if cut else []


RULES = (
    Rule(
        "box", "MATH, NuminaMath, Qwen2.5-Math, DeepSeek-R1: \\boxed{x}, \\fbox{x}; all of them, and the tag", _in_boxes
    ),
    Rule("answer_tag", "R1-Zero, TinyZero, Open-Reasoner-Zero: <answer>x</answer>", _in_tag),
    Rule("last_line", "GSM8K and what is tuned on it: #### x, A: x, or x alone in the last line", _in_last_line),
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
        _last_statement,
    ),
)
"""The ways of stating an answer, the strongest first."""


def _sentences(text: str) -> list[str]:
    """The sentences in order; a formula is never cut, a display formula belongs to the sentence before."""
    spans = [m.span() for m in _FORMULA.finditer(text)]
    found, start, at = list[str](), 0, 0
    for end in sorted(m.span() for pattern in (_SENTENCE, _LINES) for m in pattern.finditer(text)):
        while at < len(spans) and spans[at][1] <= end[0]:
            at += 1
        if at < len(spans) and spans[at][0] <= end[0] < spans[at][1]:
            continue
        piece = text[start : end[1]].strip()
        if text[end[0]] == "\n" and re.match(
            r"\s*(?:\\\[|\$\$|\\begin\{(?:equation|align))", text[end[1] : end[1] + 20]
        ):
            continue  # `The result is` and a display formula below it
        if piece:
            found.append(piece)
        start = end[1]
    if text[start:].strip():
        found.append(text[start:].strip())
    return found


def _stated(rest: str) -> tuple[str, int]:
    """What a marker announces, and where that ends: formulas, a choice, a short phrase, or the number of the sentence."""
    lead = re.match(r"[\s*:：_>]*", rest)
    start = lead.end() if lead is not None else 0
    body = rest[start : start + 1500]
    if not body:
        return "", 0
    sentences = _sentences(body)
    sentence = sentences[0] if sentences else ""
    end = start + body.find(sentence) + len(sentence)
    if (choice := _CHOICE.match(_unbold(_REASON.split(sentence, maxsplit=1)[0]))) is not None:
        return choice.group(1), end
    if (reason := _REASON.search(sentence)) is not None and re.search(r"\d|\$|\\", sentence[: reason.start()]):
        sentence = sentence[: reason.start()]
    bare = _bare(_ASIDE.sub("", _NEGATED.sub(" ", sentence))) or _bare(sentence)
    if (word := re.match(r"(?:Yes|No|True|False)\b", bare, re.I)) is not None:
        return word.group(), end
    short = len(_WORD.findall(_GROUPED_TEXT.sub("", bare))) <= 3 or not _NUMBER.search(bare)
    clause = _VERB.search(" ".join(_WORD.findall(bare))) or re.search(r"[\u4e00-\u9fff]{2,}.*\d", bare)
    if short and not clause and not _FORMULA.search(bare):
        return bare, end
    return _of_sentence(sentence), end


def _of_sentence(sentence: str) -> str:
    """The answer in a sentence: its last formulas, else its equation, else what follows the verb, else its last number."""
    text = as_equations(without_labels(_bare(sentence)))
    if "\\" not in text and "$" not in text and re.search(r"[{}@]", text):
        return ""  # neither a sentence nor mathematics
    numbers = list(_NUMBER.finditer(text))
    if (
        _CONDITIONAL.search(text)
        or len(_CASE.findall(text)) > 1
        or (len(numbers) > 1 and _HEDGED.search(text, numbers[0].end(), numbers[-1].end()) is not None)
    ):
        return text
    if re.search(r"\d", kept := _NEGATED.sub(" ", text)):
        text = kept.strip()
    elif kept != text:
        return ""
    if re.search(r"\d|\$|\\", kept := _ASIDE.sub("", text)):
        text = kept.strip()
    text = main_clause(text)
    formulas = list(_FORMULA.finditer(text))
    plain = _FORMULA.sub(lambda m: " " * len(m.group()), text).replace("\\$", "$ ")
    numbers = list(_NUMBER.finditer(plain))
    if formulas and not (numbers and numbers[-1].start() > formulas[-1].end()):
        run = [formulas[-1]]
        for before, after in reversed(list(pairwise(formulas))):
            if _JOINED.fullmatch(text[before.end() : after.start()]) is None:
                break
            run.insert(0, before)
        if len(run) > 1:  # a list or a hedge; either way all of it
            return text[run[0].start() : run[-1].end()]
        return _last_line(run[0].group(run[0].lastindex or 0))
    if not numbers:
        return text if "\\" in text else ""
    runs = [
        m for m in _EQUATION.finditer(plain) if re.search(r"\d.*=.*\d", m.group()) and m.end() >= numbers[-1].start()
    ]
    if runs:
        return _of_equation(runs[-1].group(), plain[: runs[-1].start()])
    chosen = numbers[-1]
    if (assigned := _ASSIGNED.search(plain)) is not None:
        return assigned.group()
    verbs = [m for m in _VERB.finditer(plain) if m.end() <= chosen.start()]
    if verbs and (first := _NUMBER.search(plain, verbs[-1].end())) is not None:
        chosen = first
        rest = [n for n in numbers if n.start() >= first.start()]
        if len(rest) > 1 and all(_JOINED.fullmatch(plain[a.end() : b.start()]) for a, b in pairwise(rest)):
            return plain[first.start() : rest[-1].end()]
        if _CONTINUED.search(plain, chosen.end(), numbers[-1].start()):
            chosen = numbers[-1]
    if (hedge := _near_hedge(plain, chosen.start(), chosen.end())) is not None:
        return hedge
    if (variable := re.search(r"(?<![A-Za-z])([A-Za-z])\s?=\s?$", plain[: chosen.start()])) is not None:
        return f"{variable.group(1)} = {_amount(chosen)}"
    return _amount(chosen) + _unit_after(plain, chosen.end())


def _amount(number: re.Match[str]) -> str:
    return number.group().replace("$ ", "$")


def _of_equation(equation: str, before: str) -> str:
    """The equation, for its truth to be checked. Where it is the end of a step (`we have 2 + 5 + 9 = 21`), or its left side began
    in words (`15% of 200 = 30`), what it arrives at counts."""
    worded = re.match(r"\s*[xX*/×÷+]", equation) is not None  # words stand in the left side: 80 minutes / 4 = 20
    equation = equation.replace("$", "").replace("–", "-").strip(" .,/xX")
    equation = re.sub(r"(?<=[\d)])\s*[xX]\s*(?=[\d(.])", "*", equation)
    equation = next(part for part in reversed(equation.split(", ")) if "=" in part)
    sides = equation.split("=")
    if len(sides) == 2 and (
        re.search(r"\bwe (?:have|get|obtain)\s*$", before)
        or re.search(r"\b(?:of|from|by|times|plus|minus)\s*$", before)
        or worded
    ):
        return sides[1].strip()
    return "=".join(sides)


def _last_line(formula: str) -> str:
    """The last line of a derivation, which starts with a sign."""
    if "\\begin" in formula.replace("\\begin{aligned}", "").replace("\\begin{align", "") or "\\\\" not in formula:
        return formula
    lines = [line for line in re.sub(r"\\(?:begin|end)\{align(?:ed)?\*?\}", "", formula).split("\\\\") if line.strip()]
    last = lines[-1].replace("&", " ").strip() if lines else formula
    return last if last.startswith("=") or len(lines) == 1 or all("=" in line for line in lines) else formula


def _unit_after(text: str, end: int) -> str:
    """The known unit after a number: ` km`, ` square meters`."""
    if (many := re.match(r"\s?(?:thousand|million|billion|trillion|dozen|万|亿)\b", text[end : end + 20])) is not None:
        return many.group()
    words = re.match(
        r"[\s-]?(?!/)([A-Za-z\u4e00-\u9fff°²³^/·]+\d?(?:\s(?:per\s)?[A-Za-z]+){0,2})", text[end : end + 40]
    )
    if words is None:
        return ""
    pieces = words.group(1).split()
    for count in range(len(pieces), 0, -1):
        unit = read_unit(" ".join(pieces[:count]))
        if unit is not None and unit.measures and (len(pieces[0]) > 1 or not pieces[0].isascii()):
            return " " + " ".join(pieces[:count])
    return ""


def _near_hedge(text: str, start: int, end: int) -> str | None:
    """`4 or 5` around the candidate, which is then taken whole and equals no single answer."""
    before, after = text[max(0, start - 40) : start], text[end : end + 40]
    if re.search(r"\d\W{0,4}\s+or\s+(?:\w+\s+){0,2}\W{0,4}$|\d\s?或者?\s?$", before) or re.match(
        r"\W{0,4}\s+or\s+(?:\w+\s+){0,2}\W{0,4}\d|\s?或者?\s?\d", after
    ):
        found = [m.group() for m in _NUMBER.finditer(before[-20:] + text[start:end] + after[:20])]
        return " or ".join(found)
    return None


def _unbold(text: str) -> str:
    return text.replace("**", "").replace("__", "").strip() if "**" in text or "__" in text else text.strip()


def _bare(text: str) -> str:
    """Without bold, and without the full stop at the end."""
    return _unbold(text).strip().rstrip("。！").strip().removesuffix(".").strip()
