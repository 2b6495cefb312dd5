"""The tasks of the tabletop: what a start looks like, when it has succeeded, what is rewarded on the way.

A task is one class with three hooks: attributes that say how its starts are drawn (read by `layout.py`), `success`
and `terms`. Both take a `View` of all copies and return a value for each, also for copies that play another task;
`judge` selects. All lengths are metres, all poses in the world frame.

The dense reward of every task is bounded: the weighted terms of one step add up to less than 1, and a step in which
the task is solved is worth exactly 1. The sparse reward is 1 in such a step and else 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from embodied_rl.envs.tabletop.scene import DRAWER_MAX

REACH_RADIUS = 0.025
PUSH_RADIUS = 0.05
"""m; the tolerance of Meta-World's push."""
LIFT_HEIGHT = 0.07
STILL = 0.08
"""m/s below which an object counts as resting."""
OPEN_AT, CLOSED_AT = 0.10, 0.012
"""Drawer opening in metres above which it is open, below which it is closed."""


@dataclass
class View:
    """What success and reward are computed from, for B copies; a and b are the first and second object meant.

    Example: cube at rest under an open gripper 10 cm above: a_position [[0, 0, 0.02]], a_half_height [0.02],
    tcp [[0, 0, 0.12]], between [False], held [False], gripper_open [True].
    """

    tcp: Tensor
    """[B, 3] point between the finger tips."""
    between: Tensor
    """[B] bool, a's centre is where closing the fingers would grasp it."""
    held: Tensor
    """[B] bool, a is between the fingers, which press on it."""
    gripper_open: Tensor
    """[B] bool, the fingers are commanded to and do not press on anything."""
    aperture: Tensor
    """[B] commanded opening of the fingers, 0 closed to 1 open."""
    a_position: Tensor
    """[B, 3] centre of a."""
    a_half_height: Tensor
    """[B]"""
    a_speed: Tensor
    """[B] m/s."""
    b_position: Tensor
    """[B, 3] centre of b."""
    b_half_height: Tensor
    """[B]"""
    b_start: Tensor
    """[B, 2] where b's centre was at the start."""
    goal: Tensor
    """[B, 3] the marked goal on the table."""
    relation_on: Tensor
    """[B] bool, for `place`: on b rather than beside it."""
    handle: Tensor
    """[B, 3] middle of the drawer's handle."""
    drawer: Tensor
    """[B] opening, 0 when closed."""

    @cached_property
    def a_height(self) -> Tensor:
        """[B] of a's centre above where it is when a stands on the table."""
        return self.a_position[:, 2] - self.a_half_height

    @cached_property
    def a_top(self) -> Tensor:
        """[B, 3] middle of a's upper side when a stands upright."""
        return self.a_position + torch.nn.functional.pad(self.a_half_height[:, None], (2, 0))

    @cached_property
    def tcp_to_a(self) -> Tensor:
        """[B] distance from the TCP to a's centre."""
        return distance(self.tcp, self.a_position)

    @cached_property
    def tcp_to_top(self) -> Tensor:
        """[B] distance from the TCP to the middle of a's upper side."""
        return distance(self.tcp, self.a_top)

    @cached_property
    def near_a(self) -> Tensor:
        """[B] closeness of the TCP to a's centre."""
        return closeness(self.tcp_to_a)

    @cached_property
    def fingers_part(self) -> Tensor:
        """[B] in [0, 1]: half the opening while a is not between the fingers; else one half and half the closing.

        Coming between open fingers changes nothing; were it to cost something, a policy would stay away.
        """
        return torch.where(self.between, 2 - self.aperture, self.aperture) / 2

    @cached_property
    def approach(self) -> Tensor:
        """[B] what push and lift pay for coming near a with ready fingers."""
        return 0.25 * self.near_a + 0.18 * self.fingers_part

    @cached_property
    def grip(self) -> Tensor:
        """[B] what push and lift pay while a is held."""
        return 0.22 * self.held

    @cached_property
    def a_to_goal(self) -> Tensor:
        """[B] horizontal distance from a's centre to the marked goal."""
        return distance(self.a_position[:, :2], self.goal[:, :2])

    @cached_property
    def a_to_b(self) -> Tensor:
        """[B] horizontal distance of the centres of a and b."""
        return distance(self.a_position[:, :2], self.b_position[:, :2])

    @cached_property
    def b_moved(self) -> Tensor:
        """[B] horizontal distance of b from where it started."""
        return distance(self.b_position[:, :2], self.b_start)


class Task:
    """Base of all tasks.

    To add one: subclass, name it, add templates of the same name to `instructions.TEMPLATES`, list it in TASKS.
    """

    name: str
    wordings: tuple[str, ...]
    """Keys of `instructions.TEMPLATES`; one is drawn per start and its index is the start's `relation`."""
    marked_goal: bool = False
    """A goal is marked on the table, 9 to 18 cm from the object meant."""
    drawer: tuple[float, float] = (0.0, 0.03)
    """Range of the drawer's opening at the start, m."""

    def success(self, view: View) -> Tensor:
        """[B] bool, the task is solved in this state."""
        raise NotImplementedError

    def terms(self, view: View) -> dict[str, Tensor]:
        """Dense reward terms [B], each at least 0, with a sum below 1: "reach", "grasp", "progress"."""
        raise NotImplementedError


class Reach(Task):
    """Bring the TCP to the top of the named object.

    Randomisation: positions, yaws and colours of the objects, which is meant, initial joints, wording.
    Success: TCP within 2.5 cm of the middle of the object's upper side.
    Reward terms: reach = 0.9 closeness(TCP, upper side).
    """

    name = "reach"
    wordings = ("reach",)

    def success(self, view: View) -> Tensor:
        """TCP within REACH_RADIUS of the object's upper side."""
        return view.tcp_to_top < REACH_RADIUS

    def terms(self, view: View) -> dict[str, Tensor]:
        """Closeness of the TCP."""
        return {"reach": 0.9 * closeness(view.tcp_to_top)}


class Push(Task):
    """Move the named object over the table onto the marked goal.

    Randomisation: as reach, and the goal, 9 to 18 cm from the object in any direction.
    Success: the object's centre is horizontally within 5 cm of the goal and not more than 1.5 cm above its rest.
    Reward terms: reach = 0.25 closeness(TCP, object) + 0.18 fingers' part (`View.fingers_part`); grasp = 0.22 while
    held; progress = 0.3 closeness(object, its rest on the goal), height included: were it not, the object would be
    carried there in the air. Sliding it between the fingers is paid for rather than pushing it from behind, where it
    slips off a finger 2 cm wide.
    """

    name = "push"
    wordings = ("push",)
    marked_goal = True

    def success(self, view: View) -> Tensor:
        """Object over the goal and down."""
        return (view.a_to_goal < PUSH_RADIUS) & (view.a_height.abs() < 0.015)

    def terms(self, view: View) -> dict[str, Tensor]:
        """Closeness of the TCP to the object, grip, closeness of the object to its rest on the goal."""
        return {
            "reach": view.approach,
            "grasp": view.grip,
            "progress": 0.3 * closeness(distance_of(view.a_to_goal, view.a_height)),
        }


class Lift(Task):
    """Grasp the named object and raise it.

    Randomisation: as reach.
    Success: the object is held and at least 7 cm above its resting height.
    Reward terms: reach = 0.25 closeness(TCP, object) + 0.18 fingers' part (`View.fingers_part`); grasp = 0.22 while
    held; progress = 0.3 height / 7 cm while held.
    """

    name = "lift"
    wordings = ("lift",)

    def success(self, view: View) -> Tensor:
        """Held and high enough."""
        return view.held & (view.a_height >= LIFT_HEIGHT)

    def terms(self, view: View) -> dict[str, Tensor]:
        """Closeness, grasp, height."""
        return {
            "reach": view.approach,
            "grasp": view.grip,
            "progress": 0.3 * view.held * (view.a_height / LIFT_HEIGHT).clamp(0, 1),
        }


class Place(Task):
    """Put object A on or beside object B and let go.

    Randomisation: as reach, which objects are A and B, and whether "on" or "beside" is asked.
    Success: A is released and at rest, B has moved less than 3 cm; "on": A's centre is horizontally within 2.5 cm of
    B's and it stands on B; "beside": A stands on the table with its centre 3 to 9 cm from B's.
    Reward terms: reach = 0.15 closeness(TCP, A), grasp = 0.15 while held or once in place, progress =
    0.45 closeness(A, its place) while held or once in place, 0.15 more for letting go there.
    """

    name = "place"
    wordings: tuple[str, ...] = ("place on", "place beside")

    def in_place(self, view: View) -> Tensor:
        """[B] bool, A stands where it is asked to, held or not."""
        horizontal = view.a_to_b
        on = (horizontal < 0.025) & (self.above(view).abs() < 0.008)
        beside = (horizontal > 0.03) & (horizontal < 0.09) & (view.a_height.abs() < 0.008)
        return torch.where(view.relation_on, on, beside) & (view.b_moved < 0.03)

    def above(self, view: View) -> Tensor:
        """[B] height of A over standing on B, m."""
        return view.a_position[:, 2] - view.b_position[:, 2] - view.a_half_height - view.b_half_height

    def success(self, view: View) -> Tensor:
        """In place, released, at rest."""
        return self.in_place(view) & view.gripper_open & ~view.held & (view.a_speed < STILL)

    def terms(self, view: View) -> dict[str, Tensor]:
        """Closeness, grasp, approach to the place, release."""
        horizontal = view.a_to_b
        on = distance_of(horizontal, self.above(view))
        beside = distance_of((horizontal - 0.065).abs(), view.a_height)
        done = self.in_place(view)
        carried = view.held | done
        return {
            "reach": 0.15 * view.near_a,
            "grasp": 0.15 * carried,
            "progress": 0.45 * carried * closeness(torch.where(view.relation_on, on, beside))
            + 0.15 * (done & view.gripper_open),
        }


class Stack(Place):
    """Build a tower: object A centred on object B, with the gripper withdrawn.

    Randomisation: as place, always "on".
    Success: A stands on B with centres within 1.5 cm horizontally, released, at rest, and the TCP is at least 4 cm
    from A's centre; B has moved less than 3 cm.
    Reward terms: as place.
    """

    name = "stack"
    wordings = ("stack",)

    def in_place(self, view: View) -> Tensor:
        """[B] bool, A stands centred on B, held or not."""
        horizontal = view.a_to_b
        return (horizontal < 0.015) & (self.above(view).abs() < 0.008) & (view.b_moved < 0.03)

    def success(self, view: View) -> Tensor:
        """In place, released, at rest, gripper withdrawn."""
        return super().success(view) & (view.tcp_to_a > 0.04)


class Open(Task):
    """Pull the drawer open by its handle.

    Randomisation: initial opening 0 to 3 cm, objects, initial joints, wording.
    Success: opened by at least 10 cm.
    Reward terms: reach = 0.3 closeness(TCP, handle), progress = 0.6 opening / 10 cm.
    """

    name = "open"
    wordings = ("open",)

    def success(self, view: View) -> Tensor:
        """Open far enough."""
        return view.drawer >= OPEN_AT

    def terms(self, view: View) -> dict[str, Tensor]:
        """Closeness to the handle, opening."""
        return {
            "reach": 0.3 * closeness(distance(view.tcp, view.handle)),
            "progress": 0.6 * (view.drawer / OPEN_AT).clamp(0, 1),
        }


class Close(Task):
    """Push the open drawer shut.

    Randomisation: initial opening 9 to 14 cm, objects, initial joints, wording.
    Success: less than 1.2 cm open.
    Reward terms: reach = 0.3 closeness(TCP, handle), progress = 0.6 (1 - opening / 14 cm).
    """

    name = "close"
    wordings = ("close",)
    drawer = (0.09, DRAWER_MAX)

    def success(self, view: View) -> Tensor:
        """Closed."""
        return view.drawer <= CLOSED_AT

    def terms(self, view: View) -> dict[str, Tensor]:
        """Closeness to the handle, closing."""
        return {
            "reach": 0.3 * closeness(distance(view.tcp, view.handle)),
            "progress": 0.6 * (1 - view.drawer / DRAWER_MAX).clamp(0, 1),
        }


TERMS = ("reach", "grasp", "progress")
"""Names of the reward terms, the same for all tasks so that they can be logged side by side."""
TASKS: dict[str, Task] = {task.name: task for task in (Reach(), Push(), Lift(), Place(), Stack(), Open(), Close())}


def judge(tasks: tuple[Task, ...], task: Tensor, view: View) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Success and dense reward of every copy in its own task.

    Args:
        tasks: The tasks of this env.
        task: [B] int64 index into `tasks`.
        view: The state.

    Returns:
        success: [B] bool.
        dense: [B] float32 in [0, 1]; exactly 1 where `success`.
        terms: name -> [B] float32, the weighted terms before success overrules them; 0 where a task lacks one.
    """
    none = torch.zeros_like(view.drawer)
    rows = []
    for one in tasks:
        values = one.terms(view)
        rows += [one.success(view), *(values.get(name, none) for name in TERMS)]
    # `cat` turns the bools of success into numbers on its way.
    table = torch.cat(rows).view(len(tasks), 1 + len(TERMS), -1)
    mine = table.gather(0, task.expand(1, 1 + len(TERMS), -1))[0]
    success, terms = mine[0] > 0, mine[1:]
    dense = terms.sum(dim=0).masked_fill_(success, 1.0)
    return success, dense, dict(zip(TERMS, terms.unbind(), strict=True))


def distance(p: Tensor, q: Tensor) -> Tensor:
    """Euclidean distance [B] of points [B, n]."""
    return torch.linalg.vector_norm(p - q, dim=1)


def distance_of(x: Tensor, y: Tensor) -> Tensor:
    """Length [B] of the vector with orthogonal parts x [B] and y [B]."""
    return torch.hypot(x, y)


def closeness(d: Tensor) -> Tensor:
    """1 - min(d / 40 cm, 1) / 2 - tanh(15 d) / 2: 1 at the place, 0.42 at 10 cm, 0.25 at 20 cm.

    The straight part pulls from afar, where tanh alone is flat; the curved part asks for precision near the place.
    """
    # In place and in one last step: six small kernels instead of eight, and this runs for every term of every task.
    return torch.rsub((2.5 * d).clamp_max_(1.0).add_((15 * d).tanh_()), 1, alpha=0.5)
