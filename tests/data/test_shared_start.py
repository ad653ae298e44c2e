"""What forget and retain examples begin with alike: the counts, the column, and what RMU steers then."""

import random

import pytest
import torch
from datasets import Dataset

from blur_trainer.data.collators import UnlearningCollator
from blur_trainer.data.shared_start import common_start, repeated_starts, shared_starts, with_shared_starts


def literal(forget: list[list[int]], retain: list[list[int]]) -> list[int]:
    """Every pair, token by token."""
    counts = []
    for ids in forget:
        longest = 0
        for other in retain:
            length = 0
            while length < min(len(ids), len(other)) and ids[length] == other[length]:
                length += 1
            longest = max(longest, length)
        counts.append(longest if longest < len(ids) else 0)
    return counts


@pytest.mark.parametrize("seed", range(20))
def test_the_counts_are_those_of_every_pair(seed: int) -> None:
    draw = random.Random(seed)
    rows = [[draw.choice([0, 1, 70000]) for _ in range(draw.randint(1, 9))] for _ in range(40)]
    cut = draw.randint(1, 39)
    assert shared_starts(rows[:cut], rows[cut:]) == literal(rows[:cut], rows[cut:])


def test_a_whole_row_of_the_retain_set_shares_nothing() -> None:
    assert shared_starts([[1, 2], [1, 2, 3], [1, 9]], [[1, 2, 3, 4], [5]]) == [0, 0, 1]
    assert shared_starts([[1, 2]], []) == [0]


@pytest.mark.parametrize("seed", range(20))
def test_each_start_is_left_in_one_retain_row(seed: int) -> None:
    draw = random.Random(seed)
    rows = [[draw.choice([0, 1, 70000]) for _ in range(draw.randint(1, 9))] for _ in range(40)]
    unlike = [
        list(row) for row in {tuple(row) for row in rows} if not any(row != o and o[: len(row)] == row for o in rows)
    ]
    left = [
        tuple(row[:end])
        for row, begun in zip(unlike, repeated_starts(unlike), strict=True)
        for end in range(begun + 1, len(row) + 1)
    ]
    assert sorted(left) == sorted({tuple(row[:end]) for row in unlike for end in range(1, len(row) + 1)})


def test_the_last_token_of_a_retain_row_is_always_left() -> None:
    assert repeated_starts([[1, 2], [1, 2], [1, 2, 3]]) == [0, 1, 2]
    assert repeated_starts([[4]]) == [0] and repeated_starts([]) == []


@pytest.mark.parametrize(
    ("rows", "start"),
    [
        ([[1, 2, 3], [1, 2, 4], [1, 5]], [1, 2]),  # two of three
        ([[1, 2, 3], [1, 2, 4], [6, 5], [7]], []),  # two of four are no more than half
        ([[1, 2], [1, 2]], [1, 2]),
        ([[9, 1], [70000, 2], [9, 3], [70000, 4], [70000, 5]], [70000]),
    ],
)
def test_what_more_than_half_begin_with(rows: list[list[int]], start: list[int]) -> None:
    assert common_start(rows) == start


def test_the_column_goes_into_the_batch() -> None:
    forget = Dataset.from_dict({"input_ids": [[1, 2, 3], [7, 8]], "labels": [[1, 2, 3], [7, 8]]})
    retain = [Dataset.from_dict({"input_ids": [[1, 2, 4]]}), Dataset.from_dict({"input_ids": [[7, 1]]})]
    made = with_shared_starts(forget, retain)
    assert made["shared_start"][:] == [2, 1]
    assert torch.equal(UnlearningCollator(0)(list(made))["shared_start"], torch.tensor([2, 1]))
