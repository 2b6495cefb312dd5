"""From an advantage to new weights: epochs of minibatches, backward, clip, step, and a stop on non-finite numbers."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from embodied_rl.batch import Flat, as_batch, cuts, flatten, micro_batches, minibatches, with_signal
from embodied_rl.cells import by_cell
from embodied_rl.errors import DivergenceError
from embodied_rl.extra import Extra
from embodied_rl.logp_gap import LogpGap, logp_gap
from embodied_rl.loss import LossFunction, kl_estimate
from embodied_rl.metrics import Partials
from embodied_rl.optimizer import FlatParameters, Muon, Optimizer
from embodied_rl.section import Section
from embodied_rl.types import Advantage, Batch, Policy, Rollout, State

log = logging.getLogger(__name__)

OF_EVERY_EPOCH = ("actor/skipped_updates", "sync/logp_gap_mean", "sync/logp_mended_rate")
"""Metrics that are added up over the epochs of an update; the others are those of its last epoch."""


class Update(Section):
    """How the weights are moved."""

    epochs: int = Field(4, ge=1)
    """Passes over each rollout; more reuse, more drift from the policy that sampled."""
    minibatches: int = Field(4, ge=1)
    """Optimizer steps per epoch."""
    micro_batch: int | None = Field(None, ge=1)
    """Rows per backward pass; saves memory and changes no gradient. null: the whole minibatch at once."""
    micro_units: int | None = Field(None, ge=1)
    """The same as a number of units that count, for rows of very different lengths. A row is never cut."""
    lr: float = Field(3e-4, gt=0)
    """Adam's step size."""
    critic_lr: float | None = Field(None, gt=0)
    """Adam's step size of the critic's own parameters, which are then clipped apart from the others and follow no
    schedule; null: as the others."""
    muon: Muon = Muon()
    """Another way to step for the weights of layers."""
    lr_schedule: Literal["constant", "linear", "adaptive_kl"] = "constant"
    """linear: to 0 at the end of training; adaptive_kl: divided or multiplied by 1.5 to keep the KL near target_kl."""
    lr_warmup: int = Field(0, ge=0)
    """Updates in which the step size rises to its full value, once more after critic_warmup. Adam's first steps are as
    long as any later one, whatever the gradient, and a policy that begins with skills loses some of them there."""
    target_kl: float | None = Field(None, gt=0)
    """KL(old || new) of an epoch; above 1.5 times this the remaining epochs are skipped (adaptive_kl steers to it)."""
    max_grad_norm: float = Field(0.5, gt=0)
    """Gradients longer than this are shortened to it."""
    adam_eps: float = Field(1e-5, gt=0)
    """Adam's epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (AdamW)."""

    critic_warmup: int = Field(0, ge=0)
    """Updates at the start in which advantages count as 0, so that the critic (and self_imitation) learns and the
    objective waits: the critic knows nothing yet of a policy that begins with skills."""
    logp_gap: LogpGap = LogpGap()

    @model_validator(mode="after")
    def _one_budget(self) -> Update:
        if self.micro_batch is not None and self.micro_units is not None:
            raise ValueError(
                f"micro_batch ({self.micro_batch}) and micro_units ({self.micro_units}) are two budgets for one thing: "
                "remove one"
            )
        return self

    @property
    def in_pieces(self) -> bool:
        """Whether optimizer steps are cut."""
        return self.micro_batch is not None or self.micro_units is not None

    @property
    def recomputes_as_it_goes(self) -> bool:
        """Whether the only step of a rollout can take its own log-probabilities for those before the step."""
        gap = self.logp_gap
        return gap.do == "recompute" and gap.above == 0 and self.epochs == self.minibatches == 1

    @model_validator(mode="after")
    def _adaptive_needs_target(self) -> Update:
        if self.lr_schedule == "adaptive_kl" and self.target_kl is None:
            raise ValueError("lr_schedule adaptive_kl needs target_kl (found null): set target_kl, for example 0.01")
        if self.lr_schedule == "adaptive_kl" and self.lr_warmup:
            raise ValueError(
                f"lr_warmup ({self.lr_warmup}) does nothing with lr_schedule (adaptive_kl), which finds the step size "
                "itself: remove it, or set lr_schedule: constant"
            )
        return self


class Updater:
    """The optimizer and everything it remembers."""

    def __init__(
        self, policy: Policy, loss: LossFunction, config: Update, *, seed: int, max_bad_updates: int,
        extras: Sequence[Extra] = (),
    ) -> None:  # fmt: skip
        """Take over a policy's parameters.

        Args:
            policy: A torch module that follows the Policy protocol.
            loss: The recipe's loss.
            config: The recipe's update section.
            seed: Of the shuffle.
            max_bad_updates: Updates in a row without one finite step after which `update` raises.
            extras: What else each optimizer step learns from.
        """
        self.policy, self.loss, self.config = policy, loss, config
        self.max_bad_updates = max_bad_updates
        self.extras = extras
        self.reference: Policy | None = copy.deepcopy(policy) if loss.config.kl.coef else None
        last = "critic" if config.critic_lr else None
        self.parameters = FlatParameters(cast(nn.Module, policy), last=last, muon=config.muon)
        self.optimizer = Optimizer(self.parameters, eps=config.adam_eps, weight_decay=config.weight_decay)
        self.generator = torch.Generator().manual_seed(seed)
        self.lr = config.lr
        self.version = 0
        self.bad_in_a_row = 0
        self._stepped = False
        self._moved = False
        self._problem = ""
        self._warned = False

    def update(self, rollout: Rollout, advantage: Advantage, *, progress: float) -> Partials:
        """Improve the policy with one rollout.

        Args:
            rollout: Collected by the current weights.
            advantage: Its credit.
            progress: Share of the training done, in [0, 1], for the linear schedule.

        Returns:
            metrics: Partial sums; the actor and critic diagnostics are those of the last epoch made.

        Raises:
            DivergenceError: Not one step was finite, or not one episode valid, in `max_bad_updates` updates in a row.
        """
        c = self.config
        if c.lr_schedule != "adaptive_kl":
            # The policy's own first steps come after the critic's warm-up: the ramp begins anew there.
            made = self.version - c.critic_warmup * (self.version >= c.critic_warmup)
            rise = min(1.0, (made + 1) / max(1, c.lr_warmup))
            self.lr = c.lr * rise * (1 - progress if c.lr_schedule == "linear" else 1.0)
        metrics = Partials()
        metrics.maximum("sync/policy_lag_max", float(self.version - rollout.policy_version.min()))
        flat = flatten(rollout, advantage, groups=self.loss.whole_groups, actions=self.loss.actions)
        if len(flat) == 0:
            # Every group was dropped: an update without anything to learn from, and no sign of divergence.
            if bool(rollout.valid.any()):
                self._measure_some(flatten(rollout, Advantage(torch.zeros_like(rollout.reward))), metrics)
            else:
                self._count_failed()
            self.version += 1
            return metrics
        if self.version < c.critic_warmup:
            flat.rows["advantage"] = torch.zeros_like(flat.rows["advantage"])
        if self.reference is not None and self.loss.config.kl.in_loss:
            flat.rows["logp_ref"] = self._logp(self.reference, flat)
        if c.logp_gap.do != "nothing" and not c.recomputes_as_it_goes:
            metrics.merge(self._mend(flat))
        for extra in self.extras:
            metrics.merge(extra.begin(rollout, partial(self._logp, self.policy), self.version))
        self._stepped, self._moved, self._problem = False, False, ""
        for epoch in range(c.epochs):
            diagnose = epoch == c.epochs - 1 or c.target_kl is not None
            epoch_metrics, kl = self._epoch(flat, diagnose)
            if diagnose:
                metrics_of_epoch = epoch_metrics
            metrics.merge(epoch_metrics.only(*OF_EVERY_EPOCH))
            if c.target_kl is not None and kl is not None:
                if c.lr_schedule == "adaptive_kl":
                    self._adapt(kl)
                elif kl > 1.5 * c.target_kl:
                    break
        metrics.merge(metrics_of_epoch.without(*OF_EVERY_EPOCH))
        if self._stepped and metrics.value("sync/logp_gap_mean") is None:  # no decision had an advantage
            self._measure_some(flat, metrics)
        metrics.last("actor/lr", self.lr)
        self._count_bad()
        self.version += 1
        self._reset_reference()
        return metrics

    def remember(self, rollout: Rollout) -> None:
        """Let what else is learned from take note of a rollout after its update."""
        for extra in self.extras:
            extra.end(rollout)

    def penalty(self, rollout: Rollout) -> tuple[Tensor | None, Partials]:
        """What `kl.where: reward` takes from the reward of each unit.

        coef k(d) with d = logp at sampling - logp of the reference, by the estimator k of the recipe.

        Args:
            rollout: Collected by the current weights.

        Returns:
            penalty: [T, B, A], 0 where masked; None when nothing is subtracted.
            metrics: The mean KL per unit.
        """
        kl, metrics = self.loss.config.kl, Partials()
        if self.reference is None or kl.where != "reward":
            return None, metrics
        flat = flatten(rollout, Advantage(torch.zeros_like(rollout.reward)))
        d = torch.zeros_like(rollout.logp)
        d[rollout.valid] = flat.rows["logp"] - self._logp(self.reference, flat)
        counts = rollout.mask & rollout.valid.unsqueeze(-1)
        k = torch.where(counts, kl_estimate(d, kl.kind), torch.zeros_like(d))
        metrics.add("actor/kl_to_reference", float(k.sum()), float(counts.sum()))
        return kl.coef * k, metrics

    def _reset_reference(self) -> None:
        """Every `kl.reset_every` updates begin anew from where the policy stands."""
        every = self.loss.config.kl.reset_every
        if self.reference is not None and every is not None and self.version % every == 0:
            cast(nn.Module, self.reference).load_state_dict(cast(nn.Module, self.policy).state_dict())
            for moment in self.optimizer.moments.values():
                moment.zero_()

    def _epoch(self, flat: Flat, diagnose: bool) -> tuple[Partials, float | None]:
        metrics = Partials()
        c = self.config
        for batch in minibatches(flat, c.minibatches, self.loss, self.generator, in_order=c.in_pieces):
            self._step(batch, metrics, diagnose)
        return metrics, metrics.value("actor/kl_k3") if diagnose else None

    def _step(self, batch: Batch, metrics: Partials, diagnose: bool) -> None:
        """One optimizer step on one minibatch, in micro-batches; rows that can have no gradient are not evaluated."""
        flat, c = self.parameters, self.config
        flat.grad.zero_()
        measure = c.recomputes_as_it_goes or (not self._moved and c.logp_gap.do == "nothing")
        if self.loss.skips(batch):
            everything, batch = batch, with_signal(batch)
            rows = len(everything)
            metrics.add("actor/skipped_rows_rate", float(rows - len(batch)), float(rows))
            if not len(batch) and not self.extras:
                # Nothing to learn from is no divergence, and no reason to follow the momentum of earlier steps.
                self._stepped = True
                return
            if not len(batch) and measure:  # the extras are about to move the weights that sampled
                self._measure(everything, metrics)
        loss = torch.zeros((), device=flat.grad.device)
        parts: list[dict[str, tuple[Tensor, Tensor | float]]] = []
        whole = self.loss.config.ratio == "trajectory"
        pieces = micro_batches(batch, c.micro_batch, whole, c.micro_units) if len(batch) else ()
        for piece in pieces:
            evaluation = self.policy.evaluate(piece.obs, piece.units, entropy=self.loss.reads_entropy or diagnose)
            sampled = piece.logp
            if c.recomputes_as_it_goes:
                piece.logp = evaluation.logp.detach()
            result = self.loss(evaluation, piece, diagnose=diagnose)
            result.total.backward()
            loss = loss + result.total.detach()
            parts.append(result.metrics)
            if c.recomputes_as_it_goes:
                parts.append({"sync/logp_mended_rate": (torch.ones(()), 1.0)})
            if measure:  # the weights are still those that sampled
                parts.append({"sync/logp_gap_mean": logp_gap(evaluation.logp.detach(), sampled, piece.mask)})
        for extra in self.extras:
            for more, told in extra.losses(self.policy, self.generator):
                more.backward()
                loss = loss + more.detach()
                parts.append(told)
        norm = float(torch.linalg.vector_norm(flat.grad))
        if not math.isfinite(norm) or not math.isfinite(float(loss)):
            metrics.add("actor/skipped_updates", 1.0, 0.0)
            self._problem = self._describe(batch, loss)
            return
        self._stepped = self._moved = True
        norm = self._move(norm)
        for name, (total, count) in ((k, v) for part in parts for k, v in part.items()):
            metrics.maximum(name, float(total)) if name.endswith("_max") else metrics.add(
                name, float(total), float(count)
            )
        if diagnose:
            metrics.add("actor/grad_norm", norm, 1.0)
            metrics.add("actor/loss", float(loss), 1.0)

    def _move(self, norm: float) -> float:
        """Clip and step; the length of the gradient that the policy had, without the critic if that learns apart."""
        flat, c = self.parameters, self.config
        muon_lr = (c.muon.lr or 0.0) * self.lr / c.lr  # it follows the same schedule
        if c.critic_lr is None:
            if norm > c.max_grad_norm:
                flat.grad.mul_(c.max_grad_norm / norm)
            self.optimizer.step(self.lr, muon_lr=muon_lr)
            return norm
        lengths = []
        for part in (flat.grad[: flat.border], flat.grad[flat.border :]):
            lengths.append(float(torch.linalg.vector_norm(part)))
            if lengths[-1] > c.max_grad_norm:
                part.mul_(c.max_grad_norm / lengths[-1])
        self.optimizer.step(self.lr, last_lr=c.critic_lr, muon_lr=muon_lr)
        return lengths[0]

    def _describe(self, batch: Batch, loss: Tensor) -> str:
        """What is not finite in a step: the loss, inputs and gradients by name."""
        inputs: dict[str, Tensor | None] = {
            **{f"obs.{k}": v for k, v in batch.obs.items()},
            "units": batch.units, "logp": batch.logp, "advantage": batch.advantage, "target": batch.target,
        }  # fmt: skip
        bad = [
            k
            for k, v in inputs.items()
            if v is not None and v.is_floating_point() and not bool(torch.isfinite(v).all())
        ]
        return (
            f"loss {float(loss):.3g}; non-finite inputs: {', '.join(bad) or 'none'}; "
            f"non-finite gradients: {', '.join(self.parameters.non_finite_gradients()[:8]) or 'none'}"
        )

    def _count_failed(self) -> None:
        """Stop after too many rollouts without one valid episode: no step in them counts, so the run would not end."""
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= self.max_bad_updates:
            raise DivergenceError(
                f"the env's judge or simulator failed in every episode of the last {self.bad_in_a_row} updates, so "
                "there was nothing to learn from; mend it (the warnings above say what failed)"
            )

    def _count_bad(self) -> None:
        """Count updates in a row that changed nothing; one finite step begins the count anew."""
        self.bad_in_a_row = 0 if self._stepped else self.bad_in_a_row + 1
        if self.bad_in_a_row >= self.max_bad_updates:
            raise DivergenceError(
                f"not one optimizer step of the last {self.bad_in_a_row} updates was finite ({self._problem}). "
                "The weights were left as they were; lower algorithm.update.lr, or look at the env if an input is named"
            )
        if self._problem and not self._warned:
            log.warning("update %d skips optimizer steps that are not finite: %s", self.version + 1, self._problem)
        self._warned = bool(self._problem)

    def _adapt(self, kl: float) -> None:
        """Raise or lower the step size so that an update moves the policy by about target_kl.

        Source: the rule of Schulman et al. 2017, section 4, applied to the learning rate.
        """
        c = self.config
        assert c.target_kl is not None
        # The usual range, unless the recipe itself starts outside of it.
        if kl > 2 * c.target_kl:
            self.lr = max(self.lr / 1.5, min(1e-5, c.lr))
        elif kl < 0.5 * c.target_kl:
            self.lr = min(self.lr * 1.5, max(1e-2, c.lr))

    def _logp(self, policy: Policy, flat: Flat) -> Tensor:
        """[N, A] a policy's log-probabilities of all rows, in pieces no larger than those of training."""
        c, units = self.config, flat.rows["logp"].shape[1]
        size = c.micro_batch or -(-len(flat) // c.minibatches)
        borders = cuts(flat.rows.get("mask"), len(flat), units, size, c.micro_units)
        with torch.no_grad():
            parts: Iterable[Flat] = (flat.slice(a, b) for a, b in zip(borders[:-1], borders[1:], strict=True))
            return torch.cat([policy.evaluate(p.full_obs(), p.rows["units"], entropy=False).logp for p in parts])

    def _measure_some(self, flat: Flat, metrics: Partials) -> None:
        """Log the gap over one micro-batch of rows that nothing is learned from."""
        rows = self.config.micro_batch or -(-len(flat) // self.config.minibatches)
        self._measure(as_batch(flat.slice(0, rows), self.loss), metrics)

    def _measure(self, batch: Batch, metrics: Partials) -> None:
        """Log the gap over the first micro-batch of an optimizer step."""
        piece = next(micro_batches(batch, self.config.micro_batch, False, self.config.micro_units))
        with torch.no_grad():
            logp = self.policy.evaluate(piece.obs, piece.units, entropy=False).logp
        total, count = logp_gap(logp, piece.logp, piece.mask)
        metrics.add("sync/logp_gap_mean", float(total), count)

    def _mend(self, flat: Flat) -> Partials:
        """Compare what the sampler said with what training says, and if they are too far apart act as the recipe says.

        Source: Yao et al. 2025 (truncated importance sampling, fengyao.notion.site/off-policy-rl). Differs: the weight
        belongs to a cell of the loss's ratio level, not always to a token.
        """
        c, metrics, rows = self.config.logp_gap, Partials(), flat.rows
        logp, mask = self._logp(self.policy, flat), rows.get("mask")
        total, count = logp_gap(logp, rows["logp"], mask)
        apart = float(total) > c.above * count
        metrics.add("sync/logp_gap_mean", float(total), count)
        metrics.add("sync/logp_mended_rate", float(apart), 1.0)
        if not apart:
            return metrics
        if c.do == "correct":
            loss = self.loss.config
            log_ratio = by_cell(logp - rows["logp"], mask, loss.ratio, loss.reduce, self.loss.chunk, flat.episode)
            rows["correction"] = log_ratio.exp().clamp(max=c.cap)
            counts = self.loss.weights(mask, flat.episode, logp.shape[1]) > 0
            capped = (log_ratio > math.log(c.cap)) & counts
            metrics.add("sync/correction_capped_rate", float(capped.sum()), float(counts.sum()))
        rows["logp"] = logp
        return metrics

    def state_dict(self) -> State:
        """Optimizer moments, generator, step size and counters."""
        state: State = {
            "moments": dict(self.optimizer.moments),
            "generator": self.generator.get_state(),
            "lr": self.lr,
            "version": self.version,
            "bad_in_a_row": self.bad_in_a_row,
        }
        state |= {f"extra {i}": extra.state_dict() for i, extra in enumerate(self.extras)}
        if self.reference is not None:
            state["reference"] = dict(cast(nn.Module, self.reference).state_dict())
        return state

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict`; the policy's own weights are restored by the caller."""
        for name, x in self.optimizer.moments.items():
            x.copy_(state["moments"][name])
        self.generator.set_state(state["generator"])
        for i, extra in enumerate(self.extras):
            extra.load_state_dict(state[f"extra {i}"])
        self.lr, self.version, self.bad_in_a_row = state["lr"], state["version"], state["bad_in_a_row"]
        if self.reference is not None:
            cast(nn.Module, self.reference).load_state_dict(state["reference"])
