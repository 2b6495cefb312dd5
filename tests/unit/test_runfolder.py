"""The run folder: nothing is overwritten, one process at a time, small files written in one step."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from embodied_rl import runfolder
from embodied_rl.errors import RunFolderError
from embodied_rl.runfolder import git_state, open_run, versions, write_json_atomic, write_text_atomic

CPU = torch.device("cpu")


def git(folder: Path, *args: str) -> None:
    subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *args], check=True, capture_output=True
    )


def test_a_new_run_writes_what_is_about_to_run(tmp_path):
    run = open_run(tmp_path / "runs" / "demo")
    run.write_start("name: demo\n", device=CPU)
    assert (run.path / "recipe.yaml").read_text() == "name: demo\n"
    found = json.loads((run.path / "versions.json").read_text())
    assert found["packages"]["torch"] == torch.__version__ and found["device"] == "cpu"
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert run.checkpoints.is_dir() and run.metrics.name == "metrics.jsonl" and run.videos.name == "videos"
    run.release()
    run.release()


def test_an_existing_run_is_never_overwritten(tmp_path):
    path = tmp_path / "demo"
    run = open_run(path)
    run.release()
    message = f"{path}: exists already{{}}; continue it with --resume, choose another name=..., or delete it"
    with pytest.raises(RunFolderError) as error:
        open_run(path)
    assert str(error.value) == message.format("")
    run.write_summary({"name": "demo", "finished": False, "updates": 120})  # type: ignore[typeddict-item]
    with pytest.raises(RunFolderError) as error:
        open_run(path)
    assert str(error.value) == message.format(" (stopped after update 120)")
    open_run(path, resume=True).release()


def test_an_empty_folder_may_be_used(tmp_path):
    open_run(tmp_path).release()


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(RunFolderError) as error:
        open_run(tmp_path / "demo", resume=True)
    assert str(error.value) == f"{tmp_path}/demo: there is no run to resume; start it without --resume"
    assert not (tmp_path / "demo").exists()


HOLD = "import sys, time; from pathlib import Path; from embodied_rl.runfolder import open_run; run = open_run(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_two_processes_cannot_train_into_one_folder_and_a_dead_one_leaves_no_lock(tmp_path):
    path = tmp_path / "demo"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError) as error:
            open_run(path, resume=True)
        host = os.uname().nodename
        assert str(error.value) == (
            f"{path}: another process (pid {other.pid} on {host}) is training into it; wait for it, stop it, or choose another name=..."
        )
    finally:
        other.kill()
        other.communicate()
    open_run(path, resume=True).release()


def test_a_released_run_can_be_taken_by_the_same_process(tmp_path):
    run = open_run(tmp_path / "demo")
    with pytest.raises(RunFolderError, match=f"another process \\(pid {os.getpid()} on "):
        open_run(tmp_path / "demo", resume=True)
    run.release()
    open_run(tmp_path / "demo", resume=True).release()


def test_a_path_through_a_file_is_refused(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunFolderError) as error:
        open_run(tmp_path / "runs" / "demo")
    assert str(error.value) == (
        f"{tmp_path}/runs/demo: cannot create the run folder: a part of this path is a file, not a folder: "
        "rename it, or set log.folder to another place"
    )


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full: free some space, or set log.folder to another disk"),
        (errno.EACCES, "permission denied: make it writable, or set log.folder to a folder of yours"),
        (errno.EROFS, "the file system is read-only: set log.folder to another place"),
        (errno.ENAMETOOLONG, "the name is too long: choose a shorter name=..."),
        (errno.EIO, "Input/output error: set log.folder to another place"),
    ],
)
def test_each_refusal_of_the_system_becomes_a_sentence(number, reason, tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunFolderError) as error:
        open_run(tmp_path / "demo")
    assert str(error.value) == f"{tmp_path}/demo: cannot create the run folder: {reason}"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_file_is_replaced_whole_or_not_at_all(step, tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_text_atomic(path, "old")

    def refuse(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, refuse)
        with pytest.raises(RunFolderError, match="summary.json: cannot write it: the disk is full"):
            write_text_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    write_text_atomic(path, "new")
    assert path.read_text() == "new"


def test_a_summary_without_numbers_json_lacks(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"x": 1.5, "y": None})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1.5, "y": None}
    with pytest.raises(ValueError, match="Out of range float values"):
        write_json_atomic(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text())["x"] == 1.5


def test_git_state_has_commit_diff_and_untracked_files(tmp_path):
    git(tmp_path, "init", "-b", "main")
    (tmp_path / "a.py").write_text("one\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-m", "first")
    (tmp_path / "inside").mkdir()
    state, diff = git_state(tmp_path / "inside")
    assert state is not None and len(state["commit"]) == 40
    assert (state["branch"], state["dirty"], state["untracked"], diff) == ("main", False, [], "")
    (tmp_path / "a.py").write_text("two\n")
    (tmp_path / "b.py").write_text("new\n")
    state, diff = git_state(tmp_path)
    assert state is not None and state["dirty"] and state["untracked"] == ["b.py"]
    assert "-one\n+two\n" in diff


def test_a_huge_diff_is_cut(tmp_path, monkeypatch):
    git(tmp_path, "init")
    (tmp_path / "a").write_text("x\n" * 500)
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "first")
    (tmp_path / "a").write_text("y\n" * 500)
    monkeypatch.setattr(runfolder, "LONGEST_DIFF", 100)
    assert git_state(tmp_path)[1].endswith("characters]\n") and len(git_state(tmp_path)[1]) < 200


def test_outside_a_repository_or_without_git_there_is_no_git_state(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == (None, "")
    git(tmp_path, "init")
    assert git_state(tmp_path) == (None, ""), "a repository without a commit"
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == (None, "")


def test_versions_name_the_packages_that_matter():
    assert {"torch", "numpy", "mujoco", "mujoco-warp", "gymnasium"} <= versions(CPU)["packages"].keys()
    assert versions(CPU)["cpus"] == os.cpu_count() and versions(CPU)["device_name"]
