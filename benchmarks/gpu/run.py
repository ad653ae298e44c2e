"""Everything that is worth asking a GPU, in one run of at most eight minutes; a section that fails stops no other.

    python benchmarks/gpu/run.py --out results                     # on one GPU
    python benchmarks/gpu/run.py --out results --only plain,zero   # some sections; --skip leaves some out
    python benchmarks/gpu/run.py --out results --minutes 20 --all-cells
    python benchmarks/gpu/run.py --list
    python benchmarks/gpu/run.py --out results --device cpu --tiny # does every section run at all? No GPU needed

Each section is a process of its own with its own limit, then ended with all that it started. First, all at once, what
is not timed; then the rest, one after the other, the most important first. What the minutes do not allow any more is
"not run". Written: `results.md` (the numbers, beside their aims), `results.json` (all that the sections wrote, also if
they were cut off), `log.txt` (all output). It needs nothing of the network.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from process import Log, perform, stop
from sections import SECTIONS, Section
from table import table

MINUTES = 8.0
#: a section that gets less than this share of its limit is not started
ENOUGH = 0.5


class Run:
    """The sections' results, and the time that is left."""

    def __init__(self, options: argparse.Namespace, sections: Mapping[str, Section]):
        self.options, self.sections = options, sections
        self.log, self.results = Log(options.out / "log.txt"), {}
        self.end = time.monotonic() + 60 * options.minutes

    def __call__(self, name: str, folder: Path) -> None:
        section, left = self.sections[name], self.end - time.monotonic()
        if left < ENOUGH * section.limit:
            why = f"{max(left, 0):.0f} s were left, and it takes up to {section.limit:.0f} s"
            self.results[name] = {"what": section.what, "verdict": "not run", "seconds": 0.0, "why": why}
            self.log(name, f"== not run: {why}")
            return
        command = (self.options.tiny and section.tiny) or (self.options.all_cells and section.whole) or section.command
        limit = min(left, section.limit * self.options.patience)
        path = folder / f"{name}.json"
        self.results[name] = perform(name, section.what, command, limit, self.options.device, path, self.log)

    def write(self) -> str:
        """The table. Sections stand in their own order, not in the order in which they ended."""
        ordered = {name: self.results[name] for name in self.sections if name in self.results}
        (self.options.out / "results.json").write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
        text = table(ordered)
        (self.options.out / "results.md").write_text(text + "\n", encoding="utf-8")
        return text


def rounds(names: Sequence[str], sections: Mapping[str, Section], one_by_one: bool) -> list[list[str]]:
    """Sections that run at the same time, in the order in which these groups start."""
    together = [name for name in names if not sections[name].alone]
    alone = [[name] for name in names if sections[name].alone]
    return [[name] for name in together] + alone if one_by_one else [together] * bool(together) + alone


def chosen(options: argparse.Namespace, sections: Mapping[str, Section]) -> list[str]:
    """Names in the order of the sections. An unknown name is an error."""
    only, skip = (set(filter(None, (value or "").split(","))) for value in (options.only, options.skip))
    if unknown := sorted((only | skip) - set(sections)):
        raise SystemExit(f"no such section: {', '.join(unknown)}; there are: {', '.join(sections)}")
    return [name for name in sections if (not only or name in only) and name not in skip]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for results.md, results.json and log.txt")
    parser.add_argument("--only", help="sections, by commas")
    parser.add_argument("--skip", help="sections, by commas")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it")
    parser.add_argument("--list", action="store_true", help="the sections and their limits")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes; one section at a time")
    parser.add_argument("--all-cells", action="store_true", help="all cells of plain, ddp_fsdp2 and zero, not a third")
    parser.add_argument("--patience", type=float, default=1.0, help="times the sections' limits")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, sections: Mapping[str, Section] = SECTIONS) -> int:
    options = arguments(argv)
    if options.list or not options.out:
        for name, section in sections.items():
            print(f"{name:14} {section.limit:5.0f} s  {section.what}{'' if section.alone else ', beside others'}")
        return 0
    names = chosen(options, sections)
    options.out.mkdir(parents=True, exist_ok=True)
    run, start = Run(options, sections), time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(sections)) as pool:
        for group in rounds(names, sections, one_by_one=options.tiny):
            list(pool.map(lambda name: run(name, Path(folder)), group))
            run.write()
    print(f"\n{run.write()}\n\nall: {time.monotonic() - start:.0f} s", flush=True)
    return 0 if all(result["verdict"] == "passed" for result in run.results.values()) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main())
