"""Where episodes start: seeds for training and evaluation that can never meet.

A start seed is a 62-bit hash of (run seed, stream, index) followed by one bit that says which set it belongs to:
0 for training, 1 for evaluation. So the two sets are disjoint by construction, not by luck.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor

from embodied_rl.types import Split, State


def start_seed(run_seed: int, split: Split, stream: int, index: int) -> int:
    """Return the seed of one episode start.

    Args:
        run_seed: The recipe's seed.
        split: Which set of starts.
        stream: Independent sequence, for example the group of copies that share starts.
        index: Position in the sequence, 0, 1, 2, ...

    Returns:
        seed: int in [0, 2**63), odd exactly for evaluation.
    """
    digest = hashlib.blake2b(f"{run_seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 2) << 1 | (split == "eval")


def start_seeds(run_seed: int, split: Split, streams: Tensor, indices: Tensor) -> Tensor:
    """Vector form of `start_seed`: streams [B] and indices [B] int64 -> seeds [B] int64."""
    pairs = zip(streams.tolist(), indices.tolist(), strict=True)
    return torch.tensor([start_seed(run_seed, split, s, i) for s, i in pairs], dtype=torch.int64)


def split_of(seeds: Tensor) -> Tensor:
    """[B] bool, True where a start seed belongs to the evaluation set."""
    return (seeds & 1).bool()


def numpy_rng(seed: int, purpose: str = "") -> np.random.Generator:
    """A NumPy generator for one start; another `purpose` gives an independent stream of the same start."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch's global generators (network initialisation reads the last)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def global_rng_state() -> State:
    """State of the generators that `seed_everything` seeds: an env or policy may draw from them unasked."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = cast("tuple[str, np.ndarray, int, int, float]", np.random.get_state())
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": position,
            "has_gauss": has_gauss,
            "cached": cached,
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_global_rng_state(state: State) -> None:
    """Restore `global_rng_state`; CUDA generators only where there are as many devices as then."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def global_rng_untouched() -> Iterator[None]:
    """Put the global generators back after the block, so that what happens inside changes nothing after it."""
    state = global_rng_state()
    try:
        yield
    finally:
        set_global_rng_state(state)
