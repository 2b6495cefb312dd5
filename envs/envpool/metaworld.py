"""What MetaWorld's tasks are called in words.

Source: the list of tasks of Yu et al. 2019 (Meta-World, arXiv:1910.10897, appendix A), as policies are conditioned on
it. What is `PushBack` in the program is "pull" in that list.
"""

from __future__ import annotations

from embodied_rl.convention import Convention

CONVENTION = Convention(control="ee_delta", rotation="none", gripper="closes_at_plus", metres=0.01)
"""Of every task's 4 numbers. Their axes are the world's, in which the arm looks along y: not its base's or its hand's.

Source: MetaWorld, sawyer_xyz_env.py (`action_scale` 1/100 on the mocap body; the last number drives the fingers
together).
"""

SENTENCES = {
    "Assembly": "Pick up a nut and place it onto a peg",
    "Basketball": "Dunk the basketball into the basket",
    "BinPicking": "Grasp the puck from one bin and place it into another bin",
    "BoxClose": "Grasp the cover and close the box with it",
    "ButtonPress": "Press a button",
    "ButtonPressTopdown": "Press a button from the top",
    "ButtonPressTopdownWall": "Bypass a wall and press a button from the top",
    "ButtonPressWall": "Bypass a wall and press a button",
    "CoffeeButton": "Push a button on the coffee machine",
    "CoffeePull": "Pull a mug from a coffee machine",
    "CoffeePush": "Push a mug under a coffee machine",
    "DialTurn": "Rotate a dial 180 degrees",
    "Disassemble": "Pick a nut out of a peg",
    "DoorClose": "Close a door with a revolving joint",
    "DoorLock": "Lock the door by rotating the lock clockwise",
    "DoorOpen": "Open a door with a revolving joint",
    "DoorUnlock": "Unlock the door by rotating the lock counter-clockwise",
    "DrawerClose": "Push and close a drawer",
    "DrawerOpen": "Open a drawer",
    "FaucetClose": "Rotate the faucet clockwise",
    "FaucetOpen": "Rotate the faucet counter-clockwise",
    "Hammer": "Hammer a screw on the wall",
    "HandInsert": "Insert the gripper into a hole",
    "HandlePress": "Press a handle down",
    "HandlePressSide": "Press a handle down sideways",
    "HandlePull": "Pull a handle up",
    "HandlePullSide": "Pull a handle up sideways",
    "LeverPull": "Pull a lever down 90 degrees",
    "PegInsertSide": "Insert a peg sideways",
    "PegUnplugSide": "Unplug a peg sideways",
    "PickOutOfHole": "Pick up a puck from a hole",
    "PickPlace": "Pick and place a puck to a goal",
    "PickPlaceWall": "Pick a puck, bypass a wall and place the puck",
    "PlateSlide": "Slide a plate into a cabinet",
    "PlateSlideBack": "Get a plate from the cabinet",
    "PlateSlideBackSide": "Get a plate from the cabinet sideways",
    "PlateSlideSide": "Slide a plate into a cabinet sideways",
    "Push": "Push the puck to a goal",
    "PushBack": "Pull a puck to a goal",
    "PushWall": "Bypass a wall and push a puck to a goal",
    "Reach": "Reach a goal position",
    "ReachWall": "Bypass a wall and reach a goal",
    "ShelfPlace": "Pick and place a puck onto a shelf",
    "Soccer": "Kick a soccer into the goal",
    "StickPull": "Grasp a stick and pull a box with the stick",
    "StickPush": "Grasp a stick and push a box using the stick",
    "Sweep": "Sweep a puck off the table",
    "SweepInto": "Sweep a puck into a hole",
    "WindowClose": "Push and close a window",
    "WindowOpen": "Push and open a window",
}
"""`MetaWorld/<key>-v3` -> its instruction."""


def convention_of(id: str) -> Convention | None:
    """What an envpool id's actions mean; None where it is no MetaWorld task."""
    return CONVENTION if id.partition("/")[0] == "MetaWorld" else None


def sentence_of(id: str) -> str | None:
    """The instruction of an envpool id; None where it is no MetaWorld task."""
    family, _, name = id.partition("/")
    return SENTENCES.get(name.rsplit("-", 1)[0]) if family == "MetaWorld" else None
