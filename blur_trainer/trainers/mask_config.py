"""The settings of the mask: which share of the trained weights may change, and by what they are chosen."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: optimizers that turn the gradient before they step, and so move weights whose gradient is 0
_TURNS = ("galore", "apollo")


@dataclass
class MaskConfig:
    """Settings of the mask ([where to change](docs/scaling.md#where-to-change)).

    Args:
        mask_share: only this share of the trained weights may change, those with the highest scores: `0.1`. `None`:
            all may.
        mask_score: `saliency`: the size of the forget objective's gradient before training. `fisher`: the mean squared
            gradient of the NLL on the forget set, divided by that on the retain set.
        mask_batches: how many batches of each set are read for the scores, at most.
    """

    mask_share: float | None = field(
        default=None, metadata={"help": "Only this share of the trained weights may change, e.g. 0.1. Default: all."}
    )
    mask_score: Literal["saliency", "fisher"] = field(
        default="saliency", metadata={"help": "What these are chosen by: the forget gradient, or the Fisher ratio."}
    )
    mask_batches: int = field(default=64, metadata={"help": "Read so many batches for the scores, at most."})


def check_mask(args: Any, roles: Collection[str]) -> None:
    """Raises `ValueError` for settings that would move weights outside of the mask, or leave it without a score."""
    if args.mask_share is None:
        return
    optimizer = str(getattr(args.optim, "value", args.optim))
    obstacles = [
        (
            args.mask_score == "fisher" and "retain" not in roles,
            "`mask_score='fisher'` divides by the retain set's, and there is none: choose 'saliency'",
        ),
        (args.weight_decay > 0, f"`weight_decay={args.weight_decay}` would shrink all weights: set it to 0"),
        (
            any(name in optimizer for name in _TURNS),
            f"optim={optimizer!r} turns the gradient, and so moves all weights: choose another one",
        ),
    ]
    for present, obstacle in obstacles:
        if present:
            raise ValueError(f"`mask_share={args.mask_share}`, but {obstacle}.")


def check_decay(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises `ValueError` for weight decay that an optimizer got in another way than by `weight_decay`."""
    decays = [group["weight_decay"] for group in groups if group.get("weight_decay")]
    if decays:
        raise ValueError(
            f"`mask_share` is set, but the optimizer has weight_decay={decays[0]}, which would shrink all weights: set "
            "it to 0 where the optimizer is made."
        )
