"""What a policy sees when it has eyes: drawn when asked, where something has moved, and never after the fact."""

import pytest
import torch

from embodied_rl.collect import Collector, execute
from embodied_rl.envs.tabletop import Config, build
from embodied_rl.seeding import start_seeds
from tests.kit import Scripted

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


def test_copies_that_have_finished_their_episode_are_not_drawn(monkeypatch):
    env, look, decided = make(max_steps=9), lambda obs: torch.zeros(len(obs["hand"]), 3, 7), []
    real, counts = env.step, drawn(env, monkeypatch)

    def step(action, active=None):
        out = real(action, active)
        # Copy 1 ends in the middle of the first chunk, copy 2 in the second one.
        out.terminated |= env._steps >= torch.tensor([99, 2, 4])
        return out

    env.step = step
    policy = Scripted(lambda obs: decided.append(len(obs["hand"])) or look(obs), None, chunk=3, num_units=21, has_critic=False)
    Collector([env], policy, decisions=4, mode="episodes").collect()
    assert counts == [3, 3, 2, 1], "the start, and after each decision those that decided"
    assert decided == [3, 2, 1]
    env.close()


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
