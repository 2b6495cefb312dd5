"""The command line as a user meets it: help, lists, show-config, exit codes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from embodied_rl.cli import COMMANDS, main

PROGRAM = Path(sys.executable).with_name("embodied-rl")


def run(*argv: str, **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(PROGRAM), *argv], capture_output=True, text=True, timeout=300, **kwargs)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: embodied-rl {command}" in text
    assert f"  embodied-rl {command}" in text.partition("examples:")[2]


def test_the_examples_in_the_help_are_accepted_by_the_parser():
    from embodied_rl.cli import _build_parser

    for name, (_, _, _, examples) in COMMANDS.items():
        for example in examples:
            argv = [name, *re.split(r"\s{2,}| \| ", example)[0].split()]
            _build_parser().parse_known_args(argv)


def test_help_does_not_wait_for_heavy_modules():
    code = "import sys; from embodied_rl.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_the_installed_program_runs():
    assert re.fullmatch(r"embodied-rl \d+\.\d+\.\d+\n", run("--version").stdout)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: the following arguments are required: COMMAND; see `embodied-rl --help`\n"),
        (["train"], "error: the following arguments are required: RECIPE; see `embodied-rl train --help`\n"),
        (["trian", "x"], "error: argument COMMAND: 'trian' does not exist; did you mean 'train'?; see `embodied-rl --help`\n"),
        (["list", "x"], "error: argument what: 'x' does not exist; known: algorithms, envs, policies, recipes; see `embodied-rl list --help`\n"),
        (["train", "x", "--fast"], "error: unknown argument '--fast'; see `embodied-rl --help`\n"),
        (["report", "a", "b"], "error: unknown argument 'b'; see `embodied-rl --help`\n"),
        (["evaluate", "a", "--episodes", "0"], "error: argument --episodes: expected a whole number of at least 1, got '0'; see `embodied-rl evaluate --help`\n"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("what", ["envs", "policies", "algorithms", "recipes"])
def test_list_says_what_each_name_is(what, capsys):
    assert main(["list", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = {"envs": "tabletop", "policies": "mlp", "algorithms": "ppo", "recipes": "tabletop_demo"}[what]
    assert any(line.startswith(expected) for line in lines)
    assert all(re.fullmatch(r"\w+ +\S.*[.:;\w)]", line) for line in lines), lines


def test_list_names_the_extra_that_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    monkeypatch.delitem(sys.modules, "embodied_rl.envs.envpool", raising=False)
    assert main(["list", "envs"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("envpool"))
    assert line.endswith("run: pip install 'embodied-rl[envpool]'")
    monkeypatch.delitem(sys.modules, "embodied_rl.envs.envpool", raising=False)


def test_show_config_prints_every_value_with_its_source(toy, capsys):
    assert main(["show-config", "toy.yaml", "collect.copies=8", "algorithm.loss.clip_low=1e-1"]) == 0
    lines = [re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()]
    shown = {name: (value, source) for name, value, source in lines}
    assert shown["collect.copies"] == ("8", "command line")
    assert shown["algorithm.loss.clip_low"] == ("0.1", "command line")
    assert shown["policy.hidden"] == ("[8]", "toy.yaml:3")
    assert shown["algorithm.update.epochs"] == ("1", "toy.yaml:6")
    assert shown["seed"] == ("0", "default")
    assert len(shown) > 60


def test_overrides_may_stand_on_both_sides_of_an_option(toy, capsys):
    assert main(["train", "toy.yaml", "name=a", "--resume", "seed=1"]) == 2
    assert "there is no run to resume" in capsys.readouterr().err


def test_a_closed_pipe_is_no_failure(toy):
    done = subprocess.run(f"{PROGRAM} show-config toy.yaml | head -1", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_defect_of_ours_keeps_its_traceback(toy):
    (toy / "broken.py").write_text("raise RuntimeError('boom')\n")
    done = run("show-config", "toy.yaml", "env.type=broken.py")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "boom" in done.stderr


def test_train_says_the_device_first_and_the_report_last(toy):
    done = run("train", "toy.yaml", cwd=toy)
    assert done.returncode == 0, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert "cpu" in lines[0] or "cuda" in lines[0], lines[0]
    assert done.stdout.splitlines()[-1] == "report: runs/toy/report.html"
    assert (toy / "runs/toy/report.html").is_file()
    summary = json.loads((toy / "runs/toy/summary.json").read_text())
    assert summary["finished"] and summary["env_steps"] == 120


def test_an_interrupted_run_saves_and_is_resumed_by_its_folder(toy):
    argv = [str(PROGRAM), "train", "toy.yaml", "train.env_steps=100000000", "checkpoint.every=1000000"]
    with subprocess.Popen(argv, cwd=toy, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        rows = toy / "runs/toy/metrics.jsonl"
        deadline = time.time() + 120
        while not (rows.is_file() and rows.stat().st_size) and time.time() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out.splitlines()[-1] == "stopped by SIGINT and saved; go on with: embodied-rl train runs/toy --resume"
    done = int(json.loads(rows.read_text().splitlines()[-1])["progress/env_steps"])
    assert run("train", "runs/toy", f"train.env_steps={done + 40}", "--resume", cwd=toy).returncode == 0
    assert json.loads(rows.read_text().splitlines()[-1])["progress/env_steps"] == done + 40
