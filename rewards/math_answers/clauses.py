"""Removes the parts of a sentence that are not its answer: reasons, origins, comparisons, labels,
and choices that it rules out."""

from __future__ import annotations

import re

# Possessive, so that a whole amount is taken or none: not the 1 of `1,200 = ...`.
_AMOUNT = r"\\?\$?\d++(?:[.,:]\d++)*+%?+\$?+(?!\s?[=+*/×÷^<>−:-]|\w)"
_NO_CLAUSE = (
    r"(?:(?!(?:that|this|which|he|she|it|they|we|you|there"
    r"|has|have|had|is|are|was|were|will|gets?|needs?)\b)[A-Za-z']+\s+)"
)
_PARTS = (
    re.compile(  # all before the conclusion
        r"^.*[\s,;，；](?:so(?!\s+(?:that|far|many|much|on)\b)(?![\w-])|(?:therefore|thus|hence)\b)"
        r"|^.*\brounds?\s(?:(?:up|down|off)\s)?to\b(?!\sthe\b|\s\d+\s(?:decimal|significant))"
        r"|^.*[,;]\s(?:and|but)\s(?:since|because|as)\b[^,]*,(?=\s)|^.*(?:所以|因此|从而)",
        re.IGNORECASE,
    ),
    re.compile(
        r"^\W*(?:(?:(?:so|therefore|thus|hence|then|and|now),?\s+)?"
        r"(?:because|since|given that|when|as)\b(?:[^,，]|(?<=\d),(?=\d))*,(?=\s)"
        r"|(?:因为|由于)[^,，]*[,，])",
        re.I,
    ),
    re.compile(
        r",?\s+(?:because|since)\b.*$|,\s+who\b[^,=]*$|,\s+from\s\S+\sto\s\S+\s*$"
        r"|,\s+which\s(?:is|was)\s[^,]*\b(?:than|higher|lower|more|less|fewer)\b.*$"
        r"|\swhen\s[^,.]*\b(?:is|are)\s\w+ed\b.*$|[,，]?\s*(?:因为|由于).*$",
        re.IGNORECASE,
    ),
    re.compile(
        rf"\b(?:(?:after|before)\s+(?:(?:he|she|they|it|we)\s+)?{_NO_CLAUSE}{{0,4}}{_AMOUNT}"
        rf"|(?:[a-z]+er|more|less|worse) than\s+{_NO_CLAUSE}{{0,3}}{_AMOUNT}"
        rf"|out of\s+{_NO_CLAUSE}{{0,3}}{_AMOUNT}"
        rf"|of (?:the|these|those|all|his|her|their|its|our|my)\s+{_NO_CLAUSE}?{_AMOUNT}"
        rf"|(?:from|by|among)\s+{_NO_CLAUSE}{{0,2}}{_AMOUNT})",
        re.IGNORECASE,
    ),
)
"""Parts of a sentence that hold numbers but not its answer, in the order in which they are
removed."""
_LABEL = re.compile(
    r"\b(?:step|equation|eqn?\.?|formula|question|problem|exercise|figure|fig\.|case|section"
    r"|theorem|lemma|chapter|example|table|method|part|rule)"
    r"\s?[(#]?\d{1,3}(?:\.\d+)*\)?(?!\s?[=+*/^×÷]|\w)"
    r"|第\d+[步题章节问]|(?:步骤|问题|例)\d+",
    re.IGNORECASE,
)
_SAID_TO_BE = re.compile(
    r"(?<![\w+*/×÷^)=.-])(?<![+*/×÷^)=-]\s)(\d+(?:\.\d+)?(?:\s?[+*/×÷-]\s?\d+(?:\.\d+)?)+)"
    r"\s(?:is|are|equals|gives|makes)\s(?=-?\d)"
)
_CHOICES = re.compile(
    r"(?:\b(?P<concluded>so|therefore|thus|hence|choose|chose|pick|select)"
    r"\s(?:the\s)?(?:answer\sis\s)?)?"
    r"\b(?:[Oo]ption|[Cc]hoice)\s?[(（]?(?P<named>[A-J])\b[)）]?"
    r"|\b(?:so|therefore|thus|hence|choose|chose|pick|select),?\s"
    r"(?:[(（](?P<brackets>[A-J])[)）]|(?P<bare>[B-HJ])(?=\s?[.,;]|\s(?:because|since|as)\b|$))"
    r"|(?<![A-Za-z])(?P<before>[A-J])[)）]? (?=is (?:the )?(?:correct|right))"
    r"|选项?(?:为|是)?\s?[(（]?(?P<chosen>[A-J])(?![A-Za-z])"
)
_RULED_OUT = re.compile(
    r"\s?(?:fails?\b|(?:is|are|was)\s(?:not\b|false|wrong|incorrect|impossible|excluded|out\b)"
    r"|cannot|can't|doesn't|does not)"
    r"|\s?(?:错|不|排除)"
)
_HELD = re.compile(r"\s?(?:is|must be)\s(?:the\s)?(?:only\s)?(?:correct|right|true|answer)")


def main_clause(sentence: str) -> str:
    """The part of a sentence that states the answer, without reasons, origins and comparisons. A
    part is kept if no number or formula would be left without it."""
    for part in _PARTS:
        origin = part is _PARTS[-1]
        if origin and "=" in sentence:
            break
        kept = part.sub(" ", sentence)
        if (
            re.search(r"\d" if origin else r"\d|\$[^$]|\\[a-z]", kept)
            and kept.count("$") % 2 == sentence.count("$") % 2
        ):
            sentence = kept.strip()
    return sentence


def without_labels(sentence: str) -> str:
    """The sentence without labels such as `Step 3` and `equation (3)`, whose numbers are no
    amounts."""
    return _LABEL.sub(" ", sentence)


def as_equations(sentence: str) -> str:
    """The sentence with `2 + 2 = 5` for `2 + 2 is 5`, so that its truth is checked."""
    return _SAID_TO_BE.sub(r"\1 = ", sentence)


def choices(sentence: str) -> list[str]:
    """The letters that a sentence chooses: those that it concludes or calls right, else all that it
    does not rule out."""
    named, made = list[str](), list[str]()
    for match in _CHOICES.finditer(sentence):
        letter = next(
            group for name, group in match.groupdict().items() if group and name != "concluded"
        )
        if _RULED_OUT.match(sentence, match.end()):
            continue
        named.append(letter)
        if match["concluded"] or not match["named"] or _HELD.match(sentence, match.end()):
            made.append(letter)
    return list(dict.fromkeys(made or named))


def names_choice(sentence: str) -> bool:
    return _CHOICES.search(sentence) is not None
