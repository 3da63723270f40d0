"""Rewards for form: format, language, length and repetition. They are cheap and run inline; graded
ones give `partial`."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence

import regex

from .inputs import Reward, RewardInput
from .verdict import Status, Verdict

FORMATS = {
    "think": r"<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)+",
    "think_answer": (
        r"<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>|</?think>).)+</answer>\s*"
    ),
    "boxed": r".*\\boxed\{.*",
}
_WORD = re.compile(
    r"[A-Za-z]{2,}|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
    r"|[\u0400-\u04ff]{2,}|[\u0600-\u06ff]{2,}"
)
_SCRIPTS = {
    "en": re.compile(r"[A-Za-z]"),
    "zh": re.compile(r"[\u3400-\u9fff]"),
    "ja": re.compile(r"[\u3040-\u30ff\u3400-\u9fff]"),
    "ko": re.compile(r"[\uac00-\ud7af]"),
    "ru": re.compile(r"[\u0400-\u04ff]"),
    "ar": re.compile(r"[\u0600-\u06ff]"),
}
_NOT_PROSE = re.compile(r"```.*?```|\$[^$]*\$|\\[A-Za-z]+|<[^<>]*>", re.DOTALL)


def _graded(score: float, best: float = 1.0) -> Verdict:
    status = (
        Status.CORRECT if score >= best else Status.WRONG if score <= best - 1.0 else Status.PARTIAL
    )
    return Verdict(status=status, score=score)


class _Inline(Reward):
    """Grades completions one after the other, in the calling thread."""

    inline = True

    @abstractmethod
    def score(self, row: RewardInput) -> float:
        """The score of a completion, at most `best`."""

    best = 1.0

    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        return [_graded(self.score(row), self.best) for row in batch]


class FormatReward(_Inline):
    """1.0 if the whole completion has the form, else 0.0 (DeepSeek-R1, section 2.2.2).

    `pattern`: `think` (`<think>..</think>` and an answer), `think_answer` (as in R1, with
    `<answer>..</answer>`), `boxed`, or a regular expression for the whole completion. A `<think>`
    that the prompt opened counts as the completion's. An answer that a regular expression does not
    decide within `timeout` seconds is `over_limit`.
    """

    def __init__(self, pattern: str = "think", timeout: float = 10.0) -> None:
        self.inline = pattern in FORMATS  # those take linear time
        self._timeout = timeout
        self._finished = 0
        try:
            self._pattern = regex.compile(FORMATS.get(pattern, pattern), regex.DOTALL)
        except regex.error as error:
            known = ", ".join(FORMATS)
            raise ValueError(
                f"pattern {pattern!r} is neither {known} nor a regular expression: {error}"
            ) from error

    @property
    def finished(self) -> int:
        return self._finished

    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        verdicts = []
        for row in batch:
            try:
                verdicts.append(_graded(self.score(row)))
            except TimeoutError:
                message = f"the pattern took more than {self._timeout:g} s"
                verdicts.append(Verdict(status=Status.OVER_LIMIT, score=0.0, message=message))
            self._finished += 1
        return verdicts

    def score(self, row: RewardInput) -> float:
        opened = row.prompt.rstrip().endswith("<think>")
        text = ("<think>" if opened else "") + row.completion.strip()
        # `regex` has a time limit and can release the GIL; the built-in `re` does neither
        match = self._pattern.fullmatch(text, timeout=self._timeout, concurrent=not self.inline)
        return float(match is not None)


class LanguageReward(_Inline):
    """The share of words in the target language (DeepSeek-R1, section 2.3.2); 1.0 where there are
    no words.

    Formulas, code and tags do not count. A CJK character counts as a word. `language`: en, zh, ja,
    ko, ru or ar.
    """

    def __init__(self, language: str = "en") -> None:
        if language not in _SCRIPTS:
            raise ValueError(f"language is {language!r}; it must be one of {', '.join(_SCRIPTS)}")
        self._script = _SCRIPTS[language]

    def score(self, row: RewardInput) -> float:
        words = _WORD.findall(_NOT_PROSE.sub(" ", row.completion))
        return (
            sum(self._script.match(word) is not None for word in words) / len(words)
            if words
            else 1.0
        )


class OverlongReward(_Inline):
    """The soft punishment of long completions (DAPO, arXiv 2503.14476, equation 13): from 0 down to
    -1.

    0 up to `max_tokens - buffer` tokens, then linear to -1 at `max_tokens` and beyond.
    `max_tokens=0` uses the limit of each completion.
    """

    best = 0.0

    def __init__(self, buffer: int, max_tokens: int = 0) -> None:
        if buffer < 1 or (max_tokens and buffer > max_tokens):
            raise ValueError(
                f"buffer is {buffer}; it must be between 1 and max_tokens ({max_tokens})"
            )
        self._buffer = buffer
        self._max_tokens = max_tokens

    def score(self, row: RewardInput) -> float:
        limit = self._max_tokens or row.max_tokens
        if not limit:
            raise ValueError("overlong needs max_tokens, of the reward or of the sampling")
        over = len(row.token_ids) - (limit - self._buffer)
        return -min(max(over / self._buffer, 0.0), 1.0)


class RepetitionReward(_Inline):
    """A penalty for repeated n-grams of words, from 0 down to `-penalty`: -penalty x (1 - distinct
    / all).

    As in Yeo et al., "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373), without
    their decay.
    """

    best = 0.0

    def __init__(self, ngram: int = 4, penalty: float = 1.0) -> None:
        if ngram < 1 or not 0 < penalty < float("inf"):
            raise ValueError(f"ngram ({ngram}) must be at least 1 and penalty ({penalty}) positive")
        self._ngram = ngram
        self._penalty = penalty

    def score(self, row: RewardInput) -> float:
        words = re.findall(
            r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+", row.completion.lower()
        )
        grams = list(zip(*(words[i:] for i in range(self._ngram)), strict=False))
        return -self._penalty * (1.0 - len(set(grams)) / len(grams)) if grams else 0.0
