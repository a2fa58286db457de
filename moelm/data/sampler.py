"""The order of training samples: a pure function of the seed and of how many samples were consumed before.

Nothing is stored, so a resumed run continues exactly where it stopped, also with another number of ranks or
another micro-batch size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from torch.utils.data import Sampler

from moelm.config import UserError

_MASK = 2**64 - 1
_ROUNDS = 6


def hash64(*key: int) -> int:
    """64 bits that depend on all of `key`; the same on every machine and in every version of Python."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def shuffled(position: int, n: int, seed: int) -> int:
    """The element of [0, n) that stands at `position` of an endless sequence of shuffled epochs.

    Positions [e n, (e + 1) n) are epoch e: each element exactly once, in an order of its own. A stored
    permutation would take 8 GB a rank at 10^9 windows, a pass over it every epoch, and a state to save; a
    keyed bijection takes none. It is a Feistel network over the smallest power of two >= n, walked along
    its cycle until the result falls into [0, n): fewer than two steps on average.
    """
    epoch, element = divmod(position, n)
    n_bits = (n - 1).bit_length()
    key = hash64(seed, epoch)
    while True:
        element = _feistel(element, n_bits, key)
        if element < n:
            return element


def _feistel(value: int, n_bits: int, key: int) -> int:
    """A bijection of [0, 2^n_bits): each round swaps the halves and xors one with a hash of the other, which
    can be undone whatever the hash. An even number of rounds brings unequal halves back to their places."""
    width, other = n_bits // 2, n_bits - n_bits // 2
    left, right = value >> other, value & ((1 << other) - 1)
    for i in range(_ROUNDS):
        left, right = right, left ^ (_mix(right ^ key ^ i << 56) & ((1 << width) - 1))
        width, other = other, width
    return left << other | right


def _mix(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


class GlobalBatchSampler(Sampler[list[int]]):
    """Endless micro-batches of one rank, as positions in the global order of samples.

    A global batch is `batch_size` consecutive positions, so it holds the same samples whatever the number
    of ranks and the micro-batch size: rank r's i-th sequence of micro-batch m is number m W b + r b + i of
    it, with W ranks and b sequences a micro-batch.
    """

    def __init__(self, start: int, batch_size: int, micro_batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size % (micro_batch_size * world_size):
            raise UserError(
                f"a batch of {batch_size} sequences cannot be shared by {world_size} ranks in micro-batches "
                f"of {micro_batch_size}\n  remedy: make optim.batch_tokens a multiple of data.seq_len x "
                f"optim.micro_batch_size x {world_size}, or lower optim.micro_batch_size"
            )
        self.start = start
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.micro_batch_size
        while True:  # a global batch is a whole number of these strides
            yield list(range(first, first + self.micro_batch_size))
            first += self.world_size * self.micro_batch_size
