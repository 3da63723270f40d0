"""Real chat templates: Qwen3's, with its thinking on and off, and SmolLM2's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from emberl.rl.config.data import DataConfig
from emberl.rl.data.templates import PromptWriter, framing_ids, prompt_ids, render, supervised_ids
from transformers import AutoTokenizer

USER = [{"role": "user", "content": "What is 12*3?"}]


@pytest.fixture(scope="module")
def qwen3(qwen3_tokenizer: Path) -> Any:
    return AutoTokenizer.from_pretrained(qwen3_tokenizer)


@pytest.mark.parametrize(
    ("arguments", "rendered"),
    [
        ({}, "<|im_start|>user\nWhat is 12*3?<|im_end|>\n<|im_start|>assistant\n"),
        ({"enable_thinking": True}, "<|im_start|>user\nWhat is 12*3?<|im_end|>\n<|im_start|>assistant\n"),
        (
            {"enable_thinking": False},
            "<|im_start|>user\nWhat is 12*3?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
    ],
)
def test_thinking_on_and_off(qwen3: Any, arguments: dict[str, Any], rendered: str) -> None:
    assert render(USER, qwen3, arguments) == rendered
    settings = DataConfig(source="arithmetic", template_args=arguments)
    prompt = PromptWriter(settings, qwen3).question("What is 12*3?", id="1", answer="36", source="s", columns={})
    assert qwen3.decode(prompt.token_ids) == rendered
    assert list(prompt.token_ids) == qwen3.apply_chat_template(
        USER, add_generation_prompt=True, return_dict=False, **arguments
    )


def test_a_system_prompt_and_earlier_turns(qwen3: Any) -> None:
    """Of an earlier answer the thinking is left out, by the template itself."""
    turns = [*USER, {"role": "assistant", "content": "<think>\n36\n</think>\n\n36"}, {"role": "user", "content": "+1?"}]
    settings = DataConfig(source="arithmetic", system_prompt="Be brief.")
    prompt = PromptWriter(settings, qwen3).conversation(turns, id="1", answer="37", source="s", columns={})
    assert qwen3.decode(prompt.token_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 12*3?<|im_end|>\n"
        "<|im_start|>assistant\n36<|im_end|>\n<|im_start|>user\n+1?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_worked_solution_ends_the_turn(qwen3: Any) -> None:
    prompt = PromptWriter(DataConfig(source="arithmetic"), qwen3).question(
        "What is 12*3?", id="1", answer="36", source="s", columns={}
    )
    ids = supervised_ids(prompt, "<think>\n36\n</think>\n\n36", qwen3)
    assert qwen3.decode(ids[len(prompt.token_ids) :]) == "<think>\n36\n</think>\n\n36<|im_end|>"


def test_tags_stay_and_framing_goes(qwen3: Any) -> None:
    said = "<think>\n12*3=36\n</think>\n\n<tool_call>{}</tool_call> \\boxed{36}"
    ids = prompt_ids(f"<|im_start|>assistant\n{said}<|im_end|><|endoftext|>", qwen3)
    framing = framing_ids(qwen3)
    assert qwen3.decode([t for t in ids if t not in framing]) == f"assistant\n{said}"


def test_what_a_template_refuses_is_a_plain_error(qwen3: Any) -> None:
    qwen3.chat_template, template = "{{ raise_exception('no system role') }}", qwen3.chat_template
    try:
        with pytest.raises(ValueError, match=r"refuses messages of system: no system role"):
            render([{"role": "system", "content": "x"}], qwen3)
    finally:
        qwen3.chat_template = template
