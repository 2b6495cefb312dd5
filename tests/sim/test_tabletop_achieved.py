"""What an episode achieved unasked: by the success test itself, under the instruction that would have asked for it."""

import pytest
import torch

from embodied_rl.collect import Collector
from embodied_rl.envs.tabletop import Config, build
from embodied_rl.envs.tabletop.instructions import COLORS, TEMPLATES, encode
from embodied_rl.envs.tabletop.scene import SHAPES
from embodied_rl.self_imitation import Successes
from embodied_rl.types import PolicyOutput

CPU = torch.device("cpu")
TASKS = ["reach", "push", "lift"]


def make(copies, steps, tasks=TASKS, **settings):
    config = Config(tasks=tasks, max_steps=steps, reward="sparse", end_on_success=True, physics="native", threads=1, **settings)
    env = build(config, num_envs=copies, device=CPU, split="train", seed=0)
    env.watch()
    everyone = torch.ones(copies, dtype=torch.bool)
    env.reset(everyone, 2 * torch.arange(copies) + 100, torch.arange(copies) % len(tasks))
    return env, everyone


class Stubborn:
    """The expert, who means another object than the one that is meant."""

    def __init__(self, env, shift=1):
        self.env, self.shift, self.expert = env, shift, env.expert()
        self._as(lambda: self.expert.reset(torch.ones(env.spec.num_envs, dtype=torch.bool)))

    def _as(self, do):
        episode = self.env.episode
        meant = episode.a.clone()
        episode.a.copy_((meant + self.shift) % len(SHAPES))
        out = do()
        episode.a.copy_(meant)
        return out

    def action(self):
        return self._as(self.expert.act)


def sentences(task, slot, colors):
    color, shape = COLORS[colors[slot]], SHAPES[slot]
    return {t.format(a=n) for t in TEMPLATES[task]["train"] for n in (f"{color} object", shape, f"{color} {shape}")}


def test_an_object_that_was_not_meant_is_told_in_words_that_mean_it():
    env, everyone = make(12, 50)
    expert = Stubborn(env)
    solved = torch.zeros_like(everyone)
    for _ in range(50):
        solved |= env.step(expert.action(), ~solved).success
    since, told = env.achieved(everyone)
    assert set(told) == {"instruction"} and not solved.any()
    own = 0
    for i in range(12):
        task, slot = TASKS[i % 3], int((env.episode.a[i] + 1) % 3)
        assert 5 < since[i] <= 50, "touched at least"
        words = tuple(told["instruction"][i].tolist())
        colors = env.episode.colors[i].tolist()
        mine = words in {encode(s) for s in sentences(task, slot, colors)}
        reached = words in {encode(s) for s in sentences("reach", slot, colors)}
        assert mine or reached, (i, task)
        own += mine
    assert own >= 10, "the task that was done counts more than the touch on the way"
    env.close()


def test_it_is_noted_in_the_step_in_which_that_instruction_would_have_been_fulfilled():
    env, everyone = make(9, 50)
    expert, actions = Stubborn(env), []
    for _ in range(50):
        actions.append(expert.action())
        env.step(actions[-1])
    since, _ = env.achieved(everyone)
    task, meant = env._achieved._task.clone(), env._achieved._object.clone()
    env.reset(everyone, 2 * torch.arange(9) + 100, torch.arange(9) % 3)
    env.episode.task.copy_(task)
    env.episode.a.copy_(meant)
    first = torch.zeros_like(since)
    for t, action in enumerate(actions, 1):
        success = env.step(action).success
        first = torch.where(success & (first == 0), t, first)
    assert torch.equal(first, since) and bool((since > 0).all())
    env.close()


def test_a_lift_that_failed_has_touched_the_object_that_was_meant():
    env, everyone = make(6, 14, ["reach", "lift"])
    expert = env.expert()
    expert.reset(everyone)
    for _ in range(14):
        env.step(expert.act())
    since, told = env.achieved(everyone)
    lifts = env.episode.task == 1
    assert bool((since[lifts] > 0).all()) and not since[~lifts].any(), "whoever is asked to reach has been solved, not relabelled"
    for i in lifts.nonzero()[:, 0].tolist():
        words = tuple(told["instruction"][i].tolist())
        assert words in {encode(s) for s in sentences("reach", int(env.episode.a[i]), env.episode.colors[i].tolist())}
    alone, _ = env.achieved(torch.arange(6) == 1)
    assert alone[1] == since[1] and alone.sum() == since[1], "only those who are asked for"
    env.reset(torch.arange(6) < 2, 2 * torch.arange(6), torch.ones(6, dtype=torch.int64))
    assert env.achieved(everyone)[0][:2].tolist() == [0, 0], "a new episode has achieved nothing"
    env.close()


def test_watching_changes_nothing_and_its_state_comes_back():
    runs = []
    for watched in (False, True):
        env, everyone = make(6, 50)
        if not watched:
            env._achieved = None
        expert = Stubborn(env)
        for _ in range(20):
            step = env.step(expert.action())
        runs.append((step, env))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0].obs.values(), runs[1][0].obs.values(), strict=True))
    assert torch.equal(runs[0][0].reward, runs[1][0].reward)
    env, state = runs[1][1], runs[1][1].get_state()
    before = env.achieved(everyone)
    assert bool(before[0].any())
    env.reset(everyone, 2 * torch.arange(6), torch.zeros(6, dtype=torch.int64))
    env.set_state(state)
    after = env.achieved(everyone)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1]["instruction"], after[1]["instruction"])
    env.set_state(runs[0][1].get_state())
    assert not env.achieved(everyone)[0].any(), "a state of an env that was not watched knows nothing"
    for _, one in runs:
        one.close()


class Playing:
    """A policy of one control step per decision, which plays what somebody says."""

    chunk, actions_per_decision, num_units, has_critic = 1, 1, 1, False

    def __init__(self, expert):
        self.expert = expert

    def act(self, obs, *, generator, greedy=False):
        action = self.expert.action()
        units = torch.zeros(len(action), 1)
        return PolicyOutput(units, units, action.unsqueeze(1))


@pytest.mark.parametrize("rollouts", [1, 2])
def test_decisions_before_it_are_relabelled_also_where_the_episode_began_in_an_earlier_rollout(rollouts):
    steps, copies = 18, 6
    env, _ = make(copies, steps, ["reach", "lift"])
    collector = Collector(
        [env], Playing(None), decisions=steps // rollouts, keep_final_obs=True, keep_actions=True, hindsight=True
    )
    collector.policy.expert = Stubborn.__new__(Stubborn)
    stubborn = collector.policy.expert
    stubborn.env, stubborn.shift, stubborn.expert = env, 1, env.expert()
    began = []

    def begin(mask, record, parts=None, reset=collector._reset):
        reset(mask, record, parts)
        began.append((env.episode.a.clone(), env.episode.colors.clone()))
        stubborn._as(lambda: stubborn.expert.reset(mask))

    collector._reset = begin
    seen = [collector.collect() for _ in range(rollouts)]
    last = seen[-1]
    ended = last.done[-1]
    assert ended.all(), "every episode ends with the last decision"
    for earlier in seen[:-1]:
        assert not earlier.relabelled.any(), "nothing has ended there"
    first = steps - len(last.reward)
    count = last.relabelled.sum(0)
    assert bool((count > 0).any())
    meant, colors = began[0]
    words = last.relabels["instruction"][last.episode[0]]
    for i in range(copies):
        if not count[i]:
            continue
        assert last.relabelled[: count[i], i].all() and not last.relabelled[count[i] :, i].any()
        assert 5 < first + int(count[i]) <= steps
        task, slot = ["reach", "lift"][i % 2], int((meant[i] + 1) % 3)
        known = sentences(task, slot, colors[i].tolist()) | sentences("reach", slot, colors[i].tolist())
        assert tuple(words[i].tolist()) in {encode(s) for s in known}
    own = Successes.of(last)
    assert len(own) == int(count.sum())
    t, copy = last.relabelled.nonzero(as_tuple=True)
    assert torch.equal(own.obs["instruction"], words[copy])
    assert torch.equal(own.action, last.action[t, copy])
    whole = torch.cat([last.obs["proprio"], last.final_obs["proprio"][last.final[-1]][None]])
    assert torch.equal(own.last["proprio"], whole[count[copy], copy])
    collector.close()
