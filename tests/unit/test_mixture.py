"""Several envs in one batch: each copy plays in its part, and what does not fit is stated, reported or refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from embodied_rl.check import check_env_factory
from embodied_rl.collect import Collector
from embodied_rl.config import build_recipe
from embodied_rl.curriculum import Curriculum, TaskSampler
from embodied_rl.envs._joined import share_copies
from embodied_rl.envs.mixture import Config, build
from embodied_rl.envs.target import Config as TargetConfig
from embodied_rl.envs.target import build as build_target
from embodied_rl.errors import CapabilityError, ConfigError, NotFoundError
from embodied_rl.measure import rollout_metrics
from embodied_rl.session import Session
from embodied_rl.train import run

CPU = torch.device("cpu")
TARGET = {"type": "target"}
TABLETOP = {"type": "tabletop", "tasks": ["reach", "push"]}
TOY = {"env": TARGET, "action": [5, 2]}
TOY_AND_ARM = {"missing": "zeros", "parts": [TOY, {"env": TABLETOP, "weight": 2}]}


def make(copies=4, **settings):
    config = Config.model_validate_json(json.dumps(settings))
    return build(config, num_envs=copies, device=CPU, split="train", seed=0)


def refused(kind, **settings):
    with pytest.raises(kind) as error:
        make(**settings)
    return str(error.value)


def start(env, tasks, mask=None):
    n = env.spec.num_envs
    mask = torch.ones(n, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return {k: v.clone() for k, v in env.reset(mask, torch.arange(n) * 2 + 10, torch.tensor(tasks)).items()}


def test_each_copy_moves_as_in_its_own_env_with_the_numbers_it_was_mapped_to():
    env, alone = make(**TOY_AND_ARM), build_target(TargetConfig(), num_envs=4, device=CPU, split="train", seed=0)
    seen = start(env, [0, 1, 0, 2])
    alone_seen = alone.reset(torch.ones(4, dtype=torch.bool), torch.arange(4) * 2 + 10, torch.zeros(4, dtype=torch.int64))
    action = torch.rand(4, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # Copies 0 and 2 say their target in places 5 and 2; twice in a row solves the toy.
    action[:, 5], action[:, 2] = alone_seen["state"][:, 0], alone_seen["state"][:, 1]
    first, second = env.step(action), env.step(action)
    assert torch.equal(seen["state"][[0, 2]], alone_seen["state"][[0, 2]])
    assert not first.success.any() and second.success.tolist() == [True, False, True, False]
    assert second.reward[[0, 2]].tolist() == [1.0, 1.0]


def test_an_entry_that_a_part_lacks_is_zero_there_and_nowhere_else():
    env = make(**TOY_AND_ARM)
    seen = start(env, [0, 1, 0, 2])
    for name, toy in {"state": True, "picture": True, "proprio": False, "instruction": False}.items():
        filled = seen[name].reshape(4, -1).ne(0).any(1).tolist()
        assert filled == ([True, False, True, False] if toy else [False, True, False, True]), name


def test_the_next_episode_of_a_copy_may_be_in_another_part():
    env = make(**TOY_AND_ARM)
    before = start(env, [0, 0, 0, 0])
    after = start(env, [1, 1, 1, 1], mask=[True, False, False, False])
    assert bool(after["proprio"][0].any()) and not bool(after["picture"][0].any())
    assert all(torch.equal(before[k][1:], after[k][1:]) for k in before)


def test_the_report_says_what_was_filled_padded_renamed_and_mapped():
    report = make(**TOY_AND_ARM).conformance
    assert "'proprio' is filled with zeros in target" in report
    assert "target takes the numbers [5, 2] of 7, and ignores the others" in report
    renamed = make(missing="zeros", parts=[{**TOY, "rename": {"state": "wanted"}}, {"env": TABLETOP}])
    assert "target shows 'state' as 'wanted'" in renamed.conformance
    assert "wanted" in renamed.spec.observation and "state" not in renamed.spec.observation
    (unknown,) = make(parts=[{"env": TARGET}, {"name": "b", "env": {"type": "target", "tolerance": 0.5}}]).conformance
    assert unknown.startswith("what the action's numbers mean is unknown in target and b: control, frame")


def test_vectors_of_one_name_are_padded_at_their_end_when_stated():
    parts = [{**TOY, "rename": {"state": "proprio"}}, {"env": TABLETOP}]
    assert "target torch" not in refused(CapabilityError, missing="zeros", parts=parts)
    assert "'proprio' differs: target float32 [2], tabletop float32 [31]; set env.pad: true" in refused(CapabilityError, missing="zeros", parts=parts)
    env = make(missing="zeros", pad=True, parts=parts)
    seen = start(env, [0, 1, 0, 2])
    assert "'proprio' of target is padded with zeros from 2 to 31 numbers" in env.conformance
    assert bool(seen["proprio"][0, :2].all()) and not bool(seen["proprio"][0, 2:].any())


def test_what_cannot_be_joined_is_refused_with_the_setting_that_would_state_how():
    assert "'picture' is shown by target and not by tabletop: set env.missing: zeros" in refused(CapabilityError, parts=[{"env": TARGET}, {"env": TABLETOP}])
    unmapped = refused(CapabilityError, missing="zeros", parts=[{"env": TARGET}, {"env": TABLETOP}])
    assert "target takes continuous [2], tabletop takes continuous [7]" in unmapped and "action: [0, 1]" in unmapped
    cartpole = {"type": "gymnasium", "id": "CartPole-v1"}
    assert "different kinds of action" in refused(CapabilityError, missing="zeros", parts=[{"env": TARGET, "rename": {"state": "x"}}, {"env": cartpole}])
    assert "2 numbers, and its action is [0, 0]" in refused(ConfigError, missing="zeros", parts=[{"env": TARGET, "action": [0, 0]}, {"env": TABLETOP}])
    assert "did you mean 'tolerance'" in refused(ConfigError, parts=[{"env": {"type": "target", "tolerence": 1.0}}, {"env": TABLETOP}])
    assert "env.parts[1] (cups): env 'cups' does not exist" in refused(NotFoundError, parts=[{"env": TARGET}, {"env": {"type": "cups"}}])
    assert "called target" in refused(ValueError, parts=[{"env": TARGET}, {"env": TARGET}])
    assert "missing (zeros) does nothing" in refused(ConfigError, missing="zeros", parts=[{"env": TARGET}, {"name": "b", "env": TARGET}])
    assert "no 'stat'; did you mean 'state'?" in refused(ConfigError, parts=[{"env": TARGET, "rename": {"stat": "x"}}, {"name": "b", "env": TARGET}])


def test_a_part_is_started_as_often_as_its_weight_says():
    spec = make(**TOY_AND_ARM).spec
    assert spec.tasks == ("target.target", "tabletop.reach", "tabletop.push")
    # Weights 1 and 2: a third of the starts for the toy, and a third for each task of the arm.
    assert spec.task_weights is None
    spec = make(missing="zeros", parts=[TOY, {"env": TABLETOP, "weight": 6}]).spec
    sampler = TaskSampler(Curriculum(), spec)
    assert sampler.probabilities().tolist() == pytest.approx([1 / 7, 3 / 7, 3 / 7])
    n = torch.arange(4000)
    share = torch.bincount(sampler.choose(n, torch.zeros_like(n), n), minlength=3) / 4000
    assert share.tolist() == pytest.approx([1 / 7, 3 / 7, 3 / 7], abs=0.03)
    harder = TaskSampler(Curriculum(kind="success", floor=0.05), replace(spec, task_weights=(1.0, 1.0, 2.0)))
    harder.success = torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64)
    assert harder.probabilities().tolist() == pytest.approx([0.3 / 0.45, 0.05 / 0.45, 0.1 / 0.45])


def test_groups_share_a_task_and_each_task_has_its_metrics(tmp_path):
    parts = [{"name": f"of_{n}", "env": {"type": "gymnasium", "id": "CartPole-v1", "max_steps": n}} for n in (5, 7)]
    recipe = build_recipe(
        {
            "env": {"type": "mixture", "parts": parts},
            "policy": {"type": "mlp", "hidden": [16], "attention_heads": 0},
            "algorithm": {"type": "grpo"},
            "collect": {"copies": 8, "decisions": 8, "mode": "episodes", "group_size": 2},
            "evaluate": {"episodes": 0},
            "log": {"folder": str(tmp_path), "tensorboard": False, "progress": False},
        }
    )
    session = Session.build(recipe)
    try:
        rollout = session.collector.collect()
    finally:
        session.close()
    assert torch.equal(rollout.task[0], torch.tensor([0, 0, 1, 1, 0, 0, 1, 1]))
    metrics = rollout_metrics(rollout, session.collector.spec.tasks).reduce()
    # A pole cannot fall within 7 steps, and each is worth 1.
    assert metrics["rollout/return_mean/of_5.CartPole-v1"] == 5.0
    assert metrics["rollout/return_mean/of_7.CartPole-v1"] == 7.0


OWN = {"missing": "zeros", "parts": [{**TOY, "copies": 2}, {"env": {**TABLETOP, "max_steps": 4}, "copies": 6}]}


def test_copies_are_shared_in_proportion_and_every_part_has_one():
    def sizes(*given):
        return [rows.stop - rows.start for rows in share_copies(*given)]

    assert sizes([2, 6], 8) == [2, 6] and sizes([2, 6], 4) == [1, 3]
    assert sizes([1, 2, 1], 8) == [2, 4, 2]
    assert sizes([3, 5], 7) == [3, 4]  # 2.625 and 4.375
    assert sizes([1, 99], 3) == [1, 2] and sizes([99, 1, 1], 3) == [1, 1, 1]


def test_a_part_with_copies_of_its_own_is_built_with_those_and_moves_as_alone():
    env, alone = make(8, **OWN), build_target(TargetConfig(), num_envs=2, device=CPU, split="train", seed=0)
    assert [part.spec.num_envs for part in env.envs] == [2, 6] and env.spec.num_envs == 8
    assert env.spec.blocks == ((2, (0,)), (6, (1, 2)))
    assert "each part has copies of its own: target 2, tabletop 6" in env.conformance
    seen = start(env, [0, 0, 1, 2, 1, 2, 1, 2])
    alone_seen = alone.reset(torch.ones(2, dtype=torch.bool), torch.arange(2) * 2 + 10, torch.zeros(2, dtype=torch.int64))
    assert torch.equal(seen["state"][:2], alone_seen["state"]) and not seen["state"][2:].any()
    assert seen["proprio"][2:].any(1).all() and not seen["proprio"][:2].any()
    action = torch.zeros(8, 7)
    action[:2, 5], action[:2, 2] = seen["state"][:2, 0], seen["state"][:2, 1]
    before = {k: v.clone() for k, v in seen.items()}
    steps = [env.step(action) for _ in range(4)]
    assert steps[1].success.tolist() == [True, True] + [False] * 6
    assert steps[3].truncated.tolist()[2:] == [True] * 6
    assert all(torch.equal(seen[k], before[k]) for k in seen)  # an observation that was handed out does not change
    with pytest.raises(CapabilityError, match=r"copy 0 cannot play 'tabletop.push', which is another part's"):
        start(env, [2, 0, 1, 2, 1, 2, 1, 2])
    assert make(1, **OWN).spec.blocks is None


def test_copies_of_ones_own_are_stated_for_all_parts_and_not_beside_weights():
    assert "state all or none" in refused(ValueError, missing="zeros", parts=[{**TOY, "copies": 2}, {"env": TABLETOP}])
    parts = [{**TOY, "copies": 2, "weight": 3}, {"env": TABLETOP, "copies": 2}]
    assert "weight (3) of target does nothing beside copies (2)" in refused(ValueError, missing="zeros", parts=parts)


def test_a_mixture_with_copies_of_its_own_keeps_the_contract_of_an_env():
    findings = check_env_factory(lambda b, **_: make(b, **OWN), copies=4, steps=20)
    assert not [f for f in findings if f.ok is False] and sum(f.ok is True for f in findings) > 10


def test_tasks_are_chosen_among_those_that_a_group_can_play():
    spec = make(8, **OWN).spec
    able = spec.playable()[::2]
    n = torch.arange(4000)
    in_turn = TaskSampler(Curriculum(), spec, playable=able).choose(n % 4, n // 4, n)
    assert set(in_turn[n % 4 == 0].tolist()) == {0}
    assert torch.bincount(in_turn[n % 4 == 1]).tolist() == [0, 500, 500]
    harder = TaskSampler(Curriculum(kind="success", floor=0.05), spec, playable=able)
    harder.success = torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64)
    chosen = harder.choose(n % 4, n // 4, n)
    assert set(chosen[n % 4 == 0].tolist()) == {0}
    # Within the arm 0.3 against 0.05.
    share = torch.bincount(chosen[n % 4 == 2], minlength=3) / 1000
    assert share.tolist() == pytest.approx([0, 6 / 7, 1 / 7], abs=0.04)
    told = harder.metrics().reduce()
    assert told["rollout/task_probability/target.target"] == pytest.approx(1 / 4)
    assert told["rollout/task_probability/tabletop.reach"] == pytest.approx(3 / 4 * 6 / 7)


def trained(tmp_path, env, **changes):
    recipe = {
        "name": "mixed",
        "env": {"type": "mixture", **env},
        "policy": {"type": "mlp", "hidden": [16]},
        "algorithm": {"type": "ppo", "update": {"epochs": 1, "minibatches": 1}},
        "collect": {"copies": 8, "decisions": 8},
        "train": {"env_steps": 192},
        "evaluate": {"episodes": 9, "copies": 4, "videos": 0},
        "log": {"folder": str(tmp_path), "tensorboard": False, "progress": False},
    }
    for section, values in changes.items():
        recipe[section] |= values
    folder = run(build_recipe(recipe)).folder
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows, json.loads((folder / "evaluation.json").read_text())


@pytest.mark.parametrize("how", ["copies", "weights"])
def test_ppo_trains_on_two_simulators_in_one_batch_and_every_task_is_measured(tmp_path, how):
    point = {"env": {"type": str(Path(__file__).parents[1] / "toys" / "point.py"), "max_steps": 5}, "action": [0, 1]}
    arm = {"env": {**TABLETOP, "max_steps": 4}}
    if how == "copies":
        parts, curriculum = [{**point, "copies": 2}, {**arm, "copies": 6}], {"curriculum": {"kind": "success"}}
    else:
        parts, curriculum = [point, {**arm, "weight": 6}], {}
    rows, evaluation = trained(tmp_path, {"missing": "zeros", "parts": parts}, collect=curriculum)
    told = {key for row in rows for key in row}
    for task in ("point.first", "point.second", "tabletop.reach", "tabletop.push"):
        assert f"rollout/return_mean/{task}" in told
        assert (f"rollout/task_probability/{task}" in told) == (how == "copies")
    played = [episode["task"] for episode in evaluation["episodes"]]
    assert [played.count(task) for task in evaluation["tasks"]] == [3, 2, 2, 2]


def test_a_group_across_two_parts_is_refused():
    parts = [{**TOY, "copies": 3}, {"env": TABLETOP, "copies": 5}]
    with pytest.raises(CapabilityError, match="the parts have 3 and 5 copies; make each a multiple of 2"):
        Collector([make(8, missing="zeros", parts=parts)], None, decisions=1, group_size=2)


@pytest.mark.parametrize("own", [True, False])
def test_parts_that_move_side_by_side_give_what_each_gives_alone(own):
    pytest.importorskip("envpool")
    from embodied_rl.envs import envpool

    ids, of = ("CartPole-v0", "CartPole-v1"), [0, 0, 1, 1] if own else [0, 1, 0, 1]
    parts = [{"name": f"part{p}", "env": {"type": "envpool", "id": id}} | ({"copies": 2} if own else {}) for p, id in enumerate(ids)]
    env, held = make(4, parts=parts), 2 if own else 4
    alone = [envpool.build(envpool.Config(id=id), num_envs=held, device=CPU, split="train", seed=0) for id in ids]
    none, every = torch.zeros(held, dtype=torch.int64), torch.ones(held, dtype=torch.bool)
    rows = [slice(0, 2), slice(2, 4)] if own else [slice(0, 4)] * 2
    seen = start(env, of)["state"]
    parts_seen = [part.reset(every, none, none)["state"] for part in alone]
    g = torch.Generator().manual_seed(0)
    handed_out = []
    for t in range(24):
        if t == 8 and not own:
            of[0] = 1
            seen = start(env, of, mask=[True, False, False, False])["state"]
            parts_seen[1] = alone[1].reset(torch.tensor([True, False, False, False]), none, none)["state"]
        where = torch.tensor(of)
        wanted = torch.stack([parts_seen[p][copy - rows[p].start] for copy, p in enumerate(of)])
        assert torch.equal(seen, wanted)
        action = torch.randint(2, (4,), generator=g)
        # No copy at all, those of one part, any, and all.
        active = [torch.zeros(4, dtype=torch.bool), where == 0, torch.rand(4, generator=g) < 0.6, None][t % 4]
        step = env.step(action, active)
        for p, part in enumerate(alone):
            go = (where == p)[rows[p]] & (torch.ones(4, dtype=torch.bool) if active is None else active)[rows[p]]
            theirs = part.step(action[rows[p]], go)
            parts_seen[p] = theirs.obs["state"]
            mine = torch.arange(4)[rows[p]][(where == p)[rows[p]]]
            assert torch.equal(step.reward[mine], theirs.reward[mine - rows[p].start])
            assert torch.equal(step.terminated[mine], theirs.terminated[mine - rows[p].start])
        seen = step.obs["state"]
        handed_out.append((seen, seen.clone()))
    assert all(torch.equal(x, kept) for x, kept in handed_out)
