"""Vectors and the action's numbers, compared where two sides meet; conventions are in test_conventions.py."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from embodied_rl import checkpoint
from embodied_rl.cli import main
from embodied_rl.config import build_recipe, dump_recipe
from embodied_rl.conformance import Side, conform
from embodied_rl.convention import UNKNOWN
from embodied_rl.demonstrations import Demonstrations
from embodied_rl.errors import CapabilityError
from embodied_rl.train import build_session
from embodied_rl.types import ActionSpec, EnvSpec, TensorSpec
from tests.resume import lab

ARM = str(Path(__file__).parents[1] / "toys" / "arm.py")


def side(where, numbers=7, **vectors):
    """An env that shows vectors of (size, meaning), and what is compared elsewhere or not at all."""
    seen = {name: TensorSpec((size,), meaning=meaning) for name, (size, meaning) in vectors.items()}
    other = {
        "ids": TensorSpec((4,), torch.int64, 0, 9), "slots": TensorSpec((3, 5)), "front": TensorSpec((8, 8, 3), torch.uint8),
        "mass": TensorSpec((1,), privileged=True),
    }  # fmt: skip
    spec = EnvSpec(seen | other, ActionSpec("continuous", numbers), 1, None, ("task",), seedable=True, has_state=True)
    return Side.of(where, spec)


def test_what_a_checkpoint_keeps_of_vectors_and_numbers_comes_back():
    a = side("a", hand=(3, "metres"), joints=(7, ""))
    assert a.vectors == {"hand": (3, "metres"), "joints": (7, "")} and (a.numbers, a.bounds) == (7, (-1.0, 1.0))
    assert Side.restore("a", json.loads(json.dumps(a.state()))) == a
    chosen = Side.of("b", EnvSpec({}, ActionSpec("discrete", 5), 1, None, ("task",), seedable=True, has_state=True))
    assert chosen.numbers is None is chosen.bounds


def test_a_vector_that_is_missing_or_of_another_size_is_refused():
    a = side("checkpoint a", hand=(3, "metres"), joints=(7, ""))
    for other, words in (
        (side("the env", hand=(3, "metres")), "vector 'joints' of checkpoint a is not one of the env (hand); do this"),
        (side("the env"), "vector 'hand' of checkpoint a is not one of the env (none); do this"),
        (side("the env", hand=(3, ""), joints=(7, ""), load=(1, "kg")), "vector 'load' of the env is not one of checkpoint a (hand, joints); do this"),
        (side("the env", hand=(3, ""), joints=(8, "")), "vector 'joints' has 7 numbers in checkpoint a and 8 in the env; do this"),
        (side("the env", 6, hand=(3, ""), joints=(7, "")), "an action has 7 numbers in checkpoint a and 6 in the env; do this"),
    ):  # fmt: skip
        with pytest.raises(CapabilityError) as error:
            conform(a, other, "do this")
        assert str(error.value) == words


def test_another_meaning_is_told_and_none_is_no_difference():
    a = side("a", hand=(3, "metres"), joints=(7, ""), wrist=(1, "rad"))
    b = side("b", hand=(3, "millimetres"), joints=(7, "radians"), wrist=(1, "rad"))
    assert conform(a, b, "")[1:] == (
        "vector 'hand' is 'metres' in a and 'millimetres' in b",
        "vectors of a and b are the same: joints (7), wrist (1)",
        "actions of a and b have 7 numbers each",
    )


def test_bounds_are_told_where_they_differ():
    env, inside, beyond = (replace(side(n), bounds=b) for n, b in (("env", (-1.0, 1.0)), ("low", (-0.5, 1.0)), ("far", (-1.0, 3.14159))))
    assert not any("run from" in line for line in conform(env, env, ""))
    assert conform(inside, env, "")[-1] == "the action's numbers run from -0.5 to 1 in low, from -1 to 1 in env"
    assert conform(beyond, env, "")[-1] == "the action's numbers run from -1 to 3.14 in far, from -1 to 1 in env; what is beyond is cut"
    assert "run from" not in conform(replace(inside, bounds=None), env, "")[-1]


def test_a_checkpoint_from_before_vectors_were_kept_is_compared_as_it_was():
    old = side("a", hand=(3, "")).state()
    for name in ("vectors", "numbers", "bounds"):
        del old[name]
    then = Side.restore("a", old)
    assert then.vectors is then.numbers is then.bounds is None
    for a, b in ((then, side("b", 6, arm=(2, ""))), (Side("b", UNKNOWN), side("a"))):
        assert len(conform(a, b, "")) == 1 and "unknown in" in conform(a, b, "")[0]
    with pytest.raises(CapabilityError, match=r"picture 'front' of a is not one of b \(none\)"):
        conform(then, replace(side("b"), pictures={}), "")


# ---- runs ------------------------------------------------------------------------------------------------------------


def recipe(folder, name, numbers, **changes):
    base = {
        "name": name, "threads": 1, "env": {"type": ARM, "numbers": numbers}, "policy": {"type": "mlp", "hidden": [8], "word_dim": 4},
        "algorithm": {"type": "ppo", "update": {"epochs": 1, "minibatches": 1}},
        "collect": {"copies": 4, "decisions": 4}, "train": {"env_steps": 16}, "evaluate": {"episodes": 0, "episodes_during": 4, "copies": 2},
        "log": {"folder": str(folder), "tensorboard": False, "progress": False},
    }  # fmt: skip
    return build_recipe(base | changes)


def test_a_run_is_refused_before_any_weights_are_loaded(tmp_path, capsys, monkeypatch):
    for numbers in (3, 4):
        made = recipe(tmp_path, f"of{numbers}", numbers)
        session = build_session(made)
        checkpoint.save(tmp_path / f"of{numbers}" / "checkpoints", session.state_dict(), update=0, keep=1)
        (tmp_path / f"of{numbers}" / "recipe.yaml").write_text(dump_recipe(made))
        session.close()
    same = build_session(recipe(tmp_path, "a", 3, start_from=str(tmp_path / "of3")))
    where = f"checkpoint {tmp_path / 'of3'} and the env"
    assert same.conformance[-2:] == (f"vectors of {where} are the same: taken (3)", f"actions of {where} have 3 numbers each")
    same.close()
    loaded = []
    for module in ("saved", "compare"):
        monkeypatch.setattr(f"embodied_rl.{module}.load_weights", lambda *a, **k: loaded.append(a))
    with pytest.raises(CapabilityError, match=r"vector 'taken' has 3 numbers in checkpoint .*of3 and 4 in the env; set env as it was there"):
        build_session(recipe(tmp_path, "a", 4, start_from=str(tmp_path / "of3")))
    found = checkpoint.latest(tmp_path / "of3" / "checkpoints")
    session = build_session(recipe(tmp_path, "a", 4))
    with pytest.raises(CapabilityError, match=r"and 4 in the env; resume with the version and the simulator"):
        session.load_state_dict(checkpoint.load(found), str(found))
    session.close()
    # The env of the first target is every target's.
    monkeypatch.undo()
    assert main(["evaluate", str(tmp_path / "of3"), str(tmp_path / "of4"), "--episodes", "2", "--copies", "2"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: vector 'taken' has 4 numbers in checkpoint") and told.count("\n") == 1 and not loaded


def test_what_demonstrations_hold_is_kept_with_what_learned_from_them(tmp_path):
    env, original = lab.seen()
    (tmp_path / "data").symlink_to(Path(original) / "data", target_is_directory=True)
    shutil.copytree(Path(original) / "meta", tmp_path / "meta")
    stats = tmp_path / "meta" / "stats.json"
    kept = json.loads(stats.read_text())
    kept["action"]["max"][0] = 1.5
    stats.write_text(json.dumps(kept))
    assert Demonstrations(original).bounds() == (-1.0, 1.0) and Demonstrations(tmp_path).bounds() == (-1.0, 1.5)
    settings = {"type": "sft", "demonstrations": str(tmp_path), "steps": 1, "batch_size": 4, "warmup": 0}
    small = {"type": "tiny_vla_flow", "width": 16, "heads": 2, "layers": 1, "channels": 8, "glances": 2, "chunk": 2}
    session = build_session(build_recipe({"threads": 1, "env": {"type": env}, "policy": small, "algorithm": settings}))
    assert session.state_dict()["meaning"]["bounds"] == [-1.0, 1.5]
    where = f"demonstrations {tmp_path}"
    assert f"the action's numbers run from -1 to 1.5 in {where}, from -1 to 1 in the env; what is beyond is cut" in session.conformance
    assert any(line.startswith(f"vectors of {where} and the env are the same: ") for line in session.conformance)
    stats.unlink()
    assert Demonstrations(tmp_path).bounds() is None
