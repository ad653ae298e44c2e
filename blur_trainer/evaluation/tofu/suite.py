"""The evaluation of TOFU: forget quality, model utility, memorization, membership inference."""

import logging
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blur_trainer.data.tofu_templates import TOFUTemplate, check_template
from blur_trainer.evaluation.answer_scoring import score_variants
from blur_trainer.evaluation.base import Column, Evaluation
from blur_trainer.evaluation.batching import check_positive
from blur_trainer.evaluation.scoring import generate
from blur_trainer.evaluation.splits import as_datasets
from blur_trainer.evaluation.tofu.examples import CHOICES, SPLITS, read_splits
from blur_trainer.evaluation.tofu.keys import column_of, metric_keys
from blur_trainer.evaluation.tofu.membership import Membership
from blur_trainer.evaluation.tofu.reference import RetainReference
from blur_trainer.evaluation.token_scores import AnswerScores
from blur_trainer.metrics.protocols import OPEN_UNLEARNING, TOFU, UNICODE, check_protocol, check_rouge_tokenizer

GROUPS = ("forget", "retain", *CHOICES)
MAX_ROWS = {TOFU: 300, OPEN_UNLEARNING: None}
MAX_LENGTH = {TOFU: 200, OPEN_UNLEARNING: 512}
MAX_NEW_TOKENS = 200
logger = logging.getLogger(__name__)
PRIMARY = (
    *("forget_quality", "model_utility", "forget_probability", "forget_rouge", "forget_extraction_strength"),
    *("retain_rouge", "real_authors_rouge", "world_facts_rouge", "privleak"),
)
SAMPLE = ("prompt", "gt", "response", "score")


class TOFUEvaluation(Evaluation):
    r"""
    Measures TOFU's forget quality and model utility, memorization, and membership inference.

    | key | what |
    |---|---|
    | `{forget,retain}_probability` | mean $e^{-\text{NLL per token}}$ of the answer |
    | `{real_authors,world_facts}_probability` | the same over the sum of that of all choices |
    | `{forget,retain,real_authors,world_facts}_rouge` | ROUGE-L recall of the greedy answer, with stemming |
    | `{forget,retain,real_authors,world_facts}_truth_ratio` | see [`TruthRatio`] |
    | `model_utility` | harmonic mean of the nine numbers that are not of the forget set |
    | `forget_quality`, `forget_quality_log10` | p-value of the KS test against the retain model (`reference`) |
    | `forget_exact_memorization`, `forget_extraction_strength` | see the metrics of these names |
    | `mia_{loss,zlib,min_k,min_k_plus_plus}` | AUC between forget and holdout answers; 1: forget is told apart |
    | `mia_gradnorm`, `mia_reference` | the same, with `gradnorm` and with `reference_model` |
    | `privleak` | relative change of Min-K's AUC against the retain model x 100, with `reference` |

    A key exists if its split and its columns do. Each text is run once for all its metrics.

    | `protocol` | `"tofu"` | `"open-unlearning"` |
    |---|---|---|
    | rows | the first 300 of each split | all |
    | tokens of a sequence | 200, then cut | 512, then cut |
    | denominators | exact | + 1e-10 |
    | last token, the end of sequence, in memorization and Min-K | counts | is left out |
    | least extraction strength | 0 | 1 / tokens |
    | `mia_gradnorm` | norm over all parameters | mean of the tensors' norms |

    Generated answers have at most 200 new tokens. A token with probability 0 counts with a log-probability of -1000.

    Differs from TOFU: its 200 tokens of an answer count the padded question.

    Source: Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs" (2024); Dorna et al., "OpenUnlearning"
    (2025).

    Args:
        data (`DatasetDict`):
            `forget_perturbed`, `retain_perturbed` (question, answer, paraphrased_answer, perturbed_answer),
            `real_authors_perturbed`, `world_facts_perturbed` (question, answer, perturbed_answer), `holdout` (question,
            answer). Other splits are ignored; missing ones are not evaluated.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The models' tokenizer.
        template (`str` or [`TOFUTemplate`], *optional*, defaults to `"plain"`):
            How a question becomes a prompt. Use that of the training. `"plain"` is what the trainers make of `question`
            and `answer` if the tokenizer has no chat template. See [`apply_template`] for the others.
        protocol (`str`, *optional*, defaults to `"tofu"`):
            Whose conventions, see the table.
        reference ([`RetainReference`], *optional*):
            The retain model's numbers, from [`~TOFUEvaluation.reference`] or a published log.
        gradnorm (`bool`, *optional*, defaults to `False`):
            Whether to attack by gradient norms: one backward pass per forget and holdout answer.
        reference_model ([`~transformers.PreTrainedModel`], *optional*):
            The model for the attack `reference`. It is run once.
        batch_size (`int`, *optional*, defaults to `16`):
            Questions per forward pass, each with all its answers.
        max_new_tokens (`int`, *optional*, defaults to 200), max_length (`int`, *optional*):
            They replace the protocol's values.
        rouge_tokenizer (`str`, *optional*, defaults to `"unicode"`):
            What ROUGE counts as a word: `"unicode"`, in every script, or `"original"`, ASCII letters and digits. Both
            agree on Latin script.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars (in the main process: of its share).

    Example:

    ```python
    evaluation = TOFUEvaluation(data, tokenizer)
    evaluation = TOFUEvaluation(data, tokenizer, reference=evaluation.reference(retain_model))
    evaluation(model)
    # {"forget_probability": 0.35, ..., "model_utility": 0.58, "forget_quality": 0.12, ...}
    ```
    """

    def __init__(
        self,
        data: Mapping[str, Dataset],
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | TOFUTemplate = "plain",
        protocol: str = TOFU,
        reference: RetainReference | None = None,
        gradnorm: bool = False,
        reference_model: PreTrainedModel | None = None,
        batch_size: int = 16,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        rouge_tokenizer: str = UNICODE,
        progress: bool = True,
    ) -> None:
        check_protocol(protocol)
        self.max_new_tokens = MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
        self.max_length = MAX_LENGTH[protocol] if max_length is None else max_length
        self.batch_size = batch_size
        check_positive(max_new_tokens=self.max_new_tokens, max_length=self.max_length, batch_size=batch_size)
        form = check_template(template)
        self.rouge_tokenizer = check_rouge_tokenizer(rouge_tokenizer)
        data = as_datasets(data)
        self._splits = read_splits(data, tokenizer, form, max_rows=MAX_ROWS[protocol], max_length=self.max_length)
        self.metric_keys = metric_keys(
            self._splits, reference=reference, gradnorm=gradnorm, by_reference=reference_model is not None
        )
        self.tokenizer, self.protocol, self.progress = tokenizer, protocol, progress
        self.retain_reference = reference
        self._membership = None
        if "holdout" in self._splits:
            self._membership = Membership(
                self._splits["forget"],
                self._splits["holdout"],
                protocol=protocol,
                gradnorm=gradnorm,
                reference_model=reference_model,
                batch_size=batch_size,
                progress=progress,
            )
        self._records: dict[str, list[dict[str, Any]]] = {}

    @property
    def primary_metrics(self) -> list[str]:
        """Keys of a short table: TOFU's two numbers, one per group, memorization and privacy."""
        return [key for key in PRIMARY if key in self.metric_keys]

    @property
    def columns(self) -> list[Column]:
        """What a table shows of each metric: `name`, `label` and the `goal`: `"min"`, `"max"` or `"zero"`."""
        # attacks have no column: the best value is the retain model's, and `privleak` compares with it
        shown = [key for key in self.metric_keys if not key.startswith("mia_") and "log10" not in key]
        return [column_of(key) for key in dict.fromkeys([*self.primary_metrics, *shown])]

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """All metrics of one model. Of several processes all must call it; each does its share and gets everything."""
        # Here and not above: `evaluate` takes seconds to import, and only evaluation needs it.
        from blur_trainer.evaluation.tofu.aggregates import SplitScores, aggregate, memorization

        self._records = {}
        scores = {group: self._score(model, group) for group in self._splits}
        splits = {
            group: SplitScores.of(group, split, scores[group], self._rouge(model, group))
            for group, split in self._splits.items()
            if group in GROUPS
        }
        values = aggregate(splits, reference=self.retain_reference, protocol=self.protocol)
        if "forget" in splits:
            values |= memorization([answers[0] for answers in scores["forget"]], self.protocol)
        if self._membership is not None:
            min_k_auc = None if self.retain_reference is None else self.retain_reference.min_k_auc
            values |= self._membership(model, scores["forget"], scores["holdout"], min_k_auc)
        return {key: values[key] for key in self.metric_keys}

    def reference(self, model: PreTrainedModel) -> RetainReference:
        """Makes the `reference` from the retain model. Scores only the forget and holdout answers."""
        from blur_trainer.evaluation.tofu.aggregates import SplitScores

        if "forget_truth_ratio" not in self.metric_keys:
            raise ValueError(
                f"A reference needs the split `{SPLITS['forget']}` with the columns `paraphrased_answer` and "
                "`perturbed_answer`: add them to `data`."
            )
        scores = {group: self._score(model, group) for group in ("forget", "holdout") if group in self._splits}
        forget = SplitScores.of("forget", self._splits["forget"], scores["forget"], rouge=())
        auc = None if self._membership is None else self._membership.min_k_auc(scores["forget"], scores["holdout"])
        if auc == 1:
            logger.warning("Min-K always succeeds on the retain model: no PrivLeak, which would divide by 0.")
            auc = None
        return RetainReference(tuple(forget.truth_ratios(self.protocol)), auc)

    def samples(self, n: int = 3) -> list[dict[str, Any]]:
        """The first `n` answers of each group in the last call: metric, prompt, gt, response, score (0 to 1)."""
        if not self._records:
            raise ValueError("There are no samples: call the evaluation first.")
        return [{"metric": key, **record} for key, records in self._records.items() for record in records[:n]]

    def _score(self, model: PreTrainedModel, group: str) -> list[list[AnswerScores]]:
        return score_variants(
            model,
            self._splits[group].variants,
            pad_token_id=0,  # masked: any id does
            batch_size=self.batch_size,
            details=group in ("forget", "holdout"),
            desc=f"TOFU {group}" if self.progress else None,
        )

    def _rouge(self, model: PreTrainedModel, group: str) -> list[float]:
        from blur_trainer.metrics.rouge_l_recall import rouge_l_recall

        split = self._splits[group]
        responses = generate(
            model,
            self.tokenizer,
            split.prompts,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            desc=f"TOFU {group} answers" if self.progress else None,
        )
        pairs = zip(responses, split.answers, strict=True)
        recalls = [rouge_l_recall(response, truth, self.rouge_tokenizer) for response, truth in pairs]
        rows = zip(split.prompts, split.answers, responses, recalls, strict=True)
        self._records[f"{group}_rouge"] = [dict(zip(SAMPLE, row, strict=True)) for row in rows]
        return recalls
