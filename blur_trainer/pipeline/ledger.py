"""`ledger.json`: what a model was asked to forget, request after request, and what became of each, then and now."""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from blur_trainer.atomic_write import atomic_write
from blur_trainer.report.tables import MISSING

FILE = "ledger.json"
_KEYS = ("model", "requests")
_HEADS = ("request", "rows", "done", "level", "then", "loss", "ROUGE", "now", "loss now", "ROUGE now")
Request = dict[str, Any]
State = Mapping[str, Any]


class Ledger:
    """
    The requests in a folder, written whole or not at all. It has names, digests and numbers, and no text of the sets.

    A request has `number`, `name`, `rows`, `digest`, `read` (how its file is read), `folder`, `begun`, `finished`, and
    when it is finished `model` (the folder of the model that it left), `settings` (its run.yaml), `data` (digests of
    the other sets), `level`, `before` (what was measured before it), and `states`: what was measured of it after
    itself and after each later request.

    Args:
        folder: of the ledger.
        model: `name` and `sha256` of the first model.

    Raises:
        `ValueError`: the ledger that is there begins with another model, or cannot be read.
    """

    def __init__(self, folder: Path, model: Mapping[str, str]) -> None:
        self.path, self.model = folder / FILE, dict(model)
        self.requests: list[Request] = []
        if self.path.exists():
            content = read_ledger(self.path)
            if content["model"]["sha256"] != model["sha256"]:
                raise ValueError(
                    f"{self.path} begins with the model {content['model']['name']!r}, whose weights are others than "
                    f"those of {model['name']!r}: name that model, or pass another `output_dir`."
                )
            self.model, self.requests = content["model"], content["requests"]

    def find(self, digests: Sequence[str]) -> list[Request | None]:
        """The request of each digest, in order; `None` for one that is new. The second of two equal ones is another."""
        met: Counter[str] = Counter()
        found: list[Request | None] = []
        for digest in digests:
            same = [each for each in self.requests if each["digest"] == digest]
            found.append(same[met[digest]] if met[digest] < len(same) else None)
            met[digest] += 1
        return found

    def add(self, name: str, rows: int, digest: str, read: Mapping[str, Any]) -> Request:
        """Appends a request."""
        number = len(self.requests) + 1
        kept = {"number": number, "name": name, "rows": rows, "digest": digest, "read": dict(read)}
        self.requests.append({**kept, "folder": f"request-{number}", "begun": None, "finished": None, "states": []})
        return self.requests[-1]

    def write(self) -> None:
        text = json.dumps({"model": self.model, "requests": self.requests}, indent=1) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, lambda partial: partial.write_text(text, encoding="utf-8"))

    @property
    def finished(self) -> list[Request]:
        return [each for each in self.requests if each["finished"]]


def read_ledger(path: Path) -> dict[str, Any]:
    """The content of a `ledger.json`. Raises `ValueError` for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no ledger: {error}.") from error
    if not isinstance(content, dict) or not set(_KEYS) <= set(content):
        raise ValueError(f"{path} is no ledger: it lacks some of {', '.join(_KEYS)}.")
    return content


def now() -> str:
    """The time, in UTC."""
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def meets(requests: Sequence[Request], word: str) -> bool:
    """Whether all are finished, each has this verdict now, and no attack brought anything of it back."""
    states = [each["states"][-1] if each["finished"] else {} for each in requests]
    return all(state.get("verdict") == word and not _recovered(state) for state in states)


def sentences(requests: Sequence[Request]) -> list[str]:
    """What became of each request, the finished ones first. Where all is well, one sentence."""
    done = [each for each in requests if each["finished"]]
    found = [text for each in done for text in _became(each)]
    if done and not found:
        found = ["The request is forgotten." if len(done) == 1 else f"All {len(done)} requests are forgotten."]
    left = [str(each["number"]) for each in requests if not each["finished"]]
    return found + ([f"not finished: request {', '.join(left)}"] if left else [])


def ledger_table(requests: Sequence[Request]) -> dict[str, Any]:
    """For terminal, report and card: `title`, `said`, `heads`, `rows`. "Then" is after the request, "now" the last."""
    audited = any(state.get("audit") for each in requests for state in each["states"])
    rows = [[*_row(each), *(_audits(each) if audited else [])] for each in requests]
    heads = [*_HEADS, *(["audit then", "audit now"] if audited else [])]
    return {"title": "Requests", "said": sentences(requests), "heads": heads, "rows": rows}


def _row(request: Request) -> list[str]:
    first = [f"{request['number']}: {request['name']}", str(request["rows"])]
    if not request["finished"]:
        return [*first, *([MISSING] * (len(_HEADS) - 2))]
    states = [request["states"][0], request["states"][-1]]
    level = request["level"]
    return [*first, request["finished"][:10], f"{level['nats']:.2f}", *(text for one in states for text in _cells(one))]


def _cells(state: State) -> list[str]:
    if state["verdict"] is None:
        return ["not measured", MISSING, MISSING]
    numbers = state["numbers"]
    return [state["verdict"], f"{numbers['forget_loss']:.2f}", f"{numbers['forget_rouge']:.2f}"]


def _audits(request: Request) -> list[str]:
    """Of the first state and of the last."""
    states = request["states"]
    found = [state.get("audit") for state in (states[:1] + states[-1:] if states else ({}, {}))]
    return [MISSING if one is None else ", ".join(one["recovered"]) or "no recovery" for one in found]


def _became(request: Request) -> list[str]:
    then, last = request["states"][0], request["states"][-1]
    name, since = f"request {request['number']}", f"since request {_since(request)}"
    found = []
    if last["verdict"] is None:
        found.append(f"{name} is not measured after request {last['after']}: {last['why']}")
    elif last["known"] and not then["known"]:
        found.append(f"{name} was forgotten, and is known again {since} ({'; '.join(last['because'])})")
    elif last["known"]:
        found.append(f"{name} was not forgotten, and is known ({'; '.join(last['because'])})")
    elif last["verdict"] != "forgotten":
        before = "" if then["verdict"] == last["verdict"] else f" was {then['verdict']}, and"
        when = f" {since}" if before else ""
        found.append(f"{name}{before} is {last['verdict']}{when} ({'; '.join(last['because'])})")
    if back := _recovered(last):
        before = "" if last is then or _recovered(then) else ", which then brought nothing back"
        found.append(f"{name}: recovered by {', '.join(back)}{before}")
    return found


def _since(request: Request) -> int:
    """The request after which it became what it is now: known, or else of this verdict."""
    about = "known" if request["states"][-1]["known"] else "verdict"
    last = request["states"][-1]
    same = itertools.takewhile(lambda state: state[about] == last[about], reversed(request["states"]))
    return int([state["after"] for state in same][-1])


def _recovered(state: State) -> list[str]:
    return list((state.get("audit") or {}).get("recovered") or [])
