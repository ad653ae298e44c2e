"""How a question becomes a prompt: the formats in which TOFU's models were trained.

| name | prompt | completion |
|---|---|---|
| `plain` | `Question: {question}` newline `Answer:` | a space and the answer |
| `llama3` | Llama-3-Instruct's chat format, with a system prompt and a date | the answer |
| `llama2` | `[INST] {question} [/INST]` | the answer |
| `phi` | `Question: {question}` newline `Answer: ` | the answer |

A template has no BOS or EOS: [`~blur_trainer.data.formats.tokenize_dataset`] adds those that the tokenizer has.
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
    """The text before a question, the text between question and answer, and the text that begins the answer."""

    before: str = ""
    after: str = ""
    answer: str = ""  # part of the completion, so its tokens are targets
    strip: bool = False

    def prompt(self, question: str) -> str:
        return f"{self.before}{question.strip() if self.strip else question}{self.after}"

    def completion(self, answer: str) -> str:
        return f"{self.answer}{answer.strip() if self.strip else answer}"


TOFU_TEMPLATES = {
    "plain": TOFUTemplate("Question: ", "\nAnswer:", answer=" "),
    # The chat template of Llama-3.x-Instruct under open-unlearning's configuration. The first date comes from the
    # template, the second from open-unlearning. The template strips every message.
    "llama3": TOFUTemplate(
        "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        f"Today Date: {LLAMA3_DATE}\n\n{LLAMA3_SYSTEM}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        strip=True,
    ),
    # As in TOFU and open-unlearning: no space before the answer, because Llama-2's tokenizer would merge them.
    "llama2": TOFUTemplate("[INST] ", " [/INST]"),
    # Differs from TOFU, whose loss also counts the tokens of "Answer: ". Its generation has them in the prompt.
    "phi": TOFUTemplate("Question: ", "\nAnswer: "),
}


def check_template(template: str | TOFUTemplate) -> TOFUTemplate:
    """Returns the template, looked up if it is a name. The error lists the known names."""
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
        [`~blur_trainer.data.formats.tokenize_dataset`]. The columns `paraphrased_answer` (a string) and
        `perturbed_answer` (a list), if present, are turned into completions; `refusal` and `alternative`
        (a string or a list) are copied.
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
    if "refusal" in rows[0]:  # tokenization replaces the completion by it
        table["refusal"] = [row["refusal"] for row in rows]
        features["refusal"] = Value("string")
    if "alternative" in rows[0]:
        table["alternative"] = [row["alternative"] for row in rows]
        features["alternative"] = Value("string") if isinstance(rows[0]["alternative"], str) else List(Value("string"))
    return Dataset.from_dict(table, features=Features(features))
