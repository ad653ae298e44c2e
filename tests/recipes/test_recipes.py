"""Recipes: their arguments are accepted, the page says what the data says, the examples take them as defaults."""

import configparser
import json
import re
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

import pytest
from support.cases import every
from trl import ModelConfig

import blur_trainer as bt
from blur_trainer.recipes import BENCHMARKS, recipe_names
from blur_trainer.scripts import muse, tofu, wmdp
from blur_trainer.scripts.muse import MUSEArguments
from blur_trainer.scripts.tofu import TOFUArguments

ROOT = Path(bt.__file__).parents[1]
FOLDER = Path(bt.__file__).parent / "recipes"
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
SECTIONS = {"muse-news": ("MUSE", "News"), "muse-books": ("MUSE", "Books"), "tofu": ("TOFU", ""), "wmdp": ("WMDP", "")}
LINKS = {  # what a source begins with, and where that is
    "BLUR's code": "https://github.com/OptimAI-Lab/BLURLLMUnlearning",
    "FLAT's code": "https://github.com/UCSC-REAL/FLAT",
    "GRU's code": "https://github.com/tmlr-group/GRU",
    "MUSE's code": "https://github.com/swj0419/muse_bench",
    "PDU's code": "https://github.com/tahaEntesari/open-unlearning",
    "SAM-NPO's code": "https://github.com/OPTML-Group/Unlearn-Smooth",
    "SimNPO's code": "https://github.com/OPTML-Group/Unlearn-Simple",
    "TOFU's code": "https://github.com/locuslab/tofu",
    "ULD's code": "https://github.com/UCSB-NLP-Chang/ULD",
    "WMDP's code": "https://github.com/centerforaisafety/wmdp",
    "closer-look's code": "https://github.com/sail-sg/closer-look-LLM-unlearning",
    "open-unlearning": "https://github.com/locuslab/open-unlearning",
    "second hand: BLUR's paper": "https://arxiv.org/abs/2506.08164",
}
ALL = [(benchmark, name) for benchmark in BENCHMARKS for name in recipe_names(benchmark)]
METRICS = {
    "muse-news": {"forget_verbmem", "forget_knowmem", "retain_knowmem", "privleak"},
    "tofu": {"forget_quality", "model_utility"},
    "wmdp": {"wmdp_bio", "wmdp_cyber", "mmlu"},
}
METRICS["muse-books"] = METRICS["muse-news"]


@pytest.fixture(scope="module")
def examples():
    """What reads the command lines of the examples."""
    return {"run_muse": muse, "run_tofu": tofu, "run_wmdp": wmdp}


def config_class(benchmark, found, examples):
    if "method" not in found:
        return bt.BLURConfig
    return examples[f"run_{benchmark}"].METHODS[found["method"]][1].config_class


def parse(examples, benchmark, *arguments):
    """What an example makes of its command line; bf16 on a CPU has to be asked for."""
    corpus = ["--corpus", benchmark.removeprefix("muse-")] if benchmark.startswith("muse-") else []
    module = examples["run_muse" if corpus else f"run_{benchmark}"]
    return module.parse([*corpus, "--use_cpu", "True", *map(str, arguments)])


# ---- the data ----


def test_arguments_build_their_configuration(examples, tmp_path):
    def check(benchmark, name):
        found = bt.recipe(benchmark, name)
        cls = config_class(benchmark, found, examples)
        assert set(found["arguments"]) <= {field.name for field in fields(cls) if field.init}
        config = cls(str(tmp_path), use_cpu=True, **found["arguments"])
        for key, value in found["arguments"].items():
            assert getattr(config, key) == value, key
        given = found["arguments"].get("forget_objective_kwargs", {})
        assert {key: getattr(config.build_forget_objective(), key) for key in given} == given
        assert {key: getattr(config.build_rule(), key) for key in found["arguments"].get("rule_kwargs", {})} == (
            found["arguments"].get("rule_kwargs", {})
        )
        for key in ("gamma", "alpha", "forget_weight", "retain_weight"):
            if key in found["arguments"]:  # and not of another rule, which would ignore it
                assert getattr(config.build_rule(), key) == found["arguments"][key]

    every(ALL, check)


def test_every_value_has_a_source():
    def check(benchmark, name):
        found = bt.recipe(benchmark, name)
        assert set(found["source"]) == {"model_name_or_path", *found["arguments"], *found["script"]}
        assert all(found["source"].values())
        assert found["notes"] and found["model_name_or_path"].count("/") == 1
        assert set(found) - {"method"} == {
            *("source", "model_name_or_path", "arguments", "script", "published", "notes"),
        }
        for entry in found["published"]:
            assert set(entry) == {"what", "source", "metrics"} and entry["what"] and entry["source"]
            assert entry["metrics"] and set(entry["metrics"]) <= METRICS[benchmark]

    every(ALL, check)


def test_script_options_are_those_of_the_script():
    def check(benchmark, name):
        known = {field.name for field in fields(ModelConfig)}
        if benchmark != "wmdp":
            cls = TOFUArguments if benchmark == "tofu" else MUSEArguments
            known |= {field.name for field in fields(cls)}
        assert set(bt.recipe(benchmark, name)["script"]) <= known

    every(ALL, check)


def test_each_benchmark_has_what_its_authors_did():
    assert {name for benchmark, name in ALL if benchmark == "wmdp"} >= {"paper", "official", "rmu"}
    assert all({"paper", "official"} <= set(recipe_names(f"muse-{corpus}")) for corpus in ("news", "books"))
    assert {"official", "open-unlearning", "simnpo", "uld"} <= set(recipe_names("tofu"))
    assert {"undial", "wga", "satimp", "ce-u", "altpo", "pdu", "maximal-entropy", "gru", "flat"} <= set(
        recipe_names("tofu")
    )
    assert all({"pdu", "sam-npo"} <= set(recipe_names(f"muse-{corpus}")) for corpus in ("news", "books"))


def test_wmdp_has_a_topic_each():
    topics = bt.recipe("wmdp", "paper")["arguments"]["topics"]
    assert {name: own["max_length"] for name, own in topics.items()} == {"bio": 512, "cyber": 768}
    assert {own["alpha"] for own in topics.values()} == {800}


def test_a_recipe_is_a_copy():
    bt.recipe("wmdp", "paper")["arguments"]["topics"]["bio"]["alpha"] = 1
    assert bt.recipe("wmdp", "paper")["arguments"]["topics"]["bio"]["alpha"] == 800


def test_unknown_names_list_what_there_is():
    with pytest.raises(ValueError, match=r"tofu has no recipe 'papre'; there are: official, .*uld, .*flat\."):
        bt.recipe("tofu", "papre")
    for ask in (lambda: bt.recipe("muse", "paper"), lambda: recipe_names("muse")):
        with pytest.raises(ValueError, match=r"no recipes for 'muse'; there are for: muse-news, .*wmdp\."):
            ask()


def test_the_files_are_package_data():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    patterns = config["options.package_data"]["blur_trainer"].split()
    names = sorted(path.name for path in FOLDER.glob("*.json"))
    assert names == sorted(f"{benchmark}.json" for benchmark in BENCHMARKS)
    assert all(any(fnmatch(f"recipes/{name}", pattern) for pattern in patterns) for name in names)
    assert (FOLDER / "__init__.py").is_file()  # so that `packages = find:` takes the folder


# ---- the page ----


def section(benchmark):
    return PAGE.split(f"\n## {SECTIONS[benchmark][0]}\n")[1].split("\n## ")[0]


def tables(text, first):
    """The cells of each table whose header begins so."""
    found = [part for part in text.split("\n\n") if part.startswith(first)]
    return [[[cell.strip() for cell in line[1:-1].split("|")] for line in part.split("\n")] for part in found]


def value_of(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def in_cell(text, corpus):
    """`` `1e-5` † ``, or ``News `1e-5` †, Books `2e-5` ``: the value, and whether it is second hand."""
    value = r"`([^`]+)`( †)?"
    if text.startswith("News "):
        found = re.fullmatch(f"News {value}, Books {value}", text)
        assert corpus and found, text
        value, mark = found.groups()[:2] if corpus == "News" else found.groups()[2:]
    else:
        found = re.fullmatch(value, text)
        assert found, text
        value, mark = found.groups()
    return value_of(value), mark is not None


def second_hand(source):
    return source.startswith("second hand")


def test_the_table_has_the_numbers_of_the_data():
    def check(benchmark):
        table = {}
        for (_, *heads), _, *lines in tables(section(benchmark), "| | `"):
            names = [name.strip("`") for name in heads]
            table |= {name: {} for name in names}
            for key, *cells in lines:
                assert len(cells) == len(names), key
                for name, cell in zip(names, cells, strict=True):
                    if cell:
                        table[name][key.strip("`")] = in_cell(cell, SECTIONS[benchmark][1])
        assert list(table) == recipe_names(benchmark)
        for name in table:
            found = bt.recipe(benchmark, name)
            values = {"model_name_or_path": found["model_name_or_path"], **found["arguments"], **found["script"]}
            expected = {key: (value, second_hand(found["source"][key])) for key, value in values.items()}
            expected |= {"method": (found["method"], False)} if "method" in found else {}
            assert table[name] == expected

    every(BENCHMARKS, check)


def test_published_numbers_are_those_of_the_data():
    def check(benchmark):
        corpus, listed = SECTIONS[benchmark][1], []
        (results,) = tables(section(benchmark), "| recipe | what")
        for name, what, numbers in results[2:]:
            if corpus and not what.startswith(f"{corpus}: "):
                assert what.startswith(("News: ", "Books: "))
                continue
            pairs = (pair.split(" ") for pair in numbers.removesuffix(" †").split(", "))
            metrics = {key: float(value) for key, value in pairs}
            listed.append((name.strip("`"), what.removeprefix(f"{corpus}: "), metrics, numbers.endswith(" †")))
        entries = [
            (name, entry) for name in recipe_names(benchmark) for entry in bt.recipe(benchmark, name)["published"]
        ]
        expected = [(name, entry["what"], entry["metrics"], second_hand(entry["source"])) for name, entry in entries]
        assert listed == expected

    every(BENCHMARKS, check)


def test_every_note_is_on_the_page():
    def check(benchmark, name):
        title, corpus = SECTIONS[benchmark]
        notes = section(benchmark).split(f"### Notes on {title}\n")[1]
        bullets = [" ".join(bullet.split()) for bullet in re.split(r"^\* ", notes, flags=re.MULTILINE)]
        other = {"News": "(Books)", "Books": "(News)"}.get(corpus, "()")
        for note in bt.recipe(benchmark, name)["notes"]:
            bullet = next(bullet for bullet in bullets if bullet.endswith(f": {note}"))
            whose = bullet.removesuffix(f": {note}")
            assert f"`{name}`" in whose and other not in whose

    every(ALL, check)


def test_the_main_source_of_every_recipe_is_linked():
    """That of most of its settings."""

    def check(benchmark, name):
        sources = bt.recipe(benchmark, name)["source"].values()
        main = max(LINKS, key=lambda begin: sum(source.startswith(begin) for source in sources))
        assert any(source.startswith(main) for source in sources)
        paragraph = section(benchmark).split("\nSources: ")[1].split("\n\n")[0]
        entries = [" ".join(entry.split()) for entry in paragraph.split(";")]
        entry = next(entry for entry in entries if f"`{name}`" in entry.split("[")[0])
        assert f"({LINKS[main]})" in entry

    every(ALL, check)


# ---- the examples ----


def test_examples_take_a_recipe_as_defaults(examples, tmp_path):
    def check(benchmark, name):
        found = bt.recipe(benchmark, name)
        script, args, model_args, tiny = parse(examples, benchmark, "--recipe", name, "--output_dir", tmp_path)
        assert not tiny and type(args) is config_class(benchmark, found, examples)
        assert model_args.model_name_or_path == found["model_name_or_path"]
        assert {key: getattr(args, key) for key in found["arguments"]} == found["arguments"]
        assert {key: getattr(script, key, getattr(model_args, key, None)) for key in found["script"]} == found["script"]
        assert getattr(script, "method", None) == found.get("method")

    every(ALL, check)


def test_the_command_line_overrides_a_recipe(examples, tmp_path):
    def check(benchmark, name):
        over = ["--learning_rate", 3e-7, "--max_length", 77, "--model_name_or_path", "own/model", "--dtype", "float16"]
        expected = {"tofu": {"split": "forget05", "template": "phi"}, "wmdp": {"forget_topics": ["bio"]}}
        expected = expected.get(benchmark, {"tokenizer": "own/words"})
        for key, value in expected.items():
            over += [f"--{key}", *([value] if isinstance(value, str) else value)]
        script, args, model_args, tiny = parse(examples, benchmark, "--recipe", name, "--output_dir", tmp_path, *over)
        assert (args.learning_rate, args.max_length, tiny) == (3e-7, 77, False)
        assert (model_args.model_name_or_path, model_args.dtype) == ("own/model", "float16")
        assert {key: getattr(script, key) for key in expected} == expected

    every(ALL, check)


def test_a_config_file_overrides_a_recipe(examples, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(f"learning_rate: 3.0e-7\noutput_dir: {tmp_path / 'out'}\n", encoding="utf-8")
    for benchmark, name in (("muse-news", "paper"), ("tofu", "simnpo")):
        _, args, model_args, _ = parse(examples, benchmark, "--recipe", name, "--config", path)
        assert args.learning_rate == 3e-7 and model_args.model_name_or_path


def test_without_a_recipe_nothing_changes(examples, tmp_path):
    """The tiny defaults, and the hub's."""
    script, args, _, tiny = examples["run_muse"].parse(["--output_dir", str(tmp_path)])
    assert tiny and script.recipe is None
    assert (args.forget_objective, args.gamma, args.replay) == ("target_loss", 0.15, 2048)
    _, args, _, tiny = parse(examples, "muse-news", "--model_name_or_path", "own/model", "--output_dir", tmp_path)
    assert not tiny and (args.gamma, args.forget_objective_kwargs, args.max_length) == (1.0, None, 2048)
    script, args, _, tiny = examples["run_tofu"].parse(["--output_dir", str(tmp_path)])
    assert tiny and (script.method, script.augment_retain, args.gamma) == ("blur-target", "none", 0.3)


def test_a_recipe_is_not_for_the_embedded_corpora(examples):
    with pytest.raises(ValueError, match="--recipe is for the published models: pass --corpus news or --corpus books"):
        examples["run_muse"].parse(["--recipe", "rerun"])
    _, args, _, tiny = examples["run_muse"].parse(["--recipe", "paper"])  # the method, not the settings of a 7B
    assert tiny and (args.forget_objective, args.gamma, args.learning_rate, args.replay) == ("npo", 0.1, 1e-3, None)


def test_a_recipe_brings_its_method(examples):
    with pytest.raises(ValueError, match="--recipe uld is of --method uld: leave --method out"):
        examples["run_tofu"].parse(["--recipe", "uld", "--method", "npo"])
    assert parse(examples, "tofu", "--recipe", "uld", "--method", "uld")[0].method == "uld"


def test_unknown_recipes_are_refused_by_the_examples(examples):
    def check(benchmark):
        with pytest.raises(ValueError, match=f"{benchmark} has no recipe 'papre'; there are: "):
            parse(examples, benchmark, "--recipe", "papre")

    every(["muse-books", "tofu", "wmdp"], check)
