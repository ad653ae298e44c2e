"""How well a model knows your own sets: what it is to forget, what it is to keep, and text that it never saw."""

from collections.abc import Sequence
from datetime import date
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blur_trainer.evaluation.base import Column, Evaluation
from blur_trainer.evaluation.batching import check_positive
from blur_trainer.evaluation.forget_columns import columns_of
from blur_trainer.evaluation.forget_scores import Answer, Known, known_means, membership_auc, read_answer, said_means
from blur_trainer.evaluation.forget_sets import Asked, asked, closing_ids, new_tokens, own_sets
from blur_trainer.evaluation.level import Level
from blur_trainer.evaluation.lm_eval import LMEval
from blur_trainer.evaluation.row_losses import encoded_rows, length_limit
from blur_trainer.evaluation.scoring import generate_ids

#: the longest answer that a model may write where `max_new_tokens` is left out
MOST_TOKENS = 128


class ForgetEvaluation(Evaluation):
    r"""
    Measures a model on your own sets, in any format of [`tokenize_dataset`].

    The sets are `forget`, `paraphrased` (the same questions in other words), `retain`, `hold` (known to the model, in
    neither set of the training) and `unseen` (of the forget set's kind, and no model saw it). A key exists if its set
    is there. With $\ell_t$ the log-probabilities of a row's $T$ answer tokens:

    | key | what, mean over the rows of the set |
    |---|---|
    | `{set}_loss` | $-\frac1T\sum_t\ell_t$, nats per answer token: what a [`Level`] is compared with |
    | `{set}_probability` | $\exp(\frac1T\sum_t\ell_t)$, the geometric mean of the tokens' probabilities, 0 to 1 |
    | `{set}_extraction` | extraction strength: how much of the answer, from its end, is all likeliest tokens, a share |
    | `{set}_rouge` | ROUGE-L recall of the greedy answer, 0 to 1 |
    | `{set}_exact` | share of greedy answers that are the true one, white space aside |
    | `membership_auc` | AUC of Min-40% between `forget` and `unseen`: 1 is "knows the forget set", .5 no difference |
    | `degeneration` | share of greedy answers of `retain` and `hold` that are empty or repeat themselves |
    | `forget_degeneration` | the same of `forget` |
    | `score` | $\lvert$`forget_loss` - level$\rvert$ + `retain_loss`, with a `level`: less is better |
    | `lm_eval_{task}_{metric}` | what lm-evaluation-harness says, with `lm_eval` |

    The model reads what it is trained on: prompt and answer come from the same code, with the chat template where the
    tokenizer has one. Of a `text` all tokens are scored; the model reads the first half (of the first piece of
    `max_length`) and goes on. True answers are cut to `max_new_tokens`, too. ROUGE knows the words of every script.

    No value of a forget metric is best by being extreme: the best is the nearest to the level, or to the retrained
    model's. So `metric_for_best_model` may name this evaluation only if it has a `level`; it then means `score`.

    Args:
        tokenizer: of the models.
        forget: rows to forget, a dataset or a list of dicts. The column `paraphrased_question` makes `paraphrased`.
        retain, hold, unseen, paraphrased: the other sets.
        level: the [`Level`], or nats per token.
        max_length: the longest example in tokens, as in training. A model's positions limit it, too.
        max_rows: rows of each set that are measured, at equal distances, the same in each call. `None`: all.
        max_new_tokens: the longest answer that the model may write. Default: the longest true answer, up to 128.
        batch_size: sequences per forward pass.
        qa_template, day: as of [`tokenize_dataset`].
        lm_eval: tasks of lm-evaluation-harness, for [`LMEval`]. They read at most `max_rows` rows each.
        progress: whether to show progress bars.

    Example:

    ```python
    evaluation = ForgetEvaluation(tokenizer, forget=forget, retain=retain, hold=hold, unseen=unseen, level=level)
    before = evaluation(model)
    trainer = BLURTrainer(model, args, forget, retain, benchmarks={"own": evaluation})
    trainer.train()
    judge(before, evaluation(trainer.model), level).sentence
    ```
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        forget: Any,
        retain: Any = None,
        *,
        hold: Any = None,
        unseen: Any = None,
        paraphrased: Any = None,
        level: Level | float | None = None,
        max_length: int | None = None,
        max_rows: int | None = 200,
        max_new_tokens: int | None = None,
        batch_size: int = 16,
        qa_template: str = "Question: {question}\nAnswer:",
        day: date | None = None,
        lm_eval: Sequence[str] | None = None,
        progress: bool = True,
    ) -> None:
        optional = {"max_length": max_length, "max_rows": max_rows, "max_new_tokens": max_new_tokens}
        check_positive(batch_size=batch_size, **{name: n for name, n in optional.items() if n is not None})
        self.tokenizer, self.batch_size, self.progress = tokenizer, batch_size, progress
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self._template, self._day = qa_template, day
        self._rows, indices = own_sets(forget, retain, hold, unseen, paraphrased, max_rows)
        self.level = _nats(level, indices)
        self._by_limit: dict[int | None, dict[str, list[Asked]]] = {}
        self._asked(max_length)  # what cannot be read is refused now
        self._harness = None
        if lm_eval is not None:
            self._harness = LMEval(lm_eval, tokenizer, limit=max_rows, batch_size=batch_size)
        self._answers: dict[str, list[Answer]] = {}

    @property
    def columns(self) -> list[Column]:
        """The metrics by set, then those of all sets."""
        tasks = [] if self._harness is None else self._harness.columns
        return columns_of(list(self._rows), self.level, tasks)

    @property
    def primary_metrics(self) -> list[str]:
        shown = ("forget_rouge", "forget_loss", "retain_rouge", "hold_rouge", "membership_auc")
        names = {column["name"] for column in self.columns}
        return [name for name in shown if name in names]

    @property
    def primary_metric(self) -> str:
        """`score`; without a level the first of the primary metrics, for which neither greater nor less is better."""
        return "score" if self.level is not None else self.primary_metrics[0]

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """All metrics of one model. All processes must call it: each does its share and gets all results."""
        positions = length_limit(model, None)
        sets = self._asked(length_limit(model, self.max_length))
        limit = new_tokens(sets, self.max_new_tokens, MOST_TOKENS, positions)
        known = {name: self._knows(model, name, rows) for name, rows in sets.items()}
        self._answers = {name: self._says(model, name, sets, limit) for name in sets}
        found: dict[str, float] = {}
        for name in sets:
            found |= {f"{name}_{key}": value for key, value in known_means(known[name]).items()}
            found |= {f"{name}_{key}": value for key, value in said_means(self._answers[name]).items()}
        kept = [answer for name in ("retain", "hold") for answer in self._answers.get(name, [])]
        if kept:
            found["degeneration"] = said_means(kept)["degeneration"]
        for name in ("paraphrased", "retain", "hold", "unseen"):
            found.pop(f"{name}_degeneration", None)
        if "unseen" in known:
            found["membership_auc"] = membership_auc(known["forget"], known["unseen"])
        if self.level is not None:
            found["score"] = abs(found["forget_loss"] - self.level) + found.get("retain_loss", 0.0)
        if self._harness is not None:
            found |= {f"lm_eval_{key}": value for key, value in self._harness(model).items()}
        return found

    def samples(self, n: int = 3) -> list[dict[str, Any]]:
        """The first `n` answers of each set in the last call: metric, set, prompt, gt, response, score (its ROUGE)."""
        if not self._answers:
            raise ValueError("There are no samples: call the evaluation on a model first.")
        return [
            {"metric": f"{name}_rouge", "set": name, **answer.sample()}
            for name, answers in self._answers.items()
            for answer in answers[:n]
        ]

    def _asked(self, max_length: int | None) -> dict[str, list[Asked]]:
        """The sets as tokens. Another model may have fewer positions, and is asked in shorter pieces then."""
        if max_length not in self._by_limit:
            how = (self.tokenizer, max_length, self._template, self._day)
            self._by_limit[max_length] = {name: self._encoded(name, rows, *how) for name, rows in self._rows.items()}
        return self._by_limit[max_length]

    @staticmethod
    def _encoded(name: str, rows: Any, tokenizer: Any, limit: int | None, template: str, day: Any) -> list[Asked]:
        sample = f"{name} (the {len(rows)} rows that are measured)"  # an error numbers these
        return [asked(pieces) for pieces in encoded_rows(rows, tokenizer, sample, limit, template, day)]

    def _knows(self, model: PreTrainedModel, name: str, rows: list[Asked]) -> list[Known]:
        return Known.of(model, rows, self.batch_size, self._desc("Loss", name))

    def _says(self, model: PreTrainedModel, name: str, sets: dict[str, list[Asked]], limit: int) -> list[Answer]:
        written = generate_ids(
            model,
            self.tokenizer,
            [row.prompt for row in sets[name]],
            max_new_tokens=limit,
            batch_size=self.batch_size,
            ends=closing_ids(self.tokenizer, sets),
            desc=self._desc("Answers", name),
        )
        pairs = zip(sets[name], written, strict=True)
        return [read_answer(self.tokenizer, row.prompt, row.answer[:limit], tokens) for row, tokens in pairs]

    def _desc(self, what: str, name: str) -> str | None:
        return f"{what} {name}" if self.progress else None


def _nats(level: Level | float | None, indices: list[int]) -> float | None:
    """The level of the rows that are measured."""
    if level is None:
        return None
    level = level if isinstance(level, Level) else Level(level)
    single = level.per_example
    if single is None or max(indices) >= len(single):
        return level.nats
    return sum(single[index] for index in indices) / len(indices)
