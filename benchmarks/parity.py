"""Is the update exact on every engine? One table, engine x feature; exit code 1 if a cell is off.

    python benchmarks/parity.py                        # all cells: two CPU processes, a few minutes
    python benchmarks/parity.py --engines fsdp2 zero3 --features sum lora
    python benchmarks/parity.py --markdown             # the table of benchmarks/results.md

A cell is `||w - w_ref|| / ||w_ref - w_start||` after three AdamW steps, `w_ref` from the literal single-process
training of tests/support/reference.py: no Trainer, no accumulation, no padding, both gradients as one flat vector each.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support.parity import CELLS, DEFAULT_TOLERANCE, ENGINES, FEATURES, TOLERANCE, launch


def table(errors: dict[str, float], markdown: bool) -> str:
    engines = [engine for engine in ENGINES if any(cell.startswith(f"{engine}:") for cell in errors)]
    features = [feature for feature in FEATURES if any(cell.endswith(f":{feature}") for cell in errors)]
    rows = [["", *features]]
    for engine in engines:
        values = [errors.get(f"{engine}:{feature}") for feature in features]
        rows.append([engine, *("-" if value is None else f"{value:.1e}" for value in values)])
    if markdown:
        rows = [list(column) for column in zip(*rows, strict=True)]  # a page is higher than wide
        rows.insert(1, ["---"] * len(rows[0]))
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join("".join(f"{text:>{18 if i == 0 else 14}}" for i, text in enumerate(row)) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--features", nargs="+", choices=list(FEATURES), default=list(FEATURES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    cells = [c for c in CELLS if c.split(":")[0] in options.engines and c.split(":")[1] in options.features]
    if not cells:
        parser.error("no such cell: this engine does not run with this feature")
    with tempfile.TemporaryDirectory() as folder:
        errors = launch(cells, folder, options.processes)
    print(table(errors, options.markdown))
    off = [c for c, value in errors.items() if not value <= TOLERANCE.get(c.split(":")[1], DEFAULT_TOLERANCE)]
    print(
        f"\n{len(errors) - len(off)} of {len(errors)} cells within tolerance"
        + (f"; off: {', '.join(off)}" if off else "")
    )
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
