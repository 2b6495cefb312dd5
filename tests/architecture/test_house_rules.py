"""The rules that keep the house readable, checked on the source itself."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from embodied_rl import registry
from embodied_rl.config import dump_recipe, load_recipe, load_resolved, packaged_configs, recipe_names

ROOT = Path(__file__).resolve().parents[2]
ENGINE = sorted((ROOT / "embodied_rl").rglob("*.py"))
PLUGINS = sorted([*(ROOT / "envs").rglob("*.py"), *(ROOT / "policies").rglob("*.py")])
SOURCES = ENGINE + PLUGINS
LONGEST_FILE = 450
LONGEST_FUNCTION = 80
LONGEST_LOOP = 100


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, at any depth of the code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: write imports in full"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def functions(path: Path) -> list[tuple[str, int]]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [(n.name, n.end_lineno - n.lineno + 1) for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_there_is_something_to_check():
    assert len(ENGINE) > 20
    assert {"tabletop", "gymnasium", "envpool"} <= set(registry.names("env"))


@pytest.mark.parametrize("path", ENGINE, ids=relative)
def test_the_engine_never_imports_an_env_or_a_policy(path):
    wrong = {name for name in imports(path) if re.match(r"(embodied_rl\.)?(envs|policies)\b", name)}
    assert not wrong, f"{relative(path)} imports {wrong}; go through embodied_rl.registry"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_imports_scripts_or_tests(path):
    assert not {name for name in imports(path) if re.match(r"(scripts|tests)\b", name)}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_room_is_one_page(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST_FILE, f"{relative(path)} has {lines} lines; split it by what its parts are for"
    long = [f"{name} ({length} lines)" for name, length in functions(path) if length > LONGEST_FUNCTION]
    assert not long, f"{relative(path)}: {', '.join(long)}: longer than {LONGEST_FUNCTION} lines"


def test_the_training_loop_reads_like_the_algorithm():
    assert dict(functions(ROOT / "embodied_rl" / "train.py"))["train"] < LONGEST_LOOP


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_is_pickled(path):
    text = path.read_text()
    found = [w for w in ("torch.load(", "torch.save(", "np.load(", "numpy.load(", "joblib") if w in text]
    assert not found, f"{relative(path)} uses {found}: reading a file must run no code; use embodied_rl.checkpoint"
    assert not {n for n in imports(path) if n.split(".")[0] in ("pickle", "cloudpickle", "dill", "shelve", "marshal")}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_setting_never_comes_from_the_environment_or_the_command_line(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ClassDef) or not any(ast.unparse(b).endswith(("Section", "Config")) for b in node.bases):
            continue
        text = ast.unparse(node)
        assert not re.search(r"os\.environ|getenv|sys\.argv|open\(|read_text", text), f"{relative(path)}: {node.name}"


@pytest.mark.parametrize("folder", ["envs", "policies"])
def test_a_bare_import_says_how_to_import(folder):
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: this folder is installed as 'embodied_rl.{folder}': run `pip install -e .` in the repository and "
        f"write `from embodied_rl.{folder} import ...` instead of `import {folder}`"
    )


def test_every_package_folder_is_shipped():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"embodied_rl.configs"}
    for init in [p for p in SOURCES if p.name == "__init__.py"]:
        parts = init.parent.relative_to(ROOT).parts
        found.add(".".join(parts if parts[0] == "embodied_rl" else ("embodied_rl", *parts)))
    assert listed == found


def test_every_extra_that_is_advised_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(registry.EXTRAS.values()) <= set(extras)


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    pins = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    names = {re.match(r"[\w.-]+", r)[0].lower().replace("_", "-") for r in wanted}
    assert names <= pins, f"constraints.txt pins no {names - pins}"


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_loads_and_survives_the_run_folder(name, tmp_path):
    recipe = load_recipe(name).recipe
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_resolved(tmp_path / "recipe.yaml").recipe == recipe


PARTS = sorted(packaged_configs().glob("*/*.yaml"))


@pytest.mark.parametrize("part", PARTS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_part_fits_under_a_recipe(part, tmp_path):
    base = "[env/tabletop.yaml, policy/mlp.yaml, algorithm/ppo.yaml, {}]"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: {base.format(part.relative_to(packaged_configs()))}\n")
    resolved = load_recipe(recipe)
    assert any(part.name in source for source in resolved.sources.values()), "the part sets nothing"


def test_there_are_recipes_and_parts():
    assert "tabletop_demo" in recipe_names()
    assert {part.parent.name for part in PARTS} == {"env", "policy", "algorithm", "method"}


def test_generated_pages_are_current():
    done = subprocess.run([sys.executable, "scripts/generate_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_method_files_are_short():
    for name in registry.names("algorithm"):
        lines = (ROOT / "embodied_rl" / "algorithms" / f"{name}.py").read_text().splitlines()
        assert len(lines) <= 80, f"algorithms/{name}.py: a method is a choice of blocks, not {len(lines)} lines of its own"
