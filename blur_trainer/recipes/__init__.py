"""Hyper-parameters that others have published, as data: one JSON file per benchmark, one entry per recipe."""

import copy
import json
from functools import cache
from importlib.resources import files
from typing import Any

BENCHMARKS = ("muse-news", "muse-books", "tofu", "wmdp")


def recipe(benchmark: str, name: str) -> dict[str, Any]:
    """
    A published setting.

    Args:
        benchmark (`str`):
            `"muse-news"`, `"muse-books"`, `"tofu"` or `"wmdp"`.
        name (`str`):
            One of `recipe_names(benchmark)`. `"paper"`: what BLUR's paper says. `"official"`: what its code does
            unchanged. Other names are those of the method or its authors.

    Returns:
        `dict` (a copy that you may change):

        - `model_name_or_path`: the model to unlearn from;
        - `method`: the `--method` of the example, if the benchmark has several trainers;
        - `arguments`: keyword arguments of the configuration, for one process ([`BLURConfig`], or that of `method`);
        - `script`: options of the benchmark's example beside them (tokenizer, split, prompt format, dtype);
        - `source`: name of each of these -> where it was read;
        - `published`: the published results, a list of `what`, `metrics`, `source`;
        - `notes`: departures of the code from the paper, our departures from the code, and what was not found.

    Raises:
        `ValueError`: there is no such benchmark or recipe.

    ```python
    config = bt.BLURConfig("out", **bt.recipe("muse-news", "paper")["arguments"])
    ```
    """
    recipes = _read(benchmark)
    if name not in recipes:
        raise ValueError(f"{benchmark} has no recipe {name!r}; there are: {', '.join(recipes)}.")
    return copy.deepcopy(recipes[name])


def recipe_names(benchmark: str) -> list[str]:
    """Names of a benchmark's recipes. Raises `ValueError` if there is no such benchmark."""
    return list(_read(benchmark))


@cache
def _read(benchmark: str) -> dict[str, Any]:
    if benchmark not in BENCHMARKS:
        raise ValueError(f"There are no recipes for {benchmark!r}; there are for: {', '.join(BENCHMARKS)}.")
    return json.loads(files(__name__).joinpath(f"{benchmark}.json").read_text(encoding="utf-8"))
