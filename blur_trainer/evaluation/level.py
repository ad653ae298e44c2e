"""The level: how well a model may know the forget set that never saw it, in nats per answer token."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from blur_trainer.checks import check_value
from blur_trainer.data.chat import has_chat_template
from blur_trainer.data.columns import LEVEL, find_format
from blur_trainer.data.encoding import RowEncoder, leading_special_ids
from blur_trainer.data.exchange import exchanged_answers
from blur_trainer.data.sources import check_dataset, column_names, to_dataset
from blur_trainer.evaluation.scoring import token_logps
from blur_trainer.models.loading import hub_arguments, load_pretrained

Source = Literal["retrained", "unseen", "exchanged", "given"]
_QA = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Level:
    """
    Where forgetting ends, in nats per answer token: make it by one of the `of_` methods, or give a number.

    ```python
    level = bt.Level.of_retrained("retrained-model", forget)   # best: row by row
    level = bt.Level.of_unseen("llm", unseen)                  # the model before unlearning, on rows that nobody saw
    level = bt.Level.of_exchanged("llm", forget)               # an estimate, where there is neither
    config = bt.BLURConfig("out", forget_level=level.nats)     # or "column", with
    forget = level.attached(forget)
    ```

    Args:
        nats: the mean over the rows.
        source: where it is from.
        per_example: the level of each row of the forget set, where it is known.
        spread: the standard deviation over the rows that were measured.
    """

    nats: float
    source: Source = "given"
    per_example: tuple[float, ...] | None = None
    spread: float | None = None

    def __post_init__(self) -> None:
        check_value("nats", self.nats, (float,), "(0, inf)", owner="Level")
        check_value("source", self.source, (Source,), owner="Level")
        check_value("spread", self.spread, (float, type(None)), "[0, inf)", owner="Level")
        if self.per_example is None:
            return
        object.__setattr__(self, "per_example", tuple(map(float, self.per_example)))
        bad = next((i for i, value in enumerate(self.per_example) if not 0 < value < math.inf), None)
        if bad is not None or not self.per_example:
            what = "is empty" if bad is None else f"is {self.per_example[bad]!r} at row {bad}"
            raise ValueError(f"Level: `per_example` {what}: each row needs a finite number above 0, nats per token.")

    @property
    def is_estimate(self) -> bool:
        """Whether it was made of answers that belong to other questions."""
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
    def of_exchanged(cls, model: Any, forget: Any, tokenizer: Any = None, **how: Any) -> "Level":
        """
        An estimate: the loss of the forget set's rows under the model before unlearning, their answers (or texts)
        pieced together from those of other rows ([`exchanged_answers`]).

        The arguments are those of `of_retrained`. It was 6.2, 6.3 and 3.4 nats on three small models where text that
        nobody saw cost 8.1, 5.9 and 4.0, and the retrained model said 8.1, 4.4 and 3.1 (docs/evidence.md).
        """
        return cls._of(row_nats(model, forget, tokenizer, role="forget", exchange=True, **how), "exchanged")

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


def row_nats(
    model: PreTrainedModel | str,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    role: str,
    exchange: bool = False,
    batch_size: int = 16,
    max_length: int | None = None,
    qa_template: str = _QA,
    day: date | None = None,
) -> list[float]:
    """Mean nats per answer token of each row, in order; all processes must call it. See [`Level`]."""
    if isinstance(model, str) and tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model, **hub_arguments({}))
    loaded = _loaded(model) if isinstance(model, str) else model
    limit = length_limit(loaded, max_length)
    pieces = encoded_rows(dataset, tokenizer, role, limit, qa_template, day, exchange=exchange)
    flat = [piece for row in pieces for piece in row]
    logps = token_logps(loaded, flat, pad_token_id=0, batch_size=batch_size)  # masked, so any id will do
    sums = iter((float(one.sum(dtype=np.float64)), len(one)) for one in logps)
    nats = []
    for row in pieces:
        total, tokens = map(sum, zip(*(next(sums) for _ in row), strict=True))
        nats.append(-total / tokens)
    bad = next((index for index, value in enumerate(nats) if not 0 < value < math.inf), None)
    if bad is not None:
        raise ValueError(
            f"Row {bad} of the `{role}` dataset costs the model {nats[bad]!r} nats per token, which is no level: the "
            "model knows it by heart, or is broken. Take the row out, or pass another model."
        )
    return nats


def _loaded(name: str) -> Any:
    """On this process's accelerator, if there is one."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return load_pretrained(name, {}).to(device)


def length_limit(model: Any, max_length: int | None) -> int | None:
    """`max_length`, and no more than the model's positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min((n for n in (max_length, positions) if n is not None), default=None)


def encoded_rows(
    dataset: Any,
    tokenizer: Any,
    role: str,
    max_length: int | None,
    qa_template: str = _QA,
    day: date | None = None,
    *,
    exchange: bool = False,
) -> list[list[dict[str, Any]]]:
    """The examples of each row, as training has them. Raises `ValueError` for an empty row."""
    check_dataset(dataset, role)
    fmt = find_format(column_names(dataset), role)
    if tokenizer is None and fmt != "input_ids":
        raise ValueError(f"The `{role}` dataset is text, and the model was given loaded: pass its `tokenizer` too.")
    prefix = leading_special_ids(tokenizer) if tokenizer is not None else []
    rows = list(to_dataset(dataset, fmt, role, has_template=has_chat_template(tokenizer)))
    encoder = RowEncoder(tokenizer, fmt, role, prefix, max_length, False, 0, qa_template, None, day or date.today())
    pieces = [encoder.encode(row, index) for index, row in enumerate(rows)]
    for index, examples in enumerate(pieces):
        if any(example["empty"] for example in examples):
            raise ValueError(
                f"Row {index} of the `{role}` dataset is empty, or has no answer token within {max_length} tokens: "
                "take it out, or raise `max_length`."
            )
    if not exchange:
        return pieces
    flat = iter(exchanged_answers([example for examples in pieces for example in examples], role))
    return [[next(flat) for _ in examples] for examples in pieces]
