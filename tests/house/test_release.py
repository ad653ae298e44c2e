"""What is released: one version and one citation, a wheel that runs alone, bounds that agree with the pins."""

import configparser
import os
import re
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import blur_trainer

ROOT = Path(blur_trainer.__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def pins(name: str) -> dict[str, str]:
    pairs = (line.split("==") for line in read(name).split("\n") if "==" in line and line[0] != "#")
    return {canonicalize_name(package): version for package, version in pairs}


def requirements() -> list[Requirement]:
    """Those of the package and of all its extras, but for the package itself."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = "\n".join([config["options"]["install_requires"], *config["options.extras_require"].values()]).split("\n")
    found = [Requirement(line) for line in map(str.strip, lines) if line and line[0] != "#"]
    return [requirement for requirement in found if requirement.name != "blur_trainer"]


def test_version_is_the_same_everywhere():
    first = re.search(r"^## \[(.+?)\]", read("CHANGELOG.md"), re.MULTILINE)[1]
    assert first == blur_trainer.__version__ == yaml.safe_load(read("CITATION.cff"))["version"]


def test_citation_is_the_same_everywhere():
    paper = yaml.safe_load(read("CITATION.cff"))["preferred-citation"]
    family_names = [author["family-names"] for author in paper["authors"]]
    for name in ("README.md", "blur_trainer/report/templates/model_card.md"):
        entry = re.search(r"@inproceedings\{.+?\n\}", read(name), re.DOTALL)[0]
        assert re.findall(r"(\w+), [A-Z]", entry.split("author")[1].split("}")[0]) == family_names
        assert f"pages = {{{paper['start']}--{paper['end']}}}" in entry
        assert f"year = {{{paper['year']}}}" in entry and paper["url"] in entry


def test_every_requirement_has_a_pin_within_its_bounds():
    for requirement in requirements():
        version = pins("constraints.txt").get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt has no {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement} and {version} in constraints.txt"


def test_lowest_versions_are_those_of_the_bounds():
    lowest = pins("constraints-min.txt")
    bounds = {
        canonicalize_name(r.name): str(s.version) for r in requirements() for s in r.specifier if s.operator == ">="
    }
    for name, version in lowest.items():
        assert version == bounds[name] or version.startswith(f"{bounds[name]}."), f"{name}: {version}, {bounds[name]}"


@pytest.mark.full
def test_wheel_is_whole_and_its_command_runs_from_another_folder(tmp_path):
    """In a virtual environment that has the wheel and, of this one, the libraries only."""
    pytest.importorskip("build", reason="needs the extra `release`")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "docs", "tests")
    shutil.copytree(ROOT, source, ignore=ignored)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", source], tmp_path)
    wheel, sdist = sorted((tmp_path / "dist").iterdir())
    assert (wheel.suffix, sdist.suffix) == (".whl", ".gz")
    assert run([sys.executable, "-m", "twine", "check", "--strict", wheel, sdist], tmp_path).count("PASSED") == 2

    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "blur_trainer").rglob("*.*")}
    wanted = {name for name in files if "__pycache__" not in name and (ROOT / name).is_file()}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if name.startswith("blur_trainer/")} == wanted

    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    install = ["--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    run([sys.executable, "-m", "pip", *install], tmp_path)
    libraries = next((tmp_path / "venv").glob("lib/*/site-packages"))
    (libraries / "libraries.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    where = run([python, "-c", "import blur_trainer as bt; print(bt.__file__, bt.__version__)"], tmp_path)
    assert where.split() == [str(libraries / "blur_trainer/__init__.py"), blur_trainer.__version__]
    assert "unlearn" in run([tmp_path / "venv/bin/blur-trainer", "--help"], tmp_path)
    assert "paper" in run([tmp_path / "venv/bin/blur-trainer", "recipes"], tmp_path)


def run(command: list[object], folder: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
