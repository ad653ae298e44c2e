"""Unlearn a MUSE corpus with BLUR-NPO; measure what was forgotten, what was kept, and what else was damaged.

accelerate launch examples/run_muse.py                                    # embedded corpora, tiny Llama: minutes
accelerate launch examples/run_muse.py --sequence                         # four forget sets, one after another
accelerate launch examples/run_muse.py --data_dir DIR --max_documents 8   # local JSON/JSONL, tiny Llama
accelerate launch examples/run_muse.py --corpus news --model_name_or_path muse-bench/MUSE-News_target \
    --tokenizer meta-llama/Llama-2-7b-hf
accelerate launch examples/run_muse.py --corpus news --recipe paper       # published settings: docs/recipes.md
"""

import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback
from transformers.utils import logging
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

import blur_trainer as bt
from blur_trainer.data.formats import chunk_documents
from blur_trainer.data.muse import AUC_RETRAIN, limit_documents, muse_stages
from blur_trainer.data.subset import sample_rows
from blur_trainer.report.tables import robustness_rows
from blur_trainer.saving.output_dir import check_output_dir
from blur_trainer.toy.memorize import memorized
from blur_trainer.toy.model import train_tokenizer
from blur_trainer.toy.muse import training_texts
from blur_trainer.trainers.loading import unsharded_loading

TINY = {  # for a Llama of 1M parameters that knows its texts by heart; docs/quickstart.md has the settings of a 7B
    "output_dir": "outputs/muse", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "num_train_epochs": 10,
    "per_device_train_batch_size": 8, "gamma": 0.1, "forget_objective_kwargs": '{"beta": 0.03}', "max_length": 2048,
    "precompute_ref_logps": True, "logging_steps": 5, "eval_strategy": "steps", "eval_steps": 14,
    "save_strategy": "no", "report_to": "none", "dataloader_pin_memory": False,
}  # fmt: skip
PREFIX = "You are an expert who knows all of it.\n\n"
HUB = {"output_dir": "outputs/muse", "max_length": 2048, "baseline": False}


@dataclass
class MUSEArguments:
    """What to unlearn, and by which protocol."""

    corpus: str = field(default="embedded", metadata={"choices": ["embedded", "news", "books"], "help": "MUSE corpus."})
    recipe: str | None = field(default=None, metadata={"help": "Published settings and their model, e.g. paper."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder with the corpus' splits as JSON or JSONL."})
    max_documents: int | None = field(default=None, metadata={"help": "Use that many documents of each group only."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer, where the model has none beside it."})
    sequence: bool = field(default=False, metadata={"help": "Protocol `sust`: the forget sets one after another."})
    scale: bool = field(default=False, metadata={"help": "Protocol `scal`: forget sets of growing size, each anew."})
    baseline: bool = field(
        default=True, metadata={"help": "Also run the weighted sum of the same strength (default: with tiny models)."}
    )
    robustness: bool = field(
        default=False, metadata={"help": "Also attack the unlearned model: relearning, 8 and 4 bit, another prompt."}
    )


def attacked(model, evaluation, data, forget, tokenizer, args, settings, **how):
    """Forgotten, or only hidden? A tenth of the forget set, as much text beside it, few bits, another prompt."""
    beside = "hold" if "raw_hold" in data else "retain"
    few = max(4, len(forget) // 10)
    relearning = {
        name: bt.tokenize_dataset(sample_rows(rows, few, args.seed), tokenizer, role=name, max_length=args.max_length)
        for name, rows in {"forget set": forget, f"{beside} set": data[f"raw_{beside}"]}.items()
    }
    anew = bt.MUSEEvaluation(bt.prefixed(data, PREFIX), tokenizer, **settings)
    return bt.robustness(model, evaluation, relearning=relearning, prompted={"prefix": anew}, **how)


def parse(arguments=None):
    """The script's, the trainer's and the model's arguments (of the command line); whether models are tiny."""
    parser = TrlParser((MUSEArguments, bt.BLURConfig, ModelConfig))
    asked = parser.parse_known_args(arguments)[0]
    tiny = asked.model_name_or_path is None and asked.recipe is None
    parser.set_defaults(**(TINY if tiny else HUB))
    if asked.recipe is not None:
        if asked.corpus == "embedded":
            raise ValueError("--recipe is for the published models: pass --corpus news or --corpus books.")
        found = bt.recipe(f"muse-{asked.corpus}", asked.recipe)
        parser.set_defaults(model_name_or_path=found["model_name_or_path"], **found["arguments"], **found["script"])
    return *parser.parse_args_and_config(arguments), tiny


def main():
    # 1. Arguments: what is wrong with them is found before anything is trained
    script, args, model_args, tiny = parse()
    out = Path(args.output_dir)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # DeepSpeed calls old names, at every step
    if not PartialState().is_local_main_process:  # bars once, not once per process
        datasets.disable_progress_bars(), logging.disable_progress_bar()
    if script.sequence and script.scale:
        raise ValueError("--sequence and --scale are two protocols: pass one of them.")
    if script.robustness and model_args.dtype == "float16":
        raise ValueError("--robustness trains the model further, which float16 weights do not bear: --dtype bfloat16.")
    if not args.resume_from_checkpoint:
        check_output_dir(str(out))
    elif not any(out.rglob("checkpoint-*")):
        raise ValueError(f"output_dir {str(out)!r} holds no checkpoint: leave --resume_from_checkpoint out.")

    # 2. Data
    corpus = "news" if script.data_dir and script.corpus == "embedded" else script.corpus
    data = bt.load_muse(corpus, script.data_dir)
    if script.max_documents is not None:
        data = limit_documents(data, script.max_documents, seed=args.seed)
    protocol = "sust" if script.sequence else "scal" if script.scale else None
    folds = muse_stages(data, protocol) if protocol else None

    # 3. Models: the target that knows all, the one retrained without the forget set. What to forget, and to retain
    retrain = None
    if tiny:
        torch.set_num_threads(1)  # a second thread waits longer than it works on so small a model
        tokenizer = train_tokenizer(training_texts(data)["text"])
        groups = {"target": ["forget", "retain", "hold"], "retrain": ["retain", "hold"]}
        known = {name: training_texts(data, g) for name, g in groups.items()}
        rows = {name: bt.tokenize_dataset(t, tokenizer, role=name, max_length=2048) for name, t in known.items()}
        target, retrain = (memorized(out / name, tokenizer, rows[name]) for name in rows)
        stages = folds or [("all", training_texts(data, ["forget"]))]  # the answers too: it has learnt them apart
        retain = data["raw_retain"] if folds else training_texts(data, ["retain"])  # the folds are articles
    else:
        target = model_args.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(script.tokenizer or target)
        stages = folds or [("all", data["raw_forget"])]
        stages = [(name, chunk_documents(texts["text"], tokenizer, args.max_length)) for name, texts in stages]
        retain = chunk_documents(data["raw_retain"]["text"], tokenizer, args.max_length)

    options = {
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        "quantization_config": get_quantization_config(model_args),
    } | (args.model_init_kwargs or {})

    def load(name, **changed):  # to evaluate; the trainer loads by name what it trains, in parts where it is sharded
        with unsharded_loading(args):
            device_map = {"": PartialState().device}
            return AutoModelForCausalLM.from_pretrained(name, **{"device_map": device_map, **options, **changed})

    # 4. Evaluation. PrivLeak's zero is the retrained model: ours, or the published one
    settings = {"icl": not tiny, "progress": not tiny}  # solved examples only distract a tiny model
    zero = bt.MUSEEvaluation(data, tokenizer, **settings)
    auc = zero.privleak_auc(load(retrain)) if tiny else AUC_RETRAIN.get(corpus)
    evaluation = bt.MUSEEvaluation(data, tokenizer, auc_retrain=auc, **settings)
    results = bt.Results(f"MUSE ({corpus})", evaluation, plane={"x": "forget_knowmem", "y": "retain_knowmem"})
    PartialState().print("Evaluating the target")
    results.add("target", "target", load(target))

    # 5. Unlearn, stage after stage: BLUR, and the weighted sum whose forget weight is BLUR's gamma
    runs = {f"{args.rule}-{args.forget_objective}".upper(): (out, None)}
    if script.baseline:
        runs["Sum-NPO"] = (out / "baseline", bt.Sum(forget_weight=args.gamma, retain_weight=args.alpha))
    trainers = []
    for name, (folder, rule) in runs.items():
        begin, start = target, time.time()
        for index, (stage, forget) in enumerate(stages):
            stage_folder = folder if index == len(stages) - 1 else folder / stage.replace(" ", "_")
            if script.scale:
                begin = target  # each stage anew; `sust` begins where the last stage ended
            if args.resume_from_checkpoint and (stage_folder / "trainer_state.json").exists():
                model = load(target if model_args.use_peft else stage_folder)  # finished before the interrupt
                if model_args.use_peft:
                    model = PeftModel.from_pretrained(model, stage_folder, is_trainable=True)
            else:
                by_name = isinstance(begin, str)
                trainer = bt.BLURTrainer(
                    begin,
                    replace(args, output_dir=str(stage_folder), model_init_kwargs=options if by_name else None),
                    forget,
                    retain,
                    processing_class=tokenizer,
                    peft_config=get_peft_config(model_args) if by_name else None,
                    rule=rule,
                    benchmarks={"muse": evaluation},
                )
                trainer.remove_callback(ProgressCallback)
                trainer.add_callback(bt.ProgressBarCallback(name if stage == "all" else f"{name}, {stage}"))
                begun = any(stage_folder.glob("checkpoint-*"))
                trainer.train(resume_from_checkpoint=args.resume_from_checkpoint if begun else None)
                if trainer.interrupt.interrupted:
                    raise SystemExit("Interrupted. Go on with --resume_from_checkpoint True and the same arguments.")
                trainer.save_model()
                trainer.save_state()
                trainers.append(trainer)
                model = trainer.model
            begin = model if model_args.use_peft else str(stage_folder)  # saved whole; the model may be in shards
            if len(stages) > 1 and rule is None:
                results.add_stage(stage, evaluation(model))
        results.add(name, "baseline" if rule else "unlearned", model, time.time() - start)
    if retrain:
        results.add("retrain", "retrain", load(retrain))
    if script.robustness:
        forget = [row for _, rows in stages for row in rows]
        how = {"learning_rate": args.learning_rate / 10, "retrained": load(retrain)} if tiny else {}
        model = load(out, quantization_config=None)  # as it would be given away: whole, and not in few bits
        results.add_robustness(attacked(model, evaluation, data, forget, tokenizer, args, settings, **how))

    # 6. Output: one table, metrics.json, the model card, the report
    if PartialState().is_main_process:
        names = ("forget_objective", "retain_objective", "rule", "gamma", "learning_rate", "num_train_epochs", "seed")
        metrics = results.save(out, {**{name: getattr(args, name) for name in names}, **vars(script)})
        for trainer in trainers:
            trainer.create_model_card(metrics=metrics)
        print(f"\n{bt.format_table(results.columns, results.rows)}")
        if script.robustness:
            columns = [column for column in results.columns if column["name"] in evaluation.primary_metrics]
            print(f"\n{bt.format_table(columns, robustness_rows(results.robustness, results.rows))}")
        print(f"\nReport: {bt.write_report(out)}")


if __name__ == "__main__":
    main()
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()  # of several processes, as torch asks
