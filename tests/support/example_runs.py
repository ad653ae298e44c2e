"""Runs of the examples: in a process of its own, on prepared models, and what they leave."""

import json
import os
import subprocess
import sys

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
