"""Settings of the language model policy."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from embodied_rl.section import Section


class Critic(Section):
    """A value head on the model's last hidden states."""

    kind: Literal["none", "scalar"] = "none"
    """none: for methods that compare replies; scalar: one linear layer that starts at 0."""
    level: Literal["unit", "decision"] = "unit"
    """unit: a value before every token; decision: one value, before the first token of the reply."""
    detach: bool = False
    """Keep the critic's gradient out of the model, which then learns from the policy's loss alone."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> Critic:
        for name in ("level", "detach"):
            value = getattr(self, name)
            if self.kind == "none" and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} ({value}) does nothing with kind (none): set kind: scalar, or remove it")
        return self


class Vllm(Section):
    """Who writes the replies."""

    kind: Literal["builtin", "vllm"] = "builtin"
    """builtin: the decoder of this package, on the policy's own weights; vllm: vLLM in a process of its own, which gets
    the weights after every update. Its log-probabilities differ a little (sync/logp_gap_mean), so set
    update.logp_gap.do: recompute or correct; a resumed run is not bit-identical."""
    python: str = ""
    """vllm: interpreter of the environment that has vLLM, for example ~/vllm/bin/python."""
    rows: int = Field(256, ge=1)
    """vllm: replies written at once (max_num_seqs)."""
    seconds: float = Field(1800, gt=0)
    """vllm: how long loading the model, taking weights or writing may last before it is taken to hang."""
    options: dict[str, int | float | str | bool] = {}
    """vllm: further arguments of vllm.LLM, for example {gpu_memory_utilization: 0.4}."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> Vllm:
        if self.kind == "vllm" and not self.python:
            raise ValueError("kind (vllm) needs python (found nothing): the interpreter of an environment with vLLM")
        for name in ("python", "rows", "seconds", "options"):
            value = getattr(self, name)
            if self.kind == "builtin" and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} ({value}) does nothing with kind (builtin): set kind: vllm, or remove it")
        return self


class Sampling(Section):
    """How replies are sampled where nobody learns from them."""

    temperature: float | None = Field(None, gt=0)
    """In place of the policy's own; null for that."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the likeliest tokens whose probabilities first reach this sum; 1 among all."""
    top_k: int = Field(0, ge=0)
    """Sample among this many likeliest tokens; 0 among all."""


class Config(Section):
    """Settings of the language model and of how it writes."""

    type: Literal["causal_lm"] = "causal_lm"
    model: str = Field("models/smollm2", min_length=1)
    """Folder with config.json, safetensors weights and tokenizer, as save_pretrained writes it, or the name of a model
    that was downloaded before. Must be the env's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the arithmetic (logits always float32) and of frozen weights; what is trained is kept in float32."""
    lora: int = Field(0, ge=0)
    """Rank of adapters at every linear layer; the model's own weights then stay as they are and the adapters are scaled
    by 2. 0: all weights are trained."""
    checkpoint_gradients: bool = False
    """Compute each layer a second time in the backward pass instead of keeping what it computed: less memory, a third
    more time."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """sdpa: torch's fused kernel; eager: plain products, slower, for comparison."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits while sampling and in every log-probability; greedy evaluation does not depend on it."""
    evaluation: Sampling = Sampling()
    """Of sampled evaluation (evaluate.greedy: false)."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a reply as soon as one of them stands in it; its tokens belong to the reply."""
    force_end: bool = False
    """End a reply that is as long as it may be by the token that ends replies, in its last place. The policy did not
    choose it, so it is in no loss."""
    logp: Literal["evaluate", "decoder"] = "evaluate"
    """Which log-probabilities are recorded. evaluate: those of the function that training calls (one forward pass over
    the replies), so that ratios start at 1 but for the rounding of other rows packed beside; decoder: those that were
    there when the token was drawn, for nothing, but with the rounding of decoding (sync/logp_gap_mean tells how
    far)."""
    rows: int | None = Field(None, ge=1)
    """Replies written, and with logp: evaluate judged, at once; null: all. Less saves memory."""
    critic: Critic = Critic()
    generator: Vllm = Vllm()

    @model_validator(mode="before")
    @classmethod
    def _no_truncation_in_training(cls, data: Any) -> Any:
        for name in ("top_p", "top_k"):
            if isinstance(data, dict) and name in data:
                raise ValueError(
                    f"{name} ({data[name]}) would sample training replies from a part of the distribution, and which "
                    "part that was changes with every update, so that no ratio of probabilities is right: set "
                    f"evaluation.{name} for evaluation, and train with all tokens"
                )
        return data

    @model_validator(mode="after")
    def _of_the_generator(self) -> Config:
        if self.generator.kind == "vllm" and self.lora:
            raise ValueError(
                f"lora ({self.lora}) does not work with generator.kind (vllm), which takes whole weights: set lora: 0, "
                "or generator.kind: builtin"
            )
        if self.generator.kind == "vllm" and self.rows is not None:
            raise ValueError(f"rows ({self.rows}) is of the built-in generator: set generator.rows")
        return self
