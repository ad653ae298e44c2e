"""The code that a logit-difference model's folder carries, so that plain transformers and peft load it.

The package's own source is copied when a model is saved: there is one source. Imports within the package become imports
within the folder. A copy can save the model again: then it copies itself.
"""

import re
from pathlib import Path

#: what `LogitDifferenceModel` needs of this package, this file included; tests hold it against the imports
MODULES = (
    *("logit_difference", "logit_difference_config", "logit_difference_cache", "logit_composition"),
    *("named_model", "origin", "truncation", "layer_lists", "carried_code", "file_names"),
)
#: both of one file: transformers keeps what a file imports in a place of its own, and one class would be two
AUTO_MAP = {
    "AutoConfig": "logit_difference.LogitDifferenceConfig",
    "AutoModelForCausalLM": "logit_difference.LogitDifferenceModel",
}
_HEADER = "# Part of blur_trainer, copied when this model was saved. SPDX-License-Identifier: Apache-2.0\n"
_IMPORT = re.compile(r"^from blur_trainer\.(?:\w+\.)*(\w+) import", re.MULTILINE)


def write_code(folder: str | Path) -> None:
    """Writes the modules into the folder, each as one file. `AUTO_MAP` in the configuration names two of them."""
    for name in MODULES:
        text = _source(name).read_text(encoding="utf-8")
        text = _IMPORT.sub(r"from .\1 import", text)
        (Path(folder) / f"{name}.py").write_text(_HEADER + text.removeprefix(_HEADER), encoding="utf-8")


def _source(name: str) -> Path:
    """Beside this file, or one folder above it."""
    here = Path(__file__).parent / f"{name}.py"
    return here if here.exists() else here.parent.parent / here.name
