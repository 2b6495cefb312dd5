"""An error ends a run with its message, a summary and a report, and the run goes on once the cause is mended."""

import json

import pytest

from embodied_rl.cli import main
from embodied_rl.errors import RunFolderError
from embodied_rl.runfolder import RunFolder
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
    assert "Stopped by an error; go on with --resume once it is mended: too many contacts; allow more" in page
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
