"""LIBERO's own adapter without LIBERO: what it shows, takes and says is its own, and the world behind it stands still."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np

PATH = Path(__file__).parents[3] / "envs" / "libero" / "simulator.py"
found = importlib.util.spec_from_file_location("adapter", PATH)
adapter = importlib.util.module_from_spec(found)
found.loader.exec_module(adapter)

TASK = "libero_spatial/pick_up_the_black_bowl_between_the_plate_and_the_ramekin_and_place_it_on_the_plate"
POSE = {"robot0_eef_pos": [0.1, 0.2, 0.3], "robot0_eef_quat": [0.0, 0.0, 0.0, 1.0], "robot0_gripper_qpos": [0.04, -0.04]}


class Scene:
    """Stands in for the adapter's."""

    def __init__(self, envs, task):
        self.task, self.states, self.seen = task, np.zeros((adapter.STATES, 1)), None
        observed = {name: SimpleNamespace(obs=np.array(numbers)) for name, numbers in POSE.items()}
        self.env = SimpleNamespace(step=lambda command: (None, 0.0, False, {}), _observables=observed)

    def start(self, state, seed):
        pass

    def draw(self, camera, height, width, data):
        return np.full((height, width, 3), 100 + 50 * (camera == "agentview"), np.uint8)


adapter.task_names, adapter.prepare, adapter.Scene = lambda: [TASK], lambda assets: None, Scene
Simulator = adapter.Simulator
