"""Mistakes that show only when a run starts, goes on or is looked at: what is said, and exit code 2."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from embodied_rl import registry
from embodied_rl.cli import main
from embodied_rl.errors import NotFoundError, ShapeError
from tests.kit import toy as toy_env


def say(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert main(list(argv)) == 2
    err = capsys.readouterr().err
    return err[err.index("error: ") :]


@pytest.fixture
def own_run(toy, toy_run):
    """A finished run that the test may damage."""
    shutil.copytree(toy_run, toy / "runs" / "toy")
    return toy / "runs" / "toy"


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("update_*"))[-1]


# ---- starting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:1", "cuda:x"])
def test_a_device_that_is_not_there(device, toy, capsys):
    there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
    assert say(capsys, "train", "toy.yaml", f"device={device}") == (
        f"error: device '{device}' is not there; this machine has: {there}. Set device to one of them, or to auto\n"
    )
    assert not (toy / "runs").exists()


def test_a_run_folder_that_exists(own_run, toy, capsys):
    assert say(capsys, "train", "toy.yaml") == (
        "error: runs/toy: exists already (finished); continue it with --resume, choose another name=..., or delete it\n"
    )


def test_a_run_folder_below_a_file(toy, capsys):
    (toy / "file").write_text("")
    assert say(capsys, "train", "toy.yaml", "log.folder=file") == (
        "error: file/toy: cannot create the run folder: a part of this path is a file, not a folder: rename it, or set log.folder to another place\n"
    )


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.EACCES, "permission denied: make it writable, or set log.folder to a folder of yours"),
        (errno.EROFS, "the file system is read-only: set log.folder to another place"),
        (errno.ENOSPC, "the disk is full: free some space, or set log.folder to another disk"),
    ],
)
def test_a_run_folder_that_cannot_be_written(number, sentence, toy, capsys, monkeypatch):
    real = os.mkdir

    def refuse(path, *args, **kwargs):
        if str(path).startswith("runs"):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", refuse)
    assert say(capsys, "train", "toy.yaml") == f"error: runs/toy: cannot create the run folder: {sentence}\n"


def test_a_run_folder_that_another_process_uses(own_run, toy, capsys):
    from embodied_rl.runfolder import open_run

    other = open_run(own_run, resume=True)
    try:
        assert say(capsys, "train", "toy.yaml", "--resume").startswith(f"error: runs/toy: another process (pid {os.getpid()} on ")
    finally:
        other.release()


def test_a_method_that_compares_groups_without_groups(toy, capsys):
    assert say(capsys, "train", "toy.yaml", "algorithm.type=grpo", "policy.critic.kind=none") == (
        "error: algorithm.credit compares copies of one start (baseline group_mean, scale group_std) but collect.group_size is 1: "
        "set collect.group_size: 8 and collect.mode: episodes\n"
    )


def test_a_critic_that_the_policy_does_not_have(toy, capsys):
    assert say(capsys, "train", "toy.yaml", "policy.critic.kind=none") == (
        "error: algorithm.credit.returns gae needs a value head, and the policy has none: give the policy a critic, "
        "or use algorithm: grpo or reinforce\n"
    )


@pytest.mark.parametrize(
    ("env", "id", "message"),
    [
        ("gymnasium", "HalfCheeta-v5", "error: env gymnasium: 'HalfCheeta-v5' does not exist; did you mean 'HalfCheetah-v5'?\n"),
        ("envpool", "HalfCheeta-v4", "error: env envpool: 'HalfCheeta-v4' does not exist; did you mean 'HalfCheetah-v4'?\n"),
    ],
)
def test_an_id_that_the_source_does_not_know(env, id, message, toy, capsys):
    assert say(capsys, "train", "toy.yaml", f"env.type={env}", f"env.id={id}") == message


# ---- going on -------------------------------------------------------------------------------------------------------


def test_nothing_to_resume(toy, capsys):
    assert say(capsys, "train", "toy.yaml", "--resume") == "error: runs/toy: there is no run to resume; start it without --resume\n"


def test_resuming_with_other_settings(own_run, toy, capsys):
    assert say(capsys, "train", "toy.yaml", "--resume", "seed=1", "collect.copies=8") == (
        "error: runs/toy was started with other settings (collect.copies, seed), so it cannot be continued with these; "
        "resume it with its own recipe: embodied-rl train runs/toy --resume. Only train, evaluate, checkpoint, log "
        "and device may differ\n"
    )


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_run_that_does_not_exist(toy, capsys):
    assert say(capsys, "evaluate", "runs/nothing") == "error: runs/nothing: no such run or checkpoint\n"
    assert say(capsys, "report", "runs/nothing") == "error: runs/nothing: no such run folder\n"


def test_a_checkpoint_with_a_flipped_bit(own_run, capsys):
    path = newest(own_run)
    data = bytearray((path / "tensors.safetensors").read_bytes())
    data[-3] ^= 1
    (path / "tensors.safetensors").write_bytes(data)
    err = say(capsys, "evaluate", str(path))
    assert err.startswith(f"error: {path}: ")
    assert "checksum" in err
    assert f"use {sorted((own_run / 'checkpoints').glob('update_*'))[-2]}, which is intact" in err


def test_a_checkpoint_that_was_cut_short(own_run, capsys):
    path = newest(own_run)
    os.truncate(path / "tensors.safetensors", 100)
    assert say(capsys, "evaluate", str(path)).startswith(f"error: {path}: ")


def test_a_checkpoint_without_its_tree(own_run, capsys):
    path = newest(own_run)
    (path / "state.json").unlink()
    assert "state.json" in say(capsys, "evaluate", str(path))


def test_a_foreign_checkpoint(own_run, capsys):
    from safetensors.torch import save_file

    path = newest(own_run)
    save_file({"weight": torch.zeros(3)}, path / "tensors.safetensors")
    assert say(capsys, "evaluate", str(path)).startswith(f"error: {path}: ")


def test_a_pickle_is_no_checkpoint(own_run, toy, capsys):
    torch.save({"weight": torch.zeros(3)}, toy / "model.pt")
    assert say(capsys, "evaluate", "model.pt").startswith("error: model.pt: is a file; a checkpoint is a folder")


def test_a_checkpoint_of_another_policy_shape(own_run, capsys):
    recipe = (own_run / "recipe.yaml").read_text()
    assert "hidden: [8]" in recipe
    (own_run / "recipe.yaml").write_text(recipe.replace("hidden: [8]", "hidden: [9]"))
    err = say(capsys, "evaluate", str(own_run))
    assert f"checkpoint {newest(own_run)} holds another policy: " in err
    assert "[8, " in err and "the policy has [9, " in err
    assert err.endswith("Use the recipe it was trained with (recipe.yaml in its run folder)\n")


def test_two_runs_on_different_tasks_are_not_compared(own_run, toy, capsys):
    other = toy / "runs" / "other"
    shutil.copytree(own_run, other)
    recipe = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("max_steps: 10", "max_steps: 11"))
    err = say(capsys, "evaluate", "runs/toy", "runs/other")
    assert "env.max_steps" in err


def test_a_damaged_summary(own_run, capsys):
    (own_run / "summary.json").write_text("{")
    assert say(capsys, "report", str(own_run)).startswith(f"error: {own_run}/summary.json: ")


# ---- actions, for users of the library ------------------------------------------------------------------------------

SOURCES = {"tabletop": {}, "gymnasium": {"id": "Pendulum-v1"}, "envpool": {"id": "Pendulum-v1"}}


@pytest.fixture(scope="module", params=SOURCES)
def env(request):
    module = registry.load("env", request.param)
    env = module.build(module.Config(**SOURCES[request.param]), num_envs=3, device=torch.device("cpu"), split="train", seed=0)
    env.reset(torch.ones(3, dtype=torch.bool), torch.tensor([2, 4, 6]), torch.zeros(3, dtype=torch.int64))
    yield env
    env.close()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_action_that_is_not_finite_names_the_copies(env, bad):
    action = torch.zeros(3, *env.spec.action.shape)
    action[1, 0] = bad
    with pytest.raises(ShapeError, match=r"action: not finite in copies \[1\]"):
        env.step(action)


@pytest.mark.parametrize("change", ["one copy less", "one number more", "float64", "integers"])
def test_an_action_of_another_shape_or_type_is_told_with_both(env, change):
    action = torch.zeros(3, *env.spec.action.shape)
    action = {
        "one copy less": action[:2],
        "one number more": torch.cat([action, action[:, :1]], 1),
        "float64": action.double(),
        "integers": action.long(),
    }[change]
    size = env.spec.action.size
    with pytest.raises(ShapeError) as error:
        env.step(action)
    assert f"found shape {list(action.shape)}, {action.dtype} on cpu, expected [3, {size}], torch.float32 on cpu" in str(error.value)


def test_a_camera_that_does_not_exist():
    module = registry.load("env", "tabletop")
    env = module.build(module.Config(), num_envs=1, device=torch.device("cpu"), split="train", seed=0)
    try:
        with pytest.raises(NotFoundError, match="camera 'fornt' does not exist in the tabletop scene; did you mean 'front'"):
            env.render(torch.tensor([0]), "fornt", 8, 8)
    finally:
        env.close()


def test_numbers_that_diverge_stop_the_run_and_name_the_input(toy, capsys):
    source = Path(registry.load("env", str(Path(__file__).parents[1] / "toys" / "point.py")).__file__).read_text()
    (toy / "nan.py").write_text(source.replace("1 - distance)", "distance * float('nan'))").replace("else 1 - distance", "else distance * float('nan')"))
    err = say(capsys, "train", "toy.yaml", "env.type=nan.py", "train.env_steps=10000", "train.max_bad_updates=2")
    assert "2 optimizer steps in a row were not finite" in err
    assert "advantage" in err
    rows = [json.loads(line) for line in (toy / "runs/toy/metrics.jsonl").read_text().splitlines()]
    assert all("actor/skipped_updates" in row for row in rows)


def test_the_toy_env_is_the_one_that_other_tests_use():
    assert toy_env("point", 2).spec.action.size == 2
