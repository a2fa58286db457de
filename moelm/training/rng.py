"""The random state of this process as plain tensors and numbers, so that a checkpoint loads without pickle."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_rank(seed: int, rank: int, step: int) -> None:
    """Seed all generators, differently on each rank: equal dropout masks on all ranks would be one mask. And for each
    `step` that a run begins with, or one that goes on with other ranks would draw the numbers of its beginning."""
    mixed = (seed * 1_000_003 + step * 69_069 + rank) % 2**32
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)  # CUDA too


def rng_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def is_rng_state(state: Any) -> bool:
    """Would `set_rng_state` take it?"""
    try:
        version, words, gauss = state["python"]
        random.Random().setstate((version, tuple(words), gauss))
        keys, *position = state["numpy"]
        np.random.RandomState().set_state(("MT19937", keys.numpy().astype(np.uint32), *position))
        torch.Generator().set_state(state["torch"].cpu())
        return state["cuda"] is None or isinstance(state["cuda"], torch.Tensor)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RuntimeError):
        return False


def set_rng_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
