"""Chat templates: Qwen3's own, SmolLM2's own where the model is there, and others written to the
rules of their families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from emberl.rl.config.data import DataConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.sources import open_source
from emberl.rl.data.templates import (
    PromptWriter,
    end_of_turn,
    end_token,
    framing_ids,
    prompt_ids,
    render,
    supervised_ids,
    template_of,
)
from emberl.rl.data.tiny import tiny_tokenizer
from emberl.rollout.samples import Prompt
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

USER = [{"role": "user", "content": "What is 12*3?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *USER]
TURNS = [*USER, {"role": "assistant", "content": "36"}, {"role": "user", "content": "+1?"}]
GOLD = [*TURNS, {"role": "assistant", "content": "The answer is 37."}]

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not"
    " supported') }}{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 %"
    " 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif"
    " %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] |"
    " trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{%"
    " endif %}"
)
GLM4 = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}{% if"
    " add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking"
    " %}{{ '\n' }}<think></think>{% endif %}{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif"
    " %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}{% endif %}{% if m['role'] =="
    " 'assistant' %}<｜Assistant｜>{{ m['content'].split('</think>')[-1] }}<｜end▁of▁sentence｜>{%"
    " endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
FAMILIES: dict[str, tuple[str, str, str, list[str]]] = {
    # name: (template, beginning, end, other special tokens)
    "llama3": (
        LLAMA3,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "gemma": (GEMMA, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "glm4": (
        GLM4,
        "[gMASK]",
        "<|endoftext|>",
        ["<sop>", "<|system|>", "<|user|>", "<|assistant|>"],
    ),
    "phi": (PHI, "<s>", "<|endoftext|>", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
    "r1": (
        R1,
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        ["<｜User｜>", "<｜Assistant｜>"],
    ),
}


def tokenizer_of(family: str, *, ends_texts: bool = False) -> Any:
    """A character tokenizer with the family's special tokens, which begins plain texts as the
    family's does.

    ends_texts: it puts its end token behind them, as some are set up to."""
    template, begin, end, others = FAMILIES[family]
    tokenizer = tiny_tokenizer(TinyConfig(vocabulary="bytes"))
    tokenizer.add_special_tokens({"bos_token": begin, "eos_token": end})
    tokenizer.add_tokens(others, special_tokens=True)
    tokenizer.chat_template = template
    pieces = [(name, tokenizer.convert_tokens_to_ids(name)) for name in (begin, end)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}" if ends_texts else f"{begin} $A", special_tokens=pieces
    )
    return tokenizer


@pytest.fixture(scope="module")
def qwen3(qwen3_tokenizer: Path) -> Any:
    return AutoTokenizer.from_pretrained(qwen3_tokenizer)


def written(
    tokenizer: Any, messages: Sequence[Mapping[str, str]] = USER, **settings: Any
) -> Prompt:
    writer = PromptWriter(DataConfig(source="arithmetic", **settings), tokenizer)
    return writer.conversation(messages, id="1", answer="36", source="s", columns={})


@pytest.mark.parametrize(
    ("arguments", "rendered"),
    [
        ({}, "<|im_start|>user\nWhat is 12*3?<|im_end|>\n<|im_start|>assistant\n"),
        (
            {"enable_thinking": True},
            "<|im_start|>user\nWhat is 12*3?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            {"enable_thinking": False},
            (
                "<|im_start|>user\nWhat is"
                " 12*3?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
            ),
        ),
    ],
)
def test_thinking_on_and_off(qwen3: Any, arguments: dict[str, Any], rendered: str) -> None:
    assert render(USER, qwen3, qwen3.chat_template, arguments) == rendered
    prompt = written(qwen3, chat_template_kwargs=arguments)
    assert qwen3.decode(prompt.token_ids) == rendered
    assert list(prompt.token_ids) == qwen3.apply_chat_template(
        USER, add_generation_prompt=True, return_dict=False, **arguments
    )


def test_a_system_prompt_and_earlier_turns(qwen3: Any) -> None:
    """Of an earlier answer the thinking is left out, by the template itself."""
    turns = [
        *USER,
        {"role": "assistant", "content": "<think>\n36\n</think>\n\n36"},
        {"role": "user", "content": "+1?"},
    ]
    prompt = written(qwen3, turns, system_prompt="Be brief.")
    assert (
        qwen3.decode(prompt.token_ids)
        == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 12*3?<|im_end|>\n"
        "<|im_start|>assistant\n36<|im_end|>\n<|im_start|>user\n+1?<|im_end|>\n<|im_start|>assistant\n"
    )


ANSWERED = {
    # what each family's prompt looks like after several turns: the last answer is asked for, and
    # never shown
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 12*3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n36<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n+1?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "gemma": (
        "<bos><start_of_turn>user\nWhat is"
        " 12*3?<end_of_turn>\n<start_of_turn>model\n36<end_of_turn>\n"
        "<start_of_turn>user\n+1?<end_of_turn>\n<start_of_turn>model\n"
    ),
    "glm4": "[gMASK]<sop><|user|>\nWhat is 12*3?<|assistant|>\n36<|user|>\n+1?<|assistant|>",
    "phi": (
        "<|user|>\nWhat is"
        " 12*3?<|end|>\n<|assistant|>\n36<|end|>\n<|user|>\n+1?<|end|>\n<|assistant|>\n"
    ),
    "r1": (
        "<｜begin▁of▁sentence｜><｜User｜>What is 12*3?<｜Assistant｜>36<｜end▁of▁sentence｜>"
        "<｜User｜>+1?<｜Assistant｜><think>\n"
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_several_turns_and_one_beginning(family: str) -> None:
    tokenizer = tokenizer_of(family)
    prompt = written(tokenizer, TURNS)
    assert tokenizer.decode(prompt.token_ids) == ANSWERED[family]
    assert prompt.token_ids.count(tokenizer.bos_token_id) == (0 if family == "phi" else 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("more", [0, 1])
def test_the_answer_of_a_conversation_never_gets_into_its_prompt(family: str, more: int) -> None:
    tokenizer = tokenizer_of(family)
    writer = PromptWriter(DataConfig(source="arithmetic"), tokenizer)
    turns = [*GOLD, *[{"role": "assistant", "content": "37, as I said."}] * more]
    prompt = writer.conversation(turns, id="1", answer="37", source="s", columns={})
    assert tokenizer.decode(prompt.token_ids) == ANSWERED[family]
    assert [m["content"] for m in prompt.messages] == [
        "What is 12*3?",
        "36",
        "+1?",
    ] and prompt.prefix == ""


def test_an_answer_that_is_cut_is_said_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(
        '[{"prompt": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}],'
        ' "answer": "2"}]'
    )
    tokenizer = tokenizer_of("llama3")
    source = open_source(DataConfig(source=str(tmp_path / "d.json"), heldout=0), tokenizer)
    assert "the assistant's last words left out: data.final_answer" in source.notes[0]
    assert tokenizer.decode(source.train(0).token_ids).endswith(
        "1+1?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize("role", ["model", "gpt", "bot"])
def test_others_names_for_the_assistant_leak_nothing(role: str) -> None:
    tokenizer = tokenizer_of("phi")
    assert (
        written(tokenizer, [*USER, {"role": role, "content": "36"}]).token_ids
        == written(tokenizer).token_ids
    )


def test_of_several_templates_the_default_one() -> None:
    tokenizer = tokenizer_of("phi")
    expected = written(tokenizer).token_ids
    tokenizer.chat_template = {"default": PHI, "tool_use": GLM4}
    assert written(tokenizer).token_ids == expected
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")
    with pytest.raises(ValueError, match="uses no enable_thinking"):
        written(tokenizer, chat_template_kwargs={"enable_thinking": False})


@pytest.mark.parametrize("role", ["developer", "human"])
def test_a_role_that_a_template_passes_over_is_seen(qwen3: Any, role: str) -> None:
    with pytest.raises(ValueError, match=f"leaves out the {role}'s message 'Be brief"):
        written(qwen3, [{"role": role, "content": "Be brief."}, *USER])


def test_an_answer_alone_asks_nothing() -> None:
    with pytest.raises(
        ValueError, match="the assistant's alone, so nothing is asked; remove the row"
    ):
        written(tokenizer_of("llama3"), [GOLD[-1]])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("messages", "settings"),
    [(USER, {"assistant_prefix": "So: "}), (None, {"final_answer": "continue"})],
)
def test_an_answer_is_continued_and_not_closed(
    family: str, messages: Any, settings: dict[str, Any]
) -> None:
    tokenizer = tokenizer_of(family)
    begun = [*USER, {"role": "assistant", "content": "So: "}]
    prompt = written(tokenizer, messages or begun, **settings)
    alone = written(tokenizer)
    assert tokenizer.decode(prompt.token_ids) == tokenizer.decode(alone.token_ids) + "So: "
    assert (prompt.prefix, prompt.messages) == ("So: ", alone.messages)


@pytest.mark.parametrize("prefix", ["<think>\n", "<think>", "\n<think>\n\n"])
def test_a_tag_that_the_template_opens_itself_is_not_opened_twice(prefix: str) -> None:
    tokenizer = tokenizer_of("r1")
    prompt = written(tokenizer, assistant_prefix=prefix)
    assert prompt.token_ids == written(tokenizer).token_ids
    assert prompt.prefix == "<think>\n", "what stands in the prompt"


def test_thinking_begins_in_qwens_prompt(qwen3: Any) -> None:
    prompt = written(qwen3, assistant_prefix="<think>\n")
    assert qwen3.decode(prompt.token_ids).endswith("<|im_start|>assistant\n<think>\n")
    assert prompt.token_ids[-2:] == tuple(qwen3.encode("<think>\n", add_special_tokens=False))


@pytest.mark.parametrize(
    ("messages", "settings", "expected"),
    [
        (USER, {"template": "none"}, "{bos}What is 12*3?"),
        (SYSTEM, {"template": "none"}, "{bos}Be brief.\nWhat is 12*3?"),
        (
            USER,
            {"template": "none", "assistant_prefix": "\nAnswer:"},
            "{bos}What is 12*3?\nAnswer:",
        ),
        (GOLD[2:], {"template": "none"}, "{bos}+1?"),
        (GOLD[2:], {"template": "none", "final_answer": "continue"}, "{bos}+1?\nThe answer is 37."),
        (USER, {"template": "raw"}, "{bos}What is 12*3?"),
        ([{"role": "user", "content": "{bos}Q: 1?\nA:"}], {"template": "raw"}, "{bos}Q: 1?\nA:"),
        (
            [
                {
                    "role": "user",
                    "content": "{bos}<|start_header_id|>user<|end_header_id|>\n\n1?<|eot_id|>",
                }
            ],
            {"template": "raw"},
            "{bos}<|start_header_id|>user<|end_header_id|>\n\n1?<|eot_id|>",
        ),
    ],
)
@pytest.mark.parametrize("ends_texts", [False, True])
def test_plain_and_rendered_prompts(
    messages: Any, settings: dict[str, Any], expected: str, ends_texts: bool
) -> None:
    """With one beginning, and never with an end token, after which a model has nothing to say."""
    tokenizer = tokenizer_of("llama3", ends_texts=ends_texts)
    begin = tokenizer.bos_token
    messages = [{**m, "content": m["content"].replace("{bos}", begin)} for m in messages]
    prompt = written(tokenizer, messages, **settings)
    assert tokenizer.decode(prompt.token_ids) == expected.replace("{bos}", begin)
    special = [name for name in ("<|start_header_id|>", "<|eot_id|>") if name in expected]
    assert all(tokenizer.convert_tokens_to_ids(name) in prompt.token_ids for name in special)


def test_a_rendered_prompt_is_one_text() -> None:
    with pytest.raises(
        ValueError, match=r"data\.template=raw takes a text, but here are several messages"
    ):
        written(tokenizer_of("llama3"), SYSTEM, template="raw")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "raw", "system_prompt": "x"}, r"data\.template=raw takes a prompt as it is"),
        ({"template": "raw", "merge_system": True}, r"data\.template=raw takes a prompt as it is"),
        (
            {"template": "none", "chat_template": "{{ x }}"},
            r"data\.template=none uses no chat template",
        ),
        (
            {"template": "none", "chat_template_kwargs": {"enable_thinking": False}},
            r"data\.template=none uses no chat",
        ),
        ({"chat_template_kwargs": {"tokenize": True}}, "tokenize is no variable of a template"),
        (
            {"chat_template_kwargs": {"add_generation_prompt": False}},
            "add_generation_prompt is no variable",
        ),
        ({"final_answer": "keep"}, "final_answer"),
        ({"template_args": {}}, "template_args"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(source="arithmetic", **settings)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "llama3",
            {"chat_template_kwargs": {"enable_thinking": False}},
            "the chat template of the model uses no enable_thinking",
        ),
        (
            "glm4",
            {"chat_template_kwargs": {"enable_thinkin": False}},
            "uses no enable_thinkin, so it would change nothing",
        ),
        (None, {"template": "chat"}, "has no chat template; give one in"),
        (None, {"chat_template_kwargs": {"enable_thinking": False}}, "uses no enable_thinking"),
        (
            "phi",
            {"chat_template": "nowhere.jinja"},
            r"data\.chat_template='nowhere\.jinja' is no Jinja template .* no file",
        ),
        (
            "phi",
            {"chat_template": "{% for m in messages %}"},
            r"refuses messages of user: line 1: ",
        ),
        (
            "phi",
            {"chat_template": "{{ no_such_function() }}"},
            r"refuses messages of user: 'no_such_function' is undefined",
        ),
        (
            "phi",
            {"chat_template": "{{ 'Hello' }}"},
            r"leaves out the user's message 'What is 12\*3\?'$",
        ),
    ],
)
def test_what_a_template_cannot_do_is_one_line(
    family: str | None, settings: dict[str, Any], message: str
) -> None:
    tokenizer = (
        tiny_tokenizer(TinyConfig(vocabulary="bytes")) if family is None else tokenizer_of(family)
    )
    with pytest.raises(ValueError, match=message) as error:
        written(tokenizer, **settings)
    assert "\n" not in str(error.value)


def test_thinking_is_switched_off_where_the_template_can() -> None:
    tokenizer = tokenizer_of("glm4")
    prompt = written(tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert tokenizer.decode(prompt.token_ids).endswith("<|assistant|>\n<think></think>")


def test_a_system_message_goes_into_the_users_where_there_is_no_such_role() -> None:
    tokenizer = tokenizer_of("gemma")
    refused = (
        r"refuses messages of system, user: System role not supported; .* set"
        r" data\.merge_system=true$"
    )
    with pytest.raises(ValueError, match=refused):
        written(tokenizer, system_prompt="Be brief.")
    prompt = written(tokenizer, system_prompt="Be brief.", merge_system=True)
    merged = (
        "<bos><start_of_turn>user\nBe brief.\n\nWhat is 12*3?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert tokenizer.decode(prompt.token_ids) == merged
    assert written(tokenizer, SYSTEM, merge_system=True).token_ids == prompt.token_ids
    assert (
        written(tokenizer, TURNS, merge_system=True).token_ids
        == written(tokenizer, TURNS).token_ids
    )
    with pytest.raises(ValueError, match="followed by one of assistant"):
        written(tokenizer, [SYSTEM[0], TURNS[1], TURNS[2]], merge_system=True)
    with pytest.raises(
        ValueError,
        match=r"refuses messages of user, user: Conversation roles must alternate user/assistant$",
    ):
        written(tokenizer, [*USER, *USER])


def test_a_system_message_that_a_template_drops_is_seen() -> None:
    silent = PHI.replace(
        "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
    )
    with pytest.raises(
        ValueError,
        match=r"leaves out the system's message 'Be brief\.'; .* set data\.merge_system=true",
    ):
        written(tokenizer_of("phi"), SYSTEM, chat_template=silent)


def test_another_template_from_a_file_or_as_text(qwen3: Any, tmp_path: Path) -> None:
    file = tmp_path / "llama.jinja"
    file.write_text(LLAMA3)
    tokenizer, expected = tokenizer_of("llama3"), ANSWERED["llama3"]
    tokenizer.chat_template = None
    for given in (str(file), LLAMA3):
        settings = DataConfig(source="arithmetic", chat_template=given)
        assert template_of(settings, tokenizer) == LLAMA3
        assert (
            tokenizer.decode(written(tokenizer, TURNS, chat_template=given).token_ids) == expected
        )
    assert (
        qwen3.decode(written(qwen3, chat_template=PHI).token_ids)
        == "<|user|>\nWhat is 12*3?<|end|>\n<|assistant|>\n"
    )


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("llama3", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("phi", "<|end|>"),
        ("r1", "<｜end▁of▁sentence｜>"),
        ("glm4", None),
    ],
)
def test_what_ends_a_turn_is_seen_from_the_template(family: str, end: str | None) -> None:
    tokenizer = tokenizer_of(family)
    assert end_of_turn(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))
    assert end_token(tokenizer) == tokenizer.convert_tokens_to_ids(end or "<|endoftext|>")
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = None
    assert end_token(tokenizer) == tokenizer.eos_token_id


def test_a_worked_solution_ends_the_turn(qwen3: Any) -> None:
    prompt = written(qwen3)
    ids = supervised_ids(prompt, "<think>\n36\n</think>\n\n36", qwen3, end_token(qwen3))
    assert qwen3.decode(ids[len(prompt.token_ids) :]) == "<think>\n36\n</think>\n\n36<|im_end|>"


@pytest.mark.parametrize("prefix", ["<think>\n", "<think>"])
@pytest.mark.parametrize("solution", ["<think>\n36\n</think>\n\n36", "36\n</think>\n\n36"])
def test_a_worked_solution_does_not_say_again_what_the_prompt_says(
    qwen3: Any, prefix: str, solution: str
) -> None:
    prompt = written(qwen3, assistant_prefix=prefix)
    said = qwen3.decode(supervised_ids(prompt, solution, qwen3, 7))
    newline = "" if prefix == "<think>" and not solution.startswith("<think>") else "\n"
    assert said.endswith(f"assistant\n<think>{newline}36\n</think>\n\n36" + qwen3.decode([7]))


def test_tags_stay_and_framing_goes(qwen3: Any) -> None:
    said = "<think>\n12*3=36\n</think>\n\n<tool_call>{}</tool_call> \\boxed{36}"
    ids = prompt_ids(f"<|im_start|>assistant\n{said}<|im_end|><|endoftext|>", qwen3, chat=True)
    framing = framing_ids(qwen3)
    assert qwen3.decode([t for t in ids if t not in framing]) == f"assistant\n{said}"


def test_smollm2s_own_template(smollm2: Path) -> None:
    """It brings a system message of its own where there is none."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    own = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging"
        " Face<|im_end|>\n"
    )
    asked = "<|im_start|>user\nWhat is 12*3?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(written(tokenizer).token_ids) == own + asked
    assert (
        tokenizer.decode(written(tokenizer, SYSTEM, assistant_prefix="It is").token_ids)
        == f"<|im_start|>system\nBe brief.<|im_end|>\n{asked}It is"
    )
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
