"""Rollout + reward model -> rollout with more reward: the room between collecting and credit.

    potential   F = gamma^k progress(s') - progress(s) on every decision of k control steps
    outcome     the last progress of an episode on its last decision, if it failed
    alone       the last progress of every episode on its last decision, and nothing of what the env paid

Returns in the metrics are the env's whatever is learned from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from embodied_rl.credit import Credit
from embodied_rl.errors import CapabilityError, ShapeError
from embodied_rl.recipe import Collect
from embodied_rl.rewards import Episode, RewardConfig, RewardModel
from embodied_rl.types import EnvSpec, Rollout, State


def episodes(rollout: Rollout) -> list[Episode]:
    """Cut a rollout into its episodes, copy by copy and in order.

    Args:
        rollout: Collected with `keep_final_obs`; decisions that do not count are in no episode.

    Returns:
        episodes: Their decisions together are the valid ones, each once.
    """
    assert rollout.final is not None
    names = ("valid", "episode", "terminated", "truncated", "task", "group", "final")
    valid, row, terminated, truncated, task, group, final = (getattr(rollout, n).cpu() for n in names)
    out = []
    for b in range(valid.shape[1]):
        ids, lengths = torch.unique_consecutive(row[valid[:, b], b], return_counts=True)
        stop = 0
        for index, length in zip(ids.tolist(), lengths.tolist(), strict=True):
            start, stop = stop, stop + length
            last, end = stop - 1, int(final[stop - 1, b])
            obs = {
                n: torch.cat([x[start:stop, b], rollout.final_obs[n][end : end + 1]]) for n, x in rollout.obs.items()
            }
            obs |= {n: x[index].expand(length + 1, *x.shape[1:]) for n, x in rollout.constants.items()}
            success = None if rollout.solved is None else rollout.solved[start:stop, b] > 0
            out.append(
                Episode(
                    obs, success, bool(terminated[last, b]), bool(truncated[last, b]), int(task[last, b]),
                    int(group[last, b]), b, start, rollout.units[start:stop, b], rollout.mask[start:stop, b],
                    None if rollout.result is None else int(rollout.result[last, b]),
                    None if rollout.instructions is None else rollout.instructions[index],
                )
            )  # fmt: skip
    return out


def potential_reward(
    now: Tensor, after: Tensor, terminated: Tensor, truncated: Tensor, *, discount: Tensor | float, bootstraps: bool
) -> Tensor:
    """Reward that changes no preference between policies.

    F_t = discount_t Phi(s'_t) - Phi(s_t), with Phi(s') = 0 where nothing is counted after s'.

    Summed over an episode, sum_t gamma^t F_t = -Phi(s_0): whatever the policy did in between cancels, and what is left
    is the same for every policy. Where an episode is cut and a critic stands for the rest, that critic learns V - Phi,
    and Phi(s') has to stay: gamma^T Phi(s_T) + gamma^T (V - Phi)(s_T) = gamma^T V(s_T). Without a critic the cut is the
    end of all that is counted, and Phi(s') = 0 like at a termination.

    Args:
        now: [T, B] Phi of the state each decision was taken in.
        after: [T, B] Phi of the state that really followed, before any reset.
        terminated: [T, B] bool.
        truncated: [T, B] bool.
        discount: [T, B] or a number, gamma ** executed steps.
        bootstraps: A critic's value stands for what follows a truncation.

    Returns:
        reward: [T, B].

    Source: Ng, Harada and Russell 1999, theorem 1; ends of episodes as in Grzes 2017, section 4; potentials that change
        from rollout to rollout as in Devlin and Kudenko 2012.
    """
    over = terminated if bootstraps else terminated | truncated
    return discount * torch.where(over, torch.zeros_like(after), after) - now


class Shaping:
    """A reward model and what is done with its answers; part of a checkpoint."""

    def __init__(self, model: RewardModel, config: RewardConfig, credit: Credit) -> None:
        """Join the parts.

        Args:
            model: Judges.
            config: Its section: `use` and `coef`.
            credit: The recipe's credit, for the discount and whether a critic bootstraps.
        """
        self.model, self.config, self.credit = model, config, credit

    def __call__(self, rollout: Rollout) -> tuple[Rollout, dict[str, tuple[float, float]]]:
        """Judge a rollout and pay.

        Args:
            rollout: Collected with `keep_final_obs`.

        Returns:
            rollout: The same with `reward` [T, B] raised by coef times what the model's answers are worth; with `use:
                alone` that is the whole reward, and episodes that the model cannot judge are not valid.
            metrics: name -> (sum, count).

        Raises:
            ShapeError: The model answered with something else than progress.
        """
        parts = episodes(rollout)
        answers = self.model.judge(parts)
        check_answers(self.config.type, parts, answers)
        pay = self._potential if self.config.use == "potential" else self._at_the_end
        extra = self.config.coef * pay(rollout, parts, answers)
        if self.config.use == "alone":
            rollout = _without_reward(rollout, parts, answers)
        paid = float(extra.sum()), float(rollout.valid.sum())
        failed = [a for e, a in zip(parts, answers, strict=True) if e.failed]
        ends = [float(a[-1]) for a in failed if a is not None]
        metrics = {
            "rollout/progress_reward_mean": paid,
            "rollout/progress_at_failure_mean": (sum(ends), float(len(ends))),
            "rollout/progress_judged_rate": (float(sum(a is not None for a in answers)), float(len(answers))),
        } | self.model.metrics()
        # What only the model had to see is let go, so that rollouts can be put side by side.
        let_go: dict[str, Any] = {"final": None, "final_obs": {}, "instructions": None}
        return replace(rollout, reward=rollout.reward + extra, **let_go), metrics

    def _potential(self, rollout: Rollout, parts: Sequence[Episode], answers: Sequence[Tensor | None]) -> Tensor:
        now, after = torch.zeros_like(rollout.reward), torch.zeros_like(rollout.reward)
        for e, a in zip(parts, answers, strict=True):
            if a is not None:
                now[e.first : e.first + len(e), e.copy] = a[:-1].to(now)
                after[e.first : e.first + len(e), e.copy] = a[1:].to(now)
        discount = self.credit.gamma ** rollout.steps.to(now.dtype)
        return potential_reward(
            now, after, rollout.terminated, rollout.truncated, discount=discount, bootstraps=self.credit.needs_critic
        )

    def _at_the_end(self, rollout: Rollout, parts: Sequence[Episode], answers: Sequence[Tensor | None]) -> Tensor:
        extra = torch.zeros_like(rollout.reward)
        for e, a in zip(parts, answers, strict=True):
            if a is not None and (e.failed or self.config.use == "alone"):
                extra[e.first + len(e) - 1, e.copy] = a[-1].to(extra)
        return extra

    def state_dict(self) -> State:
        """The model's."""
        return self.model.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict`."""
        self.model.load_state_dict(state)


def _without_reward(rollout: Rollout, parts: Sequence[Episode], answers: Sequence[Tensor | None]) -> Rollout:
    """The rollout without what the env paid, and without the episodes that nobody could judge."""
    valid = rollout.valid.clone()
    for e, a in zip(parts, answers, strict=True):
        if a is None:
            valid[e.first : e.first + len(e), e.copy] = False
    mask = rollout.mask & valid.unsqueeze(-1)
    return replace(rollout, reward=torch.zeros_like(rollout.reward), valid=valid, mask=mask)


def check_answers(name: str, parts: Sequence[Episode], answers: Sequence[Tensor | None]) -> None:
    """Refuse answers of a reward model that are no progress.

    Raises:
        ShapeError: Says which episode, what was found and what was expected.
    """
    where = f"reward model '{name}'"
    if len(answers) != len(parts):
        raise ShapeError(f"{where}: found {len(answers)} answers to {len(parts)} episodes, expected one each")
    for i, (e, a) in enumerate(zip(parts, answers, strict=True)):
        if a is None:
            continue
        if tuple(a.shape) != (len(e) + 1,):
            raise ShapeError(
                f"{where}, episode {i}: found progress of shape {list(a.shape)}, expected [{len(e) + 1}], one number "
                f"for each state before, between and after its {len(e)} decisions"
            )
        wrong = a[~((a >= 0) & (a <= 1))]  # NaN compares false
        if len(wrong):
            raise ShapeError(
                f"{where}, episode {i}: found progress {float(wrong[0]):g}, expected numbers in [0, 1]; answer None "
                "for an episode that it cannot judge"
            )


def check_reward(
    config: RewardConfig, credit: Credit, collect: Collect, env: EnvSpec, only_pays: Mapping[str, Any]
) -> None:
    """Refuse a use of a reward model that cannot work in this recipe, with a way out.

    Args:
        config: The recipe's reward section.
        credit: The recipe's.
        collect: The recipe's.
        env: Described.
        only_pays: Settings of the env that change what it pays and nothing else.

    Raises:
        CapabilityError: Says both values and what to change.
    """
    if config.use == "potential" and credit.returns == "trajectory":
        raise CapabilityError(
            "reward.use potential does nothing with algorithm.credit.returns trajectory: over an episode it adds up to "
            "minus the progress of the start, which no action changes. Set reward.use: outcome, or "
            "algorithm.credit.returns: return_to_go"
        )
    if config.use == "alone" and only_pays:
        name, value = next(iter(only_pays.items()))
        raise CapabilityError(
            f"env.{name} ({value}) changes what the env pays, and reward {config.type} pays in its place: remove "
            f"env.{name}, or the reward section"
        )
    if config.needs_whole_episodes and collect.mode == "stream":
        why = f"reward.use {config.use}" if config.use != "potential" else f"reward {config.type} with these settings"
        raise CapabilityError(
            f"{why} judges whole episodes, and collect.mode is stream: set collect.mode: episodes"
            + (", or reward.use: potential" if config.use == "outcome" else "")
        )
    if config.use == "outcome" and not env.has_success:
        raise CapabilityError(
            "reward.use outcome pays failed episodes, and this env does not say which those are (it has no success): "
            "set reward.use: potential"
        )
    if config.needs_results and not env.has_results:
        raise CapabilityError(
            f"reward {config.type} compares what episodes came to, and this env does not say it (it has no results): "
            "choose another reward, or an env with results, as text has"
        )
    if config.needs_groups and collect.group_size < 2:
        raise CapabilityError(
            f"reward {config.type} compares copies of one start, and collect.group_size is {collect.group_size}: set "
            "collect.group_size: 8 and collect.mode: episodes"
        )
