"""Where episodes start: everything random about them, drawn from their seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embodied_rl.envs.tabletop.instructions import NAMES, Name, Sentences, describe, encode, write_instruction
from embodied_rl.envs.tabletop.scene import FINGER_MAX, HALF_SIZE, HIDDEN, HOME, SHAPES, Scene
from embodied_rl.envs.tabletop.tasks import Task
from embodied_rl.seeding import numpy_rng

AREA = np.array([[-0.11, -0.10], [0.11, 0.21]])
"""Lowest and highest x and y of the objects' centres at the start, m."""
GOAL_AREA = np.array([[-0.13, -0.12], [0.13, 0.23]])
"""Lowest and highest x and y of marked goals, m."""
SEPARATION = 0.10
"""Smallest distance between centres of objects, m: room for an open gripper around each."""
GOAL_DISTANCE = (0.09, 0.18)
"""From the object meant to the marked goal, m."""
GOAL_CLEARANCE = 0.08
"""From the other objects to the marked goal, m."""
YAW = 0.4
"""rad to either side; keeps each object graspable without turning the wrist, though not always well."""
JOINT_NOISE = 0.04
"""Initial joint angles are within this of HOME, rad."""

_TRIES = 24
_SLOTS = len(SHAPES)


@dataclass(frozen=True)
class Starts:
    """R drawn starts.

    Example, R = 1: texts ["lift the red cube"], a [0], colors [[0, 3, 2]] (red cube, yellow cylinder, blue brick).
    """

    qpos: np.ndarray
    """[R, nq] float64, objects at rest on the table."""
    a: np.ndarray
    """[R] int64 slot of the object meant."""
    b: np.ndarray
    """[R] int64 slot of the second object; another one than a, also where the task needs none."""
    b_start: np.ndarray
    """[R, 2] where b is, m."""
    relation: np.ndarray
    """[R] int64 index into the task's wordings."""
    goal: np.ndarray
    """[R, 3] marked goal, or HIDDEN, m."""
    colors: np.ndarray
    """[R, M] int64 index into COLORS, without repetition."""
    words: np.ndarray
    """[R, L] int64 word ids of the texts, padded."""
    texts: list[str]


def draw_starts(
    scene: Scene,
    tasks: list[Task],
    seeds: list[int],
    *,
    evaluation_sentences: Sentences = "heldout",
    names: Sequence[Name] = NAMES,
) -> Starts:
    """Draw starts; each depends on its own seed and task only, so equal ones are equal bit for bit.

    Args:
        scene: Addresses of the state vector.
        tasks: R tasks.
        seeds: R start seeds; odd for evaluation (see `embodied_rl.seeding`).
        evaluation_sentences: Where evaluation starts take their sentences from; all else about them is the same.
        names: How objects may be named.

    Returns:
        starts: Objects at least SEPARATION apart, at rest.
    """
    generators = [numpy_rng(seed, f"tabletop/{task.name}") for seed, task in zip(seeds, tasks, strict=True)]
    u = np.stack([rng.random(24) for rng in generators])
    order = u[:, 0:3].argsort(axis=1)
    a, b = order[:, 0], order[:, 1]
    colors = u[:, 3:9].argsort(axis=1)[:, :_SLOTS]
    relation = np.array([int(x * len(task.wordings)) for x, task in zip(u[:, 9], tasks, strict=True)])
    texts = [
        write_instruction(
            task.wordings[relation[i]],
            "eval" if evaluation_sentences == "heldout" and seeds[i] & 1 else "train",
            describe(int(a[i]), colors[i], names, u[i, 10]),
            describe(int(b[i]), colors[i], names, u[i, 11]),
            u[i, 12],
        )
        for i, task in enumerate(tasks)
    ]
    places, spots = _spread(generators, a)
    marked = np.array([task.marked_goal for task in tasks])
    goal = np.where(marked[:, None], np.concatenate([spots, np.full((len(a), 1), 0.001)], axis=1), HIDDEN)
    drawer = np.array([task.drawer for task in tasks])
    rows = np.arange(len(a))
    return Starts(
        qpos=_positions(scene, u, places, drawer),
        a=a,
        b=b,
        b_start=places[rows, b],
        relation=relation,
        goal=goal,
        colors=colors,
        words=np.array([encode(text) for text in texts]),
        texts=texts,
    )


def rephrase(
    task: Task, seed: int, step: int, a: int, b: int, relation: int, colors: np.ndarray, names: Sequence[Name]
) -> str:
    """The same instruction in other words of training, drawn from the start's seed and the control step.

    Args:
        task: Of the copy.
        seed: Start seed.
        step: Control steps since the start.
        a: Slot of the object meant.
        b: Slot of the second object.
        relation: Index into the task's wordings.
        colors: [M] index into COLORS.
        names: How objects may be named.

    Returns:
        text: It asks for what the start's own sentence asks for.
    """
    u = numpy_rng(seed, f"tabletop/words/{step}").random(3)
    nouns = describe(a, colors, names, u[0]), describe(b, colors, names, u[1])
    return write_instruction(task.wordings[relation], "train", *nouns, u[2])


def _positions(scene: Scene, u: np.ndarray, places: np.ndarray, drawer: np.ndarray) -> np.ndarray:
    """State vectors [R, nq] from the uniform draws u [R, 24], object places [R, M, 2] and drawer ranges [R, 2]."""
    qpos = np.repeat(scene.model.qpos0[None], len(u), axis=0)
    qpos[:, scene.arm_qpos] = HOME + JOINT_NOISE * (2 * u[:, 13:20] - 1)
    qpos[:, scene.fingers_qpos] = FINGER_MAX
    qpos[:, scene.drawer_qpos] = drawer[:, 0] + (drawer[:, 1] - drawer[:, 0]) * u[:, 20]
    half_yaw = 0.5 * YAW * (2 * u[:, 21:24] - 1)
    for i, address in enumerate(scene.objects_qpos):
        qpos[:, address : address + 2] = places[:, i]
        qpos[:, address + 2] = HALF_SIZE[i, 2]
        qpos[:, address + 3] = np.cos(half_yaw[:, i])
        qpos[:, address + 4 : address + 6] = 0.0
        qpos[:, address + 6] = np.sin(half_yaw[:, i])
    return qpos


def _spread(generators: list[np.random.Generator], a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw object places [R, M, 2] and goals [R, 2] that keep their distances, by rejection."""
    places, spots = np.empty((len(a), _SLOTS, 2)), np.empty((len(a), 2))
    missing = np.arange(len(a))
    while len(missing):
        u = np.stack([generators[i].random((_TRIES, _SLOTS + 1, 2)) for i in missing])
        objects = AREA[0] + (AREA[1] - AREA[0]) * u[:, :, :_SLOTS]
        goals = GOAL_AREA[0] + (GOAL_AREA[1] - GOAL_AREA[0]) * u[:, :, _SLOTS]
        gaps = ((objects - np.roll(objects, 1, axis=2)) ** 2).sum(axis=3)
        to_goal = ((objects - goals[:, :, None]) ** 2).sum(axis=3)
        meant = np.arange(_SLOTS) == a[missing, None, None]
        near = np.where(meant, GOAL_DISTANCE[0], GOAL_CLEARANCE) ** 2
        far = np.where(meant, GOAL_DISTANCE[1], np.inf) ** 2
        good = ((gaps >= SEPARATION**2) & (to_goal >= near) & (to_goal <= far)).all(axis=2)
        found, first = good.any(axis=1), good.argmax(axis=1)
        rows = np.flatnonzero(found)
        places[missing[rows]], spots[missing[rows]] = objects[rows, first[rows]], goals[rows, first[rows]]
        missing = missing[~found]
    return places, spots
