"""The reference model: the model before unlearning, in the cheapest form that the situation allows.

| situation | reference | extra memory |
|---|---|---|
| `precompute_ref_logps=True` | the column `ref_logps`, made once before training | one float per example |
| PEFT | the model with its adapter switched off, or a frozen copy of a trained adapter | none, or one adapter |
| PEFT that trains weights beside its adapter (`bias="all"`, unfrozen norms) | a frozen copy | one model |
| full-parameter training | a frozen copy, or the `ref_model` that the user passes | one model |
| the same, activations only (`ActivationMatch(layer)`) | a frozen copy of the layers up to that one, sharing what is \
frozen in the trained model (one process, DDP) | what is trained among these layers, the embedding and the head |
| the same under FSDP2 or DeepSpeed | the same copy, sharing nothing, sharded | these layers, the embedding, the head |
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor, nn
from trl.trainer.utils import use_adapter

from blur_trainer.models.early_exit import activations
from blur_trainer.models.forward import answer_logps, evaluating, forward

#: the frozen copy of a trained adapter; no name that a user's own adapter has ("reference" is one of TRL's examples)
REFERENCE_ADAPTER = "blur_trainer_reference"


class Reference(Protocol):
    """Computes outputs of the reference model for a batch, without gradient."""

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """`{"input_ids", "attention_mask"}` `(B, T)` -> `(B, T, V)`."""

    def logps(self, batch: Mapping[str, Tensor]) -> Tensor:
        """`{"input_ids", "attention_mask", "labels"}` `(B, T)` -> `log p_ref(answer | prompt)` `(B,)`."""

    def activations(self, batch: Mapping[str, Tensor], layer: int) -> Tensor:
        """`{"input_ids", "attention_mask"}` `(B, T)` -> the output of decoder layer `layer`, `(B, T, H)`."""


class CurrentModel:
    """The trained model itself. Before the first step it is the reference: then log-probabilities are precomputed."""

    def __init__(self, model: nn.Module):
        self.model = model
        #: makes the context of a pass, for a model that no engine has prepared: the trained model's mixed precision
        self.precision: Callable[[], AbstractContextManager] = nullcontext

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

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        with evaluating(self.model), self.precision():
            yield


class FrozenModel(CurrentModel):
    """A second model that is never trained. A model of the user's keeps its flags: no pass here has a gradient."""

    @classmethod
    def copy_of(cls, model: nn.Module) -> "FrozenModel":
        return cls(copy.deepcopy(model).eval().requires_grad_(False))


@contextmanager
def switched(model: PeftModel, adapter: str | None) -> Iterator[None]:
    """Switches to another adapter, or to none (`None`).

    PEFT freezes what it switches off, and unfreezes it afterwards. Here every flag stays what it was, inside too: by
    what is trainable in its first forward pass FSDP2 decides for good in which dtype it hands over gradients.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def keep() -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    try:
        with use_adapter(model, adapter):
            keep()
            yield
    finally:
        keep()


class OtherAdapter(CurrentModel):
    """The model under another adapter, or under none (`adapter=None`). Needs no second set of base weights."""

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
    """The shape of the whole parameter, even if ZeRO-3 has replaced it by an empty tensor."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 partitioned the model while loading it. Then it cannot run or be copied before training."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _is_lora(model: PeftModel) -> bool:
    return model.peft_config[model.active_adapter].peft_type == PeftType.LORA


def _plain_lora(model: PeftModel) -> bool:
    """Whether the active adapter is a LoRA that changes nothing if `B = 0`."""
    config: Any = model.peft_config[model.active_adapter]
    extras = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias")
    return _is_lora(model) and config.bias == "none" and not any(getattr(config, x, None) for x in extras)


def _says_the_same(reference: CurrentModel, model: PeftModel) -> bool:
    probe = {"input_ids": torch.tensor([[0, 1]], device=model.device)}
    probe["attention_mask"] = torch.ones_like(probe["input_ids"])
    return torch.equal(CurrentModel(model).logits(probe), reference.logits(probe))


@torch.no_grad()
def adapter_is_identity(model: PeftModel) -> bool:
    """Whether the active adapter changes nothing yet (as every fresh LoRA).

    For a plain LoRA it checks `B`, which exists even if the base weights are not loaded yet (ZeRO-3, FSDP loading on
    one process). For any other adapter it runs one token pair.
    """
    if _plain_lora(model):
        return not any(p.any() for name, p in model.named_parameters() if _is_lora_b(name, str(model.active_adapter)))
    if not _says_the_same(OtherAdapter(model, None), model):
        return False
    # an adapter on the embeddings may have changed other rows than the probe's two
    embed = model.get_input_embeddings()
    with evaluating(model):
        for ids in torch.arange(embed.weight.shape[0], device=model.device).split(4096):
            with switched(model, None):
                base = embed(ids)
            if not torch.equal(embed(ids), base):
                return False
    return True


def trains_beside_adapter(model: PeftModel) -> list[str]:
    """The trainable parameters that act even if the adapter is switched off: biases, norms, unfrozen layers."""
    config: Any = model.peft_config[model.active_adapter]
    own = (PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type], "modules_to_save.", "token_adapter.")
    return [name for name, p in model.named_parameters() if p.requires_grad and not any(part in name for part in own)]


def adapter_reference(model: PeftModel) -> CurrentModel:
    """The reference of a PEFT model, frozen at its present state.

    A fresh adapter is switched off. A trained adapter is part of the model before unlearning, so a frozen copy of it is
    used (named `REFERENCE_ADAPTER`, saved in a subfolder). If weights beside the adapter are trained, switching it off
    does not undo that, and the whole model is copied.
    """
    partitioned, beside = is_partitioned(model), trains_beside_adapter(model)
    if partitioned and (beside or not _plain_lora(model)):
        raise ValueError(
            "Under ZeRO-3 only a plain LoRA can be its own reference (no DoRA, no `modules_to_save`, no trained biases "
            "or tokens): set `precompute_ref_logps=True`, or pass `ref_model`."
        )
    if beside:
        if getattr(model.get_base_model(), "is_quantized", False):
            raise ValueError(
                f"Weights beside the adapter are trained ({', '.join(beside[:2])}), so the reference must be a copy, "
                'and a quantized model is not copied: choose `bias="none"`, or pass `ref_model`.'
            )
        return FrozenModel.copy_of(model)
    if adapter_is_identity(model):
        return OtherAdapter(model, None)
    if partitioned:
        raise ValueError(
            "A trained adapter under ZeRO-3 cannot be copied as the reference: merge it into the model first "
            "(`blur_trainer.merge_and_save`) and train a new one, or set `precompute_ref_logps=True`, or pass "
            "`ref_model`."
        )
    _copy_adapter(model)
    copied = OtherAdapter(model, REFERENCE_ADAPTER)
    if _is_lora(model) or _says_the_same(copied, model):
        return copied
    model.delete_adapter(REFERENCE_ADAPTER)  # other methods may keep more than parameters: drawn indices, say
    return FrozenModel.copy_of(model)


def _copy_adapter(model: PeftModel) -> None:
    """Adds a frozen copy of the active adapter. It replaces the copy that an earlier trainer made."""
    active = model.active_adapter
    if REFERENCE_ADAPTER in model.peft_config:
        model.delete_adapter(REFERENCE_ADAPTER)
    config = copy.deepcopy(model.peft_config[active])
    for name in ("init_lora_weights", "init_weights"):  # PiSSA and OLoRA would take their start off the base again
        if hasattr(config, name):
            setattr(config, name, False)
    model.add_adapter(REFERENCE_ADAPTER, config)
    for name, parameter in model.named_parameters():
        if f".{REFERENCE_ADAPTER}." in name or name.endswith(f".{REFERENCE_ADAPTER}"):
            source = name.replace(f".{REFERENCE_ADAPTER}", f".{active}")
            parameter.data.copy_(model.get_parameter(source).data)
            parameter.requires_grad_(False)
