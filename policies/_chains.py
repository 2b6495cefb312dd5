r"""Denoising chains as Gaussian policies: how a sample goes from noise to an action, and how likely each step was.

Time runs from 1 (noise) to 0 (action) in K equal steps of d = 1/K. A chain is a small Markov decision process of its
own (Black et al. 2023, arXiv:2305.13301): step k moves x_k to x_{k+1} ~ N(mean_k, std_k^2), so the probability of a
whole chain is a product of Gaussians, whatever the network is.

    flow, training pair      x_t = (1 - t) a + t e,  the network learns v = e - a
    flow, ODE step           x - v d
    flow, SDE step           (x - v t)(1 - t + d) + (x + v (1 - t))(t - d - s^2 d / (2 t)),  std = s sqrt(d)
                             with s = noise sqrt(t / (1 - t)), at t = 1 with t - d in the denominator
                             (marginals are kept up to the first step, whose std does not shrink with d: its variance
                             is 1 + noise^4 / 4, and the steps after it forget that)
    flow, learned noise      the ODE step as mean, the network's own standard deviation
    diffusion, training pair x_t = alpha a + sigma e, alpha = cos(pi t / 2), sigma = sin(pi t / 2), it learns e
    diffusion, step to t'    alpha' a^ + sqrt(sigma'^2 - std^2) e^
                             with std = noise (sigma' / sigma) sqrt(1 - (alpha / alpha')^2)
                             noise 0 is DDIM, noise 1 is DDPM on these K steps

Source: Flow-SDE and Flow-Noise, Chen et al. 2025 (pi_RL, arXiv:2510.25889), after Liu et al. 2025 (Flow-GRPO,
arXiv:2505.05470) and Zhang et al. 2025 (ReinFlow, arXiv:2505.22094); diffusion steps, Song et al. 2021 (DDIM,
arXiv:2010.02502, eq. 12 and 16) and Ren et al. 2024 (DPPO, arXiv:2409.00588). Differs: diffusion starts at t = 0.98,
where alpha is not 0. Of DPPO there is no discount of the advantage over denoising steps, no clip width of their own (it
is narrower in noisier steps there), and no frozen copy for the first of them: all steps are tuned alike.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from embodied_rl.section import Section

Process = Literal["flow", "diffusion"]
LATEST = 0.98
"""Time at which a diffusion chain begins."""


class ChainConfig(Section):
    """Settings that all policies with a denoising chain have."""

    denoising_steps: int = Field(4, ge=1)
    """K; more follow the curve better and cost one pass of the action head each."""
    stochastic: Literal["all", "one", "last"] = "all"
    """sde, learned: noise in every step, in one step of each decision drawn at random, or in the last step; the others
    are deterministic. last, with start 0, makes the policy a Gaussian around what greedy evaluation does."""
    noise: float = Field(0.5, gt=0)
    """sde: strength of the noise."""
    min_std: float = Field(0.08, gt=0)
    """learned: smallest standard deviation of a step; sde: the same, which keeps the last steps from being exact."""
    max_std: float = Field(0.16, gt=0)
    """learned: the largest."""
    start: float = Field(1.0, ge=0)
    """sde, learned: standard deviation of the noise that a sampled chain starts from. 1 samples all that was imitated;
    less stays nearer to its middle, which is what greedy evaluation takes and where a policy succeeds more often."""
    units: Literal["step", "action"] = "step"
    """sde, learned: what a unit is. step: a denoising step of the whole chunk, K units; action: the part of one control
    step in it, C x K units, of which `loss.ratio: action` forms a ratio for each control step."""
    log_prob: Literal["sum", "mean"] = "sum"
    """Over the numbers of a unit, C x D with `units: step` and D with `units: action`. sum is its log-probability; mean
    divides it, so that a clip of 0.2 allows that many times as much in the true log-ratio (what pi_RL and DPPO do)."""

    def refuse_idle(self, likelihood: str, **more: tuple[str, ...]) -> None:
        """Refuse what does nothing with a likelihood.

        Args:
            likelihood: The recipe's.
            more: Further setting -> likelihoods that read it.

        Raises:
            ValueError: Says the setting, its value and what to do; or the bounds of learned noise cross.
        """
        if self.units == "action" and likelihood not in ("sde", "learned"):
            raise ValueError(
                f"units (action) takes the Gaussian of a denoising step apart, and likelihood ({likelihood}) has none: "
                "remove it, or set likelihood: sde or learned"
            )
        if likelihood == "learned" and self.min_std >= self.max_std:
            raise ValueError(f"min_std ({self.min_std}) must be below max_std ({self.max_std})")
        chain = ("sde", "learned")
        used = {"stochastic": chain, "noise": ("sde",), "max_std": ("learned",), "start": chain, "min_std": chain}
        for name, owners in (used | more).items():
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default and likelihood not in owners:
                raise ValueError(
                    f"{name} ({value}) does nothing with likelihood ({likelihood}): remove it, or set "
                    f"likelihood: {' or '.join(owners)}"
                )

    def noisy_step(
        self, rows: int, *, generator: torch.Generator | None, greedy: bool, device: torch.device
    ) -> Tensor | None:
        """The one step of each chain that has noise, [rows] int64 (with `greedy` the last); None when all have."""
        steps = self.denoising_steps
        if self.stochastic == "all" or steps == 1:
            return None
        if greedy or self.stochastic == "last":
            return torch.full((rows,), steps - 1, device=device)
        return torch.randint(steps, (rows,), generator=generator, device=device)

    def units_per_decision(self, chunk: int) -> int:
        """A, for chunks of C control steps."""
        steps = self.denoising_steps if self.stochastic == "all" else 1
        return steps * (chunk if self.units == "action" else 1)

    def by_unit(self, x: Tensor) -> Tensor:
        """Numbers of M steps [N, M, C, D] as those of units: [N, M, C D], or [N, C M, D] control step by control step.

        A step's Gaussian has independent numbers, so what it says of a control step is the sum over that one's D.
        """
        return x.flatten(2) if self.units == "step" else x.transpose(1, 2).flatten(1, 2)

    def total(self, x: Tensor) -> Tensor:
        """A quantity of each number [..., numbers] as that of their unit [...], see `log_prob`."""
        return x.sum(-1) if self.log_prob == "sum" else x.mean(-1)

    def written(self, x: Tensor, after: Tensor, k: Tensor) -> Tensor:
        """Steps of a chain as units.

        Args:
            x: [N, M, C, W] before each of M steps.
            after: [N, M, C, D] after it.
            k: [N, M] which step it is.

        Returns:
            units: [N, A, numbers]: x, after and k of each unit.
        """
        which = k.to(x.dtype)[..., None, None].expand(*x.shape[:3], 1)
        return torch.cat([self.by_unit(x), self.by_unit(after), self.by_unit(which)[..., :1]], dim=-1)

    def read(self, units: Tensor, chunk: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the x, after and k that `written` was given, for C control steps of D numbers."""
        if self.units == "action":
            parts = units.unflatten(1, (chunk, -1)).transpose(1, 2)
            return parts[..., : -size - 1], parts[..., -size - 1 : -1], parts[:, :, 0, -1].long()
        border = -chunk * size - 1
        x, after = (part.unflatten(-1, (chunk, -1)) for part in (units[..., :border], units[..., border:-1]))
        return x, after, units[..., -1].long()

    def learned_std(self, raw: Tensor) -> Tensor:
        """The network's numbers as standard deviations between min_std and max_std."""
        low, high = math.log(self.min_std), math.log(self.max_std)
        return (low + (high - low) * torch.sigmoid(raw)).exp()


class Times(NamedTuple):
    """The grid of a chain."""

    now: Tensor
    """[K] time before each step."""
    after: Tensor
    """[K] time after it; the last is 0."""


def times(process: Process, steps: int) -> Times:
    """Grid of K steps from noise to action."""
    grid = torch.linspace(1.0 if process == "flow" else LATEST, 0.0, steps + 1)
    return Times(grid[:-1], grid[1:])


def training_pair(process: Process, action: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What the network is shown and what it should answer.

    Args:
        process: Which chain.
        action: [N, ...] normalised.
        noise: [N, ...] standard normal.
        t: [N] in [0, 1].

    Returns:
        x: [N, ...] at time t.
        target: [N, ...] velocity or noise.
    """
    t = t.view(-1, *[1] * (action.ndim - 1))
    if process == "flow":
        return (1 - t) * action + t * noise, noise - action
    return torch.cos(math.pi / 2 * t) * action + torch.sin(math.pi / 2 * t) * noise, noise


def ode_step(process: Process, x: Tensor, answer: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """The deterministic step; `now` and `after` are times that broadcast against x."""
    if process == "flow":
        return x - answer * (now - after)
    return _diffusion_step(x, answer, now, after, torch.zeros_like(now))


def sde_step(
    process: Process, x: Tensor, answer: Tensor, now: Tensor, after: Tensor, noise: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the stochastic step.

    Args:
        process: Which chain.
        x: [..., C, D] before the step.
        answer: Of the network, same shape.
        now: Time before the step, broadcasts against x.
        after: Time after it.
        noise: Strength; 0 is the deterministic step.

    Returns:
        mean: Same shape as x.
        std: Broadcasts against x.
    """
    if process == "diffusion":
        ratio = torch.cos(math.pi / 2 * now) / torch.cos(math.pi / 2 * after)
        std = noise * torch.sin(math.pi / 2 * after) / torch.sin(math.pi / 2 * now) * (1 - ratio.square()).sqrt()
        return _diffusion_step(x, answer, now, after, std), std
    d = now - after
    away = torch.where(now >= 1, 1 - after, 1 - now)
    variance = noise**2 * now / away
    start, end = x - answer * now, x + answer * (1 - now)
    return start * (1 - after) + end * (after - variance * d / (2 * now)), (variance * d).sqrt()


def _diffusion_step(x: Tensor, noise: Tensor, now: Tensor, after: Tensor, std: Tensor) -> Tensor:
    alpha, sigma = torch.cos(math.pi / 2 * now), torch.sin(math.pi / 2 * now)
    action = (x - sigma * noise) / alpha
    left = (torch.sin(math.pi / 2 * after).square() - std.square()).clamp(min=0).sqrt()
    return torch.cos(math.pi / 2 * after) * action + left * noise


def gaussian_logp(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Logarithm of N(x; mean, std^2) of each number."""
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Entropy of N(., std^2) of each number."""
    return log_std + 0.5 * math.log(2 * math.pi * math.e)
