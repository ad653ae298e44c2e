"""Request after request: each starts from the model that the one before left, and old ones are measured again."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tabulate import tabulate

from blur_trainer.data.reading import Reading
from blur_trainer.models.weights_digest import weights_digest
from blur_trainer.pipeline.audited import audited
from blur_trainer.pipeline.ledger import Ledger, Request, ledger_table, meets, now
from blur_trainer.pipeline.quiet import quiet
from blur_trainer.pipeline.remeasured import remeasured, state_of
from blur_trainer.pipeline.requests import Requests
from blur_trainer.pipeline.run_file import write_sequence
from blur_trainer.pipeline.training import MERGED
from blur_trainer.pipeline.unlearn import Unlearned, run
from blur_trainer.report.later_tables import add_tables
from blur_trainer.saving.output_dir import check_writable
from blur_trainer.scripts.loading import ModelLoader


@dataclass(frozen=True)
class Sequenced:
    """
    What a sequence of requests gave.

    Args:
        requests: of `ledger.json`, see [`~blur_trainer.pipeline.ledger.Ledger`].
        output_dir: with `ledger.json`, and a folder for each request.
        model: the folder of the last model; `None` if no request is finished.
        last: the run of the last request; `None` if none was left to do.
        sentences: what became of the requests.
    """

    requests: tuple[Request, ...]
    output_dir: Path
    model: Path | None
    last: Unlearned | None
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        table = ledger_table(self.requests)
        aligned = ["left", *["right"] * (len(table["heads"]) - 1)]
        shown = tabulate(table["rows"], table["heads"], disable_numparse=True, colalign=aligned)
        where = [] if self.model is None else [f"The model is in {self.model}."]
        run = [] if self.last is None else [str(self.last)]
        return "\n\n".join([*run, shown, "\n".join([*where, *self.sentences])])

    def meets(self, word: str) -> bool:
        """Whether each request has this verdict now, and no attack brought anything of it back."""
        return meets(self.requests, word)


def unlearn_sequence(
    model: str, requests: Sequence[Any], retain: Any, output_dir: str | Path = "unlearned", **options: Any
) -> Sequenced:
    """
    Makes a model forget request after request. The command `blur-trainer unlearn --sequence` does the same.

    Each request is a run of [`unlearn`] in `output_dir/request-1` and so on. It starts from the model of the request
    before. Rows of all requests so far are left out of `retain`, `hold` and the texts to replay. After each request
    the older ones are measured again, without training. `ledger.json` says of each what was forgotten, when, by which
    settings, and its verdict then and now.

    The same call goes on after an interrupt. A later call with more requests appends them: those that the ledger has
    are not done again. To forget a request once more, name it a second time.

    Args:
        model (`str`): the first model, a folder or a name on the Hub. The same in each call.
        requests (`list`): what to forget, in order: files, folders, datasets on the Hub, or in memory.
        retain: what to keep.
        output_dir (`str`): a new folder, or one with a ledger.
        options: as of [`unlearn`], but for `paraphrased`, `redact`, `push_to_hub`, `method="uld"`. With `use_peft` the
            adapter of each request is merged. With `audit`, the older requests are attacked again at the end.

    Returns:
        [`Sequenced`]

    Raises:
        `ValueError`, `TypeError`: an option or a row is wrong; the ledger is of another model.
    """
    return run_sequence(
        {
            "model_name_or_path": model,
            "sequence": requests if isinstance(requests, str) else list(requests),
            "retain": retain,
            "output_dir": output_dir,
            **options,
        }
    )


def run_sequence(options: Mapping[str, Any]) -> Sequenced:
    """As [`unlearn_sequence`], with all options by name."""
    asked = Requests(options)
    out = Path(str(asked.options["output_dir"]))
    first = str(asked.options["model_name_or_path"])
    check_writable(str(out))
    ledger = Ledger(out, {"name": first, "sha256": weights_digest(first, **asked.hub)})
    asked.enter(ledger)
    ledger.write()
    write_sequence(out, {**asked.options, "sequence": [each["name"] for each in ledger.requests]})
    last = None
    for request in ledger.requests:
        if not request["finished"]:
            PartialState().print(f"\nRequest {request['number']}: {request['name']}", file=sys.stderr)
            last = _done(ledger, request, asked)
            if not request["finished"]:
                break  # it left no model for the next
        _look_back(ledger, request, asked)
    _audit_older(ledger, asked)
    done = ledger.finished
    table = ledger_table(ledger.requests)
    if done:
        add_tables(out / done[-1]["folder"], [table])
    model = out / done[-1]["model"] if done else None
    return Sequenced(tuple(ledger.requests), out, model, last, tuple(table["said"]))


def _done(ledger: Ledger, request: Request, asked: Requests) -> Unlearned:
    """The run of a request, entered into the ledger. One that leaves no model is not finished."""
    prepared = asked.prepared(ledger, request)
    request["begun"] = request["begun"] or now()
    ledger.write()
    done = run(prepared)
    folder, level = request["folder"], done.level
    model = f"{folder}/{MERGED}" if prepared.model_args.use_peft else folder
    try:
        digest = weights_digest(str(ledger.path.parent / model))
    except OSError:
        return done
    request |= {
        "model": model,
        "sha256": digest,
        "settings": f"{folder}/run.yaml",
        "data": {role: reading.digest for role, reading in prepared.sets.items()},
        "level": {"nats": level.nats, "source": level.source, "rouge": level.rouge},
        "before": done.metrics["before"],
        "retrained": done.metrics.get("retrained"),
        "states": [state_of(request["number"], done.verdict, done.metrics["after"], done.audit)],
        "finished": now(),
    }
    ledger.write()
    return done


def _look_back(ledger: Ledger, request: Request, asked: Requests) -> None:
    """Measures all older requests on the model that this one left, unless that was done."""
    number = request["number"]
    older = [each for each in ledger.requests[: number - 1] if each["states"][-1]["after"] < number]
    if not older:
        return
    prepared, model = asked.prepared(ledger, request), None
    for old in older:
        rows = asked.reading(old)
        if rows is None:
            state = {"after": number, "verdict": None, "known": None, "numbers": {}, "why": asked.why(old)}
        else:
            with quiet():
                if model is None:
                    load = ModelLoader(prepared.args, prepared.model_args)
                    model = load(str(ledger.path.parent / request["model"]))
                PartialState().print(f"Request {old['number']} is measured again.", file=sys.stderr)
                state = remeasured(prepared, old, request, rows, model)
        old["states"].append(state)
        ledger.write()


def _audit_older(ledger: Ledger, asked: Requests) -> None:
    """Attacks the last model for each older request, if an audit is asked for."""
    if not asked.options.get("audit") or len(ledger.finished) < 2:
        return
    out, last = ledger.path.parent, ledger.finished[-1]
    prepared = asked.prepared(ledger, last)
    for old in ledger.finished[:-1]:
        state, rows = old["states"][-1], asked.reading(old)
        if rows is None or state.get("audit"):
            continue
        before = ledger.model["name"] if old["number"] == 1 else str(out / ledger.requests[old["number"] - 2]["model"])
        PartialState().print(f"\nRequest {old['number']} is attacked again.", file=sys.stderr)
        found = audited(
            _of(prepared, rows), out / last["model"], out / last["folder"] / f"audit-of-{old['number']}", before
        )
        state["audit"] = {"sentence": found.sentence, "recovered": list(found.recovered)}
        ledger.write()


def _of(prepared: Any, rows: Reading) -> Any:
    """The same run, with another request's rows."""
    return replace(prepared, sets={**prepared.sets, "forget": rows})
