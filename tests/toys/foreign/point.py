"""A point on a line that should come to rest at a goal: a foreign simulator that misbehaves when its settings say so."""

import importlib.util
import os
import signal
import sys
import time

import numpy as np

assert "torch" not in sys.modules and "pydantic" not in sys.modules
print("a banner on standard output")
GOALS = ("left", "right")


class Simulator:
    spec = {
        "observation": {
            "state": {"shape": [2], "low": -10, "high": 10, "meaning": "position, velocity"},
            "picture": {"shape": [4, 4, 3], "dtype": "uint8", "low": 0, "high": 255},
            "word": {"shape": [1], "dtype": "int64", "low": 0, "high": 1, "constant": True},
        },
        "action": {"kind": "continuous", "size": 1, "names": ["push"]},
        "tasks": list(GOALS),
        "max_steps": 20,
        "success": True,
        "cameras": ["side"],
        "metrics": ["distance"],
        "control_hz": 10.0,
    }

    def __init__(self, settings):
        self.trouble = settings.get("trouble", {})
        if "refuse" in self.trouble:
            sys.exit(self.trouble["refuse"])
        if "crash" in self.trouble:
            raise RuntimeError("no licence")
        if "slow" in self.trouble:
            time.sleep(self.trouble["slow"])
        if settings.get("bare"):
            assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("pydantic") is None
        if "uneven" in self.trouble:
            self.spec = {**self.spec, "max_steps": os.getpid()}
        if settings.get("speaks"):
            self.spec = {**self.spec, "words": 4, "sentences": ["go left", "go right"]}
        if settings.get("on_demand"):
            self.spec = {**self.spec, "on_demand": True}
        if "dice" in self.trouble:
            self.dice = np.random.default_rng()
        self.looks = 0

    def reset(self, seed, task):
        rng = np.random.default_rng(seed)
        self.seed, self.task, self.t = seed, task, 0
        self.x, self.v = rng.uniform(-1, 1), 0.0
        self.misbehave("reset")
        return self.observe()

    def observe(self):
        self.looks += 1
        noise = self.dice.uniform() if "dice" in self.trouble else 0.0
        return {
            "state": np.array([self.x + noise, self.v]),
            "picture": np.full((4, 4, 3), int(100 + 10 * np.nan_to_num(self.x))),
            "word": [self.task],
        }

    def step(self, action):
        print("chatter", end="", flush=True)
        self.t += 1
        self.v += 0.1 * float(action[0])
        self.x += self.v
        self.misbehave("step")
        distance = abs(self.x - (2 * self.task - 1))
        obs = None if self.spec.get("on_demand") and np.isfinite(self.x) else self.observe()
        return obs, -distance, abs(self.x) > 5, False, {"success": distance < 0.1, "distance": distance}

    def misbehave(self, when):
        """The settings say what happens, at which step, in episodes of which seed; a flag file makes it happen once."""
        trouble = self.trouble
        if trouble.get("when", "step") != when or trouble.get("at", 1) != self.t + (when == "reset"):
            return
        if "seed" in trouble and trouble["seed"] != self.seed:
            return
        once = trouble.get("once")
        if once:
            try:
                open(once, "x").close()  # in one go: two processes may come here at the same time
            except FileExistsError:
                return
        what = trouble.get("what")
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "leave":
            os._exit(3)
        elif what == "hang":
            time.sleep(1000)
        elif what == "nan":
            self.x = float("nan")
        elif what == "raise":
            raise ValueError("joint 3 is on fire")
        elif what == "ask":
            input("which licence? ")

    def render(self, camera, height, width):
        return np.full((height, width, 3), int(100 + 10 * self.x), np.uint8)

    def instruction(self):
        return f"go {GOALS[self.task]}"
