"""Actions that are a Dict of Boxes: one flat vector for the policy, the Dict again for the simulator."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from embodied_rl.check import check_env
from embodied_rl.envs._spaces import ActionMap
from embodied_rl.envs.gymnasium import Config, build
from embodied_rl.errors import CapabilityError, ShapeError

CPU = torch.device("cpu")
JOINTS = spaces.Box(np.array([[-4.0, -1.0]], np.float32), np.array([[2.0, np.inf]], np.float32))
HAND = spaces.Dict({"grip": spaces.Box(0.1, 0.7, (), np.float32), "joints": JOINTS})
ARMS = spaces.Dict([("right", HAND), ("left", spaces.Box(-0.3, 0.1, (2,), np.float64))])
"""Pairs keep their order; a dict would be sorted."""
NAMES = ("right/grip.0", "right/joints.0", "right/joints.1", "left.0", "left.1")
ACTION = torch.tensor([[-1.0, 0.0, 0.25, 1.0, -1.0], [0.0, 1.0, 5.0, 0.0, -3.0]])
WANTED = [[0.1, -1.0, 0.25, 0.1, -0.3], [0.4, 2.0, 1.0, -0.1, -0.3]]


def flat(taken):
    """The numbers of a Dict [B, 5] in the order of its parts."""
    right = taken["right"]
    return np.concatenate([x.reshape(len(x), -1) for x in (right["grip"], right["joints"], taken["left"])], axis=1)


def test_a_dict_of_boxes_is_one_vector_in_the_order_of_its_keys_and_each_part_has_its_own_bounds():
    arms = ActionMap(ARMS, "env")
    assert (arms.spec.kind, arms.spec.size, arms.spec.names, arms.shape) == ("continuous", 5, NAMES, (5,))
    native = arms(ACTION)
    assert native.dtype == np.float64, "as fine as the finest of its parts"
    np.testing.assert_allclose(native, WANTED, rtol=1e-6)
    taken = arms.split(native)
    assert {k: (x.shape, x.dtype) for k, x in {**taken["right"], "left": taken["left"]}.items()} == {
        "grip": ((2,), np.float32),
        "joints": ((2, 1, 2), np.float32),
        "left": ((2, 2), np.float64),
    }
    assert list(taken) == ["right", "left"]
    np.testing.assert_allclose(flat(taken), WANTED, rtol=1e-6)


def test_one_copys_part_of_an_action_lies_in_its_space():
    arms, g = ActionMap(ARMS, "env"), torch.Generator().manual_seed(0)
    for row in arms(torch.randn(500, 5, generator=g).mul(2)):
        taken = arms.split(row)
        assert ARMS.contains(taken), taken


def test_tensors_are_split_as_tensors():
    parts = ActionMap(ARMS, "env").split(torch.arange(10.0).reshape(2, 5))
    assert parts["right"]["grip"].tolist() == [0, 5] and parts["left"].tolist() == [[3, 4], [8, 9]]
    assert parts["right"]["joints"].tolist() == [[[1, 2]], [[6, 7]]]


def test_a_box_and_a_discrete_are_handed_on_as_they_are():
    for space in (spaces.Box(-2.0, 2.0, (1, 2)), spaces.Discrete(3)):
        one, native = ActionMap(space, "env"), np.ones((4, 1, 2))
        assert one.split(native) is native and one.spec.names == ()


@pytest.mark.parametrize(
    ("space", "told"),
    [
        (spaces.Dict(left=HAND, mode=spaces.Discrete(3)), r"env: 'mode' of its action is Discrete\(3\), and in a Dict only a Box of"),
        (spaces.Dict(arm=spaces.Dict(on=spaces.MultiBinary(2))), r"'arm/on' of its action is MultiBinary\(2\), and in a Dict only"),
        (spaces.Dict(left=spaces.Box(0, 9, (1,), np.int32)), r"'left' of its action is Box\(0, 9, \(1,\), int32\), and in a Dict only"),
        (spaces.Dict(left=HAND, right=spaces.Dict()), r"'right' of its action is Dict\(\), and in a Dict only a Box of floats is"),
        (spaces.Dict(), r"its action is Dict\(\), and only a Box of floats, a Dict of such or a Discrete is understood"),
    ],
)
def test_a_part_that_is_no_box_of_floats_is_refused_by_its_name(space, told):
    with pytest.raises(CapabilityError, match=told):
        ActionMap(space, "env")


# ---- gymnasium --------------------------------------------------------------------------------------------------------


class Arms(gymnasium.Env):
    """Shows the sum of all that it was told, and keeps to itself what it was given."""

    observation_space = spaces.Box(-np.inf, np.inf, (5,), np.float64)
    action_space = ARMS

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.sum = 0, self.np_random.uniform(size=5)
        return self.sum.copy(), {}

    def step(self, action):
        right = {k: np.asarray(x) for k, x in action["right"].items()}  # of a Box without axes SyncVectorEnv makes a number
        assert ARMS.contains({"right": right, "left": action["left"]}), action
        given = {"right": {k: x[None] for k, x in right.items()}, "left": action["left"][None]}
        self.t, self.sum = self.t + 1, self.sum + flat(given)[0]
        action["left"][:] = 0  # an env may do with it what it likes
        return self.sum.copy(), float(self.sum[0]), self.t == 4, False, {}


class Both(VectorEnv):
    """The same of somebody's own, all copies at once."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}
    single_observation_space, single_action_space = Arms.observation_space, ARMS

    def __init__(self, num_envs):
        self.num_envs, self.envs = num_envs, [Arms() for _ in range(num_envs)]
        self.action_space = batch_space(ARMS, num_envs)
        self.sums, self.t = np.zeros((num_envs, 5)), np.zeros(num_envs, int)

    def reset(self, *, seed=None, options=None):
        for i in np.flatnonzero((options or {}).get("reset_mask", np.ones(self.num_envs, bool))):
            self.sums[i], self.t[i] = self.envs[i].reset(seed=seed[i] if isinstance(seed, list) else seed)[0], 0
        return self.sums.copy(), {}

    def step(self, actions):
        assert self.action_space.contains(actions), actions
        self.sums, self.t = self.sums + flat(actions), self.t + 1
        actions["left"][:] = 0
        return self.sums.copy(), self.sums[:, 0], self.t == 4, np.zeros(self.num_envs, bool), {}


@pytest.fixture(autouse=True)
def registered():
    gymnasium.register("Arms-v0", entry_point=Arms, vector_entry_point=Both)
    yield
    del gymnasium.registry["Arms-v0"]


def make(mode):
    env = build(Config(id="Arms-v0", vectorization_mode=mode), num_envs=2, device=CPU, split="train", seed=0)
    zeros = torch.zeros(2, dtype=torch.int64)
    return env, env.reset(torch.ones(2, dtype=torch.bool), torch.tensor([4, 6]), zeros)["state"]


MODES = [None, "sync", "async", "vector_entry_point"]


@pytest.mark.parametrize("mode", MODES)
def test_every_copy_is_told_its_own_numbers_however_it_is_stepped(mode):
    env, start = make(mode)
    assert env.spec.action.size == 5 and env.spec.action.names == NAMES
    for n in (1, 2):
        shown = env.step(ACTION).obs["state"]
        torch.testing.assert_close(shown, start + n * torch.tensor(WANTED), rtol=0, atol=1e-6)
    env.close()


@pytest.mark.parametrize("mode", MODES)
def test_an_episode_is_played_again_from_its_flat_actions(mode):
    (env, _), (other, _) = make(mode), make(mode)
    for action in (ACTION, ACTION.flip(0)):
        env.step(action)
    state = env.get_state()
    assert [x.shape for x in state["actions"]] == [(2, 5), (2, 5)]
    assert torch.equal(other.set_state(state)["state"], env._observe()["state"])
    assert torch.equal(env.step(ACTION).obs["state"], other.step(ACTION).obs["state"])
    env.close(), other.close()


def test_a_vector_of_another_length_is_refused():
    env, _ = make(None)
    with pytest.raises(ShapeError, match=r"found shape \[2, 2\], torch.float32 on cpu, expected \[2, 5\]"):
        env.step(torch.zeros(2, 2))


@pytest.mark.parametrize("mode", ["null", "vector_entry_point"])
def test_the_contract_holds(mode):
    findings = check_env("gymnasium", ["id=Arms-v0", f"vectorization_mode={mode}"], steps=10)
    assert [(f.name, f.detail) for f in findings if f.ok is False] == [] and sum(f.ok is True for f in findings) > 10
