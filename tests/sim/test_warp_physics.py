"""MuJoCo Warp as a physics engine: it agrees with the native one, resumes exactly and never loses contacts silently.

Tolerances of the comparison: Warp computes in float32 (7 digits), the native engine in float64. Free motion of the
arm is stable under its position control, so rounding does not build up: 1e-4 in observation units for 50 control
steps, several times the 3e-5 that was seen. Objects start exactly touching the table, where rounding decides whether
they touch at once or one physics step (0.1 m/s) later; after five control steps only the standing cylinder differs,
by some 1e-4 rad and mm/s, because Warp knows the direction of its tilt less well: 5e-3 in observation units.
"""

import subprocess
import sys

import mujoco_warp as mjw
import pytest
import torch

from embodied_rl.check import check_env
from embodied_rl.envs.tabletop import Config, build
from embodied_rl.envs.tabletop.physics import NativePhysics
from embodied_rl.envs.tabletop.scene import HOME, build_scene
from embodied_rl.envs.tabletop.warp_physics import WarpPhysics
from embodied_rl.envs.tabletop.warp_runtime import start_warp
from embodied_rl.errors import CapabilityError, CheckpointError, NotFoundError

CPU = torch.device("cpu")
SCENE = build_scene()
MODEL = SCENE.model
ALL = torch.ones(3, dtype=torch.bool)


def make(engine, copies=3, **settings):
    threads = {"threads": 1} if engine == "native" else {}
    config = Config(physics=engine, **threads, **settings)
    return build(config, num_envs=copies, device=CPU, split="train", seed=0)


def rest(copies=3, height=0.0):
    """Arm at home, gripper half open, objects in a row `height` metres above the table."""
    qpos = torch.from_numpy(MODEL.qpos0).repeat(copies, 1)
    qpos[:, SCENE.arm_qpos] = torch.from_numpy(HOME)
    qpos[:, SCENE.fingers_qpos] = 0.02
    for first in SCENE.objects_qpos:
        qpos[:, first + 2] += height
    return qpos


def hold(copies=3):
    ctrl = torch.zeros(copies, MODEL.nu)
    ctrl[:, :7] = torch.from_numpy(HOME)
    ctrl[:, 7:] = 0.02
    return ctrl


@pytest.fixture(scope="module")
def physics():
    return WarpPhysics(MODEL, 3, CPU)


@pytest.fixture
def at_rest(physics):
    physics.place(ALL, rest(), torch.zeros(3, MODEL.nv))
    return physics


def test_both_engines_give_the_same_observations_while_the_arm_moves_freely():
    native, warp = make("native"), make("warp")
    starts = (ALL, torch.tensor([2, 4, 6]), torch.arange(3))
    a, b = native.reset(*starts), warp.reset(*starts)
    assert all(torch.equal(a[name], b[name]) for name in a)
    generator = torch.Generator().manual_seed(0)
    for step in range(50):
        action = 2 * torch.rand(3, 7, generator=generator) - 1
        action[:, 2] = 0.3 * action[:, 2].abs()  # up, away from the objects
        a, b = native.step(action), warp.step(action)
        torch.testing.assert_close(a.obs["proprio"], b.obs["proprio"], rtol=0, atol=1e-4)
        torch.testing.assert_close(a.obs["goal"], b.obs["goal"], rtol=0, atol=1e-4)
        torch.testing.assert_close(a.obs["objects"], b.obs["objects"], rtol=0, atol=5e-3 if step >= 5 else 5e-2)
        torch.testing.assert_close(a.reward, b.reward, rtol=0, atol=1e-5 if step >= 5 else 1e-3)
    moved = (native.physics.qpos - rest().float())[:, SCENE.arm_qpos].abs().amax(dim=1)
    assert bool((moved > 0.2).all()), "the arm must have moved for the comparison to mean something"
    native.close()


def test_dropped_objects_come_to_rest_at_the_same_places_on_both_engines(physics):
    native = NativePhysics(MODEL, 3, 1)
    for engine in (native, physics):
        engine.place(ALL, rest(height=0.03), torch.zeros(3, MODEL.nv))
        for _ in range(12):
            engine.step(hold(), SCENE.substeps)
    for first, velocity in zip(SCENE.objects_qpos, SCENE.objects_qvel, strict=True):
        a, b = native.qpos[:, first : first + 3], physics.qpos[:, first : first + 3]
        assert bool((a[:, 2] < MODEL.qpos0[first + 2]).all()), "the object must have landed"
        torch.testing.assert_close(a, b, rtol=0, atol=5e-4)  # metres
        assert bool((physics.qvel[:, velocity : velocity + 3].abs() < 5e-3).all())
    native.close()


def lifted_by_hand(engine):
    """Slot of the object meant, success, and its height after each control step [40, 3], for one fixed hand motion."""
    env = make(engine, tasks=["lift"])
    env.reset(ALL, torch.tensor([2, 6, 0]), torch.zeros(3, dtype=torch.int64))
    copies, slots, heights = torch.arange(3), env.episode.a.clone(), []
    for step in range(40):
        place = env.object_poses()[copies, slots, :3].clone()
        if step < 12:
            place[:, 2] = 0.12  # above it; then down, close the gripper, and up
        if step >= 30:
            place[:, 2] = 0.2
        action = torch.zeros(3, 7)
        action[:, :3] = ((place - env.controller.position) / 0.02).clamp(-1, 1)
        action[:, 6] = 1.0 if step < 24 else -1.0
        success = env.step(action).success
        heights.append(env.object_poses()[copies, slots, 2].clone())
    env.close()
    return slots, success, torch.stack(heights)


def test_the_gripper_lifts_every_shape_alike_on_both_engines():
    slots, native_success, native = lifted_by_hand("native")
    _, warp_success, warp = lifted_by_hand("warp")
    assert sorted(slots.tolist()) == [0, 1, 2]
    assert bool(native_success.all()) and bool(warp_success.all())
    torch.testing.assert_close(native, warp, rtol=0, atol=2e-3)  # metres; 3e-4 was seen


def test_a_restored_state_continues_bit_for_bit_on_the_cpu(at_rest):
    physics, ctrl = at_rest, hold()
    ctrl[:, 0] += torch.tensor([0.1, -0.2, 0.3])
    for _ in range(2):
        physics.step(ctrl, SCENE.substeps)
    saved = physics.get_state()
    kept = saved["warp"].clone()
    after = []
    for _ in range(2):
        for _ in range(3):
            physics.step(ctrl, SCENE.substeps)
        after.append(physics.get_state()["warp"])
        assert torch.equal(saved["warp"], kept), "a saved state must not change when the engine goes on"
        physics.set_state(saved)
    assert torch.equal(after[0], after[1]) and not torch.equal(after[0], kept)


def test_placing_some_copies_leaves_the_others_alone(at_rest):
    physics = at_rest
    physics.step(hold(), SCENE.substeps)
    before = physics.get_state()["warp"]
    physics.place(torch.tensor([False, True, False]), rest(height=0.5), torch.full((3, MODEL.nv), 0.25))
    assert torch.equal(physics.get_state()["warp"][[0, 2]], before[[0, 2]])
    assert torch.equal(physics.qpos[1], rest(height=0.5)[1].float()) and bool((physics.qvel[1] == 0.25).all())


def test_a_copy_that_blows_up_is_put_back_to_rest_and_the_others_never_notice(at_rest):
    physics = at_rest
    physics.step(hold(), SCENE.substeps)
    undisturbed = physics.get_state()["warp"]
    physics.place(ALL, rest(), torch.zeros(3, MODEL.nv))
    velocity = torch.zeros(3, MODEL.nv)
    velocity[1] = 1e20
    physics.place(torch.tensor([False, True, False]), rest(), velocity)
    with pytest.warns(RuntimeWarning, match=r"copies \[1\] became unstable and were put back to rest"):
        physics.step(hold(), SCENE.substeps)
    assert physics.burst.tolist() == [False, True, False]
    assert torch.equal(physics.qpos[1], rest()[1].float()) and bool((physics.qvel[1] == 0).all())
    assert torch.equal(physics.get_state()["warp"][[0, 2]], undisturbed[[0, 2]])
    physics.step(hold(), SCENE.substeps)
    assert torch.equal(physics.get_state()["warp"][1], undisturbed[1]), "it goes on as if newly placed"


@pytest.mark.parametrize(
    ("room", "found"),
    [
        ({"contacts": 8}, "8 contacts and 256 constraint rows per copy"),
        ({"constraint_rows": 16}, "64 contacts and 16 constraint rows per copy"),
    ],
)
def test_too_many_contacts_are_an_error_and_never_dropped_in_silence(room, found):
    env = make("warp", copies=1, **room)
    env.reset(ALL[:1], torch.tensor([2]), torch.tensor([0]))
    with pytest.raises(CapabilityError, match=rf"copies \[0\] had more contacts than there is room for.*room for {found}"):
        for _ in range(3):  # three objects at rest touch the table in eleven points
            env.step(torch.zeros(1, 7))


def test_room_for_more_contacts_is_room_for_more_of_every_kind():
    assert WarpPhysics(MODEL, 2, CPU)._data.naccdmax == 2 * 32
    assert WarpPhysics(MODEL, 2, CPU, contacts=200)._data.naccdmax == 2 * 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"physics": "warp", "threads": 2}, r"threads \(2\) does nothing with physics \(warp\) and observation \(state\)"),
        ({"physics": "native", "contacts": 5}, r"contacts \(5\) does nothing with physics \(native\)"),
        ({"physics": "native", "constraint_rows": 5}, r"constraint_rows \(5\) does nothing with physics \(native\)"),
    ],
)
def test_what_the_engine_never_reads_is_refused(settings, message):
    with pytest.raises(ValueError, match=f"{message}: remove it, or change the other"):
        Config(**settings)


def test_a_state_of_the_native_engine_is_refused(physics):
    native = NativePhysics(MODEL, 3, 1)
    with pytest.raises(CheckpointError) as caught:
        physics.set_state(native.get_state())
    assert str(caught.value) == (
        f"physics state: found entries ['native'], expected 'warp' of shape [3, {MODEL.nq + MODEL.nv}]; "
        "restore it with the same physics engine and number of copies"
    )
    native.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that must not be there")
def test_a_device_that_warp_cannot_use_is_named():
    with pytest.raises(NotFoundError, match=r"device 'cuda:0': MuJoCo Warp cannot use it .*; it sees cpu;"):
        start_warp(torch.device("cuda:0"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_steps_on_cuda_agree_with_plain_steps_on_the_cpu(at_rest):
    cuda = WarpPhysics(MODEL, 3, torch.device("cuda:0"))
    cuda.place(ALL.cuda(), rest().cuda(), torch.zeros(3, MODEL.nv).cuda())
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ctrl = hold()
        ctrl[:, :7] += 0.1 * torch.randn(3, 7, generator=generator)
        at_rest.step(ctrl, SCENE.substeps)
        cuda.step(ctrl.cuda(), SCENE.substeps)
    assert cuda.qpos.device.type == "cuda"
    torch.testing.assert_close(cuda.qpos.cpu()[:, SCENE.arm_qpos], at_rest.qpos[:, SCENE.arm_qpos], rtol=0, atol=1e-4)
    cuda.get_state()  # looks at the overflow flags


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("observation", ["state", "pictures"])
def test_the_env_keeps_the_contract_on_cuda(observation, monkeypatch):
    """Threads add up in no fixed order there; with Warp's option for one, everything repeats bit for bit."""
    put_model = mjw.put_model

    def in_fixed_order(model):
        made = put_model(model)
        made.opt.deterministic = mjw.DeterminismType.ALL
        return made

    monkeypatch.setattr(mjw, "put_model", in_fixed_order)
    settings = ["physics=warp", "max_steps=6", f"observation={observation}"]
    findings = check_env("tabletop", settings, copies=3, device="cuda:0")
    assert [f"{f.name}: {f.detail}" for f in findings if f.ok is False] == []


COMPILES_TWO_KERNELS = """
import logging, sys
import torch, warp as wp
from embodied_rl.envs.tabletop.warp_runtime import start_warp

@wp.kernel(module="unique")
def first(x: wp.array(dtype=float)):
    x[wp.tid()] = 1.0

@wp.kernel(module="unique")
def second(x: wp.array(dtype=float)):
    x[wp.tid()] = 2.0

logging.basicConfig(level=logging.INFO, format="%(message)s")
with wp.ScopedDevice(start_warp(torch.device("cpu"))):
    x = wp.zeros(3, dtype=float)
    wp.launch(first, dim=3, inputs=[x])
    wp.launch(second, dim=3, inputs=[x])
    assert wp.to_torch(x).tolist() == [2.0, 2.0, 2.0]
"""


def test_warp_announces_its_first_compilation_once_and_prints_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("WARP_CACHE_PATH", str(tmp_path / "cache"))
    script = tmp_path / "compiles_two_kernels.py"
    script.write_text(COMPILES_TWO_KERNELS)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert run.stdout == ""
    [line] = run.stderr.splitlines()
    assert line.startswith("MuJoCo Warp is compiling its kernels for this machine") and str(tmp_path / "cache") in line
