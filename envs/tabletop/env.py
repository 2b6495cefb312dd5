"""The tabletop env: B copies of arm, objects and drawer, each with its own task and instruction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from embodied_rl.envs.tabletop.achieved import Achieved
from embodied_rl.envs.tabletop.control import CONVENTION, PoseController
from embodied_rl.envs.tabletop.instructions import NAMES, encode
from embodied_rl.envs.tabletop.kinematics import ArmKinematics
from embodied_rl.envs.tabletop.layout import draw_starts, rephrase
from embodied_rl.envs.tabletop.observe import OBSERVATION, Episode, Observer
from embodied_rl.envs.tabletop.physics import Physics
from embodied_rl.envs.tabletop.pictures import Films, engines, told, told_spec
from embodied_rl.envs.tabletop.scene import CAMERAS, CONTROL_HZ, HOME, Scene, scene_xml
from embodied_rl.envs.tabletop.tasks import TASKS, View, judge
from embodied_rl.errors import CheckpointError
from embodied_rl.runfolder import checksum
from embodied_rl.seeding import split_of
from embodied_rl.types import ActionSpec, EnvSpec, Obs, State, Step, TensorSpec

if TYPE_CHECKING:
    from embodied_rl.envs.tabletop.clumsy import Clumsy
    from embodied_rl.envs.tabletop.expert import Expert
    from embodied_rl.envs.tabletop.instructions import Name, Sentences
    from embodied_rl.envs.tabletop.pictures import Pictures
    from embodied_rl.envs.tabletop.replay import Replay

ACTION = ActionSpec("continuous", 7, ("dx", "dy", "dz", "drx", "dry", "drz", "gripper"), convention=CONVENTION)
HAND = slice(14, 24)
"""Columns of the state observation's "proprio" that remain where a policy looks at pictures: where the hand is and how
far it is open. Velocities and targets say what the last action was, and a policy that imitates repeats that instead of
looking."""
PROGRESS = 10.0
"""Scale of the progress reward: an episode that is solved from far away is worth a little less than this."""


class TabletopEnv:
    """See `embodied_rl.types.Env`; the tasks are described in `tasks.py`, the observation in `observe.py`.

    Physics and everything computed from it live on the engine's device; observations, rewards and actions cross to
    `device` at the boundary (for free when they are the same).
    """

    def __init__(
        self,
        scene: Scene,
        physics: Physics,
        tasks: tuple[str, ...],
        *,
        reward: Literal["dense", "progress", "sparse"],
        max_steps: int,
        end_on_success: bool,
        device: torch.device,
        pictures: Pictures | None = None,
        privileged: bool = False,
        evaluation_sentences: Sentences = "heldout",
        names: Sequence[Name] = NAMES,
        rephrase: bool = False,
    ) -> None:
        """Wire the parts; use `build` to make one from a config."""
        num_envs, inner = physics.num_envs, physics.device
        observation = dict(OBSERVATION)
        if pictures is not None:
            meaning = "TCP position (5/m) 3, TCP x and y axes 6, gripper opening -1..1"
            hand = TensorSpec((HAND.stop - HAND.start,), meaning=meaning)
            observation = pictures.specs | {"hand": hand, "instruction": observation["instruction"]}
        if rephrase:
            observation["instruction"] = replace(observation["instruction"], constant=False)
        if privileged:
            observation["told"] = told_spec(len(tasks))
        self.scene = scene
        self.device = device
        self.physics = physics
        self.spec = EnvSpec(
            observation=observation,
            action=ACTION,
            num_envs=num_envs,
            max_steps=max_steps,
            tasks=tasks,
            seedable=True,
            has_state=True,
            has_success=True,
            cameras=CAMERAS,
            control_hz=CONTROL_HZ,
            on_demand=pictures is not None,
        )
        self._tasks = tuple(TASKS[name] for name in tasks)
        self._reward = reward
        self._max_steps = max_steps
        self._end_on_success = end_on_success
        self._evaluation_sentences: Sentences = evaluation_sentences
        self._names, self._rephrase = tuple(names), rephrase
        self.arm = ArmKinematics(scene.model, HOME, physics.qpos)
        self.controller = PoseController(self.arm)
        self.episode = Episode.empty(num_envs, inner)
        self._observer = Observer(scene, physics.qpos, physics.qvel, self.arm, self.controller, self.episode)
        self._steps = torch.zeros(num_envs, dtype=torch.int64, device=inner)
        self._score = torch.zeros(num_envs, device=inner)
        self._texts = [""] * num_envs
        self._films = Films(scene.model, physics.device, "tabletop")
        self._pictures = pictures
        self._told = privileged
        self._achieved: Achieved | None = None
        self.arm.forward()

    # ---- the protocol ------------------------------------------------------------------------------------------

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        """Start new episodes in the masked copies; returns the observation of all copies."""
        rows = mask.nonzero().flatten().tolist()
        if rows:
            self._start(rows, seeds.tolist(), tasks.tolist())
        return self.observe()

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        """Advance one control step (1/20 s); copies that are not active stay as they are."""
        self.spec.action.check(action, self.spec.num_envs, self.device, "tabletop")
        action = action.clamp(-1, 1).to(self.physics.device)
        if active is not None:
            active = active.to(self.physics.device)
        # Nothing here is learned: without autograd's book-keeping the small kernels start a fifth faster.
        with torch.inference_mode():
            self.physics.step(self.controller.advance(action, active), self.scene.substeps, active)
            self.arm.forward()
            judged = judge(self._tasks, self.episode.task, self.view())
        self._steps += 1 if active is None else active
        if self._achieved is not None:
            moved = torch.ones_like(self._steps, dtype=torch.bool) if active is None else active
            self._achieved.look(self.view, self._steps, moved)
        if self._rephrase:
            self._say_anew(active)
        if self._pictures is not None:
            self._pictures.forget(active)
        # Reward and success leave as ordinary tensors, which anyone may change or save for a backward pass.
        burst = self.physics.burst if active is None else self.physics.burst & active
        success, reward, terms = judged[0] & ~burst, judged[1].clone(), judged[2]
        if self._reward == "sparse":
            reward = success.float()
        elif self._reward == "progress":
            before, self._score = self._score, reward if active is None else torch.where(active, reward, self._score)
            reward = PROGRESS * (self._score - before)
        truncated = self._steps >= self._max_steps
        terminated = success | burst if self._end_on_success else burst.clone()
        return Step(
            obs={} if self.spec.on_demand else self.observe(),
            reward=reward.to(self.device),
            terminated=terminated.to(self.device),
            truncated=(truncated & ~terminated).to(self.device),
            success=success.to(self.device),
            invalid=burst.to(self.device, copy=True),
            metrics={name: value.to(self.device) for name, value in terms.items()},
        )

    def observe(self) -> Obs:
        """Observation of all copies as they are now; draws only those that have moved since the last call."""
        seen = self._observer.observation()
        if self._pictures is not None:
            pictures = self._pictures.look(self.physics.qpos, self._paint)
            shown = pictures | {"hand": seen["proprio"][:, HAND], "instruction": seen["instruction"]}
            if self._told:
                task = torch.nn.functional.one_hot(self.episode.task, len(self._tasks))
                shown["told"] = told(self.view(), seen["proprio"][:, HAND.start :], self._meant(), task)
            seen = shown
        return {name: value.to(self.device) for name, value in seen.items()}

    def spare(self, copies: Tensor) -> None:
        """See `embodied_rl.types.Sparing`."""
        if self._pictures is not None:
            self._pictures.spare(copies)

    def get_state(self) -> State:
        """Everything needed to continue; on the native engine bit for bit."""
        return {
            "physics": self.physics.get_state(),
            "controller": self.controller.get_state(),
            "episode": {one.name: getattr(self.episode, one.name).clone() for one in fields(Episode)},
            "steps": self._steps.clone(),
            "score": self._score.clone(),
            "achieved": None if self._achieved is None else self._achieved.get_state(),
            "texts": list(self._texts),
            "tasks": list(self.spec.tasks),
        }

    def set_state(self, state: State) -> Obs:
        """Restore `get_state`'s result.

        Raises:
            CheckpointError: The state is of an env with other tasks, copies or physics.
        """
        if tuple(state["tasks"]) != self.spec.tasks or len(state["texts"]) != self.spec.num_envs:
            raise CheckpointError(
                f"tabletop state: found {len(state['texts'])} copies of tasks {list(state['tasks'])}, expected "
                f"{self.spec.num_envs} of {list(self.spec.tasks)}; build the env as the state's run did"
            )
        self.physics.set_state(state["physics"])
        self.controller.set_state(state["controller"])
        for one in fields(Episode):
            getattr(self.episode, one.name).copy_(state["episode"][one.name])
        self._steps.copy_(state["steps"])
        self._score = state["score"].to(self._score.device).clone()
        self._texts = list(state["texts"])
        if self._achieved is not None:
            self._achieved.set_state(state.get("achieved"))
        self._observer.begin()
        self.arm.forward()
        if self._pictures is not None:
            self._pictures.forget()
        return self.observe()

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        """Pictures [len(copies), H, W, 3] uint8 of the copies asked for.

        Raises:
            NotFoundError: No such camera.
        """
        return self._films.draw(self.physics.qpos, self._paint, copies, camera, height, width).to(self.device)

    def manifest(self) -> dict[str, Any]:
        """What results depend on: the scene, the engines that move and draw it, and the task's settings."""
        return {
            "scene": checksum(scene_xml(float(self.scene.model.opt.timestep)).encode()),
            "physics": type(self.physics).__name__,
            "reward": self._reward,
            "end_on_success": self._end_on_success,
            "sentences": self._evaluation_sentences,
            "names": list(self._names),
            "packages": engines(self.physics, self._pictures),
        }

    def close(self) -> None:
        """Stop the physics threads."""
        self.physics.close()

    # ---- for experts, tools and tests: on the physics device ---------------------------------------------------

    @property
    def tcp(self) -> tuple[Tensor, Tensor]:
        """TCP position [B, 3] (m) and rotation [B, 3, 3] of all copies; valid until the next step."""
        return self.arm.position, self.arm.rotation

    def expert(self) -> Expert:
        """A scripted policy that solves every task; see `expert.py`."""
        from embodied_rl.envs.tabletop.expert import Expert

        return Expert(self)

    def clumsy(self, copies: Tensor, seed: int) -> Clumsy:
        """The same with a hand that errs in some copies [B] bool until it has found out; see `clumsy.py`."""
        from embodied_rl.envs.tabletop.clumsy import Clumsy

        return Clumsy(self, copies, seed)

    def replay(self, seeds: Tensor, tasks: Tensor, actions: Sequence[Tensor]) -> Replay:
        """Demonstrations that began at these starts [K], repeated where objects lie elsewhere; see `replay.py`."""
        from embodied_rl.envs.tabletop.replay import Replay

        return Replay(self, seeds, tasks, actions)

    def watch(self) -> None:
        """From here on, note what episodes achieve that they were not asked for; see `achieved.py`."""
        if self._achieved is None:
            self._achieved = Achieved(self._tasks, self._names, self.episode)

    def achieved(self, copies: Tensor) -> tuple[Tensor, Obs]:
        """See `embodied_rl.types.Relabelling`."""
        assert self._achieved is not None, "achieved() without watch()"
        since, told = self._achieved.told(copies.to(self.physics.device))
        return since.to(self.device), {name: value.to(self.device) for name, value in told.items()}

    @contextmanager
    def undrawn(self) -> Iterator[None]:
        """Play without pictures for a while; the env is to be reset afterwards."""
        self._pictures, pictures = None, self._pictures
        try:
            yield
        finally:
            self._pictures = pictures

    def instructions(self) -> list[str]:
        """The instruction of each copy as text."""
        return list(self._texts)

    def view(self) -> View:
        """What success and reward are computed from, of all copies; valid until the next call."""
        return self._observer.view()

    def object_poses(self) -> Tensor:
        """[B, M, 7] position (m) and quaternion (w x y z) of every object; valid until the next step."""
        return self._observer.object_poses()

    # ---- inside -------------------------------------------------------------------------------------------------

    def _paint(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        from embodied_rl.envs.tabletop.camera import paint

        return paint(self.scene, self.episode.colors[rows], self.episode.goal[rows])

    def _meant(self) -> Tensor:
        """[B, 7] pose of the object meant."""
        poses = self.object_poses()
        return poses[torch.arange(len(poses), device=poses.device), self.episode.a].float()

    def _say_anew(self, active: Tensor | None) -> None:
        """Put the instructions of the active copies [B] into other words; those of evaluation starts stay."""
        episode = self.episode
        training = ~split_of(episode.seed)
        rows = (training if active is None else training & active).nonzero()[:, 0]
        columns = (episode.task, episode.seed, self._steps, episode.a, episode.b, episode.relation)
        told = zip(*(x[rows].tolist() for x in columns), episode.colors[rows].cpu().numpy(), strict=True)
        texts = [
            rephrase(self._tasks[task], seed, step, a, b, relation, colors, self._names)
            for task, seed, step, a, b, relation, colors in told
        ]
        if texts:
            episode.words[rows] = torch.tensor([encode(text) for text in texts], device=rows.device)
            self._observer.begin()
        for row, text in zip(rows.tolist(), texts, strict=True):
            self._texts[row] = text

    def _start(self, rows: list[int], seeds: list[int], tasks: list[int]) -> None:
        scene, inner = self.scene, self.physics.device
        picked = [tasks[row] for row in rows]
        chosen = [seeds[row] for row in rows]
        starts = draw_starts(
            scene,
            [self._tasks[task] for task in picked],
            chosen,
            evaluation_sentences=self._evaluation_sentences,
            names=self._names,
        )
        index = torch.tensor(rows, device=inner)
        mask = torch.zeros(self.spec.num_envs, dtype=torch.bool, device=inner)
        mask[index] = True
        qpos = torch.zeros(self.spec.num_envs, scene.model.nq, dtype=torch.float64, device=inner)
        qpos[index] = torch.from_numpy(starts.qpos).to(inner)
        qvel = torch.zeros(self.spec.num_envs, scene.model.nv, dtype=torch.float64, device=inner)
        self.physics.place(mask, qpos, qvel)
        drawn = {"task": picked, "seed": chosen}
        for one in fields(Episode):
            target = getattr(self.episode, one.name)
            values = drawn.get(one.name, getattr(starts, one.name, None))
            target[index] = torch.as_tensor(values).to(target.dtype).to(inner)
        self._steps[index] = 0
        for row, text in zip(rows, starts.texts, strict=True):
            self._texts[row] = text
        self._observer.begin()
        self.arm.forward()
        self.controller.hold(mask)
        if self._achieved is not None:
            self._achieved.begin(mask)
        if self._pictures is not None:
            self._pictures.forget(mask)
        score = judge(self._tasks, self.episode.task, self.view())[1]
        self._score = torch.where(mask, score, self._score)
