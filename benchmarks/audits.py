"""Which method holds when it is attacked? Trains each as benchmarks/evidence.py does, and audits the model.

    python benchmarks/audits.py --world WORLD --out RESULTS --jobs 2                 # ten minutes of a core each
    python benchmarks/audits.py --world WORLD --out RESULTS --jobs 12 --device cuda  # several processes on one GPU
    python benchmarks/audits.py --world WORLD --out RESULTS --table                  # what there is so far
    python benchmarks/audits.py --world embedded-tofu --out RESULTS                  # two minutes of a core each

`WORLD`: a folder as of benchmarks/evidence_world.py. In `embedded-tofu` and `embedded-muse` the methods are those of
`unlearn`, with the settings that it derives. The strengths are those of the five seeds in docs/evidence.md. The
audit is `blur_trainer.audit` with the budget `minutes`, beside the retrained model; leak@32 of 64 samples is drawn for
the same rows. The target itself is the row of what all attacks find. Resumes: an audit that is done is not made again.
"""

import argparse
import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from evidence import baselines, prepared, quiet, replay_texts
from evidence_table import LABELS
from own_worlds import EMBEDDED, world
from tabulate import tabulate

from blur_trainer.pipeline.methods import METHODS

#: method -> strength; the first are the winners and losers of docs/evidence.md
STRENGTHS = {
    "blur-rmu-level": 0.1, "blur-target": 0.1, "blur-npo": 0.03, "uld": -1.0, "pdu": 300.0, "rmu": 0.001,
    "graddiff": 0.1, "blur-sam": 0.01, "undial": 1.0, "npo": 0.03, "rmu-level": 0.003, "simnpo": 0.3, "ngdiff": 0.001,
}  # fmt: skip
#: of `unlearn`, in an embedded world
DERIVED = ("blur", "blur-target", "blur-npo", "uld", "rmu", "graddiff", "undial", "npo", "simnpo")
SAMPLES, K = 64, 32
_SETS = ("forget", "retain", "hold")


def made(job: Mapping[str, Any], of: Any, folder: Path) -> str:
    """The folder of the unlearned model; trains it, if it is not there."""
    if job["method"] == "target":
        return of.target
    if (folder / "done").exists():
        return str(folder)
    shutil.rmtree(folder, ignore_errors=True)
    if job["world"] in EMBEDDED:
        import blur_trainer as bt

        sets, how = {role: of.sets[role] for role in _SETS}, {"use_cpu": job["device"] == "cpu", "disable_tqdm": True}
        bt.unlearn(of.target, **sets, output_dir=folder, method=job["method"], seed=job["seed"], **how)
    else:
        trainer = prepared(dict(job), folder)
        trainer.train()
        model = trainer.model
        if job["method"] == "uld":
            model = trainer.unlearned_model()
            model.config.weight = job["strength"]
        model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    (folder / "done").touch()
    return str(folder)


def one_audit(job: dict[str, Any]) -> dict[str, Any]:
    """Trains, audits, and draws samples."""
    quiet(1)
    import blur_trainer as bt

    of = world(job["world"], Path(job["out"]) / "models")
    start, out = time.perf_counter(), Path(job["out"]) / f"{job['method']} {job['seed']}"
    model = made(job, of, out / "model")
    trained = time.perf_counter() - start
    options = {"model_name_or_path": model, **{role: of.sets[role] for role in _SETS}, "retrained": of.retrained}
    if job["method"] != "target":
        options["before"] = of.target
    found = bt.audit({**options, "batch_size": 48}, out / "audit", seed=job["seed"])
    audited = time.perf_counter() - start - trained
    leak = leaks(model, options, job)
    return {
        "method": job["method"], "seed": job["seed"], "sentence": found.sentence,
        "attacks": [{key: value for key, value in one.items() if key not in ("rows", "more")}
                    for one in found.certificate["attacks"]],
        "leak": leak, "seconds": {"training": trained, "audit": audited},
    }  # fmt: skip


def leaks(model: str, options: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, float]:
    """leak@k of many samples, of 48 rows at equal distances."""
    import blur_trainer as bt
    from blur_trainer.pipeline.measure import Sets

    sets = Sets({name: value for name, value in options.items() if name in ("model_name_or_path", "forget")})
    evaluation = bt.LeakEvaluation(
        sets.tokenizer, sets.readings["forget"].dataset, samples=SAMPLES, ks=(1, K), max_rows=48, max_new_tokens=48,
        batch_size=512 if job["device"] == "cuda" else 64, seed=job["seed"], progress=False,
    )  # fmt: skip
    return evaluation(sets.load(model))


def perform(jobs: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """All that is not done yet, in this order, by so many processes."""
    path = options.out / "audits.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    done = {(row["method"], row["seed"]) for row in rows}
    waiting = [job for job in jobs if (job["method"], job["seed"]) not in done]
    end = time.monotonic() + 60 * options.minutes
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(one_audit, waiting.pop(0)) for _ in range(min(options.jobs, len(waiting)))}
        while running:
            future = next(as_completed(running))
            running.remove(future)
            if waiting and time.monotonic() < end:
                running.add(pool.submit(one_audit, waiting.pop(0)))
            try:
                row = future.result()
            except Exception as error:  # noqa: BLE001 -- one that fails stops no other
                print(f"failed: {type(error).__name__}: {error}", flush=True)
                continue
            rows.append(row)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            took = {name: round(value) for name, value in row["seconds"].items()}
            print(f"{row['method']} {row['seed']}, {took} s: {row['sentence']}; {row['leak']}", flush=True)
    return rows


# ---- the table ----

#: column -> kinds of attacks
COLUMNS = {
    "plain": ("plain",), "bits, prompts, noise, pruning": ("bits", "prompt", "weights"),
    "relearned other text": ("relearning retain", "relearning hold"), "relearned forget": ("relearning forget",),
}  # fmt: skip


def attacks(row: Mapping[str, Any], kinds: Sequence[str]) -> list[Mapping[str, Any]]:
    """Those of these kinds; of a relearning also by the text, as `relearning forget`."""

    def of(one: Mapping[str, Any]) -> set[str]:
        return {one["kind"], f"{one['kind']} {one['settings'].get('text')}"}

    return [one for one in row["attacks"] if of(one) & set(kinds)]


def strongest(row: Mapping[str, Any], kinds: Sequence[str]) -> Mapping[str, Any]:
    """The attack whose probability of the true answer is most above its control."""
    done = [one for one in attacks(row, kinds) if "probability" in one["numbers"]]  # some models do not allow some
    return max(done, key=lambda one: one["numbers"]["probability"] - one["control"]["probability"])


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if not values or any(math.isnan(value) for value in values):
        return ""
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def cell(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str], side: str = "numbers") -> str:
    found = [strongest(row, kinds) for row in rows]
    rouge, probability = ([one[side][name] for one in found] for name in ("rouge", "probability"))
    back = sum(any(one["recovered"] for one in attacks(row, kinds)) for row in rows) if side == "numbers" else 0
    return f"{spread(rouge)}; {spread(probability)}" + (f" (**{back}**)" if back else "")


def look_inside(rows: Sequence[Mapping[str, Any]], name: str, number: str) -> str:
    found = [one for row in rows for one in row["attacks"] if one["name"] == name]
    back = sum(bool(one["recovered"]) for one in found)
    return spread([one["numbers"][number] for one in found]) + (f" (**{back}**)" if back else "")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """ROUGE; probability after the strongest attack of each kind. In brackets: in how many seeds it came back."""
    lines = []
    for method in dict.fromkeys(["target", *STRENGTHS, *DERIVED]):
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue
        back = [sum(bool(one["recovered"]) for one in row["attacks"]) for row in own]
        leak, bound = (max(row["leak"][key] for row in own) for key in (f"leak@{K}", "leak_bound"))
        lines.append([
            LABELS.get(method, METHODS[method].label if method in METHODS else method),
            len(own), f"{fmean(back):.1f} of {len(own[0]['attacks'])}",
            *(cell(own, kinds) for kinds in COLUMNS.values()), f"{leak:.2f}, {bound:.4f}",
            look_inside(own, "probes", "largest_gap"), look_inside(own, "depth", "depth"),
        ])  # fmt: skip
    others = [row for row in rows if row["method"] != "target"]
    control = [cell(others, kinds, "control") for kinds in COLUMNS.values()] if others else []
    lines.append(["retrained model, the control", "", "", *control, "", "0", "1"])
    heads = ["method", "seeds", "came back", *COLUMNS, f"leak@{K}, bound of leak@1", "probes: gap", "depth"]
    return tabulate(lines, heads, tablefmt="pipe", disable_numparse=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", required=True)
    parser.add_argument("--out", type=Path, required=True)
    names = dict.fromkeys(["target", *STRENGTHS, *DERIVED])
    parser.add_argument("--methods", nargs="+", choices=names, help="default: all of the world")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one core each")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no audit after so many")
    parser.add_argument("--settings", type=json.loads, default={}, help="of all trainings, as JSON")
    parser.add_argument("--table", action="store_true", help="print the table of what there is")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    quiet(1)
    if options.table:
        lines = (options.out / "audits.jsonl").read_text(encoding="utf-8").splitlines()
        print(table([json.loads(line) for line in lines]))
        return
    common = {"world": options.world, "out": str(options.out), "device": options.device, "settings": options.settings}
    world(options.world, options.out / "models")  # makes the models of an embedded one
    methods = options.methods or ["target", *(DERIVED if options.world in EMBEDDED else STRENGTHS)]
    if options.world not in EMBEDDED:
        base = baselines(Path(options.world), options.out / "baselines.json", options.device)
        texts = replay_texts(Path(options.world), options.out, options.device)
        common |= {"level": base["unseen"]["loss"], "replay": str(texts)}
    jobs = [
        {**common, "method": method, "seed": seed, "strength": STRENGTHS.get(method)}
        for seed in options.seeds
        for method in methods
        if method != "target" or seed == options.seeds[0]
    ]
    print(table(perform(jobs, options)))


if __name__ == "__main__":
    main()
