"""Runs inside the Python that has vLLM and nothing of ours: takes weights and contexts, gives tokens.

One JSON object per line, in and out. Weights come as a safetensors file. Started by vllm_client.py with `python FILE`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

OUT_OF_MEMORY = (
    "out of memory", "outofmemory", "not enough memory", "can't allocate memory", "memoryerror",
    "memory utilization", "available memory",
)  # fmt: skip
"""How torch and Python say it, on a GPU and on a CPU, and vLLM when it reserves what it may use."""


def main() -> None:
    """Answer requests until the input ends."""
    # Python puts the folder of this file first, whose modules must not be taken for others of their names.
    sys.path.pop(0)
    # vLLM prints to the standard output, which is ours to answer on.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are changed in this process
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    engine: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "version":
                import vllm

                answer: dict[str, Any] = {"version": vllm.__version__}
            elif request["do"] == "open":
                engine = open_engine(request)
                answer = {"ready": True}
            elif request["do"] == "weights":
                answer = {"loaded": load(engine, request["file"])}
            else:
                answer = write(engine, request)
        except BaseException as error:
            told = f"{type(error).__name__}: {error}".strip()
            answer = {"error": told.splitlines()[0], "memory": any(w in told.lower() for w in OUT_OF_MEMORY)}
        answers.write(json.dumps(answer) + "\n")


def open_engine(request: dict[str, Any]) -> Any:
    """A vLLM engine whose log-probabilities are those after the temperature."""
    from vllm import LLM
    from vllm.model_executor.layers import utils

    # On a CPU vLLM repacks weights and throws the originals away, and what is loaded later changes nothing.
    packing = utils.dispatch_cpu_unquantized_gemm

    def keep(layer: Any, remove_weight: bool) -> None:
        packing(layer, remove_weight=False)

    utils.dispatch_cpu_unquantized_gemm = keep
    return LLM(
        model=request["model"], dtype=request["dtype"], max_model_len=request["longest"], enforce_eager=True,
        enable_prefix_caching=True, logprobs_mode="processed_logprobs", seed=0, generation_config="vllm",
        disable_log_stats=True, skip_tokenizer_init=not request["texts"], max_num_seqs=request["rows"],
        **request["options"],
    )  # fmt: skip


def load(engine: Any, file: str) -> int:
    """Replace the engine's weights by those of a safetensors file and forget keys and values made by the old."""
    from safetensors import safe_open
    from vllm.model_executor.layers import utils

    with safe_open(file, "pt") as weights:
        pairs = [(name, weights.get_tensor(name)) for name in weights.keys()]  # noqa: SIM118

    def change(model: Any) -> None:
        model.load_weights(iter(pairs))
        for layer in model.modules():
            if hasattr(layer, "cpu_linear"):
                utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=False)

    engine.apply_model(change)
    engine.reset_prefix_cache()
    return len(pairs)


def write(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Continue every context by settings of its own; a text that ends a reply leaves its tokens as they were drawn."""
    from vllm import SamplingParams

    common = {
        "max_tokens": request["length"], "stop_token_ids": request["end"], "ignore_eos": True, "logprobs": 0,
        "detokenize": bool(request["stop"]), "stop": request["stop"], "include_stop_str_in_output": True,
    }  # fmt: skip
    settings = [SamplingParams(**common, **row) for row in request["sampling"]]
    prompts = [{"prompt_token_ids": ids} for ids in request["contexts"]]
    outputs = [done.outputs[0] for done in engine.generate(prompts, settings, use_tqdm=False)]
    return {
        "ids": [list(o.token_ids) for o in outputs],
        "logp": [[step[i].logprob for i, step in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs],
    }


if __name__ == "__main__":
    main()
