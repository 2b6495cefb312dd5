"""The tabletop env keeps the contract of `embodied_rl.types.Env`."""

import pytest
import torch

from embodied_rl.envs.tabletop import Config, build
from embodied_rl.errors import CheckpointError, NotFoundError, ShapeError
from embodied_rl.seeding import start_seeds

ALL = ["reach", "push", "lift", "place", "stack", "open", "close"]


def make(copies=4, **settings):
    config = Config(threads=2, **settings)
    return build(config, num_envs=copies, device=torch.device("cpu"), split="train", seed=0)


def seeds_of(copies, first=0, split="train"):
    index = torch.arange(copies)
    return start_seeds(7, split, index, torch.full((copies,), first))


def begin(env, seeds=None, tasks=None, mask=None):
    copies = env.spec.num_envs
    return env.reset(
        torch.ones(copies, dtype=torch.bool) if mask is None else mask,
        seeds_of(copies) if seeds is None else seeds,
        torch.arange(copies) % len(env.spec.tasks) if tasks is None else tasks,
    )


def actions(env, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(env.spec.num_envs, 7, generator=generator) for _ in range(steps)]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


@pytest.fixture(scope="module")
def env():
    env = make(copies=7, tasks=ALL)
    yield env
    env.close()


def test_observations_have_the_shapes_types_and_ranges_of_the_spec(env):
    obs = begin(env)
    for action in actions(env, 10):
        assert obs.keys() == env.spec.observation.keys()
        for name, spec in env.spec.observation.items():
            value = obs[name]
            assert tuple(value.shape) == (7, *spec.shape) and value.dtype == spec.dtype
            assert bool(torch.isfinite(value.float()).all())
            assert spec.low is None or int(value.min()) >= spec.low
            assert spec.high is None or int(value.max()) <= spec.high
        obs = env.step(action).obs


def test_observed_numbers_are_of_order_one(env):
    obs = begin(env)
    for action in actions(env, 30):
        obs = env.step(action).obs
        for name in ("proprio", "objects", "goal"):
            assert float(obs[name].abs().max()) < 10 and float(obs[name].abs().mean()) < 1.5


def test_the_same_seed_and_task_give_the_same_start_and_the_same_future(env):
    other = make(copies=7, tasks=ALL)
    # The other env has been used before, has its rows in another order and holds other episodes.
    begin(other, seeds_of(7, 5))
    other.step(torch.ones(7, 7))
    back = torch.arange(6, -1, -1)
    first, second = begin(env), begin(other, seeds_of(7)[back], (torch.arange(7) % 7)[back])
    assert same(first, {name: value[back] for name, value in second.items()})
    assert env.instructions() == other.instructions()[::-1]
    for action in actions(env, 5):
        one, two = env.step(action), other.step(action[back])
        assert same(one.obs, {name: value[back] for name, value in two.obs.items()})
        assert torch.equal(one.reward, two.reward[back])
    other.close()


def test_different_seeds_differ(env):
    one = begin(env, seeds_of(7, 0), torch.zeros(7, dtype=torch.int64))
    two = begin(env, seeds_of(7, 1), torch.zeros(7, dtype=torch.int64))
    for name in ("proprio", "objects"):
        assert bool((one[name] != two[name]).flatten(1).any(dim=1).all())
        assert len({tuple(row.flatten().tolist()) for row in one[name]}) == 7


def test_evaluation_in_sentences_of_training_shows_the_same_layouts(env):
    other = make(copies=7, tasks=ALL, evaluation_sentences="training")
    seeds = seeds_of(7, split="eval")
    heldout, training = begin(env, seeds), begin(other, seeds)
    assert all(torch.equal(heldout[name], training[name]) for name in ("proprio", "objects", "goal"))
    assert bool((heldout["instruction"] != training["instruction"]).any(dim=1).all())
    assert not set(env.instructions()) & set(other.instructions())
    other.close()


def test_a_group_of_copies_with_one_seed_starts_identically_with_one_instruction():
    env = make(copies=6)
    seeds = seeds_of(2).repeat_interleave(3)
    obs = begin(env, seeds, torch.tensor([0, 0, 0, 2, 2, 2]))
    for value in obs.values():
        assert torch.equal(value[0], value[1]) and torch.equal(value[0], value[2]) and torch.equal(value[3], value[5])
    assert len(set(env.instructions()[:3])) == len(set(env.instructions()[3:])) == 1
    env.close()


def test_a_partial_reset_leaves_the_other_copies_untouched(env):
    begin(env)
    for action in actions(env, 3):
        before = env.step(action).obs
    mask = torch.tensor([False, True, False, False, True, False, False])
    after = begin(env, seeds_of(7, 9), mask=mask)
    for name, value in after.items():
        assert torch.equal(value[~mask], before[name][~mask])
        assert mask.logical_not().any() and not torch.equal(value[mask], before[name][mask])
    steps = [bool(x) for x in env.step(torch.zeros(7, 7)).truncated]
    assert not any(steps)


def test_an_observation_kept_by_the_caller_is_not_overwritten(env):
    kept = begin(env)
    copy = {name: value.clone() for name, value in kept.items()}
    env.step(actions(env, 1)[0])
    begin(env, seeds_of(7, 3))
    assert same(kept, copy)


def test_get_state_and_set_state_repeat_a_rollout_bit_for_bit(env):
    begin(env)
    plan = actions(env, 24)
    for action in plan[:8]:
        env.step(action)
    state, texts = env.get_state(), env.instructions()
    first = [env.step(action) for action in plan[8:]]
    begin(env, seeds_of(7, 4))
    other = make(copies=7, tasks=ALL)
    for again in (env, other):
        again.set_state(state)
        assert again.instructions() == texts
        for action, one in zip(plan[8:], first, strict=True):
            two = again.step(action)
            assert same(one.obs, two.obs) and torch.equal(one.reward, two.reward)
            assert torch.equal(one.success, two.success) and torch.equal(one.truncated, two.truncated)
    other.close()


def test_set_state_refuses_the_state_of_another_env(env):
    begin(env)
    other = make(copies=2)
    with pytest.raises(CheckpointError, match="found 7 copies of tasks .* expected 2 of"):
        other.set_state(env.get_state())
    other.close()


def test_an_episode_is_truncated_at_max_steps_and_not_before():
    env = make(copies=2, tasks=["lift"], max_steps=5)
    begin(env)
    for t in range(1, 6):
        step = env.step(torch.zeros(2, 7))
        assert step.truncated.tolist() == [t == 5, t == 5] and not bool(step.terminated.any())
    begin(env, mask=torch.tensor([True, False]))
    assert env.step(torch.zeros(2, 7)).truncated.tolist() == [False, True]
    env.close()


def steer(env):
    """Bring every TCP to the top of the object meant."""
    offset = env.view().a_top - env.controller.position
    return torch.cat([(offset / 0.02).clamp(-1, 1), torch.zeros(len(offset), 3), torch.ones(len(offset), 1)], dim=1)


@pytest.mark.parametrize("end_on_success", [False, True])
def test_success_ends_the_episode_only_when_asked_to(end_on_success):
    env = make(copies=3, tasks=["reach"], reward="progress", end_on_success=end_on_success)
    begin(env)
    ended, solved = torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    for _ in range(25):
        step = env.step(steer(env))
        assert torch.equal(step.terminated, step.success & end_on_success)
        ended |= step.terminated
        solved |= step.success
    assert bool(solved.all()) and bool(ended.all()) == end_on_success
    env.close()


def test_the_sparse_reward_is_the_success_and_the_dense_one_is_1_with_it():
    sparse, dense = make(copies=3, tasks=["reach"], reward="sparse"), make(copies=3, tasks=["reach"])
    begin(sparse)
    begin(dense)
    for _ in range(20):
        action = steer(sparse)
        one, two = sparse.step(action), dense.step(action)
        assert torch.equal(one.reward, one.success.float()) and torch.equal(one.success, two.success)
        assert bool((two.reward[two.success] == 1).all()) and bool((two.reward[~two.success] < 1).all())
        terms = sum(two.metrics.values())
        assert torch.allclose(terms[~two.success], two.reward[~two.success])
    assert bool(one.success.all())
    sparse.close()
    dense.close()


def test_the_progress_reward_adds_up_to_ten_times_the_gain_of_the_dense_one():
    progress, dense = make(copies=3, reward="progress"), make(copies=3)
    begin(progress)
    begin(dense)
    still = torch.zeros(3, 7)
    still[:, 6] = 1.0
    first, second = progress.step(still), dense.step(still)
    for action in actions(progress, 12):
        before = second.reward
        first, second = progress.step(action), dense.step(action)
        assert torch.allclose(first.reward, 10 * (second.reward - before), atol=1e-5)
    progress.close()
    dense.close()


def test_ending_at_success_is_refused_where_it_would_pay_to_avoid_it():
    with pytest.raises(ValueError, match="pays for avoiding success"):
        Config(end_on_success=True)


def test_a_wrong_action_is_refused_with_what_was_found_and_which_copies(env):
    begin(env)
    with pytest.raises(ShapeError, match=r"found shape \[7, 6\], torch.float32 .* expected \[7, 7\], torch.float32"):
        env.step(torch.zeros(7, 6))
    with pytest.raises(ShapeError, match="torch.float64"):
        env.step(torch.zeros(7, 7, dtype=torch.float64))
    bad = torch.zeros(7, 7)
    bad[2, 3], bad[5, 0] = float("nan"), float("inf")
    with pytest.raises(ShapeError, match=r"not finite in copies \[2, 5\]"):
        env.step(bad)


def test_actions_beyond_one_are_cut(env):
    begin(env)
    state = env.get_state()
    one = env.step(torch.full((7, 7), 5.0))
    env.set_state(state)
    two = env.step(torch.ones(7, 7))
    assert same(one.obs, two.obs)


def test_an_unknown_camera_is_named_with_the_nearest():
    env = make(copies=1)
    begin(env)
    with pytest.raises(NotFoundError, match="tabletop: camera 'fornt' does not exist; did you mean 'front'"):
        env.render(torch.tensor([0]), "fornt", 32, 32)
    env.close()


def test_pictures_show_only_the_copies_asked_for_in_their_own_colours():
    env = make(copies=3)
    begin(env)
    pictures = env.render(torch.tensor([2, 0]), "front", 48, 64)
    assert pictures.shape == (2, 48, 64, 3) and pictures.dtype == torch.uint8
    assert not torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[1], env.render(torch.tensor([0]), "front", 48, 64)[0])
    env.close()


def test_which_object_is_meant_is_told_by_the_instruction_alone():
    env = make(copies=1, tasks=["lift"])
    seen: dict[int, dict] = {}
    begin(env)
    for meant in range(3):
        env.episode.a[:] = meant
        seen[meant] = env.set_state(env.get_state())
    assert all(same(seen[0], seen[meant]) for meant in (1, 2))
    env.close()


def test_close_may_be_called_twice():
    env = make(copies=2)
    env.close()
    env.close()


def test_unknown_and_repeated_tasks_are_refused():
    with pytest.raises(ValueError, match="task 'lft' does not exist; did you mean 'lift'"):
        Config(tasks=["lft"])
    with pytest.raises(ValueError, match="names one twice"):
        Config(tasks=["lift", "lift"])
