r"""Any vision-language model of transformers as the trunk of a token or flow policy.

    pictures -> the model's own vision tower and projector --\
    word ids -> its own tokens, or learned embeddings --------+-> language model -> last hidden states
    last hidden states -> narrow tokens --\
    vectors -> one token each -------------+-> blocks of the small trunk -> action head (tokens or flow)

The model runs once per decision. Its last hidden states become the prefix of `_trunk.py`, so the heads, the likelihoods
and the critic are those of tiny_vla_tokens and tiny_vla_flow, unchanged.

Pictures are resized and normalised as the model's image processor does it, without padding or cutting into tiles.
Instructions arrive as word ids, which are hashes. Those whose word the env tells enter as the model's own tokens, where
its folder has a tokenizer; the others, and padding, have embeddings learned from nothing; see docs/vla_models.md.

Source: last hidden states as the condition of a small action expert, as in Bjorck et al. 2025 (GR00T N1,
arXiv:2503.14734); LoRA, Hu et al. 2021 (arXiv:2106.09685).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from embodied_rl.errors import CapabilityError
from embodied_rl.policies import tiny_vla_flow, tiny_vla_tokens
from embodied_rl.policies._backbone import TINY, Backbone, Pretrained, blank, open_model, readable
from embodied_rl.policies._trunk import Prefix, Trunk
from embodied_rl.policies.tiny_vla_flow import FlowPolicy
from embodied_rl.policies.tiny_vla_tokens import TokenPolicy
from embodied_rl.section import Section
from embodied_rl.types import EnvSpec, Evaluation, Obs, PolicyOutput


class Config(Pretrained, tiny_vla_tokens.Config, tiny_vla_flow.Config):
    """Settings of the wrapped model and its head; `channels`, `glances` and `foresight_reads` have no use here."""

    type: Literal["hf_vla"] = "hf_vla"  # type: ignore[assignment]
    head: Literal["tokens", "flow"] = "tokens"
    """tokens: as tiny_vla_tokens (decoding, bins, temperature); flow: as tiny_vla_flow (process, likelihood, ...)."""

    @model_validator(mode="after")
    def _used(self) -> Config:
        heads: dict[str, type[Section]] = {"tokens": tiny_vla_tokens.Config, "flow": tiny_vla_flow.Config}
        mine = heads.pop(self.head).model_fields
        (other,) = heads.values()
        for name, field in type(self).model_fields.items():
            if (value := getattr(self, name)) == field.default:
                continue
            if name in ("channels", "glances"):
                raise ValueError(f"{name} ({value}) is of a picture encoder that the wrapped model replaces: remove it")
            if name == "foresight_reads":
                raise ValueError(
                    f"foresight_reads ({value}) does nothing with hf_vla, whose foresight reads the summary either "
                    "way, because the model mixes all it is given: remove it"
                )
            if name in other.model_fields and name not in mine:
                raise ValueError(f"{name} ({value}) does nothing with head ({self.head}): remove it, or change head")
        if self.encode_once and self.likelihood == "latent":
            raise ValueError(
                "encode_once (true) does nothing with likelihood (latent), which keeps what the whole model made of "
                "an observation: remove it"
            )
        return self


class WrappedTrunk(Trunk):
    """The small trunk, with the model's last hidden states in the place of its own eyes and words."""

    def __init__(self, env: EnvSpec, config: Config) -> None:
        """Load the model; vectors and blocks are those of the small trunk.

        Raises:
            UserError: A model that cannot be had, or an entry of the observation that cannot be read.
        """
        pictures, words = readable(env)
        rest = {n: o for n, o in env.seen.items() if n not in (*pictures, words)}
        super().__init__(replace(env, observation=rest), config)
        model = open_model(config, TINY)
        self.backbone = Backbone(env, model, model, model, config)
        self.narrow = nn.Sequential(nn.LayerNorm(self.backbone.width), nn.Linear(self.backbone.width, config.width))

    def prefix(self, obs: Obs) -> Prefix:
        """See `Trunk.prefix`; the model's states are tokens of the small trunk."""
        hidden = self.narrow(self.backbone(obs))
        joints = [self.joints[name](obs[name]).unsqueeze(1) for name in self.vectors]
        summary, cache = self.run(torch.cat([self.summary.expand(len(hidden), 1, -1), hidden, *joints], dim=1))
        return Prefix(summary, cache, summary)


class Tokens(TokenPolicy):
    """The token policy on a wrapped model."""

    trunk: WrappedTrunk

    def act(self, obs: Obs, *, generator: torch.Generator | None, greedy: bool = False) -> PolicyOutput:
        """See TokenPolicy; pictures may be encoded for `evaluate` as well."""
        with torch.inference_mode():
            obs = self.trunk.backbone.once(obs)
            out = super().act(obs, generator=generator, greedy=greedy)
            return replace(out, features=self.trunk.backbone.keep(obs))

    def evaluate(self, obs: Obs, units: Tensor, *, entropy: bool = True) -> Evaluation:
        """See TokenPolicy."""
        return super().evaluate(self.trunk.backbone.recall(obs), units, entropy=entropy)


class Flow(FlowPolicy):
    """The flow policy on a wrapped model."""

    trunk: WrappedTrunk

    def act(self, obs: Obs, *, generator: torch.Generator | None, greedy: bool = False) -> PolicyOutput:
        """See FlowPolicy; pictures may be encoded for `evaluate` as well."""
        with torch.inference_mode():
            obs = self.trunk.backbone.once(obs)
            out = super().act(obs, generator=generator, greedy=greedy)
            return out if out.features is not None else replace(out, features=self.trunk.backbone.keep(obs))

    def evaluate(self, obs: Obs, units: Tensor, *, entropy: bool = True) -> Evaluation:
        """See FlowPolicy."""
        return super().evaluate(self.trunk.backbone.recall(obs), units, entropy=entropy)


def build(config: Config, *, env: EnvSpec, device: torch.device) -> Tokens | Flow:
    """Build the policy for an env on a device; with likelihood latent everything but actor and critic is frozen.

    Raises:
        UserError: A model that cannot be had, or an observation or action that cannot be handled.
    """
    if env.action.kind != "continuous":
        raise CapabilityError("policy hf_vla moves continuous actions; this env's are discrete")
    head: type[Tokens | Flow] = Tokens if config.head == "tokens" else Flow
    told = {n: o for n, o in env.observation.items() if o.privileged}
    policy = head(replace(env, observation=told), config)
    trunk = WrappedTrunk(env, config)
    policy.spec, policy.trunk = env, trunk
    policy.to(device)
    trunk.backbone.settle(lambda: [trunk.backbone(blank(env, device))])
    if isinstance(policy, Flow) and config.likelihood == "latent":
        policy.freeze_flow()
    return policy
