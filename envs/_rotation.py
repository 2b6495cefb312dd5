"""Rotations written otherwise, on the device they lie on, by Warp's own routines."""

from __future__ import annotations

import torch
import warp as wp
from torch import Tensor

from embodied_rl.envs.tabletop.warp_runtime import start_warp

wp.set_module_options({"enable_backward": False})


def convert_rotation(rotation: Tensor, pair: tuple[str, str]) -> Tensor:
    """Write rotations otherwise.

    Args:
        rotation: [n, 3] rad.
        pair: ("axis_angle", "euler_xyz") or the other way round; euler_xyz is R = Rx(a) Ry(b) Rz(c).

    Returns:
        rotation: [n, 3] rad, the same rotations.
    """
    given = rotation.detach().to(torch.float32).contiguous()
    out = torch.empty_like(given)
    kernel = _to_euler if pair[1] == "euler_xyz" else _to_axis_angle
    device = start_warp(given.device)
    stream = wp.stream_from_torch(given.device) if given.device.type == "cuda" else None
    inputs = [wp.from_torch(x, dtype=wp.vec3) for x in (given, out)]
    wp.launch(kernel, dim=len(given), inputs=inputs, device=device, stream=stream)
    # Warp's angles reach to two turns.
    return torch.atan2(out.sin(), out.cos()) if pair[1] == "euler_xyz" else out


# Warp's stubs lack two of these functions. Its Euler angles go round fixed axes: z, y and x in this order are x, y and
# z of axes that turn along.
@wp.kernel
def _to_euler(given: wp.array[wp.vec3], out: wp.array[wp.vec3]) -> None:
    i = wp.tid()
    v = given[i]
    out[i] = wp.quat_to_euler(wp.quat_from_axis_angle(wp.normalize(v), wp.length(v)), 2, 1, 0)  # type: ignore[attr-defined]


@wp.kernel
def _to_axis_angle(given: wp.array[wp.vec3], out: wp.array[wp.vec3]) -> None:
    i = wp.tid()
    q = wp.quat_from_euler(given[i], 2, 1, 0)  # type: ignore[attr-defined]
    if q[3] < 0.0:
        q = -q
    axis, angle = wp.quat_to_axis_angle(q)
    out[i] = axis * angle
