"""Methods over several seeds, runs of TOFU or WMDP: mean and spread. `blur-trainer compare`, `examples/compare.py`.

Each run is a process of its own, which `blur-trainer tofu` or `wmdp` is.
"""

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from blur_trainer.atomic_write import atomic_write
from blur_trainer.report.html import write_report
from blur_trainer.report.readings import check_shares
from blur_trainer.report.seeds import write_means
from blur_trainer.report.tables import format_table
from blur_trainer.saving.output_dir import check_output_dir
from blur_trainer.scripts import tofu, wmdp
from blur_trainer.scripts.command_line import Parser, checked_words, with_config_as_words
from blur_trainer.scripts.running import check_launch
from blur_trainer.scripts.sweep import Run, check_factors, footing, joined, plan
from blur_trainer.trainers.ending import TrainingInterrupted

BENCHMARKS: dict[str, tuple[Any, list[str], list[str]]] = {
    # parser, methods, arguments of all runs; attacks are of one run's model and cannot be averaged
    "tofu": (tofu, ["blur-target", "blur-npo", "npo", "uld"], []),
    "wmdp": (wmdp, ["blur-rmu", "rmu", "blur-npo", "npo"], ["--no_robustness"]),
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


@dataclass
class CompareArguments:
    """What is compared. All other arguments go to the runs."""

    benchmark: str = field(default="tofu", metadata={"choices": list(BENCHMARKS), "help": "What the runs are of."})
    methods: list[str] | None = field(
        default=None, metadata={"help": "Of the benchmark's --method (default: four of them)."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run each (default: 0 1 2)."})
    strengths: list[float] | None = field(default=None, metadata={"help": "Multiples of each method's own strength."})
    tolerance: float | None = field(
        default=None, metadata={"help": "Level: 1 - this, of the way to the retrained model (0.05)."}
    )
    utility: float | None = field(default=None, metadata={"help": "Equal utility: this share of the target's (0.95)."})
    output_dir: str = field(default="outputs/compare", metadata={"help": "With a folder for each run in it."})
    models_dir: str | None = field(
        default=None, metadata={"help": "Where tiny models are kept (default: beside the runs)."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"metavar": "TRUE", "help": "Go on with the comparison in --output_dir."}
    )
    launcher: str | None = field(
        default=None, metadata={"help": 'What starts a run (default: this Python), e.g. "accelerate launch".'}
    )


class Comparison(NamedTuple):
    """The options, the arguments that all runs share, what is read of a sweep, and the runs."""

    options: CompareArguments
    shared: list[str]
    read: dict[str, float]
    runs: list[Run]


def parse(arguments: Sequence[str] | None = None) -> Comparison:
    """The comparison that a command line asks for. Raises `ValueError` or `TypeError` if a run would do so."""
    parser = Parser((CompareArguments,), description=__doc__)  # type: ignore[arg-type]
    options, shared = parser.parse_args_into_dataclasses(
        with_config_as_words(checked_words(arguments)), return_remaining_strings=True
    )
    script, methods, always = BENCHMARKS[options.benchmark]
    shared += ["--compare", "none", "--models_dir", options.models_dir or str(Path(options.output_dir, "models"))]
    shared += always
    if re.search(r'--hub_token|"(use_auth_)?token"', shlex.join(shared)):
        raise ValueError("A token among the arguments would be written down: `hf auth login` instead.")
    read = {name: getattr(options, name) for name in ("tolerance", "utility") if getattr(options, name) is not None}
    if read and not options.strengths:
        raise ValueError(f"{', '.join(f'--{name}' for name in read)}: only a sweep reads it. Pass --strengths too.")
    check_factors(options.strengths or ())
    check_shares(**read)
    found = {}
    for method in options.methods or methods:  # wrong arguments are found before anything is trained
        _, found[method], *_ = script.parse(["--method", method, *shared])
        if options.launcher is None:
            check_launch(found[method], "pass --launcher 'accelerate launch'")
    return Comparison(options, shared, read, plan(found, options.seeds, options.strengths))


def begin(out: Path, resume: str | None, shared: Sequence[str]) -> None:
    """The folder, with the arguments of its runs in it: runs with others are not to be averaged with them."""
    noted = out / "arguments.txt"
    if noted.exists() and not resume:
        raise ValueError(f"{str(out)!r} holds a comparison: --resume_from_checkpoint true, or another --output_dir.")
    if noted.exists() and (before := noted.read_text()) != shlex.join(shared):
        raise ValueError(f"The comparison in {str(out)!r} was begun with {before!r}: pass the same.")
    check_output_dir(str(out))
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(noted, lambda partial: partial.write_text(shlex.join(shared)))


def program(options: CompareArguments) -> list[str]:
    """The words that start a run: the command of the benchmark, as a module, so that it needs no path."""
    if options.launcher is None:
        return [sys.executable, "-m", "blur_trainer", options.benchmark]
    launcher = shlex.split(options.launcher)
    module = "--module" if Path(launcher[0]).stem == "deepspeed" else "-m"
    return [*launcher, module, "blur_trainer", options.benchmark]


def finished(folder: Path, command: Sequence[str]) -> bool:
    """Whether there are results in a run's folder, which the command is to write. Its output goes to a log beside."""
    if (folder / "metrics.json").exists():
        return True
    log, interrupts = folder.with_name(f"{folder.name}.log"), []
    signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))  # the run gets it too: it saves, we wait
    with log.open("a") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupts:
        sys.stderr.write(f"Interrupted. {REMEDY}\n")
        raise TrainingInterrupted("Interrupted", REMEDY, signal.SIGINT)
    how, last = (f"FAILED (status {status}), see {log}", log.read_text().splitlines()[-5:]) if status else ("done", [])
    _say(f"{folder.name}: {how}", *(f"    {line}" for line in last))
    return status == 0


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Runs each method with each seed and strength; writes and prints mean and spread of their numbers.

    Args:
        arguments: the words of the command line; `None` for those of this process.

    Raises:
        ValueError, TypeError, OSError: something is wrong with the arguments. No run was started until then.
        TrainingInterrupted: on Ctrl+C, after the checkpoint of the run.
        SystemExit: no run finished.
    """
    options, shared, read, runs = parse(arguments)
    out, resume = Path(options.output_dir), options.resume_from_checkpoint
    begin(out, resume, shared)
    command = [*program(options), *shared, *(["--resume_from_checkpoint", "True"] if resume else [])]
    contents = {}
    for run in runs:
        folder = out / run.folder
        own = ["--method", run.method, "--seed", str(run.seed), *run.flags, "--output_dir", str(folder)]
        if finished(folder, [*command, *own]):
            contents[run] = json.loads((folder / "metrics.json").read_text())
    if not contents:
        raise SystemExit("No run finished.")
    content = joined(runs, contents)
    try:
        if options.strengths:
            content["footing"] = footing(contents, content, **READ.get(options.benchmark, {}), **read)
    except ValueError as error:  # hours of runs have their table all the same
        _say(f"No reading at equal forgetting: {error}")
    write_means(out, content)
    show(content)
    _say(f"\nReport: {write_report(out)}")


def show(content: Mapping[str, Any]) -> None:
    """The table, and what was read at equal forgetting and at equal utility. The rest is in the report."""
    _say(f"\n{format_table(content['columns'][:9], content['rows'])}")
    for reading in content.get("footing", {}).get("readings", []):
        _say(f"\n{reading['title']}\n{reading['note']}\n\n{format_table(reading['columns'], reading['rows'])}\n")
        _say(*(f"{row['name']} {row['said']}." for row in reading["rows"] if "said" in row))
        _say(*(f"Best, {verdict['column']}: {verdict['text']}." for verdict in reading["verdicts"]))


def _say(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
