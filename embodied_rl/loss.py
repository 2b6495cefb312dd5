"""Losses as independent switches: ratio level x trust region x value loss x regularisers x aggregation.

A *cell* is what one importance ratio belongs to: a unit, an action (one control step of the chunk), a decision, or a
whole trajectory. Log-probability, entropy and KL of a cell are the sums over its units (the mean with
`reduce: mean`), so that one formula serves all four levels. Every cell carries a weight that was computed over the
whole optimizer step before the first micro-batch; a loss is a plain weighted sum, and its gradient does not know how
the step was split.

Source of the formulas: Schulman et al. 2017 (PPO, arXiv:1707.06347); Ye et al. 2020 (dual clip, arXiv:1912.09729);
Yu et al. 2025 (asymmetric clip, DAPO, arXiv:2503.14476); Xie et al. 2024 (quadratic trust region, SPO,
arXiv:2401.16025); Zheng et al. 2025 (trajectory ratio, GSPO, arXiv:2507.18071); Chen et al. 2025 (ratio as a weight,
CISPO, arXiv:2506.13585);
Schulman 2020 (KL estimators, joschu.net/blog/kl-approx.html); Farebrother et al. 2024 (HL-Gauss, arXiv:2403.03950).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from embodied_rl.cells import Aggregate, Level, by_cell, cell_weights, weighted_sum
from embodied_rl.outcome import Outcome, balanced, outcome_objective
from embodied_rl.section import Section
from embodied_rl.types import Batch, Evaluation
from embodied_rl.value_loss import ValueLoss, value_clipped, value_loss

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before exp: beyond it the clip has long decided, and exp would overflow."""


class Kl(Section):
    """Penalty that keeps the policy near a reference (the weights the run started from, or those of the last reset).

    Source: Schulman 2020 (estimators); Hu et al. 2025 (k1 in the reward, k2 in the loss, arXiv:2501.03262); Liu et al.
    2025 (resets, ProRL, arXiv:2505.24864).
    """

    kind: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of KL(current || reference) from d = logp - logp_ref: k1 = d, k2 = d^2/2, k3 = exp(-d) + d - 1."""
    coef: float = Field(0.0, ge=0)
    """Weight; 0 builds no reference policy at all."""
    where: Literal["loss", "reward"] = "loss"
    """loss: added to the loss, per ratio cell; reward: subtracted from the reward of each unit before credit, where k1
    has the gradient of the KL."""
    reset_every: int | None = Field(None, ge=1)
    """Updates after which the policy of the moment becomes the reference and Adam forgets its moments; null never."""

    @model_validator(mode="after")
    def _fits(self) -> Kl:
        if self.kind == "k1" and self.coef > 0 and self.where == "loss":
            raise ValueError(
                f"kind k1 with coef {self.coef} has zero expected gradient as a loss; "
                "choose k2 (gradient of the reverse KL) or k3, or set where: reward"
            )
        for name in ("where", "reset_every"):
            if self.coef == 0 and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) does nothing with coef 0.0: remove it, or set coef above 0"
                )
        return self

    @property
    def in_loss(self) -> bool:
        """Whether the loss has a term for it."""
        return self.coef > 0 and self.where == "loss"


class Loss(Section):
    """The loss of one optimizer step."""

    objective: Literal["ratio", "outcome"] = "ratio"
    """ratio: ratio times advantage within a trust region; outcome: the likelihood of each episode's return of 0 to 1,
    as its log-ratio against the others of its group predicts it (PACS)."""
    outcome: Outcome = Outcome()
    ratio: Level = "decision"
    """What one importance ratio covers."""
    reduce: Literal["sum", "mean"] = "sum"
    """Sum (joint probability) or mean (geometric mean) of log-ratios over the units of a cell."""
    trust: Literal["clip", "weight", "quadratic", "none"] = "clip"
    """clip: PPO's pessimistic clip, which lets go of a ratio once it has left the region; weight: the ratio, kept in
    the region, only weighs the gradient of log pi, so that none is cut off (CISPO); quadratic: a penalty that pulls it
    back (SPO, width clip_low); none: the plain importance-weighted objective."""
    clip_low: float = Field(0.2, gt=0, le=1)
    """The ratio stops helping below 1 - clip_low; 1 sets no lower end."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio stops helping above 1 + clip_high; larger than clip_low lets rare actions grow (DAPO)."""
    dual_clip: float | None = Field(None, gt=1)
    """Upper bound c of the ratio where the advantage is negative; null leaves it unbounded."""
    aggregate: Aggregate = "decision_mean"
    """Which mean a cell's weight comes from (see `cell_weights`)."""
    constant_units: int | None = Field(None, ge=1)
    """Units per trajectory in the denominator of `aggregate: constant` (Dr.GRPO's fixed length)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; larger explores more."""
    value: ValueLoss = ValueLoss()
    kl: Kl = Kl()

    @model_validator(mode="after")
    def _constant_needs_length(self) -> Loss:
        if (self.aggregate == "constant") != (self.constant_units is not None):
            raise ValueError(
                f"aggregate ({self.aggregate}) and constant_units ({self.constant_units}) belong together: "
                "set constant_units to the longest trajectory in units, or choose another aggregate"
            )
        return self

    @model_validator(mode="after")
    def _outcome_is_of_episodes(self) -> Loss:
        form = (self.ratio, self.reduce, self.trust, self.aggregate)
        if self.objective == "outcome" and form != ("trajectory", "sum", "none", "trajectory_mean"):
            raise ValueError(
                f"objective (outcome) scores whole episodes, and ratio, reduce, trust, aggregate are "
                f"{', '.join(form)}: set ratio: trajectory, reduce: sum, trust: none and aggregate: trajectory_mean"
            )
        if self.objective != "outcome" and self.outcome != Outcome():
            raise ValueError(
                f"outcome does nothing with objective ({self.objective}): remove it, or set objective: outcome"
            )
        return self

    @model_validator(mode="after")
    def _nothing_idle(self) -> Loss:
        if self.ratio == "unit" and self.reduce == "mean":
            raise ValueError(
                "reduce (mean) does nothing with ratio (unit), whose cells hold one unit each: "
                "set reduce: sum, or ratio: action, decision or trajectory"
            )
        fields = type(self).model_fields
        used = {
            "clip": ("clip_low", "clip_high", "dual_clip"), "weight": ("clip_low", "clip_high"),
            "quadratic": ("clip_low",), "none": (),
        }  # fmt: skip
        for name in used["clip"]:
            if name not in used[self.trust] and getattr(self, name) != fields[name].default:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) does nothing with trust ({self.trust}): remove it, or set "
                    "trust: clip"
                )
        return self


class LossResult(NamedTuple):
    """What a loss returns."""

    total: Tensor
    """Scalar to call backward on; micro-batches of one step add up."""
    kl: Tensor | None
    """Scalar k3 estimate of KL(old || new), already weighted over the step; None unless `diagnose`."""
    metrics: dict[str, tuple[Tensor, Tensor | float]]
    """name -> (sum, count), or (max, nan) for names that end in _max; empty unless `diagnose`."""


def surrogate(ratio: Tensor, advantage: Tensor, config: Loss) -> tuple[Tensor, Tensor]:
    """Objective of each cell, to be maximised.

    clip:  min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and for A < 0 with dual_clip c: max(that, c A)
    weight:  sg(clip(r, 1 - clip_low, 1 + clip_high)) A, with the gradient of log pi times that
    quadratic:  r A - |A| (r - 1)^2 / (2 clip_low), largest at r = 1 + clip_low sign(A)
    none:  r A

    Args:
        ratio: [N, L] pi / pi_old.
        advantage: [N, 1].
        config: The switches.

    Returns:
        objective: [N, L].
        clipped: [N, L] bool, cells whose gradient the trust region removed (weight: bounded; quadratic: turned round).
    """
    plain = ratio * advantage
    if config.trust == "none":
        return plain, torch.zeros_like(plain, dtype=torch.bool)
    if config.trust == "quadratic":
        beyond = (ratio - 1) * advantage.sign() > config.clip_low
        return plain - advantage.abs() * (ratio - 1).square() / (2 * config.clip_low), beyond
    if config.trust == "weight":
        bounded = ratio.detach().clamp(1 - config.clip_low, 1 + config.clip_high)
        # A ratio over its own value is 1 and has the gradient of log pi.
        return bounded * advantage * (ratio / ratio.detach()), bounded != ratio.detach()
    # No gradient flows through a clipped ratio, so none of it needs a backward pass.
    bounded = ratio.detach().clamp(1 - config.clip_low, 1 + config.clip_high) * advantage
    clipped = bounded < plain
    objective = torch.where(clipped, bounded, plain)
    if config.dual_clip is not None:
        floor = config.dual_clip * advantage
        below = (advantage < 0) & (objective < floor)
        objective = torch.where(below, floor, objective)
        clipped = clipped | below
    return objective, clipped


def kl_estimate(d: Tensor, kind: str) -> Tensor:
    """Per-sample KL estimators from d = logp_p - logp_q of samples of p: k1 = d, k2 = d^2/2, k3 = exp(-d) + d - 1.

    Args:
        d: Any shape.
        kind: "k1", "k2" or "k3".

    Returns:
        kl: Same shape; k3 is never negative.
    """
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    return torch.expm1(-d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) + d


@dataclass(frozen=True)
class LossFunction:
    """The loss of a recipe, ready to be called on micro-batches."""

    config: Loss
    chunk: int
    value_range: tuple[float, float] | None = None

    @property
    def reads_entropy(self) -> bool:
        """Whether a gradient flows through the entropy, so the policy has to compute it."""
        return self.config.entropy_coef != 0

    def skips(self, batch: Batch) -> bool:
        """Whether a decision without an advantage has no gradient at all, so that it need not be evaluated.

        A regulariser or a critic learns from it all the same, and a ratio over the trajectory contains it.
        """
        c = self.config
        learns = c.entropy_coef or c.kl.in_loss or (c.value.coef and batch.target is not None)
        return not learns and c.ratio != "trajectory"

    @property
    def whole_trajectories(self) -> bool:
        """Whether an optimizer step must hold its trajectories whole.

        A mean over trajectories that were torn apart would weigh a long one in every step and a short one in few.
        """
        return self.config.ratio == "trajectory" or self.config.aggregate in ("trajectory_mean", "constant")

    @property
    def actions(self) -> int | None:
        """Actions per decision where each has a ratio of its own, else None."""
        return self.chunk if self.config.ratio == "action" else None

    @property
    def whole_groups(self) -> bool:
        """Whether an optimizer step must hold its groups whole."""
        return self.config.objective == "outcome"

    def weights(
        self, mask: Tensor | None, trajectory: Tensor, num_units: int, advantage: Tensor | None = None
    ) -> Tensor:
        """`cell_weights` with this loss's level and aggregation; the outcome objective balances them by `advantage`."""
        c = self.config
        weight = cell_weights(mask, trajectory, num_units, self.chunk, c.ratio, c.aggregate, c.constant_units)
        if c.objective == "outcome" and c.outcome.balance and advantage is not None:
            return balanced(weight, advantage)
        return weight

    def __call__(self, evaluation: Evaluation, batch: Batch, *, diagnose: bool = False) -> LossResult:
        """Weighted loss of one micro-batch.

        total = - sum_cells w k f(r, A) - entropy_coef sum_cells w H + kl.coef sum_cells w kl
                + value.coef sum_rows w_row value_loss + sum_rows w_row auxiliary,  k = `Batch.correction` or 1

        Args:
            evaluation: The current policy's log-probabilities (and entropy, value) of the batch.
            batch: Rows with their weights.
            diagnose: Also compute the metrics (costs a few small kernels).

        Returns:
            result: Loss, KL estimate and metrics as partial sums.
        """
        c = self.config
        args = (batch.mask, c.ratio, c.reduce, self.chunk, batch.trajectory)
        log_ratio = by_cell(evaluation.logp - batch.logp, *args).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio = log_ratio.exp()
        advantage = batch.advantage if batch.advantage.ndim == 2 else batch.advantage.unsqueeze(-1)
        if c.objective == "outcome":
            assert batch.group is not None
            objective = outcome_objective(log_ratio, advantage, batch.trajectory, batch.group, c.outcome.beta)
            clipped = torch.zeros_like(ratio, dtype=torch.bool)
        else:
            objective, clipped = surrogate(ratio, advantage, c)
        if batch.correction is not None:
            objective = objective * batch.correction
        weight, everywhere = batch.weight, batch.mask is None
        policy = -weighted_sum(objective, weight, everywhere=everywhere)
        total = policy
        entropy = None
        if evaluation.entropy is not None:
            entropy = weighted_sum(by_cell(evaluation.entropy, *args), weight, everywhere=everywhere)
            if c.entropy_coef:
                total = torch.sub(total, entropy, alpha=c.entropy_coef)
        kl_ref = None
        if c.kl.in_loss and batch.logp_ref is not None:
            d = by_cell(evaluation.logp - batch.logp_ref, *args)
            kl_ref = weighted_sum(kl_estimate(d, c.kl.kind), weight, everywhere=everywhere)
            total = torch.add(total, kl_ref, alpha=c.kl.coef)
        critic = None
        if evaluation.value is not None and batch.target is not None and c.value.coef:
            error = value_loss(evaluation, batch, c.value, self.value_range)
            critic = weighted_sum(error, batch.row_weight, everywhere=everywhere)
            total = torch.add(total, critic, alpha=c.value.coef)
        auxiliary = None
        if evaluation.auxiliary is not None:
            auxiliary = weighted_sum(evaluation.auxiliary, batch.row_weight, everywhere=everywhere)
            total = total + auxiliary
        if not diagnose:
            return LossResult(total, None, {})
        with torch.no_grad():
            # Cells sampled from the old policy, so d = logp_old - logp_new estimates KL(old || new).
            k3 = weighted_sum(kl_estimate(-log_ratio, "k3"), weight)
            share = weight.sum()
            metrics: dict[str, tuple[Tensor, Tensor | float]] = {
                "actor/policy_loss": (policy.detach(), share),
                "actor/kl_k1": (weighted_sum(-log_ratio, weight), share),
                "actor/kl_k3": (k3, share),
                "actor/clip_fraction": (weighted_sum(clipped.to(weight.dtype), weight), share),
                "actor/ratio_max": (torch.where(weight > 0, ratio, 1.0).amax(), float("nan")),
            }
            if c.trust == "clip" and c.dual_clip is not None:
                cut = (advantage < 0) & (ratio > c.dual_clip)
                metrics["actor/dual_clip_fraction"] = (weighted_sum(cut.to(weight.dtype), weight), share)
            if entropy is not None:
                metrics["actor/entropy"] = (entropy.detach(), share)
            if kl_ref is not None:
                metrics["actor/kl_to_reference"] = (kl_ref.detach(), share)
            if auxiliary is not None:
                metrics["actor/auxiliary_loss"] = (auxiliary.detach(), batch.row_weight.sum())
            if critic is not None:
                rows = batch.row_weight.sum()
                metrics["critic/loss"] = (critic.detach(), rows)
                if c.value.kind == "clipped":
                    cut = value_clipped(evaluation, batch, c.value.clip).to(weight.dtype)
                    metrics["critic/clip_fraction"] = (weighted_sum(cut, batch.row_weight), rows)
        return LossResult(total, k3, metrics)
