"""The model that a run starts from: checks of `model.path` before Ray starts, and the preparation
of its files for the actors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..rollout.model_directory import model_directory
from .config.data import DataConfig
from .config.load import Config, ConfigError, user_errors
from .data.hub import look_up
from .data.templates import end_of_turn, template_of

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
    "spiece.model",
)
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")
ENDS_OF_TURNS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
"""Tokens that end a turn of chat models, whatever template a run gives them."""
SMALL_MODEL = "models/smollm2-135m"
"""The small real model's directory in configs/, which is not part of a checkout."""
TINY_TOKENIZER_BYTES = 65_536
"""Size that no tiny model's tokenizer.json reaches."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def check_model(config: Config) -> None:
    """Raises `ConfigError` for a model that the actors could not load, by its local files or by the
    Hub's answer for an id."""
    check_files(config)
    path, critic = config.model.path, config.critic.path
    if path is not None and _local(path) is None:
        shown = _hub_config("model.path", path).to_dict()
        _check_context(config, _context(shown))
        if config.rollout.engine == "embedded":
            _check_architecture("model.path", path, shown)
    if config.advantage.needs_critic and critic is not None and _local(critic) is None:
        _hub_config("critic.path", critic)


def check_files(config: Config) -> None:
    """`check_model` for local files only, without the Hub."""
    if config.model.path is not None:
        context = _check_path("model.path", config.model.path, config.rollout.engine)
        _check_context(config, context)
    if config.advantage.needs_critic and config.critic.path is not None:
        _check_path("critic.path", config.critic.path, engine=None)


def prepare_model(
    config: Config, run_dir: Path, tell: Callable[[str], None], *, anew: bool = True
) -> str:
    """The model that the actors load: an absolute directory or a Hub id. A GGUF file is converted,
    or a tiny model made, in the run's `model_init`; a Hub id's files are downloaded to Hugging
    Face's cache.

    anew: replace an earlier `model_init`, which may be of other settings. tell: called with a line
    for each step that takes time.
    """
    path, made = config.model.path, (run_dir / "model_init").absolute()
    if anew:
        shutil.rmtree(made, ignore_errors=True)
    if path is None:
        from .data.tiny import make_tiny

        assert config.model.tiny is not None
        _quiet()
        if not (made / "config.json").exists():
            make_tiny(made, config.model.tiny, config.seed)
        return str(made)
    local = _local(path)
    if local is None:
        tell(f"model.path={path}: its files come from the Hub, or from the cache of earlier runs")
        look_up()
        try:
            model_directory(path)
        # huggingface_hub's, for no such model and for no way to it
        except (OSError, ValueError) as error:
            raise _not_a_model("model.path", path, error) from error
        return path
    file = gguf_file("model.path", local)
    if file is None:
        return str(local)
    if not (made / "config.json").exists():
        from .gguf_conversion import convert

        _quiet()
        with user_errors():
            tell(f"model.path: {convert(file, made)}")
    return str(made)


def load_tokenizer(model_path: str, settings: DataConfig) -> Any:
    """The model's tokenizer with the chat template that the data settings choose. Raises
    `ConfigError` if there is none.

    It decodes tokens literally, without removing spaces before punctuation.
    """
    tokenizer = model_tokenizer("model.path", model_path)
    tokenizer.clean_up_tokenization_spaces = False
    with user_errors():
        tokenizer.chat_template = template_of(settings, tokenizer)
    return tokenizer


def model_tokenizer(key: str, path: str) -> Any:
    """The tokenizer in a model's files. Raises `ConfigError`, which names the setting `key`, if it
    cannot be loaded."""
    _quiet()
    local = _local(path)
    if local is None:
        look_up()
    try:
        if local is not None and _made_here(local):
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(str(local))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path if local is None else str(local))
    except Exception as error:  # of any kind: the files are whatever the user has
        raise _not_a_model(key, path, error) from error


def _made_here(folder: Path) -> bool:
    """Whether a directory's tokenizer is a tiny model's. Its class is known, and `AutoTokenizer`
    would load the registry of all architectures to find it, which takes a second."""
    file = folder / "tokenizer.json"
    if not file.is_file() or file.stat().st_size > TINY_TOKENIZER_BYTES:
        return False
    model = json.loads(file.read_text(encoding="utf-8")).get("model", {})
    return bool(model.get("type") == "WordLevel" and model["vocab"].get("</think>") == 3)


def check_directory(key: str, path: str) -> None:
    """Raises `ConfigError` if a model that no engine serves is neither a model directory nor a
    possible Hub id."""
    _check_path(key, path, engine=None)


def stop_tokens(tokenizer: Any, model_path: str) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's end token, all that the model's
    generation_config.json and config.json name, and those that end an assistant's turn by the chat
    template or by their name."""
    ids = [tokenizer.eos_token_id, end_of_turn(tokenizer), *_end_tokens(model_path)]
    ids += [tokenizer.get_vocab().get(name) for name in ENDS_OF_TURNS]
    return tuple(dict.fromkeys(t for t in ids if t is not None))


def _end_tokens(model_path: str) -> list[int]:
    """`eos_token_id`, a number or a list of them, of the model's configurations."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = model_directory(model_path) / name
        if not file.exists():
            continue
        try:
            config = json.loads(file.read_text())
        except ValueError as error:
            raise ConfigError(
                f"model.path={model_path!r}: {name} is not JSON ({error}); mend or remove it"
            ) from error
        # a model of texts and pictures has one inside
        for part in (config, config.get("text_config") or {}):
            end = part.get("eos_token_id")
            ids += end if isinstance(end, list) else [] if end is None else [end]
    return ids


def check_adapters(config: Config, model_path: str) -> None:
    """Raises `ConfigError` if `model.lora` cannot be applied to the model."""
    if config.model.lora is None:
        return
    import torch
    from transformers import AutoModelForCausalLM

    from .learner.lora import inject_adapters

    with torch.device("meta"):  # its layers' names without its weights
        model = AutoModelForCausalLM.from_config(_hub_config("model.path", model_path))
    with user_errors():
        inject_adapters(model, config.model.lora)


def gguf_file(key: str, path: Path) -> Path | None:
    """The GGUF file that an existing path is or holds; None for a Hugging Face directory."""
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ConfigError(
                f"{key}={str(path)!r} is a file, but no .gguf; give a directory, a GGUF file or a"
                " Hub id"
            )
        return path
    if _exists(path / "config.json"):
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if not files:
        raise ConfigError(
            f"{key}={str(path)!r} is a directory with neither config.json nor a GGUF file; give a"
            " Hugging Face model"
        )
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ConfigError(
            f"{key}={str(path)!r} holds {len(files)} GGUF files ({names}); give the path of one of"
            " them"
        )
    return files[0]


def _local(path: str) -> Path | None:
    """The absolute path if it exists; None for a name that only the Hub can know."""
    local = Path(path).expanduser().absolute()
    return local if _exists(local) else None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a folder that this user may not look into, or no possible name
        raise ConfigError(
            f"{str(path)!r:.200} cannot be looked at ({error.strerror}); give a path that this user"
            " may read, or a Hub id"
        ) from error


def _check_path(key: str, path: str, engine: str | None) -> int | None:
    """The tokens of the model's context, None where its files do not say. Raises `ConfigError`
    unless `path` is a usable model or a possible Hub id. engine: as in `rollout.engine`, None if no
    engine serves the model."""
    local = _local(path)
    if local is None:
        if _HUB_ID.fullmatch(path) is None or path.lower().endswith(".gguf"):
            raise ConfigError(
                f"{key}={path!r} does not exist; give a directory, a GGUF file or a Hub id"
                " (owner/name)"
            )
        if path == SMALL_MODEL:
            raise ConfigError(f"{key}={path!r} does not exist; `make smollm2` fetches it")
        return None
    file = gguf_file(key, local)
    if file is None:
        return _check_directory(key, local, engine)
    if engine is None:
        raise ConfigError(f"{key}={path!r} is a GGUF file; only model.path may be one")
    from .gguf_conversion import read_header

    try:
        return read_header(file).context_length
    except (ValueError, OSError) as error:
        raise ConfigError(f"{key}: {error}") from error


def _check_directory(key: str, folder: Path, engine: str | None) -> int | None:
    """The tokens of the model's context. Raises `ConfigError` unless a Hugging Face directory has
    config, weights and (for an engine) a tokenizer, and the engine supports its architecture."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}={str(folder)!r}: config.json cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{key}={str(folder)!r}: config.json holds no mapping")
    wanted = {"weights": WEIGHT_FILES} | (
        {"tokenizer": TOKENIZER_FILES} if engine is not None else {}
    )
    for what, patterns in wanted.items():
        if not any(file for pattern in patterns for file in folder.glob(pattern)):
            raise ConfigError(
                f"{key}={str(folder)!r} has no {what}: none of {', '.join(patterns)}; add the files"
            )
    if engine == "embedded":
        _check_architecture(key, str(folder), config)
    return _context(config)


def _context(config: dict[str, Any]) -> int | None:
    """Tokens of a model's context by its config.json, stretched by the factor of its rope scaling;
    None where it does not say."""
    config = config.get("text_config") or config
    tokens = config.get("max_position_embeddings")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factor = scaling.get("factor") or 1.0 if isinstance(scaling, dict) else 1.0
    return int(tokens * max(1.0, factor)) if isinstance(tokens, int) else None


def _check_context(config: Config, tokens: int | None) -> None:
    """Raises `ConfigError` if an answer may become longer than the model's context of `tokens`."""
    longest = config.max_model_length
    if tokens is not None and longest > tokens:
        raise ConfigError(
            f"data.max_prompt_length={config.data.max_prompt_length} and"
            f" rollout.max_response_length={config.rollout.max_response_length} are {longest}"
            f" tokens, but the context of model.path={config.model.path!r} has {tokens}; lower one"
            " of them"
        )


def _check_architecture(key: str, path: str, config: dict[str, Any]) -> None:
    from ..rollout.embedded.architecture import parse_architecture

    try:
        parse_architecture(config, f"{key}={path!r}")
    except KeyError as error:
        raise ConfigError(f"{key}={path!r}: config.json says no {error.args[0]}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _hub_config(key: str, path: str) -> Any:
    from transformers import AutoConfig

    look_up()
    try:
        return AutoConfig.from_pretrained(path)
    # transformers raises the first for a missing model, the second for a broken one
    except (OSError, ValueError) as error:
        raise _not_a_model(key, path, error) from error


def _not_a_model(key: str, path: str, error: Exception) -> ConfigError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if _local(path) is None:
        return ConfigError(
            f"{key}={path!r}: there is no such file or directory, and no such model from the Hub"
            f" ({reason})"
        )
    return ConfigError(
        f"{key}={path!r} cannot be loaded: {reason}; give a Hub id, a directory or a GGUF file"
    )


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
