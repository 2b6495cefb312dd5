"""docs/simulators.md: its example is a file and a recipe that run."""

import json
import re
from pathlib import Path

from embodied_rl.check import check_env
from embodied_rl.cli import main
from embodied_rl.config import load_component
from embodied_rl.envs.isolated import worker

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "simulators.md").read_text()


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def test_the_example_trains_and_is_filmed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cart.py").write_text(blocks("python")[1])
    (tmp_path / "cart.yaml").write_text(blocks("yaml")[1])
    assert main(["train", "cart.yaml", "log.progress=false"]) == 0
    summary = json.loads((tmp_path / "runs" / "cart" / "summary.json").read_text())
    assert summary
    assert list((tmp_path / "runs" / "cart" / "videos").rglob("*"))


def test_the_vector_env_of_ones_own_keeps_the_contract_and_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "drift.py").write_text(blocks("python")[0])
    (tmp_path / "drift.yaml").write_text(blocks("yaml")[0])
    found = check_env("gymnasium", ["id=drift:Drift-v0", "vectorization_mode=vector_entry_point"], steps=41)
    assert [f for f in found if f.ok is False] == []
    skipped = [f.detail for f in found if f.ok is None]
    assert skipped == ["no entry is marked constant"], "it is seedable, and has state"
    assert main(["train", "drift.yaml", "log.progress=false"]) == 0
    assert json.loads((tmp_path / "runs" / "drift" / "summary.json").read_text())["env_steps"] == 160


def test_every_key_of_a_spec_is_explained_and_no_other():
    table = set(re.findall(r"^\| `(\w+)` \|", PAGE.split("What `spec` may say")[1].split("\n## ")[0], re.MULTILINE))
    filled = worker.complete({"observation": {"x": {"shape": [1]}}, "action": {"kind": "discrete", "size": 2}})
    assert table == filled.keys()


def test_the_libero_section_loads():
    env = blocks("yaml")[2].removeprefix("env: {").rstrip().removesuffix("}")
    settings = [part.strip().replace(": ", "=", 1) for part in re.split(r", (?=\w+: )", env) if not part.startswith("type")]
    config = load_component("env", "libero", settings)
    assert config.tasks == ("libero_spatial", "libero_goal/put_the_bowl_on_the_plate") and config.protocol == "openvla-oft"
    # tests/sim/test_libero.py plays it.
    (elsewhere,) = re.findall(r"^embodied-rl evaluate runs/a env\.(\S+) --episodes 500", PAGE, re.MULTILINE)
    assert load_component("env", "libero", [elsewhere]).departures() == ""


def test_every_protocol_is_named():
    from embodied_rl.envs.libero import PROTOCOLS

    assert all(name in PAGE for name in PROTOCOLS)
