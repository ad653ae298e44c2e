"""The level: how well a model may know the forget set that never saw it, in nats per answer token."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from blur_trainer.checks import check_value
from blur_trainer.data.columns import LEVEL
from blur_trainer.data.sources import check_dataset, column_names
from blur_trainer.evaluation.exchanged import exchanged_rouge, exchanged_rows
from blur_trainer.evaluation.row_losses import loaded_with_tokenizer, row_nats

Source = Literal["retrained", "unseen", "exchanged", "given"]


@dataclass(frozen=True)
class Level:
    """
    Where forgetting ends, in nats per answer token: make it by one of the `of_` methods, or give a number.

    ```python
    level = bt.Level.of_retrained("retrained-model", forget)   # best: row by row
    level = bt.Level.of_unseen("llm", unseen)                  # the model before unlearning, on rows that nobody saw
    level = bt.Level.of_exchanged("llm", forget, retain)       # an estimate, where there is neither
    config = bt.BLURConfig("out", forget_level=level.nats)     # or "column", with
    forget = level.attached(forget)
    ```

    Args:
        nats: the mean over the rows.
        source: where it is from.
        per_example: the level of each row of the forget set, where it is known.
        spread: the standard deviation over the rows that were measured.
        rouge: ROUGE-L recall of the answers with exchanged words against the true ones: how much of an answer is right
            where none of its own words is. `None` where the words were not exchanged, or without a tokenizer.
    """

    nats: float
    source: Source = "given"
    per_example: tuple[float, ...] | None = None
    spread: float | None = None
    rouge: float | None = None

    def __post_init__(self) -> None:
        check_value("nats", self.nats, (float,), "(0, inf)", owner="Level")
        check_value("source", self.source, (Source,), owner="Level")
        check_value("spread", self.spread, (float, type(None)), "[0, inf)", owner="Level")
        check_value("rouge", self.rouge, (float, type(None)), "[0, 1]", owner="Level")
        if self.per_example is None:
            return
        object.__setattr__(self, "per_example", tuple(map(float, self.per_example)))
        bad = next((i for i, value in enumerate(self.per_example) if not 0 < value < math.inf), None)
        if bad is not None or not self.per_example:
            what = "is empty" if bad is None else f"is {self.per_example[bad]!r} at row {bad}"
            raise ValueError(f"Level: `per_example` {what}: each row needs a finite number above 0, nats per token.")

    @property
    def is_estimate(self) -> bool:
        """Whether it was made of rows whose words were exchanged."""
        return self.source == "exchanged"

    @classmethod
    def of_retrained(cls, model: Any, forget: Any, tokenizer: Any = None, **how: Any) -> "Level":
        """
        The loss of each forget row under a model that was trained without the forget set.

        Args:
            model: that model, loaded (whole, or as FSDP2 and ZeRO-3 hold it), or its name.
            forget: the forget set, in any format of [`tokenize_dataset`]. Several pieces of a text count by tokens.
            tokenizer: of the model. Default: the one beside the name.
            how: `batch_size=16`, `max_length=None`, and `qa_template` and `day` as of [`tokenize_dataset`].

        Raises:
            `ValueError`: no row, a row without an answer token, or one that the model knows by heart.
        """
        nats = row_nats(model, forget, tokenizer, role="forget", **how)
        return cls._of(nats, "retrained", per_example=tuple(nats))

    @classmethod
    def of_unseen(cls, model: Any, unseen: Any, tokenizer: Any = None, **how: Any) -> "Level":
        """
        The loss of rows that no model saw, of the forget set's kind, under the model before unlearning.

        The arguments are those of `of_retrained`. The rows are others than those to forget, so all of them get the
        mean.
        """
        return cls._of(row_nats(model, unseen, tokenizer, role="unseen", **how), "unseen")

    @classmethod
    def of_exchanged(cls, model: Any, forget: Any, retain: Any, tokenizer: Any = None, **how: Any) -> "Level":
        """
        An estimate: the loss of the forget set's rows under the model before unlearning, with the words that hardly
        stand in the retain set exchanged for other such words of the retain set, in question and answer alike
        ([`exchanged_texts`]; of token ids: [`exchanged_tokens`]).

        Such a row has the form of a row to forget, and nobody ever saw it. On eight small models the estimate was .96
        to 1.32 times what the retrained model loses, and text that nobody saw cost 1.00 to 1.40 times that
        (docs/evidence.md).

        The words of each row are exchanged four times; rows without a word of their own do not count. All rows get the
        mean: the estimate of a single row may be so low that its answer would stay word for word.

        Args:
            retain: in any format of [`tokenize_dataset`]; also several sets by name. The first 10 000 rows are read.

        The other arguments are those of `of_retrained`. Raises `ValueError`, too, where no word can be exchanged.
        """
        loaded, tokenizer = loaded_with_tokenizer(model, tokenizer)
        told = {name: value for name, value in how.items() if name != "batch_size"}
        rows = exchanged_rows(loaded, forget, retain, tokenizer, **told)
        flat = [row for drawn in rows for row in drawn]
        if how.get("max_length") is not None:  # other words may have more tokens
            how["max_length"] *= 2
        nats = row_nats(loaded, flat, tokenizer, role="forget", known=True, **how) if flat else []
        if not nats:
            raise ValueError(
                "No row of the `forget` dataset has a word that hardly stands in the `retain` dataset, so nothing can "
                "be exchanged for an estimate of the level: give unseen rows, a retrained model, or nats per token."
            )
        how.pop("batch_size", None)
        rouge = None if tokenizer is None else exchanged_rouge(loaded, forget, rows, tokenizer, **how)
        return dataclasses.replace(cls._of(nats, "exchanged"), rouge=rouge)

    @classmethod
    def _of(cls, nats: Sequence[float], source: Source, per_example: tuple[float, ...] | None = None) -> "Level":
        return cls(float(np.mean(nats)), source, per_example, float(np.std(nats)))

    def attached(self, dataset: Any) -> Any:
        """
        The dataset, or list of rows, with the column `forget_level`; without levels of single rows the mean in each.

        Raises `ValueError` if the levels are of another number of rows, or if there is such a column.
        """
        check_dataset(dataset, "forget")
        if not isinstance(dataset, Dataset | list):
            raise TypeError("`attached` needs a dataset of known length, not a stream: load it.")
        levels = self.per_example or (self.nats,) * len(dataset)
        if len(levels) != len(dataset):
            raise ValueError(
                f"The level is of {len(levels)} rows, and the dataset has {len(dataset)}: measure it on this one."
            )
        if LEVEL in column_names(dataset):
            raise ValueError(f"The dataset has a column `{LEVEL}` already: take it out first.")
        if isinstance(dataset, Dataset):
            return dataset.add_column(LEVEL, list(levels))
        return [{**row, LEVEL: level} for row, level in zip(dataset, levels, strict=True)]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Level":
        """What `to_json` wrote. Raises `ValueError` for anything else."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Not the JSON of a `Level`: {error}.") from error
        known = {f.name for f in fields(cls)}
        if not isinstance(content, Mapping) or "nats" not in content or not set(content) <= known:
            raise ValueError(f"Not the JSON of a `Level`, which has {sorted(known)}: make it by `to_json`.")
        return cls(**content)
