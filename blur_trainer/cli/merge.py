"""`blur-trainer merge ADAPTER OUTPUT`: an adapter and its base become one model."""

import argparse
from collections.abc import Sequence

from blur_trainer.cli.outcome import outcome
from blur_trainer.saving.merging import merge_and_save


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("blur-trainer merge", description=__doc__)
    parser.add_argument("adapter", help="what a training with --use_peft has saved: a folder, or a name on the Hub")
    parser.add_argument("output_dir", help="a new folder")
    parser.add_argument("--base_model", help="default: the model that the adapter was trained on")
    parser.add_argument("--dtype", default="auto", help="of the weights; default: as they are stored")
    words = parser.parse_args(arguments)
    with outcome("merge") as done:
        merge_and_save(words.adapter, words.output_dir, base_model=words.base_model, dtype=words.dtype)
        done.say(f"The whole model is in {words.output_dir}.")
    return done.code
