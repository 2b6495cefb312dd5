"""Rows of tokens of different lengths as one long row without padding, in which equal beginnings stand once.

    contexts [c c c c] [d d]          replies a a a, a b and e e f, of which a, b continue c and e continues d
    packed   c c c c | d d | a a a | b | e e f

Linear layers see the packed row. Attention is computed in blocks of rows of similar length, whose queries and keys are
gathered from it: a reply's keys are those of its context and of what it has in common with an earlier reply, wherever
that stands, and its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from embodied_rl.errors import ShapeError
from embodied_rl.types import PAD

Kernel = Literal["sdpa", "eager"]

PADDING = 1.25
"""A block of attention may be this much larger than what its rows really need."""
LARGEST_BLOCK = 2**24
"""Pairs of query and key in one block, at most (a single row may have more)."""


def distinct(context: Tensor) -> tuple[Tensor, Tensor]:
    """Equal rows once, in the order in which they first appear.

    Args:
        context: [N, P] int64, PAD after the end of each row.

    Returns:
        contexts: [G, P].
        group: [N] int64, the row of `contexts` that each row equals.

    Raises:
        ShapeError: A row without any token.
    """
    if bool((context[:, 0] == PAD).any()):
        empty = (context[:, 0] == PAD).nonzero().flatten().tolist()[:8]
        raise ShapeError(f"the observation is an empty context in copies {empty}: a model cannot continue nothing")
    _, inverse = torch.unique(context, dim=0, return_inverse=True)
    n = len(context)
    rows = torch.arange(n, device=context.device)
    first = torch.full((int(inverse.max()) + 1,), n, device=context.device).scatter_reduce(0, inverse, rows, "amin")
    order = first.argsort()
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return context[first[order]], rank[inverse]


def lengths(rows: Tensor) -> Tensor:
    """[N] int64, tokens before PAD."""
    return (rows != PAD).sum(-1)


def owners(group: Tensor, units: Tensor, inside: Tensor) -> Tensor:
    """Who says a token first: the first row with the same context and the same tokens up to and with this one.

    Args:
        group: [N] int64, the context of each row.
        units: [N, A] int64.
        inside: [N, A] bool, the tokens that are asked about, from the first of each row on.

    Returns:
        owner: [N, A] int64 row; the row itself where `inside` is False.
    """
    n, length = units.shape
    rows = torch.arange(n, device=units.device)
    owner, state = rows[:, None].repeat(1, length), group
    for t in range(length):
        said = torch.stack([torch.where(inside[:, t], state, n + rows), units[:, t]], dim=1)
        _, inverse = torch.unique(said, dim=0, return_inverse=True)
        first = torch.full_like(rows, n).scatter_reduce(0, inverse, rows, "amin")
        state = owner[:, t] = first[inverse]
        if torch.equal(state, rows):
            break
    return owner


@dataclass
class Block:
    """Attention of some rows: R of them, Q queries and K keys each."""

    query: Tensor
    """[R, Q] int64, where the queries stand in the packed row; anything where a row is shorter."""
    key: Tensor
    """[R, K] int64"""
    mask: Tensor
    """[R, Q, K] bool, which key each query may see; the first for every query, so that no softmax is over nothing."""


@dataclass
class Packed:
    """T tokens in one row, and what each may attend to."""

    ids: Tensor
    """[T] int64"""
    positions: Tensor
    """[T] int64, place of each token in its own conversation."""
    blocks: list[Block]
    back: Tensor
    """[T] int64, where each token's attention stands among the queries of all blocks, one block after the other."""
    source: Tensor
    """[N, A] int64, the token whose hidden state predicts each unit; 0 where there is none."""
    last: Tensor
    """[G] int64, the last token of each context."""
    kernel: Kernel = "sdpa"
    longest: int = 0
    """Tokens that a conversation may ever have, for models that see only the latest."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of one layer.

        Args:
            layer: Which, for those who keep keys and values.
            query: [T, H, d].
            key: [T, Hk, d], H a multiple of Hk.
            value: [T, Hk, d].
            scaling: Factor of the scores.

        Returns:
            out: [T, H * d].
        """
        del layer
        heads, shared, d = query.shape[1], key.shape[1], query.shape[2]
        q, k, v = query.flatten(1), key.flatten(1), value.flatten(1)
        outs = []
        for block in self.blocks:
            (rows, lq), lk = block.query.shape, block.key.shape[1]
            # An embedding, because the backward pass of `index_select` adds row after row in one thread.
            qb = F.embedding(block.query, q).view(rows, lq, heads, d).transpose(1, 2)
            kb, vb = (F.embedding(block.key, x).view(rows, lk, shared, d).transpose(1, 2) for x in (k, v))
            # Heads that share keys become further queries of one head.
            qb = qb.reshape(rows, shared, heads // shared * lq, d)
            mask = block.mask.unsqueeze(1).repeat(1, 1, heads // shared, 1)
            if self.kernel == "sdpa":
                out = F.scaled_dot_product_attention(qb, kb, vb, attn_mask=mask, scale=scaling)
            else:
                scores = (qb @ kb.transpose(2, 3) * scaling).masked_fill(~mask, float("-inf"))
                out = torch.softmax(scores.float(), dim=-1).to(vb.dtype) @ vb
            outs.append(out.reshape(rows, heads, lq, d).transpose(1, 2).reshape(rows * lq, heads * d))
        return F.embedding(self.back, torch.cat(outs) if len(outs) > 1 else outs[0])


def pack(contexts: Tensor, group: Tensor, units: Tensor, kernel: Kernel = "sdpa") -> Packed:
    """Lay contexts and their continuations in one row.

    The last token of a reply predicts nothing that counts, so it is left out; what replies to one context have in
    common at their beginning stands once.

    Args:
        contexts: [G, P] int64 with PAD.
        group: [N] int64, the context of each reply.
        units: [N, A] int64 with PAD; A may be 0.
        kernel: How attention is computed.

    Returns:
        packed: T = tokens of all contexts + tokens of all replies - N - tokens that an earlier reply has in common.
    """
    device = contexts.device
    of_context, of_reply = lengths(contexts), (lengths(units) - 1).clamp(min=0)
    start = of_context.cumsum(0) - of_context
    total = int(of_context.sum())
    places = torch.arange(max(contexts.shape[1], units.shape[1]), device=device)
    inside = places[: units.shape[1]] < of_reply[:, None]
    owner = owners(group, units, inside)
    own = inside & (owner == torch.arange(len(units), device=device)[:, None])
    alone = own.sum(1)
    common = of_reply - alone
    reply = total + alone.cumsum(0) - alone
    stands = (reply - common)[owner] + places[: units.shape[1]]  # [N, A], of each token that is inside
    counts = contexts != PAD
    ids = torch.cat([contexts[counts], units[own]])
    positions = torch.cat(
        [
            places[: contexts.shape[1]].expand_as(contexts)[counts],
            (of_context[group][:, None] + places[: units.shape[1]])[own],
        ]
    )
    last = start + of_context - 1
    source = torch.zeros_like(units)
    if units.shape[1]:
        source = torch.cat([last[group][:, None], stands[:, :-1]], dim=1)
        source = source.masked_fill(units == PAD, 0)
    blocks, back, done = [], torch.zeros_like(ids), 0
    jobs = [(start, of_context, None)] + ([(reply, alone, group)] if len(units) else [])
    for begin, count, whose in jobs:
        before = torch.zeros_like(count) if whose is None else of_context[whose] + common
        for rows in similar(count.tolist(), before.tolist()):
            r = torch.tensor(rows, device=device)
            n = int(count[r].max())
            ahead = None
            if whose is not None:
                far, context = torch.arange(int(before[r].max()), device=device), of_context[whose[r]][:, None]
                said = stands[r].gather(1, (far - context).clamp(0, units.shape[1] - 1))
                ahead = (torch.where(far < context, start[whose[r]][:, None] + far, said), before[r])
            block = _block(begin[r], count[r], places[:n], ahead)
            real = places[:n] < count[r][:, None]
            back[block.query[real]] = done + torch.arange(real.numel(), device=device).view_as(real)[real]
            done += real.numel()
            blocks.append(block)
    return Packed(ids, positions, blocks, back, source, last, kernel)


def _block(begin: Tensor, count: Tensor, places: Tensor, ahead: tuple[Tensor, Tensor] | None) -> Block:
    """The block of rows that begin at `begin` [R] and have `count` [R] tokens; ahead of them keys [R, F], count [R]."""
    own = (begin[:, None] + places).masked_fill(places >= count[:, None], 0)
    seen = (places <= places[:, None]) & (places < count[:, None, None])  # [R, Q, Q]
    key = own
    if ahead is not None:
        far, length = ahead
        before = torch.arange(far.shape[1], device=begin.device) < length[:, None]
        key = torch.cat([far.masked_fill(~before, 0), own], dim=1)
        seen = torch.cat([before[:, None].expand(-1, len(places), -1), seen], dim=2)
    seen[:, :, 0] = True
    return Block(own, key, seen)


def similar(count: Sequence[int], before: Sequence[int]) -> list[list[int]]:
    """Rows cut into blocks of similar shape.

    Args:
        count: [N] queries of each row; those with none are left out.
        before: [N] keys that each row has beyond its own tokens.

    Returns:
        blocks: Rows of each block, longest first.
    """
    rows = sorted((i for i in range(len(count)) if count[i]), key=lambda i: (-count[i], -before[i]))
    blocks: list[list[int]] = []
    needed = widest = 0
    for i in rows:
        mine = count[i] * (count[i] + before[i])
        if blocks:
            block = blocks[-1]
            keys = max(widest, count[block[0]] + before[i])
            size = (len(block) + 1) * count[block[0]] * keys
            if size <= max(PADDING * (needed + mine), 2**16) and size <= LARGEST_BLOCK:
                block.append(i)
                needed, widest = needed + mine, keys
                continue
        blocks.append([i])
        needed, widest = mine, count[i] + before[i]
    return blocks
