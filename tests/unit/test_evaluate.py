"""Evaluation: fixed starts, fixed quota per copy, chunks, success once and at the end, files, and films."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from embodied_rl.errors import CapabilityError, NotFoundError, RunFolderError
from embodied_rl.evaluate import choose, evaluate, film
from embodied_rl.metrics import check_keys
from embodied_rl.results import EvaluationResult
from embodied_rl.seeding import split_of, start_seed
from embodied_rl.stats import wilson
from tests.kit import Scripted, mlp, toy

SEEK = Scripted(lambda obs: _towards(obs), lambda obs: torch.zeros(len(obs["position"])))
STAY = Scripted(lambda obs: torch.zeros(len(obs["t"]), 1, 1), lambda obs: torch.zeros(len(obs["t"])))


def _towards(obs):
    goal = obs["goals"][torch.arange(len(obs["word"])), obs["word"][:, 0] - 1, :2]
    return ((goal - obs["position"]) / 0.3).clamp(-1, 1).unsqueeze(1)


def reference(numbers, run_seed=0, longest=6):
    """What the toy `lengths` must give: length drawn from the seed, return 1 + 2 + ... + length, success at t = 2."""
    env = toy("lengths", 1, longest=longest)
    rows = []
    for i in numbers:
        seed = start_seed(run_seed, "eval", 0, i)
        env.reset(torch.tensor([True]), torch.tensor([seed]), torch.tensor([i % 2]))
        n = int(env.length[0])
        rows.append((seed, i % 2, n * (n + 1) / 2, n, n >= 2, n == 2))
    return rows


def rows_of(result):
    columns = (result.seed, result.task, result.returns, result.length, result.success_once, result.success_at_end)
    return list(zip(*(c.tolist() for c in columns), strict=True))


@pytest.mark.parametrize("copies", [1, 3, 7, 20, 40])
def test_every_episode_is_played_exactly_once_and_reported_whole(copies):
    result = evaluate(STAY, toy("lengths", copies), episodes=20, run_seed=0)
    assert rows_of(result) == reference(range(20))
    assert split_of(result.seed).all()


def test_an_endless_episode_is_told_instead_of_waited_for(monkeypatch):
    monkeypatch.setattr("embodied_rl.evaluate.LONGEST", 50)
    env = toy("lengths", 2, longest=10**6)
    assert evaluate(STAY, toy("lengths", 2, longest=60), episodes=2, run_seed=0).episodes == 2, "a limit of its own"
    env.spec = dataclasses.replace(env.spec, max_steps=None)
    with pytest.raises(CapabilityError, match=r"has not ended within 50 control steps.*env.max_steps"):
        evaluate(STAY, env, episodes=2, run_seed=0)


def test_fewer_episodes_are_the_first_ones_of_more_and_streams_differ():
    few, more = (rows_of(evaluate(STAY, toy("lengths", 4), episodes=n, run_seed=3)) for n in (7, 19))
    assert few == more[:7]
    other = evaluate(STAY, toy("lengths", 4), episodes=7, run_seed=3, stream=1)
    train = evaluate(STAY, toy("lengths", 4), episodes=7, run_seed=3, split="train")
    seeds = {r[0] for r in few} | set(other.seed.tolist()) | set(train.seed.tolist())
    assert len(seeds) == 21 and not split_of(train.seed).any()


def test_short_episodes_are_not_over_represented():
    # Copies of odd number end after 1 step, the others after 9: first come, first served would count short ones 9 : 1.
    env = toy("lengths", 4, lengths=(9, 1, 9, 1))
    assert evaluate(STAY, env, episodes=40, run_seed=0).length.double().mean() == 5.0


def test_idle_copies_never_meet_the_env_with_what_the_policy_made_of_their_noise():
    env, given = toy("lengths", 4, lengths=(1, 4, 4, 4)), []
    real = env.step
    env.step = lambda action, active=None: given.append(action.clone()) or real(action, active)
    wild = Scripted(lambda obs: torch.where(obs["t"][:, :1] > 1e8, torch.nan, 0.5).unsqueeze(1), STAY.critic)
    evaluate(wild, env, episodes=4, run_seed=0)
    assert len(given) == 4 and all(torch.isfinite(a).all() for a in given)


def test_copies_without_another_episode_leave_the_inference_batch():
    rows = []
    counting = Scripted(lambda obs: rows.append(len(obs["t"])) or STAY.action(obs), STAY.critic)
    result = evaluate(counting, toy("lengths", 3, lengths=(2, 4, 1)), episodes=4, run_seed=0)
    # Copy 0 plays episodes 0 and 3 (2 + 2 steps), copy 1 four steps, copy 2 one.
    assert rows == [3, 2, 2, 2] and sum(rows) == int(result.length.sum())


@pytest.mark.parametrize("chunk", [2, 3, 5])
def test_a_chunk_stops_at_the_end_of_its_episode(chunk):
    policy = Scripted(lambda obs: torch.zeros(len(obs["t"]), chunk, 1), lambda obs: torch.zeros(len(obs["t"])), chunk=chunk)
    assert rows_of(evaluate(policy, toy("lengths", 3), episodes=11, run_seed=5)) == reference(range(11), run_seed=5)


def test_a_greedy_policy_that_solves_the_task_is_seen_to_solve_it():
    result = evaluate(SEEK, toy("point", 8, max_steps=15), episodes=30, run_seed=0)
    assert result.score == 1.0 and result.success_at_end.all()
    lazy = Scripted(lambda obs: torch.zeros(len(obs["position"]), 1, 2), SEEK.critic)
    assert evaluate(lazy, toy("point", 8, max_steps=15), episodes=30, run_seed=0).score < 0.3


def test_the_result_of_an_episode_does_not_depend_on_who_shares_the_batch():
    a, b = (evaluate(SEEK, toy("point", n), episodes=12, run_seed=1) for n in (3, 12))
    assert torch.equal(a.returns, b.returns) and torch.equal(a.success_once, b.success_once)


def test_sampling_repeats_for_its_generator_and_differs_from_greedy():
    env = toy("point", 4)
    policy = mlp(env.spec, hidden=(8,), word_dim=4)

    def play(greedy, seed):
        generator = None if greedy else torch.Generator().manual_seed(seed)
        return evaluate(policy, env, episodes=8, run_seed=0, greedy=greedy, generator=generator).returns

    assert torch.equal(play(True, 0), play(True, 0)) and torch.equal(play(False, 1), play(False, 1))
    assert not torch.equal(play(False, 1), play(False, 2)) and not torch.equal(play(False, 1), play(True, 0))


def test_dropout_is_off_during_evaluation_and_on_again_after_it():
    class Noisy(nn.Module):
        chunk, num_units, has_critic = 1, 1, False

        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.modes = []

        def act(self, obs, *, generator, greedy=False):
            self.modes.append(self.training)
            return STAY.act(obs, generator=generator)

    policy = Noisy()
    evaluate(policy, toy("lengths", 2), episodes=2, run_seed=0)
    assert policy.modes and not any(policy.modes) and policy.training


def test_an_env_without_success_is_scored_by_its_return():
    env = toy("forgetful", 5)
    policy = Scripted(lambda obs: torch.zeros(len(obs["noise"]), 1, 1), lambda obs: torch.zeros(len(obs["noise"])))
    result = evaluate(policy, env, episodes=10, run_seed=0)
    assert result.success_once is None and result.seedable is False
    assert torch.equal(result.returns, result.length.double()) and result.score == result.returns.mean()
    assert "success_once" not in result.to_dict()["overall"] and result.to_dict()["tasks"] == {}
    assert set(result.metrics("x").reduce()) == {"eval/x/return_mean", "eval/x/length_mean", "eval/x/episodes"}


def test_nothing_to_evaluate_is_refused_and_rewards_that_are_not_finite_spoil_their_episodes():
    with pytest.raises(CapabilityError, match="at least 1 episode, got 0"):
        evaluate(STAY, toy("lengths", 2), episodes=0, run_seed=0)
    env = toy("lengths", 2)
    env.t -= 10
    real = env.step
    env.step = lambda *a: dataclasses.replace(real(*a), reward=torch.tensor([1.0, float("nan")]))
    assert evaluate(STAY, env, episodes=4, run_seed=0).invalid.tolist() == [False, True, False, True]


def test_the_summary_and_the_metrics_agree_with_the_episodes():
    result = evaluate(STAY, toy("lengths", 5), episodes=21, run_seed=0)
    suite, row = result.to_dict(), result.metrics("heldout").reduce()
    check_keys(row)
    for name, index in (("a", 0), ("b", 1)):
        rows = result.task == index
        k, n = int(result.success_once[rows].sum()), int(rows.sum())
        once, expected = suite["tasks"][name]["success_once"], wilson(k, n)
        assert (once["successes"], once["episodes"], once["rate"]) == (k, n, k / n)
        assert (once["low95"], once["high95"]) == (expected.low, expected.high)
        assert row[f"eval/heldout/success_rate/{name}"] == pytest.approx(k / n)
        assert row[f"eval/heldout/success_low95/{name}"] == expected.low
        assert row[f"eval/heldout/episodes/{name}"] == n
    overall = suite["overall"]
    assert overall["episodes"] == 21 == suite["tasks"]["a"]["episodes"] + suite["tasks"]["b"]["episodes"]
    assert overall["return_mean"] == pytest.approx(float(result.returns.mean()))
    assert overall["return_median"] == np.median(result.returns.numpy())
    assert overall["return_std"] == pytest.approx(np.std(result.returns.numpy()))
    assert row["eval/heldout/success_at_end_rate"] == pytest.approx(float(result.success_at_end.double().mean()))
    assert row["eval/heldout/length_mean"] == pytest.approx(float(result.length.double().mean()))


@pytest.mark.parametrize("name", ["lengths", "forgetful"])
def test_a_saved_evaluation_loads_unchanged(tmp_path, name):
    policy = Scripted(lambda obs: torch.zeros(len(next(iter(obs.values()))), 1, 1), lambda obs: None, has_critic=False)
    result = evaluate(policy, toy(name, 3), episodes=7, run_seed=2**31 - 1)
    result.save(tmp_path / "evaluation.json")
    loaded = EvaluationResult.load(tmp_path / "evaluation.json")
    for field in dataclasses.fields(result):
        a, b = getattr(result, field.name), getattr(loaded, field.name)
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
    document = json.loads((tmp_path / "evaluation.json").read_text())
    assert document["episodes"][3]["task"] == result.tasks[3 % len(result.tasks)]
    assert document["summary"] == result.to_dict()


def test_a_missing_or_foreign_evaluation_is_told(tmp_path):
    path = tmp_path / "evaluation.json"
    with pytest.raises(NotFoundError, match="no such evaluation"):
        EvaluationResult.load(path)
    for text, reason in (("{", "Expecting"), ('{"format": 9}', "format 9, this version reads 1"), ("{}", "format")):
        path.write_text(text)
        with pytest.raises(RunFolderError, match=f"is not an evaluation that this version can read .*{reason}"):
            EvaluationResult.load(path)


class Filmed:
    """The toy `lengths` with a camera whose picture shows the step and the copy, and with instructions."""

    def __init__(self, copies, **config):
        self.inner = toy("lengths", copies, **config)
        self.spec = dataclasses.replace(self.inner.spec, cameras=("top", "side"), control_hz=10.0)
        self.device = self.inner.device
        self.asked = []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def instructions(self):
        return [f"seed {s}" for s in self.inner.name.tolist()]

    def render(self, copies, camera, height, width):
        self.asked.append((copies.tolist(), camera))
        pictures = torch.zeros(len(copies), height, width, 3, dtype=torch.uint8)
        pictures[..., 0] = self.inner.t[copies].to(torch.uint8).view(-1, 1, 1)
        return pictures


def test_a_film_shows_the_chosen_episodes_from_start_to_last_state(tmp_path):
    result = evaluate(STAY, toy("lengths", 4), episodes=16, run_seed=0)
    env = Filmed(3)
    numbers = choose(result, 6)
    clips = film(STAY, env, result, numbers, height=32, width=48, folder=tmp_path)
    assert len(clips) == 6
    for clip, number in zip(clips, numbers.tolist(), strict=True):
        length = int(result.length[number])
        assert clip.length == length and clip.frames.shape == (length + 1, 32, 48, 3)
        assert clip.frames[:, 0, 0, 0].tolist() == list(range(length + 1))
        assert clip.success == bool(result.success_once[number]) and clip.episode_return == float(result.returns[number])
        assert clip.task == result.tasks[number % 2] and clip.instruction == f"seed {int(result.seed[number]) % 1000}"
    assert {camera for _, camera in env.asked} == {"top"}
    assert (tmp_path / "grid.mp4").is_file() and len(list(tmp_path.glob("0*.mp4"))) == 6


def test_a_film_shows_every_control_step_of_a_chunk():
    policy = Scripted(lambda obs: torch.zeros(len(obs["t"]), 4, 1), lambda obs: torch.zeros(len(obs["t"])), chunk=4)
    env = Filmed(2)
    result = evaluate(policy, env, episodes=5, run_seed=0)
    for clip in film(policy, env, result, torch.arange(5), height=8, width=8):
        assert clip.frames[:, 0, 0, 0].tolist() == list(range(clip.length + 1))


def test_films_show_successes_and_failures_of_every_task():
    result = evaluate(STAY, toy("lengths", 4, longest=3), episodes=40, run_seed=0)
    picked = choose(result, 8)
    once = result.success_once[picked]
    assert once.sum() == 4 and set(result.task[picked][once].tolist()) == set(result.task[picked][~once].tolist()) == {0, 1}
    solved = dataclasses.replace(result, success_once=torch.ones(40, dtype=torch.bool))
    assert len(choose(solved, 8)) == 8 and len(choose(result, 100)) == 40 and len(choose(result, 0)) == 0


def test_an_env_that_cannot_be_filmed_says_why():
    result = evaluate(STAY, toy("lengths", 2), episodes=2, run_seed=0)
    with pytest.raises(CapabilityError, match="no camera to film with; set evaluate.videos: 0"):
        film(STAY, toy("lengths", 2), result, torch.arange(1))
    blind = Filmed(2)
    blind.spec = dataclasses.replace(blind.spec, seedable=False)
    with pytest.raises(CapabilityError, match="cannot start an episode again"):
        film(STAY, blind, result, torch.arange(1))
