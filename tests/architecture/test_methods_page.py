"""docs/methods.md names every recipe of a method, and for each the tests that check it; all of them exist."""

import ast
import re
from pathlib import Path

import pytest

from embodied_rl.config import packaged_configs

TESTS = Path(__file__).resolve().parents[1]
PAGE = (TESTS.parent / "docs" / "methods.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("| method |")[2].partition("\n\n")[0].splitlines()[2:]
ROWS = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in TABLE]
METHODS = {row[0]: row for row in ROWS}


def functions(file):
    return {node.name for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_names_its_formula_and_tests_that_exist(method):
    cells = METHODS[method]
    assert len(cells) == 6 and cells[2], "no formula"
    assert cells[1].startswith("["), "no paper"
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", cells[-1])
    assert named and len(named) == cells[-1].count("`") // 2, cells[-1]
    for file, name in named:
        assert (TESTS / file).is_file(), f"there is no tests/{file}"
        assert name.startswith("test_") and name in functions(TESTS / file), f"tests/{file} has no {name}"


def test_every_recipe_of_a_method_has_a_row():
    told = {name for row in ROWS for name in re.findall(r"`(?:method/)?(\w+)`", row[3])}
    files = {path.stem for path in (packaged_configs() / "method").glob("*.yaml")}
    assert len(METHODS) == len(ROWS) > 25 and files <= told, files - told
