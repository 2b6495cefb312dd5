"""From hidden states to log-probabilities: the one place where logits are made in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KEEP = 2**26
"""Probabilities that are kept for the backward pass (256 MiB); more of them are computed a second time there."""
AT_ONCE = 2**25
"""Logits that exist at the same time where they are not kept."""


class TokenLogp(torch.autograd.Function):
    """Log-probabilities of tokens and entropies of states, never holding more than some rows of logits.

    z = h W^T,  logp = z[id] - lse(z),  H = lse(z) - sum_v p_v z_v
    d logp / dz_v = 1[v = id] - p_v,  dH / dz_v = -p_v (log p_v + H)
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, state: Tensor, ids: Tensor, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """See `token_logp`."""
        rows = max(1, AT_ONCE // len(weight))
        keep = len(hidden) * len(weight) <= KEEP and ctx.needs_input_grad[0]
        logp, spread, kept = hidden.new_empty(len(ids)), [], []
        for start, h in zip(range(0, len(hidden), rows), hidden.split(rows), strict=True):
            here = _within(state, start, rows)
            z = h @ weight.T
            lse = z.logsumexp(-1, keepdim=True)
            row = state[here] - start
            logp[here] = z[row, ids[here]] - lse[row, 0]
            if entropy:
                p = (z - lse).exp_()
                spread.append(lse.squeeze(-1) - z.mul_(p).sum(-1))
            elif keep:
                p = z.sub_(lse).exp_()
            if keep:
                kept.append(p)
        h_out = torch.cat(spread) if entropy else logp.new_zeros(())
        ctx.save_for_backward(hidden, weight, state, ids, h_out, *kept)
        ctx.rows = rows
        # An entropy that is only looked at has no gradient, and its logarithms are not taken.
        ctx.set_materialize_grads(False)
        return logp, h_out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, Tensor | None, None, None, None]:
        """Gradients of the hidden states and, where they are trained, of the weights."""
        hidden, weight, state, ids, spread, *kept = ctx.saved_tensors
        of_logp, of_entropy = gradients
        of_state = None if of_logp is None else of_logp.new_zeros(len(hidden)).index_add_(0, state, of_logp)
        into_hidden = torch.empty_like(hidden)
        into_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for n, start in enumerate(range(0, len(hidden), ctx.rows)):
            cut = slice(start, start + ctx.rows)
            h, g = hidden[cut], 0.0 if of_state is None else of_state[cut, None]
            p = kept[n].clone() if kept else torch.softmax(h @ weight.T, dim=-1)
            if of_entropy is not None:
                e = of_entropy[cut, None]
                dz = torch.xlogy(p, p).addcmul_(p, spread[cut, None]).mul_(-e).sub_(p.mul_(g))
            else:
                dz = p.mul_(-g)
            if of_logp is not None:
                here = _within(state, start, ctx.rows)
                dz.index_put_((state[here] - start, ids[here]), of_logp[here], accumulate=True)
            torch.mm(dz, weight, out=into_hidden[cut])
            if into_weight is not None:
                into_weight.addmm_(dz.T, h)
        return into_hidden, into_weight, None, None, None


def _within(state: Tensor, start: int, rows: int) -> Tensor:
    """Indices of the tokens whose states are among `rows` from `start` on."""
    return ((state >= start) & (state < start + rows)).nonzero().flatten()


def token_logp(
    hidden: Tensor, weight: Tensor, state: Tensor, ids: Tensor, *, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of tokens under softmax(h W^T), of which several may follow the same state.

    Args:
        hidden: [S, D] float32, divided by the temperature already.
        weight: [V, D] float32.
        state: [M] int64, the row of `hidden` that each token follows.
        ids: [M] int64.
        entropy: Whether to compute it.

    Returns:
        logp: [M].
        entropy: [M], None when not asked for.
    """
    logp, spread = TokenLogp.apply(hidden, weight, state, ids, entropy)
    return logp, spread[state] if entropy else None
