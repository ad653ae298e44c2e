"""Linear probes for questions with choices: does a layer have the right choice at the end of the question?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blur_trainer.evaluation.batching import check_context, check_positive, encode_prompts
from blur_trainer.evaluation.inside.states import check_inside, check_layers, layer_states


@dataclass(frozen=True)
class ChoiceProbes:
    """What [`probe_choices`] found: for each layer the accuracy on held-out questions, its standard error, and chance,
    the share of the most frequent choice."""

    layers: list[int]
    accuracy: list[float]
    errors: list[float]
    chance: float


def probe_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    folds: int = 5,
    strength: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> ChoiceProbes:
    r"""
    Reads the right choice from the state $h_l$ of the prompt's last token, by logistic regression, in each layer.

    Each question is read by a probe that was trained on other questions ($k$-fold cross-validation with equal shares of
    each choice): scikit-learn's `LogisticRegression` with the L2 penalty $\lVert W \rVert^2 / 2C$ on states that are
    scaled to mean 0 and variance 1. Compare with the same of a retrained model, or with chance.

    Source: linear probes of Li et al., "The WMDP Benchmark" (2024).

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Whole and unwrapped. It is bit for bit as before afterwards.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Of the model.
        prompts (`Sequence[str]`):
            Questions with their choices, such as [`~blur_trainer.choices.choice_prompt`] writes them.
        answers (`Sequence[int]`):
            The number of each right choice.
        layers (`Sequence[int]`, *optional*):
            Layers from 0. Default: all.
        folds (`int`, *optional*, defaults to `5`):
            $k$. Each choice must be right in so many questions at least.
        strength (`float`, *optional*, defaults to `1.0`):
            $C$: small values mean strong regularization.
        batch_size (`int`, *optional*, defaults to `16`):
            Questions per forward pass.
        seed (`int`, *optional*, defaults to `0`):
            Of the folds.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar over the questions.

    Returns:
        [`ChoiceProbes`]

    Raises:
        `TypeError`, `ValueError`: as [`~blur_trainer.evaluation.inside.probes.probe_layers`]; too few questions.
    """
    # Here and not above: scikit-learn takes seconds to import.
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    check_positive(batch_size=batch_size)
    check_inside(model)
    chosen = check_layers(model, layers, "probe_choices")
    right = _check_answers(prompts, answers, folds)
    ids = encode_prompts(tokenizer, prompts)
    check_context(model, [len(row) for row in ids], what="prompt")
    last = [[len(row) - 1] for row in ids]
    desc = "Choices" if progress else None
    states = layer_states(model, ids, last, chosen, batch_size=batch_size, desc=desc)
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    accuracy, errors = [], []
    for number in range(len(chosen)):
        features = np.stack([row[number][0].float().cpu().numpy() for row in states])
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        shares = cross_val_score(probe, features, right, cv=split)
        sizes = [len(test) for _, test in split.split(features, right)]
        mean = float(np.average(shares, weights=sizes))
        accuracy.append(mean)
        errors.append(float(np.sqrt(mean * (1 - mean) / len(right))))
    return ChoiceProbes(chosen, accuracy, errors, float(np.bincount(right).max() / len(right)))


def _check_answers(prompts: Sequence[str], answers: Sequence[int], folds: int) -> np.ndarray:
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ValueError(f"`folds` is {folds!r}; it takes a whole number of at least 2.")
    if len(prompts) != len(answers):
        raise ValueError(f"There are {len(prompts)} prompts and {len(answers)} answers: each prompt has one answer.")
    right = np.array(answers)
    if right.dtype.kind not in "iu" or (right < 0).any():
        raise ValueError("`answers` must be numbers of choices from 0.")
    counts = {int(choice): int((right == choice).sum()) for choice in np.unique(right)}
    if len(counts) < 2 or min(counts.values()) < folds:
        raise ValueError(
            f"The right choices are {counts} (choice: questions); `folds={folds}` takes two choices, each right in "
            f"{folds} questions at least."
        )
    return right
