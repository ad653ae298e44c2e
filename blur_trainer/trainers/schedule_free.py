"""Schedule-free optimizers train at one point and are to be measured and saved at another, the average."""

from typing import Any


def to_averaged_point(optimizer: Any) -> None:
    """Puts the weights where the average is, until the next step goes back. Other optimizers have no such point."""
    evaluate = getattr(optimizer, "eval", None)
    if callable(evaluate):
        evaluate()


def to_training_point(optimizer: Any) -> None:
    train = getattr(optimizer, "train", None)
    if callable(train):
        train()
