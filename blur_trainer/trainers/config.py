"""The arguments of the unlearning trainers. Builds objectives and rule from the names on a command line."""

import json
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from transformers import TrainingArguments

from blur_trainer.data.chat import parse_day
from blur_trainer.gradients.by_name import RULES, rule_by_name
from blur_trainer.gradients.rules import Rule
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.by_name import FORGET_OBJECTIVES, RETAIN_OBJECTIVES
from blur_trainer.objectives.level import with_level
from blur_trainer.trainers.arguments import check_defaults, shared_settings
from blur_trainer.trainers.cpu import join_cpu_processes, prepare_cpu_engine
from blur_trainer.trainers.hidden_tokens import HiddenTokens
from blur_trainer.trainers.level_config import LevelConfig
from blur_trainer.trainers.mask_config import MaskConfig
from blur_trainer.trainers.precision import ByDevice
from blur_trainer.trainers.ranges import check_settings, check_topics
from blur_trainer.trainers.replay_config import ReplayConfig, check_weights
from blur_trainer.trainers.trainable import check_pattern, parse_layers

#: settings that may be JSON, as on a command line
_DICTS = (
    *("forget_objective_kwargs", "retain_objective_kwargs", "rule_kwargs", "model_init_kwargs", "topics"),
    *("replay_kwargs", "retain_set_weights"),
)


@dataclass
class UnlearningConfig(LevelConfig, ReplayConfig, MaskConfig, HiddenTokens, ByDevice, TrainingArguments):
    """`TrainingArguments` plus how to forget, how to retain, and how to combine the two gradients.

    Args:
        forget_objective: a name of the table in docs/methods.md: `npo`, `simnpo`, `dpo`, `altpo`, `undial`, `wga` ...
        forget_objective_kwargs: its arguments as a dict or JSON, e.g. `{"beta": 0.1}`.
        retain_objective: `nll`, `kl`, `jsd` or `activation_match`.
        retain_objective_kwargs: its arguments.
        rule: `blur`, `sum`, `pcgrad`, `mgda`, `ngdiff`, `gru`, `constrained` or `pdu`.
        gamma, alpha, lower_level, clamp: arguments of the rule `blur`, see [`BLUR`].
        forget_weight, retain_weight: arguments of the rule `sum`, see [`Sum`].
        rule_kwargs: arguments of the other rules, as a dict or JSON, e.g. `{"epsilon": 0.3}` of `pdu`.
        sam_rho: take the forget gradient where the weights are moved by so much along it ([`SAM`]). `None`: where
            they are.
        train_layers: train only these decoder layers, e.g. `5,6,7`. For a PEFT model: the adapter in these layers.
        train_parameters: train only parameters whose name contains a match of this regular expression, e.g.
            `mlp.down_proj`.
        topics: settings per topic, if `forget_dataset` is a mapping of topics. A dict or JSON such as
            `{"bio": {"coefficient": 6.5, "alpha": 1200, "max_length": 512}}`: `coefficient` of [`RMU`], `alpha` of
            [`BLUR`], `max_length` of the topic's examples. Missing settings are those of the whole training.
        repeat_topics: repeat a topic that has too few examples. Otherwise that is an error.
        precompute_ref_logps: compute the reference's log-probabilities of the forget set once, before training, and
            keep no reference model in memory. For objectives that need only these (`npo`, `dpo`, `altpo`).
        fused_lm_head: compute log-probabilities by TRL's fused LM head, without logits: same numbers, less memory.
            `None`: on GPUs, for batches with 2 GB of float32 logits or more, if the model suits and Triton works.
            Smaller batches are faster with logits; `True` saves memory there too. `kl` needs logits.
        offload_forget_gradient: keep the forget gradient in the CPU's memory during the retain pass. The GPU holds one
            gradient copy less; the result is the same; each step makes two copies over the bus.
        single_gradient_buffer: keep no second gradient. The rule's inner product comes from forward-mode
            differentiation, which takes more time. For one process or DDP, and the rules `sum` and `blur` with
            `lower_level="forget"`.
        max_length: longest example in tokens. `text` is cut into pieces of this length, other formats are truncated on
            the right. `None`: the model's context length.
        drop_empty: drop, with a warning, examples that are empty or that truncation leaves without an answer token
            (else an error).
        qa_template: prompt of a `question`/`answer` row where the tokenizer has no chat template.
        chat_template_date: the day, such as `2026-01-31`, for chat templates that write today's date. `None`: the day
            of the first start, which checkpoints record and a resumed training keeps.
        dataset_num_proc: number of processes for tokenization.
        max_skipped_steps: stop with an error after so many steps in a row without a finite gradient.
        model_init_kwargs: keyword arguments of `from_pretrained` when the model is given by name. Without a `dtype`,
            weights that are trained load in float32, frozen ones on a GPU with `bf16` in bfloat16.
        bf16: forward passes under bfloat16 autocast. `None`: on GPUs that have it, unless another precision is asked
            for (`fp16`, `accelerate launch`, DeepSpeed's file).
        activation_checkpointing: keep the layers' inputs and compute the rest again in the backward pass. `None`: on
            GPUs, except under FSDP, which has its own setting (`fsdp_config`), and where an architecture has none.
        push_report: upload `metrics.json` and `report.html` too, which hold prompts and answers of the forget set, when
            the model is pushed to the Hub.
    """

    #: the accepted names of the two objectives
    forget_objectives: ClassVar[dict[str, type[Objective]]] = FORGET_OBJECTIVES
    retain_objectives: ClassVar[dict[str, type[Objective]]] = RETAIN_OBJECTIVES

    forget_objective: str = field(
        default="npo", metadata={"help": "What to descend on the forget set.", "choices": list(FORGET_OBJECTIVES)}
    )
    forget_objective_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Its arguments as JSON, e.g. '{\"beta\": 0.1}'."}
    )
    retain_objective: str = field(
        default="nll", metadata={"help": "What to descend on the retain set.", "choices": list(RETAIN_OBJECTIVES)}
    )
    retain_objective_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Its arguments as JSON."}
    )
    rule: str = field(default="sum", metadata={"help": "How both gradients are combined.", "choices": list(RULES)})
    gamma: float = field(default=1.0, metadata={"help": "blur: rate of the lower level."})
    alpha: float = field(default=1.0, metadata={"help": "blur: rate of the upper level."})
    lower_level: str = field(
        default="forget",
        metadata={"help": "blur: the objective that is never traded away.", "choices": ["forget", "retain"]},
    )
    clamp: bool = field(default=False, metadata={"help": "blur: keep the lower level's weight at 0 or above."})
    forget_weight: float = field(default=1.0, metadata={"help": "sum: weight of the forget gradient."})
    retain_weight: float = field(default=1.0, metadata={"help": "sum: weight of the retain gradient."})
    rule_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of other rules as JSON, e.g. '{\"epsilon\": 0.3}' of pdu."}
    )
    sam_rho: float | None = field(
        default=None, metadata={"help": "SAM: forget gradient at weights moved along it by this. Default: not moved."}
    )
    train_layers: str | None = field(
        default=None, metadata={"help": "Train these decoder layers only, e.g. '5,6,7'. Default: all."}
    )
    train_parameters: str | None = field(
        default=None, metadata={"help": "Train only parameters whose name this regular expression is found in."}
    )
    topics: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Settings per topic as JSON, e.g. \'{"bio": {"alpha": 1200}}\'.'}
    )
    repeat_topics: bool = field(default=False, metadata={"help": "Go through topics again that are too short."})
    precompute_ref_logps: bool = field(
        default=False, metadata={"help": "Compute the reference's log-probabilities once and keep no reference model."}
    )
    fused_lm_head: bool | None = field(
        default=None, metadata={"help": "Log-probabilities without logits. Default: on GPUs, for large logits."}
    )
    offload_forget_gradient: bool = field(
        default=False, metadata={"help": "Keep the forget gradient in the CPU's memory during the retain pass."}
    )
    single_gradient_buffer: bool = field(
        default=False, metadata={"help": "Keep one gradient, not two: less memory, more time (one process, DDP)."}
    )
    max_length: int | None = field(default=1024, metadata={"help": "Longest example in tokens."})
    drop_empty: bool = field(
        default=False, metadata={"help": "Drop examples that are empty or left without an answer token."}
    )
    qa_template: str = field(
        default="Question: {question}\nAnswer:",
        metadata={"help": "Prompt of question/answer rows where the tokenizer has no chat template."},
    )
    chat_template_date: str | None = field(
        default=None, metadata={"help": "What chat templates get as today, 2026-01-31. Default: the first start's day."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes of the tokenization."})
    max_skipped_steps: int = field(
        default=20, metadata={"help": "Stop after so many steps in a row without a finite gradient."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of `from_pretrained` as JSON, when the model is given by name."}
    )
    push_report: bool = field(
        default=False, metadata={"help": "Push metrics.json and report.html too, which hold texts to be forgotten."}
    )

    # Other defaults than TrainingArguments': by device, a gentle learning rate, frequent logs, no look at each loss:
    # the host would wait twice per micro-batch. A step that is not finite is skipped, and counts in no loss.
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bfloat16 autocast. Default: on GPUs that have it, unless fp16 is asked for."}
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every X optimizer steps."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN and inf out of the logged loss."})

    def __post_init__(self) -> None:
        for name in _DICTS:
            setattr(self, name, _parse_dict(name, getattr(self, name)))
        self.settle_level()
        check_settings(self)
        self.remove_unused_columns = False  # batches are nested; the collator selects the columns
        prepare_cpu_engine(self)
        self.choose_by_device()
        super().__post_init__()
        self.check_schedule()
        self.find_unused_parameters()
        join_cpu_processes(self)
        if self.label_smoothing_factor != 0:
            raise ValueError("`label_smoothing_factor` has no meaning here: objectives define their own losses.")
        check_pattern(self.train_parameters)
        parse_layers(self.train_layers)
        check_topics(self.topics)
        check_weights(self.retain_set_weights)
        parse_day(self.chat_template_date)
        # Build everything once, so that a typo raises before any model is loaded.
        self.build_forget_objective(), self.build_retain_objective(), self.build_rule(), self.build_replay()

    def build_forget_objective(self) -> Objective:
        kwargs = self.forget_objective_kwargs
        named = _build("forget_objective", self.forget_objective, self.forget_objectives, kwargs)
        return with_level(named, self.forget_level, self.level_two_sided)

    def build_retain_objective(self) -> Objective:
        return _build("retain_objective", self.retain_objective, self.retain_objectives, self.retain_objective_kwargs)

    def build_rule(self) -> Rule:
        return rule_by_name(self.rule, self, _parse_dict("rule_kwargs", self.rule_kwargs))

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments) -> "UnlearningConfig":
        """
        Makes this class from a plain `TrainingArguments` or another preset, with the same settings.

        A preset whose defaults are another method's raises `TypeError`, a setting of another library's config that
        means nothing here `ValueError`.
        """
        if isinstance(args, UnlearningConfig):
            check_defaults(cls, args)
            own = {f.name for f in fields(cls) if f.init}
            return cls(**{f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name in own})
        return cls(**shared_settings(args))


def _build(what: str, name: str, table: dict[str, type], kwargs: Any) -> Any:
    if name not in table:
        raise ValueError(f"Unknown {what} {name!r}; accepted: {', '.join(sorted(table))}.")
    accepted = [f.name for f in fields(table[name]) if f.init]
    unknown = sorted(set(kwargs or {}) - set(accepted))
    if unknown:
        raise ValueError(f"{what} {name!r} takes no argument {unknown}; accepted: {accepted or 'none'}.")
    return table[name](**(kwargs or {}))


def _parse_dict(name: str, value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{name}` must be a dict or a JSON object, got {value!r} ({error}).") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a dict or a JSON object, got {type(value).__name__}.")
    return value
