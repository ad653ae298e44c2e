"""Unlearn hazardous knowledge, topic by topic, with BLUR-RMU or another method; judge it by multiple-choice questions.

deepspeed examples/run_wmdp.py                                  # invented topics, tiny Llama: minutes
python examples/run_wmdp.py --method npo --compare none
deepspeed examples/run_wmdp.py --deepspeed ds_configs/zero3.json \
    --model_name_or_path HuggingFaceH4/zephyr-7b-beta           # WMDP as the paper has it (--recipe paper)
"""

import time

from accelerate import PartialState
from datasets import concatenate_datasets
from trl import get_peft_config

import blur_trainer as bt
from blur_trainer.evaluation.lm_eval_tasks import write_tasks
from blur_trainer.scripts.attacks import relearning_sets
from blur_trainer.scripts.loading import ModelLoader
from blur_trainer.scripts.methods import changed
from blur_trainer.scripts.output import settings_of, write_output
from blur_trainer.scripts.running import begin, is_finished, run, train_and_save
from blur_trainer.scripts.wmdp import METHODS, configurations, parse, tiny_models

SAID = ("forget_objective", "retain_objective", "rule", "alpha", "learning_rate", "num_train_epochs", "seed")


def main():
    # 1. Arguments: what is wrong with them is found before anything is trained
    script, args, model_args, tiny = parse()
    configs = configurations(script, args, tiny)
    out = begin(script, args, model_args)

    # 2. Data: what to forget, topic by topic, and what to keep
    corpora = bt.load_wmdp(corpus="embedded" if tiny else "wmdp", topics=script.forget_topics, data_dir=script.data_dir)
    topics = {key.removeprefix("forget_"): rows for key, rows in corpora.items() if key.startswith("forget_")}

    # 3. Models: the target that knows too much; among the tiny ones also one that never saw what is to be forgotten
    load = ModelLoader(args, model_args)
    if tiny:
        tokenizer, target, retrained = tiny_models(script, topics)
    else:
        target, retrained = model_args.model_name_or_path, None
        tokenizer = load.tokenizer(target)

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
    trainers = {}
    for method, config in configs.items():
        folder, start = out if method == script.method else out / method, time.time()
        label = METHODS[method].label
        if is_finished(args, folder):
            model = load(folder)
        else:
            trainer = METHODS[method].trainer(
                target,
                changed(config, output_dir=str(folder), model_init_kwargs=load.options),
                forget_dataset=topics,
                retain_dataset=corpora["retain"],
                processing_class=tokenizer,
                peft_config=get_peft_config(model_args),
                benchmarks={"wmdp": evaluation} if config.eval_strategy != "no" else None,
            )
            PartialState().print(f"{label}: {trainer.trained}")
            train_and_save(trainer, label)
            trainers[label] = trainer
            model = trainer.model
        results.add(label, "unlearned" if method == script.method else "baseline", model, time.time() - start)
    if retrained:
        results.add("retrain", "retrain", load(retrained))

    # 6. Forgotten, or only hidden? A tenth of the forget set, as much text beside it, few bits
    if script.robustness:
        sets = {"forget set": concatenate_datasets(list(topics.values())), "retain set": corpora["retain"]}
        found = bt.robustness(
            load(out, to_train=True),
            evaluation,
            relearning=relearning_sets(sets, tokenizer, args),
            **({"learning_rate": args.learning_rate / 10, "retrained": load(retrained, to_train=True)} if tiny else {}),
        )
        results.add_robustness(found)

    # 7. Output: the tables, metrics.json, the model cards, the report, the questions for `lm_eval`
    if PartialState().is_main_process:
        print(write_output(out, results, trainers, settings_of(script, args, SAID)))
        if tiny:
            tasks = ",".join(write_tasks(out / "tasks", questions))
            print(f"Questions for lm_eval: --include_path {out / 'tasks'} --tasks {tasks}")


if __name__ == "__main__":
    run(main)
