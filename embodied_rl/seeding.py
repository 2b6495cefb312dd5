"""Where episodes start: seeds for training and evaluation that can never meet.

A start seed is a 62-bit hash of (run seed, stream, index) followed by one bit that says which set it belongs to:
0 for training, 1 for evaluation. So the two sets are disjoint by construction, not by luck.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch
from torch import Tensor

from embodied_rl.types import Split


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
