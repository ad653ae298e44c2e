"""Results of several models: rows, samples side by side, stages, and a metrics.json that is whole and can be shown."""

import copy
import json
import math
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

from blur_trainer import __version__
from blur_trainer.evaluation.base import Evaluation
from blur_trainer.report import results as results_module
from blur_trainer.report.html import write_report
from blur_trainer.report.results import Results
from blur_trainer.report.seeds import mean_and_spread, write_means
from blur_trainer.report.tables import format_table

COLUMNS = [
    {"name": "forget_verbmem", "label": "VerbMem forget", "goal": "min"},
    {"name": "retain_knowmem", "label": "KnowMem retain", "goal": "max"},
]
PLANE = {"x": "forget_verbmem", "y": "retain_knowmem"}


METRICS = {"target": (100.0, 98.0), "unlearned": (7.5, 96.0), "retrain": (6.0, 99.0)}


class Suite(Evaluation):
    """A benchmark whose models are strings: what they know is in `METRICS`."""

    def __init__(self):
        self.asked, self.model = [], None

    def __call__(self, model):
        self.model = model
        return dict(zip(("forget_verbmem", "retain_knowmem"), METRICS[model], strict=True))

    columns = COLUMNS

    def samples(self, n=3):
        """Of the last model; the same prompt occurs under two metrics."""
        self.asked.append(n)
        return [
            {
                "metric": metric,
                "prompt": prompt,
                "gt": f"true {prompt}",
                "response": f"{self.model} says {prompt}",
                "score": 0.5,
            }
            for metric, prompt in (("forget_verbmem", "p"), ("forget_verbmem", "q"), ("retain_knowmem", "p"))
        ][: 3 * n]


@pytest.fixture
def results():
    return Results("MUSE (toy)", Suite(), plane=PLANE)


def filled(results):
    results.add("target", "target", "target")
    results.add("BLUR-NPO", "unlearned", "unlearned", 12.5)
    results.add("retrain", "retrain", "retrain")
    return results


def load(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def test_rows_in_the_order_added(results):
    answer = results.add("target", "target", "target")
    assert answer == {"forget_verbmem": 100.0, "retain_knowmem": 98.0}
    results.add("BLUR-NPO", "unlearned", "unlearned", 12.5)
    assert results.rows == [
        {"name": "target", "kind": "target", "metrics": answer, "seconds": None},
        {
            "name": "BLUR-NPO",
            "kind": "unlearned",
            "metrics": {"forget_verbmem": 7.5, "retain_knowmem": 96.0},
            "seconds": 12.5,
        },
    ]
    assert results.columns == COLUMNS
    assert "BLUR-NPO" in format_table(results.columns, results.rows)


def test_the_suite_runs_once_for_each_model(results):
    filled(results)
    assert results.evaluation.asked == [1, 1, 1]  # samples per metric, by default one
    more = Results("MUSE (toy)", Suite(), plane=PLANE, samples=4)
    more.add("target", "target", "target")
    assert more.evaluation.asked == [4]


def test_samples_of_all_models_side_by_side(results, tmp_path):
    """Merged by prompt within a metric: the same prompt under another metric is another sample."""
    samples = filled(results).save(tmp_path, {})["samples"]
    assert [(sample["prompt"], sample["reference"]) for sample in samples] == [
        ("p", "true p"),
        ("q", "true q"),
        ("p", "true p"),
    ]
    for sample in samples:
        assert sample["responses"] == {
            name: f"{model} says {sample['prompt']}"
            for name, model in (("target", "target"), ("BLUR-NPO", "unlearned"), ("retrain", "retrain"))
        }


def test_a_sample_keeps_its_set(results, tmp_path):
    one = {"metric": "m", "prompt": "p", "gt": "g", "response": "r", "score": 0.5}
    results.evaluation.samples = lambda n: [one | {"set": "hold"}, one | {"metric": "other"}]
    assert [sample.get("set") for sample in filled(results).save(tmp_path, {})["samples"]] == ["hold", None]


def test_a_model_without_samples_leaves_a_gap(results, tmp_path):
    results.add("target", "target", "target")
    results.evaluation.samples = lambda n: []
    results.add("retrain", "retrain", "retrain")
    assert [list(sample["responses"]) for sample in results.save(tmp_path, {})["samples"]] == [["target"]] * 3


def test_stages(results, tmp_path):
    assert "stages" not in filled(results).save(tmp_path, {})
    metrics = {"forget_verbmem": 50.0}
    results.add_stage("sust 1", metrics)
    metrics["forget_verbmem"] = 40.0  # what was added is not what is still held
    results.add_stage("sust 2", metrics)
    results.save(tmp_path, {})
    assert load(tmp_path)["stages"] == [
        {"name": "sust 1", "metrics": {"forget_verbmem": 50.0}},
        {"name": "sust 2", "metrics": {"forget_verbmem": 40.0}},
    ]


def test_what_is_saved_is_what_is_returned(results, tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    content = filled(results).save(str(folder), {"gamma": 0.1, "rule": "blur"})
    assert load(folder) == content
    assert content["benchmark"] == "MUSE (toy)" and content["plane"] == PLANE and content["columns"] == COLUMNS
    assert content["settings"]["gamma"] == 0.1 and content["settings"]["rule"] == "blur"
    environment = content["settings"]["environment"]
    assert environment["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment["blur_trainer"] == __version__ and re.match(r"\d+\.\d+", __version__)
    assert {"transformers", "accelerate", "datasets", "peft", "trl"} <= set(environment)
    assert [path.name for path in folder.iterdir()] == ["metrics.json"]


def test_a_package_that_is_not_installed_but_on_the_path(results, tmp_path, monkeypatch):
    """As from a checkout: our own version is not asked of the installed packages."""

    def installed(name):
        if name.replace("-", "_") == "blur_trainer":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(results_module, "version", installed)
    assert filled(results).save(tmp_path, {})["settings"]["environment"]["blur_trainer"] == __version__
    assert results_module.package_versions("torch") == {"blur_trainer": __version__, "torch": "1.0"}


@pytest.mark.parametrize("how", ["not JSON", "disk full", "killed while replacing"])
def test_a_failed_save_leaves_the_previous_file(results, tmp_path, monkeypatch, how):
    filled(results).save(tmp_path, {"gamma": 0.1})
    before = (tmp_path / "metrics.json").read_bytes()
    settings = {"gamma": 0.2, "wrong": object() if how == "not JSON" else None}
    if how == "disk full":
        monkeypatch.setattr("pathlib.Path.write_text", lambda self, *a, **k: (_ for _ in ()).throw(OSError("full")))
    if how == "killed while replacing":
        monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises((TypeError, OSError)):
        results.save(tmp_path, settings)
    assert (tmp_path / "metrics.json").read_bytes() == before
    monkeypatch.undo()
    results.save(tmp_path, {"gamma": 0.3})  # and the next one is not in its way
    assert load(tmp_path)["settings"]["gamma"] == 0.3
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_no_token_is_saved(results, tmp_path):
    saved = results.save(tmp_path, {"model_init_kwargs": {"token": "hf_secret", "dtype": "auto"}})
    assert saved["settings"]["model_init_kwargs"] == {"token": "<TOKEN>", "dtype": "auto"}
    assert "hf_secret" not in (tmp_path / "metrics.json").read_text()


def test_means_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_means(tmp_path / "out", {"rows": []})
    before = (tmp_path / "out" / "metrics.json").read_text()

    def fail(path, text, **kwargs):
        path.write_bytes(text.encode()[:5])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Path, "write_text", fail)
        write_means(tmp_path / "out", {"rows": [{"name": "x"}]})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.json"]
    assert (tmp_path / "out" / "metrics.json").read_text() == before and json.loads(before) == {"rows": []}


def test_any_text_survives(results, tmp_path):
    results.evaluation.samples = lambda n: [
        {
            "metric": "forget_verbmem",
            "prompt": "ü\u2028 漢\n",
            "gt": "\x00\ud83e",
            "response": '</script>"',
            "score": 0.0,
        }
    ]
    content = results.add("target", "target", "target") and results.save(tmp_path, {"text": "é"})
    assert load(tmp_path) == content


@pytest.mark.parametrize("stages", [0, 4])
def test_the_report_takes_it(results, tmp_path, stages):
    filled(results)
    for k in range(stages):
        results.add_stage(f"sust {k + 1}", {"forget_verbmem": 10.0 * k, "retain_knowmem": 90.0})
    results.save(tmp_path, {"gamma": 0.1, "nothing": None, "list": [1, 2]})
    html = write_report(tmp_path).read_text(encoding="utf-8")
    for word in ("MUSE (toy)", "BLUR-NPO", "retrain", "7.5", "unlearned says q", "true q", "VerbMem forget"):
        assert word in html, word
    assert ("After each of" in html or "Stage by stage" in html) == bool(stages)
    figures = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert figures == {"before_after", "plane"} | ({"stages"} if stages else set())


# ---- several runs as one ----


def one_run(seed, quality, rate=0.1):
    rows = [
        {"name": "target", "kind": "target", "metrics": {"q": 1e-25, "none": None}, "seconds": None},
        {"name": "ULD", "kind": "unlearned", "metrics": {"q": quality, "none": None}, "seconds": 10.0 * seed},
    ]
    columns, settings = [{"name": "q", "label": "Q", "goal": "max"}], {"seed": seed, "rate": rate}
    return {"benchmark": "toy", "columns": columns, "plane": PLANE, "rows": rows, "settings": settings, "samples": []}


def test_mean_and_spread_by_hand():
    runs = [one_run(1, 0.2), one_run(2, 0.4), one_run(3, 0.9)]
    before = copy.deepcopy(runs)
    content = mean_and_spread(runs)
    assert runs == before
    target, uld = content["rows"]
    assert target == runs[0]["rows"][0], "the same in all runs: no spread"
    mean = (0.2 + 0.4 + 0.9) / 3
    spread = math.sqrt(sum((x - mean) ** 2 for x in (0.2, 0.4, 0.9)) / 2)
    assert uld["metrics"] == {"q": pytest.approx(mean), "none": None}
    assert uld["spread"] == {"q": pytest.approx(spread)} and uld["runs"] == 3 and uld["seconds"] == 20.0
    assert content["settings"] == {"seed": [1, 2, 3], "rate": 0.1}
    assert "0.500 ± 0.361" in format_table(content["columns"], content["rows"])


def test_one_run_is_given_back():
    assert mean_and_spread([one_run(1, 0.2)]) == one_run(1, 0.2)


def test_what_is_not_finite_has_no_spread():
    content = mean_and_spread([one_run(1, -math.inf), one_run(2, 0.5)])
    assert content["rows"][1]["metrics"]["q"] == -math.inf and "spread" not in content["rows"][1]
    nan = mean_and_spread([one_run(1, -math.inf), one_run(2, math.inf)])["rows"][1]["metrics"]["q"]
    assert math.isnan(nan)


def test_the_order_of_rows_may_differ_and_stages_are_averaged():
    runs = [one_run(k, 0.1 * k) | {"stages": [{"name": "fold", "metrics": {"q": 0.1 * k}}]} for k in (1, 2)]
    runs[1]["rows"].reverse()
    content = mean_and_spread(runs)
    assert [row["name"] for row in content["rows"]] == ["target", "ULD"]
    assert content["stages"][0]["metrics"]["q"] == pytest.approx(0.15) and content["stages"][0]["runs"] == 2


def without_row(run):
    del run["rows"][1]


def without_metric(run):
    run["rows"][1]["metrics"]["q"] = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_row, r"Run 2 of 3 has no row 'ULD' in its rows"),
        (without_metric, r"Run 2 of 3 has no 'q' of the row 'ULD'"),
        (lambda run: run["rows"].append(run["rows"][1]), r"Run 2 has the row 'ULD' twice"),
        (lambda run: run["rows"][1].update(name="other"), r"Run 2 of 3 has no row 'ULD'"),
        (lambda run: run["rows"][1].update(kind="baseline"), r"'ULD' is of kind 'unlearned' in one .* 'baseline'"),
        (lambda run: run.update(benchmark="MUSE"), r"Run 2 has another benchmark than run 1: 'MUSE' instead of 'toy'"),
        (lambda run: run["columns"].clear(), r"Run 2 has another columns"),
    ],
)
def test_runs_of_different_comparisons_are_refused(change, message):
    runs = [one_run(1, 0.2), one_run(2, 0.4), one_run(3, 0.9)]
    change(runs[1])
    with pytest.raises(ValueError, match=message):
        mean_and_spread(runs)


def test_no_run_is_refused():
    with pytest.raises(ValueError, match="at least one run"):
        mean_and_spread([])


def test_the_report_draws_a_mean(tmp_path):
    content = mean_and_spread([one_run(1, 0.2), one_run(2, 0.4)])
    (tmp_path / "metrics.json").write_text(json.dumps(content | {"plane": {"x": "q", "y": "q"}}))
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "± 0.141" in html and "mean and standard deviation over 2 seeds" in html
