"""Trains a tiny model until it knows its texts by heart.

Measured on the embedded corpora (224 texts of 32 authors, 6457 tokens, the longest 105; 1.05 million parameters) with
the defaults below, one CPU thread. Greedy continuations; share of exact answers (ROUGE-L F1), articles / questions:

| seed 0 | CPU seconds | forget | retain | hold |
|---|---|---|---|---|
| target | 23 | 1.00 (1.00) / 1.00 (1.00) | 1.00 / 1.00 | 1.00 / 1.00 |
| retrained without forget | 19 | 0.00 (0.22) / 0.02 (0.10) | 1.00 / 1.00 | 1.00 / 1.00 |

The target of seeds 1 and 2 and the retrained model of seed 1 give the same. AUC of the lowest-40 % score, forget
against holdout: 1.00 for the target, 0.39 and 0.44 for the retrained models (coarse: 8 against 8 articles).
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import patch_environment
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from blur_trainer.atomic_write import atomic_write_folder
from blur_trainer.toy.model import tiny_llama


class _Progress(ProgressCallback):
    """A named progress bar, without the dictionary that Trainer prints at the end."""

    def __init__(self, desc: str) -> None:
        super().__init__()
        self.desc = desc

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.current_step = 0
        self.training_bar = tqdm(desc=self.desc, total=state.max_steps, dynamic_ncols=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        pass


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, this process trains alone, without the launched engine. So the model is that of a single process."""
    state = dict(PartialState().__dict__)
    one = {"local_rank": "-1", "rank": "0", "world_size": "1"}
    with patch_environment(**one, accelerate_use_fsdp="false", accelerate_use_deepspeed="false"):
        try:
            yield
        finally:
            PartialState().__dict__.update(state)


def memorize(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    num_train_epochs: float = 20,
    learning_rate: float = 3e-3,
    batch_size: int = 8,
    seed: int = 0,
    desc: str = "memorizing",
    disable_tqdm: bool = False,
) -> LlamaForCausalLM:
    """
    Train `model` in place until it knows `dataset` by heart, with the plain [`~transformers.Trainer`], on the CPU.

    Args:
        model ([`~transformers.LlamaForCausalLM`]):
            Usually from [`tiny_llama`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Gives the padding token. Padding gets attention mask 0 and label -100, whatever its id.
        dataset ([`~datasets.Dataset`]):
            Tokenized: `input_ids`, and `labels` of the same length, -100 where nothing is to be learnt.
        num_train_epochs (`float`, defaults to `20`), learning_rate (`float`, defaults to `3e-3`):
            AdamW (betas 0.9, 0.95; no weight decay), learning rate rising over the first 5 % of the steps and falling
            linearly to 0, gradient norm clipped at 1.
        batch_size (`int`, defaults to `8`):
            Examples of similar length per step, so that few tokens are padding.
        seed (`int`, defaults to `0`):
            Seed of the order of the examples. On one machine the result is always the same.
        desc (`str`, defaults to `"memorizing"`), disable_tqdm (`bool`, defaults to `False`):
            Name of the progress bar, and whether to hide it.

    Returns:
        [`~transformers.LlamaForCausalLM`]: `model` itself, in evaluation mode. Nothing is written to disk.
    """
    missing = {"input_ids", "labels"} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"the dataset has the columns {dataset.column_names}; memorize takes tokenized examples and misses "
            f"{sorted(missing)}."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token; set `tokenizer.pad_token = tokenizer.eos_token`.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model is frozen (a target of a logit difference is); call model.requires_grad_(True).")
    with tempfile.TemporaryDirectory() as folder, _alone():  # Trainer needs a folder even if it writes nothing
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=num_train_epochs,
                learning_rate=learning_rate,
                warmup_steps=0.05,
                adam_beta2=0.95,  # 0.999 averages over more steps than this training has
                per_device_train_batch_size=batch_size,
                train_sampling_strategy="group_by_length",
                seed=seed,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                # on GPUs each process would take the first one, wrapped in `DataParallel`, and stay there
                use_cpu=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=dataset.select_columns(["input_ids", "labels"]),
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        )
        trainer.remove_callback(PrinterCallback)  # it would print the final dictionary
        if not disable_tqdm:
            trainer.add_callback(_Progress(desc))
        trainer.train()
    return model.eval()


def memorized(
    folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase, dataset: Dataset, *, seed: int = 0
) -> str:
    """
    Makes a [`tiny_llama`] that knows `dataset` by heart, saves it with its tokenizer in `folder`, and returns the path.

    An existing folder is reused. An interrupted call leaves no folder. With several processes the main one trains and
    writes, and the others wait.
    """
    folder, process = Path(folder), PartialState()
    # the main process alone looks for the folder: another one might see it just made, and not wait with the rest
    if process.is_main_process and not folder.exists():
        desc = f"Making the {folder.name} model"
        model = memorize(tiny_llama(tokenizer, seed=seed), tokenizer, dataset, seed=seed, desc=desc)
        atomic_write_folder(folder, lambda part: (model.save_pretrained(part), tokenizer.save_pretrained(part)))
    process.wait_for_everyone()
    return str(folder)
