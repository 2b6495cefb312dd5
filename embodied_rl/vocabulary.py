"""What env and policy must agree on to mean the same by a token id: which model it is, told by a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path


def fingerprint(parts: Sequence[bytes]) -> str:
    """SHA-256 (hex) over parts with their lengths, so that no two different lists of parts are read as the same bytes.

    Args:
        parts: For example the bytes of a tokenizer file, then those of a template.

    Returns:
        fingerprint: 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def local_folder(name: str) -> Path | None:
    """Where a model is on this machine; nothing is downloaded.

    Args:
        name: A folder, or the name of a model in the cache of Hugging Face.

    Returns:
        folder: None where there is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # not there, there in part, or no name that a model can have
        return None
