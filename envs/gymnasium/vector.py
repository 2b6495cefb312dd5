"""The copies of a `gymnasium.vector.VectorEnv`, whatever it does with those whose episodes have ended.

    Disabled  nothing: `reset` restarts them, with their seeds
    SameStep  they begin the next episode in the step that ends the last, whose final state is in `info`
    NextStep  they begin the next episode in the next step, which takes no action of them

All copies are stepped together. Where the simulator chooses when an episode begins, one that nobody asked for is played
to its end and thrown away; `reset` only gives the engine a start that nothing has happened after.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from embodied_rl.envs._spaces import Array, Leaf, check_action
from embodied_rl.envs.gymnasium.making import where_of
from embodied_rl.envs.gymnasium.wrapped import Wrapped
from embodied_rl.errors import CapabilityError
from embodied_rl.seeding import start_seed
from embodied_rl.types import Obs, Step

if TYPE_CHECKING:
    from embodied_rl.envs.gymnasium import Config

DISABLED, SAME_STEP, NEXT_STEP = AutoresetMode.DISABLED, AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP


class VectorizedEnv(Wrapped):
    """See `embodied_rl.types.Env` and the module docstring.

    What the vector env says of itself is tried out when it is wrapped: that a masked reset leaves the others alone (or
    it is refused), and that a copy's seed repeats its start (or it is not `seedable`).
    """

    def __init__(
        self, config: Config, env: VectorEnv[Any, Any, Any], example: Any, copies: int, device: torch.device
    ) -> None:
        """Wrap what `build` made; `example` is one copy, or the vector env itself."""
        self._mode = _mode_of(env, copies, where_of(config))
        super().__init__(config, copies, device, env.single_observation_space, env.single_action_space)
        self._env = env
        self._everyone = np.ones(copies, bool)
        self._now = {name: x.copy() for name, x in self._obs.items()}
        """What the simulator shows; `_obs` is what the engine is shown."""
        self._over = ~self._everyone
        """[B] the simulator's episode has ended and its next one has not begun."""
        self._fresh = ~self._everyone
        """[B] the simulator's episode has begun, and nothing has happened in it."""
        self._wanted = ~self._everyone
        """[B] the engine has asked for an episode that has not begun."""
        self._begun = self._closed = False
        self._seed_each = self._mode is DISABLED
        """The vector env takes a seed for each copy; otherwise one for all."""
        info, reason = self._probe()
        self._describe(
            example, info, registered=env.unwrapped.spec, seedable=not reason,
            restarts_itself=self._mode is not DISABLED, reason=reason,
        )  # fmt: skip
        if config.render and reason:
            raise CapabilityError(
                f"{self.where}: env.render draws films of episodes that are played again, and this one cannot repeat "
                f"one ({reason}): set env.render: false"
            )

    # ---- the protocol ------------------------------------------------------------------------------------------

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        """Start new episodes in the masked copies; where only the simulator can, `step` says when they have begun."""
        who, wanted = mask.cpu().numpy().astype(bool), seeds.cpu().numpy()
        if self._mode is DISABLED and self._begun:
            self._restart(who, wanted)
        elif not ((self._running | self._wanted) & ~who).any():
            # Nobody else plays, so all may begin anew, from seeds of ours.
            self._restart(self._everyone, wanted)
        self._begun = True
        self._seeds[who] = wanted[who]
        for i in np.flatnonzero(who).tolist():
            self._actions[i] = []
        self._running &= ~who
        self._wanted = (self._wanted | who) & ~self._begin(who & self._fresh)
        self._calm(self._wanted)
        return self._observe()

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        """Advance every copy by one control step; those without an episode of the engine's pay nothing."""
        check_action(action, self.spec.action, len(self._seeds), self.device, self.where)
        assert self._begun, "step before the first reset"
        native = self._action(action)
        played, starting = self._running.copy(), self._wanted.copy()
        for i in np.flatnonzero(played).tolist() if self.spec.has_state else ():
            self._actions[i].append(native[i].copy())
        reward, terminated, truncated, info = self._advance(native)
        ended = terminated | truncated
        self._show(played | starting)
        if self._mode is SAME_STEP and ended.any():
            self._show_last(info, played & ended)
        if self._success is not None:
            self._reached[played] = self._told_of(info, self._success, ended)[played].astype(bool)
        terms = {n: np.where(played, self._told_of(info, k, ended), 0) for k, n in self._terms.items()}
        self._running &= ~ended
        self._wanted &= ~self._begin(starting & self._fresh)
        self._calm(self._wanted)
        return Step(
            obs=self._observe(),
            reward=self._tensor(np.where(played, reward, 0).astype(np.float32)),
            terminated=self._tensor(terminated & played),
            truncated=self._tensor(truncated & ~terminated & played),
            success=self._tensor(self._reached.copy()) if self.spec.has_success else None,
            metrics={n: self._tensor(x.astype(np.float32)) for n, x in terms.items()},
            starting=self._tensor(starting) if starting.any() else None,
        )

    def close(self) -> None:
        """Close every copy; may be called twice."""
        if not self._closed:
            self._env.close()
        self._closed = True

    # ---- the simulator -------------------------------------------------------------------------------------------

    def _restart(self, who: Array, seeds: Array | None) -> None:
        """Reset some copies of the simulator (all of them, unless it is Disabled); None goes on with its own dice."""
        options = None if who.all() else {"reset_mask": who.copy()}
        seed = None if seeds is None else self._seed(seeds)
        self._look(self._env.reset(seed=seed, options=options)[0], who)
        self._fresh |= who
        self._over &= ~who

    def _advance(self, native: Array) -> tuple[Array, Array, Array, dict[str, Any]]:
        """Step the simulator, and follow which copies have ended and begun: reward, terminated, truncated, info."""
        if self._mode is DISABLED and self._over.any():
            self._restart(self._over.copy(), None)
        obs, reward, terminated, truncated, info = self._env.step(self._action.split(native))
        terminated, truncated = _numpy(terminated).astype(bool), _numpy(truncated).astype(bool)
        restarting = self._over if self._mode is NEXT_STEP else ~self._everyone
        ended = terminated | truncated
        if (ended & restarting).any():
            raise CapabilityError(
                f"{self.where} says autoreset_mode NextStep, but copies {_rows(ended & restarting)} end in the step "
                "after their end, which should begin their next episode: mend it, or correct its "
                "metadata['autoreset_mode']"
            )
        self._look(obs, self._everyone)
        for i in np.flatnonzero(ended).tolist() if self._mode is not SAME_STEP and "final_obs" in info else ():
            last = self._last(info, i)
            if last is not None and any((last[n] != self._now[n][i]).any() for n in last):
                raise CapabilityError(
                    f"{self.where} says autoreset_mode {self._mode.value}, but copy {i} ended with another observation "
                    "than info['final_obs'], as in SameStep: mend it, or correct its metadata['autoreset_mode']"
                )
        self._fresh = ended if self._mode is SAME_STEP else restarting
        self._over = ~self._everyone if self._mode is SAME_STEP else ended
        return _numpy(reward), terminated, truncated, info

    def _look(self, obs: Any, who: Array) -> None:
        for leaf in self._leaves:
            now = self._now[leaf.name]
            now[who] = _numpy(leaf.read(obs)).reshape(now.shape)[who]

    def _show_last(self, info: dict[str, Any], who: Array) -> None:
        """Show the engine the last state of episodes whose copies are in their next one already."""
        for i in np.flatnonzero(who).tolist():
            last = self._last(info, i)
            if last is None:
                raise CapabilityError(
                    f"{self.where} says autoreset_mode SameStep, but copy {i} ended without its last observation in "
                    "info['final_obs']: mend it, or correct its metadata['autoreset_mode']"
                )
            for name, x in last.items():
                self._obs[name][i] = x

    def _last(self, info: dict[str, Any], i: int) -> dict[str, Array] | None:
        """Copy i's part of `info["final_obs"]`, which holds arrays, or one observation for each copy."""
        final = info.get("final_obs")
        each = not isinstance(final, dict) and _numpy(final).dtype == object
        if final is None or not info.get("_final_obs", self._everyone)[i] or (each and final[i] is None):
            return None
        read = ((leaf, leaf.read(final[i]) if each else leaf.read(final)[i]) for leaf in self._leaves)
        return {leaf.name: np.reshape(_numpy(x), leaf.spec.shape).astype(leaf.dtype) for leaf, x in read}

    def _told_of(self, info: dict[str, Any], key: str, ended: Array) -> Array:
        """[B] of an entry of `info`, of the step that was made: of copies that began anew it is in `final_info`."""
        x, final = _column(info, key, len(ended)), info.get("final_info")
        if self._mode is SAME_STEP and final is not None and ended.any():
            x = np.where(ended, _column(final, key, len(ended)), x)
        return x

    # ---- the engine ----------------------------------------------------------------------------------------------

    def _begin(self, who: Array) -> Array:
        """Give the engine the episodes that have begun in some copies; returns them."""
        self._running |= who
        self._reached[who] = False
        self._show(who)
        return who

    def _show(self, who: Array) -> None:
        for name, x in self._obs.items():
            x[who] = self._now[name][who]

    def _calm(self, who: Array) -> None:
        """Show 0 instead of what is not finite: an episode that was given up for that is still played to its end."""
        for x in self._obs.values() if who.any() else ():
            x[who] = np.nan_to_num(x[who], posinf=0, neginf=0)

    def _seed(self, seeds: Array) -> Any:
        """What the vector env's `reset` takes for the seeds [B] of the copies."""
        if self._seed_each:
            return seeds.tolist()
        digest = int.from_bytes(hashlib.blake2b(seeds.tobytes(), digest_size=4).digest(), "little")
        # Below 2**31, because simulators in C count on it; odd for evaluation, as each of the seeds is.
        return digest >> 2 << 1 | int(seeds[0] & 1)

    def _replay(self, seeds: Array, actions: list[Array]) -> None:
        """All episodes end together: a copy begins when as many steps are left as its episode has."""
        self._seeds, self._actions = seeds.copy(), [list(a) for a in actions]
        self._begun = bool((seeds >= 0).any())
        self._running, self._wanted = ~self._everyone, ~self._everyone
        if not self._begun:
            return
        ages = np.array([len(a) for a in actions])
        steps, seeds = int(ages.max()), np.maximum(seeds, 0)
        self._restart(self._everyone, seeds)
        for t in range(steps):
            if (begin := ages == steps - t).any():
                self._restart(begin, seeds)
            native = np.stack([a[t - steps] if steps - t <= len(a) else self._still()[0] for a in actions])
            info = self._advance(native)[3]
        if (begin := ages == 0).any():
            self._restart(begin, seeds)
        self._begin(self._seeds >= 0)
        self._running &= ~self._over
        if steps and self._success is not None:
            self._reached = _column(info, self._success, len(seeds)).astype(bool) & (ages > 0)

    def _frames(self, copies: list[int]) -> list[Any]:
        frames = self._draw(self._env)
        return [frames[i] for i in copies]

    # ---- trying it out -------------------------------------------------------------------------------------------

    def _probe(self) -> tuple[dict[str, Any], str]:
        """What `info` holds after a first step, and why no copy can be started again from a seed ("" if it can)."""
        seeds = np.array([start_seed(0, "train", 0, i) for i in range(len(self._seeds))])
        reason = ""
        if self._mode is not DISABLED:
            reason = f"its vector env restarts copies by itself: autoreset_mode {self._mode.value}"
        try:
            start = self._seen(self._env.reset(seed=self._seed(seeds))[0])
        except Exception:
            if not self._seed_each:
                raise
            reason, self._seed_each = "its vector env takes no list of seeds, one for each copy", False
            start = self._seen(self._env.reset(seed=self._seed(seeds))[0])
        if self.config.render:
            self._draw(self._env)
        obs, reward, terminated, truncated, info = self._env.step(self._action.split(self._still()))
        for name, x in {"reward": reward, "terminated": terminated, "truncated": truncated}.items():
            if np.shape(_numpy(x)) != (len(seeds),):
                raise CapabilityError(
                    f"{self.where}: its step gives {name} of shape {list(np.shape(_numpy(x)))}, expected {len(seeds)}, "
                    "one for each copy"
                )
        after = self._seen(obs)
        if self._mode is DISABLED:
            self._try_mask(seeds, after)
            if not reason and not self._repeats(seeds, start, after):
                reason = "its vector env does not repeat an episode from the seed of its copy"
        info = {k: v for k, v in info.items() if not k.startswith("reward_") or np.shape(v) == (len(seeds),)}
        return info, reason

    def _try_mask(self, seeds: Array, before: dict[str, Array]) -> None:
        """Refuse a vector env that is to be restarted by us, and cannot restart some copies and leave others alone."""
        only = np.arange(len(seeds)) == 0
        what = f"{self.where} has autoreset_mode Disabled, but reset(seed=..., options={{'reset_mask': mask}})"
        cure = "restart the copies where the mask is True and no other, or state autoreset_mode SameStep or NextStep"
        try:
            now = self._seen(self._env.reset(seed=self._seed(seeds), options={"reset_mask": only.copy()})[0])
        except Exception as error:
            raise CapabilityError(f"{what} raises {type(error).__name__}: {error}; {cure}") from error
        same = np.all([_same(now[n], before[n]) for n in now], axis=0)
        if not same[~only].all():
            raise CapabilityError(f"{what} of copy 0 changed copies {_rows(~same & ~only)}; {cure}")

    def _repeats(self, seeds: Array, start: dict[str, Array], after: dict[str, Array]) -> bool:
        """Whether other copies begin and go on the same with the same seeds."""
        again = self._seen(self._env.reset(seed=self._seed(seeds[::-1]))[0])
        then = self._seen(self._env.step(self._action.split(self._still()))[0])
        pairs = [(again[n], start[n]) for n in again] + [(then[n], after[n]) for n in then]
        return all(_same(x, y[::-1]).all() for x, y in pairs)

    def _seen(self, obs: Any) -> dict[str, Array]:
        """The leaves [B, ...] of an observation, whose shapes are looked at."""
        seen: dict[str, Array] = {}
        for leaf in self._leaves:
            x = _read(leaf, obs, self.where)
            wanted = (len(self._seeds), *leaf.spec.shape)
            if x.shape != wanted and not (x.shape == wanted[:1] and leaf.spec.shape == (1,)):
                raise CapabilityError(
                    f"{self.where}: observation '{leaf.name}' has shape {list(x.shape)}, but its space and num_envs "
                    f"promise {list(wanted)}; mend its single_observation_space"
                )
            seen[leaf.name] = x.reshape(wanted).astype(leaf.dtype)
        return seen

    def _still(self) -> Array:
        """[B, *shape] the action that is zero everywhere."""
        zeros = torch.zeros(len(self._seeds), *self._action.spec.shape, dtype=self._action.spec.dtype)
        return self._action(zeros)


def _mode_of(env: VectorEnv[Any, Any, Any], copies: int, where: str) -> AutoresetMode:
    """Its autoreset mode.

    Raises:
        CapabilityError: It does not say, has another number of copies, or no spaces of a single one.
    """
    known = [m.value for m in AutoresetMode]
    mode = env.metadata.get("autoreset_mode")
    if not isinstance(mode, AutoresetMode) and mode not in known:
        raise CapabilityError(
            f"{where}: its vector env has metadata['autoreset_mode'] {mode!r}, expected one of {', '.join(known)}: "
            "without it nobody knows in which step a copy's next episode begins; state it in its class"
        )
    found = getattr(env, "num_envs", None)
    if found != copies:
        raise CapabilityError(
            f"{where}: its vector env has num_envs {found}, and {copies} copies were asked for; its class must make as "
            "many as its argument num_envs says"
        )
    for name in ("single_observation_space", "single_action_space"):
        if getattr(env, name, None) is None:
            raise CapabilityError(f"{where}: its vector env has no {name}; set it in its class")
    return AutoresetMode(mode)


def _read(leaf: Leaf, obs: Any, where: str) -> Array:
    try:
        return _numpy(leaf.read(obs))
    except (KeyError, TypeError, IndexError) as error:
        raise CapabilityError(
            f"{where}: its observation has no '{leaf.name}', which its space promises; mend single_observation_space"
        ) from error


def _numpy(x: Any) -> Array:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def _same(a: Array, b: Array) -> Array:
    """[B] bool, equal in every number; NaN equals NaN."""
    return ((a == b) | ((a != a) & (b != b))).reshape(len(a), -1).all(1)


def _column(info: Any, key: str, copies: int) -> Array:
    """[B] of an entry of a dict of arrays, or of an array of dicts; 0 for copies without it."""
    if not isinstance(info, dict):
        return np.array([float((one or {}).get(key) or 0) for one in info])
    if key not in info:
        return np.zeros(copies)
    x = np.array([float(v or 0) for v in _numpy(info[key]).tolist()])
    return np.where(info.get(f"_{key}", True), x, 0)


def _rows(mask: Array) -> list[int]:
    return [int(i) for i in np.flatnonzero(mask)[:8]]
