"""`blur-trainer recipes [BENCHMARK [NAME]]`: published settings, by benchmark and by name."""

import argparse
import json
from collections.abc import Sequence

from blur_trainer.cli.outcome import outcome
from blur_trainer.recipes import BENCHMARKS, recipe, recipe_names


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("blur-trainer recipes", description=__doc__)
    parser.add_argument("benchmark", nargs="?", help=f"one of {', '.join(BENCHMARKS)}; left out: all names")
    parser.add_argument("name", nargs="?", help="left out: the names of the benchmark's recipes")
    words = parser.parse_args(arguments)
    with outcome("recipes") as done:
        if words.name:
            done.say(json.dumps(recipe(words.benchmark, words.name), indent=2, ensure_ascii=False))
        else:
            for benchmark in [words.benchmark] if words.benchmark else BENCHMARKS:
                done.say(f"{benchmark}: {', '.join(recipe_names(benchmark))}")
    return done.code
