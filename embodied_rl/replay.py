r"""Good episodes of earlier rollouts, learned from again beside the policy gradient.

    L = L_RL + coef(u) * the recipe's surrogate over replayed decisions, A = max(R - quantile of recent returns, 0)

The baseline is of now and not of then: an episode that was good once and is usual by now has no advantage left. The
coefficient rises over the first updates u, before which a lucky episode would decide too much:

    coef(u) = coef (1 - cos(pi min(1, u / ramp))) / 2

Source: Oh et al. 2018 (self-imitation learning, arXiv:1806.05635); Qin et al. 2025 (SPEAR, arXiv:2509.22601), whose
median baseline and ramp these are. Differs: their clipping by covariance and their rewards for tool calls are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from embodied_rl.batch import Flat, flatten
from embodied_rl.cells import by_cell, weighted_sum
from embodied_rl.loss import MAX_LOG_RATIO, LossFunction, surrogate
from embodied_rl.metrics import Partials
from embodied_rl.section import Section
from embodied_rl.types import Advantage, Policy, Rollout, State


class Replay(Section):
    """How good episodes are replayed."""

    coef: float = Field(0.0, ge=0)
    """Weight of the loss of replayed decisions, beside that of the rollout; 0 replays nothing."""
    episodes: int = Field(256, ge=1)
    """Good episodes that are kept; the oldest leave."""
    rows: int = Field(64, ge=1)
    """Replayed decisions in each optimizer step, drawn with replacement."""
    quantile: float = Field(0.5, ge=0, le=1)
    """Of the recent returns: an episode above it is good."""
    recent: int = Field(1024, ge=1)
    """Latest episodes whose returns are the recent ones."""
    ramp: int = Field(200, ge=0)
    """Updates in which the weight rises from 0 to coef."""


class ReplayBuffer:
    """See the module docstring; part of a checkpoint."""

    def __init__(self, config: Replay, loss: LossFunction) -> None:
        """Start empty.

        Args:
            config: The recipe's.
            loss: Whose ratio, trust region and aggregation hold here as well.
        """
        self.config, self.loss = config, loss
        self.returns = torch.zeros(0)
        """[n] latest returns, the newest last."""
        self.data: dict[str, dict[str, Tensor]] = {}
        """"obs" and "rows" -> name -> [N, ...]; empty before the first good episode."""
        self.scale = 0.0
        self._drawable = torch.zeros(0, dtype=torch.int64)

    @property
    def baseline(self) -> float:
        """Quantile of the recent returns; infinite before there are any."""
        return float(self.returns.quantile(self.config.quantile)) if len(self.returns) else math.inf

    def begin(self, rollout: Rollout, logp: Callable[[Flat], Tensor], version: int) -> Partials:
        """Take the coefficient of update number `version`, counted from 0; `logp` is not needed."""
        c, metrics = self.config, Partials()
        self.scale = c.coef * ((1 - math.cos(math.pi * min(1.0, version / c.ramp))) / 2 if c.ramp else 1.0)
        self._drawable = self._good()
        metrics.last("rollout/replayed_decisions", len(self._drawable))
        return metrics

    def _good(self) -> Tensor:
        """Rows whose return is above the baseline."""
        if not self.data:
            return torch.zeros(0, dtype=torch.int64)
        return (self.data["rows"]["return"] > self.baseline).nonzero().squeeze(-1)

    def losses(self, policy: Policy, shuffle: torch.Generator) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """The weighted loss of some good decisions; nothing while there are none.

        Args:
            policy: Learns.
            shuffle: CPU generator of the draw.

        Yields:
            loss: Scalar with gradients.
            metrics: name -> (sum, count).
        """
        if not len(self._drawable) or not self.scale:
            return
        draw = torch.randint(len(self._drawable), (self.config.rows,), generator=shuffle)
        i = self._drawable[draw.to(self._drawable.device)]
        obs, rows = ({k: v[i] for k, v in self.data[n].items()} for n in ("obs", "rows"))
        c, mask = self.loss.config, rows["mask"]
        # Each draw is a trajectory of its own: whoever is drawn twice counts twice.
        trajectory = torch.arange(len(i), device=i.device)
        args = (mask, c.ratio, c.reduce, self.loss.chunk, trajectory)
        now = policy.evaluate(obs, rows["units"], entropy=False).logp
        ratio = by_cell(now - rows["logp"], *args).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        objective, clipped = surrogate(ratio, (rows["return"] - self.baseline).unsqueeze(-1), c)
        weight = self.loss.weights(mask, trajectory, now.shape[1])
        value = -self.scale * weighted_sum(objective, weight)
        share = weight.sum()
        yield value, {
            "actor/replay_loss": (value.detach(), 1.0),
            "actor/replay_clip_fraction": (weighted_sum(clipped.to(weight.dtype), weight), share),
        }

    def end(self, rollout: Rollout) -> None:
        """Keep the good episodes of a rollout that has been learned from.

        Args:
            rollout: One episode per copy.
        """
        counts = rollout.valid if rollout.greedy is None else rollout.valid & ~rollout.greedy
        score = torch.where(counts, rollout.reward, torch.zeros_like(rollout.reward)).sum(0)
        played = counts[0]
        self.returns = torch.cat([self.returns.to(score), score[played]])[-self.config.recent :]
        good = counts & (played & (score > self.baseline))
        if not bool(good.any()):
            return
        flat = flatten(rollout, Advantage(score.expand_as(rollout.reward), counts=good), actions=self.loss.actions)
        self._keep(flat)

    def _keep(self, flat: Flat) -> None:
        rows = {k: flat.rows[k] for k in ("units", "logp")}
        rows["mask"] = flat.rows.get("mask", torch.ones_like(flat.rows["logp"], dtype=torch.bool))
        rows["return"] = flat.rows["advantage"]
        first = int(self.data["rows"]["episode"].max()) + 1 if self.data else 0
        rows["episode"] = first + torch.unique(flat.episode, return_inverse=True)[1]
        new = {"obs": flat.full_obs(), "rows": rows}
        if self.data:
            new = {n: {k: torch.cat([self.data[n][k], v]) for k, v in x.items()} for n, x in new.items()}
        stays = new["rows"]["episode"] > int(new["rows"]["episode"].max()) - self.config.episodes
        self.data = {n: {k: v[stays].clone() for k, v in x.items()} for n, x in new.items()}

    def state_dict(self) -> State:
        """Recent returns and kept episodes."""
        return {"returns": self.returns, "data": {n: dict(x) for n, x in self.data.items()}}

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict`."""
        self.returns, self.data = state["returns"], {n: dict(x) for n, x in state["data"].items()}
