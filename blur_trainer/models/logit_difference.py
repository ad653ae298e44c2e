"""Unlearning by logit difference as one model: target and assistant run side by side over the same weights.

The assistant is [`lora_assistant`]'s: the target's first layers with LoRA, trained to remember what shall be forgotten.
Subtracting its logits removes that and leaves the rest. Source: 2406.08607.
"""

import copy
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from blur_trainer.models.logit_composition import check_composition, logit_difference
from blur_trainer.models.truncation import truncated_view

ADAPTER = "assistant"  # in a folder of its own: beside config.json, AutoModel would take it for an adapter of the model
HUB = ("cache_dir", "force_download", "local_files_only", "token")


class LogitDifferenceConfig(PreTrainedConfig):
    """
    Names the target and says how its assistant's logits are added.

    Args:
        target (`str`, *optional*):
            Folder or hub id of the target. The name that the target was loaded by, if not given.
        num_assistant_layers (`int`, *optional*):
            The assistant's layers. Counted, if not given.
        weight (`float`, defaults to `-0.8`), top_logit_filter (`float`, defaults to `0.01`):
            As in [`logit_difference`]; the values of ULD's scripts for TOFU. May be changed between two calls.
        text_config ([`~transformers.PreTrainedConfig`], *optional*):
            The target's configuration, which tells sizes. Taken from the target, if not given.
    """

    model_type = "logit_difference"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 -- as every composed configuration

    target: str | None = None
    num_assistant_layers: int | None = None
    weight: float = -0.8
    top_logit_filter: float = 0.01
    text_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_composition(self.weight, self.top_logit_filter)
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        super().__post_init__(**kwargs)


class LogitDifferenceCache(Cache):
    """The caches of both parts as one list of layers, so that reordering, cropping and resetting reach both."""

    def __init__(self, target: Cache, assistant: Cache) -> None:
        super().__init__(layers=[*target.layers, *assistant.layers])
        self.target, self.assistant = target, assistant


class LogitDifferenceModel(PreTrainedModel, GenerationMixin):
    """
    `target + weight * assistant` on the tokens that pass the filter: see [`logit_difference`].

    `forward` and `generate` draw from the same distribution, in every mode of `generate`; both parts have a key-value
    cache. The assistant shares the target's weights: beyond the target it costs its adapter and its cache. In `eval`
    mode from the start. At weight 0 only the target runs.

    Args:
        config ([`LogitDifferenceConfig`]):
            What it leaves open is filled in.
        target ([`~transformers.PreTrainedModel`]):
            The model to unlearn from. It is frozen by this.
        assistant ([`~peft.PeftModel`]):
            As [`lora_assistant`] makes it of this target, trained.
    """

    config_class = LogitDifferenceConfig
    base_model_prefix = ""

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
        # A copy: the constructor below settles attention for the pair, the parts have settled it for themselves.
        config.text_config = copy.deepcopy(target.config)
        super().__init__(config)
        self.target, self.assistant = target.requires_grad_(False), assistant
        self.generation_config = copy.deepcopy(target.generation_config)
        self.eval()

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
        """Logits `(B, T, V)`, -inf on rejected tokens; with labels also their mean cross-entropy, inf if one is."""
        caching = self.target.config.use_cache if use_cache is None else use_cache
        cache = self._composite(past_key_values) if past_key_values is not None or caching else None
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": cache is not None,
            "logits_to_keep": logits_to_keep,
        }
        logits = self.target(**inputs, past_key_values=cache and cache.target).logits
        weight, top_logit_filter = self.config.weight, self.config.top_logit_filter
        if weight != 0:
            assistant = self.assistant(**inputs, past_key_values=cache and cache.assistant).logits
            logits = logit_difference(logits, assistant, weight, top_logit_filter)
        loss = None if labels is None else ForCausalLMLoss(logits, labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _composite(self, cache: Cache | None) -> LogitDifferenceCache:
        """`generate` begins with an empty cache for the target and goes on with what `forward` returned."""
        if not isinstance(cache, LogitDifferenceCache):
            cache = DynamicCache(config=self.target.config) if cache is None else cache
            if not isinstance(cache, DynamicCache) or cache.get_seq_length() or not cache.layers:
                raise ValueError(
                    f"past_key_values is a `{type(cache).__name__}` with {len(cache)} layers, {cache.get_seq_length()} "
                    "tokens. Both parts need a cache: leave it out (`cache_implementation` too), or give what an "
                    "earlier call returned, or an empty DynamicCache(config=model.config)."
                )
            cache = LogitDifferenceCache(cache, DynamicCache(config=self.assistant.config))
        lengths = cache.target.get_seq_length(), cache.assistant.get_seq_length()
        if self.config.weight != 0 and lengths[0] != lengths[1]:
            raise ValueError(
                f"The cache holds {lengths[0]} tokens of the target and {lengths[1]} of the assistant: it was begun "
                "with config.weight=0. Begin a new one."
            )
        return cache

    def get_input_embeddings(self) -> nn.Module:
        return self.target.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """None: no single matrix makes these logits of a hidden state, so a fused LM head does not apply."""

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        raise NotImplementedError("The vocabulary is the target's: resize there, then make and train a new assistant.")

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, is_main_process: bool = True, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Writes the configuration, which names the target, and the adapter; no weight of the target's.

        `state_dict` is the whole model's, for an engine that has gathered it.
        """
        if not self.config.target:
            raise ValueError("The target has no name: save it, then set model.config.target to that folder or hub id.")
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
            self.config.architectures = [type(self).__name__]
            self.config.save_pretrained(save_directory)
            self.generation_config.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: LogitDifferenceConfig | None = None,
        target: PreTrainedModel | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> "LogitDifferenceModel":
        """
        Reads what `save_pretrained` wrote, and the target that it names, or takes a `target` that is loaded already.

        `revision` is that of this folder, not the target's; all other arguments go to the target's `from_pretrained`.
        """
        name, hub = str(pretrained_model_name_or_path), {key: kwargs[key] for key in HUB if key in kwargs}
        hub |= {"revision": revision} if revision else {}
        config = config or LogitDifferenceConfig.from_pretrained(name, **hub)
        if not config.target or not config.num_assistant_layers:
            raise ValueError(
                f"The configuration in {name} has target={config.target!r}, num_assistant_layers="
                f"{config.num_assistant_layers!r}: both are needed, as `save_pretrained` writes them."
            )
        generation_config = GenerationConfig.from_pretrained(name, **hub)
        target = target or AutoModelForCausalLM.from_pretrained(config.target, **kwargs)
        view = truncated_view(target, config.num_assistant_layers)
        model = cls(config, target, PeftModel.from_pretrained(view, name, subfolder=ADAPTER, **hub))
        model.generation_config = generation_config
        return model


AutoConfig.register(LogitDifferenceConfig.model_type, LogitDifferenceConfig)
AutoModelForCausalLM.register(LogitDifferenceConfig, LogitDifferenceModel)
