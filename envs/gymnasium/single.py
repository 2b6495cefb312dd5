"""B copies of a Gymnasium env, stepped one after another in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from embodied_rl.envs._spaces import Array, check_action
from embodied_rl.envs.gymnasium.wrapped import Wrapped
from embodied_rl.errors import CapabilityError
from embodied_rl.types import Obs, Step

if TYPE_CHECKING:
    from embodied_rl.envs.gymnasium import Config


class GymnasiumEnv(Wrapped):
    """See `embodied_rl.types.Env`.

    A copy is restarted only by `reset`, with the seed of its episode, so the last observation of an episode is the true
    one and the same seed always starts the same episode.
    """

    def __init__(self, config: Config, envs: list[gymnasium.Env[Any, Any]], device: torch.device) -> None:
        """Join copies that `build` made."""
        first = envs[0]
        super().__init__(config, len(envs), device, first.observation_space, first.action_space)
        self._envs = envs
        self._describe(first, self._probe(first), registered=first.spec)

    # ---- the protocol ------------------------------------------------------------------------------------------

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        """Start new episodes in the masked copies; returns the observation of all copies."""
        wanted = seeds.tolist()
        for i in mask.nonzero().flatten().tolist():
            self._start(i, wanted[i])
        return self._observe()

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        """Advance one control step; copies that are not active or have ended stay where they are, with reward 0."""
        check_action(action, self.spec.action, len(self._envs), self.device, self.where)
        assert (self._seeds >= 0).any(), "step before the first reset"
        native = self._action(action)
        go = self._running if active is None else self._running & active.cpu().numpy()
        b = len(self._envs)
        reward, terminated, truncated = np.zeros(b, np.float32), np.zeros(b, bool), np.zeros(b, bool)
        terms = {name: np.zeros(b, np.float32) for name in self._terms.values()}
        for i in np.flatnonzero(go).tolist():
            obs, reward[i], terminated[i], cut, info = self._envs[i].step(self._native(native, i))
            truncated[i] = cut and not terminated[i]
            self._read(i, obs)
            if self._success is not None:
                self._reached[i] = bool(info.get(self._success, False))
            for key, name in self._terms.items():
                terms[name][i] = info.get(key, 0.0)
            if self.spec.has_state:
                self._actions[i].append(native[i])
        self._running &= ~(terminated | truncated)
        return Step(
            obs=self._observe(),
            reward=self._tensor(reward),
            terminated=self._tensor(terminated),
            truncated=self._tensor(truncated),
            success=self._tensor(self._reached.copy()) if self.spec.has_success else None,
            metrics={name: self._tensor(x) for name, x in terms.items()},
        )

    def close(self) -> None:
        """Close every copy; may be called twice."""
        for env in self._envs:
            env.close()
        self._envs = []

    # ---- inside -------------------------------------------------------------------------------------------------

    def _probe(self, env: gymnasium.Env[Any, Any]) -> dict[str, Any]:
        """What `info` holds after a first step."""
        obs, _ = env.reset(seed=0)
        for leaf in self._leaves:
            found = np.shape(leaf.read(obs))
            if found != leaf.spec.shape and not (found == () and leaf.spec.shape == (1,)):
                raise CapabilityError(
                    f"{self.where}: observation '{leaf.name}' has shape {list(found)}, but its space promises "
                    f"{list(leaf.spec.shape)}; mend the env's observation_space"
                )
        if self.config.render:
            self._draw(env)
        zeros = torch.zeros(1, *self._action.spec.shape, dtype=self._action.spec.dtype)
        info = env.step(self._native(self._action(zeros), 0))[4]
        return {k: v for k, v in info.items() if not k.startswith("reward_") or np.ndim(v) == 0}

    def _start(self, i: int, seed: int) -> None:
        obs, info = self._envs[i].reset(seed=seed)
        self._seeds[i], self._running[i], self._actions[i] = seed, True, []
        self._reached[i] = bool(info.get(self._success, False)) if self._success else False
        self._read(i, obs)

    def _replay(self, seeds: Array, actions: list[Array]) -> None:
        for i, seed in enumerate(seeds.tolist()):
            if seed < 0:
                self._seeds[i], self._running[i], self._actions[i] = -1, False, []
                continue
            self._start(i, seed)
            for row in range(len(actions[i])):
                obs, _, terminated, truncated, info = self._envs[i].step(self._native(actions[i], row))
                if terminated or truncated:
                    self._running[i] = False
                if self._success is not None:
                    self._reached[i] = bool(info.get(self._success, False))
            if len(actions[i]):
                self._read(i, obs)
            self._actions[i] = list(actions[i])

    def _native(self, actions: Array, i: int) -> Any:
        """One copy's action; a copy of the row, because an env may keep or change what it is given."""
        return int(actions[i]) if self._action.spec.kind == "discrete" else self._action.split(actions[i].copy())

    def _read(self, i: int, obs: Any) -> None:
        for leaf in self._leaves:
            self._obs[leaf.name][i] = leaf.read(obs)

    def _frames(self, copies: list[int]) -> list[Any]:
        return [self._draw(self._envs[i]) for i in copies]
