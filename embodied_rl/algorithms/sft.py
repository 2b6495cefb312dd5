"""Supervised fine-tuning: imitate demonstrations, with the loss that belongs to the policy.

Tokens are learned by cross-entropy, flow policies by flow matching, diffusion policies by noise prediction; which of
them is the policy's own business (`imitation_loss`). Frames beyond the end of a demonstration count for nothing.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from embodied_rl.section import Section


class Config(Section):
    """Settings of supervised fine-tuning."""

    type: Literal["sft"] = "sft"
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

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Config:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be below steps ({self.steps})")
        return self
