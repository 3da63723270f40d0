"""The settings `data`. Importing this loads neither torch nor transformers nor
datasets."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from .base import Settings
from .curriculum import CurriculumConfig

KINDS = ("chain", "products", "brackets", "solve", "story", "compare")
"""The kinds of problems of the built-in source; `rl/data/arithmetic.py` shows one of each."""
LAYOUTS = (
    "gsm8k",
    "math",
    "dapo",
    "deepscaler",
    "numina",
    "openr1",
    "big_math",
    "orz",
    "simplerl",
    "logic_rl",
    "countdown",
    "eurus",
    "taco",
    "apps",
    "livecodebench",
    "deepcoder",
    "kodcode",
    "acecode",
    "leetcode",
    "verl",
    "openrlhf",
    "trl",
    "sharegpt",
)
"""The layouts that `data.layout` may name; `rl/data/layouts.py` has them as a table."""
SET_BY_EMBERL = (
    "conversation",
    "messages",
    "chat_template",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)
"""Arguments of `apply_chat_template` that a user may not give."""

FORM_OF_PROMPTS = (
    "max_prompt_length",
    "system_prompt",
    "merge_system",
    "template",
    "chat_template",
    "chat_template_kwargs",
    "assistant_prefix",
)
"""Keys that another set takes over from `data` where it does not set them itself."""
GENERATED = ("kinds", "terms", "largest_term", "largest_total", "steps", "gym")
"""Keys that say what generated problems are like."""


def endless(source: str | tuple[str, ...]) -> bool:
    """Whether the source makes problems that never repeat by design, rather than reading a data
    set."""
    return isinstance(source, str) and (
        source == "arithmetic" or source.startswith("reasoning_gym:")
    )


class DataConfig(Settings):
    """The source of problems, and the rules by which a row becomes a prompt with a reference
    answer."""

    ordered: ClassVar[bool] = True
    """Whether a curriculum may order these problems."""
    source: Annotated[str, Field(min_length=1)] | tuple[str, ...] = ""
    """`arithmetic` (built in), `reasoning_gym:<task>`, a Hub data set `owner/name`, or files:
    Parquet, Arrow, JSON, JSON lines, CSV or TSV (the texts also as .gz, .bz2, .xz, .zst), by name,
    as a glob, a folder of shards, a folder of `save_to_disk`, or a list of any of these. Rows of
    one prompt and answer count as one problem. Empty with `mixture`."""
    mixture: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    """Several sources instead of one, by names of yours, which are their prompts' source: of each
    its `weight` and what it has other than `data`, e.g. `{sums: {source: arithmetic, weight: 0.3},
    gsm8k: {source: openai/gsm8k, subset: main, weight: 0.7}}`. Weights are shares of the prompts
    and sum to 1; without any they are equal."""
    levels: tuple[Mapping[str, Any], ...] = ()
    """The same source at rising difficulty: of each level what it has other than `data`, e.g.
    `[{gym: {max_terms: 3}}, {gym: {max_terms: 6}}]`. Training begins with the first and goes on by
    `curriculum.raise_at`; held-out problems are the last one's."""
    curriculum: CurriculumConfig = CurriculumConfig()
    layout: str = "auto"
    """Where rows have prompt, answer and tests: recognised from the columns, or that of a public
    data set by name. What `prompt_column`, `prompt_template`, `answer_column` and `tests_column`
    say comes first."""
    name: str | None = None
    """As in `val-core/{name}/acc/mean@1`; empty: the file's, data set's or task's. A row's own
    `data_source` comes first."""
    max_prompt_length: int = Field(default=1024, ge=1, le=10_000_000)
    """Tokens, with the chat template."""
    overlong: Literal["error", "drop"] = "error"
    """What becomes of a longer prompt; generated problems that are too long are drawn again."""
    seed: int | None = Field(default=None, ge=0)
    """Fixes the order of a data set and the problems of a generated source; empty: the run's
    `seed`."""

    heldout: int = Field(default=512, ge=0)
    """Problems never trained on, chosen by a hash of their text and so the same for every seed. Not
    used where `eval_path` or `eval_split` names the held-out set."""
    eval_path: str | tuple[str, ...] | None = None
    """Files with the held-out problems, named as in `source`; their layout is recognised on its
    own."""
    eval_split: str | None = None
    """The split of a Hub data set with the held-out problems."""

    subset: str | None = None
    """The configuration of a Hub data set, e.g. `main` of openai/gsm8k."""
    split: str = "train"
    """Of a Hub data set, a folder whose files are named by their splits, or one of
    `save_to_disk`."""
    revision: str | None = None
    """A Hub data set's branch, tag or commit."""
    prompt_column: str | None = None
    """Text, or a list of messages; empty: what the layout says. A dot goes into a nested column,
    list or JSON text."""
    answer_column: str | None = None
    """The reference answer as it stands there; empty: what the layout says, and of a worked
    solution what it comes to. With `""` there is no reference."""
    tests_column: str | None = None
    """The tests of programs; empty: what the layout says."""
    drop: Literal["bad", "none"] = "bad"
    """`bad`: a row without prompt or answer, or with a reference that the reward refuses against
    itself, is left out, counted and shown; `none`: it ends the run before training. Where it is
    more than half of the rows, the run ends in either case."""
    answer_pattern: str | None = None
    """A regular expression whose group 1, of its last match in the answer column, is the reference:
    `#### (.+)`."""
    solution_column: str | None = None
    """The worked solution for supervised learning; empty: there is none (verl's GSM8K:
    `extra_info.answer`)."""
    solution_template: str = "{solution}"
    """What is learnt of it, e.g. `<think>{solution}</think>{answer}`."""
    prompt_template: str | None = None
    """The user's message, `{name}` standing for a column; `{{` and `}}` are braces, and so are
    those around no name."""
    system_prompt: str | None = None
    """Goes before messages that have no system message."""
    merge_system: bool = False
    """Puts the system message before the first user's, in one message, for templates without such a
    role (Gemma)."""
    template: Literal["auto", "chat", "none", "raw"] = "auto"
    """`chat`: the chat template makes a prompt of the messages. `none`: their texts alone, one
    below the other, after the tokenizer's own beginning. `raw`: a text that is a rendered prompt
    already, special tokens and all. `auto`: chat, or none where the model has no template."""
    chat_template: str | None = None
    """Another chat template than the model's: a file, or the text of one."""
    chat_template_kwargs: Mapping[str, Any] = Field(default_factory=dict)
    """What the template is given beside the messages, e.g. `{enable_thinking: false}` for Qwen3."""
    assistant_prefix: str = ""
    """How every answer begins, e.g. "<think>\n": the end of the prompt, from which the model goes
    on. It does not train; rewards read it before what was sampled."""
    final_answer: Literal["cut", "continue"] = "cut"
    """Of messages that end with the assistant's: whether that answer is left out of the prompt, or
    begins the model's."""

    kinds: Mapping[str, float] = Field(default_factory=lambda: {"chain": 1.0})
    """arithmetic: the kinds of problems (chain, products, brackets, solve, story, compare) and
    their weights."""
    terms: tuple[int, int] = (4, 6)
    """arithmetic: the fewest and the most numbers in a problem; it takes one step fewer to work
    out."""
    largest_term: int = Field(default=9, ge=2, le=99)
    """arithmetic: the numbers of `chain`, `solve`, `story` and `compare` are 1 to this; those of
    the other kinds have one digit."""
    largest_total: int = Field(default=99, ge=20, le=999)
    """arithmetic: no intermediate result exceeds this, and none is negative."""
    steps: Literal["full", "short"] = "full"
    """arithmetic: worked solutions read `7+5=12,12-3=9` (full) or `12,9` (short)."""

    gym: Mapping[str, Any] = Field(default_factory=dict)
    """reasoning_gym: arguments of the task, e.g. `{min_terms: 2}`."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "bad_references" in values:
            raise ValueError(
                "data.bad_references is data.drop now: drop is data.drop=bad, error is"
                " data.drop=none"
            )
        if isinstance(values, Mapping) and values.get("mixture") and values.get("source") == "":
            return {name: value for name, value in values.items() if name != "source"}
        return values

    @field_validator("kinds")
    @classmethod
    def _kinds(cls, kinds: Mapping[str, float]) -> Mapping[str, float]:
        for kind, weight in kinds.items():
            if kind not in KINDS:
                near = difflib.get_close_matches(kind, KINDS, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(
                    f"data.kinds has no kind {kind!r}, it has {', '.join(KINDS)}{hint}"
                )
            if not 0 <= weight < float("inf"):
                raise ValueError(f"the weight data.kinds.{kind}={weight} must be 0 or more")
        if not any(kinds.values()):
            raise ValueError(
                f"data.kinds needs one kind with a positive weight, of {', '.join(KINDS)}"
            )
        return kinds

    @field_validator("layout")
    @classmethod
    def _layout(cls, layout: str) -> str:
        if layout not in ("auto", *LAYOUTS):
            near = difflib.get_close_matches(layout, LAYOUTS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"data.layout is auto or one of {', '.join(LAYOUTS)}{hint}")
        return layout

    @field_validator("terms")
    @classmethod
    def _terms(cls, terms: tuple[int, int]) -> tuple[int, int]:
        if not 2 <= terms[0] <= terms[1] <= 32:
            raise ValueError(
                "data.terms must be [fewest, most] with 2 <= fewest <= most <= 32, e.g. [4, 6]"
            )
        return terms

    @field_validator("chat_template_kwargs")
    @classmethod
    def _not_ours(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        for name in given:
            if name in SET_BY_EMBERL:
                raise ValueError(
                    f"{name} is no variable of a template, and set by emberl; leave it out"
                )
        return given

    @field_validator("answer_pattern")
    @classmethod
    def _pattern(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"data.answer_pattern is no regular expression: {error}") from error
        if groups < 1:
            raise ValueError(
                r"data.answer_pattern needs a group around the reference, e.g. '#### (.+)'"
            )
        return pattern

    def beside(self, data: DataConfig) -> Self:
        """A copy that takes the keys in `FORM_OF_PROMPTS` from `data` where it does not set them
        itself."""
        own = self.model_fields_set
        return self.model_copy(
            update={k: getattr(data, k) for k in FORM_OF_PROMPTS if k not in own}
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """The names in `source`."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def parts(self) -> dict[str, tuple[float, DataConfig]]:
        """The sources by name, each with its share of the prompts."""
        if not self.mixture:
            return {self.name or "": (1.0, self)}
        equal = 1 / len(self.mixture)
        shares = [float(part.get("weight") or equal) for part in self.mixture.values()]
        parts = [self._other(f"mixture.{n}", p, name=n) for n, p in self.mixture.items()]
        return dict(zip(self.mixture, zip(shares, parts, strict=True), strict=True))

    @property
    def at_levels(self) -> list[DataConfig]:
        """The settings of each level, easiest first."""
        if not self.levels:
            return [self]
        return [self._other(f"levels[{i}]", level) for i, level in enumerate(self.levels)]

    def _other(self, key: str, part: Mapping[str, Any], **more: Any) -> DataConfig:
        """These settings with the keys of one part or level over them. Raises ValueError, naming
        data.`key`, if the result is not valid."""
        if inner := {"mixture", "curriculum"} & part.keys():
            raise ValueError(f"data.{key}.{inner.pop()} belongs to data itself; set it there")
        own = {name: getattr(self, name) for name in self.model_fields_set - {"mixture"}}
        if key.startswith("levels"):
            own.pop("levels")
        given = {name: value for name, value in part.items() if name != "weight"}
        merged = {k: {**own[k], **v} if k == "gym" and k in own else v for k, v in given.items()}
        try:
            return DataConfig.model_validate({**own, **merged, **more})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join([f"data.{key}", *(str(step) for step in first["loc"])])
            raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error

    @model_validator(mode="after")
    def _mixed(self) -> DataConfig:
        if self.scheduled and not self.ordered:
            raise ValueError(
                "mixture, levels and curriculum order the problems of RL; name one source here"
            )
        if self.source == () and not self.mixture:
            raise ValueError("data.source is an empty list; name at least one file")
        if bool(self.source) == bool(self.mixture):
            which = "both are set" if self.source else "neither is set"
            raise ValueError(f"set data.source (one source) or data.mixture (several): {which}")
        weights = {name: part.get("weight") for name, part in self.mixture.items()}
        given = {name: weight for name, weight in weights.items() if weight is not None}
        for name, weight in given.items():
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not 0 < weight < float("inf"):
                raise ValueError(
                    f"data.mixture.{name}.weight={weight} must be a number above 0; leave the"
                    " source out to have none of it"
                )
        if given and len(given) < len(weights):
            missing = next(name for name in weights if name not in given)
            raise ValueError(
                f"data.mixture.{missing} has no weight, others have; give all a weight, or none"
            )
        if given and abs(sum(given.values()) - 1) > 1e-6:
            raise ValueError(
                f"the weights of data.mixture sum to {sum(given.values()):g}; they are shares of"
                " the prompts and must sum to 1"
            )
        levels = [level for _, part in self.parts.values() for level in part.at_levels]
        if len(levels) > len(self.parts) and self.curriculum.rate_column is not None:
            raise ValueError(
                "data.levels rise by measured success, data.curriculum.rate_column says what was"
                " measured before; leave one of them out"
            )
        return self

    @property
    def scheduled(self) -> bool:
        """Whether prompts come in the order of a curriculum."""
        return bool(self.mixture or self.levels or self.curriculum.active)

    @model_validator(mode="after")
    def _together(self) -> DataConfig:
        reckons = any(weight for kind, weight in self.kinds.items() if kind != "compare")
        if reckons and self.largest_total < 2 * self.largest_term:
            raise ValueError(
                f"data.largest_total={self.largest_total} must be at least twice"
                f" data.largest_term={self.largest_term}, so that any number can be added or taken"
                " away"
            )
        if self.kinds.get("compare") and self.largest_term < self.terms[1]:
            raise ValueError(
                f"data.largest_term={self.largest_term} gives too few different numbers to compare;"
                f" data.terms={list(self.terms)} needs {self.terms[1]}"
            )
        if self.template in ("none", "raw") and (
            self.chat_template is not None or self.chat_template_kwargs
        ):
            raise ValueError(
                f"data.template={self.template} uses no chat template, so data.chat_template and"
                " chat_template_kwargs would do nothing; leave them out, or set data.template=chat"
            )
        if self.template == "raw" and (self.system_prompt is not None or self.merge_system):
            raise ValueError(
                "data.template=raw takes a prompt as it is, with no place for data.system_prompt"
                " and merge_system; leave them out, or set data.template=chat or none"
            )
        if self.eval_path is not None and self.eval_split is not None:
            raise ValueError(
                "set data.eval_path (a file) or data.eval_split (a split of data.source), not both"
            )
        return self
