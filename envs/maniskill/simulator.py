"""One copy of a ManiSkill task in a worker process (`env.workers`); docs/simulators.md says what a `Simulator` is."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embodied_rl.envs._spaces import resized
from embodied_rl.envs.maniskill import Config
from embodied_rl.envs.maniskill.scene import Moment, Scene
from embodied_rl.errors import UserError

Shown = dict[str, NDArray[Any]]


class Simulator:
    """A `Scene` of one copy as NumPy."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Build it.

        Args:
            settings: Of `maniskill.Config`.
        """
        config = Config(**settings)
        try:
            self.scene = Scene(config, 1, torch.device("cpu"))
        except UserError as error:
            sys.exit(str(error).removeprefix("env maniskill: "))
        scene, self._draws, self._ends = self.scene, config.observation != "state", config.end_on_success
        seen = {
            name: {
                "shape": list(entry.shape), "dtype": str(entry.dtype).removeprefix("torch."), "low": entry.low,
                "high": entry.high, "meaning": entry.meaning,
            }
            for name, entry in scene.observation.items()
        }  # fmt: skip
        self.spec = {
            "observation": seen,
            "action": {
                "kind": "continuous", "size": scene.action.spec.size, "names": list(scene.action_names),
                "convention": scene.convention and scene.convention.model_dump(mode="json"),
            },
            "tasks": [config.task],
            "max_steps": scene.max_steps,
            "success": scene.has_success,
            "cameras": list(scene.cameras),
            "control_hz": scene.control_hz,
            "on_demand": self._draws,
        }

    def reset(self, seed: int, task: int) -> Shown | None:
        """Begin an episode."""
        self.scene.start([0], [seed])
        return None if self._draws else self.observe()

    def step(self, action: NDArray[np.float32]) -> tuple[Shown | None, float, bool, bool, dict[str, Any]]:
        """Simulate one control step."""
        moment = self.scene.step(torch.from_numpy(action)[None], draw=False)
        shown: Shown | None = _shown(moment)
        if self._draws:
            # Pictures wait until they are asked for, unless there is something to see that ends the episode.
            whole = not any(bool(bad) for name, bad in moment.broken.items() if name != "reward")
            shown = None if whole else self.observe() | _shown(moment)
        info = {} if moment.success is None else {"success": bool(moment.success)}
        return shown, float(moment.reward), self._ends and bool(moment.ended), False, info

    def observe(self) -> Shown:
        """What the scene shows now."""
        return _shown(self.scene.look())

    def render(self, camera: str, height: int, width: int) -> NDArray[np.uint8]:
        """A picture [height, width, 3]."""
        picture: NDArray[np.uint8] = resized(self.scene.film(camera), height, width)[0].numpy()
        return picture

    def close(self) -> None:
        """Free the simulator."""
        self.scene.close()


def _shown(moment: Moment) -> Shown:
    return {name: x[0].numpy() for name, x in moment.obs.items()}
