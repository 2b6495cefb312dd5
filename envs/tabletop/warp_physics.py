"""The second physics engine: MuJoCo Warp, for any device Warp knows (CUDA in practice, "cpu" for tests).

How it relates to `physics.NativePhysics`: both step the model that `scene.py` compiles, with the same integrator,
cone and solver, and both start the constraint solver cold at each control step, so that positions and velocities are
the whole state. They differ in precision (Warp computes in float32, the native engine in float64) and in the contact
points they choose between touching shapes. Without contacts of moving bodies they therefore agree to float32
rounding; with them single trajectories part, as they do between any two float precisions, while the statistics of
tasks stay alike. The test `tests/sim/test_warp_physics.py` states the tolerance.

On "cpu" Warp runs single-threaded, tens of times slower than the native engine: use it to test, not to train.
"""

from __future__ import annotations

import warnings

import mujoco
import mujoco_warp as mjw
import torch
import warp as wp
from torch import Tensor

from embodied_rl.envs.tabletop.warp_runtime import start_warp
from embodied_rl.errors import CapabilityError, CheckpointError
from embodied_rl.types import State

CONTACTS = 64
"""Contacts per copy that there is room for (a pool shared by all copies); piles of all objects inside the gripper and
against the drawer were seen to make 34."""
CONVEX_PAIRS = 32
"""Pairs per copy whose contacts need the general convex algorithm (cylinders, capsule against box); half as many as
contacts where there is room for more of these."""
CONSTRAINT_ROWS = 256
"""Constraint rows of each copy, four per contact; the same piles were seen to make 138."""
CHECK_EVERY = 64
"""Control steps between looks at what went wrong on CUDA, where each look waits for the device."""

_DROPPED = (
    mjw.OverflowType.NEFC
    | mjw.OverflowType.NJMAX_NNZ
    | mjw.OverflowType.BROADPHASE
    | mjw.OverflowType.NARROWPHASE
    | mjw.OverflowType.CCD
)
"""Flags that mean lost contacts. The others (iteration limits) mean lower accuracy, as in the native engine."""
_BLOWN_UP = 1e10
"""Positions and velocities beyond this are nonsense; MuJoCo's own limit."""


class WarpPhysics:
    """B copies stepped by MuJoCo Warp in float32; see `embodied_rl.envs.tabletop.physics.Physics`.

    Its arrays are shared with torch, so nothing is copied or moved to the host between policy and physics. On CUDA a
    control step is one launch of a recorded graph. On the CPU a restored state continues bit for bit; on CUDA only to
    float32 rounding, because threads add up in no fixed order (MuJoCo Warp's option for a fixed order costs speed and
    is not used).
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        num_envs: int,
        device: torch.device,
        *,
        contacts: int = CONTACTS,
        constraint_rows: int = CONSTRAINT_ROWS,
    ) -> None:
        """Allocate the copies.

        Args:
            model: Compiled model, shared by all copies; without activations.
            num_envs: Number of copies B.
            device: Torch device whose memory is used.
            contacts: Contacts per copy that there is room for.
            constraint_rows: Constraint rows of each copy that there is room for.

        Raises:
            NotFoundError: Warp cannot use the device.
        """
        assert model.na == 0, "the scene must not have activations"
        self.model = model
        self.num_envs = num_envs
        self.device = device
        self._room = (contacts, constraint_rows)
        self._warp_device = start_warp(device)
        with wp.ScopedDevice(self._warp_device):
            self._model = mjw.put_model(model)
            # Warp would print overflows to stdout and go on; `_check` raises instead.
            self._model.opt.warn_overflow = 0
            pairs = max(min(CONVEX_PAIRS, contacts), contacts // 2)
            self._data = mjw.make_data(model, nworld=num_envs, nconmax=contacts, nccdmax=pairs, njmax=constraint_rows)
        self._qpos = wp.to_torch(self._data.qpos)
        self._qvel = wp.to_torch(self._data.qvel)
        self._ctrl = wp.to_torch(self._data.ctrl)
        self._warmstart = wp.to_torch(self._data.qacc_warmstart)
        self._overflow = wp.to_torch(self._data.overflow)
        self._before, self._before_qvel = self._qpos.clone(), self._qvel.clone()
        self.burst = torch.zeros(num_envs, dtype=torch.bool, device=device)
        self._broken = torch.zeros_like(self.burst)
        self._graphs: dict[int, wp.Graph] = {}
        self._steps = 0

    @property
    def qpos(self) -> Tensor:
        """[B, nq] float32."""
        return self._qpos

    @property
    def qvel(self) -> Tensor:
        """[B, nv] float32."""
        return self._qvel

    def place(self, mask: Tensor, qpos: Tensor, qvel: Tensor) -> None:
        """Set positions [B, nq] and velocities [B, nv] of the masked copies."""
        rows = mask[:, None]
        torch.where(rows, qpos.float(), self._qpos, out=self._qpos)
        torch.where(rows, qvel.float(), self._qvel, out=self._qvel)

    def step(self, ctrl: Tensor, substeps: int, active: Tensor | None = None) -> None:
        """Advance copies by `substeps` physics steps under constant controls [B, nu]; see `Physics.step`.

        All copies are simulated, because a recorded graph has a fixed size; those that are not active are put back.

        Raises:
            CapabilityError: A copy had more contacts than there is room for; on CUDA this is told up to
                `CHECK_EVERY` control steps late.
        """
        if self._warp_device.is_cuda and substeps not in self._graphs:
            self._graphs[substeps] = self._record(substeps)
        self._ctrl.copy_(ctrl)
        self._warmstart.zero_()
        self._before.copy_(self._qpos)
        self._before_qvel.copy_(self._qvel)
        if self._warp_device.is_cuda:
            stream = wp.stream_from_torch(torch.cuda.current_stream(self.device))
            wp.capture_launch(self._graphs[substeps], stream=stream)
        else:
            self._advance(substeps)
        if active is not None:
            torch.where(active[:, None], self._qpos, self._before, out=self._qpos)
            torch.where(active[:, None], self._qvel, self._before_qvel, out=self._qvel)
        self._mend(active)
        self._steps += 1
        if not self._warp_device.is_cuda or self._steps % CHECK_EVERY == 0:
            self._check()

    def get_state(self) -> State:
        """{"warp": [B, nq + nv] float32: positions, velocities}."""
        self._check()
        return {"warp": torch.cat([self._qpos, self._qvel], dim=1)}

    def set_state(self, state: State) -> None:
        """Restore `get_state`'s result.

        Raises:
            CheckpointError: The state comes from another engine, scene or number of copies.
        """
        shape = (self.num_envs, self.model.nq + self.model.nv)
        saved = state.get("warp")
        if saved is None or tuple(saved.shape) != shape:
            found = f"shape {list(saved.shape)}" if saved is not None else f"entries {sorted(state)}"
            raise CheckpointError(
                f"physics state: found {found}, expected 'warp' of shape {list(shape)}; "
                "restore it with the same physics engine and number of copies"
            )
        self._qpos.copy_(saved[:, : self.model.nq])
        self._qvel.copy_(saved[:, self.model.nq :])

    def close(self) -> None:
        """Drop the recorded graphs; the arrays go with the object."""
        self._graphs.clear()

    def _advance(self, substeps: int) -> None:
        with wp.ScopedDevice(self._warp_device):
            for _ in range(substeps):
                mjw.step(self._model, self._data)

    def _record(self, substeps: int) -> wp.Graph:
        """Record a control step as a CUDA graph. Written for CUDA and not yet run on one."""
        saved = self.get_state()
        wp.synchronize_device(self._warp_device)  # torch's stream and Warp's are two
        self._advance(1)  # compiles and loads every kernel, which a recording cannot
        with wp.ScopedCapture(device=self._warp_device) as capture:
            self._advance(substeps)
        wp.synchronize_device(self._warp_device)
        self.set_state(saved)
        return capture.graph

    def _mend(self, active: Tensor | None) -> None:
        """Put copies whose state has blown up back to rest where they were; written so that the host never waits."""
        sound = (self._qpos.abs() < _BLOWN_UP).all(dim=1) & (self._qvel.abs() < _BLOWN_UP).all(dim=1)
        torch.where(sound[:, None], self._qpos, self._before, out=self._qpos)
        self._qvel.masked_fill_(~sound[:, None], 0.0)
        torch.logical_not(sound, out=self.burst)
        if active is not None:
            self.burst &= active
        self._broken |= self.burst

    def _check(self) -> None:
        """Say what went wrong since the last look: a warning for unstable copies, an error for lost contacts."""
        if bool(self._broken.any()):
            warnings.warn(
                f"physics: copies {self._broken.nonzero().flatten().tolist()} became unstable and were put "
                "back to rest where they were one control step before",
                RuntimeWarning,
                stacklevel=3,
            )
            self._broken.zero_()
        lost = (self._overflow & int(_DROPPED)) != 0
        if bool(lost.any()):
            copies = lost.nonzero().flatten().tolist()
            more = f" and {len(copies) - 8} more" if len(copies) > 8 else ""
            raise CapabilityError(
                f"physics (warp): copies {copies[:8]}{more} had more contacts than there is room for, so what "
                f"they did is wrong; found room for {self._room[0]} contacts and {self._room[1]} constraint rows per "
                "copy; allow more (contacts, constraint_rows) or choose physics: native"
            )
