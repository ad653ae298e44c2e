"""Bars that last a moment and come again and again are left out: those of tokenizing, loading and writing."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from blur_trainer.scripts.command_line import OLD_NAMES


@contextmanager
def quiet() -> Iterator[None]:
    """The bars of `datasets` and `transformers` are off inside, and as before afterwards. Those of the run stay."""
    ours, theirs = datasets.are_progress_bars_disabled(), not is_progress_bar_enabled()
    datasets.disable_progress_bars()
    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for message in OLD_NAMES:
                warnings.filterwarnings("ignore", message, FutureWarning)
            yield
    finally:
        if not ours:
            datasets.enable_progress_bars()
        if not theirs:
            enable_progress_bar()
