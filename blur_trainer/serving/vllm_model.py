"""The logit-difference model for vLLM: target and assistant over one set of weights, each with its own KV cache."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.model_executor.model_loader import DefaultModelLoader
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix

from blur_trainer.models.logit_composition import composition_named
from blur_trainer.models.truncation import shortened
from blur_trainer.serving.folder import check_served, tensors_of
from blur_trainer.serving.vllm_adapter import put_adapter
from blur_trainer.serving.vllm_sharing import share_weights

TARGET = "target."  # what the target's tensors are called in the stream of all weights


class ServedLogitDifference(nn.Module):
    """
    What [`LogitDifferenceModel`] is in transformers, with vLLM's layers.

    Target and assistant are two instances of vLLM's own class for the target's architecture, of all and of
    `num_assistant_layers` layers. The composition `"offset"` has a third one, without adapter. They share every weight:
    the assistant adds its adapter only, kept as low-rank additions. Attention layers get a KV cache by their name, and
    the names differ, so each part has its own cache.

    `forward` returns the last hidden states `(T, P H)` of all `P` parts beside each other: T tokens, H the hidden size.
    `compute_logits` takes those of the tokens that vLLM picks, and composes the logits `(N, V)`. So sampling, beams,
    log-probabilities and prefix caching see the composed distribution. At weight 0 only the target runs.

    Tensor parallelism is the target's. Refused: quantization, a target that vLLM runs by its transformers backend, an
    assistant over another model, experts. vLLM itself refuses pipeline parallelism and `--enable-lora` here.

    Args:
        vllm_config: vLLM's configuration; its `hf_config` is a [`LogitDifferenceConfig`].
        prefix: of the names of the layers.

    Raises:
        `ValueError`: the configuration asks for something that is refused, or the target has changed.
        `FileNotFoundError`: target or adapter are not there.
    """

    target: Any  # instances of a class of vLLM
    others: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        config: Any = model_config.hf_config
        check_served(config, vllm_config.load_config.load_format, vllm_config.quant_config is not None)
        self.config, self.composition = config, composition_named(config.composition)
        self.hidden_size = model_config.get_hidden_size()
        self.lora, adapter, place = tensors_of(model_config.model, model_config.revision, config)
        # vLLM's loader reads these two: the adapter alone from this folder, then the target from its own
        self.allow_patterns_overrides = [adapter]
        self.secondary_weights = [
            DefaultModelLoader.Source(place.name, place.revision, prefix=TARGET, fall_back_to_pt=False)
        ]
        text = config.text_config
        self.target = init_vllm_registered_model(
            vllm_config, hf_config=text, prefix=maybe_prefix(prefix, "target"), architectures=text.architectures
        )
        if type(self.target).__module__.startswith("vllm.model_executor.models.transformers"):
            raise ValueError(
                f"vLLM has no class of its own for {text.architectures}: serve this model by transformers."
            )
        self.others = nn.ModuleDict()
        parts = ["assistant", "base"] if self.composition.pair else ["assistant"]
        for name in parts if config.weight != 0 else []:
            with set_model_tag(name):  # it is compiled apart from the target
                part = init_vllm_registered_model(
                    vllm_config,
                    hf_config=shortened(text, config.num_assistant_layers),
                    prefix=maybe_prefix(prefix, name),
                    architectures=text.architectures,
                )
            share_weights(part, self.target)
            self.others[name] = part

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.target.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The last hidden states of all parts, `(T, P H)`."""
        parts = [self.target, *self.others.values()]
        return torch.cat([part(input_ids, positions, intermediate_tensors, inputs_embeds) for part in parts], dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Composed logits `(N, V)` of hidden states `(N, P H)`. `None` on processes that vLLM asks for none."""
        parts = [self.target, *self.others.values()]
        hidden = hidden_states.split(self.hidden_size, dim=-1)
        logits = [part.compute_logits(own.contiguous()) for part, own in zip(parts, hidden, strict=True)]
        if logits[0] is None or len(logits) == 1:
            return logits[0]
        base = logits[2] if self.composition.pair else None
        return self.composition(logits[0], logits[1], base, self.config.weight, self.config.top_logit_filter)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Puts the target's tensors into the target, the adapter's over the assistant. Returns the loaded names."""
        adapter: dict[str, Tensor] = {}

        def of_target() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith(TARGET):
                    yield name.removeprefix(TARGET), tensor
                else:
                    adapter[name] = tensor

        loaded = {TARGET + name for name in self.target.load_weights(of_target())}
        if self.others:
            put = put_adapter(self.others["assistant"], adapter, self.lora)
            loaded |= {f"others.assistant.{name}" for name in put}
        return loaded
