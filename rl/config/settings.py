"""The settings of model, learning, schedule and machine: a frozen model for each group of keys.
Loads no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import LONGEST, MOST_ANSWERS, MOST_STEPS, Settings
from .tiny import TinyConfig

Share = Annotated[float, Field(ge=0, lt=1)]


class LoraConfig(Settings):
    """Low-rank adapters (peft): the base weights stay as they are, and the engines get the merged
    ones."""

    rank: int = Field(default=16, ge=1, le=65_536)
    """Rows of each adapter."""
    alpha: int = Field(default=32, ge=1, le=1_000_000)
    """The adapters' product counts alpha / rank times."""
    targets: str | tuple[str, ...] = "all-linear"
    """Names of the adapted layers, e.g. [q_proj, v_proj]; `all-linear`: every linear layer but the
    output head."""


class ModelConfig(Settings):
    """The policy that is trained."""

    path: str | None = None
    """A Hugging Face Hub id, a local directory with config, tokenizer and weights, or a GGUF file
    (or a directory with one), which is converted to float32 weights in the run's `model_init`.
    Empty: `tiny` is made."""
    tiny: TinyConfig | None = None
    """Makes a small Qwen3-architecture model with a character tokenizer in the run directory
    instead of loading one."""
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    """What forward and backward passes compute in, and what the engines serve; master weights are
    float32 (float64 with float64). `auto`: bfloat16 where the hardware multiplies it, else
    float32."""
    attention: str = "auto"
    """transformers' `attn_implementation`; `auto`: flash attention on an accelerator that has it,
    else sdpa. On a CPU in bfloat16 the learner's own packed layers for Llama, Qwen2 and Qwen3, else
    eager (faster at short lengths)."""
    gradient_checkpointing: bool = False
    """Computes a layer's activations again in the backward pass instead of keeping them: less
    memory, more time."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Sequences of a pass end to end in one row instead of padded; `auto`: where the attention
    passes over other sequences' tokens (flash and flex attention). Loss and gradient do not depend
    on it."""
    share_prompts: Literal["auto", "on", "off"] = "auto"
    """Computes a prompt once for its group of answers in a learner's pass (verl's
    use_prefix_grouper); `auto`: in packed passes of Llama, Qwen2 and Qwen3 by flash attention or
    the learner's own. On a CPU in float32 that also chooses packed passes, but for very small
    models. Loss and gradient do not depend on it."""
    lora: LoraConfig | None = None
    """Trains adapters instead of all weights; empty: all weights."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.tiny is None):
            raise ValueError(
                "set either model.path (a Hub id or a directory) or model.tiny (a small model made"
                f" here){'' if self.path is None else '; with model.path add model.tiny=null'}"
            )
        return self


class ScheduleConfig(Settings):
    """The training loop: steps, their sizes, and how far rollouts run ahead."""

    passes: float | None = Field(default=None, gt=0, le=1_000_000)
    """Passes over a finite data set, from which `steps` follows, whatever it says here; empty:
    `steps` counts. (PPO's epochs, passes over one step's answers, are `epochs`.)"""
    steps: int = Field(default=100, ge=0, le=MOST_STEPS)
    """RL steps: prompts sampled, answers marked, `minibatches` x `epochs` optimizer steps, one new
    version of the weights."""
    prompts_per_step: int = Field(default=64, ge=1, le=MOST_ANSWERS)
    """Problems of one step, `rollout.group_size` answers to each."""
    oversample: float = Field(default=1.0, ge=1, le=100)
    """With max_staleness=0: so many times `prompts_per_step` groups are started, the first of them
    to be finished are trained on, and the rest is cut. Steps are shorter by their long tail, and
    short answers are favoured (`sched/oversample/length_bias`)."""
    minibatches: int = Field(default=1, ge=1, le=MOST_ANSWERS)
    """Parts of whole groups into which a step's answers are split, an optimizer step each. From the
    second on the ratio to the sampling policy is no longer 1, and the clip of the loss acts."""
    epochs: int = Field(default=1, ge=1, le=1_000)
    """Passes over a step's answers (PPO's epochs)."""
    max_staleness: int = Field(default=0, ge=0, le=64)
    """k: a token trains at most k versions after the one that sampled it, and rollouts run ahead by
    as much while the learners work. 0: strictly on-policy, every token is sampled by the newest
    weights."""
    in_flight: Literal["update", "finish", "park"] = "update"
    """What becomes of answers that are being decoded when new weights come. `update`: they go on
    with them at the next token. `finish`: they are finished with the old ones, and the update
    waits. `park`: they go on from where they stood, read anew by the new weights. Every token keeps
    the version and the log-prob that it was drawn with."""
    overdue: Literal["wait", "evict"] = "wait"
    """What happens to a group that would become too old while it is still decoded. `wait`: the
    learners wait for it. `evict`: it is thrown away and counted, which favours short answers."""


class SyncConfig(Settings):
    """Weight transfer from the learners to the engines."""

    mode: Literal["auto", "dense", "patch"] = "auto"
    """`dense`: whole weights; `patch`: what changed since the last version, bit for bit the same
    result. `auto`: whichever takes less time at the bandwidth and the share of changed weights that
    are measured; a change is logged with its reason."""
    transport: Literal["auto", "object_store", "collective", "directory"] = "auto"
    """How the bytes travel. `object_store`: Ray's, with one copy a node. `collective`: whole
    weights go from the learners into vLLM's own processes, over the devices' fabric;
    rollout.engine_args.weight_transfer_config must name vLLM's engine for that. `directory`: files
    in `sync.directory`. `auto`: the object store, or the collective where that is configured and
    cards measure it to be faster."""
    directory: str | None = None
    """A directory that the learners and all workers see, for transport=directory; empty: `sync` in
    the run's."""
    anchor_every: int = Field(default=50, ge=1)
    """Versions after which the whole weights are made available anew, for workers that join late;
    earlier where the patches since the last time have half their size."""
    rate_limit: float | None = Field(default=None, gt=0)
    """Bytes a second that a worker may fetch: a weak link for tests and benchmarks; empty: as fast
    as it goes."""
    probe_tokens: int = Field(default=128, ge=0)
    """After each update engines and learners must give so many tokens of training prompts the same
    log-probs, but for the rounding that earlier versions have shown; fewer tokens find less. 0: not
    asked."""
    canary: bool = True
    """At the start of every engine, and after what could make it capture or pack anew, weights that
    differ in every tensor are loaded, decoded with, compared with the learners' and taken back
    (`timing_s/canary`): the proof that what decodes is what was sent. Where engines sleep and wake
    at every step, as often as 5 % of the time allow."""
    canary_every: int = Field(default=100, ge=0)
    """Versions after which that is done again; 0: never."""
    timeout: float = Field(default=600.0, gt=0, le=LONGEST)
    """Seconds for one version to be served, and proved by digest, on every worker."""


class OptimConfig(Settings):
    """AdamW over float32 master weights."""

    lr: float = Field(default=1e-6, gt=0, le=1)
    """The largest learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of Adam's first and second moment (verl and TRL: 0.9 and 0.999)."""
    eps: float = Field(default=1e-8, gt=0, lt=1)
    """Added to the root of Adam's second moment."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """AdamW's, times the learning rate (verl: 0.01)."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm; a step whose norm is not finite is skipped and counted."""
    warmup_steps: int = Field(default=0, ge=0)
    """Updates over which the rate rises from 0 to `lr`. The first has the rate 0, as in
    transformers, verl and TRL, and changes no weight."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Over all updates that RL can make. A part of a step without any signal makes none and counts
    all the same (TRL updates there, with advantages of 0); the critic's warm-up does not count for
    the policy (as in verl)."""
    min_lr_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Where a cosine ends, as a share of `lr` (verl's name for it)."""
    micro_batch_tokens: Annotated[int, Field(ge=1, le=1_000_000_000)] | Literal["auto"] = "auto"
    """Padded tokens of one forward and backward pass on one rank. Loss and gradient do not depend
    on it. `auto`: as many as the free memory holds, at most 16384, on a CPU 2048 (which is quicker
    there)."""

    @model_validator(mode="after")
    def _fits(self) -> OptimConfig:
        if self.min_lr_ratio and self.schedule != "cosine":
            raise ValueError(
                f"optim.min_lr_ratio={self.min_lr_ratio:g} is the end of a cosine; set"
                " optim.schedule=cosine"
            )
        return self


class CriticConfig(Settings):
    """The critic of advantage.kind=gae: a second model on the learners, with an optimizer of its
    own."""

    path: str | None = None
    """A Hub id or a local directory whose body it starts from; empty: the policy's body at the
    start of RL. Its value head starts at 0."""
    lr: float = Field(default=1e-5, gt=0, le=1)
    """The critic's largest learning rate."""
    lr_warmup_steps: int = Field(default=0, ge=0)
    """Updates of the critic over which its rate rises from 0."""
    warmup: int = Field(default=0, ge=0)
    """The first so many RL steps train the critic alone (verl's critic_warmup; VAPO: 50)."""
    clip: float | None = Field(default=0.5, gt=0)
    """A value may move this far from what it was before the step without a larger loss (verl 0.5,
    OpenRLHF 0.2); empty: free."""

    def optim(self, policy: OptimConfig) -> OptimConfig:
        """The policy's optimizer with the critic's learning rate."""
        return policy.model_copy(update={"lr": self.lr, "warmup_steps": self.lr_warmup_steps})


class CheckpointConfig(Settings):
    """Checkpoints, from which a stopped run resumes."""

    every: int = Field(default=50, ge=0)
    """RL steps between checkpoints; 0: only at the end of a stage and on Ctrl-C."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that stay on disk."""
    keep_best: int = Field(default=0, ge=0)
    """Of the others, those of the highest held-out accuracy that stay as well."""
    max_failures: int = Field(default=3, ge=1)
    """Checkpoints in a row that cannot be written, for want of disk for example, before the run
    ends; of fewer a line and an alert say so."""
    history: bool = False
    """Keep every version of the weights as a patch in the run's `history`; `emberl patches apply`
    makes a model of any."""


class TrackingConfig(Settings):
    """Trackers and records besides the console, `metrics.jsonl` and the learning curve."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online with a key, else offline; never asks for a login."""
    project: str = "emberl"
    """The project of W&B and of the other trackers."""
    group: str | None = None
    """Of W&B: runs that belong together; the stages of a recipe have the recipe's name there."""
    tags: tuple[str, ...] = ()
    """Of W&B."""
    notes: str | None = None
    """Of W&B: a longer text about the run."""
    job_type: str | None = None
    """Of W&B: `train`, `ablation`, ..."""
    also: tuple[Literal["tensorboard", "swanlab", "mlflow"], ...] = ()
    """Further trackers, whose packages you install."""
    samples: int = Field(default=8, ge=0)
    """Sampled answers kept at each evaluation, and of each step."""
    rollouts: Literal["some", "all", "none"] = "some"
    """Which answers are kept in full under the run's `rollouts`, with parts, scores and versions,
    as JSON lines that `emberl audit` reads: of each step `samples` of them, or every one."""
    spans: bool = True
    """Writes who was busy when to `spans.jsonl`, for `emberl report`: a few dozen lines a step."""
    system_every: float = Field(default=15.0, ge=0, le=LONGEST)
    """Seconds between two looks at the load of the run's machines; 0: none."""
    warn_after: int = Field(default=5, ge=0)
    """Steps in a row without a sign of learning (no update, equal rewards, answers all cut off,
    ...) after which one line says so, on the console and as an alert of W&B; 0: never."""
    entropy_floor: float = Field(default=0.05, ge=0, lt=1)
    """Share of the entropy of the first step below which a policy that does not solve its problems
    is said to have collapsed. arXiv 2505.22617 saw 76 % of the gain come with the first 73 % of
    the entropy that was lost, and little after it; 0: never said."""


class ProfileConfig(Settings):
    """Profiling of single steps."""

    steps: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """RL steps of which torch's profiler writes a trace of every learner and rollout worker, under
    the run's `profile`, with a timeline of the whole run (Perfetto loads them). vLLM's own
    processes are not in them."""


class ClusterConfig(Settings):
    """Placement: devices, learners, rollout workers, and the Ray cluster that holds them."""

    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """What everything runs on; `auto`: an NPU or a CUDA device where there is one, else the CPU."""
    learners: int = Field(default=1, ge=1, le=1_000_000)
    """Learner ranks, one device each (a share of the cores on a CPU)."""
    rollouts: int = Field(default=1, ge=1, le=1_000_000)
    """Rollout workers, one device each."""
    cpus_per_learner: float = Field(default=1.0, gt=0)
    """Cores that each learner takes of Ray's; on a CPU also its threads."""
    cpus_per_rollout: float = Field(default=1.0, gt=0)
    """The same of each rollout worker."""
    colocated: bool = False
    """For few devices: learner i and rollout worker i share device i, and the engines sleep while
    the learners work. With rollout.engine=vllm, schedule.max_staleness=0 and as many rollouts as
    learners."""
    sleep_level: Literal[1, 2] = 1
    """1: a sleeping engine keeps its weights in the machine's memory. 2: it drops them; the next
    version loads them anew."""
    address: str | None = None
    """A Ray cluster to join, as HOST:6379; `auto`: one that runs here, else a new one; empty: the
    one `RAY_ADDRESS` names (as in a Ray job), else a new one on this machine."""
    start_timeout: float = Field(default=300.0, gt=0, le=LONGEST)
    """Seconds for the placement to be granted and all actors to be up."""
    join_timeout: float = Field(default=60.0, ge=0, le=LONGEST)
    """Seconds that a cluster which is joined is given to have what the placement needs, for nodes
    that are about to register and for an autoscaler that brings them; then it is an error."""
    max_restarts: int = Field(default=3, ge=0)
    """How often in a row, without a new checkpoint between, the run goes on from the last one when
    learners are lost: with new ones, while the engines stay. Where no rollout worker is left, all
    actors are started anew. 0: the run ends, and --resume goes on."""
    step_timeout: float = Field(default=3600.0, gt=0, le=LONGEST)
    """Seconds for one optimizer step or one checkpoint on the learners."""
