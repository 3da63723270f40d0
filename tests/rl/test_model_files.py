"""What `model.path` may name, and what is said of a name that will not do, before Ray starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from emberl.rl.config.data import DataConfig
from emberl.rl.config.load import Config, ConfigError, resolve
from emberl.rl.config.tiny import TinyConfig
from emberl.rl.data.tiny import make_tiny
from emberl.rl.model_files import (
    check_files,
    check_model,
    load_tokenizer,
    prepare_model,
    stop_tokens,
)
from emberl.rollout.embedded.model import Decoder
from emberl.rollout.model_directory import model_directory
from transformers import AutoTokenizer

TINY = TinyConfig(hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate=32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "whole", TINY, seed=0)


def configuration(path: object, **more: Any) -> Config:
    return resolve(
        {"name": "x", "model": {"path": str(path)}, "data": {"source": "arithmetic"}, **more}
    )


def without(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in folder.glob(pattern):
            file.unlink()

    return change


def saying(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def cut(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": ')


def two_ggufs(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "a.gguf").touch()
    (folder / "b.gguf").touch()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("*.safetensors"), "has no weights"),
        (without("tokenizer.json"), "has no tokenizer"),
        (without("*"), "neither config.json nor a GGUF"),
        (cut, "config.json cannot be read"),
        (two_ggufs, r"holds 2 GGUF files \(a.gguf, b.gguf\); give the path of one"),
        (saying(architectures=["Gemma2ForCausalLM"]), "Gemma2ForCausalLM is not one of"),
        (saying(architectures=["GPT2LMHeadModel"]), "rollout.engine=vllm"),
        (saying(hidden_act="gelu"), "gelu"),
    ],
)
def test_a_directory_that_will_not_do(
    whole: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as error:
        check_files(configuration(folder))
    assert "model.path" in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    "path",
    ["./nomodel", "/nowhere/at/all", "~/no-such-model", "runs/x/model", "model.gguf", "..", "a b"],
)
def test_a_path_that_does_not_exist_is_no_malformed_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"does not exist|neither config.json") as error:
        check_files(configuration(path))
    assert "Repo id" not in str(error.value)


def test_the_small_models_place_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="`make smollm2` fetches it"):
        check_files(configuration("models/smollm2-135m"))


def test_a_name_that_no_file_can_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be looked at .File name too long"):
        check_files(configuration(tmp_path / ("x" * 300)))


def test_a_folder_that_may_not_be_looked_into_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> bool:  # what the system says to anyone but root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refused)
    with pytest.raises(ConfigError, match=r"cannot be looked at .Permission denied"):
        check_files(configuration(tmp_path / "model"))


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"max_position_embeddings": 100}, 100),
        ({"max_position_embeddings": 50, "rope_scaling": {"type": "yarn", "factor": 2.0}}, 100),
    ],
)
def test_answers_longer_than_the_models_context_are_refused(
    whole: Path, tmp_path: Path, changes: dict[str, Any], tokens: int
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    saying(**changes)(folder)
    data = {"source": "arithmetic", "max_prompt_length": 40}
    lengths = {"data": data, "rollout": {"max_response_length": 60}}
    check_files(configuration(folder, **lengths))
    lengths["rollout"] = {"max_response_length": 61}
    with pytest.raises(ConfigError, match=rf"are 101 tokens, but the context .* has {tokens}"):
        check_files(configuration(folder, **lengths))


def test_what_may_be_either_is_told_as_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"model.path='models/absent': there is no such file .* from the Hub"
    ):
        check_model(configuration("models/absent"))


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"no .gguf"):
        check_files(configuration(tmp_path / "model.safetensors"))
    (tmp_path / "model.gguf").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"model.path: .*not a GGUF"):
        check_files(configuration(tmp_path))


def test_a_critic_is_checked_too(tmp_path: Path, whole: Path) -> None:
    ppo = {"algorithm": "ppo", "critic": {"path": str(tmp_path)}}
    with pytest.raises(ConfigError, match=r"critic\.path"):
        check_files(configuration(whole, **ppo))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"only model\.path"):
        check_files(configuration(whole, **ppo))


def test_other_engines_know_their_own_architectures(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    saying(architectures=["Gemma2ForCausalLM"])(folder)
    check_files(configuration(folder, rollout={"engine": "vllm"}))


def test_actors_get_an_absolute_path(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not stand in the user's folder."""
    monkeypatch.chdir(whole.parent)
    assert prepare_model(configuration("whole"), tmp_path, print) == str(whole)
    tiny = resolve(
        {"name": "x", "model": {"tiny": TINY.model_dump()}, "data": {"source": "arithmetic"}}
    )
    assert prepare_model(tiny, Path("run"), print) == str(whole.parent / "run" / "model_init")


def test_a_hub_id_reaches_the_embedded_engine(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache, as it stands after a download."""
    repository = tmp_path / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("1" * 40)
    shutil.copytree(whole, repository / "snapshots" / ("1" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert Decoder.from_directory(model_directory("owner/tiny")).arch.hidden_size == 32
    assert model_directory(str(whole)) == whole


def test_a_tokenizer_that_cannot_be_read_is_named(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    (folder / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ConfigError, match=r"model\.path=.*cannot be loaded"):
        load_tokenizer(str(folder), DataConfig(source="arithmetic"))


def test_stop_tokens_are_all_that_the_models_files_name(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    settings = DataConfig(source="arithmetic")
    assert stop_tokens(load_tokenizer(str(folder), settings), str(folder)) == (1,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 5, 7]}')
    config = json.loads((folder / "config.json").read_text())
    inside = {"eos_token_id": None, "text_config": {"eos_token_id": 9}}
    (folder / "config.json").write_text(json.dumps(config | inside))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<end_of_turn>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    tokenizer.save_pretrained(folder)
    found = stop_tokens(load_tokenizer(str(folder), settings), str(folder))
    assert set(found) == {
        1,
        5,
        7,
        9,
        *tokenizer.convert_tokens_to_ids(["<|end|>", "<end_of_turn>"]),
    }
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(
        ConfigError, match=r"generation_config\.json is not JSON .*; mend or remove it"
    ):
        stop_tokens(tokenizer, str(folder))


def test_what_is_decoded_keeps_its_spaces(whole: Path, tmp_path: Path) -> None:
    """Some Llama tokenizers are set up to take them out before marks, also in `a != b`."""
    folder = tmp_path / "model"
    make_tiny(folder, TINY.model_copy(update={"vocabulary": "bytes"}), seed=0)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {
        "clean_up_tokenization_spaces": True,
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
    }
    file.write_text(json.dumps(config))
    eager, tokenizer = (
        AutoTokenizer.from_pretrained(folder),
        load_tokenizer(str(folder), DataConfig(source="arithmetic")),
    )
    text = "' '.join(x) if a != b do n't ."
    assert eager.decode(eager.encode(text)) != text, "the setting that is overruled does something"
    assert tokenizer.decode(tokenizer.encode(text)) == text
