"""Tells forgotten from hidden: measures again after relearning, after quantization, or with another prompt.

Each function takes an evaluation (any function from a model to numbers: [`MUSEEvaluation`], [`TOFUEvaluation`],
[`WMDPEvaluation`], [`LMEval`]), leaves the model bit for bit as it was, and answers plain data, which
[`robustness`] puts together for `metrics.json` and the report:

    {"relearning": [{"name": "forget set", "points": [{"steps": 0, "metrics": {...}}, ...]}, ...],
     "attacks": [{"name": "unchanged", "metrics": {...}}, {"name": "4 bit", "metrics": {...}}, ...]}
"""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from blur_trainer.evaluation.base import Evaluation, Measure
from blur_trainer.evaluation.distributed import rank_and_world
from blur_trainer.evaluation.robustness.attacked import check_attackable, with_weights_changed
from blur_trainer.evaluation.robustness.quantization import Bits, check_bits, quantize_dequantize
from blur_trainer.evaluation.robustness.relearning import STEPS, Examples, check_relearning, relearn

PROMPT_COLUMNS = ("prompt", "question", "paraphrased_question")


def quantized(
    model: PreTrainedModel, evaluation: Evaluation | Measure, *, bits: Bits = 4, group_size: int | None = 64
) -> dict[str, float]:
    """
    The evaluation with the weights rounded to `bits` ([`quantize_dequantize`]): small steps of unlearning may vanish
    in it.

    As usual quantizers do, it rounds the weights of every `nn.Linear` except output embeddings. An adapter is merged
    first; otherwise it would stay unrounded. The adapter of a [`LogitDifferenceModel`] does stay unrounded, because
    such a model would be served that way.

    Source: Zhang et al., "Catastrophic Failure of LLM Unlearning via Quantization" (2025).

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Unwrapped and whole. It is bit for bit as before afterwards.
        evaluation ([`Evaluation`] or `Callable`):
            What measures the model.
        bits (`int` or `"nf4"`, *optional*, defaults to `4`), group_size (`int`, *optional*, defaults to `64`):
            See [`quantize_dequantize`].

    Raises:
        `TypeError`: the model is wrapped.
        `ValueError`: its weights are sharded, offloaded or already quantized; it has no `nn.Linear`; wrong `bits`.
    """
    check_bits(bits, group_size)
    return with_weights_changed(model, evaluation, lambda weight: quantize_dequantize(weight, bits, group_size))


def _named(bits: Bits) -> str:
    check_bits(bits, None)
    return "NF4" if bits == "nf4" else f"{bits} bit"


def prefixed(data: Mapping[str, Dataset], prefix: str) -> DatasetDict:
    """
    `data` of a benchmark with `prefix` before each text that the model is asked to continue or to answer (the columns
    `prompt`, `question`, `paraphrased_question`), but for solved examples (`*_icl`): make the evaluation of it, and
    measure whether forgetting survives another wording.

    ```python
    prompted = {"as an expert": MUSEEvaluation(prefixed(data, "Answer as an expert who knows. "), tokenizer)}
    robustness(model, evaluation, prompted=prompted)
    ```

    Source: Lynch et al., "Eight Methods to Evaluate Robust Unlearning in LLMs" (2024).
    """
    if not isinstance(prefix, str) or not prefix:
        raise ValueError(f"`prefix` is {prefix!r}; it takes a text to put before the prompts.")
    changed = DatasetDict()
    for key, rows in data.items():
        columns = [] if key.endswith("_icl") else [name for name in PROMPT_COLUMNS if name in rows.column_names]
        for name in columns:
            texts = [f"{prefix}{text}" for text in rows[name]]
            rows = rows.remove_columns(name).add_column(name, texts)
        changed[key] = rows
    if all(rows is data[key] for key, rows in changed.items()):
        raise ValueError(f"`data` has none of the columns {list(PROMPT_COLUMNS)}: there are no prompts to change.")
    return changed


def robustness(
    model: PreTrainedModel,
    evaluation: Evaluation | Measure,
    *,
    relearning: Mapping[str, Examples] | None = None,
    bits: Sequence[Bits] = (8, 4),
    prompted: Mapping[str, Evaluation | Measure] | None = None,
    retrained: PreTrainedModel | None = None,
    steps: Sequence[int] = STEPS,
    learning_rate: float = 1e-5,
    batch_size: int = 4,
    seed: int = 0,
    unchanged: Mapping[str, float] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Runs all attacks, for `metrics.json` ([`Results.add_robustness`]) and the report's curve and table.

    The cost is that of the evaluation, once for each of `bits` and `prompted`, for each of `steps` per set of texts to
    relearn (and for `retrained`), and once for each model as it is, but where `unchanged` is given.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Unwrapped and whole. It is bit for bit as before afterwards.
        evaluation ([`Evaluation`] or `Callable`):
            What measures the model.
        relearning (`Mapping`, *optional*):
            Name -> examples to relearn, such as `{"forget set": ..., "unrelated text": ...}`.
        bits (`Sequence[int]`, *optional*, defaults to `(8, 4)`):
            Each is a row of the table; `"nf4"` may be among them.
        prompted (`Mapping`, *optional*):
            Name of a prefix -> the evaluation that puts it before its prompts ([`prefixed`]).
        retrained ([`~transformers.PreTrainedModel`], *optional*):
            A model that never saw the forget set. It also relearns the first of `relearning`. What the unlearned model
            regains no faster than this model learns it was not hidden.
        steps, learning_rate, batch_size, seed, unchanged (*optional*):
            See [`relearn`].
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar over the measurements, which names the attack (in the main process).

    Raises:
        As [`relearn`] and [`quantized`], before anything is measured.
    """
    relearning, prompted = relearning or {}, prompted or {}
    if retrained is not None and not relearning:
        raise ValueError("`retrained` relearns the first of `relearning`, which is empty: pass texts, or leave it out.")
    for attacked in [model] if retrained is None else [model, retrained]:
        check_attackable(attacked)
        if relearning:
            check_relearning(attacked, relearning, steps, learning_rate, batch_size)
    named = {width: _named(width) for width in bits}
    total = (unchanged is None) + len(relearning) * len(steps) + len(bits) + len(prompted)
    total += 0 if retrained is None else 1 + len(steps)
    with tqdm(desc="Attack: none", total=total, disable=not progress or rank_and_world()[0] > 0) as bar:

        def measure(attacked: PreTrainedModel, measured: Evaluation | Measure = evaluation) -> dict[str, float]:
            found = dict(measured(attacked))
            bar.update()
            return found

        def attack(name: str) -> None:
            bar.set_description(f"Attack: {name}")

        unchanged = measure(model) if unchanged is None else dict(unchanged)
        curves: list[dict[str, Any]] = []
        attacks = [{"name": "unchanged", "metrics": unchanged}]
        how: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
        for name, examples in relearning.items():
            attack(f"relearning {name}")
            curves.append({"name": name, "points": relearn(model, examples, measure, unchanged=unchanged, **how)})
        if retrained is not None:
            name, examples = next(iter(relearning.items()))
            attack(f"relearning {name} (retrain)")
            points = relearn(retrained, examples, measure, **how)
            curves.append({"name": f"{name} (retrain)", "kind": "retrain", "points": points})
        for width, name in named.items():
            attack(name)
            attacks.append({"name": name, "metrics": quantized(model, measure, bits=width)})
        for name, other in prompted.items():
            attack(name)
            attacks.append({"name": name, "metrics": measure(model, other)})
    return {"relearning": curves, "attacks": attacks}
