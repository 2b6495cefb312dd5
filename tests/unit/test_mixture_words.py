"""Parts of a mixture that are told in words: rows of one vocabulary are one row, and everything else is said."""

import json
from functools import partial

import pytest
import torch

from embodied_rl import registry
from embodied_rl.envs._joined import _observation
from embodied_rl.envs._words import encode_words
from embodied_rl.envs.mixture import Config
from embodied_rl.errors import CapabilityError, ConfigError
from embodied_rl.types import TensorSpec
from tests.kit import CPU, TOYS
from tests.unit.test_mixture_conventions import make as mixture
from tests.unit.test_mixture_conventions import refused

TABLETOP = {
    "type": "tabletop", "tasks": ["reach"], "threads": 1, "observation": "pictures", "cameras": ["table"], "picture_size": 16,
}  # fmt: skip
REACHER = TOYS.parents[1] / "examples" / "reacher"
OTHERS = {
    "metaworld": {
        "env": {"type": "envpool", "id": "MetaWorld/Reach-v3"}, "action": [0, 1, 2, 6],
        "bridge": {"gripper": "convert", "metres": "convert"},
    },
    "reacher": {
        "env": {"type": "mjcf", "scene": str(REACHER / "reacher.xml"), "task": f"{REACHER / 'task.py'}:Reach", "threads": 1},
        "action": [0, 1],
    },
}  # fmt: skip
"""Both have room for 16 words, and the tabletop for 14."""


make = partial(mixture, copies=4)


def toy(name, **settings):
    """The arm that says one word, with `rename` where it is given."""
    more = {"rename": settings.pop("rename")} if "rename" in settings else {}
    return {"name": name, "env": {"type": str(TOYS / "arm.py"), **settings}, **more}


def start(env, tasks, mask=(True,) * 4):
    return env.reset(torch.tensor(mask), torch.arange(4) * 2 + 10, torch.tensor(tasks))


@pytest.fixture(params=OTHERS)
def mixed(request):
    """The tabletop (task 0) and another simulator that speaks (task 1)."""
    if request.param == "metaworld":
        pytest.importorskip("envpool")
    env = make({"env": TABLETOP}, OTHERS[request.param], missing="zeros")
    yield env
    env.close()


@pytest.fixture
def alone():
    """The words [4, 14] of the tabletop for the seeds of `start`."""
    module = registry.load("env", "tabletop")
    env = module.build(module.Config(**TABLETOP), num_envs=4, device=CPU, split="train", seed=0)
    yield start(env, [0] * 4)["instruction"]
    env.close()


def test_rows_of_one_vocabulary_are_padded_to_the_longest_and_it_is_told(mixed):
    row = mixed.spec.observation["instruction"]
    assert row.shape == (16,) and (row.low, row.high) == (0, 1023) and row.vocabulary and row.constant
    assert "'instruction' of tabletop is padded with zeros from 14 to 16 word ids" in mixed.conformance
    assert not [line for line in mixed.conformance if line.startswith(f"'instruction' of {mixed.names[1]}")]


def test_each_copy_is_told_the_words_of_its_part_and_then_nothing(mixed, alone):
    words = start(mixed, [0, 1, 0, 1])["instruction"]
    padded = torch.nn.functional.pad(alone, (0, 2))
    assert bool(alone.any(1).all()) and torch.equal(words[[0, 2]], padded[[0, 2]])
    texts = mixed.instructions()
    other = torch.tensor([encode_words(texts[copy], 16, "a test", "") for copy in (1, 3)])
    assert torch.equal(words[[1, 3]], other)
    mixed.step(torch.zeros(4, 7))
    assert torch.equal(mixed.observe()["instruction"], words), "words stay within an episode"
    moved = start(mixed, [0, 0, 1, 1], mask=[False, True, True, False])["instruction"]
    assert torch.equal(moved[:2], padded[:2]) and torch.equal(moved[2:], torch.tensor([encode_words(text, 16, "a test", "") for text in mixed.instructions()[2:]]))


@pytest.mark.parametrize("name", ["tiny_vla_tokens", "hf_vla"])
def test_a_policy_that_reads_words_acts_in_all_parts(mixed, name):
    if name == "hf_vla":
        pytest.importorskip("transformers")
    module = registry.load("policy", name)
    torch.manual_seed(0)
    policy = module.build(module.Config(width=16, heads=2, layers=1, chunk=2), env=mixed.spec, device=CPU)
    with torch.no_grad():
        for p in policy.parameters():  # tidy initial values would hide that words are not read
            p += 0.1 * torch.randn_like(p)
    start(mixed, [0, 1, 0, 1])
    seen = mixed.observe()
    out = policy.act(seen, generator=torch.Generator().manual_seed(0))
    step = mixed.step(out.action[:, 0])
    assert bool(step.reward.isfinite().all()) and not step.terminated.any()
    of = {}
    for what, row in {"as told": seen["instruction"], "other words": seen["instruction"].flip(0)}.items():
        of[what] = policy.act(seen | {"instruction": row}, generator=None, greedy=True).value
    assert bool((of["as told"] != of["other words"]).all())


def test_padding_words_needs_no_setting_and_one_that_does_nothing_is_refused():
    words = [toy("a", vocabulary="words A"), toy("b", vocabulary="words A", words=3)]
    env = make(*words, copies=2)
    assert env.spec.observation["word"].shape == (3,) and env.spec.observation["word"].vocabulary == "words A"
    assert "pad (True) does nothing" in refused(ConfigError, *words, pad=True)
    other = toy("c", vocabulary="words A", numbers=5) | {"action": [0, 1, 2, 3, 4]}
    report = make(words[0], words[1], other, pad=True).conformance
    assert "'taken' of c is padded with zeros from 5 to 7 numbers" in report
    assert "'word' of a is padded with zeros from 1 to 3 word ids" in report


def test_rows_of_different_or_unknown_vocabularies_are_refused_however_long_they_are():
    for length in (1, 3):
        told = refused(CapabilityError, toy("a", vocabulary="words A"), toy("b", vocabulary="words B", words=length))
        assert told == (
            "mixture: the ids of 'word' are of different vocabularies: words A (a), words B (b); give one of them another "
            "name (rename), which takes a policy that reads several rows of ids (mlp does)"
        )
    told = refused(CapabilityError, toy("a", vocabulary="words A"), toy("b", words=3))
    assert told == (
        "mixture: 'word' differs: a int64 [1], b int64 [3]; name the vocabulary of its ids in the spec of b, or give one "
        "of them another name (rename)"
    )


@pytest.mark.parametrize("name", ["tiny_vla_flow", "tiny_vla_tokens", "hf_vla", "pi0"])
def test_a_policy_that_reads_one_row_of_words_refuses_two(name):
    if name in ("hf_vla", "pi0"):
        pytest.importorskip("transformers")
    shown = {"cameras": {"front": 32}}
    two = [toy("a", vocabulary="words A", **shown), toy("b", vocabulary="words B", rename={"word": "other"}, **shown)]
    env = make(*two, missing="zeros")
    module = registry.load("policy", name)
    with pytest.raises(CapabilityError) as error:
        module.build(module.Config(), env=env.spec, device=CPU)
    assert str(error.value) == (
        "this env shows 2 rows of word ids (word, other), and this policy reads one: show one (parts of a mixture share "
        "it under one name where their ids are of one vocabulary), or use policy mlp"
    )


def test_the_mlp_reads_two_rows_of_words():
    two = [toy("a", vocabulary="words A"), toy("b", vocabulary="words B", rename={"word": "other"})]
    env, mlp = make(*two, missing="zeros"), registry.load("policy", "mlp")
    policy = mlp.build(mlp.Config(hidden=(8,), word_dim=4), env=env.spec, device=CPU)
    assert policy.act(start(env, [0, 1, 2, 3]), generator=None, greedy=True).action.shape == (4, 1, 7)


def test_pictures_of_different_sizes_are_refused_with_what_to_do():
    told = refused(CapabilityError, toy("a", cameras={"front": 8}), toy("b", cameras={"front": 16}))
    assert told == (
        "mixture: 'front' differs: a uint8 [8, 8, 3], b uint8 [16, 16, 3]; pictures are not resized: set one size in all "
        "of these envs, or give one of them another name (rename)"
    )


def test_bounds_are_widened_by_zero_where_something_is_padded_and_nowhere_else():
    parts = [
        {"a": TensorSpec((n,), low=1, high=2), "b": TensorSpec((2,), low=1, high=2), "c": TensorSpec((n,), torch.int64, 1, 9, vocabulary="v")}
        for n in (2, 3)
    ]
    config = Config.model_validate_json(json.dumps({"parts": [toy("x"), toy("y")], "pad": True}))
    union = _observation(config, ["x", "y"], parts, [])
    assert {name: (entry.low, entry.high) for name, entry in union.items()} == {"a": (0, 2), "b": (1, 2), "c": (0, 9)}
