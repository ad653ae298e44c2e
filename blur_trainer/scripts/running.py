"""One run from its folder to its end: what is refused, and how it goes on after an interrupt."""

import logging
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import ProgressCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar
from trl import ModelConfig

from blur_trainer.saving.output_dir import check_output_dir
from blur_trainer.scripts.refusing import refusing
from blur_trainer.trainers.callbacks import ProgressBarCallback
from blur_trainer.trainers.ending import TrainingInterrupted
from blur_trainer.trainers.unlearning import UnlearningTrainer

logger = logging.getLogger(__name__)


def begin(script: Any, args: TrainingArguments, model_args: ModelConfig) -> Path:
    """
    The output folder. It holds no other run, which would be overwritten. From now on one process shows bars.

    Raises:
        ValueError: the folder holds a run and this one does not resume it, or attacks are asked of float16 weights, or
            this is the only process and there are several GPUs.
    """
    if script.robustness and model_args.dtype == "float16":
        raise ValueError("--robustness trains the model further, which float16 weights do not bear: --dtype bfloat16.")
    return begin_run(args)


def begin_run(args: TrainingArguments) -> Path:
    """As `begin`, for a run that attacks nothing."""
    check_launch(args, f"start `accelerate launch {_program()}` with the same arguments")
    with redirect_stdout(sys.stderr):  # accelerate imports DeepSpeed here, which goes on talking to the stdout it finds
        extract_model_from_parallel(nn.Identity())
    if not PartialState().is_local_main_process:
        datasets.disable_progress_bars()
        disable_progress_bar()
    # What is trained is shown: the first example of each role, and which weights move.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("blur_trainer").setLevel(logging.INFO)
    if not args.resume_from_checkpoint:
        check_output_dir(str(args.output_dir))
    return Path(str(args.output_dir))


def _program() -> str:
    """What a launcher is to start: this script, or the command `blur-trainer`."""
    script = sys.argv[0]
    return "-m blur_trainer" if Path(script).stem in ("blur-trainer", "__main__") else script


def check_launch(args: TrainingArguments, all_gpus: str) -> None:
    """
    Raises `ValueError` if this one process sees several GPUs: Trainer would wrap the model in `nn.DataParallel`.

    A `device_map` spreads the model over them instead. `all_gpus`: what to do for a process on each.
    """
    if args.n_gpu > 1 and "device_map" not in (getattr(args, "model_init_kwargs", None) or {}):
        raise ValueError(
            f"{args.n_gpu} GPUs are visible, and this is one process, which trains on one. To use all, {all_gpus}. To "
            "use one, set CUDA_VISIBLE_DEVICES=0."
        )


def is_finished(args: TrainingArguments, folder: Path) -> bool:
    """Whether the training into this folder ended before the interrupt after which this run goes on."""
    return bool(args.resume_from_checkpoint) and (folder / "trainer_state.json").exists()


def train_and_save(trainer: UnlearningTrainer, label: str) -> UnlearningTrainer:
    """
    Train, or go on where an interrupt left it, with one bar of this name. The model is in `output_dir` then.

    Raises:
        TrainingInterrupted: on Ctrl+C or SIGTERM, after the checkpoint of the step: exit code 130 or 143.
    """
    args = trainer.args
    trainer.remove_callback(ProgressCallback)
    if not args.disable_tqdm:
        trainer.add_callback(ProgressBarCallback(label))
    begun = args.resume_from_checkpoint and any(Path(str(args.output_dir)).glob("checkpoint-*"))
    try:
        with redirect_stdout(sys.stderr):  # without a bar, Trainer prints what it logs
            trainer.train(resume_from_checkpoint=args.resume_from_checkpoint if begun else None)
    except TrainingInterrupted as error:
        remedy = "Go on with --resume_from_checkpoint true and the same arguments."
        PartialState().print(f"{error.where}. {remedy}", file=sys.stderr)
        raise TrainingInterrupted(error.where, remedy, error.signal) from None
    except (ValueError, TypeError, OSError):
        logger.exception("%s: the training failed.", label)  # hours end by it, and `refusing` says one line only
        raise
    trainer.save_model()
    trainer.save_state()
    PartialState().wait_for_everyone()  # the main process writes, and all of them may load it next
    return trainer


def ended(command: str, main: Callable[[], None]) -> int:
    """
    Calls `main`; then several processes part, as torch asks.

    Returns:
        The exit code: 2 after a refusal, 130 after Ctrl+C outside of a training. A training ends with
        [`~blur_trainer.trainers.ending.TrainingInterrupted`] by itself.
    """
    with refusing(command) as refused:
        try:
            main()
        except KeyboardInterrupt:
            again = "Give the same command again; if a training had begun, with --resume_from_checkpoint true."
            PartialState().print(f"\n{command}: interrupted. {again}", file=sys.stderr)
            return 130
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()
    return refused.code


def run(main: Callable[[], None]) -> None:
    """Ends this process, a script, as `main` ends."""
    sys.exit(ended(Path(sys.argv[0]).name, main))
