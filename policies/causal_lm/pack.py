"""Rows of tokens of different lengths as one long row without padding, in which equal beginnings stand once.

    contexts [s s c c] [s s d]        replies a a a, a b and e e f, of which a, b continue c and e continues d
    packed   s s c c | d | a a a | b | e e f

Linear layers see the packed row. Attention is computed in blocks of rows of similar length, whose queries and keys are
gathered from it: a context's keys are what it has in common with an earlier context, wherever that stands, and its own;
a reply's are those of its context, what it has in common with an earlier reply to it, and its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """[R, Q, K] bool, which key each query may see; all see the row's own first, so that no softmax is over nothing."""


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
    contexts: Tensor
    """[G, P] int64, where each token of the contexts stands; anything beyond their ends."""
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


@dataclass
class Seats:
    """Where rows of tokens stand in the packed row, those that an earlier row has in common once."""

    own: Tensor
    """[N, L] bool, the tokens that no earlier row has said."""
    begin: Tensor
    """[N] int64, place of the first of them."""
    alone: Tensor
    """[N] int64, how many they are: those from some token of the row on."""
    stands: Tensor
    """[N, L] int64, place of every token that counts."""

    @classmethod
    def of(cls, group: Tensor, tokens: Tensor, counts: Tensor, first: int) -> Seats:
        """Seats from the place `first` on; rows have something in common within a group only (see `owners`)."""
        owner = owners(group, tokens, counts)
        own = counts & (owner == torch.arange(len(tokens), device=tokens.device)[:, None])
        alone = own.sum(1)
        begin = first + alone.cumsum(0) - alone
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return cls(own, begin, alone, (begin - counts.sum(1) + alone)[owner] + places)


def pack(contexts: Tensor, group: Tensor, units: Tensor, kernel: Kernel = "sdpa") -> Packed:
    """Lay contexts and their continuations in one row.

    The last token of a reply predicts nothing that counts, so it is left out; what contexts, and what replies to one
    context, have in common at their beginning stands once.

    Args:
        contexts: [G, P] int64 with PAD.
        group: [N] int64, the context of each reply.
        units: [N, A] int64 with PAD; A may be 0.
        kernel: How attention is computed.

    Returns:
        packed: T = tokens of all contexts + tokens of all replies - N - tokens that an earlier row has in common.
    """
    device = contexts.device
    of_context, of_reply = lengths(contexts), (lengths(units) - 1).clamp(min=0)
    places = torch.arange(max(contexts.shape[1], units.shape[1]), device=device)
    asked = Seats.of(torch.zeros_like(of_context), contexts, contexts != PAD, 0)
    replied = Seats.of(group, units, places[: units.shape[1]] < of_reply[:, None], int(asked.alone.sum()))
    ids = torch.cat([contexts[asked.own], units[replied.own]])
    positions = torch.cat(
        [
            places[: contexts.shape[1]].expand_as(contexts)[asked.own],
            (of_context[group][:, None] + places[: units.shape[1]])[replied.own],
        ]
    )
    last = asked.stands.gather(1, of_context[:, None] - 1).squeeze(1)
    source = torch.zeros_like(units)
    if units.shape[1]:
        source = torch.cat([last[group][:, None], replied.stands[:, :-1]], dim=1)
        source = source.masked_fill(units == PAD, 0)

    def conversations(rows: Tensor, longest: int) -> Tensor:
        """[R, longest] places of the tokens of replies and of the contexts before them, from the first on."""
        far, context = torch.arange(longest, device=device), of_context[group[rows]][:, None]
        before = asked.stands[group[rows]][:, :longest]
        before = F.pad(before, (0, longest - before.shape[1]))
        said = replied.stands[rows].gather(1, (far - context).clamp(0, units.shape[1] - 1))
        return torch.where(far < context, before, said)

    blocks, back, done = [], torch.zeros_like(ids), 0
    jobs: list[tuple[Seats, Tensor, Callable[[Tensor, int], Tensor]]] = [
        (asked, of_context - asked.alone, lambda rows, longest: asked.stands[rows][:, :longest])
    ]
    if len(units):
        jobs.append((replied, of_context[group] + of_reply - replied.alone, conversations))
    for seats, before, line in jobs:
        for some in similar(seats.alone.tolist(), before.tolist()):
            r = torch.tensor(some, device=device)
            count, ahead = seats.alone[r], before[r]
            block = _block(seats.begin[r], count, places[: int(count.max())], line(r, int(ahead.max())), ahead)
            real = places[: int(count.max())] < count[:, None]
            back[block.query[real]] = done + torch.arange(real.numel(), device=device).view_as(real)[real]
            done += real.numel()
            blocks.append(block)
    return Packed(ids, positions, blocks, back, asked.stands, source, last, kernel)


def _block(begin: Tensor, count: Tensor, places: Tensor, far: Tensor, length: Tensor) -> Block:
    """Rows [R] that begin at `begin` and have `count` tokens; before them keys `far` [R, F], `length` of them real."""
    own = (begin[:, None] + places).masked_fill(places >= count[:, None], 0)
    seen = (places <= places[:, None]) & (places < count[:, None, None])  # [R, Q, Q]
    before = torch.arange(far.shape[1], device=begin.device) < length[:, None]
    key = torch.cat([far.masked_fill(~before, 0), own], dim=1)
    seen = torch.cat([before[:, None].expand(-1, len(places), -1), seen], dim=2)
    seen[:, :, far.shape[1]] = True
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
