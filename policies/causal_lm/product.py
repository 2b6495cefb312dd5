"""Matrix products by weights that stay the same for many calls, as while a reply is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def product(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """X -> x W^T + b, on a CPU by a copy of W in the layout that oneDNN multiplies fastest.

    A product of few rows by a plain matrix spends much of its time on arranging the matrix, every time anew.

    Args:
        weight: [O, I].
        bias: [O] or None.
        rows: About how many rows x will have.

    Returns:
        times: [..., I] -> [..., O], without gradients.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return partial(F.linear, weight=weight, bias=bias)
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    try:
        arranged = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        # Slower, and it needs no copy.
        return partial(F.linear, weight=weight, bias=bias)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, arranged, bias, "none", [], "")


def out_of_memory(error: RuntimeError) -> bool:
    """An accelerator says it by a class of its own, a CPU by words: the first on Linux, the second on Windows."""
    words = ("can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)


@contextmanager
def arranged(model: nn.Module, rows: int) -> Iterator[None]:
    """While this lasts, the linear layers of a model multiply by arranged copies of their weights.

    Args:
        model: Its weights must not change meanwhile.
        rows: Tokens that go through at once.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    try:
        for layer in layers:
            layer.forward = product(layer.weight, layer.bias, rows)  # type: ignore[method-assign, assignment]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
