"""The rollout while `collect` writes it: storage, per-episode entries, next values, finished episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from embodied_rl.errors import ShapeError
from embodied_rl.offers import Speaking
from embodied_rl.types import Obs, PolicyOutput, Relabelling, Rollout

if TYPE_CHECKING:
    from embodied_rl.collect import Collector, Part
    from embodied_rl.execute import Executed


class Record:
    """The rollout while it is being written."""

    def __init__(self, collector: Collector, only: Tensor | None = None) -> None:
        """Start empty; `open` allocates.

        Args:
            collector: Whose rollout it is.
            only: [B] bool, copies that play; None for all.
        """
        self.c, self.only = collector, only
        spec = collector.spec
        self.constant_names = [n for n, s in spec.observation.items() if s.constant]
        self.bank: dict[str, list[Tensor]] = {n: [] for n in self.constant_names}
        self.episodes = 0
        self.current = torch.zeros(collector.num_envs, dtype=torch.int64)
        self.finals: list[tuple[int, Tensor, Obs]] = []
        self.metrics: dict[str, tuple[Tensor, Tensor]] = {}
        self.opened = False
        self.data: dict[str, Tensor] = {}
        self.obs: Obs = {}
        self.success: dict[str, Tensor] = {}
        self.shown: dict[str, Tensor] = {}
        self.deeds: list[tuple[Tensor, Tensor, Obs]] = []
        told = collector.keep_final_obs and all(isinstance(part.env, Speaking) for part in collector.parts)
        self.instructions: list[str] | None = [] if told else None

    def open(self) -> None:
        """Allocate [T, B] storage and note the episodes that are already running."""
        c = self.c
        t, b, a, device = c.decisions, c.num_envs, c.policy.num_units, c.device
        self.opened = True
        self.begin_episodes(torch.arange(b))
        for n, s in c.spec.observation.items():
            if not s.constant:
                self.obs[n] = torch.empty((t, b, *s.shape), dtype=s.dtype, device=device)
        self.data["logp"] = torch.empty((t, b, a), device=device)
        self.data["mask"] = torch.ones((t, b, a), dtype=torch.bool, device=device)
        self.data["valid"] = torch.ones((t, b), dtype=torch.bool, device=device)
        self.data["reward"] = torch.zeros((t, b), device=device)
        self.data["steps"] = torch.zeros((t, b), dtype=torch.int64, device=device)
        for n in ("terminated", "truncated", "invalid"):
            self.data[n] = torch.zeros((t, b), dtype=torch.bool, device=device)
        if c.spec.has_results:
            self.data["result"] = torch.full((t, b), -1, dtype=torch.int64, device=device)
        if c.spec.has_success:
            self.success = {n: torch.zeros((t, b), dtype=torch.bool, device=device) for n in ("once", "end")}
        for n in ("episode", "task", "group", "seed"):
            self.data[n] = torch.zeros((t, b), dtype=torch.int64, device=device)

    def begin_episodes(self, copies: Tensor) -> None:
        """Give the copies a new row in the bank of per-episode entries."""
        if not self.opened:
            return
        self.current[copies] = torch.arange(self.episodes, self.episodes + len(copies))
        self.episodes += len(copies)
        for n in self.constant_names:
            everyone = torch.cat([p.obs[n] for p in self.c.parts]) if len(self.c.parts) > 1 else self.c.parts[0].obs[n]
            self.bank[n].append(everyone[copies.to(everyone.device)].clone())
        if self.instructions is not None:
            asked = [text for part in self.c.parts for text in cast(Speaking, part.env).instructions()]
            if len(asked) != self.c.num_envs:
                wanted = f"{self.c.num_envs}, one for each copy"
                raise ShapeError(f"the env's instructions() gave {len(asked)} sentences, expected {wanted}")
            self.instructions += [asked[copy] for copy in copies.tolist()]

    def demonstrations(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Note what `Demonstrating.demonstrate` said in each part."""
        names = ("demonstration", "demonstrated")
        self.shown = {n: torch.cat(x) for n, x in zip(names, zip(*parts, strict=True), strict=True)}

    def decision(self, t: int, part: Part, output: PolicyOutput) -> None:
        """Write what the policy saw and emitted at decision t."""
        cols, d = part.columns, self.data
        for n, x in self.obs.items():
            x[t, cols] = part.obs[n]
        given = {"units": output.units}
        if self.c.keep_actions:
            given["action"] = output.action
        if output.features is not None:
            given["features"] = output.features
        assert t == 0 or ("features" in given) == ("features" in d), "features belong to every decision or to none"
        for n, x in given.items():
            if n not in d:
                shape = (self.c.decisions, self.c.num_envs, *x.shape[1:])
                d[n] = torch.zeros(shape, dtype=x.dtype, device=self.c.device)
            d[n][t, cols] = x
        d["logp"][t, cols] = output.logp
        if output.mask is not None:
            d["mask"][t, cols] = output.mask
        if output.value is not None:
            if "value" not in d:
                shape = (self.c.decisions, self.c.num_envs, *output.value.shape[1:])
                d["value"] = torch.zeros(shape, device=self.c.device)
            d["value"][t, cols] = output.value
        for n, x in (("episode", self.current), ("task", self.c.task), ("seed", self.c.seed)):
            d[n][t, cols] = x[cols].to(self.c.device)

    def outcome(self, t: int, part: Part, executed: Executed) -> Tensor:
        """Write what came of decision t; returns done [b]."""
        cols, d = part.columns, self.data
        d["reward"][t, cols] = executed.reward
        d["steps"][t, cols] = executed.steps
        d["terminated"][t, cols] = executed.terminated
        d["truncated"][t, cols] = executed.truncated
        if self.success:
            assert executed.success is not None and executed.success_once is not None
            self.success["once"][t, cols] = executed.success_once
            self.success["end"][t, cols] = executed.success
        if executed.result is not None:
            d["result"][t, cols] = executed.result
        if executed.invalid is not None:
            d["invalid"][t, cols] = executed.invalid
        if executed.starting is not None:
            d["valid"][t, cols] = ~executed.starting
            d["mask"][t, cols] &= ~executed.starting.unsqueeze(-1)
        for n, parts in executed.metrics.items():
            if n not in self.metrics:
                self.metrics[n] = (torch.zeros_like(d["reward"]), torch.zeros_like(d["reward"]))
            for whole, part_ in zip(self.metrics[n], parts, strict=True):
                whole[t, cols] = part_
        return executed.terminated | executed.truncated

    def final_obs(self, t: int, part: Part, ended: Tensor) -> None:
        """Keep what copies saw last, if a critic or a reward model is going to be asked about it, all at once."""
        if not (self.c.policy.has_critic or self.c.keep_final_obs) or not bool(ended.any()):
            return
        rows = ended.nonzero().squeeze(-1)
        self.finals.append((t, rows + part.columns.start, {k: v.index_select(0, rows) for k, v in part.obs.items()}))

    def achieved(self, part: Part, ended: Tensor) -> None:
        """Note what the copies [b] that have ended achieved unasked, if self-imitation is going to be told."""
        if not self.c.hindsight:
            return
        since, told = cast(Relabelling, part.env).achieved(ended)
        rows = since.nonzero().squeeze(-1)
        episodes = self.current[part.columns].to(rows.device)[rows]
        self.deeds.append((episodes, since[rows], {k: v[rows] for k, v in told.items()}))

    def close(self, t: int, active: Tensor) -> Rollout:
        """Cut to the decisions made, fill in next values, and sum up the finished episodes."""
        c, d = self.c, {k: v[:t] for k, v in self.data.items()}
        running = active & ~(d["terminated"] | d["truncated"])[-1]
        if c.mode == "episodes":
            # Whoever has not finished after the last decision is cut there, like at a time limit.
            d["truncated"][t - 1] |= active
            d["valid"][1:] &= ~(d["terminated"] | d["truncated"])[:-1].cummax(0).values
            if self.only is not None:
                d["valid"] &= self.only
            d["mask"] &= d["valid"].unsqueeze(-1)
        ended = (d["terminated"] | d["truncated"]) & d["valid"]
        self._void(d)
        next_value = self._next_value(d, running) if c.policy.has_critic else None
        solved = self._solved(d, t) if self.success else None
        final, final_obs = self._final(d, t) if c.keep_final_obs else (None, {})
        for part in c.parts:  # whoever is cut has ended as well
            self.achieved(part, active[part.columns] & (c.mode == "episodes"))
        relabelled, relabels = self._relabels(d, solved) if self.deeds and solved is not None else (None, {})
        finished = self._finished(d, t, ended)
        return Rollout(
            obs={k: v[:t] for k, v in self.obs.items()},
            constants={k: torch.cat(v) for k, v in self.bank.items()},
            episode=d["episode"], units=d["units"], logp=d["logp"], mask=d["mask"], valid=d["valid"],
            reward=d["reward"], steps=d["steps"], terminated=d["terminated"], truncated=d["truncated"],
            value=d.get("value"), next_value=next_value, group=c.group_of.to(c.device).expand(t, -1), task=d["task"],
            policy_version=torch.full((t, c.num_envs), c.version, dtype=torch.int64, device=c.device),
            chunk=c.policy.chunk, finished=finished, metrics=self._sums(d["valid"]), solved=solved,
            features=d.get("features"), action=d.get("action"), final=final, final_obs=final_obs, invalid=d["invalid"],
            result=d.get("result"), **{n: x.expand(t, *x.shape) for n, x in self.shown.items()},
            greedy=None if c.greedy is None else c.greedy.expand(t, -1), relabelled=relabelled, relabels=relabels,
            instructions=self.instructions,
        )  # fmt: skip

    @staticmethod
    def _void(d: dict[str, Tensor]) -> None:
        """Spread `invalid` over the whole episode, none of whose decisions is valid then."""
        if bool(d["invalid"].any()):
            d["invalid"] = torch.isin(d["episode"], d["episode"][d["invalid"]]) & d["valid"]
            d["valid"] = d["valid"] & ~d["invalid"]
            d["mask"] = d["mask"] & d["valid"].unsqueeze(-1)

    def _sums(self, valid: Tensor) -> dict[str, tuple[float, float]]:
        """`Rollout.metrics`: over the steps of valid decisions."""
        rows = {n: [x[: len(valid)][valid].double().sum() for x in parts] for n, parts in self.metrics.items()}
        return {n: (float(total), float(count)) for n, (total, count) in rows.items()}

    def _next_value(self, d: dict[str, Tensor], running: Tensor) -> Tensor:
        """[T, B]: the next decision's value, the final state's where truncated, 0 where terminated.

        The critic is asked once, about the states that no later decision values: where copies stopped and where the
        `running` ones [B] stand.
        """
        c = self.c
        # A critic of units says with the first one what the state is worth.
        value = d["value"] if d["value"].ndim == 2 else d["value"][..., 0]
        out = torch.zeros_like(value)
        out[:-1] = value[1:]
        pieces = list(self.finals)
        if bool(running.any()):
            last = self._now()
            rows = running.nonzero().squeeze(-1)
            everyone = len(rows) == c.num_envs
            pieces.append((-1, rows, last if everyone else {k: v.index_select(0, rows) for k, v in last.items()}))
        if pieces:
            values = c.policy.value({k: torch.cat([obs[k] for _, _, obs in pieces]) for k in c.spec.observation})
            for (step, copies, _), x in zip(pieces, values.split([len(p[1]) for p in pieces]), strict=True):
                out[step, copies] = x
        return torch.where(d["terminated"] | ~d["valid"], torch.zeros_like(out), out)

    def _solved(self, d: dict[str, Tensor], t: int) -> Tensor:
        """[T, B], see `Rollout.solved`; begins with what earlier rollouts left behind."""
        once, held = self.success["once"][:t], self.c.episode_success.to(self.c.device)
        solved = once.to(torch.int64)
        for i in range(t):
            solved[i].masked_fill_(held, 2)
            held = (held | once[i]) & ~(d["terminated"][i] | d["truncated"][i])
        return solved

    def _relabels(self, d: dict[str, Tensor], solved: Tensor) -> tuple[Tensor, Obs]:
        """`Rollout.relabelled` and `Rollout.relabels`: what episodes achieved that were not solved."""
        age, made = torch.zeros_like(d["steps"]), self.c.episode_length.to(self.c.device)
        for i in range(len(age)):
            age[i] = made
            made = (made + d["steps"][i]).masked_fill(d["terminated"][i] | d["truncated"][i], 0)
        episodes, since = (torch.cat(x) for x in zip(*((e, s) for e, s, _ in self.deeds), strict=True))
        until = torch.zeros(self.episodes, dtype=torch.int64, device=self.c.device)
        until[episodes] = since
        until[d["episode"][(solved > 0) & d["valid"]]] = 0
        names = self.deeds[0][2]
        told = {k: torch.cat([x[k] for _, _, x in self.deeds]) for k in names}
        relabels = {k: x.new_zeros((self.episodes, *x.shape[1:])).index_copy(0, episodes, x) for k, x in told.items()}
        return d["valid"] & (age < until[d["episode"]]), relabels

    def _now(self) -> Obs:
        """What all copies see after the last decision."""
        parts = [p.obs for p in self.c.parts]
        return {k: torch.cat([o[k] for o in parts]) if len(parts) > 1 else parts[0][k] for k in self.c.spec.observation}

    def _final(self, d: dict[str, Tensor], t: int) -> tuple[Tensor, Obs]:
        """`Rollout.final` and `Rollout.final_obs`: the ends of episodes, then the copies that are on their way."""
        row = torch.full_like(d["episode"], -1)
        pieces: list[Obs] = []
        start = 0
        for step, copies, obs in self.finals:
            row[step, copies] = torch.arange(start, start + len(copies), device=row.device)
            pieces.append(obs)
            start += len(copies)
        going = (d["valid"][t - 1] & (row[t - 1] < 0)).nonzero().squeeze(-1)
        row[t - 1, going] = torch.arange(start, start + len(going), device=row.device)
        now = self._now()
        return row, {k: torch.cat([*(p[k] for p in pieces), now[k].index_select(0, going)]) for k in self.obs}

    def _finished(self, d: dict[str, Tensor], t: int, ended: Tensor) -> dict[str, Tensor]:
        """One row per valid episode of those that `ended` [T, B]; sums start with what earlier rollouts left behind."""
        c = self.c
        done, valid = ended.cpu(), d["valid"].cpu()
        reward, steps = d["reward"].double().cpu(), d["steps"].cpu()
        once = self.success["once"][:t].cpu() if self.success else None
        names = ("return", "length", "success_once", "success_at_end", "when", "copy")
        columns: dict[str, list[Tensor]] = {k: [] for k in names}
        total, length, success = c.episode_return, c.episode_length, c.episode_success
        for i in range(t):
            total += reward[i]
            length += steps[i]
            if once is not None:
                success |= once[i]
            if not bool(done[i].any()):
                continue
            who = (done[i] & valid[i]).nonzero().squeeze(-1)
            columns["return"].append(total[who])
            columns["length"].append(length[who])
            columns["success_once"].append(success[who])
            columns["when"].append(torch.full_like(who, i))
            columns["copy"].append(who)
            total[done[i]], length[done[i]], success[done[i]] = 0.0, 0, False
        out = {k: torch.cat(v) for k, v in columns.items() if v}
        if not out or not len(out["copy"]):
            return {}
        when, copy = out.pop("when"), out["copy"]
        if c.greedy is not None:
            sampled = ~c.greedy.cpu()[copy]
            when, copy, out = when[sampled], copy[sampled], {k: v[sampled] for k, v in out.items()}
        out["task"], out["seed"] = d["task"].cpu()[when, copy], d["seed"].cpu()[when, copy]
        if once is None:
            del out["success_once"]
        else:
            out["success_at_end"] = self.success["end"][:t].cpu()[when, copy]
        return out
