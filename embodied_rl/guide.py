r"""Demonstrations of what the rollout began with, mixed into its update.

An env may know a good action for a start (a worked answer, an expert's move). Beside the policy's own episodes:

    imitate      L = L_RL - coef mean_units log pi(demonstration)                                            (ReLIFT)
    importance   L = L_RL - coef mean_units r A (1 - sg pi)^focus,  r = 2 pi / (pi_old + (pi_old + 1) / 2),
                 A = best - mean return of the group                                                        (RL-PLUS)

r is the ratio to the mixture of the policy before the update and of an unknown demonstrator, whose probability is taken
to lie half-way between pi_old and 1; no clip cuts it off, and what the policy finds unlikely weighs more.

Source: Ma et al. 2025 (ReLIFT, arXiv:2506.07527); Dong et al. 2025 (RL-PLUS, arXiv:2508.00222). Differs: ReLIFT
imitates in steps of their own and asks a stronger model; here every update has both terms and the env knows the answer.
The advantage of a demonstration has no divisor, whatever `credit.scale` is: it would be 0 in a group that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from embodied_rl.batch import Flat, cuts
from embodied_rl.metrics import Partials
from embodied_rl.section import Section
from embodied_rl.selection import unsolved
from embodied_rl.types import FEATURES, Encoding, Obs, Policy, Rollout, State


class Guide(Section):
    """How demonstrations of the env are learned from."""

    kind: Literal["none", "imitate", "importance"] = "none"
    """imitate: their likelihood (ReLIFT); importance: their gradient by multiple importance sampling (RL-PLUS)."""
    coef: float = Field(1.0, gt=0)
    """Weight beside the method's own loss."""
    starts: Literal["unsolved", "all"] = "unsolved"
    """Which starts are demonstrated: those in whose group nobody succeeded, or all."""
    best: float = 1.0
    """importance: return that a demonstration is taken to earn."""
    focus: float = Field(0.5, ge=0)
    """importance: exponent of (1 - pi); larger looks more at units that the policy finds unlikely, 0 at all alike."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> Guide:
        used = {"none": (), "imitate": ("coef", "starts"), "importance": ("coef", "starts", "best", "focus")}[self.kind]
        for name in ("coef", "starts", "best", "focus"):
            if name not in used and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} ({getattr(self, name)}) does nothing with kind ({self.kind}): remove it")
        return self


@dataclass
class Shown:
    """Demonstrations of one rollout: N rows."""

    obs: Obs
    units: Tensor
    """[N, A, ...]"""
    mask: Tensor
    """[N, A] bool"""
    advantage: Tensor
    """[N]"""
    logp: Tensor
    """[N, A] of the policy before the update."""


class Guided:
    """The demonstrations' part of an update; it remembers nothing from rollout to rollout."""

    def __init__(self, config: Guide, policy: Policy, *, size: int | None, units: int | None) -> None:
        """Nothing is shown yet.

        Args:
            config: The recipe's.
            policy: Knows which units an action is made of.
            size: Rows of one backward pass; None for all.
            units: The same as units that count.
        """
        self.config, self.encoding, self.size, self.units = config, cast(Encoding, policy), size, units
        self.shown: Shown | None = None

    def begin(self, rollout: Rollout, logp: Callable[[Flat], Tensor], version: int) -> Partials:
        """Pick the demonstrations of a rollout, one per group.

        Args:
            rollout: With `demonstration`.
            logp: Log-probabilities [N, A] of rows by the policy before the update.
            version: Not read.
        """
        assert rollout.demonstration is not None and rollout.demonstrated is not None
        metrics = Partials()
        group, valid = rollout.group[0], rollout.valid
        counts = rollout.demonstrated[0] & valid[0]
        if self.config.starts == "unsolved":
            counts = counts & unsolved(rollout)
        chosen = _first_of_each(group, counts)
        metrics.last("rollout/demonstrated_starts", len(chosen))
        self.shown = None
        if not len(chosen):
            return metrics
        units, mask = self.encoding.encode(rollout.demonstration[0, chosen].unsqueeze(1))
        if rollout.features is not None:
            obs = {FEATURES: rollout.features[0, chosen]}
        else:
            obs = {k: v[0, chosen] for k, v in rollout.obs.items()}
            obs |= {k: v[rollout.episode[0, chosen]] for k, v in rollout.constants.items()}
        rows = {"units": units, "logp": torch.zeros(mask.shape, device=mask.device), "mask": mask}
        old = logp(Flat(obs, {}, torch.arange(len(chosen), device=mask.device), rows))
        self.shown = Shown(obs, units, mask, self._advantage(rollout, chosen), old)
        return metrics

    def _advantage(self, rollout: Rollout, chosen: Tensor) -> Tensor:
        """Best - mean return of the group's own valid episodes, never negative."""
        group, member = rollout.group[0], rollout.valid[0]
        score = torch.where(rollout.valid, rollout.reward, torch.zeros_like(rollout.reward)).sum(0)
        same = (group[chosen].unsqueeze(1) == group.unsqueeze(0)) & member
        mean = (same * score).sum(1) / same.sum(1)
        return (self.config.best - mean).clamp(min=0)

    def losses(self, policy: Policy, shuffle: torch.Generator) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """The weighted loss, in pieces that fit into memory; see the module docstring.

        Args:
            policy: Learns.
            shuffle: Not read: all demonstrations are in every optimizer step.

        Yields:
            loss: Scalar with gradients, of one piece.
            metrics: name -> (sum, count).
        """
        s = self.shown
        if s is None:
            return
        total = float(s.mask.sum())
        borders = cuts(s.mask, len(s.mask), s.mask.shape[1], self.size, self.units)
        for a, b in zip(borders[:-1], borders[1:], strict=True):
            now = policy.evaluate({k: v[a:b] for k, v in s.obs.items()}, s.units[a:b], entropy=False).logp
            gain = now if self.config.kind == "imitate" else self._gain(now, s.logp[a:b], s.advantage[a:b])
            value = -self.config.coef * torch.where(s.mask[a:b], gain, torch.zeros_like(gain)).sum() / total
            told = torch.where(s.mask[a:b], now.detach(), torch.zeros_like(now)).sum()
            yield value, {"actor/demonstration_logp": (told, float(s.mask[a:b].sum()))}

    def _gain(self, now: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        """[n, A] r A (1 - sg pi)^focus."""
        p, q = now.exp(), old.exp()
        ratio = 2 * p / (q + 0.5 * (q + 1))
        return ratio * advantage.unsqueeze(-1) * (1 - p.detach()).clamp(min=0) ** self.config.focus

    def end(self, rollout: Rollout) -> None:
        """Let the demonstrations go."""
        self.shown = None

    def state_dict(self) -> State:
        """Nothing."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Nothing."""


def _first_of_each(group: Tensor, counts: Tensor) -> Tensor:
    """Index of the first copy that counts of each group that has one."""
    index = counts.nonzero().squeeze(-1)
    seen: dict[int, int] = {}
    for i, g in zip(index.tolist(), group[index].tolist(), strict=True):
        seen.setdefault(g, i)
    return torch.tensor(list(seen.values()), dtype=torch.int64, device=group.device)
