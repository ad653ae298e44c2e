"""What benchmarks/evidence.py reads and measures: the sets of a world, and how well a model knows each of them."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.evaluation.answer_scoring import score_variants
from blur_trainer.evaluation.scoring import generate
from blur_trainer.metrics.rouge_l_recall import rouge_l_recall

Row = Mapping[str, str]
#: what the target knows; unlearning sees the first two
GROUPS = ("forget", "retain", "hold", "facts")


def read_world(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Rows of `question` and `answer` by set: what the target knows, and `unseen`."""
    with (folder / "forget.csv").open(encoding="utf-8", newline="") as file:
        rows: dict[str, list] = {"forget": list(csv.DictReader(file))}
    for name in (*GROUPS[1:], "unseen"):
        rows[name] = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return {name: [{key: row[key] for key in ("question", "answer")} for row in given] for name, given in rows.items()}


def known(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch_size: int = 64
) -> dict[str, float]:
    """
    Means over the answers: `loss`, nats per token, and `top`, the share of tokens that are the likeliest.
    """
    tokens = tokenize_dataset(list(rows), tokenizer, role="evaluation", max_length=512)
    answers = [[{"input_ids": row["input_ids"], "labels": row["labels"]}] for row in tokens]
    how = {"pad_token_id": tokenizer.pad_token_id, "batch_size": batch_size, "details": True}
    scores = [scored for (scored,) in score_variants(model, answers, **how)]
    return {
        "loss": fmean(each.nll for each in scores),
        "top": fmean(float((each.predicted == each.tokens).mean()) for each in scores),
    }


def said(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch_size: int = 128
) -> float:
    """Mean ROUGE-L recall of the greedy answers."""
    prompts = [f"Question: {row['question']}\nAnswer:" for row in rows]
    how = {"max_new_tokens": 48, "batch_size": batch_size, "stop_strings": ["\n"]}
    answers = generate(model, tokenizer, prompts, **how)
    return fmean(rouge_l_recall(answer, row["answer"]) for answer, row in zip(answers, rows, strict=True))


def measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: Mapping[str, Sequence[Row]]) -> dict:
    """`{group}_{loss, top, rouge}` of at most 200 rows each, ROUGE of at most 100.

    Strengths are chosen by `choice`, the first half of `hold`; `hold` is its second half.
    """
    half = len(world["hold"]) // 2
    sets = {**{group: world[group] for group in GROUPS}, "hold": world["hold"][half:], "choice": world["hold"][:half]}
    found = {}
    for group, rows in sets.items():
        found |= {f"{group}_{name}": value for name, value in known(model, tokenizer, rows[:200]).items()}
        if group != "choice":
            found[f"{group}_rouge"] = said(model, tokenizer, rows[:100])
    return found
