"""A two-joint arm on a table touches the ball that its instruction names."""

import mujoco
import numpy as np
import torch
from torch import Tensor

from embodied_rl.envs.mjcf import Start, View

BALLS = ("red", "blue")


class Reach:
    """`tasks` names two tasks, which differ in the ball that is meant."""

    tasks = BALLS

    def __init__(self, model: mujoco.MjModel) -> None:
        """Nothing of the scene is needed beforehand."""

    def start(self, task: str, rng: np.random.Generator) -> Start:
        """Arm and balls anywhere; `memory` holds which ball is meant, for the reward alone."""
        radius, angle = rng.uniform(0.08, 0.18, 2), rng.uniform(-np.pi, np.pi, 2)
        angle[1] = angle[0] + rng.uniform(1.0, 2 * np.pi - 1.0)  # the balls never lie on each other
        places = {ball: (r * np.cos(a), r * np.sin(a), 0.0) for ball, r, a in zip(BALLS, radius, angle, strict=True)}
        wording = ("touch the {} ball", "reach for the ball that is {}")[rng.integers(2)]
        qpos = rng.uniform([-np.pi, -2.0], [np.pi, 2.0])
        return Start(wording.format(task), qpos=qpos, mocap=places, memory=(BALLS.index(task),))

    def observe(self, view: View) -> Tensor:
        """Joints, and where both balls are as seen from the tip; not which one is meant."""
        tip = view.site("tip")
        balls = [(view.body(ball) - tip)[:, :2] for ball in BALLS]
        return torch.cat([view.qpos.sin(), view.qpos.cos(), 0.1 * view.qvel, *(10 * ball for ball in balls)], dim=1)

    def sense(self, view: View) -> Tensor:
        """What a policy that looks at pictures still feels: its joints."""
        return torch.cat([view.qpos.sin(), view.qpos.cos(), 0.1 * view.qvel], dim=1)

    def distance(self, view: View) -> Tensor:
        """[B] m from the tip to the ball that is meant."""
        places = torch.stack([view.body(ball) for ball in BALLS], dim=1)
        meant = places[torch.arange(len(places), device=places.device), view.memory[:, 0].long()]
        return (meant - view.site("tip"))[:, :2].norm(dim=1)

    def reward(self, view: View) -> Tensor:
        """1 at the ball, less the farther away."""
        return torch.exp(-10 * self.distance(view))

    def success(self, view: View) -> Tensor:
        """The tip is on the ball."""
        return self.distance(view) < 0.025
