"""Rollouts against a copy-by-copy account of what must have happened, in an env that punishes every slip."""

from dataclasses import replace
from itertools import islice
from threading import Condition

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rl import registry
from embodied_rl.batch import flatten
from embodied_rl.collect import Collector
from embodied_rl.errors import CapabilityError
from embodied_rl.seeding import numpy_rng, start_seed
from embodied_rl.types import Advantage
from tests.kit import Scripted, mlp, toy

LONGEST = 6


def value_of(t, name):
    return 1000.0 * name + 7.0 * t + 1.0


def scripted(chunk, has_critic=True):
    """Action c of a chunk is the number of steps the episode will have made before it."""

    def action(obs):
        return (obs["t"][:, :1].unsqueeze(1) + torch.arange(chunk).view(1, -1, 1)).float()

    return Scripted(action, lambda obs: value_of(obs["t"][:, 0], obs["t"][:, 1]), chunk=chunk, num_units=chunk, has_critic=has_critic)


def collector(copies, *, chunk=1, parts=1, has_critic=True, **given):
    envs = [toy("lengths", copies // parts, longest=LONGEST) for _ in range(parts)]
    return Collector(envs, scripted(chunk, has_critic), **given)


class Account:
    """What one copy must do, decision by decision, worked out without tensors."""

    def __init__(self, copy, group, run_seed):
        self.copy, self.group, self.run_seed, self.index = copy, group, run_seed, -1
        self.restart()

    def restart(self):
        self.index += 1
        self.seed = start_seed(self.run_seed, "train", self.group, self.index)
        self.name, self.t, self.total, self.task = self.seed % 1000, 0, 0.0, (self.group + self.index) % 2
        self.length = int(numpy_rng(self.seed, "lengths").integers(1, LONGEST + 1))

    def decide(self, chunk):
        """One decision: (row of expected numbers, whether the episode ended)."""
        before = self.t
        self.t = min(self.length, self.t + chunk)
        reward = sum(range(before + 1, self.t + 1))
        self.total += reward
        over = self.t == self.length
        row = {
            "t": before, "name": self.name, "reward": reward, "steps": self.t - before, "terminated": over and self.length % 2 == 1,
            "truncated": over and self.length % 2 == 0, "value": value_of(before, self.name), "task": self.task, "key": (self.copy, self.index),
        }  # fmt: skip
        row["next_value"] = 0.0 if row["terminated"] else value_of(self.t, self.name)
        return row, over

    def ended(self):
        return {
            "return": self.total, "length": self.t, "success_once": self.t >= 2, "success_at_end": self.t == 2, "task": self.task,
            "seed": self.seed, "copy": self.copy,
        }  # fmt: skip


def check(rollout, t, b, row):
    got = {
        "t": rollout.obs["t"][t, b, 0], "name": rollout.obs["t"][t, b, 1], "reward": rollout.reward[t, b], "steps": rollout.steps[t, b],
        "terminated": rollout.terminated[t, b], "truncated": rollout.truncated[t, b], "value": rollout.value[t, b],
        "next_value": rollout.next_value[t, b], "task": rollout.task[t, b],
    }  # fmt: skip
    assert {k: x.item() for k, x in got.items()} == {k: row[k] for k in got}, (t, b)
    assert int(rollout.constants["name"][rollout.episode[t, b]]) == row["name"], (t, b)


def check_finished(rollout, expected):
    rows = zip(*(rollout.finished[k].tolist() for k in expected[0]), strict=True) if expected else []
    assert sorted(rows) == sorted(tuple(e.values()) for e in expected)
    assert rollout.finished or not expected


def check_common(rollout, keys):
    """Episode numbers name episodes; the env's metric is averaged over the executed steps; nothing of the waiting leaked."""
    names = {}
    for (t, b), key in keys.items():
        assert names.setdefault(int(rollout.episode[t, b]), key) == key
    assert len(set(names.values())) == len(names)
    total, count = rollout.metrics["paid"]
    assert (total, count) == (float(rollout.reward[rollout.valid].sum()), int(rollout.steps[rollout.valid].sum()))
    assert bool((rollout.mask == rollout.valid.unsqueeze(-1)).all())


cases = st.tuples(st.sampled_from([2, 4]), st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 2]), st.integers(0, 10**6))


@settings(max_examples=30)
@given(cases)
def test_a_stream_goes_on_across_rollouts_and_restarts_what_ended(case):
    copies, decisions, chunk, parts, seed = case
    c = collector(copies, chunk=chunk, parts=parts, decisions=decisions, run_seed=seed)
    accounts = [Account(b, b, seed) for b in range(copies)]
    for version in range(4):
        c.version = version
        rollout, finished, keys = c.collect(), [], {}
        assert rollout.reward.shape == (decisions, copies) and bool(rollout.valid.all()) and rollout.chunk == chunk
        assert bool((rollout.policy_version == version).all())
        for b, account in enumerate(accounts):
            for t in range(decisions):
                row, over = account.decide(chunk)
                check(rollout, t, b, row)
                keys[t, b] = row["key"]
                if over:
                    finished.append(account.ended())
                    account.restart()
        check_finished(rollout, finished)
        check_common(rollout, keys)
    c.close()


@settings(max_examples=30)
@given(cases, st.sampled_from([1, 2]))
def test_episodes_run_once_from_starts_that_a_group_shares_and_then_wait(case, group_size):
    copies, decisions, chunk, parts, seed = case
    c = collector(copies, chunk=chunk, parts=parts, decisions=decisions, run_seed=seed, mode="episodes", group_size=group_size)
    for index in range(3):
        rollout, finished, keys = c.collect(), [], {}
        made = rollout.reward.shape[0]
        for b in range(copies):
            account = Account(b, b // group_size, seed)
            for _ in range(index):
                account.restart()
            over = False
            for t in range(made):
                assert bool(rollout.valid[t, b]) == (not over)
                assert int(rollout.group[t, b]) == b // group_size
                if over:
                    assert not bool(rollout.done[t, b]) and float(rollout.reward[t, b]) == 0 and int(rollout.steps[t, b]) == 0
                    assert float(rollout.next_value[t, b]) == 0
                    continue
                row, over = account.decide(chunk)
                if t == decisions - 1 and not over:
                    # Cut by the collector, like by a time limit.
                    row["truncated"], over = True, True
                check(rollout, t, b, row)
                keys[t, b] = row["key"]
            assert over
            finished.append(account.ended())
        assert made == decisions or made == int(rollout.valid.sum(0).max())
        check_finished(rollout, finished)
        check_common(rollout, keys)
    c.close()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("mode", ["stream", "episodes"])
def test_the_actions_of_a_chunk_reach_the_env_in_order(mode, parts):
    c = collector(4, chunk=3, parts=parts, decisions=5, mode=mode)
    for _ in range(3):
        c.collect()
    for part in c.parts:
        calls = torch.stack(part.env.calls)
        action, before, length = calls.unbind(1)
        running = before < length
        assert int(running.sum()) > 10
        assert torch.equal(action[running], before[running])
    c.close()


def test_groups_share_starts_with_each_other_but_not_with_other_groups_or_rollouts():
    c = collector(6, decisions=8, mode="episodes", group_size=3)
    seen = []
    for _ in range(4):
        finished = c.collect().finished
        seeds = finished["seed"][finished["copy"].argsort()].view(2, 3)
        tasks = finished["task"][finished["copy"].argsort()].view(2, 3)
        assert bool((seeds == seeds[:, :1]).all()) and bool((tasks == tasks[:, :1]).all())
        seen += seeds[:, 0].tolist()
    assert len(set(seen)) == 8
    assert all(seed % 2 == 0 for seed in seen), "training starts are even; evaluation starts are odd"


class Counting:
    """A policy, and the number of rows of each of its calls."""

    def __init__(self, policy):
        self.policy, self.acted, self.valued = policy, [], []
        self.chunk, self.num_units, self.has_critic = policy.chunk, policy.num_units, policy.has_critic

    def act(self, obs, **given):
        self.acted.append(len(next(iter(obs.values()))))
        return self.policy.act(obs, **given)

    def value(self, obs):
        self.valued.append(len(next(iter(obs.values()))))
        return self.policy.value(obs)


@pytest.mark.parametrize("parts", [1, 2])
def test_finished_copies_leave_the_inference_batch(parts):
    # Lengths 5, 1, 2, 3 (odd: terminated, even: truncated) and at most 4 decisions: copy 0 is cut while running.
    lengths = [(5, 1, 2, 3)] if parts == 1 else [(5, 1), (2, 3)]
    policy = Counting(scripted(1))
    c = Collector([toy("lengths", 4 // parts, lengths=part) for part in lengths], policy, decisions=4, mode="episodes")
    rollout = c.collect()
    assert rollout.valid.sum(0).tolist() == [4, 1, 2, 3]
    assert policy.acted == ([4, 3, 2, 1] if parts == 1 else [2, 2, 1, 2, 1, 1, 1])
    assert sum(policy.acted) == int(rollout.valid.sum()) == 10, "16 without leaving"
    assert policy.valued == [2], "the copy that was truncated and the one that was cut, in one call"
    assert rollout.next_value[1, 2] == value_of(2, int(rollout.obs["t"][1, 2, 1]))
    assert rollout.next_value[3, 0] == value_of(4, int(rollout.obs["t"][3, 0, 1]))
    c.close()


def test_a_stream_asks_the_critic_only_for_states_that_no_later_decision_values():
    # Lengths 2 (truncated) and 3 (terminated), 3 decisions: at the end copy 0 is running and copy 1 has just begun anew.
    policy = Counting(scripted(1))
    Collector([toy("lengths", 2, lengths=(2, 3))], policy, decisions=3).collect()
    assert policy.acted == [2, 2, 2] and policy.valued == [2]


@pytest.mark.parametrize("name", ["mlp", "tiny_vla_tokens", "tiny_vla_flow"])
def test_decisions_of_a_shrinking_batch_have_the_log_probabilities_that_training_computes(name):
    env = registry.load("env", "target")
    env = env.build(env.Config(tolerance=1.0), num_envs=40, device=torch.device("cpu"), split="train", seed=0)
    if name == "mlp":
        seen = {k: v for k, v in env.spec.observation.items() if k != "picture"}
        policy = mlp(replace(env.spec, observation=seen), hidden=(16,), chunk=2, shake=0.1)
    else:
        module = registry.load("policy", name)
        torch.manual_seed(0)
        policy = module.build(module.Config(width=16, heads=2, layers=1, channels=8, glances=2, chunk=2), env=env.spec, device=env.device)
    policy = Counting(policy)
    rollout = Collector([env], policy, decisions=8, mode="episodes", generator=torch.Generator().manual_seed(0)).collect()
    assert len(set(policy.acted)) > 3 and sum(policy.acted) == int(rollout.valid.sum())
    flat = flatten(rollout, Advantage(torch.zeros_like(rollout.reward)))
    again = policy.policy.evaluate(flat.full_obs(), flat.rows["units"]).logp.detach()
    assert torch.equal(again, flat.rows["logp"])


def test_without_a_critic_no_value_is_made_up():
    rollout = collector(2, has_critic=False, decisions=3).collect()
    assert rollout.value is None and rollout.next_value is None


def test_a_collector_is_an_endless_iterator():
    assert [r.reward.shape for r in islice(collector(2, decisions=3), 3)] == [(3, 2)] * 3


def test_groups_need_an_env_that_can_be_seeded():
    with pytest.raises(CapabilityError, match="group_size 2 needs an env that starts the same episode again"):
        Collector([toy("forgetful", 4)], scripted(1), decisions=3, mode="episodes", group_size=2)


def test_an_env_without_seeds_and_state_still_streams():
    policy = Scripted(lambda obs: obs["noise"].unsqueeze(1), lambda obs: obs["noise"][:, 0])
    c = Collector([toy("forgetful", 8, seed=3)], policy, decisions=50)
    rollout = c.collect()
    ended = rollout.finished["length"]
    # Lengths are geometric with mean 4; about 100 of them end in 400 steps.
    assert 60 < len(ended) < 140 and 2.5 < float(ended.double().mean()) < 6
    running = ~rollout.terminated[:-1]
    assert torch.equal(rollout.next_value[:-1][running], rollout.value[1:][running])


def test_an_env_with_threads_of_its_own_gives_the_same_rollouts():
    plain, threaded = (collector(4, parts=2, decisions=4, run_seed=5) for _ in range(2))
    sent = []
    for part in threaded.parts:
        env, box = part.env, []
        env.send = lambda action, active, box=box: (box.append((action, active)), sent.append(1))
        env.recv = lambda env=env, box=box: env.step(*box.pop())
    for _ in range(4):
        a, b = plain.collect(), threaded.collect()
        for name in ("reward", "steps", "terminated", "truncated", "value", "next_value", "episode"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert len(sent) == 4 * 4 * 2, "every step of every part went through send"
    plain.close()
    threaded.close()


@pytest.mark.parametrize("parts", [2, 4])
def test_a_part_simulates_until_its_next_decision_while_the_policy_decides_for_all_others(parts):
    """Every step returns only after the last decision that can be made without it: without overlap nobody would get on."""
    decisions, rollouts, changed, acted, late = 3, 2, Condition(), [], []

    def overlapped(env, part):
        inner, made = env.step, []

        def step(action, active):
            rollout, t = divmod(len(made), decisions)
            made.append(t)
            wanted = rollout * decisions * parts + min((t + 1) * parts + part, decisions * parts)
            with changed:
                if not late and not changed.wait_for(lambda: len(acted) >= wanted, timeout=30):
                    late.append((part, rollout, t))
            return inner(action, active)

        env.step = step

    c = collector(4, parts=parts, decisions=decisions, has_critic=False)
    inner = c.policy.act

    def act(obs, **given):
        with changed:
            acted.append(len(obs["t"]))
            changed.notify_all()
        return inner(obs, **given)

    c.policy.act = act
    for i, part in enumerate(c.parts):
        overlapped(part.env, i)
    for _ in range(rollouts):
        c.collect()
    c.close()
    assert not late and acted == [4 // parts] * (rollouts * decisions * parts)


def test_a_copy_stops_in_the_middle_of_a_chunk():
    # Chunk 3, lengths 2 (truncated) and 7: copy 0 executes 2 steps, 1 + 2, and is valued where it stopped.
    c = Collector([toy("lengths", 2, lengths=(2, 7))], scripted(3), decisions=2)
    rollout = c.collect()
    name, other = (int(rollout.constants["name"][rollout.episode[0, b]]) for b in (0, 1))
    assert rollout.reward[0].tolist() == [3.0, 6.0] and rollout.steps[0].tolist() == [2, 3]
    assert rollout.truncated[0].tolist() == [True, False] and not bool(rollout.terminated.any())
    assert rollout.next_value[0].tolist() == [value_of(2, name), value_of(3, other)]
    assert rollout.obs["t"][1, :, 0].tolist() == [0.0, 3.0]


def test_the_last_observation_of_the_rollout_is_valued_and_so_is_every_true_last_state():
    # Lengths 2 (truncated) and 3 (terminated), 3 decisions: copy 0 is cut at t = 2 and then runs one step more.
    policy = scripted(1)
    c = Collector([toy("lengths", 2, lengths=(2, 3))], policy, decisions=3)
    rollout = c.collect()
    first, second = (start_seed(0, "train", 0, i) % 1000 for i in (0, 1))
    other = start_seed(0, "train", 1, 0) % 1000
    assert rollout.next_value[:, 0].tolist() == [value_of(1, first), value_of(2, first), value_of(1, second)]
    assert rollout.next_value[:, 1].tolist() == [value_of(1, other), value_of(2, other), 0.0]
    assert rollout.value[2, 0] == value_of(0, second)
