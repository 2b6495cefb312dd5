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
        (["list", "x"], "error: argument what: 'x' does not exist; known: algorithms, envs, policies, recipes, rewards; see `embodied-rl list --help`\n"),
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


@pytest.mark.parametrize("what", ["envs", "policies", "algorithms", "rewards", "recipes"])
def test_list_says_what_each_name_is(what, capsys):
    assert main(["list", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = {"envs": "tabletop", "policies": "mlp", "algorithms": "ppo", "rewards": "self_referential", "recipes": "tabletop_demo"}[what]
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


def test_evaluate_prints_success_with_its_interval(own_run, capsys):
    assert main(["evaluate", str(own_run), "--episodes", "6", "--copies", "3"]) == 0
    out = capsys.readouterr().out
    assert "6 held-out episodes, greedy" in " ".join(out.split())
    assert re.search(r"│ all +│ +[01]\.\d{3} +│ +[01]\.\d{3}–[01]\.\d{3} ", out)


def test_evaluate_compares_two_checkpoints_on_the_same_starts(own_run, capsys):
    run, first = os.path.relpath(own_run), os.path.relpath(own_run / "checkpoints" / "update_000002")
    assert main(["evaluate", run, first, "--episodes", "6", "--copies", "3", "--sampled"]) == 0
    out = capsys.readouterr().out
    assert out.count("held-out") == 2 and "sampled" in out
    assert "p (McNemar)" in out
    assert "starts do not show a difference" in out or "points more of the starts" in out


def test_report_prints_the_path_of_the_page(toy_run, capsys):
    assert main(["report", str(toy_run)]) == 0
    assert capsys.readouterr().out == f"{toy_run}/report.html\n"


def test_check_accepts_a_good_env_and_refuses_a_broken_one(toy, capsys):
    source = (Path(__file__).parents[1] / "toys" / "point.py").read_text()
    (toy / "mine.py").write_text(source)
    assert main(["check", "env", "mine.py", "max_steps=5"]) == 0
    assert re.search(r"\d+ passed, 0 failed", capsys.readouterr().out)
    assert main(["check", "env", "mine.py", "max_steps=50", "--copies", "2", "--steps", "4"]) == 0
    assert "4 steps, " in capsys.readouterr().out
    assert main(["check", "policy", "mlp", "--steps", "4"]) == 2
    assert "--steps does nothing for check policy" in capsys.readouterr().err
    (toy / "worse.py").write_text(source.replace('numpy_rng(int(seeds[i]), "point")', "__import__('numpy').random.default_rng()"))
    assert main(["check", "env", "worse.py"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_check_tells_a_wrong_setting_like_a_recipe_does(capsys):
    assert main(["check", "policy", "mlp", "hiden=[8]"]) == 2
    assert capsys.readouterr().err == (
        "error: 1 problem in the settings of policy mlp:\n  command line: hiden=[8]: hiden: unknown key; did you mean 'hidden'?\n"
    )


def test_doctor_tries_the_parts_and_the_disk(tmp_path, monkeypatch, capsys):
    from embodied_rl import doctor

    monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name] for name in ("torch", "MuJoCo", "video")})
    assert main(["doctor", "--runs", str(tmp_path / "new" / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("Python", "torch", "MuJoCo", "video", "run folder"):
        assert any(line.startswith(f"works     {name} ") for line in lines), name
    assert lines[-1] == "ready to train: embodied-rl train tabletop_demo"


@pytest.mark.slow  # MuJoCo Warp compiles for a minute on a fresh machine; .ci/run calls doctor as well
def test_doctor_finds_the_core_working(tmp_path):
    done = run("doctor", "--runs", str(tmp_path / "new" / "runs"))
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("Python", "torch", "MuJoCo", "MuJoCo Warp", "cameras", "video", "run folder"):
        assert f"works     {name} " in done.stdout
    assert done.stdout.splitlines()[-1] == "ready to train: embodied-rl train tabletop_demo"


def test_doctor_says_what_would_mend_a_broken_part(monkeypatch, capsys, tmp_path):
    from embodied_rl import doctor

    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "CHECKS", {"torch": doctor.CHECKS["torch"]})
    assert doctor.print_findings(doctor.examine(tmp_path)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "BROKEN    torch        OSError: libcudart.so.13: cannot open shared object file" in lines
    assert any(line.strip().startswith("mend it with: pip install --force-reinstall 'torch>=") for line in lines)
    assert lines[-1] == "1 part(s) that training needs do not work"


def test_doctor_survives_a_check_that_crashes_or_hangs(monkeypatch, tmp_path):
    from embodied_rl import doctor

    check = doctor.Check(doctor.check_torch, "reinstall it")
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor._in_a_process("torch", check)
    assert not finding.works
    assert "its process ended with code -11" in finding.detail
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(doctor, "SECONDS", 1)
    assert doctor._in_a_process("torch", check).detail == "no answer within 1 s"
