"""What goes wrong with simulators in a Python of their own: one clear sentence each."""

import hashlib
import json
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from embodied_rl import registry, sims
from embodied_rl.cli import main
from embodied_rl.config import load_component
from embodied_rl.envs.isolated import workers
from embodied_rl.errors import ConfigError, NotFoundError, SimulatorError
from tests.kit import CPU, TOYS

POINT = TOYS / "foreign" / "point.py"
ISOLATED = registry.load("env", "isolated")
LIBERO = registry.load("env", "libero")
LIBERO_ASSETS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "textures", "turbosquid_objects")


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    """What lost workers print is kept, here."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def build(num_envs=1, trouble=None, **config):
    config = {"simulator": str(POINT), "workers": num_envs, "settings": {"trouble": trouble or {}}} | config
    env = ISOLATED.build(ISOLATED.Config(**config), num_envs=num_envs, device=CPU, split="train", seed=0)
    env.close()


def refused(**given):
    with pytest.raises((SimulatorError, NotFoundError)) as caught:
        build(**given)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- simulators that do not start ---------------------------------------------------------------------------------


def test_a_simulator_may_refuse_with_a_sentence_of_its_own():
    assert refused(trouble={"refuse": "buy a licence first"}) == "env isolated: 'point.py': buy a licence first"


def test_a_simulator_that_raises_is_quoted_with_its_output():
    assert "env isolated: 'point.py' does not start: RuntimeError: no licence; its output is in /" in refused(trouble={"crash": 1})


def test_one_that_is_never_ready_is_given_up():
    assert "does not start: its worker gave no sign for 2 s" in refused(trouble={"slow": 60}, start_seconds=2.0)


def test_copies_that_differ_are_refused():
    assert "the simulator of copy 1 has another spec (max_steps) than that of copy 0" in refused(num_envs=2, trouble={"uneven": 1})


def test_a_file_without_a_simulator_is_told(tmp_path):
    file = tmp_path / "empty.py"
    file.write_text("import numpy\n")
    assert "'empty.py' does not start: AttributeError: module 'simulator' has no attribute 'Simulator'" in refused(simulator=str(file))


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ('{"action": {"kind": "discrete", "size": 2}}', "needs observation and action"),
        ('{"observation": {"x": {"shape": [1]}}, "action": {"kind": "discrete", "size": 2}, "color": 1}', "unknown: ['color']"),
        ('{"observation": {"x": {"shape": [1]}}, "action": {"kind": "discrete", "size": 2}, "words": 3}', "no method instruction()"),
        ('{"observation": {"x": {"shape": [1]}}, "action": {"kind": "discrete", "size": 2}, "sentences": ["go"]}', "sentences that nobody reads"),
    ],
)
def test_a_spec_that_says_too_little_or_too_much_is_told(tmp_path, spec, complaint):
    file = tmp_path / "odd.py"
    file.write_text(f"class Simulator:\n    spec = {spec}\n    def __init__(self, settings): pass\n")
    assert complaint in refused(simulator=str(file))


def test_an_action_that_means_what_cannot_be_is_told(tmp_path):
    file = tmp_path / "odd.py"
    for convention, complaint in (
        ({"gripper": "opens"}, "'odd.py': its action's convention is wrong: gripper: Input should be 'none', "),
        ({"control": "ee_delta", "rotation": "none", "gripper": "none"}, "takes 3 numbers (3 of position), and the action has 2"),
    ):
        action = {"kind": "continuous", "size": 2, "convention": convention}
        spec = {"observation": {"x": {"shape": [1]}}, "action": action}
        file.write_text(f"class Simulator:\n    spec = {spec}\n    def __init__(self, settings): pass\n")
        with pytest.raises(ConfigError) as error:
            refused(simulator=str(file))
        assert complaint in str(error.value)


def test_a_python_without_numpy_is_told(tmp_path):
    subprocess.run(["python3", "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    message = refused(python=str(tmp_path / "bare" / "bin" / "python"))
    assert "ended with exit code 1" in message and "No module named 'numpy'" in message


def test_a_python_that_is_no_python_is_told(tmp_path):
    file = tmp_path / "python"
    file.write_text("not a program")
    file.chmod(0o755)
    assert "cannot be run (Exec format error)" in refused(python=str(file))
    assert refused(python="/no/such/python") == (
        "env isolated: 'point.py': env.python '/no/such/python': no such file; give the path of a Python"
    )


def test_a_missing_simulator_file_is_told(tmp_path):
    assert refused(simulator=str(tmp_path / "none.py")).endswith(f"env.simulator '{tmp_path}/none.py': no such file")


def test_two_pythons_are_one_too_many():
    with pytest.raises(ConfigError, match="python .x. and sim .y. name two Pythons: remove one of them"):
        load_component("env", "isolated", ["simulator=a.py", "python=x", "sim=y"])


def test_a_worker_of_another_version_is_refused(tmp_path, monkeypatch):
    other = tmp_path / "worker.py"
    other.write_text(workers.WORKER.read_text().replace(f"PROTOCOL = {workers.PROTOCOL}", "PROTOCOL = 0"))
    monkeypatch.setattr(workers, "WORKER", other)
    assert f"speaks protocol 0, this engine speaks {workers.PROTOCOL}: install both from one version of embodied_rl" in refused()


FALLS_OFF = """
class Simulator:
    spec = {"observation": {"x": {"shape": [1]}}, "action": {"kind": "discrete", "size": 2}, "max_steps": 5}
    def __init__(self, settings): self.steps = settings["steps"]
    def reset(self, seed, task): return {"x": [0.0]}
    def step(self, action):
        with open(self.steps, "a+") as file:
            file.write("x")
            if file.tell() > 50: raise ValueError("the arm fell off")
        return {"x": [1.0]}, 1.0, False, False, {}
"""


@pytest.mark.parametrize("every", [1, 2, 9])
def test_a_run_whose_simulator_fails_again_and_again_is_told_and_not_lost(every, tmp_path, capsys):
    (tmp_path / "falls.py").write_text(FALLS_OFF)
    steps, recipe, run = tmp_path / "steps", tmp_path / "run.yaml", tmp_path / "runs" / "falls"
    recipe.write_text(
        f"name: falls\nenv: {{type: isolated, simulator: {tmp_path}/falls.py, settings: {{steps: {steps}}}, workers: 1}}\n"
        "policy: {type: mlp, hidden: [8]}\nalgorithm: {type: ppo, update: {epochs: 1, minibatches: 1}}\n"
        "collect: {copies: 2, decisions: 10}\ntrain: {env_steps: 80}\nevaluate: {episodes: 0}\n"
        f"checkpoint: {{every: {every}, every_seconds: null}}\n"
        f"log: {{tensorboard: false, progress: false, folder: {run.parent}}}\n"
    )
    assert main(["train", str(recipe)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "11 workers were lost without one finished episode" in error and "ValueError: the arm fell off" in error
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["stop_reason"], summary["updates"], summary["finished"]) == ("simulator", 3, False), "the third lost a part of its episodes"
    assert summary["saved_update"] == 3, "whether a checkpoint was due or not"
    assert "Stopped: its simulator failed again and again; go on after update 3 with --resume" in (run / "report.html").read_text()


# ---- environments of simulators -------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBODIED_RL_SIMS", str(tmp_path / "sims"))
    return tmp_path


def write_lock(folder, version="1.0", digest=None):
    """A lock file of one package, and the package beside it."""
    wheel = folder / "tinysim-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        about = "tinysim-1.0.dist-info"
        file.writestr("tinysim.py", "ANSWER = 42\n")
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tinysim\nVersion: 1.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", f"tinysim.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n")
    digest = digest or hashlib.sha256(wheel.read_bytes()).hexdigest()
    lock = folder / "mine.txt"
    lock.write_text(f"--no-index\n--find-links {folder}\ntinysim=={version} --hash=sha256:{digest}\n")
    return lock


@pytest.mark.parametrize("tool", ["uv", "pip"])
def test_an_environment_is_made_used_checked_and_removed(home, monkeypatch, tool, capsys):
    if tool == "uv" and shutil.which("uv") is None:
        pytest.skip("uv is not installed")
    if tool == "pip":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    lock = write_lock(home)
    assert main(["sim", "install", str(lock)]) == 0
    python = sims.interpreter("mine")
    assert subprocess.run([python, "-c", "import tinysim; print(tinysim.ANSWER)"], capture_output=True, text=True).stdout == "42\n"
    assert sims.pins("mine") == {"tinysim": "1.0"} and sims.find(str(lock)).state == "ready"
    assert f"ready: {python}" in capsys.readouterr().out

    (about,) = python.parent.parent.glob("lib/python*/site-packages/tinysim-1.0.dist-info")
    site = about.parent
    for part in Path(np.__file__).parents[1].glob("numpy*"):
        (site / part.name).symlink_to(part)
    build(sim="mine")
    about.rename(site / "tinysim-1.1.dist-info")
    (site / "tinysim-1.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tinysim\nVersion: 1.1\n")
    assert f"{python} has tinysim 1.1 instead of 1.0: run `embodied-rl sim install mine`" in refused(sim="mine")

    lock.write_text(lock.read_text() + "# changed\n")
    assert sims.find(str(lock)).state == "outdated"
    assert main(["sim", "remove", "mine"]) == 0 and not python.exists()


def test_a_lock_that_no_longer_resolves_is_told_and_leaves_nothing(home):
    lock = write_lock(home, version="2.0")
    with pytest.raises(SimulatorError, match=r"^sim 'mine': its lock file .*mine.txt no longer resolves \(.*tinysim.*\)$"):
        sims.install(str(lock))
    assert not (home / "sims" / "mine").exists()


@pytest.mark.parametrize(("content", "what"), [(b"", "empty"), (b"\x80\x81", "no text")])
def test_a_file_that_is_no_lock_is_told_before_anything_is_made(home, content, what):
    lock = home / "mine.txt"
    lock.write_bytes(content)
    with pytest.raises(SimulatorError, match=f"^sim 'mine': {lock} is {what}, expected a lock file: a line name==version"):
        sims.install(str(lock))
    assert not (home / "sims" / "mine").exists()


def test_a_package_of_another_content_is_refused(home):
    with pytest.raises(SimulatorError, match="no longer resolves .*[Hh]ash"):
        sims.install(str(write_lock(home, digest="0" * 64)))


def test_a_lock_for_a_python_that_is_not_here_is_told(home, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    lock = write_lock(home)
    lock.write_text("# python 3.7\n" + lock.read_text())
    with pytest.raises(SimulatorError, match="sim 'mine' needs Python 3.7, and this is .*: install python3.7, or uv"):
        sims.install(str(lock))


def test_a_simulator_that_is_not_installed_says_how(home):
    message = refused(sim="libero")
    assert message == (
        f"sim 'libero' runs in an environment of its own, and {home}/sims/libero is not there: run `embodied-rl sim install "
        "libero` (EMBODIED_RL_SIMS names another folder for it)"
    )
    (home / "sims" / "libero").mkdir(parents=True)
    assert "was not finished: run `embodied-rl sim install libero`" in refused(sim="libero")


def test_the_command_line_names_the_nearest_simulator(home, capsys):
    assert main(["sim", "install", "libbero"]) == 2
    assert capsys.readouterr().err == "error: sim 'libbero' does not exist; did you mean 'libero'?\n"
    assert main(["sim", "install"]) == 2
    assert "needs the name of a simulator; known: libero" in capsys.readouterr().err
    assert main(["sim", "list"]) == 0
    assert "absent" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["..", ".", "a/../..", "runs"])
def test_remove_deletes_nothing_that_install_did_not_make(home, name):
    (home / "sims" / "runs").mkdir(parents=True)
    (home / "precious").write_text("x")
    assert sims.remove(name) is False
    assert (home / "precious").exists() and (home / "sims" / "runs").is_dir()


# ---- LIBERO, before anything of it is needed -------------------------------------------------------------------------


def libero(**config):
    with pytest.raises((NotFoundError, SimulatorError)) as caught:
        LIBERO.build(LIBERO.Config(**config), num_envs=1, device=CPU, split="train", seed=0)
    return str(caught.value)


def test_missing_assets_say_what_to_download_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.delenv("LIBERO_ASSETS", raising=False)
    message = libero()
    assert "needs the assets of LIBERO" in message and "download" in message and "env.assets" in message and "LIBERO_ASSETS" in message
    assert f"'{tmp_path}/none' are not there: download" in libero(assets=str(tmp_path / "none"))
    (tmp_path / "scenes").mkdir()
    assert "lack articulated_objects, stable_hope_objects" in libero(assets=str(tmp_path))


def test_assets_are_found_by_the_environment_and_the_recipe_comes_first(home, monkeypatch):
    for name in LIBERO_ASSETS:
        (home / "assets" / name).mkdir(parents=True)
    monkeypatch.setenv("LIBERO_ASSETS", str(home / "assets"))
    assert "run `embodied-rl sim install libero`" in libero()
    assert "'/no/assets' are not there" in libero(assets="/no/assets")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("protocol=openvla_oft", "protocol 'openvla_oft' does not exist; did you mean 'openvla-oft'?"),
        ("max_steps=300", "max_steps (300) is not sooner than the limit of protocol 'openvla-oft' (220): remove it"),
        ("change.jpge=true", "did you mean"),
        ("change.cameras=[front]", "agentview"),
    ],
)
def test_settings_of_libero_that_cannot_act_are_refused(override, complaint):
    with pytest.raises(ConfigError) as caught:
        load_component("env", "libero", [override])
    assert complaint in str(caught.value)
