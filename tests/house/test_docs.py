"""What the documentation says is so: blocks run, links resolve, names, flags, logged keys and messages exist."""

import ast
import importlib
import importlib.util
import inspect
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from support.cases import every
from trl import TrlParser

import blur_trainer
from blur_trainer.cli.audit import AuditArguments
from blur_trainer.cli.evaluate import EvaluateArguments
from blur_trainer.cli.main import main as blur_trainer_command
from blur_trainer.cli.options import help_text
from blur_trainer.models.reference import CurrentModel
from blur_trainer.pipeline import settings as pipeline_settings
from blur_trainer.pipeline.arguments import classes_of
from blur_trainer.pipeline.measure import MeasureArguments
from blur_trainer.pipeline.methods import METHODS
from blur_trainer.scripts import tofu, wmdp
from blur_trainer.scripts.command_line import Parser
from blur_trainer.scripts.compare import CompareArguments
from blur_trainer.toy.model import tiny_llama, train_tokenizer

ROOT = Path(blur_trainer.__file__).parents[1]
PAGES = [
    path.relative_to(ROOT).as_posix() for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
]
QUICKSTART = "docs/quickstart.md"
# Where a name in backticks may come from, beside this package.
OTHERS = ("builtins", "transformers", "datasets", "peft", "torch", "torch.nn", "evaluate", "torchjd.aggregation")


class Block(NamedTuple):
    """A fenced block: its info string as words, its text, the number of its first line."""

    info: list[str]
    text: str
    line: int


@cache
def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def split(page: str) -> tuple[list[Block], str]:
    """The fenced blocks of a page, and the page without them."""
    blocks, prose, lines = [], [], []
    info: list[str] | None = None
    for number, line in enumerate(read(page).split("\n"), 1):
        if line.lstrip().startswith("```") and "`" not in line.lstrip()[3:]:
            if info is None:
                info, lines, first = line.strip()[3:].split(), [], number + 1
            else:
                blocks.append(Block(info, "\n".join(lines), first))
                info = None
        else:
            (prose if info is None else lines).append(line)
    assert info is None, f"{page}: a fence is not closed"
    return blocks, "\n".join(prose)


def blocks(page: str, language: str) -> list[Block]:
    return [block for block in split(page)[0] if block.info[:1] == [language]]


def in_backticks(page: str) -> set[str]:
    """Code spans of the prose; a span in two or more backticks may hold single ones."""
    return {span.strip() for _, span in re.findall(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", split(page)[1])}


# ---- Python blocks ----


def runnable(page: str) -> list[Block]:
    return [block for block in blocks(page, "python") if "runnable" in block.info]


def as_script(page: str) -> str:
    """The runnable blocks in one file, each in its own lines, so that a traceback names the page's line."""
    lines: list[str] = []
    for block in runnable(page):
        lines += [""] * (block.line - 1 - len(lines)) + block.text.split("\n")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs a page in a folder of its own, once; answers the names that it leaves."""

    @cache
    def run_page(page: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("page")
        script = folder / f"{Path(page).stem}.py"
        script.write_text(as_script(page), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            return {"folder": folder, **runpy.run_path(str(script))}

    return run_page


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)])
def test_blocks_run(page, run):
    assert run(page)


def test_the_first_lines_of_the_readme_run(tmp_path, monkeypatch):
    """As they stand, on a tiny model in the folder that they name, which says fewer texts than by default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline_settings, "_REPLAYED", (16, 16))
    monkeypatch.setattr(pipeline_settings, "_STEPS", 2)
    first = blocks("README.md", "python")[0].text
    tokenizer = train_tokenizer([first])
    tiny_llama(tokenizer, num_layers=1).save_pretrained("my-model")
    tokenizer.save_pretrained("my-model")
    (tmp_path / "first.py").write_text(first, encoding="utf-8")
    runpy.run_path("first.py")
    assert (tmp_path / "unlearned" / "model.safetensors").is_file()


@pytest.mark.full
def test_commands_on_your_own_data_run(run, monkeypatch):
    """Those of the page, one after another, in the folder where its Python blocks have run."""
    page = "docs/your-own-data.md"
    folder = run(page)["folder"]
    monkeypatch.chdir(folder)
    commands = [block.text.replace("\\\n", " ") for block in blocks(page, "bash") if "runnable" in block.info]
    assert len(commands) >= 2
    for command in commands:
        name, *words = shlex.split(command)
        assert name == "blur-trainer" and blur_trainer_command(words) == 0, command
    first, again = ((folder / name / "model.safetensors").read_bytes() for name in ("out", "out-again"))
    assert first == again, "the page says that `run.yaml` gives the same model"


def test_quickstart_is_among_the_pages_that_run():
    assert len(runnable(QUICKSTART)) >= 4


def test_quickstart_forgets_and_retains(run):
    """The page says that its examples forget: the first model has, and the last one, chosen by its gap."""
    names = run(QUICKSTART)
    first = transformers.AutoModelForCausalLM.from_pretrained(names["folder"] / "unlearned")
    for model in (first, names["trainer"].model):
        values = names["muse"](model)
        assert values["forget_knowmem"] < 30 and values["retain_knowmem"] > 70, values
    assert (names["folder"] / "unlearned" / "model.safetensors").is_file()
    assert (names["folder"] / "adapter" / "adapter_model.safetensors").is_file()
    assert not (names["folder"] / "adapter" / "model.safetensors").exists()
    assert (names["folder"] / "chosen" / "report.html").is_file()


def test_quickstart_names_the_logged_keys(run):
    history = run(QUICKSTART)["trainer"].state.log_history
    logged = {key for entry in history if "loss" in entry for key in entry}
    section = read(QUICKSTART).split("## What is logged")[1].split("\n## ")[0]
    table = "\n".join(line.split("|")[1] for line in section.split("\n") if line.startswith("| `"))
    documented = set(re.findall(r"`(.+?)`", table))
    assert documented == logged - {"learning_rate", "step", "epoch"} | {"grad/skipped"}


def test_first_loss_of_npo_is_as_said(run):
    """2 ln 2 / beta, before the first step."""
    names = run(QUICKSTART)
    ids = torch.tensor([[1, 5, 9, 2]])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    model = names["model"].eval()
    assert blur_trainer.NPO(beta=0.1)(model, batch, CurrentModel(model)).item() == pytest.approx(13.9, abs=0.05)


def test_python_blocks_are_python_and_name_what_exists():
    """Fragments too: they parse, and what they take from the package (`bt.X`, imports) is there."""

    def check(page):
        for block in blocks(page, "python"):
            assert set(block.info[1:]) <= {"runnable"}, f"{page}:{block.line}: {block.info}"
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "bt":
                    assert hasattr(blur_trainer, node.attr), f"{page}:{block.line}: bt.{node.attr}"
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("blur_trainer"):
                    module = importlib.import_module(str(node.module))
                    assert all(hasattr(module, alias.name) for alias in node.names), f"{page}:{block.line}"

    every(PAGES, check)


# ---- links ----


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: str) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#{1,6} +(.+?) *$", split(page)[1], re.MULTILINE)}


def links(page: str) -> list[str]:
    prose = re.sub(r"`[^`\n]*`", "", split(page)[1])  # no link in code: `(B,)` after `[...]` is none
    found = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def test_relative_links_resolve():
    def check(page):
        for link in links(page):
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.resolve().is_relative_to(ROOT), f"{page}: {link} leads out of the repository"
            assert target.exists(), f"{page}: {link}"
            if anchor:
                assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), f"{page}: {link}"

    every(PAGES, check)


def test_index_leads_to_every_page():
    reachable = {((ROOT / "docs") / link.partition("#")[0]).resolve() for link in links("docs/index.md")}
    missing = {page for page in PAGES if (ROOT / page).resolve() not in reachable}
    assert missing <= {"docs/index.md", "README.md"}


# ---- names ----


@cache
def package() -> dict[str, ModuleType]:
    """Every module of the package by its name, but those that import vLLM, which has an environment of its own."""
    paths = [path for path in (ROOT / "blur_trainer").rglob("*.py") if "\nfrom vllm." not in path.read_text()]
    names = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    dotted = {".".join(parts).removesuffix(".__init__") for parts in names}
    return {name: importlib.import_module(name) for name in sorted(dotted)}


@cache
def keywords() -> set[str]:
    """Names of arguments: of the configuration, and of every public function and class."""
    known = {field.name for field in fields(blur_trainer.BLURConfig)}
    for name in blur_trainer.__all__:
        value = getattr(blur_trainer, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            known |= set(inspect.signature(value).parameters)
    for other in (peft.LoraConfig, peft.PeftModel.from_pretrained):
        known |= set(inspect.signature(other).parameters)
    return known


def exists(name: str) -> bool:
    """A module of ours, or a name in one of ours or in a library that the pages speak of."""
    others = (importlib.import_module(other) for other in OTHERS)
    return name in package() or any(hasattr(module, name) for module in [*package().values(), *others])


def class_like(span: str) -> str | None:
    """`Sum`, `BLUR(gamma=1)`, `bt.NPO`, `transformers.Trainer` -> the class; a module of ours -> itself."""
    if re.fullmatch(r"blur_trainer(\.[a-z_]+)*", span):
        return span
    found = re.fullmatch(r"(?:[a-z_]+\.)*([A-Z][A-Za-z]+)(?:\(.*\))?", span)
    return found[1] if found else None


def test_classes_in_backticks_exist():
    def check(page):
        placeholders = {"DIR", "ENGINES"}  # of command lines; a table of the tests
        named = {name for span in in_backticks(page) if (name := class_like(span))} - placeholders
        assert sorted(name for name in named if not exists(name)) == [], page

    every(PAGES, check)


def test_keywords_in_backticks_exist():
    """`gamma=0.2`, and the same inside of a call."""

    def check(page):
        used = {word for span in in_backticks(page) if not span.startswith("-") for word in words_before_equals(span)}
        assert sorted(used - keywords()) == [], page

    every(PAGES, check)


def words_before_equals(span: str) -> list[str]:
    return re.findall(r"(?:^|[(,] ?)([a-z_]\w*)=(?!=)", span)


def test_files_in_backticks_exist():
    """Files of the repository: a path with a folder of ours in front."""

    def check(page):
        folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {
            "outputs"
        }  # there once the examples have run
        for span in in_backticks(page):
            if re.fullmatch(r"[\w.-]+(/[\w.<>-]+)+/?", span) and span.split("/")[0] in folders and "<" not in span:
                assert (ROOT / span).exists(), f"{page}: {span}"

    every(PAGES, check)


# ---- command lines ----


def example_module(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        return importlib.import_module(name)


def example_parser(name: str = "run_muse") -> TrlParser:
    """The parser that the example builds: it is caught where it is first asked."""

    class Caught(Exception):
        pass

    class Catching(Parser):
        def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
            if self.add_help:  # the one of all arguments, after that of those which it depends on
                raise Caught(self)
            return super().parse_known_args(*args, **kwargs)

    module = example_module(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blur_trainer.scripts.command_line.Parser", Catching)
        patch.setattr("sys.argv", [f"{name}.py"])
        with pytest.raises(Caught) as caught:
            module.main()
    parser = caught.value.args[0]
    parser.__class__ = TrlParser
    return parser


@pytest.fixture(scope="module")
def parser() -> TrlParser:
    return example_parser()


@pytest.fixture(scope="module")
def flags(parser: TrlParser) -> set[str]:
    """All that a page may name: of the examples, of TRL's parser, of the benchmarks, of the launcher."""
    launcher = importlib.import_module("accelerate.commands.launch").launch_command_parser().format_help()
    for module in ("accelerate.commands.launch", "deepspeed.launcher.runner"):  # whose help hides some
        launcher += Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    scripts = [*(ROOT / "benchmarks").rglob("*.py"), ROOT / "examples" / "serve_uld.py"]
    benchmarks = "\n".join(path.read_text(encoding="utf-8") for path in scripts)
    own = "\n".join(re.findall(r'add_argument\((".*)', benchmarks))
    configs = {trainer.config_class for _, trainer, *_ in tofu.METHODS.values()}
    others = "\n".join(TrlParser((tofu.TOFUArguments, config)).format_help() for config in configs)
    others += TrlParser((wmdp.WMDPArguments,)).format_help() + TrlParser((CompareArguments,)).format_help()
    text = f"{parser.format_help()} {others} {launcher} {own} {own_data_help()} --config --help --help-all"
    return set(re.findall(r"--\w[\w-]*", text))


def own_data_help() -> str:
    """The options of `blur-trainer unlearn` with any method, of `evaluate` and of `audit`."""
    classes = [classes_of(method) for method in METHODS] + [(EvaluateArguments,)]
    classes += [(MeasureArguments, AuditArguments)]
    return "".join(help_text(each, "unlearn", "", "") for each in classes)


def test_flags_exist(flags):
    def check(page):
        named = {flag for span in in_backticks(page) for flag in re.findall(r"(?<!\S)--\w[\w-]*", span)}
        for command in commands(page):
            named |= {word.split("=")[0] for word in command if word.startswith("--")}
        assert sorted(named - flags) == [], page

    every(PAGES, check)


def commands(page: str) -> Iterator[list[str]]:
    """Commands of a page as words: of its shell blocks, and of code spans that hold one."""
    shell = [block.text for language in ("bash", "sh", "shell", "console") for block in blocks(page, language)]
    shell += [block.text for block in split(page)[0] if not block.info]
    for text in [*shell, *(span for span in in_backticks(page) if re.search(r"run_\w+\.py ", span))]:
        for line in text.replace("\\\n", " ").split("\n"):
            if re.match(r"\s*(accelerate|deepspeed|python|torchrun)\s", line):
                yield shlex.split(line, comments=True)


def example_commands(script: str = "run_muse") -> list[tuple[str, list[str]]]:
    found = []
    for page in PAGES:
        for command in commands(page):
            at = [index for index, word in enumerate(command) if word.endswith(f"examples/{script}.py")]
            if at:
                found.append((page, command[at[0] + 1 :]))
    return found


def test_example_commands_are_accepted(parser, tmp_path):
    """Parsed in full, configuration and all; on this machine bf16 needs `use_cpu`, which DeepSpeed does not take."""

    def check(page, arguments):
        if "--help" in arguments:
            return
        defaults = ([] if "--deepspeed" in arguments else ["--use_cpu", "True"]) + (
            [] if "--output_dir" in arguments else ["--output_dir", str(tmp_path / "out")]
        )
        _, args, _ = parser.parse_args_into_dataclasses(args=[*arguments, *defaults])
        assert args.build_forget_objective() and args.build_rule()

    every(example_commands(), check)


def test_tofu_commands_are_accepted(tmp_path):
    def check(page, arguments):
        _, args, model_args, tiny = tofu.parse(["--output_dir", str(tmp_path), "--use_cpu", "True", *arguments])
        assert args.build_forget_objective() and args.build_rule()
        assert tiny == (model_args.model_name_or_path is None)

    every(example_commands("run_tofu"), check)


def test_wmdp_commands_are_accepted(monkeypatch, tmp_path):
    """As on a machine whose GPU knows bfloat16: DeepSpeed does not take `use_cpu`."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)

    def check(page, arguments):
        defaults = ["--output_dir", str(tmp_path)] + ([] if "--deepspeed" in arguments else ["--use_cpu", "True"])
        _, args, model_args, tiny = wmdp.parse([*defaults, *arguments])
        assert args.build_forget_objective() and args.build_rule()
        assert tiny == (model_args.model_name_or_path is None) and not (tiny and "--recipe" in arguments)

    every(example_commands("run_wmdp"), check)


def test_local_splits_are_listed():
    required = importlib.import_module("blur_trainer.data.muse").REQUIRED
    assert [name for name in required if f"`{name}.jsonl`" not in read(QUICKSTART)] == []


# ---- messages ----


@cache
def messages() -> str:
    """Every string of the package, `...` where a value is put in."""
    found = []
    for path in (ROOT / "blur_trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_are_those_of_the_code():
    section = read(QUICKSTART).split("## Common errors")[1]
    cells = [line.split("|")[1].strip() for line in section.split("\n") if line.startswith("| `")]
    quoted = [cell.strip("` ") if not cell.startswith("``") else cell[2:-2].strip() for cell in cells]
    assert len(quoted) > 10
    assert [message for message in quoted if message not in messages()] == []
