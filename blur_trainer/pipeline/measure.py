"""Measures models on one's own sets, whoever made them: one table, and a verdict where there is a model before."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from trl import ModelConfig

from blur_trainer.checks import check_fields
from blur_trainer.evaluation.forget import ForgetEvaluation
from blur_trainer.evaluation.level import Level
from blur_trainer.models.loading import check_model, hub_arguments
from blur_trainer.pipeline.arguments import SETS, SetArguments, SourceArguments
from blur_trainer.pipeline.quiet import quiet
from blur_trainer.pipeline.sets import made, read_set, read_tokenizer
from blur_trainer.report.results import Kind, Results
from blur_trainer.report.verdict import Verdict, judge
from blur_trainer.scripts.loading import ModelLoader
from blur_trainer.trainers.config import UnlearningConfig


@dataclass
class MeasureArguments(SetArguments):
    """What is measured, of which model."""

    before: str | None = field(default=None, metadata={"help": "The model before unlearning: then there is a verdict."})
    drop_empty: bool = field(default=False, metadata={"help": "Leave out rows without a question, answer or text."})
    batch_size: int = field(default=16, metadata={"help": "Rows per forward pass."})
    max_length: int | None = field(default=None, metadata={"help": "Longest example in tokens."})
    qa_template: str = field(
        default="Question: {question}\nAnswer:", metadata={"help": "Prompt where there is no chat template."}
    )


@dataclass(frozen=True)
class Measured:
    """The rows of the table; the verdict, if there is a model before."""

    results: Results
    verdict: Verdict | None


CLASSES = (MeasureArguments, SourceArguments, ModelConfig)
NAME = "model"
_RANGES = {"eval_rows": "[1, inf)", "batch_size": "[1, inf)", "max_length": "[2, inf)"}


class Sets:
    """Tokenizer, sets and loader of a measurement. Raises `ValueError` for what is missing or cannot be read."""

    def __init__(self, options: Mapping[str, Any]):
        self.script, source, model_args = (made(of, {"dtype": None, **options}) for of in CLASSES)
        if not model_args.model_name_or_path or self.script.forget is None:
            raise ValueError("Give `model_name_or_path` (the model) and `forget` (what it was to forget).")
        self.model = str(model_args.model_name_or_path)
        check_fields(self.script, _RANGES, skipped=SETS)  # sets may be in memory
        hub = hub_arguments({"revision": model_args.model_revision})
        for name in (self.model, self.script.before, self.script.retrained):
            if name is not None:
                check_model(name, hub if name == self.model else hub_arguments({}))
        self.tokenizer = read_tokenizer(self.script.tokenizer or self.model, source.chat_template, hub)
        asked = [role for role in SETS if getattr(self.script, role) is not None]
        self.readings = {
            role: read_set(role, self.script, source, self.tokenizer, self.script.drop_empty) for role in asked
        }
        self.args = UnlearningConfig("measured", report_to="none")
        self.load = ModelLoader(self.args, model_args)

    def said(self) -> dict[str, Any]:
        """Of the report's settings: the model, how the sets were read, their digests, and the day."""
        data = {role: f"{reading.said}; digest {reading.digest}" for role, reading in self.readings.items()}
        return {"model_name_or_path": self.model, "data": data, "date": date.today().isoformat()}

    def evaluation(self) -> ForgetEvaluation:
        script = self.script
        return ForgetEvaluation(
            self.tokenizer,
            max_rows=script.eval_rows,
            lm_eval=script.lm_eval,
            batch_size=script.batch_size,
            max_length=script.max_length,
            qa_template=script.qa_template,
            **{role: reading.dataset for role, reading in self.readings.items()},
        )


def measure(sets: Sets, samples: int = 3) -> Measured:
    """Measures the model, the one before and the retrained one, each if it is named. Keeps some prompts and answers."""
    with quiet():
        return _measured(sets, samples)


def _measured(sets: Sets, samples: int) -> Measured:
    script, load = sets.script, sets.load
    results = Results("Your own data", sets.evaluation(), samples=samples)
    results.trained = False
    named: list[tuple[str, Kind, str | None]] = [
        ("before", "target", script.before),
        (NAME, "unlearned", sets.model),
        ("retrained", "retrain", script.retrained),
    ]
    for name, kind, model in named:
        if model is not None:
            results.add(name, kind, load(model))
    numbers: dict[str, Mapping[str, float]] = {row["name"]: row["metrics"] for row in results.rows}
    verdict = None
    if script.before:
        level = None
        others = next((sets.readings[role] for role in ("retain", "hold") if role in sets.readings), None)
        if script.retrained is None and script.unseen is None and others is not None:
            how = {"max_length": script.max_length, "qa_template": script.qa_template}
            forget = sets.readings["forget"]
            level = Level.of_exchanged(load(script.before), forget.dataset, others.dataset, sets.tokenizer, **how)
        verdict = judge(numbers["before"], numbers[NAME], level, numbers.get("retrained"))
        results.verdict = verdict
    return Measured(results, verdict)
