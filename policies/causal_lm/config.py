"""Settings of the language model policy."""

from __future__ import annotations

from typing import Literal

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
    logp: Literal["evaluate", "decoder"] = "evaluate"
    """Which log-probabilities are recorded. evaluate: those of the function that training calls, so that the ratio
    starts at exactly 1 (one forward pass over the replies); decoder: those that were there when the token was drawn,
    for nothing, but apart by rounding (sync/logp_gap_mean tells how far)."""
    rows: int | None = Field(None, ge=1)
    """Replies written at once; null: all. Less saves memory."""
    critic: Critic = Critic()
