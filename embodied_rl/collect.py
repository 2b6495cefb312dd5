"""Policy + env -> Rollout: the only room that knows resets, chunks, groups and pipelining.

The copies are split into `pipeline` parts. With one part everything runs in order in this thread; with two, one part
simulates in the background while the policy decides for the other. Either way every decision is on-policy and the
order of all random draws is fixed.

    stream    episodes go on across rollouts; a copy that ends is restarted at once
    episodes  each copy runs one episode per rollout from a start shared by its group, then waits: it is neither
              simulated nor shown to the policy
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor

from embodied_rl.budget import Budget, share_out
from embodied_rl.curriculum import Curriculum, StartPool, make_sampler
from embodied_rl.decide import decide, decide_mixed
from embodied_rl.errors import CapabilityError, CheckpointError
from embodied_rl.execute import Ends, Executed, execute
from embodied_rl.observation import check_finite, check_observation, name_of
from embodied_rl.record import Record
from embodied_rl.seeding import start_seed
from embodied_rl.selection import columns
from embodied_rl.types import Demonstrating, Env, Hinting, Obs, Policy, Relabelling, Rollout, State, Step

log = logging.getLogger(__name__)


@dataclass
class Part:
    """One env and the columns of the rollout that belong to it."""

    env: Env
    columns: slice
    obs: Obs = field(default_factory=dict)
    pending: Callable[[], Executed] | None = None
    worker: ThreadPoolExecutor | None = None

    def start(self, action: Tensor, active: Tensor | None, ends: Ends) -> None:
        """Begin executing a chunk, in the background when there are several parts."""
        send, recv, first = getattr(self.env, "send", None), getattr(self.env, "recv", None), self.columns.start
        if self.worker is None:
            done = execute(self.env, action, active, ends)
            self.pending = lambda: done
        elif send is not None and recv is not None and action.shape[1] == 1:
            # The env has threads of its own: no need to cross one of ours.
            send(action[:, 0], active)
            received = _Received(self.env, recv)
            self.pending = lambda: execute(received, action, active, first=first)  # type: ignore[arg-type]
        else:
            future: Future[Executed] = self.worker.submit(execute, self.env, action, active, ends, first=first)
            self.pending = future.result

    def finish(self) -> Executed:
        """Wait for the chunk that was begun."""
        assert self.pending is not None
        pending, self.pending = self.pending, None
        return pending()


class _Received:
    """An env whose step has already been begun."""

    def __init__(self, env: Env, recv: Callable[[], Step]) -> None:
        self.spec, self.where, self._recv = env.spec, name_of(env), recv

    def step(self, action: Tensor, active: Tensor | None) -> Step:
        return self._recv()


class Collector:
    """Collects rollouts; iterate over it, or call `collect`. Every rollout has memory of its own."""

    def __init__(
        self, envs: Sequence[Env], policy: Policy, *, decisions: int, mode: Literal["stream", "episodes"] = "stream",
        group_size: int = 1, curriculum: Curriculum | None = None, run_seed: int = 0,
        generator: torch.Generator | None = None, keep_final_obs: bool = False, keep_actions: bool = False,
        greedy_baseline: bool = False, budget: Budget | None = None, demonstrated: bool = False,
        hindsight: bool = False,
    ) -> None:  # fmt: skip
        """Join env parts and a policy.

        Args:
            envs: Parts of equal spec; their copies are concatenated.
            policy: Decides; its `chunk` fixes C.
            decisions: T, the most decisions of one rollout.
            mode: See the module docstring.
            group_size: Copies that share each start.
            curriculum: Which task each start gets; None for one after the other.
            run_seed: Seed of the starts.
            generator: Of the policy's samples, on the policy's device.
            keep_final_obs: Fill `Rollout.final_obs` and `instructions`, which reward models and self-imitation read.
            keep_actions: Fill `Rollout.action`, which self-imitation reads.
            greedy_baseline: The first copy of each group takes the policy's mode.
            budget: Copies per start by its success rate; None for `group_size` each.
            demonstrated: Fill `Rollout.demonstration`.
            hindsight: Fill `Rollout.relabelled`.

        Raises:
            CapabilityError: Groups on an env that cannot be seeded, or of copies that cannot play the same tasks; a
                curriculum without tasks or success.
        """
        self.policy, self.mode, self.group_size, self.run_seed = policy, mode, group_size, run_seed
        self.spec = envs[0].spec
        self.decisions, self.generator = decisions, generator
        self.keep_final_obs, self.keep_actions = keep_final_obs, keep_actions
        if group_size > 1 and not self.spec.seedable:
            raise CapabilityError(
                f"collect.group_size {group_size} needs an env that starts the same episode again for the same seed, "
                f"and this one cannot{self.spec.because}; use group_size: 1 with a method that needs no groups, or an "
                "env that can"
            )
        self.sampler = make_sampler(curriculum or Curriculum(), envs, group_size, run_seed, budgeted=budget is not None)
        self.budget = budget
        self.parts: list[Part] = []
        start = 0
        for env in envs:
            worker = ThreadPoolExecutor(1, thread_name_prefix="simulate") if len(envs) > 1 else None
            self.parts.append(Part(env, slice(start, start + env.spec.num_envs), worker=worker))
            start += env.spec.num_envs
        self.num_envs, self.device = start, envs[0].device
        b = self.num_envs
        self.group_of = torch.arange(b) // group_size
        self.greedy_baseline, self.demonstrated, self.hindsight = greedy_baseline, demonstrated, hindsight
        for env in envs if hindsight else ():
            cast(Relabelling, env).watch()
        self.starts = torch.zeros(b, dtype=torch.int64)
        self.seed = torch.zeros(b, dtype=torch.int64)
        self.task = torch.zeros(b, dtype=torch.int64)
        self.episode_return = torch.zeros(b, dtype=torch.float64)
        self.episode_length = torch.zeros(b, dtype=torch.int64)
        self.episode_success = torch.zeros(b, dtype=torch.bool)
        self.version = 0
        self._begun = False

    @property
    def greedy(self) -> Tensor | None:
        """[B] bool, copies that take the policy's mode: the first of each group; None when all sample."""
        if not self.greedy_baseline:
            return None
        before = torch.cat([self.group_of.new_full((1,), -1), self.group_of[:-1]])
        return (self.group_of != before).to(self.device)

    @property
    def ends(self) -> Ends:
        """Whose last observation the rollout needs, see `Record.final_obs`."""
        if self.keep_final_obs:
            return "all"
        blind = not self.policy.has_critic or getattr(self.policy, "privileged_critic", False)
        return "none" if blind else "truncated"

    def __iter__(self) -> Iterator[Rollout]:
        """Endless rollouts by the policy's weights of the moment."""
        while True:
            yield self.collect()

    def collect(self) -> Rollout:
        """Gather one rollout of at most `decisions` decisions per copy.

        Raises:
            DivergenceError: An env shows numbers that are not finite where an episode begins.
        """
        try:
            return self._collect(Record(self))
        except Exception:
            # Half a rollout is of no use, nor are the episodes that it left anywhere: the next one begins them anew.
            self._begun = False
            self._forget_episodes()
            raise

    def again(self, copies: Tensor, hint: float) -> Rollout:
        """Play the last starts of some copies once more, with a hint; nobody else moves, and no statistic counts it.

        Args:
            copies: [B] bool on the CPU, with at least one True; `mode: episodes` only.
            hint: Share of the solution that the env shows (`types.Hinting`).

        Returns:
            rollout: [T, b] of these copies alone, without `finished`.
        """
        for part in self.parts:
            cast(Hinting, part.env).hint(hint)
        rollout = self._collect(Record(self, copies.to(self.device)), copies)
        for part in self.parts:
            cast(Hinting, part.env).hint(0.0)
        return columns(rollout, copies.nonzero().squeeze(-1).to(self.device))

    def _collect(self, record: Record, again: Tensor | None = None) -> Rollout:
        everyone = torch.ones(self.num_envs, dtype=torch.bool)
        if again is not None:
            self._reset(again, record)
        elif self.mode == "episodes" or not self._begun:
            self._restart(everyone, record)
            self._begun = True
        record.open()
        if self.demonstrated:
            record.demonstrations([cast(Demonstrating, part.env).demonstrate() for part in self.parts])
        active = (everyone if again is None else again.clone()).to(self.device)
        for part in self.parts:
            if bool(active[part.columns].any()):
                self._decide(part, 0, active, record)
        for t in range(self.decisions):
            for part in self.parts:
                self._receive(part, t, active, record)
                if t + 1 < self.decisions and bool(active[part.columns].any()):
                    self._decide(part, t + 1, active, record)
            if not bool(active.any()):
                break
        rollout = record.close(t + 1, active)
        if again is None:
            self.sampler.observe(rollout.finished)
        return rollout

    def _decide(self, part: Part, t: int, active: Tensor, record: Record) -> None:
        here = active[part.columns]
        some = None if self.mode == "stream" or bool(here.all()) else here
        if self.greedy is None:
            output = decide(self.policy, part.obs, some, generator=self.generator)
        else:
            modes = self.greedy[part.columns]
            output = decide_mixed(self.policy, part.obs, here, modes, generator=self.generator)
        record.decision(t, part, output)
        part.start(output.action, some, self.ends)

    def _receive(self, part: Part, t: int, active: Tensor, record: Record) -> None:
        if part.pending is None:
            return
        executed = part.finish()
        part.obs = executed.obs
        done = record.outcome(t, part, executed)
        if not bool(done.any()):
            return
        record.final_obs(t, part, done if self.keep_final_obs else executed.truncated)
        record.achieved(part, done)
        if self.mode == "episodes":
            active[part.columns] &= ~done
        else:
            mask = torch.zeros(self.num_envs, dtype=torch.bool)
            mask[part.columns] = done.cpu()
            self._restart(mask, record, [part])

    def _restart(self, mask: Tensor, record: Record, parts: Sequence[Part] | None = None) -> None:
        """Begin new episodes in the masked copies: they depend on (run seed, group, how many before, curriculum)."""
        where = mask.nonzero().squeeze(-1)
        if self.budget is None:
            self.seed[where], self.task[where] = self.sampler.begin(self.group_of[where], self.starts[where])
        else:
            self._divide(self.budget)
        self.starts[where] += 1
        self._reset(mask, record, parts)

    def _divide(self, budget: Budget) -> None:
        """Draw the starts of all groups, then give each as many copies as its success rate says."""
        groups = torch.arange(self.num_envs // self.group_size)
        seed, task = self.sampler.begin(groups, torch.zeros_like(groups))
        copies = share_out(cast(StartPool, self.sampler).rate(seed), self.num_envs, budget)
        self.group_of = groups.repeat_interleave(copies)
        self.seed, self.task = seed[self.group_of], task[self.group_of]

    def _reset(self, mask: Tensor, record: Record, parts: Sequence[Part] | None = None) -> None:
        for part in parts or self.parts:
            here, seeds, tasks = (x[part.columns].to(self.device) for x in (mask, self.seed, self.task))
            part.obs = part.env.reset(here, seeds, tasks)
            check_observation(part.obs, part.env.spec, start=True)
            check_finite(part.obs, here, part.env, first=part.columns.start)
        record.begin_episodes(mask.nonzero().squeeze(-1))

    @property
    def _starts_anew(self) -> bool:
        """Whether nothing of the env outlives a rollout: every copy is then restarted by its seed."""
        return self.mode == "episodes" and self.spec.seedable

    def state_dict(self) -> State:
        """Everything collection needs to go on bit for bit, when the env has state."""
        keep_envs = self._begun and self.spec.has_state and not self._starts_anew
        generator = self.generator
        state: State = {
            "version": self.version,
            "tasks": self.sampler.state_dict(),
            "begun": self._begun,
            "generator": generator and {"device": generator.device.type, "state": generator.get_state()},
            "envs": [p.env.get_state() for p in self.parts] if keep_envs else None,
        }
        return state | {k: getattr(self, k) for k in self._COPY_FIELDS}

    _COPY_FIELDS = ("starts", "seed", "task", "episode_return", "episode_length", "episode_success")

    def load_state_dict(self, state: State) -> bool:
        """Restore `state_dict`.

        Returns:
            exact: False when episodes begin anew because the env cannot restore its state, or when actions are
                drawn from a new sequence because the old one was of another kind of device.

        Raises:
            CheckpointError: It is of another number of copies.
        """
        found = len(state["starts"])
        if found != self.num_envs:
            raise CheckpointError(f"it holds {found} copies of the env, collect.copies is {self.num_envs}")
        for k in self._COPY_FIELDS:
            getattr(self, k).copy_(state[k])
        self.version = state["version"]
        self.sampler.load_state_dict(state["tasks"])
        # Until an env state is in place the next rollout must begin with a reset, whatever this collector did before.
        self._begun = False
        same_samples = self._restore_generator(state["generator"])
        if not state["begun"] or self._starts_anew:
            return same_samples
        if state["envs"] is not None:
            try:
                for part, env_state in zip(self.parts, state["envs"], strict=True):
                    part.obs = part.env.set_state(env_state)
                self._begun = True
                return same_samples
            except CapabilityError as error:
                log.warning("%s", error)
        self._forget_episodes()
        log.warning(
            "this env cannot restore its state%s: episodes begin anew, so the resumed run is not bit-identical",
            self.spec.because,
        )
        return False

    def _forget_episodes(self) -> None:
        self.episode_return.zero_(), self.episode_length.zero_(), self.episode_success.zero_()

    def _restore_generator(self, saved: State | None) -> bool:
        if self.generator is None or saved is None:
            return True
        if saved["device"] == self.generator.device.type:
            self.generator.set_state(saved["state"])
            return True
        self.generator.manual_seed(start_seed(self.run_seed, "train", -1, self.version))
        log.warning(
            "the run was sampled on %s and goes on on %s: actions are drawn from a new sequence, so the resumed run is "
            "not bit-identical", saved["device"], self.generator.device.type,
        )  # fmt: skip
        return False

    def close(self) -> None:
        """Stop the background threads and close the env parts."""
        for part in self.parts:
            if part.worker is not None:
                part.worker.shutdown(wait=True)
            part.env.close()
