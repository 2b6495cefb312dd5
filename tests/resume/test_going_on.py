"""What a resumed run says and does where it cannot simply go on."""

import errno
import json
import logging
import os
import re
import shutil

import pytest
import torch

from embodied_rl import checkpoint
from embodied_rl.checkpoint import CheckpointWarning
from embodied_rl.cli import main
from embodied_rl.errors import CheckpointError
from embodied_rl.session import Session
from tests.resume import lab


def mistake(capsys, *argv):
    """The message of a command that ends with exit code 2."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1
    return err[err.index("error: ") :]


def tree_of(folder):
    """Every file below a folder with its bytes, locks aside."""
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


@pytest.fixture
def begun(tmp_path):
    """A run of 5 updates of 10, as the command line leaves it: recipe file and run folder."""
    recipe = lab.write(lab.recipe("stream", checkpoint={"keep": 3}), tmp_path)
    lab.go(lab.recipe("stream", checkpoint={"keep": 3}), tmp_path / "run", until=5)
    shutil.copy(recipe, tmp_path / "run" / "recipe.yaml")
    return recipe, tmp_path / "run"


def test_without_a_checkpoint_the_run_begins_again_and_says_so(whole, tmp_path, caplog):
    """As when a run is killed before its first checkpoint; rows it had written are replaced."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"progress/update": 1, "progress/env_steps": 80, "actor/lr": 9}\n{"progress/upd')
    with caplog.at_level(logging.INFO):
        assert main(["train", str(lab.write(lab.recipe("stream"), tmp_path)), "--resume"]) == 0
    assert f"{tmp_path / 'run'} has no checkpoint yet: starting from the beginning" in caplog.messages
    assert lab.rows_of(tmp_path / "run") == whole("stream")[0]


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(begun, whole, caplog):
    recipe, run = begun
    newest = run / "checkpoints" / "update_000005"
    os.truncate(newest / "tensors.safetensors", 1000)
    with caplog.at_level(logging.INFO), pytest.warns(CheckpointWarning, match=f"{newest}: is damaged: .* going back to the older"):
        assert main(["train", str(recipe), "--resume"]) == 0
    assert f"continuing {run} after update 4" in caplog.messages
    assert lab.rows_of(run) == whole("stream")[0]
    assert lab.differing(lab.state_of(run / "checkpoints"), whole("stream")[1]) == []


def test_when_every_checkpoint_is_damaged_nothing_is_touched(begun, capsys):
    recipe, run = begun
    for path in (run / "checkpoints").iterdir():
        (path / "state.json").write_text("{")
    before = tree_of(run)
    err = mistake(capsys, "train", recipe, "--resume")
    assert err.startswith(f"error: {run / 'checkpoints'}: no checkpoint is intact (")
    assert err.endswith("; start the run again under another name\n")
    assert tree_of(run) == before


OTHER = {
    "another policy": ({"policy": {"hidden": [12, 16]}}, r"holds another policy: .* Use the recipe it was trained with"),
    "other copies": ({"collect": {"copies": 4}}, r": it holds 4 copies of the env, collect.copies is 8$"),
    "other parts": ({"collect": {"pipeline": 2}}, r" does not fit this run \(ValueError: .*\); use one that this recipe wrote"),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_checkpoint_of_another_run_is_refused(case, begun, tmp_path, capsys):
    recipe, run = begun
    changes, message = OTHER[case]
    lab.go(lab.recipe("stream", **changes), tmp_path / "other", until=7)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "update_000007", run / "checkpoints" / "update_000007")
    before = tree_of(run)
    err = mistake(capsys, "train", recipe, "--resume")
    assert err.startswith(f"error: checkpoint {run / 'checkpoints' / 'update_000007'}")
    assert re.search(message, err.strip()), err
    assert tree_of(run) == before


def test_a_state_that_lacks_a_part_is_refused(begun):
    _, run = begun
    state = checkpoint.load(checkpoint.latest(run / "checkpoints"))
    del state["credit"]["m2"]
    session = Session.build(lab.recipe("stream"))
    with pytest.raises(CheckpointError, match=r"checkpoint here does not fit this run \(KeyError: 'm2'\); use one that this recipe wrote"):
        session.load_state_dict(state, "here")
    session.close()


def test_what_does_not_change_the_training_may_change_on_resume(begun, whole):
    recipe, run = begun
    changes = ["evaluate.every=2", "checkpoint.every=4", "log.tensorboard=true", "train.max_bad_updates=9", "device=cpu"]
    assert main(["train", str(recipe), "--resume", *changes]) == 0
    rows = [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in lab.rows_of(run)]
    assert rows == [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in whole("stream")[0]]
    assert [row["progress/update"] for row in lab.rows_of(run) if "eval/heldout/success_rate" in row] == [3, 6, 8, 10]


def test_a_run_folder_that_was_moved_goes_on_where_it_is(begun, whole, tmp_path, monkeypatch):
    _, run = begun
    (tmp_path / "elsewhere").mkdir()
    run.rename(tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "moved", "--resume"]) == 0
    assert lab.differing(lab.state_of(tmp_path / "elsewhere" / "moved" / "checkpoints"), whole("stream")[1]) == []
    assert not run.exists()


SOURCES = {
    "envpool": ({"type": "envpool", "id": "Pendulum-v1"}, " (envpool seeds its copies once"),
    "a toy": ({"type": str(lab.TOYS / "forgetful.py")}, ":"),
    "gymnasium without its actions": (
        {"type": "gymnasium", "id": "Pendulum-v1", "resumable": False}, " (env.resumable is false):",
    ),
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_an_env_without_state_goes_on_with_new_episodes_and_says_so(source, tmp_path, caplog):
    env, reason = SOURCES[source]
    wanted = lab.recipe(updates=6, env=env)
    rows, _ = lab.go(wanted, tmp_path / "run", until=3)
    caplog.clear()
    rest, state = lab.go(wanted, tmp_path / "run", resume=True)
    (told,) = [m for m in caplog.messages if m.startswith(f"this env cannot restore its state{reason}")]
    assert told.endswith(": episodes begin anew, so the resumed run is not bit-identical")
    assert [row["progress/update"] for row in rows + rest] == [1, 2, 3, 4, 5, 6]
    assert rest[-1]["progress/env_steps"] == 480
    assert all(torch.isfinite(x).all() for x in state["policy"].values())


def test_whole_episodes_need_no_env_state_to_be_exact(tmp_path, caplog):
    """Every rollout begins with a reset by seed, so even an env that remembers nothing goes on bit for bit."""
    wanted = lab.recipe(
        updates=4, env={"type": "gymnasium", "id": "Pendulum-v1", "resumable": False, "max_steps": 8}, collect={"mode": "episodes"}
    )
    rows, state = lab.go(wanted, tmp_path / "whole")
    first, _ = lab.go(wanted, tmp_path / "run", until=2)
    rest, end = lab.go(wanted, tmp_path / "run", resume=True)
    assert first + rest == rows and lab.differing(state, end) == []
    assert not caplog.messages
    assert state["collector"]["envs"] is None, "nothing is stored that is not read"


FICKLE = '''
"""Registers an env that does not repeat its episodes."""
import gymnasium
import numpy as np
class Fickle(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}
    def step(self, action):
        return np.random.default_rng().random(1).astype(np.float32), 0.0, False, False, {}
gymnasium.register("Fickle-v0", Fickle, max_episode_steps=8)
'''


def test_an_env_that_does_not_repeat_its_episodes_goes_on_with_new_ones(tmp_path, monkeypatch, caplog):
    (tmp_path / "fickle_package.py").write_text(FICKLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    wanted = lab.recipe(updates=6, env={"type": "gymnasium", "id": "fickle_package:Fickle-v0"})
    lab.go(wanted, tmp_path / "run", until=3)
    caplog.clear()
    rest, _ = lab.go(wanted, tmp_path / "run", resume=True)
    assert len(rest) == 3
    assert "did not repeat its episode" in caplog.messages[0]
    assert caplog.messages[1].startswith("this env cannot restore its state: episodes begin anew")


def test_another_machine_is_told(begun, caplog):
    _, run = begun
    state = checkpoint.load(checkpoint.latest(run / "checkpoints"))
    session = Session.build(lab.recipe("stream"))
    assert session.load_state_dict(state, "here") is True and not caplog.messages
    state["machine"] |= {"threads": "64", "torch": "1.0"}
    assert session.load_state_dict(state, "here") is False
    assert caplog.messages == [
        f"not the machine of before (torch 1.0 -> {torch.__version__}, threads 64 -> 1): results may differ in the last bits"
    ]
    session.close()


def test_samples_of_another_kind_of_device_are_drawn_anew(begun, caplog):
    """A CUDA generator's state means nothing to the CPU's; a run must be able to go on without its GPU."""
    _, run = begun
    state = checkpoint.load(checkpoint.latest(run / "checkpoints"))
    state["machine"]["device"] = "cuda"
    state["collector"]["generator"] = {"device": "cuda", "state": torch.zeros(16, dtype=torch.uint8)}
    drawn = []
    for _ in range(2):
        session = Session.build(lab.recipe("stream"))
        assert session.load_state_dict(state, "here") is False
        drawn.append(torch.rand(4, generator=session.collector.generator))
        session.close()
    assert torch.equal(*drawn), "still a function of the recipe"
    assert "the run was sampled on cuda and goes on on cpu" in caplog.messages[0]


def test_no_start_seed_is_used_twice(tmp_path):
    """Neither by two copies, nor before and after a resume."""
    wanted = lab.recipe("stream", updates=6)
    seeds = []
    for until, resume in ((3, False), (-1, True)):
        session = Session.build(wanted)
        collect = session.collector.collect
        session.collector.collect = lambda collect=collect: seeds.append(collect()) or seeds[-1]
        monkey = pytest.MonkeyPatch()
        monkey.setattr(Session, "build", classmethod(lambda cls, recipe, session=session, **_: session))
        try:
            lab.go(wanted, tmp_path / "run", until=until, resume=resume)
        finally:
            monkey.undo()
    finished = torch.cat([r.finished["seed"] for r in seeds if r.finished])
    assert len(finished) == len(finished.unique()) > 40
    assert not (finished & 1).any(), "the last bit is 0 for training"


def test_the_final_evaluation_of_a_resumed_run_is_that_of_the_whole_one(begun, tmp_path):
    recipe, run = begun
    assert main(["train", str(recipe), "--resume"]) == 0
    assert main(["train", str(recipe), "name=whole"]) == 0
    a, b = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("run", "whole"))
    assert a == b


def test_the_best_checkpoint_of_a_run_outlives_newer_ones(tmp_path):
    evaluate = {"every": 2, "episodes_during": 12}
    wanted = lab.recipe(updates=12, evaluate=evaluate, checkpoint={"keep": 1}, algorithm={"update": {"lr": 0.03}})
    first, _ = lab.go(wanted, tmp_path / "run", until=7)
    rest, _ = lab.go(wanted, tmp_path / "run", resume=True)
    scores = {row["progress/update"]: row["eval/heldout/success_rate"] for row in first + rest if "eval/heldout/success_rate" in row}
    best = max(scores, key=lambda update: (scores[update], update))
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == sorted({f"update_{best:06d}", "update_000012"})
    assert checkpoint.best(tmp_path / "run" / "checkpoints").name == f"update_{best:06d}"


def test_a_disk_that_fills_up_is_told_and_the_run_goes_on_bit_for_bit(whole, tmp_path, monkeypatch, capsys):
    recipe, saved = lab.write(lab.recipe("stream"), tmp_path), checkpoint.save_file

    def full(tensors, path, **kwargs):
        if "update_000004" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        saved(tensors, path, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    err = mistake(capsys, "train", recipe)
    assert err.startswith(
        f"error: {tmp_path / 'run' / 'checkpoints'}: cannot write the checkpoint of update 4: the disk is full ("
    )
    assert err.endswith("; earlier checkpoints are untouched; free some space and run again with --resume\n")
    monkeypatch.undo()
    assert main(["train", str(recipe), "--resume"]) == 0
    assert lab.rows_of(tmp_path / "run") == whole("stream")[0]
    assert lab.differing(lab.state_of(tmp_path / "run" / "checkpoints"), whole("stream")[1]) == []
