"""A model that is named instead of being given as a folder: found where it was downloaded to before, and never fetched."""

import socket

import pytest
import torch
from huggingface_hub import constants

from embodied_rl.envs import text
from embodied_rl.errors import NotFoundError
from embodied_rl.policies import causal_lm
from tests.toys.tiny_lm import tiny_lm

CPU = torch.device("cpu")
NAME = "somebody/tiny"


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A cache of Hugging Face with one model, and what was asked of the network."""
    hub, addresses = tmp_path / "hub", []
    model = hub / f"models--{NAME.replace('/', '--')}"
    tiny_lm(model / "snapshots" / "0123abc")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123abc")

    def refuse(*address, **_):
        addresses.append(address)
        raise OSError("no network")

    # HF_HOME is read when the package is imported.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return addresses


def env(model):
    return text.build(text.Config(model=model, max_context=200), num_envs=2, device=CPU, split="train", seed=0)


def test_a_model_that_was_downloaded_before_is_found_by_its_name(asked):
    speaking = env(NAME)
    policy = causal_lm.build(causal_lm.Config(model=NAME), env=speaking.spec, device=CPU)
    obs = speaking.reset(torch.ones(2, dtype=torch.bool), torch.tensor([2, 4]), torch.zeros(2, dtype=torch.int64))
    assert policy.act(obs, generator=None, greedy=True).units.shape == (2, 32)
    assert speaking.spec.vocabulary.name == NAME and asked == []


@pytest.mark.parametrize("name", ["somebody/else", "tiny", "a/b/c", "no such name"])
def test_a_model_that_was_not_is_refused_without_a_look_at_the_network(name, asked):
    absent = "there is no such folder, and no model of that name was downloaded before; give "
    with pytest.raises(NotFoundError, match=f"env.model {name}: {absent}the folder that policy.model has"):
        env(name)
    with pytest.raises(NotFoundError, match=f"policy.model '{name}': {absent}a folder that holds"):
        causal_lm.build(causal_lm.Config(model=name), env=env(NAME).spec, device=CPU)
    assert asked == []


def test_a_folder_in_the_home_is_found_by_both(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_lm(tmp_path / "models" / "tiny")
    causal_lm.build(causal_lm.Config(model="~/models/tiny"), env=env("~/models/tiny").spec, device=CPU)
