"""Gymnasium's vector envs in every autoreset mode, against bare ones that are counted by hand."""

import json
import os
import signal

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from embodied_rl import registry
from embodied_rl.batch import flatten
from embodied_rl.check import check_env
from embodied_rl.collect import Collector
from embodied_rl.config import build_recipe
from embodied_rl.credit import CreditChain
from embodied_rl.envs import mixture
from embodied_rl.envs.gymnasium import Config, build
from embodied_rl.envs.gymnasium.vector import VectorizedEnv
from embodied_rl.errors import (
    CapabilityError,
    ConfigError,
    MissingExtraError,
    NotFoundError,
)
from embodied_rl.evaluate import evaluate
from embodied_rl.measure import Clock
from embodied_rl.seeding import start_seeds
from embodied_rl.session import Session, build_policy
from embodied_rl.train import run
from tests.kit import Scripted, algorithm, mlp

CPU = torch.device("cpu")


class Walk(gymnasium.Env):
    """Counts its steps up to a length that its seed says; even lengths are cut, odd ones reach the goal."""

    observation_space = spaces.Dict({"at": spaces.Dict({"t": spaces.Box(0, 9, (1,), np.float32)}), "end": spaces.Discrete(9)})
    action_space = spaces.Box(-2.0, 2.0, (1,), np.float32)

    def __init__(self, breaks=False):
        self.breaks = breaks

    def _obs(self):
        return {"at": {"t": np.array([np.nan if self.breaks and self.t == 2 and self.end > 4 else self.t], np.float32)}, "end": self.end}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.end = 0, int(self.np_random.integers(2, 7))
        return self._obs(), {"is_success": False}

    def step(self, action):
        self.t += 1
        over, odd = self.t == self.end, self.end % 2 == 1
        return self._obs(), float(self.t), over and odd, over and not odd, {"is_success": over and odd, "reward_t": float(self.t)}


class Own(VectorEnv):
    """A vector env of somebody's own: each copy counts to its `lengths`; `bend` is what is wrong with it."""

    def __init__(self, num_envs, mode="Disabled", bend=""):
        self.num_envs, self.mode, self.bend = num_envs + (bend == "copies"), mode, bend
        self.metadata = {} if bend == "mode" else {"autoreset_mode": AutoresetMode(mode)}
        self.single_observation_space = spaces.Box(0, 9, (1 + (bend == "space"),), np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        if self.bend == "mask":
            mask[:] = True
        if not hasattr(self, "t"):
            self.t, self.length = np.zeros(self.num_envs), np.zeros(self.num_envs)
        self.t[mask], self.length[mask] = 0, self.np_random.integers(2, 5, mask.sum())
        self.over = np.zeros(self.num_envs, bool)
        return self._obs(), {}

    def _obs(self):
        return self.t.astype(np.float32)[:, None]

    def step(self, actions):
        self.t += 1
        begins = self.over & (self.mode == "NextStep")
        self.t[begins] = 0
        self.over = over = (self.t >= self.length) & (not self.bend == "again" or ~begins)
        if self.bend == "again":
            over = over | begins
        last, info = self._obs(), {}
        if self.mode == "SameStep" or self.bend == "same":
            info = {} if self.bend == "last" else {"final_obs": last}
            self.t[over] = 0
        return self._obs(), np.ones(self.num_envs), over, np.zeros(self.num_envs, bool), info


@pytest.fixture(autouse=True)
def registered():
    gymnasium.register("Walk-v0", entry_point=Walk)
    gymnasium.register("Own-v0", vector_entry_point=Own)
    gymnasium.register("Single-v0", entry_point=Walk, vector_entry_point=lambda num_envs: Walk())
    yield
    for id in ("Walk-v0", "Own-v0", "Single-v0"):
        del gymnasium.registry[id]


def make(id, copies=3, mode="sync", reset=None, **settings):
    if reset is not None:
        settings["vector_kwargs"] = {"autoreset_mode": reset}
    return build(Config(id=id, vectorization_mode=mode, **settings), num_envs=copies, device=CPU, split="train", seed=0)


def refused(error, message, **settings):
    with pytest.raises(error, match=message):
        make(**settings).close()


def begin(env, seeds):
    b = env.spec.num_envs
    return env.reset(torch.ones(b, dtype=torch.bool), torch.tensor(seeds), torch.zeros(b, dtype=torch.int64))


def collect(env, decisions, rollouts=1, mode="stream", **given):
    collector = Collector(
        [env], mlp(env.spec, hidden=[8], shake=0.3), decisions=decisions, mode=mode, keep_final_obs=True, keep_actions=True,
        generator=torch.Generator().manual_seed(0), **given,
    )  # fmt: skip
    return [collector.collect() for _ in range(rollouts)]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


# ---- Disabled: nothing is given up ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("id", "mode", "max_steps"),
    [("CartPole-v1", "sync", None), ("Pendulum-v1", "sync", 9), ("Walk-v0", "sync", None), ("Walk-v0", "async", None)],
)
def test_a_disabled_vector_env_gives_the_rollouts_of_single_copies(id, mode, max_steps):
    ours, theirs = make(id, mode=None, max_steps=max_steps), make(id, mode=mode, max_steps=max_steps)
    assert isinstance(theirs, VectorizedEnv) and theirs.spec == ours.spec
    assert theirs._made_of == ours._made_of, "their evaluations can be compared"
    for a, b in zip(collect(ours, 40, 2), collect(theirs, 40, 2), strict=True):
        assert a.finished and same(a.finished, b.finished) and same(a.obs, b.obs) and same(a.final_obs, b.final_obs)
        for name in ("action", "reward", "terminated", "truncated", "episode", "valid", "value", "next_value", "steps"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.metrics == b.metrics and bool(b.valid.all())
    ours.close(), theirs.close()


def test_a_disabled_vector_env_goes_on_bit_for_bit_from_its_state():
    env, other = make("Walk-v0"), make("Walk-v0")
    begin(env, [2, 4, 6])
    stay = torch.tensor([True, True, False])  # the third copy waits after its end
    for t in range(9):
        step = env.step(torch.zeros(3, 1))
        done = (step.terminated | step.truncated) & stay
        obs = env.reset(done, torch.tensor([12, 14, 16]) + 10 * t, torch.zeros(3, dtype=torch.int64)) if done.any() else step.obs
    ages = [len(a) for a in env.get_state()["actions"]]
    assert len(set(ages)) > 1 and ages[2] == int(obs["end"][2])
    assert same(other.set_state(env.get_state()), obs)
    for _ in range(2):
        x, y = env.step(torch.ones(3, 1)), other.step(torch.ones(3, 1))
        assert same(x.obs, y.obs) and torch.equal(x.reward, y.reward) and torch.equal(x.truncated, y.truncated)


def test_processes_do_not_hear_ctrl_c():
    env = make("Walk-v0", 2, "async")
    begin(env, [2, 4])
    for process in env._env.processes:
        os.kill(process.pid, signal.SIGINT)
    assert env.step(torch.zeros(2, 1)).obs["at/t"].flatten().tolist() == [1.0, 1.0]
    env.close(), env.close()


# ---- what restarts itself ---------------------------------------------------------------------------------------------

RESTLESS = [("CartPole-v1", "sync", "NextStep"), ("CartPole-v1", "sync", "SameStep"), ("CartPole-v1", "vector_entry_point", None)]


def by_hand(env, seed, actions):
    """What a bare vector env does with these actions [T, B]: rows (t, copy, obs before, reward, done, obs after) and steps
    in which it only restarts a copy."""
    obs, _ = env.reset(seed=seed)
    over, rows, restarts = np.zeros(env.num_envs, bool), [], set()
    for t, action in enumerate(actions):
        new, reward, terminated, truncated, info = env.step(action)
        for b in range(env.num_envs):
            if over[b]:
                restarts.add((t, b))
                continue
            done = bool(terminated[b] or truncated[b])
            last = info["final_obs"][b] if done and "final_obs" in info else new[b]
            rows.append((t, b, obs[b], float(reward[b]), done, last))
        obs = new
        over = (terminated | truncated) & (env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP)
    return rows, restarts


@pytest.mark.parametrize(("id", "mode", "reset"), RESTLESS)
def test_episodes_are_those_of_the_bare_vector_env_counted_by_hand(id, mode, reset):
    copies, decisions = 3, 60
    env = make(id, copies, mode, reset)
    first, second = collect(env, decisions, 2)
    actions = torch.cat([first.action, second.action]).squeeze(2).numpy()
    seed = env._seed(start_seeds(0, "train", torch.arange(copies), torch.zeros(copies, dtype=torch.int64)).numpy())
    kwargs = {"vector_kwargs": {"autoreset_mode": reset}} if reset else {}
    bare = gymnasium.make_vec(id, copies, mode, **kwargs)
    rows, restarts = by_hand(bare, seed, actions)

    valid = torch.cat([first.valid, second.valid])
    assert {(t, b) for t, b in (~valid).nonzero().tolist()} == restarts and bool(restarts) == (reset != "SameStep")
    for r, offset in ((first, 0), (second, decisions)):
        here = [row for row in rows if offset <= row[0] < offset + decisions]
        assert int(r.steps.sum()) == int(r.valid.sum()) == len(here)
        for t, b, obs, reward, done, last in here:
            i = t - offset
            assert np.array_equal(r.obs["state"][i, b].numpy(), obs) and float(r.reward[i, b]) == reward
            assert bool(r.done[i, b]) == done
            if done:
                assert np.array_equal(r.final_obs["state"][r.final[i, b]].numpy(), last)
    returns, lengths, episodes = np.zeros(copies), np.zeros(copies, int), []
    for _, b, _, reward, done, _ in rows:
        returns[b] += reward
        lengths[b] += 1
        if done:
            episodes.append((b, returns[b], lengths[b]))
            returns[b], lengths[b] = 0, 0
    found = [
        x for r in (first, second) for x in zip(*(r.finished[k].tolist() for k in ("copy", "return", "length")), strict=True)
    ]
    assert len(episodes) > 6 and found == episodes
    env.close(), bare.close()


@pytest.mark.parametrize(("id", "mode", "reset"), RESTLESS)
def test_no_state_after_an_end_reaches_a_loss(id, mode, reset):
    env = make(id, 3, mode, reset)
    (rollout,) = collect(env, 80)
    fallen = {k: v.clone() for k, v in rollout.final_obs.items()}["state"][rollout.final[rollout.done]]
    advantage = CreditChain(algorithm("ppo").credit)(rollout)
    flat = flatten(rollout, advantage)
    assert len(flat) == int(rollout.valid.sum()) and len(fallen) > 6

    def upright(x):
        return ((x[:, 0].abs() <= 2.4) & (x[:, 2].abs() <= 12 * 2 * np.pi / 360)).all()

    assert upright(flat.obs["state"]) and not upright(fallen)
    # What was recorded where nothing was decided changes no advantage.
    idle = ~rollout.valid
    assert bool(idle.any()) == (reset != "SameStep") and not bool(rollout.mask[idle].any())
    for name in ("value", "next_value", "reward", "logp"):
        getattr(rollout, name)[idle] = float("nan")
    again = CreditChain(algorithm("ppo").credit)(rollout)
    assert torch.equal(again.advantage, advantage.advantage) and bool(torch.isfinite(again.advantage).all())
    assert float(advantage.advantage[idle].abs().sum()) == 0
    env.close()


@pytest.mark.parametrize("reset", ["NextStep", "SameStep", "Disabled"])
def test_success_terms_and_last_states_belong_to_the_episode_that_ended(reset):
    env = make("Walk-v0", 3, reset=reset)
    for rollout in collect(env, 25, 2):
        ended, r = rollout.finished, rollout
        assert len(ended["length"]) > 6 and 0 < ended["success_once"].sum() < len(ended["length"])
        assert torch.equal(ended["success_once"], ended["length"] % 2 == 1)
        assert torch.equal(ended["success_once"], ended["success_at_end"])
        assert torch.equal(ended["return"], (ended["length"] * (ended["length"] + 1) / 2).double())
        last = r.final_obs["at/t"][r.final[r.done]].flatten()
        assert torch.equal(last, r.final_obs["end"][r.final[r.done]].float()) and torch.equal(r.truncated[r.done], last % 2 == 0)
        total, count = r.metrics["t"]
        assert count == int(r.valid.sum()) and total == float(r.reward[r.valid].sum())
    env.close()


@pytest.mark.parametrize("reset", ["NextStep", "SameStep"])
@pytest.mark.parametrize("episodes", [2, 8])
def test_an_evaluation_counts_whole_episodes_and_repeats_itself(reset, episodes):
    env = make("Walk-v0", 3, reset=reset)
    spent = mlp(env.spec, hidden=[8])
    result = evaluate(spent, env, episodes=episodes, run_seed=1)
    assert torch.equal(result.returns, (result.length * (result.length + 1) / 2).double()) and int(result.length.min()) >= 2
    assert torch.equal(result.success_once, result.length % 2 == 1)
    again = evaluate(spent, env, episodes=episodes, run_seed=1)
    assert torch.equal(result.length, again.length), "whoever begins all copies anew seeds them"
    env.close()


def test_a_copy_that_went_on_without_being_asked_begins_with_the_simulators_next_episode():
    env = make("Walk-v0", 2, reset="SameStep")
    obs = begin(env, [2, 4])
    ends, active = obs["end"].tolist(), torch.tensor([True, False])
    one = torch.zeros(2, dtype=torch.int64)
    env.step(torch.zeros(2, 1), active)
    env.reset(torch.tensor([False, True]), torch.tensor([0, 6]), one)
    told = [env.step(torch.zeros(2, 1)) for _ in range(ends[1])]
    begun = ends[1] - 1  # steps that its old episode still takes
    assert [bool(s.starting is not None and s.starting[1]) for s in told] == [True] * begun + [False]
    assert all(float(s.reward[1]) == 0 and not (s.terminated | s.truncated)[1] for s in told[:begun])
    assert told[begun - 1].obs["at/t"][1] == 0 and told[begun].obs["at/t"][1] == 1 and told[begun].reward[1] == 1


# ---- a whole run ------------------------------------------------------------------------------------------------------

RECIPE = {
    "name": "pole",
    "env": {"type": "gymnasium", "id": "CartPole-v1", "vectorization_mode": "vector_entry_point"},
    "policy": {"type": "mlp", "hidden": [8]},
    "algorithm": {"type": "ppo", "update": {"epochs": 1, "minibatches": 2}},
    "collect": {"copies": 4, "decisions": 32},
    "train": {"env_steps": 400},
    "evaluate": {"episodes": 4, "copies": 2, "videos": 0},
    "log": {"tensorboard": False, "progress": False},
}


def test_ppo_counts_only_the_steps_that_were_played():
    session = Session.build(build_recipe(RECIPE))
    kept, collect = [], session.collector.collect
    session.collector.collect = lambda: kept.append(collect()) or kept[-1]
    clock, over, steps = Clock(), torch.zeros(4, dtype=torch.bool), 0
    for _ in range(4):
        metrics = session.iterate(clock).reduce()
        for done, valid in zip(kept[-1].done, kept[-1].valid, strict=True):
            assert torch.equal(valid, ~over) and not bool(over.all())
            steps, over = steps + int(valid.sum()), done
        assert session.env_steps == session.decisions == steps < 4 * 32 * session.update
        assert metrics["rollout/length_mean"] == float(kept[-1].finished["length"].double().mean())
    session.close()


def test_a_run_through_a_vector_env_trains_evaluates_and_is_reported(tmp_path):
    finished = run(build_recipe(RECIPE), folder=tmp_path / "run")
    assert finished.reason == "finished" and (tmp_path / "run" / "report.html").exists()
    assert finished.result.episodes == 4 and torch.equal(finished.result.returns, finished.result.length.double())


@pytest.mark.parametrize("reset", ["NextStep", "SameStep"])
def test_the_same_run_seed_gives_the_same_rollout(reset):
    a, b = (collect(make("Walk-v0", 3, reset=reset), 12)[0] for _ in range(2))
    assert same(a.obs, b.obs) and torch.equal(a.valid, b.valid)


# ---- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("id", "mode", "reset", "reason"),
    [
        ("CartPole-v1", "sync", "SameStep", "restarts copies by itself: autoreset_mode SameStep"),
        ("CartPole-v1", "vector_entry_point", None, "restarts copies by itself: autoreset_mode NextStep"),
        ("Own-v0", "vector_entry_point", None, "takes no list of seeds, one for each copy"),
    ],
)
def test_groups_and_states_of_an_env_that_cannot_are_refused_with_the_reason(id, mode, reset, reason):
    env = make(id, 4, mode, reset)
    assert not env.spec.seedable and not env.spec.has_state and reason in env.spec.reason
    with pytest.raises(CapabilityError, match=f"group_size 2 needs an env that starts the same.*{reason}"):
        collect(env, 4, mode="episodes", group_size=2)
    with pytest.raises(CapabilityError, match=f"cannot save its state.*{reason}"):
        env.get_state()
    env.close()


def test_an_own_vector_env_that_is_disabled_and_takes_one_seed_trains():
    env = make("Own-v0", 3, "vector_entry_point")
    assert not env.spec.restarts_itself and env.spec.max_steps is None
    for rollout in collect(env, 20, 2):
        assert bool(rollout.valid.all()) and set(rollout.finished["length"].tolist()) <= {2, 3, 4}
        assert torch.equal(rollout.finished["return"], rollout.finished["length"].double())


def test_a_decision_of_several_steps_is_refused_where_copies_cannot_wait(monkeypatch):
    class Module:
        @staticmethod
        def build(config, *, env, device):
            return Scripted(lambda o: None, lambda o: None, chunk=4)

    recipe = build_recipe(RECIPE)
    monkeypatch.setattr(registry, "load", lambda kind, name: Module)
    with pytest.raises(CapabilityError, match="covers 4 control steps, and a copy .* cannot wait .*NextStep"):
        build_policy(recipe, env=make("CartPole-v1", 2, "vector_entry_point").spec, device=CPU)
    assert build_policy(recipe, env=make("CartPole-v1", 2).spec, device=CPU).chunk == 4


def test_a_mixture_needs_copies_of_their_own_for_a_part_that_restarts_itself():
    def mixed(**copies):
        walk = {"type": "gymnasium", "id": "Walk-v0", "vectorization_mode": "sync"}
        restless = walk | {"vector_kwargs": {"autoreset_mode": "NextStep"}}
        parts = [{"name": "waits", "env": walk, **copies}, {"name": "restless", "env": restless, **copies}]
        return mixture.build(mixture.Config.model_validate_json(json.dumps({"parts": parts})), num_envs=4, device=CPU, split="train", seed=0)

    with pytest.raises(CapabilityError, match="the copies of restless restart by themselves.*state copies for every part"):
        mixed()
    env = mixed(copies=2)
    (rollout,) = collect(env, 40)
    assert bool(rollout.valid[:, :2].all()) and not bool(rollout.valid[:, 2:].all())
    ended = rollout.finished
    assert torch.equal(ended["return"], (ended["length"] * (ended["length"] + 1) / 2).double())
    assert env.spec.reason == "restless: its vector env restarts copies by itself: autoreset_mode NextStep"


OWN = {"id": "Own-v0", "mode": "vector_entry_point"}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"id": "CartPoll-v1", "mode": "sync"}, NotFoundError, "'CartPoll-v1' does not exist; did you mean 'CartPole-v1'?"),
        ({"id": "CartPoll-v1", "mode": "vector_entry_point"}, NotFoundError, "does not exist; did you mean 'CartPole-v1'?"),
        ({"id": "no_such:Foo-v0", "mode": "vector_entry_point"}, MissingExtraError, "not installed: No module named 'no_such'"),
        ({"id": "Walk-v0", "mode": "vector_entry_point"}, CapabilityError, "registers no vector_entry_point: set env.vect"),
        ({"id": "Own-v0", "mode": None}, ConfigError, "a vector env alone, so set env.vectorization_mode: vector_entry"),
        ({"id": "Single-v0", "mode": "vector_entry_point"}, CapabilityError, "makes a Walk, expected a gymnasium.vector"),
        ({"id": "CartPole-v1", "vector_kwargs": {"foo": 1}}, ConfigError, "foo.*look at env.kwargs and env.vector_kwargs"),
        ({"id": "CartPole-v1", "reset": "NextStop"}, ConfigError, "autoreset_mode 'NextStop' does not exist; did you mean"),
        ({"id": "CartPole-v1", "mode": None, "reset": "NextStep"}, ValueError, r"vector_kwargs \(autoreset_mode\) does nothing"),
        ({"id": "CartPole-v1", "kwargs": {"num_envs": 2}}, ConfigError, "must not hold num_envs; use .* collect.copies"),
        ({**OWN, "kwargs": {"speed": 2}}, ConfigError, "cannot be made: .*speed.*look at env.kwargs"),
        ({**OWN, "kwargs": {"bend": "mode"}}, CapabilityError, r"\['autoreset_mode'\] None, expected one of NextStep, SameStep"),
        ({**OWN, "kwargs": {"bend": "copies"}}, CapabilityError, "num_envs 4, and 3 copies were asked for"),
        ({**OWN, "kwargs": {"bend": "space"}}, CapabilityError, r"has shape \[3, 1\], but its space and num_envs promise \[3, 2\]"),
        ({**OWN, "kwargs": {"bend": "mask"}}, CapabilityError, r"'reset_mask': mask}\) of copy 0 changed copies \[1, 2\]; restart"),
    ],
)  # fmt: skip
def test_what_cannot_be_driven_is_refused_at_the_start(settings, error, message):
    refused(error, message, **settings)


@pytest.mark.parametrize(
    ("bend", "mode", "error", "message"),
    [
        ("last", "SameStep", CapabilityError, r"says autoreset_mode SameStep, but copy \d ended without its last observation"),
        ("same", "NextStep", CapabilityError, r"says autoreset_mode NextStep, but copy \d ended with another observation than"),
        ("same", "Disabled", CapabilityError, r"says autoreset_mode Disabled, but copy \d ended with another observation than"),
        ("again", "NextStep", CapabilityError, r"copies \[.*\] end in the step after their end"),
    ],
)
def test_a_vector_env_that_does_not_keep_its_word_is_refused_when_it_shows(bend, mode, error, message):
    env = make("Own-v0", 3, "vector_entry_point", kwargs={"bend": bend, "mode": mode})
    with pytest.raises(error, match=message):
        collect(env, 30)


@pytest.mark.parametrize("reset", ["NextStep", "SameStep", "Disabled"])
def test_an_episode_that_shows_what_is_not_finite_does_not_count_and_the_next_one_begins(reset, caplog):
    env = make("Walk-v0", 3, reset=reset, kwargs={"breaks": True})
    (rollout,) = collect(env, 60)
    told = [m for m in caplog.messages if "finite" in m]
    assert told and all(m.startswith("env gymnasium") and "observation 'at/t' is not finite in copies [" in m for m in told)
    assert rollout.finished["length"].unique().tolist() == [2, 3, 4], "of five and six steps none is left"
    assert rollout.invalid.sum() == 2 * len(rollout.episode[rollout.invalid].unique()), "they end after two"
    assert torch.isfinite(rollout.obs["at/t"]).all() and torch.isfinite(rollout.logp).all()
    env.close()


@pytest.mark.parametrize(
    "settings",
    [
        ["id=Walk-v0", "vectorization_mode=sync", "vector_kwargs={autoreset_mode: Disabled}"],
        ["id=Walk-v0", "vectorization_mode=sync", "vector_kwargs={autoreset_mode: SameStep}"],
        ["id=Walk-v0", "vectorization_mode=sync", "vector_kwargs={autoreset_mode: NextStep}"],
        ["id=CartPole-v1", "vectorization_mode=vector_entry_point", "max_steps=12"],
        ["id=Own-v0", "vectorization_mode=vector_entry_point"],
    ],
)
def test_the_contract_holds(settings):
    broken = [(f.name, f.detail) for f in check_env("gymnasium", settings, steps=15) if f.ok is False]
    assert broken == []
