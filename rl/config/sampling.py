"""The settings of sampling: how answers are drawn in training and in evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from .base import LONGEST, MOST_ANSWERS, MOST_TOKENS, Settings
from .data import DataConfig
from .reward import RewardPart


class SamplingConfig(Settings):
    """Truncation of the model's distribution before a token is drawn; the defaults leave it
    whole."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draws from the smallest set of tokens that has this share of the probability; 1: from all."""
    top_k: int = Field(default=0, ge=0, le=MOST_TOKENS)
    """Draws from this many of the likeliest tokens; 0: from all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Tokens less likely than this share of the likeliest are never drawn; 0: none."""
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    """Divides the logits of tokens that the prompt or the answer has already (multiplies negative
    ones); 1: none."""

    @property
    def cuts(self) -> dict[str, Any]:
        """These settings by name, as `Sampling` takes them."""
        return {name: getattr(self, name) for name in SamplingConfig.model_fields}

    @property
    def changed(self) -> dict[str, Any]:
        """Those of `cuts` that are not at their default and so change the distribution."""
        own = SamplingConfig.model_fields
        return {name: value for name, value in self.cuts.items() if value != own[name].default}


class RolloutConfig(SamplingConfig):
    """Sampling of answers, and the engines that do it."""

    engine: str = "embedded"
    """`embedded`: in-process PyTorch with continuous batching, for Llama, Qwen2 and Qwen3
    architectures. `vllm`: vLLM, which has to be installed; with vllm-ascend beside it, on NPUs.
    `package.module:factory`: an engine of your own, made by factory(spec:
    emberl.rollout.engine.WorkerSpec, cards), with the methods of `emberl.rollout.engine.Engine`."""
    engine_args: Mapping[str, Any] = Field(default_factory=dict)
    """vLLM's engine arguments by its own names, e.g. {gpu_memory_utilization: 0.8, enforce_eager:
    true}."""
    servers: tuple[str, ...] = ()
    """Addresses of vLLM servers that already run (`vllm serve` in developer mode), one rollout
    worker for each, with engine=vllm; then cluster.rollouts does not count, and workers take no
    cards."""
    servers_directory: str | None = None
    """A directory that workers and servers see, through which weights go; empty: servers run on the
    workers' machine."""
    max_restarts: int = Field(default=2, ge=0)
    """How often one worker is replaced (or starts vLLM's processes anew) when it is lost or stuck;
    what it had not answered is asked again."""
    group_size: int = Field(default=8, ge=1, le=65_536)
    """G, the number of answers to each prompt."""
    temperature: float = Field(default=1.0, ge=0, le=100)
    """Of the distribution that answers are drawn from; the log-probs of learners are taken under
    the same one."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer beside the model's own end tokens, e.g. [</answer>]; they may begin
    and end within tokens."""
    include_stop: bool = True
    """Whether rewards read the text that ended the answer, e.g. a closing tag, or the answer up to
    there. All tokens that were sampled train in either case."""
    max_response_length: int = Field(default=512, ge=1, le=MOST_TOKENS)
    """Tokens; an answer that reaches it is cut (`response_length/clip_ratio`)."""
    max_num_seqs: int = Field(default=256, ge=1, le=MOST_ANSWERS)
    """Answers that one worker decodes at a time."""
    token_rate: float | None = Field(default=None, gt=0)
    """Tokens a second to which the embedded engine holds every running answer, so that devices
    rather than this machine's cores decide in tests and benchmarks; empty: as fast as it goes."""
    timeout: float = Field(default=1800.0, gt=0, le=LONGEST)
    """Seconds within which a step's answers must arrive; later the run ends and says which worker
    is late."""
    environment: str | None = None
    """`package.module:Class` or `./file.py:Class` that answers the model between its turns, as
    `emberl.rollout.environments` says; max_response_length then counts all turns and observations,
    and timeout each turn. Empty: every answer is one turn."""
    max_turns: int = Field(default=8, ge=1, le=10_000)
    """Turns of the model in an episode at most."""
    environment_timeout: float = Field(default=60.0, gt=0, le=LONGEST)
    """Seconds for one step of an environment; what is late ends its episode."""

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_more(cls, stop: Any) -> Any:
        return (stop,) if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _no_empty_text(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if not all(stop):
            raise ValueError("an empty text would end every answer; leave it out")
        return stop

    @field_validator("engine_args")
    @classmethod
    def _sizes(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        for key in ("tensor_parallel_size", "pipeline_parallel_size"):
            size = given.get(key, 1)
            if not isinstance(size, int) or size < 1:
                raise ValueError(
                    f"rollout.engine_args.{key}={size!r} must be a number of devices, 1 or more"
                )
        return given

    @property
    def cards(self) -> int:
        """Devices of one worker: tensor parallel size x pipeline parallel size."""
        sizes = (
            self.engine_args.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline")
        )
        return math.prod(int(size) for size in sizes)


class ThinkingConfig(Settings):
    """The model's thoughts in an evaluation: whether it has any, and how long they may be."""

    mode: Literal["template", "slow", "fast"] = "template"
    """`slow`: with thoughts, `fast`: without, by the chat template's own variable
    (`enable_thinking` of Qwen3, `thinking` of DeepSeek), or where it has none by how every answer
    begins: the opening tag, or an empty pair of tags. `template`: as the template has it."""
    open: str = "<think>"
    """What begins thoughts, at the end of the prompt or the beginning of the answer; an answer
    without it has none. Empty: all of an answer is thought until `close`."""
    close: str = Field(default="</think>", min_length=1)
    """What ends them."""
    budgets: tuple[int, ...] = ()
    """Tokens after which thoughts are ended by force (s1, arXiv 2501.19393; Qwen3's thinking
    budget, arXiv 2505.09388), a column of the result for each: what was thought without a budget
    is cut there, and the model goes on from `ending`. Empty: thoughts end by themselves."""
    ending: str | None = None
    """What is put behind thoughts that are ended by force, e.g. `"\n</think>\n\n"`; empty: `close`
    alone."""

    @field_validator("budgets", mode="before")
    @classmethod
    def _one_or_more(cls, budgets: Any) -> Any:
        return (budgets,) if isinstance(budgets, int) else budgets

    @field_validator("budgets")
    @classmethod
    def _rising(cls, budgets: tuple[int, ...]) -> tuple[int, ...]:
        if any(budget < 1 for budget in budgets) or len(set(budgets)) < len(budgets):
            raise ValueError("give each number of tokens once, 1 or more, e.g. [64, 256]")
        return tuple(sorted(budgets))

    @model_validator(mode="after")
    def _closes(self) -> ThinkingConfig:
        if self.open and self.ending is not None and self.close not in self.ending:
            raise ValueError(
                f"ending={self.ending!r} does not hold close={self.close!r}, so thoughts would go"
                " on after it; put it in"
            )
        return self


class EvalSetConfig(DataConfig):
    """A set of problems to be evaluated on, all of it: the keys of `data`, with `path` for
    `source`, and its own answers. What is not set is as in `eval` and `rollout`, and the template,
    the system prompt and the longest prompt as in `data`."""

    ordered = False
    heldout: int = Field(default=0, ge=0, le=0)
    """0: nothing of a set is trained on."""
    size: int | None = Field(default=None, ge=1, le=100_000_000)
    """The first so many problems; empty: all, of a generated source 512."""
    samples: int | None = Field(default=None, ge=1, le=65_536)
    """Answers to each problem."""
    temperature: float | None = Field(default=None, ge=0, le=100)
    """0: greedy."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Empty: `eval.top_p`."""
    top_k: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    """Empty: `eval.top_k`."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Empty: `eval.min_p`."""
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    """Empty: `eval.repetition_penalty`."""
    max_response_length: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    """Tokens; the engines are made for it. Empty: `rollout.max_response_length`."""
    thinking: ThinkingConfig = ThinkingConfig()
    verifier: RewardPart | None = None
    """What marks the answers: a name such as `math`, or the keys of a part of the reward; empty:
    the run's reward."""

    @model_validator(mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"source": value}
        if not isinstance(value, Mapping) or "path" not in value:
            return value
        if "source" in value:
            raise ValueError("path is another word for source; set one of them")
        return {"source": value["path"], **{key: v for key, v in value.items() if key != "path"}}

    @model_validator(mode="after")
    def _whole(self) -> EvalSetConfig:
        if self.eval_path is not None or self.eval_split is not None:
            raise ValueError(
                "a set is evaluated whole: name its file in path, or its split in split"
            )
        return self

    @property
    def generated(self) -> bool:
        """Whether its problems are made rather than read."""
        return isinstance(self.source, str) and self.source.startswith(
            ("arithmetic", "reasoning_gym:")
        )


class EvalConfig(SamplingConfig):
    """Held-out problems, before, during and after RL."""

    every: int = Field(default=25, ge=0)
    """RL steps between evaluations; 0: only before and after. With `schedule.max_staleness` above 0
    the learners go on meanwhile."""
    size: int | None = Field(default=None, ge=0, le=100_000_000)
    """The first so many of the problems that `data` holds out; empty: all of them; 0: none."""
    samples: int = Field(default=1, ge=1, le=65_536)
    """Answers to each problem (`mean@N`)."""
    temperature: float = Field(default=0.0, ge=0, le=100)
    """0: greedy."""
    sets: Mapping[str, EvalSetConfig] = Field(default_factory=dict)
    """Further sets by name, each with the keys of `data` and answers of its own, e.g. {aime24:
    {path: aime24.parquet, prompt_column: problem, samples: 16, temperature: 0.6, verifier: math}};
    `val-core/aime24/acc/mean@16`."""

    @property
    def active(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self.size != 0 or bool(self.sets)
