"""The toy target: what is right, what solves it, when it ends, and that its packaged recipe learns it."""

import pytest
import torch

from embodied_rl import registry
from embodied_rl.config import load_recipe
from embodied_rl.train import run
from tests.kit import CPU

TARGET = registry.load("env", "target")


def begin(copies=1, **settings):
    """An env at its first step, and the targets [copies, 2]."""
    env = TARGET.build(TARGET.Config(**settings), num_envs=copies, device=CPU, split="train", seed=0)
    return env, begin_again(env, range(copies))["state"]


def begin_again(env, seeds, mask=None):
    n = env.spec.num_envs
    mask = torch.ones(n, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return env.reset(mask, torch.tensor([2 * s for s in seeds]), torch.zeros(n, dtype=torch.int64))


def inwards(target, *offset):
    """An action so far from the target, to the side on which nothing is cut."""
    return target - target.sign() * torch.tensor(offset)


def solves(env, *actions):
    """Whether each step of copy 0 solves the task."""
    steps = [env.step(action) for action in actions]
    for step in steps:
        assert torch.equal(step.terminated, step.success) and torch.equal(step.reward, step.success.float())
    return [bool(step.success[0]) for step in steps]


@pytest.mark.parametrize(
    ("offset", "right"),
    [((0.0, 0.0), True), ((0.349, 0.0), True), ((0.0, 0.351), False), ((0.24, 0.24), True), ((0.26, 0.26), False)],
)
def test_two_steps_within_0_35_of_the_target_solve_it(offset, right):
    env, target = begin()
    action = inwards(target, *offset)
    assert solves(env, action, action) == [False, right]


def test_another_tolerance_is_another_radius():
    env, target = begin(tolerance=0.5)
    near, far = inwards(target, 0.49, 0.0), inwards(target, 0.51, 0.0)
    assert solves(env, near, far, near, near) == [False, False, False, True]


def test_an_action_beyond_the_border_counts_as_one_on_it():
    env, _ = begin()
    env.set_state(env.get_state() | {"target": torch.tensor([[0.9, 0.0]])})
    action = torch.tensor([[7.0, 0.0]])
    assert solves(env, action, action) == [False, True]


def test_a_miss_between_two_right_steps_begins_the_count_anew():
    env, target = begin()
    miss = inwards(target, 0.4, 0.0)
    assert solves(env, target, miss, target, target) == [False, False, False, True]


def test_a_reset_begins_the_count_anew_in_its_copies_alone():
    env, target = begin(2)
    env.step(target)
    target = begin_again(env, (5, 6), mask=[True, False])["state"]
    assert env.step(target).success.tolist() == [False, True]
    assert env.step(target).success[0]


def test_an_episode_is_cut_after_24_steps_unless_the_last_one_solves_it():
    env, target = begin(2)
    miss = inwards(target, 0.4, 0.4)
    for _ in range(22):
        assert not env.step(miss).truncated.any()
    first = torch.stack([target[0], miss[1]])
    assert not env.step(first).truncated.any()
    last = env.step(first)
    assert (last.truncated.tolist(), last.terminated.tolist()) == ([False, True], [True, False])
    assert last.reward.tolist() == [1.0, 0.0]


def test_the_picture_is_noise_of_16_x_16_pixels_and_the_state_the_target():
    env, target = begin(3)
    obs = begin_again(env, (0, 0, 4))
    assert env.spec.observation["picture"].shape == obs["picture"].shape[1:] == (16, 16, 3)
    assert obs["picture"].dtype == torch.uint8 and obs["picture"].float().std() > 60
    assert torch.equal(obs["picture"][0], obs["picture"][1]) and not torch.equal(obs["picture"][0], obs["picture"][2])
    assert torch.equal(obs["state"][:2], target[[0, 0]]) and not torch.equal(obs["state"][2], target[2])
    assert env.step(target).obs["picture"].equal(obs["picture"]), "for the whole episode"


@pytest.fixture
def threads():
    """The recipe computes with one thread; other tests need not."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow  # 40 s
def test_the_packaged_recipe_learns_it_from_sparse_success(threads, tmp_path):
    """Greedy, on 300 starts that training never sees."""
    changes = ["seed=0", "device=cpu", "train.max_seconds=null", "log.tensorboard=false", "log.progress=false", f"log.folder={tmp_path}"]
    resolved = load_recipe("target_grpo", changes)
    result = run(resolved.recipe).result
    assert resolved.recipe.threads == 1 and result.greedy
    assert result.episodes == 300 and result.score >= 0.9
