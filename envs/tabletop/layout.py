"""Where an episode starts: everything random about it, drawn from its seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embodied_rl.envs.tabletop.instructions import COLORS, describe, encode, write_instruction
from embodied_rl.envs.tabletop.scene import DRAWER_MAX, FINGER_MAX, HALF_SIZE, HIDDEN, HOME, SHAPES, Scene
from embodied_rl.envs.tabletop.tasks import Task
from embodied_rl.seeding import numpy_rng

AREA = np.array([[-0.11, 0.11], [-0.11, 0.21]])
"""Where objects start: ranges of x and y of their centres, m."""
GOAL_AREA = np.array([[-0.13, 0.13], [-0.13, 0.23]])
"""Where goals are marked, m."""
SEPARATION = 0.10
"""Smallest distance between centres of objects, m: room for an open gripper around each."""
GOAL_DISTANCE = (0.09, 0.18)
"""From the object meant to the marked goal, m."""
GOAL_CLEARANCE = 0.08
"""From the other objects to the marked goal, m."""
YAW = 0.4
"""rad to either side; keeps each object graspable without turning the wrist, though not always well."""
JOINT_NOISE = 0.04
"""Standard deviation of the initial joint angles about HOME, rad; cut at two."""
_TRIES = 48


@dataclass(frozen=True)
class Start:
    """One drawn start.

    Example: task lift, text "lift the red cube", a = 0, colors [0, 3, 2] (red cube, yellow cylinder, blue brick).
    """

    qpos: np.ndarray
    """[nq] float64, objects at rest on the table."""
    a: int
    """Slot of the object meant."""
    b: int
    """Slot of the second object; another one than a, also where the task needs none."""
    relation: int
    """Index into the task's wordings."""
    goal: np.ndarray
    """[3] marked goal, or HIDDEN."""
    colors: np.ndarray
    """[M] int64 index into COLORS, without repetition."""
    text: str
    words: tuple[int, ...]
    """Word ids of `text`, padded."""


def draw_start(scene: Scene, task: Task, seed: int) -> Start:
    """Draw a start; the same seed and task give the same start, bit for bit.

    Args:
        scene: Addresses of the state vector.
        task: Which task.
        seed: Start seed; odd for evaluation, which takes other wordings (see `embodied_rl.seeding`).

    Returns:
        start: Objects at least SEPARATION apart, at rest.
    """
    rng = numpy_rng(seed, f"tabletop/{task.name}")
    slots = len(SHAPES)
    a, b = (int(i) for i in rng.permutation(slots)[:2])
    relation = int(rng.integers(len(task.wordings)))
    colors = rng.permutation(len(COLORS))[:slots]
    split = "eval" if seed & 1 else "train"
    text = write_instruction(
        task.wordings[relation], split, describe(a, colors, rng), describe(b, colors, rng), rng
    )
    places, spot = _spread(rng, a)
    qpos = scene.model.qpos0.copy()
    qpos[scene.arm_qpos] = HOME + JOINT_NOISE * rng.standard_normal(len(HOME)).clip(-2, 2)
    qpos[scene.fingers_qpos] = FINGER_MAX
    low, high = task.drawer
    qpos[scene.drawer_qpos] = min(rng.uniform(low, high), DRAWER_MAX)
    yaw = rng.uniform(-YAW, YAW, slots)
    for i, address in enumerate(scene.objects_qpos):
        qpos[address : address + 2] = places[i]
        qpos[address + 2] = HALF_SIZE[i, 2]
        qpos[address + 3 : address + 7] = np.cos(yaw[i] / 2), 0.0, 0.0, np.sin(yaw[i] / 2)
    goal = np.array([*spot, 0.001]) if task.marked_goal else HIDDEN
    return Start(qpos, a, b, relation, goal, colors, text, encode(text))


def _spread(rng: np.random.Generator, a: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw object places [M, 2] and a goal [2] that keep their distances, by rejection."""
    others = [i for i in range(len(SHAPES)) if i != a]
    while True:
        places = AREA[:, 0] + (AREA[:, 1] - AREA[:, 0]) * rng.random((_TRIES, len(SHAPES), 2))
        goals = GOAL_AREA[:, 0] + (GOAL_AREA[:, 1] - GOAL_AREA[:, 0]) * rng.random((_TRIES, 2))
        gaps = np.linalg.norm(places - np.roll(places, 1, axis=1), axis=2)
        to_goal = np.linalg.norm(places - goals[:, None], axis=2)
        good = (
            (gaps.min(axis=1) >= SEPARATION)
            & (to_goal[:, a] >= GOAL_DISTANCE[0])
            & (to_goal[:, a] <= GOAL_DISTANCE[1])
            & (to_goal[:, others].min(axis=1) >= GOAL_CLEARANCE)
        )
        found = np.flatnonzero(good)
        if len(found):
            return places[found[0]], goals[found[0]]
