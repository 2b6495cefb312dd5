"""What the numbers of an action mean: said truthfully, kept with what was learned, compared where sides meet."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from embodied_rl import checkpoint, registry
from embodied_rl.cli import main
from embodied_rl.compare import evaluate_targets
from embodied_rl.config import build_recipe, dump_recipe
from embodied_rl.conformance import Side, conform
from embodied_rl.convention import UNKNOWN, Convention, compare
from embodied_rl.demo_check import check_demos, validate
from embodied_rl.demo_format import Feature
from embodied_rl.demo_writer import DemoWriter
from embodied_rl.demonstrations import Demonstrations
from embodied_rl.envs.maniskill.convention import convention_of
from embodied_rl.envs.mjcf.scene import load_scene
from embodied_rl.errors import CapabilityError, ConfigError
from embodied_rl.train import build_session, run
from embodied_rl.types import ActionSpec, EnvSpec, TensorSpec
from tests.resume import lab

CPU = torch.device("cpu")
ARM = str(Path(__file__).parents[1] / "toys" / "arm.py")
HAND = {"control": "ee_delta", "frame": "base", "rotation": "axis_angle", "gripper": "opens_at_plus", "metres": 0.02, "radians": 0.05}


def said(**changes):
    return Convention(**HAND | changes)


def spec(convention=None, cameras=None, hz=20.0):
    seen = {"x": TensorSpec((1,))} | {n: TensorSpec((s, s, 3), torch.uint8) for n, s in (cameras or {}).items()}
    action = ActionSpec("continuous", 7, convention=convention)
    return EnvSpec(seen, action, 1, None, ("task",), seedable=True, has_state=True, control_hz=hz)


# ---- the words -------------------------------------------------------------------------------------------------------


def test_each_item_is_the_same_unknown_or_different():
    assert set(compare(said(), said()).values()) == {"same"}
    found = compare(said(gripper="closes_at_plus", metres=0.05, radians=None), said(frame=None))
    assert found == {
        "control": "same", "frame": "unknown", "rotation": "same", "gripper": "differs", "metres": "differs", "radians": "unknown",
    }  # fmt: skip
    assert compare(said(metres=0.1 + 0.2), said(metres=0.3))["metres"] == "same", "rounding is no difference"
    assert compare(said(radians=0.1), said(radians=-0.1))["radians"] == "differs"
    assert set(compare(UNKNOWN, said()).values()) == {"unknown"}
    joints = Convention(control="joint_delta", gripper="none", radians=0.1)
    assert compare(joints, joints) == {"control": "same", "gripper": "same", "radians": "same"}
    still = Convention(control="ee_delta", rotation="none")
    assert "radians" not in compare(still, still)


@pytest.mark.parametrize(
    ("convention", "size", "wanted"),
    [
        (said(), 7, ""),
        (said(rotation="quaternion_wxyz"), 8, ""),
        (said(rotation="rot6d", gripper="none"), 9, ""),
        (said(rotation="none", radians=None), 4, ""),
        (Convention(control="joint_delta", gripper="none"), 5, ""),
        (said(gripper=None), 12, ""),
        (said(), 4, "takes 7 numbers (3 of position, 3 of rotation, 1 of gripper), and the action has 4"),
        (said(rotation="none", radians=None), 7, "takes 4 numbers (3 of position, 1 of gripper), and the action has 7"),
    ],
)
def test_a_convention_fits_the_number_of_numbers(convention, size, wanted):
    misfit = convention.misfit(size)
    assert wanted in misfit and bool(wanted) == bool(misfit)
    if wanted:
        with pytest.raises(ConfigError, match="correct one of them"):
            ActionSpec("continuous", size, convention=convention)
    else:
        assert ActionSpec("continuous", size, convention=convention).convention == convention


def test_the_places_of_the_numbers():
    assert said().blocks(7) == ("position",) * 3 + ("rotation",) * 3 + ("gripper",)
    assert Convention(control="joint_absolute", gripper="opens_at_plus").blocks(3) == ("joint", "joint", "gripper")
    assert said(rotation=None).blocks(7) is None and said(gripper=None).blocks(7) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gripper": "opens"}, "opens_at_plus"),
        ({"radians": 0.0}, "radians .0. would turn nothing"),
        ({"metres": -0.05}, "greater than 0"),
        ({"rotation": "none", "radians": 0.1}, r"radians \(0.1\) says nothing with rotation \(none\)"),
        ({"control": "joint_delta", "metres": 0.1}, r"metres \(0.1\) belongs to the hand's pose and control is joint_delta"),
        ({"grip": "none"}, "Extra inputs"),
    ],
)
def test_what_no_convention_can_say_is_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        Convention(**wrong)


# ---- what the envs say ------------------------------------------------------------------------------------------------


def test_the_arm_on_the_table_does_what_it_says():
    module = registry.load("env", "tabletop")
    env = module.build(module.Config(tasks=["reach"]), num_envs=1, device=CPU, split="train", seed=0)
    try:
        told = env.spec.action.convention
        env.reset(torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        wanted, frame = env.controller.position.clone(), env.controller.rotation.clone()
        env.step(torch.tensor([[0.5, 0, 0, 0, 0, 1.0, 1.0]]))
        move, turn = env.controller.position - wanted, env.controller.rotation[0] @ frame[0].T
        assert move[0].tolist() == pytest.approx([told.metres / 2, 0, 0], abs=1e-6)
        # About the base's z axis, by the right-hand rule, multiplied from the left.
        assert torch.atan2(turn[1, 0], turn[0, 0]).item() == pytest.approx(told.radians, abs=1e-5)
        opened = float(env.controller.finger)
        env.step(torch.tensor([[0, 0, 0, 0, 0, 0, -1.0]]))
        assert told.gripper == "opens_at_plus" and opened > float(env.controller.finger)
    finally:
        env.close()


def test_metaworlds_gripper_closes_at_plus():
    pytest.importorskip("envpool")
    module = registry.load("env", "envpool")
    env = module.build(module.Config(id="MetaWorld/Reach-v3"), num_envs=1, device=CPU, split="train", seed=0)
    try:
        told = env.spec.action.convention
        one = torch.ones(1, dtype=torch.bool)
        before = env.reset(one, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))["state"][0].clone()
        for _ in range(12):
            step = env.step(torch.tensor([[1.0, 0, 0, 1.0]]))
        moved = step.obs["state"][0] - before
        assert told.gripper == "closes_at_plus" and float(moved[3]) < -0.1, "entry 3 is how far the fingers are apart"
        # The hand lags a little behind the twelve moves of its target.
        assert 0.6 < float(moved[0]) / (12 * told.metres) <= 1.0
        assert told.misfit(env.spec.action.size) == ""
    finally:
        env.close()


@dataclass
class PDEEPoseControllerConfig:
    frame: str = "root_translation:root_aligned_body_rotation"
    pos_lower: float = -0.1
    pos_upper: float = 0.1
    rot_lower: float = -0.2
    rot_upper: float = 0.2
    use_delta: bool = True
    normalize_action: bool = True


@dataclass
class PDJointPosControllerConfig:
    lower: float | None
    upper: float | None
    use_delta: bool = False


def test_maniskills_controllers_are_read():
    grip = PDJointPosControllerConfig(-0.01, 0.04)
    pose = convention_of("panda", {"arm": PDEEPoseControllerConfig(), "gripper": grip})
    # mani_skill multiplies a normalised rotation by rot_lower, so that +1 turns against the right-hand rule.
    assert pose == said(rotation="euler_xyz", metres=0.1, radians=-0.2)
    absolute = PDEEPoseControllerConfig(use_delta=False, normalize_action=False, pos_lower=-2.0, pos_upper=2.0)
    assert convention_of("panda", {"arm": absolute, "gripper": grip}) == said(
        control="ee_absolute", rotation="euler_xyz", metres=2.0, radians=0.2
    )
    tool = PDEEPoseControllerConfig(frame="body_translation:body_aligned_body_rotation", pos_upper=0.3)
    assert convention_of("panda_stick", {"arm": tool}) == said(
        frame="tool", rotation="euler_xyz", metres=None, radians=-0.2, gripper="none"
    )
    joints = {"arm": PDJointPosControllerConfig(-0.1, 0.1, use_delta=True), "gripper": grip}
    assert convention_of("panda_wristcam", joints) == Convention(control="joint_delta", gripper="opens_at_plus", radians=0.1)
    assert convention_of("panda", {"arm": object(), "gripper": grip}) is None
    assert convention_of("xarm6_robotiq", joints) is None and convention_of("panda", {"gripper": grip}) is None


def test_a_scene_of_ones_own_says_what_its_recipe_says(tmp_path):
    scene = "examples/reacher/reacher.xml"
    assert load_scene(scene).action.convention is None
    joints = Convention(control="joint_torque", gripper="none")
    assert load_scene(scene, joints).action.convention == joints
    with pytest.raises(ConfigError, match=r"takes 7 numbers .* and the action has 2; correct env.convention"):
        load_scene(scene, said())


# ---- two sides -------------------------------------------------------------------------------------------------------


def test_a_difference_is_one_sentence_and_what_is_unknown_is_told():
    a, b = Side.of("checkpoint a", spec(said())), Side.of("the env", spec(said(gripper="closes_at_plus")))
    with pytest.raises(CapabilityError) as error:
        conform(a, b, "do this")
    assert str(error.value) == (
        "what the action's numbers mean differs: gripper is opens_at_plus in checkpoint a and closes_at_plus in the env; do this"
    )
    report = conform(a, b, "", despite=("gripper",))
    assert report[0].startswith("actions of checkpoint a and the env are the same in control (ee_delta), frame (base)")
    assert report[1] == "gripper is opens_at_plus in checkpoint a and closes_at_plus in the env, as stated"
    assert conform(a, Side.of("the env", spec()), "")[0] == (
        "what the action's numbers mean is unknown in the env: control, frame, rotation, gripper, metres, radians"
    )
    with pytest.raises(ConfigError, match=r"start_despite \(metres\) does nothing"):
        conform(a, b, "", despite=("gripper", "metres"))
    tokens = replace(spec(), action=ActionSpec("discrete", 5))
    assert conform(Side.of("a", tokens), Side.of("b", tokens), "") == ("vectors of a and b are the same: x (1)",)


def test_a_picture_that_one_side_lacks_is_refused_and_one_of_another_size_is_told():
    a = Side.of("checkpoint a", spec(said(), {"front": 64, "wrist": 32}))
    with pytest.raises(CapabilityError, match=r"picture 'wrist' of checkpoint a is not one of the env \(front\); do this"):
        conform(a, Side.of("the env", spec(said(), {"front": 64})), "do this")
    with pytest.raises(CapabilityError, match=r"picture 'more' of the env is not one of checkpoint a \(front, wrist\); do this"):
        conform(a, Side.of("the env", spec(said(), {"front": 64, "wrist": 32, "more": 8})), "do this")
    report = conform(a, Side.of("the env", spec(said(), {"front": 128, "wrist": 32}, hz=10.0)), "")
    assert (report[1], report[-1]) == (
        "picture 'front' has 64 x 64 pixels in checkpoint a, 128 x 128 in the env",
        "checkpoint a has 20 control steps per second, the env 10",
    )


def test_what_a_checkpoint_keeps_comes_back():
    side = Side.of("here", spec(said(), {"front": 64}))
    assert Side.restore("here", json.loads(json.dumps(side.state()))) == side
    assert Side.restore("old", None) == Side("old", UNKNOWN)
    with pytest.raises(ConfigError, match="bad: its action's convention is wrong: gripper"):
        Side.restore("bad", side.state() | {"convention": {"gripper": "up"}})


def speaking(vocabulary):
    """An env whose instructions are 6 ids below 50."""
    base = spec()
    words = TensorSpec((6,), torch.int64, 0, 49, constant=True, vocabulary=vocabulary)
    return replace(base, observation=base.observation | {"instruction": words})


def test_ids_of_another_vocabulary_of_the_same_size_are_refused_and_unnamed_ones_are_taken():
    a, b, silent = (Side.of(name, speaking(v)) for name, v in (("there", "words A"), ("here", "words B"), ("there", "")))
    match = r"ids of 'instruction' mean differs: 'words A' in there and 'words B' in here"
    with pytest.raises(CapabilityError, match=match):
        conform(a, b, "do something")
    unknown = "what the ids of 'instruction' mean is unknown in there"
    assert not any("ids" in line for line in conform(a, replace(a, where="here"), ""))
    assert unknown in conform(silent, b, "") and unknown in conform(b, silent, "")
    assert "what the ids of 'instruction' mean is unknown in old" in conform(Side.restore("old", None), b, "")
    old = a.state()
    del old["vocabularies"]
    conform(Side.restore("of a version before", old), b, "")
    assert Side.restore("there", json.loads(json.dumps(a.state()))) == a


def test_every_env_that_speaks_in_word_ids_names_the_same_vocabulary():
    from embodied_rl.envs._words import word_row
    from embodied_rl.envs.envpool.layout import INSTRUCTION
    from embodied_rl.envs.tabletop.observe import OBSERVATION

    named = {word_row(5).vocabulary, INSTRUCTION.vocabulary, OBSERVATION["instruction"].vocabulary}
    assert len(named) == 1 and "" not in named


# ---- runs ------------------------------------------------------------------------------------------------------------


def recipe(folder, name, convention, **changes):
    base = {
        "name": name, "threads": 1, "env": {"type": ARM, "convention": convention, "cameras": changes.pop("cameras", {})},
        "policy": {"type": "mlp", "hidden": [8], "word_dim": 4}, "algorithm": {"type": "ppo", "update": {"epochs": 1, "minibatches": 1}},
        "collect": {"copies": 4, "decisions": 4}, "train": {"env_steps": 16},
        "evaluate": {"episodes": 0, "episodes_during": 4, "copies": 2},
        "log": {"folder": str(folder), "tensorboard": False, "progress": False},
    }  # fmt: skip
    return build_recipe(base | changes)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Runs `opens` and `closes`, begun in envs whose grippers mean opposite things; read only."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("opens", "closes"):
        made = recipe(folder, name, HAND | {"gripper": f"{name}_at_plus"})
        session = build_session(made)
        checkpoint.save(folder / name / "checkpoints", session.state_dict(), update=0, keep=1)
        (folder / name / "recipe.yaml").write_text(dump_recipe(made))
        session.close()
    return folder


def test_a_policy_is_not_evaluated_where_its_numbers_mean_something_else(two_runs, capsys):
    first, second = str(two_runs / "opens"), str(two_runs / "closes")
    assert len(evaluate_targets([first], episodes=2)) == 1
    assert main(["evaluate", first, second, "--episodes", "2", "--copies", "2"]) == 2
    told = capsys.readouterr().err
    assert "gripper is closes_at_plus in checkpoint" in told and "opens_at_plus in the env" in told


def test_training_starts_from_a_policy_that_means_the_same_or_where_it_is_stated_that_it_does_not(two_runs, tmp_path, caplog):
    start = {"start_from": str(two_runs / "closes")}
    with pytest.raises(CapabilityError, match="or name in start_despite what training is to get over"):
        build_session(recipe(tmp_path, "a", HAND, **start))
    caplog.set_level(logging.INFO)
    unknown = build_session(recipe(tmp_path, "b", None, **start))
    assert "what the action's numbers mean is unknown in the env: control" in unknown.conformance[0]
    assert unknown.conformance[0] in caplog.text
    unknown.close()
    found = run(recipe(tmp_path, "c", HAND, start_despite=["gripper"], **start)).folder
    kept = (found / "conformance.txt").read_text()
    assert "gripper is closes_at_plus in checkpoint" in kept and "the same in control (ee_delta), frame (base)" in kept
    with pytest.raises(ValueError, match=r"start_despite \(\['gripper'\]\) does nothing with start_from \(null\)"):
        recipe(tmp_path, "d", HAND, start_despite=["gripper"])


def rewritten(found, folder, change):
    """A copy of a checkpoint with another note of what it means."""
    state = checkpoint.load(found)
    change(state)
    return checkpoint.save(folder, state, update=1, keep=1)


def test_a_checkpoint_of_old_says_nothing_and_is_taken(two_runs, tmp_path):
    found = checkpoint.latest(two_runs / "closes" / "checkpoints")
    old = rewritten(found, tmp_path / "old", lambda state: state.pop("meaning"))
    session = build_session(recipe(tmp_path, "a", HAND, start_from=str(old)))
    assert session.conformance[0].startswith(f"what the action's numbers mean is unknown in checkpoint {old}: control")
    session.load_state_dict(checkpoint.load(old), str(old))
    session.close()


def test_a_run_is_not_resumed_with_a_simulator_that_has_changed_its_convention(two_runs, tmp_path):
    session = build_session(recipe(tmp_path, "a", HAND))
    found = checkpoint.latest(two_runs / "opens" / "checkpoints")
    assert checkpoint.load(found)["meaning"] == session.meaning().state()
    assert session.load_state_dict(checkpoint.load(found), str(found)) is True
    found = checkpoint.latest(two_runs / "closes" / "checkpoints")
    with pytest.raises(CapabilityError, match="resume with the version and the simulator that it was begun with"):
        session.load_state_dict(checkpoint.load(found), str(found))
    session.close()


# ---- demonstrations --------------------------------------------------------------------------------------------------


@pytest.fixture
def demos(tmp_path):
    """A set whose info.json may be changed; returns its folder and how to say a convention in it."""
    _, original = lab.seen()
    folder = tmp_path / "demos"
    folder.mkdir()
    for part in ("data", "meta"):
        (folder / part).symlink_to(Path(original) / part, target_is_directory=True)
    info = json.loads((folder / "meta" / "info.json").read_text())
    (folder / "meta").unlink()
    (folder / "meta").mkdir()
    for file in (Path(original) / "meta").iterdir():
        if file.name != "info.json":
            (folder / "meta" / file.name).write_bytes(file.read_bytes())

    def say(convention):
        own = info["embodied_rl"] | {"convention": convention}
        (folder / "meta" / "info.json").write_text(json.dumps(info | {"embodied_rl": own}))

    return folder, say


def test_demonstrations_are_not_learned_by_ids_of_another_vocabulary(demos):
    folder, say = demos
    say(None)
    path = folder / "meta" / "info.json"
    info = json.loads(path.read_text())
    name = next(iter(info["embodied_rl"]["observation"]))
    info["embodied_rl"]["observation"][name]["vocabulary"] = "words A"
    path.write_text(json.dumps(info))
    there = Demonstrations(folder)

    def env(vocabulary):
        entries = there.observation | {name: replace(there.observation[name], vocabulary=vocabulary)}
        return EnvSpec(entries, replace(there.action, convention=None), 1, None, ("task",), seedable=True, has_state=True)

    there.require(env("words A")), there.require(env(""))
    with pytest.raises(CapabilityError, match="'words A' in demonstrations .* and 'words B' in the env"):
        there.require(env("words B"))


def test_demonstrations_are_not_learned_where_their_numbers_mean_something_else(demos):
    folder, say = demos
    say({"gripper": "closes_at_plus"})
    there = Demonstrations(folder)
    env = EnvSpec(there.observation, replace(there.action, convention=None), 1, None, ("task",), seedable=True, has_state=True)
    assert "unknown in" in there.require(env)[0]
    opposite = replace(env, action=replace(env.action, convention=Convention(gripper="opens_at_plus")))
    with pytest.raises(CapabilityError, match=r"gripper is closes_at_plus in demonstrations .* opens_at_plus in the env; collect"):
        there.require(opposite)
    assert check_demos(str(folder))[0].detail == "what an action means is gripper closes_at_plus"
    say(None)
    assert "unknown in" in Demonstrations(folder).require(opposite)[0]
    assert check_demos(str(folder))[0].detail == "what an action means is unknown"
    say({"gripper": "sideways"})
    with pytest.raises(ConfigError, match="its action's convention is wrong: gripper: Input should be 'none'"):
        Demonstrations(folder)
    assert any("convention is wrong: gripper" in problem for problem in validate(folder))


def test_a_policy_that_imitates_means_what_its_demonstrations_mean(demos):
    folder, say = demos
    say({"gripper": "closes_at_plus"})
    env, _ = lab.seen()
    settings = {"type": "sft", "demonstrations": str(folder), "steps": 1, "batch_size": 4, "warmup": 0}
    small = {"type": "tiny_vla_flow", "width": 16, "heads": 2, "layers": 1, "channels": 8, "glances": 2, "chunk": 2}
    session = build_session(build_recipe({"threads": 1, "env": {"type": env}, "policy": small, "algorithm": settings}))
    assert session.state_dict()["meaning"]["convention"]["gripper"] == "closes_at_plus"
    assert "unknown in the env: gripper" not in session.conformance[0] and "gripper" in session.conformance[0]


def test_a_set_is_not_gone_on_with_under_another_convention(tmp_path):
    def writer(convention):
        return DemoWriter(
            tmp_path / "set", {"action": Feature("float32", (7,))}, fps=20, robot="arm", made={"seed": 0}, observation={},
            convention=convention,
        )  # fmt: skip

    def kept():
        return json.loads((tmp_path / "set" / "meta" / "info.json").read_text())["embodied_rl"]["convention"]

    writer(said()).finish()
    assert kept() == said().model_dump()
    writer(None).finish()
    assert kept() == said().model_dump(), "what was said of the first episodes stays said"
    with pytest.raises(CapabilityError, match="gripper is opens_at_plus in .* and closes_at_plus in the env; choose another --out"):
        writer(said(gripper="closes_at_plus"))
    path = tmp_path / "set" / "meta" / "info.json"
    info = json.loads(path.read_text())
    del info["embodied_rl"]["convention"]
    path.write_text(json.dumps(info))
    writer(said()).finish()
    assert kept() is None, "and what was not said of them is not said later"
