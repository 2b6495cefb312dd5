r"""Any vision-language model of transformers as the trunk of a token or flow policy.

    pictures -> the model's own vision tower and projector --\
    word ids -> learned embeddings ---------------------------+-> language model -> last hidden states
    last hidden states -> narrow tokens --\
    vectors -> one token each -------------+-> blocks of the small trunk -> action head (tokens or flow)

The model runs once per decision. Its last hidden states become the prefix of `_trunk.py`, so the heads, the likelihoods
and the critic are those of tiny_vla_tokens and tiny_vla_flow, unchanged.

Pictures are resized and normalised as the model's image processor does it, without padding or cutting into tiles.
Instructions arrive as word ids, which are hashes and cannot be turned back into text: their embeddings are learned from
nothing, the tokenizer is not used, and padding is a word like any other. docs/vla_models.md tells what follows.

Source: last hidden states as the condition of a small action expert, as in Bjorck et al. 2025 (GR00T N1,
arXiv:2503.14734); LoRA, Hu et al. 2021 (arXiv:2106.09685).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
import transformers
from pydantic import Field, model_validator
from torch import Tensor, nn

from embodied_rl.errors import CapabilityError, CheckpointError, MissingExtraError, NotFoundError
from embodied_rl.policies import tiny_vla_flow, tiny_vla_tokens
from embodied_rl.policies._pretrained import from_folder
from embodied_rl.policies._trunk import Prefix, Trunk
from embodied_rl.policies.tiny_vla_flow import FlowPolicy
from embodied_rl.policies.tiny_vla_tokens import TokenPolicy
from embodied_rl.section import Section
from embodied_rl.types import EnvSpec, Obs

NESTED = ("smolvlm", "idefics2", "idefics3")
"""Model types that take pictures as [rows, pictures, 3, H, W]."""
PATCHES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Model types that take pictures as flattened patches and give words and patches three-dimensional positions."""

_TEXT = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
_SIGHT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 32, "patch_size": 8}  # fmt: skip
_QWEN = {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "patch_size": 8,
         "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
TINY: dict[str, dict[str, Any]] = {
    "paligemma": {"text_config": {"model_type": "gemma"} | _TEXT, "projection_dim": 32, "image_token_index": 31,
                  "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False} | _SIGHT},
    "smolvlm": {"text_config": {"model_type": "llama", "pad_token_id": 0} | _TEXT, "vision_config": _SIGHT,
                "image_token_id": 31},
    "qwen3_vl": {"text_config": _TEXT | {"rope_parameters": _ROPE}, "vision_config": _QWEN, "image_token_id": 31,
                 "video_token_id": 30},
}  # fmt: skip
"""Settings of the tiny models: about 50,000 weights each, drawn at random."""


class Pretrained(Section):
    """Settings that all wrapped models have."""

    model: str = Field("tiny:paligemma", min_length=1)
    """Folder with config.json and safetensors weights, as `save_pretrained` writes it; or tiny:paligemma, tiny:smolvlm
    or tiny:qwen3_vl, a very small model with random weights, for tests and for trying a recipe out."""
    freeze: Literal["none", "vision", "all"] = "none"
    """Weights of the model that are not trained: none; what lies before the language model; all (the head, and the
    embeddings of words, are always trained)."""
    lora: int = Field(0, ge=0)
    """Rank of adapters at every linear layer that freeze leaves; the model's own weights then stay as they are and
    the adapters are scaled by 2. 0: the weights themselves are trained."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the model's frozen matrices and of its arithmetic; what is trained is kept in float32."""
    image_size: int | None = Field(None, ge=8)
    """Pixels of a side that pictures are resized to; null: what the model was made for, or, where it takes any
    size, that of the env's pictures rounded up to whole patches."""

    @model_validator(mode="after")
    def _something_to_adapt(self) -> Pretrained:
        if self.lora and self.freeze == "all":
            raise ValueError(f"lora ({self.lora}) adapts nothing with freeze (all): set freeze: vision, or lora: 0")
        return self


class Config(Pretrained, tiny_vla_tokens.Config, tiny_vla_flow.Config):
    """Settings of the wrapped model and its head; `channels` and `glances` have no use here."""

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
            if name in other.model_fields and name not in mine:
                raise ValueError(f"{name} ({value}) does nothing with head ({self.head}): remove it, or change head")
        return self


def open_model(config: Pretrained, tiny: dict[str, dict[str, Any]]) -> Any:
    """Build one of the tiny models, or load a folder; nothing is ever downloaded.

    Raises:
        NotFoundError: No such folder or tiny model, or no config.json or weights in it.
        CheckpointError: The weights do not fit the config.
    """
    name, path = config.model, Path(config.model).expanduser()
    where = f"policy.model '{name}'"
    known = " or ".join(f"tiny:{kind}" for kind in tiny)
    if name.startswith("tiny:"):
        if (kind := name.removeprefix("tiny:")) not in tiny:
            raise NotFoundError(f"{where}: there is no such tiny model; known: {known}")
        settings = transformers.AutoConfig.for_model(kind, **tiny[kind])
        return _class_of(settings)(settings)
    if not path.is_dir():
        raise NotFoundError(
            f"{where}: no such folder; models are never downloaded: give a folder that holds config.json and "
            f"safetensors weights, or {known}"
        )
    if not (path / "config.json").is_file():
        there = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise NotFoundError(f"{where}: the folder holds no config.json (found {there}); save_pretrained writes one")

    def of_config() -> Any:
        return _class_of(transformers.AutoConfig.from_pretrained(path, local_files_only=True))

    return from_folder(of_config, path, where, dtype=getattr(torch, config.dtype))


def _class_of(settings: Any) -> Any:
    is_pi0 = settings.model_type == "pi0"
    return transformers.PI0ForConditionalGeneration if is_pi0 else transformers.MODEL_MAPPING[type(settings)]


def adapt(body: nn.Module, vlm: Any, config: Pretrained) -> None:
    """Choose what of a model's transformer layers `body` is trained, and add adapters; `freeze` speaks of `vlm` alone.

    Raises:
        MissingExtraError: Adapters are asked for and peft is not installed.
    """
    language = set(vlm.get_decoder().parameters())
    fixed = {p for p in vlm.parameters() if config.freeze == "all" or (config.freeze == "vision" and p not in language)}
    targets = [n for n, m in body.named_modules() if isinstance(m, nn.Linear) and m.weight not in fixed]
    for p in body.parameters():
        p.requires_grad_(p not in fixed and not config.lora)
    if config.lora:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                "policy.lora needs the package 'peft', which is not installed; run: pip install 'embodied-rl[vla]'"
            ) from error
        inject_adapter_in_model(LoraConfig(r=config.lora, lora_alpha=2 * config.lora, target_modules=targets), body)


class Backbone(nn.Module):
    """A transformers model with an env's pictures and words in front of it."""

    mean: Tensor
    std: Tensor
    origin: Tensor

    def __init__(self, env: EnvSpec, model: Any, vlm: Any, body: nn.Module, config: Pretrained) -> None:
        """Take over a model.

        Args:
            env: Its pictures and its one row of word ids are read.
            model: The whole model.
            vlm: The part that has the vision tower and the language model; it may be all of it.
            body: See `adapt`.
            config: What to train of it, and how to compute it.

        Raises:
            CapabilityError: No picture, pictures of a wrong size, or a model that reads no pictures.
        """
        super().__init__()
        if not hasattr(vlm, "get_image_features") or not hasattr(vlm.config, "vision_config"):
            raise CapabilityError(f"policy.model '{config.model}' is a {type(vlm).__name__}, which reads no pictures")
        self.config, self.model = config, model
        self.parts = [vlm]  # in a list, because its weights are counted with `model` already
        self.kind = vlm.config.model_type
        self.width = vlm.config.get_text_config().hidden_size
        self.pictures, self.words_entry = readable(env)
        self.sizes = {name: self._size(env.observation[name].shape[:2]) for name in self.pictures}
        file = Path(config.model).expanduser() / "preprocessor_config.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for name in ("mean", "std"):
            x = torch.tensor(found.get(f"image_{name}") or (0.5, 0.5, 0.5))
            self.register_buffer(name, x.view(3, 1, 1), persistent=False)
        if self.words_entry:
            with torch.no_grad():  # new words as large as those that the language model knows
                some = torch.arange(min(1000, vlm.config.get_text_config().vocab_size))
                std_of_words = float(vlm.get_input_embeddings()(some).float().std())
            self.words = nn.Embedding(int(env.observation[self.words_entry].high or 0) + 1, self.width)
            nn.init.normal_(self.words.weight, std=std_of_words)
        adapt(body, vlm, config)
        self.left_out: list[str] = []
        self.eval()

    @property
    def vlm(self) -> Any:
        """The part with the vision tower and the language model."""
        return self.parts[0]

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: dropout would part `evaluate` from `act`."""
        return super().train(False)

    def autocast(self) -> torch.autocast:
        """The precision of the model's arithmetic."""
        return torch.autocast(self.mean.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")

    def _size(self, given: tuple[int, ...]) -> tuple[int, int]:
        """Height and width that a camera's pictures are resized to."""
        vision = self.vlm.config.vision_config
        step = _number(getattr(vision, "patch_size", 1)) * getattr(vision, "spatial_merge_size", 1)
        if (side := self.config.image_size) and side % step:
            raise CapabilityError(
                f"policy.image_size ({side}) must be a multiple of {step}, the patch of '{self.config.model}'"
            )
        side = side or getattr(vision, "image_size", None)
        if side is None:
            return -(-given[0] // step) * step, -(-given[1] // step) * step
        return _number(side), _number(side)

    def look(self, obs: Obs) -> list[Tensor]:
        """Each camera's pictures as the model wants them, [N, 3, H, W]."""
        seen = []
        for name, size in self.sizes.items():
            x = obs[name].permute(0, 3, 1, 2).float() / 255
            if x.shape[2:] != size:
                x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
            seen.append(((x - self.mean) / self.std).contiguous())
        return seen

    def embed(self, obs: Obs) -> tuple[Tensor, dict[str, Any]]:
        """What the language model reads.

        Returns:
            tokens: [N, S, width], pictures before words.
            more: Further arguments of Qwen's language model.
        """
        n = len(obs[self.pictures[0]])
        more: dict[str, Any] = {}
        if self.kind in PATCHES:
            features, more = self._embed_patches(obs, n)
        else:
            pictures = torch.stack(self.look(obs), dim=1)
            pictures = pictures if self.kind in NESTED else pictures.flatten(0, 1)
            found = self.vlm.get_image_features(pictures).pooler_output
            features = [(found if isinstance(found, Tensor) else torch.cat(list(found))).reshape(n, -1, self.width)]
        words = [self.words(obs[self.words_entry])] if self.words_entry else []
        return torch.cat([*features, *words], dim=1), more

    def _embed_patches(self, obs: Obs, n: int) -> tuple[list[Tensor], dict[str, Any]]:
        """Qwen's way: patches in the order of the squares that are merged, and positions in time, height and width."""
        vision = self.vlm.config.vision_config
        p, m = _number(vision.patch_size), vision.spatial_merge_size
        start = 0
        features: list[Tensor] = []
        deep: list[list[Tensor]] = []
        places: list[Tensor] = []
        for x in self.look(obs):
            rows, columns = x.shape[2] // p, x.shape[3] // p
            x = x.view(n, 3, rows // m, m, p, columns // m, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
            x = x.expand(*x.shape[:6], _number(vision.temporal_patch_size), p, p).reshape(n * rows * columns, -1)
            grid = torch.tensor([[1, rows, columns]], device=x.device)
            out = self.vlm.get_image_features(x, image_grid_thw=grid.expand(n, 3))
            features.append(torch.stack(list(out.pooler_output)))
            deep.append([torch.stack(list(level)) for level in getattr(out, "deepstack_features", ())])
            places.append(self.vlm.get_vision_position_ids(start, grid[0], 1, m, device=x.device))
            start += max(rows, columns) // m
        length = obs[self.words_entry].shape[1] if self.words_entry else 0
        seen = sum(f.shape[1] for f in features)
        places.append(torch.arange(start, start + length, device=self.mean.device).expand(3, -1))
        more: dict[str, Any] = {"position_ids": torch.cat(places, dim=1).unsqueeze(1).expand(3, n, -1)}
        if any(deep):
            more["visual_pos_masks"] = (torch.arange(seen + length, device=self.mean.device) < seen).expand(n, -1)
            levels = zip(*deep, strict=True)
            more["deepstack_visual_embeds"] = [torch.cat(level, dim=1).flatten(0, 1) for level in levels]
        return features, more

    def forward(self, obs: Obs) -> Tensor:
        """Last hidden states [N, S, width]."""
        with self.autocast():
            tokens, more = self.embed(obs)
            if self.kind in PATCHES:
                out = self.vlm.language_model(inputs_embeds=tokens, use_cache=False, **more)
            else:
                if self.kind == "paligemma":  # everybody sees everybody
                    more = {"token_type_ids": torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device)}
                out = self.vlm(inputs_embeds=tokens, use_cache=False, **more)
        return cast(Tensor, out.last_hidden_state.float())

    def settle(self, outputs: Callable[[], Iterable[Tensor]]) -> None:
        """Decide, once the weights are on their device, what is trained and what a checkpoint holds.

        Weights that no output depends on (token embeddings, a pooling head) are frozen. Frozen matrices take the
        precision asked for. Frozen weights of a folder stay out of checkpoints: they are read from the folder again.

        Raises:
            CapabilityError: The model cannot compute `outputs`, what the policy reads of it.
        """
        try:
            reached = _leaves(outputs())
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            sizes = ", ".join(f"{h} x {w}" for h, w in self.sizes.values())
            raise CapabilityError(
                f"policy.model '{self.config.model}' ({self.kind}) cannot be run on pictures of {sizes} pixels "
                f"({type(error).__name__}: {str(error).strip().splitlines()[0]}); known to work: "
                f"{', '.join(TINY)}; policy.image_size null takes the model's own size"
            ) from error
        for p in self.model.parameters():
            p.requires_grad_(p.requires_grad and p in reached)
            p.data = p.data.float() if p.requires_grad or p.ndim < 2 else p.data.to(getattr(torch, self.config.dtype))
        if self.config.model.startswith("tiny:"):
            return
        self.left_out = [n for n, p in self.model.named_parameters(remove_duplicate=False) if not p.requires_grad]
        digest = hashlib.sha256()
        for name in self.left_out:
            p = self.model.get_parameter(name).detach().flatten()
            digest.update(f"{name}{p[:: 1 + len(p) // 64].tolist()}".encode())
        self.register_buffer("origin", torch.tensor(int.from_bytes(digest.digest()[:7], "little")))
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_pre_hook(_put_back)


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in cast(Backbone, module).left_out:
        state.pop(f"{prefix}model.{name}")


def _put_back(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    backbone = cast(Backbone, module)
    if not torch.equal(state.get(f"{prefix}origin", backbone.origin).cpu(), backbone.origin.cpu()):
        raise CheckpointError(
            f"the frozen weights of policy.model '{backbone.config.model}' are not those that this checkpoint was "
            "trained on: give the same folder and the same policy.dtype"
        )
    for name in backbone.left_out:
        state.setdefault(f"{prefix}model.{name}", backbone.model.get_parameter(name).data)


def _leaves(outputs: Iterable[Tensor]) -> set[Tensor]:
    """Parameters that outputs depend on."""
    todo, seen, found = [x.grad_fn for x in outputs if x.grad_fn is not None], set(), set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(leaf)
        todo += [before for before, _ in node.next_functions if before is not None]
    return found


def _number(x: Any) -> int:
    return int(x if isinstance(x, int) else x[0])


def readable(env: EnvSpec) -> tuple[list[str], str]:
    """Names of an env's pictures, and of its row of word ids ("" when it has none).

    Raises:
        CapabilityError: There is no picture.
    """
    seen = env.seen.items()
    pictures = [n for n, o in seen if o.dtype == torch.uint8 and len(o.shape) == 3 and o.shape[2] == 3]
    words = [n for n, o in seen if o.dtype == torch.int64 and len(o.shape) == 1 and o.high is not None]
    if not pictures:
        raise CapabilityError("a vision-language model needs a picture [H, W, 3] uint8; this env shows none")
    return pictures, words[0] if words else ""


def blank(env: EnvSpec, device: torch.device) -> Obs:
    """One row of zeros of each entry."""
    return {n: torch.zeros(1, *o.shape, dtype=o.dtype, device=device) for n, o in env.observation.items()}


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


def build(config: Config, *, env: EnvSpec, device: torch.device) -> TokenPolicy | FlowPolicy:
    """Build the policy for an env on a device; with likelihood latent everything but actor and critic is frozen.

    Raises:
        UserError: A model that cannot be had, or an observation or action that cannot be handled.
    """
    if env.action.kind != "continuous":
        raise CapabilityError("policy hf_vla moves continuous actions; this env's are discrete")
    head: type[TokenPolicy | FlowPolicy] = TokenPolicy if config.head == "tokens" else FlowPolicy
    told = {n: o for n, o in env.observation.items() if o.privileged}
    policy = head(replace(env, observation=told), config)
    trunk = WrappedTrunk(env, config)
    policy.spec, policy.trunk = env, trunk
    policy.to(device)
    trunk.backbone.settle(lambda: [trunk.backbone(blank(env, device))])
    if isinstance(policy, FlowPolicy) and config.likelihood == "latent":
        policy.freeze_flow()
    return policy
