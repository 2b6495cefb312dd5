"""The mlp policy with a sampler that lies a little about its log-probabilities."""

from __future__ import annotations

from dataclasses import replace

import torch

from embodied_rl import registry
from embodied_rl.types import EnvSpec, Obs, PolicyOutput

mlp = registry.load("policy", "mlp")


class Config(mlp.Config):
    """Settings."""

    type: str = "tests/toys/tilted.py"
    tilt: float = 0.2
    """Largest error of a unit's log-probability."""


class Tilted(mlp.MlpPolicy):
    """`act` reports logp + tilt sin(units + 2 logp)."""

    def act(self, obs: Obs, *, generator: torch.Generator | None, greedy: bool = False) -> PolicyOutput:
        out = super().act(obs, generator=generator, greedy=greedy)
        return replace(out, logp=out.logp + self.config.tilt * torch.sin(out.units + 2 * out.logp))


def build(config: Config, *, env: EnvSpec, device: torch.device) -> Tilted:
    return Tilted(env, config).to(device)
