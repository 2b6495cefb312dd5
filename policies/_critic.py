"""The critic of vision-language-action policies: from the trunk's summary, or from what only a simulator knows.

Source: a critic that sees the state of the simulator while the actor sees pictures, Pinto et al. 2017 (asymmetric
actor critic, arXiv:1710.06542).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from embodied_rl.errors import CapabilityError
from embodied_rl.section import Section
from embodied_rl.types import EnvSpec, Obs


class ValueHead(Section):
    """The critic, which reads the prefix: never noise or sampled actions."""

    kind: Literal["scalar", "hl_gauss", "none"] = "scalar"
    """scalar: one number; hl_gauss: a distribution over return bins (needs loss.value.kind hl_gauss); none."""
    hidden: int = Field(128, ge=1)
    """Width of its hidden layer."""
    reads: Literal["prefix", "privileged"] = "prefix"
    """prefix: what the trunk makes of the observation; privileged: only those entries that the env marks so, such as
    the simulator's state, through a network of its own (an asymmetric critic). It is needed while training only."""
    detach: bool = False
    """Let no gradient of the value loss into the trunk: it then cannot disturb what was imitated, nor teach it."""
    insight: float = Field(0.0, ge=0)
    """Weight, while reinforcing, of a second loss of the actor's eye: predict what the critic is told from pictures and
    words. Every decision then shows it which object was meant, also where the episode failed. 0 leaves it out."""
    bins: int = Field(51, ge=3)
    """Bins of hl_gauss."""
    low: float = -0.1
    """Lower edge of the first bin, in (scaled) return units."""
    high: float = 1.1
    """Upper edge of the last bin."""

    @model_validator(mode="after")
    def _ordered(self) -> ValueHead:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self

    @model_validator(mode="after")
    def _nothing_idle(self) -> ValueHead:
        anything, bins = ("scalar", "hl_gauss"), ("hl_gauss",)
        used = {"hidden": anything, "reads": anything, "detach": anything, "bins": bins, "low": bins, "high": bins}
        for name, kinds in used.items():
            value = getattr(self, name)
            if self.kind not in kinds and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} ({value}) does nothing with kind ({self.kind}): remove it, or set kind: {kinds[0]}"
                )
        if self.insight and self.reads != "privileged":
            raise ValueError(
                f"insight ({self.insight:g}) predicts what only a simulator knows, and reads is {self.reads}: set "
                "reads: privileged, or remove it"
            )
        if self.detach and self.reads == "privileged":
            raise ValueError(
                "detach (true) does nothing with reads (privileged), which shares nothing with the trunk: remove it"
            )
        return self


class Critic(nn.Module):
    """Value of an observation, as a number or as the mean of a distribution over bins."""

    support: Tensor

    def __init__(self, env: EnvSpec, width: int, config: ValueHead, sight: int = 0) -> None:
        """One hidden layer on the summary, two on privileged entries.

        Args:
            env: Says which entries are privileged.
            width: Of the summary.
            sight: Numbers that `insight` predicts from.
            config: The recipe's section.

        Raises:
            CapabilityError: It is to read privileged entries and the env has none that are vectors.
        """
        super().__init__()
        self.detach = config.detach
        self.range = (config.low, config.high) if config.kind == "hl_gauss" else None
        bins = config.bins if self.range else 1
        self.entries: list[str] = []
        size = 0
        if config.reads == "privileged":
            told = {k: v for k, v in env.observation.items() if v.privileged and v.dtype.is_floating_point}
            if not told:
                raise CapabilityError(
                    "policy.critic.reads (privileged): this env shows nothing that only a simulator knows; for the "
                    "tabletop set env.privileged=true, or set policy.critic.reads=prefix"
                )
            self.entries = list(told)
            size = sum(v.shape[0] for v in told.values())
            self.enter = nn.Sequential(nn.Linear(size, config.hidden), nn.ELU())
            width = config.hidden
        self.hidden, self.head = nn.Linear(width, config.hidden), nn.Linear(config.hidden, bins)
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)
        if config.insight and not sight:
            raise CapabilityError(
                f"policy.critic.insight ({config.insight:g}) teaches the eye of tiny_vla_tokens and tiny_vla_flow, and "
                "this policy has none that could be taught so: remove it"
            )
        self.insight = Insight(sight, size, config) if config.insight else None
        step = (config.high - config.low) / bins
        self.register_buffer("support", config.low + step * (torch.arange(bins) + 0.5), persistent=False)

    def told(self, obs: Obs) -> Tensor:
        """[N, D] the privileged entries, one after the other."""
        return torch.cat([obs[name] for name in self.entries], dim=1)

    def blind(self, obs: Obs) -> bool:
        """Whether what it reads is missing, as it is outside of simulation."""
        return any(name not in obs for name in self.entries)

    def forward(self, summary: Tensor | None, obs: Obs) -> tuple[Tensor, Tensor | None]:
        """[N, width] or the privileged entries of obs to values [N] and, of a classifying critic, logits [N, bins]."""
        if self.entries:
            x = self.enter(self.told(obs))
        else:
            assert summary is not None
            x = summary.detach() if self.detach else summary
        raw = self.head(F.gelu(self.hidden(x)))
        if self.range is None:
            return raw.squeeze(-1), None
        return torch.softmax(raw, dim=-1) @ self.support, raw


class Insight(nn.Module):
    """Predict what only a simulator knows from what the actor sees; nothing reads the prediction."""

    def __init__(self, sight: int, size: int, config: ValueHead) -> None:
        """One hidden layer, from `sight` numbers to the `size` numbers that the critic is told."""
        super().__init__()
        self.weight = config.insight
        self.hidden, self.head = nn.Linear(sight, config.hidden), nn.Linear(config.hidden, size)

    def forward(self, sight: Tensor, told: Tensor) -> Tensor:
        """[N] weight times the mean Huber loss over the numbers told [N, size], with gradients into `sight`."""
        guess = self.head(F.gelu(self.hidden(sight)))
        return self.weight * F.huber_loss(guess, told, reduction="none").mean(1)
