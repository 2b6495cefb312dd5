"""The interface between the tabletop env and a physics engine, and the native engine behind it."""

from __future__ import annotations

import os
import warnings
from typing import Any, Literal, Protocol

import mujoco
import numpy as np
import torch
from mujoco.rollout import Rollout
from torch import Tensor

from embodied_rl.errors import CheckpointError
from embodied_rl.types import State

Engine = Literal["auto", "native", "warp"]


class Physics(Protocol):
    """B copies of one MuJoCo model, stepped together.

    Everything an env computes is a function of `qpos` and `qvel`, so that engines can be exchanged. Both are the same
    tensors for good; `place`, `step` and `set_state` change their values, nobody else does.
    """

    model: mujoco.MjModel
    num_envs: int
    device: torch.device
    burst: Tensor
    """[B] bool on `device`, copies that became unstable in the latest step; they are at rest again, elsewhere than they
    would have been, so their episodes tell nothing."""

    @property
    def qpos(self) -> Tensor:
        """[B, nq] float32 on `device`."""
        ...

    @property
    def qvel(self) -> Tensor:
        """[B, nv] float32 on `device`."""
        ...

    def place(self, mask: Tensor, qpos: Tensor, qvel: Tensor) -> None:
        """Set positions and velocities of some copies; everything else of them starts as new.

        Args:
            mask: [B] bool, copies to set.
            qpos: [B, nq] in the model's units; only masked rows are read.
            qvel: [B, nv]; only masked rows are read.
        """
        ...

    def step(self, ctrl: Tensor, substeps: int, active: Tensor | None = None) -> None:
        """Advance copies by physics steps under constant controls.

        Args:
            ctrl: [B, nu]
            substeps: Physics steps.
            active: [B] bool, copies to advance; the others keep their state bit for bit. None for all.
        """
        ...

    def get_state(self) -> State:
        """What the engine needs to continue, as tensors that later steps do not change."""
        ...

    def set_state(self, state: State) -> None:
        """Restore `get_state`'s result."""
        ...

    def close(self) -> None:
        """Free threads and memory; may be called twice."""
        ...


class NativePhysics:
    """MuJoCo's C engine with its own thread pool (`mujoco.rollout.Rollout`), float64 inside.

    The solver starts each control step cold (no warm start is carried over), so time, positions and velocities are
    the whole state and a restored copy continues bit for bit, whatever ran in between and on whichever thread.
    """

    def __init__(self, model: mujoco.MjModel, num_envs: int, threads: int) -> None:
        """Start the pool.

        Args:
            model: Compiled model, shared by all copies.
            num_envs: Number of copies B.
            threads: Threads that step copies in parallel; 1 steps on the calling thread.
        """
        self.model = model
        self.num_envs = num_envs
        self.device = torch.device("cpu")
        pool = threads if threads > 1 else 0
        self._pool: Rollout | None = Rollout(nthread=pool)
        self._models = [model] * num_envs
        self._data = [mujoco.MjData(model) for _ in range(max(1, pool))]
        size = mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_FULLPHYSICS)
        assert size == 1 + model.nq + model.nv, "the scene must not have activations or plugins"
        self._state = np.zeros((num_envs, size))
        self._state[:, 1 : 1 + model.nq] = model.qpos0
        self._tensor = torch.from_numpy(self._state)
        self._qpos, self._qvel = torch.zeros(num_envs, model.nq), torch.zeros(num_envs, model.nv)
        self._publish()
        self.burst = torch.zeros(num_envs, dtype=torch.bool)
        self._path = np.zeros((num_envs, 0, size))
        self._ctrl = np.zeros((num_envs, 0, model.nu))
        self._sensors = np.zeros((num_envs, 0, model.nsensordata))
        # A few chunks per thread even out copies that need more solver iterations than others.
        self._chunk = max(1, num_envs // (4 * max(1, threads)))

    @property
    def qpos(self) -> Tensor:
        """[B, nq] float32."""
        return self._qpos

    @property
    def qvel(self) -> Tensor:
        """[B, nv] float32."""
        return self._qvel

    def _publish(self) -> None:
        self._qpos.copy_(self._tensor[:, 1 : 1 + self.model.nq])
        self._qvel.copy_(self._tensor[:, 1 + self.model.nq :])

    def place(self, mask: Tensor, qpos: Tensor, qvel: Tensor) -> None:
        """Set positions [B, nq] and velocities [B, nv] of the masked copies and their clocks to zero."""
        self._tensor[mask] = torch.cat([torch.zeros(self.num_envs, 1), qpos, qvel], dim=1)[mask].double()
        self._publish()

    def step(self, ctrl: Tensor, substeps: int, active: Tensor | None = None) -> None:
        """Advance copies by `substeps` physics steps under constant controls [B, nu]; see `Physics.step`."""
        if self._ctrl.shape[1] != substeps:
            self._path = np.zeros((self.num_envs, substeps, self._state.shape[1]))
            self._ctrl = np.zeros((self.num_envs, substeps, self.model.nu))
            self._sensors = np.zeros((self.num_envs, substeps, self.model.nsensordata))
        rows = slice(None) if active is None or bool(active.all()) else active.nonzero()[:, 0].numpy()
        state = self._state[rows]
        n = len(state)
        self.burst.zero_()
        if n == 0:
            return
        path, controls = self._path[:n], self._ctrl[:n]
        controls[:] = ctrl.numpy()[rows, None]
        assert self._pool is not None, "step after close"
        self._pool.rollout(
            self._models[:n],
            self._data,
            state,
            controls,
            skip_checks=True,
            nstep=substeps,
            state=path,
            sensordata=self._sensors[:n],
            chunk_size=self._chunk,
        )
        # MuJoCo stops a copy whose state has blown up, or starts it again from its reference pose: its clock tells.
        clock = state[:, 0] + (substeps - 0.5) * self.model.opt.timestep
        broken = ~(path[:, -1, 0] > clock)
        if broken.any():
            path[broken, -1] = state[broken]
            path[broken, -1, 1 + self.model.nq :] = 0.0
            self.burst[rows] = torch.from_numpy(broken)
            warnings.warn(
                f"physics: copies {np.arange(self.num_envs)[rows][broken].tolist()} became unstable and were "
                "put back to rest where they were one control step before",
                RuntimeWarning,
                stacklevel=2,
            )
        self._state[rows] = path[:, -1]
        self._publish()

    def get_state(self) -> State:
        """{"native": [B, 1 + nq + nv] float64: time (s), positions, velocities}."""
        return {"native": self._tensor.clone()}

    def set_state(self, state: State) -> None:
        """Restore `get_state`'s result.

        Raises:
            CheckpointError: The state comes from another engine, scene or number of copies.
        """
        saved = state.get("native")
        if saved is None or saved.shape != self._tensor.shape:
            found = f"shape {list(saved.shape)}" if saved is not None else f"entries {sorted(state)}"
            raise CheckpointError(
                f"physics state: found {found}, expected 'native' of shape {list(self._tensor.shape)}; "
                "restore it with the same physics engine and number of copies"
            )
        self._tensor.copy_(saved)
        self._publish()

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def make_physics(
    engine: Engine, model: mujoco.MjModel, num_envs: int, device: torch.device, threads: int | None, **room: int
) -> Physics:
    """Make an engine for B copies of a model.

    Args:
        engine: native: MuJoCo's C engine on CPU threads; warp: MuJoCo Warp on `device`; auto: by the device.
        model: Without activations.
        num_envs: Copies B.
        device: Of the Warp engine.
        threads: Of the native engine; None for every core this process may use.
        **room: For `WarpPhysics`: contacts and constraint_rows of each copy.
    """
    if engine == "warp" or (engine == "auto" and device.type == "cuda"):
        # Only those who ask for it pay for importing and compiling it.
        from embodied_rl.envs.tabletop.warp_physics import WarpPhysics

        return WarpPhysics(model, num_envs, device, **room)
    return NativePhysics(model, num_envs, cores(threads))


def cores(threads: int | None) -> int:
    """CPU threads to use: as many as the recipe says, or all that this process may use."""
    return threads or len(os.sched_getaffinity(0))


def refuse_idle(config: Any, of_pictures: tuple[str, ...]) -> None:
    """Refuse what the physics or the observation that was chosen never reads.

    Args:
        config: With physics, observation, threads, contacts and constraint_rows.
        of_pictures: Its settings that belong to observation: pictures.

    Raises:
        ValueError: A setting was changed and does nothing.
    """
    state = config.observation == "state"
    idle = {
        "observation (state)": of_pictures if state else (),
        "physics (native)": ("contacts", "constraint_rows") if config.physics == "native" else (),
        "physics (warp) and observation (state)": ("threads",) if config.physics == "warp" and state else (),
    }
    for cause, names in idle.items():
        for name in names:
            value = getattr(config, name)
            if value != type(config).model_fields[name].default:
                raise ValueError(f"{name} ({value}) does nothing with {cause}: remove it, or change the other")
