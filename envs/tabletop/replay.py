"""One demonstration, repeated where the objects lie elsewhere.

The hand's commanded path is moved along with what it is about: until the fingers close, with the object meant, and from
then on with the marked goal, where there is one. It moves over as the hand does: whoever has gone half of the way has
half of the shift. So nothing is known but the demonstration and where things are; or, after `suppose`, where they are
supposed to be, see `blind.py`.

Source: Mandlekar et al. 2023 (MimicGen, arXiv:2310.17596): segments of a demonstration, each moved with its object, of
which those that succeed are kept. Differs: the path is bent from its beginning instead of joined by a straight line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from embodied_rl.envs.tabletop.blind import feels, solved, things_at
from embodied_rl.envs.tabletop.clumsy import STUCK, errors
from embodied_rl.envs.tabletop.control import MAX_MOVE, MAX_TURN
from embodied_rl.envs.tabletop.env import TabletopEnv
from embodied_rl.envs.tabletop.expert import Expert
from embodied_rl.seeding import numpy_rng

CLOSING = 4
"""Control steps that fingers take to close."""
CLOSE = 0.6
"""Part of a step of the hand that may still be missing when it goes on to the next."""
LOST = 3
"""Control steps without the object between closed fingers after which it begins again."""


class Replay:
    """Repeats demonstrations; follows `embodied_rl.record_demos.Expert`."""

    disturbed = Expert.disturbed

    def __init__(self, env: TabletopEnv, seeds: Tensor, tasks: Tensor, actions: Sequence[Tensor]) -> None:
        """Look at where the demonstrations began; the env must be reset before it is used for anything else.

        Args:
            env: Watched in `act`.
            seeds: [K] int64 start seeds of the demonstrations.
            tasks: [K] int64
            actions: K times [T, 7], as executed.
        """
        self._env, device = env, env.physics.device
        b, longest = env.spec.num_envs, max(len(x) for x in actions)
        self._tasks, self._length = tasks.to(device), torch.tensor([len(x) for x in actions], device=device)
        padded = torch.stack([torch.cat([x, x[-1:].expand(longest - len(x), -1)]) for x in actions]).to(device)
        inside = (torch.arange(longest, device=device) < self._length[:, None]).unsqueeze(2)
        moved = (padded[:, :, :6].clamp(-1, 1) * inside).cumsum(1)
        self._path, self._turned, self._grip = MAX_MOVE * moved[:, :, :3], MAX_TURN * moved[:, :, 5], padded[:, :, 6]
        self._closes = ((self._grip < 0) & inside[:, :, 0]).any(1)
        """[K] bool; an object that is never grasped is touched, and what counts is its upper side."""
        self._grasp = grasp = torch.where(self._closes, (self._grip < 0).int().argmax(1), self._length - 1)
        self._there = _progress(self._path[:, :, :2], grasp)
        """[K, T] how far the hand has come to the object, 0 to 1."""
        self._on = _progress(self._path[:, :, :2] - _at(self._path[:, :, :2], grasp), self._length - 1, grasp)
        """[K, T] and from there to where it ends."""
        looks, first = [], torch.arange(b, device=env.device) == 0
        for seed, task in zip(seeds.tolist(), tasks.tolist(), strict=True):
            env.reset(first, first.long() * seed, first.long() * task)
            looks.append({name: x[:1] for name, x in self._look().items()})
        self._shown = {name: torch.cat([look[name] for look in looks]) for name in looks[0]}
        """Where things were, by demonstration."""
        self._now = {name: torch.zeros(b, *x.shape[1:], device=device) for name, x in self._shown.items()}
        self._which, self._step, self._empty = (torch.zeros(b, dtype=torch.int64, device=device) for _ in range(3))
        self._psi = torch.zeros(b, device=device)
        self._supposed: dict[str, Tensor] = {}
        self._trying = False
        """Whether guesses are tried, once each."""
        self._past = torch.zeros_like(self._step)
        """[B] control steps at the end of the path."""

    def reset(self, mask: Tensor) -> None:
        """Begin in the masked copies [B], each with a demonstration of its task, drawn by the start's seed."""
        mask = mask.to(self._step.device)
        for name, x in self._where().items():
            self._now[name][mask] = x[mask]
        episode = self._env.episode
        for copy in mask.nonzero()[:, 0].tolist():
            known = (self._tasks == episode.task[copy]).nonzero()[:, 0]
            pick = numpy_rng(int(episode.seed[copy]), "replay").random()
            self._which[copy] = known[int(pick * len(known))]
        self._step[mask], self._empty[mask], self._past[mask], self._psi[mask] = 0, 0, 0, 0.0

    def suppose(self, mask: Tensor, seeds: Tensor, beside: Sequence[list[int]]) -> None:
        """From the next `reset` of the masked copies [B] on, take things to lie as they do at other starts [B].

        Shifted as `embodied_rl.blind.Guesser` says.
        """
        mask = mask.to(self._step.device)
        rows = mask.nonzero()[:, 0].tolist()
        told = things_at(
            self._env, [int(seeds[i]) for i in rows], self._env.episode.task[mask].tolist(), [beside[i] for i in rows]
        )
        for name, x in told.items():
            self._supposed.setdefault(name, torch.zeros_like(self._now[name]))[mask] = x

    def guess(self, seeds: Tensor, tasks: Tensor, elsewhere: Tensor, beside: Sequence[list[int]]) -> Tensor:
        """Whether attempts [N] at these starts succeed when they `suppose` so: [N] bool."""
        self._trying = True
        try:
            return solved(self, self._env, seeds, tasks, elsewhere, beside)
        finally:
            self._trying = False

    @property
    def over(self) -> Tensor:
        """[B] bool, it has been at the end of its path for a while, or its guess has been found wrong."""
        return self._past >= LOST

    def _start_over(self) -> None:
        """Begin again from where the hand is, and where the object is, where closed fingers do not hold it."""
        k = self._which
        closed = self._closes[k] & (self._step > self._grasp[k] + CLOSING)
        self._empty = torch.where(closed & ~self._held(), self._empty + 1, 0)
        self._past += self._step >= self._length[k] - 1
        anew = self._empty > LOST
        if self._trying:
            # A guess that has closed on nothing is wrong, even where the object is pushed to its goal all the same.
            self._past[anew] = LOST
        elif bool(anew.any()):
            for name, x in self._where().items():
                self._now[name][anew] = x[anew]
            self._step[anew], self._empty[anew] = 0, 0

    def act(self) -> Tensor:
        """Actions [B, 7] towards the next point of the path; a hand that is behind is waited for."""
        self._start_over()
        k, t, shown, now = self._which, self._step, self._shown, self._now
        there, on = self._there[k, t], self._on[k, t]
        lid = torch.where(self._closes[k], 0.0, now["half"] - shown["half"][k])
        object_ = now["object"] - shown["object"][k]
        object_[:, 2] += lid
        marked = (shown["goal"][k, 2] > 0) & self._closes[k]
        goal = torch.where(marked[:, None], now["goal"] - shown["goal"][k], object_)
        goal[:, 2] = object_[:, 2]
        hand = now["hand"] - shown["hand"][k]
        shift = hand + there[:, None] * (object_ - hand) + on[:, None] * (goal - object_)
        target = shown["hand"][k] + self._path[k, t] + shift
        move = (target - self._env.controller.position) / MAX_MOVE
        aligned = torch.remainder(now["yaw"] - shown["yaw"][k] + math.pi / 2, math.pi) - math.pi / 2
        turn = (self._turned[k, t] + there * aligned - self._psi) / MAX_TURN
        action = torch.zeros(len(k), 7, device=move.device)
        action[:, :3], action[:, 5], action[:, 6] = move.clamp(-1, 1), turn.clamp(-1, 1), self._grip[k, t]
        self._psi += MAX_TURN * action[:, 5]
        arrives = (move - action[:, :3]).norm(dim=1) < CLOSE
        self._step = torch.minimum(t + arrives, self._length[k] - 1)
        return action.to(self._env.device)

    def clumsy(self, copies: Tensor, seed: int) -> Erring:
        """The same with a hand that errs in some copies [B] bool until it has found out."""
        return Erring(self, copies, seed)

    def _where(self) -> dict[str, Tensor]:
        """Where things are, or are supposed to be."""
        return self._look() | self._supposed

    def _held(self) -> Tensor:
        """[B] bool, the object meant is held; or, of one that supposes, something is."""
        return feels(self._env) if self._supposed else self._env.view().held

    def _look(self) -> dict[str, Tensor]:
        """Where the hand is told to be, the object meant, its turn and half height, and the goal, of all copies."""
        env, view = self._env, self._env.view()
        rows = torch.arange(env.spec.num_envs, device=view.tcp.device)
        quaternion = env.object_poses()[rows, env.episode.a, 3:].float()
        return {
            "hand": env.controller.position.clone().float(),
            "object": view.a_position.clone().float(),
            "half": view.a_half_height.clone().float(),
            "yaw": 2 * torch.atan2(quaternion[:, 3], quaternion[:, 0]),
            "goal": view.goal.clone().float(),
        }


class Erring(Replay):
    """Takes objects that are grasped to be up to some centimetres from where they are; see `clumsy.Clumsy`."""

    def __init__(self, right: Replay, copies: Tensor, seed: int) -> None:
        """Draw the errors.

        Args:
            right: What it would do if it knew better.
            copies: [B] bool, who errs, if its task is one of grasping.
            seed: Of where to and for how long.
        """
        self.__dict__.update(right.__dict__)
        self._now = {name: x.clone() for name, x in right._now.items()}
        self._which, self._step, self._psi = right._which.clone(), right._step.clone(), right._psi.clone()
        self._empty = right._empty.clone()
        self._aside, self._late = errors(len(copies), seed, self._step.device)
        self._copies = copies.to(self._step.device)
        self.errs = torch.zeros_like(self._copies)
        """[B] bool, has not found out yet."""
        self._closed, self._waited = torch.zeros_like(self._step), torch.zeros_like(self._step)

    def reset(self, mask: Tensor) -> None:
        """Begin to err in the masked copies [B] that are to."""
        super().reset(mask)
        mask = mask.to(self._step.device)
        self._now["object"][mask] += self._aside[mask]
        self.errs = torch.where(mask, self._copies & self._closes[self._which], self.errs)
        self._closed[mask], self._waited[mask] = 0, 0

    def _start_over(self) -> None:
        """Not before the error is found out."""

    def act(self) -> Tensor:
        """Actions [B, 7] of one who does not know better."""
        before = self._step.clone()
        action = super().act()
        self._waited = torch.where(self._step == before, self._waited + 1, 0)
        self._closed += action[:, 6].to(self._closed.device) < 0
        noticed = (self._closed > CLOSING + self._late) | (self._waited > STUCK)
        # Whoever has the object in spite of all was right.
        self.errs = self.errs & ~noticed & ~self._held()
        return action


def _at(x: Tensor, index: Tensor) -> Tensor:
    """[K, 1, D] the rows of x [K, T, D] at an index [K] each."""
    return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[2]))


def _progress(path: Tensor, end: Tensor, begin: Tensor | None = None) -> Tensor:
    """[K, T] share of the way [K, T, 2] made between two steps, 0 before and 1 after; at once where there is no way."""
    steps = torch.arange(path.shape[1], device=path.device)
    length = torch.diff(path, dim=1, prepend=torch.zeros_like(path[:, :1])).norm(dim=2)
    counts = steps <= end[:, None]
    if begin is not None:
        counts &= steps > begin[:, None]
    made = (length * counts).cumsum(1)
    share = made / made[:, -1:].clamp(min=1e-6)
    return torch.where(made[:, -1:] > 1e-3, share, (steps >= (0 if begin is None else begin[:, None])).float())
