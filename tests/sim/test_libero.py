"""LIBERO for real, in the environment that `embodied-rl sim install libero` makes; needs EGL and LIBERO_ASSETS."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from embodied_rl import registry, sims
from embodied_rl.check import check_env
from embodied_rl.cli import main
from embodied_rl.config import build_recipe
from embodied_rl.envs._words import word_id
from embodied_rl.errors import SimulatorError
from embodied_rl.train import run as train
from tests.kit import CPU

pytestmark = [
    pytest.mark.sim,
    pytest.mark.skipif("LIBERO_ASSETS" not in os.environ, reason="LIBERO_ASSETS names no folder of LIBERO's assets"),
]
LIBERO = registry.load("env", "libero")
SIMULATOR = Path(LIBERO.__file__).with_name("simulator.py")
BOWL = "libero_goal/put_the_bowl_on_the_plate"
DRAWER = "libero_goal/open_the_middle_drawer_of_the_cabinet"
NEXT = "libero_spatial/pick_up_the_black_bowl_next_to_the_plate_and_place_it_on_the_plate"
SIDE = 64
SMALL = {"render": SIDE, "picture": SIDE}

PLAIN = """
import os, pickle, sys, tempfile, zipfile
import numpy as np
assets, suite, task, row, seed, out, side = sys.argv[1:]
home = os.environ["LIBERO_CONFIG_PATH"] = tempfile.mkdtemp()
open(home + "/config.yaml", "w").write("{}")
import libero.libero as L
L._assets_path_cache = assets
from libero.libero.envs import OffScreenRenderEnv
folder = os.path.dirname(L.__file__)
bddl = f"{folder}/bddl_files/{suite}/{task}.bddl"
env = OffScreenRenderEnv(bddl_file_name=bddl, camera_heights=int(side), camera_widths=int(side))
env.seed(int(seed))
env.reset()
with zipfile.ZipFile(f"{folder}/init_files/{suite}/{task}.pruned_init") as file:
    states = pickle.loads(file.read(next(n for n in file.namelist() if n.endswith("data.pkl"))))
obs = env.set_init_state(states[int(row)])
for _ in range(10):
    obs, *_ = env.step([0, 0, 0, 0, 0, 0, -1])
rng, seen = np.random.default_rng(0), []
for _ in range(5):
    seen.append(obs)
    obs, *_ = env.step(rng.uniform(-1, 1, 7).astype(np.float32).astype(float))
names = ["agentview_image", "robot0_eye_in_hand_image", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"]
np.savez(out, states=states, **{name: np.stack([o[name] for o in seen]) for name in names})
"""
"""LIBERO as evaluation scripts use it, without anything of ours."""

PREPARE = """
import io
from PIL import Image
def prepare(picture):
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture[::-1, ::-1])).save(file, "JPEG", quality=95)
    small = Image.open(file).convert("RGB").resize((224, 224), Image.Resampling.LANCZOS)
    edge = 224 * (1 - 0.9 ** 0.5) / 2
    return np.asarray(small.resize((224, 224), Image.Resampling.BILINEAR, box=(edge, edge, 224 - edge, 224 - edge)))
np.savez(out, **{name: prepare(seen[0][name]) for name in names[:2]})
"""
"""The first pictures as OpenVLA-OFT prepares them: upright, through JPEG, to 224, and nine tenths of the area."""


@pytest.fixture(scope="module")
def python():
    return sims.install("libero").python


@pytest.fixture(scope="module")
def env(python, tmp_path_factory):
    """One task of each of two suites, in one process, by openpi's protocol with small pictures."""
    config = LIBERO.Config(tasks=(BOWL, NEXT), states="each", protocol="openpi", change=LIBERO.Changes(**SMALL), workers=1)
    env = LIBERO.build(config, num_envs=2, device=CPU, split="eval", seed=0)
    yield env
    env.close()


def start(env, tasks, seeds=(1, 3)):
    return env.reset(torch.ones(2, dtype=torch.bool), torch.tensor(seeds), torch.tensor(tasks))


def run(python, code, *args):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "script.py"
        file.write_text(code)
        variables = os.environ | {"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl", "LP_NUM_THREADS": "1"}
        done = subprocess.run([python, file, *args], env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(("number", "name"), [(0, BOWL), (1, NEXT)])
def test_what_is_seen_is_libero_bit_for_bit(env, python, tmp_path, number, name):
    run(python, PLAIN, os.environ["LIBERO_ASSETS"], *name.split("/"), "3", "7", str(tmp_path / "plain.npz"), "64")
    plain = np.load(tmp_path / "plain.npz")
    for attempt in range(2):  # a scene that is used again is as good as new
        rng, seen = np.random.default_rng(0), start(env, [2 * 3 + number] * 2, seeds=(1 + 2 * attempt, 5))
        for t in range(5):
            for ours, theirs in (("agentview", "agentview_image"), ("wrist", "robot0_eye_in_hand_image")):
                assert np.array_equal(seen[ours][attempt].numpy(), plain[theirs][t][::-1, ::-1]), (attempt, t, ours)
            proprio = seen["proprio"][attempt].numpy()
            assert np.array_equal(proprio[:3], plain["robot0_eef_pos"][t].astype(np.float32))
            assert np.array_equal(proprio[6:], plain["robot0_gripper_qpos"][t].astype(np.float32))
            env.step(torch.from_numpy(rng.uniform(-1, 1, 7).astype(np.float32)).expand(2, 7).contiguous())
            seen = env.observe()


def test_a_picture_of_full_size_is_prepared_as_the_protocol_says(python, tmp_path):
    run(python, PLAIN + PREPARE, os.environ["LIBERO_ASSETS"], *BOWL.split("/"), "3", "0", str(tmp_path / "prepared.npz"), "256")
    prepared = np.load(tmp_path / "prepared.npz")
    config = LIBERO.Config(tasks=(BOWL,), states="each", protocol="openvla-oft", workers=1)
    env = LIBERO.build(config, num_envs=1, device=CPU, split="eval", seed=0)
    try:
        seen = env.reset(torch.ones(1, dtype=torch.bool), torch.ones(1).long(), torch.full((1,), 3))
    finally:
        env.close()
    for ours, theirs in (("agentview", "agentview_image"), ("wrist", "robot0_eye_in_hand_image")):
        assert np.array_equal(seen[ours][0].numpy(), prepared[theirs]) and prepared[theirs].std() > 20, ours


def test_a_turn_is_about_an_axis_of_the_base_and_by_the_right_hand_rule(env):
    """The hand looks down: in its own frame the same number would turn it the other way about the vertical."""
    told = env.spec.action.convention
    assert (told.control, told.frame, told.rotation) == ("ee_delta", "base", "axis_angle")
    for axis in range(3):
        before = Rotation.from_rotvec(start(env, [0, 0])["proprio"][:, 3:6].numpy())
        action = torch.zeros(2, 7)
        action[:, 3 + axis] = torch.tensor([1.0, -1.0])
        for _ in range(4):
            env.step(action)
        turn = (Rotation.from_rotvec(env.observe()["proprio"][:, 3:6].numpy()) * before.inv()).as_rotvec()
        # From rest the soft controller makes a tenth to a sixth of them.
        shares = turn[:, axis] / (4 * told.radians) * np.array([1, -1])
        assert bool(((shares > 0.05) & (shares < 0.4)).all()), (axis, shares)
        assert np.abs(np.delete(turn, axis, axis=1)).max() < 0.06, axis


def test_tasks_words_and_limits_are_those_of_the_suites(env):
    obs = start(env, [14, 21])
    assert env.spec.tasks[14] == f"{BOWL}#07" and env.spec.tasks[21] == f"{NEXT}#10" and len(env.spec.tasks) == 100
    assert env.instructions() == ["put the bowl on the plate", "pick up the black bowl next to the plate and place it on the plate"]
    assert obs["instruction"][0, :7].tolist() == [*map(word_id, "put the bowl on the plate".split()), 0]
    assert env.spec.max_steps == 300 and env.spec.control_hz == 20


def test_an_episode_of_a_suite_ends_at_its_own_limit(python, monkeypatch):
    monkeypatch.setitem(LIBERO.PROTOCOLS["openvla-oft"], "steps", {"libero_goal": 5, "libero_spatial": 3})
    config = LIBERO.Config(tasks=(BOWL, NEXT), change=LIBERO.Changes(**SMALL, settle=0), workers=1)
    env = LIBERO.build(config, num_envs=2, device=CPU, split="train", seed=0)
    try:
        start(env, [0, 1], seeds=(0, 2))
        ends = [env.step(torch.zeros(2, 7)).truncated.tolist() for _ in range(6)]
        assert [[row[copy] for row in ends].index(True) + 1 for copy in (0, 1)] == [5, 3]
        assert sum(map(sum, ends)) == 2 and env.spec.max_steps == 5
    finally:
        env.close()


def test_it_keeps_the_contract(python):
    small = [f"change.{name}={SIDE}" for name in SMALL]
    settings = [f"tasks=[{BOWL}, {NEXT}]", *small, "change.settle=2", "max_steps=6", "workers=1"]
    findings = check_env("libero", settings, copies=2, steps=12)
    assert [f"{f.name}: {f.detail}" for f in findings if f.ok is False] == []
    assert sum(f.ok is True for f in findings) >= 18


def test_it_runs_in_this_python_where_libero_is_installed_beside_the_engine(python, monkeypatch, caplog):
    """The published evaluation, but for the size of what is drawn, which is told."""
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sims, "interpreter", None)  # that of `sim install` is not asked for
    config = LIBERO.Config(tasks=(BOWL,), states="each", change=LIBERO.Changes(**SMALL), workers=1, isolated=False)
    with caplog.at_level(logging.INFO):
        env = LIBERO.build(config, num_envs=1, device=CPU, split="eval", seed=0)
    try:
        assert "50 initial states (env.states: each, evaluate.episodes: 50); this evaluation departs from it in" in caplog.text
        assert env.reset(torch.ones(1, dtype=torch.bool), torch.ones(1).long(), torch.ones(1).long())["wrist"].shape[1:] == (SIDE, SIDE, 3)
        told = env.manifest()["protocol"]
        assert told["departures"] == f"env.change.render: {SIDE}, env.change.picture: {SIDE}" and told["trials"] == 50
        assert env.foreign.python == python and env.foreign.versions == {}
    finally:
        env.close()


def test_a_start_depends_on_seed_and_task_alone_and_a_state_is_restored_bit_for_bit(env):
    def differ(a, b):
        return [name for name in a if not torch.equal(a[name], b[name])]

    first = start(env, [10, 11])
    for _ in range(3):
        env.step(torch.full((2, 7), 0.5))
    seen, state = env.observe(), env.get_state()
    assert differ(seen, first)
    ahead = [env.step(torch.full((2, 7), -0.5)), env.observe()][1]
    swapped = start(env, [11, 10])
    assert all(torch.equal(swapped[name].flip(0), x) for name, x in first.items())
    assert not differ(env.set_state(state), seen)
    env.step(torch.full((2, 7), -0.5))
    assert not differ(env.observe(), ahead)


@pytest.mark.parametrize(("hand", "open_"), [("open_low", -0.4), ("open_high", 0.4), ("open_high_binary", 0.1)])
def test_the_gripper_is_told_by_the_convention(python, hand, open_):
    config = LIBERO.Config(tasks=(BOWL,), change=LIBERO.Changes(**SMALL, hand=hand), workers=1, states="published")
    env = LIBERO.build(config, num_envs=2, device=CPU, split="eval", seed=0)
    try:
        start(env, [0, 0])
        action = torch.zeros(2, 7)
        action[:, 6] = torch.tensor([open_, -open_])
        for _ in range(20):
            env.step(action)
        wide, tight = (env.observe()["proprio"][:, 6] - env.observe()["proprio"][:, 7]).tolist()
        assert wide > 0.07 and tight < 0.02, "metres between the fingers"
        told = env.spec.action.convention
        assert told.gripper == ("opens_at_plus" if open_ > 0 else "closes_at_plus")
        # Four control steps of 0.05 m along the base's x; from rest the soft controller makes a sixth of them.
        before = env.observe()["proprio"][0, :3].clone()
        action[:, 0] = 1.0
        for _ in range(4):
            env.step(action)
        moved = env.observe()["proprio"][0, :3] - before
        assert 0.1 < float(moved[0]) / (4 * told.metres) < 1.0 and float(moved[1:].abs().max()) < 0.03
    finally:
        env.close()


def test_success_pays_one_and_ends_the_episode(python):
    code = f"""
import importlib.util, json, sys
found = importlib.util.spec_from_file_location("simulator", {str(SIMULATOR)!r})
module = importlib.util.module_from_spec(found); found.loader.exec_module(module)
import numpy as np
copy = module.Simulator(json.loads(sys.argv[1]))
copy.reset(1, 0)
print(copy.step(np.zeros(7, np.float32))[1:])
copy.scene.env.sim.data.set_joint_qpos("wooden_cabinet_1_middle_level", -0.16)
print(copy.step(np.zeros(7, np.float32))[1:])
"""
    protocol = LIBERO.Config(change=LIBERO.Changes(**SMALL)).in_force()
    settings = {"protocol": protocol, "states": "published", "tasks": [DRAWER], "assets": os.environ["LIBERO_ASSETS"]}
    said = run(python, code, json.dumps(settings)).splitlines()
    assert said[-2:] == ["(0.0, False, False, {'success': False})", "(1.0, True, False, {'success': True})"]


def test_tasks_and_instructions_are_those_of_liberos_own_benchmarks(python):
    """Its benchmark imports torch, which only its learning needs and the environment lacks."""
    code = f"""
import importlib.util, json, sys, types
found = importlib.util.spec_from_file_location("simulator", {str(SIMULATOR)!r})
module = importlib.util.module_from_spec(found); found.loader.exec_module(module)
module.prepare(sys.argv[1])
sys.modules["torch"] = types.ModuleType("torch")
from libero.libero import benchmark
theirs = {{s: {{f"{{s}}/{{t.name}}": t.language for t in benchmark.get_benchmark(s)().tasks}} for s in module.SUITES}}
print(json.dumps([theirs, {{name: module.language(name) for name in module.task_names()}}]))
"""
    theirs, ours = json.loads(run(python, code, os.environ["LIBERO_ASSETS"]).splitlines()[-1])
    assert [len(tasks) for tasks in theirs.values()] == [10, 10, 10, 10, 90]
    joined = {name: text for tasks in theirs.values() for name, text in tasks.items()}
    assert list(ours.items()) == list(joined.items())


def test_the_initial_states_are_read_without_unpickling(python, tmp_path):
    code = f"""
import importlib.util, pickle, zipfile
import numpy as np
found = importlib.util.spec_from_file_location("simulator", {str(SIMULATOR)!r})
module = importlib.util.module_from_spec(found); found.loader.exec_module(module)
names = module.task_names()
for name in names:
    with zipfile.ZipFile(f"{{module.locate()}}/init_files/{{name}}.pruned_init") as file:
        truth = pickle.loads(file.read(next(n for n in file.namelist() if n.endswith("data.pkl"))))
    assert np.array_equal(module.initial_states(name), truth) and len(truth) == 50, name
print(len(names), sum(len(module.language(name).split()) > module.WORDS for name in names))
"""
    assert run(python, code).split() == ["130", "0"]


# ---- a policy from its first update to the published evaluation ----------------------------------------------------

RECIPE = {
    "name": "looks",
    "env": {"type": "libero", "tasks": [BOWL, NEXT], "protocol": "openpi", "change": SMALL, "max_steps": 6, "workers": 1},
    "policy": {
        "type": "tiny_vla_tokens", "bins": 5, "width": 16, "heads": 2, "layers": 1, "channels": 8, "glances": 2, "chunk": 3,
        "foresight": 0,
    },
    "algorithm": {"type": "ppo", "update": {"epochs": 1, "minibatches": 1}},
    "collect": {"copies": 2, "decisions": 2},
    "train": {"env_steps": 24},
    "evaluate": {"episodes": 2, "copies": 2, "videos": 0},
    "log": {"tensorboard": False, "progress": False},
}  # fmt: skip
PAGE = Path(__file__).resolve().parents[2] / "docs" / "simulators.md"


def test_a_policy_is_trained_and_evaluated_and_then_as_published(python, tmp_path):
    finished = train(build_recipe(RECIPE), folder=tmp_path / "looks")
    rows = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["progress/env_steps"] for row in rows] == [12, 24] and finished.reason == "finished"
    own = finished.result
    assert own.length.tolist() == [6, 6] and own.tasks == (BOWL, NEXT) and own.valid.all()
    told, frames = own.manifest["env"], own.manifest["frames"]
    assert told["protocol"]["name"] == "openpi" and told["states"] == "heldout"
    assert told["protocol"]["departures"].startswith("env.states: heldout, env.change.render: 64")
    assert told["packages"]["mujoco"] == "3.3.2" and told["packages"]["robosuite"] == "1.4.0"
    assert re.fullmatch("[0-9a-f]{64}", told["assets"])
    assert set(frames) == {BOWL, NEXT} and frames[BOWL].keys() == {"seed", "agentview", "wrist", "proprio", "instruction"}

    (line,) = re.findall(r"^embodied-rl (evaluate runs/a .*)$", PAGE.read_text().split("## LIBERO")[1], re.MULTILINE)
    command = line.replace("runs/a", str(finished.folder)).replace("--episodes 500 --copies 10", "--episodes 2 --copies 2")
    assert command != line and main(command.split()) == 0
    (file,) = (finished.folder / "evaluations").iterdir()
    stored = json.loads(file.read_text())
    assert [episode["task"] for episode in stored["episodes"]] == [f"{BOWL}#00", f"{NEXT}#00"]
    published, frames_then = stored["manifest"]["env"], stored["manifest"]["frames"]
    assert published["states"] == "each" and published["assets"] == told["assets"]
    assert published["protocol"]["chunk"] == 5 and stored["manifest"]["policy"]["departures"] == "policy.chunk: 3"
    assert published["protocol"]["departures"] == "env.change.render: 64, env.change.picture: 64, env.max_steps: 6"
    assert frames_then[f"{BOWL}#00"]["instruction"] == frames[BOWL]["instruction"]
    assert frames_then[f"{BOWL}#00"]["proprio"] != frames[BOWL]["proprio"], "it starts where training may, the other does not"


# ---- what can be missing ------------------------------------------------------------------------------------------


def refused(monkeypatch, tmp_path, **config):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SimulatorError) as caught:
        LIBERO.build(LIBERO.Config(**{"tasks": (BOWL,), "workers": 1} | config), num_envs=1, device=CPU, split="train", seed=0)
    return str(caught.value)


def test_a_task_that_does_not_exist_names_the_nearest(python, monkeypatch, tmp_path):
    assert refused(monkeypatch, tmp_path, tasks=("libero_goal/put_the_bowl_on_the_plates",)) == (
        f"env libero: task 'libero_goal/put_the_bowl_on_the_plates' does not exist; did you mean '{BOWL}'?"
    )
    assert "did you mean 'libero_spatial'?" in refused(monkeypatch, tmp_path, tasks=("libero_spacial",))
    assert "name one twice" in refused(monkeypatch, tmp_path, tasks=("libero_goal", BOWL))


def test_without_egl_the_packages_to_install_are_named(python, monkeypatch, tmp_path):
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_DIRS", str(tmp_path))
    message = refused(monkeypatch, tmp_path)
    assert message.startswith("env libero: LIBERO draws with EGL, and that does not work here (") and "libegl1" in message


def test_a_missing_asset_is_named(python, monkeypatch, tmp_path):
    given = Path(os.environ["LIBERO_ASSETS"])
    for folder in given.iterdir():
        if folder.name != "stable_scanned_objects":
            (tmp_path / folder.name).symlink_to(folder)
    shutil.copytree(given / "stable_scanned_objects", tmp_path / "stable_scanned_objects")
    shutil.rmtree(tmp_path / "stable_scanned_objects" / "plate")
    message = refused(monkeypatch, tmp_path, assets=str(tmp_path))
    assert message.startswith(f"env libero: an asset of '{BOWL}' is missing (") and "plate" in message
