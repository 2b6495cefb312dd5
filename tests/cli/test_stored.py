"""Where `embodied-rl evaluate` keeps what it has measured."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from embodied_rl.cli import main
from embodied_rl.errors import CapabilityError, RunFolderError
from embodied_rl.results import EvaluationResult
from embodied_rl.stored import check_out, store
from tests.kit import unwrapped


def stored_by(capsys):
    out = capsys.readouterr().out
    return [Path(line.removeprefix("stored: ")) for line in out.splitlines() if line.startswith("stored: ")]


def test_what_evaluate_measures_is_stored_with_its_manifest_and_can_be_compared(own_run, capsys):
    first = own_run / "checkpoints" / "update_000002"
    for target in (own_run, own_run, first):
        assert main(["evaluate", str(target), "--episodes", "6", "--copies", "3"]) == 0
    files = stored_by(capsys)
    assert [file.name for file in files] == ["update_000003.json", "update_000003-2.json", "update_000002.json"]
    assert {file.parent for file in files} == {own_run / "evaluations"}
    kept = [json.loads(file.read_text()) for file in files]
    assert kept[0] == kept[1] and len(kept[0]["episodes"]) == 6 and kept[0]["manifest"]["frames"].keys() == {"first", "second"}
    assert main(["evaluate", str(files[0]), str(files[2])]) == 0
    assert "on the same starts" in unwrapped(capsys.readouterr().out)


def test_out_names_the_file_and_two_runs_are_stored_in_their_own_folders(own_run, tmp_path, capsys):
    out = tmp_path / "mine.json"
    assert main(["evaluate", str(own_run), "--episodes", "4", "--sampled", "--out", str(out)]) == 0
    assert stored_by(capsys) == [out] and not json.loads(out.read_text())["greedy"]
    assert not (own_run / "evaluations").exists()
    other = Path(shutil.copytree(own_run, tmp_path / "other"))
    assert main(["evaluate", str(own_run), str(other), "--episodes", "4"]) == 0
    assert stored_by(capsys) == [run / "evaluations" / "update_000003.json" for run in (own_run, other)]


def test_settings_of_env_are_those_of_the_env_that_is_evaluated_in(own_run, tmp_path, capsys):
    files = []
    for order in (["env.max_steps=3", "--episodes", "8"], ["--episodes", "8", "env.max_steps=3"]):
        assert main(["evaluate", str(own_run), *order]) == 0
        shown = capsys.readouterr().out
        assert "env.max_steps=3: 8 held-out episodes" in unwrapped(shown)
        files.append(Path(shown.splitlines()[-1].removeprefix("stored: ")))
    kept = [json.loads(file.read_text()) for file in files]
    assert kept[0] == kept[1] and kept[0]["manifest"]["env"]["max_steps"] == 3
    assert {episode["length"] for episode in kept[0]["episodes"]} == {3}
    assert main(["evaluate", str(own_run), str(own_run), "env.max_steps=3", "--episodes", "4"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("stored: ")]) == 2
    assert main(["evaluate", str(own_run / "evaluation.json"), str(files[0])]) == 2
    assert "not made with the same simulator: max_steps is 10 in A and 3 in B" in capsys.readouterr().err
    folder = Path(shutil.copytree(own_run, tmp_path / "a=b"))
    assert main(["evaluate", str(own_run), str(folder), "--episodes", "2"]) == 0, "a folder may have such a name"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["RUN", "policy.hidden=[4]"], "evaluate changes settings of env alone, as in env.max_steps=50, got 'policy.hidden=[4]'"),
        (["RUN", "env.max_stepz=3"], "command line: env.max_stepz=3: env.max_stepz: unknown key; did you mean 'max_steps'?"),
        (["RUN", "RUN", "RUN"], "evaluate takes one or two runs, got 3 ("),
        (["RUN/evaluation.json", "env.max_steps=3"], "env.max_steps=3 does nothing to "),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(own_run, arguments, complaint, capsys):
    assert main(["evaluate", *(text.replace("RUN", str(own_run)) for text in arguments)]) == 2
    assert complaint in capsys.readouterr().err


def test_what_cannot_be_compared_is_stored_all_the_same(own_run, capsys, monkeypatch):
    def refuse(*_, **__):
        raise CapabilityError("different starts")

    monkeypatch.setattr("embodied_rl.compare.print_targets", refuse)
    assert main(["evaluate", str(own_run), str(own_run), "--episodes", "2"]) == 2
    assert len(stored_by(capsys)) == 2


def test_every_suite_has_a_file_of_its_own(own_run, tmp_path):
    result = EvaluationResult.load(own_run / "evaluation.json")
    suites, path = {"heldout": result, "dim_light": result}, own_run / "checkpoints" / "update_000003"
    assert [file.name for file in store(suites, path, tmp_path / "x.json")] == ["x.json", "x.dim_light.json"]
    recipe = own_run / "recipe.yaml"
    recipe.write_text(re.sub(r"\n  suites: .*", "\n  suites: {dim_light: {max_steps: 5}}", recipe.read_text()))
    with pytest.raises(RunFolderError, match=r"--out .*y.json: .*y.dim_light.json exists already"):
        (tmp_path / "y.dim_light.json").touch()
        check_out(tmp_path / "y.json", path)
    store(suites, path)
    again = [file.name for file in store(suites, path)]
    assert again == ["update_000003-2.json", "update_000003-2.dim_light.json"]
    assert all((own_run / "evaluations" / name).is_file() for name in again)


@pytest.mark.parametrize(
    ("out", "complaint"),
    [
        ("mine.txt", "--out mine.txt: expected a name that ends in .json, by which a stored evaluation is known"),
        ("no/mine.json", "--out no/mine.json: there is no folder no: make it, or name another file"),
        ("kept.json/mine.json", "--out kept.json/mine.json: there is no folder kept.json: make it, or name another file"),
        (f"{'x' * 300}.json", f"--out {'x' * 300}.json: cannot be written (File name too long): name another file"),
        ("kept.json", "--out kept.json: kept.json exists already: name another file, or delete it"),
    ],
)
def test_a_file_that_cannot_be_is_refused_before_anything_is_evaluated(toy_run, out, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("kept.json").write_text("{}")
    monkeypatch.setattr("embodied_rl.compare.evaluate_targets", lambda *_, **__: pytest.fail("it was evaluated"))
    assert main(["evaluate", str(toy_run), "--out", out]) == 2
    assert capsys.readouterr().err == f"error: {complaint}\n"
    assert Path("kept.json").read_text() == "{}" and os.listdir() == ["kept.json"]


def test_a_folder_that_cannot_be_written_is_told_after_the_result(own_run, capsys):
    (own_run / "evaluations").write_text("a file")
    assert main(["evaluate", str(own_run), "--episodes", "2"]) == 2
    shown = capsys.readouterr()
    assert "2 held-out episodes" in unwrapped(shown.out)
    assert shown.err == f"error: {own_run}/evaluations/update_000003.json: cannot be written (File exists): name another file with --out\n"


def test_out_is_refused_where_it_could_not_hold_what_is_measured(toy_run, capsys):
    stored = str(toy_run / "evaluation.json")
    assert main(["evaluate", stored, "--out", "x.json"]) == 2
    assert capsys.readouterr().err == f"error: --out does nothing to {stored}, which has been made: remove it\n"
    assert main(["evaluate", str(toy_run), str(toy_run), "--out", "x.json"]) == 2
    assert "--out (x.json) is one file, and two are evaluated: remove it" in capsys.readouterr().err
