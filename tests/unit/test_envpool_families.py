"""Families of envpool: MetaWorld's fifty tasks in one batch, MuJoCo Playground's arms and hands, and what each is told."""

import pytest
import torch

from embodied_rl.envs._words import encode_words
from embodied_rl.manifest import frame
from embodied_rl.offers import Speaking

envpool = pytest.importorskip("envpool")
from embodied_rl.envs.envpool import Config, build  # noqa: E402
from embodied_rl.envs.envpool.metaworld import sentence_of  # noqa: E402

CPU = torch.device("cpu")
PLAYGROUND = (
    "AeroCubeRotateZAxis", "AlohaHandOver", "AlohaSinglePegInsertion", "LeapCubeReorient", "LeapCubeRotateZAxis",
    "PandaOpenCabinet", "PandaPickCube", "PandaPickCubeCartesian", "PandaPickCubeOrientation", "PandaRobotiqPushCube",
)  # fmt: skip
"""Its manipulation tasks; the others walk."""


@pytest.fixture
def make():
    made = []

    def build_it(id, copies, **settings):
        made.append(build(Config(id=id, threads=1, **settings), num_envs=copies, device=CPU, split="train", seed=7))
        return made[-1]

    yield build_it
    for env in made:
        env.close()


def begin(env, tasks, mask=None):
    b = len(tasks)
    mask = torch.ones(b, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return env.reset(mask, torch.zeros(b, dtype=torch.int64), torch.tensor(tasks))


def test_all_of_metaworld_is_one_batch_and_every_task_has_a_sentence_of_its_own(make):
    env = make("MetaWorld/*", 4)
    assert len(env.spec.tasks) == 50 and env.spec.has_success
    told, ids = [], []
    for first in range(0, 52, 4):
        tasks = [min(first + i, 49) for i in range(4)]
        obs = begin(env, tasks)
        told += env.instructions()
        ids += [tuple(row) for row in obs["instruction"].tolist()]
        assert env.instructions() == told[-4:], "asking changes nothing"
    assert len(set(told)) == 50 and len(set(ids)) == 50
    assert ids == [encode_words(text, 16, "", "") for text in told]
    assert told[env.spec.tasks.index("MetaWorld/DrawerClose-v3")] == "Push and close a drawer"
    before = obs["state"].clone()
    step = env.step(torch.full((4, 4), 0.5), torch.tensor([True, True, True, False]))
    moved = (step.obs["state"] != before).any(1)
    assert moved.tolist() == [True, True, True, False] and bool((step.reward[:3] != 0).all())
    assert torch.isfinite(step.obs["state"]).all() and not step.success.any()


@pytest.mark.parametrize("name", PLAYGROUND)
def test_playgrounds_manipulation_tasks_show_and_take_what_they_say(make, name):
    env = make(f"MuJoCoPlayground/{name}-v1", 2)
    obs = begin(env, [0, 0])
    size = env.spec.action.size
    assert env.spec.action.kind == "continuous" and size >= 3 and not isinstance(env, Speaking)
    step = env.step(torch.full((2, size), 0.3))
    for name, spec in env.spec.observation.items():
        assert obs[name].shape == step.obs[name].shape == (2, *spec.shape) and torch.isfinite(step.obs[name].float()).all()
    assert any(not torch.equal(obs[name], step.obs[name]) for name in obs)
    assert torch.isfinite(step.reward).all() and not step.truncated.any()


def test_the_list_of_manipulation_tasks_is_that_of_the_installed_envpool():
    """What is new in a later version is either added above or walks."""
    walks = ("Joystick", "Getup", "Handstand", "Footstand", "Gait")
    ids = [id.split("/")[1].removesuffix("-v1") for id in envpool.list_all_envs() if id.startswith("MuJoCoPlayground/")]
    assert sorted(id for id in ids if not any(word in id for word in walks)) == sorted(PLAYGROUND)


POLES = {"CartPole-v0": "balance for a while", "CartPole-v1": "balance for long"}


def test_the_manifest_tells_the_assets_and_what_a_pool_of_seed_0_shows_of_every_task(make):
    ids = ("MetaWorld/Reach-v3", "MetaWorld/DrawerClose-v3")
    shown = {"partially_observable": False}
    env = make(ids, 2, kwargs=shown)
    begin(env, [0, 1])
    told = env.manifest()
    assert {"envpool", "envpool-assets", "envpool-assets-mujoco-large"} <= told["packages"].keys()
    assert told["ids"] == list(ids) == list(told["frames"])
    for id in ids:
        pool = envpool.make_gymnasium(id, num_envs=1, num_threads=1, seed=0, **shown)
        words = torch.tensor([encode_words(sentence_of(id), 16, "", "")])
        obs = {"state": torch.from_numpy(pool.reset()[0]).float(), "instruction": words}
        assert told["frames"][id] == frame(obs, 0, 0)
    assert make(ids, 5, kwargs=shown, max_steps=9).manifest()["frames"] == told["frames"], "whatever is made of them"
    alone = make("MetaWorld/Reach-v3", 3).manifest()["frames"]["MetaWorld/Reach-v3"]
    assert alone["state"] != told["frames"]["MetaWorld/Reach-v3"]["state"], "its goal is hidden there"


def test_instructions_are_the_sentences_of_the_running_episodes(make):
    env = make(tuple(POLES), 3, instructions=POLES)
    assert isinstance(env, Speaking) and env.instructions() == ["", "", ""], "nothing has begun"
    begin(env, [1, 0, 1])
    assert env.instructions() == ["balance for long", "balance for a while", "balance for long"]
    begin(env, [0, 0, 0], mask=[True, False, False])
    assert env.instructions() == ["balance for a while", "balance for a while", "balance for long"]
    alone = make("CartPole-v1", 2, instructions={"CartPole-v1": "Balance, for long!"})
    begin(alone, [0, 0])
    assert alone.instructions() == ["Balance, for long!"] * 2
    assert not isinstance(make("CartPole-v1", 2), Speaking)
