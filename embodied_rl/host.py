"""What a run asks of the machine it computes on: its threads, and that memory once touched stays at hand."""

from __future__ import annotations

import ctypes
import functools
import sys

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt."""


def prepare(threads: int | None) -> None:
    """Set the threads of torch, and keep freed memory.

    Args:
        threads: The recipe's `threads`; None leaves torch's own number.
    """
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()


@functools.cache
def keep_freed_memory() -> bool:
    """Let the C library reuse large blocks instead of handing each back to the system.

    By default glibc maps every block above a few megabytes anew and unmaps it when it is freed, so each intermediate
    tensor of a batch is paid for page by page, every time: a forward and backward pass of a small
    vision-language-action model over 640 rows met 60,000 to 120,000 page faults, 0.2 to 0.3 s of its 1.4 s. The price:
    the process does not shrink below its peak.

    Returns:
        kept: False where the C library is another one, which is left as it is.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 * 2**20))
    return all([mallopt(name, value) for name, value in wanted])
