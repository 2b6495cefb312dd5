"""Where metrics go: JSON lines that survive a kill, TensorBoard, wandb offline, the terminal."""

import builtins
import io
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from embodied_rl import console
from embodied_rl.console import ConsoleWriter, key_numbers, summary_table
from embodied_rl.errors import MissingExtraError, RunFolderError
from embodied_rl.recipe import Recipe
from embodied_rl.runfolder import open_run
from embodied_rl.section import Section
from embodied_rl.writers import JsonlWriter, TensorBoardWriter, WandbWriter, Writers, open_writers, read_rows

CPU = torch.device("cpu")


def row_of(update: int, **more: float) -> dict[str, float]:
    return {"progress/update": update, "progress/env_steps": 100 * update, "actor/loss": update / 3, **more}


def recipe_of(folder: Path, **log: object) -> Recipe:
    return Recipe.model_validate(
        {"name": "demo", "env": Section(), "policy": Section(), "algorithm": Section(), "log": {"folder": str(folder), **log}}
    )


def updates(path: Path) -> list[int]:
    return [row["progress/update"] for row in read_rows(path)]


def test_a_row_is_one_line_and_floats_come_back_exactly(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(row_of(1, **{"actor/lr": 0.1 + 0.2}))
    writer.write(row_of(2))
    assert read_rows(tmp_path / "metrics.jsonl") == [row_of(1, **{"actor/lr": 0.1 + 0.2}), row_of(2)]
    writer.close()
    writer.close()


def test_every_line_is_json_even_when_a_metric_is_not_finite(tmp_path):
    writers = Writers([JsonlWriter(tmp_path / "metrics.jsonl")])
    writers.write(row_of(1, **{"actor/kl_k3": math.nan, "actor/ratio_max": math.inf}))
    writers.write(row_of(2))
    writers.close()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    first, second = (json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["actor/kl_k3"] is None and first["actor/ratio_max"] is None
    assert first["progress/non_finite_metrics"] == 2 and second["progress/non_finite_metrics"] == 0
    assert "actor/kl_k3" not in second, "what was not measured is absent"


def test_a_killed_process_loses_no_finished_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    child = os.fork()
    if child == 0:
        writer = JsonlWriter(path)
        writer.write(row_of(1))
        os._exit(9)
    os.waitpid(child, 0)
    assert updates(path) == [1]


def test_truncating_drops_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    for update in range(1, 6):
        writer.write(row_of(update))
    writer.close()
    whole = path.read_text()
    with open(path, "a") as file:
        file.write('{"progress/update": 6, "actor/lo')
    assert updates(path) == [1, 2, 3, 4, 5]
    writer = JsonlWriter(path)
    writer.truncate_after(3)
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:3]), "kept rows stay byte for byte"
    writer.write(row_of(4))
    writer.flush()
    writer.close()
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:4])


def test_truncating_to_the_start_empties_the_file(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(row_of(1))
    writer.truncate_after(0)
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"progress/update": 1}\noops\n{"progress/update": 2}\n')
    with pytest.raises(RunFolderError) as error:
        read_rows(path)
    assert str(error.value) == f"{path}:2: not a JSON object; remove that line"
    assert read_rows(tmp_path / "missing.jsonl") == []


def test_a_full_disk_is_told_in_one_sentence(tmp_path):
    if not Path("/dev/full").is_char_device():
        pytest.skip("needs /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(RunFolderError) as error:
        writer.write(row_of(1))
    writer.close()  # must not try the line again
    assert str(error.value) == (
        f"{tmp_path}/metrics.jsonl: cannot write it: the disk is full: free some space, or set log.folder to another disk"
    )


def test_writers_refuse_a_key_without_a_row_when_asked(tmp_path):
    writers = Writers([JsonlWriter(tmp_path / "metrics.jsonl")], check=True)
    writers.write(row_of(1))
    with pytest.raises(KeyError, match="actor/approx_kl"):
        writers.write(row_of(2, **{"actor/approx_kl": 0.0}))
    writers.close()


def test_closing_closes_every_writer_even_when_one_fails():
    closed = []

    class Stub:
        def __init__(self, name, error):
            self.name, self.error = name, error

        def close(self):
            closed.append(self.name)
            if self.error:
                raise RunFolderError("no")

    with pytest.raises(RunFolderError):
        Writers([Stub("a", False), Stub("b", True), Stub("c", False)]).close()
    assert sorted(closed) == ["a", "b", "c"]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_metric_over_control_steps_and_a_resume_hides_what_came_later(tmp_path):
    pytest.importorskip("tensorboard")
    first = TensorBoardWriter(tmp_path)
    for update in (1, 2, 3):
        first.write(row_of(update))
    first.flush()
    first.close()
    assert scalars(tmp_path)["actor/loss"] == [(100, pytest.approx(1 / 3)), (200, pytest.approx(2 / 3)), (300, 1.0)]
    second = TensorBoardWriter(tmp_path, resume_step=200)
    second.write(row_of(3, **{"actor/loss": 5.0}))
    second.close()
    assert [step for step, _ in scalars(tmp_path)["actor/loss"]] == [100, 200, 300]
    assert scalars(tmp_path)["actor/loss"][-1] == (300, 5.0)


@pytest.mark.parametrize(
    ("package", "way_out", "make"),
    [
        ("tensorboard", "log.tensorboard=false", lambda folder: TensorBoardWriter(folder)),
        ("wandb", "log.wandb=off", lambda folder: WandbWriter(folder, mode="offline", project="p", name="n", config={})),
    ],
)
def test_a_missing_extra_is_named_with_its_cure(package, way_out, make, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == package or name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for module in [m for m in sys.modules if m.split(".")[0] == package or m == "torch.utils.tensorboard"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError) as error:
        make(tmp_path)
    assert str(error.value) == (
        f"log.{package} needs the package '{package}', which is not installed; run: pip install 'embodied-rl[{package}]', or set {way_out}"
    )


def test_wandb_offline_writes_into_the_run_folder_and_keeps_its_id_over_a_resume(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for update in (1, 2):
        writer = WandbWriter(tmp_path, mode="offline", project="demo", name="demo", config={"seed": 0})
        writer.write(row_of(update))
        ids.append(writer._run.id)
        writer.close()
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text()
    assert list((tmp_path / "wandb").glob(f"offline-run-*/run-{ids[0]}.wandb"))


def test_open_writers_continues_all_destinations_after_the_checkpoint(tmp_path, capsys):
    recipe = recipe_of(tmp_path)
    folder = open_run(tmp_path / "demo")
    writers = open_writers(folder, recipe, device=CPU)
    for update in (1, 2, 3):
        writers.write(row_of(update))
    writers.flush()
    writers.close()
    writers = open_writers(folder, recipe, device=CPU, update=2)
    writers.write(row_of(3, **{"actor/loss": 7.0}))
    writers.close()
    folder.release()
    assert updates(folder.metrics) == [1, 2, 3] and read_rows(folder.metrics)[-1]["actor/loss"] == 7.0
    assert scalars(folder.path / "tensorboard")["actor/loss"][-1] == (300, 7.0)
    assert ", going on at step 200" in capsys.readouterr().out


def test_the_log_section_chooses_the_destinations(tmp_path):
    folder = open_run(tmp_path / "demo")
    writers = open_writers(folder, recipe_of(tmp_path, tensorboard=False, progress=False), device=CPU)
    assert [type(w) for w in writers.writers] == [JsonlWriter, ConsoleWriter]
    writers.close()
    folder.release()


FULL_ROW = {
    "progress/update": 20, "progress/env_steps": 500, "progress/episodes": 40, "rollout/success_once_rate": 0.5,
    "rollout/success_once_rate/reach": 0.75, "rollout/success_once_rate/push[1]": 0.25, "rollout/return_mean": 3.5,
    "rollout/return_std": 1.0, "rollout/length_mean": 33.0, "actor/entropy": 2.0, "actor/kl_k3": 0.01, "actor/lr": 3e-4,
    "actor/clip_fraction": 0.1, "actor/grad_norm": 0.4, "critic/loss": 0.2, "critic/explained_variance": 0.8,
    "eval/heldout/success_rate": 0.6, "eval/heldout/success_low95": 0.5, "eval/heldout/success_high95": 0.7,
    "time/rollout_s": 3.0, "time/update_s": 1.0, "time/total_s": 99.0, "perf/env_steps_per_s": 1234.5,
    "actor/skipped_updates": 2.0,
}  # fmt: skip


def test_without_a_terminal_there_is_one_plain_line_every_so_many_updates():
    out = io.StringIO()
    writer = ConsoleWriter("demo", 1000, device=CPU, every=10, console=Console(file=out, width=60))
    for update in range(1, 21):
        writer.write({**row_of(update), "perf/env_steps_per_s": 1234.5})
    writer.write({**FULL_ROW, "progress/update": 23})
    writer.close()
    lines = out.getvalue().splitlines()
    threads = torch.get_num_threads()
    assert lines[0] == f"demo: device cpu ({threads} thread{'s' * (threads > 1)}), torch {torch.__version__}"
    assert [line.split(" · ")[0] for line in lines[1:]] == ["update 1", "update 10", "update 20", "update 23"]
    assert lines[-1].startswith(
        "update 23 · 500 steps (50 %) · success 0.5 · eval heldout 0.60 [0.50, 0.70] · return 3.5 · entropy 2 · kl 0.01 · "
        "explained 0.8 · 1,234 steps/s · left 0:0"
    )
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize(("limit", "left"), [(None, "left 16:40"), (150.0, "left 0:51"), (9000.0, "left 16:40")])
def test_the_time_left_is_what_the_steps_or_the_seconds_allow(limit, left):
    out = io.StringIO()
    writer = ConsoleWriter("demo", 1000, device=CPU, every=1, max_seconds=limit, console=Console(file=out, width=60))
    writer._started -= 1000  # half of the steps took 1000 s, and the run is 99 s old
    writer.write(FULL_ROW)
    assert out.getvalue().rstrip().endswith(left)


def test_slow_updates_are_told_one_by_one(monkeypatch):
    monkeypatch.setattr(console, "LONGEST_SILENCE_S", -1.0)
    out = io.StringIO()
    writer = ConsoleWriter("demo", 1000, device=CPU, every=10, console=Console(file=out, width=60))
    for update in range(1, 4):
        writer.write(row_of(update))
    assert [line.split(" · ")[0] for line in out.getvalue().splitlines()[1:]] == ["update 1", "update 2", "update 3"]


def test_on_a_terminal_the_key_numbers_are_redrawn_in_place():
    out = io.StringIO()
    terminal = Console(file=out, width=100, force_terminal=True, legacy_windows=False)
    writer = ConsoleWriter("demo", 1000, device=CPU, console=terminal)
    writer.write(FULL_ROW)
    writer.say("a line above")
    writer.close()
    writer.close()
    shown = out.getvalue()
    for text in ("500 / 1,000 steps", "50 %", "reach 0.75 · push[1] 0.25", "heldout 0.60 [0.50, 0.70] at update 20", "1,234 steps/s", "a line above"):
        assert text in shown


def test_key_numbers_are_at_most_eight_lines_and_leave_out_what_was_not_measured():
    lines = dict(key_numbers(FULL_ROW, [0.0, 0.5, 1.0], 20))
    assert len(lines) == 8
    assert lines["success"] == "0.5  ▁▅█" and lines["skipped"] == "2 non-finite steps"
    assert lines["speed"] == "1,234 steps/s  rollout 75 %  update 25 %"
    assert dict(key_numbers({"progress/update": 1, "rollout/return_mean": 2.0}, [], None)) == {"return": "2  episodes 0"}
    assert key_numbers({}, [], None) == []


def test_the_closing_table_has_a_row_per_task_and_one_for_all():
    rate = {"rate": 0.9, "low95": 0.85, "high95": 0.94, "successes": 90, "episodes": 100}
    result = {"success_once": rate, "success_at_end": rate, "return_mean": 1.0, "length_mean": 20.0, "episodes": 100}
    bare = {"return_mean": 2.0, "length_mean": 10.0, "episodes": 5}
    out = io.StringIO()
    Console(file=out, width=120).print(
        summary_table(
            {"name": "demo", "finished": True, "stop_reason": "finished", "updates": 1, "env_steps": 1, "episodes": 1, "wall_time_s": 1.0,
             "device": "cpu", "evaluation": {"heldout": {"overall": result, "tasks": {"[red]": result}}, "plain": {"overall": bare, "tasks": {}}}}
        )
    )  # fmt: skip
    assert "before training" not in out.getvalue()
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in out.getvalue().splitlines() if "│" in line]
    assert cells == [
        ["heldout", "[red]", "0.900", "0.850–0.940", "0.900", "1.00", "20.0", "100"],
        ["heldout", "all", "0.900", "0.850–0.940", "0.900", "1.00", "20.0", "100"],
        ["plain", "all", "–", "–", "–", "2.00", "10.0", "5"],
    ]


def test_the_closing_table_tells_what_changed_and_how_suites_differ():
    bare = {"overall": {"return_mean": 2.0, "length_mean": 10.0, "episodes": 5}, "tasks": {}}
    gap = {"difference": 0.03, "low95": -0.01, "high95": 0.07, "p": 0.2, "episodes": 300}
    change = gap | {"difference": 0.5, "low95": 0.4, "high95": 0.6, "before": 0.41, "after": 0.91}
    suites = {"heldout": bare | {"since_start": {"all": change}}, "easy": bare | {"against_heldout": {"all": gap}}}
    out = io.StringIO()
    given = {"name": "demo", "stop_reason": "finished", "env_steps": 1, "evaluation": suites}
    Console(file=out, width=120).print(summary_table(given))  # type: ignore[arg-type]
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert lines[-2:] == [
        "heldout: before training 0.410, paired difference +0.500 (+0.400 to +0.600)",
        "easy minus heldout: paired difference +0.030 (-0.010 to +0.070)",
    ]
