"""Each task's success and reward on states worked out by hand, and on states of the simulator set by hand."""

import math
import re

import pytest
import torch

from embodied_rl.envs.tabletop import Config, build
from embodied_rl.envs.tabletop.scene import CABINET_FRONT, HALF_SIZE, HANDLE_OFFSET
from embodied_rl.envs.tabletop.tasks import TASKS, View, closeness, judge
from embodied_rl.seeding import start_seeds

FIELDS = {
    "tcp": [0.0, 0.0, 0.2],
    "between": False,
    "held": False,
    "gripper_open": True,
    "aperture": 1.0,
    "a_position": [0.0, 0.0, 0.02],
    "a_half_height": 0.02,
    "a_speed": 0.0,
    "b_position": [0.1, 0.0, 0.016],
    "b_half_height": 0.016,
    "b_start": [0.1, 0.0],
    "goal": [0.0, 0.1, 0.001],
    "relation_on": True,
    "handle": [0.0, -0.3, 0.05],
    "drawer": 0.0,
}
"""A cube at rest at the origin, a brick 10 cm before it, the open gripper 20 cm above the cube, the drawer closed."""


def outcome(task, **changes):
    """Success, dense reward and terms of one state."""
    view = View(**{name: torch.tensor([value]) for name, value in {**FIELDS, **changes}.items()})
    success, dense, terms = judge((TASKS[task],), torch.zeros(1, dtype=torch.int64), view)
    return bool(success), float(dense), {name: float(value) for name, value in terms.items()}


def close_to(d):
    """The documented closeness, by hand."""
    return 1 - min(d / 0.4, 1) / 2 - math.tanh(15 * d) / 2


def weights(task):
    """The numbers that the task's docstring names as weights, in order: what is documented is what is tested."""
    said = TASKS[task].__doc__.split("Reward terms:")[1]
    return [float(number) for number in re.findall(r"0\.\d+", said)]


def test_closeness_has_the_documented_values():
    got = closeness(torch.tensor([0.0, 0.1, 0.2, 0.4, 1.0])).tolist()
    assert got == pytest.approx([1.0, 0.42, 0.25, 0.0, 0.0], abs=5e-3)
    assert got == pytest.approx([close_to(d) for d in (0.0, 0.1, 0.2, 0.4, 1.0)], abs=1e-6)


def test_reach_asks_for_the_top_of_the_object():
    success, dense, terms = outcome("reach")
    assert not success and terms["reach"] == pytest.approx(weights("reach")[0] * close_to(0.16)) == pytest.approx(dense)
    assert outcome("reach", tcp=[0.0, 0.02, 0.05])[:2] == (True, 1.0)
    assert not outcome("reach", tcp=[0.0, 0.03, 0.04])[0]
    assert not outcome("reach", tcp=[0.1, 0.0, 0.032])[0], "the other object does not count"


def test_push_asks_for_the_object_on_the_goal_and_on_the_table():
    success, dense, terms = outcome("push")
    assert not success
    reach, fingers, grasp, progress = weights("push")
    wanted = {"reach": reach * close_to(0.18) + fingers / 2, "grasp": 0.0, "progress": progress * close_to(0.1)}
    assert terms == pytest.approx(wanted)
    at_it = outcome("push", tcp=[0.0, 0.0, 0.02], between=True, held=True, gripper_open=False, aperture=0.2)[2]
    assert at_it["reach"] == pytest.approx(reach + fingers * 0.9) and at_it["grasp"] == pytest.approx(grasp)
    assert dense == pytest.approx(sum(terms.values()))
    assert outcome("push", a_position=[0.0, 0.055, 0.02])[:2] == (True, 1.0)
    assert not outcome("push", a_position=[0.0, 0.045, 0.02])[0]
    assert not outcome("push", a_position=[0.0, 0.1, 0.05])[0], "carried over the goal is not pushed onto it"
    over_it = outcome("push", a_position=[0.0, 0.1, 0.22])[2]
    assert over_it["progress"] == pytest.approx(progress * close_to(0.2)), "nor is it paid as if it were"


def test_lift_asks_for_7_cm_and_a_hold():
    up = {"a_position": [0.0, 0.0, 0.091], "tcp": [0.0, 0.0, 0.091]}
    assert outcome("lift", **up, held=True)[:2] == (True, 1.0)
    assert not outcome("lift", **up, held=False)[0], "thrown up is not lifted"
    assert not outcome("lift", a_position=[0.0, 0.0, 0.085], held=True)[0]


def test_lift_pays_for_open_fingers_on_the_way_and_for_closing_them_at_the_object():
    reach, fingers, grasp, progress = weights("lift")
    half = {"a_position": [0.0, 0.0, 0.055], "tcp": [0.0, 0.0, 0.055]}
    terms = outcome("lift", **half, between=True, held=True, gripper_open=False, aperture=0.1)[2]
    part = 0.5 + 0.5 * (1 - 0.1)
    assert terms == pytest.approx({"reach": reach + part * fingers, "grasp": grasp, "progress": 0.5 * progress})
    for aperture in (0.0, 1.0):
        terms = outcome("lift", aperture=aperture)[2]
        wanted = {"reach": reach * close_to(0.18) + aperture / 2 * fingers, "grasp": 0.0, "progress": 0.0}
        assert terms == pytest.approx(wanted)
    thrown = outcome("lift", **half)[2]
    assert thrown["grasp"] == thrown["progress"] == 0.0


def on(task, **changes):
    return outcome(task, **{"a_position": [0.1, 0.0, 0.052], "tcp": [0.1, 0.0, 0.11], **changes})


def test_place_on_asks_for_a_standing_released_on_b():
    assert on("place")[:2] == (True, 1.0)
    assert on("place", a_position=[0.12, 0.0, 0.052])[0]
    assert not on("place", a_position=[0.13, 0.0, 0.052])[0]
    assert not on("place", a_position=[0.1, 0.0, 0.07])[0], "hovering"
    assert not on("place", held=True, gripper_open=False)[0]
    assert not on("place", gripper_open=False)[0]
    assert not on("place", a_speed=0.2)[0]
    assert not on("place", b_start=[0.14, 0.0])[0], "B was pushed about"
    assert not on("place", relation_on=False)[0], "beside was asked"


def test_place_beside_asks_for_a_next_to_b_on_the_table():
    for x, solved in ((0.04, True), (0.02, True), (0.005, False), (0.08, False)):
        assert outcome("place", relation_on=False, a_position=[x, 0.0, 0.02])[0] == solved
    assert not outcome("place", relation_on=False, a_position=[0.04, 0.0, 0.05])[0]
    assert not outcome("place", relation_on=True, a_position=[0.04, 0.0, 0.02])[0]


def test_place_pays_for_reach_grasp_approach_and_release_in_this_order():
    start = outcome("place")[1]
    near = outcome("place", tcp=[0.0, 0.0, 0.02])[1]
    held = outcome("place", tcp=[0.0, 0.0, 0.02], held=True, gripper_open=False)[1]
    above = {"a_position": [0.1, 0.0, 0.08], "tcp": [0.1, 0.0, 0.08], "held": True, "gripper_open": False}
    carried = outcome("place", **above)[1]
    down = on("place", tcp=[0.1, 0.0, 0.052], held=True, gripper_open=False)[1]
    let_go = on("place", tcp=[0.1, 0.0, 0.052], a_speed=0.2)[1]
    solved = on("place")[1]
    order = [start, near, held, carried, down, let_go, solved]
    assert order == sorted(order) and len(set(order)) == len(order) and order[-1] == 1.0 and order[-2] < 1.0


def test_stack_asks_for_a_centred_tower_and_the_gripper_withdrawn():
    assert on("stack")[:2] == (True, 1.0)
    assert not on("stack", a_position=[0.12, 0.0, 0.052])[0], "2 cm off centre"
    assert not on("stack", tcp=[0.1, 0.0, 0.07])[0], "gripper still around A"
    assert not on("stack", held=True, gripper_open=False)[0]


def test_open_asks_for_10_cm():
    assert outcome("open", drawer=0.101)[:2] == (True, 1.0)
    success, dense, terms = outcome("open", drawer=0.05, tcp=[0.0, -0.3, 0.05])
    assert not success and terms == pytest.approx({"reach": weights("open")[0], "grasp": 0.0, "progress": 0.5 * weights("open")[1]})
    assert outcome("open", drawer=-0.01)[2]["progress"] == 0.0


def test_close_asks_for_less_than_12_mm():
    assert outcome("close", drawer=0.01)[:2] == (True, 1.0)
    success, dense, terms = outcome("close", drawer=0.07, tcp=[0.0, -0.3, 0.05])
    assert not success
    assert terms == pytest.approx({"reach": weights("close")[0], "grasp": 0.0, "progress": 0.5 * weights("close")[1]})


def test_each_copy_is_judged_by_its_own_task():
    view = View(**{name: torch.tensor([value] * 3) for name, value in {**FIELDS, "drawer": 0.12}.items()})
    tasks = tuple(TASKS[name] for name in ("reach", "open", "close"))
    success, dense, terms = judge(tasks, torch.tensor([2, 1, 0]), view)
    assert success.tolist() == [False, True, False]
    for i, name in enumerate(("close", "open", "reach")):
        alone = outcome(name, drawer=0.12)
        assert float(dense[i]) == pytest.approx(alone[1])
        assert {term: float(value[i]) for term, value in terms.items()} == pytest.approx(alone[2])


@pytest.mark.parametrize("task", list(TASKS))
def test_dense_rewards_stay_in_0_to_1_and_reach_1_only_by_success(task):
    generator = torch.Generator().manual_seed(0)
    n = 4000

    def points():
        return 0.3 * (torch.rand(n, 3, generator=generator) - 0.3)

    def coin():
        return torch.rand(n, generator=generator) < 0.5

    view = View(
        tcp=points(), between=coin(), held=coin(), gripper_open=coin(), aperture=torch.rand(n, generator=generator), a_position=points(), a_half_height=torch.full((n,), 0.02),
        a_speed=0.1 * torch.rand(n, generator=generator), b_position=points(), b_half_height=torch.full((n,), 0.02),
        b_start=points()[:, :2], goal=points(), relation_on=coin(), handle=points(),
        drawer=0.15 * torch.rand(n, generator=generator),
    )  # fmt: skip
    view.tcp[: n // 2] = view.a_position[: n // 2]
    view.handle[: n // 2] = view.tcp[: n // 2]
    success, dense, terms = judge((TASKS[task],), torch.zeros(n, dtype=torch.int64), view)
    assert bool((dense >= 0).all()) and bool((dense[~success] < 1).all()) and bool((dense[success] == 1).all())
    assert all(bool((value >= 0).all()) for value in terms.values())


# ---- the same, read from the simulator -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def env():
    env = build(Config(tasks=list(TASKS), threads=1), num_envs=1, device=torch.device("cpu"), split="train", seed=0)
    yield env
    env.close()


def start(env, task, a=0, b=2, index=0):
    """Begin a task in which cube (a) and brick (b) are meant."""
    seeds = start_seeds(3, "train", torch.zeros(1), torch.full((1,), index))
    env.reset(torch.ones(1, dtype=torch.bool), seeds, torch.tensor([list(TASKS).index(task)]))
    env.episode.a[:], env.episode.b[:] = a, b


def put(env, finger=None, **places):
    """Place objects, the drawer or the gripper; physics is not advanced."""
    scene, state = env.scene, env.get_state()
    qpos = state["physics"]["native"][:, 1:]
    for name, value in places.items():
        if name == "drawer":
            qpos[:, scene.drawer_qpos] = value
        else:
            first = scene.objects_qpos[("cube", "cylinder", "brick").index(name)]
            qpos[0, first : first + 3] = torch.tensor(value, dtype=torch.float64)
            qpos[0, first + 3 : first + 7] = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    if finger is not None:
        qpos[:, scene.fingers_qpos], state["controller"]["finger"][:] = finger
    env.set_state(state)
    return env.view()


def verdict(env):
    success, _, _ = judge(env._tasks, env.episode.task, env.view())
    return bool(success)


def test_objects_start_at_rest_on_the_table_and_stay_there(env):
    start(env, "lift")
    before = env.object_poses().clone()
    assert before[0, :, 2].tolist() == pytest.approx(HALF_SIZE[:, 2].tolist(), abs=1e-6)
    for _ in range(10):
        env.step(torch.tensor([[0.0, 0, 0, 0, 0, 0, 1]]))
    assert float((env.object_poses() - before)[0, :, :3].abs().max()) < 1e-3


def test_no_task_is_solved_at_its_start(env):
    for task in TASKS:
        for index in range(10):
            start(env, task, index=index)
            assert not verdict(env), f"{task} start {index}"


def test_held_means_pressed_between_the_pads(env):
    start(env, "lift")
    tcp = env.tcp[0][0].tolist()
    assert bool(put(env, cube=tcp, finger=(0.0195, -0.01)).held)
    assert not bool(put(env, cube=tcp, finger=(0.04, 0.04)).held), "open fingers hold nothing"
    assert not bool(put(env, cube=[tcp[0] + 0.05, *tcp[1:]], finger=(0.0195, -0.01)).held), "beside the pads"
    assert not bool(put(env, cube=tcp, finger=(0.001, -0.01)).held), "closed on nothing"


def test_lift_is_judged_in_the_simulator(env):
    start(env, "lift")
    put(env, cube=env.tcp[0][0].tolist(), finger=(0.0195, -0.01))
    assert float(env.tcp[0][0, 2]) > 0.1 and verdict(env)
    put(env, brick=env.tcp[0][0].tolist(), cube=[0.0, 0.2, 0.02], finger=(0.0195, -0.01))
    assert not verdict(env), "another object was lifted"


def test_push_is_judged_in_the_simulator(env):
    start(env, "push")
    goal = env.episode.goal[0].tolist()
    put(env, cube=[goal[0] + 0.02, goal[1], 0.02])
    assert verdict(env)
    put(env, cube=[goal[0] + 0.06, goal[1], 0.02])
    assert not verdict(env)


def test_place_and_stack_are_judged_in_the_simulator(env):
    for task, relation in (("place", 0), ("stack", 0), ("place", 1)):
        start(env, task)
        brick = env.object_poses()[0, 2, :3].tolist()
        env.episode.b_start[0] = torch.tensor(brick[:2])
        env.episode.relation[:] = relation
        upon, beside = [*brick[:2], 0.052], [brick[0], brick[1] + 0.06, 0.02]
        put(env, cube=beside if relation else upon)
        assert verdict(env)
        put(env, cube=upon if relation else beside)
        assert not verdict(env)


def test_the_drawer_tasks_are_judged_in_the_simulator(env):
    start(env, "open")
    put(env, drawer=0.11)
    assert verdict(env)
    start(env, "close")
    view = put(env, drawer=0.005)
    assert verdict(env)
    handle = CABINET_FRONT + HANDLE_OFFSET
    assert view.handle[0].tolist() == pytest.approx([handle[0] - 0.005, handle[1], handle[2]], abs=1e-5)
