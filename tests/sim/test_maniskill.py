"""ManiSkill tasks for real: with a software driver of Vulkan where there is no GPU."""

import builtins
import json
import logging
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

pytest.importorskip("mani_skill")
from embodied_rl import registry  # noqa: E402
from embodied_rl.check import check_env  # noqa: E402
from embodied_rl.envs.maniskill import Config, build  # noqa: E402
from embodied_rl.envs.maniskill.scene import check_task, manifest_of  # noqa: E402
from embodied_rl.envs.maniskill.simulator import Simulator  # noqa: E402
from embodied_rl.errors import CapabilityError, ConfigError, MissingExtraError, NotFoundError, SimulatorError  # noqa: E402
from embodied_rl.evaluate import evaluate  # noqa: E402
from embodied_rl.manifest import checksum_of  # noqa: E402
from tests.kit import Scripted  # noqa: E402

pytestmark = [pytest.mark.sim, pytest.mark.filterwarnings("ignore")]
CPU = torch.device("cpu")


def make(task="PushCube-v1", copies=2, **settings):
    return build(Config(task=task, **settings), num_envs=copies, device=CPU, split="train", seed=0)


def start(env, seeds, mask=(True, True)):
    obs = env.reset(torch.tensor(mask), torch.tensor(seeds), torch.zeros(2, dtype=torch.int64))
    return {k: v.clone() for k, v in obs.items()}


def actions(n, size=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(2, size, generator=g) * 2 - 1 for _ in range(n)]


@pytest.fixture(scope="module")
def push():
    env = make(max_steps=8)
    yield env
    env.close()


def test_equal_seeds_start_equal_episodes_that_go_on_alike(push):
    first = start(push, [10, 10])["state"]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], start(push, [12, 10])["state"][0])
    again = start(push, [10, 10])["state"]
    assert torch.equal(again, first)
    for action in actions(3):
        state = push.step(action[:1].expand(2, -1).contiguous()).obs["state"]
        assert torch.equal(state[0], state[1])


def test_an_action_moves_the_hand_by_what_it_says(push):
    """pd_ee_delta_pose: 1 is 0.1 m along an axis of the robot's base (the controller's pos_upper), reached in part."""
    start(push, [10, 10])
    before = push._scenes[0].env.agent.tcp.pose.p[0].clone()
    up, still = torch.zeros(2, 7), torch.zeros(2, 7)
    up[0, 2] = 1.0
    for _ in range(3):
        push.step(up)
    push.step(still)
    risen = push._scenes[0].env.agent.tcp.pose.p[0] - before
    assert 0.1 < float(risen[2]) < 0.35 and abs(float(risen[1])) < 0.03


def test_what_the_numbers_mean_is_what_the_controller_does(push):
    """A rotation of +1 turns against the right-hand rule, and the fingers open at +1."""
    told = push.spec.action.convention
    assert (told.control, told.frame, told.rotation, told.gripper) == ("ee_delta", "base", "euler_xyz", "opens_at_plus")
    assert told.metres == 0.1 and told.radians == -0.1
    agent, seen = push._scenes[0].env.agent, {}
    for sign in (1.0, -1.0):
        start(push, [10, 10])
        before = Rotation.from_quat(agent.tcp.pose.q[0].numpy(), scalar_first=True)
        action = torch.zeros(2, 7)
        action[0, 5] = action[0, 6] = sign
        for _ in range(3):
            push.step(action)
        turn = Rotation.from_quat(agent.tcp.pose.q[0].numpy(), scalar_first=True) * before.inv()
        seen[sign] = turn.as_rotvec()[2], float(agent.robot.get_qpos()[0, -1])
    assert -0.35 < seen[1.0][0] < -0.1 and 0.1 < seen[-1.0][0] < 0.35
    assert seen[1.0][1] > seen[-1.0][1] + 0.01, "metres of a finger"


def test_a_partial_reset_leaves_the_other_copy_alone(push):
    start(push, [10, 12])
    for action in actions(2):
        step = push.step(action)
    after = start(push, [14, 14], mask=(True, False))["state"]
    assert torch.equal(after[1], step.obs["state"][1]) and not torch.equal(after[0], step.obs["state"][0])
    steps = [push.step(action) for action in actions(6, seed=1)]
    # Copy 1 is at its limit of 8 now, copy 0 two steps short of it.
    assert steps[-1].truncated.tolist() == [False, True] and not steps[-2].truncated.any()


def test_a_saved_episode_goes_on_bit_for_bit(push):
    start(push, [10, 12])
    for action in actions(3):
        push.step(action)
    state = push.get_state()
    wanted = [push.step(action).obs["state"].clone() for action in actions(3, seed=2)]
    start(push, [20, 22])
    push.set_state(state)
    assert all(torch.equal(push.step(a).obs["state"], x) for a, x in zip(actions(3, seed=2), wanted, strict=True))


def solve(env):
    """Put the cube of copy 0 at its goal."""
    task = env._scenes[0].env
    pose = task.obj.pose
    task.obj.set_pose(type(pose).create_from_pq(p=task.goal_region.pose.p + torch.tensor([[0.0, 0.0, 0.019]]), q=pose.q))


def test_success_is_told_where_the_cube_is_at_its_goal(push):
    start(push, [10, 12])
    assert not push.step(torch.zeros(2, 7)).success.any()
    solve(push)
    step = push.step(torch.zeros(2, 7))
    assert step.success.tolist() == step.terminated.tolist() == [True, False]
    assert float(step.reward[0]) == 1.0  # the normalised dense reward of a solved task


def test_each_reward_is_paid_as_the_task_defines_it():
    """PushCube: dense is 4 once solved, normalized_dense a fourth of it, sparse 1 once solved and 0 before."""
    paid = {}
    for reward in ("normalized_dense", "dense", "sparse"):
        env = make(reward=reward)
        start(env, [10, 12])
        far = env.step(torch.zeros(2, 7)).reward
        solve(env)
        paid[reward] = torch.stack([far, env.step(torch.zeros(2, 7)).reward])
        env.close()
    assert paid["sparse"].tolist() == [[0, 0], [1, 0]]
    assert paid["dense"][1, 0] == 4 and bool(((paid["dense"][0] > 0) & (paid["dense"][0] < 4)).all())
    torch.testing.assert_close(paid["dense"], 4 * paid["normalized_dense"])


@pytest.mark.parametrize(("ends", "length"), [(True, 2), (False, 4)])
def test_a_success_that_does_not_last_is_one_at_the_end_only_where_it_ends_the_episode(ends, length):
    env = make(copies=1, max_steps=4, end_on_success=ends)
    task = env._scenes[0].env
    task.evaluate = lambda: {"success": task.elapsed_steps == 2}
    still = Scripted(lambda obs: torch.zeros(1, 1, 7), lambda obs: torch.zeros(1), has_critic=False)
    result = evaluate(still, env, episodes=1, run_seed=0)
    env.close()
    assert result.success_once.tolist() == [True] and result.success_at_end.tolist() == [ends]
    assert result.length.tolist() == [length]


def spoil(monkeypatch, scene, *what):
    """Let one scene show or pay what is not a number."""
    nan = float("nan")
    if "state" in what:
        sense = scene.env._get_obs_extra
        monkeypatch.setattr(scene.env, "_get_obs_extra", lambda info: {name: x * nan for name, x in sense(info).items()})
    if "reward" in what:
        monkeypatch.setattr(scene.env, "get_reward", lambda **_: torch.tensor([nan]))


@pytest.mark.parametrize(("what", "told"), [(("reward",), "reward"), (("state",), "'state'"), (("state", "reward"), "'state'")])
def test_a_simulation_that_blows_up_is_an_invalid_episode_and_no_failure_and_is_told_once(push, monkeypatch, caplog, what, told):
    start(push, [10, 12])
    spoil(monkeypatch, push._scenes[1], *what)
    with caplog.at_level(logging.WARNING):
        step = push.step(torch.zeros(2, 7))
        push.step(torch.zeros(2, 7), torch.tensor([True, False]))  # the copy waits, and is not told again
    assert step.invalid.tolist() == step.terminated.tolist() == [False, True]
    assert torch.isfinite(step.reward).all() and torch.isfinite(step.obs["state"]).all()
    sentence = f"{told} is not finite in copies [1]: their episodes do not count"
    assert [m for m in caplog.messages if "finite" in m] == [f"env maniskill: 'PushCube-v1': {sentence}"]


@pytest.mark.parametrize("settings", [{}, {"observation": "rgb", "pixels": 32, "film": 32}], ids=["state", "rgb"])
def test_a_worker_shows_what_is_not_finite_where_it_is(settings, monkeypatch):
    """The engine names what it was shown: an observation, although the pictures wait, or the reward."""
    there, still = Simulator({"task": "PushCube-v1", **settings}), np.zeros(7, np.float32)
    try:
        there.reset(10, 0)
        shown, reward, *_ = there.step(still)
        assert (shown is None) == bool(settings) and np.isfinite(reward)
        with monkeypatch.context() as bad:
            spoil(bad, there.scene, "reward")
            shown, reward, *_ = there.step(still)
        assert np.isnan(reward) and (shown is None if settings else np.isfinite(shown["state"]).all())
        spoil(monkeypatch, there.scene, "state")
        shown, reward, *_ = there.step(still)
        assert np.isfinite(reward) and np.isnan(shown["state"]).any() and shown.keys() == there.spec["observation"].keys()
    finally:
        there.close()


# ---- what tasks offer -------------------------------------------------------------------------------------------


@pytest.fixture
def task(monkeypatch):
    """Register PushCube with other modes, as "Mine-v1"."""
    from mani_skill.envs.tasks.tabletop.push_cube import PushCubeEnv
    from mani_skill.utils.registration import REGISTERED_ENVS, EnvSpec

    def register(**modes):
        cls = type("Mine", (PushCubeEnv,), {f"SUPPORTED_{name}_MODES": found for name, found in modes.items()})
        monkeypatch.setitem(REGISTERED_ENVS, "Mine-v1", EnvSpec("Mine-v1", cls, max_episode_steps=50))
        return cls

    return register


def paid(env, steps=2):
    """Rewards [steps, 2] once copy 0 is solved, after one step before."""
    start(env, [10, 12])
    still = torch.zeros(2, 7)
    rewards = [env.step(still).reward]
    solve(env)
    rewards += [env.step(still).reward for _ in range(steps)]
    return torch.stack(rewards)


def test_a_task_without_a_reward_is_paid_its_success(task):
    task(REWARD=["none"])
    mine, sparse = make("Mine-v1", reward="none", end_on_success=False), make(reward="sparse", end_on_success=False)
    assert paid(mine).tolist() == paid(sparse).tolist() == [[0, 0], [1, 0], [1, 0]]
    assert mine.manifest()["reward"] == "none"
    mine.close()
    sparse.close()


def test_of_pictures_that_come_with_segmentation_only_the_colours_are_kept(task):
    """And where nobody looks the reward of a task without one is paid as well."""
    task(REWARD=["none"], OBS=["rgb+segmentation"])
    mine = make("Mine-v1", reward="none", observation="rgb", pixels=32, film=32)
    plain = make(observation="rgb", pixels=32, film=32)
    seen, wanted = start(mine, [10, 12]), start(plain, [10, 12])
    assert seen.keys() == wanted.keys() == {"state", "base_camera"}
    assert all(torch.equal(seen[name], wanted[name]) for name in wanted) and seen["base_camera"].float().std() > 5
    assert paid(mine, steps=1).tolist() == [[0, 0], [1, 0]]
    mine.close()
    plain.close()


def test_what_a_task_does_not_offer_is_told_with_what_a_recipe_can_ask_for(task):
    task(REWARD=["none"], OBS=["none", "state_dict", "rgb+segmentation"])
    with pytest.raises(CapabilityError, match=r"'Mine-v1' does not take reward normalized_dense: set env.reward to one of \['none'\]$"):
        make("Mine-v1")
    with pytest.raises(CapabilityError, match=r"does not take observation rgbd: set env.observation to one of \['rgb'\]$"):
        make("Mine-v1", reward="none", observation="rgbd")
    task(OBS=["pointcloud"])
    with pytest.raises(CapabilityError, match=r"offers only \['pointcloud'\], which env.observation cannot say, so this task does"):
        make("Mine-v1")
    task(REWARD=["mine"])
    with pytest.raises(CapabilityError, match=r"offers only \['mine'\], which env.reward cannot say"):
        make("Mine-v1")
    with pytest.raises(CapabilityError, match=r"take reward none: set env.reward to one of \['normalized_dense', 'dense', 'sparse'\]"):
        make(reward="none")


def test_no_task_sends_a_recipe_in_a_circle():
    from mani_skill.utils.registration import REGISTERED_ENVS

    followed = set()
    for name in REGISTERED_ENVS:
        settings = {}
        while True:
            try:
                check_task(Config(task=name, **settings), CPU)
            except CapabilityError as error:
                refused = str(error)
                if advice := re.search(r"set env\.(\w+) to one of \['(\w+)'", refused):
                    assert advice[1] not in settings, refused
                    settings[advice[1]] = advice[2]
                    followed.add(advice[2])
                    continue
                assert "needs the assets" in refused
            break
    assert followed == {"sparse", "none", "rgb"}


@pytest.mark.parametrize(
    ("found", "error", "told"),
    [
        (FileNotFoundError("[Errno 2] apt_5.json"), CapabilityError, r"apt_5.json; where that is an asset, `python -m mani_skill"),
        (ImportError("svgpathtools not installed"), MissingExtraError, "cannot be made: svgpathtools not installed$"),
    ],
)
def test_what_a_task_lacks_when_it_is_built_is_one_sentence(task, monkeypatch, found, error, told):
    def load(self, options):
        raise found

    monkeypatch.setattr(task(), "_load_scene", load)
    with pytest.raises(error, match=told):
        make("Mine-v1")


def test_a_group_of_assets_is_told_by_its_name(tmp_path, monkeypatch):
    from mani_skill.utils.assets import DATA_GROUPS, DATA_SOURCES, DataSource
    from mani_skill.utils.registration import REGISTERED_ENVS

    for name in ("can/1", "can/2"):
        monkeypatch.setitem(DATA_SOURCES, name, DataSource("objects", target_path=name, output_dir=tmp_path))
    monkeypatch.setitem(DATA_GROUPS, "cans", ["can/1", "can/2"])
    monkeypatch.setattr(REGISTERED_ENVS["PushCube-v1"], "asset_download_ids", ["cans"])
    (tmp_path / "can" / "1").mkdir(parents=True)
    with pytest.raises(CapabilityError, match=r"needs the assets cans, which are not under .*download_asset cans`"):
        make()
    (tmp_path / "can" / "2").mkdir()
    check_task(Config(task="PushCube-v1"), CPU)
    assert manifest_of(Config(task="PushCube-v1"), CPU, 2)["assets"].keys() == {"can/1", "can/2"}


def test_a_robot_whose_assets_are_not_on_the_disk_is_told_and_nobody_is_asked(tmp_path, monkeypatch):
    from mani_skill import ASSET_DIR
    from mani_skill.agents.robots import ANYmalC
    from mani_skill.utils import download_asset

    ask = download_asset.prompt_yes_no
    monkeypatch.setattr(ANYmalC, "urdf_path", str(tmp_path / "anymal.urdf"))
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked"))
    with pytest.raises(CapabilityError) as refused:
        make("AnymalC-Reach-v1", copies=1, control="pd_joint_delta_pos")
    assert str(refused.value) == (
        f"env maniskill: 'AnymalC-Reach-v1': its robot anymal_c needs the assets anymal_c, which are not under {ASSET_DIR}: run "
        "`python -m mani_skill.utils.download_asset anymal_c` where the internet can be reached, or set MS_ASSET_DIR"
    )
    assert download_asset.prompt_yes_no is ask


@pytest.fixture(scope="module", params=["PickCube-v1", "PushCube-v1"])
def eyes(request):
    """Small pictures; a process that draws in software works for half a minute before its first one, and only then."""
    env = make(request.param, observation="rgbd", pixels=32, film=32, control="pd_ee_delta_pos")
    yield env
    env.close()


def test_a_policy_reads_the_depth_too(eyes):
    module = registry.load("policy", "tiny_vla_tokens")
    config = module.Config(width=16, heads=2, layers=1, channels=8, glances=2, chunk=2, critic={"kind": "scalar"})
    policy = module.build(config, env=eyes.spec, device=CPU)
    seen = start(eyes, [10, 12])
    farther = seen | {"base_camera_depth": seen["base_camera_depth"] + 0.5}
    out = policy.act(seen, generator=torch.Generator().manual_seed(0))
    assert out.action.shape == (2, 2, eyes.spec.action.size)
    summary, other = (policy.trunk.prefix(obs).summary for obs in (seen, farther))
    assert (summary - other).abs().max() > 1e-3


def test_pictures_come_without_the_pose_of_the_cube(eyes):
    task = eyes.config.task
    seen = start(eyes, [10, 12])
    assert seen["base_camera"].shape == (2, 32, 32, 3) and seen["base_camera"].dtype == torch.uint8
    assert not torch.equal(seen["base_camera"][0], seen["base_camera"][1])
    depth = seen["base_camera_depth"]
    assert depth.shape == (2, 32, 32, 1) and 0.1 < float(depth[depth > 0].median()) < 3.0
    # Joints, velocities and the hand; PickCube says as well whether it holds something, and where to.
    assert seen["state"].shape[1] == {"PickCube-v1": 9 + 9 + 1 + 7 + 3, "PushCube-v1": 9 + 9 + 7}[task]
    scene = eyes._scenes[0].env
    cube = (scene.cube if task == "PickCube-v1" else scene.obj).pose.p[0]
    near = (seen["state"][0].unfold(0, 3, 1) - cube).abs().amax(1).min()
    assert float(near) > 1e-3
    film = eyes.render(torch.tensor([1, 0]), eyes.spec.cameras[0], 24, 32)
    assert film.shape == (2, 24, 32, 3) and film.float().std() > 5


def test_pictures_are_drawn_when_they_are_asked_for_and_show_what_maniskill_shows(eyes, monkeypatch):
    ours, plain = eyes._scenes
    looks = []
    look = type(ours).look
    monkeypatch.setattr(type(ours), "look", lambda self, *given: looks.append(self) or look(self, *given))
    before = start(eyes, [10, 10])
    assert looks == [ours, plain]
    first = torch.tensor([True, False])
    for action in actions(3, size=4):
        step = eyes.step(action, first)
        wanted = plain.env.step(plain._native(action[:1]))  # ManiSkill's own step, with its cameras
        assert not step.obs and float(step.reward[0]) == float(wanted[1])
        assert bool(step.success[0]) == bool(wanted[4]["success"])
    assert len(looks) == 2
    seen = eyes.observe()
    assert looks[2:] == [ours]  # the copy that waited is not drawn again
    sensed = wanted[0]["sensor_data"]["base_camera"]
    assert torch.equal(seen["base_camera"][:1], sensed["rgb"]) and torch.equal(seen["base_camera"][1], before["base_camera"][1])
    assert torch.equal(seen["base_camera_depth"][:1], sensed["depth"].float() / 1000)
    assert not torch.equal(seen["base_camera"][0], before["base_camera"][0])


def passes(*settings):
    findings = check_env("maniskill", settings, copies=2, steps=6)
    assert not [f for f in findings if f.ok is False] and sum(f.ok is True for f in findings) > 10


def test_pictures_keep_the_contract():
    passes("task=PickCube-v1", "observation=rgb", "pixels=32", "film=32", "max_steps=3", "control=pd_ee_delta_pos")


def test_states_keep_the_contract():
    passes("task=PickCube-v1", "max_steps=5")


# ---- two robots -------------------------------------------------------------------------------------------------

PAIR = "TwoRobotPickCube-v1"


@pytest.fixture(scope="module", params=[PAIR, "TwoRobotStackCube-v1"])
def pair(request):
    env = make(request.param, max_steps=8)
    yield env
    env.close()


def robots(env):
    """Both robots of the first copy: where their hands are [2, 3], and how wide their fingers are open [2]."""
    agents = env._scenes[0].env.agent.agents
    return torch.cat([one.tcp.pose.p for one in agents]), torch.stack([one.robot.get_qpos()[0, -1] for one in agents])


def moved(env, name, x=1.0):
    """How far both hands go in three steps, and how wide they are open then, with one number and zeros beside it."""
    start(env, [10, 12])
    action, (before, _) = torch.zeros(2, env.spec.action.size), robots(env)
    action[0, env.spec.action.names.index(name)] = x
    for _ in range(3):
        env.step(action)
    after, fingers = robots(env)
    return after - before, fingers


def test_each_of_two_arms_moves_by_its_own_part_of_the_vector(pair):
    pose = ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")
    assert pair.spec.action.names == tuple(f"panda_wristcam-{i}.{name}" for i in (0, 1) for name in pose)
    assert pair.spec.action.convention is None, "a convention is of one hand"
    # They face each other along y, and each counts in its own base's axes.
    for arm, ahead in ((0, 1), (1, -1)):
        for name, axis, way in (("dx", 1, ahead), ("dy", 0, -ahead), ("dz", 2, 1)):
            gone, _ = moved(pair, f"panda_wristcam-{arm}.{name}")
            assert 0.07 < float(gone[arm, axis]) * way < 0.35 and float(gone[1 - arm].abs().max()) < 2e-3
        width = {x: moved(pair, f"panda_wristcam-{arm}.gripper", x)[1] for x in (1.0, -1.0)}
        assert float(width[1.0][arm]) > float(width[-1.0][arm]) + 0.01
        assert abs(float(width[1.0][1 - arm] - width[-1.0][1 - arm])) < 1e-3


def test_two_robots_start_alike_from_equal_seeds_and_are_reset_alone(pair):
    first = start(pair, [10, 10])["state"]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], start(pair, [12, 10])["state"][0])
    for action in actions(3, size=14):
        step = pair.step(action)
    after = start(pair, [10, 10], mask=(True, False))["state"]
    assert torch.equal(after[0], first[0]) and torch.equal(after[1], step.obs["state"][1])
    steps = [pair.step(action) for action in actions(5, size=14, seed=1)]
    assert steps[-1].truncated.tolist() == [False, True] and not steps[-2].truncated.any()
    assert len({float(x) for step in steps for x in step.reward}) > 5, "the task pays its dense reward"


def test_two_robots_keep_the_contract():
    passes(f"task={PAIR}", "max_steps=5")


def test_each_robots_joints_have_their_own_bounds_and_the_map_is_the_simulators():
    """Robots of two kinds, whose keys ManiSkill sorts: the second one comes first in the vector."""
    env = make(PAIR, copies=1, control="pd_joint_pos", kwargs={"robot_uids": ["panda", "fetch"]})
    scene = env._scenes[0]
    wanted, names = scene.env.single_action_space, env.spec.action.names
    assert list(wanted) == ["fetch-1", "panda-0"] and names[0] == "fetch-1.0" and names[-1] == "panda-0.7"
    assert not np.allclose(wanted["panda-0"].low[:7], -wanted["panda-0"].high[:7])
    # Some joints of the Fetch turn without an end: there the number is used as it is.
    ends = {robot: (np.nan_to_num(box.low, neginf=-1), np.nan_to_num(box.high, posinf=1)) for robot, box in wanted.items()}
    for x, way in ((-1.0, 0.0), (0.0, 0.5), (9.0, 1.0)):
        told = scene._native(torch.full((1, len(names)), x))
        assert list(told) == list(wanted)
        for robot, (low, high) in ends.items():
            np.testing.assert_allclose(told[robot].numpy(), (low + way * (high - low))[None], rtol=1e-6, atol=1e-6)
    env.close()


def test_another_number_of_robots_than_a_task_has_is_told():
    env = make(PAIR, copies=1, kwargs={"robot_uids": ["panda", "panda"]})
    assert env.spec.action.names[7] == "panda-1.dx"
    env.close()
    for uids in ("panda", ["panda"] * 3):
        with pytest.raises(ConfigError, match="cannot be made: .*; look at env.control and env.kwargs$"):
            make(PAIR, copies=1, kwargs={"robot_uids": uids})


def test_a_worker_plays_a_task_of_two_robots_like_this_process(pair):
    there, plan = Simulator({"task": pair.config.task, "max_steps": 8}), actions(4, size=14)
    try:
        assert there.spec["action"]["names"] == list(pair.spec.action.names) and there.spec["action"]["convention"] is None
        begun = start(pair, [10, 12])["state"]
        assert np.array_equal(there.reset(12, 0)["state"], begun[1].numpy())
        for action in plan:
            shown, reward, *_ = there.step(action[1].numpy())
            step = pair.step(action)
            assert np.array_equal(shown["state"], step.obs["state"][1].numpy()) and reward == float(step.reward[1])
    finally:
        there.close()


def test_both_wrists_of_two_robots_are_seen():
    env = make(PAIR, observation="rgb", pixels=32, film=32)
    before = start(env, [10, 12])
    wrists = ["panda_wristcam-0-hand_camera", "panda_wristcam-1-hand_camera"]
    assert before.keys() == {"state", "base_camera", *wrists}
    # Joints and speeds of both, and both hands.
    assert before["state"].shape[1] == 2 * (9 + 9) + 2 * 7
    # One hand turns, so its own picture changes more than what the other sees of it.
    action = torch.zeros(2, 14)
    action[:, 7 + 5] = 1.0
    for _ in range(3):
        env.step(action)
    after = env.observe()
    change = [(after[name].float() - before[name].float()).abs().mean() for name in wrists]
    assert float(change[1]) > 5 and float(change[1]) > 1.5 * float(change[0])
    env.close()


def test_copies_in_processes_play_the_same_episodes(push):
    there = make(max_steps=8, workers=2)
    try:
        assert torch.equal(start(there, [10, 12])["state"], start(push, [10, 12])["state"])
        for t, action in enumerate(actions(8)):
            active = torch.tensor([True, t % 2 == 0])
            a, b = there.step(action, active), push.step(action, active)
            assert torch.equal(a.obs["state"], b.obs["state"]) and torch.equal(a.reward, b.reward)
            assert a.truncated.tolist() == b.truncated.tolist() == [t == 7, False]
        assert torch.equal(a.success, b.success) and there.spec.cameras == push.spec.cameras
        assert there.manifest() == push.manifest() and push.manifest()["packages"].keys() == {"mani_skill", "sapien"}
    finally:
        there.close()
    with pytest.raises(SimulatorError, match="controller 'pd_ee_delta_pos3' does not exist; did you mean 'pd_ee_delta_pos'"):
        make(control="pd_ee_delta_pos3", workers=1)


def test_what_was_downloaded_and_tasks_of_ones_own_are_told_by_their_checksums(tmp_path, monkeypatch):
    from mani_skill.utils.assets import DATA_SOURCES, DataSource
    from mani_skill.utils.registration import REGISTERED_ENVS

    (tmp_path / "cans").mkdir()
    (tmp_path / "cans" / "mesh.obj").write_text("v 0 0 0")
    monkeypatch.setitem(DATA_SOURCES, "cans", DataSource("task_assets", target_path="cans", output_dir=tmp_path))
    monkeypatch.setattr(REGISTERED_ENVS["PushCube-v1"], "asset_download_ids", ["cans"])
    told = manifest_of(Config(task="PushCube-v1"), CPU, 2)
    assert told["assets"] == {"cans": checksum_of(tmp_path / "cans")} and "source" not in told
    monkeypatch.setattr(REGISTERED_ENVS["PushCube-v1"], "cls", type("Mine", (), {"__module__": __name__}))
    assert len(manifest_of(Config(task="PushCube-v1"), CPU, 2)["source"]) == 64


def test_the_number_of_copies_is_told_where_they_share_a_scene():
    config = Config(task="PushCube-v1")
    few, many = (manifest_of(config, torch.device("cuda"), n) for n in (2, 8))
    assert (few.pop("num_envs"), many.pop("num_envs")) == (2, 8) and few == many
    assert manifest_of(config, CPU, 2) == manifest_of(config, CPU, 8) and few["files"]["maniskill/scene.py"]


def test_assets_that_are_not_on_the_disk_are_told_with_the_command_that_brings_them(tmp_path, monkeypatch):
    from mani_skill.utils.assets import DATA_SOURCES, DataSource
    from mani_skill.utils.registration import REGISTERED_ENVS

    monkeypatch.setitem(DATA_SOURCES, "cans", DataSource("task_assets", target_path="cans", output_dir=tmp_path))
    monkeypatch.setattr(REGISTERED_ENVS["PushCube-v1"], "asset_download_ids", ["cans"])
    with pytest.raises(CapabilityError) as refused:
        make()
    assert str(refused.value) == (
        f"env maniskill: 'PushCube-v1' needs the assets cans, which are not under {tmp_path}: run `python -m "
        "mani_skill.utils.download_asset cans` where the internet can be reached, or set MS_ASSET_DIR"
    )


def test_what_does_not_exist_is_told_with_the_nearest_name():
    with pytest.raises(NotFoundError, match="'PushCub-v1' does not exist; did you mean 'PushCube-v1'"):
        make("PushCub-v1")
    with pytest.raises(ConfigError, match="kwargs must not hold obs_mode; use env.observation"):
        make(kwargs={"obs_mode": "state"})
    with pytest.raises(CapabilityError, match=r"starts \(batch\) does nothing on device cpu"):
        make(starts="batch")
    with pytest.raises(NotFoundError, match="controller 'pd_ee_delta_pos3' does not exist; did you mean 'pd_ee_delta_pos'"):
        make(control="pd_ee_delta_pos3")
    with pytest.raises(ValueError, match=r"pixels \(64\) does nothing with observation \(state\)"):
        Config(pixels=64)


def test_without_a_vulkan_device_one_sentence_says_what_to_install():
    code = (
        "import torch\nfrom embodied_rl.envs.maniskill import Config, build\n"
        "try:\n    build(Config(), num_envs=1, device=torch.device('cpu'), split='train', seed=0)\n"
        "except Exception as e:\n    import json; print(json.dumps([type(e).__name__, str(e)]))\n"
    )
    # Nothing that names a driver may come from outside.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VK_")} | {"VK_ICD_FILENAMES": "/nonexistent/driver.json"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    kind, text = json.loads(done.stdout.strip().splitlines()[-1])
    assert kind == "CapabilityError"
    assert "apt-get install libvulkan1 chromium" in text and "VK_ICD_FILENAMES is /nonexistent/driver.json" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_all_copies_are_one_scene_and_a_partial_reset_leaves_the_others_alone():
    device = torch.device("cuda:0")
    env = build(Config(task="PushCube-v1", max_steps=8), num_envs=4, device=device, split="train", seed=0)
    first = torch.tensor([True, False, False, False], device=device)
    seeds, tasks, still = torch.arange(0, 8, 2, device=device), torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(4, 7, device=device)
    begun = env.reset(torch.ones_like(first), seeds, tasks)["state"]
    assert len(env._scenes) == 1 and not env.spec.has_state
    for _ in range(2):
        step = env.step(still)
    told = [begun, step.obs["state"], step.reward, step.terminated, step.truncated, step.success, step.invalid]
    assert {x.device for x in told} == {device}
    after = env.reset(first, seeds, tasks)["state"]
    torch.testing.assert_close(after[1:], step.obs["state"][1:], rtol=0, atol=1e-4)
    torch.testing.assert_close(after[0], begun[0], rtol=0, atol=1e-4)
    steps = [env.step(still) for _ in range(6)]
    # The others are at their limit of 8 now, copy 0 two steps short of it.
    assert steps[-1].truncated.tolist() == [False, True, True, True] and not steps[-2].truncated.any()
    env.close()


@pytest.mark.slow
def test_ppo_learns_to_push_the_cube_from_state(tmp_path):
    """The recipe as it is, one seed."""
    from embodied_rl.config import load_recipe
    from embodied_rl.train import run

    finished = run(load_recipe("pushcube_ppo", [f"log.folder={tmp_path}", "log.progress=false", "evaluate.videos=0"]).recipe)
    summary = json.loads((finished.folder / "evaluation.json").read_text())["summary"]
    assert summary["overall"]["episodes"] == 100
    assert summary["overall"]["success_once"]["rate"] > 0.8
