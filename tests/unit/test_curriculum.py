"""Tasks by success rate: hand-worked rates and probabilities, frequencies, groups, and what a saved run remembers."""

import copy

import pytest
import torch
from scipy.stats import chisquare

from embodied_rl.collect import Collector
from embodied_rl.curriculum import Curriculum, TaskSampler
from embodied_rl.errors import CapabilityError
from embodied_rl.seeding import start_seeds
from embodied_rl.types import ActionSpec, EnvSpec, TensorSpec
from tests.kit import Scripted, toy


def env(tasks=3, has_success=True):
    names = tuple("abcdefg"[:tasks])
    return EnvSpec({"x": TensorSpec((1,))}, ActionSpec("continuous", 1), 4, None, names, seedable=True, has_state=True, has_success=has_success)


def sampler(tasks=3, **config):
    return TaskSampler(Curriculum(kind="success", **config), env(tasks))


def ended(*pairs):
    """Finished episodes (task, success)."""
    task, success = zip(*pairs, strict=True)
    return {"task": torch.tensor(task), "success_once": torch.tensor(success)}


def test_success_rates_and_probabilities_by_hand():
    s = sampler(window=2, floor=0.05)
    assert s.probabilities().tolist() == pytest.approx([1 / 3] * 3), "nothing is known yet"
    # Task 0: 4 of 4, 1/16 of the half is left: 1/32 + 15/16 = 31/32. Task 1: 1 of 2: 1/4 x 1/2 + 3/4 x 1/2 = 1/2.
    s.observe(ended((0, True), (0, True), (1, False), (0, True), (1, True), (0, True)))
    assert s.success.tolist() == pytest.approx([31 / 32, 1 / 2, 1 / 2])
    # p (1 - p) + 0.05: 31/1024 + 0.05 = 0.0802734375, and 0.3 twice.
    assert s.probabilities().tolist() == pytest.approx([0.0802734375 / 0.6802734375, 0.3 / 0.6802734375, 0.3 / 0.6802734375])
    assert s.metrics().reduce() == {f"rollout/task_probability/{t}": pytest.approx(p) for t, p in zip("abc", s.probabilities().tolist(), strict=True)}
    # One failure of task 2 in a window of 2: half of the way from 1/2 to 0.
    s.observe(ended((2, False)))
    assert s.success.tolist() == pytest.approx([31 / 32, 1 / 2, 1 / 4])


def test_the_order_of_episodes_and_empty_rollouts_change_nothing():
    a, b = sampler(window=7), sampler(window=7)
    episodes = [(0, True), (1, False), (0, False), (2, True), (0, True)]
    a.observe(ended(*episodes)), b.observe(ended(*reversed(episodes)))
    assert torch.equal(a.success, b.success)
    before = a.success.clone()
    a.observe({})
    assert torch.equal(a.success, before)


def test_tasks_are_drawn_with_their_probabilities_by_the_seed_alone():
    s = sampler()
    s.success = torch.tensor([0.99, 0.5, 0.1], dtype=torch.float64)
    n = 4000
    index = torch.arange(n)
    seeds = start_seeds(0, "train", 0 * index, index)
    task = s.choose(0 * index, index, seeds)
    counts = torch.bincount(task, minlength=3)
    assert chisquare(counts.numpy(), (n * s.probabilities()).numpy()).pvalue > 1e-3
    assert float(s.probabilities().min()) > 0.1, "none is given up"
    # With other success rates a few starts change their task, and nothing else is drawn.
    s.success[1] = 0.6
    moved = s.choose(0 * index, index, seeds) != task
    assert 0 < int(moved.sum()) < 0.04 * n
    assert torch.equal(s.choose(0 * index, index, seeds.flip(0)), s.choose(0 * index, index, seeds).flip(0)), "only the seed counts"


def test_without_a_curriculum_tasks_come_in_turn():
    s = TaskSampler(Curriculum(), env())
    s.observe(ended((0, True)))
    assert s.choose(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 5]), torch.tensor([2, 4, 6])).tolist() == [0, 1, 1]
    assert s.metrics().reduce() == {}


def collector(mode="episodes", group_size=1, **given):
    """The point; its policy walks to the first goal, so that the first task is soon solved and the other is not."""
    def action(obs):
        return ((obs["goals"][:, 0, :2] - obs["position"]) / 0.3).clamp(-1, 1).unsqueeze(1)

    policy = Scripted(action, lambda obs: obs["position"].sum(-1), num_units=2)
    return Collector(
        [toy("point", 16, max_steps=12, end_on_success=True)], policy, decisions=14, mode=mode, group_size=group_size, **given
    )


@pytest.mark.parametrize("mode", ["episodes", "stream"])
def test_a_solved_task_is_played_less_and_the_sampler_sees_every_episode_once(mode):
    c = collector(mode, curriculum=Curriculum(kind="success", window=10))
    by_hand, counts = sampler(2, window=10), torch.zeros(2, 2)
    for i in range(16):
        rollout = c.collect()
        by_hand.observe(rollout.finished)
        counts[i // 8] += torch.bincount(rollout.finished["task"], minlength=2)
    assert torch.equal(c.sampler.success, by_hand.success)
    rates = c.sampler.success.tolist()
    assert rates[0] > 0.99 and rates[1] < 0.4
    share = counts[:, 0] / counts.sum(1)
    assert float(share[1]) < 0.4


def test_a_group_shares_its_task():
    c = collector(group_size=4, curriculum=Curriculum(kind="success", window=5))
    seen = set()
    for _ in range(6):
        task = c.collect().task[0].view(4, 4)
        assert bool((task == task[:, :1]).all())
        seen |= {tuple(task[:, 0].tolist())}
    assert len(seen) > 2, "not the same tasks in every rollout"


@pytest.mark.parametrize("mode", ["episodes", "stream"])
def test_a_saved_curriculum_goes_on_bit_for_bit(mode):
    whole, other = (collector(mode, curriculum=Curriculum(kind="success", window=5), run_seed=3) for _ in range(2))
    for _ in range(3):
        whole.collect()
    other.collect()
    assert other.load_state_dict(copy.deepcopy(whole.state_dict())) is True
    for _ in range(4):
        a, b = whole.collect(), other.collect()
        assert torch.equal(a.task, b.task) and torch.equal(a.reward, b.reward)
        assert torch.equal(whole.sampler.success, other.sampler.success)
    assert float((whole.sampler.success - 0.5).abs().max()) > 0.1


def test_a_curriculum_that_cannot_act_is_refused():
    with pytest.raises(CapabilityError, match="chooses among tasks, and the env has only 'a'"):
        sampler(1)
    with pytest.raises(CapabilityError, match="goes by success rates, and the env does not tell success"):
        TaskSampler(Curriculum(kind="success"), env(has_success=False))
    with pytest.raises(ValueError, match=r"window \(5\) does nothing with kind \(none\)"):
        Curriculum(window=5)
