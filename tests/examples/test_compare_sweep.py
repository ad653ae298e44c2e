"""`blur-trainer compare --strengths`: its runs, how it goes on, the two readings, its output. Nothing is trained."""

import json
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from blur_trainer.report import html as report
from blur_trainer.scripts import compare

KEYS = {
    "model_utility": "max", "forget_probability": "min", "forget_rouge": "min", "retain_rouge": "max",
    "real_authors_rouge": "max", "world_facts_rouge": "max",
}  # fmt: skip
COLUMNS = [{"name": key, "label": key.replace("_", " "), "goal": goal} for key, goal in KEYS.items()]
LABELS = {"npo": "NPO", "blur-npo": "BLUR-NPO", "graddiff": "GradDiff"}
SWEEP = ["--methods", "npo", "blur-npo", "graddiff", "--seeds", "0", "1", "--strengths", "0.3", "1"]


def row(name, kind, *numbers):
    return {"name": name, "kind": kind, "metrics": dict(zip(KEYS, numbers, strict=True)), "seconds": 1.0}


def numbers_of(method: str, strength: float, seed: int):
    """BLUR keeps more than NPO at the level, the same in both seeds; GradDiff never gets there."""
    shift = 0.1 * seed
    if method == "graddiff":
        return 0.8, 0.9 - strength / 10, 0.9, 0.99, 0.9, 0.9
    if strength < 1:
        return 0.83, 0.3, 0.8, 0.99, 0.98, 0.97
    kept = 0.70 if method == "npo" else 0.755 + 0.01 * seed
    authors = 0.9 - shift if method == "blur-npo" else 0.7 - 1.05 * shift  # 0.2 and 0.205 less
    return kept - shift, 0.01, 0.3 + shift, kept, authors, 0.9


@pytest.fixture
def main(monkeypatch, capsys, tmp_path):
    """`main("--seeds", "0")`: what is printed, and the command lines of the runs, which write made-up numbers."""
    monkeypatch.setattr(report, "DPI", 20)
    failing: list[str] = []

    def run(*words, fail=(), drawn=False):
        seen, failing[:] = [], fail
        if not drawn:
            monkeypatch.setattr(compare, "write_report", str)  # takes two seconds

        def done(command, stdout, **_):
            folder = Path(command[command.index("--output_dir") + 1])
            method, seed = (command[command.index(flag) + 1] for flag in ("--method", "--seed"))
            [flag] = [word for word in command if re.match(r"--(gamma|forget_weight)=", word)]
            seen.append((method, seed, flag))
            if folder.name in failing:
                return SimpleNamespace(returncode=1)
            own = row(LABELS[method], "unlearned", *numbers_of(method, float(flag.split("=")[1]), int(seed)))
            rows = [row("target", "target", 0.84, 1.0, 1.0, 1.0, 1.0, 1.0), own]
            rows.append(row("retrain", "retrain", 0.85, 0.02, 0.5, 1.0, 1.0, 1.0))
            sample = {"prompt": "Who?", "reference": "X", "responses": {"target": "X", LABELS[method]: flag}}
            content = {
                "benchmark": "TOFU",
                "columns": COLUMNS,
                "plane": {"x": "forget_probability", "y": "model_utility"},
            }
            content |= {"rows": rows, "settings": {"seed": int(seed)}, "samples": [sample]}
            folder.mkdir()
            (folder / "metrics.json").write_text(json.dumps(content))
            return SimpleNamespace(returncode=0)

        monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=done, STDOUT=None))
        compare.main(["--output_dir", str(tmp_path / "out"), "--use_cpu", "True", *words])
        return capsys.readouterr().out, seen

    return run


def content(tmp_path):
    return json.loads((tmp_path / "out" / "metrics.json").read_text())


def test_a_sweep_from_its_runs_to_its_report(main, tmp_path):
    printed, seen = main(*SWEEP, drawn=True)
    flags = ("--forget_weight=0.3", "--forget_weight=1.0", "--gamma=0.3", "--gamma=1.0", "--forget_weight=0.09")
    assert seen[:5] == [(m, "0", f) for m, f in zip(("npo", "npo", *["blur-npo"] * 2, "graddiff"), flags, strict=True)]
    assert len(seen) == 12 and {seed for _, seed, _ in seen[6:]} == {"1"}, "the first seed is whole before the second"
    written = content(tmp_path)
    assert [r["name"] for r in written["rows"]] == [
        "target", "NPO, forget_weight 0.3", "NPO, forget_weight 1", "BLUR-NPO, gamma 0.3", "BLUR-NPO, gamma 1",
        "GradDiff, forget_weight 0.09", "GradDiff, forget_weight 0.3", "retrain",
    ]  # fmt: skip
    assert written["rows"][2]["metrics"]["model_utility"] == pytest.approx(0.65) and written["rows"][2]["runs"] == 2
    assert list(written["samples"][0]["responses"]) == ["target", *[r["name"] for r in written["rows"][1:-1]]]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "At equal forgetting: what is left</h2>" in page and "Forgotten against kept, by strength</h2>" in page
    assert sorted(path.name for path in (tmp_path / "out" / "figures").iterdir()) == ["front.png"]
    assert "At equal utility: what is still known\n" in printed and printed.splitlines()[-1].startswith("Report: ")


def test_at_equal_forgetting(main, tmp_path):
    printed, _ = main(*SWEEP)
    forgetting = content(tmp_path)["footing"]["readings"][0]
    rows = {r["name"]: r for r in forgetting["rows"]}
    assert list(rows) == ["target", "NPO", "BLUR-NPO", "GradDiff", "retrain"]
    assert rows["NPO"]["metrics"]["model_utility"] == pytest.approx((0.70 + 0.60) / 2)
    assert rows["NPO"]["said"] == "forgets enough in 2 of 2 seeds, with forget_weight 1, 1"
    assert rows["GradDiff"]["said"] == "never forgets enough, with forget_weight 0.09, 0.3"
    assert set(rows["GradDiff"]["metrics"].values()) == {None}
    shown = ["model_utility", "retain_rouge", "real_authors_rouge", "world_facts_rouge"]
    assert [column["name"] for column in forgetting["columns"]] == [*shown, "forget_probability", "forget_rouge"]
    utility, _, authors, facts = forgetting["verdicts"]
    # 0.055 and 0.065 more: 0.06 +- 12.706 * 0.005
    assert (utility["column"], utility["winner"], utility["left_out"]) == ("model utility", None, ["GradDiff"])
    assert utility["text"] == "no difference shown (2 seeds)"
    assert facts["winner"] is None
    # Student's point of one degree of freedom is 12.706; 12.706 * 0.0025 = 0.0318
    assert authors["text"] == "BLUR-NPO, by 0.203 (0.171 to 0.234) over NPO (2 seeds)"
    assert "GradDiff never forgets enough" in printed
    assert "Best, model utility: no difference shown (2 seeds)." in printed


def test_at_equal_utility_and_over_all(main, tmp_path):
    main(*SWEEP, "--utility", "0.9", "--tolerance", "0.5")
    written = content(tmp_path)["footing"]
    _, utility, fronts = written["readings"]
    rows = {r["name"]: r for r in utility["rows"]}
    # .9 of .84 is .756, and BLUR at gamma 1 keeps .755 in one seed; the ways are .4 and 1
    assert rows["BLUR-NPO"]["said"] == "keeps enough in 2 of 2 seeds, with gamma 0.3, 0.3"
    assert rows["GradDiff"]["metrics"]["forget_rouge"] == pytest.approx(0.9)
    rouge = utility["verdicts"][1]
    assert (rouge["column"], rouge["text"]) == ("forget rouge", "no difference shown (2 seeds)"), "NPO and BLUR alike"
    areas = {r["name"]: r["metrics"]["area"] for r in fronts["rows"]}
    whole = [0.4 * 0.83 + 0.6 * kept for kept in (0.755, 0.665)]
    assert areas["BLUR-NPO"] == pytest.approx(sum(whole) / 2 / 0.84)
    assert (written["level"], written["utility"]) == (0.5, 0.9) and len(written["points"]) == 12
    way = {(p["method"], p["strength"], p["seed"]): p["way"] for p in written["points"]}
    assert way["NPO", 0.3, 0] == pytest.approx(0.4), "ROUGE has moved least"
    assert way["NPO", 1, 1] == 1, "beyond the retrained model"


def test_a_sweep_goes_on_with_what_failed(main, tmp_path):
    printed, _ = main(*SWEEP, fail=["npo-forget_weight=1-1"])
    assert "npo-forget_weight=1-1: FAILED (status 1)" in printed
    said = {r["name"]: r.get("said") for r in content(tmp_path)["footing"]["readings"][0]["rows"]}
    assert said["NPO"] == "forgets enough in 1 of 2 seeds, with forget_weight 1"
    _, seen = main(*SWEEP, "--resume_from_checkpoint", "True")
    assert seen == [("npo", "1", "--forget_weight=1.0")]
    _, seen = main(*SWEEP, "3", "--resume_from_checkpoint", "True")
    assert len(seen) == 6 and {flag for *_, flag in seen} == {
        "--forget_weight=3.0",
        "--gamma=3.0",
        "--forget_weight=0.9",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strengths", "1", "-1"], r"--strengths \[1.0, -1.0\]: pass different numbers above 0"),
        (["--strengths", "1", "1"], "pass different numbers"),
        (["--strengths", "1", "--tolerance", "10"], "tolerance=10.0"),
        (["--strengths", "1", "--utility", "95"], r"utility=95.0"),
        (["--utility", "0.9"], "--utility: only a sweep reads it. Pass --strengths too"),
    ],
)
def test_wrong_arguments_of_a_sweep(main, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        main("--methods", "npo", *words)
    assert not (tmp_path / "out").exists()


def test_an_interrupt_ends_with_130(tmp_path, capsys):
    stops = "import os, signal; os.kill(os.getppid(), signal.SIGINT)"
    with pytest.raises(SystemExit) as raised:
        compare.finished(tmp_path / "npo-0", [sys.executable, "-c", stops])
    assert raised.value.code == 130 and "Go on with --resume_from_checkpoint true" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
