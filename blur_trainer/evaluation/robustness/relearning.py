"""Fine-tunes the unlearned model for a few steps and measures. What comes back fast was only hidden."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from blur_trainer.constants import IGNORE_INDEX
from blur_trainer.evaluation.base import Evaluation, Measure
from blur_trainer.evaluation.batching import check_context, check_example, check_positive, pad
from blur_trainer.evaluation.distributed import rank_and_world
from blur_trainer.evaluation.robustness.attacked import check_attackable, trainable, under_attack
from blur_trainer.evaluation.robustness.low_rank import low_rank
from blur_trainer.models.logit_difference import LogitDifferenceModel

Examples: TypeAlias = Dataset | Sequence[dict[str, Any]]
Row = tuple[list[int], list[int]]
STEPS = (1, 2, 5, 10, 20)


def relearn(
    model: PreTrainedModel,
    examples: Examples,
    evaluation: Evaluation | Measure,
    *,
    steps: Sequence[int] = STEPS,
    learning_rate: float = 1e-5,
    batch_size: int = 4,
    seed: int = 0,
    rank: int | None = None,
    unchanged: Mapping[str, float] | None = None,
    desc: str | None = None,
) -> list[dict[str, Any]]:
    r"""
    The evaluation after so many steps of plain fine-tuning.

    The loss is the mean negative log-likelihood of the labels of a batch, the optimizer AdamW ($\beta$ 0.9, 0.999; no
    weight decay; gradient norm clipped at 1), the learning rate constant. Each pass over the examples is in another
    random order, drawn from `seed`.

    All weights are trained, with adapters merged into them first, as an attacker would who is given the model. Of a
    [`LogitDifferenceModel`] it is the adapter's alone. The optimizer's weights are float32, whatever the model's are:
    beside a bfloat16 weight of 0.02 a step of 1e-5 would round away, and the model would seem robust.

    Memory beside the model's: a gradient, two moments in float32 and, for a bfloat16 model, the float32 weights; a copy
    of the weights as they were on the CPU. Of several processes all must call it: each trains the same, and they share
    the evaluation.

    Source: Lynch et al., "Eight Methods to Evaluate Robust Unlearning in LLMs" (2024); Hu et al., "Jogging the Memory
    of Unlearned LLMs Through Targeted Relearning Attacks" (2025).

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Unwrapped and whole, in float32 or bfloat16. It is trained in evaluation mode (no dropout) and restored bit
            for bit afterwards.
        examples (`Dataset` or `Sequence[dict]`):
            `{"input_ids", "labels"}`, as [`tokenize_dataset`] makes them: a small part of the forget set
            ([`sample_rows`]), or unrelated text.
        evaluation ([`Evaluation`] or `Callable`):
            What measures the model.
        steps (`Sequence[int]`, *optional*, defaults to `(1, 2, 5, 10, 20)`):
            When to measure, in rising order. Step 0 is added.
        learning_rate (`float`, *optional*, defaults to `1e-5`):
            The default suits models with billions of weights. Tiny models and adapters need more.
        batch_size (`int`, *optional*, defaults to `4`):
            Examples per step.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order of the examples.
        rank (`int`, *optional*):
            Train low-rank updates of this rank (LoRA) beside the weights instead of all weights; see
            [`~blur_trainer.evaluation.robustness.low_rank.low_rank`]. They need a higher `learning_rate`.
        unchanged (`Mapping`, *optional*):
            What the evaluation says of the model as it is, where that is known: step 0 is then not measured again.
        desc (`str`, *optional*):
            Label of the progress bar over the steps; no bar when left out.

    Returns:
        `list[dict]`: `{"steps": int, "metrics": dict}` for step 0 and each of `steps`.

    Raises:
        `TypeError`: the model is wrapped in something.
        `ValueError`: its weights are sharded, offloaded, of few bits or float16; an example has no label, or is longer
        than the model's context; nothing would be trained.
    """
    check_attackable(model)
    check_relearning(model, {"examples": examples}, steps, learning_rate, batch_size)
    rows, last = [check_example(index, example) for index, example in enumerate(examples)], steps[-1]
    points = [{"steps": 0, "metrics": dict(evaluation(model) if unchanged is None else unchanged)}]
    cuda = list({parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"})
    chosen = trainable(model) if rank is None else low_rank(model, rank, seed)
    with under_attack(model), chosen as parameters, torch.random.fork_rng(cuda):
        # float32 copies, for small steps; a float32 parameter needs no copy
        masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in parameters]
        optimizer = torch.optim.AdamW(masters, lr=learning_rate, weight_decay=0.0)
        batches = _batches(rows, batch_size, seed)
        for step in tqdm(range(1, last + 1), desc=desc, disable=desc is None or rank_and_world()[0] > 0):
            _train_step(model, parameters, masters, optimizer, next(batches))
            if step in steps:
                points.append({"steps": step, "metrics": dict(evaluation(model))})
    return points


def check_relearning(
    model: PreTrainedModel, relearning: Mapping[str, Examples], steps: Sequence[int], rate: float, batch_size: int
) -> None:
    """Raises for arguments that [`relearn`] does not accept, before anything is measured."""
    check_positive(batch_size=batch_size, **{f"steps[{i}]": step for i, step in enumerate(steps)})
    if not steps or list(steps) != sorted(set(steps)):
        raise ValueError(f"`steps` is {list(steps)!r}; it takes rising numbers of steps, at least one.")
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
        raise ValueError(f"`learning_rate` is {rate!r}; it takes a number above 0.")
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise ValueError("The weights are float16, in which gradients vanish: load the model in bfloat16 or float32.")
    if isinstance(model, LogitDifferenceModel) and model.config.weight == 0:
        raise ValueError("`config.weight` is 0: only the target runs, no adapter is there to train. Set a weight.")
    for name, examples in relearning.items():
        rows = [check_example(index, example) for index, example in enumerate(examples)]
        if not rows:
            raise ValueError(f"`{name}` has no rows: there is nothing to relearn.")
        for index, (_, labels) in enumerate(rows):
            if all(label == IGNORE_INDEX for label in labels[1:]):
                raise ValueError(f"`{name}[{index}]` has no label behind its first token: leave it out.")
        check_context(model, [len(ids) for ids, _ in rows], what="example")


def _train_step(
    model: PreTrainedModel,
    parameters: list[nn.Parameter],
    masters: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    batch: list[Row],
) -> None:
    input_ids, attention_mask = pad([ids for ids, _ in batch], 0, "right", model.device)
    labels, _ = pad([labels for _, labels in batch], IGNORE_INDEX, "right", model.device)
    with torch.enable_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1].float()
        targets = labels[:, 1:].to(logits.device)
        nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX).backward()
    copies = [(p, master) for p, master in zip(parameters, masters, strict=True) if p is not master]
    for parameter, master in copies:
        master.grad, parameter.grad = None if parameter.grad is None else parameter.grad.float(), None
    nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for parameter, master in copies:
            parameter.copy_(master)


def _batches(rows: list[Row], batch_size: int, seed: int) -> Iterator[list[Row]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(order), batch_size):
            yield [rows[index] for index in order[start : start + batch_size]]
