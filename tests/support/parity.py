"""Every engine x feature against the literal single-process training: the cells of tests/gradients/test_parity.py.

As a program, on several processes, it trains the cells that it is given and writes, per cell, how far the weights are
from the reference's. benchmarks/parity.py prints the table of all cells.
"""

import copy
import json
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, get_peft_model
from support import reference
from support.models import examples, tiny_llama
from support.processes import forked, freeze_imports
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, training_args

from blur_trainer.data.pairing import PairedDataset
from blur_trainer.gradients.rules import BLUR, MGDA, NGDiff, PCGrad, Sum
from blur_trainer.gradients.stateful_rules import GRU, Constrained
from blur_trainer.objectives.activations import ActivationMatch
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.control_vectors import control_vector
from blur_trainer.objectives.level import TargetLoss, Until
from blur_trainer.objectives.likelihood import NLL, GradAscent
from blur_trainer.objectives.preference import NPO
from blur_trainer.objectives.rmu import RMU
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.unlearning import UnlearningTrainer

STEPS, WINDOW, LEARNING_RATE = 3, 8, 1e-2
MARK = 47  # a token of the forget set only
FORGET, RETAIN = examples(STEPS * WINDOW, seed=5), examples(19, seed=6)


def marked(rows: list[dict[str, list[int]]], first: int) -> list[dict[str, list[int]]]:
    """Rows that begin with `first`, and have no `MARK` later on."""

    def without(tokens: list[int]) -> list[int]:
        return [token if token != MARK else 5 for token in tokens[1:]]

    return [{"input_ids": [first, *without(r["input_ids"])], "labels": [-100, *without(r["labels"])]} for r in rows]


#: of the last retain rows, if there are weights
WEIGHT, LIGHT = 0.25, 7


def data(features: dict[str, Any]) -> tuple[list[dict[str, Any]], Any]:
    """Forget and retain rows; with weights, the retain rows as two sets."""
    if features.get("levels") or features.get("until"):
        return [row | {"forget_level": 4.0 + 0.3 * (i % 5)} for i, row in enumerate(FORGET)], RETAIN
    if features.get("retain_set_weights"):
        return FORGET, {"retain": RETAIN[:-LIGHT], "general": RETAIN[-LIGHT:]}
    return (marked(FORGET, MARK), marked(RETAIN, 4)) if features.get("one_sided") else (FORGET, RETAIN)


class OneSided(LlamaForCausalLM):
    """Has a layer that one objective alone comes by: batches that begin with `MARK`."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.aside = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        if bool((input_ids[:, 0] == MARK).any()):
            embedded = embedded + self.aside(embedded)
        return super().forward(inputs_embeds=embedded, **kwargs)


def fsdp2(**config: Any) -> dict[str, Any]:
    layers = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    return {"fsdp": True, "fsdp_config": {"version": 2, **layers, **config}}


def zero(stage: int, *offload: str, persistent: int = 0, **config: Any) -> dict[str, Any]:
    optimization: dict[str, Any] = {"stage": stage}
    if stage == 3:
        optimization |= {
            "stage3_param_persistence_threshold": persistent,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    optimization |= {f"offload_{what}": {"device": "cpu", "pin_memory": False} for what in offload}
    return {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto", "initial_scale_power": 10},
            "zero_optimization": optimization,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **config,
        }
    }


ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": fsdp2(),
    "fsdp2_lean": fsdp2(cpu_ram_efficient_loading=True, state_dict_type="SHARDED_STATE_DICT"),
    "zero0": zero(0),
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
    "zero3_persistent": zero(3, persistent=300),  # small parameters stay gathered
    "zero1_offload": zero(1, "optimizer"),
    "zero2_offload": zero(2, "optimizer"),
    "zero3_offload": zero(3, "optimizer"),
    "zero3_offload_all": zero(3, "optimizer", "param"),
    "zero1_fp32_sums": zero(1, data_types={"grad_accum_dtype": "fp32"}),  # with bf16 weights: other classes, buffers
    "zero2_fp32_sums": zero(2, data_types={"grad_accum_dtype": "fp32"}),
}
Direction = Callable[[Tensor, Tensor], Tensor]
RULES: dict[str, tuple[Any, Direction]] = {
    "blur": (BLUR(gamma=0.5), lambda f, r: reference.blur_direction(f, r, "forget", 0.5, 1.0, False)),
    "sum": (Sum(1.0, 2.0), lambda f, r: f + 2.0 * r),
    "blur_wmdp": (BLUR(alpha=800.0), lambda f, r: reference.blur_direction(f, r, "forget", 1.0, 800.0, False)),
    "clamp": (BLUR(gamma=0.0, clamp=True), lambda f, r: reference.blur_direction(f, r, "forget", 0.0, 1.0, True)),
    "pcgrad": (PCGrad(), reference.pcgrad_direction),
    "mgda": (MGDA(), reference.mgda_direction),
    "ngdiff": (NGDiff(), reference.ngdiff_direction),
}
#: with a state: made anew for each training
STATEFUL: dict[str, tuple[Callable[[], Any], Callable[[], Direction]]] = {
    "gru": (lambda: GRU(0.7, retain_weight=0.5), lambda: reference.GruDirection(0.7, 0.5)),
    "constrained": (
        lambda: Constrained(BLUR(gamma=0.5), epsilon=1.0, initial=2.0, rate=0.3),
        lambda: reference.ConstrainedDirection(RULES["blur"][1], 1.0, 2.0, 0.3),
    ),
}
FEATURES: dict[str, dict[str, Any]] = {
    "blur": {},
    "sum": {"rule": "sum"},
    "clamp": {"rule": "clamp"},
    "pcgrad": {"rule": "pcgrad"},
    "mgda": {"rule": "mgda"},
    "accumulation": {"rule": "sum", "accumulation": 4},
    "clipping": {"rule": "sum", "max_grad_norm": 0.3},
    "checkpointing": {"rule": "sum", "accumulation": 2, "activation_checkpointing": True},
    "tied": {"rule": "sum", "tie": True},
    "frozen": {"rule": "sum", "frozen": True},
    "lora": {"rule": "sum", "lora": True},
    "one-sided": {"rule": "sum", "one_sided": True},
    "one-sided, checkpointing": {"rule": "sum", "one_sided": True, "activation_checkpointing": True},
    "bf16": {"rule": "sum", "bf16": True},
    "fused head": {"rule": "sum", "fused_lm_head": True},
    "compiled": {"rule": "sum", "accumulation": 2, "torch_compile": True, "torch_compile_backend": "aot_eager"},
    "fp16": {"rule": "sum", "fp16": True},
    "NPO": {"rule": "sum", "npo": True},
    "NPO, kept logps": {"rule": "sum", "npo": True, "precompute_ref_logps": True},
    "NPO, fused head": {"rule": "sum", "npo": True, "precompute_ref_logps": True, "fused_lm_head": True},
    "NPO, lora": {"rule": "sum", "npo": True, "lora": True, "fresh": True},
    "NPO, lora, bf16": {"rule": "sum", "npo": True, "lora": True, "fresh": True, "bf16": True},
    "rmu": {
        **{"rule": "blur_wmdp", "rmu": True, "accumulation": 2},
        **{"train_layers": "0,1", "train_parameters": "down_proj|o_proj"},
    },
    "retain weights": {"rule": "sum", "accumulation": 2, "retain_set_weights": {"general": WEIGHT}},
    "ngdiff": {"rule": "ngdiff"},
    "gru": {"rule": "gru", "accumulation": 2, "max_grad_norm": 0.3},
    "constrained": {"rule": "constrained", "accumulation": 2, "max_grad_norm": 0.3},
    "sam": {"rule": "sum", "sam_rho": 0.5, "accumulation": 2, "max_grad_norm": 0.3},
    "sam, lora": {"sam_rho": 0.5, "lora": True},
    "levels": {"levels": True, "accumulation": 2},
    "until": {"until": True, "accumulation": 2, "max_grad_norm": 0.3},
    "one buffer": {"accumulation": 2, "single_gradient_buffer": True},
    "mask": {"mask_share": 0.3, "accumulation": 2, "max_grad_norm": 0.3},
    "mask, fisher": {"rule": "sum", "mask_share": 0.1, "mask_score": "fisher", "accumulation": 2},
    "mask, gru": {"rule": "gru", "mask_share": 0.3, "accumulation": 2, "max_grad_norm": 0.3},
    "mask, sam": {"rule": "sum", "mask_share": 0.3, "sam_rho": 0.5, "tie": True},
    "mask, lora": {"rule": "sum", "mask_share": 0.3, "lora": True},
    "mask, rmu": {
        **{"rule": "blur_wmdp", "rmu": True, "mask_share": 0.3, "accumulation": 2},
        **{"train_layers": "0,1", "train_parameters": "down_proj|o_proj"},
    },
    "mask, one buffer": {"mask_share": 0.3, "accumulation": 2, "single_gradient_buffer": True},
    "one buffer, sum": {"rule": "sum", "tie": True, "max_grad_norm": 0.3, "single_gradient_buffer": True},
}
#: largest relative error of the update after three AdamW steps. MGDA's vector is a small difference of two gradients;
#: bf16 has three digits, fp16 four, and Adam divides by what is left of small gradients. (A lost gradient: near 1.)
TOLERANCE = {"mgda": 5e-5, "mask, gru": 5e-5, "bf16": 0.15, "NPO, lora, bf16": 0.15, "fp16": 0.05}
DEFAULT_TOLERANCE = 1e-5
#: refused by name, or not there on a CPU (torch's fp16 autocast), or the same as another cell
ONLY = {
    "zero3_persistent": {"sam"},
    "fsdp2_lean": {"sum", "lora", "tied"},
    "zero1_fp32_sums": {"bf16"},
    "zero2_fp32_sums": {"bf16"},
}
NOT = {"zero0": {"bf16", "fp16"}, "ddp": {"fp16"}, "fsdp2": {"fp16"}}
FEW = {
    **{feature: {"ddp", "fsdp2", "zero2", "zero3"} for feature in ("ngdiff", "constrained", "sam, lora")},
    **{
        feature: {"ddp", "fsdp2", "zero2", "zero3"}
        for feature in ("rmu", "levels", "until", "mask, rmu", "mask, lora", "mask, gru", "mask, sam", "retain weights")
    },
    "NPO, fused head": {"ddp", "fsdp2", "zero3"},
    "NPO, lora, bf16": {"ddp", "fsdp2", "zero3"},
    "one-sided, checkpointing": {"ddp", "fsdp2"},
}
CELLS = [
    f"{engine}:{feature}"
    for engine in ENGINES
    for feature in FEATURES
    if feature in ONLY.get(engine, FEATURES) and feature not in NOT.get(engine, ())
    if engine in FEW.get(feature, ENGINES)
    if engine == "ddp" or "single_gradient_buffer" not in FEATURES[feature]
]


def forget_objective(features: dict[str, Any]) -> Objective:
    if features.get("levels"):
        return TargetLoss(two_sided=True)
    if features.get("until"):
        return Until(GradAscent())
    return NPO() if features.get("npo") else GradAscent()


def build(features: dict[str, Any]) -> nn.Module:
    model = tiny_llama(0, tie=features.get("tie", False))
    if features.get("rmu"):
        model = tiny_llama(0, layers=3)
    if features.get("one_sided"):
        torch.manual_seed(1)
        model = OneSided(model.config)
    if features.get("frozen"):
        model.model.layers[0].requires_grad_(False)
        model.model.embed_tokens.requires_grad_(False)
    if features.get("lora"):
        torch.manual_seed(0)
        # a fresh adapter, which changes nothing, is switched off for the reference; else B is not 0 at the start
        fresh = features.get("fresh", False)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=fresh))
    return model


def literal(features: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trainable weights before and after, from the slow reference."""
    forget, retain = data(features)
    if isinstance(retain, dict):
        weight = {"retain": 1.0, "general": WEIGHT}
        retain = [row | {"weight": weight[name]} for name, rows in retain.items() for row in rows]
    pairs = PairedDataset(forget, retain, seed=42)
    items = [pairs[i] for i in range(STEPS * WINDOW)]
    windows = [
        {role: [item[role] for item in items[k : k + WINDOW]] for role in ("forget", "retain")}
        for k in range(0, len(items), WINDOW)
    ]
    model = build(features)
    forget_loss = lambda m, rows: -reference.token_mean_nll(m, rows)  # noqa: E731
    if features.get("npo"):
        forget_loss = reference.example_mean_npo(copy.deepcopy(model), NPO().beta)
    if features.get("levels"):
        forget_loss = reference.example_mean_target_loss(two_sided=True)
    if features.get("until"):
        forget_loss = reference.ascent_until
    retain_loss = reference.token_mean_nll
    if features.get("rmu"):
        for name, parameter in model.named_parameters():
            lower = ".layers.2." not in name if features.get("lora") else ".layers.0." in name or ".layers.1." in name
            ends = ".weight" if features.get("lora") else ("mlp.down_proj.weight", "self_attn.o_proj.weight")
            parameter.requires_grad_(parameter.requires_grad and lower and name.endswith(ends))
        goal = reference.towards(control_vector("forget", model.config.hidden_size, 0), 3.0)
        forget_loss = reference.token_mean_distance(1, goal)
        retain_loss = reference.token_mean_distance(1, reference.as_frozen(model, 1))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    name = features.get("rule", "blur")
    reference.train(
        model,
        windows,
        {"forget": forget_loss, "retain": retain_loss},
        STATEFUL[name][1]() if name in STATEFUL else RULES[name][1],
        learning_rates=[LEARNING_RATE] * STEPS,
        max_grad_norm=features.get("max_grad_norm", 1.0),
        bf16=features.get("bf16", False),
        sam_rho=features.get("sam_rho"),
        mask=None if "mask_share" not in features else mask_of(features, model, items, forget_loss),
    )
    return start, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def mask_of(features: dict[str, Any], model: nn.Module, items: list[Any], forget_loss: Any) -> Tensor:
    """The literal mask, from the rows that a training of `STEPS` windows reads, each once."""
    if features.get("mask_score") == "fisher":
        size = WINDOW // features.get("accumulation", 1)
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(42)).split(size)
        batches = [{role: [items[i][role] for i in part] for role in ("forget", "retain")} for part in order]
        scores = reference.fisher_scores(model, batches)
    else:
        scores = reference.saliency_scores(model, [item["forget"] for item in items], forget_loss)
    return torch.tensor(reference.top_share(scores, features["mask_share"])).double()


@cache
def expected(feature: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same on every engine."""
    return literal(FEATURES[feature])


def whole(parameter: Tensor, engine: str) -> Tensor:
    """The fp32 master of a trainable parameter, from all processes' shards."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach().cpu()
    if engine.startswith("zero") and engine != "zero0":
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).detach().cpu()
    return parameter.detach().cpu()


def forget_engine() -> None:
    """Back to a process that has not chosen an engine yet; the process group stays."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            del os.environ[name]


def make(engine: str, feature: str, folder: str, **overrides: Any) -> UnlearningTrainer:
    """The trainer of a cell; `overrides` are of its arguments, or `model` and the objectives."""
    features = dict(FEATURES[feature])
    forget_engine()
    accumulation = features.get("accumulation", 1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings: dict[str, Any] = {
        "per_device_train_batch_size": WINDOW // accumulation // processes,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        **{"bf16": False, "activation_checkpointing": False},  # also on a GPU
        **{key: value for key, value in features.items() if key in UnlearningConfig.__dataclass_fields__},
        **copy.deepcopy(ENGINES[engine]),
    }
    rmu, rule = features.get("rmu", False), features.get("rule", "blur")
    objects = {
        "model": build(features),
        "forget_objective": forget_objective(features),
        "retain_objective": NLL(),
        **({"forget_objective": RMU(1, coefficient=3.0), "retain_objective": ActivationMatch(1)} if rmu else {}),
        "rule": STATEFUL[rule][0]() if rule in STATEFUL else RULES[rule][0],
    }
    objects |= {name: overrides.pop(name) for name in objects if name in overrides}
    settings |= overrides
    settings.pop("rule", None)
    training_args.is_torch_bf16_gpu_available = lambda: True  # transformers allows bf16 on a CPU without an engine only
    args = UnlearningConfig(f"{folder}/{engine}-{feature}", **settings)
    trainer = UnlearningTrainer(objects.pop("model"), args, *data(features), **objects)
    trainer.remove_callback(PrinterCallback)
    # after the training, what `train_layers` froze has its `requires_grad` back
    trainer.trained_names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    return trainer


def train(engine: str, feature: str, folder: str, **overrides: Any) -> UnlearningTrainer:
    trainer = make(engine, feature, folder, **overrides)
    trainer.train()
    return trainer


def error(engine: str, feature: str, trainer: UnlearningTrainer) -> float:
    """`||w - w_ref|| / ||w_ref - w_start||` over all trainable weights; on the first process, which has read them."""
    plain = {
        name.replace("_orig_mod.", "").removeprefix("module."): p
        for name, p in trainer.model_wrapped.named_parameters()
    }
    got = {name: whole(p, engine) for name, p in plain.items() if name in trainer.trained_names}
    if not PartialState().is_main_process:
        return 0.0
    start, want = expected(feature)
    if got.keys() != want.keys():
        raise AssertionError(f"other parameters: {sorted(got.keys() ^ want.keys())}")
    distance = sum((got[name].double() - want[name].double()).square().sum() for name in want)
    moved = sum((want[name].double() - start[name].double()).square().sum() for name in want)
    if moved < 1e-4:
        raise AssertionError("the reference did not move: the comparison would prove nothing")
    return (distance / moved).sqrt().item()


def main(folder: str, names: str) -> None:
    datasets.disable_progress_bars()
    freeze_imports()
    errors = {}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for cell in names.split(";"):
        engine, feature = cell.split(":")
        trainer = train(engine, feature, folder)
        errors[cell] = error(engine, feature, trainer)
        if PartialState().is_main_process:
            Path(folder, "errors.json").write_text(json.dumps(errors))


def launch(cells: list[str], folder: Path | str, processes: int = 2) -> dict[str, float]:
    """The errors of these cells."""
    forked(__file__, str(folder), ";".join(cells), processes=processes)
    return json.loads(Path(folder, "errors.json").read_text())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
    PartialState().wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # gloo aborts an exit now and then, after everything is written
