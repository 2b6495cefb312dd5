"""What the tests of repeated demonstrations share."""

import pytest

from embodied_rl.config import load_component
from embodied_rl.record_demos import collect_demonstrations

TASKS = ("reach", "push", "lift")
SETTINGS = ["tasks=[reach,push,lift]", "max_steps=60", "threads=1"]


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """A set of one undisturbed demonstration of each task; read it, never write into it."""
    folder = tmp_path_factory.mktemp("demos") / "one"
    collect_demonstrations(load_component("env", "tabletop", SETTINGS), folder, 3, noise=0.0, copies=6)
    return folder
