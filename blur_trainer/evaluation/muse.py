"""The evaluation of MUSE: VerbMem, KnowMem and PrivLeak."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blur_trainer.evaluation.base import Column, Evaluation
from blur_trainer.evaluation.batching import check_positive
from blur_trainer.evaluation.muse_keys import GROUPS, PRIVLEAK, metric_keys
from blur_trainer.evaluation.scoring import generate, token_logps
from blur_trainer.evaluation.splits import as_datasets
from blur_trainer.metrics.protocols import UNICODE, check_rouge_tokenizer

METRICS = {"verbmem": "VerbMem", "knowmem": "KnowMem"}


class MUSEEvaluation(Evaluation):
    r"""
    Measures the first three criteria of MUSE.

    | key | what |
    |---|---|
    | `{forget,retain,hold}_verbmem` | mean ROUGE-L F1 x 100 between the continuation of a passage and the true one |
    | `{forget,retain,hold}_knowmem` | mean ROUGE-L F1 x 100 between the answer to a question and the true one |
    | `privleak_auc` | AUC of Min-40% between forget and holdout texts |
    | `privleak` | (AUC - AUC_retrain) / AUC_retrain x 100, only with `auc_retrain` |

    Continuations are greedy and 128 tokens long; the truth is cut to 128 token ids (BOS counts). Answers are greedy and
    32 tokens long. Their prompt is `"Question: ...\nAnswer: "` after solved examples of the same form, and they are cut
    where the next question would begin. Texts are scored whole.

    A key exists if its split does. `hold` is not in MUSE: the model knew it, no unlearning step saw it, and it shows
    damage that the retain set hides.

    Differs from open-unlearning: ROUGE without stemming, truths cut, and no AUC_retrain of 0.5 assumed.
    Differs from MUSE: decoding without `clean_up_tokenization_spaces` (transformers 5 has dropped it for BPE); only the
    EOS ids of the model's generation configuration are used; Min-40% is defined on short texts.

    Source: Shi et al., "MUSE: Machine Unlearning Six-Way Evaluation for Language Models" (2025).

    Args:
        data (`DatasetDict`, or mapping of names to lists of dicts):
            Splits named `{config}_{split}`: `verbmem_forget` (prompt, gt), `knowmem_forget_qa` and
            `knowmem_forget_qa_icl` (question, answer), the same with `retain` and `hold`, `privleak_forget` and
            `privleak_holdout` (text). Other splits are ignored; missing ones are not evaluated.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The models' tokenizer.
        auc_retrain (`float`, *optional*):
            [`~MUSEEvaluation.privleak_auc`] of the model retrained without the forget set, in (0, 1]. The paper's
            retrained Llama-2-7B: 0.4772 on News, 0.5393 on Books. Without it there is no `privleak`, only the AUC.
        icl (`bool`, *optional*, defaults to `True`):
            Whether questions follow the (ten, in MUSE) solved ones of the `_icl` split.
        max_new_tokens_verbmem (`int`, *optional*, defaults to `128`):
            Length of the continuation and of the truth.
        max_new_tokens_knowmem (`int`, *optional*, defaults to `32`):
            Length of the answer.
        batch_size (`int`, *optional*, defaults to `16`):
            Sequences per forward pass.
        rouge_tokenizer (`str`, *optional*, defaults to `"unicode"`):
            What ROUGE counts as a word: `"unicode"`, in every script, or `"original"`, ASCII letters and digits. Both
            agree on Latin script.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars (in the main process, for its share).

    Example:

    ```python
    evaluation = MUSEEvaluation(data, tokenizer, auc_retrain=0.4772)
    evaluation(model)
    # {"forget_verbmem": 58.3, "forget_knowmem": 63.9, "retain_knowmem": 55.2, "privleak_auc": 0.001, "privleak": -99.8}
    evaluation.samples(1)[0]
    # {"metric": "forget_verbmem", "prompt": ..., "gt": ..., "response": ..., "score": 0.61}
    ```
    """

    def __init__(
        self,
        data: Mapping[str, Dataset],
        tokenizer: PreTrainedTokenizerBase,
        *,
        auc_retrain: float | None = None,
        icl: bool = True,
        max_new_tokens_verbmem: int = 128,
        max_new_tokens_knowmem: int = 32,
        batch_size: int = 16,
        rouge_tokenizer: str = UNICODE,
        progress: bool = True,
    ) -> None:
        # Imported here, because `evaluate` takes seconds to import and only evaluation needs it.
        from blur_trainer.metrics import knowmem, privleak, rouge_l, verbmem

        check_positive(
            max_new_tokens_verbmem=max_new_tokens_verbmem,
            max_new_tokens_knowmem=max_new_tokens_knowmem,
            batch_size=batch_size,
        )
        data = as_datasets(data)
        self.metric_keys = metric_keys(data, icl)
        if auc_retrain is not None:
            privleak.check_auc_retrain(auc_retrain)
            if "privleak_auc" not in self.metric_keys:
                raise ValueError(f"`auc_retrain` needs the splits {PRIVLEAK}, `data` has {sorted(data)}.")
            self.metric_keys.append("privleak")
        self.data, self.tokenizer, self.auc_retrain, self.icl = data, tokenizer, auc_retrain, icl
        self.max_new_tokens_verbmem = max_new_tokens_verbmem
        self.max_new_tokens_knowmem = max_new_tokens_knowmem
        self.batch_size, self.progress = batch_size, progress
        self.rouge_tokenizer = check_rouge_tokenizer(rouge_tokenizer)
        self._stops, self._min_k_score, self._rouge_l_f1 = knowmem.STOPS, privleak.min_k_score, rouge_l.rouge_l_f1
        # In memory, because several processes may evaluate at once, and none may leave files behind.
        self._metrics: dict[str, Any] = {
            "verbmem": verbmem.VerbMem(keep_in_memory=True),
            "knowmem": knowmem.KnowMem(keep_in_memory=True),
            "privleak": privleak.PrivLeak(keep_in_memory=True),
        }
        self._records: dict[str, list[dict[str, Any]]] = {}

    @property
    def primary_metrics(self) -> list[str]:
        """Keys of MUSE's own table: forgetting, verbatim and factual, utility, privacy."""
        table = ("forget_verbmem", "forget_knowmem", "retain_knowmem", "privleak")
        return [key for key in table if key in self.metric_keys]

    @property
    def columns(self) -> list[Column]:
        """What a table shows of each metric."""
        columns: list[Column] = []  # `privleak_auc` has no column, because no value of it is best
        for key in self.metric_keys:
            group, _, metric = key.partition("_")
            if key == "privleak":
                columns.append({"name": key, "label": "PrivLeak", "goal": "zero"})
            elif group in GROUPS:
                label = f"{METRICS[metric]} {group}"
                columns.append({"name": key, "label": label, "goal": "min" if group == "forget" else "max"})
        return columns

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """All metrics of one model. All processes must call it: each does its share and gets all results."""
        self._records = {}
        values: dict[str, float] = {}
        for key in self.metric_keys:
            group, _, metric = key.partition("_")
            if metric == "verbmem":
                values[key] = self._verbmem(model, group)
            elif metric == "knowmem":
                values[key] = self._knowmem(model, group)
        if "privleak_auc" in self.metric_keys:
            values |= self._privleak(model)
        return values

    def privleak_auc(self, model: PreTrainedModel) -> float:
        """Only the AUC. That of the retrained model is the `auc_retrain` for other models."""
        if "privleak_auc" not in self.metric_keys:
            raise ValueError(f"PrivLeak needs the splits {PRIVLEAK}, `data` has {sorted(self.data)}.")
        return self._privleak(model)["privleak_auc"]

    def samples(self, n: int = 3) -> list[dict[str, Any]]:
        """The first `n` examples of each text metric in the last call: metric, prompt, gt, response, score (0 to 1)."""
        if not self._records:
            raise ValueError(
                "There are no samples: call the evaluation first, on data with a verbmem or knowmem split."
            )
        return [{"metric": key, **record} for key, records in self._records.items() for record in records[:n]]

    def _verbmem(self, model: PreTrainedModel, group: str) -> float:
        split, limit = self.data[f"verbmem_{group}"], self.max_new_tokens_verbmem
        prompts = list(split["prompt"])
        # MUSE cuts the ids that the tokenizer gives. With a BOS, the truth is one token shorter than the response.
        truth_ids = [ids[:limit] for ids in self.tokenizer(list(split["gt"]))["input_ids"]]
        truths = self.tokenizer.batch_decode(truth_ids, skip_special_tokens=True)
        responses = self._generate(model, prompts, limit, f"VerbMem {group}")
        return self._score("verbmem", group, prompts, truths, responses)

    def _knowmem(self, model: PreTrainedModel, group: str) -> float:
        split = self.data[f"knowmem_{group}_qa"]
        shots = ""
        if self.icl:
            solved = self.data[f"knowmem_{group}_qa_icl"]
            pairs = zip(solved["question"], solved["answer"], strict=True)
            shots = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in pairs)
        prompts = [f"{shots}Question: {question}\nAnswer: " for question in split["question"]]
        responses = self._generate(model, prompts, self.max_new_tokens_knowmem, f"KnowMem {group}", self._stops)
        return self._score("knowmem", group, prompts, list(split["answer"]), responses)

    def _privleak(self, model: PreTrainedModel) -> dict[str, float]:
        scores: list[float] = []
        labels: list[int] = []
        for label, name in enumerate(PRIVLEAK):  # 0 forget, 1 holdout
            ids = self.tokenizer(list(self.data[name]["text"]))["input_ids"]
            logps = token_logps(
                model,
                [{"input_ids": row, "labels": row} for row in ids],
                pad_token_id=0,  # masked, so any id will do
                batch_size=self.batch_size,
                desc=f"PrivLeak {name.removeprefix('privleak_')}" if self.progress else None,
            )
            scores += [self._min_k_score(row) for row in logps]
            labels += [label] * len(logps)
        result = self._metrics["privleak"].compute(predictions=scores, references=labels, auc_retrain=self.auc_retrain)
        return {k: float(result[n]) for k, n in (("privleak_auc", "auc"), ("privleak", "privleak")) if n in result}

    def _generate(
        self, model: PreTrainedModel, prompts: list[str], max_new_tokens: int, desc: str, stops: Sequence[str] = ()
    ) -> list[str]:
        return generate(
            model,
            self.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=self.batch_size,
            stop_strings=stops,
            desc=desc if self.progress else None,
        )

    def _score(self, metric: str, group: str, prompts: list[str], truths: list[str], responses: list[str]) -> float:
        words = self.rouge_tokenizer
        self._records[f"{group}_{metric}"] = [
            {"prompt": prompt, "gt": truth, "response": response, "score": self._rouge_l_f1(response, truth, words)}
            for prompt, truth, response in zip(prompts, truths, responses, strict=True)
        ]
        result = self._metrics[metric].compute(predictions=responses, references=truths, tokenizer=words)
        return float(result[metric])
