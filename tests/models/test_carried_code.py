"""A saved logit-difference model loads with plain transformers and peft: the folder carries the code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from support.models import tiny_llama
from support.processes import ENVIRONMENT
from transformers import AutoModelForCausalLM

import blur_trainer
from blur_trainer.models.carried_code import MODULES
from blur_trainer.models.logit_composition import COMPOSITIONS
from blur_trainer.models.logit_difference import LogitDifferenceConfig, LogitDifferenceModel
from blur_trainer.models.lora_assistant import lora_assistant

PACKAGE = Path(blur_trainer.__file__).parent
IDS = torch.arange(3, 11).view(2, 4)
#: reads the folders named on the command line as somebody who has not installed the package
STRANGER = """
import sys
sys.modules["blur_trainer"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
found, folders = {}, sys.argv[2:]
try:
    AutoModelForCausalLM.from_pretrained(folders[0])
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("code ran that nobody trusted")
ids = torch.arange(3, 11).view(2, 4)
for folder in folders:
    for again in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__name__ == "LogitDifferenceModel" and "blur_trainer" not in type(model).__module__
        name = folder.split("/")[-1]
        with torch.no_grad():
            found[name] = model(ids).logits
        found[f"{name}, generated"] = model.generate(ids, max_new_tokens=4, do_sample=False)
        folder = f"{folder} again"
        if not again:
            model.save_pretrained(folder)
save_file(found, sys.argv[1])
"""


def unlearned(composition, tmp_path):
    target = tiny_llama()
    target.save_pretrained(tmp_path / "target")
    assistant = lora_assistant(target, 1, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(1)
    for name, weight in assistant.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    config = LogitDifferenceConfig(target=str(tmp_path / "target"), composition=composition)
    model = LogitDifferenceModel(config, target, assistant)
    model.save_pretrained(tmp_path / composition)
    return model


def test_the_folder_loads_without_the_package_and_gives_the_same(tmp_path):
    models = {name: unlearned(name, tmp_path) for name in COMPOSITIONS}
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "found"), *(str(tmp_path / name) for name in models)]
    there = ENVIRONMENT | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=there, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "found")
    for name, model in models.items():
        with torch.no_grad():
            logits = model(IDS).logits
        written = model.generate(IDS, max_new_tokens=4, do_sample=False)
        for kept in (name, f"{name} again"):
            assert torch.equal(found[kept], logits)
            assert torch.equal(found[f"{kept}, generated"], written)


def test_with_the_package_its_own_code_is_used_even_where_the_folder_is_trusted(tmp_path):
    unlearned("uld", tmp_path)
    for trust in (None, True):
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "uld", trust_remote_code=trust)) is (
            LogitDifferenceModel
        )


def imported(path):
    """The package's modules that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return {PACKAGE.parent / f"{name.replace('.', '/')}.py" for name in names if name.startswith("blur_trainer")}


def test_the_folder_carries_what_the_code_imports_and_nothing_else():
    needed, waiting = set(), {PACKAGE / "models" / "logit_difference.py"}
    while waiting:
        path = waiting.pop()
        needed.add(path)
        waiting |= imported(path) - needed
    assert sorted(path.stem for path in needed) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_the_copies_are_the_packages_source(name, tmp_path):
    LogitDifferenceConfig().save_pretrained(tmp_path)
    copy = (tmp_path / f"{name}.py").read_text(encoding="utf-8")
    assert "Apache-2.0" in copy and "\nfrom blur_trainer" not in copy
    compile(copy, name, "exec")
    path = next(PACKAGE.rglob(f"{name}.py"))
    assert len(copy.splitlines()) == len(path.read_text(encoding="utf-8").splitlines()) + 1
