"""What "the reference model" is: the model before unlearning, at the smallest price that the situation allows.

| situation | reference | extra memory |
|---|---|---|
| `precompute_ref_logps=True` | the column `ref_logps`, made once before training | one float per example |
| PEFT | the model with its adapter switched off, or a frozen copy of a trained adapter | none, or one adapter |
| full-parameter training | a frozen copy, or the `ref_model` that the user passes | one model |
| the same, activations only (`ActivationMatch(layer)`) | a frozen copy of the layers up to that one, sharing what is \
frozen in the trained model (one process, DDP) | what is trained among these layers, the embedding and the head |
| the same under FSDP2 or DeepSpeed | the same copy, sharing nothing, sharded | these layers, the embedding, the head |
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from trl.trainer.utils import use_adapter

from blur_trainer.models.early_exit import activations
from blur_trainer.models.forward import answer_logps, evaluating, forward

REFERENCE_ADAPTER = "reference"


class Reference(Protocol):
    """Answers what the reference model says of a batch, without gradient."""

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """`{"input_ids", "attention_mask"}` `(B, T)` -> `(B, T, V)`."""

    def logps(self, batch: Mapping[str, Tensor]) -> Tensor:
        """`{"input_ids", "attention_mask", "labels"}` `(B, T)` -> `log p_ref(answer | prompt)` `(B,)`."""

    def activations(self, batch: Mapping[str, Tensor], layer: int) -> Tensor:
        """`{"input_ids", "attention_mask"}` `(B, T)` -> the output of decoder layer `layer`, `(B, T, H)`."""


class CurrentModel:
    """The model as it is now: the reference before the first step, which is when log-probabilities are precomputed."""

    def __init__(self, model: nn.Module):
        self.model = model

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        with self._as_reference():
            return forward(self.model, batch)

    @torch.no_grad()
    def logps(self, batch: Mapping[str, Tensor]) -> Tensor:
        with self._as_reference():
            return answer_logps(self.model, batch)

    @torch.no_grad()
    def activations(self, batch: Mapping[str, Tensor], layer: int) -> Tensor:
        with self._as_reference():
            return activations(self.model, batch, layer)

    def _as_reference(self) -> AbstractContextManager:
        return evaluating(self.model)


class FrozenModel(CurrentModel):
    """A second model, never trained."""

    def __init__(self, model: nn.Module):
        super().__init__(model.eval().requires_grad_(False))

    @classmethod
    def copy_of(cls, model: nn.Module) -> "FrozenModel":
        return cls(copy.deepcopy(model))


@contextmanager
def switched(model: PeftModel, adapter: str | None) -> Iterator[None]:
    """Another adapter inside, or none (`None`). What was frozen is so afterwards: PEFT unfreezes what it switches."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        with use_adapter(model, adapter):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


class OtherAdapter(CurrentModel):
    """The model itself under another adapter, or under none (`adapter=None`): no second set of base weights."""

    def __init__(self, model: PeftModel, adapter: str | None = None):
        super().__init__(model)
        self.peft_model = model
        self.adapter = adapter

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        with switched(self.peft_model, self.adapter), evaluating(self.peft_model):
            yield


def _is_lora_b(name: str, adapter: str) -> bool:
    return f"lora_B.{adapter}." in name or name.endswith(f"lora_embedding_B.{adapter}")


def partition_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter, also where ZeRO-3 has left an empty tensor in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 has partitioned the model while it was loaded: it cannot run, or be copied, until training."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _plain_lora(model: PeftModel) -> bool:
    """Whether the active adapter is a LoRA of which `B = 0` means that it changes nothing."""
    config: Any = model.peft_config[model.active_adapter]
    extras = ("use_dora", "modules_to_save", "trainable_token_indices")
    return (
        config.peft_type == PeftType.LORA
        and config.bias == "none"
        and not any(getattr(config, x, None) for x in extras)
    )


@torch.no_grad()
def adapter_is_identity(model: PeftModel) -> bool:
    """Whether the active adapter changes nothing yet (as every fresh LoRA).

    A plain LoRA by its `B` alone, which is at hand also where the base weights are not yet (ZeRO-3, FSDP loading on one
    process); any other adapter by running one token pair.
    """
    if _plain_lora(model):
        return not any(p.any() for name, p in model.named_parameters() if _is_lora_b(name, str(model.active_adapter)))
    probe = {"input_ids": torch.tensor([[0, 1]], device=model.device)}
    probe["attention_mask"] = torch.ones_like(probe["input_ids"])
    if not torch.equal(CurrentModel(model).logits(probe), OtherAdapter(model, None).logits(probe)):
        return False
    # an adapter on the embeddings has moved the rows of tokens that occurred, and the probe sees two of them
    embed = model.get_input_embeddings()
    with evaluating(model):
        for ids in torch.arange(embed.weight.shape[0], device=model.device).split(4096):
            with switched(model, None):
                base = embed(ids)
            if not torch.equal(embed(ids), base):
                return False
    return True


def adapter_reference(model: PeftModel) -> OtherAdapter:
    """The reference of a PEFT model, frozen at its present state.

    A fresh adapter is switched off. A trained one holds knowledge of its own, and the base model is not the model
    before unlearning: then a frozen copy of the adapter stands in (named `reference`, saved in a subfolder).
    """
    partitioned = is_partitioned(model)
    if partitioned and not _plain_lora(model):
        raise ValueError(
            "Under ZeRO-3 only a plain LoRA can be its own reference (no DoRA, no `modules_to_save`, no trained biases "
            "or tokens): set `precompute_ref_logps=True`, or pass `ref_model`."
        )
    if adapter_is_identity(model):
        return OtherAdapter(model, None)
    if partitioned:
        raise ValueError(
            "A trained adapter under ZeRO-3 cannot be copied as the reference: merge it into the model first "
            "(`merge_and_unload`) and train a new one, or set `precompute_ref_logps=True`, or pass `ref_model`."
        )
    active = model.active_adapter
    if REFERENCE_ADAPTER not in model.peft_config:
        model.add_adapter(REFERENCE_ADAPTER, model.peft_config[active])
    for name, parameter in model.named_parameters():  # also of an earlier trainer's copy: the present state counts
        if f".{REFERENCE_ADAPTER}." in name or name.endswith(f".{REFERENCE_ADAPTER}"):
            source = name.replace(f".{REFERENCE_ADAPTER}", f".{active}")
            parameter.data.copy_(model.get_parameter(source).data)
            parameter.requires_grad_(False)
    return OtherAdapter(model, REFERENCE_ADAPTER)
