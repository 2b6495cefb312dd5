"""Stands in for the package `vllm` where only our side of the talk is tested: its few calls over transformers."""

import json
import os
import sys
from types import ModuleType, SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MOST = None
"""Rows for which there is memory; None for any number."""
__version__ = os.environ.get("STAND_IN_VERSION", "0.32.0")

for name in ("model_executor", "model_executor.layers", "model_executor.layers.utils"):
    sys.modules[f"vllm.{name}"] = ModuleType(f"vllm.{name}")
sys.modules["vllm.model_executor.layers.utils"].dispatch_cpu_unquantized_gemm = None


class SamplingParams(SimpleNamespace):
    """Whatever it is given."""


def truncated(z, s):
    """Logits [V] of the top_k likeliest, and of those the fewest whose probabilities reach top_p; -inf for the others."""
    if k := getattr(s, "top_k", 0):
        z = z.masked_fill(z < z.topk(k).values[-1], float("-inf"))
    if (most := getattr(s, "top_p", 1.0)) < 1:
        p = z.softmax(-1)
        few = next(n for n in range(1, len(z) + 1) if float(p.topk(n).values.sum()) >= most)
        z = z.masked_fill(p < p.topk(few).values[-1], float("-inf"))
    return z


class LLM:
    """One row after the other."""

    def __init__(self, model, dtype, **settings):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.tokenizer = None if settings["skip_tokenizer_init"] else AutoTokenizer.from_pretrained(model)
        self.stale = False
        print(json.dumps({"vllm": "prints what it likes"}))

    def apply_model(self, change):
        def load_weights(pairs):
            missing = self.model.load_state_dict(dict(pairs), strict=False)
            assert set(missing.missing_keys) <= {"lm_head.weight"} and not missing.unexpected_keys
            self.stale = True

        change(SimpleNamespace(load_weights=load_weights, modules=list))

    def reset_prefix_cache(self):
        self.stale = False

    @torch.no_grad()
    def generate(self, prompts, settings, use_tqdm):
        assert not self.stale, "old keys and values"
        if MOST is not None and len(prompts) > MOST:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return [self._write(list(p["prompt_token_ids"]), s) for p, s in zip(prompts, settings, strict=True)]

    def _stopped(self, written, s):
        """A token or a text that ends the reply is there."""
        if written and written[-1] in s.stop_token_ids:
            return True
        if not s.stop:
            return False
        assert s.detokenize and self.tokenizer is not None, "texts need the tokenizer"
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        return any(x in text for x in s.stop)

    def _write(self, ids, s):
        g, written, steps = torch.Generator().manual_seed(getattr(s, "seed", 0)), [], []
        while len(written) < s.max_tokens and not self._stopped(written, s):
            z = self.model(torch.tensor([ids + written])).logits[0, -1].float()
            p = truncated(z / (s.temperature or 1.0), s).log_softmax(-1)
            i = int(torch.multinomial(p.exp(), 1, generator=g)) if s.temperature else int(p.argmax())
            written.append(i)
            steps.append({i: SimpleNamespace(logprob=float(p[i]))})
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=written, logprobs=steps)])
