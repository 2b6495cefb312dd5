"""Runs that are stopped and resumed: recipes that between them use every part that has a state, and what is compared."""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import torch

from embodied_rl import checkpoint
from embodied_rl.cli import main
from embodied_rl.config import build_recipe, dump_recipe, load_component
from embodied_rl.metrics import deterministic
from embodied_rl.recipe import Recipe
from embodied_rl.record_demos import collect_demonstrations
from embodied_rl.runfolder import open_run
from embodied_rl.train import StopRequest, _restore, build_session, train
from embodied_rl.writers import JsonlWriter, Writers, read_rows

TOYS = Path(__file__).resolve().parents[1] / "toys"
POINT = {"type": str(TOYS / "point.py"), "max_steps": 7}

BASE: dict[str, Any] = {
    "name": "run", "threads": 1, "env": POINT, "policy": {"type": "mlp", "hidden": [16, 16], "word_dim": 4},
    "algorithm": {"type": "ppo", "update": {"epochs": 2, "minibatches": 2}},
    "collect": {"copies": 8, "decisions": 10},
    "evaluate": {"episodes": 6, "episodes_during": 6, "copies": 4, "videos": 0},
    "checkpoint": {"every": 1}, "log": {"tensorboard": False, "progress": False},
}  # fmt: skip

RECIPES: dict[str, dict[str, Any]] = {
    "stream": {
        "algorithm": {"credit": {"reward_scale": "running_return_std"}, "update": {"lr_schedule": "linear", "weight_decay": 0.01}},
        "evaluate": {"every": 3, "greedy": False},
    },
    "two parts": {
        "policy": {"std": "state", "squash": True, "critic": {"share": "nothing"}},
        "algorithm": {
            "loss": {"value": {"kind": "clipped"}, "dual_clip": 3.0, "entropy_coef": 0.01},
            "update": {"lr_schedule": "adaptive_kl", "target_kl": 0.01, "micro_batch": 13},
        },
        "collect": {"pipeline": 2},
    },
    "groups": {
        "env": {"end_on_success": True, "reward": "sparse"},
        "policy": {"critic": {"kind": "none"}},
        "algorithm": {"type": "grpo", "loss": {"kl": {"coef": 0.1}}, "update": {"epochs": 2, "minibatches": 2, "target_kl": 0.02}},
        "collect": {"mode": "episodes", "group_size": 4},
        "evaluate": {"every": 2},
    },
    "sampled groups": {
        "env": {"end_on_success": True, "reward": "sparse"},
        "policy": {"critic": {"kind": "none"}, "init_std": 2.0},
        "algorithm": {"type": "grpo", "credit": {"reward_scale": "running_return_std"}},
        "collect": {"mode": "episodes", "group_size": 4, "dynamic_sampling": "refill", "curriculum": {"kind": "success", "window": 20}},
        "train": {"env_steps": 1500},
    },
    "chunks": {
        "policy": {"chunk": 3, "critic": {"kind": "hl_gauss", "low": -5.0, "high": 5.0}},
        "algorithm": {"credit": {"mask_after_success": True}, "loss": {"ratio": "action", "value": {"kind": "hl_gauss"}}},
    },
    "discrete": {
        "env": {"type": str(TOYS / "two_state.py"), "max_steps": 4},
        "policy": {"type": str(TOYS / "tilted.py"), "hidden": [16, 16]},
        "algorithm": {"type": "reinforce", "update": {"logp_gap": {"do": "correct", "cap": 1.1}}},
        "collect": {"mode": "episodes"},
    },
    "units": {
        "env": {"type": str(TOYS / "words.py"), "turns": 2, "partial": True},
        "policy": {"type": str(TOYS / "table.py"), "critic": "unit", "spread": 0.3},
        "algorithm": {
            "credit": {"level": "unit", "gamma": 1.0},
            "loss": {"ratio": "unit", "kl": {"kind": "k1", "coef": 0.1, "where": "reward", "reset_every": 2}},
        },
        "collect": {"mode": "episodes", "decisions": 2},
    },
    "greedy baseline": {
        "env": {"type": str(TOYS / "words.py"), "turns": 2},
        "policy": {"type": str(TOYS / "table.py"), "spread": 0.3},
        "algorithm": {"type": "reinforce", "credit": {"baseline": "greedy", "whiten": False}},
        "collect": {"mode": "episodes", "decisions": 2, "group_size": 4},
    },
    "hints": {
        "env": {"type": str(TOYS / "words.py")},
        "policy": {"type": str(TOYS / "table.py"), "spread": 0.3},
        "algorithm": {"type": "grpo"},
        "collect": {"mode": "episodes", "decisions": 1, "group_size": 4, "hints": [0.3, 0.7], "dynamic_sampling": "drop"},
    },
    "budget": {
        "env": {"type": str(TOYS / "words.py")},
        "policy": {"type": str(TOYS / "table.py"), "spread": 0.5},
        "algorithm": {"type": "grpo"},
        "collect": {
            "mode": "episodes", "decisions": 1, "copies": 16, "group_size": 4, "budget": {"high": 8},
            "curriculum": {"kind": "success", "starts": 6, "window": 4}, "hints": [0.5],
        },
    },
    "replay and demonstrations": {
        "env": {"type": str(TOYS / "words.py")},
        "policy": {"type": str(TOYS / "table.py"), "spread": 0.5},
        "algorithm": {
            "type": "grpo", "update": {"epochs": 1, "minibatches": 2},
            "replay": {"coef": 0.5, "rows": 6, "episodes": 5, "recent": 20, "ramp": 6}, "guide": {"kind": "importance", "coef": 0.1},
        },
        "collect": {"mode": "episodes", "decisions": 1, "group_size": 4},
    },
    "pendulum": {
        "env": {"type": "gymnasium", "id": "Pendulum-v1", "max_steps": 23},
        "algorithm": {"credit": {"reward_scale": "running_return_std"}},
        "collect": {"copies": 3, "decisions": 15, "pipeline": 3},
        "evaluate": {"every": 4, "episodes_during": 3, "copies": 2},
    },
    "cheetah": {
        "env": {"type": "gymnasium", "id": "HalfCheetah-v5", "max_steps": 23},
        "collect": {"copies": 2, "decisions": 10},
    },
    "tabletop": {
        "env": {"type": "tabletop", "tasks": ["reach", "lift", "open"], "max_steps": 11, "threads": 2},
        "algorithm": {"credit": {"reward_scale": "running_return_std"}},
        "collect": {"copies": 6, "decisions": 8, "pipeline": 2},
        "evaluate": {"every": 4, "episodes_during": 3, "copies": 3},
    },
    "potential": {
        "env": {"end_on_success": True, "reward": "sparse"},
        "reward": {"type": "self_referential", "use": "potential", "memory": 3, "neighbours": 1, "entries": ["position"]},
    },
    "outcome": {
        "env": {"end_on_success": True, "reward": "sparse"},
        "policy": {"chunk": 2, "critic": {"kind": "none"}},
        "algorithm": {"type": "reinforce"},
        "collect": {"mode": "episodes", "decisions": 4},
        "reward": {"type": "self_referential", "embed": "trajectory"},
    },
    "own successes": {
        "env": {"type": "target", "tolerance": 0.9, "max_steps": 6},
        "policy": {"type": "tiny_vla_flow", "width": 16, "heads": 2, "layers": 1, "channels": 8, "glances": 2, "chunk": 2},
        "algorithm": {"self_imitation": {"coef": 1.0, "rows": 16, "keep": 24}, "update": {"critic_lr": 3e-3, "epochs": 1, "minibatches": 2}},
        "collect": {"copies": 8, "decisions": 4},
    },
    "hindsight": {
        "env": {"type": "tabletop", "tasks": ["reach"], "observation": "pictures", "cameras": ["table"], "picture_size": 16,
                "reward": "sparse", "end_on_success": True, "max_steps": 8, "threads": 1},
        "policy": {"type": "tiny_vla_tokens", "width": 16, "heads": 2, "layers": 1, "channels": 8, "glances": 2, "chunk": 2, "draws": 3},
        "algorithm": {"self_imitation": {"coef": 1.0, "rows": 16, "keep": 24, "hindsight": True}, "update": {"epochs": 1, "minibatches": 2}},
        "collect": {"copies": 4, "decisions": 3},
    },
    "own successes, seen": {
        "env": {"type": "target", "tolerance": 0.9, "max_steps": 6},
        "policy": {"type": "tiny_vla_tokens", "width": 16, "heads": 2, "layers": 1, "channels": 8, "glances": 2, "chunk": 2},
        "algorithm": {
            "self_imitation": {"coef": 1.0, "rows": 16, "learns": "foresight"}, "update": {"epochs": 1, "minibatches": 2},
        },
        "collect": {"copies": 8, "decisions": 4},
    },
    "tokens": {
        "env": {"type": "target", "tolerance": 0.9, "max_steps": 6},
        "policy": {
            "type": "tiny_vla_tokens", "width": 16, "heads": 2, "layers": 1, "channels": 8, "glances": 2, "chunk": 2, "bins": 8,
            "decoding": "autoregressive", "critic": {"kind": "hl_gauss"},
        },
        "algorithm": {"loss": {"ratio": "action", "value": {"kind": "hl_gauss"}}, "update": {"epochs": 1, "minibatches": 2}},
        "collect": {"copies": 8, "decisions": 4},
    },
    "insight": {
        "env": {"type": str(TOYS / "whispered.py"), "tolerance": 0.9, "max_steps": 6},
        "policy": {
            "type": "tiny_vla_tokens", "width": 16, "heads": 2, "layers": 1, "channels": 8, "glances": 2, "chunk": 2,
            "critic": {"reads": "privileged", "insight": 1.0},
        },
        "algorithm": {
            "update": {"critic_lr": 3e-3, "epochs": 1, "minibatches": 2, "muon": {"lr": 2e-3, "only": ["eyes"]}},
        },
        "collect": {"copies": 8, "decisions": 4},
    },
    "imitation": {
        "policy": {"type": "tiny_vla_flow", "width": 16, "heads": 2, "layers": 1, "channels": 8, "glances": 2, "chunk": 2},
        # The last update is shorter than the others.
        "algorithm": {
            "type": "sft", "steps": 29, "steps_per_update": 3, "batch_size": 16, "warmup": 2, "muon": {"lr": 0.01},
            "augment": {"brightness": 0.4, "contrast": 0.3, "colour": 0.1},
        },
        "evaluate": {"every": 4},
    },
}  # fmt: skip
UPDATES = 10

SEEN = '''
"""The point of shown.py as a small VLA policy can see it: the goals as one vector, 8 x 8 pixels."""
from dataclasses import replace
import torch
from embodied_rl import registry
from embodied_rl.types import TensorSpec
shown = registry.load("env", r"{shown}")
class Config(shown.Config):
    """Settings."""
    tilt: bool = False
    """Shows one entry more."""
class Seen(shown.Shown):
    def __init__(self, config, num_envs, device):
        super().__init__(config, num_envs, device)
        own = {{"goals": TensorSpec((4,))}}
        if config.pictures:
            own["camera"] = TensorSpec((8, 8, 3), torch.uint8, low=0, high=255)
        if config.tilt:
            own["tilt"] = TensorSpec((1,))
        self.spec = replace(self.spec, observation=self.spec.observation | own)
    def _see(self):
        obs = super()._see()
        obs["goals"] = obs["goals"][..., :2].flatten(1)
        if self.config.pictures:
            obs["camera"] = torch.nn.functional.pad(obs["camera"], (0, 0, 0, 0, 1, 1))
        if self.config.tilt:
            obs["tilt"] = obs["position"][:, :1]
        return obs
def build(config, *, num_envs, device, split, seed):
    return Seen(config, num_envs, device)
'''


@cache
def seen(episodes: int = 40) -> tuple[str, str]:
    """The env SEEN as a file, and demonstrations of it; made once, gone with the process."""
    folder = Path(tempfile.mkdtemp(prefix="embodied_rl_tests_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "seen.py").write_text(SEEN.format(shown=TOYS / "shown.py"))
    env = load_component("env", str(folder / "seen.py"), [])
    collect_demonstrations(env, folder / "demos", episodes)
    return str(folder / "seen.py"), str(folder / "demos")


def lay(below: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Top over below; a section whose type changes replaces the old one."""
    out = dict(below)
    for key, value in top.items():
        old = out.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        out[key] = lay(old, value) if both and value.get("type", old.get("type")) == old.get("type") else value
    return out


def recipe(name: str = "", updates: int = UPDATES, **changes: Any) -> Recipe:
    """A recipe of the table that makes about `updates` updates, with changes laid over it; "imitation" has its own steps."""
    data = lay(BASE, RECIPES[name] if name else {})
    if name == "imitation":
        env, demonstrations = seen()
        del data["collect"]  # it makes no rollouts, and its length is in optimizer steps
        data = lay(data, {"env": {"type": env}, "algorithm": {"demonstrations": demonstrations}})
        return build_recipe(lay(data, changes))
    data = lay(data, changes)
    steps = data["collect"]["copies"] * data["collect"]["decisions"] * data["policy"].get("chunk", 1) * updates
    return build_recipe(lay({"train": {"env_steps": steps}}, data))


# ---- in this process ------------------------------------------------------------------------------------------------


class Tape:
    """A writer that keeps the rows and asks the run to stop after some update."""

    def __init__(self, stop: StopRequest, last: int) -> None:
        self.stop, self.last, self.rows = stop, last, []

    def write(self, row: dict[str, float]) -> None:
        self.rows.append(deterministic(row))
        if row["progress/update"] == self.last:
            self.stop.signal = signal.SIGTERM

    def flush(self) -> None: ...
    def close(self) -> None: ...


def go(wanted: Recipe, path: Path, *, until: int = -1, resume: bool = False) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Train in this process, until an update (as if by SIGTERM) or the end: rows, and the state at the end."""
    session = build_session(wanted)
    folder = open_run(path, resume=resume)
    try:
        if resume:
            _restore(folder, session)
        stop = StopRequest()
        tape, file = Tape(stop, until), JsonlWriter(folder.metrics)
        file.truncate_after(session.update)
        with closing(Writers([tape, file], check=True)) as writers:
            train(session, folder, writers, stop)
        return tape.rows, state_of(folder.checkpoints)
    finally:
        folder.release()
        session.close()


# ---- in a process that can be killed --------------------------------------------------------------------------------


def start(argv: list[str], log: Path) -> multiprocessing.process.BaseProcess:
    """`embodied-rl ARGV` in a process of its own, forked from one that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.resume.lab", "embodied_rl.report", "embodied_rl.envs.tabletop", "embodied_rl.envs.gymnasium"])
    process = context.Process(target=_child, args=(argv, str(log)))
    process.start()
    return process


def _child(argv: list[str], log: str) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    code = main(argv)
    sys.stdout.flush()
    sys.exit(code)


def wait_for(condition: Any, process: Any, seconds: float = 120.0) -> bool:
    """Whether the condition became true while the process lived."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        if not process.is_alive():
            return bool(condition())
        time.sleep(0.003)
    raise AssertionError(f"nothing happened in {seconds} s")


def count_rows(run: Path) -> int:
    """Lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def train_with_kills(wanted: Recipe, folder: Path, kills: int, seed: int) -> int:
    """Train through the command line, killed with -9 at random moments and resumed; returns the kills that hit."""
    dice, hit, run, log = random.Random(seed), 0, folder / wanted.name, folder / "log.txt"
    recipe_file = write(wanted, folder)
    for left in range(kills, -1, -1):
        argv = ["train", str(recipe_file)] + (["--resume"] if run.exists() else [])
        process = start(argv, log)
        if left:
            target = count_rows(run) + dice.randint(-1, 2)
            wait_for(lambda target=target: count_rows(run) >= target, process)
            time.sleep(dice.uniform(0, 0.08))
            hit += process.is_alive()
            process.kill()
        process.join()
        if process.exitcode == 0:
            return hit
        assert process.exitcode == -signal.SIGKILL, log.read_text()
    raise AssertionError(log.read_text())


def write(wanted: Recipe, folder: Path) -> Path:
    """The recipe as a file whose run lands in `folder`."""
    path = folder / "recipe.yaml"
    folder.mkdir(exist_ok=True)
    path.write_text(dump_recipe(wanted.model_copy(update={"log": wanted.log.model_copy(update={"folder": str(folder)})})))
    return path


# ---- what is compared -----------------------------------------------------------------------------------------------


def rows_of(run: Path) -> list[dict[str, float]]:
    """The deterministic part of metrics.jsonl."""
    return [deterministic(row) for row in read_rows(run / "metrics.jsonl")]


def state_of(checkpoints: Path) -> dict[str, Any]:
    """The newest checkpoint without the clock."""
    newest = checkpoint.latest(checkpoints)
    assert newest is not None
    state = checkpoint.load(newest)
    del state["counters"]["wall_s"]
    return state


def differing(a: Any, b: Any, place: str = "") -> list[str]:
    """Places at which two states differ in any bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in sorted(a.keys() | b.keys(), key=str) for d in differing(a.get(k), b.get(k), f"{place}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differing(x, y, f"{place}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        equal = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    else:
        equal = type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))
    return [] if equal else [place]
