"""Any causal language model of transformers as a policy: it reads a conversation and writes a reply, token by token.

    observation {"context": [B, P]} -> model -> reply [B, A] token ids and PAD, which is the action and the units

Generation keeps keys and values (decode.py); equal contexts, as those of a group, are computed once. Training lays all
tokens in one row without padding, with equal contexts once as well (pack.py), and makes logits only where a reply has a
token, some rows at a time (head.py). Both run the model's own layers; only its attention is replaced (model.py), and a
model that then computes something else is refused.
"""

from __future__ import annotations

import torch

from embodied_rl.policies.causal_lm.config import Config
from embodied_rl.policies.causal_lm.policy import CausalLM
from embodied_rl.types import EnvSpec

__all__ = ["CausalLM", "Config", "build"]


def build(config: Config, *, env: EnvSpec, device: torch.device) -> CausalLM:
    """Build the policy for an env on a device.

    Raises:
        UserError: There is no such model, or it does not fit the env.
    """
    return CausalLM(env, config, device)
