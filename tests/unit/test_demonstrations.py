"""Demonstrations: what is recorded, what survives a kill, what comes back, and in which order it is drawn."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from embodied_rl import registry
from embodied_rl.cli import main
from embodied_rl.config import load_component
from embodied_rl.demo_check import validate
from embodied_rl.demo_format import DemonstrationError
from embodied_rl.demonstrations import Demonstrations
from embodied_rl.envs.tabletop.instructions import encode
from embodied_rl.errors import CapabilityError
from embodied_rl.record_demos import CORRELATION, FADE, NOISE, STARTS, Disturbance, collect_demonstrations
from embodied_rl.seeding import start_seed
from tests.kit import CPU, TOYS

SHOWN = str(TOYS / "shown.py")


def record(folder, episodes, *, noise=1.0, misses=0.0, show=False, keep="success", copies=4, seed=0, **settings):
    """Demonstrations of the toy; its expert fails at about a quarter of the starts when time is short."""
    values = {"max_steps": 5} | settings
    env = load_component("env", SHOWN, [f"{k}={json.dumps(v)}" for k, v in values.items()])
    return collect_demonstrations(
        env, folder, episodes, noise=noise, misses=misses, show_misses=show, keep=keep, copies=copies, seed=seed
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """Twelve episodes; read it, never write into it."""
    folder = tmp_path_factory.mktemp("demos") / "twelve"
    record(folder, 12)
    return folder


# ---- what is recorded ------------------------------------------------------------------------------------------------


def disturbance(copies, seed, steps, std, dimensions):
    """[steps, copies, D] by the formula, one number at a time, from the same draws."""
    generator = torch.Generator().manual_seed(seed)
    e = [torch.randn(copies, dimensions, generator=generator).double().numpy() for _ in range(steps)]
    out = np.zeros((steps, copies, dimensions))
    for i in np.ndindex(copies, dimensions):
        n = std * e[0][i]
        for t in range(steps):
            n = n if t == 0 else 0.85 * n + std * (1 - 0.85**2) ** 0.5 * e[t][i]
            out[t, *i] = n * (1 - t / 20) if t < 20 else 0
    return out


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_env_executes_more_than_the_expert_wanted_and_the_set_holds_what_it_wanted(noise, tmp_path):
    record(tmp_path / "demos", 12, noise=noise)
    demos = Demonstrations(tmp_path / "demos")
    lengths, pushed = set(), 0.0
    for line, episode in zip(demos.lines, demos.load(), strict=True):
        module = registry.load("env", SHOWN)
        env = module.build(module.Config(max_steps=5), num_envs=1, device=CPU, split="train", seed=0)
        attempt = line.extra["attempt"]
        assert line.extra["seed"] == start_seed(0, "train", STARTS, attempt)
        assert line.extra["task"] == env.spec.tasks[attempt % 2]
        obs = env.reset(torch.ones(1, dtype=torch.bool), torch.tensor([line.extra["seed"]]), torch.tensor([attempt % 2]))
        assert episode.instruction == env.instructions()[0]
        added = disturbance(4, start_seed(0, "train", NOISE, attempt // 4), 5, noise, 2)[:, attempt % 4]
        for t in range(line.length):
            assert set(obs) == set(episode.obs)
            for name in ("goals", "word"):
                assert torch.equal(episode.obs[name][t], obs[name][0]), (name, t)
            torch.testing.assert_close(episode.obs["position"][t], obs["position"][0], rtol=0, atol=1e-5)
            goal = episode.obs["goals"][t, attempt % 2, :2]
            wanted = ((goal - episode.obs["position"][t]) / 0.3).clamp(-1, 1)
            torch.testing.assert_close(episode.action[t], wanted, rtol=0, atol=1e-6)
            executed = (episode.action[t] + torch.tensor(added[t]).float()).clamp(-1, 1)
            pushed = max(pushed, float((executed - wanted).abs().max()))
            step = env.step(executed[None])
            torch.testing.assert_close(episode.reward[t], step.reward[0], rtol=0, atol=1e-5)
            assert episode.success[t] == step.success[0]
            obs = step.obs
        assert bool(step.terminated | step.truncated)
        lengths.add(line.length)
    assert len(lengths) > 2, "episodes of one length would test little"
    assert (pushed > 1) if noise else (pushed < 1e-6)


def test_after_a_miss_the_set_holds_what_the_expert_does_and_nothing_before(tmp_path):
    """The toy's clumsy hand goes away from the goal for one or two steps; the disturbance is left out of this."""
    made = {misses: tmp_path / str(misses) for misses in (0.0, 0.5, 1.0)}
    for misses, folder in made.items():
        record(folder, 12, noise=0.0, misses=misses, max_steps=9)
        assert validate(folder) == []
    right, some, wrong = (
        {line.extra["attempt"]: e for line, e in zip(d.lines, d.load(), strict=True)}
        for d in map(Demonstrations, made.values())
    )
    module, later = registry.load("env", SHOWN), []
    for attempt, episode in wrong.items():
        seed = torch.tensor([start_seed(0, "train", STARTS, attempt)])
        env = module.build(module.Config(max_steps=9), num_envs=1, device=CPU, split="train", seed=0)
        obs = env.reset(torch.ones(1, dtype=torch.bool), seed, torch.tensor([attempt % 2]))
        missed = 0
        while not torch.equal(obs["position"][0], episode.obs["position"][0]):
            obs, missed = env.step(-env.expert().act().clamp(-1, 1)).obs, missed + 1
            assert missed <= 2, "the set does not begin where the error was found out"
        later.append(missed)
        for t in range(len(episode.action)):
            assert torch.equal(episode.obs["camera"][t], obs["camera"][0])
            assert torch.equal(episode.action[t], env.expert().act().clamp(-1, 1)[0])
            obs = env.step(episode.action[t : t + 1]).obs
        assert bool(episode.success[-1])
    assert set(later) == {1, 2}
    same = {a: len(e.action) == len(right[a].action) and torch.equal(e.action, right[a].action)
            for a, e in some.items() if a in right}  # fmt: skip
    assert set(same.values()) == {True, False}, "about half of the attempts begin with a miss"


def test_a_miss_that_is_shown_is_labelled_with_what_the_expert_would_have_done(tmp_path):
    """The same attempts, from their first step on; what was executed there is the opposite of what the set holds."""
    made = {show: tmp_path / str(show) for show in (False, True)}
    for show, folder in made.items():
        record(folder, 6, noise=0.0, misses=1.0, show=show, max_steps=9)
    module = registry.load("env", SHOWN)
    mended, shown = (list(zip(d.lines, d.load(), strict=True)) for d in map(Demonstrations, made.values()))
    for (line, after), (same, whole) in zip(mended, shown, strict=True):
        assert line.extra == same.extra
        missed = len(whole.action) - len(after.action)
        assert missed in (1, 2)
        assert torch.equal(whole.action[missed:], after.action)
        attempt = line.extra["attempt"]
        env = module.build(module.Config(max_steps=9), num_envs=1, device=CPU, split="train", seed=0)
        env.reset(torch.ones(1, dtype=torch.bool), torch.tensor([line.extra["seed"]]), torch.tensor([attempt % 2]))
        for t in range(missed):
            right = env.expert().act().clamp(-1, 1)
            assert torch.equal(whole.action[t], right[0])
            env.step(-right)
        assert torch.equal(env.position[0], after.obs["position"][0])


def test_how_a_hand_errs_says_nothing_of_whose_hand_it_is(tmp_path, monkeypatch):
    """Drawn by one seed, a copy that errs would always err alike: the numbers below the share are its first ones."""
    asked, toy = [], registry.load("env", SHOWN).Shown
    made = toy.clumsy
    monkeypatch.setattr(toy, "clumsy", lambda env, copies, seed: asked.append((copies, seed)) or made(env, copies, seed))
    record(tmp_path / "some", 40, misses=0.5, max_steps=9)
    first = [torch.rand(4, generator=torch.Generator().manual_seed(seed))[0] < 0.5 for errs, seed in asked if errs[0]]
    assert len(first) >= 4
    assert {bool(x) for x in first} == {True, False}


def test_an_episode_that_is_all_error_is_in_no_set(tmp_path):
    """A hand that errs for two steps of two has nothing to show, not even where failures are kept."""
    done = record(tmp_path / "all", 6, misses=1.0, keep="all", max_steps=2)
    demos = Demonstrations(tmp_path / "all")
    assert {line.length for line in demos.lines} == {1}
    assert sum(count.tried for count in done.tasks.values()) > 6


def test_pictures_come_back_exactly(tmp_path):
    """Undisturbed, so that an env can be made to play the same again, bit for bit."""
    record(tmp_path / "demos", 4, noise=0.0)
    demos = Demonstrations(tmp_path / "demos")
    for line, episode in zip(demos.lines, demos.load(), strict=True):
        module = registry.load("env", SHOWN)
        env = module.build(module.Config(max_steps=5), num_envs=1, device=CPU, split="train", seed=0)
        task = torch.tensor([line.extra["attempt"] % 2])
        obs = env.reset(torch.ones(1, dtype=torch.bool), torch.tensor([line.extra["seed"]]), task)
        for t in range(line.length):
            for name, x in obs.items():
                assert episode.obs[name].dtype == x.dtype
                assert torch.equal(episode.obs[name][t], x[0]), (name, t)
            step = env.step(episode.action[t : t + 1])
            assert episode.reward[t] == step.reward[0]
            obs = step.obs


def test_the_disturbance_is_slow_as_strong_as_asked_for_and_fades():
    std, copies = 0.7, 40_000
    drawn = Disturbance(std, torch.tensor([True, False]), copies, seed=3)
    added = torch.stack([drawn.draw() for _ in range(FADE + 5)])
    assert not added[:, :, 1].any(), "a dimension that is to be left alone is"
    assert not added[FADE:].any() and bool(added[FADE - 1].any())
    faded = 1 - torch.arange(FADE) / FADE
    # 40,000 draws: the standard error of a standard deviation is 0.35 %, of a correlation 0.5 %.
    torch.testing.assert_close(added[:FADE, :, 0].std(1), std * faded, rtol=0.02, atol=0)
    for lag in (1, 4):
        r = torch.corrcoef(added[[2, 2 + lag], :, 0])[0, 1]
        assert float(r) == pytest.approx(CORRELATION**lag, abs=0.02)
    again = Disturbance(std, torch.tensor([True, False]), copies, seed=3)
    assert torch.equal(torch.stack([again.draw() for _ in range(3)]), added[:3])
    assert not torch.equal(Disturbance(std, torch.tensor([True, False]), copies, seed=4).draw(), added[0])


def test_an_expert_says_which_dimensions_are_disturbed(tmp_path, monkeypatch):
    monkeypatch.setattr(registry.load("env", SHOWN).Expert, "disturbed", (True, False), raising=False)
    record(tmp_path / "demos", 8)
    moved = []
    for episode in Demonstrations(tmp_path / "demos").load():
        moved.append((episode.obs["position"].diff(dim=0) / 0.3 - episode.action[:-1]).abs())
    off = torch.cat(moved)
    assert float(off[:, 0].max()) > 0.5 and float(off[:, 1].max()) < 1e-5


def test_the_set_describes_what_the_env_shows_and_takes(twelve):
    demos = Demonstrations(twelve)
    module = registry.load("env", SHOWN)
    spec = module.build(module.Config(), num_envs=1, device=CPU, split="train", seed=0).spec
    assert demos.observation == spec.observation
    assert demos.action == spec.action
    assert demos.cameras == ("camera",)
    demos.require(spec)
    assert (demos.episodes, demos.frames) == (12, sum(line.length for line in demos.lines))
    assert demos.chunk_index.tolist() == [0] * 12
    assert validate(twelve) == []


def test_every_task_has_as_many_episodes_and_all_succeed(twelve):
    lines = Demonstrations(twelve).lines
    assert [line.extra["task"] for line in lines] == ["first", "second"] * 6
    assert all(line.extra["success"] for line in lines)
    attempts = [line.extra["attempt"] for line in lines]
    assert max(attempts) > 11, "the expert never failed, so nothing was replaced"
    assert len(set(attempts)) == 12
    assert attempts[::2] == sorted(attempts[::2]) and attempts[1::2] == sorted(attempts[1::2])


def test_all_keeps_every_attempt_in_order(tmp_path):
    done = record(tmp_path / "all", 10, keep="all")
    lines = Demonstrations(tmp_path / "all").lines
    assert [line.extra["attempt"] for line in lines] == list(range(10))
    outcomes = [line.extra["success"] for line in lines]
    assert {True, False} == set(outcomes)
    assert sum(count.solved for count in done.tasks.values()) == sum(outcomes)
    assert sum(count.tried for count in done.tasks.values()) == 10


@pytest.mark.parametrize("keep", ["all", "success"])
def test_an_episode_that_the_simulator_spoilt_is_in_no_set(keep, tmp_path, monkeypatch):
    toy = registry.load("env", SHOWN).Shown
    step = toy.step

    def spoilt(self, action, active=None):
        out = step(self, action, active)
        out.invalid = (self.t == 1) & (torch.arange(len(self.t)) == 1)
        out.terminated |= out.invalid
        return out

    monkeypatch.setattr(toy, "step", spoilt)
    record(tmp_path / "set", 6, keep=keep)
    attempts = [line.extra["attempt"] for line in Demonstrations(tmp_path / "set").lines]
    assert len(attempts) == 6 and not any(attempt % 4 == 1 for attempt in attempts), "the second copy's never are"


def test_an_env_that_shows_itself_on_demand_gives_the_same_set(twelve, tmp_path):
    record(tmp_path / "on_demand", 12, on_demand=True)
    for a, b in zip(Demonstrations(twelve).load(), Demonstrations(tmp_path / "on_demand").load(), strict=True):
        assert torch.equal(a.action, b.action)
        assert all(torch.equal(a.obs[name], b.obs[name]) for name in a.obs)


def test_the_files_are_what_other_programs_read(twelve):
    lines = [json.loads(line) for line in (twelve / "meta/episodes.jsonl").read_text().splitlines()]
    line = max(lines, key=lambda row: row["length"])
    table = pq.read_table(twelve / f"data/chunk-000/episode_{line['episode_index']:06d}.parquet")
    info = json.loads((twelve / "meta/info.json").read_text())
    assert table.num_rows == line["length"]
    assert set(table.column_names) == set(info["features"])
    assert info["codebase_version"] == "v2.1" and info["fps"] == 10 and info["splits"] == {"train": "0:12"}
    frames = table.to_pylist()
    assert [f["frame_index"] for f in frames] == list(range(len(frames)))
    assert frames[2]["timestamp"] == pytest.approx(0.2)
    assert frames[-1]["next.done"] and frames[-1]["next.success"]
    assert frames[0]["observation.images.camera"]["bytes"].startswith(b"\x89PNG")
    texts = {row["task_index"]: row["task"] for row in map(json.loads, (twelve / "meta/tasks.jsonl").read_text().splitlines())}
    assert [texts[f["task_index"]] for f in frames] == line["tasks"] * len(frames)
    stats = [json.loads(row) for row in (twelve / "meta/episodes_stats.jsonl").read_text().splitlines()]
    assert set(stats[3]["stats"]) == set(info["features"])
    assert np.shape(stats[line["episode_index"]]["stats"]["observation.images.camera"]["mean"]) == (3, 1, 1)
    note = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert note["observation.images.camera"] == {"_type": "Image"}


def test_statistics_are_those_of_all_frames(twelve):
    demos = Demonstrations(twelve)
    statistics = demos.statistics()
    assert set(statistics) == {"action", "position", "goals"}
    episodes = list(demos.load(cameras=()))
    for name, stats in statistics.items():
        values = torch.cat([e.action if name == "action" else e.obs[name] for e in episodes]).double().numpy()
        assert len(values) == demos.frames
        expected = {
            "mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0),
            "q01": np.quantile(values, 0.01, axis=0), "q99": np.quantile(values, 0.99, axis=0),
        }  # fmt: skip
        assert set(stats) == set(expected)
        for k, x in expected.items():
            torch.testing.assert_close(stats[k], torch.from_numpy(x).float(), rtol=1e-6, atol=1e-7)


# ---- interruptions ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(1, 44, 3))
def test_a_stop_at_any_write_loses_nothing_that_was_finished(moment, twelve, tmp_path, monkeypatch):
    real, calls = os.fsync, [0]

    def fsync(handle):
        calls[0] += 1
        if calls[0] >= moment:
            raise Killed
        real(handle)

    folder = tmp_path / "demos"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(Killed):
            record(folder, 12)
    record(folder, 12)
    assert contents(folder) == contents(twelve)


def test_nothing_is_written_after_a_write_that_failed(twelve, tmp_path, monkeypatch):
    """The disk is full for a moment, while the next attempts are being played."""
    from embodied_rl import demo_writer

    append, failed = demo_writer.DemoWriter.append, []

    def fails_once(self, packed):
        if len(self.lines) == 3 and not failed:
            failed.append(True)
            raise DemonstrationError("no space left")
        append(self, packed)

    monkeypatch.setattr(demo_writer.DemoWriter, "append", fails_once)
    with pytest.raises(DemonstrationError, match="no space left"):
        record(tmp_path / "demos", 12)
    assert Demonstrations(tmp_path / "demos").episodes == 3
    record(tmp_path / "demos", 12)
    assert contents(tmp_path / "demos") == contents(twelve)


def test_leftovers_of_a_kill_are_removed(twelve, tmp_path):
    folder = tmp_path / "demos"
    record(folder, 5)
    data = folder / "data/chunk-000"
    with open(folder / "meta/episodes.jsonl", "ab") as file:
        file.write(b'{"episode_index": 5, "tas')
    with open(folder / "meta/episodes_stats.jsonl", "ab") as file:
        file.write(b'{"episode_index": 5, "stats": {}}\n{"epi')
    with open(folder / "meta/tasks.jsonl", "ab") as file:
        file.write(b'{"task_index": 2, "task": "never used"}\n')
    shutil.copy(data / "episode_000004.parquet", data / "episode_000005.parquet")
    (data / ".tmp-episode_000006.parquet").write_bytes(b"PAR1")
    assert Demonstrations(folder).episodes == 5, "a cut last line is no episode"
    record(folder, 12)
    assert contents(folder) == contents(twelve)


def test_a_longer_set_begins_with_the_shorter_one(twelve, tmp_path):
    for episodes in (1, 4, 9, 12):
        record(tmp_path / "demos", episodes)
    assert contents(tmp_path / "demos") == contents(twelve)


def test_many_episodes_lie_in_several_folders(twelve, tmp_path, monkeypatch):
    from embodied_rl import demo_writer

    monkeypatch.setattr(demo_writer, "CHUNKS_SIZE", 5)
    for episodes in (7, 12):
        record(tmp_path / "demos", episodes)
    demos = Demonstrations(tmp_path / "demos")
    assert demos.chunk_index.tolist() == [0] * 5 + [1] * 5 + [2] * 2
    assert demos.info["total_chunks"] == 3
    assert (tmp_path / "demos/data/chunk-002/episode_000011.parquet").is_file()
    assert validate(demos.folder) == []
    for a, b in zip(Demonstrations(twelve).load(), demos.load(), strict=True):
        assert torch.equal(a.action, b.action)


def test_nothing_is_recorded_when_there_is_enough(twelve, tmp_path):
    shutil.copytree(twelve, tmp_path / "demos")
    assert record(tmp_path / "demos", 7).episodes == 12
    assert contents(tmp_path / "demos") == contents(twelve)


SLOWLY = """
import time
from embodied_rl import demo_writer
from tests.unit.test_demonstrations import record
append = demo_writer.DemoWriter.append
def slow(self, packed):
    append(self, packed)
    print(len(self.lines), flush=True)
    time.sleep(0.005)
demo_writer.DemoWriter.append = slow
record(__import__("pathlib").Path({folder!r}), 40)
"""


def test_kill_9_and_going_on_equals_no_kill(tmp_path):
    record(tmp_path / "whole", 40)
    folder = tmp_path / "killed"
    for kill_at in (3, 17):
        root = Path(__file__).resolve().parents[2]
        code = SLOWLY.format(folder=str(folder))
        with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if int(line) >= kill_at:
                    time.sleep(0.001 * kill_at)
                    process.send_signal(signal.SIGKILL)
                    break
        assert process.returncode == -signal.SIGKILL
        assert kill_at <= Demonstrations(folder).episodes < 40
    record(folder, 40)
    assert contents(folder) == contents(tmp_path / "whole")


# ---- drawing batches -------------------------------------------------------------------------------------------------


def numbered(demos):
    """(episode, frame) of every frame, found again by its action and position, which are all different."""
    return {
        (*e.action[t].tolist(), *e.obs["position"][t].tolist(), *e.obs["goals"][t].flatten().tolist()): (e.index, t)
        for e in demos.load(cameras=())
        for t in range(len(e.action))
    }


def who(names, obs, action):
    rows = torch.cat([action[:, 0], obs["position"], obs["goals"].flatten(1)], dim=1)
    return [names[tuple(row)] for row in rows.tolist()]


@pytest.mark.parametrize("frames_in_cache", [10_000, 20, 1])
def test_each_epoch_draws_every_frame_once_within_the_limit(frames_in_cache, twelve):
    demos = Demonstrations(twelve)
    names = numbered(demos)
    assert len(names) == demos.frames
    frame_bytes = 6 * 8 * 3 + 8 + 24 + 8 + 8
    batches = demos.batches(torch.Generator().manual_seed(0), 5, 1, cache_bytes=frames_in_cache * frame_bytes)
    drawn = []
    for _ in range(3 * demos.frames):
        obs, action, mask, _ = next(batches)
        assert bool(mask.all()) and action.shape == (5, 1, 2)
        drawn += who(names, obs, action)
        most = max(frames_in_cache, max(demos.lengths.tolist()) if frames_in_cache == 1 else 0)
        assert 0 < batches.cached_bytes <= most * frame_bytes
    n = demos.frames
    for epoch in range(len(drawn) // n):
        assert sorted(drawn[epoch * n : (epoch + 1) * n]) == sorted(names.values())
    assert drawn[:n] != drawn[n : 2 * n], "each epoch has an order of its own"
    assert batches.epoch == len(drawn) // n - 1


def test_chunks_hold_the_actions_that_followed_and_end_with_the_episode(twelve):
    demos = Demonstrations(twelve)
    names, episodes = numbered(demos), list(demos.load())
    batches = demos.batches(torch.Generator().manual_seed(1), 16, 4)
    ends = 0
    for _ in range(20):
        obs, action, mask, _ = next(batches)
        assert action.dtype == torch.float32 and mask.dtype == torch.bool
        for i, (e, t) in enumerate(who(names, obs, action)):
            follow = episodes[e].action[t : t + 4]
            assert mask[i].tolist() == [c < len(follow) for c in range(4)]
            assert torch.equal(action[i, : len(follow)], follow)
            assert torch.equal(action[i, len(follow) :], follow[-1:].expand(4 - len(follow), 2))
            assert torch.equal(obs["camera"][i], episodes[e].obs["camera"][t])
            assert torch.equal(obs["word"][i], episodes[e].obs["word"][t])
            ends += len(follow) < 4
    assert ends > 20


@pytest.mark.parametrize("frames_in_cache", [10_000, 20])
@pytest.mark.parametrize("drawn", [0, 1, 9, 40])
def test_a_sampler_goes_on_where_it_was(frames_in_cache, drawn, twelve):
    demos = Demonstrations(twelve)
    limit = {"cache_bytes": frames_in_cache * 192}
    first = demos.batches(torch.Generator().manual_seed(5), 7, 3, **limit)
    for _ in range(drawn):
        next(first)
    state = first.state_dict()
    assert all(isinstance(x, int | torch.Tensor) for x in state.values())
    expected = [next(first) for _ in range(30)]
    second = demos.batches(torch.Generator().manual_seed(99), 7, 3, **limit)
    next(second)
    second.load_state_dict(state)
    for obs, action, mask, _ in expected:
        obs_again, action_again, mask_again, _ = next(second)
        assert torch.equal(action, action_again) and torch.equal(mask, mask_again)
        assert all(torch.equal(obs[name], obs_again[name]) for name in obs)


def test_another_order_of_the_set_is_not_taken_for_the_same(twelve, tmp_path):
    demos = Demonstrations(twelve)
    state = demos.batches(torch.Generator(), 4, 1).state_dict()
    with pytest.raises(CapabilityError, match="20 frames in the cache, the saved run had"):
        demos.batches(torch.Generator(), 4, 1, cache_bytes=20 * 192).load_state_dict(state)
    record(tmp_path / "other", 2)
    with pytest.raises(CapabilityError, match="frames in the set, the saved run had"):
        Demonstrations(tmp_path / "other").batches(torch.Generator(), 4, 1).load_state_dict(state)


def test_cameras_can_be_left_out(twelve):
    demos = Demonstrations(twelve)
    assert "camera" not in next(demos.load(cameras=())).obs
    obs, _, _, _ = next(demos.batches(torch.Generator(), 2, 1, cameras=()))
    assert set(obs) == {"position", "goals", "word"}


def test_sets_made_elsewhere_are_read(twelve, tmp_path):
    """Without our own notes in info.json, with variable-length lists, named motors, and channels first."""
    folder = tmp_path / "foreign"
    shutil.copytree(twelve, folder)
    info = json.loads((folder / "meta/info.json").read_text())
    del info["embodied_rl"]
    info["features"]["action"]["names"] = {"motors": ["left", "right"]}
    info["features"]["observation.images.camera"] |= {"shape": [3, 6, 8], "names": ["channels", "height", "width"]}
    (folder / "meta/info.json").write_text(json.dumps(info))
    rows = [json.loads(line) for line in (folder / "meta/episodes.jsonl").read_text().splitlines()]
    kept = [{k: row[k] for k in ("episode_index", "tasks", "length")} for row in rows]
    (folder / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, kept)))
    demos = Demonstrations(folder)
    assert demos.action.names == ("left", "right")
    assert demos.observation["camera"].shape == (6, 8, 3)
    assert demos.observation["word"].shape == (1,)
    for a, b in zip(Demonstrations(twelve).load(), demos.load(), strict=True):
        assert torch.equal(a.action, b.action) and a.instruction == b.instruction
        assert all(torch.equal(a.obs[name], b.obs[name]) for name in a.obs)
    assert validate(folder) == []


# ---- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(toy):
    text = (toy / "toy.yaml").read_text().replace("point.py", "shown.py").replace("policy: {", "policy: {attention_heads: 0, ")
    (toy / "toy.yaml").write_text(text.replace("attention_heads: 0, ", ""))
    return "toy.yaml"


def test_collect_goes_on_and_check_passes(recipe, toy, capsys):
    assert main(["collect", recipe, "--episodes", "4", "--out", "demos"]) == 0
    out = capsys.readouterr().out
    assert "expert at first" in out and "expert at second" in out and "MiB" in out
    assert main(["collect", recipe, "--episodes", "6", "--out", "demos"]) == 0
    assert Demonstrations("demos").episodes == 6
    capsys.readouterr()
    assert main(["check", "demos", "demos"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("ok   6 episodes, ") and out[1] == "1 passed, 0 failed, 0 not tried"
    (toy / "demos/data/chunk-000/episode_000002.parquet").unlink()
    (toy / "demos/meta/stats.json").unlink()
    assert main(["check", "demos", "demos"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("FAIL demos/data/chunk-000/episode_000002.parquet: is missing; ")
    assert out[1].startswith("FAIL demos/meta/stats.json: is missing")
    assert out[2] == "0 passed, 2 failed, 0 not tried"


def test_ctrl_c_keeps_what_is_complete(recipe, toy, capsys, monkeypatch):
    from embodied_rl import demo_writer

    append = demo_writer.DemoWriter.append

    def interrupted(self, packed):
        if len(self.lines) == 3:
            raise KeyboardInterrupt
        append(self, packed)

    with monkeypatch.context() as patch:
        patch.setattr(demo_writer.DemoWriter, "append", interrupted)
        assert main(["collect", recipe, "--episodes", "6", "--out", "demos"]) == 130
    assert capsys.readouterr().out == "interrupted: 3 of 6 episodes are in demos; run the same command to go on\n"
    assert json.loads((toy / "demos/meta/info.json").read_text())["total_episodes"] == 3
    assert main(["collect", recipe, "--episodes", "6", "--out", "demos"]) == 0
    assert validate("demos") == []


# ---- the tabletop ----------------------------------------------------------------------------------------------------


def test_a_small_set_of_the_tabletop(tmp_path):
    env = load_component("env", "tabletop", ["tasks=[reach,push,lift]", "max_steps=60", "threads=1"])
    done = collect_demonstrations(env, tmp_path / "demos", 6, copies=6)
    demos = Demonstrations(tmp_path / "demos")
    assert done.episodes == demos.episodes == 6
    assert [line.extra["task"] for line in demos.lines] == ["reach", "push", "lift"] * 2
    assert all(line.tasks[0] for line in demos.lines)
    assert validate(demos.folder) == []
    obs, action, mask, _ = next(demos.batches(torch.Generator(), 32, 8))
    assert action.shape == (32, 8, 7) and obs["objects"].shape[0] == 32
    assert set(demos.statistics()) == {"action", "proprio", "objects", "looks", "goal"}
    module = registry.load("env", "tabletop")
    built = module.build(env, num_envs=1, device=CPU, split="train", seed=0)
    demos.require(built.spec)
    spec = built.spec.observation
    assert spec["instruction"].texts and demos.observation == {**spec, "instruction": replace(spec["instruction"], texts=())}
    built.close()


def test_frames_of_one_scene_may_be_told_in_different_words(tmp_path):
    env = load_component("env", "tabletop", ["tasks=[reach,push]", "max_steps=60", "threads=1", "rephrase=true"])
    collect_demonstrations(env, tmp_path / "demos", 4, copies=2)
    demos = Demonstrations(tmp_path / "demos")
    assert validate(demos.folder) == []
    texts = [json.loads(line)["task"] for line in (demos.folder / "meta/tasks.jsonl").read_text().splitlines()]
    for line in demos.lines:
        told = pq.read_table(demos.folder / f"data/chunk-000/episode_{line.index:06d}.parquet")
        said = [texts[i] for i in told["task_index"].to_pylist()]
        assert told["observation.instruction"].to_pylist() == [list(encode(text)) for text in said]
        assert tuple(dict.fromkeys(said)) == line.tasks and len(line.tasks) > 4
