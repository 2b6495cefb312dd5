"""What docs/text.md shows is run, not trusted."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from embodied_rl import registry
from embodied_rl.cli import main
from embodied_rl.envs.text.tasks import build_task, names
from embodied_rl.seeding import numpy_rng
from tests.toys.tiny_lm import tiny_lm

PAGE = (Path(__file__).parents[2] / "docs" / "text.md").read_text(encoding="utf-8")
FILES = {
    "backwards.py": re.search(r"^`backwards.py`:\n\n```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)[1],
    "halves.jsonl": re.search(r"^`halves.jsonl`,.*?```json\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)[1],
}
COMMANDS = [shlex.split(line)[1:] for block in re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE) for line in block.splitlines()]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the files of the page, and a tiny model where the page has a real one."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    tiny_lm(tmp_path / "models" / "smollm2")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_task_of_the_page_keeps_the_contract(here, capsys):
    command = next(c for c in COMMANDS if "backwards" in c[-1])
    assert main(command) == 0
    assert "0 failed" in capsys.readouterr().out


@pytest.mark.slow
def test_the_questions_of_the_page_keep_the_contract(here, capsys):
    command = next(c for c in COMMANDS if "halves" in " ".join(c))
    assert main(command) == 0
    assert "0 failed" in capsys.readouterr().out


def test_every_command_of_the_page_is_tried_here():
    assert [c[:3] for c in COMMANDS] == [["check", "env", "text"]] * 2


def test_the_task_of_the_page_pays_for_letters_in_their_place(here):
    task = build_task({"task": "./backwards.py", "letters": 4})
    q = task.question(numpy_rng(0))
    assert task.score(q, f" {q.answer}\n") == 1.0
    assert task.score(q, q.answer[:3]) == 0.75 and task.score(q, "") == 0.0 and task.score(q, q.answer * 2) == 0.5


def test_every_answer_of_the_page_is_right(here):
    task = build_task("halves.jsonl")
    for q in task.questions:
        assert task.score(q, q.answer) == 1.0 > task.score(q, "17")
    assert task.score(task.questions[0], "It is 1.5.") == task.score(task.questions[2], "$0.5x^2$") == 1.0


def test_the_env_section_of_the_page_is_one():
    section = yaml.safe_load(re.search(r"^```yaml\n(env:.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)[1])["env"]
    config = registry.load("env", "text").Config.model_validate_json(json.dumps(section))
    defaults = type(config).model_fields
    assert (config.max_context, config.max_reply) == (defaults["max_context"].default, defaults["max_reply"].default)


def test_the_table_names_every_task_and_setting():
    rows = {re.match(r"\| `([\w.]+)", row)[1]: row.rsplit("|", 2)[1] for row in PAGE.splitlines() if row.startswith("| `")}
    rows["questions"] = rows.pop("questions.jsonl")
    assert set(rows) == set(names())
    for name, told in rows.items():
        fields = importlib.import_module(f"embodied_rl.envs.text.tasks.{name}").Config.model_fields
        assert re.findall(r"`(\w+)`", told) == [f for f in fields if f != "dataset"], name
