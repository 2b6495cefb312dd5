"""What several kinds of tests share: a recipe that trains in about a second, and one finished run of it."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# No luck and no clock: the same examples on every run, however slow the machine.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parent.parent
TOY = f"""\
name: toy
env: {{type: {ROOT}/tests/toys/point.py}}
policy: {{type: mlp, hidden: [8], word_dim: 4}}
algorithm:
  type: ppo
  update: {{epochs: 1, minibatches: 1}}
collect: {{copies: 4, decisions: 10}}
train: {{env_steps: 120}}
evaluate: {{episodes: 8, episodes_during: 4, copies: 4, videos: 0}}
checkpoint: {{every: 1}}
log: {{tensorboard: false}}
"""


@pytest.fixture(autouse=True)
def subnormal_numbers_count():
    """A run of an earlier test took them for nothing (`embodied_rl.host`); hypothesis draws them, and would look for who did."""
    torch.set_flush_denormal(False)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Working folder with `toy.yaml`: three updates on a point in the plane; runs go to its `runs/`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(TOY)
    return tmp_path


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """A finished run of the toy recipe, shared by all tests: read it, never write into it."""
    from embodied_rl.cli import main

    folder = tmp_path_factory.mktemp("toy_run")
    (folder / "toy.yaml").write_text(TOY)
    assert main(["train", str(folder / "toy.yaml"), f"log.folder={folder}"]) == 0
    return folder / "toy"


@pytest.fixture
def own_run(toy_run, tmp_path):
    """A copy of the finished run that may be written into."""
    return Path(shutil.copytree(toy_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory):
    """A Python that has NumPy and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for part in Path(np.__file__).parents[1].glob("numpy*"):
        (site / part.name).symlink_to(part)
    return str(folder / "bin" / "python")
