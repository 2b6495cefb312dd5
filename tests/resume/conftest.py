"""Uninterrupted runs, made once and compared with by several tests."""

import pytest
import torch

from tests.resume import lab


@pytest.fixture(autouse=True)
def threads():
    """The recipes compute with one thread; other tests need not."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """whole(name): rows and last state of a recipe of the table that was never stopped; read only."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = lab.go(lab.recipe(name), tmp_path_factory.mktemp("whole") / "run")
        return made[name]

    return of
