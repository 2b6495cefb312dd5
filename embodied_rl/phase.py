"""Optimizer steps on something else alone, after each update, with a step size and moments of their own.

Reinforcement moves by little, because what was sampled soon says nothing about where the policy then stands. What was
done well stays worth imitating, and imitation learns to see by many steps; with both in one step the smaller sets the
pace.

Source: Oh, Guo, Singh, Lee 2018 (self-imitation learning, arXiv:1806.05635, algorithm 1: M further updates per
iteration). Differs: what is learned in them is the extra's own loss, here imitation rather than a clipped advantage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from embodied_rl.extra import Extra
from embodied_rl.metrics import Partials
from embodied_rl.optimizer import FlatParameters, Optimizer
from embodied_rl.types import Policy, State


class Phases:
    """The steps of all extras that ask for some, each with an optimizer of its own."""

    def __init__(
        self, extras: Sequence[Extra], parameters: FlatParameters, *, eps: float, max_grad_norm: float
    ) -> None:
        """Begin with moments of zero.

        Args:
            extras: What is learned; their `steps` and `lr` say how.
            parameters: The policy's, shared with the optimizer of the update.
            eps: Adam's.
            max_grad_norm: Gradients longer than this are shortened to it.
        """
        self.parameters, self.max_grad_norm = parameters, max_grad_norm
        self.made = [(x, Optimizer(parameters, eps=eps, weight_decay=0.0)) for x in extras if x.steps]

    def run(self, policy: Policy, shuffle: torch.Generator, *, scale: float, muon: float) -> Partials:
        """Make the steps; what no gradient reaches (the critic) stays where it is.

        Args:
            policy: Whose parameters these are.
            shuffle: Draws what each step learns from.
            scale: Of the step size, by the schedule of the update.
            muon: Muon's step size in units of Adam's.

        Returns:
            metrics: The mean loss; steps that are not finite are left out and counted.
        """
        metrics, grad = Partials(), self.parameters.grad
        for extra, optimizer in self.made:
            for _ in range(extra.steps):
                grad.zero_()
                total = 0.0
                for loss, _told in extra.losses(policy, shuffle):
                    loss.backward()
                    total += float(loss.detach())
                norm = float(torch.linalg.vector_norm(grad))
                if not norm:
                    break  # there is nothing to learn from yet
                if not math.isfinite(norm):
                    metrics.add("actor/skipped_updates", 1.0, 0.0)
                    continue
                if norm > self.max_grad_norm:
                    grad.mul_(self.max_grad_norm / norm)
                optimizer.step(scale * extra.lr, muon_lr=scale * extra.lr * muon)
                metrics.add("actor/phase_loss", total, 1.0)
        return metrics

    def state_dict(self) -> State:
        """The moments."""
        return {str(i): dict(optimizer.moments) for i, (_, optimizer) in enumerate(self.made)}

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict`."""
        for i, (_, optimizer) in enumerate(self.made):
            for name, x in optimizer.moments.items():
                x.copy_(state[str(i)][name])
