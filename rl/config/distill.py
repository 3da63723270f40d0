"""The settings `distill`: frozen teachers whose distributions the policy learns on its own samples.
Loads no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .algorithm import MOST
from .base import MOST_TOKENS, Settings

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


class TeacherConfig(Settings):
    """A frozen model, and the prompts that are its own."""

    path: str = Field(min_length=1)
    """A Hugging Face directory or Hub id, with the vocabulary of `model`."""
    sources: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """The data sources whose prompts it teaches; empty: those that no other teacher has."""


class DistillConfig(Settings):
    """On-policy distillation: the policy samples, and teachers say how likely they find each token.
    Off-policy distillation is `stages: [sft]` on a data set of a teacher's answers."""

    teachers: Mapping[str, TeacherConfig] = Field(default_factory=dict)
    """By a name of yours; empty: no distillation."""
    loss: Literal["policy_gradient", Divergence] = "policy_gradient"
    """`policy_gradient`: the reverse KL of each sampled token, log(teacher / policy), is added to
    its advantage (slime's OPD, Thinking Machines). The others compare whole distributions at each
    sampled token (GKD): `forward_kl` is KL(teacher || policy), `reverse_kl` KL(policy || teacher),
    `jsd` the generalised Jensen-Shannon divergence."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """jsd: the teacher's share of the mixture (arXiv 2306.13649, TRL's `beta`): towards 0 it is a
    forward, towards 1 a reverse KL."""
    top_k: int = Field(default=0, ge=0, le=MOST_TOKENS)
    """Whole distributions: the teacher's likeliest tokens are compared one by one, and all others
    as a single one, which bounds memory; 0: the whole vocabulary."""
    coef: float = Field(default=1.0, gt=0, le=MOST)
    """Weight of the distillation."""
    reward_coef: float = Field(default=0.0, ge=0, le=MOST)
    """Weight of the advantages of `reward`; 0: rewards are only logged."""

    @model_validator(mode="after")
    def _teaches(self) -> DistillConfig:
        everywhere = [name for name, teacher in self.teachers.items() if not teacher.sources]
        if len(everywhere) > 1:
            raise ValueError(
                f"distill.teachers {' and '.join(everywhere)} name no sources, so both would have"
                " every prompt; give all but one of them sources"
            )
        named = Counter(s for teacher in self.teachers.values() for s in set(teacher.sources))
        if twice := [source for source, count in named.items() if count > 1]:
            raise ValueError(
                f"distill.teachers: the source {twice[0]!r} has {named[twice[0]]} teachers; leave"
                " it to one of them"
            )
        own = {name: getattr(self, name) for name in type(self).model_fields if name != "teachers"}
        if not self.teachers and own != {n: type(self).model_fields[n].default for n in own}:
            raise ValueError(
                "distill has settings but no teachers; name one, e.g."
                " distill.teachers.large.path=runs/large/model"
            )
        return self

    @property
    def active(self) -> bool:
        return bool(self.teachers)

    @property
    def on_samples(self) -> bool:
        """Whether teachers are asked about the sampled tokens alone."""
        return self.active and self.loss == "policy_gradient"

    @property
    def on_distributions(self) -> bool:
        """Whether teachers are asked about the whole vocabulary."""
        return self.active and self.loss != "policy_gradient"

    def teacher_of(self, source: str) -> int:
        """The index of the teacher of this source's prompts; -1 if there is none."""
        teachers = list(self.teachers.values())
        named = [i for i, teacher in enumerate(teachers) if source in teacher.sources]
        everywhere = [i for i, teacher in enumerate(teachers) if not teacher.sources]
        return (named or everywhere or [-1])[0]
