"""Unlearn a MUSE corpus to the level of a model that never saw it; measure what is forgotten, kept and damaged.

accelerate launch examples/run_muse.py                                    # embedded corpora, tiny Llama: minutes
accelerate launch examples/run_muse.py --recipe paper                     # BLUR-NPO as published, alone
accelerate launch examples/run_muse.py --sequence                         # four forget sets, one after another
accelerate launch examples/run_muse.py --data_dir DIR --max_documents 8   # local JSON/JSONL, tiny Llama
accelerate launch examples/run_muse.py --corpus news --model_name_or_path muse-bench/MUSE-News_target \
    --tokenizer meta-llama/Llama-2-7b-hf
accelerate launch examples/run_muse.py --corpus news --recipe paper       # published settings: docs/recipes.md
"""

import time

from accelerate import PartialState
from peft import PeftModel
from trl import get_peft_config

import blur_trainer as bt
from blur_trainer.data.formats import chunk_documents
from blur_trainer.data.muse import AUC_RETRAIN, limit_documents, muse_stages
from blur_trainer.scripts.attacks import PREFIX, relearning_sets
from blur_trainer.scripts.levels import measured, needs_level, with_level
from blur_trainer.scripts.loading import ModelLoader
from blur_trainer.scripts.methods import changed
from blur_trainer.scripts.muse import PUBLISHED, label_of, parse, tiny_models
from blur_trainer.scripts.output import settings_of, write_output
from blur_trainer.scripts.running import begin, is_finished, run, train_and_save
from blur_trainer.toy.muse import training_texts

SAID = ("forget_objective", "retain_objective", "rule", "gamma", "replay", "learning_rate", "num_train_epochs", "seed")


def main():
    # 1. Arguments: what is wrong with them is found before anything is trained
    script, args, model_args, tiny = parse()
    out = begin(script, args, model_args)
    if args.resume_from_checkpoint and not any(out.rglob("checkpoint-*")):
        raise ValueError(f"output_dir {str(out)!r} holds no checkpoint: leave --resume_from_checkpoint out.")

    # 2. Data
    corpus = "news" if script.data_dir and script.corpus == "embedded" else script.corpus
    data = bt.load_muse(corpus, script.data_dir)
    if script.max_documents is not None:
        data = limit_documents(data, script.max_documents, seed=args.seed)
    folds = muse_stages(data, script.protocol) if script.protocol else None

    # 3. Models: the target that knows all, the one retrained without the forget set. What to forget, and to retain
    load = ModelLoader(args, model_args)
    if tiny:
        tokenizer, target, retrained = tiny_models(data, out)
        stages = folds or [("all", training_texts(data, ["forget"]))]  # the answers too: it has learnt them apart
        retain = data["raw_retain"] if folds else training_texts(data, ["retain"])  # the folds are articles
    else:
        target, retrained = model_args.model_name_or_path, None
        tokenizer = load.tokenizer(script.tokenizer or target)
        stages = folds or [("all", data["raw_forget"])]
        stages = [(name, chunk_documents(texts["text"], tokenizer, args.max_length)) for name, texts in stages]
        retain = chunk_documents(data["raw_retain"]["text"], tokenizer, args.max_length)

    # 4. Evaluation. PrivLeak's zero is the retrained model: ours, or the published one
    how = {"icl": not tiny, "progress": not tiny}  # solved examples only distract a tiny model
    zero = bt.MUSEEvaluation(data, tokenizer, **how)
    auc = zero.privleak_auc(load(retrained)) if retrained else AUC_RETRAIN.get(corpus)
    evaluation = bt.MUSEEvaluation(data, tokenizer, auc_retrain=auc, **how)
    results = bt.Results(f"MUSE ({corpus})", evaluation, plane={"x": "forget_knowmem", "y": "retain_knowmem"})
    PartialState().print("Evaluating the target")
    results.add("target", "target", load(target))

    # 5. Unlearn, stage after stage: the method, and BLUR-NPO as published
    methods = {label_of(args): (out, args)}
    if script.baseline:
        methods.setdefault("BLUR-NPO", (out / "baseline", changed(args, **PUBLISHED)))
    trainers = {}
    for label, (folder, config) in methods.items():
        first, start = target, time.time()
        for index, (stage, forget) in enumerate(stages):
            given, sets = config, {"forget_dataset": forget, "retain_dataset": retain}
            if needs_level(config) or (script.level and folder == out):
                asked = script.level or ("retrained" if retrained else "unseen")
                level = measured(asked, forget, data.get("privleak_holdout"), target, retrained, load, tokenizer)
                given, sets = with_level(config, sets, level)
            stage_folder = folder if index == len(stages) - 1 else folder / stage.replace(" ", "_")
            if script.scale:
                first = target  # each stage anew; `sust` begins where the last stage ended
            if is_finished(args, stage_folder):
                model = load(target if model_args.use_peft else stage_folder)
                if model_args.use_peft:
                    model = PeftModel.from_pretrained(model, stage_folder, is_trainable=True, torch_device="cpu")
            else:
                by_name = isinstance(first, str)
                trainer = bt.BLURTrainer(
                    first,
                    changed(given, output_dir=str(stage_folder), model_init_kwargs=load.options if by_name else None),
                    processing_class=tokenizer,
                    peft_config=get_peft_config(model_args) if by_name else None,
                    benchmarks={"muse": evaluation},
                    **sets,
                )
                train_and_save(trainer, label if stage == "all" else f"{label}, {stage}")
                trainers[label] = trainer
                model = trainer.model
            first = model if model_args.use_peft else str(stage_folder)  # saved whole; the model may be in shards
            if len(stages) > 1 and folder == out:
                results.add_stage(stage, evaluation(model))
        results.add(label, "unlearned" if folder == out else "baseline", model, time.time() - start)
    if retrained:
        results.add("retrain", "retrain", load(retrained))

    # 6. Forgotten, or only hidden? A tenth of the forget set, as much text beside it, few bits, another prompt
    if script.robustness:
        beside = "hold" if "raw_hold" in data else "retain"
        sets = {"forget set": [row for _, rows in stages for row in rows], f"{beside} set": data[f"raw_{beside}"]}
        anew = bt.MUSEEvaluation(bt.prefixed(data, f"{PREFIX}\n\n"), tokenizer, **how)
        found = bt.robustness(
            load(out, to_train=True),  # as it would be given away: whole, and not in few bits
            evaluation,
            relearning=relearning_sets(sets, tokenizer, args),
            prompted={"prefix": anew},
            **({"learning_rate": args.learning_rate / 10, "retrained": load(retrained, to_train=True)} if tiny else {}),
        )
        results.add_robustness(found)

    # 7. Output: the tables, metrics.json, the model cards, the report
    if PartialState().is_main_process:
        print(write_output(out, results, trainers, settings_of(script, args, SAID)))


if __name__ == "__main__":
    run(main)
