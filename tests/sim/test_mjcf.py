"""A scene file and a task class of one's own: the example learns to move on both engines, and mistakes get a sentence."""

from pathlib import Path

import mujoco
import pytest
import torch

from embodied_rl import checkpoint
from embodied_rl.config import build_recipe
from embodied_rl.envs.mjcf import Config, build
from embodied_rl.envs.mjcf.scene import load_scene
from embodied_rl.errors import CapabilityError, ConfigError, NotFoundError
from embodied_rl.registry import load
from embodied_rl.session import Session
from embodied_rl.train import run
from embodied_rl.types import Sparing
from tests.kit import mlp

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2] / "examples" / "reacher"
SCENE, TASK = str(ROOT / "reacher.xml"), f"{ROOT / 'task.py'}:Reach"
SCENE_XML = (ROOT / "reacher.xml").read_text()


def make(copies=4, **settings):
    threads = {} if settings.get("physics") == "warp" else {"threads": 1}
    config = Config(**({"scene": SCENE, "task": TASK} | threads | settings))
    return build(config, num_envs=copies, device=CPU, split="train", seed=0)


def begin(env, first=0):
    b = env.spec.num_envs
    return env.reset(torch.ones(b, dtype=torch.bool), first + 2 * torch.arange(b), torch.arange(b) % len(env.spec.tasks))


def test_both_engines_move_the_example_alike_and_as_mujoco_alone_does():
    native, warp = make(), make(physics="warp")
    begin(native), begin(warp)
    data = mujoco.MjData(native.scene.model)
    data.qpos[:] = native.physics.qpos[0].double().numpy()
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        action = torch.rand(4, 2, generator=g) * 2 - 1
        a, b = native.step(action), warp.step(action)
        torch.testing.assert_close(a.obs, b.obs, atol=1e-4, rtol=0)
        torch.testing.assert_close(a.reward, b.reward, atol=1e-4, rtol=0)
        data.ctrl[:] = 0.1 * action[0].double().numpy()
        mujoco.mj_step(native.scene.model, data, 10)
        torch.testing.assert_close(a.obs["state"][0, :2], torch.from_numpy(data.qpos).sin().float(), atol=1e-4, rtol=0)
        mujoco.mj_kinematics(native.scene.model, data)
        torch.testing.assert_close(native.view().site("tip")[0], torch.from_numpy(data.site("tip").xpos).float(), atol=1e-4, rtol=0)


def test_the_instruction_says_which_ball_is_meant_and_the_reward_is_of_that_ball():
    env = make(copies=6)
    begin(env)
    view = env.view()
    for copy, text in enumerate(env.instructions()):
        ball = env.spec.tasks[copy % 2]
        assert ball in text
        distance = (view.body(ball)[copy] - view.site("tip")[copy]).norm()
        torch.testing.assert_close(env.task.reward(view)[copy], torch.exp(-10 * distance))
    assert env.spec.control_hz == pytest.approx(20) and env.spec.action.names == ("shoulder", "elbow")


def test_a_restored_copy_continues_bit_for_bit():
    env, other = make(), make()
    begin(env), begin(other, first=100)
    env.step(torch.full((4, 2), 0.4))
    obs = other.set_state(env.get_state())
    assert torch.equal(obs["state"], env.observe()["state"]) and other.instructions() == env.instructions()
    for _ in range(5):
        a, b = env.step(torch.full((4, 2), -0.7)), other.step(torch.full((4, 2), -0.7))
        assert torch.equal(a.obs["state"], b.obs["state"]) and torch.equal(a.reward, b.reward)


def test_the_camera_shows_the_marks_where_the_start_put_them():
    env = make(copies=2)
    begin(env)
    pictures = env.render(torch.tensor([0, 1]), "above", 64, 64).float()
    for copy, picture in enumerate(pictures):
        red = (picture[..., 0] - picture[..., 1] > 60).nonzero().float()
        assert len(red) > 3
        # 0.75 m above the table with 45 degrees: 64 pixels are 2 * 0.75 * tan(22.5 deg) = 0.621 m; rows go down, y up.
        x, y = (red.mean(0)[1] - 31.5) * 0.621 / 64, -(red.mean(0)[0] - 31.5) * 0.621 / 64
        assert (torch.stack([x, y]) - env.view().body("red")[copy, :2]).norm() < 0.03


def test_the_example_is_trained_for_a_few_updates():
    from embodied_rl.collect import Collector

    env = make(copies=8, max_steps=10)
    rollout = Collector([env], mlp(env.spec), decisions=20, generator=torch.Generator().manual_seed(0)).collect()
    assert rollout.truncated.sum() == 16 and rollout.constants["instruction"].shape[1] == 16


@pytest.mark.parametrize("physics", ["native", "warp"])
def test_a_policy_that_looks_sees_what_the_scene_has_become(physics):
    """Pictures are drawn for copies that have moved, alike on both engines, and are those that `render` draws."""
    env = make(copies=2, physics=physics, observation="pictures", picture_size=32)
    first = begin(env)
    assert first.keys() == {"above", "instruction", "proprio"} and first["above"].shape == (2, 32, 32, 3)
    for _ in range(10):
        step = env.step(torch.ones(2, 2), torch.tensor([True, False]))
        assert step.obs == {}, "shown on demand alone"
    now = env.observe()
    assert torch.equal(now["above"][1], first["above"][1]) and not torch.equal(now["above"][0], first["above"][0])
    view = env.view()
    torch.testing.assert_close(now["proprio"], torch.cat([view.qpos.sin(), view.qpos.cos(), 0.1 * view.qvel], 1).float())
    # Films have shadows and pictures none, so only the balls are compared: they are where the red is.
    for copy, film in enumerate(env.render(torch.tensor([0, 1]), "above", 32, 32)):
        seen, filmed = (((x[..., 0].int() - x[..., 1]) > 60).nonzero().float().mean(0) for x in (now["above"][copy], film))
        assert (seen - filmed).norm() < 1.0
    env.step(-torch.ones(2, 2))
    assert isinstance(env, Sparing)
    env.spare(torch.tensor([True, False]))
    later = env.observe()
    assert torch.equal(later["above"][0], now["above"][0]) and not torch.equal(later["above"][1], now["above"][1])
    other = make(copies=2, physics="warp" if physics == "native" else "native", observation="pictures", picture_size=32)
    apart = (begin(other)["above"].int() - first["above"].int()).abs().amax(-1) > 2
    assert apart.float().mean() < 0.01, "rounding may move an edge by a pixel"


LOOKING = {
    "env": {"observation": "pictures", "picture_size": 16, "max_steps": 8, "threads": 1},
    "collect": {"copies": 4, "decisions": 8},
    "train": {"env_steps": 64},
    "evaluate": {"episodes": 4, "copies": 4, "videos": 1},
    "log": {"tensorboard": False, "progress": False},
}


def test_ppo_trains_on_the_pictures_of_the_example(tmp_path):
    """A small policy that looks: every part of it learns, and a run evaluates and films it."""
    small = {"type": "tiny_vla_tokens", "bins": 5, "width": 16, "heads": 2, "layers": 1, "channels": 8, "glances": 2, "chunk": 1, "foresight": 0}
    env = LOOKING["env"] | {"type": "mjcf", "scene": SCENE, "task": TASK}
    ppo = {"type": "ppo", "update": {"epochs": 1, "minibatches": 1, "lr": 1e-3}}
    wanted = build_recipe(LOOKING | {"name": "looks", "env": env, "policy": small, "algorithm": ppo, "seed": 0})
    before = Session.build(wanted)
    weights = {name: p.detach().clone() for name, p in before.policy.named_parameters()}
    before.close()
    finished = run(wanted, folder=tmp_path / "run")
    after = checkpoint.load(checkpoint.latest(finished.folder / "checkpoints"))["policy"]
    still = [name for name, p in weights.items() if torch.equal(p, after[name])]
    assert still == [] and finished.reason == "finished" and finished.result.episodes == 4
    assert set(finished.result.manifest["frames"]) == {"red", "blue"} and "above" in finished.result.manifest["frames"]["red"]
    assert list((finished.folder / "videos").glob("*.mp4"))


def scene_without(old, new=""):
    assert old in SCENE_XML
    return SCENE_XML.replace(old, new)


@pytest.mark.parametrize(
    ("xml", "error", "message"),
    [
        ("<mujoco><worldbody><geom type='cube'/></worldbody></mujoco>", ConfigError, "is not valid: XML Error: .*cube"),
        ("<mujoco/>", CapabilityError, "has no actuator"),
        (scene_without('ctrllimited="true" ctrlrange="-0.1 0.1"'), CapabilityError, "actuator 'shoulder' has no ctrlrange"),
        (scene_without('<geom type="sphere"', '<geom contype="1" type="sphere"'), CapabilityError, "mocap body 'red' collides"),
        (scene_without('<motor name="elbow" joint="elbow"/>', '<general name="elbow" joint="elbow" ctrlrange="-1 1" dyntype="integrator" gainprm="1"/>'), CapabilityError, "state beyond positions and velocities"),
    ],
)  # fmt: skip
def test_a_scene_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, xml, error, message):
    (tmp_path / "scene.xml").write_text(xml)
    with pytest.raises(error, match=message) as told:
        load_scene(str(tmp_path / "scene.xml"))
    assert "\n" not in str(told.value)


def task_file(tmp_path, **methods):
    body = {
        "__init__": "def __init__(self, model): pass",
        "start": "def start(self, task, rng): return Start('go')",
        "observe": "def observe(self, view): return view.qpos",
        "reward": "def reward(self, view): return view.qpos[:, 0]",
        "success": "def success(self, view): return view.qpos[:, 0] > 1",
    } | methods
    lines = [f"    {line}" for line in body.values() if line]
    path = tmp_path / "own.py"
    path.write_text("\n".join(["import torch", "from embodied_rl.envs.mjcf import Start", "class Own:", *lines]))
    return f"{path}:Own"


@pytest.mark.parametrize(
    ("methods", "error", "message"),
    [
        ({"reward": ""}, ConfigError, "has no method reward; a task needs start, observe, reward, success"),
        ({"start": "def start(self, task, rng): return 'go'"}, ConfigError, "start returned str, expected embodied_rl.envs.mjcf.Start"),
        ({"start": "def start(self, task, rng): return Start('go', qpos=[1, float('nan')])"}, ConfigError, r"start's qpos is \[1, nan\], expected 2 finite numbers"),
        ({"start": "def start(self, task, rng): return Start('go', mocap={'rad': (0, 0, 0)})"}, ConfigError, "places 'rad', which is no mocap body; did you mean 'red'?"),
        ({"reward": "def reward(self, view): return view.qpos"}, ConfigError, r"reward returned torch.float32 \[4, 2\] for 4 copies, expected torch.float32 \[4\]"),
        ({"reward": "def reward(self, view): return view.qpos[:, 0] * float('nan')"}, ConfigError, "not finite at the start"),
        ({"success": "def success(self, view): return view.site('tipp')[:, 0] > 1"}, NotFoundError, "site 'tipp' does not exist; did you mean 'tip'?"),
        ({"success": "def success(self, view): return view.qpos[:, 0]"}, ConfigError, "success returned torch.float32"),
        ({"__init__": "def __init__(self): pass"}, ConfigError, "cannot be made of the scene's model: TypeError"),
    ],
)  # fmt: skip
def test_a_task_class_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, methods, error, message):
    with pytest.raises(error, match=message):
        make(task=task_file(tmp_path, **methods))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"scene": "nowhere.xml"}, NotFoundError, "scene 'nowhere.xml': no such file"),
        ({"task": "nowhere.py:Reach"}, NotFoundError, "nowhere.py': no such file"),
        ({"task": "no.such.module:Reach"}, NotFoundError, "there is no module 'no'"),
        ({"task": TASK.replace("Reach", "Raech")}, NotFoundError, "has no class 'Raech'; did you mean 'Reach'?"),
        ({"task": "reach"}, ConfigError, "expected file.py:Class"),
        ({"observation": "pictures", "cameras": ("abbove",)}, NotFoundError, "camera 'abbove' does not exist; did you mean 'above'?"),
    ],
)  # fmt: skip
def test_a_name_that_does_not_exist_is_told(settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings)


def test_settings_that_would_do_nothing_are_refused():
    for idle in ({"cameras": ("above",)}, {"physics": "native", "contacts": 5}, {"physics": "warp", "threads": 2}):
        with pytest.raises(ValueError, match="does nothing with"):
            load("env", "mjcf").Config(scene=SCENE, task=TASK, **idle)


def test_a_reward_that_is_not_finite_makes_its_episode_invalid_and_no_other(tmp_path):
    bad = "def reward(self, view): return torch.where(view.qpos[:, 0] > 0.01, float('nan'), 1.0) * torch.ones(4)"
    env = make(task=task_file(tmp_path, reward=bad))
    begin(env)
    push = torch.zeros(4, 2)
    push[2, 0] = 1.0
    for _ in range(5):
        step = env.step(push)
        if step.invalid.any():
            break
    assert step.invalid.tolist() == [False, False, True, False] and step.terminated.tolist() == step.invalid.tolist()
    assert step.reward.tolist() == [1, 1, 0, 1] and torch.isfinite(step.obs["state"]).all()
