"""The package as others install it: everything it needs is inside."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOOK = """
import embodied_rl
from embodied_rl import registry
from embodied_rl.config import load_recipe, packaged_configs
print(embodied_rl.__file__)
print(packaged_configs())
print(load_recipe("tabletop_demo").recipe.env.type)
print(*registry.names("env"), *registry.names("policy"))
"""


def test_an_installed_wheel_brings_envs_policies_and_configs(tmp_path):
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("embodied_rl", "envs", "policies", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(target)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    file, configs, env, names = done.stdout.splitlines()
    assert Path(file).is_relative_to(target)
    assert Path(configs) == target / "embodied_rl" / "configs"
    assert env == "tabletop"
    assert names.split() == [p.removesuffix(".py") for folder in ("envs", "policies") for p in sorted(os.listdir(ROOT / folder)) if not p.startswith("_")]
