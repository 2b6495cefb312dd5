"""Start Warp, the compiler behind the GPU physics, the cameras and the kinematics, without noise on the terminal.

Warp compiles its kernels on first use (about a minute for the physics, seconds for the rest) and keeps them in a
cache on disk. Its messages go to Python's logging instead of stdout, and the first compilation of a process is
announced by one sentence.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import warp as wp

from embodied_rl.errors import NotFoundError

log = logging.getLogger(__name__)


class _Messages:
    """Warp's messages on their way to Python's logging; the methods are the ones `warp.set_logger` asks for."""

    def __init__(self) -> None:
        self._told = False

    def debug(self, message: str) -> None:
        log.debug(message)

    def info(self, message: str) -> None:
        if "(compiled)" in message and not self._told:
            self._told = True
            log.info(
                "MuJoCo Warp is compiling its kernels for this machine: up to a few minutes, only this once; "
                "later runs read them from %s",
                wp.config.kernel_cache_dir,
            )
        log.debug(message)

    def warning(self, message: str, category: type[Warning] | None = None, stacklevel: int = 1) -> None:
        warnings.warn(message, category, stacklevel=stacklevel + 1)

    def error(self, message: str) -> None:
        log.error(message)


def start_warp(device: torch.device) -> wp.Device:
    """Initialise Warp (once per process) and return its name for a torch device.

    Args:
        device: Where physics or cameras run; "cpu" or a CUDA device.

    Returns:
        warp_device: The same device, for `warp.ScopedDevice`.

    Raises:
        NotFoundError: Warp cannot use this device.
    """
    # A logger that somebody else installed is theirs to keep.
    if type(wp.get_logger()).__module__.startswith("warp."):
        wp.set_logger(_Messages())
    with _without_driver_note() if device.type == "cpu" else contextlib.nullcontext():
        wp.init()
    try:
        return wp.device_from_torch(device)
    except (RuntimeError, ValueError, IndexError) as error:
        known = ", ".join(str(d) for d in wp.get_devices())
        raise NotFoundError(
            f"device '{device}': MuJoCo Warp cannot use it ({error}); it sees {known}; choose one of them, or "
            "update the NVIDIA driver"
        ) from None


class Launch:
    """A kernel bound to its arguments, one thread per copy; calling it costs some 15 microseconds on a CPU."""

    def __init__(self, kernel: wp.Kernel, num_envs: int, device: torch.device, *arguments: Any) -> None:
        """Compile the kernel if need be and record the call.

        Args:
            kernel: Its first index is the copy.
            num_envs: Number of copies B.
            device: Where the tensors are.
            *arguments: In the kernel's order: tensors, whose memory is bound, or numbers.
        """
        self._device = device
        warp_device = start_warp(device)
        types = [variable.type for variable in kernel.adj.args]
        # The arrays do not own the memory: the tensors have to live as long as the recorded call.
        self._tensors = arguments
        bound = [
            wp.from_torch(value, dtype=kind.dtype) if isinstance(value, torch.Tensor) else value
            for kind, value in zip(types, arguments, strict=True)
        ]
        self._call = wp.launch(kernel, dim=num_envs, inputs=bound, device=warp_device, record_cmd=True)

    def __call__(self) -> None:
        """Run it in order with torch's own kernels."""
        if self._device.type == "cuda":
            self._call.launch(wp.stream_from_torch(torch.cuda.current_stream(self._device)))
        else:
            self._call.launch()


@contextlib.contextmanager
def _without_driver_note() -> Iterator[None]:
    """Hide the line on stderr that there is no CUDA driver: C code prints it on every CPU and nothing turns it off."""
    try:
        saved = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)
