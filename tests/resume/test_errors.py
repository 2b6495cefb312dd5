"""An error ends a run with its message, a summary and a report, and the run goes on once the cause is mended."""

import json

import pytest

from embodied_rl.cli import main
from embodied_rl.errors import RunFolderError, SimulatorError
from embodied_rl.runfolder import RunFolder
from embodied_rl.session import Session
from tests.resume import lab

BREAKS = '''
"""A filmed point that breaks while a file beside it says where: "train 25", "eval 3" (control steps) or "film"."""
from pathlib import Path
from embodied_rl import registry
from embodied_rl.errors import CapabilityError
filmed = registry.load("env", r"{filmed}")
class Config(filmed.Config):
    """Settings."""
class Breaks(filmed.Filmed):
    steps = 0
    def at(self, place):
        file = Path(__file__).with_name("trouble")
        if file.exists() and file.read_text() == place:
            raise {kind}("too many contacts; allow more")
    def step(self, action, active=None):
        self.steps += 1
        self.at(f"{{self.split}} {{self.steps}}")
        return super().step(action, active)
    def render(self, *asked):
        self.at("film")
        return super().render(*asked)
def build(config, *, num_envs, device, split, seed):
    env = Breaks(config, num_envs, device)
    env.split = split
    return env
'''
UPDATES = 3
PRETRAINED = str(lab.TOYS / "pretrained.py")


def broken(folder, place, kind="CapabilityError", policy="mlp"):
    """The recipe of a run that breaks at this place until `folder/trouble` is gone."""
    (folder / "breaks.py").write_text(BREAKS.format(filmed=lab.TOYS / "filmed.py", kind=kind))
    (folder / "trouble").write_text(place)
    env = {"type": str(folder / "breaks.py"), "max_steps": 7}
    return lab.write(lab.recipe(updates=UPDATES, env=env, policy={"type": policy}, evaluate={"videos": 1}), folder)


def summary_of(folder):
    return json.loads((folder / "run" / "summary.json").read_text())


@pytest.mark.parametrize(
    ("place", "policy", "updates", "known"),
    [
        ("train 25", "mlp", 2, []),
        ("eval 3", "mlp", UPDATES, []),
        ("film", "mlp", UPDATES, ["heldout"]),
        ("eval 3", PRETRAINED, 0, []),  # while the start is evaluated
    ],
)  # fmt: skip
def test_an_error_leaves_a_summary_and_a_report_of_a_run_that_goes_on(place, policy, updates, known, tmp_path, capsys):
    recipe = broken(tmp_path, place, policy=policy)
    assert main(["train", str(recipe)]) == 2
    err = capsys.readouterr().err
    assert err.endswith("error: too many contacts; allow more\n") and err.count("error:") == 1
    told = summary_of(tmp_path)
    assert (told["finished"], told["stop_reason"], told["error"]) == (False, "error", "too many contacts; allow more")
    assert (told["updates"], list(told["evaluation"])) == (updates, known)
    page = (tmp_path / "run" / "report.html").read_text()
    resume = f"go on after update {updates} with --resume" if updates else "nothing was saved yet, so --resume begins anew"
    assert f"Stopped by an error; {resume} once it is mended: too many contacts; allow more" in page
    (tmp_path / "trouble").unlink()
    assert main(["train", str(recipe), "--resume"]) == 0
    told = summary_of(tmp_path)
    assert (told["finished"], told["stop_reason"], told["updates"]) == (True, "finished", UPDATES) and "error" not in told
    assert told["evaluation"]["heldout"]["overall"]["episodes"] == 6


def test_a_defect_keeps_its_traceback_and_the_run_its_summary(tmp_path):
    recipe = broken(tmp_path, "train 15", kind="RuntimeError")
    with pytest.raises(RuntimeError, match="too many contacts"):
        main(["train", str(recipe)])
    told = summary_of(tmp_path)
    assert (told["stop_reason"], told["updates"]) == ("error", 1)
    assert told["error"] == "RuntimeError: too many contacts; allow more"


def test_what_cannot_be_written_does_not_hide_the_error(tmp_path, capsys, monkeypatch):
    def full(self, summary):
        raise RunFolderError("the disk is full")

    monkeypatch.setattr(RunFolder, "write_summary", full)
    assert main(["train", str(broken(tmp_path, "train 15"))]) == 2
    assert capsys.readouterr().err.endswith("error: too many contacts; allow more\n")


@pytest.fixture
def clock(monkeypatch):
    """A clock of the training loop by which every update takes 100 s, and an update that the simulator fails in."""
    state, iterate = {"now": 0.0, "fails at": None}, Session.iterate

    def iterate_slowly(self, clock):
        state["now"] += 100
        if self.update + 1 == state["fails at"]:
            self.collector.collect()
            raise SimulatorError("its simulator is gone")
        return iterate(self, clock)

    monkeypatch.setattr(Session, "iterate", iterate_slowly)
    monkeypatch.setattr("embodied_rl.train.perf_counter", lambda: state["now"])
    return state


def saved(folder):
    return sorted(int(p.name.removeprefix("update_")) for p in (folder / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("settings", "updates"),
    [
        ({"every": 1000, "every_seconds": 250}, [3, 6, 9, 12, 13]),
        ({"every": 1000, "every_seconds": None}, [13]),
        ({"every": 5, "every_seconds": 250}, [3, 5, 8, 10, 13]),
    ],
)
def test_a_checkpoint_is_due_after_so_many_updates_or_seconds(settings, updates, clock, tmp_path):
    lab.go(lab.recipe("chunks", checkpoint={"keep": 9} | settings), tmp_path / "run")
    assert saved(tmp_path) == updates


def test_a_run_whose_simulator_fails_goes_on_bit_for_bit_from_a_checkpoint_that_time_made(clock, whole, tmp_path):
    wanted, (rows, state) = lab.recipe("chunks", checkpoint={"every": 1000, "keep": 9}), whole("chunks")
    clock["fails at"] = 6
    with pytest.raises(SimulatorError):
        lab.go(wanted, tmp_path / "run")
    assert saved(tmp_path) == [3], "300 s, if nothing else is said"
    clock["fails at"] = None
    rest, end = lab.go(wanted, tmp_path / "run", resume=True)
    assert rest == rows[3:] and lab.differing(end, state) == []
    assert saved(tmp_path) == [3, 6, 9, 12, 13]
