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
from pydantic import Field, field_validator
from torch import Tensor, nn

from embodied_rl.errors import CapabilityError
from embodied_rl.policies._ordered import MiddleDraw, gaussian_classes, median_class
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
    """While imitating (demonstrations, or own successes): standard deviation in bins of a Gaussian around the
    demonstrated number, whose mass in each bin is the target; the likeliest bin is then near the middle of what was
    demonstrated, not the highest of many narrow peaks. 0: the one bin it falls into."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits while sampling and in every log-probability; greedy evaluation does not depend on it."""
    draws: int = Field(1, ge=1, le=99)
    """Odd. Sampling takes the middle one of so many draws, with its exact log-probability: 1 samples all that was
    imitated; the more, the nearer to the median, and the less often a doubtful bin is taken in one of 35 numbers."""
    greedy: Literal["likeliest", "median"] = "likeliest"
    """What greedy evaluation takes of the probabilities of a dimension's bins: the likeliest bin, or the one in which
    half of the mass is reached, which a single high peak beside the others does not move."""

    @field_validator("draws")
    @classmethod
    def _has_a_middle(cls, draws: int) -> int:
        if draws % 2 == 0:
            raise ValueError(f"draws ({draws}) has no middle one: take {draws - 1} or {draws + 1}")
        return draws


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
        self.middle = MiddleDraw(config.draws)
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
            logp = self.middle.log_prob(torch.log_softmax(logits, dim=-1), units)
            value = self.estimate(summary, obs, n)
            action = self.scale.restore(self._centre(units)).view(len(units), self.chunk, self.size)
            return PolicyOutput(units[:n], logp[:n], action[:n], value)

    def evaluate(self, obs: Obs, units: Tensor, *, entropy: bool = True) -> Evaluation:
        """Log-probabilities and entropies [N, A], values [N]."""
        obs, n = padded(obs)
        units = pad_rows(units)
        summary, cache, sight = self.trunk.prefix(obs)
        log_probs = torch.log_softmax(self._logits(cache, units), dim=-1)
        h = self.middle.entropy(log_probs) if entropy else None
        return self.judged(summary, obs, self.middle.log_prob(log_probs, units), h, n, sight)

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
        """Drawn tokens (for real rows only: padding moves no generator), or the choice."""
        if greedy and self.config.greedy == "median":
            return median_class(logits * self.config.temperature)
        if greedy:
            return logits.argmax(-1)
        units = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        units[:n] = self.middle.sample(logits[:n], generator)
        return units

    def _centre(self, units: Tensor) -> Tensor:
        """Middles of the bins in [-1, 1], [N, C, D]."""
        u = (units.to(torch.float32) + 0.5) * (2 / self.config.bins) - 1
        return u.view(len(units), self.chunk, self.size)


def build(config: Config, *, env: EnvSpec, device: torch.device) -> TokenPolicy:
    """Build the policy for an env on a device.

    Raises:
        CapabilityError: An observation or action it cannot handle.
    """
    return TokenPolicy(env, config).to(device)
