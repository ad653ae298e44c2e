"""The house's rules that a parser can check: who imports whom, and what the package never does."""

import ast
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import networkx as nx

import blur_trainer

ROOT = Path(blur_trainer.__file__).parent
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
SOURCES = [path for path in MODULES if (ROOT / path).read_text().strip()]  # an empty __init__.py says nothing
EXAMPLES = sorted((ROOT.parent / "examples").glob("*.py"))

# What a room may import beside itself and third parties. Reading down, each room imports rooms above it only.
ARROWS: dict[str, set[str]] = {
    "constants": set(),
    "atomic_write": set(),
    "file_names": set(),
    "importing": set(),
    "credentials": set(),
    "choices": set(),
    "checks": set(),
    "metrics": set(),
    "recipes": set(),
    "toy": {"choices", "atomic_write"},
    "gradients": {"constants", "checks"},
    "data": {"constants", "choices", "toy"},
    "models": {"constants", "checks", "atomic_write", "file_names"},
    "objectives": {"constants", "checks", "models", "atomic_write"},
    "evaluation": {"constants", "checks", "atomic_write", "file_names", "choices", "metrics", "data", "models"},
    # an evaluation's contract, whose numbers it shows
    "report": {"constants", "checks", "atomic_write", "credentials", "evaluation"},
    "saving": {"atomic_write", "file_names", "models", "report"},  # a merged model's card, figures to upload
    "trainers": {
        *("constants", "checks", "atomic_write", "credentials", "gradients", "data", "models"),
        *("objectives", "evaluation", "report", "saving"),
    },
    "uld": {"constants", "checks", "data", "models", "objectives", "evaluation", "trainers"},
    "serving": {"models"},
    "memory": {"models", "objectives", "trainers"},
    "scripts": {
        *("checks", "atomic_write", "toy", "recipes", "data", "models", "evaluation", "report", "saving", "trainers"),
        "uld",
    },
    "pipeline": {
        *("constants", "checks", "atomic_write", "credentials", "data", "models", "evaluation", "report", "saving"),
        *("trainers", "uld", "scripts"),
    },
    "cli": {"importing", "scripts", "pipeline", "saving", "report", "recipes", "memory", "trainers"},
    "__main__": {"cli"},
}
FREE = {"__init__", "_version"}  # public names and a number
FORBIDDEN_CALLS = {"eval", "exec", "print", "compile", "__import__", "globals"}
FORBIDDEN_NAMES = {"_inner_training_loop", "retain_graph", "pickle", "dill", "joblib"}


def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), str(path))


def part(dotted: str) -> str:
    """`data.formats` -> `data`."""
    return dotted.split(".")[0]


def is_module(dotted: str) -> bool:
    """`blur_trainer.saving.output_dir`, and not a name in a module."""
    path = ROOT.parent.joinpath(*dotted.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imported(module: ast.Module) -> Iterator[str]:
    """Our modules that a module imports, anywhere in it, without `blur_trainer.`."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: write it out"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else node.module or "" for name in names]
        else:
            continue
        yield from (name.removeprefix("blur_trainer.") for name in names if name.startswith("blur_trainer"))


def offences(module: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(module):
        where = f"line {getattr(node, 'lineno', '?')}"
        if isinstance(node, ast.Assert):
            found.append(f"{where}: assert")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(f"{where}: {node.func.id}()")
        elif isinstance(node, ast.ExceptHandler) and (node.type is None or catches_everything(node.type)):
            found.append(f"{where}: except Exception")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            found.append(f"{where}: {ast.unparse(node)}")
        found += [f"{where}: {name}" for name in mentioned(node) if name.split(".")[0] in FORBIDDEN_NAMES]
    return found


def catches_everything(handled: ast.expr) -> bool:
    return any(isinstance(n, ast.Name) and n.id in ("Exception", "BaseException") for n in ast.walk(handled))


def mentioned(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.keyword):
        return [node.arg or ""]
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(alias.name for alias in node.names)]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def astray(path: Path) -> list[str]:
    """Imports of a module against the arrows."""
    here = part(".".join(path.with_suffix("").parts))
    if here in FREE:
        return []
    if here not in ARROWS:
        return [f"{path} is new: say in ARROWS what {here} may import"]
    wrong = {name for name in imported(tree(path)) if part(name) not in ARROWS[here] | {here, *FREE}}
    may = sorted(ARROWS[here]) or "nothing of ours"
    return [f"{path} imports {sorted(wrong)}; {here} may import {may}"] if wrong else []


def long_or_silent(path: Path) -> list[str]:
    found = []
    lines = (ROOT / path).read_text().count("\n")
    if lines > 250:
        found.append(f"{path} has {lines} lines")
    if path.name != "__init__.py" and not ast.get_docstring(tree(path)):
        found.append(f"{path} has no docstring")
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            if length > 40:
                found.append(f"{path}: {node.name} has a body of {length} lines")
    return found


def private(path: Path) -> list[str]:
    """Names of the package that an example imports and that are not public."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("blur_trainer"):
            continue
        module = importlib.import_module(node.module)
        for name in (alias.name for alias in node.names):
            if name.startswith("_") or name not in getattr(module, "__all__", [name]):
                found.append(f"{path.name} imports {name}, not in {node.module}.__all__")
    return found


def over(paths: list[Path], check: Callable[[Path], list[str]]) -> list[str]:
    assert paths
    return [offence for path in paths for offence in check(path)]


def test_imports_follow_the_arrows():
    assert over(SOURCES, astray) == []


def test_nothing_forbidden():
    assert over(SOURCES, lambda path: [f"{path}: {offence}" for offence in offences(tree(path))]) == []


def test_modules_are_short_and_say_what_they_are():
    assert over(SOURCES, long_or_silent) == []


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that import each other around a circle."""
    graph = nx.DiGraph([(module, other) for module, others in arrows.items() for other in others])
    return [sorted(knot) for knot in nx.strongly_connected_components(graph) if len(knot) > 1]


def module_arrows() -> dict[str, set[str]]:
    """Which of our modules each module imports, also inside functions and under TYPE_CHECKING."""
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES}
    del names["__init__"]  # the public names: nothing of ours imports them
    return {name: set(imported(tree(path))) - {name} for name, path in names.items()}


def test_no_import_circle_between_modules():
    arrows = module_arrows()
    assert sum(map(len, arrows.values())) > 300, "the imports were not found"
    assert set().union(*arrows.values()) <= set(arrows), "an import leads nowhere, or to the public names"
    assert circles(arrows) == []


def test_no_import_circle_between_rooms():
    assert circles(ARROWS) == []
    above: set[str] = set()
    for room, others in ARROWS.items():
        assert others <= above, f"{room} imports {sorted(others - above)}, which stand below it in ARROWS"
        above.add(room)


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_one_module_imports_deepspeed():
    def imports(path: Path) -> bool:
        nodes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [getattr(node, "module", None) or node.names[0].name for node in nodes]
        return any(name.split(".")[0] == "deepspeed" for name in names)

    assert [path.as_posix() for path in SOURCES if imports(path)] == ["gradients/deepspeed.py"]


def test_examples_use_public_names_only():
    assert over(EXAMPLES, private) == []


OFFENCES = [
    ("assert x", "assert"),
    ("print(1)", "print()"),
    ("eval('1')", "eval()"),
    ("exec('1')", "exec()"),
    ("globals()['NPO']", "globals()"),
    ("try:\n    f()\nexcept Exception:\n    pass", "except Exception"),
    ("try:\n    f()\nexcept (OSError, Exception):\n    pass", "except Exception"),
    ("try:\n    f()\nexcept:\n    pass", "except Exception"),
    ("import pickle", "pickle"),
    ("from pickle import loads", "pickle"),
    ("torch.load(p)", "torch.load"),
    ("torch.save(p)", "torch.save"),
    ("class T:\n    def _inner_training_loop(self): self._inner_training_loop()", "_inner_training_loop"),
    ("loss.backward(retain_graph=True)", "retain_graph"),
]


def test_the_checker_finds_what_it_looks_for():
    missed = [source for source, offence in OFFENCES if not any(offence in one for one in offences(ast.parse(source)))]
    assert missed == []


def test_the_checker_sees_every_kind_of_import():
    source = "import blur_trainer.toy\nfrom blur_trainer import data\ndef f():\n    from blur_trainer.data.x import y"
    assert list(imported(ast.parse(source))) == ["toy", "data", "data.x"]


def test_the_checker_leaves_the_innocent_alone():
    assert offences(ast.parse("model.eval()\ntry:\n    f()\nexcept OSError:\n    raise\ntorch.compile(model)")) == []
