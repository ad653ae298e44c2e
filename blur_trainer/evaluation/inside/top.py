"""What a model runs above its layers (final norm, head), on given states and with other weights.

The model's own `forward` runs it, with another list of layers. So no name of a norm is known here, and what an
architecture computes beside norm and head (a projection, a cap of the logits) is not left out.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blur_trainer.models.early_exit import LowerLayers
from blur_trainer.models.forward import causal_lm, evaluating
from blur_trainer.models.layers import find_layers

#: where a weight is: its module and the name of the attribute
Place = tuple[nn.Module, str]
Weights = Mapping[Place, Tensor]


class Top:
    """
    The part of a model above its layers.

    Args:
        model: a decoder whose layers [`find_layers`] finds. It runs one token once.

    Attributes:
        weights (`dict`): place -> weight, of each module that runs after the last layer. They are the model's own.

    Raises:
        `ValueError`: such a weight is stored in few bits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.owner, self.name, self.layers = find_layers(model)
        self.as_tuple = False  # whether a layer answers a tuple, whose first entry is the states
        self.weights = self._find_weights()

    def _find_weights(self) -> dict[Place, Tensor]:
        used: list[nn.Module] = []

        def begin(layer: nn.Module, args: Any, output: Any) -> None:
            self.as_tuple = isinstance(output, tuple)
            used.clear()

        def note(part: nn.Module, args: Any, output: Any) -> None:
            used.append(part)

        own = [part for part in causal_lm(self.model).modules() if dict(part.named_parameters(recurse=False))]
        handles = [part.register_forward_hook(note) for part in own]
        handles.append(self.layers[-1].register_forward_hook(begin))
        try:
            with evaluating(self.model):
                self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        found: dict[Place, Tensor] = {
            (part, name): weight for part in used for name, weight in part.named_parameters(recurse=False)
        }
        if not all(weight.is_floating_point() for weight in found.values()):
            raise ValueError(
                "The head is stored in few bits, so no copy of it can be trained: leave it out of the quantization "
                "(`llm_int8_skip_modules`), as is the default."
            )
        return found

    def copies(self) -> dict[Place, nn.Parameter]:
        """The weights as new float32 parameters."""
        return {place: nn.Parameter(weight.detach().float().clone()) for place, weight in self.weights.items()}

    @contextmanager
    def alone(self, weights: Weights) -> Iterator[Callable[[Tensor], Tensor]]:
        """
        Yields a function from states `(N, H)`, outputs of a layer, to logits `(N, V)`. Nothing below is run, and
        gradients reach `weights` only.
        """
        given = _Given(self.layers[0], self.as_tuple)

        def run(states: Tensor) -> Tensor:
            given.states = states[:, None]  # each a sequence of one token: what stands above works on each token alone
            ids = torch.zeros(len(states), 1, dtype=torch.long, device=self.model.device)
            return self.model(input_ids=ids, use_cache=False).logits[:, 0]

        with self._changed(weights, LowerLayers(self.layers, 0, given)):
            yield run

    @contextmanager
    def behind(self, layer: int, weights: Weights) -> Iterator[None]:
        """Inside, the model ends behind this layer: `weights`, in the model's dtype, read what the layer answers."""
        kept = {place: nn.Parameter(weight.detach().to(self.weights[place])) for place, weight in weights.items()}
        with self._changed(kept, LowerLayers(self.layers, layer, self.layers[layer])):
            yield

    @contextmanager
    def _changed(self, weights: Weights, layers: nn.ModuleList) -> Iterator[None]:
        """Inside, the model has other layers and other weights above them. Then it gets back the same objects."""
        setattr(self.owner, self.name, layers)
        try:
            for (part, name), weight in weights.items():
                setattr(part, name, weight)
            yield
        finally:
            setattr(self.owner, self.name, self.layers)
            for (part, name), weight in self.weights.items():
                setattr(part, name, weight)


class _Given:
    """Stands for the layers and answers given states."""

    def __init__(self, layer: nn.Module, as_tuple: bool) -> None:
        self.layer, self.as_tuple = layer, as_tuple
        self.states: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.states,) if self.as_tuple else self.states

    def __getattr__(self, name: str) -> Any:  # backbones read attributes of their layers, e.g. the kind of attention
        return getattr(self.layer, name)
