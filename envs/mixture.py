"""Several envs in one batch: every copy can play any task of any part, so groups and curricula work as ever.

Each part is built with all B copies, and a copy moves in the part whose task it was given at its last reset; the others
leave it alone. Where every part states its `copies`, it is built with those alone, and they play nothing else. The
parts agree on one observation and one action: what has to be filled, padded or mapped for that is stated in the recipe,
told in `conformance`, and refused otherwise.

    parts: [{name: reach, env: {type: tabletop, tasks: [reach]}},
            {name: toy, weight: 2, env: {type: target}, rename: {state: wanted}, action: [0, 1]}]
    missing: zeros
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from embodied_rl import registry, yaml_strict
from embodied_rl.convention import Convention, Item
from embodied_rl.envs._joined import Joined, join, share_copies
from embodied_rl.errors import CapabilityError, CheckpointError, ConfigError, NotFoundError, UserError, nearest
from embodied_rl.manifest import told_by
from embodied_rl.measure import restarts_of
from embodied_rl.offers import Sparing, Speaking
from embodied_rl.schema import Problems, resolve_component
from embodied_rl.section import Section
from embodied_rl.types import Env, Obs, Split, State, Step

log = logging.getLogger(__name__)


class MixturePart(Section):
    """One env of a mixture."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Stands before the names of its tasks, as in `toy.target`; null takes the env's type."""
    weight: float = Field(1.0, gt=0)
    """How often training starts an episode in this part, relative to the others; shared evenly by its tasks."""
    copies: int | None = Field(None, ge=1)
    """How many of `collect.copies` are this part's own and play nothing else, which saves the memory of simulators that
    wait; stated for all parts or for none. Other numbers of copies (evaluation, a pipeline) are divided likewise."""
    env: dict[str, Any]
    """The part's `env` section, with its type."""
    rename: dict[str, str] = {}
    """Entry of its observation -> the name it has in the mixture, where two parts mean different things by one name."""
    action: tuple[int, ...] | None = None
    """Which numbers of the mixture's action it takes, in its own order; null takes all of them."""
    convention: Convention | None = None
    """What its numbers mean, as far as its env does not say so itself."""
    bridge: dict[Item, Literal["convert", "keep"]] = {}
    """What becomes of each item in which its numbers mean something else than the mixture's, which mean what they do in
    the first part that takes all of them. convert: works it out (gripper, metres, radians, and rotation between
    axis_angle and euler_xyz); keep: leaves the numbers, so that equal ones do different things."""


class Config(Section):
    """Settings of a mixture."""

    type: Literal["mixture"] = "mixture"
    parts: tuple[MixturePart, ...] = Field(min_length=2)
    """The envs."""
    missing: Literal["refuse", "zeros"] = "refuse"
    """What becomes of an entry that only some parts show: zeros fills it in the others; refuse says which those are."""
    pad: bool = False
    """Fill vectors of one name with zeros at their end, up to the longest; false refuses different lengths. Rows of
    word ids of one vocabulary are filled in any case, because 0 is no word."""

    @model_validator(mode="after")
    def _names_differ(self) -> Config:
        names = [part_name(part) for part in self.parts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"several parts are called {', '.join(twice)}: give each a name of its own")
        stated = [part for part in self.parts if part.copies is not None]
        if stated and len(stated) < len(self.parts):
            without = [part_name(part) for part in self.parts if part.copies is None]
            raise ValueError(f"copies is stated for some parts and not for {', '.join(without)}: state all or none")
        for part in stated:
            if part.weight != 1:
                raise ValueError(
                    f"weight ({part.weight:g}) of {part_name(part)} does nothing beside copies ({part.copies}), which "
                    "say how much is played there: remove one of them"
                )
        return self


def part_name(part: MixturePart) -> str:
    """The part's name, or its env's type without folders and endings."""
    return part.name or str(part.env.get("type", "env")).removesuffix(".py").replace(".", "/").rsplit("/", 1)[-1]


class MixtureEnv:
    """See the module docstring and `embodied_rl.types.Env`."""

    def __init__(self, config: Config, envs: list[Env], joined: Joined, device: torch.device) -> None:
        """Join envs of the copies that `joined.rows` names."""
        self.config, self.names = config, [part_name(part) for part in config.parts]
        self.envs, self.device, self._joined, self.spec = envs, device, joined, joined.spec
        self.conformance = joined.report
        """What was filled, padded, renamed, mapped or left out, one sentence each."""
        self._rows = joined.rows
        self._part, self._task = torch.zeros(2, self.spec.num_envs, dtype=torch.int64, device=device).unbind()
        if self.spec.blocks is not None:
            for p, rows in enumerate(self._rows):
                self._part[rows] = p
        self._seated: list[tuple[int, Tensor | None]] = []
        """Parts in which copies play, and which of the part's those are, [b] bool; None where all of them do."""
        # What does not change within an episode is only read where episodes begin.
        self._changing = {
            k for k, entry in self.spec.observation.items() if joined.spec.restarts_itself or not entry.constant
        }
        self._begun = False
        self._obs: Obs = {}
        if any(isinstance(env, Speaking) for env in envs):
            self.instructions = self._instructions  # a mixture of parts without words has no such method

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        """Start new episodes in the masked copies, each in the part that its task belongs to."""
        part = self._joined.part_of.to(self.device)[tasks]
        inner = self._joined.task_in_part.to(self.device)[tasks]
        if self.spec.blocks is not None and bool((wrong := mask & (part != self._part)).any()):
            copy = int(wrong.nonzero()[0])
            raise CapabilityError(
                f"mixture: copy {copy} cannot play '{self.spec.tasks[int(tasks[copy])]}', which is another part's; the "
                "spec's blocks say which copies play what"
            )
        self._part, self._task = torch.where(mask, part, self._part), torch.where(mask, tasks, self._task)
        for p, (env, rows) in enumerate(zip(self.envs, self._rows, strict=True)):
            mine = mask & (self._part == p)
            # The first reset begins an episode in every copy of every part: no simulator is left half begun.
            start = (mine if self._begun else torch.ones_like(mask))[rows]
            if bool(start.any()):
                task = torch.where(mine, inner, torch.zeros_like(inner))[rows]
                obs = env.reset(start, seeds[rows], task)
                self._take(p, obs, (mine if self._begun else self._part == p)[rows])
        self._begun = True
        self._seat()
        return dict(self._obs)

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        """Advance the active copies, each in its part; the others wait, with reward 0."""
        self.spec.action.check(action, self.spec.num_envs, self.device, "mixture")
        assert self._begun, "step before the first reset"
        no = torch.zeros(self.spec.num_envs, dtype=torch.bool, device=self.device)
        zero = torch.zeros(self.spec.num_envs, device=self.device)
        out = Step({}, zero.clone(), no.clone(), no.clone(), no.clone() if self.spec.has_success else None)
        moved: list[dict[str, Tensor]] = []
        fresh: Obs = {}
        for p, here, step in self._advance(action, active):
            rows = self._rows[p]
            _put(out.reward, rows, here, step.reward)
            _put(out.terminated, rows, here, step.terminated)
            _put(out.truncated, rows, here, step.truncated)
            if out.success is not None and step.success is not None:
                _put(out.success, rows, here, step.success)
            if step.invalid is not None:
                out.invalid = no.clone() if out.invalid is None else out.invalid
                _put(out.invalid, rows, here, step.invalid)
            if step.starting is not None:
                out.starting = no.clone() if out.starting is None else out.starting
                _put(out.starting, rows, here, step.starting)
            moved.append({name: zero.clone() for name in step.metrics})
            for name, x in step.metrics.items():
                _put(moved[-1][name], rows, here, x)
            for name, x in self._joined.observation_of(p, step.obs, self._changing).items():
                if name not in fresh:
                    fresh[name] = self._obs[name].clone()  # earlier observations keep theirs
                _put(fresh[name], rows, here, x)
        self._obs |= fresh
        # A mean over copies of which some do not know the quantity would be of something else.
        shared = set.intersection(*(set(m) for m in moved)) if moved else set()
        out.metrics = {name: torch.stack([m[name] for m in moved]).sum(0) for name in sorted(shared)}
        out.obs = {} if self.spec.on_demand else dict(self._obs)
        return out

    def _advance(self, action: Tensor, active: Tensor | None) -> Iterator[tuple[int, Tensor | None, Step]]:
        """Each part in which copies move, which of its copies those are (None: all), and its step.

        Parts whose step has two halves are all begun before the first is waited for.
        """
        moving = self._seated
        if active is not None and not bool(active.all()):
            some = [(p, _and(here, active[self._rows[p]])) for p, here in moving]
            moving = [(p, here) for p, here in some if bool(here.any())]
        shares = [self._joined.action_of(p, action[self._rows[p]]) for p, _ in moving]
        begun = [hasattr(self.envs[p], "send") for p, _ in moving]
        for (p, here), share, split in zip(moving, shares, begun, strict=True):
            if split:
                cast("Any", self.envs[p]).send(share, here)
        for (p, here), share, split in zip(moving, shares, begun, strict=True):
            yield p, here, cast("Any", self.envs[p]).recv() if split else self.envs[p].step(share, here)

    def observe(self) -> Obs:
        """Observation of all copies as they are now; parts that show themselves with every step are not asked again."""
        for p, env in enumerate(self.envs):
            if env.spec.on_demand:
                self._take(p, env.observe(), (self._part == p)[self._rows[p]])
        return dict(self._obs)

    def spare(self, copies: Tensor) -> None:
        """See `embodied_rl.types.Sparing`; parts that cannot are drawn as ever."""
        for p, (env, rows) in enumerate(zip(self.envs, self._rows, strict=True)):
            if env.spec.on_demand and isinstance(env, Sparing):
                env.spare((copies & (self._part == p))[rows])

    def get_state(self) -> State:
        """Each part's state, and where each copy plays.

        Raises:
            CapabilityError: A part cannot save its state.
        """
        where = {"part": self._part.clone(), "task": self._task.clone(), "begun": self._begun}
        return {**where, "envs": [env.get_state() for env in self.envs]}

    def set_state(self, state: State) -> Obs:
        """Restore `get_state`'s result.

        Raises:
            CheckpointError: It is of other parts or another number of copies.
        """
        if len(state["envs"]) != len(self.envs) or len(state["part"]) != self.spec.num_envs:
            raise CheckpointError(
                f"mixture state: found {len(state['envs'])} parts of {len(state['part'])} copies, expected "
                f"{len(self.envs)} of {self.spec.num_envs}; build the env as the state's run did"
            )
        self._part, self._begun, self._obs = state["part"].to(self.device).clone(), state["begun"], {}
        # Older states do not say it; it only names what copies in parts without words are asked for.
        self._task = state.get("task", torch.zeros_like(state["part"])).to(self.device).clone()
        for p, (env, saved) in enumerate(zip(self.envs, state["envs"], strict=True)):
            obs = env.set_state(saved)
            if self._begun:
                self._take(p, obs, (self._part == p)[self._rows[p]])
        self._seat()
        return dict(self._obs)

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        """Pictures [len(copies), H, W, 3] uint8, each drawn by the part in which its copy plays.

        Raises:
            NotFoundError: Not every part has this camera.
        """
        if camera not in self.spec.cameras:
            known = nearest(camera, self.spec.cameras) if self.spec.cameras else "; the parts share none"
            raise NotFoundError(f"mixture: camera '{camera}' does not exist in every part{known}")
        out = torch.zeros(len(copies), height, width, 3, dtype=torch.uint8, device=self.device)
        for p, (env, held) in enumerate(zip(self.envs, self._rows, strict=True)):
            rows = (self._part[copies] == p).nonzero().flatten()
            if len(rows):
                out[rows] = env.render(copies[rows] - held.start, camera, height, width)
        return out

    @property
    def restarts(self) -> int | None:
        """Processes that parts have replaced since they were built; None where no part has any."""
        return restarts_of(self.envs)

    def manifest(self) -> dict[str, Any]:
        """What is told of each part, by its name, and how they are joined."""
        parts = {}
        for name, part, env in zip(self.names, self.config.parts, self.envs, strict=True):
            joined = part.model_dump(mode="json", include={"rename", "action", "convention", "bridge"})
            parts[name] = {**told_by(env), "joined": joined}
        return {"missing": self.config.missing, "pad": self.config.pad, "parts": parts}

    def close(self) -> None:
        """Close every part; may be called twice."""
        for env in self.envs:
            env.close()

    def _instructions(self) -> list[str]:
        """The instruction of each copy as text; in parts without words, the name of its task."""
        texts, part = [self.spec.tasks[task] for task in self._task.tolist()], self._part.tolist()
        for p, (env, held) in enumerate(zip(self.envs, self._rows, strict=True)):
            said = env.instructions() if isinstance(env, Speaking) else []
            for copy, text in enumerate(said, held.start):
                if part[copy] == p:
                    texts[copy] = text
        return texts

    def _seat(self) -> None:
        """Note who plays where, until the next reset."""
        here = [(self._part == p)[rows] for p, rows in enumerate(self._rows)]
        self._seated = [(p, None if bool(x.all()) else x) for p, x in enumerate(here) if bool(x.any())]

    def _take(self, p: int, obs: Obs, here: Tensor) -> None:
        """Lay all that one part shows into the mixture's observation, in those of its copies [b] that are meant."""
        new, held = self._joined.observation_of(p, obs), self._rows[p]
        for name, entry in self.spec.observation.items():
            x = new.get(name)
            if name not in self._obs:
                shape = (self.spec.num_envs, *entry.shape)
                self._obs[name] = torch.zeros(shape, dtype=entry.dtype, device=self.device)
            whole = self._obs[name] = self._obs[name].clone()  # earlier observations keep theirs
            _put(whole, held, here, torch.zeros_like(whole[held]) if x is None else x)


def _and(here: Tensor | None, active: Tensor) -> Tensor:
    """Copies that are both; None stands for all."""
    return active if here is None else here & active


def _put(whole: Tensor, held: slice, here: Tensor | None, x: Tensor) -> None:
    """Write a part's values x [b, ...] into the mixture's [B, ...], in those of its copies [b] that are meant."""
    if here is not None:
        x = torch.where(here.view(-1, *[1] * (x.ndim - 1)), x, whole[held])
    whole[held] = x


def build(config: Config, *, num_envs: int, device: torch.device, split: Split, seed: int) -> MixtureEnv:
    """Build every part, with all copies or with its own, and join them.

    Args:
        config: What to make.
        num_envs: Copies B.
        device: Of every part.
        split: Handed on.
        seed: Handed on.

    Raises:
        CapabilityError: The parts cannot be joined; says which setting would state how.
        UserError: A part cannot be built; its message, after the name of the part.
    """
    envs: list[Env] = []
    own = [part.copies for part in config.parts if part.copies is not None]
    # Fewer copies than parts could not reach every task: each part then has all of them.
    rows = share_copies(own, num_envs) if own and num_envs >= len(own) else None
    try:
        for number, part in enumerate(config.parts):
            held = num_envs if rows is None else rows[number].stop - rows[number].start
            where = f"env.parts[{number}]"
            kind = part.env.get("type")
            if not isinstance(kind, str):
                raise ConfigError(f"{where}.env: found no type, expected the name of an env, as in {{type: target}}")
            try:
                node = yaml_strict.parse(yaml_strict.dump(part.env), where, lines=False)
                settings = resolve_component("env", kind, node, Problems())
                module = registry.load("env", kind)
                envs.append(module.build(settings, num_envs=held, device=device, split=split, seed=seed))
            except UserError as error:
                raise type(error)(f"{where} ({part_name(part)}): {error}") from error
        joined = join(config, [part_name(part) for part in config.parts], [env.spec for env in envs], rows)
    except BaseException:
        for env in envs:
            env.close()
        raise
    for line in joined.report:
        log.info("mixture: %s", line)
    return MixtureEnv(config, envs, joined, device)
