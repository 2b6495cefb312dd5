"""All trainable parameters as one vector, and the optimizer that moves it."""

from __future__ import annotations

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from embodied_rl.errors import CapabilityError
from embodied_rl.section import Section

MOMENTUM = 0.95
"""Muon's share of the past in the mean of gradients."""


class Muon(Section):
    """A second way to step, for the weights of linear and convolution layers; see `Optimizer`."""

    lr: float | None = Field(None, gt=0)
    """Muon's step size, on the schedule of Adam's, which then moves only what is left; null: Adam moves everything.
    0.01 to 0.05 is usual from scratch."""
    only: tuple[str, ...] = ()
    """Parts of the names of those weights that it moves; none: all but the critic's, where that has its own step size.
    A step costs the more the wider the layers are."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> Muon:
        if self.only and self.lr is None:
            raise ValueError(f"only ({', '.join(self.only)}) does nothing with lr (null): remove it, or set lr")
        return self


class FlatParameters:
    """All trainable parameters as windows of one vector, and their gradients of another.

    One vector makes the optimizer step, the clip and the finiteness check one kernel each; with small networks
    these would otherwise take as long as the backward pass.
    """

    def __init__(self, module: nn.Module, *, last: str | None = None, muon: Muon | None = None) -> None:
        """Move the module's trainable parameters into one vector (values unchanged).

        Args:
            module: On its final device, all trainable parameters of one dtype.
            last: Parameters whose names begin so come last, from element `border` on; None keeps the order.
            muon: What it names, but for what comes last, comes right before the border, each one of `matrices`.

        Raises:
            CapabilityError: Muon is to move something that the module has not.
        """
        own = layer_weights(module) if muon is not None and muon.lr else set()
        only = muon.only if muon is not None else ()

        def place(name: str, p: nn.Parameter) -> int:
            if last is not None and name.startswith(last):
                return 2
            return int(id(p) in own and (not only or any(part in name for part in only)))

        self.named = sorted(((n, p) for n, p in module.named_parameters() if p.requires_grad), key=lambda x: place(*x))
        params = [p for _, p in self.named]
        data = torch.cat([p.detach().flatten() for p in params])
        self.vector = data
        self.grad = torch.zeros_like(data)
        self.matrices: list[tuple[slice, int]] = []
        """Window of the vector and number of rows of each matrix that Muon moves."""
        self.border = start = 0
        for name, p in self.named:
            window = slice(start, start + p.numel())
            p.data = self.vector[window].view(p.shape)
            p.grad = self.grad[window].view(p.shape)
            if place(name, p) == 1:
                self.matrices.append((window, len(p)))
            start = window.stop
            if place(name, p) < 2:
                self.border = start
        if muon is not None and muon.lr and not self.matrices and not only:
            raise CapabilityError(
                "muon.lr is for the weights of linear and convolution layers, and none of them is trained here: set "
                "muon.lr: null"
            )
        for part in only:
            if not any(part in name and place(name, p) == 1 for name, p in self.named):
                movable = (n for n, p in self.named if id(p) in own and not (last and n.startswith(last)))
                layers = sorted({n.rsplit(".", 1)[0] for n in movable})
                raise CapabilityError(
                    f"muon.only names {part!r}, and no weight of a trainable linear or convolution layer has that in "
                    f"its name: choose among {', '.join(layers[:30])}"
                )

    def non_finite_gradients(self) -> list[str]:
        """Names of parameters whose gradient holds NaN or infinity."""
        return [n for n, p in self.named if p.grad is not None and not bool(torch.isfinite(p.grad).all())]


def layer_weights(module: nn.Module) -> set[int]:
    """`id` of the weights of linear and convolution layers, without those that are an embedding as well."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = {id(m.weight) for m in module.modules() if isinstance(m, layers)}
    return found - {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}


class Optimizer:
    """AdamW on one vector, and Muon on its matrices where a step size is given for them.

    AdamW is the kernel of `torch.optim.AdamW(fused=True)` without the Python around it, which takes longer than the
    kernel where networks are small (45 of 55 microseconds per step).

    Muon moves the weights W [m, n] of a layer along the nearest orthogonal matrix to their gradient's running mean, so
    every direction that the gradient has moves equally far, also those that few rows of a batch ask for:

        M <- 0.95 M + 0.05 G,   W <- W - lr sqrt(max(1, m / n)) orthogonal(0.95 M + 0.05 G)

    Source: Jordan et al. 2024 (Muon, kellerjordan.github.io/posts/muon), with its scale. Differs: float32 instead of
    bfloat16, and a running mean instead of a running sum, which `orthogonal` does not see.
    """

    def __init__(self, flat: FlatParameters, *, eps: float, weight_decay: float) -> None:
        """Start with moments of zero.

        Args:
            flat: Parameters, moved in place by `step`, and their gradients, read by it.
            eps: Added to the root of the second moment.
            weight_decay: Decoupled from the gradient.
        """
        self.flat, self.eps, self.weight_decay = flat, eps, weight_decay
        self.moments = {"exp_avg": torch.zeros_like(flat.vector), "exp_avg_sq": torch.zeros_like(flat.vector)}
        # The kernel wants its counter in float32 on the parameters' device.
        self.moments["step"] = torch.zeros((), device=flat.vector.device)
        self.first = flat.matrices[0][0].start if flat.matrices else flat.border
        """Element where the matrices begin."""

    @torch.no_grad()
    def step(self, lr: float, *, last_lr: float | None = None, muon_lr: float = 0.0) -> None:
        """Move the vector by one step, with betas 0.9 and 0.999 and momentum 0.95.

        Args:
            lr: Step size of AdamW.
            last_lr: AdamW's step size from the border on; None: as before it.
            muon_lr: Step size of the matrices.
        """
        m, flat = self.moments, self.flat
        m["step"] += 1
        parts = [(slice(self.first), lr)]
        if flat.border < len(flat.vector):
            parts.append((slice(flat.border, None), lr if last_lr is None else last_lr))
        for part, size in parts:
            torch._fused_adamw_(
                [flat.vector[part]], [flat.grad[part]], [m["exp_avg"][part]], [m["exp_avg_sq"][part]], [], [m["step"]],
                lr=size, beta1=0.9, beta2=0.999,
                weight_decay=self.weight_decay, eps=self.eps, amsgrad=False, maximize=False,
            )  # fmt: skip
        for window, rows in flat.matrices:
            gradient, weight = flat.grad[window].view(rows, -1), flat.vector[window].view(rows, -1)
            mean = m["exp_avg"][window].view(rows, -1).lerp_(gradient, 1 - MOMENTUM)
            weight.mul_(1 - muon_lr * self.weight_decay)
            scale = math.sqrt(max(1.0, rows / weight.shape[1]))
            weight.add_(orthogonal(gradient.lerp(mean, MOMENTUM)), alpha=-muon_lr * scale)


def orthogonal(x: Tensor) -> Tensor:
    r"""About the nearest matrix [m, n] with orthonormal rows or columns.

    Singular values become 0.7 to 1.2, those below a fiftieth of the matrix's norm less.

        X <- a X + b X X^T X + c (X X^T)^2 X,   five times, from X / ||X||

    Args:
        x: [m, n]; zero stays zero.

    Returns:
        out: U V^T of x = U S V^T, nearly.

    Source: the quintic of Jordan et al. 2024 (Muon).
    """
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / x.norm().clamp(min=1e-12)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T
