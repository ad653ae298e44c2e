"""Computes a causal language model's logits, or only the log-probabilities of its answers.

Log-probabilities need no `(B, T, V)` logits. TRL's fused LM head multiplies the backbone's output by the head tile by
tile, and the backward pass recomputes each tile. With 2048 tokens and a vocabulary of 128k that saves gigabytes per
example.
"""

import functools
import math
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from blur_trainer.models.fused_heads import CHECKED, fused_from, logits_bytes
from blur_trainer.models.fused_kernel import TRITON_DEVICES, kernel_obstacle
from blur_trainer.models.logps import per_token_logps

logger = get_logger(__name__)


def forward(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Logits `(B, T, V)`. Passes no labels, so the model computes no loss of its own, and makes no cache."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


def answer_logps(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """`log p(answer | prompt)` `(B,)`, by the fused head if the batch takes it, else from the logits."""
    return answer_logps_and_router_loss(model, batch)[0]


def answer_token_logps(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """`log p` of each answer token `(B, T-1)`, 0 at other positions; computed as [`answer_logps`] does."""
    return _token_logps_and_output(model, batch)[0]


def answer_logps_and_router_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """
    `log p(answer | prompt)` `(B,)`, and what a mixture of experts with `config.output_router_logits=True` adds to its
    own loss: the load-balancing loss of this batch times `config.router_aux_loss_coef`, 0-d. Else `None`.
    """
    token_logps, output = _token_logps_and_output(model, batch)
    logps = token_logps.sum(-1)
    balance = getattr(output, "aux_loss", None)
    if balance is None:
        return logps, None
    return logps, causal_lm(model).config.get_text_config().router_aux_loss_coef * balance


def _token_logps_and_output(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if takes_fused_head(model, batch):
        output = model(**inputs, labels=batch["labels"], fused_lm_head=True)
        return output.log_probs, output
    output = model(**inputs, use_cache=False)
    return per_token_logps(output.logits, batch["labels"]), output


def hidden_size(model: nn.Module) -> int:
    """`H`, the size of the decoder's activations `(B, T, H)`."""
    return causal_lm(model).config.get_text_config(decoder=True).hidden_size


def causal_lm(model: nn.Module) -> Any:
    """The model inside its wrappers (PEFT, DDP, DeepSpeed's engine, `torch.compile`)."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def has_fused_head(model: nn.Module) -> bool:
    """Whether some batches, or all, go through a fused head."""
    return _fused_from(causal_lm(model)) < math.inf


def takes_fused_head(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether this batch goes through a fused head. Reads shapes only."""
    target = causal_lm(model)
    least = _fused_from(target)
    return least < math.inf and _logits_bytes(target, batch["input_ids"].numel()) >= least


def _fused_from(target: Any) -> float:
    return getattr(target, "fused_lm_head_from", math.inf)


def _logits_bytes(target: Any, tokens: int) -> int:
    return logits_bytes(tokens, target.config.get_text_config().vocab_size)


def choose_head(
    model: PreTrainedModel | PeftModel,
    fused: bool | None,
    device: torch.device,
    largest: int | None = None,
    by_batch: bool = True,
) -> None:
    """Decides how `answer_logps` works for this model. Call it before an engine wraps the model.

    `None` chooses: on GPUs, where TRL's head is a Triton kernel, it takes the fused head for batches whose logits are
    large (`fused_heads.FUSED_FROM`). On a CPU it takes logits: there the fused head takes 1.2 to 1.8 times as long
    (`benchmarks/fused_head.py`) and more memory, because its tiles are several float32 copies. `True` raises
    `ValueError` if the head does not suit, or its kernel does not run.

    Args:
        model: a causal language model.
        fused: `UnlearningConfig.fused_lm_head`.
        device: where the model will run.
        largest: tokens of the largest batch, padding included. Default: not known, any number.
        by_batch: `False` decides for all batches by the largest one. For engines that shard the weights: processes
            whose batches go different ways would gather different tensors.
    """
    target = causal_lm(model)
    size = math.inf if largest is None else _logits_bytes(target, largest)
    least = fused_from(fused, device.type in TRITON_DEVICES, size, by_batch)
    obstacle = fused_head_obstacle(model) or kernel_obstacle(device) if least < math.inf else None
    if obstacle and fused:
        raise ValueError(f"`fused_lm_head=True`, but {obstacle}. Change that, or leave the option off.")
    if obstacle:
        logger.warning(f"Log-probabilities are computed from whole logits, without a fused LM head: {obstacle}.")
        least = math.inf
    if least < math.inf and not hasattr(target, "fused_lm_head_from"):
        _add_fused_head(target)
    if hasattr(target, "fused_lm_head_from") or least < math.inf:  # without a fused head there is nothing to switch
        target.fused_lm_head_from = least


def _add_fused_head(model: Any) -> None:
    plain = model.forward
    add_fused_lm_head(model)
    if not isinstance(plain, types.MethodType):  # a hook of accelerate's, which binds the model itself
        return
    fused, unbound = model.forward.__func__, plain.__func__

    # TRL's function holds the bound `forward` of this model, so a deep copy would run the original. Use an unbound one.
    @functools.wraps(type(model).forward)
    def choose(self: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return unbound(self, *args, **kwargs)
        output = fused(self, *args, fused_lm_head=True, **kwargs)
        _finish_group(self)
        return output

    model.forward = types.MethodType(choose, model)


def _finish_group(model: Any) -> None:
    """Runs the LM head on no tokens, so that FSDP2 sees every module of its group run.

    accelerate shards the last norm and the head as one group, and the fused head reads the head's weight without
    calling it. Before torch 2.13 such a group stays gathered until a backward pass, whatever `reshard()` says.
    """
    head = model.get_output_embeddings()
    sharded = isinstance(head, FSDPModule)
    if sharded and not torch.is_grad_enabled():
        head(torch.zeros(0, head.in_features, dtype=head.weight.dtype, device=head.weight.device))


def fused_head_obstacle(model: PreTrainedModel | PeftModel) -> str | None:
    """Why the fused head would not give this model's log-probabilities. `None` if it does.

    The fused head multiplies the backbone's output by the head's `weight` itself. So it would ignore an adapter or a
    quantized layer on the head, and what an architecture computes before or after the head.
    """
    target = causal_lm(model)
    head = target.get_output_embeddings() if isinstance(target, PreTrainedModel) else None
    if type(head) is not nn.Linear:
        what = "there is none" if head is None else f"this one is `{type(head).__name__}`"
        return f"it needs a plain `torch.nn.Linear` as the LM head (no adapter, no quantization), and {what}"
    if target.base_model is target:
        return f"`{type(target).__name__}` has no backbone (`base_model`) below the LM head"
    own = not type(target).forward.__module__.startswith("transformers.models.")
    composed = target.config.get_text_config() is not target.config
    if own or composed or target.config.model_type not in CHECKED:
        return f"it was not compared with the logits of `{type(target).__name__}`"
    return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and without the router's training loss in a mixture of experts (which does
    not allow generation). On exit every module gets its training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    routers = router_configs(model)
    model.eval()
    for config in routers:
        config.output_router_logits = False
    try:
        # Not inference_mode, because tensors that modules cache here (rotary tables) must stay usable in training.
        with torch.no_grad():
            yield
    finally:
        for config in routers:
            config.output_router_logits = True
        # One by one: `model.train()` would also change parts that their owner keeps in evaluation mode.
        for module, flag in flags:
            module.training = flag


def router_configs(model: nn.Module) -> list[Any]:
    """The configurations in the model that ask for the router's logits, and so for its load-balancing loss."""
    own = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    every = {id(config): config for top in own for config in (top, top.get_text_config())}
    return [config for config in every.values() if getattr(config, "output_router_logits", False)]
