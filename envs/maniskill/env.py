"""The copies of a ManiSkill task as an `embodied_rl.types.Env`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from embodied_rl.envs._spaces import resized
from embodied_rl.envs.maniskill.scene import Moment, Scene, manifest_of
from embodied_rl.errors import CapabilityError, CheckpointError, NotFoundError, nearest
from embodied_rl.types import ActionSpec, EnvSpec, Obs, State, Step

if TYPE_CHECKING:
    from embodied_rl.envs.maniskill import Config

log = logging.getLogger(__name__)


class ManiSkillEnv:
    """See `embodied_rl.types.Env`; one scene with all copies (GPU), or one scene per copy (CPU).

    Its state is what the episodes were made of, the seed and the actions of each copy, which are played again: PhysX on
    a CPU repeats an episode bit for bit, but gives no access to its warm-started contacts. On a GPU it does not repeat.
    """

    def __init__(self, config: Config, scenes: list[Scene], device: torch.device) -> None:
        """Join scenes that `build` made."""
        first = scenes[0]
        self.config, self.device, self.where, self._scenes = config, device, first.where, scenes
        b = self._b = sum(scene.copies for scene in scenes)
        self._alone = first.copies == 1
        size = first.action.spec.size
        self.spec = EnvSpec(
            observation=first.observation,
            action=ActionSpec("continuous", size, first.action_names, convention=first.convention),
            num_envs=b,
            max_steps=first.max_steps,
            tasks=(config.task,),
            seedable=config.starts == "exact",
            has_state=device.type == "cpu",
            has_success=first.has_success,
            cameras=first.cameras,
            control_hz=first.control_hz,
            # On a GPU all copies are simulated and drawn together, so none could wait for its picture.
            on_demand=self._alone and config.observation != "state" and device.type == "cpu",
        )
        self._steps = torch.zeros(b, dtype=torch.int64, device=device)
        self._seeds = torch.full((b,), -1, dtype=torch.int64)
        self._actions: list[list[Tensor]] = [[] for _ in range(b)]
        self._now: list[Moment | None] = [None] * len(scenes)
        self._stale: set[int] = set()
        """Scenes that have moved since they were looked at; on demand only."""

    # ---- the protocol ------------------------------------------------------------------------------------------

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        """Start new episodes in the masked copies; returns the observation of all copies."""
        rows, wanted = mask.nonzero().flatten().tolist(), seeds.tolist()
        if self._alone:
            for row in rows:
                self._scenes[row].start([0], [wanted[row]])
        elif self.config.starts == "exact":
            for row in rows:
                self._scenes[0].start([row], [wanted[row]])
        elif rows:
            self._scenes[0].start(rows, [wanted[row] for row in rows])
        for row in rows:
            self._seeds[row], self._actions[row] = wanted[row], []
        self._steps[mask] = 0
        for i in rows if self._alone else ([0] if rows else []):
            self._look(i)
        return self.observe()

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        """Advance one control step; on a CPU copies that are not active stay where they are, with reward 0."""
        self.spec.action.check(action, self._b, self.device, self.where)
        go = torch.ones(self._b, dtype=torch.bool, device=self.device) if active is None else active
        bad: dict[str, Tensor] = {}
        for i, scene in enumerate(self._scenes):
            if self._alone and not bool(go[i]):
                continue
            part = slice(i, i + 1) if self._alone else slice(None)
            moment = scene.step(action[part], draw=not self.spec.on_demand)
            for name, which in moment.broken.items():
                bad.setdefault(name, torch.zeros_like(go))[part] = which
            self._keep(i, moment)
            if self._alone:
                self._actions[i].append(action[i].detach().clone())
        self._steps = self._steps + go
        now = [m for m in self._now if m is not None]
        assert len(now) == len(self._scenes), "step before the first reset"
        broken = self._told({name: which & go for name, which in bad.items()})
        ended = torch.cat([m.ended for m in now]) & go if self.config.end_on_success else torch.zeros_like(broken)
        limit = self.spec.max_steps
        late = self._steps >= limit if limit is not None else torch.zeros_like(broken)
        reward = torch.cat([m.reward for m in now])
        terminated = ended | broken
        return Step(
            obs={} if self.spec.on_demand else self._observe(),
            reward=torch.where(go & ~broken, reward, torch.zeros_like(reward)),
            terminated=terminated,
            truncated=late & go & ~terminated,
            success=torch.cat([m.success for m in now if m.success is not None]) if self.spec.has_success else None,
            invalid=broken,
        )

    def observe(self) -> Obs:
        """Observation of all copies as they are now; only those that have moved since the last call are drawn."""
        for i in sorted(self._stale):
            self._look(i)
        return self._observe()

    def get_state(self) -> State:
        """Seed and actions of each copy's episode, and its observation as a check.

        Raises:
            CapabilityError: The simulation runs on a GPU.
        """
        self._needs_state()
        size = self.spec.action.size
        obs = self.observe() if all(m is not None for m in self._now) else {}
        return {
            "task": self.config.task,
            "seeds": self._seeds.clone(),
            "actions": [torch.stack(a) if a else torch.empty(0, size) for a in self._actions],
            "obs": {name: x.clone() for name, x in obs.items()},
        }

    def set_state(self, state: State) -> Obs:
        """Play the episodes of `get_state` again; costs as many steps as they are old, without their pictures.

        Raises:
            CheckpointError: The state is of another task or number of copies.
            CapabilityError: An episode did not repeat, or the simulation runs on a GPU.
        """
        self._needs_state()
        if state["task"] != self.config.task or len(state["actions"]) != self._b:
            raise CheckpointError(
                f"{self.where}: the state is of {len(state['actions'])} copies of '{state['task']}', expected "
                f"{self._b} of '{self.config.task}'; build the env as the state's run did"
            )
        for i, (seed, actions) in enumerate(zip(state["seeds"].tolist(), state["actions"], strict=True)):
            self._seeds[i], self._steps[i], self._actions[i] = seed, len(actions), list(actions)
            if seed < 0:
                self._now[i] = None
                continue
            scene = self._scenes[i]
            scene.start([0], [seed])
            for action in actions:
                scene.advance(action[None])
            self._look(i)
        if not state["obs"]:
            return {}
        obs = self._observe()
        for name, x in state["obs"].items():
            same = (obs[name] == x).reshape(self._b, -1).all(1)
            if not bool(same.all()):
                rows = (~same).nonzero().flatten().tolist()
                raise CapabilityError(
                    f"{self.where} did not repeat its episodes: '{name}' of copies {rows[:8]} differs from the saved "
                    "one; was the state written on another machine or with another version of SAPIEN?"
                )
        return obs

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        """Pictures [len(copies), H, W, 3] uint8, drawn at `film` x `film` and scaled.

        Raises:
            NotFoundError: No such camera.
        """
        if camera not in self.spec.cameras:
            raise NotFoundError(f"{self.where}: camera '{camera}' does not exist{nearest(camera, self.spec.cameras)}")
        rows = copies.tolist()
        if not rows:
            return torch.empty(0, height, width, 3, dtype=torch.uint8, device=self.device)
        shots = [self._scenes[i].film(camera)[0] for i in rows] if self._alone else self._scenes[0].film(camera)[copies]
        return resized(torch.stack(list(shots)), height, width).to(self.device)

    def manifest(self) -> dict[str, Any]:
        """What results depend on."""
        return manifest_of(self.config, self.device, self._b)

    def close(self) -> None:
        """Free every scene; may be called twice."""
        for scene in self._scenes:
            scene.close()
        self._scenes = []

    # ---- inside -------------------------------------------------------------------------------------------------

    def _look(self, i: int) -> None:
        self._now[i] = self._scenes[i].look()
        self._stale.discard(i)

    def _keep(self, i: int, moment: Moment) -> None:
        """Take over what a step brought; what the scene shows stays as it was seen last where nothing was drawn."""
        if self.spec.on_demand:
            before = self._now[i]
            assert before is not None, "step before the first reset"
            moment.obs = before.obs
            self._stale.add(i)
        self._now[i] = moment

    def _told(self, bad: dict[str, Tensor]) -> Tensor:
        """[B] bool, simulations that have blown up; each copy is told once, by the first thing that is not finite."""
        broken = torch.zeros(self._b, dtype=torch.bool, device=self.device)
        for name, which in bad.items():
            copies = (which & ~broken).nonzero().flatten().tolist()
            if copies:
                log.warning("%s: %s is not finite in copies %s: their episodes do not count", self.where, name, copies)
            broken |= which
        return broken

    def _observe(self) -> Obs:
        now = [m for m in self._now if m is not None]
        assert len(now) == len(self._scenes), "the first reset has to begin an episode in every copy"
        seen = {name: torch.cat([m.obs[name] for m in now]) for name in self.spec.observation}
        return {name: torch.nan_to_num(x) if x.is_floating_point() else x for name, x in seen.items()}

    def _needs_state(self) -> None:
        if not self.spec.has_state:
            raise CapabilityError(
                f"{self.where} cannot save its state on {self.device}: PhysX on a GPU does not repeat an episode bit "
                "for bit, so a resumed run begins new episodes"
            )
