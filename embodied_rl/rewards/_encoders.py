"""Frozen features of what is seen: pictures as mean colours over a grid or by a vision model, vectors as they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embodied_rl.errors import CapabilityError, CheckpointError, MissingExtraError, NotFoundError, nearest
from embodied_rl.types import EnvSpec, Obs, TensorSpec

BATCH = 256
"""Pictures that go through a vision model at once."""


def is_picture(spec: TensorSpec) -> bool:
    """Whether an entry is an RGB picture [H, W, 3] of bytes."""
    return spec.dtype == torch.uint8 and len(spec.shape) == 3 and spec.shape[2] == 3


class Encoder:
    """From observations to features [N, D]; nothing in it changes after it is built."""

    def __init__(self, name: str, grid: int, entries: Sequence[str] | None, env: EnvSpec, device: torch.device) -> None:
        """Choose what to look at, and load the vision model if there is one.

        Args:
            name: "pixels", or the folder of a vision model.
            grid: Rows and columns of mean colours.
            entries: Names of observation entries; None for the pictures, or the vectors where there are none.
            env: Whose observations are encoded.
            device: Where.

        Raises:
            NotFoundError: An entry or the folder does not exist.
            CapabilityError: Nothing to look at, or an entry that is neither picture nor vector.
        """
        self.grid, self.device = grid, device
        self.names = choose(entries, env)
        self.pictures = [n for n in self.names if is_picture(env.observation[n])]
        if name != "pixels" and not self.pictures:
            raise CapabilityError(
                f"reward.encoder '{name}' looks at pictures, and among what it is shown ({', '.join(self.names)}) "
                "there is none: set reward.encoder: pixels, which takes vectors as they are, or let the env show some"
            )
        self.model = None if name == "pixels" else VisionModel(name, device)

    def __call__(self, observations: Sequence[Obs]) -> list[Tensor]:
        """Encode several sequences of states at once.

        Args:
            observations: Each name -> [N_i, ...].

        Returns:
            features: Each [N_i, D] float32.
        """
        lengths = [len(o[self.names[0]]) for o in observations]
        columns = [self._entry(n, torch.cat([o[n] for o in observations])) for n in self.names]
        return list(torch.cat(columns, dim=1).split(lengths))

    @torch.no_grad()
    def _entry(self, name: str, x: Tensor) -> Tensor:
        if name not in self.pictures:
            return x.flatten(1).float()
        if self.model is not None:
            return torch.cat([self.model(part) for part in x.split(BATCH)])
        return F.adaptive_avg_pool2d(x.movedim(-1, 1).float() / 255, self.grid).flatten(1)


def choose(entries: Sequence[str] | None, env: EnvSpec) -> list[str]:
    """Names of the entries to look at; see `Encoder`."""
    offered = env.observation
    for name in entries or ():
        if name not in offered:
            raise NotFoundError(f"reward.entries: the env shows no '{name}'{nearest(name, offered)}")
        if not is_picture(offered[name]) and not offered[name].dtype.is_floating_point:
            raise CapabilityError(
                f"reward.entries: '{name}' is {list(offered[name].shape)} of {offered[name].dtype}, expected a picture "
                "[height, width, 3] of torch.uint8 or a vector of numbers: leave it out"
            )
    names = list(entries or [n for n, s in offered.items() if is_picture(s) and not s.constant])
    names = names or [n for n, s in offered.items() if s.dtype.is_floating_point and not s.constant]
    if all(offered[n].constant for n in names):
        raise CapabilityError(
            f"reward: no picture or vector that it looks at changes within an episode of this env (it shows "
            f"{', '.join(offered)}), so none can tell progress: choose another reward model, or reward=null"
        )
    return names


class VisionModel:
    """A vision model of transformers: mean of its last hidden states."""

    def __init__(self, folder: str, device: torch.device) -> None:
        """Load it from a folder; nothing is ever downloaded.

        Args:
            folder: With config.json and safetensors weights, as `save_pretrained` writes it.
            device: Where it runs.

        Raises:
            NotFoundError: There is no such folder, or no model in it that transformers can load.
            CheckpointError: It lacks weights, which would start at random.
            MissingExtraError: transformers is not installed.
        """
        path, where = Path(folder).expanduser(), f"reward.encoder '{folder}'"
        if not (path / "config.json").is_file():
            raise NotFoundError(
                f"{where}: no folder with a config.json; models are never downloaded: give the folder of a vision "
                "model as save_pretrained writes it, or pixels"
            )
        try:
            import transformers
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"{where} needs transformers; run: pip install 'embodied-rl[vla]'") from error
        try:
            model, info = transformers.AutoModel.from_pretrained(
                path, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise NotFoundError(f"{where}: transformers {transformers.__version__} cannot load it ({first})") from error
        # The pooler comes after the hidden states, which are all that is read.
        if missing := sorted(k for k in info["missing_keys"] if "pooler" not in k):
            raise CheckpointError(f"{where}: the folder lacks {len(missing)} weights ({', '.join(missing[:3])}, ...)")
        # A model of pictures and words brings its tower.
        self.model: Any = getattr(model, "vision_model", model).to(device).eval().requires_grad_(False)
        size = getattr(self.model.config, "image_size", None)
        if not isinstance(size, int):
            raise NotFoundError(
                f"{where}: {type(model).__name__} has no image_size, so it is no model of single pictures"
            )
        self.size = size
        file = path / "preprocessor_config.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.mean, self.std = (
            torch.tensor(found.get(f"image_{n}") or (0.5, 0.5, 0.5), device=device).view(3, 1, 1)
            for n in ("mean", "std")
        )

    def __call__(self, pictures: Tensor) -> Tensor:
        """From [N, H, W, 3] uint8 to [N, D]."""
        x = F.interpolate(
            pictures.movedim(-1, 1).float() / 255, (self.size, self.size), mode="bicubic", antialias=True
        ).clamp(0, 1)
        hidden: Tensor = self.model(pixel_values=(x - self.mean) / self.std).last_hidden_state
        return hidden.float().mean(1)
