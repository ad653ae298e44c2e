"""The report in a real browser: nothing runs over the page's edge, and every image is shown."""

import html
import json
import re
import shutil
import subprocess

import pytest
from support import own_run

from blur_trainer.report.html import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')  # it forbids scripts, ours too
SCRIPT = """<script>addEventListener("load", () => {
  const root = document.documentElement, images = [...document.images];
  const boxes = [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll"));
  parent.postMessage(JSON.stringify({inner: innerWidth, scroll: root.scrollWidth, images: images.length,
    missing: images.filter(i => !i.complete || !i.naturalWidth).length,
    cut: boxes.filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80)),
    source: images.map(i => i.currentSrc === i.src)}), "*");
});</script>"""
# a window is at least 500 pixels wide, a frame may be narrower
FRAME = """<!DOCTYPE html><script>addEventListener("message", e => document.body.append(e.data));</script>
<iframe src="copy.html" style="width: %dpx; height: 2000px; border: 0"></iframe>"""
STATE = {
    "log_history": [
        {
            "step": step,
            "loss": 1.0,
            "loss/forget": step,
            "loss/retain": 0.1,
            "grad/cosine": 0.1,
            "grad/forget_norm": 1.0,
        }
        for step in (1, 2, 3)
    ]
}
# the columns of another run, as wide as they get
WIDE = {"columns": [{"name": f"metric_{i}", "label": f"Metric number {i}", "goal": "min"} for i in range(14)]}
WIDE["rows"] = [
    {"name": name, "kind": kind, "metrics": {f"metric_{i}": 10.0 * i for i in range(14)}}
    for name, kind in (("target", "target"), (own_run.LONG, "unlearned"))
]
CASES = {"own": own_run.metrics(), "other": own_run.metrics(verdict=None) | WIDE}

pytestmark = [pytest.mark.full, pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")]


def shown(folder, width, *options):
    """What the page is like in a window of this width."""
    text = POLICY.sub(SCRIPT, (folder / "report.html").read_text(encoding="utf-8"), count=1)
    (folder / "copy.html").write_text(text, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME % width, encoding="utf-8")
    done = run(folder, "--window-size=1400,2000", *options, "--dump-dom", (folder / "frame.html").as_uri())
    return json.loads(html.unescape(re.search(r"{.*}", done.stdout.partition("</iframe>")[2], re.DOTALL)[0]))


def run(folder, *options):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "metrics.json").write_text(json.dumps(CASES[request.param]), encoding="utf-8")
    (folder / "trainer_state.json").write_text(json.dumps(STATE), encoding="utf-8")
    write_report(folder)
    return folder


@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_runs_over_the_edge_and_no_image_is_missing(folder, width):
    found = shown(folder, width)
    assert found["inner"] == width, "the browser has another width than was asked for"
    assert found["scroll"] <= found["inner"] and not found["cut"]
    assert found["images"] >= 3 and found["missing"] == 0


def test_dark_paper_has_dark_figures(folder):
    assert all(shown(folder, 1200)["source"])
    dark = shown(folder, 1200, "--blink-settings=preferredColorScheme=0")
    assert not any(dark["source"]) and dark["missing"] == 0


def test_it_prints(folder):
    path = folder / "report.pdf"
    run(folder, f"--print-to-pdf={path}", (folder / "report.html").as_uri())
    assert path.read_bytes().startswith(b"%PDF") and path.stat().st_size > 20_000
