"""The gymnasium env: true last observations, seeds, state by replay, spaces, and sentences for what does not work."""

import os
import re
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from embodied_rl import registry
from embodied_rl.envs.gymnasium import Config, build
from embodied_rl.errors import (
    CapabilityError,
    CheckpointError,
    ConfigError,
    MissingExtraError,
    NotFoundError,
    ShapeError,
)

CPU = torch.device("cpu")


def make(id, copies=2, **settings):
    return build(Config(id=id, **settings), num_envs=copies, device=CPU, split="train", seed=0)


def begin(env, seeds):
    b = env.spec.num_envs
    return env.reset(torch.ones(b, dtype=torch.bool), torch.tensor(seeds), torch.zeros(b, dtype=torch.int64))


def actions(env, steps, seed=0):
    g, a, b = torch.Generator().manual_seed(seed), env.spec.action, env.spec.num_envs
    if a.kind == "discrete":
        return torch.randint(a.size, (steps, b), generator=g)
    return torch.rand(steps, b, a.size, generator=g) * 2 - 1


class Counter(gymnasium.Env):
    """Counts its steps; says what it was told."""

    observation_space = spaces.Dict(
        {
            "count": spaces.Box(0, 100, (1,), np.int32),
            "nested": spaces.Dict({"picture": spaces.Box(0, 255, (2, 2, 3), np.uint8)}),
            "kind": spaces.Discrete(3, start=5),
            "scalar": spaces.Box(-1.0, 1.0, (), np.float64),
        }
    )
    action_space = spaces.Box(np.array([[0.0, -4.0]]), np.array([[2.0, np.inf]]), dtype=np.float64)
    hidden = np.random.default_rng(0)

    def __init__(self, limit=3, goal=2, noisy=False):
        self.limit, self.goal, self.noisy, self.told = limit, goal, noisy, []

    def _obs(self):
        picture = np.full((2, 2, 3), self.t, np.uint8)
        scalar = self.hidden.random() if self.noisy else 0.5
        return {"count": np.array([self.t], np.int32), "nested": {"picture": picture}, "kind": 5 + self.t % 3, "scalar": scalar}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action):
        self.told.append(action)
        self.t += 1
        info = {"is_success": self.t == self.goal, "reward_time": -0.5}
        return self._obs(), float(self.t), self.t >= self.limit, False, info


@pytest.fixture(autouse=True)
def registered():
    gymnasium.register("Counter-v0", entry_point=Counter, max_episode_steps=5)
    gymnasium.register("CounterRandom-v0", entry_point=Counter, nondeterministic=True)
    yield
    del gymnasium.registry["Counter-v0"], gymnasium.registry["CounterRandom-v0"]


@pytest.mark.parametrize("id", ["HalfCheetah-v5", "Pendulum-v1", "CartPole-v1"])
def test_copies_see_exactly_what_gymnasium_itself_gives(id):
    env = make(id)
    obs = begin(env, [2**62 + 4, 8])
    raw = [gymnasium.make(id), gymnasium.make(id)]
    for i, seed in enumerate([2**62 + 4, 8]):
        assert np.array_equal(obs["state"][i].numpy(), raw[i].reset(seed=seed)[0].astype(np.float32))
    alive = [True, True]
    for a in actions(env, 30):
        step = env.step(a)
        for i in range(2):
            if not alive[i]:
                continue
            native = a[i].numpy() if id != "Pendulum-v1" else a[i].numpy() * 2
            o, r, terminated, truncated, _ = raw[i].step(int(native) if id == "CartPole-v1" else native)
            assert np.array_equal(step.obs["state"][i].numpy(), o.astype(np.float32))
            assert step.reward[i] == np.float32(r)
            assert bool(step.terminated[i]) == terminated
            assert bool(step.truncated[i]) == truncated
            alive[i] = not terminated
    env.close()


def test_an_episode_ends_with_its_true_last_observation_and_waits_for_reset():
    env = make("Counter-v0")
    begin(env, [0, 2])
    a = torch.zeros(2, 2)
    for _ in range(3):
        step = env.step(a)
    assert step.terminated.tolist() == [True, True] and step.truncated.tolist() == [False, False]
    assert step.obs["count"].flatten().tolist() == [3.0, 3.0]
    waiting = env.step(a)
    assert waiting.obs["count"].flatten().tolist() == [3.0, 3.0] and waiting.reward.tolist() == [0.0, 0.0]
    obs = env.reset(torch.tensor([False, True]), torch.tensor([0, 4]), torch.zeros(2, dtype=torch.int64))
    assert obs["count"].flatten().tolist() == [3.0, 0.0]
    assert env.step(a).obs["count"].flatten().tolist() == [3.0, 1.0]


def test_a_time_limit_truncates_and_does_not_terminate():
    env = make("Counter-v0", kwargs={"limit": 100})
    assert env.spec.max_steps == 5
    begin(env, [0, 2])
    flags = [(s.terminated.tolist(), s.truncated.tolist()) for s in (env.step(torch.zeros(2, 2)) for _ in range(5))]
    assert flags == [([False] * 2, [False] * 2)] * 4 + [([False] * 2, [True] * 2)]


def test_max_steps_replaces_the_registered_limit():
    env = make("Counter-v0", kwargs={"limit": 100}, max_steps=2)
    begin(env, [0, 2])
    assert env.spec.max_steps == 2
    assert not env.step(torch.zeros(2, 2)).truncated.any() and env.step(torch.zeros(2, 2)).truncated.all()


def test_an_end_at_the_time_limit_is_a_termination_only():
    env = make("Counter-v0", max_steps=3)
    begin(env, [0, 2])
    for _ in range(3):
        step = env.step(torch.zeros(2, 2))
    assert step.terminated.all() and not step.truncated.any()


def test_only_active_copies_advance():
    env = make("Counter-v0")
    begin(env, [0, 2])
    step = env.step(torch.zeros(2, 2), torch.tensor([True, False]))
    assert step.obs["count"].flatten().tolist() == [1.0, 0.0] and step.reward.tolist() == [1.0, 0.0]


def test_nested_observations_are_laid_out_flat_with_their_dtypes():
    env = make("Counter-v0")
    obs = begin(env, [0, 2])
    assert {k: (v.dtype, tuple(v.shape)) for k, v in obs.items()} == {
        "count": (torch.float32, (2, 1)),
        "nested/picture": (torch.uint8, (2, 2, 2, 3)),
        "kind": (torch.int64, (2,)),
        "scalar": (torch.float32, (2, 1)),
    }
    kind = env.spec.observation["kind"]
    assert (kind.low, kind.high) == (0, 2) and obs["kind"].tolist() == [0, 0]
    assert env.spec.observation["nested/picture"].high == 255


def test_actions_are_clipped_then_mapped_to_the_box_and_left_alone_where_it_is_unbounded():
    env = make("Counter-v0", copies=1, kwargs={"limit": 100})
    begin(env, [0])
    for a in ([-1.0, -1.0], [0.0, 0.25], [1.0, 1.0], [-7.0, 7.0]):
        env.step(torch.tensor([a]))
    told = env._envs[0].unwrapped.told[1:]  # the first was the look at `info`
    assert [t.tolist() for t in told] == [[[0.0, -1.0]], [[1.0, 0.25]], [[2.0, 1.0]], [[0.0, 1.0]]]
    assert told[0].dtype == np.float64


def test_success_and_reward_terms_come_from_info():
    env = make("Counter-v0")
    begin(env, [0, 2])
    assert env.spec.has_success
    steps = [env.step(torch.zeros(2, 2)) for _ in range(3)]
    assert [s.success.tolist() for s in steps] == [[False] * 2, [True] * 2, [False] * 2]
    assert steps[0].metrics["time"].tolist() == [-0.5, -0.5]
    assert make("CartPole-v1").spec.has_success is False


def test_results_stay_as_they_were_when_the_env_moves_on():
    env = make("Counter-v0")
    obs = begin(env, [0, 2])
    first = env.step(torch.zeros(2, 2))
    env.step(torch.zeros(2, 2))
    assert obs["count"].flatten().tolist() == [0.0, 0.0] and first.obs["count"].flatten().tolist() == [1.0, 1.0]
    assert first.success.tolist() == [False, False]


@pytest.mark.parametrize("id", ["HalfCheetah-v5", "Pendulum-v1", "CartPole-v1", "Counter-v0"])
def test_a_restored_env_continues_bit_for_bit(id):
    env, other = make(id, 3), make(id, 3)
    begin(env, [2, 4, 6])
    plan = actions(env, 40)
    for a in plan[:20]:
        done = (step := env.step(a)).terminated | step.truncated
        if done[:2].any():  # the third copy waits after its end
            env.reset(done & torch.tensor([True, True, False]), torch.tensor([12, 14, 16]), torch.zeros(3, dtype=torch.int64))
    restored, original = other.set_state(env.get_state()), env._observe()
    assert all(torch.equal(restored[k], original[k]) for k in original)
    for a in plan[20:]:
        x, y = env.step(a), other.step(a)
        assert all(torch.equal(x.obs[k], y.obs[k]) for k in x.obs)
        assert torch.equal(x.reward, y.reward) and torch.equal(x.terminated, y.terminated)
        assert torch.equal(x.truncated, y.truncated)
        assert (x.success is None and y.success is None) or torch.equal(x.success, y.success)
    assert len(env.get_state()["actions"]) == 3
    env.close(), other.close()


def test_the_state_is_of_tensors_and_plain_values_only(tmp_path):
    from embodied_rl import checkpoint

    env, other = make("Counter-v0"), make("Counter-v0")
    begin(env, [0, 2])
    env.step(torch.zeros(2, 2))
    path = checkpoint.save(tmp_path, env.get_state(), update=1, keep=1)
    obs = other.set_state(checkpoint.load(path))
    assert obs["count"].flatten().tolist() == [1.0, 1.0]


def test_a_state_from_before_the_first_reset_restores_an_env_that_was_not_started():
    env, other = make("Counter-v0"), make("Counter-v0")
    begin(other, [0, 2])
    other.set_state(env.get_state())
    assert other.get_state()["seeds"].tolist() == [-1, -1]


def test_an_env_with_hidden_randomness_is_refused_when_its_state_is_restored():
    env, other = make("Counter-v0", kwargs={"noisy": True}), make("Counter-v0", kwargs={"noisy": True})
    begin(env, [0, 2])
    env.step(torch.zeros(2, 2))
    with pytest.raises(CapabilityError, match="did not repeat its episode: after 1 replayed steps 'scalar' of copy 0"):
        other.set_state(env.get_state())


def test_states_of_another_env_are_refused():
    with pytest.raises(CheckpointError, match="the state is of 2 copies of 'CartPole-v1', expected 2 of 'Pendulum-v1'"):
        make("Pendulum-v1").set_state(make("CartPole-v1").get_state())


@pytest.mark.parametrize(
    ("id", "settings", "reason"),
    [("CounterRandom-v0", {}, "registered as nondeterministic"), ("Counter-v0", {"resumable": False}, "env.resumable is false")],
)
def test_an_env_without_state_says_so(id, settings, reason):
    env = make(id, **settings)
    assert env.spec.has_state is False
    begin(env, [0, 2])
    env.step(torch.zeros(2, 2))
    assert env._actions == [[], []]
    with pytest.raises(CapabilityError, match=reason):
        env.get_state()


def test_wrong_actions_are_refused_with_the_copies_named():
    env = make("Counter-v0", copies=3)
    begin(env, [0, 2, 4])
    with pytest.raises(ShapeError, match=r"found shape \[3, 5\], torch.float32 on cpu, expected \[3, 2\]"):
        env.step(torch.zeros(3, 5))
    with pytest.raises(ShapeError, match="torch.float64"):
        env.step(torch.zeros(3, 2, dtype=torch.float64))
    bad = torch.zeros(3, 2)
    bad[1, 0], bad[2, 1] = float("nan"), float("inf")
    with pytest.raises(ShapeError, match=r"not finite in copies \[1, 2\]"):
        env.step(bad)
    env = make("CartPole-v1", copies=3)
    begin(env, [0, 2, 4])
    with pytest.raises(ShapeError, match=r"copies \[2\] got 2, expected 0 to 1"):
        env.step(torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"id": "HalfChetah-v5"}, NotFoundError, "env gymnasium: 'HalfChetah-v5' does not exist; did you mean 'HalfCheetah-v5'?"),
        ({"id": "Zzz/Qqqq-v0"}, NotFoundError, "once its package is installed and named"),
        ({"id": "not_there:Foo-v0"}, MissingExtraError, "needs a package that is not installed: No module named 'not_there'"),
        ({"id": "CartPole-v1", "kwargs": {"foo": 1}}, ConfigError, "cannot be made: .*foo"),
        ({"id": "CartPole-v1", "kwargs": {"render_mode": "human"}}, ConfigError, "kwargs must not hold render_mode"),
        ({"id": "Blackjack-v1"}, CapabilityError, "observation 'state' is a Tuple, and only Box, Discrete and Dict"),
    ],
)
def test_what_cannot_be_made_is_told_in_a_sentence(settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings)


def test_an_action_space_that_is_not_understood_is_told():
    class Buttons(Counter):
        action_space = spaces.MultiBinary(3)

    gymnasium.register("Buttons-v0", entry_point=Buttons)
    try:
        with pytest.raises(CapabilityError, match=r"its action is MultiBinary\(3\), and only a Box of floats, a Dict of such or a Discrete"):
            make("Buttons-v0")
    finally:
        del gymnasium.registry["Buttons-v0"]


def test_warnings_of_an_outdated_id_and_of_its_model_go_to_the_log_once(caplog, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    make("HalfCheetah-v4", copies=3).close()
    assert caplog.text.count("out of date") == 1 and caplog.text.count("settotalmass") == 1
    assert capfd.readouterr().err == "" and list(tmp_path.iterdir()) == []


def test_pictures_are_offered_only_when_asked_for_and_have_the_size_asked_for():
    class Painter(Counter):
        metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

        def __init__(self, render_mode=None):
            super().__init__()
            self.render_mode = render_mode

        def render(self):
            return np.full((8, 12, 3), 10 * self.t, np.uint8)

    gymnasium.register("Painter-v0", entry_point=Painter)
    try:
        plain, env = make("Painter-v0"), make("Painter-v0", render=True)
        assert plain.spec.cameras == () and env.spec.cameras == ("default",)
        begin(env, [0, 2])
        env.step(torch.zeros(2, 2), torch.tensor([False, True]))
        pictures = env.render(torch.tensor([1, 0]), "default", 16, 16)
        assert pictures.shape == (2, 16, 16, 3) and pictures.dtype == torch.uint8
        assert pictures[0].unique().tolist() == [10] and pictures[1].unique().tolist() == [0]
        assert env.render(torch.tensor([1]), "default", 8, 12).shape == (1, 8, 12, 3)
        with pytest.raises(NotFoundError, match="camera 'front' does not exist; known: default"):
            env.render(torch.tensor([0]), "front", 8, 8)
        with pytest.raises(NotFoundError, match="set env.render: true"):
            plain.render(torch.tensor([0]), "default", 8, 8)
    finally:
        del gymnasium.registry["Painter-v0"]


def test_an_env_that_cannot_draw_is_refused_when_it_is_built():
    class Blind(Counter):
        metadata = {"render_modes": ["rgb_array"]}

        def __init__(self, render_mode=None):
            super().__init__()
            self.render_mode = render_mode

        def render(self):
            raise RuntimeError("no display")

    gymnasium.register("Blind-v0", entry_point=Blind)
    try:
        with pytest.raises(CapabilityError, match="cannot draw on this machine: no display; MuJoCo envs need"):
            make("Blind-v0", render=True)
    finally:
        del gymnasium.registry["Blind-v0"]


def test_without_egl_one_sentence_says_what_to_install(tmp_path):
    """In a process of its own that finds no driver, since OpenGL is loaded once."""
    command = "import sys; from embodied_rl.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["check", "env", "gymnasium", "id=HalfCheetah-v5", "render=true"]
    environment = os.environ | {"MUJOCO_GL": "egl", "__EGL_VENDOR_LIBRARY_DIRS": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(
        r"error: env gymnasium: 'HalfCheetah-v5' cannot draw on this machine: .*; MuJoCo envs need a display or MUJOCO_GL=egl "
        r"with the system packages libegl1 and libgl1; or set env.render: false\n", done.stderr,
    )  # fmt: skip


def test_the_registry_finds_it_although_it_shares_its_name_with_the_package():
    assert registry.load("env", "gymnasium").build is build
    assert "_spaces" not in registry.names("env")
