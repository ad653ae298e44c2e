"""For tests/support/engine_worker.py: trains the tiny model under DDP or alone, saves weights and log from rank 0."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import broadcast
from safetensors.torch import save_file
from support.models import examples, tiny_llama
from torch.nn.functional import cross_entropy

from blur_trainer.gradients import backend
from blur_trainer.gradients.rules import BLUR, Sum
from blur_trainer.objectives.activations import ActivationMatch
from blur_trainer.objectives.likelihood import GradAscent
from blur_trainer.objectives.preference import NPO, SimNPO
from blur_trainer.objectives.rmu import RMU
from blur_trainer.trainers import single_buffer
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.unlearning import UnlearningTrainer


class OwnLoss(UnlearningTrainer):
    """A loss of its own for each role, from the logits of the wrapped model."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ((role, batch),) = inputs.items()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        nll = cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="sum") / num_items_in_batch
        return (-0.5 if role == "forget" else 2.0) * nll


# the features of tests/support/parity.py are not repeated here: this is about the log, and about what DDP alone has
CASES = {
    "blur": {"rule": BLUR(gamma=0.5)},
    "accumulation": {"rule": Sum(), "batch_size": 1, "accumulation": 2},
    "precomputed": {"rule": BLUR(), "precompute_ref_logps": True},
    "own_loss": {"rule": Sum(), "forget_objective": GradAscent(), "trainer": OwnLoss},
    "bucket_view": {"rule": Sum(), "bucket_view": True},
    "one_buffer": {"rule": BLUR(gamma=0.5), "single_gradient_buffer": True},
    "simnpo": {"rule": Sum(), "forget_objective": SimNPO()},
    # accumulated, so that a step's topic is that of both processes and of the whole window
    "topics": {
        **{"rule": BLUR(alpha=50), "forget_objective": RMU(0), "retain_objective": ActivationMatch(0)},
        **{"batch_size": 1, "accumulation": 2, "topics": {"b": {"alpha": 200, "coefficient": 2.0}}},
        "forget": {"a": examples(8, seed=7), "b": examples(8, seed=8)},
    },
}


@contextmanager
def other_numbers(rank: int) -> Iterator[None]:
    """What other kernels on another card may do: each process finds other last digits, and once one finds NaN.

    If each believed its own numbers, weights would drift apart, and a process that skips a step alone would leave the
    others waiting for it.
    """
    exact, calls = backend.inner_products, []

    def inner_products(*gradients):
        calls.append(1)
        odd = torch.nan if rank > 0 and len(calls) == 2 else 1 + 1e-9 * rank
        return exact(*gradients) * odd

    backend.inner_products = single_buffer.inner_products = inner_products
    try:
        yield
    finally:
        backend.inner_products = single_buffer.inner_products = exact


def main(name: str, output_dir: str) -> None:
    case = dict(CASES[name])
    rule, forget_objective = case.pop("rule"), case.pop("forget_objective", NPO())
    forget, retain_objective = case.pop("forget", examples(12, seed=5)), case.pop("retain_objective", None)
    bucket_view, trainer_class = case.pop("bucket_view", False), case.pop("trainer", UnlearningTrainer)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    # the same global window of 4 in every world: one process takes what two share
    batch_size, accumulation = case.pop("batch_size", 2), case.pop("accumulation", 1)
    args = UnlearningConfig(
        f"{output_dir}/{name}-{processes}",
        per_device_train_batch_size=batch_size * (2 // processes),
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        max_steps=3,
        train_sampling_strategy="sequential",
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        **case,
    )
    trainer = trainer_class(
        tiny_llama(0),
        args,
        forget,
        examples(7, seed=6),
        rule=rule,
        forget_objective=forget_objective,
        retain_objective=retain_objective,
    )
    if bucket_view:
        trainer.accelerator.ddp_handler.gradient_as_bucket_view = True
    rank = int(os.environ.get("RANK", "0"))
    with other_numbers(rank):
        trainer.train()
    if processes > 1:
        flat = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        theirs = broadcast(flat.clone())
        if not torch.equal(flat, theirs):
            raise AssertionError(f"{name}: the weights of process {rank} are not those of process 0")
    if trainer.is_world_process_zero():
        weights = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
        save_file(weights, Path(output_dir) / f"{name}-{processes}.safetensors")
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        (Path(output_dir) / f"{name}-{processes}.json").write_text(json.dumps(history))
