"""Checks that the teachers of a distillation fit the student and its data, before anything is
loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config.load import Config, ConfigError
from .data.sources import known_sources
from .data.table import Head
from .model_files import check_directory, model_tokenizer

PROBE = "Let f(x) = 12x^2 - 7.5; then\n\tf(3)=100.5 <think>\u00e9\u4e16</think>"
"""Text by which two tokenizers with one vocabulary are compared: equal tokens mean equal merges."""


def check_teachers(config: Config, heads: Sequence[Head], *, hub: bool) -> None:
    """Raises `ConfigError` for a teacher that is no model, whose tokens differ from the student's,
    or with a source that the data do not have. heads: those of the training tables. hub: also check
    models of the Hub, whose tokenizers may be downloaded."""
    teachers = config.distill.teachers
    known = known_sources(config.data, heads) if teachers else None
    if known is not None:
        _check_sources(config, known)
    student = None
    for name, teacher in teachers.items():
        key = f"distill.teachers.{name}.path"
        check_directory(key, teacher.path)
        if not hub and not Path(teacher.path).expanduser().exists():
            continue
        student = student or _student(config, hub)
        if student is not None:
            difference = unlike(student, model_tokenizer(key, teacher.path))
            if difference is not None:
                raise ConfigError(
                    f"{key}={teacher.path!r}: its tokens are not the student's ({difference}), so"
                    " that its log-probs say nothing of them; give a teacher with the tokenizer of"
                    " the model, or distil by stages=[sft] on its answers"
                )


def _check_sources(config: Config, known: set[str]) -> None:
    distill = config.distill
    for name, teacher in distill.teachers.items():
        for source in teacher.sources:
            if source not in known:
                raise ConfigError(
                    f"distill.teachers.{name}.sources has {source!r}, which is no source of the"
                    f" data; these are {', '.join(sorted(known))}"
                )
    untaught = sorted(source for source in known if distill.teacher_of(source) < 0)
    if untaught and not distill.reward_coef:
        raise ConfigError(
            f"distill.teachers has none for the source {untaught[0]!r}, and distill.reward_coef=0"
            " leaves its prompts nothing to learn from; add it to a teacher's sources, or set"
            " distill.reward_coef"
        )


def _student(config: Config, hub: bool) -> Any:
    """The student's tokenizer; None if its files are not here yet."""
    if config.model.path is None:
        from .data.tiny import tiny_tokenizer

        assert config.model.tiny is not None
        return tiny_tokenizer(config.model.tiny)
    if not hub and not Path(config.model.path).expanduser().exists():
        return None
    return model_tokenizer("model.path", config.model.path)


def unlike(student: Any, teacher: Any) -> str | None:
    """The first difference between two tokenizers; None if they give the same tokens."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if len(ours) != len(theirs):
        return f"{len(theirs):,} tokens instead of {len(ours):,}"
    for token, number in sorted(ours.items(), key=lambda pair: pair[1]):
        if theirs.get(token) != number:
            return f"{token!r} is number {number} of the student's and {theirs.get(token)} of its"
    try:
        cut = [each.encode(PROBE, add_special_tokens=False) for each in (student, teacher)]
    except Exception:  # a vocabulary of few characters has no token for this text
        return None
    return None if cut[0] == cut[1] else "they cut one text differently"
