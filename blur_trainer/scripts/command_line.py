"""A command line becomes dataclasses: the benchmark's own, those of the trainer it chooses, those of the model."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from trl import ModelConfig, TrlParser

from blur_trainer.checks import check_fields
from blur_trainer.recipes import recipe

Parsed = tuple[Any, Any, ModelConfig, bool]  # script, trainer, model; whether models are tiny
COUNTS = dict.fromkeys(("max_documents", "max_rows", "limit"), "[1, inf)")  # of the scripts' own arguments
OLD_NAMES = ("`torch.distributed", "`is_gradient_checkpointing`")  # DeepSpeed and PEFT call them, at every step


def parse(
    script_class: Any,
    config_class: Callable[[Any], Any],
    defaults: Callable[[Any, bool], dict[str, Any]],
    recipe_of: Callable[[Any, ModelConfig], tuple[str, str] | None],
    arguments: Sequence[str] | None = None,
) -> Parsed:
    """
    The command line. Its defaults are a recipe's, where one is named; else those of tiny or of real models.

    Args:
        script_class: the benchmark's own arguments, a dataclass.
        config_class: the trainer's, which may depend on the benchmark's.
        defaults: those of the trainer, told the benchmark's arguments and whether models are tiny.
        recipe_of: benchmark and name of the recipe, told the benchmark's and the model's arguments; `None` for none.
        arguments: the words; `None` for those of this process.

    Raises:
        ValueError, TypeError: a setting is out of its range, or a recipe does not fit. No model was made until then.

    Returns:
        The three dataclasses, and whether models are tiny: no model was named.
    """
    for message in OLD_NAMES:
        warnings.filterwarnings("ignore", message, FutureWarning)
    both: Any = (script_class, ModelConfig)
    first = TrlParser(both, add_help=False)  # what the rest depends on
    first.set_defaults(dtype=None)  # TRL's is float32; the trainer chooses by device and by what is trained
    script, model_args, _ = first.parse_args_and_config(arguments, return_remaining_strings=True)
    named, given = recipe_of(script, model_args), {}
    if named is not None:
        found = recipe(*named)
        given = {key: found[key] for key in ("model_name_or_path", "method") if key in found}
        first.set_defaults(**given)
        script, model_args, _ = first.parse_args_and_config(arguments, return_remaining_strings=True)
        if "method" in found and script.method != found["method"]:
            raise ValueError(f"--recipe {named[1]} is of --method {found['method']}: leave --method out.")
        given |= found["arguments"] | found["script"]
    tiny = model_args.model_name_or_path is None
    all_three: Any = (script_class, config_class(script), ModelConfig)
    parser: Any = TrlParser(all_three)
    parser.set_defaults(**{"dtype": None} | defaults(script, tiny) | given)
    script, args, model_args = parser.parse_args_and_config(arguments)
    check_fields(script, COUNTS)
    return script, args, model_args, tiny
