"""Evaluation sets: problems to evaluate the policy on, with sampling and verifier of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from ..rewards.suite import RewardSuite, build_suite
from ..rollout.samples import Prompt, Sampling
from .answers import reward_input
from .config.data import DataConfig
from .config.load import Config, ConfigError, user_errors
from .config.sampling import EvalSetConfig, ThinkingConfig
from .data.sources import PromptSource, open_source
from .evaluation.thinking import Thoughts, in_mode

GENERATED_SIZE = 512
"""Problems of a generated set whose `size` is not set."""
HELD_OUT = ""
"""Name of the set that `data` itself holds out; its metrics are named by data source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSet:
    """A set of problems, with the sampling and the grading of answers to them."""

    name: str
    """Name in metrics, e.g. `val-core/{name}/acc/mean@N`; `HELD_OUT` for the problems that `data`
    holds out."""
    prompts: Sequence[Prompt]
    samples: int
    """Answers to each problem."""
    sampling: Mapping[str, Any]
    """Fields of `Sampling` that this set overrides."""
    suite: RewardSuite
    thinking: Thoughts | None = None
    """Thinking budgets at which thoughts are also ended by force; None without any."""

    def sampled(self, sampling: Sampling) -> Sampling:
        """The run's sampling with this set's overrides."""
        return replace(sampling, **self.sampling)


def open_eval_sets(
    config: Config,
    source: PromptSource | None,
    suite: RewardSuite,
    tokenizer_of: Callable[[DataConfig], Any],
    tell: Callable[[str], None],
    opened: ExitStack,
) -> tuple[EvalSet, ...]:
    """The held-out problems of `source`, if there is one, and every set of `eval.sets`; `opened`
    closes the reward suites of these.

    tell: called with a line for each omission. Raises ConfigError for a set that cannot be read or
    graded.
    """
    sets = []
    if source is not None and config.eval.size != 0 and source.heldout:
        prompts = _cut(source.heldout, config.eval.size, "eval.size", "held-out problems", tell)
        sets.append(
            EvalSet(
                name=HELD_OUT,
                prompts=prompts,
                samples=config.eval.samples,
                sampling=sampling_of(config, None),
                suite=suite,
            )
        )
    sources = {prompt.source for each in sets for prompt in each.prompts}
    if source is not None:
        sources.add(source.name)
    for name, own in config.eval.sets.items():
        settings = own.beside(config.data)
        if name in sources:
            raise ConfigError(
                f"eval.sets.{name} has the name of a data source; rename it, or set data.name"
            )
        with user_errors():
            try:
                sets.append(
                    _open(name, settings, config, suite, tokenizer_of(settings), tell, opened)
                )
            except ValueError as error:
                raise ValueError(f"eval.sets.{name}: {error}") from error
    return tuple(sets)


def _open(
    name: str,
    settings: EvalSetConfig,
    config: Config,
    suite: RewardSuite,
    tokenizer: Any,
    tell: Callable[[str], None],
    opened: ExitStack,
) -> EvalSet:
    key = f"eval.sets.{name}"
    generated = settings.generated
    if generated:
        settings = settings.model_copy(update={"heldout": settings.size or GENERATED_SIZE})
    settings = in_mode(settings, settings.thinking, tokenizer.chat_template)
    source = open_source(settings, tokenizer, config.seed)
    prompts = list(source.heldout) if generated else _all_of(source)
    for note in source.notes:
        tell(f"{key}: {note}")
    prompts = _cut(prompts, settings.size, f"{key}.size", f"problems of {name}", tell)
    if settings.verifier is not None:
        suite = build_suite({"answer": settings.verifier.model_dump()})
        opened.callback(suite.close)
        suite.trial(reward_input(prompts[0], tokenizer, "0"))
    bad = suite.check_references([reward_input(prompt, tokenizer, "") for prompt in prompts])
    unfit = {b.row for b in bad}
    if bad:
        line = f"{len(unfit)} of {len(prompts)} references cannot be graded against: {bad[0]}"
        if 2 * len(unfit) > len(prompts):
            raise ValueError(line)
        if settings.drop == "none":
            raise ValueError(f"{line}; mend them, or set drop=bad")
        tell(f"{key}: left out: {line}")
        prompts = [prompt for row, prompt in enumerate(prompts) if row not in unfit]
    sampling = sampling_of(config, settings)
    longest = sampling.get("max_tokens", config.rollout.max_response_length)
    return EvalSet(
        name=name,
        prompts=prompts,
        samples=settings.samples or config.eval.samples,
        sampling=sampling,
        suite=suite,
        thinking=_thoughts(config, settings.thinking, tokenizer, longest),
    )


def _thoughts(
    config: Config, settings: ThinkingConfig, tokenizer: Any, longest: int
) -> Thoughts | None:
    """The `Thoughts` that end at budgets; None without any. Raises ValueError if a budget leaves no
    room for an answer."""
    if not settings.budgets:
        return None
    if config.rollout.environment is not None:
        raise ValueError("thinking.budgets are for answers of one turn; leave them out")
    thoughts = Thoughts(settings, tokenizer)
    if (most := settings.budgets[-1]) + len(thoughts.ending) >= longest:
        raise ValueError(
            f"thinking.budgets={most} and the {len(thoughts.ending)} tokens of its ending leave no"
            f" room for an answer in max_response_length={longest}; raise that, or lower the budget"
        )
    return thoughts


def _all_of(source: PromptSource) -> list[Prompt]:
    """Every problem of a data set, in the order of its rows."""
    prompts = [source.train(i) for i in range(source.size or 0)]
    return sorted(prompts, key=_row)


def _row(prompt: Prompt) -> tuple[int, str]:
    number = prompt.id.rpartition("/")[2]
    return (int(number) if number.isdigit() else 0, prompt.id)


def _cut(
    prompts: Sequence[Prompt], size: int | None, key: str, what: str, tell: Callable[[str], None]
) -> list[Prompt]:
    """The first `size` prompts (None: all); calls `tell` if some are left out."""
    if size is not None and size < len(prompts):
        tell(f"{key}={size}: the first {size} of {len(prompts)} {what} are evaluated")
        return list(prompts[:size])
    return list(prompts)


def sampling_of(config: Config, own: EvalSetConfig | None) -> dict[str, Any]:
    """Fields of `Sampling` in an evaluation: those of `eval`, overridden by the set's own."""
    keys = {"temperature": config.eval.temperature, **config.eval.cuts, "seed": config.seed}
    if own is not None:
        names = {"temperature": "temperature", "max_response_length": "max_tokens"}
        names |= {name: name for name in config.eval.cuts}
        keys |= {
            field: value for key, field in names.items() if (value := getattr(own, key)) is not None
        }
    return keys
