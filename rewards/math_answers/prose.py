"""The answer that a sentence states: its choice, formula, equation or number."""

from __future__ import annotations

import re
from itertools import pairwise

from .clauses import as_equations, choices, main_clause, names_choice, without_labels
from .number_words import in_digits
from .sentences import FORMULA, GROUPED_TEXT, NUMBER, WORD, bare, sentences, tail, unbold
from .units import read_unit

VERB = re.compile(
    r"\b(?:is|are|was|equals?|equal to|gives?|becomes?|get|to be|as|=)(?:\s+exactly|\s+equal\s+to)?"
    r"\b[:\s]*|[=＝]|(?:是|为|等于|得)[:：]?"
)
_ASIDE = re.compile(
    r"(?<=[\w$%)}])\s?[(（](?!\s?(?:or|或))[^()（）$\\]*(?:[A-Za-z]{2}|[\u4e00-\u9fff])[^()（）$\\]*[)）]"
)
_OTHERWISE_PUT = re.compile(r"\s?[(（]\s?(?:or|或)\s([^()（）]{1,30})[)）]")
"""The same value in another form, in brackets: `3/4 (or 0.75)`."""
_NEGATED = re.compile(
    r",?\s*\b(?:and\s+)?(?:not|rather than|instead of)\s+\\?\$?[\d.,]*\d%?(?:\s+but\b)?"
    r"|\bnot\s+[(（]?[A-J][)）]?,?\s+but\b"
    r"|(?:，|,)?而?不是\s?\d+"
)
_DENIED = re.compile(
    r"\b(?:is|are|be)\s+(?:not|false|less than|more than|greater than|at least|at most"
    r"|incorrect|wrong)\b"
    r"|不是|不等于|大于|小于|\b(?:cannot|could|might|may) be\b|可能是"
    r"|\b(?:do not|don't|cannot) (?:know|say|tell)|give up|\bno answer\b",
    re.I,
)
_EXCLUDED = re.compile(
    r"(\d(?:\s?[A-Za-z]{1,20})?\s?[-+*/×÷–]\s?\d[^=]{0,80}=\s?\$?\d.{0,80}?)"
    r"\b(?:is|are)\snot\s(?!right|correct|true|the\b|possible|equal|valid|an?\b)(?=[a-z])"
)
"""An equation whose result is then denied a property: `12 - 8 = 4 girls are not in the team` states
4."""
_CONDITIONAL = re.compile(r"\bif\b.*\b(?:otherwise|else)\b|如果.*否则", re.I)
_CASE = re.compile(r"\d\S{0,20}\s(?:if|when)\b|当[^当时\d]{1,40}时[^当\d]{0,40}\d", re.I)
"""A value with its case, as `3 when n is even`. Two of them are no single answer."""
_UNFINISHED = re.compile(
    r"\b(?:and|then|but|the|of|to|from|with|or|so|a|an|is|that|we|he|she|they|I)\s*$", re.I
)
_NO_SOLUTION = re.compile(r"\b(?:has|have|is|are)\s(no\s(?:real\s|integer\s)?solutions?)\b", re.I)
_LISTED = re.compile(r"^\s*\d{1,2}[.)、]\s+(?=\D)", re.M)
_CHANCE = re.compile(r"\b(?:probability|chance|fraction)\b", re.IGNORECASE)
_OUT_OF = re.compile(r"(\d+) out of (\d+)")
_PLAIN_EQUATION = re.compile(
    r"(?<![A-Za-z\d])[A-Za-z](?:\([a-z]\))?\s?=\s?(?=[^=]*[a-z])[-−]?\d*(?:[a-z](?:\^?\d|[²³])?)?"
    r"(?:\s?[-+*/−]\s?(?:\d+(?:\.\d+)?)?(?:[a-z](?:\^?\d|[²³])?)?)+(?=\s*[.。]?\s*\Z)"
)
"""An equation such as `y = 2x + 1` outside dollars."""
_NAMED_AT_END = re.compile(r"\b(?:is|was)\s(?:a\s)?([A-Z][a-z]+)\.?\s*\Z")
_ASSIGNED = re.compile(
    r"(?<![A-Za-z\d])[A-Za-z]\s?=\s?[-−]?[\d./]+"
    r"(?:\s?(?:,|，|、|and|or|或|和)\s?[A-Za-z]\s?=\s?[-−]?[\d./]+)+"
)
_STEP = re.compile(r"\b(?:we (?:have|get|obtain)|of|from|by|times|plus|minus)\s*$")
_EQUATION = re.compile(r"[\d .,()\[\]+*/×÷·^%$−–=xX-]+")
_CONTINUED = re.compile(
    r"\b(?:then|plus|minus|add|subtract|multiply|divide|times)\b", re.IGNORECASE
)
_REASON = re.compile(
    r",?\s+(?:because|since|where|so that|as (?:we|the|it)|which|for)\b"
    r"|(?:，|,)\s*(?:因为|由于|其中)"
)
_HEDGED = re.compile(
    r"\b(?:maybe|perhaps|possibly|alternatively|could also|or it|or,|^or)\b"
    r"|\bor\b(?=\s+(?:maybe|perhaps|possibly))|或者|也许|可能",
    re.IGNORECASE,
)
_CHINESE_CLAUSE = re.compile(r"[\u4e00-\u9fff]{2,}.*\d")
_JOINED = re.compile(r"[\s,;、，；]*(?:and|or|和|或|与)?[\s,;、，；]*", re.IGNORECASE)
_CHOICE = re.compile(
    r"(?:option|choice)?\s*[(（]?([A-J])"
    r"(?:[)）](?=\W|$)|[.:：、](?=\s|$)|(?=\s*[,.。;；!]?\s*$|，))"
)
_INEQUALITY = re.compile(
    r"(?:(?<![\w.])[-−]?\d+(?:\.\d+)?\s?[<>≤≥]=?\s?)?"
    r"(?<![A-Za-z])[A-Za-z]\s?[<>≤≥]=?\s?[-−]?\d+(?:\.\d+)?"
)
_RANGE = re.compile(
    r"\b[Bb]etween\s(?:\$\s)?(?P<low>\d+(?:\.\d+)?)\sand\s(?:\$\s)?(?P<high>\d+(?:\.\d+)?)"
    r"|(?<![\d./^*+=-])\d+(?:\.\d+)?(?:\s?[-–~～至到]\s?|\sto\s|\sthrough\s)\d+(?:\.\d+)?"
    r"(?![\d/]|\s?[=+*×÷^])"
)
_CONTEXT = re.compile(
    r"\b(?:for|in|on|at|with|during|over|within|every|each|per|from|than|who|whose"
    r"|after|before|until|when|while|which)\s(?!total\b|all\b|fact\b)(?:[A-Za-z']+\s){0,3}\Z"
    r"|\d.*\bto\s[a-z]+\s(?:[A-Za-z']+\s){0,3}\Z|[用以在每]\Z",
    re.IGNORECASE,
)
"""Phrases before a number that is no answer but a price, a time or a purpose."""
_NO_CONTEXT = re.compile(
    r"\b(?:(?:left|ends?(?:\sup)?|ended(?:\sup)?)\swith|result(?:s|ed|ing)?\sin"
    r"|(?:needs?|needed|has|have|had|able|going|used|wants?|takes?|up|left|gets?)\sto\s\w+)"
    r"\s(?:\w+\s){0,3}\Z",
    re.IGNORECASE,
)
_ROUNDED = re.compile(r"\s?≈\s?-?\d+(?:\.\d+)?")
_IN_TOTAL = re.compile(r".{0,30}\b(?:in total|altogether|in all|total)\b")
_MANY = re.compile(r"\s?(?:thousand|million|billion|trillion|dozen|万|亿)\b")
_UNIT_WORDS = re.compile(
    r"[\s-]?(?!/)([A-Za-z\u4e00-\u9fff°²³^/·]+\d?(?:\s(?:per\s)?[A-Za-z]+){0,2})"
)
_OR_BEFORE = re.compile(r"\d\W{0,4}\s+or\s+(?:\w+\s+){0,2}\W{0,4}$|\d\s?或者?\s?$")
_OR_AFTER = re.compile(r"\W{0,4}\s+or\s+(?:\w+\s+){0,2}\W{0,4}\d|\s?或者?\s?\d")
_LISTED_WITH = re.compile(r"\s[A-Za-z\s']{0,40}(?:,|,?\sand)\s(?:\$\s)?\Z|\sto\s\Z")
"""The text between numbers that are listed, as in `for 3 shirts and 2 hats`."""


def last_statement(text: str) -> list[str]:
    """A list of the one answer that the last sentence with a number, formula or choice states;
    empty if that sentence denies, asks or is cut off."""
    text = tail(text)
    parts = sentences(_LISTED.sub("", text))
    last = parts[-1] if parts else ""
    if last.endswith(("?", "？")) or (_is_denied(_NEGATED.sub("", last)) and not choices(last)):
        return []
    if (nothing := _NO_SOLUTION.search(last)) is not None:
        return [nothing.group(1)]
    if last and re.search(r"\d|\$|\\", last) is None:
        parts[-1] = last = in_digits(last)
    for sentence in reversed(parts):
        if sentence is parts[-1] and _UNFINISHED.search(sentence):
            return []  # the text was cut off
        if sentence.endswith(("?", "？")):
            return []  # what the problem asks, without an answer behind it
        if names_choice(sentence):
            if chosen := choices(sentence):
                return [", ".join(chosen)]
            continue
        if re.search(r"\d|\$[^$]|\\", sentence) and (stated := of_sentence(sentence)):
            return [stated]
    if re.search(r"\d|\\", text) or len(text) > 400:
        return []
    cut = VERB.split(last)[-1].strip().strip("*.。") if len(WORD.findall(last)) > 3 else text
    return [cut] if cut else []


def _is_denied(sentence: str) -> bool:
    """Whether a sentence only says what the answer is not, as `it is less than 5` does and `what is
    not used is 16` does not."""
    ends = [match.end() for match in _DENIED.finditer(_EXCLUDED.sub(r"\1", sentence))]
    rest = sentence[ends[-1] :] if ends else "= 0"
    return re.search(r"(?:=|\b(?:is|are|has|have)\b|是)[^=]{0,80}\d", rest) is None


def announced(rest: str) -> tuple[str, int]:
    """The answer that a marker before `rest` announces, and the index where its sentence ends. The
    answer is a choice, a short phrase, or what `of_sentence` finds; empty if there is none."""
    lead = re.match(r"[\s*:：_>]*", rest)
    start = lead.end() if lead is not None else 0
    body = rest[start : start + 1500]
    if not body:
        return "", 0
    stated = sentences(body)
    sentence = stated[0] if stated else ""
    end = start + body.find(sentence) + len(sentence)
    named = unbold(_REASON.split(sentence, maxsplit=1)[0])
    if (choice := _CHOICE.match(named)) is not None:
        content = bare(named[choice.end() :])
        both = content and len(content) < 40 and NUMBER.match(content) is not None
        return f"({choice.group(1)}) {content}" if both else choice.group(1), end
    reason = _REASON.search(sentence)
    if reason is not None and re.search(r"\d|\$|\\", sentence[: reason.start()]):
        sentence = sentence[: reason.start()]
    sentence = _OTHERWISE_PUT.sub(r" or \1", sentence)
    bare_ = bare(_ASIDE.sub("", _NEGATED.sub(" ", sentence))) or bare(sentence)
    if (word := re.match(r"(?:Yes|No|True|False)\b", bare_, re.I)) is not None:
        return word.group(), end
    if re.search(r"[\d$\\]", bare_) is None:
        bare_ = sentence = in_digits(bare_)
    short = len(WORD.findall(GROUPED_TEXT.sub("", bare_))) <= 3 or not NUMBER.search(bare_)
    clause = VERB.search(" ".join(WORD.findall(bare_))) or _CHINESE_CLAUSE.search(bare_)
    if short and not clause and not FORMULA.search(bare_):
        return bare_, end
    return of_sentence(sentence), end


def hedge_after(text: str) -> bool:
    """Whether the text goes on to a second answer, as `maybe 6` does."""
    hedge = _HEDGED.search(text)
    return hedge is not None and NUMBER.search(text, hedge.end()) is not None


def of_sentence(sentence: str) -> str:
    """The answer in a sentence: its last formulas, else its equation, else the number behind the
    verb, else its last number; empty if there is none."""
    text = as_equations(without_labels(bare(_OTHERWISE_PUT.sub(r" or \1", sentence))))
    if "\\" not in text and "$" not in text and re.search(r"[{}@]", text):
        return ""  # neither a sentence nor mathematics
    if _CHANCE.search(text) is not None:
        text = _OUT_OF.sub(r"\1/\2", text)
    numbers = list(NUMBER.finditer(text))
    # Returned whole, `5 if the coin is fair, otherwise 7` equals no number.
    if _CONDITIONAL.search(text) or len(_CASE.findall(text)) > 1:
        return text
    if len(numbers) > 1 and _HEDGED.search(text, numbers[0].end(), numbers[-1].end()) is not None:
        return text
    if re.search(r"\d", kept := _NEGATED.sub(" ", text)):
        text = kept.strip()
    elif kept != text:
        return ""
    if re.search(r"\d|\$|\\", kept := _ASIDE.sub("", text)):
        text = kept.strip()
    text = main_clause(text)
    formulas = list(FORMULA.finditer(text))
    plain = FORMULA.sub(lambda m: " " * len(m.group()), text).replace("\\$", "$ ")
    numbers = list(NUMBER.finditer(plain))
    if formulas and not (numbers and numbers[-1].start() > formulas[-1].end()):
        return _of_formulas(text, formulas)
    if not numbers:
        return text if "\\" in text else ""
    between = text[formulas[-1].end() : numbers[-1].start()] if formulas else ""
    if re.fullmatch(r",?\s(?:or|i\.e\.),?\s", between) is not None:
        return f"{formulas[-1].group()} or {numbers[-1].group()}"
    return _of_numbers(plain, numbers)


def _of_formulas(text: str, formulas: list[re.Match[str]]) -> str:
    run = [formulas[-1]]
    for before, after in reversed(list(pairwise(formulas))):
        if _JOINED.fullmatch(text[before.end() : after.start()]) is None:
            break
        run.insert(0, before)
    if len(run) > 1:  # a list or a hedge; either way all of it
        return text[run[0].start() : run[-1].end()]
    return _last_line(run[0].group(run[0].lastindex or 0))


def _of_numbers(plain: str, numbers: list[re.Match[str]]) -> str:
    """The answer in a sentence with numbers and no formula."""
    runs = [m for m in _EQUATION.finditer(plain) if re.search(r"\d.*=.*\d", m.group())]
    if runs and runs[-1].end() >= numbers[-1].start():
        return _of_equation(runs[-1].group(), plain[: runs[-1].start()])
    if (assigned := _PLAIN_EQUATION.search(plain) or _ASSIGNED.search(plain)) is not None:
        return assigned.group()
    if (named := _NAMED_AT_END.search(plain)) is not None and named.start() > numbers[-1].end():
        return named.group(1)
    inequalities = list(_INEQUALITY.finditer(plain))
    if inequalities and inequalities[-1].end() >= numbers[-1].end():
        return inequalities[-1].group()
    if (ranges := list(_RANGE.finditer(plain))) and ranges[-1].end() >= numbers[-1].end():
        return _of_range(ranges[-1], plain)
    verbs = [m for m in VERB.finditer(plain) if m.end() <= numbers[-1].start()]
    if verbs and (first := NUMBER.search(plain, verbs[-1].end())) is not None:
        chosen = first
        rest = [n for n in numbers if n.start() >= first.start()]
        gaps = [plain[a.end() : b.start()] for a, b in pairwise(rest)]
        if gaps and all(_JOINED.fullmatch(gap) for gap in gaps):
            return plain[first.start() : rest[-1].end()]
        if _CONTINUED.search(plain, chosen.end(), numbers[-1].start()):
            chosen = numbers[-1]
    else:
        chosen = _object(plain, numbers)
    if (hedge := _near_hedge(plain, chosen.start(), chosen.end())) is not None:
        return hedge
    variable = re.search(r"(?<![A-Za-z])[A-Za-z]\s?=\s?$", plain[: chosen.start()])
    prefix = variable.group() if variable is not None else ""
    if (rounded := _ROUNDED.match(plain, chosen.end())) is not None:
        return prefix + _amount(chosen) + rounded.group()
    return prefix + _amount(chosen) + ("" if prefix else _unit_after(plain, chosen.end()))


def _of_range(match: re.Match[str], sentence: str) -> str:
    """A range as it is written, since `3 to 5 days` is neither 3 nor 5; as a ratio where the
    sentence speaks of one."""
    if match["low"]:
        return f"({match['low']}, {match['high']})"
    is_ratio = re.search(r"\bratio\b", sentence, re.IGNORECASE) is not None
    return re.sub(r"\sto\s", ":", match.group()) if is_ratio else match.group()


def _object(plain: str, numbers: list[re.Match[str]]) -> re.Match[str]:
    """The last number that is in no phrase of price, time or purpose: 40 in `he paid $40 for 5
    shirts`, 60 in `60 miles in 1 hour`."""
    last = numbers[-1]
    if _IN_TOTAL.match(plain, last.end()) is not None:
        return last
    free, before = list[re.Match[str]](), None
    for number in numbers:
        gap = plain[before.end() : number.start()] if before is not None else ""
        context = _is_context(plain[: number.start()])
        if context or (before is not None and _LISTED_WITH.match(gap) is not None):
            before = number
        else:
            before = None
            free.append(number)
    return free[-1] if free else last


def _is_context(before: str) -> bool:
    before = before[-80:].removesuffix("$ ").removesuffix("-")
    return _CONTEXT.search(before) is not None and _NO_CONTEXT.search(before) is None


def _amount(number: re.Match[str]) -> str:
    return number.group().replace("$ ", "$")


def _of_equation(equation: str, before: str) -> str:
    """The whole equation, so that its truth is checked; only its right side where the left one
    began in words (`15% of 200 = 30`) or a step led to it (`we have 2 + 5 + 9 = 21`)."""
    worded = re.match(r"\s*(?:[xX*/×÷+]|[-–]\s)", equation) is not None  # 80 minutes / 4 = 20
    equation = re.sub(r"\$\s*", "", equation).replace("–", "-")
    equation = re.sub(r"^(?:[ ,/xX]|\.(?!\d))+", "", equation).rstrip(" .,/xX")
    equation = re.sub(r"(?<=[\d)])\s*[xX]\s*(?=[\d(.])", "*", equation)
    equation = next(part for part in reversed(equation.split(", ")) if "=" in part)
    worded |= equation.count("(") != equation.count(")")
    if equation.count("=") == 1 and (worded or _STEP.search(before)):
        return equation.partition("=")[2].strip()
    return equation


def _last_line(formula: str) -> str:
    """The last line of a derivation whose lines go on from the one before; any other formula
    unchanged."""
    inner = re.sub(r"\\(?:begin|end)\{align(?:ed)?\*?\}", "", formula)
    lines = [line for line in inner.split("\\\\") if line.strip()]
    if "\\begin" in inner:
        return formula
    if len(lines) < 2:
        return inner.replace("&", " ").strip() if "\\&" not in inner else formula
    last = lines[-1].replace("&", " ").strip()
    return last if last.startswith("=") or all("=" in line for line in lines) else formula


def _unit_after(text: str, end: int) -> str:
    """The known unit after a number: ` km`, ` square meters`."""
    if (many := _MANY.match(text, end)) is not None:
        return many.group()
    words = _UNIT_WORDS.match(text[end : end + 40])
    if words is None:
        return ""
    pieces = words.group(1).split()
    if pieces[0] == "in" and text[end + 3 : end + 4].isspace():
        return ""  # `$4 in change`
    for count in range(len(pieces), 0, -1):
        unit = read_unit(" ".join(pieces[:count]))
        letter = len(pieces[0]) == 1 and pieces[0].isascii() and text[end:].strip(" .") != pieces[0]
        if unit is not None and unit.measures and not letter:
            return " " + " ".join(pieces[:count])
    return ""


def _near_hedge(text: str, start: int, end: int) -> str | None:
    """All numbers of a hedge around the candidate, as `4 or 5`, which equals no single answer; None
    without a hedge."""
    before, after = text[max(0, start - 40) : start], text[end : end + 40]
    if _OR_BEFORE.search(before) is None and _OR_AFTER.match(after) is None:
        return None
    numbers = NUMBER.findall(before[-20:] + text[start:end] + after[:20])
    return " or ".join(numbers)
