"""One file per method: a `Config` that chooses its defaults over the shared blocks.

A method is three sections: `credit` (embodied_rl/credit.py), `loss` (embodied_rl/loss.py) and `update`
(embodied_rl/update.py). A new one usually needs no code, only other defaults: subclass `AlgorithmConfig` in one file,
here or in a file of your own.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from embodied_rl.augment import Augment
from embodied_rl.credit import Credit
from embodied_rl.guide import Guide
from embodied_rl.loss import Loss
from embodied_rl.optimizer import Muon
from embodied_rl.replay import Replay
from embodied_rl.section import Section
from embodied_rl.self_imitation import SelfImitation
from embodied_rl.update import Update


class AlgorithmConfig(Section):
    """What every method is made of."""

    type: str
    credit: Credit = Credit()
    loss: Loss = Loss()
    update: Update = Update()
    self_imitation: SelfImitation = SelfImitation()
    replay: Replay = Replay()
    guide: Guide = Guide()

    @model_validator(mode="after")
    def _levels_fit(self) -> AlgorithmConfig:
        if self.credit.level == "unit" and self.loss.ratio != "unit":
            raise ValueError(
                f"credit.level (unit) gives every unit an advantage of its own and loss.ratio "
                f"({self.loss.ratio}) takes several units together: set loss.ratio: unit, or credit.level: decision"
            )
        credit = (self.credit.returns, self.credit.baseline, self.credit.whiten)
        if self.loss.objective == "outcome" and credit != ("trajectory", "none", False):
            raise ValueError(
                f"loss.objective (outcome) predicts plain returns, and credit has returns {credit[0]}, baseline "
                f"{credit[1]}, whiten {str(credit[2]).lower()}: set returns: trajectory, baseline: none, scale: none "
                "and whiten: false"
            )
        if self.loss.kl.where == "reward" and self.credit.scale in ("group_std", "group_mean"):
            raise ValueError(
                f"loss.kl.where (reward) makes the rewards of a group differ a little even when all succeed or all "
                f"fail, and credit.scale ({self.credit.scale}) would blow that up: set credit.scale: none or "
                "batch_std, or loss.kl.where: loss"
            )
        return self

    @model_validator(mode="after")
    def _replays_decisions(self) -> AlgorithmConfig:
        form = (self.loss.ratio, self.loss.objective)
        if self.replay.coef and (form[0] == "trajectory" or form[1] == "outcome"):
            raise ValueError(
                f"replay.coef ({self.replay.coef:g}) draws single decisions, and loss.ratio ({form[0]}) with "
                f"loss.objective ({form[1]}) needs whole episodes: set loss.ratio: unit, or replay.coef: 0"
            )
        for name, field in type(self.replay).model_fields.items():
            value = getattr(self.replay, name)
            if not self.replay.coef and value != field.default:
                raise ValueError(
                    f"replay.{name} ({value}) does nothing with replay.coef (0): remove it, or set coef: 1"
                )
        return self

    @model_validator(mode="after")
    def _critic_is_trained(self) -> AlgorithmConfig:
        if self.credit.needs_critic and self.loss.value.coef == 0:
            raise ValueError(
                f"credit.returns ({self.credit.returns}) reads a critic but loss.value.coef is {self.loss.value.coef}: "
                "set the coefficient above 0, or choose credit.returns: return_to_go with another baseline"
            )
        if self.update.critic_warmup and self.loss.value.coef == 0:
            raise ValueError(
                f"update.critic_warmup ({self.update.critic_warmup}) trains the critic only, and loss.value.coef is "
                f"{self.loss.value.coef}: remove the warm-up, or set the coefficient above 0"
            )
        return self


class ImitationConfig(Section):
    """What a method that learns from demonstrations is made of."""

    type: str
    demonstrations: str = Field(min_length=1)
    """Folder of the demonstrations (`embodied-rl collect` makes one; docs/demonstrations.md describes it)."""
    steps: int = Field(1000, ge=1)
    """Optimizer steps in all."""
    steps_per_update: int = Field(25, ge=1)
    """Optimizer steps between two rows of metrics, and what evaluate.every and checkpoint.every count in."""
    batch_size: int = Field(128, ge=1)
    """Frames per optimizer step."""
    action_range: Literal["quantiles", "std", "none"] = "quantiles"
    """What is mapped to [-1, 1] in each action dimension: the range between the 1 % and 99 % quantiles, the mean plus
    and minus three standard deviations, or [-1, 1] itself. Kept in the checkpoint."""
    lr: float = Field(1e-3, gt=0)
    """Adam's step size after the warm-up."""
    muon: Muon = Muon()
    """Another way to step for the weights of layers."""
    warmup: int = Field(50, ge=0)
    """Optimizer steps in which the step size rises from 0."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """cosine: down to 0 at the last step."""
    weight_decay: float = Field(1e-4, ge=0)
    """Decoupled weight decay (AdamW)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients longer than this are shortened to it."""
    adam_eps: float = Field(1e-5, gt=0)
    """Adam's epsilon."""
    augment: Augment = Augment()
    """How demonstrated pictures are varied, each time anew."""

    @model_validator(mode="after")
    def _warm_up_ends(self) -> ImitationConfig:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be below steps ({self.steps})")
        return self
