"""The MuJoCo scene of the tabletop family: arm, gripper, three objects, a drawer, a goal marker, five cameras.

One compiled model serves every copy: what differs between copies (joint angles, object poses, colours, goal) is
state or camera input, never part of the model. Primitive geometry only, so it loads without assets.

Frame: x forward from the robot, y to its left, z up; the table top is z = 0 and the middle of the work area is the
origin. The base of the arm stands at x = -0.615 m.

Sources: kinematics, joint, velocity and torque limits from the Franka Emika Panda datasheet (Franka Control Interface
documentation, "Robot and interface specifications"); link masses and inertias identified by Gaz, Cognetti, Oliva,
Robuffo Giordano and De Luca, "Dynamic identification of the Franka Emika Panda robot with retrieval of feasible
parameters", IEEE RA-L 4(4), 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mujoco
import numpy as np

CONTROL_HZ = 20.0
TIMESTEP = 0.01
"""Seconds of one physics step; five make a control step."""

SHAPES = ("cube", "cylinder", "brick")
"""Shape of each object slot; slot m of every copy has shape m."""
HALF_SIZE = np.array([[0.020, 0.020, 0.020], [0.020, 0.020, 0.022], [0.020, 0.032, 0.016]])
"""[M, 3] half extents in metres of each slot, in the object's own frame (a cylinder: radius, radius, half height)."""
OBJECT_MASS = 0.08
"""kg"""

ARM_JOINTS = tuple(f"joint{i}" for i in range(1, 8))
HOME = np.array([0.0, math.pi / 8, 0.0, -5 * math.pi / 8, 0.0, 3 * math.pi / 4, math.pi / 4])
"""[7] rad; the gripper points straight down above the middle of the work area."""
BASE_X = -0.615
FINGER_MAX = 0.04
"""m each finger opens; the width between the pads is twice that."""

CABINET_FRONT = np.array([0.10, -0.31, 0.0])
"""Middle of the lower edge of the closed drawer's front, m."""
DRAWER_MAX = 0.14
"""m"""
HANDLE_OFFSET = np.array([-0.055, 0.0, 0.055])
"""Middle of the handle bar relative to CABINET_FRONT while the drawer is closed, m."""

CAMERAS = ("front", "overhead", "table", "close", "wrist")
GOAL_RADIUS = 0.05
HIDDEN = np.array([0.0, 0.0, -1.0])
"""Where the goal marker waits in tasks that have no marked goal, m."""

_LIMITS = [(-2.8973, 2.8973), (-1.7628, 1.7628), (-2.8973, 2.8973), (-3.0718, -0.0698),
           (-2.8973, 2.8973), (-0.0175, 3.7525), (-2.8973, 2.8973)]  # fmt: skip
# N m s/rad on each object's rotation (too small to matter for translation): a rolling cylinder stops within a second,
# as on felt, without the cost of rolling friction in every contact.
_SPIN_DAMPING = 2e-4
_TORQUE = (87, 87, 87, 87, 12, 12, 12)
_STIFFNESS = (1800, 1800, 1200, 1200, 500, 500, 500)
_DAMPING = (100, 100, 65, 65, 32, 32, 32)

# Joint frame in its parent (pos, quat), mass, centre of mass, inertia (xx yy zz xy xz yz), capsules (fromto, radius).
_LINKS = [
    ("0 0 .333", "1 0 0 0", 4.970684, ".003875 .002081 -.04762",
     ".70337 .70661 .009117 -.000139 .006772 .019169", [("0 0 -.19 0 0 0", .058)]),
    ("0 0 0", "1 -1 0 0", 0.646926, "-.003141 -.02872 .003495",
     ".007962 .02811 .025995 -.003925 .010254 .000704", [("0 -.12 0 0 0 0", .056)]),
    ("0 -.316 0", "1 1 0 0", 3.228604, ".027518 .039252 -.066502",
     ".037242 .036155 .01083 -.004761 -.011396 -.012805", [("0 0 -.17 0 0 -.06", .055), ("0 0 -.06 .0825 0 0", .045)]),
    ("0.0825 0 0", "1 1 0 0", 3.587895, "-.05317 .104419 .027454",
     ".025853 .019552 .028323 .007796 -.001332 .008641", [("0 0 -.05 0 0 .05", .05), ("0 0 0 -.0825 .1 0", .045)]),
    ("-0.0825 0.384 0", "1 -1 0 0", 1.225946, "-.011953 .041065 -.038437",
     ".035549 .029474 .008627 -.002117 -.004037 .000229", [("0 0 -.26 0 .03 -.08", .05), ("0 .06 -.1 0 0 0", .04)]),
    ("0 0 0", "1 1 0 0", 1.666555, ".060149 -.014117 -.010517",
     ".001964 .004354 .005433 .000109 -.001158 .000341", [("0 0 -.05 0 0 .03", .045), ("0 0 0 .088 0 0", .04)]),
    ("0.088 0 0", "1 1 0 0", 0.735522, ".010517 -.004252 .061597",
     ".012516 .010027 .004815 -.000428 -.001196 -.000741", [("0 0 -.02 0 0 .075", .042)]),
]  # fmt: skip


Point = tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """The compiled model and where things are in its state vectors.

    Example: the cube's position of every copy is `qpos[:, scene.objects_qpos[0] : scene.objects_qpos[0] + 3]`.
    """

    model: mujoco.MjModel
    arm_qpos: slice
    arm_qvel: slice
    fingers_qpos: slice
    fingers_qvel: slice
    drawer_qpos: int
    drawer_qvel: int
    objects_qpos: tuple[int, ...]
    """First of the seven numbers (position, quaternion w x y z) of each object."""
    objects_qvel: tuple[int, ...]
    """First of the six numbers (linear velocity in the world frame, angular velocity in the body frame)."""
    object_geoms: tuple[int, ...]
    """Geom whose colour says which object it is, one per slot."""
    goal_mocap: int
    """Row of the goal marker in `mocap_pos`."""
    substeps: int
    """Physics steps of one control step."""


def build_scene(timestep: float = TIMESTEP) -> Scene:
    """Compile the scene.

    Args:
        timestep: Physics step in seconds; a control step of 1/20 s must be a whole number of them.

    Returns:
        scene: Model and addresses.
    """
    model = mujoco.MjModel.from_xml_string(scene_xml(timestep))

    def qpos(name: str) -> int:
        return int(model.jnt_qposadr[model.joint(name).id])

    def qvel(name: str) -> int:
        return int(model.jnt_dofadr[model.joint(name).id])

    substeps = round(1 / CONTROL_HZ / timestep)
    assert abs(substeps * timestep * CONTROL_HZ - 1) < 1e-9, timestep
    arm_q, arm_v, finger_q, finger_v = qpos("joint1"), qvel("joint1"), qpos("finger_left"), qvel("finger_left")
    return Scene(
        model=model,
        arm_qpos=slice(arm_q, arm_q + 7),
        arm_qvel=slice(arm_v, arm_v + 7),
        fingers_qpos=slice(finger_q, finger_q + 2),
        fingers_qvel=slice(finger_v, finger_v + 2),
        drawer_qpos=qpos("drawer"),
        drawer_qvel=qvel("drawer"),
        objects_qpos=tuple(qpos(shape) for shape in SHAPES),
        objects_qvel=tuple(qvel(shape) for shape in SHAPES),
        object_geoms=tuple(int(model.geom(shape).id) for shape in SHAPES),
        goal_mocap=int(model.body_mocapid[model.body("goal").id]),
        substeps=substeps,
    )


def scene_xml(timestep: float = TIMESTEP) -> str:
    """Return the scene as MJCF text.

    Damping must stay explicit and mild (damping x timestep < inertia): MuJoCo's implicit integrators apply it after the
    contact forces are solved, so strongly damped joints move otherwise than the friction cones assumed and every
    grasped object creeps out of the gripper. Hence Euler, armature 0.5, and gains near critical damping.

    Collisions are limited by bits to the pairs that matter: objects with everything, the gripper with table and
    drawer. The links of the arm above the hand collide with nothing: inside the workspace limits they cannot reach
    the table.
    """
    return f"""
<mujoco model="tabletop">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{timestep}" integrator="Euler" cone="elliptic" impratio="10" solver="Newton"
          iterations="30" ls_iterations="20"/>
  <size memory="2M"/>
  <visual><headlight ambient=".38 .38 .39" diffuse=".2 .2 .2" specular=".05 .05 .05"/>
    <map znear=".005" zfar="10"/><global offwidth="1280" offheight="960"/></visual>
  <default>
    <geom solref=".02 1" friction="1 .02 .001"/>
    <default class="visual"><geom contype="0" conaffinity="0" mass="0" rgba=".93 .93 .95 1"/></default>
    <default class="object"><geom contype="1" conaffinity="15" condim="4" mass="{OBJECT_MASS}"/></default>
    <default class="table"><geom contype="2" conaffinity="0"/></default>
    <default class="drawer"><geom contype="4" conaffinity="0" rgba=".55 .42 .3 1"/></default>
    <default class="gripper"><geom contype="8" conaffinity="6" rgba=".35 .36 .4 1"/></default>
    <default class="finger"><joint type="slide" axis="0 1 0" range="0 {FINGER_MAX}" armature=".3"/>
      <geom contype="8" conaffinity="6" rgba=".35 .36 .4 1" type="box" size=".0105 .007 .0265" pos="0 .007 .0265"
            condim="4" friction="1.5 .05 .001"/>
      <position kp="400" kv="28" ctrlrange="-.01 {FINGER_MAX}" forcerange="-15 15"/></default>
  </default>
  <worldbody>
    <light name="top" pos=".5 .6 1.6" dir="-.35 -.4 -1" directional="true" diffuse=".56 .55 .52" specular=".15 .15 .15"
           castshadow="true"/>
    <geom name="table" class="table" type="plane" size=".75 .6 .01" rgba=".74 .71 .66 1"/>
    {_cameras()}
    {_arm()}
    {_objects()}
    {_drawer()}
    <body name="goal" mocap="true" pos="{_text(HIDDEN)}">
      <geom name="goal" class="visual" type="cylinder" size="{GOAL_RADIUS} .001" rgba=".95 .2 .75 1"/></body>
  </worldbody>
  <equality>
    <joint name="fingers" joint1="finger_left" joint2="finger_right" solref=".02 1" solimp=".95 .99 .001"/>
  </equality>
  <actuator>
    {_actuators()}
    <position name="finger_left" joint="finger_left" class="finger"/>
    <position name="finger_right" joint="finger_right" class="finger"/>
  </actuator>
</mujoco>"""


def _text(values: np.ndarray) -> str:
    return " ".join(f"{v:.6g}" for v in values)


def _look_at(name: str, position: Point, target: Point, fovy: float, up: Point) -> str:
    backward = np.subtract(position, target)
    backward /= np.linalg.norm(backward)
    right = np.cross(up, backward)
    right /= np.linalg.norm(right)
    axes = np.concatenate([right, np.cross(backward, right)])
    return f'<camera name="{name}" pos="{_text(np.array(position))}" xyaxes="{_text(axes)}" fovy="{fovy}"/>'


def _cameras() -> str:
    # The wrist camera belongs to the hand, see _hand. The overhead one leans back: the arm would hide the table. The
    # table camera is a policy's: all starts of the objects fill it, so that a cube is 6 of its 64 pixels wide.
    return (
        _look_at("front", (0.70, 0.36, 0.56), (-0.02, -0.09, 0.11), 48, (0, 0, 1))
        + _look_at("overhead", (0.38, -0.07, 0.92), (-0.03, -0.07, 0.03), 46, (0, 0, 1))
        + _look_at("table", (0.52, 0.055, 0.50), (0.01, 0.055, 0.01), 34, (0, 0, 1))
        # As wide as the table camera's in pictures of 2 rows to 3 columns; above and below there is nothing to see.
        + _look_at("close", (0.52, 0.055, 0.50), (0.01, 0.055, 0.015), 23, (0, 0, 1))
    )


def _arm() -> str:
    base = '<geom class="visual" type="capsule" fromto="-.03 0 .05 0 0 .12" size=".07"/>'
    text = f'<body name="link0" pos="{BASE_X} 0 0">{base}'
    for i, (position, quat, mass, com, inertia, capsules) in enumerate(_LINKS):
        low, high = _LIMITS[i]
        text += (
            f'<body name="link{i + 1}" pos="{position}" quat="{quat}" gravcomp="1">'
            f'<inertial mass="{mass}" pos="{com}" fullinertia="{inertia}"/>'
            f'<joint name="joint{i + 1}" axis="0 0 1" range="{low} {high}" armature=".5"/>'
        )
        for fromto, radius in capsules:
            text += f'<geom class="visual" type="capsule" fromto="{fromto}" size="{radius}"/>'
    return text + _hand() + "</body>" * 8


def _hand() -> str:
    inertial = '<inertial mass=".015" pos="0 .007 .027" diaginertia="2.4e-6 2.4e-6 7.5e-7"/>'
    return f"""
    <body name="hand" pos="0 0 .107" quat=".9238795 0 0 -.3826834" gravcomp="1">
      <inertial mass=".73" pos="-.01 0 .03" diaginertia=".001 .0025 .0017"/>
      <geom name="palm" class="gripper" type="box" size=".03 .1 .031" pos="0 0 .031" rgba=".93 .93 .95 1"/>
      <site name="tcp" pos="0 0 .1034" size=".004" rgba="0 0 0 0"/>
      <camera name="wrist" pos=".08 0 .03" xyaxes="0 1 0 1 0 .3" fovy="90"/>
      <body name="finger_left" pos="0 0 .0584" gravcomp="1">{inertial}
        <joint name="finger_left" class="finger"/><geom name="pad_left" class="finger"/></body>
      <body name="finger_right" pos="0 0 .0584" quat="0 0 0 1" gravcomp="1">{inertial}
        <joint name="finger_right" class="finger"/><geom name="pad_right" class="finger"/></body>
    </body>"""


def _objects() -> str:
    # The start poses only keep the compiled model free of overlaps; every episode draws its own.
    text = ""
    for i, shape in enumerate(SHAPES):
        half = HALF_SIZE[i]
        kind, size = ("cylinder", half[1:]) if shape == "cylinder" else ("box", half)
        inertial = _off_axis(half) if shape == "cylinder" else ""
        text += (
            f'<body name="{shape}" pos="0 {0.1 * i} {half[2]}">'
            f'<joint name="{shape}" type="free" damping="{_SPIN_DAMPING}"/>{inertial}'
            f'<geom name="{shape}" class="object" type="{kind}" size="{_text(size)}" rgba=".5 .5 .5 1"/></body>'
        )
    return text


def _off_axis(half: np.ndarray) -> str:
    # MuJoCo places the contacts of a standing cylinder by the direction of its tilt. Exactly upright that direction is
    # rounding error, and now and then all contacts vanish for some steps: the cylinder hops by 3 mm. A centre of mass
    # 0.02 mm off the axis keeps the tilt at 1e-5 rad, where the direction is known.
    radius, height = half[1], 2 * half[2]
    across, along = OBJECT_MASS * (3 * radius**2 + height**2) / 12, OBJECT_MASS * radius**2 / 2
    return f'<inertial pos="2e-5 0 0" mass="{OBJECT_MASS}" diaginertia="{across:.6g} {across:.6g} {along:.6g}"/>'


def _drawer() -> str:
    x, y, _ = CABINET_FRONT
    dx, _, dz = HANDLE_OFFSET
    # The cabinet is hollow to the eye and to objects: top, sides and back only; the drawer never touches it.
    return f"""
    <body name="cabinet" pos="{x} {y} 0">
      <geom class="drawer" type="box" size=".09 .09 .004" pos=".09 0 .081"/>
      <geom class="drawer" type="box" size=".09 .004 .0385" pos=".09 .086 .0385"/>
      <geom class="drawer" type="box" size=".09 .004 .0385" pos=".09 -.086 .0385"/>
      <geom class="drawer" type="box" size=".004 .082 .0385" pos=".176 0 .0385"/>
      <body name="drawer">
        <joint name="drawer" type="slide" axis="-1 0 0" range="0 {DRAWER_MAX}" damping="6" frictionloss=".6"
               armature=".1"/>
        <geom name="drawer_front" class="drawer" type="box" size=".006 .08 .036" pos="-.004 0 .039" mass=".3"
              rgba=".72 .58 .42 1"/>
        <geom class="drawer" type="box" size=".08 .076 .003" pos=".082 0 .008" mass=".2" rgba=".8 .72 .6 1"/>
        <geom name="handle" class="drawer" type="capsule" fromto="{dx} -.045 {dz} {dx} .045 {dz}" size=".007" mass=".05"
              rgba=".25 .25 .28 1" friction="1.2 .02 .001"/>
        <geom class="visual" type="capsule" fromto="{dx} -.045 {dz} -.01 -.045 {dz}" size=".005" rgba=".25 .25 .28 1"/>
        <geom class="visual" type="capsule" fromto="{dx} .045 {dz} -.01 .045 {dz}" size=".005" rgba=".25 .25 .28 1"/>
      </body>
    </body>"""


def _actuators() -> str:
    return "".join(
        f'<position name="{joint}" joint="{joint}" kp="{kp}" kv="{kv}" ctrlrange="{low} {high}" '
        f'forcerange="-{force} {force}"/>'
        for joint, kp, kv, (low, high), force in zip(ARM_JOINTS, _STIFFNESS, _DAMPING, _LIMITS, _TORQUE, strict=True)
    )
