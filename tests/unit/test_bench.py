"""What the benchmarks compute with: time by part, medians, spreads."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from embodied_rl.config import load_recipe

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    """scripts/_bench.py with a clock that a test moves."""
    spec = importlib.util.spec_from_file_location("_bench", SCRIPTS / "_bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.now = 0.0
    monkeypatch.setattr(module, "perf_counter", lambda: module.now)
    return module


def test_time_in_a_nested_part_does_not_count_for_the_outer_one(bench):
    class Env:
        def observe(self):
            bench.now += 4

        def reset(self, wrong=False):
            bench.now += 1
            self.observe()
            if wrong:
                raise ValueError
            bench.now += 2

    env, parts = Env(), bench.Parts(("camera", "reset", "rest"))
    parts.watch(env, "observe", "camera"), parts.watch(env, "reset", "reset")
    bench.now += 10
    env.reset()
    assert parts.take() == {"camera": 4, "reset": 3, "rest": 10}
    with pytest.raises(ValueError):
        env.reset(wrong=True)
    bench.now += 5
    assert parts.take() == {"camera": 4, "reset": 1, "rest": 5}, "a part that fails has ended all the same"


def test_what_a_device_still_does_belongs_to_the_part_that_asked_for_it(bench):
    class Policy:
        def act(self):
            self.owed = 3

    def wait():
        bench.now += policy.owed
        policy.owed = 0

    policy = Policy()
    policy.owed = 0
    parts = bench.Parts(("inference", "rest"), wait)
    parts.watch(policy, "act", "inference")
    policy.act()
    assert parts.take() == {"inference": 3, "rest": 0}


def test_a_measurement_that_failed_is_left_out_and_none_is_no_number(bench):
    results = [{"ms": 4.0}, {"ms": None}, {"ms": 2.0}, {"ms": 6.0}]
    assert bench.median(results, "ms") == 4.0
    assert bench.spread(results, "ms") == 1.0
    assert bench.median([], "ms") is None and bench.spread([], "ms") == 0.0


@pytest.mark.parametrize("wrong", [None, "raise RuntimeError('the peer broke')", "print('nothing that is a result'); import os; os._exit(0)"])
def test_a_script_one_of_whose_measurements_failed_prints_the_rest_and_exits_with_a_code(tmp_path, wrong):
    script = tmp_path / "bench_it.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
from _bench import finish, measure_all, median, worker_main

def measure(job):
    if job["env"] == "peer":
        {wrong or "pass"}
    return {{"steps_per_s": 3.0}}

worker_main(measure)
jobs = [{{"env": env}} for env in ("peer", "ours")]
found = measure_all(__file__, jobs, 2)
finish({{job["env"]: median(found[i], "steps_per_s") for i, job in enumerate(jobs)}})
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout.splitlines()[-1]) == {"peer": None if wrong else 3.0, "ours": 3.0}
    assert done.returncode == (1 if wrong else 0)
    assert ("2 of the measurements failed" in done.stderr) == bool(wrong)
    assert ("the peer broke" in done.stderr) == ("broke" in (wrong or ""))


@pytest.mark.parametrize("kind", ["isolated", "gymnasium_async"])
def test_a_step_behind_a_process_is_measured_beside_one_in_this_process(monkeypatch, kind):
    monkeypatch.syspath_prepend(SCRIPTS)
    spec = importlib.util.spec_from_file_location("bench_isolation", SCRIPTS / "bench_isolation.py")
    isolation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(isolation)
    monkeypatch.setattr(isolation, "clock", lambda step, steps: ([step() for _ in range(steps)], (3e-6 * steps, 2e-6 * steps))[1])
    monkeypatch.setattr(isolation, "direct", lambda job, steps: (1e-6, 1e-6))
    job = {"kind": kind, "copies": 2, "workers": 1, "shape": [10], "dtype": "float32", "steps": 5}
    assert isolation.measure(job) == {"overhead_us": pytest.approx(14), "quiet_us": pytest.approx(9)}


@pytest.fixture
def vla(monkeypatch):
    """scripts/bench_vla.py."""
    monkeypatch.syspath_prepend(SCRIPTS)
    spec = importlib.util.spec_from_file_location("bench_vla", SCRIPTS / "bench_vla.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_distant_simulator_serves_one_part_after_the_other(bench, vla, monkeypatch):
    waited = []
    monkeypatch.setattr(vla, "perf_counter", lambda: bench.now)
    monkeypatch.setattr(vla, "sleep", waited.append)
    server, bench.now = vla.Server(), 100.0
    server.serve(3.0), server.serve(2.0)
    bench.now = 104.0
    server.serve(1.0)
    bench.now = 110.0
    server.serve(4.0)
    assert waited == [3.0, 5.0, 2.0, 4.0], "behind what was asked for earlier, and at once when there is nothing left to do"


@pytest.mark.parametrize("policy, name", [("tiny_vla_flow", "tabletop_vla"), ("tiny_vla_tokens", "tabletop_vla_tokens")])
def test_a_policy_is_measured_with_the_settings_of_its_own_recipe(vla, policy, name):
    built = vla.recipe({"policy": policy, "device": "cpu", "threads": 1, "copies": 8, "decisions": 2})
    packaged = load_recipe(name).recipe
    assert built.policy == packaged.policy and built.policy.type == policy
    assert built.algorithm == packaged.algorithm and built.env.privileged == packaged.env.privileged
    assert built.start_from is None and built.collect.copies == 8


@pytest.mark.parametrize("goals", ["one place", "anywhere"])
@pytest.mark.parametrize("method", ["GRPO", "PPO"])
def test_every_case_of_the_progress_rewards_is_trained_and_evaluated(monkeypatch, goals, method):
    monkeypatch.syspath_prepend(SCRIPTS)
    spec = importlib.util.spec_from_file_location("bench_rewards", SCRIPTS / "bench_rewards.py")
    rewards = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rewards)
    for case in [reward for name, reward in rewards.CASES if name == method]:
        rates = rewards.measure({"goals": goals, "method": method, "reward": case, "seed": 1, "updates": 1})
        assert set(rates) == set(rewards.RATES) and all(0 <= rate <= 1 for rate in rates.values())
