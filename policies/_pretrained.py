"""Loading weights that somebody else saved, whole or with one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from embodied_rl.errors import CheckpointError, NotFoundError


def from_folder(kind: Callable[[], Any], path: str | Path, where: str, **how: Any) -> Any:
    """A model of transformers from a local folder.

    Args:
        kind: Gives the class whose `from_pretrained` loads it; what it raises is told as well.
        path: The folder.
        where: Begins each message.
        how: For `from_pretrained`.

    Raises:
        NotFoundError: transformers cannot load it.
        CheckpointError: It lacks weights, which would start at random.
    """
    try:
        model, info = kind().from_pretrained(
            path, local_files_only=True, use_safetensors=True, output_loading_info=True, **how
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise NotFoundError(f"{where}: transformers {transformers.__version__} cannot load it ({first})") from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{where}: the folder lacks {len(missing)} weights of its config.json ({', '.join(missing[:3])}, ...), and "
            "they would start at random: give the whole model"
        )
    return model
