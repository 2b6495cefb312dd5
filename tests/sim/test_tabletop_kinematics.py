"""The batched kinematics agree with MuJoCo's, and the inverse kinematics get to where they are sent."""

import mujoco
import numpy as np
import pytest
import torch

from embodied_rl.envs.tabletop.control import LEASH, WORKSPACE, PoseController
from embodied_rl.envs.tabletop.kinematics import (
    ArmKinematics,
    rotation_error,
    rotation_from_quaternion,
    turned,
)
from embodied_rl.envs.tabletop.scene import CABINET_FRONT, HANDLE_OFFSET, HOME, build_scene

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scene():
    return build_scene()


@pytest.fixture(scope="module")
def arm(scene):
    return ArmKinematics(scene.model, torch.from_numpy(HOME), CPU)


def postures(scene, count, spread, seed=0):
    rng = np.random.default_rng(seed)
    low, high = scene.model.jnt_range[scene.arm_qpos].T
    return (HOME + spread * rng.uniform(-1, 1, (count, 7))).clip(low, high)


def test_forward_kinematics_and_jacobian_equal_mujocos(scene, arm):
    joints = postures(scene, 20, 2.0)
    position, rotation, frames = arm.forward(torch.from_numpy(joints).float())
    jacobian = arm.jacobian(frames, position)
    data = mujoco.MjData(scene.model)
    site = scene.model.site("tcp").id
    linear, angular = np.zeros((3, scene.model.nv)), np.zeros((3, scene.model.nv))
    for i, row in enumerate(joints):
        data.qpos[scene.arm_qpos] = row
        mujoco.mj_kinematics(scene.model, data)
        mujoco.mj_comPos(scene.model, data)
        mujoco.mj_jacSite(scene.model, data, linear, angular, site)
        assert np.allclose(position[i], data.site_xpos[site], atol=2e-6)
        assert np.allclose(rotation[i], data.site_xmat[site].reshape(3, 3), atol=2e-6)
        wanted = np.concatenate([linear[:, scene.arm_qvel], angular[:, scene.arm_qvel]])
        assert np.allclose(jacobian[i], wanted, atol=3e-6)


def test_inverse_kinematics_reach_poses_wherever_tasks_happen(scene, arm):
    generator = torch.Generator().manual_seed(0)
    joints = torch.from_numpy(HOME).float().repeat(64, 1)
    low, high = torch.tensor([-0.17, -0.20, 0.01]), torch.tensor([0.15, 0.27, 0.25])
    target = low + (high - low) * torch.rand(64, 3, generator=generator)
    target[-1] = torch.from_numpy(CABINET_FRONT + HANDLE_OFFSET)
    pose = arm.forward(joints)
    yaw = torch.zeros(64, 3)
    yaw[:, 2] = 2 * torch.rand(64, generator=generator) - 1
    target_rotation = turned(pose[1], yaw)
    for _ in range(40):
        joints = arm.solve(joints, arm.forward(joints), target, target_rotation, 0.3)
    position, rotation, _ = arm.forward(joints)
    assert float((position - target).norm(dim=1).max()) < 4e-3
    assert float(rotation_error(target_rotation, rotation).norm(dim=1).max()) < 2e-2
    limits = torch.from_numpy(scene.model.jnt_range[scene.arm_qpos]).float()
    assert bool((joints >= limits[:, 0]).all()) and bool((joints <= limits[:, 1]).all())


def test_a_target_out_of_reach_keeps_the_joints_finite_and_within_their_limits(scene, arm):
    joints = torch.from_numpy(HOME).float()[None]
    for _ in range(30):
        pose = arm.forward(joints)
        step = arm.solve(joints, pose, torch.tensor([[3.0, 0.0, 0.0]]), pose[1], 0.3)
        assert float((step - joints).abs().max()) <= 0.3 + 1e-6
        joints = step
    limits = torch.from_numpy(scene.model.jnt_range[scene.arm_qpos]).float()
    assert bool((joints >= limits[:, 0]).all()) and bool((joints <= limits[:, 1]).all())


def test_turning_by_a_rotation_vector_equals_mujocos_quaternion():
    vector = np.array([0.3, -0.5, 0.2])
    quaternion, matrix = np.zeros(4), np.zeros(9)
    angle = np.linalg.norm(vector)
    mujoco.mju_axisAngle2Quat(quaternion, vector / angle, angle)
    mujoco.mju_quat2Mat(matrix, quaternion)
    got = turned(torch.eye(3)[None], torch.from_numpy(vector).float()[None])[0]
    assert np.allclose(got, matrix.reshape(3, 3), atol=1e-6)
    assert np.allclose(rotation_from_quaternion(torch.from_numpy(quaternion)), matrix.reshape(3, 3), atol=1e-12)
    assert torch.equal(turned(torch.eye(3)[None], torch.zeros(1, 3))[0], torch.eye(3))


def test_the_rotation_error_is_the_small_rotation_between_two_frames():
    vector = torch.tensor([[0.02, -0.03, 0.01]])
    start = turned(torch.eye(3)[None], torch.tensor([[0.5, 0.2, -0.7]]))
    assert torch.allclose(rotation_error(turned(start, vector), start), vector, atol=2e-5)


def test_wanted_poses_stay_within_workspace_leash_tilt_and_yaw(arm):
    controller = PoseController(arm, 8, CPU)
    joints = torch.from_numpy(HOME).float().repeat(8, 1)
    pose = arm.forward(joints)
    controller.hold(torch.ones(8, dtype=torch.bool), pose)
    generator = torch.Generator().manual_seed(0)
    push = torch.randn(8, 7, generator=generator).sign()
    low, high = torch.tensor(WORKSPACE).unbind(1)
    for _ in range(60):
        joints = controller.advance(push, joints, pose)[:, :7]
        inside = torch.clamp(pose[0], low, high)
        assert float((controller.position - inside).abs().max()) < LEASH + 1e-4
        assert bool((controller.position >= low).all()) and bool((controller.position <= high).all())
        pose = arm.forward(joints)
        tilt = torch.acos(-controller.rotation[:, 2, 2].clamp(-1, 1))
        assert float(tilt.max()) < 0.55
        yaw = torch.atan2(controller.rotation[:, 1, 0], controller.rotation[:, 0, 0])
        assert float(yaw.abs().max()) < 1.75 + 0.1
    eye = controller.rotation @ controller.rotation.transpose(1, 2)
    assert torch.allclose(eye, torch.eye(3).expand(8, 3, 3), atol=1e-4)


def test_a_unit_action_moves_the_wanted_pose_by_the_stated_step(arm):
    controller = PoseController(arm, 1, CPU)
    joints = torch.from_numpy(HOME).float()[None]
    pose = arm.forward(joints)
    controller.hold(torch.ones(1, dtype=torch.bool), pose)
    ctrl = controller.advance(torch.tensor([[1.0, -1.0, 0.5, 0.0, 0.0, 1.0, -1.0]]), joints, pose)
    assert torch.allclose(controller.position - pose[0], torch.tensor([[0.02, -0.02, 0.01]]), atol=1e-6)
    assert torch.allclose(rotation_error(controller.rotation, pose[1]), torch.tensor([[0.0, 0.0, 0.05]]), atol=1e-3)
    assert torch.allclose(ctrl[:, 7:], torch.full((1, 2), -0.01))
