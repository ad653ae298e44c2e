"""Scores many answers to one question and reads the question only once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blur_trainer.evaluation.batch_scores import BatchScores, ScoredRow
from blur_trainer.evaluation.batching import buckets, check_context, check_example, check_positive, pad
from blur_trainer.evaluation.distributed import in_shares, is_sharded
from blur_trainer.evaluation.prompt_cache import can_share_prompts, read_prompts, rows_of
from blur_trainer.evaluation.token_scores import AnswerScores, score_row, scored_positions, to_numpy
from blur_trainer.models.forward import evaluating


@dataclass(frozen=True)
class _Question:
    """One question: the tokens of each answer (with prompt), the scored positions, and the shared prefix."""

    input_ids: list[list[int]]
    positions: list[list[int]]
    prefix: int  # number of shared, unscored first tokens; 0: nothing is shared


def score_variants(
    model: PreTrainedModel,
    questions: Sequence[Sequence[dict[str, Any]]],
    *,
    pad_token_id: int,
    batch_size: int = 16,
    details: bool = False,
    desc: str | None = None,
) -> list[list[AnswerScores]]:
    r"""
    Scores of every answer to every question. They equal those of one sequence at a time, to float rounding.

    If the model's cache allows it ([`can_share_prompts`]), the common first tokens of a question's answers run once.
    Their keys and values are repeated, and only the rest is run for each answer. `batch_size` questions of similar
    length are read together, then their answers, `batch_size` of similar length at a time. Prompts are padded on the
    left and answers on the right, with the true attention mask and position ids. So each answer follows its prompt
    without a gap. The shared part is the common prefix of the *tokens* (prompt and answer may merge where they join),
    without its last token, which predicts the first answer token.

    Otherwise, and for a question with one answer, whole sequences are run, padded on the right.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Unwrapped causal language model, whole or sharded by FSDP2 or ZeRO-3. It runs in evaluation mode; the mode
            of each module is restored. All processes must call this function.
        questions (`Sequence[Sequence[dict]]`):
            Per question its answers, each `{"input_ids": list[int], "labels": list[int]}` with the prompt, labels -100
            where nothing is scored. Every answer needs a scored token.
        pad_token_id (`int`):
            Any id of the vocabulary. It fills masked positions.
        batch_size (`int`, *optional*, defaults to `16`):
            Sequences per forward pass.
        details (`bool`, *optional*, defaults to `False`):
            Whether the first answer to each question gets `predicted`, `means` and `variances`.
        desc (`str`, *optional*):
            Label of the progress bar. Default: no bar.

    Returns:
        `list[list[AnswerScores]]`: Per question, in the given order, the scores of its answers.
    """
    check_positive(batch_size=batch_size)
    with evaluating(model):
        share = can_share_prompts(model)
        rows = [_question(index, answers, share) for index, answers in enumerate(questions)]
        check_context(model, [max(map(len, row.input_ids)) for row in rows], what="question")
        order = buckets([max(map(len, row.input_ids)) - row.prefix for row in rows], 1)
        found: dict[int, list[AnswerScores]] = {}
        # One kind after the other, because with sharded parameters all processes need equally many forward passes.
        for shared in (True, False):
            part = [index for (index,) in order if (rows[index].prefix > 0) == shared]
            batches = [part[start : start + batch_size] for start in range(0, len(part), batch_size)]
            sizes = [sum(len(rows[index].input_ids) for index in batch) for batch in batches]
            passes = ceil(max(sizes) / batch_size) if sizes and is_sharded(model) else 0

            def run(indices: list[int], passes: int = passes) -> list[list[AnswerScores]]:
                batch = [rows[index] for index in indices]
                return _Batch(model, batch, pad_token_id, details).scores(batch_size, passes)

            if part:
                found |= zip(sorted(part), in_shares(model, batches, run, desc), strict=True)
    return [found[index] for index in range(len(rows))]


def _question(index: int, answers: Sequence[dict[str, Any]], share: bool) -> _Question:
    if not answers:
        raise ValueError(f"`questions[{index}]` has no answer to score: give at least one.")
    checked = [check_example(index, answer) for answer in answers]
    positions = [scored_positions(labels) for _, labels in checked]
    for number, (ids, labels) in enumerate(checked):
        if not positions[number]:
            raise ValueError(
                f"`questions[{index}][{number}]` has no scored token: its labels are -100 after the first."
            )
        if any(ids[t] != labels[t] for t in positions[number]):
            raise ValueError(f"`questions[{index}][{number}]` has labels that are neither -100 nor its input_ids.")
    input_ids = [ids for ids, _ in checked]
    prefix = 0
    if share and len(answers) > 1:
        prefix = min(_common_prefix(input_ids), *(found[0] - 1 for found in positions))
    return _Question(input_ids, positions, prefix)


def _common_prefix(rows: list[list[int]]) -> int:
    columns = zip(*rows, strict=False)  # up to the shortest sequence
    return next((t for t, column in enumerate(columns) if len(set(column)) > 1), min(map(len, rows)))


class _Batch:
    """A batch of questions: all with a shared prefix, or all without."""

    def __init__(self, model: PreTrainedModel, questions: list[_Question], pad_token_id: int, details: bool) -> None:
        self.model, self.questions, self.pad_token_id, self.details = model, questions, pad_token_id, details
        # (question, index of the answer), in order
        self.answers = [
            (q, number) for q, question in enumerate(questions) for number in range(len(question.input_ids))
        ]
        prompts = [question.input_ids[0][: question.prefix] for question in questions]
        self.prompts = read_prompts(model, prompts, pad_token_id) if questions[0].prefix else None

    def scores(self, batch_size: int, passes: int) -> list[list[AnswerScores]]:
        """The scores of each question's answers, in at least `passes` forward passes (some are repeated for that)."""
        chunks = buckets(
            [len(self.questions[q].input_ids[n]) - self.questions[q].prefix for q, n in self.answers], batch_size
        )
        chunks += [chunks[-1]] * (passes - len(chunks))
        found: dict[int, AnswerScores] = {}
        for chunk in chunks:
            found |= zip(chunk, self._run([self.answers[index] for index in chunk]), strict=True)
        scores = iter([found[index] for index in range(len(found))])
        return [[next(scores) for _ in question.input_ids] for question in self.questions]

    def _run(self, answers: list[tuple[int, int]]) -> list[AnswerScores]:
        """One forward pass over some answers."""
        rows = [(self.questions[q], number) for q, number in answers]
        suffixes = [question.input_ids[number][question.prefix :] for question, number in rows]
        input_ids, mask = pad(suffixes, self.pad_token_id, "right", self.model.device)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
        if self.prompts is not None:
            owners = torch.tensor([q for q, _ in answers], device=self.model.device)
            cache = rows_of(self.prompts[0], owners)
            before = self.prompts[1][owners]
            inputs |= {
                "attention_mask": torch.cat([before, mask], dim=-1),
                # padding repeats its row's last position, because a higher one may not exist
                "position_ids": before.sum(-1, keepdim=True) + mask.cumsum(-1) - 1,
                "past_key_values": cache,
                "use_cache": True,
            }
        wanted = [self._wanted(question, number) for question, number in rows]
        read = BatchScores(wanted, input_ids.device) if input_ids.device.type != "cpu" else _row_by_row(wanted)
        return read(self.model(**inputs).logits[:, -input_ids.shape[1] :])  # prompt tuning puts virtual tokens in front

    def _wanted(self, question: _Question, number: int) -> ScoredRow:
        ids, positions = question.input_ids[number], question.positions[number]
        columns = [t - 1 - question.prefix for t in positions]  # position t - 1 predicts token t
        return ScoredRow(columns, [ids[t] for t in positions], self.details and number == 0)


def _row_by_row(rows: Sequence[ScoredRow]) -> Callable[[Tensor], list[AnswerScores]]:
    def read(logits: Tensor) -> list[AnswerScores]:
        pairs = zip(logits, rows, strict=True)
        return to_numpy([score_row(row, want.columns, want.targets, want.detailed) for row, want in pairs])

    return read
