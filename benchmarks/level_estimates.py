"""How far are the sources of a level from the loss of a retrained model?

    python benchmarks/level_estimates.py --out RESULTS                  # the embedded worlds; five minutes on a core
    python benchmarks/level_estimates.py --out RESULTS --world WORLD    # also a folder as of evidence_world.py

Prints one row per model: what the retrained model loses on the forget set, in nats per token; as shares of that the
loss of unseen rows, the estimate `Level.of_exchanged` with a share of 2 % (the default) and with others, and by token
ids. Below: mean and spread (of logarithms), least and largest. `unseen rows' own`: the estimate made of the unseen
rows, as a share of what they cost.
"""

import argparse
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from own_worlds import EMBEDDED, World, reshaped, with_retrained, with_system_prompt, world
from transformers import AutoModelForCausalLM, AutoTokenizer

import blur_trainer as bt
from blur_trainer.data.formats import tokenize_dataset

SHARES = (0.02, 0.01, 0.015, 0.03, 0.05)


def shares(of: World) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(of.target)
    names = (of.target, of.retrained)
    before, retrained = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in names)
    forget, retain, unseen = (of.sets[name] for name in ("forget", "retain", "unseen"))
    truth = bt.Level.of_retrained(retrained, forget, tokenizer).nats
    cost = bt.Level.of_unseen(before, unseen, tokenizer).nats
    found = {"retrained": truth, "unseen": cost / truth}
    for share in SHARES:
        with patch("blur_trainer.data.exchange.OWN", share):
            found[f"{share:.1%}"] = bt.Level.of_exchanged(before, forget, retain, tokenizer).nats / truth
    ids = [tokenize_dataset(rows, tokenizer, role="forget", max_length=512) for rows in (forget, retain)]
    found["token ids"] = bt.Level.of_exchanged(before, *ids).nats / truth
    found["unseen rows' own"] = bt.Level.of_exchanged(before, unseen, retain, tokenizer).nats / cost
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--world", nargs="*", default=[])
    words = parser.parse_args()
    torch.set_num_threads(1)
    models = words.out / "models"
    tofu, muse = (world(name, models) for name in EMBEDDED)
    worlds = [world(name, models) for name in words.world] + [tofu, muse, with_system_prompt(tofu, models)]
    worlds += [reshaped(of, kind, 192, models) for of in (tofu, muse) for kind in ("qwen2", "gpt_neox")]
    rows = {of.name: shares(with_retrained(of)) for of in worlds}
    columns = list(rows["tofu"])
    print("| model |" + "".join(f" {name} |" for name in columns))
    for name, found in rows.items():
        print(f"| {name} |" + "".join(f" {found[column]:.2f} |" for column in columns))
    logs = {name: np.log([found[name] for found in rows.values()]) for name in columns[1:]}
    for what, say in (
        ("mean", lambda x: f"{np.exp(x.mean()):.2f} ± {x.std():.2f}"),
        ("range", lambda x: f"{np.exp(x.min()):.2f} to {np.exp(x.max()):.2f}"),
    ):
        print(f"| {what} | |" + "".join(f" {say(logs[name])} |" for name in columns[1:]))


if __name__ == "__main__":
    main()
