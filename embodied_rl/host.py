"""What a run asks of the machine it computes on: threads, memory that stays at hand, no numbers next to nothing."""

from __future__ import annotations

import ctypes
import functools
import sys

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt."""


def prepare(threads: int | None) -> None:
    """Set the threads of torch, keep freed memory, and take what is next to nothing for nothing.

    Numbers below 1.2e-38 (subnormal, in float32) are computed by microcode on many processors, some hundred times
    slower, and the tails of softmaxes and smoothed targets are full of them: imitation with `tiny_vla_tokens` fell from
    620 frames/s to 200 after its first 16,000, on a Xeon. They change no result that anyone could see. Threads begun
    later inherit the setting, so it comes before torch's own.

    Args:
        threads: The recipe's `threads`; None leaves torch's own number.
    """
    torch.set_flush_denormal(True)
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
