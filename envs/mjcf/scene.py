"""The scene file: what it must have for many copies of it to be stepped, and what its actuators take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mujoco
import torch
from torch import Tensor

from embodied_rl.convention import UNKNOWN, Convention
from embodied_rl.errors import CapabilityError, ConfigError, NotFoundError
from embodied_rl.types import ActionSpec


@dataclass(frozen=True)
class Scene:
    """A compiled scene file.

    Example: one motor with ctrlrange -2 to 4 has middle [1], half [3]; an action of -1 is a control of -2.
    """

    path: Path
    model: mujoco.MjModel
    action: ActionSpec
    middle: Tensor
    """[nu] control that an action of 0 means."""
    half: Tensor
    """[nu] by how much an action of 1 differs from that."""

    @property
    def where(self) -> str:
        """For messages."""
        return f"env mjcf: scene '{self.path}'"


def load_scene(path: str, convention: Convention = UNKNOWN) -> Scene:
    """Compile a scene.

    Args:
        path: Of an MJCF file; files that it includes are looked for beside it.
        convention: Of its actions, as far as it is known.

    Raises:
        NotFoundError: No such file.
        ConfigError: MuJoCo refuses it (says what MuJoCo says), or the convention does not fit.
        CapabilityError: It has no actuator, an actuator without a range, or state beyond positions and velocities.
    """
    file = Path(path).expanduser()
    where = f"env mjcf: scene '{path}'"
    if not file.is_file():
        raise NotFoundError(f"{where}: no such file; env.scene is the path of an MJCF file (XML)")
    try:
        model = mujoco.MjModel.from_xml_path(str(file))
    except ValueError as error:
        raise ConfigError(f"{where} is not valid: {' '.join(str(error).split())}") from None
    if model.nu == 0:
        raise CapabilityError(f"{where} has no actuator, so no action could move anything: add one (<actuator>)")
    names = tuple(model.actuator(i).name or f"actuator{i}" for i in range(model.nu))
    free = [name for name, limited in zip(names, model.actuator_ctrllimited, strict=True) if not limited]
    if free:
        raise CapabilityError(
            f"{where}: actuator '{free[0]}' has no ctrlrange, so nothing says what an action of 1 is: give it one, as "
            'in ctrlrange="-1 1"'
        )
    if mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_FULLPHYSICS) != 1 + model.nq + model.nv:
        raise CapabilityError(
            f"{where} has state beyond positions and velocities (actuators with dyntype or delay, or plugins), which "
            "the engines do not carry from step to step: use actuators without it, such as motor or position"
        )
    _marks_only(model, where)
    low, high = torch.from_numpy(model.actuator_ctrlrange.copy()).float().unbind(1)
    if misfit := convention.misfit(model.nu):
        raise ConfigError(f"{where}: {misfit}; correct env.convention, or the scene's actuators")
    action = ActionSpec("continuous", model.nu, names, convention=None if convention == UNKNOWN else convention)
    return Scene(file, model, action, (high + low) / 2, (high - low) / 2)


def _marks_only(model: mujoco.MjModel, where: str) -> None:
    """Mocap bodies are placed at the start of an episode and never felt: the engines do not move them."""
    for body in range(model.nbody):
        if model.body_mocapid[body] < 0:
            continue
        name = model.body(body).name
        geoms = range(model.body_geomadr[body], model.body_geomadr[body] + model.body_geomnum[body])
        if any(model.geom_contype[g] or model.geom_conaffinity[g] for g in geoms):
            raise CapabilityError(
                f"{where}: mocap body '{name}' collides, and mocap bodies are marks here that are seen and not felt: "
                'give its geoms contype="0" conaffinity="0", or joints instead of mocap'
            )
        tied = model.eq_type != mujoco.mjtEq.mjEQ_JOINT
        if bool((((model.eq_obj1id == body) | (model.eq_obj2id == body)) & tied).any()):
            raise CapabilityError(
                f"{where}: an equality constraint holds on to mocap body '{name}', and mocap bodies are marks here "
                "that are seen and not felt: tie bodies with joints"
            )
