"""Supervised fine-tuning: imitate demonstrations, with the loss that belongs to the policy.

Tokens are learned by cross-entropy, flow policies by flow matching, diffusion policies by noise prediction; which of
them is the policy's own business (`imitation_loss`). Frames beyond the end of a demonstration count for nothing.
"""

from __future__ import annotations

from typing import Literal

from embodied_rl.algorithms import ImitationConfig


class Config(ImitationConfig):
    """Settings of supervised fine-tuning."""

    type: Literal["sft"] = "sft"
