"""GRPO: no critic; each episode is compared with the others that started from the same state.

A_i = (R_i - mean of the group) / max(std of the group, floor), the same for all units of the episode;
clipped ratio per unit; every trajectory weighs the same.

Family, by switches: Dr.GRPO (credit.scale none, loss.aggregate constant), RLOO (credit.baseline leave_one_out,
credit.scale none, loss.trust none), DAPO's clip (loss.clip_high 0.28, loss.aggregate unit_mean), GSPO (loss.ratio
trajectory, loss.reduce mean, clip 3e-4 / 4e-4), Lite PPO (credit.scale batch_std, loss.aggregate unit_mean),
PSR / NSR (credit.negative_weight / positive_weight 0).

Source: Shao et al. 2024, section 4.1 (arXiv:2402.03300). Differs: the divisor has a floor, and groups whose returns
are all equal give exactly 0.
"""

from __future__ import annotations

from typing import Literal

from embodied_rl.algorithms import AlgorithmConfig
from embodied_rl.credit import Credit
from embodied_rl.loss import Loss
from embodied_rl.value_loss import ValueLoss


class Config(AlgorithmConfig):
    """Defaults of GRPO."""

    type: Literal["grpo"] = "grpo"
    credit: Credit = Credit(gamma=1.0, returns="trajectory", baseline="group_mean", scale="group_std")
    loss: Loss = Loss(ratio="unit", aggregate="trajectory_mean", value=ValueLoss(coef=0.0))
