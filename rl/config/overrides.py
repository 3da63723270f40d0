"""`key=value` on the command line: text where the key holds text, YAML where it does not.

    data.answer_pattern=#### (.+)      the text as it stands, also with : [ {, yes or 1e3
    data.system_prompt=                the empty text
    data.system_prompt=null            none; 'null' in quotes is the text
    rollout.servers=[http://a:8000,b]  a list of texts
    optim.lr=1e-4  stages=[sft,rl]  data.kinds={chain: 1, solve: 2}

`${...}` is OmegaConf's, as in a file; `\\${` is a dollar sign and a brace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel


class OverrideError(ValueError):
    """An override that is no `key=value`."""


def tree_of(
    override: str, model: type[BaseModel], example: str = "optim.lr=1e-4"
) -> dict[str, Any]:
    """`a.b=value` as {a: {b: value}}, the value of the type that `model` has there. Raises
    OverrideError, with `example` in its message, if it has not that form."""
    key, equals, value = override.partition("=")
    path = key.split(".")
    if not equals or not all(path) or not key.strip():
        raise OverrideError(f"override {override!r} must have the form key=value, e.g. {example}")
    tree: Any = read(
        value, [kind for annotation in kinds_at(model, path) for kind in members(annotation)]
    )
    for part in reversed(path):
        tree = {part: tree}
    assert isinstance(tree, dict)
    return tree


def merged(tree: Any, over: Any) -> Any:
    """`tree` with `over` on top: mappings are merged key by key, all else is replaced whole."""
    if not isinstance(tree, Mapping) or not isinstance(over, Mapping):
        return over
    both = {key: merged(tree[key], over[key]) for key in tree.keys() & over.keys()}
    return {**tree, **over, **both}


def without_null_entries(tree: Mapping[str, Any], kinds: Sequence[Any]) -> dict[str, Any]:
    """`tree` without the entries that are null in mappings whose keys are the user's own, such as
    `reward.parts`: so an override takes out what the file has. kinds: the types of the tree."""
    kept: dict[str, Any] = {}
    free = any(not (isinstance(kind, type) and issubclass(kind, BaseModel)) for kind in kinds)
    for name, value in tree.items():
        inside = [inner for kind in kinds for inner in _inside(kind, name)]
        own = [member for inner in inside for member in members(inner)]
        if value is None and free and own and not {NoneType, Any} & {*own}:
            continue
        kept[name] = without_null_entries(value, own) if isinstance(value, Mapping) else value
    return kept


def read(value: str, kinds: Sequence[Any]) -> Any:
    """The text `value` converted to the types of its key, `kinds` (empty for an unknown key)."""
    given = [kind for kind in kinds if kind is not NoneType]
    texts = [kind for kind in given if is_text(kind)]
    if given and len(texts) == len(given):
        return None if value == "null" else _unquoted(value)
    lists = [kind for kind in given if is_list_of_texts(kind)]
    if given and len(texts) + len(lists) == len(given):
        items = _texts(value)
        return items if items is not None else (_unquoted(value) if texts else value)
    return _yaml(value)


def kinds_at(model: Any, path: Sequence[str]) -> list[Any]:
    """The annotations of the key at this path, one for each way through a union; [] for no key."""
    reached = [model]
    for part in path:
        inside = [_inside(member, part) for kind in reached for member in members(kind)]
        reached = [inner for kinds in inside for inner in kinds]
    return reached


def members(kind: Any) -> Iterator[Any]:
    """The members of a union, of unions in it, and of annotated types."""
    if get_origin(kind) in (Union, UnionType):
        for part in get_args(kind):
            yield from members(part)
    elif get_origin(kind) is Annotated:
        yield from members(get_args(kind)[0])
    else:
        yield kind


def _inside(kind: Any, part: str) -> list[Any]:
    if kind is Any:
        return [Any]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(part)
        return [] if field is None else [field.annotation]
    origin = get_origin(kind)
    is_mapping = isinstance(origin, type) and issubclass(origin, Mapping)
    return [get_args(kind)[1]] if is_mapping else []


def is_text(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return all(isinstance(word, str) for word in get_args(kind))
    return kind is str


def is_list_of_texts(kind: Any) -> bool:
    origin = get_origin(kind)
    if not (isinstance(origin, type) and issubclass(origin, Sequence)):
        return False
    items = [part for part in get_args(kind) if part is not Ellipsis]
    return bool(items) and all(is_text(part) for item in items for part in members(item))


def _unquoted(value: str) -> str:
    """The text; in one pair of quotes, without them and as YAML reads it."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        inner = _load(value)
        return inner if isinstance(inner, str) else value
    return value


def _texts(value: str) -> list[str] | None:
    """[a, 'b, c', 1e3] as a list of texts; None if the text is no such list."""
    stripped = value.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return None
    parsed = _load(stripped, plain=True)
    if isinstance(parsed, list) and all(isinstance(item, str) for item in parsed):
        return parsed
    return None


def _yaml(value: str) -> Any:
    """The value that YAML reads from a text in brackets or quotes, or of one word; else the text
    itself."""
    stripped = value.strip()
    closed = len(stripped) > 1 and stripped[0] + stripped[-1] in ("[]", "{}", "''", '""')
    if not closed and (len(stripped.split()) != 1 or "#" in stripped):
        return value
    parsed = _load(stripped)
    whole = parsed is not None or stripped in ("null", "~", "Null", "NULL")
    return parsed if whole and (closed or not isinstance(parsed, list | dict)) else value


def _load(text: str, *, plain: bool = False) -> Any:
    """The value of a YAML text; None if it is not valid. plain: every scalar stays a text."""
    import yaml

    try:
        if plain:
            return yaml.load(text, Loader=yaml.BaseLoader)
        # by OmegaConf, as files are: for PyYAML, which follows YAML 1.1, 1e-4 is a text
        tree = OmegaConf.to_container(OmegaConf.from_dotlist([f"x={text}"]))
    except (OmegaConfBaseException, yaml.YAMLError):
        return None
    assert isinstance(tree, dict)
    return tree["x"]
