"""Runs of the examples: in a process of its own, on prepared models, and what they leave."""

import json
import os
import subprocess
import sys

import blur_trainer as bt
from blur_trainer.data.subset import limit_rows
from blur_trainer.scripts import tiny, tofu, wmdp
from blur_trainer.toy.model import tiny_llama, train_tokenizer
from blur_trainer.toy.muse import muse_corpora, training_texts

FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "metrics.json",
    "model.safetensors",
    "reference_logps.safetensors",
    "report.html",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_args.bin",
}
PRECOMPUTED = {"reference_logps.safetensors"}  # of NPO


def load(folder, name="metrics.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def launch(*command, folder):
    """A process of its own, one thread, no network."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def as_the_hub(folder):
    """MUSE-News as the Hub has it: {config}/{split}.json, `retain1`, no hold groups."""
    for key, rows in muse_corpora(num_authors=16).items():
        config, split = key.split("_", 1)
        if "hold" in split.split("_") or key == "verbmem_retain":
            continue
        path = folder / config / f"{'retain1' if key == 'raw_retain' else split}.json"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(json.dumps(rows.to_list()), encoding="utf-8")
    return folder


def with_ignorant_models(folder, data):
    """`target/` and `retrain/` where the example looks for those it made before."""
    tokenizer = train_tokenizer(training_texts(data)["text"])
    for seed, name in enumerate(("target", "retrain")):
        tiny_llama(tokenizer, hidden_size=16, num_layers=1, num_heads=2, seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def _ignorant(folder, tokenizer, dataset, **_):
    """What stands for a memorized model: the right vocabulary, and nothing known."""
    tiny_llama(tokenizer, hidden_size=16, num_heads=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def prepared(name, folder, monkeypatch):
    """Models where the example `name` looks for its own, and the arguments of a run on data as small as it gets."""
    short = ["--eval_strategy", "no", "--output_dir", str(folder / "run")]
    if name == "run_muse":  # one text a stage: fewer than processes
        news = as_the_hub(folder / "news")
        with_ignorant_models(folder / "run", bt.load_muse("news", news))
        return [*short, "--data_dir", str(news)]
    monkeypatch.setattr(tiny, "memorized", _ignorant)
    short += ["--models_dir", str(folder / "models")]
    if name == "run_wmdp":
        wmdp.tiny_models(wmdp.parse(short)[0], ["potions", "machines"])
        return short
    tofu.tiny_models(limit_rows(bt.load_tofu("embedded", "forget10"), 3), tofu.parse(short)[0])
    return [*short, "--max_rows", "3"]
