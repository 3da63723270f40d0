"""Migration of configurations written for earlier versions of emberl: removed keys are left out,
renamed ones get their new name, and a line for each says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REMOVED: Mapping[str, str] = {
    "schedule.stream_parts": "a step trains whole",
    "sft.stop_loss": "sft.steps or sft.epochs alone ends the stage",
    "sft.stop_accuracy": "sft.steps or sft.epochs alone ends the stage",
    "sft.check_every": "sft.eval_every says how often a supervised stage is evaluated",
}
"""Removed key -> the behaviour without it."""
RENAMED: Mapping[str, str] = {
    "data.template_args": "data.chat_template_kwargs",
    "data.bad_references": "data.drop",
}
"""Old key -> new key, in the same group."""
VALUES: Mapping[str, Mapping[str, str]] = {"data.drop": {"drop": "bad", "error": "none"}}
"""New key -> old value -> new value."""


def brought_up(tree: Mapping[str, Any], shown: str = "") -> tuple[dict[str, Any], list[str]]:
    """A file's tree (a recipe's with its stages) in today's keys, and a line for each key that was
    migrated. shown: a prefix for the keys in these lines, e.g. `stage 2: `."""
    renewed: dict[str, Any] = {}
    lines: list[str] = []
    for group, held in tree.items():
        if isinstance(held, Mapping) and group != "stages":
            renewed[group], more = _group(group, held, shown)
            lines += more
        elif group == "stages" and isinstance(held, list):
            renewed[group] = []
            for number, stage in enumerate(held, 1):
                new, more = (stage, [])
                if isinstance(stage, Mapping):
                    new, more = brought_up(stage, f"stage {stage.get('name', number)}: ")
                renewed[group].append(new)
                lines += more
        else:
            renewed[group] = held
    return renewed, lines


def _group(name: str, held: Mapping[str, Any], shown: str) -> tuple[dict[str, Any], list[str]]:
    renewed: dict[str, Any] = {}
    lines: list[str] = []
    for last, value in held.items():
        key = f"{name}.{last}"
        if key in REMOVED:
            why = REMOVED[key]
            lines.append(f"{shown}{key}={value} is left out, emberl has no such key now: {why}")
        elif key in RENAMED:
            new = RENAMED[key]
            words = VALUES.get(new, {})
            kept = words.get(value, value) if isinstance(value, str) else value
            renewed.setdefault(new.rpartition(".")[2], kept)
            lines.append(f"{shown}{key} is {new} now, here {kept}")
        else:
            renewed[last] = value
    return renewed, lines
