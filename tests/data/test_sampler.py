"""The order of samples: a bijection per epoch, and the same global batches whatever the ranks."""

from itertools import islice

import pytest

from moelm.config import UserError
from moelm.data.sampler import GlobalBatchSampler, hash64, shuffled


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 31, 100, 255, 256, 257, 1000])
def test_each_epoch_visits_each_element_exactly_once(n):
    for epoch in range(3):
        order = [shuffled(position, n, seed=3) for position in range(epoch * n, (epoch + 1) * n)]
        assert sorted(order) == list(range(n))


def test_order_differs_by_epoch_and_by_seed_and_is_not_the_stored_one():
    n = 500
    first = [shuffled(position, n, seed=0) for position in range(n)]
    second = [shuffled(n + position, n, seed=0) for position in range(n)]
    other = [shuffled(position, n, seed=1) for position in range(n)]
    stored = list(range(n))
    for one, two in ((first, second), (first, other), (first, stored), (second, stored)):
        assert sum(a == b for a, b in zip(one, two, strict=True)) < 10  # one is expected by chance


@pytest.mark.parametrize("n", [4096, 8192, 5000])
def test_order_is_spread_evenly(n):
    """Chi-square over (quarter of the epoch, quarter of the data) and over the steps between neighbours."""
    order = [shuffled(position, n, seed=5) for position in range(n)]
    cells = [0] * 16
    steps = [0] * 16
    for position, element in enumerate(order):
        cells[position * 4 // n * 4 + element * 4 // n] += 1
        steps[(element - order[position - 1]) % n * 16 // n] += 1
    for counts in (cells, steps):
        chi_square = sum((count - n / 16) ** 2 / (n / 16) for count in counts)
        assert chi_square < 38  # 15 degrees of freedom: p = 0.001


@pytest.mark.parametrize("n_bits", [12, 13])
def test_every_bit_of_a_position_is_mixed(n_bits):
    n = 2**n_bits
    flipped = [position ^ shuffled(position, n, seed=5) for position in range(n)]
    for bit in range(n_bits):
        assert 0.45 * n < sum(value >> bit & 1 for value in flipped) < 0.55 * n


def test_order_needs_no_memory_of_a_huge_data_set():
    n = 10**12
    assert len({shuffled(position, n, seed=0) for position in range(1000)}) == 1000
    assert all(0 <= shuffled(position, n, seed=0) < n for position in range(10**15, 10**15 + 100))


def test_order_never_changes_between_versions():
    assert [shuffled(position, 10, seed=0) for position in range(10)] == [0, 6, 4, 5, 3, 8, 9, 2, 1, 7]
    assert hash64(1, 2) != hash64(12) != hash64(2, 1)


def global_batches(n_batches: int, micro: int, world: int, start: int = 0, batch: int = 24) -> list[list[int]]:
    """What all ranks together read for each optimizer step, in the order of the samples."""
    n_micro = batch // (micro * world)
    per_rank = [
        list(islice(GlobalBatchSampler(start, batch, micro, rank, world), n_batches * n_micro)) for rank in range(world)
    ]
    return [
        [p for m in range(step * n_micro, (step + 1) * n_micro) for rank in range(world) for p in per_rank[rank][m]]
        for step in range(n_batches)
    ]


@pytest.mark.parametrize(("micro", "world"), [(24, 1), (1, 1), (4, 1), (12, 2), (3, 2), (1, 8), (2, 4), (6, 4)])
def test_a_global_batch_holds_the_same_samples_whatever_the_ranks_and_micro_batches(micro, world):
    batches = global_batches(3, micro, world)
    assert batches == [list(range(0, 24)), list(range(24, 48)), list(range(48, 72))]


def test_a_resumed_run_continues_where_it_stopped_with_other_ranks():
    assert global_batches(3, 2, 2)[2:] == global_batches(1, 3, 4, start=48)


def test_a_batch_that_the_ranks_cannot_share_is_refused():
    with pytest.raises(UserError, match="24 sequences cannot be shared by 5 ranks"):
        GlobalBatchSampler(0, 24, 1, 0, 5)
