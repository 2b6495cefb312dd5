"""An error ends a run with its message, a summary and a report, and the run goes on once the cause is mended."""

import json

import pytest

from embodied_rl import checkpoint
from embodied_rl.cli import main
from embodied_rl.errors import RunFolderError, SimulatorError
from embodied_rl.runfolder import RunFolder
from embodied_rl.session import Session
from embodied_rl.suites import Suite
from embodied_rl.update import Updater
from tests.resume import lab

BREAKS = '''
"""A filmed point that breaks while a file beside it says where: "train 25", "eval 3" (control steps) or "film"."""
from pathlib import Path
from embodied_rl import registry
from embodied_rl.errors import CapabilityError, SimulatorError
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


def test_a_run_whose_simulator_fails_has_saved_by_time_and_saves_what_it_had_learned_since(clock, whole, tmp_path):
    wanted, (rows, _) = lab.recipe("chunks", checkpoint={"every": 1000, "keep": 9}), whole("chunks")
    clock["fails at"] = 6
    with pytest.raises(SimulatorError):
        lab.go(wanted, tmp_path / "run")
    assert saved(tmp_path) == [3, 5], "after 300 s, if nothing else is said, and before it stopped"
    assert lab.rows_of(tmp_path / "run") == rows[:5]
    clock["fails at"] = None
    rest, _ = lab.go(wanted, tmp_path / "run", resume=True)
    assert [row["progress/update"] for row in rest] == list(range(6, 14))
    assert rest[0] != rows[5], "its episodes begin anew: the same ones might fail again"


@pytest.mark.parametrize("mode", ["stream", "episodes"])
@pytest.mark.parametrize("kind", ["SimulatorError", "RuntimeError"])
def test_whatever_a_simulator_fails_of_no_finished_update_is_lost(kind, mode, tmp_path):
    """Three updates of ten control steps were made; the third fails halfway, with episodes that were on their way."""
    broken(tmp_path, "train 25" if mode == "stream" else "train 17", kind=kind)
    wanted = lab.recipe(
        updates=6, env={"type": str(tmp_path / "breaks.py"), "max_steps": 7}, policy={"type": "mlp"},
        checkpoint={"every": 1000}, collect={"mode": mode}, evaluate={"episodes": 0},
    )
    with pytest.raises((SimulatorError, RuntimeError), match="too many contacts"):
        lab.go(wanted, tmp_path / "run")
    assert saved(tmp_path) == [2]
    before = checkpoint.load(tmp_path / "run" / "checkpoints" / "update_000002")
    assert before["collector"]["begun"] is False and before["collector"]["envs"] is None
    assert not before["collector"]["episode_length"].any(), "no half episode is added to the first one that begins"
    (tmp_path / "trouble").unlink()
    rows, end = lab.go(wanted, tmp_path / "run", resume=True)
    assert [row["progress/update"] for row in rows] == list(range(3, end["updater"]["version"] + 1))
    assert rows[-1]["progress/env_steps"] >= 6 * 80
    assert all(row["rollout/length_mean"] == 7 for row in rows if "rollout/length_mean" in row)
    assert lab.differing(before["policy"], end["policy"]) != []


def test_an_error_in_the_middle_of_an_update_saves_nothing_of_it(tmp_path, monkeypatch):
    update = Updater.update

    def fail(self, *args, **kwargs):
        if self.version == 2:
            raise RuntimeError("half of the weights have moved")
        return update(self, *args, **kwargs)

    monkeypatch.setattr(Updater, "update", fail)
    with pytest.raises(RuntimeError, match="half of the weights"):
        lab.go(lab.recipe(updates=6, checkpoint={"every": 1000}), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("update_*"))


def test_an_evaluation_that_fails_costs_no_update(tmp_path, monkeypatch):
    """Its row of metrics is lost, since that would hold the evaluation."""
    wanted = lab.recipe(updates=6, checkpoint={"every": 1000}, evaluate={"every": 3})
    with monkeypatch.context() as patched, pytest.raises(SimulatorError):
        patched.setattr(Suite, "run", lambda *args, **kwargs: (_ for _ in ()).throw(SimulatorError("gone")))
        lab.go(wanted, tmp_path / "run")
    assert saved(tmp_path) == [3]
    rows, _ = lab.go(wanted, tmp_path / "run", resume=True)
    assert [row["progress/update"] for row in lab.rows_of(tmp_path / "run")] == [1, 2, 4, 5, 6]
    assert rows[-1]["eval/heldout/episodes"] == 6
