"""What `blur-trainer muse`, `tofu` and `wmdp` have in common: their help, and how they end."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from trl import ModelConfig

from blur_trainer.cli.options import help_text, named, settings_file
from blur_trainer.scripts.methods import Method
from blur_trainer.scripts.refusing import refusing
from blur_trainer.scripts.running import ended
from blur_trainer.trainers.blur import BLURConfig

_MORE = """Every setting of the training and of the model is an option, too. Often wanted:
  --model_name_or_path MODEL    A real model. Left out: tiny ones, made here, offline.
  --output_dir OUT              A new folder. Default: outputs/{name}.
  --config YAML                 Options from a file. Words go above it.
  --learning_rate, --num_train_epochs, --gamma, --seed, --use_cpu true
  --resume_from_checkpoint true Go on after an interrupt, with the same options.
On several GPUs: accelerate launch -m blur_trainer {name} ... All options: --help-all."""


class Benchmark(NamedTuple):
    """
    A command.

    Args:
        name: of the command.
        own: the dataclass of what only this benchmark has. `--help` shows it.
        methods: to choose among; empty for one that has BLUR only.
        main: takes the words.
    """

    name: str
    own: Any
    methods: Mapping[str, Method]
    main: Callable[[Sequence[str]], None]

    def __call__(self, arguments: Sequence[str]) -> int:
        """The exit code: 2 for wrong options, 130 after Ctrl+C."""
        usage = f"blur-trainer {self.name} [OPTION ...]"
        if "--help" in arguments or "-h" in arguments:
            sys.stdout.write(help_text([self.own], self.name, usage, _MORE.format(name=self.name)))
            return 0
        if "--help-all" not in arguments:
            return ended(f"blur-trainer {self.name}", lambda: self.main(arguments))
        with refusing(f"blur-trainer {self.name}") as refused:
            sys.stdout.write(help_text([self.own, self._config_class(arguments), ModelConfig], self.name, usage, ""))
        return refused.code

    def _config_class(self, arguments: Sequence[str]) -> Any:
        """The settings of the training: those of the method that is named."""
        if not self.methods:
            return BLURConfig
        method = named("method", *settings_file(arguments), next(iter(self.methods)))
        if method not in self.methods:
            raise ValueError(f"--method {method!r}: choose among {', '.join(self.methods)}.")
        return self.methods[method].trainer.config_class
