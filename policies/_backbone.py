r"""Vision-language models of transformers in front of a policy: opened, adapted, and shown an env's pictures and words.

    pictures -> the model's own vision tower and projector -> `see` --\
    word ids -> the model's own tokens, or learned (`_reading.py`) ---+-> `embed` -> language model -> `forward`

Where the vision part is frozen, what it made of a picture while sampling can be kept (`encode_once`): `once` encodes,
`keep` turns the observation into bytes for the rollout, `recall` turns them back, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
import transformers
from pydantic import Field, model_validator
from torch import Tensor, nn

from embodied_rl.errors import CapabilityError, CheckpointError, MissingExtraError, NotFoundError
from embodied_rl.policies._pretrained import from_folder
from embodied_rl.policies._reading import Words
from embodied_rl.policies._trunk import padded, row_of_words
from embodied_rl.section import Section
from embodied_rl.types import FEATURES, EnvSpec, Obs

SEEN = "policy/seen"
"""Entry that stands for the pictures of an observation: what the vision part made of them."""
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
    """Weights of the model that are not trained: none; what lies before the language model; all (the head, and learned
    embeddings of words, are always trained, embeddings of tokens never)."""
    lora: int = Field(0, ge=0)
    """Rank of adapters at every linear layer that freeze leaves; the model's own weights then stay as they are and
    the adapters are scaled by 2. 0: the weights themselves are trained."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the model's frozen matrices and of its arithmetic; what is trained is kept in float32."""
    image_size: int | None = Field(None, ge=8)
    """Pixels of a side that pictures are resized to; null: what the model was made for, or, where it takes any
    size, that of the env's pictures rounded up to whole patches."""
    words: Literal["tokens", "learned"] = "tokens"
    """tokens: an instruction's words enter as the model's own tokens, where its folder has a tokenizer and the env
    tells its words beforehand; other words, and padding, have embeddings learned from nothing. learned: all have."""
    encode_once: bool = False
    """Keep, beside each decision, what the frozen vision part made of its pictures, so that no update encodes them
    again: time for memory, one number for each token of a picture and dimension of the language model."""

    @model_validator(mode="after")
    def _something_to_keep(self) -> Pretrained:
        if self.encode_once and self.freeze == "none":
            raise ValueError("encode_once (true) needs a vision part that stays as it is: set freeze: vision or all")
        return self

    @model_validator(mode="after")
    def _something_to_adapt(self) -> Pretrained:
        if self.lora and self.freeze == "all":
            raise ValueError(f"lora ({self.lora}) adapts nothing with freeze (all): set freeze: vision, or lora: 0")
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
        self.config, self.model, self.env = config, model, env
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
            entry = env.observation[self.words_entry]
            self.words = Words(entry, vlm.get_input_embeddings(), config.model, config.words)
        adapt(body, vlm, config)
        # A task has few words: trained, they would drift away from all that it does not have.
        vlm.get_input_embeddings().requires_grad_(False)
        self.left_out: list[str] = []
        self.layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
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

    def see(self, obs: Obs) -> Tensor:
        """The pictures as the language model wants them: [N, levels, S, width].

        Level 0 takes the place of tokens; others, which Qwen3-VL has, are added to its first layers' results.
        """
        pictures = self.look(obs)
        if self.kind in PATCHES:
            return torch.cat([self._see_patches(x) for x in pictures], dim=2)
        x = torch.stack(pictures, dim=1)
        found = self.vlm.get_image_features(x if self.kind in NESTED else x.flatten(0, 1)).pooler_output
        found = found if isinstance(found, Tensor) else torch.cat(list(found))
        return found.reshape(len(x), 1, -1, self.width)

    def _see_patches(self, x: Tensor) -> Tensor:
        """Qwen's way: patches in the order of the squares that are merged."""
        vision = self.vlm.config.vision_config
        p, m = _number(vision.patch_size), vision.spatial_merge_size
        n, rows, columns = len(x), x.shape[2] // p, x.shape[3] // p
        x = x.view(n, 3, rows // m, m, p, columns // m, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
        x = x.expand(*x.shape[:6], _number(vision.temporal_patch_size), p, p).reshape(n * rows * columns, -1)
        grid = torch.tensor([[1, rows, columns]], device=x.device)
        out = self.vlm.get_image_features(x, image_grid_thw=grid.expand(n, 3))
        levels = [out.pooler_output, *getattr(out, "deepstack_features", ())]
        return torch.stack([torch.stack(list(level)) for level in levels], dim=1)

    def embed(self, obs: Obs) -> tuple[Tensor, dict[str, Any]]:
        """What the language model reads.

        Returns:
            tokens: [N, S, width], pictures before words.
            more: Further arguments of Qwen's language model.
        """
        seen = obs[SEEN] if SEEN in obs else self.see(obs)
        own = self.vlm.get_input_embeddings()
        words = [self.words.read(obs[self.words_entry], own)] if self.words_entry else []
        tokens = torch.cat([seen[:, 0], *words], dim=1)
        return tokens, self._places(seen, tokens.shape[1]) if self.kind in PATCHES else {}

    def _places(self, seen: Tensor, length: int) -> dict[str, Any]:
        """Qwen's positions in time, height and width, and what it made of pictures at deeper levels."""
        vision = self.vlm.config.vision_config
        p, m = _number(vision.patch_size), vision.spatial_merge_size
        start, places = 0, []
        for height, width in self.sizes.values():
            grid = torch.tensor([1, height // p, width // p], device=seen.device)
            places.append(self.vlm.get_vision_position_ids(start, grid, 1, m, device=seen.device))
            start += max(height, width) // p // m
        n, _, pictures, _ = seen.shape
        places.append(torch.arange(start, start + length - pictures, device=seen.device).expand(3, -1))
        more: dict[str, Any] = {"position_ids": torch.cat(places, dim=1).unsqueeze(1).expand(3, n, -1)}
        if seen.shape[1] > 1:
            more["visual_pos_masks"] = (torch.arange(length, device=seen.device) < pictures).expand(n, -1)
            more["deepstack_visual_embeds"] = [level.flatten(0, 1) for level in seen[:, 1:].unbind(1)]
        return more

    def once(self, obs: Obs) -> Obs:
        """The observation with its pictures encoded, where that is to be kept."""
        if not self.layout:
            return obs
        rows, n = padded(obs)
        with self.autocast():
            seen = self.see(rows)[:n]
        return {SEEN: seen, **{name: x for name, x in obs.items() if name not in self.pictures}}

    def keep(self, obs: Obs) -> Tensor | None:
        """The bytes [N, ...] of what `once` gave; None where nothing is kept, or an entry that training reads lacks."""
        if not self.layout or not self.layout.keys() <= obs.keys():
            return None
        return torch.cat([obs[name].reshape(len(obs[name]), -1).view(torch.uint8) for name in self.layout], dim=1)

    def recall(self, obs: Obs) -> Obs:
        """The observation that `keep` made bytes of; any other as it is."""
        if not self.layout or FEATURES not in obs:
            return obs
        sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in self.layout.values()]
        parts = zip(self.layout.items(), obs[FEATURES].split(sizes, dim=1), strict=True)
        # A copy begins where its type may begin.
        return {name: x.clone().view(dtype).view(-1, *shape) for (name, (dtype, shape)), x in parts}

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
        How pictures that are encoded once are kept is decided here, too.

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
        if self.config.encode_once:
            with torch.no_grad(), self.autocast():
                seen = self.see(blank(self.env, self.mean.device))
            rest = {n: (o.dtype, o.shape) for n, o in self.env.observation.items() if n not in self.pictures}
            self.layout = {SEEN: (seen.dtype, tuple(seen.shape[1:])), **rest}
        if self.config.model.startswith("tiny:"):
            return
        self.left_out = [n for n, p in self.model.named_parameters(remove_duplicate=False) if not p.requires_grad]
        digest = hashlib.sha256(self.words.tongue.encode() if self.words_entry else b"")
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
            "trained on, or its tokenizer is not: give the same folder and the same policy.dtype"
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
        CapabilityError: There is no picture, or several rows of word ids.
    """
    pictures = [n for n, o in env.seen.items() if o.dtype == torch.uint8 and len(o.shape) == 3 and o.shape[2] == 3]
    if not pictures:
        raise CapabilityError("a vision-language model needs a picture [H, W, 3] uint8; this env shows none")
    return pictures, row_of_words(env)


def blank(env: EnvSpec, device: torch.device) -> Obs:
    """One row of zeros of each entry."""
    return {n: torch.zeros(1, *o.shape, dtype=o.dtype, device=device) for n, o in env.observation.items()}
