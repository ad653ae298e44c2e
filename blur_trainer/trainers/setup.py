"""Checks and loads everything before training: arguments, model, tokenizer, reference."""

from collections.abc import Collection, Mapping
from typing import Any

from peft import PeftConfig, PeftModel
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from blur_trainer.gradients.rules import Rule, Sum
from blur_trainer.models.forward import choose_head
from blur_trainer.models.loading import load_pretrained
from blur_trainer.models.reference import FrozenModel, partition_shape
from blur_trainer.models.suitable import check_causal_lm
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.router import check_router
from blur_trainer.trainers.adapters import add_adapter, check_peft_model
from blur_trainer.trainers.arguments import check_defaults, check_settings
from blur_trainer.trainers.batch_shape import longest_example
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.cpu import engine_requested
from blur_trainer.trainers.precision import loading_arguments, settle_checkpointing
from blur_trainer.trainers.saveable import check_saveable
from blur_trainer.trainers.trainable import check_optimizer, check_trainable


def resolve_args(
    config_class: type[UnlearningConfig], args: Any, model: Any, given: Collection[str] = ()
) -> UnlearningConfig:
    """
    The arguments as `config_class`. The default `output_dir` is named after model and class, as in TRL.

    `given`: settings for which the trainer got an object, whose value in `args` is not read.
    """
    if args is None:
        name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        name = (name or type(model).__name__).rstrip("/").split("/")[-1]
        return config_class(f"{name}-{config_class.__name__.removesuffix('Config')}")
    if not isinstance(args, TrainingArguments):
        raise TypeError(
            f"`args` must be a `{config_class.__name__}` or `TrainingArguments`, got `{type(args).__name__}`."
        )
    check_settings(args)
    if not isinstance(args, UnlearningConfig):
        return config_class.from_training_arguments(args)
    if args.forget_objectives is not config_class.forget_objectives:  # ULD learns what others forget
        raise TypeError(
            f"`args` is a `{type(args).__name__}`, whose objectives are another trainer's: pass a "
            f"`{config_class.__name__}`."
        )
    check_defaults(config_class, args, given)
    return args


def check_rule(rule: Any) -> None:
    if not callable(rule) or isinstance(rule, type):
        raise TypeError(
            "`rule` must be a callable from the (2, 2) Gramian to two weights, such as `BLUR(gamma=0.2)`, got "
            f"{rule!r}. By name, set `rule` in the config."
        )


def check_retain_free(rule: Rule) -> None:
    """Raises if there is no retain dataset but the rule gives retain a weight."""
    if not (isinstance(rule, Sum) and rule.retain_weight == 0):
        raise ValueError(
            f"`retain_dataset` is missing, and the rule {rule} combines two gradients: pass retain examples, or "
            "`rule=Sum(retain_weight=0)` to forget without retaining."
        )


def check_objectives(objectives: Mapping[str, Objective], precompute: bool, weighted: bool = False) -> None:
    for role, objective in objectives.items():
        if not isinstance(objective, Objective):
            raise TypeError(
                f"`{role}_objective` must be an instance of `blur_trainer.Objective` such as `NPO(beta=0.1)`, got "
                f"{objective!r}. By name, set `{role}_objective` in the config."
            )
    if "retain" in objectives and objectives["retain"].needs_refusal:
        raise ValueError(
            f"{objectives['retain']} as the retain objective needs refusals, which are made for the forget set only: "
            "choose `nll`, `kl` or `jsd`."
        )
    if weighted and "retain" in objectives and type(objectives["retain"]).num_items is not Objective.num_items:
        raise ValueError(
            f"`retain_set_weights` weighs the items of each example, and {objectives['retain']} counts those of a "
            "batch (`num_items`): let it override `items`, which answers `(B,)`, instead."
        )
    forget = objectives["forget"]
    if forget.needs_alternatives and not forget.needs_refusal:
        raise ValueError(f"{forget} has `needs_alternatives`, which fills the column of `needs_refusal`: set both.")
    if precompute and not reads_logps_only(objectives["forget"]):
        raise ValueError(
            "`precompute_ref_logps=True`, but the forget objective reads no reference log-probabilities "
            f"({', '.join(map(str, objectives.values()))}): leave it off, or choose `npo`, `dpo` or `altpo`. "
            "(`kl`, `jsd` and `undial` need whole distributions, which are too large to keep.)"
        )


def reads_logps_only(objective: Objective) -> bool:
    return objective.needs_reference and not objective.needs_reference_logits


def choose_heads(args: UnlearningConfig, *models: Any) -> None:
    """Chooses the LM head of every model that computes log-probabilities: see `UnlearningConfig.fused_lm_head`."""
    by_batch = not any(engine_requested(args, engine) for engine in ("deepspeed", "fsdp"))
    for model in models:
        model = model.model if isinstance(model, FrozenModel) else model
        if isinstance(model, PreTrainedModel | PeftModel):
            length = longest_example(args, model.config.get_text_config())
            largest = args.per_device_train_batch_size * length if length else None
            choose_head(model, args.fused_lm_head, args.device, largest, by_batch)


def load_model(
    model: Any, args: UnlearningConfig, peft_config: PeftConfig | None = None
) -> PreTrainedModel | PeftModel:
    """The model to train: loaded if it is a name (safetensors only), wrapped if there is a `peft_config`."""
    if isinstance(model, str):
        model = load_pretrained(model, loading_arguments(args, frozen=peft_config is not None))
    elif not isinstance(model, PreTrainedModel | PeftModel):
        raise TypeError(
            f"`model` must be a model name, a `PreTrainedModel` or a `PeftModel`, got `{type(model).__name__}`."
        )
    elif isinstance(model, FSDPModule):
        raise ValueError(
            "The model was sharded by an earlier trainer, which still holds its shards: save it, and pass the folder's "
            "name (its adapter: loaded anew, on a base model loaded anew)."
        )
    elif args.model_init_kwargs:
        raise ValueError("`model_init_kwargs` is for a model given by name; this one is loaded already.")
    check_causal_lm(model, "`model`")
    if peft_config is not None:
        return add_adapter(model, peft_config)
    if isinstance(model, PeftModel):
        check_peft_model(model)
    return model


def check_models(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    ref_model: PreTrainedModel | None,
    args: UnlearningConfig,
) -> None:
    """Raises if model, tokenizer and reference differ in vocabulary. On a GPU wrong ids would give garbage."""
    if ref_model is not None:
        if not isinstance(ref_model, PreTrainedModel | PeftModel):
            raise TypeError(f"`ref_model` must be a loaded model, got `{type(ref_model).__name__}`.")
        check_causal_lm(ref_model, "`ref_model`")
    check_trainable(model, engine_requested(args, "deepspeed"))
    check_saveable(model)
    settle_checkpointing(model, args)
    rows = vocabulary_size(model)
    if tokenizer is not None and len(tokenizer) > rows:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, the model embeds {rows}: pass the model's own tokenizer as "
            "`processing_class`, or call `model.resize_token_embeddings(len(tokenizer))` first."
        )
    if ref_model is None:
        return
    theirs = {id(parameter) for parameter in ref_model.parameters()}
    if any(id(parameter) in theirs for parameter in model.parameters() if parameter.requires_grad):
        raise ValueError(
            "`ref_model` is the very model to be trained, or shares trained parameters with it: leave it out (a frozen "
            "copy is made), or pass another one."
        )
    if vocabulary_size(ref_model) != rows:
        raise ValueError(
            f"`ref_model` has a vocabulary of {vocabulary_size(ref_model)}, the model one of {rows}: they must agree."
        )


def check_training(model: PreTrainedModel | PeftModel, objectives: Mapping[str, Objective], optimizer: Any) -> None:
    """Raises for an optimizer that leaves parameters out, and for a router's loss that has no weight."""
    check_optimizer(model, optimizer)
    check_router(model, objectives)


def vocabulary_size(model: PreTrainedModel | PeftModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return partition_shape(embedding.weight)[0]


def context_length(model: PreTrainedModel | PeftModel, max_length: int | None) -> int | None:
    """`max_length`, limited to the model's number of positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min((n for n in (max_length, positions) if n is not None), default=None)


def pad_token_id(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The tokenizer's pad or eos id, else the model's, else 0. Padding is masked, so any valid id will do."""
    config = model.config.get_text_config()
    owners = [tokenizer, config] if tokenizer is not None else [config]
    for name in ("pad_token_id", "eos_token_id"):
        for owner in owners:
            value = getattr(owner, name, None)
            value = value[0] if isinstance(value, list) else value
            if value is not None and 0 <= value < vocabulary_size(model):
                return value
    return 0
