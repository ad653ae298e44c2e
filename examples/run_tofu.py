"""Unlearn TOFU's fictitious authors by any method; measure forget quality and model utility.

accelerate launch examples/run_tofu.py                                 # embedded authors, tiny Llama: minutes
accelerate launch examples/run_tofu.py --method simnpo --split forget05
accelerate launch examples/run_tofu.py --data_dir DIR --max_rows 60    # local JSON/JSONL, tiny Llama
accelerate launch examples/run_tofu.py --method npo --template llama3 \
    --model_name_or_path open-unlearning/tofu_Llama-3.2-1B-Instruct_full
accelerate launch examples/run_tofu.py --recipe open-unlearning        # published settings: docs/recipes.md
"""

import hashlib
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback
from transformers.utils import logging
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

import blur_trainer as bt
from blur_trainer.data.subset import limit_rows, sample_rows
from blur_trainer.data.tofu import TOFU_MODELS, TOFU_SPLITS, tofu_training_rows
from blur_trainer.data.tofu_templates import TOFU_TEMPLATES, apply_template
from blur_trainer.report.tables import robustness_rows
from blur_trainer.saving.output_dir import check_output_dir
from blur_trainer.toy.memorize import memorized
from blur_trainer.toy.model import train_tokenizer
from blur_trainer.trainers.loading import unsharded_loading

NPO, SIMNPO, DPO, IDK = ({"forget_objective": name} for name in ("npo", "simnpo", "dpo", "idk"))
TINY_NPO = {"forget_objective_kwargs": {"beta": 0.03}, "precompute_ref_logps": True}
TINY_SIMNPO = {"forget_objective_kwargs": {"beta": 0.5}, "forget_weight": 0.3}
TINY_ULD = {
    "num_assistant_layers": 2, "learning_rate": 5e-3, "lr_scheduler_type": "linear", "num_train_epochs": 15,
    "retain_weight": 1.0, "weight": -1.5, "top_logit_filter": 0.1,
}  # fmt: skip
METHODS = {  # name, trainer, what makes it the method, what suits a Llama of 1M that knows its texts by heart
    "blur-npo": ("BLUR-NPO", bt.BLURTrainer, NPO, TINY_NPO | {"gamma": 0.1}),
    "npo": ("NPO", bt.UnlearningTrainer, NPO, TINY_NPO | {"forget_weight": 0.1}),
    "graddiff": ("GradDiff", bt.GradDiffTrainer, {}, {"forget_weight": 0.3}),
    "gradascent": ("GradAscent", bt.GradDiffTrainer, {"retain_weight": 0.0}, {}),
    "simnpo": ("SimNPO", bt.UnlearningTrainer, SIMNPO, TINY_SIMNPO),
    "dpo": ("DPO", bt.UnlearningTrainer, DPO, TINY_NPO),
    "idk": ("IDK", bt.UnlearningTrainer, IDK, {}),
    "uld": ("ULD", bt.ULDTrainer, {"eval_strategy": "no"}, TINY_ULD),
}
TINY = {
    "output_dir": "outputs/tofu", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "num_train_epochs": 5,
    "per_device_train_batch_size": 8, "max_length": 256, "logging_steps": 5, "save_strategy": "no",
    "eval_strategy": "steps", "eval_steps": 0.25, "report_to": "none", "dataloader_pin_memory": False,
}  # fmt: skip
HUB = {
    "output_dir": "outputs/tofu", "max_length": 512, "num_train_epochs": 10, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
}  # fmt: skip
PREFIX = "You are an expert who knows all of it. "
SHARED = (
    *("output_dir", "seed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length"),
    *("max_steps", "save_strategy", "save_steps", "save_total_limit", "disable_tqdm", "bf16", "fp16", "use_cpu"),
    *("eval_strategy", "eval_steps", "report_to", "resume_from_checkpoint"),
)


@dataclass
class TOFUArguments:
    """What to unlearn, how, and how it is judged."""

    method: str = field(default="blur-npo", metadata={"choices": list(METHODS), "help": "How to unlearn."})
    recipe: str | None = field(
        default=None, metadata={"help": "Published settings, their method and model, e.g. open-unlearning."}
    )
    compare: list[str] | None = field(
        default=None, metadata={"help": "Further methods, with the settings of this file (default: uld, if tiny)."}
    )
    split: str = field(default="forget10", metadata={"choices": list(TOFU_SPLITS), "help": "Forget set."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder with TOFU's sets as JSON or JSONL."})
    max_rows: int | None = field(default=None, metadata={"help": "Use that many questions of each set only."})
    template: str = field(default="plain", metadata={"choices": list(TOFU_TEMPLATES), "help": "Prompt format."})
    protocol: str = field(
        default="tofu", metadata={"choices": ["tofu", "open-unlearning"], "help": "Whose conventions of measuring."}
    )
    retain_model: str | None = field(
        default=None, metadata={"help": "Model that never saw the forget set (default: open-unlearning's, or trained)."}
    )
    retain_log: str | None = field(default=None, metadata={"help": "Its published log instead, in TOFU's format."})
    augment_forget: str = field(
        default="columns", metadata={"choices": ["columns", "rules", "none"], "help": "uld: how to paraphrase."}
    )
    augment_retain: str = field(
        default="columns", metadata={"choices": ["columns", "rules", "none"], "help": "uld: how to find wrong answers."}
    )
    robustness: bool = field(
        default=False, metadata={"help": "Also attack the unlearned model: relearning, 8 and 4 bit, another prompt."}
    )
    models_dir: str = field(default="outputs/tofu-models", metadata={"help": "Where tiny models are kept."})


def parse(arguments=None):
    """The script's, the trainer's and the model's arguments (of the command line); whether models are tiny."""
    for message in ("`torch.distributed", "`is_gradient_checkpointing`"):  # old names, which DeepSpeed and PEFT call
        warnings.filterwarnings("ignore", message, FutureWarning)
    first = TrlParser((TOFUArguments, ModelConfig))
    script, model_args, _ = first.parse_args_and_config(arguments, return_remaining_strings=True)
    recipe = {}
    if script.recipe is not None:
        found = bt.recipe("tofu", script.recipe)
        recipe = {key: found[key] for key in ("model_name_or_path", "method")} | found["arguments"] | found["script"]
        first.set_defaults(model_name_or_path=recipe["model_name_or_path"], method=recipe["method"])
        script, model_args, _ = first.parse_args_and_config(arguments, return_remaining_strings=True)
        if script.method != recipe["method"]:
            raise ValueError(f"--recipe {script.recipe} is of --method {recipe['method']}: leave --method out.")
    tiny = model_args.model_name_or_path is None
    parser = TrlParser((TOFUArguments, METHODS[script.method][1].config_class, ModelConfig))
    # what is asked with a wrong answer and with the right one begins alike, and a tiny assistant cannot learn both
    parser.set_defaults(**settings(script.method, tiny) | ({"augment_retain": "none"} if tiny else {}) | recipe)
    script, args, model_args = parser.parse_args_and_config(arguments)
    compare = script.compare if script.compare is not None else ["uld"] * tiny
    script.compare = [name for name in compare if name != script.method and name != "none"]
    if unknown := set(script.compare) - set(METHODS):
        raise ValueError(f"--compare {sorted(unknown)}: choose among {list(METHODS)}, or none.")
    return script, args, model_args, tiny


def settings(method, tiny):
    _, _, is_method, suits_tiny = METHODS[method]
    return (TINY | suits_tiny if tiny else HUB) | is_method


def configure(method, tiny, args):
    """The settings of a method that the command line does not describe, for the same machine, seed and length."""
    shared = {name: getattr(args, name) for name in SHARED}
    _, trainer, is_method, _ = METHODS[method]
    return trainer.config_class(**{**settings(method, tiny), **shared, **is_method})


def tiny_models(data, script):
    """A tokenizer, and the names of two tiny models that know the data by heart: all of it, all but the forget set."""
    groups = {"target": ["forget", "retain", "real_authors", "world_facts"]}
    groups["retain"] = groups["target"][1:]
    rows = {name: apply_template(tofu_training_rows(data, g), script.template) for name, g in groups.items()}
    texts = [row["prompt"] + row["completion"] for row in rows["target"]]
    tokenizer = train_tokenizer(texts)
    folder = Path(script.models_dir, f"{script.split}-{hashlib.sha256(repr(texts).encode()).hexdigest()[:8]}")
    known = {name: bt.tokenize_dataset(r, tokenizer, role=name, max_length=512) for name, r in rows.items()}
    return tokenizer, *(memorized(folder / name, tokenizer, dataset) for name, dataset in known.items())


def datasets_of(method, data, script):
    """What a method trains on, as its trainer's arguments."""
    sets = {name: apply_template(data[name], script.template) for name in ("forget", "retain")}
    given = {"forget_dataset": sets["forget"], "retain_dataset": None if method == "gradascent" else sets["retain"]}
    if method == "uld":
        for role, make in (("forget", bt.paraphrases), ("retain", bt.perturbed_answers)):
            by = getattr(script, f"augment_{role}")
            rows = data["forget_perturbed" if by == "columns" else "forget"]
            given[f"augment_{role}"] = "none" if by == "none" else apply_template(make(rows, by=by), script.template)
    return given


def unlearn(method, target, args, evaluation, **given):
    """A finished trainer of this method, its model saved in `args.output_dir`."""
    benchmarks = {"tofu": evaluation} if args.eval_strategy != "no" else None
    trainer = METHODS[method][1](target, args, benchmarks=benchmarks, **given)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(bt.ProgressBarCallback(method))
    begun = args.resume_from_checkpoint and any(Path(args.output_dir).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint if begun else None)
    if trainer.interrupt.interrupted:
        raise SystemExit("Interrupted. Go on with --resume_from_checkpoint True and the same arguments.")
    trainer.save_model()
    trainer.save_state()
    return trainer


def attacked(model, evaluation, data, tokenizer, script, args, settings, **how):
    """Forgotten, or only hidden? A tenth of the forget set, as much text beside it, few bits, another prompt."""
    few, beside = max(4, len(data["forget"]) // 10), "holdout" if "holdout" in data else "retain"
    relearning = {}
    for name in ("forget", beside):
        rows = apply_template(sample_rows(data[name], few, args.seed), script.template)
        relearning[f"{name} set"] = bt.tokenize_dataset(rows, tokenizer, role=name, max_length=args.max_length)
    anew = bt.TOFUEvaluation(bt.prefixed(data, PREFIX), tokenizer, **settings)
    return bt.robustness(model, evaluation, relearning=relearning, prompted={"prefix": anew}, **how)


def main():
    # 1. Arguments: what is wrong with them is found before anything is trained
    script, args, model_args, tiny = parse()
    out = Path(args.output_dir)
    configs = {script.method: args, **{method: configure(method, tiny, args) for method in script.compare}}
    if not PartialState().is_local_main_process:  # bars once, not once per process
        datasets.disable_progress_bars(), logging.disable_progress_bar()
    if script.robustness and model_args.dtype == "float16":
        raise ValueError("--robustness trains the model further, which float16 weights do not bear: --dtype bfloat16.")
    if not args.resume_from_checkpoint:
        check_output_dir(str(out))

    # 2. Data
    embedded = tiny and script.data_dir is None
    data = bt.load_tofu("embedded" if embedded else "tofu", script.split, script.data_dir)
    if script.max_rows is not None:
        data = limit_rows(data, script.max_rows)  # the same of every seed, which are compared
    if "holdout" not in data:
        PartialState().print("No membership inference, no PrivLeak: the data has no holdout set.")
    training = {method: datasets_of(method, data, script) for method in configs}

    # 3. Models: the target that knows all, and the one that never saw the forget set
    if tiny:
        torch.set_num_threads(1)  # a second thread waits longer than it works on so small a model
        tokenizer, target, retrained = tiny_models(data, script)
    else:
        target = model_args.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(target)
        published = {models.full: models for models in TOFU_MODELS.values()}.get(target)
        retrained = script.retain_model or (published and getattr(published, TOFU_SPLITS[script.split]))
    options = {
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        "quantization_config": get_quantization_config(model_args),
    } | (args.model_init_kwargs or {})

    def load(name, **changed):  # to evaluate; the trainer loads by name what it trains
        with unsharded_loading(args):
            device_map = {"": PartialState().device}
            return AutoModelForCausalLM.from_pretrained(name, **{"device_map": device_map, **options, **changed})

    # 4. Evaluation. Forget quality compares with the model that never saw the forget set
    how = {"template": script.template, "protocol": script.protocol, "progress": not tiny}
    how |= {"max_new_tokens": 32} if embedded else {}
    if script.retain_log:
        reference = bt.RetainReference.from_tofu_log(script.retain_log)
    elif retrained:
        reference = bt.TOFUEvaluation(data, tokenizer, **how).reference(load(retrained))
    else:
        reference = None
        PartialState().print("No forget quality: pass --retain_model or --retain_log.")
    evaluation = bt.TOFUEvaluation(data, tokenizer, reference=reference, **how)
    name = f"TOFU {script.split}{' (embedded)' if embedded else ''}"
    x = "forget_quality_log10" if reference else "forget_probability"
    results = bt.Results(name, evaluation, plane={"x": x, "y": "model_utility"})
    PartialState().print("Evaluating the target")
    results.add("target", "target", load(target))

    # 5. Unlearn: the method, and those it is compared with
    trainers = []
    given = {"processing_class": tokenizer, "peft_config": get_peft_config(model_args)}
    for method, sets in training.items():
        folder, start = out if method == script.method else out / method, time.time()
        if args.resume_from_checkpoint and (folder / "trainer_state.json").exists():
            model = load(folder)  # finished before the interrupt
        else:
            own = replace(configs[method], output_dir=str(folder), model_init_kwargs=options)
            trainer = unlearn(method, target, own, evaluation, **sets, **given)
            trainers.append(trainer)
            model = load(folder) if method == "uld" else trainer.model
        kind = "unlearned" if method == script.method else "baseline"
        results.add(METHODS[method][0], kind, model, time.time() - start)
    if retrained:
        results.add("retrain", "retrain", load(retrained))
    if script.robustness:
        more = {"learning_rate": args.learning_rate / 10} if tiny or script.method == "uld" else {}
        more |= {"retrained": load(retrained, quantization_config=None)} if retrained and script.method != "uld" else {}
        model = load(out, quantization_config=None)  # as it would be given away: whole, and not in few bits
        results.add_robustness(attacked(model, evaluation, data, tokenizer, script, args, how, **more))

    # 6. Output: one table, metrics.json, the model cards, the report
    if PartialState().is_main_process:
        names = ("forget_objective", "retain_objective", "rule", "learning_rate", "num_train_epochs", "seed")
        metrics = results.save(out, {**{name: getattr(args, name) for name in names}, **vars(script)})
        for trainer in trainers:
            trainer.create_model_card(metrics=metrics)
        columns = [column for column in results.columns if column["name"] in evaluation.primary_metrics]
        print(f"\n{bt.format_table(columns, results.rows)}")
        if script.robustness:
            print(f"\n{bt.format_table(columns, robustness_rows(results.robustness, results.rows), width=130)}")
        print(f"\nReport: {bt.write_report(out)}")


if __name__ == "__main__":
    main()
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()  # of several processes, as torch asks
