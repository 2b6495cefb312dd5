"""Mistakes that show only when a run starts, goes on or is looked at: what is said, and exit code 2."""

import errno
import json
import os
import platform
import re
import shutil
from pathlib import Path

import pytest
import torch

from embodied_rl import registry
from embodied_rl.cli import main
from embodied_rl.errors import NotFoundError, ShapeError


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
        assert say(capsys, "train", "toy.yaml", "--resume") == (
            f"error: runs/toy: another process (pid {os.getpid()} on {platform.node()}) is training into it; wait for it, "
            "stop it, or choose another name=...\n"
        )
    finally:
        other.release()


def test_a_method_that_compares_groups_without_groups(toy, capsys):
    assert say(capsys, "train", "toy.yaml", "algorithm.type=grpo", "policy.critic.kind=none") == (
        "error: algorithm.credit compares copies of one start (baseline group_mean, scale group_std) but collect.group_size is 1: "
        "set collect.group_size: 8 and collect.mode: episodes\n"
    )


def test_groups_that_credit_does_not_compare_cannot_be_sampled(toy, capsys):
    groups = ("collect.mode=episodes", "collect.group_size=2", "collect.dynamic_sampling=drop")
    assert say(capsys, "train", "toy.yaml", *groups) == (
        "error: collect.dynamic_sampling drop takes out groups whose returns are all equal, but with algorithm.credit.baseline "
        "critic they carry a signal: set algorithm.credit.baseline: group_mean (with returns: trajectory), or "
        "collect.dynamic_sampling: none\n"
    )


def test_success_that_the_env_does_not_tell_cannot_be_masked(toy, capsys):
    gym = ("env.type=gymnasium", "env.id=CartPole-v1", "algorithm.credit.mask_after_success=true")
    assert say(capsys, "train", "toy.yaml", *gym) == (
        "error: algorithm.credit.mask_after_success masks what follows success, and the env does not tell success: remove it\n"
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


LAST = Path("runs/toy/checkpoints/update_000003")
INTACT = "use runs/toy/checkpoints/update_000002, which is intact"


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "tensors.safetensors").read_bytes())
    data[-3] ^= 1
    (path / "tensors.safetensors").write_bytes(data)


def edit_the_tree(path: Path) -> None:
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"env_steps": 120', '"env_steps": 121'))


DAMAGES = {
    "flipped bit": (flip_a_bit, f"{LAST}: is damaged: the checksum of tensors.safetensors is wrong; {INTACT}"),
    "cut short": (
        lambda path: os.truncate(path / "tensors.safetensors", 100),
        f"{LAST}: is damaged: tensors.safetensors has 100 bytes instead of {{size}}; {INTACT}",
    ),
    "no tree": (
        lambda path: (path / "state.json").unlink(),
        f"{LAST}: is not a whole checkpoint: state.json missing, found tensors.safetensors; {INTACT}",
    ),
    "edited by hand": (edit_the_tree, f"{LAST}: is damaged: the checksum of state.json is wrong; {INTACT}"),
    "another program's": (
        lambda path: (path / "state.json").write_text('{"format": "pt"}'),
        f"{LAST}: is foreign: state.json was not written by embodied_rl; {INTACT}",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_checkpoint_names_the_damage_and_an_intact_one(damage, own_run, capsys):
    change, message = DAMAGES[damage]
    size = (LAST / "tensors.safetensors").stat().st_size
    change(LAST)
    assert say(capsys, "evaluate", str(LAST)) == f"error: {message.format(size=size)}\n"


def test_a_pickle_is_no_checkpoint(own_run, capsys):
    torch.save({"weight": torch.zeros(3)}, own_run / "model.pt")
    assert say(capsys, "evaluate", "runs/toy/model.pt") == (
        "error: runs/toy/model.pt: is a file; a checkpoint is a folder that holds state.json and tensors.safetensors\n"
    )


def test_a_checkpoint_of_another_policy_shape(own_run, capsys):
    recipe = (own_run / "recipe.yaml").read_text()
    assert "hidden: [8]" in recipe
    (own_run / "recipe.yaml").write_text(recipe.replace("hidden: [8]", "hidden: [9]"))
    err = say(capsys, "evaluate", "runs/toy")
    assert err.startswith(f"error: checkpoint {LAST} holds another policy: ")
    assert re.search(r"[\w.]+ is \[8, \d+\], the policy has \[9, \d+\]; ", err)
    assert err.endswith("Use the recipe it was trained with (recipe.yaml in its run folder)\n")


def test_a_checkpoint_outside_a_run_folder(own_run, toy, capsys):
    shutil.copytree(LAST, toy / "alone")
    assert say(capsys, "evaluate", "alone") == (
        "error: checkpoint alone lies outside a run folder: no recipe.yaml above it; put it into its run\n"
    )


def test_a_damaged_summary(own_run, capsys):
    (own_run / "summary.json").write_text("{")
    assert say(capsys, "report", "runs/toy") == (
        "error: runs/toy/summary.json: is damaged (Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1)); delete it and run `embodied-rl report` again\n"
    )


def test_a_folder_that_is_no_run(toy, capsys):
    (toy / "empty").mkdir()
    assert say(capsys, "report", "empty") == (
        "error: empty: is not a run folder (it has neither recipe.yaml nor metrics.jsonl)\n"
    )
    assert say(capsys, "evaluate", "empty") == (
        "error: empty: holds no checkpoint (expected empty/checkpoints/update_... or empty/state.json)\n"
    )


# ---- stored evaluations ---------------------------------------------------------------------------------------------


def test_a_greedy_evaluation_beside_a_sampled_one(own_run, toy, capsys):
    assert main(["evaluate", "runs/toy", "--sampled", "--out", "sampled.json"]) == 0
    names = ("runs/toy/evaluation.json", "sampled.json")
    unlike = f"A = {names[0]} and B = {names[1]} were not played alike: A greedy and B sampled"
    assert say(capsys, "evaluate", *names) == (
        f"error: {unlike}. Evaluate both again in one way (greedy or sampled), or compare them with --compare-anyway\n"
    )
    assert main(["evaluate", *names, "--compare-anyway"]) == 0
    assert f"note: {unlike}\n" in capsys.readouterr().out
    assert main(["evaluate", names[1], names[1]]) == 0
    assert "note:" not in capsys.readouterr().out


def test_a_stored_evaluation_that_does_not_say_how_was_played(own_run, toy, capsys):
    file = own_run / "evaluation.json"
    document = json.loads(file.read_text())
    document["manifest"]["policy"] = {"greedy": "yes", "chunk": 1}
    file.write_text(json.dumps(document))
    assert say(capsys, "evaluate", "runs/toy/evaluation.json") == (
        "error: runs/toy/evaluation.json: is not an evaluation that this version can read (the 'policy' of its manifest lacks "
        "'greedy' (true or false) or 'chunk' (control steps)); make it again\n"
    )


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
        with pytest.raises(NotFoundError, match="tabletop: camera 'fornt' does not exist; did you mean 'front'"):
            env.render(torch.tensor([0]), "fornt", 8, 8)
    finally:
        env.close()


@pytest.mark.parametrize("number", ["nan", "1e30"])
def test_numbers_that_diverge_stop_the_run_and_name_the_cause(number, toy, capsys):
    source = Path(registry.load("env", str(Path(__file__).parents[1] / "toys" / "point.py")).__file__).read_text()
    bad = f"distance * float('{number}')"
    (toy / "bad.py").write_text(source.replace("1 - distance)", f"{bad})").replace("else 1 - distance", f"else {bad}"))
    err = say(capsys, "train", "toy.yaml", "env.type=bad.py", "train.env_steps=10000", "train.max_bad_updates=2")
    if number == "nan":
        assert err == (
            "error: the env's judge or simulator failed in every episode of the last 2 updates, so there was nothing to "
            "learn from; mend it (the warnings above say what failed)\n"
        )
    else:
        assert err.startswith("error: not one optimizer step of the last 2 updates was finite (loss ")
        assert err.endswith("). The weights were left as they were; lower algorithm.update.lr, or look at the env if an input is named\n")
    rows = [json.loads(line) for line in (toy / "runs/toy/metrics.jsonl").read_text().splitlines()]
    assert all(("actor/skipped_updates" if number == "1e30" else "rollout/invalid_episodes") in row for row in rows)
