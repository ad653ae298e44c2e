"""What the sections found, as Markdown: numbers with an aim, the other numbers, and how each section went.

python benchmarks/gpu/table.py results/results.json
"""

import json
import sys
from pathlib import Path
from typing import Any

VERDICTS = {True: "met", False: "**missed**"}


def number(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def shown(row: dict[str, Any]) -> str:
    spread = f" ({'–'.join(number(value) for value in row['spread'])})" if "spread" in row else ""
    return f"{number(row['value'])}{spread} {row.get('unit', '')}".strip()


def aim(row: dict[str, Any]) -> str:
    """`at least .9`, `at most 1`, `.9 to 1.1`."""
    least, most = row.get("least"), row.get("most")
    if least is not None and most is not None:
        return f"{number(least)} to {number(most)}"
    return f"at least {number(least)}" if least is not None else f"at most {number(most)}"


def cells(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a section whose JSON is a mapping of names to `{"good": ..., "value": ...}`: how many are good."""
    judged = {name: one for name, one in found.items() if isinstance(one, dict) and "good" in one}
    if not judged:
        return []
    off = [name for name, one in judged.items() if not one["good"]]
    what = "good" + (f"; not: {'; '.join(off)}" if off else "")
    return [
        {
            "what": what,
            "value": len(judged) - len(off),
            "unit": f"of {len(judged)}",
            "least": len(judged),
            "met": not off,
        }
    ]


def counts(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Of `launches.py`: by what is counted, the sum over all operators or lines that it was counted at."""
    units = {"operators": "kernel launches", "waits": "waits of the host"}
    return [
        {"what": f"{name}: {unit}", "value": sum(by_name[field].values())}
        for name, by_name in found.items()
        for field, unit in units.items()
        if isinstance(by_name, dict) and field in by_name
    ]


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    found = result.get("json")
    if isinstance(found, list):
        return found
    if not isinstance(found, dict):
        return []
    return found.get("rows", []) if "rows" in found else cells(found) + counts(found)


def last_words(result: dict[str, Any]) -> str:
    """Why a section did not pass: what it says, its own list of failures, or the last line that it printed."""
    found = result.get("json")
    failed = found.get("failed", []) if isinstance(found, dict) else []
    printed = [line for line in result.get("output", []) if line.strip()]
    words = result.get("why") or "; ".join(failed) or (printed[-1] if printed else "")
    return escaped(words)[:200]


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def table(results: dict[str, dict[str, Any]]) -> str:
    found = {name: rows_of(result) for name, result in results.items()}
    lines = ["| section | with an aim | measured | aim | |", "|---|---|---|---|---|"]
    for name, rows in found.items():
        aimed = [row for row in rows if "met" in row]
        lines += [f"| {name} | {escaped(r['what'])} | {shown(r)} | {aim(r)} | {VERDICTS[r['met']]} |" for r in aimed]
    lines += ["", "| section | other numbers | measured |", "|---|---|---|"]
    for name, rows in found.items():
        lines += [f"| {name} | {escaped(r['what'])} | {shown(r)} |" for r in rows if "met" not in r]
    lines += ["", "| section | what | how it went | seconds | last words |", "|---|---|---|---|---|"]
    for name, result in results.items():
        verdict = result["verdict"] if result["verdict"] == "passed" else f"**{result['verdict']}**"
        words = "" if result["verdict"] == "passed" else last_words(result)
        lines.append(f"| {name} | {result['what']} | {verdict} | {result['seconds']:.0f} | {words} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
