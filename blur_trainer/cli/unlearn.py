"""`blur-trainer unlearn`: your own data, one command, a forgotten model, a verdict."""

import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from typing import Any

from accelerate import PartialState

from blur_trainer.cli.options import given_options, help_text, named, settings_file
from blur_trainer.pipeline.arguments import (
    DERIVED,
    DERIVED_FROM,
    UnlearnArguments,
    check_method,
    check_name,
    classes_of,
)
from blur_trainer.pipeline.methods import DEFAULT
from blur_trainer.pipeline.preparing import prepare
from blur_trainer.pipeline.sequence import run_sequence
from blur_trainer.pipeline.unlearn import Unlearned, run
from blur_trainer.saving.output_dir import holds_run

logger = logging.getLogger(__name__)
OUTPUT_DIR = "unlearned"
_USAGE = """blur-trainer unlearn --model_name_or_path MODEL --forget FILE --retain FILE
                            [--output_dir OUT] [--config YAML] [OPTION ...]"""
_MORE = """Everything else follows from model and data if left out. Often wanted:
  --output_dir OUT              A new folder. Default: unlearned.
  --config YAML                 Options from a file, such as a run's run.yaml. Words go above it.
  --use_peft true               Train an adapter (LoRA).
  --learning_rate, --gamma, --num_train_epochs, --replay (0: none), --seed
  --audit minutes               Then attack the unlearned model; a certificate says what came back.
  --report_to tensorboard       Or wandb, trackio: steps, results and figures. Several: with commas.
  --push_to_hub true            Publish the model and its numbers as --hub_model_id, without texts.
  --resume_from_checkpoint true Go on after an interrupt, with the same options.
All options of reading, training and model: --help-all, for one method: --method npo --help-all."""


def main(arguments: Sequence[str], command: str = "unlearn") -> int:
    """
    Exit code 1 if the verdict is not the one of `--require`, 2 for wrong options, 130 after Ctrl-C. `command`: as
    messages name it.
    """
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(help_text([UnlearnArguments], "unlearn", _USAGE, _MORE))
        return 0
    options: dict[str, Any] = {}
    try:
        words, stored = settings_file(arguments)
        method = check_method(named("method", words, stored, DEFAULT))
        if "--help-all" in words:
            sys.stdout.write(help_text(classes_of(method), "unlearn", _USAGE, ""))
            return 0
        given = given_options(classes_of(method), words, stored, partial(check_name, method=method))
        options = {"output_dir": OUTPUT_DIR} | _derived_anew(given, stored)
        with redirect_stdout(sys.stderr):  # libraries print: stdout has the result alone
            if options.get("sequence") is not None:
                sequenced, wanted = run_sequence(options), options.get("require")
                said, met = str(sequenced), wanted is None or sequenced.meets(wanted)
            else:
                prepared = prepare(options)
                done = run(prepared)
                said, met = str(done), _meets(done, prepared.script.require)
    except (ValueError, TypeError, OSError) as error:
        logger.debug("blur-trainer unlearn", exc_info=True)
        PartialState().print(f"blur-trainer {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        PartialState().print(f"\nblur-trainer {command}: interrupted. {_how_to_go_on(options)}", file=sys.stderr)
        return 130
    return _said(said, met)


def _meets(done: Unlearned, wanted: str | None) -> bool:
    came_back = done.audit is not None and bool(done.audit.recovered)
    return wanted is None or (wanted == done.verdict.word and not came_back)


def _said(result: str, met: bool) -> int:
    process = PartialState()
    if process.is_main_process:
        sys.stdout.write(f"{result}\n")
    process.wait_for_everyone()
    process.destroy_process_group()
    return 0 if met else 1


def _derived_anew(given: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """Without the derived settings of a `run.yaml` if the words changed what they had followed from."""
    other = [name for name in DERIVED_FROM if given.get(name) != stored.get(name)]
    if DERIVED not in given or not other:
        return given
    said = f"--{other[0]} is another one than in the file: settings are derived anew."
    PartialState().print(said, file=sys.stderr)
    return {name: value for name, value in given.items() if name != DERIVED}


def _how_to_go_on(options: dict[str, Any]) -> str:
    if options.get("sequence") is not None:
        return "Give the same command again: it goes on at the first request that is not finished."
    if holds_run(str(options.get("output_dir", OUTPUT_DIR))):
        return "Go on with --resume_from_checkpoint true and the same options."
    return "Nothing was trained yet: give the same command again."
