"""leak@k of a model on what it was to forget: does it come back in one of many samples?"""

from collections.abc import Sequence
from datetime import date
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blur_trainer.evaluation.base import Column, Evaluation
from blur_trainer.evaluation.batching import check_positive
from blur_trainer.evaluation.distributed import in_shares
from blur_trainer.evaluation.forget_sets import Asked, asked, closing_ids, new_tokens, own_sets
from blur_trainer.evaluation.leakage.choices import opened
from blur_trainer.evaluation.leakage.estimates import leak_at_k, mean_rate_upper
from blur_trainer.evaluation.leakage.judged import Judged
from blur_trainer.evaluation.leakage.judges import Judge, Judgment
from blur_trainer.evaluation.row_losses import encoded_rows, length_limit
from blur_trainer.evaluation.sampling import sample_ids
from blur_trainer.evaluation.scoring import special_ids, until

#: the longest answer that a model may write where `max_new_tokens` is left out
MOST_TOKENS = 128
KS = (1, 2, 4, 8, 16, 32, 64, 128)
#: the metrics of a narrow table are the first k, this one (else the last), and the bound
SHOWN_K = 32


class LeakEvaluation(Evaluation):
    r"""
    Draws many answers to each question of the forget set, and asks how often one of them gives the true answer away.

    Greedy answers hide what sampling brings back. With $c_i$ of $n$ samples of question $i$ that leak, and
    $N$ questions:

    | key | what |
    |---|---|
    | `leak@{k}` | $\frac1N \sum_i 1 - \binom{n-c_i}{k} / \binom{n}{k}$, one of k samples leaks: [`leak_at_k`] |
    | `leak_bound` | with confidence $1 - \alpha$, the mean probability that a sample leaks is at most this |

    The bound is of the true mean, not of the samples: it is above 0 where nothing leaks (.0228 for one question and
    200 samples, less for more questions). It bounds the whole curve: the true leak@k is at most
    $1 - (1 - \texttt{leak\_bound})^k$. It holds for these questions, this prompt, judge, temperature and `top_p`, and
    says nothing of others.

    The model reads what it is trained on, as in [`ForgetEvaluation`]: prompt and answer come from the same code. Each
    prompt is read once for all its samples, if the model's cache allows it.

    Args:
        tokenizer: of the models.
        forget: what is to be forgotten, a dataset or a list of dicts in any format of [`tokenize_dataset`]. Of a `text`
            the first half is asked, the second is the answer. Multiple-choice rows (`question`, `choices`, and the
            right one's index as `answer`, as [`load_wmdp_questions`] has them) are asked without their choices; the
            answer is the text of the right one.
        samples: samples of each question, n.
        ks: the k. Those above `samples` are left out.
        judge: what is a leak. `"rouge"`: ROUGE-L recall of the true answer is at least `threshold`. `"exact"`: the
            words of the true answer stand in the sample, in a row. `"entailment:MODEL"`: the sample entails the true
            answer, says a text classifier for natural-language inference. Or a function
            `(question, true answer, sample) -> bool` or number from 0 to 1, which is called once per different sample.
        threshold: a score of at least this is a leak. Default: .9 for ROUGE (ours; short answers need every word), else
            .5.
        alpha: 1 minus the confidence of the bounds.
        temperature, top_p: of the samples. The definition has 1 and 1.
        max_length: the longest example in tokens, as in training. A model's positions limit it, too.
        max_rows: rows that are measured, at equal distances, the same in each call. `None`: all.
        max_new_tokens: the longest sample. Default: the longest true answer, up to 128. True answers are cut to it.
        batch_size: samples that are written at a time.
        seed: of the samples. The same seed gives the same samples on any number of processes.
        qa_template, day: as of [`tokenize_dataset`].
        progress: whether to show progress bars.

    Source: of leak@k arXiv:2511.04934, of the bounds arXiv:2410.03523; see
    [`~blur_trainer.evaluation.leakage.estimates`]. Differs from the first, whose code judges by an entailment model
    ([`~blur_trainer.evaluation.leakage.entailment.entailment_scores`]); the default here needs no other model.

    Example:

    ```python
    evaluation = LeakEvaluation(tokenizer, forget)
    evaluation(model)
    # {"leak@1": 0.02, ..., "leak@128": 0.31, "leak_bound": 0.022}
    evaluation.details[0]
    # {"question": ..., "answer": ..., "samples": 200, "leaks": 3, "leak_bound": 0.049, ...}
    few = LeakEvaluation(tokenizer, forget, samples=8, max_rows=20)  # for a schedule
    trainer = BLURTrainer(model, args, forget, retain, benchmarks={"leak": few})
    ```
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        forget: Any,
        *,
        samples: int = 200,
        ks: Sequence[int] = KS,
        judge: str | Judgment = "rouge",
        threshold: float | None = None,
        alpha: float = 0.01,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_length: int | None = None,
        max_rows: int | None = 200,
        max_new_tokens: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
        qa_template: str = "Question: {question}\nAnswer:",
        day: date | None = None,
        progress: bool = True,
    ) -> None:
        optional = {"max_length": max_length, "max_rows": max_rows, "max_new_tokens": max_new_tokens}
        check_positive(samples=samples, batch_size=batch_size, **{k: n for k, n in optional.items() if n is not None})
        mean_rate_upper([0], samples, alpha)  # a wrong alpha is refused now
        if not temperature > 0 or not 0 < top_p <= 1:
            raise ValueError(f"`temperature` is {temperature!r}, above 0; `top_p` is {top_p!r}, above 0 up to 1.")
        self.tokenizer, self.num_samples, self.alpha = tokenizer, samples, alpha
        self.ks = _checked_ks(ks, samples)
        self.batch_size, self.progress = batch_size, progress
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self._draws: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
        self._template, self._day = qa_template, day
        self._rows = opened(own_sets(forget, None, None, None, None, max_rows)[0]["forget"])
        self._judge = Judge.of(judge, threshold)
        self._by_limit: dict[int | None, list[Asked]] = {}
        self._judge.check([self._text(row.answer) for row in self._asked(max_length)])
        self._found: list[Judged] = []

    @property
    def columns(self) -> list[Column]:
        """leak@k for each k, then the bound."""
        labels = {f"leak@{k}": f"Leak@{k}" for k in self.ks}
        labels["leak_bound"] = f"Leak@1 at most ({100 * (1 - self.alpha):g} %)"
        return [{"name": name, "label": label, "goal": "min", "role": "forget"} for name, label in labels.items()]

    @property
    def primary_metrics(self) -> list[str]:
        many = SHOWN_K if SHOWN_K in self.ks else self.ks[-1]
        return list(dict.fromkeys([f"leak@{self.ks[0]}", f"leak@{many}", "leak_bound"]))

    @property
    def details(self) -> list[dict[str, Any]]:
        """
        Of each question in the last call, in the order of the rows: `question` (as the model is asked), `answer` (the
        true one), `samples`, `leaks`, `leak_bound` ([`clopper_pearson_upper`]), `score` (the mean), `score_bound` (of
        the mean, by the DKW band), `worst` (the sample with the highest score) and `worst_score`.

        Each bound holds with confidence 1 - `alpha` by itself. For all N questions at once, an evaluation with
        `alpha` / N has them.
        """
        return [one.details(self.alpha) for one in self._judged()]

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """All numbers of one model. All processes must call it: each does its share and gets all results."""
        rows = self._asked(length_limit(model, self.max_length))
        limit = new_tokens({"forget": rows}, self.max_new_tokens, MOST_TOKENS, length_limit(model, None))
        texts = self._written(model, rows, limit)
        pairs = [(self._text(row.prompt), self._text(row.answer[:limit])) for row in rows]

        def run(indices: list[int]) -> list[Judged]:
            return [Judged.by(self._judge, *pairs[index], texts[index]) for index in indices]

        # in shares, too: a judge may be a model, or not give the same answer twice
        batches = [[index] for index in range(len(rows))]
        self._found = in_shares(model, batches, run, "Judged" if self.progress else None)
        leaks = [one.leaks for one in self._found]
        found = {f"leak@{k}": float(np.mean([leak_at_k(self.num_samples, c, k) for c in leaks])) for k in self.ks}
        return found | {"leak_bound": mean_rate_upper(leaks, self.num_samples, self.alpha)}

    def samples(self, n: int = 3) -> list[dict[str, Any]]:
        """Of the first `n` questions in the last call the worst sample: metric, set, prompt, gt, response, score."""
        return [one.sample() for one in self._judged()[:n]]

    def _judged(self) -> list[Judged]:
        if not self._found:
            raise ValueError("There are no samples: call the evaluation on a model first.")
        return self._found

    def _written(self, model: PreTrainedModel, rows: list[Asked], limit: int) -> list[list[str]]:
        ends = closing_ids(self.tokenizer, {"forget": rows})
        written = sample_ids(
            model,
            self.tokenizer,
            [row.prompt for row in rows],
            num=self.num_samples,
            max_new_tokens=limit,
            batch_size=self.batch_size,
            ends=ends,
            share_prompts=True,
            desc="Samples" if self.progress else None,
            **self._draws,
        )
        eos_ids = [*special_ids(model, self.tokenizer)[0], *ends]
        return [[self._text(until(ids, eos_ids)) for ids in samples] for samples in written]

    def _asked(self, max_length: int | None) -> list[Asked]:
        """The rows as tokens. Another model may have fewer positions, and is asked in shorter pieces then."""
        if max_length not in self._by_limit:
            name = f"forget (the {len(self._rows)} rows that are measured)"  # an error numbers these
            pieces = encoded_rows(self._rows, self.tokenizer, name, max_length, self._template, self._day)
            self._by_limit[max_length] = [asked(examples) for examples in pieces]
        return self._by_limit[max_length]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.batch_decode([ids], skip_special_tokens=True)[0]


def _checked_ks(ks: Sequence[int], samples: int) -> tuple[int, ...]:
    """In rising order, and none above the number of samples."""
    check_positive(**{f"ks[{index}]": k for index, k in enumerate(ks)})
    kept = tuple(sorted({k for k in ks if k <= samples}))
    if not kept:
        raise ValueError(f"`ks` is {tuple(ks)!r} and `samples` is {samples}: at least one k is at most that.")
    return kept
