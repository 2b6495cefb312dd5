"""A limited number of starts: passes over them, success rates of each, copies by success rate, and what is refused."""

import pytest
import torch

from embodied_rl.budget import Budget
from embodied_rl.collect import Collector
from embodied_rl.curriculum import Curriculum, StartPool
from embodied_rl.errors import CapabilityError
from embodied_rl.measure import Clock
from embodied_rl.recipe import Collect
from embodied_rl.session import Session
from tests.kit import toy
from tests.resume import lab
from tests.toys.table import Config, Table
from tests.unit.test_curriculum import env


def pool(starts=6, tasks=2, **given):
    return StartPool(Curriculum(starts=starts, **given), env(tasks), run_seed=3)


def collector(copies=32, parts=1, **given):
    torch.manual_seed(0)
    envs = [toy("words", copies // parts) for _ in range(parts)]
    return Collector(envs, Table(Config(spread=1.0), envs[0].spec), decisions=1, mode="episodes", group_size=4, **given)


def begin(p, groups):
    n = torch.arange(groups)
    return p.begin(n, 0 * n)


def test_every_start_comes_once_in_each_pass_and_in_another_order():
    p = pool()
    first, second = (torch.cat([begin(p, 2)[0] for _ in range(3)]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(p.seed.tolist()) and len(set(first)) == 6 and first != second
    assert not any(s & 1 for s in first), "training starts"
    seeds, tasks = begin(p, 6)
    assert dict(zip(p.seed.tolist(), p.task.tolist(), strict=True)) == dict(zip(seeds.tolist(), tasks.tolist(), strict=True))
    assert p.task.tolist() == [0, 1, 0, 1, 0, 1]
    assert torch.equal(pool().seed, p.seed), "they depend on the run seed alone"
    shared, _ = p.begin(torch.tensor([4, 4, 9]), torch.zeros(3, dtype=torch.int64))
    assert shared[0] == shared[1] != shared[2], "a group shares its start"


def test_success_rates_are_those_of_starts():
    p = pool(window=2)
    # 4 of 4 in a window of 2: 1/16 x 1/2 + 15/16 = 31/32, and 1 failure: half of the way from 1/2 to 0.
    p.observe({"seed": p.seed[torch.tensor([5, 5, 1, 5, 5])], "task": torch.zeros(5, dtype=torch.int64), "success_once": torch.tensor([True, True, False, True, True])})
    assert p.success.tolist() == [0.5, 0.25, 0.5, 0.5, 0.5, 31 / 32]
    assert p.rate(p.seed[[5, 1]]).tolist() == [31 / 32, 0.25]
    assert p.metrics().reduce() == {"rollout/start_success_mean": pytest.approx((2.25 + 31 / 32) / 6)}


def test_a_curriculum_plays_what_is_half_solved_and_no_start_twice_at_once():
    p = pool(starts=8, kind="success", floor=1e-4)
    p.success[:] = torch.tensor([0.5, 0.5, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    drawn = [begin(p, 2)[0] for _ in range(50)]
    assert all(a != b for a, b in drawn)
    assert float(torch.isin(torch.cat(drawn), p.seed[:2]).double().mean()) > 0.98


@pytest.mark.parametrize("parts", [1, 2])
def test_copies_follow_the_success_rates(parts):
    c = collector(parts=parts, curriculum=Curriculum(starts=8, window=4), budget=Budget(low=2, high=12))
    assert torch.bincount(c.collect().group[0]).tolist() == [4] * 8, "nothing is known yet"
    c.sampler.success[:] = 1.0
    c.sampler.success[3] = 0.3
    rollout = c.collect()
    size = torch.bincount(rollout.group[0])
    seeds = rollout.finished["seed"][rollout.finished["copy"].argsort()]
    assert int(size.sum()) == 32 and int(size.min()) == 2 and int(size.max()) == 12
    assert int((seeds == c.sampler.seed[3]).sum()) == 12
    for group in range(8):
        assert len(seeds[rollout.group[0] == group].unique()) == 1
    assert c.greedy is None
    c.greedy_baseline = True
    assert c.greedy.nonzero().flatten().tolist() == [0, *size.cumsum(0)[:-1].tolist()]
    c.close()


def test_the_budget_is_logged_and_every_group_is_whole():
    s = Session.build(lab.recipe("budget"))
    metrics = s.iterate(Clock())
    assert metrics.value("rollout/episodes") == 16 and metrics.reduce()["rollout/group_size_max"] >= 4
    s.close()


def test_what_cannot_act_is_refused():
    with pytest.raises(ValueError, match=r"curriculum.starts \(3\) is less than the 4 starts of one rollout"):
        Collect(copies=16, mode="episodes", group_size=4, curriculum=Curriculum(starts=3))
    with pytest.raises(ValueError, match="set curriculum.starts, for example to 1000"):
        Collect(copies=16, mode="episodes", group_size=4, budget=Budget())
    with pytest.raises(ValueError, match=r"group_size \(4\) is the mean of the copies per start"):
        Collect(copies=16, mode="episodes", group_size=4, curriculum=Curriculum(starts=8), budget=Budget(low=5))
    with pytest.raises(ValueError, match=r"low \(5\) must not be above high \(4\)"):
        Budget(low=5, high=4)
    with pytest.raises(ValueError, match=r"floor \(0.2\) does nothing with kind \(none\)"):
        Curriculum(starts=4, floor=0.2)
    with pytest.raises(CapabilityError, match="the env does not tell success: set collect.budget: null"):
        c = collector()
        c.parts[0].env.spec.__dict__["has_success"] = False
        Collector([c.parts[0].env], c.policy, decisions=1, mode="episodes", group_size=4, curriculum=Curriculum(starts=8), budget=Budget())
