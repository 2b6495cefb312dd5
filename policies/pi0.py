"""pi0 as transformers has it: PaliGemma reads pictures and words, an action expert turns noise into a chunk.

    pictures, words -> PaliGemma -> keys and values, once per decision
    vectors, x_k, t_k -> action expert over them -> velocity -> x_{k+1},  K times

An action has `max_action_dim` numbers in the model and D in the env. Reinforcement learning sees each denoising step as
a Gaussian over the C x D numbers that the env executes (`sde` or `learned`, see tiny_vla_flow and _chains); the numbers
beyond D follow the ODE, so the recorded log-probability is that of everything random in the step. Units are denoising
steps, or with `units: action` their control steps, and carry all numbers of x_k. Greedy decisions are the ODE from the
middle of the noise.

The env's vectors are joined, brought to mean 0 and deviation 1 by what demonstrations showed, and padded with zeros to
`max_state_dim`. Pictures and word ids enter as in hf_vla.

Source: Black et al. 2024 (pi0, arXiv:2410.24164); Chen et al. 2025 (pi_RL, arXiv:2510.25889). Differs: a chunk may be
shorter than the one the weights were trained with, and is then executed whole; the critic reads the mean of the prefix.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from pydantic import Field, model_validator
from torch import Tensor, nn

from embodied_rl.errors import CapabilityError
from embodied_rl.policies._backbone import TINY, Backbone, Pretrained, blank, open_model, readable
from embodied_rl.policies._chains import (
    ChainConfig,
    gaussian_entropy,
    gaussian_logp,
    ode_step,
    sde_step,
    times,
    training_pair,
)
from embodied_rl.policies._critic import Critic, ValueHead
from embodied_rl.policies._trunk import ActionScale, pad_rows, padded
from embodied_rl.types import EnvSpec, Evaluation, Obs, PolicyOutput

_PALIGEMMA = {"model_type": "paligemma"} | TINY["paligemma"]
TINY_PI0: dict[str, dict[str, Any]] = {
    "pi0": {
        "vlm_config": _PALIGEMMA,
        "dit_config": _PALIGEMMA["text_config"] | {"hidden_size": 16, "intermediate_size": 32},
        "chunk_size": 4, "max_state_dim": 12, "max_action_dim": 8,
    },
}  # fmt: skip
"""Settings of the tiny model: random weights."""


class Config(ChainConfig, Pretrained):
    """Settings of pi0."""

    type: Literal["pi0"] = "pi0"
    model: str = Field("tiny:pi0", min_length=1)
    """Folder with config.json and safetensors weights of a `PI0ForConditionalGeneration`; or tiny:pi0, a very small
    model with random weights, for tests and for trying a recipe out."""
    chunk: int | None = Field(None, ge=1)
    """Control steps that one decision covers, at most the model's chunk_size; null: chunk_size, what it was trained
    with."""
    likelihood: Literal["sde", "learned"] = "sde"
    """sde: every step keeps the marginals of the ODE; learned: the ODE step with a standard deviation of the network's
    own."""
    critic: ValueHead = ValueHead()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        self.refuse_idle(self.likelihood)
        return self


class Prefix(NamedTuple):
    """What the action expert and the critic read of an observation."""

    summary: Tensor
    """[N, width] mean of the last hidden states."""
    layers: list[tuple[Tensor, Tensor]]
    """Keys and values [N, heads, S, size] of each layer."""
    state: Tensor
    """[N, max_state_dim]"""


class Pi0Policy(nn.Module):
    """See the module docstring; follows `embodied_rl.types.Policy` and `Imitator`."""

    now: Tensor
    after: Tensor
    state_mean: Tensor
    state_std: Tensor

    def __init__(self, env: EnvSpec, config: Config) -> None:
        """Load or build the model for one env.

        Raises:
            UserError: A model that cannot be had, or an env, chunk or vector that it is too small for.
        """
        super().__init__()
        pictures, words = readable(env)
        self.vectors = _vectors(env, {*pictures, words})
        model = open_model(config, TINY_PI0)
        if not isinstance(model, transformers.PI0ForConditionalGeneration):
            raise CapabilityError(f"policy.model '{config.model}' is a {type(model).__name__}, not pi0: use hf_vla")
        settings = model.config
        _check_sizes(env, config, settings, self.vectors)
        self.config, self.spec = config, env
        self.chunk = config.chunk or settings.chunk_size
        self.size, self.wide = env.action.size, settings.max_action_dim
        self.state_size, self.alpha = settings.max_state_dim, settings.time_sampling_beta_alpha
        self.latest = settings.time_sampling_scale, settings.time_sampling_offset
        self.units_out_of_order = config.units == "action"
        self.units_span_chunk = not self.units_out_of_order
        self.actions_per_decision = 1 if self.units_span_chunk else self.chunk
        self.num_units = config.units_per_decision(self.chunk)
        self.entropy_learns = config.likelihood == "learned"
        self.has_critic = config.critic.kind != "none"
        self.privileged_critic = config.critic.reads == "privileged"
        self.value_range = (config.critic.low, config.critic.high) if config.critic.kind == "hl_gauss" else None
        self.scale = ActionScale(self.size)
        length = sum(env.observation[name].shape[0] for name in self.vectors)
        self.register_buffer("state_mean", torch.zeros(length))
        self.register_buffer("state_std", torch.ones(length))
        self.backbone = Backbone(env, model, model.model.vlm, model.model, config)
        self.spread = nn.Linear(settings.dit_config.hidden_size, self.size) if config.likelihood == "learned" else None
        self.critic = Critic(env, self.backbone.width, config.critic) if self.has_critic else None
        grid = times("flow", config.denoising_steps)
        self.register_buffer("now", grid.now, persistent=False)
        self.register_buffer("after", grid.after, persistent=False)

    # ---- acting and learning by reinforcement -------------------------------------------------------------------

    def act(self, obs: Obs, *, generator: torch.Generator | None, greedy: bool = False) -> PolicyOutput:
        """Draw a chunk [B, C, D] and the units that `evaluate` needs to judge it."""
        with torch.inference_mode():
            obs = self.backbone.once(obs)
            features = self.backbone.keep(obs)
            obs, n = padded(obs)
            prefix = self.prefix(obs)

            def normal(width: int) -> Tensor:
                if greedy:
                    return self.now.new_zeros(len(prefix.state), self.chunk, width)
                # For real rows only: padding moves no generator.
                return pad_rows(torch.randn((n, self.chunk, width), generator=generator, device=self.now.device))

            chosen = self.config.noisy_step(n, generator=generator, greedy=greedy, device=self.now.device)
            chosen = None if chosen is None else pad_rows(chosen)
            x, before, later, logps = self.config.start * normal(self.wide), [], [], []
            for k in range(self.config.denoising_steps):
                step = torch.full((len(x),), k, device=x.device)
                mean, std, flat = self._step(prefix, x, step)
                after = flat[..., : self.size] if greedy else mean + std * normal(self.size)
                if chosen is not None:
                    after = torch.where((chosen == k).view(-1, 1, 1), after, flat[..., : self.size])
                # Of the very numbers that training computes again, so the ratio starts at exactly 1.
                logps.append(gaussian_logp(after, mean, std))
                before.append(x)
                later.append(after)
                x = torch.cat([after, flat[..., self.size :]], dim=-1)
            which = torch.arange(self.config.denoising_steps, device=x.device).expand(len(x), -1)
            chain = [torch.stack(before, 1), torch.stack(later, 1), which, torch.stack(logps, 1)]
            if chosen is not None:
                rows = torch.arange(len(x), device=x.device)
                chain = [y[rows, chosen].unsqueeze(1) for y in chain]
            units, logp = self.config.written(*chain[:3]), self._total(chain[3])
            action = self.scale.restore(x[..., : self.size])
            blind = self.critic is None or self.critic.blind(obs)
            value = None if blind else self._value(prefix, obs)[0][:n]
            return PolicyOutput(units[:n], logp[:n], action[:n], value, features=features)

    def evaluate(self, obs: Obs, units: Tensor, *, entropy: bool = True) -> Evaluation:
        """Log-probabilities and entropies [N, A], values [N]."""
        obs, n = padded(self.backbone.recall(obs))
        prefix = self.prefix(obs)
        x, after, k = self.config.read(pad_rows(units), self.chunk, self.size)
        logps, entropies = [], []
        for i in range(k.shape[1]):
            mean, std, _ = self._step(prefix, x[:, i], k[:, i])
            logps.append(gaussian_logp(after[:, i], mean, std))
            if entropy:
                entropies.append(gaussian_entropy(std.log()))
        value, value_logits = self._value(prefix, obs) if self.critic is not None else (None, None)
        return Evaluation(
            self._total(torch.stack(logps, 1))[:n], self._total(torch.stack(entropies, 1))[:n] if entropy else None,
            None if value is None else value[:n], None if value_logits is None else value_logits[:n],
        )  # fmt: skip

    def value(self, obs: Obs) -> Tensor:
        """[N] critic's estimate, without gradients."""
        assert self.critic is not None, "value() on a policy without a critic"
        with torch.inference_mode():
            obs, n = padded(obs)
            return self._value(self.prefix(obs), obs)[0][:n]

    def observe(self, obs: Obs) -> None:
        """Nothing moves but by gradients."""

    # ---- learning from demonstrations ---------------------------------------------------------------------------

    def fit_actions(self, low: Tensor, high: Tensor) -> None:
        """Map the range [D] of demonstrated actions to [-1, 1]."""
        self.scale.fit(low, high)

    def fit_vectors(self, statistics: dict[str, dict[str, Tensor]]) -> None:
        """Normalise the env's vectors by mean and standard deviation of the demonstrations."""
        if self.vectors:
            self.state_mean.copy_(torch.cat([statistics[name]["mean"] for name in self.vectors]))
            self.state_std.copy_(torch.cat([statistics[name]["std"] for name in self.vectors]).clamp(min=0.01))

    def imitation_loss(self, obs: Obs, action: Tensor, last: Obs, generator: torch.Generator) -> Tensor:
        """Squared error of the velocity, mean over all numbers of the model: [N, C] for actions [N, C, D].

        Times follow pi0's Beta(alpha, 1), which has more of them near the noise. `last` is not used.
        """
        obs, n = padded(obs)
        a = F.pad(self.scale.normalise(action), (0, self.wide - self.size))
        noise = torch.randn(a.shape, generator=generator, device=a.device)
        u = torch.rand(len(a), generator=generator, device=a.device)
        scale, offset = self.latest
        t = u ** (1 / self.alpha) * scale + offset
        x, target = training_pair("flow", a, noise, t)
        velocity, _ = self.velocity(self.prefix(obs), pad_rows(x), pad_rows(t))
        return (velocity[:n] - target).square().mean(-1)

    # ---- inside -------------------------------------------------------------------------------------------------

    def prefix(self, obs: Obs) -> Prefix:
        """Run PaliGemma over pictures and words; all of them see each other."""
        with self.backbone.autocast():
            tokens, _ = self.backbone.embed(obs)
            n, length, _ = tokens.shape
            out = self.backbone.vlm(
                inputs_embeds=tokens, use_cache=True,
                # pi0 counts positions from 0, PaliGemma itself from 1.
                position_ids=torch.arange(length, device=tokens.device).expand(n, -1),
                token_type_ids=torch.zeros(n, length, dtype=torch.int64, device=tokens.device),
            )  # fmt: skip
        state = torch.cat([self.now.new_zeros(n, 0), *(obs[name].float() for name in self.vectors)], dim=1)
        state = (state - self.state_mean) / self.state_std
        state = F.pad(state, (0, self.state_size - state.shape[1]))
        layers = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
        return Prefix(out.last_hidden_state.float().mean(1), layers, state)

    def velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The action expert's answer to noisy chunks.

        Args:
            prefix: Of `prefix`.
            x: [N, C, max_action_dim]
            t: [N] times, 1 is noise.

        Returns:
            velocity: [N, C, max_action_dim]
            hidden: [N, C, width of the expert]
        """
        model = self.backbone.model
        with self.backbone.autocast():
            # A fresh cache for each pass: the expert appends to the one it is given.
            cache = transformers.DynamicCache(ddp_cache_data=prefix.layers)
            tokens = model.embed_action_time(prefix.state, x, t)
            hidden = model.model(action_embeds=tokens, past_key_values=cache).last_hidden_state[:, 1:]
            velocity = model.action_out_proj(hidden)
        return velocity.float(), hidden.float()

    def _step(self, prefix: Prefix, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step k [N] from x [N, C, wide]: mean and standard deviation [N, C, D], and the ODE's [N, C, wide]."""
        now, after = (grid[k].view(-1, 1, 1) for grid in (self.now, self.after))
        velocity, hidden = self.velocity(prefix, x, self.now[k])
        flat = ode_step("flow", x, velocity, now, after)
        d = self.size
        if self.spread is not None:
            return flat[..., :d], self.config.learned_std(self.spread(hidden)), flat
        mean, std = sde_step("flow", x[..., :d], velocity[..., :d], now, after, self.config.noise)
        return mean, std.clamp(min=self.config.min_std).expand_as(mean), flat

    def _total(self, x: Tensor) -> Tensor:
        """Of each number of the steps [N, M, C, D] to each unit [N, A]."""
        return self.config.total(self.config.by_unit(x))

    def _value(self, prefix: Prefix, obs: Obs) -> tuple[Tensor, Tensor | None]:
        assert self.critic is not None
        value: tuple[Tensor, Tensor | None] = self.critic(F.layer_norm(prefix.summary, prefix.summary.shape[1:]), obs)
        return value


def _vectors(env: EnvSpec, taken: set[str]) -> list[str]:
    """Names of the env's vectors.

    Raises:
        CapabilityError: Something else is left.
    """
    rest = {name: spec for name, spec in env.seen.items() if name not in taken}
    for name, spec in rest.items():
        if not (spec.dtype.is_floating_point and len(spec.shape) == 1):
            raise CapabilityError(
                f"policy pi0 cannot read observation '{name}' ({spec.dtype}, shape {list(spec.shape)}): it takes RGB "
                "pictures [H, W, 3] uint8, vectors, and one row of word ids"
            )
    return list(rest)


def _check_sizes(env: EnvSpec, config: Config, settings: Any, vectors: list[str]) -> None:
    """Raise CapabilityError where the env or the recipe asks for more than the model has."""
    where = f"policy.model '{config.model}'"
    if config.chunk is not None and config.chunk > settings.chunk_size:
        raise CapabilityError(
            f"policy.chunk ({config.chunk}) is longer than the {settings.chunk_size} steps (chunk_size) of {where}: "
            f"set chunk: {settings.chunk_size}, or null"
        )
    if env.action.size > settings.max_action_dim:
        raise CapabilityError(
            f"this env's actions have {env.action.size} numbers, {where} has room for {settings.max_action_dim} "
            "(max_action_dim)"
        )
    length = sum(env.observation[name].shape[0] for name in vectors)
    if length > settings.max_state_dim:
        raise CapabilityError(
            f"this env's vectors ({', '.join(vectors)}) have {length} numbers, {where} has room for "
            f"{settings.max_state_dim} (max_state_dim): let the env show fewer"
        )
    if settings.time_sampling_beta_beta != 1.0:
        found = settings.time_sampling_beta_beta
        raise CapabilityError(f"{where} draws times with time_sampling_beta_beta {found}; this policy knows only 1.0")


def build(config: Config, *, env: EnvSpec, device: torch.device) -> Pi0Policy:
    """Build the policy for an env on a device.

    Raises:
        UserError: A model that cannot be had, or an observation, action or chunk it cannot handle.
    """
    if env.action.kind != "continuous":
        raise CapabilityError("policy pi0 moves continuous actions; this env's are discrete")
    policy = Pi0Policy(env, config).to(device)

    def outputs() -> list[Tensor]:
        prefix = policy.prefix(blank(env, device))
        x = torch.zeros(1, policy.chunk, policy.wide, device=device)
        read = [prefix.summary] if policy.has_critic and not config.critic.detach else []
        return [*policy.velocity(prefix, x, torch.ones(1, device=device)), *read]

    policy.backbone.settle(outputs)
    if not policy.vectors:  # multiplied by zeros only
        policy.backbone.model.embed_action_time.state_proj.weight.requires_grad_(False)
    return policy
