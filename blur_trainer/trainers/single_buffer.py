"""The step with one gradient buffer and no slots: `.grad` holds the forget gradient, then the combination.

    forget pass                   .grad = g_f
    forward mode, retain loss     <g_f, g_r> along `.grad`, without computing g_r
    rule                          w, from a rule that does not need ||g_r||
    scale, retain pass            .grad = w_f g_f + w_r g_r; the retain loss is weighted before its backward pass

This is exact under DDP. Its last reduction averages `w_f g_f`, which is equal on all processes, plus each process's
share of `w_r g_r`. `||g_r||`, for the log, follows from the norm of the combination.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from blur_trainer.gradients.backend import GradientBackend, inner_products
from blur_trainer.gradients.forward_mode import directional_derivative
from blur_trainer.gradients.rules import Rule
from blur_trainer.models.forward import evaluating, forward
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.precision import is_reentrant
from blur_trainer.trainers.step import Step, objective_pass, record, weights_of


def check_single_buffer(args: UnlearningConfig, rule: Rule, roles: Mapping[str, Any], one_pass: bool = True) -> None:
    """Raises `ValueError` for settings that a single gradient buffer does not support, before any model is loaded."""
    if not args.single_gradient_buffer:
        return
    obstacles: list[tuple[bool, str]] = [
        (hasattr(rule, "retain_smoothing"), f"the rule {rule} keeps a mean of gradients: choose another rule"),
        (
            getattr(rule, "needs_retain_norm", True),
            f"the rule {rule} reads the norm of the retain gradient: choose `sum`, or `blur` with "
            "`lower_level='forget'` (a rule of your own says `needs_retain_norm = False`)",
        ),
        ("retain" not in roles, "there is no retain dataset, and so only one gradient: leave it off"),
        (
            "retain" in roles and roles["retain"].top_layer is not None,
            f"{roles.get('retain')} ends the forward pass at a layer, which its forward mode does not: leave it off",
        ),
        (not one_pass, "a `forget_procedure` such as SAM needs a second one: choose one of both"),
        (args.offload_forget_gradient, "`offload_forget_gradient=True` keeps a second one: choose one of both"),
        (args.fp16, "`fp16=True` scales the loss, and scaled gradients overflow in its forward mode: use `bf16=True`"),
        (
            bool(args.activation_checkpointing) and is_reentrant(args),
            "reentrant checkpointing has no forward mode: "
            "set `activation_checkpointing_kwargs={'use_reentrant': False}`",
        ),
    ]
    for present, obstacle in obstacles:
        if present:
            raise ValueError(f"`single_gradient_buffer=True`, but {obstacle}.")


def check_forward_mode(model: Any, args: UnlearningConfig, engine: DistributedType) -> None:
    """Raises `NotImplementedError` if the engine shards, or a kernel of the model has no forward mode."""
    if not args.single_gradient_buffer:
        return
    if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise NotImplementedError(
            "`single_gradient_buffer=True` runs on one process and DDP, not under FSDP or DeepSpeed, where each "
            "process holds its shard of the gradients only: leave it off, or set `offload_forget_gradient=True`."
        )
    ids = torch.tensor([[0, 1]], device=args.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tangents = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    try:
        with evaluating(model):  # without dropout, which would draw random numbers
            directional_derivative(model, tangents, lambda m: forward(m, batch).sum())
    except NotImplementedError as error:
        raise NotImplementedError(
            "`single_gradient_buffer=True` needs forward-mode differentiation of the model, which one of its kernels "
            "does not have: load it with `attn_implementation='sdpa'` or `'eager'`, without Liger kernels and 4- or "
            f"8-bit weights, or leave the option off. ({str(error).splitlines()[0]})"
        ) from error


def one_buffer_step(step: Step) -> Tensor:
    """Runs both passes over the window. `.grad` becomes the combination, or empty if it is not finite."""
    backend, rule = step.backend, step.rule()
    losses = {"forget": objective_pass(step, "forget")}
    _mask(backend)
    gramian = torch.full((2, 2), torch.nan, dtype=torch.float64)
    gramian[0, 0] = _squared_norm(backend)
    weights = weights_of(step, rule, gramian)
    if gramian[0, 0].isfinite() and not weights.isfinite().all():  # a fixed sum does not need the inner product
        gramian[0, 1] = gramian[1, 0] = _inner_product(step)
        weights = weights_of(step, rule, gramian)
    # NaN in the inner product: it was not computed, or the weights are NaN too. A clamp may hide inf.
    finite = bool(gramian[0, 0].isfinite() and weights.isfinite().all() and not gramian[0, 1].isinf())
    if finite:
        forget_weight, retain_weight = weights.tolist()
        gradients = _gradients(backend)
        if gradients:  # foreach does not accept empty lists
            torch._foreach_mul_(gradients, forget_weight)
        losses["retain"] = objective_pass(step, "retain", retain_weight)
        _mask(backend)
        combined = _squared_norm(backend)  # finite only if the retain gradient is
        finite = bool(combined.isfinite())
        gramian[1, 1] = _retain_norm(combined, gramian, weights)
    if not finite:
        backend.discard()
    return record(step, rule, losses, gramian, weights, finite)


def _gradients(backend: GradientBackend) -> list[Tensor]:
    return [p.grad for p in backend.parameters if p.grad is not None]


def _mask(backend: GradientBackend) -> None:
    """Makes `.grad` 0, in place, where a mask says that an entry may not change."""
    for _ in backend.masked(parameter.grad for parameter in backend.parameters):
        pass


def _squared_norm(backend: GradientBackend) -> Tensor:
    """Squared norm of `.grad`, 0-d float64 on the CPU, equal on every process."""
    gradients = _gradients(backend)
    return backend.shared(inner_products(gradients, [None] * len(gradients)))[0]


def _retain_norm(combined: Tensor, gramian: Tensor, weights: Tensor) -> Tensor:
    """`||g_r||^2` from `||w_f g_f + w_r g_r||^2`, for the log. NaN if rounding hides it."""
    forget, retain = weights
    known = torch.stack([forget**2 * gramian[0, 0], 2 * forget * retain * gramian[0, 1]])
    rest = combined - known.sum()
    return torch.where(rest > 1e-4 * known.abs().max(), rest / retain**2, torch.nan)


def _inner_product(step: Step) -> Tensor:
    """`<g_f, g_r>` over all processes, with `g_f` in `.grad`. Uses the model below DDP, so that DDP reduces nothing."""
    model = step.accelerator.unwrap_model(step.backend.model, keep_torch_compile=False)
    tangents = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    device = step.device
    total = torch.zeros((), device=device)
    # so that the retain pass draws the same dropout masks
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type):
        for batch in step.window:
            with step.autocast():
                loss = partial(step.loss, role="retain", batch=batch["retain"], count=step.counts["retain"])
                total += _derivative(model, tangents, loss)
    return step.accelerator.reduce(total, "sum").cpu().double()


def _derivative(model: Any, tangents: Mapping[str, Tensor], loss: Callable[[Any], Tensor]) -> Tensor:
    try:
        return directional_derivative(model, tangents, loss)
    except NotImplementedError as error:  # the model has one: `check_forward_mode`
        raise NotImplementedError(
            "`single_gradient_buffer=True` needs forward-mode differentiation of the retain loss, and the retain "
            "objective, or a `compute_loss` of your own, has an operation without it: leave the option off. "
            f"({str(error).splitlines()[0]})"
        ) from error
