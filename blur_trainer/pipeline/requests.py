"""The requests of a sequence as its options name them: read once, and found in the ledger by their digests."""

from collections.abc import Mapping
from typing import Any

from trl import ModelConfig

from blur_trainer.data.reading import Reading
from blur_trainer.models.loading import hub_arguments
from blur_trainer.models.weights_digest import weights_digest
from blur_trainer.pipeline.arguments import (
    DERIVED,
    SourceArguments,
    UnlearnArguments,
    check_arguments,
    check_options,
    going_on,
)
from blur_trainer.pipeline.ledger import Ledger, Request
from blur_trainer.pipeline.methods import DISTILL
from blur_trainer.pipeline.preparing import NO_DTYPE, Prepared, mapping, prepare
from blur_trainer.pipeline.run_file import kind_of
from blur_trainer.pipeline.sets import made, read_set, read_tokenizer
from blur_trainer.pipeline.settings import process_count
from blur_trainer.saving.output_dir import holds_run

_READ = ("forget_columns", "forget_config", "forget_split", "limit")
_REFUSED = {
    "forget": "`sequence` says what to forget: leave `forget` out",
    "forgotten": "a sequence knows what was forgotten before: leave `forgotten` out",
    "paraphrased": "`paraphrased` is of one forget set: leave it out with `sequence`",
    "redact": "the ledger has digests of the rows, which `redact` leaves out: take `redact` or `sequence`",
    "push_to_hub": "`push_to_hub` would publish each model of a sequence: leave it out, and push the last one",
}


class Requests:
    """
    What is to be forgotten, read before anything is trained.

    Args:
        options: of a sequence. Those that are `None` count as left out.

    Attributes:
        options: of each run, but for its own sets and folder. `hub`: where the files of the first model are.

    Raises:
        `ValueError`, `TypeError`, `OSError`: what is wrong, with its remedy.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        given = {name: value for name, value in options.items() if value is not None and name != DERIVED}
        asked = given.pop("sequence", None)
        _check(given, asked)
        if given.get("use_peft"):
            given["merge"] = True  # the next request starts from the whole model
        self._asked = list(asked)
        method = check_options({**given, "forget": asked[0]})
        self._script = made(UnlearnArguments, {**given, "forget": asked[0], "method": method})
        self._source, model_args = made(SourceArguments, given), made(ModelConfig, {**NO_DTYPE, **given})
        check_arguments(self._script, model_args.use_peft)
        kwargs = mapping("model_init_kwargs", given.get("model_init_kwargs"))
        hub = hub_arguments({"revision": model_args.model_revision, **kwargs})
        self.hub = {name: value for name, value in hub.items() if name != "trust_remote_code"}
        name = self._script.tokenizer or str(model_args.model_name_or_path)
        self._tokenizer = read_tokenizer(name, self._source.chat_template, hub)
        self.options = given
        self._how = {key: given[key] for key in _READ if key in given}
        self._given = [self._read(rows, self._how) for rows in self._asked]
        self._sources: dict[int, Any] = {}
        self._readings: dict[int, Reading | None] = {}
        self._why: dict[int, str] = {}
        self._prepared: dict[int, Prepared] = {}

    def enter(self, ledger: Ledger) -> None:
        """Enters what is new into the ledger. Raises `ValueError` if the folder holds a run that is no sequence."""
        out = ledger.path.parent
        if not ledger.requests and (found := holds_run(str(out))):
            raise ValueError(f"{str(out)!r} holds a run that is no sequence ({', '.join(found)}): pass another folder.")
        known = ledger.find([reading.digest for reading in self._given])
        for request, reading, rows in zip(known, self._given, self._asked, strict=True):
            name = str(rows) if isinstance(rows, str) or hasattr(rows, "__fspath__") else kind_of(rows)
            entry = request or ledger.add(name, len(reading.dataset), reading.digest, self._how)
            self._sources[entry["number"]] = str(rows) if name == str(rows) else rows
            self._readings[entry["number"]] = reading
        for each in ledger.requests:
            if each["number"] not in self._readings:
                self._read_again(each)

    def reading(self, request: Request) -> Reading | None:
        """The rows of a request; `None` if they cannot be read."""
        return self._readings[request["number"]]

    def why(self, request: Request) -> str:
        """Why its rows are not there."""
        return self._why[request["number"]]

    def prepared(self, ledger: Ledger, request: Request) -> Prepared:
        """
        The run of a request. Raises `ValueError` if its rows are not there, or if the model that it starts from is
        another than the ledger has.
        """
        number = request["number"]
        if number not in self._prepared:
            self._prepared[number] = prepare(self._run_options(ledger, request))
        return self._prepared[number]

    def _run_options(self, ledger: Ledger, request: Request) -> dict[str, Any]:
        number, out = request["number"], ledger.path.parent
        folder = out / request["folder"]
        if self.reading(request) is None:
            raise ValueError(f"Request {number} is not finished, and {self.why(request)}: name it in `sequence`.")
        sources = [self._sources.get(each["number"]) for each in ledger.requests[:number]]
        options = {**self.options, "forget": sources[-1], "output_dir": str(folder)}
        options["forgotten"] = [each for each in sources if each is not None]
        if number > 1:
            before = ledger.requests[number - 2]
            options["model_name_or_path"] = str(out / before["model"])
            options.pop("model_revision", None)
            if weights_digest(options["model_name_or_path"]) != before["sha256"]:
                raise ValueError(f"The weights in {out / before['model']} are others than the ledger has.")
        if holds_run(str(folder)):
            options["resume_from_checkpoint"] = True
        return options

    def _read(self, rows: Any, how: Mapping[str, Any]) -> Reading:
        source = made(SourceArguments, {**vars(self._source), **dict.fromkeys(_READ), **how})
        return read_set("forget", self._script, source, self._tokenizer, bool(self.options.get("drop_empty")), rows)

    def _read_again(self, request: Request) -> None:
        """A request of an earlier call, by its name and as it was read then."""
        number, name = request["number"], request["name"]
        self._readings[number] = None
        try:
            reading = self._read(name, request["read"])
        except (ValueError, TypeError, OSError):
            self._why[number] = f"its rows are not there any more ({name})"
            return
        if reading.digest != request["digest"]:
            self._why[number] = f"its rows are others than they were ({name})"
            return
        self._readings[number] = reading
        self._sources[number] = name if request["read"] == self._how else reading


def _check(given: dict[str, Any], asked: Any) -> None:
    """Raises for what a sequence cannot do. Going on is what it does by itself."""
    for name, why in _REFUSED.items():
        if given.get(name):
            raise ValueError(f"{why[0].upper()}{why[1:]}.")
    if isinstance(asked, str) or not asked or not all(asked):
        raise ValueError(f"`sequence` takes a list of sets to forget, one or more, got {asked!r}.")
    if "-" in [each for each in asked if isinstance(each, str)]:
        raise ValueError("`sequence` reads its sets more than once, and standard input can be read once: give files.")
    if given.get("method") in ("uld", DISTILL):
        raise ValueError(
            "`sequence` is not for uld, which leaves two models, nor for distill, which starts from two: each request "
            "starts from one."
        )
    if isinstance(going_on(given.pop("resume_from_checkpoint", None)), str):
        raise ValueError("A sequence goes on by itself: leave `resume_from_checkpoint` out.")
    if process_count() > 1:
        raise ValueError(
            "`sequence` runs with one process. With several, run `unlearn` for each request, and name the earlier ones "
            "by `forgotten`."
        )
