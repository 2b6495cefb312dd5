"""The report: one file, no network, honest about what is missing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied_rl import report, report_evaluation
from embodied_rl.charts import CHARTS, Baseline, baselines, draw, save_curves, smooth
from embodied_rl.console import stop_sentence
from embodied_rl.errors import NotFoundError, RunFolderError
from embodied_rl.report import write_report
from embodied_rl.runfolder import open_run
from embodied_rl.video import Clip, write_pairs, write_videos
from embodied_rl.writers import JsonlWriter

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Text, tags and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def rate(successes: int, episodes: int) -> dict:
    r = successes / episodes
    return {"rate": r, "low95": max(0.0, r - 0.05), "high95": min(1.0, r + 0.04), "successes": successes, "episodes": episodes}


def result(successes: int, episodes: int) -> dict:
    return {
        "success_once": rate(successes, episodes), "success_at_end": rate(successes - 1, episodes),
        "return_mean": 3.25, "length_mean": 41.0, "episodes": episodes,
    }  # fmt: skip


def summary(**more) -> dict:
    return {
        "name": "demo", "finished": True, "stop_reason": "finished", "updates": 60, "env_steps": 6000, "episodes": 900,
        "wall_time_s": 683.0, "device": "cpu", "seed": 0,
        "evaluation": {"heldout": {"overall": result(93, 100), "tasks": {"reach": result(49, 50), "push": result(44, 50)}}},
    } | more  # fmt: skip


def metrics_row(update: int) -> dict:
    row = {
        "progress/update": update, "progress/env_steps": 100 * update, "progress/episodes": 15 * update,
        "rollout/success_once_rate": update / 100, "rollout/return_mean": 0.1 * update, "rollout/length_mean": 50.0,
        "rollout/success_once_rate/reach": update / 80, "rollout/success_once_rate/push": update / 120,
        "sync/logp_gap_mean": 1e-7, "actor/entropy": 3.0, "actor/kl_k3": 0.01, "actor/kl_k1": 0.012, "actor/clip_fraction": 0.1,
        "critic/explained_variance": 0.5, "critic/loss": 0.2, "actor/grad_norm": 0.4, "actor/lr": 3e-4,
        "time/rollout_s": 3.0, "time/update_s": 1.0, "time/total_s": 4.0 * update, "perf/env_steps_per_s": 2500.0,
        "perf/memory_mib": 800.0,
    }  # fmt: skip
    if update % 20 == 0:
        row |= {"eval/heldout/success_rate": 0.5, "eval/heldout/success_low95": 0.4, "eval/heldout/success_high95": 0.6, "time/evaluate_s": 2.0}
    return row


def make_run(folder: Path, updates: int = 60, given: dict | None = None, clips: int = 0, recipe: str = "name: demo\n") -> Path:
    run = open_run(folder)
    run.write_start(recipe, device=torch.device("cpu"))
    writer = JsonlWriter(run.metrics)
    for update in range(1, updates + 1):
        writer.write(metrics_row(update))
    writer.close()
    if given is not None:
        run.write_summary(given)  # type: ignore[arg-type]
    frames = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8)
    write_videos(run.videos, [Clip(frames, f"task{i}", "do it", i % 2 == 0, 4, 1.0) for i in range(clips)], fps=10)
    run.release()
    return run.path


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text())


@pytest.fixture
def two_panels(monkeypatch) -> None:
    """Draw only the first curves, where the test is about something else."""
    monkeypatch.setattr(report, "CHARTS", CHARTS[:2])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "demo", given=summary(), clips=3)
    write_report(run)
    return run


def test_the_page_refers_to_nothing_outside_itself(finished):
    html = (finished / "report.html").read_text()
    addresses = set(re.findall(r"https?://[^\s\"'<>)]*", html))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "names of namespaces are not fetched"
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    for tag, attributes in Page(html).tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))


def test_the_page_shows_success_with_intervals_per_task_and_overall(finished):
    page = Page((finished / "report.html").read_text())
    assert "demo finished" in page.text and "93.0 % 88.0–97.0 success, heldout" in page.text
    assert "reach 0.980 0.930–1.000 0.960 3.25 41.0 50" in page.text
    assert "push 0.880 0.830–0.920 0.860 3.25 41.0 50" in page.text
    assert "all 0.930 0.880–0.970 0.920 3.25 41.0 100" in page.text
    assert "6,000 control steps" in page.text and "11 min 23 s wall time" in page.text
    bars = [a["style"] for tag, a in page.tags if tag == "i" and "width" in a.get("style", "")]
    assert "width:98.00%" in bars and "width:93.00%" in bars


def test_a_run_that_started_from_another_shows_what_changed_in_pairs(tmp_path, two_panels):
    old = summary(since_start={"reach": CHANGE, "all": CHANGE})  # as summaries of one suite had it
    words = " ".join(page_of(make_run(tmp_path / "run", given=old)).words)
    assert "Before and after" in words and words.count("+0.520") == 2 and "+0.460 to +0.580" in words and "2e-30" in words
    assert "Before and after" not in " ".join(page_of(make_run(tmp_path / "other", given=summary())).words)


CHANGE = {"before": 0.41, "after": 0.93, "difference": 0.52, "low95": 0.46, "high95": 0.58, "p": 2e-30, "episodes": 300}
GAP = {"difference": 0.03, "low95": -0.01, "high95": 0.07, "p": 0.2, "episodes": 100}


def two_suites() -> dict:
    """Before and after, in two suites of two tasks."""

    def suite(after: tuple[int, int], before: tuple[int, int], more: dict) -> dict:
        def played(successes: tuple[int, int]) -> dict:
            tasks = {task: result(n, 50) for task, n in zip(("reach", "push"), successes, strict=True)}
            return {"overall": result(sum(successes), 100), "tasks": tasks}

        changes = {task: CHANGE for task in ("reach", "push", "all")}
        return played(after) | more | {"start": played(before) | more, "since_start": changes}

    gaps = {task: GAP for task in ("reach", "push", "all")}
    return {
        "heldout": suite((44, 42), (20, 10), {}),
        "training_sentences": suite((48, 46), (25, 15), {"against_heldout": gaps}),
    }


def test_success_is_shown_by_task_and_suite_before_and_after_with_intervals(tmp_path, two_panels):
    page = page_of(make_run(tmp_path / "run", given=summary(evaluation=two_suites())))
    assert "86.0 % 81.0–90.0 success, heldout" in page.text and "94.0 % 89.0–98.0 success, training sentences" in page.text
    # After training: rate, interval, and what differs from the held-out suite.
    assert "reach 0.960 0.910–1.000 0.940 +0.030 -0.010 to +0.070 3.25 41.0 50" in page.text
    assert page.text.count("minus heldout return") == 1, "the held-out suite is not compared with itself"
    # Before and after, on the same starts.
    assert page.text.count("before after difference, 95 % p episodes") == 2
    row = "push 0.410 {} 0.930 {} +0.520 +0.460 to +0.580 2e-30 300"
    assert row.format("0.150–0.240", "0.790–0.880") in page.text and row.format("0.250–0.340", "0.870–0.960") in page.text
    assert row.format("0.250–0.340", "0.810–0.900").replace("push", "all") in page.text
    bars = [a["aria-label"] for tag, a in page.tags if tag == "div" and "bar" in a.get("class", "")]
    assert bars[-6:] == ["25 of 50", "48 of 50", "15 of 50", "46 of 50", "40 of 100", "94 of 100"]


def test_films_of_the_same_starts_are_shown_side_by_side_task_by_task(tmp_path, two_panels):
    run = make_run(tmp_path / "demo", updates=2, given=summary(), clips=3)
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    before = [Clip(frames, task, f"do {i}", False, 4, 0.0) for i, task in enumerate(("push", "reach", "push"))]
    after = [Clip(frames, clip.task, clip.instruction, i != 1, 2 + i, 1.0) for i, clip in enumerate(before)]
    write_pairs(run / "videos" / "pairs", before, after, fps=10)
    page = page_of(run)
    assert "Episodes before and after training" in page.text and "Episodes after training" not in page.text
    assert len([1 for tag, _ in page.tags if tag == "video"]) == 3
    shown = ["push do 0", "push do 2", "reach do 1"]
    assert [page.text.index(words) for words in shown] == sorted(page.text.index(words) for words in shown)
    assert "before: failure · 4 steps after: success · 4 steps push do 2" in page.text
    assert "before: failure · 4 steps after: failure · 3 steps reach do 1" in page.text


def test_the_policy_that_training_started_from_is_a_dashed_line_with_its_interval(tmp_path):
    levels = baselines({"overall": result(41, 100) | {"return_std": 2.0}, "tasks": {}})
    assert levels["eval/<suite>/success_rate"] == Baseline(0.41, 0.41 - 0.05, 0.41 + 0.04)
    assert levels["eval/<suite>/return_mean"] == Baseline(3.25, 3.25 - 0.392, 3.25 + 0.392)
    rows = [metrics_row(u) for u in range(1, 61)]
    for chart in CHARTS[:2]:
        with_level, without = draw(rows, chart, levels), draw(rows, chart)
        assert ">before training<" in with_level and ">before training<" not in without
        # The line and its sample in the legend, nothing else of the panel, are dashed.
        assert with_level.count("stroke-dasharray") == without.count("stroke-dasharray") + 2
    assert draw([], CHARTS[0], levels) is None, "a level alone is no curve"
    assert ">before training<" not in draw(rows, CHARTS[-1], levels)


def test_the_level_of_the_start_is_on_the_page_while_the_run_is_still_going(tmp_path, two_panels):
    run = make_run(tmp_path / "demo", updates=5)
    plain = page_of(run).text
    start = {"summary": {"overall": result(41, 100) | {"return_std": 2.0}, "tasks": {}}}
    (run / "evaluation_start.json").write_text(json.dumps(start))
    text = page_of(run).text
    assert text.count("before training") == 2 and "before training" not in plain
    assert "The dashed line is the policy that training started from" in text


def test_the_page_has_curves_time_recipe_versions_and_source(finished):
    page = Page((finished / "report.html").read_text())
    for chart in CHARTS:
        if chart.title not in ("Distance to the reference", "Success by task, evaluation", "Imitation loss"):
            assert chart.title in page.text
    assert "Distance to the reference" not in page.text, "nothing measured, no panel"
    assert "Collecting 3 min 00 s 73.2 % 3,000 ms" in page.text
    assert "Evaluation 6.0 s 2.4 % 100 ms" in page.text
    assert "Median speed 2,500 control steps per second" in page.text
    assert "name: demo" in page.text and f"torch {torch.__version__}" in page.text
    git = json.loads((finished / "git.json").read_text()) if (finished / "git.json").exists() else None
    assert git is None or f"commit {git['commit']} on {git['branch']}" in page.text


def test_videos_of_successes_and_failures_are_inside_the_page(finished):
    page = Page((finished / "report.html").read_text())
    videos = [a for tag, a in page.tags if tag == "video"]
    assert len(videos) == 3
    assert all(v["src"].startswith("data:video/mp4;base64,") and {"autoplay", "loop", "muted", "playsinline"} <= v.keys() for v in videos)
    assert [a["class"] for tag, a in page.tags if tag == "figure"][:3] == ["success", "failure", "success"]
    assert "task1 failure · 4 steps do it" in page.text


def test_the_page_stays_small_when_there_are_many_videos(tmp_path, monkeypatch, two_panels):
    run = make_run(tmp_path / "demo", updates=2, given=summary(), clips=3)
    monkeypatch.setattr(report_evaluation, "VIDEO_BUDGET", (run / "videos" / "00_task0_success.mp4").stat().st_size + 10)
    page = page_of(run)
    assert len([1 for tag, _ in page.tags if tag == "video"]) == 1
    assert "2 more in the folder videos/." in page.text


def test_a_long_run_gives_a_page_of_bounded_size(tmp_path):
    run = make_run(tmp_path / "demo", updates=3000, given=summary())
    assert write_report(run).stat().st_size < 1_500_000


def test_equal_runs_give_equal_pages(finished):
    first = (finished / "report.html").read_text()
    assert write_report(finished).read_text() == first


def test_names_and_texts_cannot_break_the_page(tmp_path, two_panels):
    evil = "<script>alert(1)</script>&'\""
    tasks = {evil: result(9, 10), "reach": result(9, 10)}
    run = make_run(
        tmp_path / "demo", updates=3, recipe=f"name: {evil}\n",
        given=summary(name=evil, stop_reason=evil, evaluation={evil: {"overall": result(9, 10), "tasks": tasks}}),
    )  # fmt: skip
    row = metrics_row(4) | {f"rollout/success_once_rate/{evil}": 0.5}
    writer = JsonlWriter(run / "metrics.jsonl")
    writer.write(row)
    writer.close()
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    write_videos(run / "videos", [Clip(frames, evil, evil, True)], fps=10)
    page = page_of(run)
    assert not [1 for tag, _ in page.tags if tag == "script"]
    assert page.text.count("<script>alert(1)</script>") >= 6


def test_an_unfinished_run_says_so(tmp_path, two_panels):
    run = make_run(tmp_path / "demo", updates=25)
    page = page_of(run)
    assert "demo unfinished" in page.text and "the page shows its state after update 25." in page.text
    assert "There is no final evaluation yet. Its last evaluation during training was at update 20" in page.text
    assert "2,500 control steps" in page.text and "Learning curves" in page.text


def test_a_run_before_its_first_update_has_a_page(tmp_path, two_panels):
    page = page_of(make_run(tmp_path / "demo", updates=0))
    assert "before the first update" in page.text and "No update has finished yet." in page.text


def test_a_stopped_run_tells_why_and_a_skipped_evaluation_is_named(tmp_path, two_panels):
    page = page_of(make_run(tmp_path / "demo", updates=2, given=summary(finished=False, stop_reason="SIGINT", evaluation={})))
    assert "demo stopped" in page.text and "Stopped by an interrupt; go on with --resume." in page.text
    assert "There was no final evaluation." in page.text


@pytest.mark.parametrize(
    ("reason", "saved", "sentence"),
    [
        ("SIGTERM", 40, "Stopped by a termination signal; go on after update 40 with --resume."),
        ("SIGINT", 0, "Stopped by an interrupt; nothing was saved yet, so --resume begins anew."),
        ("diverged", 4, "Stopped: numbers were not finite; the last good checkpoint after update 4 is kept."),
        ("diverged", 0, "Stopped: numbers were not finite; nothing was saved yet."),
    ],
)
def test_how_a_run_goes_on_is_told_by_what_was_saved(reason, saved, sentence):
    assert stop_sentence(summary(stop_reason=reason, saved_update=saved)) == sentence


def test_the_summary_of_an_earlier_stop_is_not_shown_once_the_run_has_gone_on(tmp_path, two_panels):
    page = page_of(make_run(tmp_path / "demo", updates=9, given=summary(finished=False, stop_reason="SIGINT", updates=5)))
    assert "demo unfinished" in page.text and "state after update 9." in page.text and "900 control steps" in page.text


def test_an_env_without_success_shows_its_return(tmp_path, two_panels):
    overall = {"return_mean": 1612.5, "length_mean": 1000.0, "episodes": 10}
    page = page_of(make_run(tmp_path / "demo", updates=2, given=summary(evaluation={"heldout": {"overall": overall, "tasks": {}}})))
    assert "return, heldout" in page.text and "heldout 1612.50 1000.0 10" in page.text
    assert "at the end 0" not in page.text


def test_metrics_that_were_not_finite_leave_gaps(tmp_path, two_panels):
    run = make_run(tmp_path / "demo", updates=5)
    writer = JsonlWriter(run / "metrics.jsonl")
    writer.write(metrics_row(6) | {"actor/kl_k3": float("nan"), "perf/env_steps_per_s": float("inf")})
    writer.close()
    page = page_of(run)
    assert not re.search(r"\b(nan|inf|none)\b", page.text.lower()) and "Median speed 2,500 control steps" in page.text


@pytest.mark.parametrize(
    ("name", "make", "kind", "message"),
    [
        ("missing", lambda p: None, NotFoundError, "no such run folder"),
        ("other", lambda p: p.mkdir(), RunFolderError, "is not a run folder (it has neither recipe.yaml nor metrics.jsonl)"),
    ],
)
def test_what_is_not_a_run_folder_is_refused(name, make, kind, message, tmp_path):
    make(tmp_path / name)
    with pytest.raises(kind) as error:
        write_report(tmp_path / name)
    assert str(error.value) == f"{tmp_path / name}: {message}"


def test_a_damaged_summary_is_named(tmp_path, two_panels):
    run = make_run(tmp_path / "demo", updates=1)
    (run / "summary.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"summary.json: is damaged \(.*\); delete it and run `embodied-rl report` again"):
        write_report(run)


def test_curves_are_also_saved_as_a_picture(finished, tmp_path):
    from PIL import Image

    with Image.open(finished / "learning_curve.png") as picture:
        assert picture.width > 900
        assert len(picture.convert("RGB").getcolors(10**6)) > 50, "something is drawn"
    assert not save_curves([], tmp_path / "none.png") and not (tmp_path / "none.png").exists()


def test_a_panel_draws_each_measured_line_with_its_name():
    rows = [metrics_row(u) for u in range(1, 61)]
    charts = {chart.title: chart for chart in CHARTS}
    svg = draw(rows, charts["Success"])
    assert svg is not None and svg.startswith("<svg") and ">while collecting<" in svg and ">evaluation heldout<" in svg
    by_task = draw(rows, charts["Success by task, while collecting"])
    assert by_task is not None and ">reach<" in by_task and ">push<" in by_task
    assert draw(rows, charts["Distance to the reference"]) is None
    assert draw([metrics_row(1)], charts["Entropy"]) is not None, "one point is drawn as a dot"


def test_smoothing_keeps_constants_and_the_mean_of_a_window():
    assert (smooth(np.full(200, 2.5)) == 2.5).all()
    assert smooth(np.arange(10.0)) is not None and (smooth(np.arange(10.0)) == np.arange(10.0)).all(), "short curves stay"
    values = np.random.default_rng(0).normal(size=200)
    soft = smooth(values)
    assert soft[100] == pytest.approx(values[95:106].mean())
    assert soft[0] == pytest.approx(values[:6].mean()) and soft[-1] == pytest.approx(values[-6:].mean())
    values[100] = np.nan
    assert smooth(values)[100] == pytest.approx(np.nanmean(values[95:106]))
