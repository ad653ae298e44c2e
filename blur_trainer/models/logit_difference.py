"""Unlearning by logits as one model: a target and its assistant run side by side and share most of their weights.

ULD trains an assistant ([`lora_assistant`]: the target's first layers with LoRA) to remember what shall be forgotten.
Subtracting its logits removes that and leaves the rest. Source: 2406.08607. [`COMPOSITIONS`] has other ways to combine
the two, with their sources.
"""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import SAFE_WEIGHTS_NAME, can_return_tuple

from blur_trainer.models.logit_composition import composition_named
from blur_trainer.models.logit_difference_cache import LogitDifferenceCache as LogitDifferenceCache
from blur_trainer.models.logit_difference_cache import composite_cache
from blur_trainer.models.logit_difference_config import LogitDifferenceConfig
from blur_trainer.models.named_model import ADAPTER as ADAPTER
from blur_trainer.models.named_model import HUB, adapter_inside, named_model, own_folder
from blur_trainer.models.truncation import truncated_view, without_adapter

logger = logging.getLogger(__name__)
AUTO_CLASS = ("_adapter_model_path", "adapter_kwargs")  # arguments that `AutoModelForCausalLM` adds


def _shares_weights(target: nn.Module, assistant: nn.Module) -> bool:
    owned = {id(parameter) for parameter in target.parameters()}
    return not owned.isdisjoint(id(parameter) for parameter in assistant.parameters())


class LogitDifferenceModel(PreTrainedModel, GenerationMixin):
    """
    A model whose logits combine those of a target and an assistant: see [`COMPOSITIONS`].

    `forward` and all modes of `generate` use the same distribution. All parts have a key-value cache. The assistant
    shares the target's weights, so it adds only its adapter and its cache to the memory. The model starts in `eval`
    mode. At weight 0 only the target runs.

    ULD's and WHP's assistants are trained alone. An `"offset"` model is trained as a whole, by any trainer and
    objective, with the target as the reference model. Gradients reach only the adapter; `train` only the assistant.

    Args:
        config ([`LogitDifferenceConfig`]):
            Missing values are filled in.
        target ([`~transformers.PreTrainedModel`]):
            The model to unlearn from. It gets frozen.
        assistant ([`~peft.PeftModel`]):
            A trained [`lora_assistant`] of this target, or of another model with the same vocabulary.
    """

    config_class = LogitDifferenceConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True

    def __init__(self, config: LogitDifferenceConfig, target: PreTrainedModel, assistant: PeftModel) -> None:
        if not isinstance(assistant, PeftModel):
            raise TypeError(f"assistant is a `{type(assistant).__name__}`; make it with lora_assistant(target, ...).")
        layers, sizes = assistant.config.num_hidden_layers, (target.config.vocab_size, assistant.config.vocab_size)
        if config.num_assistant_layers not in (None, layers):
            raise ValueError(
                f"The assistant has {layers} layers, num_assistant_layers={config.num_assistant_layers}: leave it out."
            )
        if sizes[0] != sizes[1]:
            raise ValueError(f"Vocabularies of {sizes[0]} (target) and {sizes[1]} (assistant) tokens: they must match.")
        config.num_assistant_layers = layers
        config.target = config.target or target.name_or_path or None
        shared = _shares_weights(target, assistant)
        if shared and config.assistant:
            raise ValueError(
                f"The assistant is a view of the target, config.assistant={config.assistant!r}: leave it out."
            )
        config.assistant = config.assistant or (None if shared else assistant.name_or_path or None)
        # A copy, because the constructor below sets the attention; target and assistant have set their own already.
        config.text_config = copy.deepcopy(target.config)
        super().__init__(config)
        self.target, self.assistant = target.requires_grad_(False), assistant
        self.base = without_adapter(assistant) if composition_named(config.composition).pair else None
        self.generation_config = copy.deepcopy(target.generation_config)
        self.eval()

    def train(self, mode: bool = True) -> "LogitDifferenceModel":
        """Switches only the assistant's mode. The frozen parts stay in `eval` mode, without dropout."""
        super().train(mode)
        for part in (self.target, self.base):
            if part is not None:
                part.eval()
        return self

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast:
        """Returns logits `(B, T, V)`, and with labels their mean cross-entropy."""
        composition, weight = composition_named(self.config.composition), self.config.weight
        caching = self.target.config.use_cache if use_cache is None else use_cache
        cache = None
        if past_key_values is not None or caching:
            configs = self.target.config, self.assistant.config
            cache = composite_cache(past_key_values, *configs, composition.pair, weight)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": cache is not None,
            "logits_to_keep": logits_to_keep,
        }
        base: Tensor | None = None
        with torch.no_grad():
            logits = self.target(**inputs, past_key_values=cache and cache.target).logits
            if weight != 0 and composition.pair:
                base = self._base()(**inputs, past_key_values=cache and cache.base).logits
        if weight != 0:
            assistant = self.assistant(**inputs, past_key_values=cache and cache.assistant).logits
            logits = composition(logits, assistant, base, weight, self.config.top_logit_filter)
        loss = None if labels is None else ForCausalLMLoss(logits, labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _base(self) -> PreTrainedModel:
        if self.base is None:
            raise ValueError(
                f"config.composition={self.config.composition!r} was set after the model was made, and reads a part "
                "that it does not have: make a new LogitDifferenceModel of this config."
            )
        return self.base

    def get_input_embeddings(self) -> nn.Module:
        return self.target.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """None, because no single matrix makes these logits. So a fused LM head does not apply."""

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        raise NotImplementedError("The vocabulary is the target's: resize there, then make and train a new assistant.")

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, is_main_process: bool = True, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Writes the configuration, which names the target, and the adapter. No weights of the target.

        `state_dict` is the whole model's, if an engine has gathered it. Under `"offset"` the adapter is also written to
        `model.safetensors` under this model's names: a `Trainer` resumes from there.
        """
        if not self.config.target:
            logger.warning("The target has no name: `from_pretrained` of %s will need `target=`.", save_directory)
        if not self.config.assistant and not _shares_weights(self.target, self.assistant):
            raise ValueError("The assistant's model has no name: save it, then set model.config.assistant to that.")
        whole = self.state_dict() if state_dict is None else state_dict
        if state_dict is not None:
            prefix = "assistant."
            state_dict = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        self.assistant.save_pretrained(
            str(Path(save_directory) / ADAPTER),
            is_main_process=is_main_process,
            save_embedding_layers=False,
            state_dict=state_dict,
        )
        if is_main_process:
            self.config.record_origins()
            self.config.architectures = [type(self).__name__]
            self.config.save_pretrained(save_directory)
            if self.base is not None:
                trained = {name: whole[name].contiguous() for name in whole if "lora_" in name}
                save_file(trained, Path(save_directory) / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
            self.generation_config.save_pretrained(save_directory)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `Module.load_state_dict`. Frozen weights may be missing unless `strict`: they have their own folders."""
        result = super().load_state_dict(state_dict, strict, assign)
        result.missing_keys[:] = [name for name in result.missing_keys if "lora_" in name]
        return result

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: LogitDifferenceConfig | None = None,
        target: PreTrainedModel | None = None,
        assistant: PreTrainedModel | None = None,
        is_trainable: bool = False,
        revision: str | None = None,
        trust_remote_code: bool | None = None,
        trust_target_remote_code: bool = False,
        **kwargs: Any,
    ) -> "LogitDifferenceModel":
        """
        Loads what `save_pretrained` wrote and the models that it names. Loaded models may be passed instead: `target`,
        and `assistant` if the configuration names one. `is_trainable=True` allows further training of the adapter.

        `revision` is of this folder; `trust_remote_code` has no effect here. `trust_target_remote_code=True` runs code
        that comes with the named models. Other arguments go to their `from_pretrained`. All weights are safetensors.

        Raises:
            `FileNotFoundError`: a named folder, or the adapter, is not there.
            `ValueError`: a named model is not the one that was there when this one was saved, or is of this kind
                itself, or needs code that is not trusted.
        """
        for key in AUTO_CLASS:  # set for a folder with an adapter in it, such as a checkpoint; not meant for the target
            kwargs.pop(key, None)
        hub = {key: kwargs[key] for key in HUB if key in kwargs}
        name = str(pretrained_model_name_or_path)
        folder = own_folder(name, **hub, **({"revision": revision} if revision else {}))
        config = config or LogitDifferenceConfig.from_pretrained(str(folder))
        if not (config.target or target) or not config.num_assistant_layers:
            raise ValueError(
                f"The configuration in {name} has target={config.target!r}, num_assistant_layers="
                f"{config.num_assistant_layers!r}: both are needed, as `save_pretrained` writes them. Without a name "
                "the target itself is: pass `target=`."
            )
        inside = adapter_inside(folder)
        beside = folder if Path(name).is_dir() else None
        kwargs |= {"trust_remote_code": trust_target_remote_code}
        target = target or named_model(config, "target", beside, name, kwargs)
        below = (
            target if config.assistant is None else assistant or named_model(config, "assistant", beside, name, kwargs)
        )
        view = truncated_view(below.requires_grad_(False), config.num_assistant_layers)
        options: Any = {"is_trainable": is_trainable, "subfolder": inside, "torch_device": "cpu"}  # not GPU 0
        adapter = PeftModel.from_pretrained(view, str(folder), **options)
        model = cls(config, target, adapter)
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
        return model


if __name__.startswith("blur_trainer."):  # a copy in a model's folder is found by its `auto_map`
    AutoConfig.register(LogitDifferenceConfig.model_type, LogitDifferenceConfig)
    AutoModelForCausalLM.register(LogitDifferenceConfig, LogitDifferenceModel)
