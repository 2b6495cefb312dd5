r"""A multi-layer perceptron for vectors, object slots and instruction words; Gaussian or categorical actions.

    words  -> embedding, sum over words -------------------------+
    slots  -> attention: the words ask, the objects answer ------+--> concat -> hidden layers -> action distribution
    vectors -> running normalisation ----------------------------+                          \-> value

The instruction embedding is learned from scratch over the env's word ids, so nothing is downloaded. Attention over
object slots lets one network follow "push the red cube" whichever slot the red cube sits in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from embodied_rl.errors import CapabilityError
from embodied_rl.section import Section
from embodied_rl.types import EnvSpec, Evaluation, Obs, PolicyOutput, TensorSpec

MIN_ROWS = 16
"""Smaller batches are padded to this many rows: matrix kernels change their summation order below it, and then the
log-probability of a decision would depend on the size of the batch it is evaluated in."""
MIN_COLUMNS = 16
"""Narrower layers are padded to this many outputs for the same reason, where the kernels need it (see `affine`)."""
KEY_DIM = 32
"""Width of the attention's questions and answers."""
WORD_STD = 0.15
"""Standard deviation of untrained word vectors. Words that say nothing keep about this length, and they drown the one
that tells objects apart: with 1 the network finds the object meant half as fast, and less surely in new sentences."""
SHARPNESS = 2.0
"""Factor on the attention's scores, which makes up for the short word vectors."""
MAX_LOG_STD = 2.0
"""Upper bound of a standard deviation that depends on the state, as a logarithm."""
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": F.relu, "elu": F.elu, "silu": F.silu}


class Critic(Section):
    """The value head."""

    kind: Literal["scalar", "hl_gauss", "none"] = "scalar"
    """scalar: one number; hl_gauss: a distribution over return bins (needs loss.value.kind hl_gauss); none."""
    share: Literal["nothing", "encoder", "all"] = "encoder"
    """What it shares with the actor: nothing, the words and the attention, or the hidden layers too. The value loss
    teaches a shared encoder which object is meant much faster than the policy gradient does."""
    bins: int = Field(51, ge=3)
    """Bins of hl_gauss."""
    low: float = -1.0
    """Lower edge of the first bin, in (scaled) return units."""
    high: float = 1.0
    """Upper edge of the last bin."""

    @model_validator(mode="after")
    def _ordered(self) -> Critic:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


class Config(Section):
    """Settings of the multi-layer perceptron."""

    type: Literal["mlp"] = "mlp"
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    activation: Literal["tanh", "relu", "elu", "silu"] = "tanh"
    """Non-linearity between layers."""
    std: Literal["free", "state"] = "free"
    """Standard deviation: one learned number per action dimension, or a second output of the network."""
    bound_mean: bool = False
    """Pass the mean through tanh: it stays inside the action range, so exploration never dies in the clipped region."""
    init_std: float = Field(1.0, gt=0)
    """Standard deviation before training; larger explores more at first."""
    min_std: float = Field(0.01, gt=0)
    """Lower bound, so that log-probabilities stay finite."""
    squash: bool = False
    """Pass actions through tanh, with the exact change of density."""
    normalize_obs: bool = True
    """Keep a running mean and standard deviation of the vectors; part of the checkpoint."""
    word_dim: int = Field(32, ge=1)
    """Width of the word embedding."""
    attention_heads: int = Field(2, ge=0)
    """Questions the instruction asks the object slots; 0 concatenates the slots instead."""
    chunk: int = Field(1, ge=1)
    """Actions per decision."""
    hold: int = Field(1, ge=1)
    """Control steps each action is held for; 2 decides half as often, which explores farther and computes less."""
    critic: Critic = Critic()

    @model_validator(mode="after")
    def _std_can_move(self) -> Config:
        highest = math.exp(MAX_LOG_STD) if self.std == "state" else math.inf
        if not self.min_std < self.init_std < highest:
            raise ValueError(
                f"init_std ({self.init_std}) must lie between min_std ({self.min_std}) and {highest:.3g}: "
                "at a bound no gradient would ever move it"
            )
        return self


class RunningNorm(nn.Module):
    """Normalise the last axis by the mean and standard deviation of everything observed so far.

    Statistics move only in `observe` (pairwise update of Chan et al. 1979), never while acting or training.
    """

    mean: Tensor
    m2: Tensor
    count: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, size: int) -> None:
        """Start as the identity for `size` features."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("shift", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """(x - mean) / std, limited to +-10; x is [..., size]."""
        return torch.addcmul(self.shift, x, self.scale).clamp_(-10.0, 10.0)

    def observe(self, x: Tensor) -> None:
        """Take in x [..., size]."""
        x = x.detach().reshape(-1, x.shape[-1]).double()
        n = x.shape[0]
        var, mean = torch.var_mean(x, dim=0, unbiased=False)
        total = self.count + n
        delta = mean - self.mean
        self.m2 += var * n + delta.square() * (self.count * n / total)
        self.mean += delta * (n / total)
        self.count.copy_(total)
        std = (self.m2 / self.count).sqrt().clamp(min=1e-2)
        self.scale.copy_(1 / std)
        self.shift.copy_(-self.mean / std)


class Encoder(nn.Module):
    """From an observation dict to one vector per row.

    Slot entries with the same number of slots describe the same things. Where there are words and attention heads, the
    slots reach the network only as what the words pick out of them: the raw slots beside it would mostly add noise to
    every gradient. What does not change in an episode says what a thing is, so it makes the keys; what does change says
    where it is, so it makes the values (an entry of either kind alone makes both).
    """

    def __init__(self, env: EnvSpec, config: Config) -> None:
        """Choose a branch for each entry of the observation by its dtype and rank."""
        super().__init__()
        self.vectors: list[str] = []
        self.slots: dict[int, list[str]] = {}
        self.ids: list[str] = []
        self.words = nn.ModuleDict()
        specs = env.seen
        for name, spec in specs.items():
            if not spec.dtype.is_floating_point:
                self._add_words(name, spec, config)
            elif len(spec.shape) == 1:
                self.vectors.append(name)
            elif len(spec.shape) == 2:
                self.slots.setdefault(spec.shape[0], []).append(name)
            else:
                raise CapabilityError(
                    f"policy mlp cannot read observation '{name}' of shape {spec.shape}: it takes at most 2 axes"
                )
        self.size = sum(specs[n].shape[0] for n in self.vectors) + config.word_dim * len(self.ids)
        self.heads = config.attention_heads if self.ids else 0
        self.query, self.key = nn.ModuleDict(), nn.ModuleDict()
        self.keys: dict[int, list[str]] = {}
        self.values: dict[int, list[str]] = {}
        for m, group in self.slots.items():
            width = sum(specs[n].shape[1] for n in group)
            if not self.heads:
                self.size += m * width
                continue
            self.keys[m] = [n for n in group if specs[n].constant] or group
            self.values[m] = [n for n in group if not specs[n].constant] or group
            self.query[str(m)] = nn.Linear(config.word_dim * len(self.ids), self.heads * KEY_DIM)
            self.key[str(m)] = nn.Linear(sum(specs[n].shape[1] for n in self.keys[m]), self.heads * KEY_DIM)
            self.size += self.heads * sum(specs[n].shape[1] for n in self.values[m])

    def _add_words(self, name: str, spec: TensorSpec, config: Config) -> None:
        if spec.low is None or spec.high is None or spec.dtype == torch.uint8 or len(spec.shape) > 1:
            raise CapabilityError(
                f"policy mlp cannot read observation '{name}' ({spec.dtype}, shape {spec.shape}): it takes vectors, "
                "object slots and bounded integers; for images choose a policy with an image encoder"
            )
        self.ids.append(name)
        words = nn.Embedding(int(spec.high) + 1, config.word_dim, padding_idx=0 if spec.shape else None)
        if spec.shape:
            words.weight.data.mul_(WORD_STD)
        self.words[name] = words

    def forward(self, obs: Obs) -> Tensor:
        """[N, size] from normalised observations."""
        parts = [obs[n] for n in self.vectors]
        if self.ids:
            words = torch.cat([self._embed(n, obs[n]) for n in self.ids], dim=-1)
            parts.append(words)
        for m, group in self.slots.items():
            if self.heads:
                parts.append(self._attend(m, words, obs))
            else:
                parts += [obs[n].flatten(1) for n in group]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _embed(self, name: str, ids: Tensor) -> Tensor:
        vectors = self.words[name](ids)
        if ids.ndim == 1:
            return vectors
        present = (ids != 0).unsqueeze(-1).to(vectors.dtype)
        # The sum, not the mean: in a mean the one word that tells objects apart drowns among the others.
        return (vectors * present).sum(1)

    def _attend(self, m: int, words: Tensor, obs: Obs) -> Tensor:
        """[N, heads * D]: for each head the values [N, M, D] averaged by how well the keys answer the words."""
        keys = torch.cat([obs[n] for n in self.keys[m]], dim=-1)
        values = torch.cat([obs[n] for n in self.values[m]], dim=-1)
        query = self.query[str(m)](words).view(-1, self.heads, 1, KEY_DIM)
        key = self.key[str(m)](keys).view(-1, m, self.heads, KEY_DIM).transpose(1, 2)
        weight = torch.softmax((query * key).sum(-1) * SHARPNESS, dim=-1)
        return torch.einsum("nhm,nmd->nhd", weight, values).flatten(1)


class Tower(nn.Module):
    """Linear layers with a non-linearity between them, orthogonally initialised."""

    def __init__(self, sizes: tuple[int, ...], activation: str) -> None:
        """Build layers sizes[0] -> sizes[1] -> ... ; a non-linearity follows every one."""
        super().__init__()
        self.layers = nn.ModuleList(linear(a, b, math.sqrt(2)) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """From [N, sizes[0]] to [N, sizes[-1]]."""
        for layer in self.layers:
            x = self.activation(affine(x, layer))
        return x


def affine(x: Tensor, layer: Any) -> Tensor:
    """W x + b, each row with the same bits whatever other rows stand beside it; `layer` is an `nn.Linear`."""
    weight, bias = layer.weight, layer.bias
    outputs, inputs = weight.shape
    # Measured with MKL: one output, or few outputs of a number of inputs that no vector divides, go row by row.
    if outputs >= MIN_COLUMNS or (outputs > 1 and inputs % 4 == 0):
        return F.linear(x, weight, bias)
    missing = MIN_COLUMNS - outputs
    return F.linear(x, F.pad(weight, (0, 0, 0, missing)), F.pad(bias, (0, missing)))[:, :outputs]


def linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """A linear layer with orthogonal weights of the given gain and zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class MlpPolicy(nn.Module):
    """See the module docstring; follows `embodied_rl.types.Policy`."""

    value_support: Tensor
    critic: Tower
    critic_encoder: Encoder
    critic_head: nn.Linear

    def __init__(self, env: EnvSpec, config: Config) -> None:
        """Build for one env; parameters are drawn from torch's global generator."""
        super().__init__()
        self.config, self.spec = config, env
        self.chunk = config.chunk * config.hold
        self.actions_per_decision = config.chunk
        self.discrete = env.action.kind == "discrete"
        if self.discrete and (config.squash or self.chunk > 1):
            raise CapabilityError(
                "policy mlp: discrete actions take neither squash nor chunk or hold above 1; remove them "
                "from the recipe"
            )
        self.num_units = 1 if self.discrete else config.chunk * env.action.size
        self.has_critic = config.critic.kind != "none"
        self.value_range = (config.critic.low, config.critic.high) if config.critic.kind == "hl_gauss" else None
        observed = env.observation.items()
        floats = {n: s.shape[-1] for n, s in observed if s.dtype.is_floating_point and len(s.shape) in (1, 2)}
        self.norms = nn.ModuleDict({n: RunningNorm(d) for n, d in floats.items()} if config.normalize_obs else {})
        self.encoder = Encoder(env, config)
        sizes = (self.encoder.size, *config.hidden)
        self.actor = Tower(sizes, config.activation)
        outputs = env.action.size if self.discrete else self.num_units * (2 if config.std == "state" else 1)
        self.actor_head = linear(sizes[-1], outputs, 0.01)
        if not self.discrete and config.std == "free":
            self.log_std = nn.Parameter(torch.full((self.num_units,), math.log(config.init_std)))
        self._build_critic(env, config)

    def _build_critic(self, env: EnvSpec, config: Config) -> None:
        if not self.has_critic:
            return
        critic = config.critic
        if critic.share == "nothing":
            self.critic_encoder = Encoder(env, config)
        if critic.share != "all":
            self.critic = Tower((self.encoder.size, *config.hidden), config.activation)
        bins = critic.bins if self.value_range else 1
        self.critic_head = linear(config.hidden[-1] if config.hidden else self.encoder.size, bins, 1.0)
        if self.value_range:
            width = (critic.high - critic.low) / bins
            self.register_buffer("value_support", critic.low + width * (torch.arange(bins) + 0.5))

    def act(self, obs: Obs, *, generator: torch.Generator | None, greedy: bool = False) -> PolicyOutput:
        """One decision per copy: units are pre-squash action values [B, A] (or one category [B, 1])."""
        with torch.inference_mode():
            out, value, _, n = self._forward(obs, critic=True)
            if self.discrete:
                noise = torch.rand(out.shape, generator=generator, device=out.device, dtype=out.dtype)
                # Gumbel-max: the arg-max of logits + Gumbel noise is a sample of the categorical.
                gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))
                units = (out if greedy else out + gumbel).argmax(-1, keepdim=True)
                return PolicyOutput(units[:n], self._log_prob(out, None, units)[:n], units[:n], value)
            mean, log_std = self._split(out)
            if greedy:
                units = mean
            else:
                # Noise for the real rows only, so that padding does not move the generator.
                noise = torch.randn((n, self.num_units), generator=generator, device=out.device, dtype=out.dtype)
                std = log_std.exp()
                units = mean.clone()
                units[:n] += noise * (std[:n] if std.ndim == 2 else std)
            action = torch.tanh(units) if self.config.squash else units
            logp = self._log_prob(mean, log_std, units)
            action = action[:n].view(n, self.config.chunk, -1).repeat_interleave(self.config.hold, dim=1)
            return PolicyOutput(units[:n], logp[:n], action, value)

    def evaluate(self, obs: Obs, units: Tensor, *, entropy: bool = True) -> Evaluation:
        """Log-probabilities [N, A], entropies [N, A] and values [N] of recorded decisions."""
        out, value, logits, n = self._forward(obs, critic=self.has_critic)
        if self.discrete:
            log_probs = torch.log_softmax(out, dim=-1)
            h = -(log_probs.exp() * log_probs).sum(-1, keepdim=True)[:n] if entropy else None
            return Evaluation(self._log_prob(out, None, _pad(units, len(out)))[:n], h, value, logits)
        mean, log_std = self._split(out)
        logp = _cut(self._log_prob(mean, log_std, _pad(units, len(out))), n)
        h = _cut(self._entropy(mean, log_std), n) if entropy else None
        return Evaluation(logp, h, value, logits)

    def value(self, obs: Obs) -> Tensor:
        """[N] critic's estimate, without gradients."""
        with torch.inference_mode():
            _, value, _, _ = self._forward(obs, actor=False, critic=True)
        assert value is not None, "value() on a policy without a critic"
        return value

    def observe(self, obs: Obs) -> None:
        """Move the observation normaliser."""
        for name, norm in self.norms.items():
            cast(RunningNorm, norm).observe(obs[name])

    def _forward(
        self, obs: Obs, *, actor: bool = True, critic: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
        """Network outputs (padded to MIN_ROWS), values and value logits (not padded), and the number of real rows."""
        n = len(next(iter(obs.values())))
        if n < MIN_ROWS:
            obs = {k: _pad(v, MIN_ROWS) for k, v in obs.items()}
        obs = {k: self.norms[k](v) if k in self.norms else v for k, v in obs.items()}
        share = self.config.critic.share
        features = self.encoder(obs) if actor or share != "nothing" else None
        hidden = self.actor(features) if actor or share == "all" else features
        out = affine(hidden, self.actor_head) if actor and hidden is not None else torch.empty(0)
        if not critic or not self.has_critic:
            return out, None, None, n
        if share != "all":
            hidden = self.critic(self.critic_encoder(obs) if share == "nothing" else features)
        raw = _cut(self.critic_head(hidden), n)
        if self.value_range is None:
            return out, raw.squeeze(-1), None, n
        return out, torch.softmax(raw, dim=-1) @ self.value_support, raw, n

    def _split(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [N, A] and log standard deviation [A] or [N, A]."""
        floor = math.log(self.config.min_std)
        if self.config.std == "free":
            mean, log_std = out, self.log_std.clamp(min=floor)
        else:
            mean, raw = out.chunk(2, dim=-1)
            log_std = (raw + math.log(self.config.init_std)).clamp(floor, MAX_LOG_STD)
        return torch.tanh(mean) if self.config.bound_mean else mean, log_std

    def _log_prob(self, out: Tensor, log_std: Tensor | None, units: Tensor) -> Tensor:
        """[N, A]; log N(u; mean, std), minus log |d tanh(u) / du| when squashed."""
        if log_std is None:
            return torch.log_softmax(out, dim=-1).gather(-1, units)
        z = (units - out) * (-log_std).exp()
        logp = torch.addcmul(-(log_std + HALF_LOG_2PI), z, z, value=-0.5)
        return logp - log_tanh_derivative(units) if self.config.squash else logp

    def _entropy(self, mean: Tensor, log_std: Tensor) -> Tensor:
        """[N, A]; of the Gaussian, plus E[log |d tanh|] by Gauss-Hermite quadrature when squashed."""
        entropy = (log_std + (0.5 + HALF_LOG_2PI)).expand_as(mean)
        if not self.config.squash:
            return entropy
        quadrature = np.polynomial.hermite_e.hermegauss(12)
        nodes, weights = (torch.tensor(a, dtype=mean.dtype, device=mean.device) for a in quadrature)
        points = mean.unsqueeze(-1) + log_std.exp().unsqueeze(-1) * nodes
        return entropy + (log_tanh_derivative(points) * (weights / weights.sum())).sum(-1)


def log_tanh_derivative(u: Tensor) -> Tensor:
    """log(1 - tanh(u)^2) = 2 (log 2 - u + log sigmoid(2u)), without cancellation for large |u|; any shape."""
    # Not softplus: its last few elements are computed by another kernel than the rest.
    return 2.0 * (math.log(2.0) - u + F.logsigmoid(2.0 * u))


def _pad(x: Tensor, rows: int) -> Tensor:
    """Append zero rows to x up to `rows`."""
    return x if len(x) >= rows else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def _cut(x: Tensor, rows: int) -> Tensor:
    """The first rows; x itself when it has no more, because the backward pass of a slice copies."""
    return x if len(x) == rows else x[:rows]


def build(config: Config, *, env: EnvSpec, device: torch.device) -> MlpPolicy:
    """Build the policy for an env on a device.

    Raises:
        CapabilityError: An observation or action the perceptron cannot handle.
    """
    return MlpPolicy(env, config).to(device)
