"""Which device draws, and how ManiSkill is told: it needs a Vulkan driver even where nothing is drawn."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sapien
import torch

from embodied_rl.errors import CapabilityError
from embodied_rl.vulkan import DRIVERS, SOFTWARE, draw_in_software

log = logging.getLogger(__name__)

_handing_in = threading.Lock()


def drawing_device(device: torch.device, where: str) -> Any:
    """Return the `sapien.Device` that draws.

    Args:
        device: Where the tensors live.
        where: Name of the env, for messages.

    Raises:
        CapabilityError: There is no Vulkan device; says what to install.
    """
    if device.type != "cuda" and draw_in_software():
        log.info("%s draws in software: %s=%s", where, DRIVERS, SOFTWARE)
    name = f"cuda:{device.index or 0}" if device.type == "cuda" else "pci:0"
    try:
        found = sapien.Device(name)
        reason = "" if found.can_render() else f"'{name}' cannot draw"
    except RuntimeError as error:
        reason = str(error)
    if not reason:
        return found
    raise CapabilityError(
        f"{where} needs a Vulkan device, even for observation: state, and found none ({reason}; {DRIVERS} is "
        f"{os.environ.get(DRIVERS, 'not set')}): on a machine without a GPU run `apt-get install libvulkan1 chromium` "
        f"and set {DRIVERS}={SOFTWARE}; with an NVIDIA GPU install its Vulkan driver"
    )


@contextmanager
def handed_in(device: Any) -> Iterator[None]:
    """Make ManiSkill draw with this device while an env is being built.

    Its own setting cannot say it: `render_backend` is split at ":", and a software device is only known as "pci:0".
    """
    from mani_skill.envs import sapien_env

    parse = sapien_env.parse_sim_and_render_backend

    def with_device(simulate: str, draw: str) -> Any:
        backend = parse(simulate, "none")
        backend.render_device = device
        backend.render_backend = "sapien_cuda" if device.is_cuda() else "sapien_cpu"
        return backend

    with _handing_in:
        sapien_env.parse_sim_and_render_backend = with_device
        try:
            yield
        finally:
            sapien_env.parse_sim_and_render_backend = parse
