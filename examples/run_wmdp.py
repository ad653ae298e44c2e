"""Unlearn hazardous knowledge, topic by topic, with BLUR-RMU or another method; judge it by multiple-choice questions.

deepspeed examples/run_wmdp.py                                  # invented topics, tiny Llama: minutes
python examples/run_wmdp.py --method npo --compare none
deepspeed examples/run_wmdp.py --deepspeed ds_configs/zero3.json \
    --model_name_or_path HuggingFaceH4/zephyr-7b-beta           # WMDP as the paper has it (--recipe paper)
"""

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
from blur_trainer.data.subset import sample_rows
from blur_trainer.evaluation.lm_eval_tasks import write_tasks
from blur_trainer.report.tables import robustness_rows
from blur_trainer.saving.output_dir import check_output_dir
from blur_trainer.toy.memorize import memorized
from blur_trainer.toy.model import train_tokenizer
from blur_trainer.toy.wmdp import topic_lessons
from blur_trainer.trainers.loading import unsharded_loading

RMU = {"forget_objective": "rmu", "retain_objective": "activation_match"}
TINY_RMU = {  # layer 2 of 4, whose activations have norms of 70 to 90
    "forget_objective_kwargs": {"layer": 2, "coefficient": 10_000}, "retain_objective_kwargs": {"layer": 2},
}  # fmt: skip
TINY_NPO = {"forget_objective_kwargs": {"beta": 0.03}, "num_train_epochs": 5}
METHODS = {  # name, trainer, what makes it the method, what suits a Llama of 1M that knows its questions by heart
    "blur-rmu": ("BLUR-RMU", bt.BLURTrainer, RMU, TINY_RMU | {"alpha": 3_000}),
    "rmu": ("RMU", bt.UnlearningTrainer, RMU, TINY_RMU | {"retain_weight": 10_000}),
    "blur-npo": ("BLUR-NPO", bt.BLURTrainer, {"forget_objective": "npo"}, TINY_NPO | {"gamma": 0.1}),
    "npo": ("NPO", bt.UnlearningTrainer, {"forget_objective": "npo"}, TINY_NPO | {"forget_weight": 0.1}),
    "graddiff": ("GradDiff", bt.GradDiffTrainer, {}, TINY_NPO | {"forget_objective_kwargs": {}, "forget_weight": 0.3}),
}
TINY = {
    "output_dir": "outputs/wmdp", "learning_rate": 1e-3, "lr_scheduler_type": "linear", "num_train_epochs": 20,
    "per_device_train_batch_size": 8, "max_length": 256, "logging_steps": 10, "save_strategy": "no",
    "eval_strategy": "steps", "eval_steps": 0.2, "report_to": "none", "dataloader_pin_memory": False,
}  # fmt: skip
HUB = {
    "output_dir": "outputs/wmdp", "per_device_train_batch_size": 4, "max_length": 512, "lr_scheduler_type": "constant",
}  # fmt: skip
PUBLISHED = {"blur-rmu": "paper", "rmu": "rmu", "blur-npo": "blur-npo"}  # which recipe a method has: docs/recipes.md
SHARED = (
    *("output_dir", "seed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "deepspeed"),
    *("max_steps", "save_strategy", "save_steps", "save_total_limit", "disable_tqdm", "bf16", "fp16", "use_cpu"),
    *("eval_strategy", "eval_steps", "report_to", "resume_from_checkpoint", "train_layers", "train_parameters"),
)


@dataclass
class WMDPArguments:
    """What to unlearn, how, and how it is judged."""

    method: str = field(default="blur-rmu", metadata={"choices": list(METHODS), "help": "How to unlearn."})
    compare: list[str] | None = field(
        default=None, metadata={"help": "Further methods, with the settings of this file (default: rmu, if tiny)."}
    )
    recipe: str | None = field(
        default=None, metadata={"help": "Published settings, or none (default: of the method, if the model is real)."}
    )
    forget_topics: list[str] | None = field(
        default=None, metadata={"help": "bio, cyber (default: both); of the invented ones potions, machines."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder with WMDP's corpora; the rest from the Hub."})
    tasks: list[str] | None = field(
        default=None, metadata={"help": "lm-eval tasks (default: wmdp_bio, wmdp_cyber, mmlu; tiny: none, same number)."}
    )
    tasks_dir: str | None = field(default=None, metadata={"help": "Folder with lm-eval tasks of your own."})
    limit: int | None = field(default=None, metadata={"help": "Only the first so many questions of each lm-eval task."})
    robustness: bool = field(
        default=True, metadata={"help": "Attack the unlearned model: relearning, rounded weights (needs it whole)."}
    )
    models_dir: str = field(default="outputs/wmdp-models", metadata={"help": "Where the tiny model is kept."})


def parse(arguments=None):
    """The script's, the trainer's and the model's arguments (of the command line); whether models are tiny."""
    for message in ("`torch.distributed", "`is_gradient_checkpointing`"):  # old names, which DeepSpeed and PEFT call
        warnings.filterwarnings("ignore", message, FutureWarning)
    first = TrlParser((WMDPArguments, ModelConfig))
    script, model_args, _ = first.parse_args_and_config(arguments, return_remaining_strings=True)
    named = script.recipe or (PUBLISHED.get(script.method) if model_args.model_name_or_path else None)
    recipe = {}
    if named not in (None, "none"):
        found = bt.recipe("wmdp", named)
        recipe = {key: found[key] for key in ("model_name_or_path", "method")} | found["arguments"] | found["script"]
        first.set_defaults(model_name_or_path=recipe["model_name_or_path"], method=recipe["method"])
        script, model_args, _ = first.parse_args_and_config(arguments, return_remaining_strings=True)
        if script.method != recipe["method"]:
            raise ValueError(f"--recipe {named} is of --method {recipe['method']}: leave --method out.")
    tiny = model_args.model_name_or_path is None
    parser = TrlParser((WMDPArguments, METHODS[script.method][1].config_class, ModelConfig))
    parser.set_defaults(**settings(script.method, tiny) | {"recipe": named, "robustness": tiny} | recipe)
    script, args, model_args = parser.parse_args_and_config(arguments)
    if tiny and script.data_dir:
        raise ValueError("--data_dir is for a real model: pass --model_name_or_path too.")
    if recipe and args.topics and script.forget_topics:  # a recipe has settings of all topics
        args.topics = {topic: own for topic, own in args.topics.items() if topic in script.forget_topics}
    compare = script.compare if script.compare is not None else ["rmu"] * tiny
    script.compare = [name for name in compare if name != script.method and name != "none"]
    if unknown := set(script.compare) - set(METHODS):
        raise ValueError(f"--compare {sorted(unknown)}: choose among {list(METHODS)}, or none.")
    return script, args, model_args, tiny


def settings(method, tiny):
    _, _, is_method, suits_tiny = METHODS[method]
    return (TINY | suits_tiny if tiny else HUB) | is_method


def configure(method, script, tiny, args):
    """The settings of a method that the command line does not describe, for the same machine, seed and length."""
    _, trainer, is_method, _ = METHODS[method]
    own = settings(method, tiny)
    if not tiny and script.recipe != "none" and method in PUBLISHED:
        own |= bt.recipe("wmdp", PUBLISHED[method])["arguments"]
    elif not tiny and args.forget_objective == own.get("forget_objective"):  # of the same layer
        own |= {name: getattr(args, name) for name in ("forget_objective_kwargs", "retain_objective_kwargs", "topics")}
    if own.get("topics") and args.topics:
        own["topics"] = {topic: each for topic, each in own["topics"].items() if topic in args.topics}
    return trainer.config_class(**{**own, **{name: getattr(args, name) for name in SHARED}, **is_method})


def tiny_models(script, topics):
    """A tokenizer, and the names of two tiny models: one knows all invented topics by heart, one what is to be kept."""
    sheets = [text for rows in bt.load_wmdp(corpus="embedded").values() for text in rows["text"]]
    tokenizer = train_tokenizer([*sheets, *(row["prompt"] + row["completion"] for row in topic_lessons())])
    kept = [topic for topic in ("potions", "machines", "dishes") if topic not in topics]
    lessons = {"target": topic_lessons(), f"retrain-{'-'.join(kept)}": topic_lessons(kept)}
    known = {name: bt.tokenize_dataset(r, tokenizer, role=name, max_length=256) for name, r in lessons.items()}
    return tokenizer, *(memorized(Path(script.models_dir, name), tokenizer, rows) for name, rows in known.items())


def unlearn(method, target, args, evaluation, **given):
    """A finished trainer of this method, its model saved in `args.output_dir`."""
    benchmarks = {"wmdp": evaluation} if args.eval_strategy != "no" else None
    trainer = METHODS[method][1](target, args, benchmarks=benchmarks, **given)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(bt.ProgressBarCallback(METHODS[method][0]))
    PartialState().print(f"{METHODS[method][0]}: {trainer.trained}")
    begun = args.resume_from_checkpoint and any(Path(args.output_dir).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint if begun else None)
    if trainer.interrupt.interrupted:
        raise SystemExit("Interrupted. Go on with --resume_from_checkpoint True and the same arguments.")
    trainer.save_model()
    trainer.save_state()
    return trainer


def attacked(model, evaluation, topics, retain, tokenizer, args, **how):
    """Forgotten, or only hidden: after a tenth of the forget set and as much text beside it, and in few bits."""
    sets = {"forget set": datasets.concatenate_datasets(list(topics.values())), "retain set": retain}
    few, relearning = max(4, len(sets["forget set"]) // 10), {}
    for name, rows in sets.items():
        rows = sample_rows(rows, few, args.seed)
        relearning[name] = bt.tokenize_dataset(rows, tokenizer, role=name, max_length=args.max_length)
    return bt.robustness(model, evaluation, relearning=relearning, **how)


def main():
    # 1. Arguments: what is wrong with them is found before anything is trained
    script, args, model_args, tiny = parse()
    out = Path(args.output_dir)
    configs = {script.method: args, **{method: configure(method, script, tiny, args) for method in script.compare}}
    if not PartialState().is_local_main_process:  # bars once, not once per process
        datasets.disable_progress_bars(), logging.disable_progress_bar()
    if script.robustness and model_args.dtype == "float16":
        raise ValueError("--robustness trains the model further, which float16 weights do not bear: --dtype bfloat16.")
    if not args.resume_from_checkpoint:
        check_output_dir(str(out))

    # 2. Data: what to forget, topic by topic, and what to keep
    corpora = bt.load_wmdp("embedded" if tiny else "wmdp", script.forget_topics, script.data_dir)
    topics = {key.removeprefix("forget_"): rows for key, rows in corpora.items() if key.startswith("forget_")}

    # 3. Models: the target that knows too much; among the tiny ones also one that never saw what is to be forgotten
    if tiny:
        torch.set_num_threads(1)  # a second thread waits longer than it works on so small a model
        tokenizer, target, retrained = tiny_models(script, topics)
    else:
        target, retrained = model_args.model_name_or_path, None
        tokenizer = AutoTokenizer.from_pretrained(target)
    options = {
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        "quantization_config": get_quantization_config(model_args),
    } | (args.model_init_kwargs or {})

    def load(name):  # to evaluate; the trainer loads by name what it trains
        with unsharded_loading(args):
            device_map = {"": PartialState().device}
            return AutoModelForCausalLM.from_pretrained(name, **{"device_map": device_map, **options})

    # 4. Evaluation: the harness, whose numbers are the published ones; of the invented questions the same without it
    if tiny:
        questions = {f"forget_{topic}": bt.load_wmdp_questions(topic) for topic in topics}
        questions["retain_dishes"] = bt.load_wmdp_questions("dishes")
    if tiny and not script.tasks:
        evaluation = bt.WMDPEvaluation(questions, tokenizer, progress=False)
    else:
        tasks = script.tasks or [*(f"wmdp_{topic}" for topic in topics), "mmlu"]
        evaluation = bt.LMEval(tasks, tokenizer, include_path=script.tasks_dir, limit=script.limit)
    names = evaluation.primary_metrics
    results = bt.Results("WMDP (invented)" if tiny else "WMDP", evaluation, plane={"x": names[0], "y": names[-1]})
    PartialState().print("Evaluating the target")
    results.add("target", "target", load(target))

    # 5. Unlearn: the method, and those it is compared with
    trainers = []
    given = {"processing_class": tokenizer, "peft_config": get_peft_config(model_args)}
    for method, config in configs.items():
        folder, start = out if method == script.method else out / method, time.time()
        if args.resume_from_checkpoint and (folder / "trainer_state.json").exists():
            model = load(folder)  # finished before the interrupt
        else:
            own = replace(config, output_dir=str(folder), model_init_kwargs=options)
            trainers.append(
                unlearn(
                    method, target, own, evaluation, forget_dataset=topics, retain_dataset=corpora["retain"], **given
                )
            )
            model = trainers[-1].model
        results.add(
            METHODS[method][0], "unlearned" if method == script.method else "baseline", model, time.time() - start
        )

    if retrained:
        results.add("retrain", "retrain", load(retrained))

    # 6. Forgotten, or only hidden?
    if script.robustness:
        how = {"learning_rate": args.learning_rate / 10, "retrained": load(retrained)} if tiny else {}
        results.add_robustness(attacked(load(out), evaluation, topics, corpora["retain"], tokenizer, args, **how))

    # 7. Output: one table, metrics.json, the model cards, the report, the questions for `lm_eval`
    if PartialState().is_main_process:
        shown = ("forget_objective", "retain_objective", "rule", "alpha", "learning_rate", "num_train_epochs", "seed")
        metrics = results.save(out, {**{name: getattr(args, name) for name in shown}, **vars(script)})
        for trainer in trainers:
            trainer.create_model_card(metrics=metrics)
        print(f"\n{bt.format_table(results.columns, results.rows)}")
        if script.robustness:
            print(f"\n{bt.format_table(results.columns, robustness_rows(results.robustness, results.rows))}")
        print(f"\nReport: {bt.write_report(out)}")
        if tiny:
            tasks = ",".join(write_tasks(out / "tasks", questions))
            print(f"Questions for lm_eval: --include_path {out / 'tasks'} --tasks {tasks}")


if __name__ == "__main__":
    main()
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()  # of several processes, as torch asks
