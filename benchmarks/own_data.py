"""Do the defaults of `unlearn` forget to the level, with nothing chosen but model, forget and retain?

    python benchmarks/own_data.py --world WORLD --out RESULTS              # five seeds; about 4 minutes each on a core
    python benchmarks/own_data.py --world WORLD --out RESULTS --lora       # the same with LoRA
    python benchmarks/own_data.py --world WORLD --out RESULTS --faults     # settings that are wrong: what is said?
    python benchmarks/own_data.py --world WORLD --out RESULTS --device cuda --options '{"learning_rate": 3e-4}'
    python benchmarks/own_data.py --world embedded-tofu --out RESULTS --architecture qwen2 --width 192
    python benchmarks/own_data.py --world embedded-tofu --out RESULTS --system

`WORLD`: a folder as of benchmarks/evidence_world.py, `embedded-tofu` or `embedded-muse`. `hold` and `facts` are only
measured; the level is the estimate that needs no further data. `--unseen` gives unseen rows, too. Resumes: a run that
is in RESULTS/runs.jsonl is not made again.
"""

import argparse
import contextlib
import io
import json
import time
from pathlib import Path

import torch
from evidence_data import known, said
from own_worlds import ARCHITECTURES, World, reshaped, with_system_prompt, world

#: name -> options that are wrong, or sets that are
FAULTS = {
    "lr 1e-7": {"learning_rate": 1e-7},
    "lr 1e-1": {"learning_rate": 1e-1},
    "gamma 0": {"gamma": 0.0},
    "gamma 10": {"gamma": 10.0},
    "swapped sets": {"forget": "retain", "retain": "forget"},
    "unknown forget set": {"forget": "unseen"},
    "forget = retain": {"retain": "forget"},
}


def one_run(of: World, out: Path, name: str, options: dict, device: str) -> dict:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from blur_trainer import unlearn

    given = {role: options.pop(role, role) for role in ("forget", "retain", "hold")}
    sets = {role: of.sets[each] for role, each in given.items()}
    if options.pop("unseen", False):
        sets["unseen"] = of.sets["unseen"]
    options["use_cpu"] = device == "cpu"
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        done = unlearn(of.target, **sets, output_dir=out / name, **options)
    found = {"name": name, "word": done.verdict.word, "sentence": str(done.verdict)}
    found["seconds"] = time.perf_counter() - start
    for when in ("before", "after"):
        found |= {f"{when}_{key}": value for key, value in done.metrics[when].items()}
    saved = any((out / name / file).exists() for file in ("config.json", "adapter_config.json"))
    if of.facts and saved:
        model = AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32).to(device)
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        found |= {f"facts_{key}": value for key, value in known(model, tokenizer, of.facts[:200]).items()}
        found["facts_rouge"] = said(model, tokenizer, of.facts[:100])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--unseen", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--architecture", choices=ARCHITECTURES, help="another model of a world that is embedded")
    parser.add_argument("--width", type=int, default=192, help="of that model")
    parser.add_argument("--system", action="store_true", help="all questions behind a system prompt of 38 tokens")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--options", type=json.loads, default={}, help="of `unlearn`, as JSON; they name the run, too")
    words = parser.parse_args()
    torch.set_num_threads(1)
    words.out.mkdir(parents=True, exist_ok=True)
    path = words.out / "runs.jsonl"
    done = {json.loads(line)["name"] for line in path.read_text().splitlines()} if path.exists() else set()
    if words.faults:
        jobs = {name: {**options, "num_train_epochs": 3, "eval_rows": 100} for name, options in FAULTS.items()}
    else:
        kind = {**({"use_peft": True} if words.lora else {}), **({"unseen": True} if words.unseen else {})}
        more = [f"{key} {value}" for key, value in words.options.items()]
        what = f"{'lora' if words.lora else 'full'}{', unseen' if words.unseen else ''}"
        jobs = {f"{what} seed {seed}": {"seed": seed, **kind} for seed in words.seeds}
        more += [f"{words.architecture} {words.width}"] if words.architecture else []
        more += ["system prompt"] if words.system else []
        jobs = {", ".join((name, *more)): options for name, options in jobs.items()}
    of = world(words.world, words.out / "models")
    if words.architecture:
        of = reshaped(of, words.architecture, words.width, words.out / "models")
    if words.system:
        of = with_system_prompt(of, words.out / "models")
    for name, options in jobs.items():
        if name in done:
            continue
        found = one_run(of, words.out, name, {"disable_tqdm": True, **options, **words.options}, words.device)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        shown = {
            "forget": f"{found['after_forget_loss']:.2f} / {found['after_forget_rouge']:.2f}",
            **{
                role: f"{found[f'after_{role}_rouge'] / found[f'before_{role}_rouge']:.3f}"
                for role in ("retain", "hold")
                if found.get(f"before_{role}_rouge")
            },
        }
        print(f"{name}: {shown}, {found['seconds']:.0f} s\n  {found['sentence']}", flush=True)


if __name__ == "__main__":
    main()
