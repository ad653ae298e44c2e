"""Returns the output of one decoder layer. Nothing above the layer is run, forward or backward, on any engine."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from blur_trainer.models.forward import causal_lm
from blur_trainer.models.layers import find_layers


def activations(model: nn.Module, batch: Mapping[str, Any], layer: int) -> Tensor:
    """
    The output of decoder layer `layer` (0-based), `(B, T, H)`. For the last layer: before the final norm.

    The wrapped model is called (PEFT, DDP, FSDP2, DeepSpeed, `torch.compile`), so every engine works as usual. Inside,
    the backbone's loop over the layers ends early. The final norm and the head run on one position per example, and
    their result is dropped.

    Raises:
        `TypeError`: the layers are not found (see [`find_layers`]).
        `ValueError`: there is no such layer.
    """
    with ending_at(model, layer):
        return model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **_few_logits(model)
        )


@contextmanager
def ending_at(model: nn.Module, layer: int) -> Iterator[None]:
    """Inside this context a call of `model` returns the output of layer `layer`. On exit the model is restored.

    The inner model *returns* the activations; no hook stores them. So DDP finds the parameters that take part, FSDP2
    and ZeRO-3 know what backward needs, and reentrant checkpointing keeps the graph.

    The tap and the list are new in each call, but the model reads nothing from them that differs between calls. So
    `torch.compile` compiles once per layer and shape.
    """
    lm = causal_lm(model)
    owner, name, layers = find_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"The model has the layers 0 to {len(layers) - 1}, and no layer {layer}.")
    tap, plain, own = _Tap(layers[layer]), lm.forward, "forward" in vars(lm)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        plain(*args, **kwargs)
        return tap.take()

    setattr(owner, name, LowerLayers(layers, layer, tap))
    lm.forward = forward
    try:
        yield
    finally:
        setattr(owner, name, layers)
        if own:  # an own `forward`: accelerate's autocast, or a fused head
            lm.forward = plain
        else:
            del lm.forward


class _Tap:
    """Replaces the last layer that runs: calls it and keeps its output."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.output: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        answer = self.layer(*args, **kwargs)
        self.output = answer[0] if isinstance(answer, tuple) else answer
        return answer

    def __getattr__(self, name: str) -> Any:  # backbones read attributes of their layers, e.g. the kind of attention
        return getattr(self.layer, name)

    def take(self) -> Tensor:
        output, self.output = self.output, None
        if output is None:
            raise RuntimeError(f"`{type(self.layer).__name__}` was not run by the model's forward pass.")
        return output


class LowerLayers(nn.ModuleList):
    """A list of layers that iterates over the first `last` ones and then `tap`. All stay registered, so engines find
    every layer."""

    def __init__(self, layers: nn.ModuleList, last: int, tap: Any):
        super().__init__()
        for name, layer in layers.named_children():
            self.add_module(name, layer)
        self._shown = [*list(layers)[:last], tap]

    def __len__(self) -> int:
        return len(self._shown)

    def __iter__(self) -> Any:
        return iter(self._shown)

    def __getitem__(self, index: Any) -> Any:
        return self._shown[index]


def _few_logits(model: nn.Module) -> dict[str, int]:
    accepted: Iterable[str] = inspect.signature(type(causal_lm(model)).forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
