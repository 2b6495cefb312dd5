"""A demonstration repeated by guesswork: as if things lay as they do at another start, and only success tells.

Where the objects are is looked at nowhere. A guess is what some other start would show; the hand knows where it is and
feels whether its fingers hold something, and the simulator says whether the task is solved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from embodied_rl.envs.tabletop.layout import draw_starts
from embodied_rl.envs.tabletop.scene import HALF_SIZE
from embodied_rl.envs.tabletop.tasks import TASKS
from embodied_rl.seeding import numpy_rng

if TYPE_CHECKING:
    from embodied_rl.envs.tabletop.env import TabletopEnv
    from embodied_rl.envs.tabletop.replay import Replay

SHIFT = 0.03
"""Metres: standard deviation of a small shift, to each side."""


def things_at(env: TabletopEnv, seeds: list[int], tasks: list[int], beside: Sequence[list[int]]) -> dict[str, Tensor]:
    """Where the object meant and the goal lie at R starts, shifted: a part of what `Replay` looks at, in its form.

    A shift is the mean of those that the seeds in `beside` [R] draw.
    """
    starts = draw_starts(env.scene, [TASKS[env.spec.tasks[task]] for task in tasks], seeds)
    rows = np.arange(len(seeds))
    pose = starts.qpos[rows[:, None], np.array(env.scene.objects_qpos)[starts.a][:, None] + np.arange(7)]
    found = {
        "object": pose[:, :3],
        "half": HALF_SIZE[starts.a, 2],
        "yaw": 2 * np.arctan2(pose[:, 6], pose[:, 3]),
        "goal": starts.goal,
    }
    shift = np.zeros((len(seeds), 2, 3))
    for row, some in enumerate(beside):
        shift[row, :, :2] = np.mean([_shift(seed) for seed in some] or [np.zeros((2, 2))], axis=0)
    found["object"], found["goal"] = found["object"] + shift[:, 0], found["goal"] + shift[:, 1]
    return {name: torch.from_numpy(x).float().to(env.physics.device) for name, x in found.items()}


def _shift(seed: int) -> np.ndarray:
    """[2, 2] of the object and of the goal, to each side."""
    return SHIFT * numpy_rng(seed, "beside").normal(size=(2, 2))


def feels(env: TabletopEnv) -> Tensor:
    """[B] bool, something is between the fingers, whatever it is: they rest wider than they are told to close.

    That is what `observe.look` calls pressing; where the object meant is, which it asks besides, they do not feel.
    """
    scene, wanted = env.scene, env.controller.finger
    opening = env.physics.qpos[:, scene.fingers_qpos].mean(dim=1)
    still = env.physics.qvel[:, scene.fingers_qvel].abs().amax(dim=1) < 0.03
    return (opening - wanted > 0.002) & (opening > 0.012) & still


def solved(
    replay: Replay, env: TabletopEnv, seeds: Tensor, tasks: Tensor, elsewhere: Tensor, beside: Sequence[list[int]]
) -> Tensor:
    """Try every guess once, as many side by side as the env has copies; nothing is drawn.

    Args:
        replay: Of the demonstrations.
        env: Which it watches; is to be reset afterwards.
        seeds: [N] int64 where attempts start.
        tasks: [N] int64
        elsewhere: [N] int64 starts that are taken for them.
        beside: N lists of seeds of shifts.

    Returns:
        solved: [N] bool
    """
    b, device = env.spec.num_envs, env.device
    out, trying, begun = torch.zeros(len(seeds), dtype=torch.bool), torch.full((b,), -1), 0
    with env.undrawn():
        while True:
            free = (trying < 0).nonzero()[:, 0][: len(seeds) - begun]
            if len(free):
                trying[free] = torch.arange(begun, begun + len(free))
                begun += len(free)
                fresh = torch.zeros(b, dtype=torch.bool)
                fresh[free] = True
                env.reset(fresh.to(device), seeds[trying].to(device), tasks[trying].to(device))
                replay.suppose(fresh, elsewhere[trying], [beside[i] for i in trying.tolist()])
                replay.reset(fresh)
            running = trying >= 0
            if not bool(running.any()):
                return out
            step = env.step(torch.where(running.to(device)[:, None], replay.act(), 0.0), running.to(device))
            assert step.success is not None
            success, ended = step.success.cpu() & running, (step.terminated | step.truncated).cpu()
            out[trying[success]] = True
            trying[success | ended | replay.over.cpu()] = -1
