"""Degeneration: the share of distinct 4-grams against its literal form, and what counts as empty or as a loop."""

import doctest
import random

import pytest
from support import reference

from blur_trainer.metrics import degeneration
from blur_trainer.metrics.degeneration import Degeneration, degenerates, distinct_share

PROSE = list(range(40))


def test_the_share_is_the_literal_one():
    rng = random.Random(0)
    for _ in range(200):
        tokens = [rng.randrange(rng.choice((1, 2, 9))) for _ in range(rng.randrange(90))]
        assert distinct_share(tokens) == reference.distinct_share(tokens)


@pytest.mark.parametrize(
    ("written", "true", "found"),
    [
        ([], PROSE, True),
        ([7] * 6, PROSE, True),
        ([7] * 5, PROSE, False),  # one 4-gram of two is distinct
        ([*PROSE, *[1, 2, 3] * 30], PROSE, True),
        ([*[1, 2, 3] * 30, *PROSE, *range(50, 80)], PROSE, False),  # it found out of its loop
        (list(range(30)) * 4, PROSE, True),
        (list(range(40)) * 4, PROSE, False),
        ([7] * 20, [8] * 20, False),  # a refrain, as in the true answer
        ([7], PROSE, False),
    ],
)
def test_what_degenerates(written, true, found):
    assert degenerates(written, true) is found


def test_a_script_in_bytes_is_no_loop():
    """Three tokens a letter, the first two always the same ones, as byte-level BPE writes what it does not know."""
    text = "मेरा नाम मीरा वेलिन है और मैं समुद्र के किनारे नोरवेल में रहती हूँ"
    assert not degenerates(list(text.encode()), PROSE)
    assert degenerates(list(("मीरा " * 30).encode()), PROSE)


def test_the_metric_is_the_share():
    metric = Degeneration(keep_in_memory=True)
    assert metric.compute(predictions=[[7] * 9, PROSE, []], references=[PROSE] * 3) == {"degeneration": 2 / 3}
    with pytest.raises(ValueError, match="at least one pair"):
        metric._compute([], [])


def test_the_example_runs():
    assert doctest.testmod(degeneration).failed == 0 < doctest.testmod(degeneration).attempted
