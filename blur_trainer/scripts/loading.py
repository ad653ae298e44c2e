"""Models to evaluate beside the one that is trained, which the trainer loads itself."""

from typing import Any

from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from trl import ModelConfig, get_quantization_config

from blur_trainer.trainers.loading import unsharded_loading


class ModelLoader:
    """
    Loads by name as the command line says, whole on every process, whatever engine trains.

    ```python
    load = ModelLoader(args, model_args)
    tokenizer = load.tokenizer("folder")
    retrained = load("folder")
    exact = load("folder", quantization_config=None)
    ```

    `--model_revision` is of the model that the command line names, not of others. Code that comes with a model is
    refused, unless `--model_init_kwargs` trusts it.

    Attributes:
        options: what `from_pretrained` is given; `model_init_kwargs` of the model that is trained.
    """

    def __init__(self, args: TrainingArguments, model_args: ModelConfig) -> None:
        self._args = args
        self._named = model_args.model_name_or_path
        self.options: dict[str, Any] = {
            "dtype": model_args.dtype,
            "attn_implementation": model_args.attn_implementation,
            "quantization_config": get_quantization_config(model_args),
            "trust_remote_code": False,  # left open, the auto classes ask on stdin
            **({} if model_args.model_revision == "main" else {"revision": model_args.model_revision}),
        } | (getattr(args, "model_init_kwargs", None) or {})

    def __call__(self, name: str, **changed: Any) -> PreTrainedModel:
        with unsharded_loading(self._args):
            options = {"device_map": {"": PartialState().device}, **self._options_of(name), **changed}
            return AutoModelForCausalLM.from_pretrained(name, **options)

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """The tokenizer beside a model."""
        given = self._options_of(name)
        hub = {key: given[key] for key in ("cache_dir", "revision", "token", "trust_remote_code") if key in given}
        return AutoTokenizer.from_pretrained(name, **hub)

    def _options_of(self, name: str) -> dict[str, Any]:
        own = str(name) == self._named
        return {key: item for key, item in self.options.items() if own or key != "revision"}
