from __future__ import annotations

import time

import pytest

from mirai_dist.state.cursor import BatchLayout, Cursor, samples_of_rank


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_an_epoch_visits_every_entry_once(size: int) -> None:
    cursor = Cursor(3, "generator", size)
    for epoch in range(3):
        indices = [cursor.index(epoch * size + place) for place in range(size)]
        assert sorted(indices) == list(range(size))


def test_epochs_streams_and_seeds_order_differently() -> None:
    def order(seed: int, stream: str, epoch: int) -> tuple[int, ...]:
        cursor = Cursor(seed, stream, 100)
        return tuple(cursor.index(epoch * 100 + place) for place in range(100))

    orders = {order(1, "generator", 0), order(1, "generator", 1), order(1, "critic", 0), order(2, "generator", 0)}
    assert len(orders) == 4
    assert tuple(range(100)) not in orders


def test_the_order_is_well_mixed() -> None:
    """Rank correlation of place and index, and of neighbours, is near zero in every epoch."""
    size = 1000
    cursor = Cursor(1, "generator", size)
    for epoch in range(5):
        indices = [cursor.index(epoch * size + place) for place in range(size)]
        assert abs(correlation(list(range(size)), indices)) < 0.15
        assert abs(correlation(indices[:-1], indices[1:])) < 0.15


def correlation(left: list[int], right: list[int]) -> float:
    count = len(left)
    mean_left, mean_right = sum(left) / count, sum(right) / count
    covariance = sum((a - mean_left) * (b - mean_right) for a, b in zip(left, right, strict=True))
    spread = sum((a - mean_left) ** 2 for a in left) * sum((b - mean_right) ** 2 for b in right)
    return covariance / spread**0.5


def test_an_endless_source_never_repeats() -> None:
    cursor = Cursor(1, "generator", None)
    indices = [cursor.index(number) for number in cursor.take(10_000)]
    assert len(set(indices)) == len(indices)
    assert all(0 <= index < 2**63 for index in indices)
    assert indices[:50] != [Cursor(1, "critic", None).index(number) for number in range(50)]


def test_resumes_at_any_mix_of_world_sizes_consume_the_uninterrupted_sequence() -> None:
    batch = 12
    straight = Cursor(1, "generator", 50)
    expected = [straight.index(number) for number in straight.take(batch * 6)]
    seen: list[int] = []
    consumed = 0
    for ranks, micro_size in [(1, 12), (2, 2), (3, 4), (4, 3), (6, 1), (12, 1)]:
        per_rank = []
        for rank in range(ranks):
            cursor = Cursor(1, "generator", 50)
            cursor.consumed = consumed
            first = cursor.take(batch)[0]
            layout = BatchLayout(ranks, rank, micro_size, batch // (ranks * micro_size))
            assert layout.global_size == batch
            per_rank.append([number for micro in samples_of_rank(first, layout) for number in micro])
        numbers = [number for rank_numbers in per_rank for number in rank_numbers]
        assert len(set(numbers)) == batch, "two ranks hold the same sample"
        seen += [Cursor(1, "generator", 50).index(number) for number in sorted(numbers)]
        consumed += batch
    assert seen == expected


def test_layout_deals_contiguous_blocks_to_micro_batches() -> None:
    layouts = [BatchLayout(ranks=2, rank=rank, micro_size=2, micro_batches=3) for rank in range(2)]
    assert samples_of_rank(24, layouts[0]) == [[24, 25], [28, 29], [32, 33]]
    assert samples_of_rank(24, layouts[1]) == [[26, 27], [30, 31], [34, 35]]


def test_a_large_data_set_costs_no_table() -> None:
    """The paper's 250,000 prompts: reading far into an epoch is as quick as at its start."""
    cursor = Cursor(1, "generator", 250_000)
    started = time.perf_counter()
    indices = [cursor.index(number) for number in range(7 * 250_000 + 100_000, 7 * 250_000 + 100_064)]
    assert len(set(indices)) == 64
    assert time.perf_counter() - started < 0.5


def test_a_data_set_cannot_be_empty() -> None:
    with pytest.raises(ValueError, match="critic"):
        Cursor(1, "critic", 0)
