"""What the README shows is run, not trusted."""

import re
from pathlib import Path

from embodied_rl.config import build_recipe
from embodied_rl.train import run

README = Path(__file__).parents[2] / "README.md"


def test_the_env_in_one_file_learns(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1
    file = tmp_path / "walk.py"
    file.write_text(blocks[0], encoding="utf-8")
    recipe = build_recipe(
        {
            "name": "walk",
            "threads": 1,
            "env": {"type": str(file)},
            "policy": {"type": "mlp", "hidden": [32, 32], "init_std": 0.5},
            "algorithm": {"type": "ppo", "update": {"lr": 1e-3}},
            "collect": {"copies": 32, "decisions": 20},
            "train": {"env_steps": 20000},
            "evaluate": {"episodes": 50, "copies": 25},
            "log": {"folder": str(tmp_path / "runs"), "tensorboard": False, "progress": False},
        }
    )
    result = run(recipe).result
    assert result is not None and result.to_dict()["overall"]["success_at_end"]["rate"] >= 0.9
    assert (tmp_path / "runs" / "walk" / "report.html").stat().st_size > 10_000
