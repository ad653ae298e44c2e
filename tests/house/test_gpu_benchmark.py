"""`benchmarks/gpu/run.py`: its minutes, its table, sections that fail or come too late; `full`: each section, tiny."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks" / "gpu"
sys.path += [str(GPU.parent), str(GPU)]

bandwidth, run, sections, table = map(importlib.import_module, ("bandwidth", "run", "sections", "table"))
row, write_rows = (getattr(importlib.import_module("rows"), name) for name in ("row", "write_rows"))

ROWS = [
    row("a step", 0.97, "of two stock steps", most=1.0, spread=(0.95, 0.99)),
    row("tokens | s", 0.83, "of the limit", least=0.9),
    row("copy", 2345.0, "GB/s"),
]


def python(code, limit=60.0, **kwargs):
    """A section that runs some lines; they find the path of its JSON in `sys.argv`."""
    return sections.Section("what it asks", limit, ["-c", f"import json, sys, time\n{code}", "{json}"], **kwargs)


def writes(rows, then=""):
    return f"open(sys.argv[1], 'w').write({json.dumps(json.dumps({'rows': rows}))})\n{then}"


def started(folder, sections, *arguments):
    """Exit code, results and the table."""
    code = run.main(["--device", "cpu", "--out", str(folder), *arguments], sections)
    return code, json.loads((folder / "results.json").read_text()), (folder / "results.md").read_text().splitlines()


def test_numbers_stand_beside_their_aims(tmp_path):
    code, results, lines = started(tmp_path, {"one": python(writes(ROWS), alone=False), "two": python("")})
    assert code == 0 and [result["verdict"] for result in results.values()] == ["passed", "passed"]
    assert results["one"]["json"]["rows"] == ROWS and results["one"]["what"] == "what it asks"
    assert "| one | a step | 0.97 (0.95–0.99) of two stock steps | at most 1 | met |" in lines
    assert "| one | tokens \\| s | 0.83 of the limit | at least 0.9 | **missed** |" in lines
    assert "| one | copy | 2,345 GB/s |" in lines
    assert sum(line.startswith("| two |") for line in lines) == 1


def test_a_section_that_fails_or_does_not_end_stops_no_other(tmp_path):
    made = {
        "fails": python("sys.exit('no GPU is visible')", alone=False),
        "hangs": python(writes(ROWS[:1], "sys.stdout.flush(); time.sleep(60)"), limit=1.0, alone=False),
        "last": python(writes(ROWS[2:])),
    }
    code, results, lines = started(tmp_path, made)
    assert code == 1
    assert {name: result["verdict"] for name, result in results.items()} == {
        "fails": "failed",
        "hangs": "cut off",
        "last": "passed",
    }
    assert results["hangs"]["json"]["rows"] == ROWS[:1] and results["hangs"]["seconds"] < 20
    assert any(line.startswith("| hangs | a step | 0.97") for line in lines)  # what it had written counts
    assert any(
        line.startswith("| fails | what it asks | **failed** |") and "no GPU is visible" in line for line in lines
    )
    assert "[fails] no GPU is visible" in (tmp_path / "log.txt").read_text()


def test_what_the_minutes_do_not_allow_is_not_run(tmp_path):
    """Too little time is left for the second; it bounds the third."""
    waits = "time.sleep(60)"
    made = {"one": python(waits, limit=1.0), "two": python("", limit=600.0), "three": python(waits, limit=3.0)}
    code, results, lines = started(tmp_path, made, "--minutes", str(3 / 60))
    assert code == 1 and results["three"]["verdict"] == "cut off" and results["three"]["seconds"] < 2.9
    assert results["two"]["verdict"] == "not run" and "it takes up to 600 s" in results["two"]["why"]
    assert any("**not run**" in line and "it takes up to 600 s" in line for line in lines)


def test_sections_can_be_chosen(tmp_path):
    made = {"one": python(""), "two": python(""), "three": python("")}
    assert list(started(tmp_path, made, "--skip", "two")[1]) == ["one", "three"]
    assert list(started(tmp_path, made, "--only", "three,one")[1]) == ["one", "three"]
    with pytest.raises(SystemExit, match="no such section: four; there are: one, two, three"):
        run.main(["--out", str(tmp_path), "--skip", "four"], made)


def test_cells_are_counted():
    found = {"zero1:sum": {"good": True, "value": 1e-6}, "zero2:sum": {"good": False, "error": "no"}}
    result = {"what": "cells", "verdict": "failed", "seconds": 3.0, "json": found, "output": ["1 of 2", ""]}
    lines = table.table({"zero": result}).splitlines()
    assert "| zero | good; not: zero2:sum | 1 of 2 | at least 2 | **missed** |" in lines
    assert "| zero | cells | **failed** | 3 | 1 of 2 |" in lines


def test_launches_are_added_up():
    found = {"BLUR step": {"operators": {"add": 3.0, "mul": 4.5}, "waits": {"backend.py:1": 1.0}, "bytes": {}}}
    lines = table.table(
        {"launches": {"what": "counts", "verdict": "passed", "seconds": 3.0, "json": found}}
    ).splitlines()
    assert "| launches | BLUR step: kernel launches | 7.5 |" in lines
    assert "| launches | BLUR step: waits of the host | 1 |" in lines


def test_rows_know_whether_they_are_within_their_aim(tmp_path):
    assert [found.get("met") for found in ROWS] == [True, False, None]
    assert row("x", float("nan"), most=1.0)["met"] is False and row("x", 1.2, least=0.9, most=1.1)["met"] is False
    write_rows(tmp_path / "rows.json", ROWS, failed=["one"])
    assert json.loads((tmp_path / "rows.json").read_text()) == {"rows": ROWS, "failed": ["one"]}


def test_the_command_lines_name_what_exists():
    for section in run.SECTIONS.values():
        for command in (section.command, section.tiny or section.command):
            files = [word for word in command if word.startswith("/") or word.startswith("tests/")]
            assert all((ROOT / word).exists() for word in files), command
    alone = [section.limit for section in sections.ALONE.values()]
    assert max(section.limit for section in sections.TOGETHER.values()) + sum(alone[:3]) <= 60 * run.MINUTES


def test_the_gramian_against_a_copy(tmp_path, monkeypatch):
    """The cheapest section, in this process."""
    path = tmp_path / "bandwidth.json"
    monkeypatch.setattr("sys.argv", ["bandwidth.py", "--device", "cpu", "--tiny", "--json", str(path)])
    assert bandwidth.main() == 0
    rows = json.loads(path.read_text())["rows"]
    errors = {found["what"]: found for found in rows if "error" in found["what"]}
    assert "tiny, bfloat16: Gramian, error" in errors and all(found["met"] for found in errors.values())
    shares = [found for found in rows if found["what"].endswith("share of the bandwidth")]
    assert {"tiny, float32: combination, share of the bandwidth"} <= {found["what"] for found in shares}
    assert all(found["value"] > 0 for found in shares)


@pytest.mark.full
def test_every_section_runs_on_a_cpu(tmp_path):
    command = [sys.executable, str(GPU / "run.py"), "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--minutes", "60", "--patience", "8"], capture_output=True, text=True, check=False)
    results = json.loads((tmp_path / "results.json").read_text())
    off = {name: result for name, result in results.items() if result["verdict"] != "passed"}
    assert not off and done.returncode == 0 and list(results) == list(run.SECTIONS), off
    assert "| steps | tiny: BLUR (ascent) |" in (tmp_path / "results.md").read_text()
