"""From a rollout [T, B] to minibatches [N]: flatten, shuffle, weigh, slice.

The weights of an optimizer step are counted here, over all its rows, before the first micro-batch is cut from it.
Trajectories stay whole where the ratio or the mean covers a trajectory; otherwise decisions are shuffled one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from embodied_rl.cells import cell_weights
from embodied_rl.loss import LossFunction
from embodied_rl.types import FEATURES, Advantage, Batch, Obs, Rollout

LAZY_BYTES = 256 * 2**20
"""Observations larger than this are gathered minibatch by minibatch instead of shuffled as a whole."""


@dataclass
class Flat:
    """All decisions of a rollout that are learned from as rows."""

    obs: Obs
    """name -> [N, ...]"""
    constants: Obs
    """name -> [E, ...]"""
    episode: Tensor
    """[N] int64 row of `constants`, and the trajectory of the decision."""
    rows: dict[str, Tensor]
    """units, logp, advantage, and where present mask, target, value, logp_ref, correction: [N, ...]."""

    def __len__(self) -> int:
        return len(self.episode)

    def take(self, index: Tensor) -> Flat:
        """Rows in a new order."""
        return Flat(
            {k: v.index_select(0, index) for k, v in self.obs.items()},
            self.constants,
            self.episode.index_select(0, index),
            {k: v.index_select(0, index) for k, v in self.rows.items()},
        )

    def split(self, sizes: list[int]) -> Iterator[Flat]:
        """Consecutive windows of these sizes, without copying; cheaper than one `slice` each."""
        obs, rows = ({k: v.split(sizes) for k, v in x.items()} for x in (self.obs, self.rows))
        for i, episode in enumerate(self.episode.split(sizes)):
            yield Flat({k: v[i] for k, v in obs.items()}, self.constants, episode, {k: v[i] for k, v in rows.items()})

    def slice(self, start: int, stop: int) -> Flat:
        """A window of consecutive rows, without copying."""
        return Flat(
            {k: v[start:stop] for k, v in self.obs.items()},
            self.constants,
            self.episode[start:stop],
            {k: v[start:stop] for k, v in self.rows.items()},
        )

    def full_obs(self) -> Obs:
        """Observations of the rows with the per-episode entries put back."""
        return {**self.obs, **{k: v.index_select(0, self.episode) for k, v in self.constants.items()}}


def flatten(rollout: Rollout, advantage: Advantage, *, groups: bool = False, actions: int | None = None) -> Flat:
    """Turn the decisions that are learned from into rows, copy by copy within each decision index.

    Args:
        rollout: [T, B].
        advantage: [T, B] or [T, B, A].
        groups: Tell the group of each row.
        actions: How many a decision has, where each has a ratio of its own: those that would have begun after the end
            of the episode were never taken, and do not count.

    Returns:
        flat: N = number of decisions that count. The mask is left out when every unit counts. Where the policy gave
            features, they stand for the observation.
    """
    counts = rollout.valid if advantage.counts is None else advantage.counts
    index = None if bool(counts.all()) else counts.flatten().nonzero().squeeze(-1)

    def rows(x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        return x if index is None else x.index_select(0, index)

    columns = {"units": rows(rollout.units), "logp": rows(rollout.logp), "advantage": rows(advantage.advantage)}
    if advantage.target is not None:
        columns["target"] = rows(advantage.target)
    if rollout.value is not None:
        columns["value"] = rows(rollout.value)
    if groups:
        columns["group"] = rows(rollout.group)
    mask = rows(rollout.mask)
    # A policy's own backward pass would spread a NaN left in a masked unit to all its weights.
    # Integers cannot be NaN, and their PAD tells where a row ends.
    if columns["units"].is_floating_point() and not bool(mask.all()):
        counts = mask.view(*mask.shape, *[1] * (columns["units"].ndim - 2))
        columns["units"] = columns["units"].masked_fill(~counts, 0)
    if actions is not None:
        # Their units stay as they are: others of the decision may have been sampled after looking at them.
        mask = mask & rows(_taken(rollout, actions))
    if not bool(mask.all()):
        columns["mask"] = mask
    if rollout.features is not None:
        return Flat({FEATURES: rows(rollout.features)}, {}, rows(rollout.episode), columns)
    return Flat({k: rows(v) for k, v in rollout.obs.items()}, rollout.constants, rows(rollout.episode), columns)


def _taken(rollout: Rollout, actions: int) -> Tensor:
    """[T, B, A] bool, units of actions that had begun before the episode ended."""
    units = torch.arange(rollout.mask.shape[-1], device=rollout.steps.device)
    begins = units // (len(units) // actions) * (rollout.chunk // actions)
    return begins < rollout.steps.unsqueeze(-1)


def observed(rollout: Rollout) -> Obs | None:
    """What `Policy.observe` may learn from: the observations of the valid decisions, where they are finite.

    One NaN would stay in a running mean for good.

    Args:
        rollout: [T, B].

    Returns:
        obs: name -> [N, ...], per-episode entries put back; None when no row is left.
    """
    rows = {k: v.flatten(0, 1) for k, v in rollout.obs.items()}
    rows |= {k: v.index_select(0, rollout.episode.flatten()) for k, v in rollout.constants.items()}
    keep = rollout.valid.flatten()
    for x in rows.values():
        if x.is_floating_point():
            finite = torch.isfinite(x)
            keep = keep if bool(finite.all()) else keep & finite.reshape(len(x), -1).all(1)
    if bool(keep.all()):
        return rows
    return {k: v[keep] for k, v in rows.items()} if bool(keep.any()) else None


def minibatches(
    flat: Flat, count: int, loss: LossFunction, generator: torch.Generator, *, in_order: bool = False
) -> Iterator[Batch]:
    """One epoch: every row exactly once, in `count` optimizer steps of nearly equal size.

    Args:
        flat: The rows.
        count: Optimizer steps per epoch; fewer when there are fewer rows or trajectories.
        loss: Decides whether trajectories stay whole, and the weights.
        generator: CPU generator of the shuffle.
        in_order: Lay the rows of a step in the order of collection, in which copies that saw the same are neighbours:
            where the step is cut into pieces, a policy can then compute what they share once.

    Yields:
        batch: With weights that add up to 1 over the batch.
    """
    whole = loss.whole_trajectories or loss.whole_groups
    together = flat.rows["group"] if loss.whole_groups else flat.episode
    order, borders = _shuffle(together, count, whole, generator)
    lazy = sum(v.nbytes for v in flat.obs.values()) > LAZY_BYTES
    sizes = [stop - start for start, stop in zip(borders[:-1], borders[1:], strict=True)]
    if in_order:
        steps = [rows.sort().values for rows in order.split(sizes)]
        if whole:
            steps = [rows[together[rows].argsort(stable=True)] for rows in steps]
        order = torch.cat(steps)
    parts = (flat.take(rows) for rows in order.split(sizes)) if lazy else flat.take(order).split(sizes)
    for part in parts:
        yield as_batch(part, loss)


def as_batch(part: Flat, loss: LossFunction) -> Batch:
    """The rows of one optimizer step with their weights, counted over exactly these rows."""
    r = part.rows
    n = len(part)
    weight = loss.weights(r.get("mask"), part.episode, r["logp"].shape[1], r["advantage"])
    if "target" in r and r["target"].ndim == 2:
        row_weight = cell_weights(r.get("mask"), part.episode, r["logp"].shape[1], loss.chunk, "unit", "unit_mean")
    else:
        row_weight = torch.full((n,), 1.0 / n, device=part.episode.device)
    return Batch(
        part.full_obs(), r["units"], r["logp"], r.get("mask"), r["advantage"], r.get("target"), r.get("value"),
        weight, row_weight, part.episode, r.get("logp_ref"), r.get("group"), r.get("correction"),
    )  # fmt: skip


def with_signal(batch: Batch) -> Batch:
    """The rows whose advantage is not exactly 0, with the weights they had among all rows of the optimizer step."""
    rows = (batch.advantage.view(len(batch), -1) != 0).any(1).nonzero().squeeze(-1)
    if len(rows) == len(batch):
        return batch
    fields = {k: (v[rows] if isinstance(v, Tensor) else v) for k, v in vars(batch).items() if k != "obs"}
    return Batch(obs={k: v.index_select(0, rows) for k, v in batch.obs.items()}, **fields)


def micro_batches(
    batch: Batch, size: int | None, whole_trajectories: bool, units: int | None = None
) -> Iterator[Batch]:
    """Cut an optimizer step into pieces that fit in memory; the weights stay those of the whole step.

    Args:
        batch: The step.
        size: Rows per piece; None for one piece.
        whole_trajectories: Cut only between trajectories (groups, where the batch has them), so a piece may be larger
            than `size`.
        units: Units that count per piece, in place of `size`; a single row may have more.

    Yields:
        piece: Consecutive rows.
    """
    starts = None
    if whole_trajectories:
        together = batch.trajectory if batch.group is None else batch.group
        starts = [0, *((together.diff() != 0).nonzero().squeeze(-1) + 1).tolist()]
    borders = cuts(batch.mask, len(batch), batch.logp.shape[1], size, units, starts)
    if len(borders) == 2:
        yield batch
        return
    for a, b in zip(borders[:-1], borders[1:], strict=True):
        cut = slice(a, b)
        fields = {k: (v[cut] if isinstance(v, Tensor) else v) for k, v in vars(batch).items() if k != "obs"}
        yield Batch(obs={k: v[cut] for k, v in batch.obs.items()}, **fields)


def cuts(
    mask: Tensor | None, rows: int, num_units: int, size: int | None, units: int | None, starts: list[int] | None = None
) -> list[int]:
    """Borders of pieces of consecutive rows within a budget.

    Args:
        mask: [N, A] bool, units that count; None for all.
        rows: N.
        num_units: A.
        size: Budget in rows.
        units: Budget in units that count, in place of `size`.
        starts: Rows where a cut is allowed, beginning with 0; None for all.

    Returns:
        borders: 0, ..., N. A piece holds as much as fits, and at least what lies between two allowed cuts.
    """
    budget = units if units is not None else size
    if budget is None:
        return [0, rows]
    cost = [1] * rows if units is None else [num_units] * rows if mask is None else mask.sum(1).tolist()
    allowed = list(range(rows)) if starts is None else starts
    borders, used = [0], 0
    for a, b in zip(allowed, [*allowed[1:], rows], strict=True):
        more = sum(cost[a:b])
        if a > borders[-1] and used + more > budget:
            borders.append(a)
            used = 0
        used += more
    return [*borders, rows]


def _shuffle(together: Tensor, count: int, whole: bool, generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """Order of the rows [N] and the borders of the minibatches [count + 1]; `whole` keeps equal ids [N] `together`."""
    n = len(together)
    if not whole:
        count = min(count, n)
        order = torch.randperm(n, generator=generator).to(together.device)
        return order, [round(i * n / count) for i in range(count + 1)]
    ids, inverse = torch.unique(together, return_inverse=True)
    rank = torch.randperm(len(ids), generator=generator).to(together.device)
    order = torch.argsort(rank[inverse], stable=True)
    lengths = torch.bincount(rank[inverse], minlength=len(ids)).cumsum(0).tolist()
    count = min(count, len(ids))
    cuts = [round(i * len(ids) / count) for i in range(1, count)]
    return order, [0, *(lengths[c - 1] for c in cuts), n]
