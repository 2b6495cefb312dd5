"""A small vision-language-action model with a generative action head: flow matching or diffusion over a chunk.

The head is a few tokens, one per control step, that carry a noisy action and its time and read the prefix (pictures,
words, joints) of the trunk. K steps turn noise into a chunk; the prefix is encoded once for all of them.

How reinforcement learning sees a sample (`likelihood`):

    sde      every step (or one random step of K) is a Gaussian that keeps the marginals of the ODE (Flow-SDE; DPPO
             with process: diffusion)
    learned  the ODE step with a standard deviation that the network learns, within bounds (Flow-Noise, ReinFlow)
    cfm      no likelihood: the ratio is exp(old - new) of the flow-matching loss at stored noises and times (FPO)
    latent   the flow stays frozen; a small actor chooses the noise that it starts from (DSRL's idea, on policy), and
             what the frozen trunk made of a picture while sampling is kept, so that training never encodes it again

Units are denoising steps (one unit with cfm and latent). loss.ratio: unit clips each step by itself, as DPPO does (what
else differs from it: `_chains.py`); decision forms the joint ratio of the chain. With units: action they are a control
step's part of a denoising step, and loss.ratio: action clips each control step by itself. cfm and latent have no such
parts: a matching loss stands for the whole chunk, and every number of the noise that a flow starts from moves all of
its actions. Greedy evaluation is the ODE from the middle of the noise.

Source: Black et al. 2024 (pi0, arXiv:2410.24164); Chen et al. 2025 (pi_RL, arXiv:2510.25889); Ren et al. 2024 (DPPO,
arXiv:2409.00588); McAllister et al. 2025 (FPO, arXiv:2507.21053); Wagenmaker et al. 2025 (DSRL, arXiv:2506.15799).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from embodied_rl.errors import CapabilityError
from embodied_rl.policies._chains import (
    ChainConfig,
    gaussian_entropy,
    gaussian_logp,
    ode_step,
    sde_step,
    times,
    training_pair,
)
from embodied_rl.policies._trunk import Cache, TrunkConfig, pad_rows, padded
from embodied_rl.policies._vla import VlaPolicy
from embodied_rl.types import FEATURES, EnvSpec, Evaluation, Obs, PolicyOutput


class Config(ChainConfig, TrunkConfig):
    """Settings of the flow policy."""

    type: Literal["tiny_vla_flow"] = "tiny_vla_flow"
    process: Literal["flow", "diffusion"] = "flow"
    """flow: straight paths, the network answers with a velocity; diffusion: it answers with the noise, and sde with
    noise 1 is DDPM."""
    likelihood: Literal["sde", "learned", "cfm", "latent"] = "sde"
    """See the module docstring; imitation is the same for all."""
    samples: int = Field(8, ge=1)
    """cfm: stored pairs of noise and time per decision; more make the ratio less noisy."""
    latent_std: float = Field(0.3, gt=0)
    """latent: the actor's standard deviation at first; the frozen flow was trained on 1."""

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.process == "diffusion" and self.likelihood in ("learned", "cfm"):
            raise ValueError(
                f"likelihood ({self.likelihood}) belongs to process flow, process is {self.process}: "
                "choose likelihood sde or latent, or process: flow"
            )
        if self.likelihood == "latent" and self.critic.insight:
            raise ValueError(
                f"critic.insight ({self.critic.insight:g}) does nothing with likelihood (latent), whose eye is "
                "frozen: remove it"
            )
        self.refuse_idle(self.likelihood, samples=("cfm",), latent_std=("latent",))
        return self


class FlowPolicy(VlaPolicy):
    """See the module docstring; follows `embodied_rl.types.Policy` and `Imitator`."""

    now: Tensor
    after: Tensor

    def __init__(self, env: EnvSpec, config: Config) -> None:
        """Build for one env; parameters are drawn from torch's global generator.

        Raises:
            CapabilityError: The env's actions are not continuous.
        """
        if env.action.kind != "continuous":
            raise CapabilityError("policy tiny_vla_flow moves continuous actions; this env's are discrete")
        super().__init__(env, config)
        self.config, self.units_out_of_order = config, config.units == "action"
        self.units_span_chunk = not self.units_out_of_order
        self.actions_per_decision = 1 if self.units_span_chunk else config.chunk
        self.kind = config.likelihood
        self.entropy_learns = self.kind in ("learned", "latent")
        self.num_units = config.units_per_decision(config.chunk) if self.kind in ("sde", "learned") else 1
        width = config.width
        self.enter = nn.Linear(self.size, width)
        self.place = nn.Parameter(0.1 * torch.randn(config.chunk, width))
        self.clock = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.GELU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.size)
        self.spread = nn.Linear(width, self.size) if self.kind == "learned" else None
        grid = times(config.process, config.denoising_steps)
        self.register_buffer("now", grid.now, persistent=False)
        self.register_buffer("after", grid.after, persistent=False)
        self.frozen: list[nn.Parameter] = []
        if self.kind == "latent":
            flat = config.chunk * self.size
            last = nn.Linear(width, flat)
            nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
            self.actor = nn.Sequential(nn.Linear(width, width), nn.GELU(), last)
            self.actor_log_std = nn.Parameter(torch.full((flat,), math.log(config.latent_std)))

    # ---- acting and learning by reinforcement -------------------------------------------------------------------

    def act(self, obs: Obs, *, generator: torch.Generator | None, greedy: bool = False) -> PolicyOutput:
        """Draw a chunk [B, C, D] and the units that `evaluate` needs to judge it."""
        with torch.inference_mode():
            obs, n = padded(obs)
            summary, cache, _ = self.trunk.prefix(obs)
            x, units = self._draw(summary, cache, n, generator, greedy)
            # Of the very function that training calls, so the ratio starts at exactly 1.
            logp, _ = self._log_prob(summary, cache, units)
            value = self.estimate(summary, obs, n)
            kept = self.keep(summary, obs) if self.kind == "latent" else None
            features = None if kept is None else kept[:n]
            return PolicyOutput(units[:n], logp[:n], self.scale.restore(x)[:n], value, features=features)

    def evaluate(self, obs: Obs, units: Tensor, *, entropy: bool = True) -> Evaluation:
        """Log-probabilities (and entropies, where there are any) [N, A], values [N]."""
        obs, n = padded(obs)
        cache: Cache = []
        if FEATURES in obs:
            (summary, obs), sight = self.recall(obs[FEATURES]), None
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.kind != "latent"):
                summary, cache, sight = self.trunk.prefix(obs)
        logp, h = self._log_prob(summary, cache, pad_rows(units))
        return self.judged(summary, obs, logp, h if entropy else None, n, sight)

    # ---- learning from demonstrations ---------------------------------------------------------------------------

    def fit_vectors(self, statistics: dict[str, dict[str, Tensor]]) -> None:
        """Prepare to foresee where demonstrations end, and let go of what `freeze_flow` froze."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        super().fit_vectors(statistics)

    def freeze_flow(self) -> None:
        """Leave only actor and critic to reinforcement learning: likelihood latent."""
        chosen = [p for n, p in self.named_parameters() if p.requires_grad and not n.startswith(("actor", "critic"))]
        for parameter in chosen:
            parameter.requires_grad_(False)
        self.frozen = chosen

    def imitation_loss(self, obs: Obs, action: Tensor, last: Obs, generator: torch.Generator) -> Tensor:
        """Squared error of the velocity (or noise), mean over dimensions, and foresight: [N, C]."""
        obs, n = padded(obs)
        a = self.scale.normalise(action)
        noise = torch.randn(a.shape, generator=generator, device=a.device)
        t = torch.rand(len(a), generator=generator, device=a.device) * self.now[0]
        _, cache, sight = self.trunk.prefix(obs)
        x, target = training_pair(self.config.process, a, noise, t)
        out, _ = self._answer(cache, pad_rows(x).unsqueeze(1), pad_rows(t).unsqueeze(1))
        error = (out[:n, 0] - target).square().mean(-1)
        return error + self.trunk.foresight_loss(sight[:n], last)

    # ---- inside -------------------------------------------------------------------------------------------------

    def _answer(self, cache: Cache, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's answers to M noisy chunks of each row, which do not see each other.

        Args:
            cache: Of the prefix.
            x: [N, M, C, D]
            t: [N, M]

        Returns:
            answer: [N, M, C, D] velocity or noise.
            std: [N, M, C, D] of likelihood learned, else None.
        """
        n, m, c, _ = x.shape
        tokens = self.enter(x) + self.place + self.clock(_waves(t)).unsqueeze(2)
        mask = None
        if m > 1:
            own = torch.arange(m, device=x.device).repeat_interleave(c)
            same = own[:, None] == own[None, :]
            mask = torch.cat([same.new_ones(m * c, cache[0][0].shape[2]), same], dim=1)
        out = self.norm(self.trunk.suffix(tokens.flatten(1, 2), cache, mask=mask)).view(n, m, c, -1)
        if self.spread is None:
            return self.head(out), None
        return self.head(out), self.config.learned_std(self.spread(out))

    def _draw(
        self, summary: Tensor, cache: Cache, n: int, generator: torch.Generator | None, greedy: bool
    ) -> tuple[Tensor, Tensor]:
        """A normalised chunk [N, C, D] and its units."""
        shape = (n, self.chunk, self.size)

        def normal(*more: int) -> Tensor:
            if greedy:
                return summary.new_zeros(len(summary), *more, *shape[1:])
            # For real rows only: padding moves no generator.
            return pad_rows(torch.randn((n, *more, *shape[1:]), generator=generator, device=summary.device))

        x = normal()
        if self.kind == "latent":
            w = self.actor(summary).view_as(x) + self.actor_log_std.exp().view(self.chunk, -1) * x
            return self._denoise(cache, w), w.flatten(1).unsqueeze(1)
        if self.kind == "cfm":
            x = self._denoise(cache, x)
            s = self.config.samples
            even = ((torch.arange(s, device=x.device) + 0.5) / s).expand(n, -1)
            t = even if greedy else torch.rand((n, s), generator=generator, device=x.device)
            return x, torch.cat([x.flatten(1), normal(s).flatten(1), pad_rows(t)], dim=1).unsqueeze(1)
        x = x * self.config.start
        steps = self.config.denoising_steps
        chosen = self.config.noisy_step(n, generator=generator, greedy=greedy, device=x.device)
        chosen = None if chosen is None else pad_rows(chosen)
        before, later = [], []
        for k in range(steps):
            now = torch.full((len(x), 1), k, device=x.device)
            mean, std, flat = (y[:, 0] for y in self._step(cache, x.unsqueeze(1), now))
            after = flat if greedy else mean + std * normal()
            if chosen is not None:
                after = torch.where(chosen.eq(k).view(-1, 1, 1), after, flat)
            before.append(x)
            later.append(after)
            x = after
        which = torch.arange(steps, device=x.device).expand(len(x), -1)
        chain = [torch.stack(before, 1), torch.stack(later, 1), which]
        if chosen is not None:
            rows = torch.arange(len(x), device=x.device)
            chain = [y[rows, chosen].unsqueeze(1) for y in chain]
        return x, self.config.written(*chain)

    def _ode(self, cache: Cache, x: Tensor, k: int) -> Tensor:
        answer, _ = self._answer(cache, x.unsqueeze(1), self.now[k].expand(len(x), 1))
        return ode_step(self.config.process, x, answer[:, 0], self.now[k], self.after[k])

    def _denoise(self, cache: Cache, x: Tensor) -> Tensor:
        """From noise [N, C, D] to a chunk by the ODE."""
        for k in range(self.config.denoising_steps):
            x = self._ode(cache, x, k)
        return x

    def _step(self, cache: Cache, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation of steps k [N, M] from x [N, M, C, D], and the end of the ODE step."""
        now, after = (grid[k].unsqueeze(-1).unsqueeze(-1) for grid in (self.now, self.after))
        answer, std = self._answer(cache, x, self.now[k])
        flat = ode_step(self.config.process, x, answer, now, after)
        if std is not None:
            return flat, std, flat
        mean, std = sde_step(self.config.process, x, answer, now, after, self.config.noise)
        return mean, std.clamp(min=self.config.min_std).expand_as(mean), flat

    def _log_prob(self, summary: Tensor, cache: Cache, units: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probability and entropy of each unit [N, A]."""
        total = self.config.total
        if self.kind == "latent":
            mean, log_std = self.actor(summary), self.actor_log_std
            logp = gaussian_logp(units[:, 0], mean, log_std.exp())
            return total(logp).unsqueeze(1), total(gaussian_entropy(log_std).expand_as(mean)).unsqueeze(1)
        if self.kind == "cfm":
            return -self._matching_loss(cache, units[:, 0]).unsqueeze(1), None
        x, after, k = self.config.read(units, self.chunk, self.size)
        mean, std, _ = self._step(cache, x, k)
        each = gaussian_logp(after, mean, std), gaussian_entropy(std.log())
        logp, entropy = (total(self.config.by_unit(y)) for y in each)
        return logp, entropy

    def _matching_loss(self, cache: Cache, unit: Tensor) -> Tensor:
        """[N] flow-matching loss of a chunk at its stored noises and times."""
        s, flat = self.config.samples, self.chunk * self.size
        action = unit[:, None, :flat].expand(-1, s, -1).unflatten(-1, (self.chunk, self.size))
        noise = unit[:, flat : flat * (s + 1)].view_as(action)
        t = unit[:, -s:]
        x, target = training_pair("flow", action.flatten(0, 1), noise.flatten(0, 1), t.flatten())
        answer, _ = self._answer(cache, x.view_as(action), t)
        error = (answer - target.view_as(action)).square().flatten(2)
        return self.config.total(error).mean(1)


FREQUENCIES = 8
"""Sines and cosines of the time that the head is told."""


def _waves(t: Tensor) -> Tensor:
    """[...] times to [..., 2 FREQUENCIES]."""
    angle = t.unsqueeze(-1) * math.pi * 2.0 ** (torch.arange(FREQUENCIES, device=t.device) - 1)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def build(config: Config, *, env: EnvSpec, device: torch.device) -> FlowPolicy:
    """Build the policy for an env on a device; with likelihood latent everything but actor and critic is frozen.

    Raises:
        CapabilityError: An observation or action it cannot handle.
    """
    policy = FlowPolicy(env, config)
    if config.likelihood == "latent":
        policy.freeze_flow()
    return policy.to(device)
