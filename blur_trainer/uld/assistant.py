"""The assistant that ULD trains, and its target. Loads only as many layers as are needed."""

import copy
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel
from trl.trainer.utils import get_config_model_id

from blur_trainer.models.loading import load_lower, load_pretrained, read_config
from blur_trainer.models.logit_difference import LogitDifferenceConfig, LogitDifferenceModel
from blur_trainer.models.lora_assistant import lora_assistant
from blur_trainer.models.origin import Origin, record
from blur_trainer.models.suitable import check_causal_lm
from blur_trainer.models.truncation import quarter
from blur_trainer.trainers.adapters import has_adapter
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.cpu import engine_requested
from blur_trainer.trainers.precision import loading_arguments


class Assistant:
    """
    The trained model, and how it becomes a [`LogitDifferenceModel`].

    If the target is a name, only its lower layers are loaded, because training needs no more. If it is a model, or with
    `whole`, the assistant shares the target's weights.

    Args:
        target: the model to unlearn from, or its name.
        num_layers: layers of the assistant. `None`: a quarter of the target's.
        lora: configuration of the assistant's LoRA, as for `lora_assistant`.
        whole: whether the unlearned model is needed during training.
        args: the training arguments, for `model_init_kwargs` and the engine.
    """

    def __init__(
        self,
        target: str | PreTrainedModel,
        num_layers: int | None,
        lora: LoraConfig | None,
        whole: bool,
        args: UnlearningConfig,
    ) -> None:
        self._check(target, lora, whole, args)
        self._kwargs = loading_arguments(args, frozen=True)
        self._lora = lora
        self.name: str | None = target if isinstance(target, str) else None
        self.target: PreTrainedModel | None = None
        if isinstance(target, str) and not whole:
            self.text_config = read_config(target, self._kwargs)
            base = load_lower(target, self.text_config, num_layers, self._kwargs)
        else:
            base = load_pretrained(target, self._kwargs) if isinstance(target, str) else target
            self.target, self.text_config = base, base.config
            self.name = get_config_model_id(base.config) or None
        self._origins = None if self.name is None else self._origin(self.name, isinstance(target, str))
        self.model = lora_assistant(base, quarter(self.text_config) if num_layers is None else num_layers, lora)

    def _origin(self, name: str, by_name: bool) -> dict[str, Origin]:
        """What the target is now, before training: of a hub id the commit, if this class has loaded it."""
        loaded = (self._kwargs.get("revision") or "main", self._kwargs.get("cache_dir")) if by_name else ()
        self.name, origin = record(name, *loaded)
        return {self.name: origin}

    @staticmethod
    def _check(target: Any, lora: Any, whole: bool, args: UnlearningConfig) -> None:
        if not isinstance(target, str | PreTrainedModel) or isinstance(target, LogitDifferenceModel):
            raise TypeError(
                f"`model` must be a model name or a `PreTrainedModel`, got `{type(target).__name__}`; of an adapter "
                "pass the folder that `blur_trainer.merge_and_save` writes, of a `LogitDifferenceModel` its `target`."
            )
        if isinstance(target, PreTrainedModel):
            check_causal_lm(target, "`model`")
            if has_adapter(target):
                raise ValueError(
                    "The target has an adapter in it: merge it, `blur_trainer.merge_and_save(adapter, 'merged')`, and "
                    "pass 'merged'."
                )
        if lora is not None and not isinstance(lora, LoraConfig):
            raise TypeError(f"`peft_config` must be a `LoraConfig`, got `{type(lora).__name__}`.")
        if not isinstance(target, str) and args.model_init_kwargs:
            raise ValueError("`model_init_kwargs` is for a model given by name; this one is loaded already.")
        engine = next((engine for engine in ("fsdp", "deepspeed") if engine_requested(args, engine)), None)
        if engine and (whole or not isinstance(target, str)):
            raise ValueError(
                f"Under {engine} the assistant cannot share the target's weights: give the model by name, and evaluate "
                "the saved one after training instead of passing `benchmarks`."
            )

    def speaker(self) -> PreTrainedModel:
        """The target as a whole. Loaded for the caller if training needs its lower layers only."""
        return self.target if self.target is not None else load_pretrained(str(self.name), self._kwargs)

    def composed(self, weight: float, top_logit_filter: float) -> LogitDifferenceModel:
        """Target and assistant as one model that shares the target's weights. If they shared weights before, further
        training changes it too. Otherwise the target is loaded now, and the assistant is a copy."""
        target: Any = self.target
        model = self.model
        if target is None:
            target = load_pretrained(str(self.name), self._kwargs)
            model = lora_assistant(target, self.model.config.num_hidden_layers, self._lora)
            set_peft_model_state_dict(model, get_peft_model_state_dict(self.model))
        device = next(self.model.parameters()).device
        return LogitDifferenceModel(self.config(weight, top_logit_filter), target.to(device), model.to(device))

    def config(self, weight: float, top_logit_filter: float) -> LogitDifferenceConfig:
        """The configuration of the unlearned model."""
        return LogitDifferenceConfig(
            target=self.name,
            origins=copy.deepcopy(self._origins),
            num_assistant_layers=self.model.config.num_hidden_layers,
            weight=weight,
            top_logit_filter=top_logit_filter,
            text_config=copy.deepcopy(self.text_config),
            architectures=[LogitDifferenceModel.__name__],
        )
