"""Collects the rows of a run's table model by model, and writes `metrics.json` for the report."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedModel

from blur_trainer._version import __version__
from blur_trainer.atomic_write import atomic_write
from blur_trainer.credentials import without_tokens
from blur_trainer.evaluation.base import Column, Evaluation, Measure, as_evaluation

if TYPE_CHECKING:
    from blur_trainer.evaluation.inside.choices import ChoiceProbes
    from blur_trainer.evaluation.inside.patching import UnlearningDepth
    from blur_trainer.evaluation.inside.probes import LayerProbes

Kind = Literal["target", "unlearned", "baseline", "retrain"]
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "trl")


class Results:
    """
    Evaluates models one after another and keeps the results for tables and the report.

    Args:
        benchmark: name of the benchmark and the corpus, for the report's title.
        evaluation: an [`Evaluation`], run by [`add`] for each model. Or a function from a model to a dict of numbers,
            whose keys are the columns.
        plane: the metrics on the axes of the forget-retain plane, `{"x": ..., "y": ...}`. Default: no such figure.
        samples: texts per metric that are kept of each model.

    ```python
    results = Results("MUSE (news)", evaluation, plane={"x": "forget_knowmem", "y": "retain_knowmem"})
    results.add("target", "target", model)
    print(format_table(results.columns, results.rows))
    results.save(output_dir, settings={"gamma": 0.1})
    ```
    """

    def __init__(
        self,
        benchmark: str,
        evaluation: Evaluation | Measure,
        *,
        plane: Mapping[str, str] | None = None,
        samples: int = 1,
    ):
        self.benchmark = benchmark
        self.evaluation = as_evaluation(evaluation)
        self.plane = dict(plane or {})
        self.rows: list[dict[str, Any]] = []
        self.stages: list[dict[str, Any]] = []
        self.robustness: dict[str, Any] = {}
        self.inside: dict[str, Any] = {}
        #: of a run on one's own data: a `Verdict`
        self.verdict: Any = None
        #: further tables of the report and of the card: title, said, heads, rows
        self.tables: list[dict[str, Any]] = []
        #: whether a training belongs to the numbers; the report misses its log otherwise
        self.trained = True
        self._num_samples = samples
        self._samples: dict[tuple[str, str], dict[str, Any]] = {}

    @property
    def columns(self) -> list[Column]:
        """What the table shows of each metric. Of a function: known once a model has been added."""
        return list(self.evaluation.columns)

    def add(self, name: str, kind: Kind, model: PreTrainedModel, seconds: float | None = None) -> dict[str, float]:
        """Evaluates `model` as the row `name`. `seconds` is the time of its unlearning."""
        metrics = self.evaluation(model)
        self.rows.append({"name": name, "kind": kind, "metrics": metrics, "seconds": seconds})
        for sample in self.evaluation.samples(self._num_samples):
            entry = {"prompt": sample["prompt"], "reference": sample["gt"], "responses": {}}
            entry |= {"set": sample["set"]} if "set" in sample else {}
            kept = self._samples.setdefault((sample["metric"], sample["prompt"]), entry)
            kept["responses"][name] = sample["response"]
        return metrics

    def add_stage(self, name: str, metrics: Mapping[str, float]) -> None:
        """Adds the metrics after one stage of a protocol with several forget sets (sequential or growing)."""
        shown = {column["name"]: metrics[column["name"]] for column in self.columns if column["name"] in metrics}
        self.stages.append({"name": name, "metrics": shown})

    def add_robustness(self, found: Mapping[str, Any]) -> None:
        """What [`~blur_trainer.evaluation.robustness.battery.robustness`] found of the unlearned model."""
        self.robustness = dict(found)

    def add_inside(
        self,
        *,
        probes: "LayerProbes | None" = None,
        depth: "UnlearningDepth | None" = None,
        choices: "Mapping[str, ChoiceProbes] | None" = None,
    ) -> None:
        """
        What was found inside the models, layer by layer.

        Args:
            probes: of [`~blur_trainer.evaluation.inside.probes.probe_layers`].
            depth: of [`~blur_trainer.evaluation.inside.patching.unlearning_depth`].
            choices: name of a model -> what [`~blur_trainer.evaluation.inside.choices.probe_choices`] found in it.
        """
        for name, found in {"probes": probes, "depth": depth}.items():
            if found is not None:
                self.inside[name] = asdict(found)
        if choices:
            self.inside["choices"] = [{"name": name, **asdict(found)} for name, found in choices.items()]

    def save(self, output_dir: str | os.PathLike[str], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Writes `metrics.json` atomically, without access tokens in `settings`, and returns its content."""
        content: dict[str, Any] = {
            "benchmark": self.benchmark,
            "columns": self.columns,
            "plane": self.plane,
            "rows": self.rows,
            "settings": {**without_tokens(settings), "environment": package_versions(*_PACKAGES)},
            "samples": list(self._samples.values()),
        }
        if self.stages:
            content["stages"] = self.stages
        if self.robustness:
            content["robustness"] = self.robustness
        if self.inside:
            content["inside"] = self.inside
        if self.verdict is not None:
            content["verdict"] = asdict(self.verdict)
        if self.tables:
            content["tables"] = self.tables
        if not self.trained:
            content["trained"] = False
        path = Path(output_dir) / "metrics.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=2) + "\n"
        atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8"))
        return content


def package_versions(*names: str) -> dict[str, str]:
    """Our own version and those of other packages. Ours is there too where the package is not installed."""
    return {"blur_trainer": __version__, **{name: version(name) for name in names}}
