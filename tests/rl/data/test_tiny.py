"""The small model and its tokenizer: exact round trips, and what plain transformers makes of the
saved directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from emberl.rl.config.data import KINDS, DataConfig
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.arithmetic import IN_ENGLISH, ProblemMaker
from emberl.rl.data.templates import end_token, prompt_ids, render, supervised_ids
from emberl.rl.data.tiny import make_tiny, tiny_tokenizer, tiny_weights
from emberl.rl.model_files import model_tokenizer
from emberl.rollout.samples import Prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

SMALL = {"hidden": 16, "layers": 2, "heads": 2, "head_dim": 8, "intermediate": 24}


def test_one_token_for_each_character() -> None:
    tokenizer = tiny_tokenizer(TinyConfig())
    assert len(tokenizer) == 4 + len("0123456789+-*=?,()x")
    ids = tokenizer.encode("<think>7+5=12</think>12<eos>", add_special_tokens=False)
    names = ["<think>", "7", "+", "5", "=", "1", "2", "</think>", "1", "2", "<eos>"]
    assert tokenizer.convert_ids_to_tokens(ids) == names
    assert (ids[0], ids[7], ids[-1], tokenizer.pad_token_id) == (2, 3, 1, 0)


def test_thinking_survives_where_special_tokens_are_skipped() -> None:
    """The grader looks for `</think>` in text decoded that way."""
    tokenizer = tiny_tokenizer(TinyConfig())
    assert tokenizer.decode([2, 3, 0, 1], skip_special_tokens=True) == "<think></think>"


def test_round_trip_of_every_kind_of_problem() -> None:
    tokenizer = tiny_tokenizer(TinyConfig())
    for kind in set(KINDS) - set(IN_ENGLISH):
        for steps in ("full", "short"):
            maker = ProblemMaker(
                DataConfig(source="arithmetic", kinds={kind: 1}, steps=steps, largest_term=40)
            )
            for i in range(100):
                problem = next(maker.train(0, i))
                text = problem.text + problem.solution
                ids = tokenizer.encode(text, add_special_tokens=False)
                assert tokenizer.decode(ids) == text
                assert len(ids) == len(text) - len("<think></think>") + 2


BYTES = tiny_tokenizer(TinyConfig(vocabulary="bytes", chat_template=True))


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_bytes_round_trip_of_any_text(text: str) -> None:
    ids = BYTES.encode(text, add_special_tokens=False)
    assert BYTES.decode(ids) == text
    if "<" not in text:
        assert len(ids) == len(text.encode())


def test_a_character_outside_the_vocabulary_is_an_error_not_a_gap() -> None:
    with pytest.raises(ValueError, match="cannot encode 'seven'"):
        prompt_ids("seven", tiny_tokenizer(TinyConfig()), chat=False)


def test_chat_template() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    assert (
        render(messages, BYTES, BYTES.chat_template) == "system: Be brief.\nuser: 1+1?\nassistant: "
    )
    assert render(messages, tiny_tokenizer(TinyConfig()), None) == "Be brief.\n1+1?"


def test_supervised_tokens_are_prompt_solution_and_end() -> None:
    prompt = Prompt(id="a", token_ids=(11, 14, 13), answer="2", source="arithmetic")
    tokenizer = tiny_tokenizer(TinyConfig())
    ids = supervised_ids(prompt, "<think>2</think>2", tokenizer, end_token(tokenizer))
    assert ids[:3] == prompt.token_ids
    assert tokenizer.convert_ids_to_tokens(ids[3:]) == ["<think>", "2", "</think>", "2", "<eos>"]


class WithBos:
    """A tokenizer that begins every text with a token of its own, as Llama's does; no chat
    template, no Rust."""

    chat_template: str | None = None
    eos_token_id: int | None = 9

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return ([7] if add_special_tokens else []) + [len(word) for word in text.split()]

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        chat_template: Any,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> Any:
        assert not tokenize and add_generation_prompt
        return f"{conversation[-1]['content']} now"


def test_a_plain_prompt_begins_as_the_tokenizer_wants_and_a_solution_adds_nothing() -> None:
    tokenizer = WithBos()
    ids = prompt_ids(
        render([{"role": "user", "content": "one three"}], tokenizer, None), tokenizer, chat=False
    )
    assert ids == (7, 3, 5)
    prompt = Prompt(id="a", token_ids=ids, answer="", source="s")
    assert supervised_ids(prompt, "it is", tokenizer, end_token(tokenizer)) == (7, 3, 5, 2, 2, 9)
    template = "it writes its own special tokens"
    text = render([{"role": "user", "content": "one"}], tokenizer, template)
    assert prompt_ids(text, tokenizer, chat=True) == (3, 3)
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="no eos_token"):
        end_token(tokenizer)


@pytest.mark.parametrize("vocabulary", ["arithmetic", "bytes"])
def test_transformers_loads_what_was_saved(tmp_path: Path, vocabulary: str) -> None:
    config = TinyConfig(
        **SMALL, vocabulary=vocabulary, chat_template=vocabulary == "bytes", max_positions=64
    )
    folder = make_tiny(tmp_path / "made" / "here", config, seed=0)
    ours = tiny_tokenizer(config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "<think>3*7=21</think>(21)?" + ("Café, £5\n\n  don 't" if vocabulary == "bytes" else "")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == ours.encode(text, add_special_tokens=False)
    assert tokenizer(text).input_ids == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.chat_template == ours.chat_template
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert (model.config.vocab_size, model.dtype, model.config.max_position_embeddings) == (
        len(ours),
        torch.float32,
        64,
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for holder in (model.config, model.generation_config, tokenizer):
        assert (holder.eos_token_id, holder.pad_token_id, holder.bos_token_id) == (1, 0, None)
    # what transformers makes of these settings by the same seed, and the settings that it read
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = type(model)(model.config)
    assert model.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    plain = type(model.config)(
        vocab_size=len(ours), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=24, max_position_embeddings=64,
        initializer_range=0.06, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    ).to_dict()  # fmt: skip
    read = model.config.to_dict()
    given = {"architectures", "dtype", "transformers_version", "_name_or_path"}
    assert {k for k in plain if plain[k] != read.get(k)} <= given


def test_a_run_loads_the_tokenizer_that_transformers_would(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, TinyConfig(**SMALL, vocabulary="bytes", chat_template=True), 0)
    ours, theirs = model_tokenizer("model.path", str(folder)), AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs)
    assert ours.init_kwargs == theirs.init_kwargs
    assert ours.get_vocab() == theirs.get_vocab()


def test_a_tiny_model_is_made_without_the_models_of_transformers(tmp_path: Path) -> None:
    """To load these takes seconds of every start."""
    program = """
import sys
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from emberl.rl.model_files import model_tokenizer
make_tiny(sys.argv[1], TinyConfig(), 0)
model_tokenizer("model.path", sys.argv[1])
print(*({"transformers.modeling_utils", "transformers.models"} & {*sys.modules}))
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == []


def test_the_seed_is_the_model(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    files = [
        (make_tiny(tmp_path / name, TinyConfig(**SMALL), seed) / "model.safetensors").read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert files[0] == files[1] != files[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_default_size() -> None:
    # by hand: 23 * 128 embedding + 3 * (q, o: 2 * 128 * 128; k, v: 2 * 128 * 64; mlp: 3 * 128 *
    # 384; norms: 2 * 128 + 2 * 64) + 128
    weights = tiny_weights(TinyConfig(), 23, seed=0)
    assert (
        sum(w.numel() for w in weights.values()) == 2944 + 3 * (32768 + 16384 + 147456 + 384) + 128
    )


def test_initial_weights_have_the_spread_that_was_asked_for() -> None:
    for std in (0.06, 0.02):
        weights = tiny_weights(TinyConfig(init_std=std), 23, seed=0)
        matrices = {name: w for name, w in weights.items() if w.ndim == 2}
        assert len(matrices) == 1 + 3 * 7
        for name, matrix in matrices.items():
            assert matrix.std().item() == pytest.approx(std, rel=0.05), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3, "kv_heads": 2}, r"model\.tiny\.heads=3 must be a multiple of kv_heads=2"),
        ({"head_dim": 7}, r"model\.tiny\.head_dim=7 must be even"),
        ({"chat_template": True}, r"chat_template=true needs model\.tiny\.vocabulary=bytes"),
    ],
)
def test_bad_sizes_name_their_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TinyConfig(**options)
