"""What reward functions see of a prompt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from emberl.rl.answers import reward_input
from emberl.rollout.samples import Prompt

TURN = {"role": "user", "content": "2+2?"}
CHAT, PLAIN = SimpleNamespace(chat_template="x"), SimpleNamespace(chat_template=None)


@pytest.mark.parametrize(
    ("tokenizer", "columns", "messages", "plain"),
    [
        (CHAT, {"question": "2+2?"}, (TURN,), "2+2?"),
        (None, {"question": "2+2?"}, (TURN,), "2+2?"),  # before a tokenizer is loaded: the same
        (CHAT, {"prompt": [TURN]}, (TURN,), None),
        (None, {"prompt": [TURN]}, (TURN,), None),
        (PLAIN, {"question": "2+2?"}, (), "2+2?"),
    ],
)
def test_a_text_stays_a_text(
    tokenizer: Any, columns: dict[str, Any], messages: tuple[Any, ...], plain: str | None
) -> None:
    prompt = Prompt(
        id="0", token_ids=(1,), answer="4", source="s", messages=(TURN,), columns=columns
    )
    seen = reward_input(prompt, tokenizer, "4")
    assert (seen.messages, seen.plain_prompt) == (messages, plain)
    assert (seen.completion, seen.answer, seen.columns) == ("4", "4", columns)
