"""The envpool env: the same numbers as the pool itself, explicit resets, subsets, send and recv."""

import dataclasses
import sys
import warnings

import numpy as np
import pytest
import torch

from embodied_rl import registry
from embodied_rl.collect import Collector
from embodied_rl.envs._words import encode_words
from embodied_rl.errors import CapabilityError, ConfigError, MissingExtraError, NotFoundError, ShapeError
from tests.kit import mlp

envpool = pytest.importorskip("envpool")
from embodied_rl.envs.envpool import Config, build  # noqa: E402
from embodied_rl.envs.envpool.metaworld import SENTENCES, sentence_of  # noqa: E402

CPU = torch.device("cpu")


def make(id, copies=4, seed=7, **settings):
    return build(Config(id=id, **settings), num_envs=copies, device=CPU, split="train", seed=seed)


def raw_pool(id, copies=4, seed=7, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # envpool makes Box spaces that warn about their own precision
        pool = envpool.make_gymnasium(id, num_envs=copies, seed=seed, **settings)
        assert pool.observation_space is not None
    return pool


def reset(env, mask=None):
    b = env.spec.num_envs
    mask = torch.ones(b, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return env.reset(mask, torch.zeros(b, dtype=torch.int64), torch.zeros(b, dtype=torch.int64))


@pytest.mark.parametrize("threads", [1, 3])
def test_continuous_copies_give_what_the_pool_gives(threads):
    env, pool = make("HalfCheetah-v4", threads=threads), raw_pool("HalfCheetah-v4", num_threads=1)
    assert np.array_equal(reset(env)["state"].numpy(), pool.reset()[0].astype(np.float32))
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        a = torch.rand(4, 6, generator=g) * 4 - 2
        step = env.step(a)
        obs, reward, terminated, truncated, _ = pool.step(a.clamp(-1, 1).double().numpy())
        assert np.array_equal(step.obs["state"].numpy(), obs.astype(np.float32))
        assert np.array_equal(step.reward.numpy(), reward)
        assert np.array_equal(step.terminated.numpy(), terminated) and np.array_equal(step.truncated.numpy(), truncated)
    env.close()


def test_bounded_actions_are_mapped_to_the_box():
    env, pool = make("Pendulum-v1"), raw_pool("Pendulum-v1")
    reset(env), pool.reset()
    a = torch.tensor([[-3.0], [-0.5], [0.25], [1.0]])
    native = np.array([[-2.0], [-1.0], [0.5], [2.0]], np.float32)
    assert np.array_equal(env.step(a).obs["state"].numpy(), pool.step(native)[0])


def test_a_finished_copy_keeps_its_last_observation_and_starts_where_a_reset_puts_it():
    env, pool = make("CartPole-v1", threads=2), raw_pool("CartPole-v1")
    before = torch.from_numpy(pool.reset()[0])
    assert torch.equal(reset(env)["state"], before)
    lengths, age = [], np.zeros(4, int)
    for _ in range(120):
        push = np.ones(4, np.int32)
        step = env.step(torch.ones(4, dtype=torch.int64))
        obs, reward, terminated, truncated, info = pool.step(push)
        assert np.array_equal(step.obs["state"].numpy(), obs)
        assert np.array_equal(step.terminated.numpy(), terminated) and not truncated.any()
        age += 1
        ids = np.flatnonzero(terminated).astype(np.int32)
        if len(ids):
            lengths += age[ids].tolist()
            age[ids] = 0
            assert (step.obs["state"][ids, 2].abs() > 0.2).all(), "the fallen pole, not a fresh start"
            fresh = reset(env, terminated.tolist())["state"]
            assert np.array_equal(fresh[ids].numpy(), pool.reset(ids)[0])
            assert (fresh[ids].abs() < 0.05).all()
            kept = np.setdiff1d(np.arange(4), ids)
            assert torch.equal(fresh[kept], step.obs["state"][kept])
    assert min(lengths) >= 7 and max(lengths) <= 11, "no step is lost to a hidden reset"


def test_a_time_limit_truncates_with_the_true_last_observation():
    env, endless = make("HalfCheetah-v4", max_steps=5), make("HalfCheetah-v4")
    assert env.spec.max_steps == 5 and endless.spec.max_steps == 1000
    reset(env), reset(endless)
    for t in range(5):
        a = torch.full((4, 6), 0.1 * t)
        step, other = env.step(a), endless.step(a)
        assert torch.equal(step.obs["state"], other.obs["state"])
        assert step.truncated.tolist() == [t == 4] * 4 and not step.terminated.any()


def test_copies_keep_their_rows_with_many_threads():
    env, alone = make("CartPole-v1", copies=64, threads=8), make("CartPole-v1", copies=64, threads=1)
    assert torch.equal(reset(env)["state"], reset(alone)["state"])
    g = torch.Generator().manual_seed(0)
    for t in range(200):
        a = torch.randint(2, (64,), generator=g)
        x, y = env.step(a), alone.step(a)
        assert torch.equal(x.obs["state"], y.obs["state"]) and torch.equal(x.terminated, y.terminated), t
        if x.terminated.any():
            assert torch.equal(reset(env, x.terminated.tolist())["state"], reset(alone, x.terminated.tolist())["state"])


def test_only_active_copies_advance():
    env, other = make("HalfCheetah-v4"), make("HalfCheetah-v4")
    start = reset(env)["state"]
    reset(other)
    a = torch.full((4, 6), 0.5)
    step, whole = env.step(a, torch.tensor([True, False, True, False])), other.step(a)
    assert torch.equal(step.obs["state"][[1, 3]], start[[1, 3]]) and step.reward[[1, 3]].tolist() == [0, 0]
    assert torch.equal(step.obs["state"][[0, 2]], whole.obs["state"][[0, 2]])
    later = env.step(a, torch.tensor([False, True, False, True]))
    assert torch.equal(later.obs["state"], whole.obs["state"])
    assert torch.equal(env.step(a, torch.zeros(4, dtype=torch.bool)).obs["state"], whole.obs["state"])


def test_results_stay_as_they_were_when_the_pool_moves_on():
    for id in ("HalfCheetah-v4", "CartPole-v1"):
        env = make(id)
        kept = [reset(env)["state"]]
        zero = torch.zeros(4, *env.spec.action.shape, dtype=env.spec.action.dtype)
        copies = [kept[0].clone()]
        for _ in range(50):
            step = env.step(zero)
            kept += [step.obs["state"], step.reward]
            copies += [step.obs["state"].clone(), step.reward.clone()]
        assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_send_and_recv_are_a_step_in_two_halves():
    env, other = make("HalfCheetah-v4"), make("HalfCheetah-v4")
    reset(env), reset(other)
    for _ in range(5):
        a = torch.full((4, 6), -0.3)
        env.send(a)
        x, y = env.recv(), other.step(a)
        assert torch.equal(x.obs["state"], y.obs["state"]) and torch.equal(x.reward, y.reward)


def test_dictionaries_categories_images_and_success_are_understood():
    env = make("BabyAI-GoToObj-v0", copies=2)
    obs = reset(env)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in obs.items()} == {
        "direction": (torch.int64, (2,)), "image": (torch.uint8, (2, 7, 7, 3)), "mission": (torch.uint8, (2, 512)),
    }  # fmt: skip
    env = make("FetchReach-v4", copies=2)
    assert set(reset(env)) == {"state"} and env.spec.has_success
    assert env.spec.observation["state"].meaning == "observation 10, achieved_goal 3, desired_goal 3"
    step = env.step(torch.zeros(2, 4))
    assert step.obs["state"].shape == (2, 16)
    distance = (step.obs["state"][:, 10:13] - step.obs["state"][:, 13:]).norm(dim=-1)
    assert step.success.dtype == torch.bool and torch.equal(step.success, distance < 0.05)


def test_reward_terms_are_reported_when_asked_for_and_add_up():
    env = make("HalfCheetah-v4", reward_terms=True)
    reset(env)
    step = env.step(torch.full((4, 6), 0.7))
    assert set(step.metrics) == {"run", "ctrl"}
    torch.testing.assert_close(step.metrics["run"] + step.metrics["ctrl"], step.reward)
    plain = make("HalfCheetah-v4")
    reset(plain)
    assert plain.step(torch.zeros(4, 6)).metrics == {}


def test_what_envpool_cannot_do_is_said():
    env = make("CartPole-v1")
    assert env.spec.seedable is False and env.spec.has_state is False and env.spec.cameras == ()
    for call in (env.get_state, lambda: env.set_state({})):
        with pytest.raises(CapabilityError, match="envpool gives no access to it.*use env.type: gymnasium"):
            call()
    with pytest.raises(NotFoundError, match="camera 'front' does not exist"):
        env.render(torch.tensor([0]), "front", 8, 8)
    env.close()
    env.close()


def test_wrong_actions_are_refused_with_the_copies_named():
    env = make("HalfCheetah-v4")
    start = reset(env)["state"]
    bad = torch.zeros(4, 6)
    bad[2, 3] = float("nan")
    with pytest.raises(ShapeError, match=r"not finite in copies \[2\]"):
        env.step(bad)
    with pytest.raises(ShapeError, match=r"found shape \[4\], torch.float32 on cpu, expected \[4, 6\]"):
        env.step(torch.zeros(4))
    # A refused action leaves the pool ready for the next one.
    assert env.step(torch.zeros(4, 6)).obs["state"].shape == start.shape
    env = make("CartPole-v1")
    reset(env)
    with pytest.raises(ShapeError, match=r"copies \[1\] got -1, expected 0 to 1"):
        env.step(torch.tensor([0, -1, 1, 1]))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"id": "HalfChetah-v4"}, NotFoundError, "env envpool: 'HalfChetah-v4' does not exist; did you mean 'HalfCheetah-v4'?"),
        ({"id": "@@@@"}, NotFoundError, r"does not exist; envpool.list_all_envs\(\) returns all"),
        ({"id": "CartPole-v1", "kwargs": {"reward_treshold": 1}}, ConfigError, "no setting 'reward_treshold' in kwargs; did you mean 'reward_threshold'?"),
        ({"id": "CartPole-v1", "kwargs": {"seed": 1}}, ConfigError, "no setting 'seed' in kwargs"),
        ({"id": "HalfCheetah-v4", "kwargs": {"frame_skip": "many"}}, ConfigError, "cannot be made"),
        ({"id": "MetaWorld/Drower*"}, NotFoundError, r"'MetaWorld/Drower\*' does not exist; did you mean 'MetaWorld/Drawer"),
        ({"id": ("CartPole-v0", "CartPole-v1")}, CapabilityError, "'CartPole-v0' is one of several tasks and has no instruction.*set env.instructions: {CartPole-v0: a sentence}"),
        ({"id": ("CartPole-v1", "Pendulum-v1"), "instructions": {"CartPole-v1": "balance", "Pendulum-v1": "swing"}}, CapabilityError, r"'CartPole-v1' shows state \[4\], instruction \[16\], takes 2 numbers, 'Pendulum-v1' state \[3\].*env.type: mixture"),
        ({"id": "CartPole-v1", "instructions": {"CartPole-v2": "balance"}}, ConfigError, "a sentence for 'CartPole-v2'; did you mean 'CartPole-v1'?"),
        ({"id": "CartPole-v1", "instructions": {"CartPole-v1": "on " * 17}}, CapabilityError, "has 17 words.*reads 1 to 16"),
        ({"id": "CartPole-v1", "instructions": {"CartPole-v1": ""}}, CapabilityError, "instruction '' has no words, env envpool: 'CartPole-v1' reads 1 to 16"),
        ({"id": "MetaWorld/Reach-v3", "instructions": {"MetaWorld/Reach-v3": ""}}, CapabilityError, "instruction '' has no words"),
        ({"id": "CartPole-v1", "instructions": {"CartPole-v1": "?!"}}, CapabilityError, r"instruction '\?!' has no words"),
    ],
)
def test_what_cannot_be_made_is_told_in_a_sentence(settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    monkeypatch.delitem(sys.modules, "embodied_rl.envs.envpool")
    with pytest.raises(MissingExtraError, match=r"pip install 'embodied-rl\[envpool\]'"):
        registry.load("env", "envpool")


POLES = {"CartPole-v0": "balance for a while", "CartPole-v1": "balance for long"}


def several(copies=5, **settings):
    return make(tuple(POLES), copies=copies, instructions=POLES, **settings)


def begin(env, tasks, mask=None):
    b = len(tasks)
    mask = torch.ones(b, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return env.reset(mask, torch.zeros(b, dtype=torch.int64), torch.tensor(tasks))


def test_copies_of_several_ids_give_what_the_pools_of_those_ids_give():
    env = several()
    # 5 copies and 2 ids: a pool of three rows each. Id 1 is asked for by four copies, so it gets a second pool.
    pools = [raw_pool("CartPole-v0", copies=3, seed=7), raw_pool("CartPole-v1", copies=3, seed=7), raw_pool("CartPole-v1", copies=3, seed=10)]
    at = {0: (1, 0), 1: (0, 0), 2: (1, 1), 3: (1, 2), 4: (2, 0)}  # copy -> (pool, row)
    seen = [pool.reset()[0] for pool in pools]
    obs = begin(env, [1, 0, 1, 1, 1])
    assert env.spec.tasks == tuple(POLES) and env.spec.max_steps == 500
    for t in range(6):
        assert all(np.array_equal(obs["state"][copy].numpy(), seen[p][row]) for copy, (p, row) in at.items())
        action = torch.tensor([1, 0, 0, 1, t % 2])
        inner = [np.zeros(3, np.int32) for _ in pools]
        for copy, (p, row) in at.items():
            inner[p][row] = action[copy]
        stepped = [pool.step(a) for pool, a in zip(pools, inner, strict=True)]
        seen, step = [x[0] for x in stepped], env.step(action)
        obs = step.obs
        assert all(step.reward[copy] == stepped[p][1][row] for copy, (p, row) in at.items())
    words = [encode_words(POLES[id], 16, "", "") for id in POLES]
    assert [tuple(row) for row in obs["instruction"].tolist()] == [words[1], words[0], words[1], words[1], words[1]]


def test_a_copy_that_is_given_another_task_gives_its_row_back_and_the_others_stay():
    env = several(copies=4)
    before = begin(env, [0, 1, 0, 1])
    kept = {name: x.clone() for name, x in before.items()}
    after = begin(env, [1, 0, 0, 1], mask=[True, True, False, False])
    assert torch.equal(after["state"][2:], kept["state"][2:]) and not torch.equal(after["state"][:2], kept["state"][:2])
    assert torch.equal(after["instruction"][[0, 1, 2, 3]], kept["instruction"][[1, 0, 2, 3]])
    assert all(torch.equal(x, kept[name]) for name, x in before.items()), "what was handed out stays as it was"
    assert len(env._blocks) == 2, "the rows that were given back were enough"
    action = torch.ones(4, dtype=torch.int64)
    step = env.step(action, torch.tensor([True, False, False, True]))
    assert torch.equal(step.obs["state"][1:3], after["state"][1:3]) and step.reward.tolist() == [1, 0, 0, 1]
    assert not torch.equal(step.obs["state"][0], after["state"][0])
    env.close(), env.close()


class InOnePiece:
    """An env without send and recv."""

    def __init__(self, env):
        self.spec, self.device = env.spec, env.device
        self.reset, self.step, self.close = env.reset, env.step, env.close


def test_pipelined_collection_in_the_pools_own_threads_gives_what_plain_steps_give():
    def rollouts(wrap):
        envs = [wrap(several(copies=3, seed=seed, threads=2)) for seed in (1, 2)]
        collector = Collector(envs, mlp(envs[0].spec), decisions=40, generator=torch.Generator().manual_seed(0))
        out = [collector.collect() for _ in range(2)]
        collector.close()
        return out

    for ours, plain in zip(rollouts(lambda env: env), rollouts(InOnePiece), strict=True):
        assert ours.terminated.any()
        for name in ("units", "logp", "reward", "terminated", "truncated", "task", "value", "next_value"):
            assert torch.equal(getattr(ours, name), getattr(plain, name)), name
        assert all(torch.equal(ours.obs[name], plain.obs[name]) for name in ours.obs)


@pytest.mark.parametrize("parts", [1, 2])
def test_an_episode_that_shows_what_is_not_finite_does_not_count_and_its_copy_is_restarted(parts, caplog):
    envs = [make("HalfCheetah-v4", copies=3, max_steps=20) for _ in range(parts)]
    pool, steps, real = envs[-1], [], envs[-1].recv

    def spoilt():
        step = real()
        steps.append(None)
        state = step.obs["state"].clone()
        state[1] = torch.nan if len(steps) == 7 else state[1]
        return dataclasses.replace(step, obs=step.obs | {"state": state})

    pool.recv = spoilt  # `step` is `send` and `recv`
    collector = Collector(envs, mlp(pool.spec), decisions=30, generator=torch.Generator().manual_seed(0))
    rollout = collector.collect()
    collector.close()
    column = 3 * (parts - 1) + 1
    assert rollout.invalid.sum(0).tolist() == [7 * (c == column) for c in range(3 * parts)]
    assert rollout.truncated[:, column].nonzero().flatten().tolist() == [6, 26], "the next episode has its twenty steps"
    told = f"'state' is not finite in copies [{column}]: their episodes do not count"
    assert [m.split("observation ")[-1] for m in caplog.messages if "finite" in m] == [told]


def test_every_metaworld_task_has_a_sentence_and_tells_its_success():
    ids = [id for id in envpool.list_all_envs() if id.startswith("MetaWorld/")]
    assert len(ids) == len(SENTENCES) == 50 and all(sentence_of(id) for id in ids)
    assert sentence_of("HalfCheetah-v4") is None
    env = make(("MetaWorld/DrawerClose-v3", "MetaWorld/Reach-v3"), copies=2, kwargs={"partially_observable": False}, threads=1)
    pool = raw_pool("MetaWorld/DrawerClose-v3", copies=1, partially_observable=False, num_threads=1)
    obs, raw = begin(env, [1, 0]), pool.reset()[0]
    assert obs["instruction"][1].tolist() == list(encode_words("push and close a drawer", 16, "", ""))
    reached = []
    for _ in range(120):
        # The hand is at 0:3 and the handle at 4:7: go above it, in front of it, then push.
        hand, handle = raw[0, :3], raw[0, 4:7]
        ahead = handle + [0, -0.08, 0.02] if abs(hand[0] - handle[0]) > 0.02 or hand[2] > handle[2] + 0.04 else handle + [0, 0.3, 0.02]
        push = np.concatenate([np.clip(10 * (ahead - hand), -1, 1), [1.0]]).astype(np.float32)
        raw, _, _, _, info = pool.step(push[None])
        step = env.step(torch.stack([torch.zeros(4), torch.from_numpy(push)]))
        assert step.success.tolist() == [False, bool(info["success"][0])]
        assert torch.equal(step.obs["state"][1], torch.from_numpy(raw[0].astype(np.float32)))
        reached.append(bool(info["success"][0]))
    assert any(reached) and not reached[0]


class Lent:
    """Several ids played with bare pools, row by row: what a copy is lent, and what each row gave, by its own number."""

    def __init__(self, copies, share, seed):
        self.pools, self.free, self.at = [], {id: [] for id in POLES}, {}
        self.share, self.seed, self.copies = share, seed, copies
        self.seen = np.zeros((copies, 4), np.float32)

    def reset(self, rows, ids):
        for copy in rows:
            if copy in self.at:
                id, pool, row = self.at[copy]
                self.free[id].append((pool, row))
        lent = {}
        for copy in rows:
            id = ids[copy]
            if not self.free[id]:
                made = sum(self.share for other, _, _ in self.pools if other == id)
                self.free[id] = [(len(self.pools), row) for row in range(self.share)]
                self.pools.append([id, raw_pool(id, copies=self.share, seed=self.seed + made), False])
            self.free[id].sort()
            pool, row = self.free[id].pop(0)
            self.at[copy] = (id, pool, row)
            lent.setdefault(pool, {})[row] = copy
        for number, of in lent.items():
            _, pool, begun = self.pools[number]
            obs, info = pool.reset(np.array(sorted(of), np.int32)) if begun else pool.reset()
            self.pools[number][2] = True
            for row, x in zip(info["env_id"], obs, strict=True):
                if row in of:
                    self.seen[of[row]] = x

    def step(self, actions, active):
        reward, ended, cut = np.zeros(self.copies, np.float32), np.zeros(self.copies, bool), np.zeros(self.copies, bool)
        for number, (_, pool, _) in enumerate(self.pools):
            of = {row: copy for copy, (_, where, row) in self.at.items() if where == number and active[copy]}
            if not of:
                continue
            rows = np.array(sorted(of), np.int32)
            obs, r, e, c, info = pool.step(np.array([actions[of[row]] for row in rows], np.int32), rows)
            for i, row in enumerate(info["env_id"]):
                copy = of[row]
                self.seen[copy], reward[copy], ended[copy], cut[copy] = obs[i], r[i], e[i], c[i]
        return reward, ended, cut


def test_any_copies_may_move_and_change_their_task_while_pools_are_added():
    rng, ids = np.random.default_rng(0), list(POLES)
    env, bare = several(copies=5), Lent(5, 3, 7)
    start, over, handed_out, words = np.ones(5, bool), np.zeros(5, bool), [], {}
    for t in range(60):
        if start.any():
            # At first all play one task, for which two pools are needed.
            tasks = rng.integers(0, 2, 5) if t else np.zeros(5, int)
            obs = begin(env, tasks.tolist(), mask=start.tolist())
            bare.reset(np.flatnonzero(start).tolist(), [ids[task] for task in tasks])
            words |= {copy: encode_words(POLES[ids[tasks[copy]]], 16, "", "") for copy in np.flatnonzero(start)}
            over &= ~start
            assert np.array_equal(obs["state"].numpy(), bare.seen)
        active = ~over & ((rng.random(5) < 0.7) | (t % 3 == 0)) & (t % 11 != 7)
        action = rng.integers(0, 2, 5)
        step = env.step(torch.from_numpy(action), torch.from_numpy(active))
        reward, ended, cut = bare.step(action, active)
        assert np.array_equal(step.obs["state"].numpy(), bare.seen) and np.array_equal(step.reward.numpy(), reward)
        assert np.array_equal(step.terminated.numpy(), ended) and np.array_equal(step.truncated.numpy(), cut)
        assert [tuple(row) for row in step.obs["instruction"].tolist()] == [words[copy] for copy in range(5)]
        handed_out += [(x, x.clone()) for x in (*step.obs.values(), step.reward)]
        over |= ended | cut
        start = over | (rng.random(5) < 0.1)
    assert len(bare.pools) > 2 and len(env._blocks) == len(bare.pools)
    assert all(torch.equal(x, kept) for x, kept in handed_out)
