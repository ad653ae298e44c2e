"""Models to evaluate beside the one that is trained, which the trainer loads itself."""

import types
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import convert_outputs_to_fp32
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from trl import ModelConfig, get_quantization_config

from blur_trainer.trainers.cpu import engine_requested
from blur_trainer.trainers.loading import unsharded_loading
from blur_trainer.trainers.precision import loading_arguments
from blur_trainer.uld.trainer import ULDConfig


class ModelLoader:
    """
    Loads by name as the command line says, whole on every process, whatever engine trains. What it loads computes as
    the trained model does, in the same dtype and under the same autocast, so that a table compares like with like.

    ```python
    load = ModelLoader(args, model_args)
    tokenizer = load.tokenizer("folder")
    retrained = load("folder")
    attacked = load("folder", to_train=True)
    ```

    `--model_revision` is of the model that the command line names, not of others. Code that comes with a model is
    refused, unless `--model_init_kwargs` trusts it.

    Attributes:
        options: `model_init_kwargs` of the model that is trained. The dtype is in it only if it was named; otherwise
            the trainer chooses it, and this class for what it loads itself.
    """

    def __init__(self, args: TrainingArguments, model_args: ModelConfig) -> None:
        self._args = args
        self._named = model_args.model_name_or_path
        # weights of few bits are computed with in the dtype of autocast
        compute = model_args.dtype or ("bfloat16" if args.bf16 else "float16" if args.fp16 else "float32")
        quantized = get_quantization_config(replace(model_args, dtype=compute))
        given: dict[str, Any] = getattr(args, "model_init_kwargs", None) or {}
        dtype = given.get("dtype", model_args.dtype)
        named = {} if dtype is None else {"dtype": dtype}
        self.options: dict[str, Any] = {
            **named,
            "attn_implementation": model_args.attn_implementation,
            "quantization_config": quantized,
            "trust_remote_code": False,  # left open, the auto classes ask on stdin
            **({} if model_args.model_revision == "main" else {"revision": model_args.model_revision}),
        } | given
        frozen = model_args.use_peft or quantized is not None or isinstance(args, ULDConfig)
        # a revision among them is of the named model only
        self._chosen = {key: item for key, item in loading_arguments(args, frozen).items() if key == "dtype"}
        self._to_train = {"dtype": "float32", **named, "quantization_config": None}

    def __call__(self, name: str, to_train: bool = False) -> PreTrainedModel:
        """The model. `to_train`: all its weights will be trained, by an attack: none in few bits, and in float32."""
        options = {"device_map": {"": PartialState().device}, **self._chosen, **self._options_of(name)}
        with unsharded_loading(self._args):
            model = AutoModelForCausalLM.from_pretrained(name, **options | (self._to_train if to_train else {}))
        return under_autocast(model, self._args)

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """The tokenizer beside a model."""
        given = self._options_of(name)
        hub = {key: given[key] for key in ("cache_dir", "revision", "token", "trust_remote_code") if key in given}
        return AutoTokenizer.from_pretrained(name, **hub)

    def _options_of(self, name: str) -> dict[str, Any]:
        own = str(name) == self._named
        return {key: item for key, item in self.options.items() if own or key != "revision"}


def under_autocast(model: PreTrainedModel, args: TrainingArguments) -> PreTrainedModel:
    """The model, with the `forward` that accelerate gives the one that these arguments train.

    DeepSpeed casts the weights instead.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if dtype is None or engine_requested(args, "deepspeed"):
        return model
    plain, autocast = model.forward, torch.autocast(model.device.type, dtype)
    if isinstance(plain, types.MethodType):  # unbound, so that a copy of the model runs the copy's weights
        model.forward = types.MethodType(convert_outputs_to_fp32(autocast(plain.__func__)), model)
    else:  # spread over several devices: accelerate's hooks
        model.forward = convert_outputs_to_fp32(autocast(plain))
    return model
