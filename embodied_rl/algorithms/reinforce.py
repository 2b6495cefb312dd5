"""REINFORCE: the plain policy gradient, one step per rollout, with a choice of baseline.

L = -(G_t - b) log pi(a_t | s_t), G_t the discounted return from t on. The ratio is 1 at the only step, so the
importance-weighted objective r A has exactly this gradient.

Family, by switches: credit.baseline none | batch_mean | group_mean | leave_one_out, credit.whiten (REINFORCE++).

Source: Williams 1992; whitening as in Hu et al. 2025 (REINFORCE++, arXiv:2501.03262).
"""

from __future__ import annotations

from typing import Literal

from embodied_rl.algorithms import AlgorithmConfig
from embodied_rl.credit import Credit
from embodied_rl.loss import Loss
from embodied_rl.update import Update
from embodied_rl.value_loss import ValueLoss


class Config(AlgorithmConfig):
    """Defaults of REINFORCE."""

    type: Literal["reinforce"] = "reinforce"
    credit: Credit = Credit(returns="return_to_go", baseline="batch_mean", whiten=True)
    loss: Loss = Loss(trust="none", value=ValueLoss(coef=0.0))
    update: Update = Update(epochs=1, minibatches=1)
