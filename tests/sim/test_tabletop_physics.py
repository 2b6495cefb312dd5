"""The scene on the native engine: grasps hold, threads do not matter, and damage is contained."""

import mujoco
import numpy as np
import pytest
import torch

from embodied_rl.envs.tabletop import Config, build
from embodied_rl.envs.tabletop.physics import NativePhysics
from embodied_rl.envs.tabletop.scene import HOME, TIMESTEP, build_scene
from embodied_rl.errors import CheckpointError
from embodied_rl.seeding import start_seeds


@pytest.fixture(scope="module")
def scene():
    return build_scene()


def at_home(scene, copies, threads=1):
    physics = NativePhysics(scene.model, copies, threads)
    qpos = torch.from_numpy(scene.model.qpos0).repeat(copies, 1)
    qpos[:, scene.arm_qpos] = torch.from_numpy(HOME)
    physics.place(torch.ones(copies, dtype=torch.bool), qpos, torch.zeros(copies, scene.model.nv))
    return physics


def controls(copies, steps):
    generator = torch.Generator().manual_seed(0)
    rest = torch.cat([torch.from_numpy(HOME).float(), torch.full((2,), 0.02)])
    return [rest + 0.1 * torch.randn(copies, 9, generator=generator) for _ in range(steps)]


def test_the_number_of_threads_changes_no_bit(scene):
    states = []
    for threads in (1, 2, 3):
        physics = at_home(scene, 5, threads)
        for ctrl in controls(5, 6):
            physics.step(ctrl, scene.substeps)
        states.append(physics.get_state()["native"])
        physics.close()
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_one_control_step_equals_its_physics_steps_by_hand(scene):
    physics = at_home(scene, 1)
    data = mujoco.MjData(scene.model)
    data.qpos[:] = physics.get_state()["native"][0, 1 : 1 + scene.model.nq].numpy()
    ctrl = controls(1, 1)[0]
    data.ctrl[:] = ctrl[0].numpy()
    physics.step(ctrl, 5)
    for _ in range(5):
        mujoco.mj_step(scene.model, data)
    assert np.array_equal(physics.get_state()["native"][0, 1 : 1 + scene.model.nq].numpy(), data.qpos)
    assert float(physics.get_state()["native"][0, 0]) == pytest.approx(5 * TIMESTEP) == pytest.approx(1 / 20)
    physics.close()


def test_placing_some_copies_leaves_the_others(scene):
    physics = at_home(scene, 3)
    physics.step(controls(3, 1)[0], 5)
    before = physics.get_state()["native"]
    physics.place(torch.tensor([False, True, False]), torch.zeros(3, 31), torch.ones(3, 28))
    after = physics.get_state()["native"]
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert bool((after[1, :32] == 0).all()) and bool((after[1, 32:] == 1).all())
    physics.close()


def test_a_copy_that_blows_up_is_put_back_to_rest_and_said(scene):
    physics = at_home(scene, 3)
    qpos = physics.qpos.clone()
    wild = torch.zeros(3, scene.model.nv)
    wild[1] = 1e12
    physics.place(torch.tensor([False, True, False]), qpos, wild)
    with pytest.warns(RuntimeWarning, match=r"copies \[1\] became unstable"):
        physics.step(controls(3, 1)[0], 5)
    assert physics.burst.tolist() == [False, True, False]
    assert torch.equal(physics.qpos[1], qpos[1]) and bool((physics.qvel[1] == 0).all())
    assert not torch.equal(physics.qpos[0], qpos[0])
    physics.step(controls(3, 1)[0], 5)
    assert not physics.burst.any()
    physics.close()


def test_an_episode_whose_physics_blew_up_counts_for_nothing():
    env = build(Config(tasks=["reach"], threads=1), num_envs=3, device=torch.device("cpu"), split="train", seed=0)
    everyone = torch.ones(3, dtype=torch.bool)
    env.reset(everyone, torch.tensor([2, 4, 6]), torch.zeros(3, dtype=torch.int64))
    assert not env.step(torch.zeros(3, 7)).invalid.any()
    wild = torch.zeros(3, env.scene.model.nv)
    wild[1] = 1e12
    env.physics.place(torch.tensor([False, True, False]), env.physics.qpos.clone(), wild)
    with pytest.warns(RuntimeWarning, match=r"copies \[1\] became unstable"):
        step = env.step(torch.zeros(3, 7))
    told = step.invalid
    assert told.tolist() == step.terminated.tolist() == [False, True, False] and not step.success[1]
    assert not env.step(torch.zeros(3, 7)).invalid.any() and told.tolist() == [False, True, False], "told once, for good"
    env.close()


def test_a_foreign_state_is_refused(scene):
    physics = at_home(scene, 2)
    with pytest.raises(CheckpointError, match=r"found shape \[3, 60\], expected 'native' of shape \[2, 60\]"):
        physics.set_state({"native": torch.zeros(3, 60)})
    with pytest.raises(CheckpointError, match=r"found entries \['warp'\]"):
        physics.set_state({"warp": torch.zeros(2, 60)})
    physics.close()


def test_every_shape_can_be_grasped_lifted_and_shaken_through_the_action_interface():
    """Guards the contact settings: with strongly damped joints under an implicit integrator objects crept out."""
    copies = 24
    env = build(Config(tasks=["lift"], threads=2, max_steps=100), num_envs=copies, device=torch.device("cpu"),
                split="train", seed=0)  # fmt: skip
    index = torch.arange(copies)
    env.reset(torch.ones(copies, dtype=torch.bool), start_seeds(0, "train", index, 0 * index), 0 * index)
    assert set(env.episode.a.tolist()) == {0, 1, 2}
    generator = torch.Generator().manual_seed(0)
    held = []
    for t in range(80):
        view = env.view()
        target = view.a_position.clone()
        if t < 14:
            target[:, 2] += 0.08
        if t >= 29:
            target = env.controller.position.clone()
            target[:, 2] = 0.2
        pose = env.object_poses()[index, env.episode.a]
        turn = 2 * torch.atan2(pose[:, 6], pose[:, 3])
        turn -= torch.atan2(env.controller.rotation[:, 1, 0], env.controller.rotation[:, 0, 0])
        action = torch.zeros(copies, 7)
        action[:, :3] = (target - env.controller.position) / 0.02
        action[:, 5] = turn / 0.1 * (t < 20)
        action[:, 6] = 1.0 if t < 24 else -1.0
        if t >= 50:
            action[:, :6] = 0.7 * torch.randn(copies, 6, generator=generator)
        env.step(action)
        held.append(env.view().held.clone())
    assert int(held[49].sum()) >= copies - 1, "lifted"
    assert int(held[-1].sum()) >= copies - 2, "and still held after 1.5 s of shaking"
    env.close()
