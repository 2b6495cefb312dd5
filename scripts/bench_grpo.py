"""GRPO on a language model beside TRL's GRPOTrainer: seconds per step, where they go, and memory.

    python scripts/bench_grpo.py              3 interleaved rounds of 3 steps (about 15 minutes on 2 cores)
    python scripts/bench_grpo.py --quick      one round of one step

One step is 8 questions x 8 samples of at most 32 new tokens at temperature 1, one pass over them, one optimizer step, no
reference model: "What is A + B? Answer with just the number." with two-digit numbers. Both sides ask questions of one kind of
SmolLM2-135M-Instruct (models/smollm2; see scripts/get_smollm2.py). A reply is paid by a hash of its text, so that every
group has contrast and no row can be left out, and the step size is so small that replies stay as long as they were.
TRL runs with micro-batches of 8, its best here, when it is installed (`pip install -e '.[trl]'`); otherwise only ours is
measured. Both are in float32; `--dtypes float32 bfloat16` adds bfloat16 weights where the CPU multiplies them. The first step warms up and does not count.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import zlib
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from _bench import Job, Parts, finish, machine, measure_all, median, parser, spread, table, worker_main

MODEL, LENGTH, LR = "models/smollm2", 32, 1e-9
PARTS = ("generation", "update", "rest")
TASK = '''
"""Sums whose replies are paid by a hash."""
import zlib
from embodied_rl.envs.text.tasks.arithmetic import Arithmetic, Config
class Paid(Arithmetic):
    """Two-digit sums."""
    def score(self, question, reply):
        """A number in [0, 1) that is different for every reply."""
        return zlib.crc32(reply.encode()) % 1000 / 1000
def build(config):
    """Make the task."""
    return Paid(config)
'''


def measure_ours(job: Job) -> dict[str, Any]:
    """Seconds per step of the recipe `arithmetic_grpo`."""
    from embodied_rl.config import load_recipe
    from embodied_rl.measure import Clock, memory_mib
    from embodied_rl.session import Session

    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "paid.py"
        task.write_text(TASK, encoding="utf-8")
        options = [
            f"env.tasks=[{task}]", f"env.max_reply={LENGTH}", f"env.model={MODEL}", f"policy.model={MODEL}",
            f"policy.dtype={job['dtype']}", f"algorithm.update.lr={LR}", f"threads={job['threads']}",
        ]  # fmt: skip
        s = Session.build(load_recipe("arithmetic_grpo", options).recipe)
        parts = Parts(PARTS)
        parts.watch(s.policy, "act", "generation")
        parts.watch(s.updater, "update", "update")
        s.iterate(Clock())
        parts.take()
        tokens, start = 0.0, perf_counter()
        for _ in range(job["steps"]):
            row = s.iterate(Clock()).reduce()
            tokens += row["rollout/reward_tokens_mean"] * s.recipe.collect.copies
        seconds = perf_counter() - start
        spent = parts.take()
        s.close()
    return _result(job, seconds, tokens, spent, memory_mib())


def questions(number: int) -> list[str]:
    """Questions drawn as the recipe draws them."""
    import torch

    from embodied_rl.config import load_recipe
    from embodied_rl.envs.text.tasks import build_task
    from embodied_rl.seeding import numpy_rng, start_seeds

    recipe = load_recipe("arithmetic_grpo", []).recipe
    task = build_task("arithmetic")
    seeds = start_seeds(recipe.seed, "train", torch.zeros(number), torch.arange(number)).tolist()
    return [task.draw(partial(numpy_rng, seed), False, recipe.env.heldout).text for seed in seeds]


def measure_trl(job: Job) -> dict[str, Any]:
    """Seconds per step of TRL."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from embodied_rl.measure import memory_mib

    torch.set_num_threads(job["threads"])
    lengths: list[int] = []

    def paid(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.append(sum(map(len, completion_ids)))
        return [zlib.crc32(c[0]["content"].encode()) % 1000 / 1000 for c in completions]

    parts, mark = Parts(PARTS), {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                parts.take(), lengths.clear()
                mark["start"] = perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == job["steps"] + 1:
                mark["stop"], mark["spent"] = perf_counter(), parts.take()

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, use_cpu=not torch.cuda.is_available(), per_device_train_batch_size=8, gradient_accumulation_steps=8,
            num_generations=8, max_completion_length=LENGTH, temperature=1.0, beta=0.0, num_iterations=1, learning_rate=LR,
            max_steps=job["steps"] + 1, report_to=[], save_strategy="no", logging_strategy="no", bf16=False, gradient_checkpointing=False,
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        asked = [{"prompt": [{"role": "user", "content": q}]} for q in questions(8 * (job["steps"] + 2))]
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=getattr(torch, job["dtype"]), local_files_only=True)
        trainer = GRPOTrainer(
            model=model, reward_funcs=paid, args=config, train_dataset=Dataset.from_list(asked), callbacks=[Watch()],
            processing_class=AutoTokenizer.from_pretrained(MODEL, local_files_only=True, padding_side="left"),
        )  # fmt: skip
        parts.watch(trainer, "_generate_and_score_completions", "generation")
        parts.watch(trainer, "training_step", "update")  # what generation spends inside it is not counted here
        trainer.train()
    return _result(job, mark["stop"] - mark["start"], float(sum(lengths)), mark["spent"], memory_mib())


def _result(job: Job, seconds: float, tokens: float, spent: dict[str, float], memory: float) -> dict[str, Any]:
    steps = job["steps"]
    return {
        "s_per_step": seconds / steps, **{part: spent[part] / steps for part in PARTS}, "tokens_per_step": tokens / steps,
        "tokens_per_s": tokens / seconds, "generated_per_s": tokens / spent["generation"], "memory_mib": memory,
    }  # fmt: skip


def measure(job: Job) -> dict[str, Any]:
    """One measurement in a process of its own."""
    return measure_ours(job) if job["side"] == "ours" else measure_trl(job)


def main() -> None:
    """Measure, print the table and the JSON line."""
    p = parser(__doc__)
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of torch (default all)")
    p.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"], help="default float32")
    args = p.parse_args()
    if not (Path(MODEL) / "config.json").exists():
        raise SystemExit(f"there is no {MODEL}: make it by `python scripts/get_smollm2.py`")
    sides = ["ours"]
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed: measuring ours only (pip install -e '.[trl]' to compare)")
    else:
        sides.append("trl")
    repeats, steps = args.repeats or (1 if args.quick else 3), 1 if args.quick else 3
    jobs = [{"side": side, "dtype": d, "threads": args.threads, "steps": steps} for side in sides for d in args.dtypes]
    results = measure_all(os.path.abspath(__file__), jobs, repeats, timeout=1800)
    keys = ["s_per_step", *PARTS, "tokens_per_step", "tokens_per_s", "generated_per_s", "memory_mib"]
    rows = [
        [f"{job['side']} {job['dtype']}", *(median(results[i], key) for key in keys), spread(results[i], "s_per_step")]
        for i, job in enumerate(jobs)
    ]
    print(machine())
    print(table(["", "s/step", *PARTS, "tokens/step", "tokens/s", "generated/s", "peak MiB", "spread"], rows))
    seconds = {side: [r[1] for r, job in zip(rows, jobs, strict=True) if job["side"] == side and r[1]] for side in sides}
    ratio = min(seconds["trl"]) / min(seconds["ours"]) if len(sides) == 2 and all(seconds.values()) else None
    if ratio is not None:
        print(f"TRL's best takes {ratio:.2f} times as long as our best")
    finish({"ratio": ratio, "rows": {r[0]: dict(zip(keys, r[1:], strict=False)) for r in rows}})


if __name__ == "__main__":
    worker_main(measure)
    main()
