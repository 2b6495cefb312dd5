"""PPO: clipped ratios, GAE from a critic, several epochs over each rollout.

L = -min(r A, clip(r, 1 - e, 1 + e) A) + c_v (v - y)^2 - c_h H,  r = pi(a|s) / pi_old(a|s), A = whitened GAE.

Source: Schulman et al. 2017 (arXiv:1707.06347). Differs: advantages are whitened over the rollout, not the minibatch,
so that the gradient does not depend on how the rollout is split; time limits bootstrap from the true last state.
"""

from __future__ import annotations

from typing import Literal

from embodied_rl.algorithms import AlgorithmConfig
from embodied_rl.credit import Credit


class Config(AlgorithmConfig):
    """Defaults of PPO."""

    type: Literal["ppo"] = "ppo"
    credit: Credit = Credit(returns="gae", baseline="critic", whiten=True)
