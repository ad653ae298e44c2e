"""Measures models on one's own sets, whoever made them: one table, and a verdict where there is a model before."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig

from blur_trainer.data.chat import with_chat_template
from blur_trainer.evaluation.forget import ForgetEvaluation
from blur_trainer.evaluation.level import Level
from blur_trainer.models.loading import hub_arguments
from blur_trainer.pipeline.arguments import SETS, SourceArguments
from blur_trainer.pipeline.sets import made, read_set
from blur_trainer.report.results import Kind, Results
from blur_trainer.report.verdict import Verdict, judge
from blur_trainer.scripts.loading import ModelLoader
from blur_trainer.trainers.config import UnlearningConfig


@dataclass
class MeasureArguments:
    """What is measured, of which model."""

    forget: str | None = field(default=None, metadata={"help": "What was to be forgotten: a file, a folder, the Hub."})
    retain: str | None = field(default=None, metadata={"help": "What was to be kept."})
    hold: str | None = field(default=None, metadata={"help": "What the model knew and neither set mentions."})
    unseen: str | None = field(default=None, metadata={"help": "Of the kind of forget, but no model saw it."})
    paraphrased: str | None = field(default=None, metadata={"help": "The questions of forget in other words."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer, where the model has none beside it."})
    before: str | None = field(default=None, metadata={"help": "The model before unlearning: then there is a verdict."})
    retrained: str | None = field(default=None, metadata={"help": "A model that never saw the forget set."})
    eval_rows: int = field(default=200, metadata={"help": "Rows of each set that are measured."})
    lm_eval: list[str] | None = field(default=None, metadata={"help": "Tasks of lm-evaluation-harness, too."})
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


class Sets:
    """Tokenizer, sets and loader of a measurement. Raises `ValueError` for what is missing or cannot be read."""

    def __init__(self, options: Mapping[str, Any]):
        self.script, source, model_args = (made(of, {"dtype": None, **options}) for of in CLASSES)
        if not model_args.model_name_or_path or self.script.forget is None:
            raise ValueError("Give `model_name_or_path` (the model) and `forget` (what it was to forget).")
        self.model = str(model_args.model_name_or_path)
        hub = hub_arguments({"revision": model_args.model_revision})
        tokenizer = AutoTokenizer.from_pretrained(self.script.tokenizer or self.model, **hub)
        self.tokenizer: PreTrainedTokenizerBase = with_chat_template(tokenizer, source.chat_template)
        asked = [role for role in SETS if getattr(self.script, role) is not None]
        self.readings = {
            role: read_set(role, self.script, source, self.tokenizer, self.script.drop_empty) for role in asked
        }
        self.args = UnlearningConfig("measured", report_to="none")
        self.load = ModelLoader(self.args, model_args)

    def said(self) -> dict[str, Any]:
        """Of the report's settings: how the sets were read, their digests, and the day."""
        data = {role: f"{reading.said}; digest {reading.digest}" for role, reading in self.readings.items()}
        return {"data": data, "date": date.today().isoformat()}

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


def measure(sets: Sets) -> Measured:
    """Measures the model, the one before and the retrained one, each if it is named."""
    script, load = sets.script, sets.load
    results = Results("Your own data", sets.evaluation(), samples=3)
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
        if script.retrained is None and script.unseen is None:
            how = {"max_length": script.max_length, "qa_template": script.qa_template}
            level = Level.of_exchanged(load(script.before), sets.readings["forget"].dataset, sets.tokenizer, **how)
        verdict = judge(numbers["before"], numbers[NAME], level, numbers.get("retrained"))
        results.verdict = verdict
    return Measured(results, verdict)
