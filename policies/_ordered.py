"""Distributions over ordered classes, such as the bins of a number: targets, the median, the middle of some draws."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_classes(place: Tensor, bins: int, std: float) -> Tensor:
    """Mass of a Gaussian in each bin; what lies beyond the edges belongs to the outermost bins.

    p_k = Phi((k + 1 - x) / std) - Phi((k - x) / std), with edges 0 and K at minus and plus infinity

    Args:
        place: [N] x in [0, K], in bins.
        bins: K.
        std: In bins.

    Returns:
        target: [N, K], rows sum to 1.

    Source: Imani & White 2018 (HL-Gaussian, arXiv:1806.04613), there for returns.
    """
    edges = (torch.arange(1, bins, device=place.device) - place.unsqueeze(-1)) / std
    inside = torch.special.ndtr(edges)
    return F.pad(inside, (0, 1), value=1.0) - F.pad(inside, (1, 0), value=0.0)


def median_class(logits: Tensor) -> Tensor:
    """First class with which at least half of the mass is reached: logits [..., K] -> [...] int64."""
    mass = torch.softmax(logits, dim=-1).cumsum(-1)
    return (mass < 0.5).sum(-1)


class MiddleDraw:
    """The middle one of n independent draws from a distribution over K ordered classes, n = 2a - 1.

    With F_k the mass up to class k, the middle draw is at most k with probability I(F_k), the regularised incomplete
    beta function of (a, a), so that

        q_k = I(F_k) - I(F_{k-1}) = p_k * integral over t in [0, 1] of beta(F_{k-1} + t p_k; a, a)

    n = 1 is the distribution itself; the larger n is, the nearer q is to its median, and high peaks beside the rest
    lose their mass. The integrand is a polynomial of degree n - 1, for which a Gauss-Legendre nodes are exact, and all
    terms are positive: nothing cancels.

    Example: p = [0.5, 0.25, 0.25], n = 3: F = [0.5, 0.75, 1], I(F) = 3 F^2 - 2 F^3 = [0.5, 0.84375, 1],
    q = [0.5, 0.34375, 0.15625].

    Source: the distribution of an order statistic (David & Nagaraja 2003, Order Statistics, 2.1).
    """

    def __init__(self, draws: int) -> None:
        """Prepare for n = `draws`, odd."""
        assert draws % 2 == 1, draws
        self.draws, self.power = draws, (draws - 1) // 2
        node, weight = np.polynomial.legendre.leggauss(self.power + 1)
        scale = math.lgamma(draws + 1) - 2 * math.lgamma(self.power + 1)
        self._nodes = torch.from_numpy((node + 1) / 2)
        self._weights = torch.from_numpy(np.log(weight / 2) + scale)

    def sample(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Classes [...] of logits [..., K]: the class of the middle one of n uniform numbers."""
        mass = torch.softmax(logits, dim=-1).cumsum(-1)
        u = torch.rand((*logits.shape[:-1], self.draws), generator=generator, device=logits.device).median(-1).values
        return (mass < u.unsqueeze(-1)).sum(-1).clamp_max_(logits.shape[-1] - 1)

    def log_prob(self, log_probs: Tensor, chosen: Tensor) -> Tensor:
        """Return log q of some classes.

        Args:
            log_probs: [..., K] of single draws.
            chosen: [...] int64.

        Returns:
            log_prob: [...]
        """
        at = chosen.unsqueeze(-1)
        picked = log_probs.gather(-1, at)
        if not self.power:
            return picked.squeeze(-1)
        p, tiny = picked.exp(), torch.finfo(picked.dtype).tiny
        upto = log_probs.exp().cumsum(-1)
        below = (upto.gather(-1, at) - p).clamp_min(0)
        above = (upto[..., -1:] - upto.gather(-1, at)).clamp_min(0)
        nodes, weights = self._nodes.to(p), self._weights.to(p)
        under, over = below + p * nodes, above + p * (1 - nodes)
        density = weights + self.power * (under * over).clamp_min(tiny).log()
        return picked.squeeze(-1) + density.logsumexp(-1)

    def entropy(self, log_probs: Tensor) -> Tensor:
        """Entropy [...] of q in nats, from log_probs [..., K] of single draws."""
        if not self.power:
            return -(log_probs.exp() * log_probs).sum(-1)
        # I(F) = sum over j >= a of C(n, j) F^j (1 - F)^(n - j)
        f = log_probs.exp().cumsum(-1).clamp(0, 1)
        n, upto = self.draws, torch.zeros_like(f)
        for j in range(self.power + 1, n + 1):
            upto = upto + math.comb(n, j) * f**j * (1 - f) ** (n - j)
        q = torch.diff(upto, dim=-1, prepend=torch.zeros_like(f[..., :1])).clamp_min(torch.finfo(f.dtype).tiny)
        return -(q * q.log()).sum(-1)
