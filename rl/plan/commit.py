"""How long an engine stands still for new weights: a sum over what it does with them between two
tokens.

Dense, every process of a vLLM engine reads all tensors from the host's memory, hashes them and
loads its part; the embedded engine copies and hashes them. Of a patch, each changed element is
compared and written; to bring them to the device, to find where they belong, and to read back and
compare checksums goes on beside decoding.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Literal

from .devices import CommitRates, ModelShape

Engine = Literal["vllm", "embedded"]
Mode = Literal["dense", "patch"]

ORDERS_S = {"vllm": 0.1, "embedded": 0.01}
"""Seconds to stop an engine at a token boundary and have it go on. An assumption."""


def commit_seconds(
    shape: ModelShape,
    rates: CommitRates,
    *,
    engine: Engine,
    mode: Mode,
    cards: int,
    changed: float,
) -> float:
    """Of one engine on `cards` devices. changed: share of the elements of a patch."""
    part, orders = 1 / cards, ORDERS_S[engine]
    if mode == "dense":
        # every process hashes whole tensors, and keeps its part of them
        hashed = shape.weight_bytes / rates.hash_bytes_per_s
        return orders + part * shape.weight_bytes / rates.copy_bytes_per_s + hashed
    return orders + part * changed * shape.parameters / rates.scatter_elements_per_s


def read_rates(path: Path) -> CommitRates:
    """The rates that `emberl bench device --json` measured; ValueError with what is missing."""
    try:
        found = json.loads(path.read_text())["commit"]
        rates = {field.name: float(found[field.name]) for field in fields(CommitRates)}
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"link.rates={path} cannot be read ({error}); emberl bench device --json makes it"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        names = ", ".join(field.name for field in fields(CommitRates))
        raise ValueError(
            f"link.rates={path} must have numbers {names} under 'commit' ({error!r} is wrong);"
            " emberl bench device --json makes it"
        ) from error
    wrong = [name for name, rate in rates.items() if not 0 < rate < float("inf")]
    if wrong:
        raise ValueError(f"link.rates={path}: commit.{wrong[0]}={rates[wrong[0]]} must be above 0")
    return CommitRates(**rates)
