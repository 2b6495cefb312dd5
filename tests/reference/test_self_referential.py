"""SRPO's progress worked by hand, its clusters against graphs of scipy, its encoder against pictures one can paint."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.sparse.csgraph import connected_components

from embodied_rl import registry
from embodied_rl.rewards import Episode
from embodied_rl.types import ActionSpec, TensorSpec
from tests.kit import CPU, spec

self_referential = registry.load("reward", "self_referential")
ACTION = ActionSpec("continuous", 1)


def seeing(**observation):
    made = spec(observation, ACTION)
    return type(made)(**{**vars(made), "has_success": True, "tasks": ("a", "b")})


PLANE = seeing(place=TensorSpec((2,)))


def model(env=PLANE, **config):
    return self_referential.build(self_referential.Config(**config), env=env, device=CPU)


def episode(*states, solved=None, task=0, group=0, name="place"):
    """An episode through these states; `solved` is the decision in which the goal held."""
    success = torch.zeros(len(states) - 1, dtype=torch.bool)
    if solved is not None:
        success[solved] = True
    return Episode({name: torch.tensor(states)}, success, solved is not None, solved is None, task, group, 0, 0)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


START = [20.0, 20.0]
# Features have the mean (12, 1) and the deviations sqrt(216) = 14.7 and sqrt(0.8) = 0.894. In these units (0, 0) and (10, 0)
# are 10 / 14.7 / sqrt(2) = 0.48 apart, root mean square, and so are (0, 2) and (10, 2); nothing else is within 0.5.
SUCCESSES = [(0.0, 0.0), (0.0, 2.0), (10.0, 0.0), (10.0, 2.0), (40.0, 1.0)]
CENTRES = [[5.0, 0.0], [5.0, 2.0]]
# Distances to the nearest centre: 1, 3, 5; relative to the nearest and farthest failure: 0, 0.5, 1.
FAILURES = {(5.0, 1.0): sigmoid(5), (5.0, 5.0): 0.5, (8.0, -4.0): sigmoid(-5)}


def batch(**given):
    return [
        *(episode(START, list(x), solved=0, **given) for x in SUCCESSES),
        *(episode(START, list(x), **given) for x in FAILURES),
    ]


def test_successes_cluster_and_the_lonely_one_counts_for_nothing():
    centres = self_referential.cluster_centres(torch.tensor(SUCCESSES), radius=0.5, neighbours=2)
    torch.testing.assert_close(centres, torch.tensor(CENTRES))


def test_where_nothing_clusters_the_mean_is_the_centre():
    centres = self_referential.cluster_centres(torch.tensor(SUCCESSES), radius=0.4, neighbours=2)
    torch.testing.assert_close(centres, torch.tensor([[12.0, 1.0]]))


def test_with_one_neighbour_every_success_counts():
    centres = self_referential.cluster_centres(torch.tensor(SUCCESSES), radius=0.4, neighbours=1)
    torch.testing.assert_close(centres, torch.tensor(SUCCESSES))


def test_one_success_is_its_own_centre_though_nothing_varies():
    torch.testing.assert_close(self_referential.cluster_centres(torch.tensor([[3.0, 4.0]]), 0.5, 2), torch.tensor([[3.0, 4.0]]))


def test_failures_are_scored_by_their_distance_to_the_nearest_cluster():
    answers = model().judge(batch())
    for answer, expected in zip(answers[len(SUCCESSES) :], FAILURES.values(), strict=True):
        assert float(answer[-1]) == pytest.approx(expected, abs=1e-6)


def test_a_state_has_progress_as_well_and_it_grows_on_the_way():
    # (5, 12): distance 10 -> (10 - 1) / 4 = 2.25; (5, 7): 5 -> 1; (5, 2.5): 0.5 -> -0.125
    on_its_way = replace(episode([5.0, 12.0], [5.0, 7.0], [5.0, 2.5]), truncated=False)
    *_, answer = model().judge([*batch(), on_its_way])
    assert answer.tolist() == pytest.approx([sigmoid(10 * (0.5 - d)) for d in (2.25, 1.0, -0.125)], abs=1e-6)


def test_failures_that_are_all_as_near_get_one_half():
    a = episode(START, [1.0, 1.0], solved=0)
    answers = model().judge([a, episode(START, [4.0, 5.0]), episode(START, [-2.0, -3.0])])
    assert [float(x[-1]) for x in answers[1:]] == [0.5, 0.5]


def test_the_reference_is_the_state_in_which_the_goal_first_held():
    wandering = episode(START, [0.0, 0.0], [9.0, 9.0], [0.0, 0.0], solved=0)
    wandering.success[2] = True
    m = model()
    m.judge([wandering])
    assert m.references[0].tolist() == [[0.0, 0.0]]


def test_nobody_is_compared_with_another_task_or_group():
    answers = model().judge([*batch(task=0), *(episode(START, list(x), task=1) for x in FAILURES)])
    assert all(a is not None for a in answers[:8]) and answers[8:] == [None] * 3
    m = model(compare="group")
    answers = m.judge([*batch(group=7), episode(START, [5.0, 1.0], group=8)])
    assert float(answers[6][-1]) == pytest.approx(0.5, abs=1e-6) and answers[-1] is None
    assert m.judge([episode(START, [5.0, 1.0], group=7)]) == [None]  # another rollout's groups are other starts


def test_without_any_success_it_says_nothing():
    assert model().judge([episode(START, list(x)) for x in FAILURES]) == [None] * 3


def failures_only():
    return [episode(START, list(x)) for x in FAILURES]


def test_successes_are_remembered_for_rollouts_without_any():
    m = model()
    m.judge(batch())
    answers = m.judge(failures_only())
    assert [float(a[-1]) for a in answers] == pytest.approx(list(FAILURES.values()), abs=1e-6)
    forgetful = model(memory=0)
    forgetful.judge(batch())
    assert forgetful.judge(failures_only()) == [None] * 3


def test_memory_keeps_the_latest_beside_the_new():
    m = model(memory=2)
    m.judge([episode(START, [float(i), 0.0], solved=0) for i in range(5)])
    assert m.references[0][:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    m.judge([episode(START, [9.0, 0.0], solved=0)])
    assert m.references[0][:, 0].tolist() == [3.0, 4.0, 9.0]


def test_a_potential_is_known_before_the_rollout_it_judges():
    m = model(use="potential")
    assert m.judge(batch()) == [None] * 8
    # Successes and failures of this rollout change the next one's judgement only.
    distracted = [*failures_only(), episode(START, [100.0, 0.0], solved=0), episode(START, [300.0, 300.0])]
    answers = m.judge(distracted)
    assert [float(a[-1]) for a in answers[:3]] == pytest.approx(list(FAILURES.values()), abs=1e-6)
    again = m.judge(failures_only())
    assert [float(a[-1]) for a in again] != pytest.approx(list(FAILURES.values()), abs=1e-3)


def test_a_trajectory_is_the_mean_of_its_states_so_far():
    m = model(embed="trajectory")
    m.judge([episode([0.0, 0.0], [2.0, 4.0], [7.0, 2.0], solved=1)])
    assert m.references[0].tolist() == [[3.0, 2.0]]


def test_its_state_is_restored():
    m, other = model(), model()
    m.judge(batch())
    other.judge([episode(START, [1.0, 1.0], solved=0, task=1)])
    other.load_state_dict(m.state_dict())
    for a, b in zip(m.judge(failures_only()), other.judge(failures_only()), strict=True):
        assert torch.equal(a, b)
    assert set(other.references) == {0}


@pytest.mark.parametrize("seed", range(20))
def test_clusters_are_the_components_of_the_graph_of_cores(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(40, 2, generator=g)
    radius, neighbours = 0.13, 3
    label = self_referential.cluster(x, radius, neighbours)
    near = torch.cdist(x, x) <= radius
    core = near.sum(1) >= neighbours
    _, component = connected_components((near & core & core.unsqueeze(1)).numpy(), directed=False)
    for i in range(40):
        if core[i]:
            same = [j for j in range(40) if core[j] and component[j] == component[i]]
            assert int(label[i]) == min(same)
        else:
            touched = [int(label[j]) for j in range(40) if core[j] and near[i, j]]
            assert int(label[i]) == min(touched, default=40)
    assert bool(core.any()) and not bool(core.all())


def test_a_point_between_two_clusters_does_not_join_them():
    # Radius 1, four neighbours: 1 is near 0 and 2 only, so it is no core, and goes to the first cluster it touches.
    x = torch.tensor([-1.0, -1.0, -1.0, 0.0, 1.0, 2.0, 3.0, 3.0, 3.0]).unsqueeze(1)
    assert self_referential.cluster(x, 1.0, 4).tolist() == [0, 0, 0, 0, 0, 5, 5, 5, 5]


# ---- what is looked at ----------------------------------------------------------------------------------------------


def test_a_picture_becomes_the_mean_colours_of_a_grid():
    env = seeing(camera=TensorSpec((4, 6, 3), torch.uint8, low=0, high=255), hand=TensorSpec((2,)))
    m = model(env, grid=2)
    picture = torch.zeros(1, 4, 6, 3, dtype=torch.uint8)
    picture[0, :2, :3, 0] = 255  # red in the upper left quarter
    picture[0, 2:, 3:, 2] = torch.tensor([[51, 102, 0], [0, 102, 51]])  # blue in the lower right, on average 51
    (z,) = m.encoder([{"camera": picture, "hand": torch.ones(1, 2)}])
    red, green, blue = z.view(3, 2, 2)  # the vector is not looked at
    assert red.tolist() == [[1.0, 0.0], [0.0, 0.0]] and green.eq(0).all() and blue[1, 1] == pytest.approx(0.2)


def test_without_pictures_the_vectors_are_taken_as_they_are():
    env = seeing(a=TensorSpec((2,)), words=TensorSpec((3,), torch.int64), b=TensorSpec((2, 2)), looks=TensorSpec((1,), constant=True))
    obs = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[[3.0, 4.0], [5.0, 6.0]]]), "looks": torch.ones(1, 1), "words": torch.ones(1, 3)}
    assert model(env).encoder([obs])[0].tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    assert model(env, entries=["b"]).encoder([obs])[0].tolist() == [[3.0, 4.0, 5.0, 6.0]]
