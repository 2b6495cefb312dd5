"""When an env and a policy mean the same by a token id: a fingerprint over what maps text to ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


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
