"""How a question becomes a prompt: the formats in which TOFU's models were trained.

| name | prompt | completion |
|---|---|---|
| `plain` | `Question: {question}` newline `Answer:` | a space and the answer |
| `llama3` | Llama-3-Instruct's chat format, with a system prompt and a date | the answer |
| `llama2` | `[INST] {question} [/INST]` | the answer |
| `phi` | `Question: {question}` newline `Answer: ` | the answer |

The tokenizer's BOS and EOS are not part of them: [`~blur_trainer.data.formats.tokenize_dataset`] adds what there is.
Llama-3-Instruct's EOS is `<|eot_id|>`, the end of a turn in its chat format.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, List, Value

LLAMA3_SYSTEM = "You are a helpful assistant."
LLAMA3_DATE = "10 Apr 2025"


@dataclass(frozen=True)
class TOFUTemplate:
    """What stands before a question, between it and the answer, and in front of the answer itself."""

    before: str = ""
    after: str = ""
    answer: str = ""  # part of the completion: a target
    strip: bool = False

    def prompt(self, question: str) -> str:
        return f"{self.before}{question.strip() if self.strip else question}{self.after}"

    def completion(self, answer: str) -> str:
        return f"{self.answer}{answer.strip() if self.strip else answer}"


TOFU_TEMPLATES = {
    "plain": TOFUTemplate("Question: ", "\nAnswer:", answer=" "),
    # As Llama-3.x-Instruct's own chat template writes it, in open-unlearning's configuration of these models: the
    # first date is the template's, the second open-unlearning's; the template strips every message.
    "llama3": TOFUTemplate(
        "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        f"Today Date: {LLAMA3_DATE}\n\n{LLAMA3_SYSTEM}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        strip=True,
    ),
    # TOFU and open-unlearning alike: no space before the answer, which Llama-2's tokenizer would merge with it.
    "llama2": TOFUTemplate("[INST] ", " [/INST]"),
    # Differs from TOFU, whose loss counts the tokens of "Answer: " too; its generation has them in the prompt as here.
    "phi": TOFUTemplate("Question: ", "\nAnswer: "),
}


def check_template(template: str | TOFUTemplate) -> TOFUTemplate:
    """A template, or the one of this name; an error names those there are."""
    if isinstance(template, TOFUTemplate):
        return template
    if template not in TOFU_TEMPLATES:
        raise ValueError(f"template is {template!r}; it must be a `TOFUTemplate` or one of {list(TOFU_TEMPLATES)}.")
    return TOFU_TEMPLATES[template]


def apply_template(rows: Dataset | Iterable[Mapping[str, Any]], template: str | TOFUTemplate = "plain") -> Dataset:
    """
    Question and answer as `prompt` and `completion`, so that training and evaluation see the same tokens.

    Args:
        rows ([`~datasets.Dataset`] or iterable of mappings):
            With the columns `question` and `answer`.
        template (`str` or [`TOFUTemplate`], defaults to `"plain"`):
            A name in `TOFU_TEMPLATES`, or a template of one's own.

    Returns:
        [`~datasets.Dataset`]: columns `prompt` and `completion`, for
        [`~blur_trainer.data.formats.tokenize_dataset`]; where the rows have `paraphrased_answer` (a string) or
        `perturbed_answer` (a list), the completions that they make, under these names; `refusal` as it is.
    """
    chosen = check_template(template)
    rows = list(rows)
    missing = sorted({"question", "answer"} - set(rows[0])) if rows else ["question", "answer"]
    if missing:
        has = f"the columns {sorted(rows[0])}" if rows else "no rows"
        raise ValueError(f"the rows have {has}; a template needs {missing}.")
    table: dict[str, list] = {
        "prompt": [chosen.prompt(row["question"]) for row in rows],
        "completion": [chosen.completion(row["answer"]) for row in rows],
    }
    features = {"prompt": Value("string"), "completion": Value("string")}
    if "paraphrased_answer" in rows[0]:
        table["paraphrased_answer"] = [chosen.completion(row["paraphrased_answer"]) for row in rows]
        features["paraphrased_answer"] = Value("string")
    if "perturbed_answer" in rows[0]:
        table["perturbed_answer"] = [[chosen.completion(one) for one in row["perturbed_answer"]] for row in rows]
        features["perturbed_answer"] = List(Value("string"))
    if "refusal" in rows[0]:  # the tokenization puts it in the place of the completion
        table["refusal"] = [row["refusal"] for row in rows]
        features["refusal"] = Value("string")
    return Dataset.from_dict(table, features=Features(features))
