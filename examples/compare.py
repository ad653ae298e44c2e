"""Compare methods over several seeds: runs of run_tofu.py or run_wmdp.py, then mean and spread of each.

python examples/compare.py                                    # 4 methods, 3 seeds, tiny Llama: a quarter of an hour
python examples/compare.py --methods npo simnpo --seeds 0 1 --split forget05
python examples/compare.py --strengths 0.1 0.3 1 3            # at equal forgetting, and at equal utility
python examples/compare.py --benchmark wmdp --methods blur-rmu rmu
python examples/compare.py --resume_from_checkpoint true      # after an interrupt: what is not finished

Arguments that are not listed by --help go to the runs.
"""

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import run_tofu
import run_wmdp

import blur_trainer as bt
from blur_trainer.atomic_write import atomic_write
from blur_trainer.report.readings import check_shares
from blur_trainer.report.seeds import write_means
from blur_trainer.saving.output_dir import check_output_dir
from blur_trainer.scripts.running import check_launch
from blur_trainer.scripts.sweep import check_factors, footing, joined, plan
from blur_trainer.trainers.ending import TrainingInterrupted

BENCHMARKS = {  # script, methods, arguments of all runs; attacks are of one run's model and cannot be averaged
    "tofu": (run_tofu, ["blur-target", "blur-npo", "npo", "uld"], []),
    "wmdp": (run_wmdp, ["blur-rmu", "rmu", "blur-npo", "npo"], ["--no_robustness"]),
}
# what is read at equal forgetting and at equal utility, where it is not all columns of the forget and the retain set
READ = {
    "tofu": {
        "forgotten": ("forget_probability", "forget_rouge"),
        "kept": ("model_utility",),
        "shown": ("model_utility", "retain_rouge", "real_authors_rouge", "world_facts_rouge"),
    }
}
REMEDY = "Go on with --resume_from_checkpoint true and the same arguments."


def parse():
    """The arguments of the comparison, and those that all runs share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", choices=BENCHMARKS, default="tofu")
    parser.add_argument("--methods", nargs="+", help="Of the benchmark's (default: four of them).")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--strengths", nargs="+", type=float, help="Multiples of each method's own strength.")
    parser.add_argument("--tolerance", type=float, help="Level: 1 - this, of the way to the retrained model (0.05).")
    parser.add_argument("--utility", type=float, help="Equal utility: this share of the target's (0.95).")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare"))
    parser.add_argument("--models_dir", help="Where tiny models are kept (default: beside the runs).")
    parser.add_argument("--resume_from_checkpoint", metavar="True", help="Go on with the comparison in --output_dir.")
    parser.add_argument("--launcher", default=sys.executable, help='What starts a run, e.g. "accelerate launch".')
    options, shared = parser.parse_known_args()
    script, methods, always = BENCHMARKS[options.benchmark]
    options.methods = options.methods or methods
    shared += ["--compare", "none", "--models_dir", options.models_dir or str(options.output_dir / "models"), *always]
    if re.search(r'--hub_token|"(use_auth_)?token"', shlex.join(shared)):
        raise ValueError("A token among the arguments would be written down: `hf auth login` instead.")
    read = {name: getattr(options, name) for name in ("tolerance", "utility") if getattr(options, name) is not None}
    if read and not options.strengths:
        raise ValueError(f"{', '.join(f'--{name}' for name in read)}: only a sweep reads it. Pass --strengths too.")
    check_factors(options.strengths or ())
    check_shares(**read)
    options.read, arguments = read, {}
    for method in options.methods:  # wrong arguments are found before anything is trained
        _, arguments[method], *_ = script.parse(["--method", method, *shared])
        if options.launcher == sys.executable:
            check_launch(arguments[method], "pass --launcher 'accelerate launch'")
    return options, shared, plan(arguments, options.seeds, options.strengths)


def begin(out, resume, shared):
    """The folder, with the arguments of its runs in it: runs with others are not to be averaged with them."""
    noted = out / "arguments.txt"
    if noted.exists() and not resume:
        raise ValueError(f"{str(out)!r} holds a comparison: --resume_from_checkpoint true, or another --output_dir.")
    if noted.exists() and (before := noted.read_text()) != shlex.join(shared):
        raise ValueError(f"The comparison in {str(out)!r} was begun with {before!r}: pass the same.")
    check_output_dir(str(out))
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(noted, lambda partial: partial.write_text(shlex.join(shared)))


def finished(folder, command):
    """Whether there are results in a run's folder, which the command is to write. Its output goes to a log beside."""
    if (folder / "metrics.json").exists():
        return True
    log, interrupts = folder.with_name(f"{folder.name}.log"), []
    signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))  # the run gets it too: it saves, we wait
    with log.open("a") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupts:
        print(f"Interrupted. {REMEDY}", file=sys.stderr)
        raise TrainingInterrupted("Interrupted", REMEDY, signal.SIGINT)
    how, last = (f"FAILED (status {status}), see {log}", log.read_text().splitlines()[-5:]) if status else ("done", [])
    print(f"{folder.name}: {how}", *last, sep="\n    ", flush=True)
    return status == 0


def main():
    options, shared, runs = parse()
    out, resume = options.output_dir, options.resume_from_checkpoint
    begin(out, resume, shared)
    program = [*shlex.split(options.launcher), BENCHMARKS[options.benchmark][0].__file__, *shared]
    program += ["--resume_from_checkpoint", "True"] if resume else []
    contents = {}
    for run in runs:
        folder = out / run.folder
        own = ["--method", run.method, "--seed", str(run.seed), *run.flags, "--output_dir", str(folder)]
        if finished(folder, [*program, *own]):
            contents[run] = json.loads((folder / "metrics.json").read_text())
    if not contents:
        raise SystemExit("No run finished.")
    content = joined(runs, contents)
    try:
        if options.strengths:
            content["footing"] = footing(contents, content, **READ.get(options.benchmark, {}), **options.read)
    except ValueError as error:  # hours of runs have their table all the same
        print(f"No reading at equal forgetting: {error}")
    write_means(out, content)
    print(f"\n{bt.format_table(content['columns'][:9], content['rows'])}")  # the rest is in the report
    for reading in content.get("footing", {}).get("readings", []):
        print(f"\n{reading['title']}\n{reading['note']}\n\n{bt.format_table(reading['columns'], reading['rows'])}\n")
        print(*(f"{row['name']} {row['said']}." for row in reading["rows"] if "said" in row), sep="\n")
        print(*(f"Best, {verdict['column']}: {verdict['text']}." for verdict in reading["verdicts"]), sep="\n")
    print(f"\nReport: {bt.write_report(out)}")


if __name__ == "__main__":
    main()
