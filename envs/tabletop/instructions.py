"""The words of each task: templates for training, other templates for evaluation, and word ids.

Evaluation templates are sentences that never occur in training, built from words that all do (in other combinations),
so that an evaluation asks for composition and not for unknown vocabulary. Word ids are stable hashes: no download, and
adding a template changes no other id. A word that never occurred in training (a user's own sentence) gets its own id,
whose embedding is untrained: the policy then has to rely on the other words.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

from embodied_rl.envs._words import WORD_IDS, encode_words, word_id
from embodied_rl.envs.tabletop.scene import SHAPES
from embodied_rl.types import Split

MAX_WORDS = 14
"""L, word ids of an instruction; shorter ones are padded with 0."""

__all__ = ["MAX_WORDS", "TEMPLATES", "WORD_IDS", "Sentences", "describe", "encode", "word_id", "write_instruction"]

Sentences = Literal["heldout", "training"]
"""Whose templates evaluation starts use: their own, which training never sees, or those of training."""

Name = Literal["color", "shape", "both"]
"""How an instruction names an object."""
NAMES: tuple[Name, ...] = ("color", "shape", "both")

COLORS = ("red", "green", "blue", "yellow", "purple", "orange")

# {a} the object meant, {b} the second object, {goal} the marked goal.
TEMPLATES: dict[str, dict[Split, tuple[str, ...]]] = {
    "reach": {
        "train": (
            "reach the {a}",
            "touch the {a}",
            "reach for the {a}",
            "move the gripper to the {a}",
            "move your hand to the top of the {a}",
            "go to the {a} and touch the top",
            "please reach for the {a}",
            "please touch the top of the {a}",
            "now touch the {a}",
            "now go to the top of the {a}",
            "go and reach the {a}",
            "please move your hand to the {a}",
            "bring the gripper to the {a}",
            "bring your hand to the top of the {a}",
            "touch the {a} with the gripper",
            "put the gripper on top of the {a}",
        ),
        "eval": (
            "please touch the {a}",
            "touch the top of the {a}",
            "go and touch the {a}",
            "please move the gripper to the top of the {a}",
            "reach for the top of the {a}",
            "now bring your hand to the {a}",
        ),
    },
    "push": {
        "train": (
            "push the {a} to the goal",
            "slide the {a} to the marked spot",
            "push the {a} over the table to the marker",
            "bring the {a} to the marked goal",
            "please slide the {a} over to the goal",
            "please push the {a} to the goal",
            "move the {a} to the marked spot",
            "move the {a} over the table to the goal",
            "now push the {a} to the marker",
            "now slide the {a} to the goal",
            "please bring the {a} over to the marked spot",
            "bring the {a} to the marker",
            "go and push the {a} to the goal",
            "slide the {a} over the table to the marked goal",
            "move the {a} to the goal with the gripper",
            "push the {a} over to the spot",
        ),
        "eval": (
            "please push the {a} to the marked spot",
            "slide the {a} over the table to the goal",
            "push the {a} over to the marked goal",
            "please bring the {a} to the marker",
            "now move the {a} to the goal",
        ),
    },
    "lift": {
        "train": (
            "lift the {a}",
            "pick up the {a}",
            "lift the {a} up from the table",
            "grasp the {a} and lift it",
            "please pick the {a} up",
            "take the {a} and hold it up",
            "now lift the {a} up",
            "now pick the {a} up",
            "please lift the {a} from the table",
            "pick the {a} up and hold it",
            "grasp the {a} and hold it up",
            "take the {a} up from the table",
            "please take the {a} and lift it",
            "go and pick up the {a}",
            "lift the {a} with the gripper",
            "please grasp the {a} and pick it up",
        ),
        "eval": (
            "please lift the {a}",
            "grasp the {a} and pick it up",
            "pick the {a} up from the table",
            "take the {a} and lift it up",
            "now take the {a} and hold it",
            "go and lift the {a}",
        ),
    },
    "place on": {
        "train": (
            "place the {a} on the {b}",
            "put the {a} on top of the {b}",
            "pick up the {a} and place it on the {b}",
            "please put the {a} on the {b}",
        ),
        "eval": (
            "please place the {a} on top of the {b}",
            "pick up the {a} and put it on top of the {b}",
            "put the {a} on the {b}",
        ),
    },
    "place beside": {
        "train": (
            "place the {a} beside the {b}",
            "put the {a} next to the {b}",
            "pick up the {a} and place it next to the {b}",
            "please put the {a} beside the {b}",
        ),
        "eval": (
            "please place the {a} next to the {b}",
            "pick up the {a} and put it beside the {b}",
            "put the {a} beside the {b}",
        ),
    },
    "stack": {
        "train": (
            "stack the {a} on the {b}",
            "stack the {a} on top of the {b}",
            "pick up the {a} and stack it on the {b}",
            "please make a tower with the {a} over the {b}",
        ),
        "eval": (
            "please stack the {a} on top of the {b}",
            "make a tower with the {a} on top of the {b}",
            "pick up the {a} and stack it on top of the {b}",
        ),
    },
    "open": {
        "train": (
            "open the drawer",
            "pull the drawer open",
            "pull the handle of the drawer",
            "please open the drawer by the handle",
        ),
        "eval": (
            "please pull the drawer open",
            "open the drawer by the handle",
            "please pull the handle",
        ),
    },
    "close": {
        "train": (
            "close the drawer",
            "push the drawer shut",
            "shut the drawer by the handle",
            "please close the open drawer",
        ),
        "eval": (
            "please shut the drawer",
            "push the open drawer shut",
            "close the drawer by the handle",
        ),
    },
}


def describe(slot: int, colors: np.ndarray, names: Sequence[Name], u: float) -> str:
    """Name one object by its colour, its shape or both; each picks it out among the objects present.

    Args:
        slot: Which object.
        colors: [M] index into COLORS of each object, all different.
        names: Ways to choose from.
        u: Number in [0, 1) that decides which.

    Returns:
        noun: "red object" (color), "cube" (shape) or "red cube" (both).
    """
    color, shape = COLORS[colors[slot]], SHAPES[slot]
    return {"color": f"{color} object", "shape": shape, "both": f"{color} {shape}"}[names[int(len(names) * u)]]


def vocabulary() -> list[str]:
    """Sentences that hold every word of every instruction."""
    templates = [text for kind in TEMPLATES.values() for split in kind.values() for text in split]
    return [*(text.format(a="object", b="object") for text in templates), *COLORS, *SHAPES]


def write_instruction(wording: str, split: Split, a: str, b: str, u: float) -> str:
    """Choose a template and fill it.

    Args:
        wording: Key of TEMPLATES.
        split: Which templates.
        a: Noun of the object meant.
        b: Noun of the second object.
        u: Number in [0, 1) that decides which template.

    Returns:
        text: The instruction, lower case.
    """
    templates = TEMPLATES[wording][split]
    return templates[int(u * len(templates))].format(a=a, b=b)


@lru_cache(maxsize=8192)
def encode(text: str) -> tuple[int, ...]:
    """Word ids of a sentence, padded with 0 to MAX_WORDS; see `embodied_rl.envs._words.encode`."""
    return encode_words(text, MAX_WORDS, "the tabletop", "raise MAX_WORDS in envs/tabletop/instructions.py")
