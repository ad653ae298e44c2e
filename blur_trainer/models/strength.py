"""One dial for the strength of a trained model, of whichever kind: 0 is the model before unlearning, 1 as trained."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from peft import LoraConfig, PeftModel
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from torch import nn

from blur_trainer.models.logit_difference import LogitDifferenceModel
from blur_trainer.models.mixing import At, check_strength, weight_mix
from blur_trainer.models.task_vector import more_than_lora


@contextmanager
def strength_dial(model: nn.Module, before: nn.Module | None = None) -> Iterator[At]:
    """
    Changes the strength of an unlearned model without training again. `at(0)` is the model before, `at(1)` as trained.

    | model | what `at(strength)` sets |
    |---|---|
    | [`LogitDifferenceModel`] (ULD, offset, WHP) | `config.weight`: `strength` times the weight that it has now |
    | a LoRA | its scaling: `W + strength * scaling * B A` ([`~peft.helpers.rescale_adapter_scale`]) |
    | any other, a task vector's too | the weights: `strength * after + (1 - strength) * before` ([`weight_mix`]) |

    For a LoRA on unchanged weights `W` the second is the third: `B A` is not linear in `B` and `A` together, but it is
    in the scaling. For a task vector of scale `c` it is the task vector of scale `strength * c`. The weights lie on a
    line; what the model says does not, so measure it at each strength.

    The model is as it was after the `with` block, bit for bit.

    Args:
        model ([`torch.nn.Module`]): the trained model.
        before ([`torch.nn.Module`], *optional*): the model before unlearning: only for weights, see [`weight_mix`].

    Yields:
        `at(strength)`, which returns `model`.

    Raises:
        ValueError: if `before` is missing or not used by this kind of model; if an adapter is more than a LoRA, is
            merged, or is one of several that are active.

    Example:

    ```python
    with strength_dial(model, target) as at:
        by_strength = {strength: evaluation(at(strength)) for strength in (0.25, 0.5, 0.75, 1.0)}
    ```
    """
    if isinstance(model, LogitDifferenceModel):
        dial = _logit_weight(model)
    elif isinstance(model, PeftModel):
        dial = _adapter_scale(model)
    elif before is None:
        raise ValueError("This model has no strength of its own: pass `before`, the model before unlearning.")
    else:
        dial = weight_mix(model, before)
        before = None
    if before is not None:
        raise ValueError(f"A {type(model).__name__} contains the model before unlearning: leave `before` out.")
    with dial as at:
        yield at


@contextmanager
def _logit_weight(model: LogitDifferenceModel) -> Iterator[At]:
    trained = model.config.weight

    def at(strength: float) -> nn.Module:
        check_strength(strength)
        model.config.weight = strength * trained
        return model

    try:
        yield at
    finally:
        model.config.weight = trained


@contextmanager
def _adapter_scale(model: PeftModel) -> Iterator[At]:
    _check_adapter(model)
    with ExitStack() as stack:

        def at(strength: float) -> nn.Module:
            check_strength(strength)
            stack.close()  # the scaling as trained
            stack.enter_context(rescale_adapter_scale(model, strength))
            return model

        yield at


def _check_adapter(model: PeftModel) -> None:
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"The adapters {model.active_adapters} are active: the model before unlearning is not known. Activate "
            "one, or merge the others into the model first."
        )
    config = model.peft_config[model.active_adapters[0]]
    extra = more_than_lora(config)
    if not isinstance(config, LoraConfig) or extra:
        raise ValueError(
            f"The adapter ({type(config).__name__}, {', '.join(extra)}) is more than a LoRA: its scaling alone does "
            "not lead to the model before. Merge it, and pass the whole model with `before`."
        )
    if any(module.merged for module in model.modules() if isinstance(module, LoraLayer)):
        raise ValueError("The adapter is merged into the weights, and its scaling has no effect: unmerge it first.")
