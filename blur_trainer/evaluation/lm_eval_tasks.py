"""Writes your own questions as tasks of lm-evaluation-harness, in the form of its `wmdp_*` and `mmlu_*`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset

from blur_trainer.atomic_write import atomic_write
from blur_trainer.choices import DESCRIPTION
from blur_trainer.evaluation.splits import as_datasets
from blur_trainer.evaluation.wmdp import COLUMNS, subjects_of
from blur_trainer.file_names import file_name

_TASK = r"""task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
num_fewshot: 0
output_type: multiple_choice
description: {description}
doc_to_text: "{{{{question.strip()}}}}\nA. {{{{choices[0]}}}}\nB. {{{{choices[1]}}}}\nC. {{{{choices[2]}}}}\nD. {{{{choices[3]}}}}\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""  # noqa: E501


def write_tasks(
    folder: str | os.PathLike[str], data: Mapping[str, Dataset], *, subjects: Mapping[str, str] | None = None
) -> list[str]:
    """
    Write each set of questions as a task: `{key}.yaml` and `{key}.jsonl`, written atomically.

    ```bash
    lm_eval --model hf --model_args pretrained=outputs/wmdp --tasks forget_potions --include_path outputs/wmdp/tasks
    ```

    gives the `{key}_accuracy` of [`~blur_trainer.evaluation.wmdp.WMDPEvaluation`] on the same data. The task holds the
    file's absolute path. If you move the folder, write the task again.

    Args:
        folder (`str` or `Path`):
            The target folder. It is created if it does not exist.
        data (`Mapping[str, Dataset]`), subjects (`Mapping[str, str]`, *optional*):
            As for `WMDPEvaluation`.

    Returns:
        `list[str]`: the tasks' names, which are the keys of `data`.

    Raises:
        `ValueError`: there are no questions, `WMDPEvaluation` refuses a set, or a key is no plain file name. Nothing
            has been written then.
    """
    data = as_datasets(data)
    named = subjects_of(data, subjects)
    for key in data:
        file_name(key, "The task")
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for key, rows in data.items():
        about = DESCRIPTION.format(subject=named[key])
        file = folder / f"{key}.jsonl"
        # a JSON string is also a YAML string
        task = _TASK.format(task=json.dumps(key), file=json.dumps(str(file)), description=json.dumps(about))
        lines = "".join(f"{json.dumps({column: row[column] for column in COLUMNS})}\n" for row in rows)
        _write(file, lines)
        _write(file.with_suffix(".yaml"), task)
    return list(data)


def _write(path: Path, text: str) -> None:
    atomic_write(path, lambda part: part.write_text(text, encoding="utf-8"))
