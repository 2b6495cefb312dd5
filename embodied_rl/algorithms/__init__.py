"""One file per method: a `Config` that chooses its defaults over the shared blocks.

A method is three sections: `credit` (embodied_rl/advantage.py), `loss` (embodied_rl/loss.py) and `update`
(embodied_rl/update.py). A new one usually needs no code, only other defaults: subclass `AlgorithmConfig` in one file,
here or in a file of your own.
"""

from __future__ import annotations

from pydantic import model_validator

from embodied_rl.advantage import Credit
from embodied_rl.loss import Loss
from embodied_rl.section import Section
from embodied_rl.update import Update


class AlgorithmConfig(Section):
    """What every method is made of."""

    type: str
    credit: Credit = Credit()
    loss: Loss = Loss()
    update: Update = Update()

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
