"""docs/simulators.md: its example is a file and a recipe that run."""

import json
import re
from pathlib import Path

from embodied_rl.cli import main
from embodied_rl.config import load_component
from embodied_rl.envs.isolated import worker

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "simulators.md").read_text()


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def test_the_example_trains_and_is_filmed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cart.py").write_text(blocks("python")[0])
    (tmp_path / "cart.yaml").write_text(blocks("yaml")[0])
    assert main(["train", "cart.yaml", "log.progress=false"]) == 0
    summary = json.loads((tmp_path / "runs" / "cart" / "summary.json").read_text())
    assert summary
    assert list((tmp_path / "runs" / "cart" / "videos").rglob("*"))


def test_every_key_of_a_spec_is_explained_and_no_other():
    table = set(re.findall(r"^\| `(\w+)` \|", PAGE.split("What `spec` may say")[1].split("## LIBERO")[0], re.MULTILINE))
    filled = worker.complete({"observation": {"x": {"shape": [1]}}, "action": {"kind": "discrete", "size": 2}})
    assert table == filled.keys()


def test_the_libero_section_loads():
    env = blocks("yaml")[1].removeprefix("env: {").rstrip().removesuffix("}")
    settings = [part.strip().replace(": ", "=", 1) for part in re.split(r", (?=\w+: )", env) if not part.startswith("type")]
    config = load_component("env", "libero", settings)
    assert config.tasks == ("libero_spatial", "libero_goal/put_the_bowl_on_the_plate") and config.protocol == "openvla-oft"


def test_every_protocol_is_named():
    from embodied_rl.envs.libero import PROTOCOLS

    assert all(name in PAGE for name in PROTOCOLS)
