"""B copies of a scene file, moved by its own actuators and judged by the user's task class."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import mujoco
import numpy as np
import torch
from torch import Tensor

from embodied_rl.envs._words import encode_words, word_row
from embodied_rl.envs.mjcf.scene import Scene
from embodied_rl.envs.mjcf.task import Start, Task
from embodied_rl.envs.mjcf.view import Poses, View
from embodied_rl.envs.tabletop.physics import Physics
from embodied_rl.envs.tabletop.pictures import Films, engines
from embodied_rl.errors import CheckpointError, ConfigError, nearest
from embodied_rl.manifest import source
from embodied_rl.runfolder import checksum
from embodied_rl.seeding import numpy_rng
from embodied_rl.types import EnvSpec, Obs, State, Step, TensorSpec

if TYPE_CHECKING:
    from embodied_rl.envs.mjcf import Config
    from embodied_rl.envs.tabletop.pictures import Pictures

log = logging.getLogger(__name__)

MAX_WORDS = 16
"""Words of an instruction that there is room for."""


class MjcfEnv:
    """See `embodied_rl.types.Env`. Physics and task live on the engine's device; what leaves goes to `device`."""

    def __init__(
        self,
        config: Config,
        scene: Scene,
        task: Task,
        physics: Physics,
        poses: Poses,
        cameras: tuple[str, ...],
        device: torch.device,
        pictures: Pictures | None,
    ) -> None:
        """Wire the parts and try the task once; use `build` to make one from a config."""
        self.config, self.scene, self.task, self.physics, self.device = config, scene, task, physics, device
        self.where = f"env mjcf: task '{config.task}'"
        self._pictures, self._poses = pictures, poses
        self._films = Films(scene.model, physics.device, scene.where)
        self._sense: Callable[[View], Tensor] | None = getattr(task, "sense", None)
        self._ends: Callable[[View], Tensor] | None = getattr(task, "terminated", None)
        b, inner = physics.num_envs, physics.device
        tasks: tuple[str, ...] = tuple(getattr(task, "tasks", ())) or (type(task).__name__,)
        starts = [self._drawn(name, 0) for name in tasks]
        self._task = torch.zeros(b, dtype=torch.int64, device=inner)
        self._steps = torch.zeros(b, dtype=torch.int64, device=inner)
        self._broken = torch.zeros(b, dtype=torch.bool, device=inner)
        self._memory = torch.zeros(b, len(starts[0].memory), device=inner)
        self._words = torch.zeros(b, MAX_WORDS, dtype=torch.int64, device=inner)
        self._texts = [""] * b
        self._middle, self._half = scene.middle.to(inner), scene.half.to(inner)
        self._mocap0 = poses.mocap_pos[0].clone()
        for number, start in enumerate(starts):
            self._begin([number] * b, list(range(b)), [start] * b)
            observation = self._observed()
        self.spec = EnvSpec(
            observation=observation,
            action=scene.action,
            num_envs=b,
            max_steps=config.max_steps,
            tasks=tasks,
            seedable=True,
            has_state=True,
            has_success=True,
            cameras=cameras,
            control_hz=1.0 / (config.frame_skip * scene.model.opt.timestep),
            on_demand=pictures is not None,
        )

    # ---- the protocol ------------------------------------------------------------------------------------------

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        """Start new episodes in the masked copies; returns the observation of all copies."""
        rows = mask.nonzero().flatten().tolist()
        if rows:
            wanted, given = tasks.tolist(), seeds.tolist()
            starts = [self._drawn(self.spec.tasks[wanted[row]], given[row]) for row in rows]
            self._begin([wanted[row] for row in rows], rows, starts)
        return self.observe()

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        """Advance one control step; copies that are not active stay as they are, with reward 0."""
        self.spec.action.check(action, self.spec.num_envs, self.device, "mjcf")
        inner = self.physics.device
        go = torch.ones(self.spec.num_envs, dtype=torch.bool, device=inner) if active is None else active.to(inner)
        ctrl = self._middle + self._half * action.clamp(-1, 1).to(inner)
        self.physics.step(ctrl, self.config.frame_skip, None if active is None else go)
        self._poses.update(self.physics.qpos)
        if self._pictures is not None:
            self._pictures.forget(go)
        view = self.view()
        reward, success, over, seen = self._judged(view)
        if self.config.end_on_success:
            over = over | success
        self._steps += go
        broken = go & ~(torch.isfinite(reward) & torch.isfinite(seen).all(dim=1))
        if bool(broken.any()):
            log.warning(
                "%s: reward or observation is not finite in copies %s; their episodes are left out and counted",
                self.where, broken.nonzero().flatten().tolist(),
            )  # fmt: skip
        self._broken |= broken
        broken |= go & self.physics.burst
        terminated = (over & go) | broken
        return Step(
            obs={} if self.spec.on_demand else self._shown(seen),
            reward=torch.where(go & ~broken, reward, torch.zeros_like(reward)).to(self.device),
            terminated=terminated.to(self.device),
            truncated=((self._steps >= self.config.max_steps) & go & ~terminated).to(self.device),
            success=success.to(self.device),
            invalid=broken.to(self.device),
        )

    def observe(self) -> Obs:
        """Observation of all copies as they are now; draws only those that have moved since the last call."""
        return self._shown(self._vector(self.view()))

    def spare(self, copies: Tensor) -> None:
        """See `embodied_rl.types.Sparing`."""
        if self._pictures is not None:
            self._pictures.spare(copies)

    def get_state(self) -> State:
        """Everything needed to continue; on the native engine bit for bit."""
        return {
            "physics": self.physics.get_state(),
            "mocap": self._poses.mocap_pos.clone(),
            "texts": list(self._texts),
            "tasks": list(self.spec.tasks),
            **{name: getattr(self, f"_{name}").clone() for name in self._FIELDS},
        }

    _FIELDS = ("task", "steps", "memory", "broken")

    def set_state(self, state: State) -> Obs:
        """Restore `get_state`'s result.

        Raises:
            CheckpointError: The state is of an env with other tasks, copies or physics.
        """
        if tuple(state["tasks"]) != self.spec.tasks or len(state["texts"]) != self.spec.num_envs:
            raise CheckpointError(
                f"{self.where}: the state is of {len(state['texts'])} copies of tasks {list(state['tasks'])}, expected "
                f"{self.spec.num_envs} of {list(self.spec.tasks)}; build the env as the state's run did"
            )
        self.physics.set_state(state["physics"])
        self._poses.mocap_pos.copy_(state["mocap"])
        for name in self._FIELDS:
            getattr(self, f"_{name}").copy_(state[name])
        self._tell(range(self.spec.num_envs), state["texts"])
        self._poses.update(self.physics.qpos)
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
        """What results depend on: the scene as compiled, the task and its settings, and the engine."""
        model = self.scene.model
        compiled = np.empty(mujoco.mj_sizeModel(model), np.uint8)
        mujoco.mj_saveModel(model, None, compiled)
        return {
            "scene": checksum(compiled.tobytes()),
            "task": type(self.task).__qualname__,
            **source(type(self.task)),
            "settings": self.config.model_dump(mode="json", exclude={"scene", "task", "physics", "threads"}),
            "physics": type(self.physics).__name__,
            "packages": engines(self.physics, self._pictures),
        }

    def close(self) -> None:
        """Stop the physics threads."""
        self.physics.close()

    # ---- for tools and tests ------------------------------------------------------------------------------------

    def instructions(self) -> list[str]:
        """The instruction of each copy as text."""
        return list(self._texts)

    def view(self) -> View:
        """What the task looks at, of all copies; valid until the next step."""
        return View(self.scene, self._poses, self.physics.qpos, self.physics.qvel, self._task, self._memory)

    # ---- inside -------------------------------------------------------------------------------------------------

    def _drawn(self, task: str, seed: int) -> Start:
        """One start, checked."""
        start: object = self.task.start(task, numpy_rng(seed, f"mjcf/{task}"))
        if not isinstance(start, Start):
            found = type(start).__name__
            raise ConfigError(f"{self.where}: start returned {found}, expected embodied_rl.envs.mjcf.Start")
        model = self.scene.model
        for name, value, size in (("qpos", start.qpos, model.nq), ("qvel", start.qvel, model.nv)):
            if value is not None and (np.shape(value) != (size,) or not np.isfinite(value).all()):
                raise ConfigError(f"{self.where}: start's {name} is {value}, expected {size} finite numbers")
        marks = self._marks()
        for name, place in start.mocap.items():
            if name not in marks:
                raise ConfigError(f"{self.where}: start places '{name}', which is no mocap body{nearest(name, marks)}")
            if np.shape(place) != (3,) or not np.isfinite(place).all():
                raise ConfigError(f"{self.where}: start places '{name}' at {place}, expected 3 finite numbers (m)")
        return start

    def _marks(self) -> dict[str, int]:
        """Mocap body -> its row in `mocap_pos`."""
        model = self.scene.model
        rows = {model.body(i).name: int(model.body_mocapid[i]) for i in range(model.nbody)}
        return {name: row for name, row in rows.items() if row >= 0}

    def _begin(self, tasks: list[int], rows: list[int], starts: list[Start]) -> None:
        model, inner, b = self.scene.model, self.physics.device, self.physics.num_envs
        mask = torch.zeros(b, dtype=torch.bool, device=inner)
        mask[rows] = True
        qpos, qvel = np.tile(model.qpos0, (b, 1)), np.zeros((b, model.nv))
        marks = self._marks()
        for row, task, start in zip(rows, tasks, starts, strict=True):
            qpos[row] = model.qpos0 if start.qpos is None else start.qpos
            qvel[row] = 0.0 if start.qvel is None else start.qvel
            if len(start.memory) != self._memory.shape[1]:
                raise ConfigError(
                    f"{self.where}: start's memory has {len(start.memory)} numbers, and {self._memory.shape[1]} in "
                    "another start; give as many in every start"
                )
            self._memory[row] = torch.tensor(start.memory, dtype=torch.float32)
            self._task[row] = task
            self._poses.mocap_pos[row] = self._mocap0
            for name, place in start.mocap.items():
                self._poses.mocap_pos[row, marks[name]] = torch.tensor(place, dtype=torch.float32)
        self.physics.place(mask, torch.from_numpy(qpos).to(inner), torch.from_numpy(qvel).to(inner))
        self._steps[mask], self._broken[mask] = 0, False
        self._tell(rows, [start.instruction for start in starts])
        self._poses.update(self.physics.qpos)
        if self._pictures is not None:
            self._pictures.forget(mask)

    def _tell(self, rows: Iterable[int], texts: list[str]) -> None:
        for row, text in zip(rows, texts, strict=True):
            self._texts[row] = text
            ids = encode_words(text, MAX_WORDS, self.where, "raise MAX_WORDS in envs/mjcf/env.py")
            self._words[row] = torch.tensor(ids)

    def _vector(self, view: View) -> Tensor:
        """[B, D] of `observe`, or beside pictures of `sense`."""
        if self._pictures is None:
            return self.task.observe(view).float()
        return self._sense(view).float() if self._sense is not None else view.qpos[:, :0]

    def _judged(self, view: View) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reward, success and termination [B], and what is seen [B, D]."""
        success = self.task.success(view)
        over = torch.zeros_like(success) if self._ends is None else self._ends(view)
        return self.task.reward(view).float(), success, over, self._vector(view)

    def _shown(self, vector: Tensor) -> Obs:
        # An episode that has become invalid is not used, but a policy is still asked about what it shows.
        vector = torch.where(self._broken[:, None], torch.zeros_like(vector), vector)
        seen = {} if self._pictures is None else self._pictures.look(self.physics.qpos, self._paint)
        if vector.shape[1]:
            seen["state" if self._pictures is None else "proprio"] = vector
        return {name: x.to(self.device) for name, x in (seen | {"instruction": self._words.clone()}).items()}

    def _paint(self, rows: Tensor) -> tuple[Tensor, None]:
        return self._poses.mocap_pos[rows], None

    def _observed(self) -> dict[str, TensorSpec]:
        """What is shown, found by asking the task once; says what it gives that cannot be used.

        Raises:
            ConfigError: Another shape or dtype than `Task` says, or a number that is not finite at a start.
        """
        b = self.physics.num_envs
        reward, success, over, seen = self._judged(self.view())
        for name, x, kind in (("reward", reward, torch.float32), ("success", success, torch.bool),
                              ("terminated", over, torch.bool)):  # fmt: skip
            if x.shape != (b,) or x.dtype != kind:
                raise ConfigError(
                    f"{self.where}: {name} returned {x.dtype} {list(x.shape)} for {b} copies, expected {kind} [{b}]"
                )
        name = "observe" if self._pictures is None else "sense"
        if seen.ndim != 2 or len(seen) != b:
            raise ConfigError(f"{self.where}: {name} returned {list(seen.shape)} for {b} copies, expected [{b}, D]")
        if not bool(torch.isfinite(reward).all() & torch.isfinite(seen).all()):
            raise ConfigError(f"{self.where}: {name} or reward is not finite at the start of an episode")
        shown = {} if self._pictures is None else dict(self._pictures.specs)
        if seen.shape[1]:
            meaning = f"what {name} of {self.config.task} returns"
            shown["state" if self._pictures is None else "proprio"] = TensorSpec((seen.shape[1],), meaning=meaning)
        return shown | {"instruction": word_row(MAX_WORDS)}
