"""A causal language model of transformers, read from a folder, whose attention is ours."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from embodied_rl.errors import CapabilityError, MissingExtraError, NotFoundError
from embodied_rl.policies._pretrained import from_folder
from embodied_rl.policies.causal_lm.pack import distinct, pack
from embodied_rl.types import PAD, EnvSpec
from embodied_rl.vocabulary import fingerprint, local_folder

ATTENTION = "embodied_rl"
"""Name under which transformers finds our attention."""
TOLERANCE = 1e-3
"""Largest difference of log-probabilities between our way through a model and its own, in float32."""

log = logging.getLogger(__name__)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, sliding_window: int | None = None, packing: Any = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers calls it, of one packed row: hand it to whoever knows what the row is made of.

    Args:
        module: The attention layer.
        query: [1, H, T, d].
        key: [1, Hk, T, d].
        value: [1, Hk, T, d].
        attention_mask: Unused; the packing knows better.
        scaling: Factor of the scores.
        sliding_window: Tokens that a token sees.
        packing: A `Packed`, `Prefill` or `Cache`.
        others: Of models whose attention is not the usual one, which `prove` refuses.

    Returns:
        out: [1, T, H, d], and no weights.
    """
    if packing is None:
        raise CapabilityError("policy causal_lm: this model does not hand its arguments on to its attention")
    if sliding_window is not None and packing.longest > sliding_window:
        raise CapabilityError(
            f"policy causal_lm: this model's tokens see {sliding_window} tokens and the env's conversations may have "
            f"{packing.longest}; lower the env's max_context or length so that the sum is no more than that"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    out = packing.attend(module.layer_idx, q, k, v, scale)
    return out.view(1, *q.shape).to(value.dtype), None


transformers.AttentionInterface.register(ATTENTION, attend)


def open_folder(name: str) -> tuple[Path, Any]:
    """The folder of a model and its tokenizer; a name that is no folder is looked up among those downloaded before.

    Raises:
        NotFoundError: No model or no tokenizer there.
    """
    where, path = f"policy.model '{name}'", local_folder(name)
    if path is None:
        raise NotFoundError(
            f"{where}: there is no such folder, and no model of that name was downloaded before; give a folder "
            "that holds config.json, safetensors weights and a tokenizer (scripts/get_smollm2.py makes one)"
        )
    for file, what in (("config.json", "model"), ("tokenizer.json", "tokenizer")):
        if not (path / file).is_file():
            there = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
            raise NotFoundError(
                f"{where}: the folder holds no {what} ({file} is missing; found {there}); save_pretrained of the "
                f"{what} writes it"
            )
    try:
        return path, transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise NotFoundError(f"{where}: transformers cannot read its tokenizer ({first})") from error


def same_language(name: str, path: Path, tokenizer: Any, env: EnvSpec) -> None:
    """Refuse a model whose token ids mean something else than the env's.

    Raises:
        CapabilityError: Another vocabulary.
    """
    theirs = env.vocabulary
    if theirs is None:
        raise CapabilityError("policy causal_lm continues conversations of tokens, and this env has no vocabulary")
    template = tokenizer.chat_template or ""
    mine = fingerprint([(path / "tokenizer.json").read_bytes(), str(template).encode()])
    if mine != theirs.fingerprint:
        raise CapabilityError(
            f"policy.model '{name}' and the env's tokens ('{theirs.name}') do not belong together: tokenizer or chat "
            "template differ, so the same ids would mean other words; set env.model and policy.model to one folder"
        )


def load(name: str, path: Path, dtype: torch.dtype) -> Any:
    """Load weights from a folder; nothing is downloaded.

    Raises:
        NotFoundError: transformers cannot load it, or it is no causal language model.
        CheckpointError: Weights are missing.
    """
    where = f"policy.model '{name}'"
    model = from_folder(
        lambda: transformers.AutoModelForCausalLM, path, where, dtype=dtype, attn_implementation="eager"
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # dropout would part what is trained from what was sampled
    return model


def add_adapters(model: Any, rank: int) -> None:
    """Freeze a model and put adapters of a rank at every linear layer of its trunk, scaled by 2, kept in float32.

    Raises:
        MissingExtraError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "policy.lora needs the package 'peft', which is not installed; run: pip install 'embodied-rl[text]'"
        ) from error
    trunk = model.base_model
    targets = [n for n, m in trunk.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    model.requires_grad_(False)
    fan = any(isinstance(m, Conv1D) for m in trunk.modules())
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, fan_in_fan_out=fan)
    inject_adapter_in_model(settings, trunk)
    for p in trunk.parameters():
        if p.requires_grad:
            p.data = p.data.float()


def run(model: Any, ids: Tensor, positions: Tensor, packing: Any) -> Tensor:
    """Last hidden states of packed tokens.

    Args:
        model: From `load`, with our attention.
        ids: [T] int64.
        positions: [T] int64.
        packing: Who attends to whom.

    Returns:
        hidden: [T, D].
    """
    out = model.base_model(
        input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, packing=packing
    )
    return cast(Tensor, out.last_hidden_state)[0]


@torch.no_grad()
def prove(name: str, model: Any) -> None:
    """Put our attention into a model and make sure that it computes what it did before.

    Two conversations with a context in common go through the model one by one as its authors meant it, and packed.

    Raises:
        CapabilityError: The results differ: its attention, positions or logits are not the usual ones.
    """
    size = model.config.get_text_config().vocab_size
    g = torch.Generator().manual_seed(0)
    device = model.get_input_embeddings().weight.device
    context = torch.randint(size, (1, 5), generator=g).expand(2, -1).to(device)
    units = torch.randint(size, (2, 4), generator=g).to(device)
    units[1, 3] = PAD
    wanted = []
    for row in (units[0], units[1, :3]):
        z = model(input_ids=torch.cat([context[0], row])[None], use_cache=False).logits[0, 4:-1].float()
        wanted.append(z.log_softmax(-1).gather(1, row[:, None]).squeeze(1))
    try:
        model.set_attn_implementation(ATTENTION)
        packed = pack(*distinct(context), units)
        layers: list[int] = []
        plain = packed.attend

        def watched(layer: int, *args: Any) -> Tensor:
            layers.append(layer)
            return plain(layer, *args)

        packed.attend = watched  # type: ignore[method-assign, assignment]
        h = run(model, packed.ids, packed.positions, packed)[packed.source[units != PAD]]
        z = (h.float() @ model.get_output_embeddings().weight.float().T).log_softmax(-1)
        gap = float((z.gather(1, units[units != PAD][:, None]).squeeze(1) - torch.cat(wanted)).abs().max())
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CapabilityError(
            f"policy.model '{name}' is a {type(model).__name__}, whose attention cannot be replaced ({error})"
        ) from error
    if layers != list(range(model.config.get_text_config().num_hidden_layers)):
        raise CapabilityError(
            f"policy.model '{name}' is a {type(model).__name__}, of which only layers {layers} have an attention that "
            "can be replaced, and which would mix packed sequences in the others: it is not supported"
        )
    exact = model.dtype == torch.float32
    if not gap < (TOLERANCE if exact else 0.25):
        raise CapabilityError(
            f"policy.model '{name}' is a {type(model).__name__}, which computes attention, positions or logits in a "
            f"way of its own (log-probabilities differ by {gap:.2g} when sequences are packed): it is not supported"
        )
