"""Credit assignment as a chain of small steps: shape, returns, baseline, scale, post-process.

Published methods are choices along the chain (`Credit`), not functions of their own; the steps are in `advantage.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from embodied_rl.advantage import (
    Baseline,
    Scale,
    equal_in_group,
    gae,
    greedy_score,
    on_last_unit,
    other_half,
    return_to_go,
    scale,
    subtract_baseline,
    unit_gae,
    whiten,
)
from embodied_rl.section import Section
from embodied_rl.selection import until_success
from embodied_rl.types import Advantage, Rollout, State


class Credit(Section):
    """How rewards become advantages."""

    gamma: float = Field(0.99, ge=0, le=1)
    """Discount per control step; a decision of k executed steps is discounted by gamma ** k."""
    returns: Literal["gae", "return_to_go", "trajectory"] = "gae"
    """gae: needs a critic; return_to_go: discounted sum from the decision on; trajectory: one number per episode."""
    level: Literal["decision", "unit"] = "decision"
    """What gets an advantage of its own. unit: returns and values run from unit to unit through the whole episode; a
    decision is paid on its last unit, and gae needs a critic that values every unit."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's lambda: 0 is the one-step error (low variance), 1 the discounted return minus the value."""
    mask_after_success: bool = False
    """For envs that go on after success: learn nothing from decisions that begin after the goal has first held in their
    episode, and end its return there. The decision in which the goal is reached counts whole."""
    reward_scale: Literal["none", "running_return_std"] = "none"
    """Divide rewards by the running standard deviation of the discounted return before anything else."""
    baseline: Baseline = "critic"
    """What is subtracted; critic comes with gae, the group ones compare copies of one start. other_half: means of the
    halves of the group (`split_by`); greedy: the return of the group's first copy, which takes the policy's mode
    and is not learned from; constant: `constant`."""
    constant: float | None = None
    """What the baseline `constant` subtracts: 0.5 makes a success good and a failure bad, whatever the others did."""
    split_by: Literal["length", "surprise"] = "length"
    """other_half: what the group is split by: units of the episode, or their mean -log pi (entropy in expectation)."""
    between: float = Field(0.5, ge=0, le=1)
    """other_half: weight of the comparison with the other half; the rest is compared with the own one."""
    larger: float = Field(1.0, gt=0)
    """other_half: factor of the scores of the half with the larger metric where halves are compared. Below 1 the other
    half is preferred (shorter episodes), also in groups whose scores are all equal; above 1 the larger one."""
    virtual_return: float | None = None
    """Return of a made-up member of every group, usually the best possible one: a group that failed as a whole then
    learns from it (NGRPO). null for none."""
    scale: Scale = "none"
    """What the centred score is divided by."""
    scale_floor: float = Field(1e-3, gt=0)
    """Smallest divisor; scores that are all equal give an advantage of exactly 0 whatever the floor."""
    whiten: bool = False
    """Finally bring the advantages of the whole rollout to mean 0 and standard deviation 1."""
    clip: float | None = Field(None, gt=0)
    """Finally clamp advantages to +-clip; null for no clamp."""
    positive_weight: float = Field(1.0, ge=0)
    """Finally multiply positive advantages (0 learns from failures only)."""
    negative_weight: float = Field(1.0, ge=0)
    """Finally multiply negative advantages (0 learns from successes only)."""

    @model_validator(mode="after")
    def _fits(self) -> Credit:
        if (self.returns == "gae") != (self.baseline == "critic"):
            raise ValueError(
                f"returns ({self.returns}) and baseline ({self.baseline}) do not fit: gae goes with critic, "
                "return_to_go and trajectory with none, constant, greedy, batch_mean, group_mean, leave_one_out or "
                "other_half"
            )
        if self.returns == "gae" and self.scale != "none":
            raise ValueError(f"scale ({self.scale}) does nothing with returns gae: set scale: none (and whiten: true)")
        if self.returns != "gae" and self.lam != type(self).model_fields["lam"].default:
            raise ValueError(f"lam ({self.lam}) does nothing with returns ({self.returns}): remove it, or use gae")
        self._nothing_idle()
        mean_of_others = self.needs_groups and self.baseline != "greedy"
        if self.level == "unit" and (self.returns == "trajectory" or mean_of_others):
            raise ValueError(
                f"level (unit) with returns ({self.returns}) and baseline ({self.baseline}): all units of an episode "
                "would get the same number; set level: decision, or returns: return_to_go with baseline none, "
                "constant, greedy or batch_mean, or gae"
            )
        centred_in_group = self.baseline in ("group_mean", "leave_one_out", "other_half")
        if self.scale != "none" and not (
            centred_in_group or (self.scale, self.baseline) == ("batch_std", "batch_mean")
        ):
            raise ValueError(
                f"scale ({self.scale}) with baseline ({self.baseline}) would blow up scores that are all equal: "
                "use baseline group_mean or leave_one_out (or batch_mean with batch_std), or scale: none"
            )
        return self

    def _nothing_idle(self) -> None:
        users = {
            "constant": ("constant",),
            "split_by": ("other_half",),
            "between": ("other_half",),
            "larger": ("other_half",),
            "virtual_return": ("group_mean", "leave_one_out"),
        }
        for name, baselines in users.items():
            value, default = getattr(self, name), type(self).model_fields[name].default
            if self.baseline not in baselines and value != default:
                raise ValueError(
                    f"{name} ({value}) does nothing with baseline ({self.baseline}): remove it, or set baseline: "
                    f"{' or '.join(baselines)}"
                )
        if self.baseline == "constant" and self.constant is None:
            raise ValueError("baseline (constant) needs a number (constant is null): set constant, for example 0.5")
        if self.virtual_return is not None and self.scale == "batch_std":
            raise ValueError(
                f"virtual_return ({self.virtual_return}) belongs to groups and scale (batch_std) to the batch: set "
                "scale: group_std or none"
            )

    @property
    def needs_critic(self) -> bool:
        """Whether the policy must have a value head."""
        return self.returns == "gae"

    @property
    def needs_groups(self) -> bool:
        """Whether copies must share starts."""
        return self.baseline in ("group_mean", "leave_one_out", "other_half", "greedy")


class CreditChain:
    """`Credit` with the little memory it needs (the running scale of rewards); part of a checkpoint."""

    def __init__(self, config: Credit, *, drop_equal_groups: bool = False) -> None:
        """Start with an empty memory.

        Args:
            config: The recipe's credit section.
            drop_equal_groups: Groups whose returns are all equal leave before the update, so that no mean over the
                batch counts them; otherwise they stay, with an advantage of 0.
        """
        self.config, self.drop_equal_groups = config, drop_equal_groups
        self._running: Tensor | None = None
        self._count, self._mean, self._m2 = 0.0, 0.0, 0.0

    def __call__(self, rollout: Rollout, penalty: Tensor | None = None) -> Advantage:
        """Run the chain.

        Args:
            rollout: A finished rollout; group methods need one episode per copy (`collect.mode: episodes`).
            penalty: [T, B, A] subtracted from the reward of each unit, 0 where masked; None for none.

        Returns:
            advantage: `.advantage` [T, B] or, with `level: unit`, [T, B, A], and `.target` of the same shape =
                unprocessed advantage + value with a critic.
        """
        c = self.config
        metrics: dict[str, tuple[float, float]] = {}
        if c.mask_after_success:
            made, rollout = float(rollout.valid.sum()), until_success(rollout)
            metrics["rollout/after_success_rate"] = (made - float(rollout.valid.sum()), made)
        reward, discount = self._reward_and_discount(rollout)
        if penalty is not None:
            penalty = torch.where(rollout.mask & rollout.valid.unsqueeze(-1), penalty, torch.zeros_like(penalty))
            reward = reward - penalty.sum(-1)
        if c.reward_scale != "none":
            divisor = self._reward_std(reward, rollout, discount)
            reward, penalty = reward / divisor, None if penalty is None else penalty / divisor
        target, counts = None, rollout.valid
        if rollout.greedy is not None:
            # Without its baseline, whose judge failed, a group has nothing to be compared with.
            lost = rollout.group[0][rollout.greedy[0] & ~rollout.valid[0]]
            counts = counts & ~rollout.greedy & ~torch.isin(rollout.group, lost)
        if c.level == "unit":
            out = self._by_unit(rollout, reward, penalty, discount, counts)
            return replace(out, metrics=metrics | out.metrics)
        if c.returns == "gae":
            assert rollout.value is not None and rollout.next_value is not None
            value = torch.where(rollout.valid, rollout.value, torch.zeros_like(reward))
            next_value = torch.where(rollout.valid, rollout.next_value, torch.zeros_like(reward))
            raw = gae(
                reward, value, next_value, rollout.terminated, rollout.truncated | ~rollout.valid,
                discount=discount, lam=c.lam,
            )  # fmt: skip
            target = raw + value
            metrics |= fit_metrics(value, target, rollout.valid)
        else:
            score = return_to_go(reward, rollout.done, discount=discount)
            if c.needs_groups:
                equal, member = ~self.contrast(rollout), rollout.valid[0]
                metrics["rollout/zero_advantage_groups"] = (float(equal[member].sum()), float(member.sum()))
                if self.drop_equal_groups:
                    counts = counts & ~equal
            counted = counts
            if c.returns == "trajectory":
                # One row: an episode counts once in a mean over the batch, however many decisions it took.
                score, counted = score[:1], counted[:1]
            raw = self._compare(score, counted, rollout).expand_as(reward)
        return Advantage(self._post(raw, counts), target, metrics, counts)

    def _compare(self, score: Tensor, counted: Tensor, rollout: Rollout) -> Tensor:
        """Baseline and scale: scores [T, B] and those of them that count -> advantages [T, B]."""
        c, group, copies = self.config, rollout.group[0], score.shape[1]
        if c.baseline == "constant":
            assert c.constant is not None
            return score - c.constant
        if c.baseline == "greedy":
            assert rollout.greedy is not None
            return score - greedy_score(score[0], group, rollout.greedy[0])
        if c.baseline == "other_half":
            raw = other_half(score, split_metric(rollout, c.split_by), group, counted[0], c.between, c.larger)
            return scale(raw, score, group, counted, c.scale, c.scale_floor)
        if c.virtual_return is not None:
            score, group, counted = self._with_virtual(score, group, counted)
        raw = subtract_baseline(score, group, counted, c.baseline)
        return scale(raw, score, group, counted, c.scale, c.scale_floor)[:, :copies]

    def _with_virtual(self, score: Tensor, group: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [T, B], groups [B] and what counts, with one more column for each group's made-up member.

        Source: Nan et al. 2025 (NGRPO, arXiv:2509.18851), who add the largest possible reward.
        """
        ids, best = group.unique(), self.config.virtual_return
        made_up = score.new_full((len(score), len(ids)), 0.0 if best is None else best)
        everyone = torch.ones_like(made_up, dtype=torch.bool)
        return torch.cat([score, made_up], 1), torch.cat([group, ids]), torch.cat([counted, everyone], 1)

    def _by_unit(
        self, rollout: Rollout, reward: Tensor, penalty: Tensor | None, discount: Tensor | float, counts: Tensor
    ) -> Advantage:
        """`level: unit`: reward [T, B] is net of the penalty [T, B, A] of its units already."""
        c, mask = self.config, rollout.mask & counts.unsqueeze(-1)
        paid = on_last_unit(reward, mask)
        if penalty is not None:
            paid = on_last_unit(reward + penalty.sum(-1), mask) - penalty
        cut, zero = rollout.truncated | ~rollout.valid, torch.zeros_like(reward)
        if c.returns == "return_to_go":
            # Values of 0 and lambda 1 leave the plain sum of what is still to come.
            nothing = torch.zeros_like(paid)
            score = unit_gae(paid, nothing, zero, mask, rollout.terminated, cut, discount=discount, lam=1.0)
            if c.baseline == "greedy":
                assert rollout.greedy is not None
                # The greedy copy's whole return, whatever has passed: it only has to be independent of the sample.
                total = return_to_go(reward, rollout.done, discount=discount)[0]
                raw = score - greedy_score(total, rollout.group[0], rollout.greedy[0]).unsqueeze(-1)
            elif c.baseline == "constant":
                raw = self._compare(score, mask, rollout)
            else:
                raw = subtract_baseline(score, rollout.group[0], mask, c.baseline)
            return Advantage(self._post(raw, mask), counts=counts)
        assert rollout.value is not None and rollout.next_value is not None
        value = torch.where(rollout.valid.unsqueeze(-1), rollout.value, torch.zeros_like(paid))
        next_value = torch.where(rollout.valid, rollout.next_value, zero)
        raw = unit_gae(paid, value, next_value, mask, rollout.terminated, cut, discount=discount, lam=c.lam)
        target = torch.where(mask, raw + value, torch.zeros_like(raw))
        return Advantage(self._post(raw, mask), target, fit_metrics(value, target, mask), counts)

    def contrast(self, rollout: Rollout) -> Tensor:
        """[B] bool, True for copies of groups whose returns differ: only these tell good from bad."""
        if self.config.mask_after_success:
            rollout = until_success(rollout)
        reward, discount = self._reward_and_discount(rollout)
        score, group = return_to_go(reward, rollout.done, discount=discount)[:1], rollout.group[0]
        member = rollout.valid[:1]
        if self.config.virtual_return is not None:
            score, group, member = self._with_virtual(score, group, member)
        return ~equal_in_group(score, group, member[0])[0, : reward.shape[1]]

    def _reward_and_discount(self, rollout: Rollout) -> tuple[Tensor, Tensor | float]:
        # An infinite or NaN number in a masked decision must not reach the sums.
        reward = torch.where(rollout.valid, rollout.reward, torch.zeros_like(rollout.reward))
        gamma = self.config.gamma
        return reward, gamma if rollout.chunk == 1 else gamma ** rollout.steps.to(reward.dtype)

    def _post(self, x: Tensor, valid: Tensor) -> Tensor:
        c = self.config
        if c.whiten:
            x = whiten(x, valid)
        if c.clip is not None:
            x = x.clamp(-c.clip, c.clip)
        if c.positive_weight != 1 or c.negative_weight != 1:
            x = torch.where(x > 0, c.positive_weight * x, c.negative_weight * x)
        return torch.where(valid, x, torch.zeros_like(x))

    def _reward_std(self, reward: Tensor, rollout: Rollout, discount: Tensor | float) -> float:
        """Standard deviation of the running discounted return R <- discount R + r over all decisions seen so far.

        Source: Engstrom et al. 2020, appendix A.2 (arXiv:2005.12729); R is not reset at rollout borders, only at
        the end of an episode.
        """
        # A NaN would stay in the statistics for good; the update that it belongs to is skipped anyway.
        reward = torch.where(torch.isfinite(reward), reward, torch.zeros_like(reward))
        # Where every episode ended with its rollout nothing runs on, and the next one may have other copies.
        running = torch.zeros_like(reward[0])
        if self._running is not None and bool(self._running.any()):
            running = self._running.to(reward.device)
        series = torch.empty_like(reward)
        for t in range(len(reward)):
            d = discount[t] if isinstance(discount, Tensor) else discount
            running = running * d + reward[t]
            series[t] = running
            running = torch.where(rollout.done[t] | ~torch.isfinite(running), torch.zeros_like(running), running)
        self._running = running
        series = series[rollout.valid & torch.isfinite(series)].double()
        if series.numel():
            n, mean = float(series.numel()), float(series.mean())
            m2 = float(series.var(unbiased=False)) * n
            total = self._count + n
            delta = mean - self._mean
            self._m2 += m2 + delta**2 * self._count * n / total
            self._mean += delta * n / total
            self._count = total
        return max((self._m2 / self._count) ** 0.5, 1e-4) if self._count else 1.0

    def state_dict(self) -> State:
        """What a checkpoint keeps of it."""
        return {"running": self._running, "count": self._count, "mean": self._mean, "m2": self._m2}

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict`."""
        self._running, self._count, self._mean, self._m2 = state["running"], state["count"], state["mean"], state["m2"]


def split_metric(rollout: Rollout, by: str) -> Tensor:
    """[B] of each copy's episode: "length" its units, "surprise" the mean of -log pi over them."""
    mask = rollout.mask & rollout.valid.unsqueeze(-1)
    units = mask.sum((0, 2)).to(rollout.logp.dtype)
    if by == "length":
        return units
    return -torch.where(mask, rollout.logp, torch.zeros_like(rollout.logp)).sum((0, 2)) / units.clamp(min=1)


def fit_metrics(value: Tensor, target: Tensor, valid: Tensor) -> dict[str, tuple[float, float]]:
    """How well the critic predicts its targets: explained variance 1 - Var(y - v) / Var(y), and both means.

    Args:
        value: [T, B] or [T, B, A].
        target: Of the same shape.
        valid: Of the same shape, bool.

    Returns:
        metrics: name -> (sum, count); explained_variance is absent when the targets do not vary.
    """
    v, y = (value, target) if bool(valid.all()) else (value[valid], target[valid])
    if v.numel() < 2:
        return {}
    n = float(v.numel())
    metrics = {"critic/value_mean": (float(v.mean()) * n, n), "critic/target_mean": (float(y.mean()) * n, n)}
    variance = float(y.var())
    if variance > 0:
        metrics["critic/explained_variance"] = (1 - float((y - v).var()) / variance, 1.0)
    return metrics
