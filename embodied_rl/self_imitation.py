r"""Learning from one's own successes as from demonstrations, beside the policy gradient.

A policy gradient tells what to do more often, one number per decision. An episode that succeeded tells more: these were
good actions, and where it ended is where these pictures and words had meant. With groups of tries at the same start
a guess that was right by luck is a labelled example. The loss is the policy's own imitation loss:

    L = L_RL + coef * mean over decisions of solved episodes of imitation_loss(obs, executed actions, where it ended)

Actions are only part of it. Where a solved episode ended is a label that no demonstration was needed for, and every
rollout brings starts that were never demonstrated: `learns: foresight` leaves the actions to the policy gradient and
teaches the eye alone, by that part of the imitation loss which predicts where the episode ends.

Where one episode in a hundred succeeds, a rollout brings a handful of examples: `keep` those of earlier ones as well,
and they become a set of demonstrations that grows until newer ones push the oldest out.

Many a failure succeeds at something else: a policy that has seen one demonstration touches some object far more often
than the one it was asked for. With `hindsight` an env that knows says which instruction an episode fulfilled unasked,
and it is imitated under that one: what was a failure then tells what words mean.

Source: Oh et al. 2018 (self-imitation learning, arXiv:1806.05635). Differs: only whole solved episodes count, by the
policy's imitation loss instead of a return-weighted likelihood, and the oldest leave instead of the least surprising.
Hindsight: Andrychowicz et al. 2017 (arXiv:1707.01495); in words, Chan et al. 2019 (ACTRCE, arXiv:1902.04546). Differs:
what it relabels is imitated, not replayed to a critic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from embodied_rl.batch import Flat
from embodied_rl.metrics import Partials
from embodied_rl.section import Section
from embodied_rl.types import Foreseeing, Imitator, Obs, Policy, Rollout, State


class SelfImitation(Section):
    """How own successes are imitated."""

    coef: float = Field(0.0, ge=0)
    """Weight of the imitation loss of decisions in solved episodes, beside the method's own loss; 0 leaves it out."""
    rows: int = Field(64, ge=1)
    """Decisions of solved episodes in each optimizer step; more cost more time and are less noisy."""
    keep: int = Field(0, ge=0)
    """Decisions of solved episodes that are kept, the oldest leave; 0: those of the latest rollout only. Part of a
    checkpoint, pictures included."""
    hindsight: bool = False
    """Also imitate episodes that failed and achieved what another instruction asks for, under that instruction; needs
    an env that knows (`Relabelling`)."""
    learns: Literal["everything", "foresight"] = "everything"
    """everything: the whole imitation loss, actions included; foresight: only where the episode ended, from pictures
    and words."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> SelfImitation:
        for name in ("rows", "keep", "hindsight", "learns"):
            value = getattr(self, name)
            if not self.coef and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} ({value}) does nothing with coef (0): remove it, or set coef above 0")
        return self


class OwnSuccesses:
    """The solved episodes of the latest rollouts as something to learn from; see `embodied_rl.extra.Extra`."""

    def __init__(self, config: SelfImitation, device: torch.device, seed: int) -> None:
        """Nothing has succeeded yet; `seed` is of the noise of the imitation loss, drawn on `device`."""
        self.config = config
        self.noise = torch.Generator(device).manual_seed(seed)
        self.successes: Successes | None = None

    def begin(self, rollout: Rollout, logp: Callable[[Flat], Tensor], version: int) -> Partials:
        """Pick the successes out."""
        metrics, new = Partials(), Successes.of(rollout)
        if self.config.keep:
            new = (new if self.successes is None else self.successes.then(new)).newest(self.config.keep)
        self.successes = new
        metrics.last("rollout/imitated_decisions", float(len(self.successes)))
        if rollout.relabelled is not None:
            metrics.last("rollout/relabelled_decisions", float(rollout.relabelled.sum()))
        return metrics

    def losses(self, policy: Policy, shuffle: torch.Generator) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """The imitation loss times its coefficient, where something has succeeded."""
        if self.successes:
            of = self.successes.foresight if self.config.learns == "foresight" else self.successes.loss
            loss = of(cast(Any, policy), self.config.rows, shuffle, self.noise)
            yield self.config.coef * loss, {"actor/self_imitation_loss": (loss.detach(), 1.0)}

    def end(self, rollout: Rollout) -> None:
        """Nothing is left to do."""

    def state_dict(self) -> State:
        """The generator of the noise, and what is kept."""
        kept = self.successes if self.config.keep else None
        return {"noise": self.noise.get_state(), "kept": None if kept is None else vars(kept)}

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict`."""
        self.noise.set_state(state["noise"])
        if state["kept"] is not None:
            self.successes = Successes(**state["kept"])


@dataclass
class Successes:
    """Decisions of the solved episodes of a rollout, as demonstrations."""

    obs: Obs
    """name -> [N, ...]"""
    action: Tensor
    """[N, C, D] as executed."""
    mask: Tensor
    """[N, C] bool, control steps that were executed."""
    last: Obs
    """name -> [N, D] the observation's vectors where the episode ended."""

    def __len__(self) -> int:
        return len(self.action)

    def then(self, newer: Successes) -> Successes:
        """These, and newer ones after them."""

        def both(old: Obs, new: Obs) -> Obs:
            return {k: torch.cat([x, new[k]]) for k, x in old.items()}

        action, mask = torch.cat([self.action, newer.action]), torch.cat([self.mask, newer.mask])
        return Successes(both(self.obs, newer.obs), action, mask, both(self.last, newer.last))

    def newest(self, most: int) -> Successes:
        """The last `most` of them."""
        here = slice(max(0, len(self) - most), None)
        obs, last = ({k: x[here] for k, x in entries.items()} for entries in (self.obs, self.last))
        return Successes(obs, self.action[here], self.mask[here], last)

    @staticmethod
    def of(rollout: Rollout) -> Successes:
        """Pick them out.

        Args:
            rollout: Collected with `keep_final_obs` and `keep_actions`, in an env that knows success.

        Returns:
            successes: Of episodes that end in this rollout, solved. Decisions after the first in which the goal holds
                are left out.
        """
        assert rollout.action is not None and rollout.final is not None and rollout.solved is not None
        ended = rollout.done & rollout.valid & (rollout.solved > 0)
        # Episodes are numbered within the rollout, so one table says where each of them ended.
        end = torch.full((int(rollout.episode.max()) + 1,), -1, dtype=torch.int64, device=rollout.final.device)
        end[rollout.episode[ended]] = rollout.final[ended]
        place = end[rollout.episode]
        counts = (place >= 0) & rollout.valid & (rollout.solved < 2)
        own = Successes._taken(rollout, counts, {k: v[place[counts]] for k, v in rollout.final_obs.items()}, {})
        if rollout.relabelled is None:
            return own
        counts = rollout.relabelled
        told = {k: v[rollout.episode[counts]] for k, v in rollout.relabels.items()}
        return own.then(Successes._taken(rollout, counts, Successes._after(rollout, counts), told))

    @staticmethod
    def _taken(rollout: Rollout, counts: Tensor, last: Obs, told: Obs) -> Successes:
        """The decisions that count [T, B] as N rows, whose episodes came to `last` and were told something else."""
        assert rollout.action is not None
        constants = {k: v[rollout.episode[counts]] for k, v in rollout.constants.items()}
        obs = {k: v[counts] for k, v in rollout.obs.items()} | constants | told
        ends = last | constants | told
        vectors = {k: v for k, v in ends.items() if v.is_floating_point() and v.ndim == 2}
        steps = torch.arange(rollout.action.shape[2], device=counts.device)
        return Successes(obs, rollout.action[counts], steps < rollout.steps[counts].unsqueeze(-1), vectors)

    @staticmethod
    def _after(rollout: Rollout, counts: Tensor) -> Obs:
        """What followed the last decision that counts [T, B] of each decision's episode, N rows."""
        assert rollout.final is not None
        latest = torch.zeros(int(rollout.episode.max()) + 1, dtype=torch.int64, device=counts.device)
        for t, here in enumerate(counts):
            latest[rollout.episode[t, here]] = t
        latest, copy = latest[rollout.episode[counts]], counts.nonzero()[:, 1]
        row = rollout.final[latest, copy]
        following = (latest + 1).clamp_max(len(rollout.final) - 1)

        def seen(name: str, end: Tensor) -> Tensor:
            goes_on = (row < 0).view(-1, *[1] * (end.ndim - 1))
            return torch.where(goes_on, rollout.obs[name][following, copy], end[row.clamp_min(0)])

        return {k: seen(k, v) for k, v in rollout.final_obs.items() if v.is_floating_point()}

    def loss(self, policy: Imitator, rows: int, shuffle: torch.Generator, noise: torch.Generator) -> Tensor:
        """Mean imitation loss of some of them, drawn with replacement.

        Args:
            policy: Learns.
            rows: How many.
            shuffle: CPU generator of the draw.
            noise: Of the imitation loss, on the policy's device.

        Returns:
            loss: Scalar.
        """
        i, obs, last = self._draw(rows, shuffle)
        weight = self.mask[i].float()
        each = policy.imitation_loss(obs, self.action[i], last, noise)
        return (each * weight).sum() / weight.sum()

    def foresight(self, policy: Foreseeing, rows: int, shuffle: torch.Generator, noise: torch.Generator) -> Tensor:
        """`loss` without the actions: how far off it is foreseen where these episodes ended."""
        del noise  # nothing is drawn
        _, obs, last = self._draw(rows, shuffle)
        return policy.foresight_loss(obs, last).mean()

    def _draw(self, rows: int, shuffle: torch.Generator) -> tuple[Tensor, Obs, Obs]:
        i = torch.randint(len(self), (rows,), generator=shuffle).to(self.action.device)
        return i, {k: v[i] for k, v in self.obs.items()}, {k: v[i] for k, v in self.last.items()}
