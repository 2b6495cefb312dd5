"""What a policy sees when it has eyes: drawn when asked, where something has moved, and never after the fact."""

from dataclasses import fields

import pytest
import torch

from embodied_rl import registry
from embodied_rl.collect import Collector
from embodied_rl.credit import CreditChain
from embodied_rl.envs.tabletop import Config, build
from embodied_rl.envs.tabletop.env import TabletopEnv
from embodied_rl.evaluate import evaluate
from embodied_rl.execute import execute
from embodied_rl.seeding import start_seeds
from embodied_rl.types import Sparing
from tests.kit import CPU, Scripted, algorithm

COPIES = 3


def make(**settings):
    config = Config(tasks=["reach", "push"], observation="pictures", picture_size=16, threads=1, **settings)
    env = build(config, num_envs=COPIES, device=torch.device("cpu"), split="train", seed=0)
    begin(env, torch.ones(COPIES, dtype=torch.bool))
    return env


def begin(env, mask, first=0):
    index = torch.arange(COPIES) + first
    return env.reset(mask, start_seeds(0, "train", index, 0 * index), index % 2)


def drawn(env, monkeypatch):
    """Numbers of pictures per call of the ray tracer from now on."""
    counts, real = [], env._pictures._camera.render

    def counting(qpos, *args):
        counts.append(len(qpos))
        return real(qpos, *args)

    monkeypatch.setattr(env._pictures._camera, "render", counting)
    return counts


def test_a_policy_sees_pictures_the_hand_and_the_words_and_no_positions():
    env = make(cameras=("wrist",))
    obs = env.observe()
    assert {name: (tuple(x.shape[1:]), x.dtype) for name, x in obs.items()} == {
        "wrist": ((16, 16, 3), torch.uint8), "hand": ((10,), torch.float32), "instruction": ((14,), torch.int64),
    }  # fmt: skip
    assert list(obs) == list(env.spec.observation) and env.spec.on_demand
    assert torch.allclose(obs["hand"][:, :3], 5 * env.tcp[0]) and float(obs["hand"][:, 9].min()) > 0.9, "open"
    env.close()


def test_only_copies_that_have_moved_are_drawn_again_and_only_when_asked(monkeypatch):
    env = make()
    env.observe()
    counts = drawn(env, monkeypatch)
    env.observe()
    assert counts == [], "nothing has moved"
    active = torch.tensor([True, False, True])
    for _ in range(4):
        assert env.step(torch.zeros(COPIES, 7), active).obs == {}
    assert counts == []
    env.observe()
    begin(env, torch.tensor([False, True, False]), first=9)
    assert counts == [2, 1]
    env.close()


def test_a_copy_that_ends_inside_a_chunk_shows_where_it_stopped():
    env, alone = make(max_steps=2), make(max_steps=2)
    generator = torch.Generator().manual_seed(0)
    chunk = 2 * torch.rand(COPIES, 5, 7, generator=generator) - 1
    seen = execute(env, chunk, None)
    assert bool(seen.truncated.all()) and seen.steps.tolist() == [2] * COPIES
    for c in range(2):
        alone.step(chunk[:, c])
    wanted = alone.observe()
    assert all(torch.equal(seen.obs[name], wanted[name]) for name in wanted)
    env.close(), alone.close()


def test_a_restored_state_is_seen_as_it_was():
    env = make()
    env.step(torch.full((COPIES, 7), 0.5))
    before, state = {k: v.clone() for k, v in env.observe().items()}, env.get_state()
    env.step(torch.full((COPIES, 7), -1.0))
    assert not torch.equal(env.observe()["wrist"], before["wrist"])
    again = env.set_state(state)
    assert all(torch.equal(again[name], before[name]) for name in before)
    env.close()


def test_copies_that_wait_are_not_simulated():
    env = make()
    idle = torch.tensor([False, True, False])
    before = env.get_state()
    env.step(torch.ones(COPIES, 7), ~idle)
    after = env.get_state()
    for part in ("physics", "controller"):
        for name, x in before[part].items():
            assert torch.equal(x[idle], after[part][name][idle]), name
            assert name == "finger" or not torch.equal(x[~idle], after[part][name][~idle]), name
    assert after["steps"].tolist() == [1, 0, 1]
    env.close()


def ending(env, lengths):
    """The env with episodes that are solved after so many control steps [B]."""
    real = env.step

    def step(action, active=None):
        out = real(action, active)
        solved = env._steps >= torch.tensor(lengths)
        out.reward, out.terminated = torch.where(solved, 1.0, out.reward), out.terminated | solved
        out.truncated &= ~solved
        return out

    env.step = step
    return env


def still(decided, has_critic=False):
    """A policy that does not move, and notes how many copies it decides for."""
    def act(obs):
        decided.append(len(obs["hand"]))
        return torch.zeros(len(obs["hand"]), 3, 7)

    return Scripted(act, lambda obs: obs["hand"][:, 0], chunk=3, num_units=21, has_critic=has_critic)


# The start, and after each decision those that go on; copy 0 is truncated, copies 1 and 2 are solved in earlier chunks.
NOBODY, TRUNCATED, EVERYBODY = [3, 2, 1], [3, 2, 1, 1], [3, 3, 2, 1]


@pytest.mark.parametrize(
    ("critic", "keep", "wanted"),
    [(None, False, NOBODY), ("told", False, NOBODY), ("looks", False, TRUNCATED), ("looks", True, EVERYBODY), (None, True, EVERYBODY)],
)
def test_where_an_episode_ends_is_drawn_only_if_somebody_looks_there(critic, keep, wanted, monkeypatch):
    env, decided = ending(make(max_steps=9), [99, 2, 4]), []
    counts, policy = drawn(env, monkeypatch), still(decided, has_critic=critic is not None)
    policy.privileged_critic = critic == "told"
    Collector([env], policy, decisions=4, mode="episodes", keep_final_obs=keep).collect()
    assert counts == wanted and decided == NOBODY
    env.close()


@pytest.mark.parametrize("watch", [None, lambda env, episode: None])
def test_evaluation_draws_one_picture_for_each_decision(watch, monkeypatch):
    env, decided = ending(make(max_steps=9), [99, 2, 4]), []
    counts = drawn(env, monkeypatch)
    result = evaluate(still(decided), env, episodes=8, run_seed=0, on_frame=watch)
    # Copies 0, 1, 2 decide three times, once and twice in each episode; the last of them plays two, the others three.
    assert result.length.tolist() == [9, 2, 4] * 2 + [9, 2] and sum(decided) == sum(counts) == 3 * 3 + 3 * 1 + 2 * 2
    env.close()


def test_a_spared_copy_shows_an_old_picture_and_the_truth_beside_until_it_is_reset(monkeypatch):
    env = make(privileged=True)
    before, spared = env.observe(), torch.tensor([True, False, False])
    env.step(torch.full((COPIES, 7), 0.5))
    assert isinstance(env, Sparing)
    env.spare(spared)
    after = env.observe()
    for name in ("table", "wrist"):
        assert torch.equal(after[name][0], before[name][0]) and not torch.equal(after[name][1], before[name][1])
    assert not torch.equal(after["told"][0], before["told"][0])
    counts = drawn(env, monkeypatch)
    env.observe()
    again = begin(env, spared)
    assert counts == [1] and all(torch.equal(again[name][0], before[name][0]) for name in again)
    env.close()


METHODS = {
    "a critic that is told": ({"reads": "privileged"}, "ppo", {"gamma": 0.97, "lam": 0.8}, "stream", False),
    "a critic that looks": ({}, "ppo", {}, "stream", False),
    "a critic that looks, episodes": ({}, "ppo", {}, "episodes", False),
    "no critic": ({"kind": "none"}, "grpo", {}, "episodes", False),
    "a reward model": ({"kind": "none"}, "grpo", {}, "episodes", True),
}


def collected(critic, method, credit, mode, keep):
    """Two rollouts as tabletop_vla_tokens collects them, in two parts, with their advantages; and pictures drawn."""
    config = Config(
        tasks=["reach", "push"], observation="pictures", cameras=("close",), picture_size=(16, 24), threads=1, max_steps=12,
        reward="sparse", privileged=True, end_on_success=True,
    )  # fmt: skip
    envs = [ending(build(config, num_envs=4, device=CPU, split="train", seed=0), [99, 99, 3, 6]) for _ in range(2)]
    module = registry.load("policy", "tiny_vla_tokens")
    torch.manual_seed(0)
    small = {"width": 16, "heads": 2, "layers": 1, "channels": 8, "glances": 2, "chunk": 5, "bins": 16, "foresight": 0}
    policy = module.build(module.Config(**small, critic=critic), env=envs[0].spec, device=CPU)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.1 * torch.randn_like(p)
    count = [0]
    for env in envs:
        def render(qpos, *args, real=env._pictures._camera.render):
            count[0] += len(qpos)
            return real(qpos, *args)

        env._pictures._camera.render = render
    collector = Collector(
        envs, policy, decisions=4, mode=mode, group_size=4 if method == "grpo" else 1, keep_final_obs=keep,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    rollouts = [collector.collect() for _ in range(2)]
    chain = CreditChain(algorithm(method, credit=credit).credit)
    collector.close()
    return rollouts, [chain(rollout, None) for rollout in rollouts], count[0]


@pytest.mark.parametrize("name", METHODS)
def test_what_is_learned_from_does_not_depend_on_whether_ends_are_drawn(name, monkeypatch):
    rollouts, advantages, count = collected(*METHODS[name])
    monkeypatch.setattr(TabletopEnv, "spare", lambda env, copies: None)
    always, wanted, most = collected(*METHODS[name])
    assert count == most if METHODS[name][-1] else count < most
    for a, b in zip(rollouts, always, strict=True):
        assert a.truncated.any() and a.terminated.any() and a.valid.any()
        for field in fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if field.name == "obs":  # decisions that nobody made show anything
                x, y = ({k: v[a.valid] for k, v in seen.items()} for seen in (x, y))
            if isinstance(x, dict):
                assert x.keys() == y.keys() and all(torch.equal(torch.as_tensor(x[k]), torch.as_tensor(y[k])) for k in x), field.name
            else:
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, field.name
        assert a.next_value is None or bool(a.next_value[a.truncated].any())
    for a, b in zip(advantages, wanted, strict=True):
        assert torch.equal(a.advantage, b.advantage) and bool(a.advantage.any())
        assert (a.target is None) == (b.target is None) and (a.target is None or torch.equal(a.target, b.target))


def test_a_wide_picture_shows_objects_larger():
    """The objects' share of the table camera's columns is the same in the close one, which has more of them."""
    seen = {}
    for camera, size in (("table", (64, 64)), ("close", (64, 96))):
        config = Config(tasks=["lift"], observation="pictures", cameras=(camera,), picture_size=size, threads=1)
        env = build(config, num_envs=8, device=torch.device("cpu"), split="train", seed=0)
        index = torch.arange(8)
        env.reset(torch.ones(8, dtype=torch.bool), start_seeds(0, "train", index, index), 0 * index)
        picture = env.observe()[camera]
        assert picture.shape == (8, *size, 3)
        spread = picture.float().amax(-1) - picture.float().amin(-1)
        seen[camera] = (spread > 90).sum((1, 2)).float()  # the colours of objects; table, arm and sky are nearly grey
        env.close()
    assert float((seen["close"] / seen["table"]).median()) == pytest.approx(1.5**2, rel=0.15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"observation": "pictures", "cameras": ("writs",)}, "camera 'writs' does not exist; did you mean 'wrist'?"),
        ({"observation": "pictures", "cameras": ("wrist", "wrist")}, "name at least one, and each once"),
        ({"names": ("color", "color")}, "names ['color', 'color']: each once"),
        ({"observation": "pictures", "picture_size": (64, 4)}, "greater than or equal to 8"),
        ({"picture_size": 32}, "picture_size (32) does nothing with observation (state)"),
    ],
)
def test_wrong_pictures_are_refused(settings, message):
    with pytest.raises(ValueError) as refused:
        Config(**settings)
    assert message in str(refused.value)
