"""The batched kinematics agree with MuJoCo's, and the inverse kinematics get to where they are sent."""

import mujoco
import numpy as np
import pytest
import torch

from embodied_rl.envs.tabletop.control import LEASH, WORKSPACE, PoseController
from embodied_rl.envs.tabletop.kinematics import DAMPING, MAX_JOINT_STEP, POSTURE_GAIN, ArmKinematics
from embodied_rl.envs.tabletop.scene import CABINET_FRONT, HANDLE_OFFSET, HOME, build_scene


@pytest.fixture(scope="module")
def scene():
    return build_scene()


class Arm:
    """The kinematics over positions of their own."""

    def __init__(self, scene, joints):
        self.columns = scene.arm_qpos
        self.qpos = torch.zeros(len(joints), scene.model.nq)
        self.kinematics = ArmKinematics(scene.model, HOME, self.qpos)
        self.move(joints)

    def move(self, joints):
        self.qpos[:, self.columns] = torch.as_tensor(joints).float()
        self.kinematics.forward()

    def follow(self):
        """Put the joints where the inverse kinematics want them."""
        self.kinematics.solve()
        self.move(self.kinematics.ctrl[:, :7])


def at_home(scene, count):
    return Arm(scene, np.tile(HOME, (count, 1)))


def turned(rotation, vector):
    """A frame turned in the world by a rotation vector, by MuJoCo."""
    quaternion, matrix = np.zeros(4), np.zeros(9)
    angle = np.linalg.norm(vector)
    mujoco.mju_axisAngle2Quat(quaternion, vector / max(angle, 1e-12), angle)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3) @ rotation


def turn_between(start, end):
    """Rotation vector in the world that turns one frame into another, by MuJoCo."""
    quaternion, vector = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, (end @ start.T).astype(np.float64).flatten())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


def within_limits(scene, joints):
    low, high = torch.from_numpy(scene.model.jnt_range[scene.arm_qpos]).float().unbind(1)
    return bool((joints >= low).all()) and bool((joints <= high).all())


def postures(scene, count, spread, seed=0):
    rng = np.random.default_rng(seed)
    low, high = scene.model.jnt_range[scene.arm_qpos].T
    return (HOME + spread * rng.uniform(-1, 1, (count, 7))).clip(low, high)


def test_forward_and_inverse_kinematics_equal_their_formulas_over_mujocos_jacobian(scene):
    """dq = J' (J J' + lambda^2 I)^-1 (e - J n) + n in float64, J and e from MuJoCo."""
    joints = postures(scene, 20, 1.5)
    arm = Arm(scene, joints)
    kinematics = arm.kinematics
    rng = np.random.default_rng(1)
    shift, vector = rng.uniform(-0.02, 0.02, (20, 3)), rng.uniform(-0.02, 0.02, (20, 3))
    site, data = scene.model.site("tcp").id, mujoco.MjData(scene.model)
    linear, angular = np.zeros((3, scene.model.nv)), np.zeros((3, scene.model.nv))
    low, high = scene.model.jnt_range[scene.arm_qpos].T
    wanted = []
    for i, row in enumerate(joints):
        data.qpos[scene.arm_qpos] = row
        mujoco.mj_kinematics(scene.model, data)
        mujoco.mj_comPos(scene.model, data)
        mujoco.mj_jacSite(scene.model, data, linear, angular, site)
        rotation = data.site_xmat[site].reshape(3, 3)
        assert np.allclose(kinematics.position[i], data.site_xpos[site], atol=2e-6)
        assert np.allclose(kinematics.rotation[i], rotation, atol=2e-6)
        kinematics.target_position[i] = torch.from_numpy(data.site_xpos[site] + shift[i])
        kinematics.target_rotation[i] = torch.from_numpy(turned(rotation, vector[i]))
        jacobian = np.concatenate([linear[:, scene.arm_qvel], angular[:, scene.arm_qvel]])
        rest = POSTURE_GAIN * (HOME - row)
        error = np.concatenate([shift[i], vector[i]]) - jacobian @ rest
        step = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + DAMPING**2 * np.eye(6), error) + rest
        wanted.append((row + step.clip(-MAX_JOINT_STEP, MAX_JOINT_STEP)).clip(low, high))
    kinematics.solve()
    assert np.allclose(kinematics.ctrl[:, :7], np.stack(wanted), atol=1e-4)


def test_inverse_kinematics_reach_poses_wherever_tasks_happen(scene):
    generator = torch.Generator().manual_seed(0)
    arm = at_home(scene, 64)
    low, high = torch.tensor([-0.17, -0.20, 0.01]), torch.tensor([0.15, 0.27, 0.25])
    target = low + (high - low) * torch.rand(64, 3, generator=generator)
    target[-1] = torch.from_numpy(CABINET_FRONT + HANDLE_OFFSET)
    kinematics = arm.kinematics
    kinematics.target_position.copy_(target)
    yaw = 2 * torch.rand(64, generator=generator) - 1
    frames = [turned(kinematics.rotation[i].numpy(), np.array([0, 0, float(yaw[i])])) for i in range(64)]
    kinematics.target_rotation.copy_(torch.from_numpy(np.stack(frames)))
    for _ in range(40):
        arm.follow()
    assert float((kinematics.position - target).norm(dim=1).max()) < 4e-3
    left = [turn_between(kinematics.rotation[i].numpy(), frames[i]) for i in range(64)]
    assert np.linalg.norm(left, axis=1).max() < 2e-2
    assert within_limits(scene, kinematics.ctrl[:, :7])


def test_a_target_out_of_reach_keeps_the_joints_finite_and_within_their_limits(scene):
    arm = at_home(scene, 1)
    arm.kinematics.target_position[0] = torch.tensor([3.0, 0.0, 0.0])
    for _ in range(30):
        before = arm.qpos[:, arm.columns].clone()
        arm.kinematics.target_rotation.copy_(arm.kinematics.rotation)
        arm.follow()
        assert float((arm.qpos[:, arm.columns] - before).abs().max()) <= MAX_JOINT_STEP + 1e-6
    assert within_limits(scene, arm.qpos[:, arm.columns])


def test_wanted_poses_stay_within_workspace_leash_tilt_and_yaw(scene):
    arm = at_home(scene, 8)
    controller = PoseController(arm.kinematics)
    controller.hold(torch.ones(8, dtype=torch.bool))
    generator = torch.Generator().manual_seed(0)
    push = torch.randn(8, 7, generator=generator).sign()
    low, high = torch.tensor(WORKSPACE).unbind(1)
    for _ in range(60):
        joints = controller.advance(push)[:, :7]
        inside = torch.clamp(arm.kinematics.position, low, high)
        assert float((controller.position - inside).abs().max()) < LEASH + 1e-4
        assert bool((controller.position >= low).all()) and bool((controller.position <= high).all())
        arm.move(joints)
        tilt = torch.acos(-controller.rotation[:, 2, 2].clamp(-1, 1))
        assert float(tilt.max()) < 0.55
        yaw = torch.atan2(controller.rotation[:, 1, 0], controller.rotation[:, 0, 0])
        assert float(yaw.abs().max()) < 1.75 + 0.1
    eye = controller.rotation @ controller.rotation.transpose(1, 2)
    assert torch.allclose(eye, torch.eye(3).expand(8, 3, 3), atol=1e-4)


def test_a_unit_action_moves_the_wanted_pose_by_the_stated_step(scene):
    arm = at_home(scene, 2)
    controller = PoseController(arm.kinematics)
    controller.hold(torch.ones(2, dtype=torch.bool))
    ctrl = controller.advance(torch.tensor([[1.0, -1.0, 0.5, 0.0, 0.0, 1.0, -1.0], [0, 0, 0, 0.6, -0.8, 0, 0.0]]))
    moved = controller.position - arm.kinematics.position
    assert torch.allclose(moved, torch.tensor([[0.02, -0.02, 0.01], [0.0, 0.0, 0.0]]), atol=1e-6)
    turns = [turn_between(arm.kinematics.rotation[i].numpy(), controller.rotation[i].numpy()) for i in range(2)]
    assert np.allclose(turns, [[0.0, 0.0, 0.05], [0.03, -0.04, 0.0]], atol=2e-5)
    assert torch.allclose(ctrl[:, 7:], torch.tensor([[-0.01, -0.01], [0.015, 0.015]]))


def test_no_action_changes_no_bit_of_what_is_wanted(scene):
    arm = at_home(scene, 1)
    controller = PoseController(arm.kinematics)
    controller.hold(torch.ones(1, dtype=torch.bool))
    rotation = controller.rotation.clone()
    controller.advance(torch.zeros(1, 7))
    assert torch.equal(controller.rotation, rotation)
