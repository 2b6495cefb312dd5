"""The policy: generation, and log-probabilities of what was generated, over one model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from embodied_rl.errors import CapabilityError
from embodied_rl.policies.causal_lm.config import Config, Sampling
from embodied_rl.policies.causal_lm.decode import Narrowing, Written
from embodied_rl.policies.causal_lm.generator import Decoder, Generator, Request, in_batches
from embodied_rl.policies.causal_lm.head import token_logp
from embodied_rl.policies.causal_lm.model import add_adapters, load, open_folder, prove, run, same_language
from embodied_rl.policies.causal_lm.pack import distinct, pack
from embodied_rl.policies.causal_lm.vllm_client import VllmGenerator
from embodied_rl.types import PAD, EnvSpec, Evaluation, Obs, PolicyOutput


class CausalLM(nn.Module):
    """See the package's docstring; follows `embodied_rl.types.Policy`."""

    pretrained = True

    def __init__(self, env: EnvSpec, config: Config, device: torch.device) -> None:
        """Load the model and fit it to an env.

        Raises:
            UserError: There is no such model, or it does not fit the env.
        """
        super().__init__()
        self.config = config
        self.entry = _conversation(env)
        path, tokenizer = open_folder(config.model)
        same_language(config.model, path, tokenizer, env)
        precision = torch.float32 if config.dtype == "float32" or not config.lora else torch.bfloat16
        self.model = load(config.model, path, precision).to(device)
        self._fit(env)
        prove(config.model, self.model)
        if config.lora:
            add_adapters(self.model, config.lora)
        if config.checkpoint_gradients:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.chunk = self.actions_per_decision = 1
        self.has_critic = config.critic.kind != "none"
        self.value_per_unit = self.has_critic and config.critic.level == "unit"
        self.value_range: tuple[float, float] | None = None  # no classifier over returns
        self._annealed: Tensor | None = None
        self._evaluating = False
        self.samples_for_evaluation = config.evaluation != Sampling()
        if self.has_critic:
            self.critic = nn.Linear(self.model.get_output_embeddings().weight.shape[1], 1, device=device)
            nn.init.zeros_(self.critic.weight), nn.init.zeros_(self.critic.bias)
        self.generator: Generator = Decoder(tokenizer)
        if config.generator.kind == "vllm":
            self.generator = VllmGenerator(
                config.generator, path, dtype=config.dtype, longest=self.longest, texts=bool(config.stop)
            )
        self.train(False)

    def _fit(self, env: EnvSpec) -> None:
        """Compare the model's sizes with the env's."""
        settings, name = self.model.config.get_text_config(), self.config.model
        self.num_units, self.vocabulary = env.action.length, env.action.size
        (context,) = env.observation[self.entry].shape
        self.longest = context + self.num_units
        have = len(self.model.get_output_embeddings().weight)
        if have < self.vocabulary:
            raise CapabilityError(
                f"policy.model '{name}' knows {have} tokens and the env's vocabulary has {self.vocabulary}"
            )
        limit = getattr(settings, "max_position_embeddings", None)
        if limit is not None and self.longest > limit:
            raise CapabilityError(
                f"policy.model '{name}' was made for {limit} tokens, and a conversation of this env may have {context} "
                f"and {self.num_units} more in the reply: lower the env's max_context or length"
            )
        assert env.vocabulary is not None
        self.register_buffer("end", torch.tensor(env.vocabulary.end, dtype=torch.int64), persistent=False)
        self.end: Tensor = self.end.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.get_input_embeddings().weight.device

    def train(self, mode: bool = True) -> CausalLM:
        """Stay in evaluation mode, except that transformers checkpoints gradients in training mode only."""
        return super().train(self.config.checkpoint_gradients)

    # ---- the protocol -------------------------------------------------------------------------------------------

    def act(self, obs: Obs, *, generator: torch.Generator | None, greedy: bool = False) -> PolicyOutput:
        """Write (or with `greedy` take the likeliest tokens of) one reply per copy, at most A tokens."""
        context, uniform = obs[self.entry], None
        if not greedy:
            # One number per token, drawn ahead: what a row says does not depend on how long the others talk.
            shape = len(context), self.num_units
            uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=context.device)
        # Nobody reads what an evaluation would say of its own replies.
        exact = self.config.logp == "evaluate" and not self._evaluating
        valued = self.has_critic and not self._evaluating
        with torch.no_grad():
            narrow = self._narrowing(len(context)) if self._evaluating else None
            written = self.write(context, uniform, states=valued and not exact, narrow=narrow)
            units, logp, value = self._forced(written.units), written.logp, None
            if written.hidden is not None:
                value = self._value(written.hidden, units)
            elif exact or valued:
                judged = self._judged(context, units)
                logp, value = judged.logp if exact else logp, judged.value
        return PolicyOutput(units, logp, units.unsqueeze(1), value, self._chosen(units))

    def write(
        self, context: Tensor, uniform: Tensor | None, *, states: bool = False, narrow: Narrowing | None = None
    ) -> Written:
        """Let the generator write one reply per row.

        Args:
            context: [B, P] int64 with PAD.
            uniform: [B, A] float64 in [0, 1), see `Request`; None takes the likeliest tokens.
            states: Return the hidden states as well, if the generator has them.
            narrow: How each row is sampled beside the policy's temperature; None as in training.

        Raises:
            UserError: There is not enough memory for one row, or the generator cannot write.
        """
        temperature = self._temperature()
        return self.generator.write(
            Request(context, uniform, temperature, self.end, narrow, self.config.stop, states), self
        )

    def _judged(self, context: Tensor, units: Tensor) -> Judged:
        """What `evaluate` says of replies that were just written, in batches that fit into memory."""

        def some(rows: slice) -> Judged:
            found = self.evaluate({self.entry: context[rows]}, units[rows], entropy=False)
            return Judged(found.logp, found.value)

        own, theirs = (self.config.rows, "policy.rows"), (self.config.generator.rows, "policy.generator.rows")
        most, setting = theirs if self.config.generator.kind == "vllm" else own
        return in_batches(some, len(context), most, "judge", setting)

    def _narrowing(self, rows: int) -> Narrowing:
        """What `evaluation` says, for every row."""
        e, device = self.config.evaluation, self.device
        heat = 1.0 if e.temperature is None else e.temperature / self.config.temperature
        return Narrowing(
            torch.full((rows,), heat, device=device), torch.full((rows,), e.top_k, device=device),
            torch.full((rows,), e.top_p, device=device),
        )  # fmt: skip

    def _forced(self, units: Tensor) -> Tensor:
        """With `force_end`, replies [B, A] that fill every place end there."""
        if self.config.force_end:
            units = units.clone()
            units[:, -1] = torch.where(units[:, -1] == PAD, PAD, self.end[0])
        return units

    def _chosen(self, units: Tensor) -> Tensor:
        """[B, A] bool, tokens that the policy chose itself."""
        chosen = units != PAD
        if self.config.force_end:
            chosen[:, -1] = False
        return chosen

    def evaluate(self, obs: Obs, units: Tensor, *, entropy: bool = True) -> Evaluation:
        """Log-probabilities and entropies [N, A], 0 at PAD; values [N, A] or [N] (critic.level)."""
        contexts, group = distinct(obs[self.entry])
        packed = pack(contexts, group, units, self.config.attention)
        hidden = self.hidden(packed.ids, packed.positions, packed)
        counts = units != PAD
        # Replies that begin alike go on from the same states, whose logits are made once.
        places, state = packed.source[counts].unique(return_inverse=True)
        seen = hidden[places].float()
        with torch.autocast(seen.device.type, enabled=False):
            cold = self._temperature().expand(units.shape)[counts]
            cold = cold.new_empty(len(places)).index_copy_(0, state, cold).unsqueeze(-1)
            logp, spread = token_logp(seen / cold, self.head(), state, units[counts], entropy=entropy)

        def lay(x: Tensor) -> Tensor:
            return x.new_zeros(units.shape).masked_scatter(counts, x)

        value = None
        if self.has_critic:
            level = self.config.critic.level
            value = lay(self._judge(seen)[state]) if level == "unit" else self._judge(hidden[packed.last])[group]
        return Evaluation(lay(logp), None if spread is None else lay(spread), value)

    def encode(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Replies [N, 1, A] as units [N, A] and mask: they are the same ids."""
        units = action[:, 0]
        return units, units != PAD

    def value(self, obs: Obs) -> Tensor:
        """[N] the critic's estimate before the first token of a reply."""
        with torch.no_grad():
            contexts, group = distinct(obs[self.entry])
            packed = pack(contexts, group[:0], contexts.new_zeros(0, 0), self.config.attention)
            return self._judge(self.hidden(packed.ids, packed.positions, packed)[packed.last])[group]

    def observe(self, obs: Obs) -> None:
        """Nothing: a language model has no running statistics."""

    def evaluating(self, on: bool) -> None:
        """Sample by `evaluation` from here on, or as in training again."""
        self._evaluating = on

    def anneal(self, temperature: Tensor | None) -> None:
        """Give every token of a reply a temperature [A] of its own, in place of the recipe's; None takes it back."""
        self._annealed = None if temperature is None else temperature.to(self.device, torch.float32)

    # ---- what a generator reads --------------------------------------------------------------------------------

    def autocast(self) -> torch.autocast:
        """See `Speaker`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")

    def hidden(self, ids: Tensor, positions: Tensor, packing: Any) -> Tensor:
        """See `Speaker`."""
        packing.longest = self.longest
        with self.autocast():
            return run(self.model, ids, positions, packing)

    def head(self) -> Tensor:
        """See `Speaker`; float32 because the rounding of the last product is what a log-probability shows directly."""
        weight: Tensor = self.model.get_output_embeddings().weight.float()
        return weight if len(weight) == self.vocabulary else weight[: self.vocabulary]

    def weights(self) -> dict[str, Tensor]:
        """See `Speaker`; of weights that are tied, one."""
        tied = self.model.get_output_embeddings().weight is self.model.get_input_embeddings().weight
        return {n: p for n, p in self.model.state_dict().items() if not (tied and n == "lm_head.weight")}

    # ---- inside -------------------------------------------------------------------------------------------------

    def _temperature(self) -> Tensor:
        """[A] float32, of each token."""
        if self._annealed is not None:
            return self._annealed
        return torch.full((self.num_units,), self.config.temperature, device=self.device)

    def _judge(self, hidden: Tensor) -> Tensor:
        """The critic's estimate of hidden states [..., D]."""
        hidden = hidden.float()
        value: Tensor = self.critic(hidden.detach() if self.config.critic.detach else hidden).squeeze(-1)
        return value

    def _value(self, states: Tensor, units: Tensor) -> Tensor:
        if self.config.critic.level == "decision":
            return self._judge(states[:, 0])
        return self._judge(states).masked_fill(units == PAD, 0.0)


class Judged(NamedTuple):
    """What `evaluate` says of B replies."""

    logp: Tensor
    """[B, A]"""
    value: Tensor | None
    """[B, A] or [B]; None without a critic."""


def _conversation(env: EnvSpec) -> str:
    """Name of the env's one observation, a row of token ids."""
    rows = [n for n, s in env.observation.items() if s.dtype == torch.int64 and len(s.shape) == 1]
    if env.action.kind != "tokens" or len(rows) != 1 or len(env.observation) != 1:
        raise CapabilityError(
            f"policy causal_lm reads one row of tokens and writes another; this env shows {', '.join(env.observation)} "
            f"and takes {env.action.kind} actions"
        )
    return rows[0]
