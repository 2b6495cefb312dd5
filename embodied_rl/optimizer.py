"""All trainable parameters as one vector, and Adam on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FlatParameters:
    """All trainable parameters as windows of one vector, and their gradients of another.

    One vector makes the optimizer step, the clip and the finiteness check one kernel each; with small networks
    these would otherwise take as long as the backward pass.
    """

    def __init__(self, module: nn.Module, *, last: str | None = None) -> None:
        """Move the module's trainable parameters into one vector (values unchanged).

        Args:
            module: On its final device, all trainable parameters of one dtype.
            last: Parameters whose names begin so come last, from element `border` on; None keeps the order.
        """
        self.named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        if last is not None:
            self.named.sort(key=lambda one: one[0].startswith(last))
        self.border = sum(p.numel() for n, p in self.named if last is None or not n.startswith(last))
        params = [p for _, p in self.named]
        data = torch.cat([p.detach().flatten() for p in params])
        self.vector = data
        self.grad = torch.zeros_like(data)
        start = 0
        for p in params:
            stop = start + p.numel()
            p.data = self.vector[start:stop].view(p.shape)
            p.grad = self.grad[start:stop].view(p.shape)
            start = stop

    def non_finite_gradients(self) -> list[str]:
        """Names of parameters whose gradient holds NaN or infinity."""
        return [n for n, p in self.named if p.grad is not None and not bool(torch.isfinite(p.grad).all())]


class Adam:
    """AdamW on one vector: the kernel of `torch.optim.AdamW(fused=True)` without the Python around it.

    That Python takes longer than the kernel where networks are small (45 of 55 microseconds per step).
    """

    def __init__(self, vector: Tensor, grad: Tensor, *, eps: float, weight_decay: float) -> None:
        """Start with moments of zero.

        Args:
            vector: Parameters, moved in place by `step`.
            grad: Their gradients, read by `step`.
            eps: Added to the root of the second moment.
            weight_decay: Decoupled from the gradient.
        """
        self.vector, self.grad, self.eps, self.weight_decay = vector, grad, eps, weight_decay
        self.moments = {"exp_avg": torch.zeros_like(vector), "exp_avg_sq": torch.zeros_like(vector)}
        # The kernel wants its counter in float32 on the parameters' device.
        self.moments["step"] = torch.zeros((), device=vector.device)

    @torch.no_grad()
    def step(self, *lrs: float, border: int | None = None) -> None:
        """Move the vector by one step, with betas 0.9 and 0.999.

        Args:
            lrs: Step size; two of them are that before and that from the border on.
            border: Element of the vector where the second begins.
        """
        m = self.moments
        m["step"] += 1
        parts = [slice(None)] if border is None else [slice(border), slice(border, None)]
        for part, lr in zip(parts, lrs, strict=True):
            torch._fused_adamw_(
                [self.vector[part]], [self.grad[part]], [m["exp_avg"][part]], [m["exp_avg_sq"][part]], [], [m["step"]],
                lr=lr, beta1=0.9, beta2=0.999,
                weight_decay=self.weight_decay, eps=self.eps, amsgrad=False, maximize=False,
            )  # fmt: skip
