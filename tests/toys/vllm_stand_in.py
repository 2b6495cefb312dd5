"""Stands in for the package `vllm` where only our side of the talk is tested: its few calls over transformers."""

import json
import os
import sys
from types import ModuleType, SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

__version__ = os.environ.get("STAND_IN_VERSION", "0.32.0")

for name in ("model_executor", "model_executor.layers", "model_executor.layers.utils"):
    sys.modules[f"vllm.{name}"] = ModuleType(f"vllm.{name}")
sys.modules["vllm.model_executor.layers.utils"].dispatch_cpu_unquantized_gemm = None


class SamplingParams(SimpleNamespace):
    """Whatever it is given."""


class LLM:
    """One row after the other."""

    def __init__(self, model, dtype, **settings):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
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
        return [self._write(list(p["prompt_token_ids"]), s) for p, s in zip(prompts, settings, strict=True)]

    def _write(self, ids, s):
        g, written, steps = torch.Generator().manual_seed(s.seed), [], []
        while len(written) < s.max_tokens and not (written and written[-1] in s.stop_token_ids):
            z = self.model(torch.tensor([ids + written])).logits[0, -1].float()
            p = (z / (s.temperature or 1.0)).log_softmax(-1)
            i = int(torch.multinomial(p.exp(), 1, generator=g)) if s.temperature else int(p.argmax())
            written.append(i)
            steps.append({i: SimpleNamespace(logprob=float(p[i]))})
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=written, logprobs=steps)])
