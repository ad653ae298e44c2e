"""What an audit may cost: how many rows, samples, steps and layers each budget allows, and what that leaves out."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Name = Literal["minutes", "hours"]


@dataclass(frozen=True)
class Budget:
    """
    Args:
        rows: of the forget set that are measured, at most.
        samples: of each question, for leak@k.
        k: of leak@k, which is compared with the control.
        new_tokens: the longest answer.
        steps, rates: of relearning.
        noise, pruned: shares of the weights' standard deviation, and of the weights.
        shots: solved examples before a question.
        probe_epochs, probe_layers, probe_rows: of the probes, at most.
    """

    name: Name
    rows: int
    samples: int
    k: int
    new_tokens: int
    steps: int
    rates: tuple[float, ...]
    noise: tuple[float, ...]
    pruned: tuple[float, ...]
    shots: int
    probe_epochs: int
    probe_layers: int
    probe_rows: int

    def said(self) -> dict[str, Any]:
        """As the certificate has it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


BUDGETS = {
    "minutes": Budget("minutes", 48, 16, 8, 48, 20, (1e-5, 1e-4, 1e-3), (0.02,), (0.2,), 3, 5, 3, 64),
    "hours": Budget(
        "hours", 400, 128, 32, 128, 200, (1e-6, 1e-5, 1e-4, 1e-3), (0.01, 0.03, 0.1), (0.1, 0.3, 0.5), 5, 50, 1000, 400
    ),
}


def budget_of(name: str) -> Budget:
    """Raises `ValueError` for a name that is none."""
    if name not in BUDGETS:
        raise ValueError(f"`budget` is {name!r}: it is {' or '.join(map(repr, BUDGETS))}.")
    return BUDGETS[name]
