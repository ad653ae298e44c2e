"""Models to evaluate beside the one that is trained, which the trainer loads itself."""

from typing import Any

from accelerate import PartialState
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from trl import ModelConfig, get_quantization_config

from blur_trainer.trainers.loading import unsharded_loading


class ModelLoader:
    """
    Loads by name as the command line says, whole on every process, whatever engine trains.

    ```python
    load = ModelLoader(args, model_args)
    retrained = load("folder")
    exact = load("folder", quantization_config=None)
    ```

    Attributes:
        options: what `from_pretrained` is given; `model_init_kwargs` of the model that is trained.
    """

    def __init__(self, args: TrainingArguments, model_args: ModelConfig) -> None:
        self._args = args
        self.options: dict[str, Any] = {
            "dtype": model_args.dtype,
            "attn_implementation": model_args.attn_implementation,
            "quantization_config": get_quantization_config(model_args),
            "trust_remote_code": False,  # left open, the auto classes ask on stdin
        } | (getattr(args, "model_init_kwargs", None) or {})

    def __call__(self, name: str, **changed: Any) -> PreTrainedModel:
        with unsharded_loading(self._args):
            options = {"device_map": {"": PartialState().device}, **self.options, **changed}
            return AutoModelForCausalLM.from_pretrained(name, **options)
