"""ULD, unlearning by logit difference: trains an assistant to remember what the target shall forget."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from blur_trainer.models.logit_composition import check_composition
from blur_trainer.models.logit_difference import ADAPTER, LogitDifferenceModel
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.distributions import Uniform
from blur_trainer.objectives.likelihood import NLL
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.retain_sets import Mixture
from blur_trainer.trainers.unlearning import UnlearningTrainer
from blur_trainer.uld.assistant import Assistant
from blur_trainer.uld.augment import WAYS, paraphrases, perturbed_answers

logger = get_logger(__name__)
#: a dataset, the name of a way to make one from the forget set ("none" makes none), or a function of a row
Augmentation = Any
_MISSING = (
    "{names} not given: without paraphrases ULD's assistant learns the wording instead of the fact (the paper: forget "
    "quality on TOFU 10 % falls from 0.52 to 1e-7), and without wrong answers it may be sure of those too. Pass a "
    'dataset, "columns", "rules", a callable, or "none".'
)


@dataclass
class ULDConfig(UnlearningConfig):
    """[`UnlearningConfig`] of ULD (arXiv 2406.08607): NLL on the forget set, uniform on the retain set, weighted sum.

    Args:
        num_assistant_layers: how many of the target's layers the assistant has. `None`: a quarter (8 of 32).
        retain_weight: weight of the uniform loss. It is 5 in ULD's code, whose mean includes prompts and padding.
        weight, top_logit_filter: those of the unlearned model, see [`LogitDifferenceConfig`]. Training does not depend
            on them; `tune_weight` chooses them by a level afterwards.
    """

    forget_objectives: ClassVar[dict[str, type[Objective]]] = {"nll": NLL}
    retain_objectives: ClassVar[dict[str, type[Objective]]] = {"uniform": Uniform}

    forget_objective: str = field(
        default="nll", metadata={"help": "What the assistant descends on the forget set.", "choices": ["nll"]}
    )
    retain_objective: str = field(
        default="uniform", metadata={"help": "What the assistant descends on the retain set.", "choices": ["uniform"]}
    )
    retain_weight: float = field(default=5.0, metadata={"help": "sum: weight of the retain gradient."})
    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Total number of training epochs to perform."})
    num_assistant_layers: int | None = field(
        default=None, metadata={"help": "Layers of the assistant. Default: a quarter of the target's."}
    )
    weight: float = field(default=-0.8, metadata={"help": "Of the assistant's logits in the unlearned model."})
    top_logit_filter: float = field(
        default=0.01, metadata={"help": "Only tokens at least that likely, relative to the likeliest, can be drawn."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_composition(self.weight, self.top_logit_filter)
        if self.forget_level is not None:
            raise ValueError(
                f"`forget_level={self.forget_level!r}` is a level of what the trained model forgets, and ULD's "
                "assistant learns the forget set: leave it out, and choose `weight` by `tune_weight`."
            )


class ULDTrainer(UnlearningTrainer):
    """
    Trains the assistant of a [`LogitDifferenceModel`]. The target does not change.

    ```python
    trainer = ULDTrainer("llm", ULDConfig("out"), forget_ds, retain_ds, augment_forget="rules", augment_retain="rules")
    trainer.train()
    trainer.save_model()
    model = AutoModelForCausalLM.from_pretrained("out")  # target and assistant: generates as if it had forgotten
    ```

    As [`UnlearningTrainer`], with these differences:

    Args:
        model: the target: loaded, or by name (then only its lower layers are loaded for training).
        augment_forget: paraphrases of the forget set, to be remembered too. A dataset, or `"columns"`, `"rules"` or a
            callable, with which [`paraphrases`] makes one.
        augment_retain: the forget questions with wrong answers, on which the assistant shall be uniform. A dataset, or
            an argument of [`perturbed_answers`]. They are half of the retain examples in training.
        peft_config: a `LoraConfig`; rank 16, alpha 32, dropout 0.05 on all linear layers but the head by default (no
            dropout if the experts of a layer are one tensor).
        eval_dataset: its NLL is the *assistant's*, which should fall on the forget set. Benchmarks see the unlearned
            model.

    A missing augmentation gives a warning. In the paper's ablation, forget quality on TOFU (10 %) falls from 0.52 to
    1e-7 without paraphrases of the forget set.
    """

    config_class = ULDConfig
    speaks_of_losses = False  # the assistant learns what is to be forgotten
    args: ULDConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: ULDConfig | None = None,
        forget_dataset: Any = None,
        retain_dataset: Any = None,
        *,
        augment_forget: Augmentation = None,
        augment_retain: Augmentation = None,
        **kwargs: Any,
    ) -> None:
        _check_objectives(kwargs)
        given = {"augment_forget": augment_forget, "augment_retain": augment_retain}
        if missing := [name for name, dataset in given.items() if dataset is None]:
            logger.warning(_MISSING.format(names=" and ".join(missing)))
        self._whole = bool(kwargs.get("benchmarks"))
        self._composed: LogitDifferenceModel | None = None
        super().__init__(
            model,
            args,
            _with_augmentation(forget_dataset, forget_dataset, augment_forget, paraphrases),
            _with_augmentation(forget_dataset, retain_dataset, augment_retain, perturbed_answers, balanced=True),
            **kwargs,
        )

    def _load_model(self, model: Any, args: Any, peft_config: Any) -> PeftModel:
        self._composed = None  # of an earlier training's (`model_init`)
        self.assistant = Assistant(model, args.num_assistant_layers, peft_config, self._whole, args)
        return self.assistant.model

    def speaker(self, model: Any) -> PreTrainedModel:
        """The target: the assistant, which is trained, cannot say texts."""
        return self.assistant.speaker()

    method = "ULD"
    library = "transformers"
    about = (
        "An assistant (the first layers of the base model, with an adapter) has learnt to remember the forget set, and "
        "its logits are subtracted from the base model's: nothing of the base model has changed. To load both, import "
        "`blur_trainer` and use `AutoModelForCausalLM.from_pretrained` as ever."
    )

    def unlearned_model(self) -> LogitDifferenceModel:
        """Target and assistant as one model, in memory, with the weight and the filter of `args`.

        If both share their weights (the model was given loaded, or benchmarks run), it follows further training.
        Otherwise it loads the target and copies the assistant. Under FSDP2 and DeepSpeed the assistant is sharded: save
        it and load the folder instead.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise RuntimeError(
                "The assistant is sharded: call `save_model()`, then load `output_dir` with `LogitDifferenceModel`."
            )
        if self._composed is None or self.assistant.target is None:
            self._composed = self.assistant.composed(self.args.weight, self.args.top_logit_filter)
        return self._composed

    def benchmarked_model(self) -> PreTrainedModel:
        return self.unlearned_model()

    def _write_model(self, folder: str, resumable: bool) -> None:
        """Writes the adapter and the configuration of a [`LogitDifferenceModel`]."""
        super()._write_model(folder, resumable)
        if not self.args.should_save:
            return
        self.assistant.config(self.args.weight, self.args.top_logit_filter).save_pretrained(folder)
        self.assistant.model.generation_config.save_pretrained(folder)
        if not resumable:  # to resume, Trainer needs the adapter in the folder itself
            Path(folder, ADAPTER).mkdir()
            for path in Path(folder).glob("adapter_*"):
                path.rename(path.parent / ADAPTER / path.name)


def _check_objectives(kwargs: dict[str, Any]) -> None:
    """The assistant's logits are subtracted: it must learn the forget set, and nothing about the retain set."""
    for role, table in (("forget", ULDConfig.forget_objectives), ("retain", ULDConfig.retain_objectives)):
        given, accepted = kwargs.get(f"{role}_objective"), tuple(table.values())
        if isinstance(given, Objective) and not isinstance(given, accepted):
            raise ValueError(
                f"`{role}_objective={given}`: ULD's assistant descends `{accepted[0].__name__}()` on the {role} set, "
                "because its logits are subtracted. Leave it out, or use `UnlearningTrainer`."
            )


def _with_augmentation(
    forget: Any, dataset: Any, given: Any, make: Callable[..., Dataset], balanced: bool = False
) -> Any:
    if given is None or given == "none":
        return dataset
    if isinstance(given, str) and given not in WAYS:
        role = "retain" if balanced else "forget"
        raise ValueError(f"augment_{role}={given!r}: give a dataset, a callable, or one of {[*WAYS, 'none']}.")
    more = make(forget, by=given) if isinstance(given, str) or callable(given) else given
    return Mixture((dataset, more), balanced)
