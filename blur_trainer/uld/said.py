"""What the target says to questions of random words: rows on which ULD's assistant shall be uniform too.

The assistant is trained on the forget and the retain set. On what neither mentions it may be sure of something, and
subtracting it changes the target there. Such questions need no data, and the answers are of every kind that the target
knows.
"""

import random

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blur_trainer.constants import IGNORE_INDEX
from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.evaluation.batching import check_positive
from blur_trainer.evaluation.sampling import sample

_LENGTHS = range(3, 10)  # tokens of a question


def said_to_anything(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num: int,
    *,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    max_length: int | None = None,
    qa_template: str = "Question: {question}\nAnswer:",
) -> Dataset:
    """
    Questions of 3 to 9 random tokens of the vocabulary (those of letters alone), each with a sampled answer.

    Add them to ULD's retain set: `[*retain, *said_to_anything(target, tokenizer, 2 * len(retain))]`.

    Args:
        model ([`~transformers.PreTrainedModel`]): the target, whole.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        num (`int`): how many to ask. Empty answers are dropped.
        max_new_tokens, temperature, batch_size: of the sampling.
        seed (`int`): of questions and answers.
        max_length, qa_template: as in the training. With a chat template that one asks.

    Returns:
        [`~datasets.Dataset`]: `question` and `answer`.

    Raises:
        `ValueError`: no number of at least 1, a vocabulary without letters, or no answer that is not empty.
    """
    check_positive(num=num)
    vocabulary = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    letters = [token for token, text in enumerate(vocabulary) if text.strip().isalpha()]
    if not letters:
        raise ValueError("The tokenizer has no token that is letters alone: give questions of your own instead.")
    draw = random.Random(seed)
    drawn = [draw.choices(letters, k=draw.choice(_LENGTHS)) for _ in range(num)]
    questions = [f"{text.strip()}?" for text in tokenizer.batch_decode(drawn)]
    asked = tokenize_dataset(
        [{"question": question, "answer": "."} for question in questions],
        tokenizer,
        role="question",
        max_length=max_length,
        qa_template=qa_template,
    )
    prompts = [
        row["input_ids"][: next(place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX)]
        for row in asked
    ]
    sampled = sample(
        model,
        tokenizer,
        prompts,
        num=1,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )
    answers = [said.strip() for (said,) in sampled]
    rows = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True) if a]
    if not rows:
        raise ValueError(f"All of the {num} sampled answers are empty: the model says nothing to such questions.")
    return Dataset.from_list(rows)
