"""Unlearn TOFU's fictitious authors by any method; measure forget quality and model utility.

accelerate launch examples/run_tofu.py                                 # embedded authors, tiny Llama: minutes
accelerate launch examples/run_tofu.py --method simnpo --split forget05 --level unseen
accelerate launch examples/run_tofu.py --method blur-npo               # BLUR as published: no end of its own
accelerate launch examples/run_tofu.py --data_dir DIR --max_rows 60    # local JSON/JSONL, tiny Llama
accelerate launch examples/run_tofu.py --method npo --template llama3 \
    --model_name_or_path open-unlearning/tofu_Llama-3.2-1B-Instruct_full
accelerate launch examples/run_tofu.py --recipe open-unlearning        # published settings: docs/recipes.md
"""

import time

from accelerate import PartialState
from trl import get_peft_config

import blur_trainer as bt
from blur_trainer.data.subset import limit_rows
from blur_trainer.data.tofu import TOFU_MODELS, TOFU_SPLITS
from blur_trainer.data.tofu_templates import apply_template
from blur_trainer.scripts.attacks import PREFIX, relearning_sets
from blur_trainer.scripts.levels import measured, needs_level, with_level
from blur_trainer.scripts.loading import ModelLoader
from blur_trainer.scripts.methods import changed
from blur_trainer.scripts.output import settings_of, write_output
from blur_trainer.scripts.running import begin, is_finished, run, train_and_save
from blur_trainer.scripts.tofu import METHODS, configurations, parse, tiny_models, training_sets, with_said

SAID = ("forget_objective", "retain_objective", "rule", "learning_rate", "num_train_epochs", "seed")


def main():
    # 1. Arguments: what is wrong with them is found before anything is trained
    script, args, model_args, tiny = parse()
    configs = configurations(script, args, tiny)
    out = begin(script, args, model_args)

    # 2. Data
    embedded = tiny and script.data_dir is None
    data = bt.load_tofu("embedded" if embedded else "tofu", script.split, script.data_dir)
    if script.max_rows is not None:
        data = limit_rows(data, script.max_rows)  # the same of every seed, which are compared
    if "holdout" not in data:
        PartialState().print("No membership inference, no PrivLeak: the data has no holdout set.")
    training = {method: training_sets(method, data, script) for method in configs}

    # 3. Models: the target that knows all, and the one that never saw the forget set
    load = ModelLoader(args, model_args)
    if tiny:
        tokenizer, target, retrained = tiny_models(data, script)
    else:
        target = model_args.model_name_or_path
        tokenizer = load.tokenizer(target)
        published = {models.full: models for models in TOFU_MODELS.values()}.get(target)
        retrained = script.retain_model or (published and getattr(published, TOFU_SPLITS[script.split]))

    if "uld" in configs and script.said:
        training["uld"] = with_said(training["uld"], script, load(target), tokenizer, args.seed)

    # Where forgetting ends: at what a model loses that never saw the authors
    leveled = [
        name for name, config in configs.items() if needs_level(config) or (script.level and name == script.method)
    ]
    if leveled:
        unseen = apply_template(data["holdout"], script.template) if "holdout" in data else None
        forget = training[script.method]["forget_dataset"]
        asked = script.level or ("retrained" if unseen is None and retrained else "unseen")
        level = measured(asked, forget, unseen, target, retrained, load, tokenizer)
        for name in leveled:
            configs[name], training[name] = with_level(configs[name], training[name], level)

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
    trainers = {}
    for method, config in configs.items():
        folder, start = out if method == script.method else out / method, time.time()
        if is_finished(args, folder):
            model = load(folder)
        else:
            trainer = METHODS[method].trainer(
                target,
                changed(config, output_dir=str(folder), model_init_kwargs=load.options),
                processing_class=tokenizer,
                peft_config=get_peft_config(model_args),
                benchmarks={"tofu": evaluation} if config.eval_strategy != "no" else None,
                **training[method],
            )
            train_and_save(trainer, method)
            trainers[METHODS[method].label] = trainer
            model = load(folder) if method == "uld" else trainer.model
        kind = "unlearned" if method == script.method else "baseline"
        results.add(METHODS[method].label, kind, model, time.time() - start)
    if retrained:
        results.add("retrain", "retrain", load(retrained))

    # 6. Forgotten, or only hidden? A tenth of the forget set, as much text beside it, few bits, another prompt
    if script.robustness:
        beside = "holdout" if "holdout" in data else "retain"
        sets = {f"{name} set": apply_template(data[name], script.template) for name in ("forget", beside)}
        anew = bt.TOFUEvaluation(bt.prefixed(data, f"{PREFIX} "), tokenizer, **how)
        more = {"learning_rate": args.learning_rate / 10} if tiny or script.method == "uld" else {}
        if retrained and script.method != "uld":
            more["retrained"] = load(retrained, to_train=True)
        found = bt.robustness(
            load(out, to_train=True),  # as it would be given away: whole, and not in few bits
            evaluation,
            relearning=relearning_sets(sets, tokenizer, args),
            prompted={"prefix": anew},
            **more,
        )
        results.add_robustness(found)

    # 7. Output: the tables, metrics.json, the model cards, the report
    if PartialState().is_main_process:
        said = settings_of(script, args, SAID)
        print(write_output(out, results, trainers, said, columns=evaluation.primary_metrics, attack_width=130))


if __name__ == "__main__":
    run(main)
