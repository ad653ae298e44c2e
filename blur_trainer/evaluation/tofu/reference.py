"""The retain model's numbers on the forget set, with which Forget Quality and PrivLeak compare."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blur_trainer.atomic_write import atomic_write
from blur_trainer.data.files import read_json

LOG_FILES = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}


@dataclass(frozen=True)
class RetainReference:
    """
    The numbers of the model that was trained without the forget set, as `TOFUEvaluation.reference(model)` makes them.

    Args:
        truth_ratios (`tuple[float, ...]`):
            Truth ratio of each forget question (wrong over right, as [`truth_ratios`] has it), in the data's order.
        min_k_auc (`float`, *optional*):
            `mia_min_k` of that model: the AUC of Min-40% between forget and holdout answers, near 0.5 as it should be.
    """

    truth_ratios: tuple[float, ...]
    min_k_auc: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "truth_ratios", tuple(float(ratio) for ratio in self.truth_ratios))
        if not self.truth_ratios:
            raise ValueError("`truth_ratios` is empty: give one per forget question.")
        bad = next((ratio for ratio in self.truth_ratios if not ratio >= 0), None)
        if bad is not None:
            raise ValueError(f"`truth_ratios` must be 0 or more, got {bad}: the retain model has probably diverged.")
        if self.min_k_auc is not None and not 0 <= self.min_k_auc < 1:
            raise ValueError(
                f"`min_k_auc` must be in [0, 1), got {self.min_k_auc}: an attack that always succeeds on the retain "
                "model leaves nothing to compare with. Leave it out."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON atomically."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(Path(path), lambda partial: partial.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RetainReference":
        """Reads what `save` wrote."""
        content = _read(path)
        if "truth_ratios" not in content:
            raise ValueError(
                f"{path} has no `truth_ratios`, it has {sorted(content)[:5]}. For TOFU's own logs there is "
                "`from_tofu_log`, for open-unlearning's `from_open_unlearning_log`."
            )
        return cls(tuple(content["truth_ratios"]), content.get("min_k_auc"))

    @classmethod
    def from_tofu_log(cls, path: str | os.PathLike[str]) -> "RetainReference":
        """
        Reads TOFU's published `eval_log_aggregated.json`, or an `eval_log_forget.json`. It has the first 300 forget
        questions with answers cut to 200 tokens, so it is for `protocol="tofu"`. It has no membership attack.
        """
        # Here and not above: `evaluate` takes seconds to import.
        from blur_trainer.metrics.truth_ratio import truth_ratios

        content = _read(path)
        split = content.get(LOG_FILES["forget"], content)
        right, wrong = (log_column(split, name, str(path)) for name in ("avg_paraphrased_loss", "average_perturb_loss"))
        return cls(tuple(truth_ratios(right, wrong)))

    @classmethod
    def from_open_unlearning_log(cls, path: str | os.PathLike[str]) -> "RetainReference":
        """From open-unlearning's `TOFU_EVAL.json` of a retain model, for `protocol="open-unlearning"`."""
        content = _read(path)
        if "forget_truth_ratio" not in content:
            raise ValueError(f"{path} has no `forget_truth_ratio`, it has {sorted(content)[:5]}: evaluate that first.")
        by_index = content["forget_truth_ratio"]["value_by_index"]
        ratios = tuple(by_index[key]["score"] for key in sorted(by_index, key=int))
        return cls(ratios, content["mia_min_k"]["auc"] if "mia_min_k" in content else None)


def log_column(split: Mapping[str, Any], name: str, where: str) -> list[Any]:
    """One column of a split of TOFU's logs, a list or a dictionary by index."""
    if name not in split:
        raise ValueError(f"{where} has no `{name}`, it has {sorted(split)[:5]}: not a log of TOFU's evaluation.")
    values = split[name]
    return [values[key] for key in sorted(values, key=int)] if isinstance(values, Mapping) else list(values)


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    content = read_json(Path(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of numbers.")
    return content
