"""Generation: what rows have in common, a context and then the same first tokens, is computed once.

A line of the cache is written for all rows that have said the same so far. It splits where they part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from embodied_rl.policies.causal_lm.pack import Packed, lengths
from embodied_rl.types import PAD

SHELF = 256
"""Width of the first of two steps in which a token is looked up by its cumulative probability."""
LEAVE = 0.9
"""Where no line splits, the cache is made smaller when this share of its lines, or less, is still being written."""


@dataclass
class Cache:
    """Keys and values of G contexts and of what n lines have written since, layer by layer."""

    contexts: Tensor
    """[G] int64, length of each."""
    group: Tensor
    """[n] int64, context of each line, ascending."""
    written: int = 0
    """Tokens that every line has."""
    shared: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Per layer keys and values [G, Hk, P, d]."""
    own: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Per layer keys and values [n, Hk, room, d]."""
    longest: int = 0
    """See `Packed.longest`."""

    def __post_init__(self) -> None:
        self._arrange()

    def _arrange(self) -> None:
        """Give each line a seat [G, S] beside the others of its context."""
        count = torch.bincount(self.group, minlength=len(self.contexts))
        seats = int(count.max())
        rank = torch.arange(len(self.group), device=self.group.device) - (count.cumsum(0) - count)[self.group]
        self.seat = self.group * seats + rank
        self.seats = seats
        self.full = len(self.group) == len(self.contexts) * seats
        places = torch.arange(int(self.contexts.max()), device=self.contexts.device)
        beyond = places >= self.contexts[self.group][:, None]
        self.hide = beyond[:, None, None] if bool(beyond.any()) else None  # [n, 1, 1, P]

    def _by_context(self, x: Tensor) -> Tensor:
        """[n, Hk, R, d] as [G, Hk, S * R, d]."""
        n, hk, r, d = x.shape
        if not self.full:
            x = x.new_zeros(len(self.contexts) * self.seats, hk, r, d).index_copy_(0, self.seat, x)
        return x.view(-1, self.seats, hk, r, d).transpose(1, 2).reshape(-1, hk, self.seats * r, d)

    def _by_row(self, x: Tensor) -> Tensor:
        """[G, Hk, S * R, d] as [n, Hk, R, d]."""
        g, hk, _, d = x.shape
        x = x.view(g, hk, self.seats, -1, d).transpose(1, 2).reshape(g * self.seats, hk, -1, d)
        return x if self.full else x.index_select(0, self.seat)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of one new token per line.

        Args:
            layer: Which.
            query: [n, H, d].
            key: [n, Hk, d], kept.
            value: [n, Hk, d], kept.
            scaling: Factor of the scores.

        Returns:
            out: [n, H * d].
        """
        (far_k, far_v), (near_k, near_v), t = self.shared[layer], self.own[layer], self.written
        near_k[:, :, t], near_v[:, :, t] = key, value
        near_k, near_v = near_k[:, :, : t + 1], near_v[:, :, : t + 1]
        n, hk, d = key.shape
        q = query.view(n, hk, -1, d).to(far_k.dtype) * scaling
        far = self._by_row(self._by_context(q) @ far_k.transpose(2, 3))
        if self.hide is not None:
            far = far.masked_fill(self.hide, float("-inf"))
        p = torch.softmax(torch.cat([far, q @ near_k.transpose(2, 3)], dim=-1).float(), dim=-1).to(far_v.dtype)
        far_p, near_p = p.split([far.shape[-1], t + 1], dim=-1)
        out = self._by_row(self._by_context(far_p) @ far_v) + near_p @ near_v
        return out.reshape(n, -1)

    def make_room(self, length: int) -> None:
        """Room for the next token, doubled when there is none, up to `length`."""
        room = self.own[0][0].shape[2] if self.own else 0
        if self.written < room:
            return
        more = min(max(32, room), max(length - room, 1))
        if not self.own:
            empty = [(k.new_empty(len(self.group), k.shape[1], 0, k.shape[3]),) * 2 for k, _ in self.shared]
            self.own = empty
        self.own = [
            (torch.cat([k, k.new_zeros(*k.shape[:2], more, k.shape[3])], dim=2),
             torch.cat([v, v.new_zeros(*v.shape[:2], more, v.shape[3])], dim=2))
            for k, v in self.own
        ]  # fmt: skip

    def go_on(self, before: Tensor) -> None:
        """Take m lines that continue the lines `before` [m] (ascending, equal where one splits); forget the others."""
        self.own = [(k.index_select(0, before), v.index_select(0, before)) for k, v in self.own]
        left, self.group = torch.unique(self.group[before], return_inverse=True)
        if len(left) < len(self.contexts):
            self.contexts = self.contexts[left]
            longest = int(self.contexts.max())
            self.shared = [(k[left, :, :longest], v[left, :, :longest]) for k, v in self.shared]
        self._arrange()


@dataclass
class Prefill:
    """Attention within the contexts, which also puts their keys and values into a cache."""

    packed: Packed
    cache: Cache
    longest: int = 0
    """See `Packed.longest`."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """See `Packed.attend`."""
        count = self.cache.contexts
        beyond = torch.arange(int(count.max()), device=count.device) >= count[:, None]
        at = self.packed.contexts[:, : beyond.shape[1]].masked_fill(beyond, 0)
        # Small products of bf16 matrices are slower on a CPU than those of float32.
        dtype = torch.float32 if key.device.type == "cpu" else value.dtype
        rows = [x.to(dtype)[at].transpose(1, 2).contiguous() for x in (key, value)]
        assert layer == len(self.cache.shared), "layers must attend in order"
        self.cache.shared.append((rows[0], rows[1]))
        return self.packed.attend(layer, query, key, value, scaling)


class Written(NamedTuple):
    """What was generated for B rows."""

    units: Tensor
    """[B, L] int64 with PAD."""
    logp: Tensor
    """[B, L], 0 at PAD."""
    hidden: Tensor | None
    """[B, L, D], the states that each token was drawn from; None unless asked for."""


class Narrowing(NamedTuple):
    """How each of B rows is sampled."""

    temperature: Tensor
    """[B] float32, divides the logits on top of what they were divided by already."""
    top_k: Tensor
    """[B] int64, likeliest tokens that may be drawn; 0 for all."""
    top_p: Tensor
    """[B] float32, sum of probabilities at which no further token may be drawn; 1 for all."""

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Logits [n, V] of these rows [n], -inf where a token may not be drawn: top_k first, then top_p of the rest.

        Of equally likely tokens the one of the lower id comes first; the likeliest token always stays.
        """
        z = logits / self.temperature[rows, None]
        k, p = self.top_k[rows, None], self.top_p[rows, None]
        if bool((k == 0).all()) and bool((p >= 1).all()):
            return z
        ranked, order = z.sort(dim=-1, descending=True, stable=True)
        place = torch.arange(z.shape[1], device=z.device)
        ranked = ranked.masked_fill((k > 0) & (place >= k), float("-inf"))
        share = ranked.softmax(-1)
        # What comes before a token, itself not counted: below top_p it is still needed.
        ranked = ranked.masked_fill((share.cumsum(-1) - share >= p) & (p < 1), float("-inf"))
        return torch.empty_like(z).scatter_(1, order, ranked)


def sample(logits: Tensor, line: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Draw one token per row by its cumulative probability.

    Args:
        logits: [m, V] float32, of each line; overwritten.
        line: [n] int64, the line of each row: rows that have said the same so far share one.
        uniform: [n] float64 in [0, 1), one number decides one token; None takes the likeliest.

    Returns:
        ids: [n] int64.
        logp: [n] float32.
    """
    top, best = logits.max(-1, keepdim=True)
    p = logits.sub_(top)
    if uniform is None:
        return best.squeeze(-1)[line], -p.logsumexp(-1)[line]
    m, v = p.shape
    if v % SHELF:
        p = torch.nn.functional.pad(p, (0, SHELF - v % SHELF), value=float("-inf"))
    # One pass for the sums of shelves, then one shelf per row: half a pass less than a cumulative sum over all.
    shelves = p.exp().view(m, -1, SHELF)
    sums = shelves.sum(-1).double().cumsum(-1)[line]
    total = sums[:, -1:]
    target = uniform.clamp(max=1 - 1e-12)[:, None] * total
    shelf = torch.searchsorted(sums, target, right=True).clamp(max=sums.shape[1] - 1)
    rest = target - torch.where(shelf > 0, sums.gather(1, (shelf - 1).clamp(min=0)), 0.0)
    inner = shelves[line, shelf.squeeze(1)].double().cumsum(-1)
    rest = torch.minimum(rest, inner[:, -1:] * (1 - 1e-12))
    ids = (shelf * SHELF + torch.searchsorted(inner, rest, right=True)).squeeze(1)
    return ids, (p[line, ids] - total.squeeze(1).log()).float()


def generate(
    hidden: Callable[[Tensor, Tensor, Prefill | Cache], Tensor], logits: Callable[[Tensor, int], Tensor],
    packed: Packed, contexts: Tensor, group: Tensor, length: int, end: Tensor, uniform: Tensor | None, *,
    states: bool = False, narrow: Narrowing | None = None, stop: Callable[[Tensor], Tensor] | None = None,
) -> Written:  # fmt: skip
    """Continue contexts token after token.

    Args:
        hidden: Of ids [T], positions [T] and an attention: last hidden states [T, D].
        logits: Of hidden states [n, D] and a token's place in the reply: [n, V] float32, temperature included.
        packed: The contexts alone, packed.
        contexts: [G, P] int64 with PAD.
        group: [B] int64, the context of each row.
        length: Tokens after which a row is cut.
        end: [E] int64, ids that end a row.
        uniform: [B, length] float64, see `sample`; a row's tokens do not depend on who else is there.
        states: Return the hidden states as well.
        narrow: How each row is sampled; log-probabilities are then those under it.
        stop: Of what rows [n, t] have written so far: [n] bool, rows that end here.

    Returns:
        written: For the rows in their own order.
    """
    b, device = len(group), group.device
    cache = Cache(lengths(contexts), torch.arange(len(contexts), device=device))
    h = hidden(packed.ids, packed.positions, Prefill(packed, cache))[packed.last]
    units = torch.full((b, length), PAD, dtype=torch.int64, device=device)
    logp = torch.zeros(b, length, device=device)
    kept = h.new_zeros(b, length, h.shape[1]) if states else None
    rows, line, z = torch.arange(b, device=device), group, logits(h, 0)
    for t in range(length):
        drawn = None if uniform is None else uniform[rows, t]
        if narrow is not None and drawn is not None:  # row by row, since each may be narrowed otherwise
            ids, of_ids = sample(narrow(z[line], rows), torch.arange(len(rows), device=device), drawn)
        else:
            ids, of_ids = sample(z, line, drawn)
        units[rows, t], logp[rows, t] = ids, of_ids
        if kept is not None:
            kept[rows, t] = h[line]
        alive = ~torch.isin(ids, end)
        if stop is not None:
            alive = alive & ~stop(units[rows, : t + 1])
        if t + 1 == length or not bool(alive.any()):
            break
        rows = rows[alive]
        said, line = torch.unique(torch.stack([line, ids], 1)[alive], dim=0, return_inverse=True)
        before, ids = said.unbind(1)
        if len(before) > LEAVE * len(cache.group) and bool((before.diff() > 0).all()):
            line, ids = before[line], ids.new_zeros(len(cache.group)).index_copy_(0, before, ids)
        else:
            cache.go_on(before)
        cache.make_room(length)
        h = hidden(ids, cache.contexts[cache.group] + t, cache)
        cache.written += 1
        z = logits(h, t + 1)
    return Written(units, logp, kept)
