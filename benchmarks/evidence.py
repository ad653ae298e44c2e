"""Which method forgets real text to the level of a model that never saw it, and keeps the rest?

    python benchmarks/evidence.py --world WORLD --out RESULTS --jobs 2                # hours on two cores; resumes
    python benchmarks/evidence.py --world WORLD --out RESULTS --jobs 8 --device cuda  # several processes on one GPU
    python benchmarks/evidence.py --world WORLD --out RESULTS --table                 # what there is so far

`WORLD`: a folder as of benchmarks/evidence_world.py. Every method tries three strengths on a seed that no table
reports, at half of the length. The same rule chooses one for all: of those that reach the level the one that keeps
most of the first half of `hold`, else the one that forgets most. Reported are five other seeds, `facts`, and the second
half of `hold`. The level: a forget loss of at least .9 of the retrained model's, a ROUGE within .10 of its. Every
method trains on the retain set and on the same texts that the target said itself (`--no-replay`: on the retain set
alone). Other settings, as of `--settings`, want another `--out`.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from evidence_methods import CANDIDATES, ULD
from evidence_table import chosen_strength, table

TUNING_SEED, SEEDS = 7, (0, 1, 2, 3, 4)
NAMES = [*CANDIDATES, "uld"]


def quiet(threads: int) -> None:
    import logging

    import datasets
    import torch
    from transformers.utils import logging as of_transformers

    torch.set_num_threads(threads)
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)


def loaded(folder: Path, device: str, attention: str = "sdpa"):
    import torch
    from transformers import AutoModelForCausalLM

    how = {"dtype": torch.float32, "attn_implementation": attention}
    return AutoModelForCausalLM.from_pretrained(folder, **how).to(device)


def replay_texts(world: Path, out: Path, device: str) -> Path:
    """The file of texts that the target says itself, made once."""
    path = out / "replay.jsonl"
    if not path.exists():
        from evidence_data import read_world
        from transformers import AutoTokenizer

        import blur_trainer as bt

        sets, tokenizer = read_world(world), AutoTokenizer.from_pretrained(world / "target")
        found = bt.replay(
            loaded(world / "target", device, "eager"),  # the filter by loss needs forward-mode differentiation
            tokenizer,
            num=2048,
            forget=sets["forget"],
            retain=sets["retain"],
            prompts=["Question:"],
            max_new_tokens=160,
            max_length=512,
            batch_size=128,
        )
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found["text"]), encoding="utf-8")
    return path


def prepared(job: dict[str, Any], folder: Path) -> Any:
    """The trainer of a method with a strength and a seed."""
    from evidence_data import read_world
    from transformers import AutoTokenizer

    import blur_trainer as bt

    world = Path(job["world"])
    sets, tokenizer = read_world(world), AutoTokenizer.from_pretrained(world / "target")
    retain: Any = sets["retain"]
    if job["replay"]:
        texts = Path(job["replay"]).read_text(encoding="utf-8").splitlines()
        retain = {"retain": retain, "replay": [json.loads(line) for line in texts]}
    where = {"seed": job["seed"], "use_cpu": job["device"] == "cpu", **job["settings"]}
    candidate = ULD if job["method"] == "uld" else CANDIDATES[job["method"]]
    config = {**candidate.config(job["strength"], job["level"]), **where}
    if job["seed"] == TUNING_SEED:
        config["num_train_epochs"] /= 2
    target = loaded(world / "target", job["device"])
    if job["method"] == "uld":
        how = {"augment_forget": "rules", "augment_retain": "none"}
        args = bt.ULDConfig(str(folder), **config)
        return bt.ULDTrainer(target, args, sets["forget"], retain, processing_class=tokenizer, **how)
    args = bt.UnlearningConfig(str(folder), **config)
    return bt.UnlearningTrainer(target, args, sets["forget"], retain, processing_class=tokenizer)


def one_run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains a method with a strength and a seed and measures it. ULD: one row per strength, of one training."""
    quiet(1)
    from evidence_data import measured, read_world

    start, sets = time.perf_counter(), read_world(Path(job["world"]))
    said = {key: job[key] for key in ("method", "seed")} | {"replay": bool(job["replay"])}
    with tempfile.TemporaryDirectory() as folder:
        trainer = prepared(job, Path(folder))
        tokenizer = trainer.processing_class
        try:
            trainer.train()
        except (RuntimeError, ValueError, ArithmeticError) as error:  # a ruined model is a result, too
            return [{**said, "strength": job["strength"], "failed": f"{type(error).__name__}: {error}"[:300]}]
        seconds, rows = time.perf_counter() - start, []
        if job["method"] != "uld":
            numbers = measured(trainer.model, tokenizer, sets)
            return [{**said, "strength": job["strength"], "train_seconds": seconds, **numbers}]
        unlearned = trainer.unlearned_model()
        for weight in job["strengths"]:
            unlearned.config.weight = weight
            rows.append({**said, "strength": weight, "train_seconds": seconds, **measured(unlearned, tokenizer, sets)})
    return rows


def baselines(world: Path, path: Path, device: str) -> dict[str, dict[str, float]]:
    """What target and retrained model know, and the level: the target's loss on text that nobody saw."""
    if not path.exists():
        from evidence_data import known, measured, read_world
        from transformers import AutoTokenizer

        sets, tokenizer = read_world(world), AutoTokenizer.from_pretrained(world / "target")
        found = {name: measured(loaded(world / name, device), tokenizer, sets) for name in ("target", "retrain")}
        found["unseen"] = known(loaded(world / "target", device), tokenizer, sets["unseen"])
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


class Sweep:
    """The runs that are there, and those that are to be made."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.path = options, options.out / "runs.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.rows = [json.loads(line) for line in lines]
        self.end = time.monotonic() + 60 * options.minutes

    def perform(self, jobs: list[dict[str, Any]], devices: list[str]) -> None:
        """All of these that are not there yet, in their order, on as many processes as there are devices."""
        done = {(row["method"], row["seed"], row["strength"], row["replay"]) for row in self.rows}
        missing = [
            job
            for job in jobs
            if any((job["method"], job["seed"], s, bool(job["replay"])) not in done for s in job["strengths"])
        ]
        context = multiprocessing.get_context("spawn")
        pools = {device: ProcessPoolExecutor(devices.count(device), mp_context=context) for device in set(devices)}
        waiting, running = missing, {}

        def give(device: str) -> None:
            if waiting and time.monotonic() < self.end:
                running[pools[device].submit(one_run, {**waiting.pop(0), "device": device})] = device

        for device in devices:
            give(device)
        while running:
            future = next(as_completed(running))
            device = running.pop(future)
            for row in future.result():
                self.rows.append({**row, "device": device})
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(self.rows[-1]) + "\n")
                print(
                    ", ".join(
                        f"{key} {value:.3g}" if isinstance(value, float) else f"{value}" for key, value in row.items()
                    ),
                    flush=True,
                )
            give(device)
        for pool in pools.values():
            pool.shutdown()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes on the device, one core each")
    parser.add_argument("--cpu_jobs", type=int, default=0, help="with --device cuda: further processes on the CPU")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after so many")
    parser.add_argument("--chosen", type=json.loads, default={}, help="strengths by method, as JSON: nothing is tried")
    parser.add_argument("--settings", type=json.loads, default={}, help="of all trainings, as JSON")
    parser.add_argument("--no-replay", action="store_true", help="train on the retain set alone")
    parser.add_argument("--table", action="store_true", help="print the tables of what there is")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(options)
    if not options.table:
        quiet(1)
        base = baselines(options.world, options.out / "baselines.json", options.device)
        replay = None if options.no_replay else str(replay_texts(options.world, options.out, options.device))
        common = {"world": str(options.world), "level": base["unseen"]["loss"], "replay": replay}
        common["settings"] = options.settings
        devices = [options.device] * options.jobs + ["cpu"] * options.cpu_jobs

        def job(method: str, seed: int, strengths: tuple[float, ...]) -> dict[str, Any]:
            return {**common, "method": method, "seed": seed, "strengths": strengths, "strength": strengths[0]}

        first = []
        for name in [name for name in options.methods if name not in options.chosen]:
            tried = ULD.strengths if name == "uld" else CANDIDATES[name].strengths
            each = [tried] if name == "uld" else [(strength,) for strength in tried]
            first += [job(name, TUNING_SEED, strengths) for strengths in each]
        sweep.perform(first, devices)
        best = {name: chosen_strength(sweep.rows, name, base, TUNING_SEED, bool(replay)) for name in options.methods}
        best |= options.chosen
        sweep.perform(
            [
                job(name, seed, (best[name],))
                for seed in options.seeds
                for name in options.methods
                if best[name] is not None
            ],
            devices,
        )
    base = json.loads((options.out / "baselines.json").read_text(encoding="utf-8"))
    print(table(sweep.rows, base, TUNING_SEED))


if __name__ == "__main__":
    main()
