"""Parts of a mixture that mean different things by an action, and a curriculum over the tasks of several parts."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.spatial.transform import Rotation

from embodied_rl.check import check_env_factory
from embodied_rl.collect import Collector
from embodied_rl.config import build_recipe
from embodied_rl.curriculum import Curriculum
from embodied_rl.envs._rotation import convert_rotation
from embodied_rl.envs.mixture import Config, build
from embodied_rl.errors import CapabilityError, ConfigError
from embodied_rl.measure import Clock
from embodied_rl.train import build_session
from tests.kit import Scripted

CPU = torch.device("cpu")
ARM = str(Path(__file__).parents[1] / "toys" / "arm.py")
HAND = {"control": "ee_delta", "frame": "base", "rotation": "axis_angle", "gripper": "opens_at_plus", "metres": 0.02, "radians": 0.05}


def arm(name, convention=None, bridge=None, action=None, said=None, numbers=7, **part):
    made = {"name": name, "env": {"type": ARM, "convention": convention, "numbers": numbers}, "bridge": bridge or {}, **part}
    return made | ({"action": action} if action else {}) | ({"convention": said} if said else {})


def make(*parts, copies=2, **settings):
    config = Config.model_validate_json(json.dumps({"parts": parts, **settings}))
    return build(config, num_envs=copies, device=CPU, split="train", seed=0)


def refused(kind, *parts, **settings):
    with pytest.raises(kind) as error:
        make(*parts, **settings)
    return str(error.value)


def taken(env, action, part=1):
    """What the part was given for an action of the mixture."""
    everyone = torch.ones(2, dtype=torch.bool)
    tasks = torch.full((2,), [i for i, name in enumerate(env.spec.tasks) if name.startswith(env.names[part])][0])
    env.reset(everyone, torch.arange(2) * 2, tasks)
    return env.step(torch.tensor([action, action], dtype=torch.float32)).obs["taken"][0, : env.envs[part].spec.action.size].tolist()


# ---- conversions -----------------------------------------------------------------------------------------------------


def test_a_gripper_of_the_other_sign_is_turned_round_and_nothing_else():
    env = make(arm("a", HAND), arm("b", HAND | {"gripper": "closes_at_plus"}, {"gripper": "convert"}))
    assert taken(env, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, -0.7])
    assert taken(env, [0.1] * 7, part=0) == pytest.approx([0.1] * 7)
    assert "gripper is opens_at_plus in a and closes_at_plus in b: b takes the gripper times -1" in env.conformance
    assert env.spec.action.convention.model_dump() == HAND


def test_steps_of_another_length_are_rescaled_and_what_is_out_of_reach_is_cut():
    # LIBERO's 0.05 m and 0.5 rad against 0.02 m and -0.1 rad: times 2.5 and -5.
    libero, other = HAND | {"metres": 0.05, "radians": 0.5}, HAND | {"radians": -0.1}
    env = make(arm("a", libero), arm("b", other, {"metres": "convert", "radians": "convert"}))
    assert taken(env, [0.1, -0.2, 0.4, 0.1, -0.1, 0.02, 0.7]) == pytest.approx([0.25, -0.5, 1.0, -0.5, 0.5, -0.1, 0.7])
    assert taken(env, [1.0, -7.0, 0, -1, 0, 0, 0])[:4] == [1.0, -1.0, 0.0, 1.0]
    report = "\n".join(env.conformance)
    assert "metres is 0.05 in a and 0.02 in b: b takes the position times 2.5; beyond 0.4 it is cut" in report
    assert "radians is 0.5 in a and -0.1 in b: b takes the rotation times -5; beyond 0.2 it is cut" in report
    # The other way round an action beyond 1 is one of 1 before it becomes smaller.
    env = make(arm("a", HAND), arm("b", libero, {"metres": "convert", "radians": "convert"}))
    assert taken(env, [1, 7, 0, 1, 0, 0, 0])[:4] == pytest.approx([0.4, 0.4, 0, 0.1])


@pytest.mark.parametrize("pair", [("axis_angle", "euler_xyz"), ("euler_xyz", "axis_angle")])
def test_rotations_are_written_as_scipy_writes_them(pair):
    v = (torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) - 0.5) * 3
    v[0] = 0
    if pair[1] == "euler_xyz":
        truth = Rotation.from_rotvec(v.double().numpy()).as_euler("XYZ")
    else:
        truth = Rotation.from_euler("XYZ", v.double().numpy()).as_rotvec()
    assert torch.allclose(convert_rotation(v, pair).double(), torch.from_numpy(truth), atol=1e-5)


def test_a_rotation_is_converted_in_its_own_unit():
    unit = HAND | {"radians": 0.5}
    # One with a sign against the right-hand rule, as ManiSkill has it.
    other = HAND | {"rotation": "euler_xyz", "radians": -1.0}
    env = make(arm("a", unit), arm("b", other, {"rotation": "convert", "radians": "convert"}))
    given = torch.tensor([0.4, -0.9, 0.7])
    wanted = Rotation.from_rotvec((given * 0.5).double().numpy()).as_euler("XYZ") / -1.0
    assert taken(env, [0.1, 0.2, 0.3, *given.tolist(), 0.5]) == pytest.approx([0.1, 0.2, 0.3, *wanted, 0.5], abs=1e-6)
    assert abs(wanted[0] - -0.2) > 0.02, "the two ways of writing differ here"
    assert "the rotation of b is converted from axis_angle to euler_xyz" in env.conformance
    # Numbers that are kept in their size are only written otherwise.
    kept = make(arm("a", unit), arm("b", other, {"rotation": "convert", "radians": "keep"}))
    as_they_are = Rotation.from_rotvec((given * 0.5).double().numpy()).as_euler("XYZ") / 0.5
    assert taken(kept, [0, 0, 0, *given.tolist(), 0])[3:6] == pytest.approx(as_they_are.tolist(), abs=1e-6)


def test_a_part_without_rotation_takes_its_places_of_the_whole_hand():
    four = {"control": "ee_delta", "rotation": "none", "gripper": "closes_at_plus", "metres": 0.01}
    part = arm("b", four, {"gripper": "convert", "metres": "convert"}, action=[0, 1, 2, 6], numbers=4)
    env = make(arm("a", HAND), part, pad=True)
    assert taken(env, [0.1, 0.2, -0.3, 9, 9, 9, 0.4]) == pytest.approx([0.2, 0.4, -0.6, -0.4])
    assert "what the action's numbers mean is unknown in b: frame" in env.conformance
    meant = env.spec.action.convention
    assert (meant.frame, meant.rotation, meant.gripper) == (None, "axis_angle", "opens_at_plus")
    wrong = refused(ConfigError, arm("a", HAND), part | {"action": [0, 1, 2, 3]}, pad=True)
    assert "number 3 of b is of its gripper and takes number 3 of the mixture, which is of the rotation in a" in wrong


def test_numbers_that_are_kept_reach_the_part_unchanged_and_are_one_thing_no_more():
    env = make(arm("a", HAND), arm("b", HAND | {"metres": 0.05, "frame": "tool"}, {"metres": "keep", "frame": "keep"}))
    assert taken(env, [0.5] * 7) == [0.5] * 7
    assert "metres is 0.02 in a and 0.05 in b, and b takes the numbers as they are" in env.conformance
    assert env.spec.action.convention.metres is None and env.spec.action.convention.gripper == "opens_at_plus"


def test_what_an_env_does_not_say_its_recipe_may_say():
    env = make(arm("a", HAND), arm("b", {"control": "ee_delta"}, {"gripper": "convert"}, said={k: v for k, v in (HAND | {"gripper": "closes_at_plus"}).items() if k != "control"}))
    assert taken(env, [0.5] * 7)[6] == -0.5
    assert "convention says control (ee_delta), and the env says so itself" in refused(ConfigError, arm("a", HAND), arm("b", HAND, said=HAND))
    short = refused(ConfigError, arm("a", HAND), arm("b", None, said=HAND, action=[0, 1, 2, 6], numbers=4), pad=True)
    assert "mixture: b: its convention" in short and "and the action has 4; correct its convention" in short


def test_every_item_is_told_as_the_same_or_unknown():
    assert make(arm("a", HAND), arm("b", HAND)).conformance == (
        "actions of a and b are the same in control (ee_delta), frame (base), rotation (axis_angle), gripper (opens_at_plus), metres (0.02), radians (0.05)",
    )
    env = make(arm("a", HAND), arm("b"))
    assert env.conformance == ("what the action's numbers mean is unknown in b: control, frame, rotation, gripper, metres, radians",)
    assert env.spec.action.convention is None


def test_a_difference_that_nothing_states_is_refused_with_what_would_state_it():
    closes = HAND | {"gripper": "closes_at_plus"}
    told = refused(CapabilityError, arm("a", HAND), arm("b", closes))
    assert told == (
        "mixture: gripper is opens_at_plus in a and closes_at_plus in b, so equal numbers would mean different things: "
        "set for b bridge: {gripper: convert}, or {gripper: keep} to give it the numbers as they are"
    )
    told = refused(CapabilityError, arm("a", HAND), arm("b", HAND | {"frame": "tool"}))
    assert "set for b bridge: {frame: keep} to give" in told and "convert" not in told
    assert "which nothing converts" in refused(ConfigError, arm("a", HAND), arm("b", HAND | {"frame": "tool"}, {"frame": "convert"}))
    joints = {"control": "joint_delta", "gripper": "opens_at_plus", "radians": 0.1}
    assert "control is ee_delta in a and joint_delta in b" in refused(CapabilityError, arm("a", HAND), arm("b", joints, action=[0, 1, 2, 3, 4, 5, 6]))
    assert "because it does not differ: remove it" in refused(ConfigError, arm("a", HAND), arm("b", HAND, {"gripper": "convert"}))
    assert "because nobody says what it is: say it in convention, or remove it" in refused(ConfigError, arm("a", HAND), arm("b", None, {"gripper": "convert"}))
    assert "because its numbers are the mixture's" in refused(ConfigError, arm("a", HAND, {"gripper": "convert"}), arm("b", HAND))
    poles = {"env": {"type": "gymnasium", "id": "CartPole-v1"}}
    mute = refused(ConfigError, poles | {"name": "a"}, poles | {"name": "b", "bridge": {"gripper": "convert"}})
    assert "bridge and convention of b are of continuous actions, and this one is discrete" in mute


def test_a_mixture_that_converts_keeps_the_contract_of_an_env():
    parts = (
        arm("a", HAND),
        arm("b", HAND | {"gripper": "closes_at_plus", "rotation": "euler_xyz", "metres": 0.05}, dict.fromkeys(("gripper", "rotation", "metres"), "convert")),
    )
    findings = check_env_factory(lambda b, **_: make(*parts, copies=b), copies=4, steps=12)
    assert not [f for f in findings if f.ok is False] and sum(f.ok is True for f in findings) > 10
    assert "gripper opens_at_plus" in next(f.detail for f in findings if f.name.startswith("The spec contradicts"))


# ---- curriculum ------------------------------------------------------------------------------------------------------

EASY, HARD = {"type": ARM, "tasks": ["easy"]}, {"type": ARM, "tasks": ["hard", "easy"]}


def mixed(folder, parts, **collect):
    return build_recipe(
        {
            "name": "mixed", "threads": 1, "env": {"type": "mixture", "parts": parts},
            "policy": {"type": "mlp", "hidden": [8], "word_dim": 4},
            "algorithm": {"type": "ppo", "update": {"epochs": 1, "minibatches": 1}},
            "collect": {"copies": 8, "decisions": 2, "mode": "episodes", **collect}, "train": {"env_steps": 512},
            "evaluate": {"episodes": 0}, "checkpoint": {"every": 1},
            "log": {"folder": str(folder), "tensorboard": False, "progress": False},
        }
    )  # fmt: skip


def test_a_curriculum_measures_every_task_of_every_part_and_keeps_their_weights(tmp_path):
    """`easy` is always solved and `hard` never, so that p (1 - p) goes to 0 and the weights are left."""
    parts = [{"name": "first", "env": EASY, "weight": 3}, {"name": "second", "env": HARD}]
    session = build_session(mixed(tmp_path, parts, curriculum={"kind": "success", "window": 5, "floor": 0.05}))
    assert session.conformance[0].startswith("what the action's numbers mean is unknown in first and second: ")
    played = [session.iterate(Clock()).reduce() for _ in range(24)]
    session.close()
    tasks = ("first.easy", "second.hard", "second.easy")
    last = played[-1]
    assert all(0.05 <= row["rollout/task_probability/" + t] for row in played for t in tasks)
    assert sum(last[f"rollout/task_probability/{t}"] for t in tasks) == pytest.approx(1)
    # 3 against a half and a half.
    assert last["rollout/task_probability/first.easy"] == pytest.approx(0.75, abs=0.02)
    for task, rate in zip(tasks, (1.0, 0.0, 1.0), strict=True):
        told = [row[f"rollout/success_once_rate/{task}"] for row in played if f"rollout/success_once_rate/{task}" in row]
        assert told and set(told) == {rate}, task
    returns = [row["rollout/return_mean/second.easy"] for row in played if "rollout/return_mean/second.easy" in row]
    assert set(returns) == {2.0}


def collector(parts, copies=8, group_size=2, **given):
    policy = Scripted(lambda obs: torch.zeros(len(obs["taken"]), 1, 7), lambda obs: obs["taken"].sum(-1), num_units=7)
    envs = [make(*parts, copies=copies)]
    return Collector(envs, policy, decisions=2, mode="episodes", group_size=group_size, **given)


@pytest.mark.parametrize("own", [False, True])
def test_a_curriculum_over_parts_goes_on_bit_for_bit(own):
    parts = [{"name": "first", "env": EASY}, {"name": "second", "env": HARD}]
    parts = [p | {"copies": n} for p, n in zip(parts, (2, 6), strict=True)] if own else parts
    whole, other = (collector(parts, curriculum=Curriculum(kind="success", window=5), run_seed=4) for _ in range(2))
    for _ in range(3):
        whole.collect()
    assert other.load_state_dict(copy.deepcopy(whole.state_dict())) is True
    seen = set()
    for _ in range(6):
        a, b = whole.collect(), other.collect()
        assert torch.equal(a.task, b.task) and torch.equal(a.reward, b.reward)
        assert torch.equal(whole.sampler.success, other.sampler.success)
        assert torch.equal(a.task[0, ::2], a.task[0, 1::2]), "a group shares its task"
        if own:
            assert set(a.task[0, :2].tolist()) == {0} and set(a.task[0, 2:].tolist()) <= {1, 2}
        seen |= set(a.task[0].tolist())
    assert seen == {0, 1, 2}
    assert whole.sampler.success.tolist()[1] < 0.1 < 0.9 < whole.sampler.success.tolist()[2]


def test_starts_that_are_played_again_keep_their_part_and_their_share():
    parts = [{"name": "first", "env": EASY, "weight": 3}, {"name": "second", "env": HARD}]
    made = collector(parts, group_size=1, curriculum=Curriculum(kind="success", starts=400, window=5), run_seed=1)
    share = torch.bincount(made.sampler.task, minlength=3) / 400
    # Weights 3 and 1, of which each task of the second has a half.
    assert share.tolist() == pytest.approx([0.75, 0.125, 0.125], abs=0.05)
    task_of = dict(zip(made.sampler.seed.tolist(), made.sampler.task.tolist(), strict=True))
    for _ in range(40):
        finished = made.collect().finished
        assert [task_of[s] for s in finished["seed"].tolist()] == finished["task"].tolist()
    moved = made.sampler.success != 0.5
    hard = made.sampler.task == 1
    assert bool(moved.any()) and bool((made.sampler.success[moved & hard] < 0.5).all())
    assert bool((made.sampler.success[moved & ~hard] > 0.5).all())
    with pytest.raises(CapabilityError, match="leave out the parts' copies"):
        collector([p | {"copies": 4} for p in (parts[1], {"name": "third", "env": EASY})], curriculum=Curriculum(starts=8))


def test_a_part_without_success_makes_a_curriculum_impossible(tmp_path):
    pole = {"name": "pole", "env": {"type": "gymnasium", "id": "Pendulum-v1"}, "action": [0]}
    recipe = mixed(tmp_path, [{"name": "first", "env": EASY}, pole], curriculum={"kind": "success"})
    recipe = recipe.model_copy(update={"env": recipe.env.model_copy(update={"missing": "zeros"})})
    with pytest.raises(CapabilityError, match="goes by success rates, and the env does not tell success"):
        build_session(recipe)


def test_the_spec_of_a_mixture_is_equal_however_often_it_is_built():
    parts = (arm("a", HAND), arm("b", HAND | {"gripper": "closes_at_plus"}, {"gripper": "convert"}))
    one, other = make(*parts).spec, make(*parts).spec
    assert one == other and replace(one, num_envs=3) != other


def test_parts_whose_words_have_different_ids_are_refused():
    def speaking(name, vocabulary):
        part = arm(name, HAND)
        return part | {"env": part["env"] | {"vocabulary": vocabulary}}

    told = refused(CapabilityError, speaking("a", "words A"), speaking("b", "words B"))
    assert "the ids of 'word' are of different vocabularies: words A (a), words B (b)" in told
    for second, joined in (("words A", "words A"), ("", "")):
        env = make(speaking("a", "words A"), speaking("b", second))
        assert env.spec.observation["word"].vocabulary == joined, "what one part does not say the mixture cannot say"
