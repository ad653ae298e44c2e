"""Ends a row of `generate` once its text contains a stop string."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria


class StopStrings(StoppingCriteria):
    """Marks the rows whose decoded continuation contains one of the strings. Works on text, for every tokenizer.

    It looks at every token, because a row that runs on costs more than a look. A look waits for the device, as
    `generate` does itself after each token, and copies one token per row. Only rows that still run are decoded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str], width: int) -> None:
        self.tokenizer, self.stop_strings, self.width = tokenizer, stop_strings, width
        self._rows: list[list[int]] = []  # the continuations, on the host
        self._running: list[int] = []
        self._done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self._done is None:
            self._rows = [[] for _ in input_ids]
            self._running = list(range(len(input_ids)))
            self._done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        seen = self.width + len(self._rows[0])
        for row, tokens in zip(self._rows, input_ids[:, seen:].tolist(), strict=True):
            row += tokens
        texts = self.tokenizer.batch_decode([self._rows[row] for row in self._running], skip_special_tokens=True)
        running = [row for row, text in zip(self._running, texts, strict=True) if not self._stops(text)]
        if running != self._running:
            self._running = running
            done = [row not in running for row in range(len(self._rows))]
            self._done = torch.tensor(done, device=input_ids.device)
        return self._done

    def _stops(self, text: str) -> bool:
        return any(stop in text for stop in self.stop_strings)
