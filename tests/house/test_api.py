"""The public names: each is there, loaded when asked for, typed, and on the page docs/api.md."""

import ast
import gc
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import blur_trainer
from blur_trainer.importing import import_quickly

ROOT = Path(blur_trainer.__file__).parents[1]
PUBLIC = [name for name in blur_trainer.__all__ if name != "__version__"]


def generator():
    spec = importlib.util.spec_from_file_location("generate_api", ROOT / "docs" / "generate_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_there_once():
    assert len(PUBLIC) == len(set(PUBLIC)) <= 94  # 80 before own data, 90 before audits
    assert [name for name in PUBLIC if not hasattr(blur_trainer, name)] == []
    assert dir(blur_trainer) == sorted(blur_trainer.__all__)
    with pytest.raises(AttributeError, match="'blur_trainer' has no attribute 'memorize'"):
        blur_trainer.memorize  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(blur_trainer.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"blur_trainer.{module}" for name, module in blur_trainer._HOME.items()}


def test_the_page_lists_all_of_them_as_their_docstrings_say():
    found = generator()
    listed = [name for names in found.TASKS.values() for name in names]
    assert sorted(listed) == sorted(PUBLIC)
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == found.page(), "run `python docs/generate_api.py`"
    assert [name for name in PUBLIC if not found.summary(getattr(blur_trainer, name))] == []


def test_importing_costs_no_more_than_what_is_used():
    code = "import sys, blur_trainer; {}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"

    def loaded(use):
        done = subprocess.run([sys.executable, "-c", code.format(use)], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert not {"torch", "transformers", "numpy"} & loaded("pass")
    rule = loaded("blur_trainer.BLUR")
    assert "torch" in rule
    assert not {"transformers", "datasets", "trl", "peft", "accelerate"} & rule


@pytest.mark.parametrize("collects", [True, False])
def test_the_garbage_collector_rests_during_an_import_and_is_as_before_afterwards(collects, tmp_path, monkeypatch):
    """Also where the import fails."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "imported.py").write_text("import gc\nRESTED = not gc.isenabled()\n")
    (tmp_path / "broken.py").write_text("raise OSError\n")
    (gc.enable if collects else gc.disable)()
    try:
        assert import_quickly("imported").RESTED and gc.isenabled() is collects
        with pytest.raises(OSError):
            import_quickly("broken")
        assert gc.isenabled() is collects
    finally:
        gc.enable()
        sys.modules.pop("imported", None)
