"""Every metric that is logged, and partial sums that make means of unequal parts right.

A key is `group/name[_statistic]`, lower case, with the unit in the name where it is not obvious and the estimator in
the name where several exist (`kl_k1`, `kl_k3`). The x axis is `progress/env_steps`. A quantity that was not measured
is absent, never 0. Each key has one row in `METRICS`; `<suite>`, `<task>` and `<term>` stand for any name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from embodied_rl.errors import nearest

Better = Literal["higher", "lower", ""]
Reduction = Literal["mean", "sum", "max", "last"]


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Example: `Metric("actor/kl_k3", "step size of the update", "mean(e^d - 1 - d), ...", "nat", "", "mean")`.
    """

    key: str
    """`group/name`; a part in angle brackets stands for any name."""
    meaning: str
    """One phrase."""
    formula: str
    """How it is computed, "" when the meaning says it all."""
    unit: str
    """Unit; "1" for a share or a ratio, "task" for the env's own reward units."""
    better: Better
    """Direction in which it should move, "" when neither is better by itself."""
    reduction: Reduction
    """How parts of one update (minibatches, copies, ranks) become one number."""


GROUPS: dict[str, str] = {
    "rollout": "Episodes that ended while collecting, with the exploring policy",
    "actor": "The policy's update",
    "critic": "The value function's update",
    "sync": "Distance between the policy that sampled and the one being trained",
    "eval": "Closed-loop evaluation on starts that training never sees",
    "time": "Wall time of the parts of one update",
    "perf": "Speed and memory",
    "progress": "Counters since the start of the run, over resumes",
}
"""Group -> what it is about."""

_R = "ratio r = pi_new / pi_old at the loss's ratio level"
_KL = "d = log pi_old - log pi_new over sampled cells"

_TABLE: tuple[tuple[str, str, str, str, Better, Reduction], ...] = (
    ("rollout/return_mean", "undiscounted return of an episode", "sum of rewards", "task", "higher", "mean"),
    ("rollout/return_std", "spread of the return over episodes", "sample standard deviation", "task", "", "last"),
    ("rollout/length_mean", "length of an episode", "", "control steps", "", "mean"),
    ("rollout/success_once_rate", "episodes in which the goal held at some step", "", "1", "higher", "mean"),
    ("rollout/success_once_rate/<task>", "the same, of one task", "", "1", "higher", "mean"),
    ("rollout/success_at_end_rate", "episodes in which the goal held in the last state", "", "1", "higher", "mean"),
    ("rollout/success_at_end_rate/<task>", "the same, of one task", "", "1", "higher", "mean"),
    ("rollout/return_mean/<task>", "return of one task's episodes", "sum of rewards", "task", "higher", "mean"),
    ("rollout/truncated_rate", "ended episodes that were cut by a time limit", "truncated / ended", "1", "", "mean"),
    ("rollout/invalid_rate", "ended episodes in which the judge or the simulator failed: they are in no other metric "
     "and are not learned from", "failed / (ended, failed ones included)", "1", "lower", "mean"),
    ("rollout/invalid_episodes", "how many those are", "", "episodes", "lower", "sum"),
    ("rollout/reward_<term>_mean", "reward term or diagnostic that the env reports, per control step", "", "task", "",
     "mean"),
    ("rollout/zero_advantage_groups", "groups of equal returns: they carry no signal", "", "1", "lower", "mean"),
    ("rollout/task_probability/<task>", "how likely the curriculum starts this task in the next rollout",
     "(p (1 - p) + floor) / sum over tasks, p the running success rate", "1", "", "last"),
    ("rollout/start_success_mean", "running success rate, mean over the curriculum's starts", "", "1", "higher",
     "last"),
    ("rollout/group_size_max", "copies of the start that got most of the budget", "", "copies", "", "last"),
    ("rollout/after_success_rate", "decisions that began after success and are not learned from", "", "1", "", "mean"),
    ("rollout/relabelled_decisions", "decisions of failures that did what another instruction asks for", "",
     "decisions", "", "last"),
    ("rollout/imitated_decisions", "decisions self-imitation draws from: of solved episodes, and relabelled ones", "",
     "decisions", "higher", "last"),
    ("rollout/replayed_decisions", "decisions of good episodes of earlier rollouts, which replay draws from", "",
     "decisions", "", "last"),
    ("rollout/demonstrated_starts", "starts whose demonstration is learned from", "", "starts", "", "last"),
    ("rollout/attempts", "rollouts that dynamic sampling collected for this update", "", "rollouts", "lower", "last"),
    ("rollout/hinted_groups", "groups that nobody solved: played again with a hint", "", "1", "lower", "mean"),
    ("rollout/progress_at_failure_mean", "progress in the last state of failed episodes, by the reward model", "", "1",
     "higher", "mean"),
    ("rollout/progress_reward_mean", "what the reward model added to the env's reward, per decision", "", "task", "",
     "mean"),
    ("rollout/majority_share", "members of a group that came to its most frequent result", "", "1", "", "mean"),
    ("rollout/majority_right_rate", "groups whose most frequent result is a success; no reward reads it", "", "1",
     "higher", "mean"),
    ("rollout/progress_judged_rate", "episodes that the reward model could judge", "", "1", "higher", "mean"),
    ("rollout/episodes", "episodes that ended in this rollout", "", "episodes", "", "sum"),
    ("actor/loss", "total loss that is minimised, critic and regularisers included", "", "", "", "mean"),
    ("actor/policy_loss", "surrogate objective, negated", f"-mean(trust region(r, A)); {_R}", "", "", "mean"),
    ("actor/auxiliary_loss", "what the policy learns besides, such as predicting what only a simulator knows",
     "by policy, times its own weight", "", "lower", "mean"),
    ("actor/imitation_loss", "the policy's own loss on demonstrated actions",
     "cross-entropy of tokens, or squared error of velocities or noise", "", "lower", "mean"),
    ("actor/entropy", "entropy of one ratio cell (unit, action, ...) of the policy", "-E[log pi]", "nat", "", "mean"),
    ("actor/kl_k1", "KL(old || new), plain estimator", f"mean(d); {_KL}", "nat", "", "mean"),
    ("actor/kl_k3", "KL(old || new), low-variance estimator, never negative", f"mean(e^-d - 1 + d); {_KL}", "nat", "",
     "mean"),
    ("actor/ratio_max", "largest ratio of a cell that counts", f"max(r); {_R}", "1", "", "max"),
    ("actor/clip_fraction", "cells whose gradient the trust region cut off", "", "1", "", "mean"),
    ("actor/dual_clip_fraction", "cells cut by the dual clip (negative advantage, huge ratio)", "", "1", "", "mean"),
    ("actor/grad_norm", "length of the gradient before clipping, all parameters", "L2 norm", "", "", "mean"),
    ("actor/lr", "step size of the optimizer", "", "", "", "last"),
    ("actor/kl_to_reference", "KL(new || reference)", "estimator of the recipe (k1, k2 or k3)", "nat", "", "mean"),
    ("actor/skipped_updates", "optimizer steps skipped: loss or gradient not finite", "", "steps", "lower", "sum"),
    ("actor/self_imitation_loss", "imitation loss of own solved episodes, before its coefficient",
     "by policy: cross-entropy, squared error of the velocity", "", "lower", "mean"),
    ("actor/replay_loss", "surrogate objective of replayed decisions, negated, times its coefficient", "", "", "",
     "mean"),
    ("actor/replay_clip_fraction", "cells of replayed decisions whose gradient the trust region cut off", "", "1", "",
     "mean"),
    ("actor/demonstration_logp", "log-probability of a demonstrated unit", "mean(log pi)", "nat", "higher", "mean"),
    ("actor/skipped_rows_rate", "decisions without an advantage, which were not evaluated because nothing could learn "
     "from them; the other metrics of the update are then over the rest", "", "1", "", "mean"),
    ("critic/loss", "value loss before its coefficient", "", "", "lower", "mean"),
    ("critic/explained_variance", "share of the targets' variance that the values explain, before the update",
     "1 - var(target - value) / var(target)", "1", "higher", "mean"),
    ("critic/value_mean", "critic's estimate while sampling", "", "scaled return", "", "mean"),
    ("critic/target_mean", "what the critic is regressed to", "", "scaled return", "", "mean"),
    ("critic/clip_fraction", "values whose gradient the clipped value loss cut off", "", "1", "", "mean"),
    ("sync/policy_lag_max", "age of the oldest decision in the batch", "version trained - version that sampled",
     "updates", "lower", "max"),
    ("sync/logp_gap_mean", "log-probability at sampling versus recomputed by the learner, same weights",
     "mean |logp_sampled - logp_learner|", "nat", "lower", "mean"),
    ("sync/logp_mended_rate", "updates whose gap was above update.logp_gap.above", "", "1", "lower", "mean"),
    ("sync/correction_capped_rate", "cells whose importance weight was cut to update.logp_gap.cap", "", "1", "lower",
     "mean"),
    ("eval/<suite>/success_rate", "episodes in which the goal held at some step (once)", "", "1", "higher", "mean"),
    ("eval/<suite>/success_low95", "lower end of its 95 % interval", "Wilson", "1", "higher", "last"),
    ("eval/<suite>/success_high95", "upper end of its 95 % interval", "Wilson", "1", "higher", "last"),
    ("eval/<suite>/success_at_end_rate", "episodes whose goal held in the last state", "", "1", "higher", "mean"),
    ("eval/<suite>/return_mean", "undiscounted return of an episode", "sum of rewards", "task", "higher", "mean"),
    ("eval/<suite>/length_mean", "length of an episode", "", "control steps", "", "mean"),
    ("eval/<suite>/episodes", "episodes evaluated", "", "episodes", "", "sum"),
    ("eval/<suite>/invalid", "episodes in which the judge or the simulator failed, which count in no rate or mean", "",
     "episodes", "lower", "sum"),
    ("eval/<suite>/invalid/<task>", "the same, of one task", "", "episodes", "lower", "sum"),
    ("eval/<suite>/success_rate/<task>", "success once, of one task", "", "1", "higher", "mean"),
    ("eval/<suite>/success_low95/<task>", "lower end of its 95 % interval", "Wilson", "1", "higher", "last"),
    ("eval/<suite>/success_high95/<task>", "upper end of its 95 % interval", "Wilson", "1", "higher", "last"),
    ("eval/<suite>/success_at_end_rate/<task>", "success at the end, of one task", "", "1", "higher", "mean"),
    ("eval/<suite>/return_mean/<task>", "return of one task's episodes", "sum of rewards", "task", "higher", "mean"),
    ("eval/<suite>/length_mean/<task>", "length of one task's episodes", "", "control steps", "", "mean"),
    ("eval/<suite>/episodes/<task>", "episodes evaluated, of one task", "", "episodes", "", "sum"),
    ("time/rollout_s", "collecting: env and policy", "", "s", "lower", "sum"),
    ("time/advantage_s", "credit assignment", "", "s", "lower", "sum"),
    ("time/update_s", "losses, gradients and optimizer steps", "", "s", "lower", "sum"),
    ("time/evaluate_s", "evaluation", "", "s", "lower", "sum"),
    ("time/checkpoint_s", "writing the checkpoint that followed the update before", "", "s", "lower", "sum"),
    ("time/total_s", "since the start of the run, over resumes", "", "s", "", "last"),
    ("perf/env_steps_per_s", "training speed, updates included",
     "control steps of all copies / (rollout_s + advantage_s + update_s)", "steps/s", "higher", "last"),
    ("perf/decisions_per_s", "policy calls per second, updates included", "", "decisions/s", "higher", "last"),
    ("perf/worker_restarts", "processes of isolated simulators that were lost and started again, of this rollout", "",
     "processes", "lower", "sum"),
    ("perf/memory_mib", "largest resident memory of the process so far", "", "MiB", "lower", "max"),
    ("progress/update", "finished updates", "", "updates", "", "last"),
    ("progress/env_steps", "control steps learned from, over all copies: the x axis",
     "simulated ones; when imitating, frames of demonstrations with repetitions", "control steps", "", "last"),
    ("progress/optimizer_steps", "optimizer steps of a run that imitates", "", "steps", "", "last"),
    ("progress/decisions", "policy calls over all copies", "", "decisions", "", "last"),
    ("progress/episodes", "episodes that ended", "", "episodes", "", "last"),
    ("progress/non_finite_metrics", "keys of this row that were NaN or infinite (written as null)", "", "keys", "lower",
     "last"),
)  # fmt: skip

METRICS: dict[str, Metric] = {row[0]: Metric(*row) for row in _TABLE}
"""Key pattern -> its row."""

_PATTERNS = [
    (re.compile(re.sub(r"<task>", r".+", re.sub(r"<(suite|term)>", r"[^/]+", key))), metric)
    for key, metric in METRICS.items()
    if "<" in key
]


@lru_cache(maxsize=4096)
def find(key: str) -> Metric | None:
    """Return the row that describes a logged key, or None."""
    if key in METRICS and "<" not in key:
        return METRICS[key]
    return next((metric for pattern, metric in _PATTERNS if pattern.fullmatch(key)), None)


def check_keys(keys: Iterable[str]) -> None:
    """Refuse keys that have no row in the table.

    Raises:
        KeyError: Names every such key and its nearest known one.
    """
    unknown = [f"'{k}'{nearest(k, METRICS)}" for k in keys if find(k) is None]
    if unknown:
        raise KeyError(f"metrics without a row in METRICS: {'; '.join(unknown)}")


def deterministic(row: Mapping[str, float | None]) -> dict[str, float | None]:
    """A row without wall time and speed: what two runs of equal seed share bit for bit."""
    return {k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))}


class Partials:
    """Metrics as parts that can be merged: (sum, count), maximum, last.

    Example: `add("actor/entropy", 6.0, 3)` and `add("actor/entropy", 1.0, 1)` reduce to 7 / 4 = 1.75, not to the mean
    of the means (1.5).
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._maxima: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        """Add a part of a mean, or of a sum where the table says so (the count is then not read)."""
        s, n = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (s + float(total), n + float(count))

    def merge_pairs(self, parts: Mapping[str, tuple[float, float]]) -> None:
        """Add many (sum, count) parts."""
        for name, (total, count) in parts.items():
            self.add(name, total, count)

    def maximum(self, name: str, value: float) -> None:
        """Raise a maximum; NaN wins, so that it is not hidden."""
        old = self._maxima.get(name, -math.inf)
        self._maxima[name] = old if math.isnan(old) or old >= value else float(value)

    def last(self, name: str, value: float) -> None:
        """Set a value that replaces the earlier one."""
        self._last[name] = float(value)

    def merge(self, other: Partials) -> None:
        """Add another's parts; its last values win."""
        self.merge_pairs(other._sums)
        for name, value in other._maxima.items():
            self.maximum(name, value)
        self._last.update(other._last)

    def only(self, *names: str) -> Partials:
        """A copy with these names only."""
        return self._filtered(lambda name: name in names)

    def without(self, *names: str) -> Partials:
        """A copy without these names."""
        return self._filtered(lambda name: name not in names)

    def value(self, name: str) -> float | None:
        """One reduced metric; None when nothing was added or its count is 0."""
        return self.reduce().get(name)

    def reduce(self) -> dict[str, float]:
        """Turn the parts into numbers.

        Returns:
            row: name -> value; a mean of nothing (count 0) is absent.
        """
        row: dict[str, float] = {}
        for name, (total, count) in self._sums.items():
            metric = find(name)
            if metric is not None and metric.reduction == "sum":
                row[name] = total
            elif count != 0:
                row[name] = total / count
        return row | self._maxima | self._last

    def _filtered(self, keep: Callable[[str], bool]) -> Partials:
        new = Partials()
        new._sums = {k: v for k, v in self._sums.items() if keep(k)}
        new._maxima = {k: v for k, v in self._maxima.items() if keep(k)}
        new._last = {k: v for k, v in self._last.items() if keep(k)}
        return new


def metrics_markdown() -> str:
    """The table as the documentation page `docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "Generated from `METRICS` in `embodied_rl/metrics.py`; do not edit.",
        "",
        "`metrics.jsonl` has one JSON object per update. A quantity that was not measured is absent, never 0.",
        "A measured quantity that is NaN or infinite is `null`, and `progress/non_finite_metrics` counts such keys.",
        "The x axis is `progress/env_steps`. `<suite>`, `<task>` and `<term>` stand for any name.",
        "Two runs of equal recipe and seed agree bit for bit on every key except `time/` and `perf/`.",
        "Reduction says how parts of one update (minibatches, copies, processes) become one number.",
    ]
    for group, about in GROUPS.items():
        lines += ["", f"## {group}/", "", f"{about}.", ""]
        lines += ["| key | meaning | formula | unit | better | reduction |", "|---|---|---|---|---|---|"]
        for m in METRICS.values():
            if m.key.startswith(f"{group}/"):
                cells = (f"`{m.key}`", m.meaning, m.formula, m.unit, m.better or "–", m.reduction)
                lines.append("| " + " | ".join(c.replace("|", "\\|") or "–" for c in cells) + " |")
    return "\n".join(lines) + "\n"
