"""The episodes that a reward model is shown, in an env that punishes every slip, and the sums that shaping leaves behind."""

import itertools

import pytest
import torch

from embodied_rl.collect import Collector
from embodied_rl.credit import Credit
from embodied_rl.rewards import RewardConfig, RewardModel
from embodied_rl.shaping import Shaping, episodes
from tests.kit import Scripted, toy
from tests.properties.test_collector import LONGEST, scripted

CASES = list(itertools.product((1, 2, 3, 4), (1, 2), (False, True), ("stream", "episodes")))
"""Chunk, parts, whether there is a critic, mode."""


def collected(case, rollouts=3):
    chunk, parts, has_critic, mode = case
    envs = [toy("lengths", 6 // parts, longest=LONGEST) for _ in range(parts)]
    decisions = 1 + (3 * chunk + parts) % 7
    collector = Collector(
        envs, scripted(chunk, has_critic), decisions=decisions, mode=mode, run_seed=chunk, keep_final_obs=True
    )
    out = [collector.collect() for _ in range(rollouts)]
    collector.close()
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_episode_shows_every_state_once_and_the_last_one_is_where_it_really_ended(case):
    for rollout in collected(case):
        seen = torch.zeros_like(rollout.valid)
        for e in episodes(rollout):
            rows = slice(e.first, e.first + len(e))
            assert not bool(seen[rows, e.copy].any())
            seen[rows, e.copy] = True
            steps = rollout.steps[rows, e.copy]
            t, names = e.obs["t"][:, 0], e.obs["t"][:, 1]
            torch.testing.assert_close(t, t[0] + torch.cat([torch.zeros(1), steps.cumsum(0).float()]), rtol=0, atol=0)
            assert names.unique().numel() == 1 and bool((e.obs["name"][:, 0] == names).all())
            assert e.obs["name"].shape == (len(e) + 1, 1)
            # Success holds exactly at t = 2.
            assert e.success.tolist() == [bool(b >= 2) for b in t[1:]]
            last = rollout.terminated[rows, e.copy], rollout.truncated[rows, e.copy]
            assert (e.terminated, e.truncated) == (bool(last[0][-1]), bool(last[1][-1]))
            assert not bool((last[0] | last[1])[:-1].any())
            assert e.failed == ((e.terminated or e.truncated) and not bool(e.success.any()))
            assert (e.task, e.group) == (int(rollout.task[e.first, e.copy]), int(rollout.group[e.first, e.copy]))
        assert torch.equal(seen, rollout.valid)


def height(t, name):
    """A potential without any order in it, in [0, 1]."""
    return torch.frac(0.37 * t * t + 0.61 * name + 0.1 * t * name).abs().double()


class Hilly(RewardModel):
    def judge(self, episodes):
        return [height(e.obs["t"][:, 0], e.obs["t"][:, 1]) for e in episodes]


@pytest.mark.parametrize("gamma", [0.9, 1.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_shaping_of_an_episode_adds_up_to_the_difference_of_its_ends(case, gamma, coef=3.0):
    """sum_i gamma^(steps before i) F_i = gamma^(all steps) Phi(end) - Phi(start), with Phi(end) = 0 where nothing is counted after it."""
    credit = Credit(gamma=gamma) if case[2] else Credit(gamma=gamma, returns="return_to_go", baseline="none")
    shaping = Shaping(Hilly(), RewardConfig(type="hilly", coef=coef), credit)
    for plain in collected(case):
        plain.reward = plain.reward.double()
        shaped, metrics = shaping(plain)
        extra = shaped.reward - plain.reward
        assert bool((extra[~plain.valid] == 0).all())
        for e in episodes(plain):
            rows = slice(e.first, e.first + len(e))
            phi = height(e.obs["t"][:, 0], e.obs["t"][:, 1])
            before = e.obs["t"][:, 0].double() - e.obs["t"][0, 0]
            over = e.terminated or (e.truncated and not case[2])
            end = 0.0 if over else gamma ** before[-1] * phi[-1]
            total = (gamma ** before[:-1] * extra[rows, e.copy]).sum()
            torch.testing.assert_close(total, coef * (end - phi[0]), rtol=0, atol=1e-6)
        total, count = metrics["rollout/progress_reward_mean"]
        assert count == int(plain.valid.sum()) and total == pytest.approx(float(extra.sum()), abs=1e-6)
        assert metrics["rollout/progress_judged_rate"][0] == len(episodes(plain))


def test_the_outcome_is_paid_once_to_failures_where_they_end():
    credit = Credit(gamma=0.9, returns="trajectory", baseline="none")
    shaping = Shaping(Hilly(), RewardConfig(type="hilly", use="outcome", coef=0.5), credit)
    kinds = set()
    for plain in collected((2, 1, False, "episodes"), rollouts=4):
        shaped, metrics = shaping(plain)
        extra = shaped.reward - plain.reward
        ends = []
        for e in episodes(plain):
            rows = slice(e.first, e.first + len(e))
            last = float(height(e.obs["t"][-1, 0], e.obs["t"][-1, 1]))
            expected = [0.0] * (len(e) - 1) + [0.0 if e.succeeded else 0.5 * last]
            assert extra[rows, e.copy].tolist() == pytest.approx(expected, abs=1e-5)
            kinds.add(e.succeeded)
            ends += [] if e.succeeded else [last]
        total, count = metrics["rollout/progress_at_failure_mean"]
        assert count == len(ends) and total == pytest.approx(sum(ends))
    assert kinds == {True, False}


def test_what_cannot_be_judged_is_not_paid_and_not_counted_as_0():
    class Silent(RewardModel):
        def judge(self, episodes):
            return [None if e.copy % 2 else torch.ones(len(e) + 1) for e in episodes]

    plain = collected((1, 1, True, "stream"), rollouts=1)[0]
    shaped, metrics = Shaping(Silent(), RewardConfig(type="silent"), Credit(gamma=0.5))(plain)
    assert torch.equal(shaped.reward[:, 1::2], plain.reward[:, 1::2])
    assert not torch.equal(shaped.reward[:, ::2], plain.reward[:, ::2])
    judged, parts = metrics["rollout/progress_judged_rate"]
    assert (judged, parts) == (sum(e.copy % 2 == 0 for e in episodes(plain)), len(episodes(plain)))
    total, count = metrics["rollout/progress_at_failure_mean"]
    assert count == sum(e.failed and e.copy % 2 == 0 for e in episodes(plain)) and total == count


def test_pictures_drawn_on_demand_end_where_those_drawn_always_do():
    def seen(on_demand):
        env = toy("shown", 4, on_demand=on_demand, max_steps=5)
        policy = Scripted(lambda obs: obs["goals"][:, :1, :2].expand(-1, 2, -1) - obs["position"].unsqueeze(1), lambda obs: obs["position"][:, 0], chunk=2, num_units=4)
        rollout = Collector([env], policy, decisions=7, keep_final_obs=True).collect()
        return episodes(rollout)

    pairs = list(zip(seen(True), seen(False), strict=True))
    assert len(pairs) > 4
    for a, b in pairs:
        assert a.obs.keys() == b.obs.keys() == {"position", "goals", "word", "camera"}
        assert all(torch.equal(a.obs[n], b.obs[n]) for n in a.obs)


def test_nothing_is_kept_when_nobody_asks():
    envs = [toy("lengths", 4, longest=LONGEST)]
    rollout = Collector(envs, scripted(2), decisions=5).collect()
    assert rollout.final is None and rollout.final_obs == {}
