"""What all heads on the trunk share: the critic, the range of actions, and the beginning of every policy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embodied_rl.policies._critic import Critic
from embodied_rl.policies._trunk import ActionScale, Trunk, TrunkConfig, padded
from embodied_rl.types import EnvSpec, Evaluation, Obs


class VlaPolicy(nn.Module):
    """Trunk, critic and action range; a head adds `act`, `evaluate` and `imitation_loss`."""

    def __init__(self, env: EnvSpec, config: TrunkConfig) -> None:
        """Build what does not depend on the head; parameters are drawn from torch's global generator."""
        super().__init__()
        self.spec = env
        self.chunk, self.size = config.chunk, env.action.size
        head = config.critic
        self.has_critic = head.kind != "none"
        self.value_range = (head.low, head.high) if head.kind == "hl_gauss" else None
        self.scale = ActionScale(self.size)
        self.trunk = Trunk(env, config)
        self.critic = Critic(env, config.width, head, self.trunk.sight) if self.has_critic else None
        self.privileged_critic = head.reads == "privileged"

    def value(self, obs: Obs) -> Tensor:
        """[N] critic's estimate, without gradients."""
        assert self.critic is not None, "value() on a policy without a critic"
        with torch.inference_mode():
            obs, n = padded(obs)
            summary = None if self.critic.entries else self.trunk.prefix(obs).summary
            return self.critic(summary, obs)[0][:n]

    def observe(self, obs: Obs) -> None:
        """Nothing moves but by gradients."""

    def fit_actions(self, low: Tensor, high: Tensor) -> None:
        """Map the range [D] of demonstrated actions to [-1, 1]."""
        self.scale.fit(low, high)

    def fit_vectors(self, statistics: dict[str, dict[str, Tensor]]) -> None:
        """Prepare to foresee where demonstrations end."""
        self.trunk.fit_vectors(statistics)

    @property
    def foresees(self) -> bool:
        """Whether there is anything that `foresight_loss` could teach."""
        return self.trunk.foresight is not None

    def foresight_loss(self, obs: Obs, last: Obs) -> Tensor:
        """See `embodied_rl.types.Foreseeing`."""
        obs, n = padded(obs)
        sight = self.trunk.look(obs).sight if self.trunk.looks else self.trunk.prefix(obs).sight
        return self.trunk.foresight_loss(sight[:n], last).squeeze(1)

    def imitates(self) -> None:
        """Let own successes train what only the imitation loss reads, too."""
        if self.trunk.foresight is not None:
            self.trunk.foresight.requires_grad_(True)

    def estimate(self, summary: Tensor, obs: Obs, n: int) -> Tensor | None:
        """[n] what the critic says while acting; None without a critic, or where it cannot see."""
        return None if self.critic is None or self.critic.blind(obs) else self.critic(summary, obs)[0][:n]

    def keep(self, summary: Tensor, obs: Obs) -> Tensor | None:
        """[N, width + D] all that `judged` reads, as vectors: the summary, and what the critic is told beside it.

        None where the critic cannot see: nothing is learned there.
        """
        if self.critic is None or not self.critic.entries:
            return summary
        return None if self.critic.blind(obs) else torch.cat([summary, self.critic.told(obs)], dim=1)

    def recall(self, kept: Tensor) -> tuple[Tensor, Obs]:
        """What `keep` was given, of obs the entries that the critic reads."""
        names = self.critic.entries if self.critic is not None else []
        told = [self.spec.observation[name].shape[0] for name in names]
        # Contiguous, as they were: other strides may take another matrix kernel, whose last bits differ.
        summary, *parts = (x.contiguous() for x in kept.split([kept.shape[1] - sum(told), *told], dim=1))
        return summary, dict(zip(names, parts, strict=True))

    def judged(
        self, summary: Tensor, obs: Obs, logp: Tensor, entropy: Tensor | None, n: int, sight: Tensor | None = None
    ) -> Evaluation:
        """The evaluation of the first n rows, with the critic's view of them and what `sight` could have told it."""
        value, logits = self.critic(summary, obs) if self.critic is not None else (None, None)
        more = None
        if self.critic is not None and self.critic.insight is not None and sight is not None:
            more = self.critic.insight(sight, self.critic.told(obs))
        rest = (None if x is None else x[:n] for x in (entropy, value, logits, more))
        return Evaluation(logp[:n], *rest)
