"""A small vision-language-action model that speaks actions as tokens: 256 bins for each dimension of each control step.

    parallel        one query token per control step; all its dimensions are decided at once and independently
    autoregressive  one token per dimension, each seeing those before it (with a cache, D x C short steps)

Units are tokens, A = C x D of them, ordered control step by control step. Actions are the bins' middles, mapped from
[-1, 1] to the range that the demonstrations used.

Source: 256 bins, Kim et al. 2024 (OpenVLA, arXiv:2406.09246), there spread between the 1 % and 99 % quantiles of each
dimension as here; parallel decoding, Kim et al. 2025 (OpenVLA-OFT, arXiv:2502.19645). Differs: bins are output classes
of their own instead of rare words of a language model.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from embodied_rl.errors import CapabilityError
from embodied_rl.policies._trunk import Cache, TrunkConfig, causal_mask, pad_rows, padded
from embodied_rl.policies._vla import VlaPolicy
from embodied_rl.types import EnvSpec, Evaluation, Obs, PolicyOutput


class Config(TrunkConfig):
    """Settings of the token policy."""

    type: Literal["tiny_vla_tokens"] = "tiny_vla_tokens"
    decoding: Literal["parallel", "autoregressive"] = "parallel"
    """parallel: all tokens at once, a few times faster; autoregressive: each token sees those before it."""
    bins: int = Field(256, ge=2)
    """Classes per action dimension."""
    smoothing: float = Field(0.0, ge=0)
    """Imitation: standard deviation in bins of a Gaussian around the demonstrated number, whose mass in each bin is the
    target; the likeliest bin is then near the middle of what was demonstrated, not the highest of many narrow peaks. 0:
    the one bin it falls into."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits while sampling and in every log-probability; greedy evaluation does not depend on it."""
    greedy: Literal["likeliest", "median"] = "likeliest"
    """What greedy evaluation takes of the probabilities of a dimension's bins: the likeliest bin, or the one in which
    half of the mass is reached, which a single high peak beside the others does not move."""


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


class TokenPolicy(VlaPolicy):
    """See the module docstring; follows `embodied_rl.types.Policy` and `Imitator`."""

    def __init__(self, env: EnvSpec, config: Config) -> None:
        """Build for one env; parameters are drawn from torch's global generator.

        Raises:
            CapabilityError: The env's actions are not continuous.
        """
        if env.action.kind != "continuous":
            raise CapabilityError("policy tiny_vla_tokens cuts continuous actions into bins; this env's are discrete")
        super().__init__(env, config)
        self.config, self.actions_per_decision = config, config.chunk
        self.num_units = config.chunk * self.size
        self.autoregressive = config.decoding == "autoregressive"
        width = config.width
        length = self.num_units if self.autoregressive else config.chunk
        self.query = nn.Parameter(0.1 * torch.randn(length, width))
        if self.autoregressive:
            self.bin_token = nn.Embedding(config.bins, width)
            nn.init.normal_(self.bin_token.weight, std=0.1)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.bins * (1 if self.autoregressive else self.size))
        nn.init.zeros_(self.head.bias), nn.init.normal_(self.head.weight, std=0.02)

    # ---- acting and learning by reinforcement -------------------------------------------------------------------

    def act(self, obs: Obs, *, generator: torch.Generator | None, greedy: bool = False) -> PolicyOutput:
        """Sample (or with `greedy` choose) tokens [B, A]; the action is [B, C, D]."""
        with torch.inference_mode():
            obs, n = padded(obs)
            summary, cache, _ = self.trunk.prefix(obs)
            if self.autoregressive:
                units = self._decode(cache, n, generator, greedy)
                logits = self._logits(cache, units)
            else:
                logits = self._logits(cache, None)
                units = self._sample(logits, n, generator, greedy)
            # By the very operations of training, so the ratio starts at exactly 1.
            logp = self._chosen(torch.log_softmax(logits, dim=-1), units)
            value = self.estimate(summary, obs, n)
            action = self.scale.restore(self._middle(units)).view(len(units), self.chunk, self.size)
            return PolicyOutput(units[:n], logp[:n], action[:n], value)

    def evaluate(self, obs: Obs, units: Tensor, *, entropy: bool = True) -> Evaluation:
        """Log-probabilities and entropies [N, A], values [N]."""
        obs, n = padded(obs)
        units = pad_rows(units)
        summary, cache, sight = self.trunk.prefix(obs)
        log_probs = torch.log_softmax(self._logits(cache, units), dim=-1)
        h = -(log_probs.exp() * log_probs).sum(-1) if entropy else None
        return self.judged(summary, obs, self._chosen(log_probs, units), h, n, sight)

    # ---- learning from demonstrations ---------------------------------------------------------------------------

    def imitation_loss(self, obs: Obs, action: Tensor, last: Obs, generator: torch.Generator) -> Tensor:
        """Cross-entropy of the demonstrated tokens, mean over the dimensions, and foresight: [N, C]."""
        del generator  # nothing is drawn
        obs, n = padded(obs)
        bins, std = self.config.bins, self.config.smoothing
        # A class is (u + 1) / 2 * bins, rounded down; the range's upper edge belongs to the last.
        place = (self.scale.normalise(action).clamp(-1, 1) + 1).flatten(1) / 2 * bins
        units = place.long().clamp(max=bins - 1)
        _, cache, sight = self.trunk.prefix(obs)
        logits = self._logits(cache, pad_rows(units), temperature=1.0)[:n].flatten(0, 1)
        target = gaussian_classes(place.flatten(), bins, std) if std else units.flatten()
        loss = F.cross_entropy(logits, target, reduction="none")
        return loss.view(n, self.chunk, self.size).mean(-1) + self.trunk.foresight_loss(sight[:n], last)

    # ---- inside -------------------------------------------------------------------------------------------------

    def _logits(self, cache: Cache, units: Tensor | None, temperature: float | None = None) -> Tensor:
        """[N, A, bins]; autoregressive ones are given the tokens `units` [N, A] that came before each."""
        n = len(cache[0][0])
        x = self.query.expand(n, -1, -1)
        if self.autoregressive:
            assert units is not None
            x = torch.cat([x[:, :1], x[:, 1:] + self.bin_token(units[:, :-1])], dim=1)
        mask = causal_mask(self.num_units, cache) if self.autoregressive else None
        out = self.trunk.suffix(x, cache, mask=mask)
        logits = self.head(self.norm(out)).reshape(n, self.num_units, self.config.bins)
        return logits / (self.config.temperature if temperature is None else temperature)

    def _decode(self, cache: Cache, n: int, generator: torch.Generator | None, greedy: bool) -> Tensor:
        """Token after token, each one small step over the cache."""
        cache = list(cache)
        x = self.query[:1].expand(len(cache[0][0]), -1, -1)
        units: list[Tensor] = []
        for i in range(self.num_units):
            out = self.trunk.suffix(x, cache, grow=True)
            logits = self.head(self.norm(out)) / self.config.temperature
            units.append(self._sample(logits, n, generator, greedy))
            if i + 1 < self.num_units:
                x = self.query[i + 1] + self.bin_token(units[-1])
        return torch.cat(units, dim=1)

    def _sample(self, logits: Tensor, n: int, generator: torch.Generator | None, greedy: bool) -> Tensor:
        """Arg-max of the logits with Gumbel noise (for real rows only: padding moves no generator), or the choice."""
        if greedy and self.config.greedy == "median":
            return median_class(logits * self.config.temperature)
        if greedy:
            return logits.argmax(-1)
        noise = torch.rand((n, *logits.shape[1:]), generator=generator, device=logits.device)
        gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))
        scores = logits.clone()
        scores[:n] += gumbel
        return scores.argmax(-1)

    @staticmethod
    def _chosen(log_probs: Tensor, units: Tensor) -> Tensor:
        return log_probs.gather(-1, units.unsqueeze(-1)).squeeze(-1)

    def _middle(self, units: Tensor) -> Tensor:
        """Middles of the bins in [-1, 1], [N, C, D]."""
        u = (units.to(torch.float32) + 0.5) * (2 / self.config.bins) - 1
        return u.view(len(units), self.chunk, self.size)


def build(config: Config, *, env: EnvSpec, device: torch.device) -> TokenPolicy:
    """Build the policy for an env on a device.

    Raises:
        CapabilityError: An observation or action it cannot handle.
    """
    return TokenPolicy(env, config).to(device)
