"""Chooses the tiny settings of every method of `run_tofu.py` with equal effort, on a seed that no table reports.

Four values of the one setting that says how strongly a method forgets; all else is as published. The rule of choice is
the same for all: the largest harmonic mean of forget quality and model utility.

python benchmarks/tune_tofu.py --out tried.jsonl                    # resumes: what is in the file is not run again
python benchmarks/tune_tofu.py --out tried.jsonl --methods npo wga
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import harmonic_mean

import torch
from tabulate import tabulate

import blur_trainer as bt
from blur_trainer.scripts.loading import ModelLoader
from blur_trainer.scripts.methods import changed
from blur_trainer.scripts.strengths import strength_of
from blur_trainer.scripts.tofu import METHODS, parse, tiny_models, training_sets


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="one line of JSON per run")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--models_dir", default="outputs/tofu-models")
    return parser.parse_args()


def measured(method: str, value: float, options: argparse.Namespace) -> dict[str, float]:
    given = ["--method", method, "--seed", str(options.seed), "--compare", "none", "--eval_strategy", "no"]
    script, args, model_args, _ = parse([*given, "--models_dir", options.models_dir, "--disable_tqdm", "True"])
    data = bt.load_tofu("embedded", script.split)
    load = ModelLoader(args, model_args)
    tokenizer, target, retrained = tiny_models(data, script)
    how = {"template": script.template, "protocol": script.protocol, "progress": False, "max_new_tokens": 32}
    reference = bt.TOFUEvaluation(data, tokenizer, **how).reference(load(retrained))
    with tempfile.TemporaryDirectory() as folder:
        config = changed(strength_of(method).put(args, value), output_dir=folder, model_init_kwargs=load.options)
        sets = training_sets(method, data, script)
        trainer = METHODS[method].trainer(target, config, processing_class=tokenizer, **sets)
        trainer.train()
        trainer.save_model()
        model = load(folder) if method == "uld" else trainer.model
        return bt.TOFUEvaluation(data, tokenizer, reference=reference, **how)(model)


def chosen(runs: list[dict]) -> dict:
    return max(runs, key=lambda run: harmonic_mean([run["forget_quality"], run["model_utility"]]))


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    known = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(run["method"], run["value"]) for run in known if run["seed"] == options.seed}
    for method in options.methods:
        strength = strength_of(method)
        for value in strength.tried:
            if (method, value) in done:
                continue
            numbers = measured(method, value, options)
            run = {"method": method, "setting": strength.setting, "value": value, "seed": options.seed, **numbers}
            known.append(run)
            with options.out.open("a") as file:
                file.write(json.dumps(run) + "\n")
    rows = []
    for method in options.methods:
        runs = [run for run in known if run["method"] == method and run["seed"] == options.seed]
        best = chosen(runs)
        rows += [
            [method if run is runs[0] else "", f"{run['setting']} {run['value']:g}{' *' if run is best else ''}"]
            + [f"{run[key]:.3g}" for key in ("forget_quality", "model_utility", "forget_rouge", "retain_rouge")]
            for run in runs
        ]
    heads = ["method", "tried (* chosen)", "forget quality", "utility", "ROUGE forget", "ROUGE retain"]
    print(tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
