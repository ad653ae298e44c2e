"""An audit: a battery of attacks on a model that is said to have forgotten, beside a control, with a certificate."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from blur_trainer.checks import check_value
from blur_trainer.pipeline.audit_budget import Budget, Name, budget_of
from blur_trainer.pipeline.audit_fit import cut_budget, cuts_said, fit
from blur_trainer.pipeline.audit_plan import battery, left_out, plan_table, seconds_of
from blur_trainer.pipeline.audit_report import results_of
from blur_trainer.pipeline.audit_rows import Reader, Side, parted
from blur_trainer.pipeline.audit_world import Attack, World
from blur_trainer.pipeline.certificate import Certificate, subject
from blur_trainer.pipeline.measure import Sets
from blur_trainer.pipeline.quiet import quiet
from blur_trainer.report.results import Results


@dataclass(frozen=True)
class Audit:
    """
    What [`audit`] found.

    Args:
        sentence: `"no recovery under these attacks at this budget (...)"`, or `"recovered by: ..."` and the attacks.
        recovered: the names of the attacks that brought something back.
        certificate: the content of `audit.json`.
        results: for [`write_report`].
    """

    sentence: str
    recovered: tuple[str, ...]
    certificate: dict[str, Any]
    results: Results

    def __str__(self) -> str:
        return self.sentence


def audit(
    sets: Sets | Mapping[str, Any],
    output_dir: str | os.PathLike[str],
    budget: Name = "minutes",
    seed: int = 0,
    perturb: Mapping[str, Callable[[str], str]] | None = None,
) -> Audit:
    """
    Attacks a model that is said to have forgotten, and writes down what was tried and what came back.

    The attacks: the plain question, 8 and 4 bits and NF4, the beginning of an answer, solved examples, paraphrases,
    questions as `perturb` makes them, beam search, searches for the least likely answer, noise on the weights, pruning,
    relearning of a part of the forget set (another part is measured), of `retain` and of `hold` at several rates, also
    by LoRA, leak@k, and, with a retrained model, probes and unlearning depth.

    Each is done on a control, too: on the `retrained` model, if there is one; else on the model itself with the rows of
    `unseen` in place of those of `forget`. An attack *recovers* the answers if a number of the attacked model, ROUGE or
    probability of the true answer, is above that of the attacked control by more than .05, by more than two standard
    errors, and with a confidence of 99 %. With many attacks one of them may do so by chance, so look at the numbers.
    Without any control the model as it is takes its place.

    What each attack costs is said before it starts, and what does not fit into the budget's time is cut. Each is
    written to `audit.json` when it is done. The same call goes on where it was interrupted.

    Args:
        sets: a `Sets`, or the options of `blur-trainer audit` by name. Sets may be rows in memory.
        output_dir: a folder for `audit.json`, the certificate. It has numbers and digests, and no text of the sets.
        budget: `"minutes"` (under ten of them for a model of 3 M weights on one CPU core) or `"hours"`.
        seed: of all draws.
        perturb: name -> a function from a question to another question, such as its translation. Answers stay. It is
            called for the rows that are measured. The certificate has the names.

    Raises:
        `ValueError` or `TypeError`: the folder has the certificate of another audit; an option is wrong; a set of less
        than four rows.

    Example:

    ```python
    found = bt.audit({"model_name_or_path": "unlearned", "forget": "forget.csv", "retrained": "retrained"}, "audited")
    print(found)
    ```
    """
    limits = budget_of(budget)
    check_value("seed", seed, (int,), "[0, 4294967295]")
    if PartialState().num_processes > 1:
        raise ValueError("An audit runs with one process: start it without a launcher.")
    rewordings = _rewordings(perturb)
    given = sets if isinstance(sets, Sets) else Sets(sets)
    check_sizes(given)
    control = control_of(given)
    certificate = Certificate(Path(output_dir), subject(given, limits.said(), seed), control)
    with quiet():
        _attack(_Worlds(given, seed, control, rewordings), limits, certificate)
    content = certificate.content()
    back = tuple(one["name"] for one in content["attacks"] if one["recovered"])
    return Audit(content["sentence"], back, content, results_of(content))


def _attack(worlds: "_Worlds", limits: Budget, certificate: Certificate) -> None:
    """Plans, or goes on with what was planned."""
    seconds = None
    if certificate.cut is None:
        seconds = seconds_of(worlds(limits))
        certificate.cut = fit(limits, worlds, seconds, battery)
    cut = certificate.cut
    world = worlds(cut_budget(limits, cut))
    attacks = [one for one in battery(world) if one.name not in cut["not_tried"]]
    certificate.planned = [one.name for one in attacks]
    certificate.left_out = [*cuts_said(limits, cut), *left_out(world, worlds.others)]
    certificate.write()
    _run(attacks, world, certificate, seconds)


def _rewordings(perturb: Any) -> dict[str, Callable[[str], str]]:
    found = dict(perturb or {})
    for name, change in found.items():
        if not isinstance(name, str) or not callable(change):
            raise TypeError(f"`perturb` maps names to functions of a question, got {name!r}: {change!r}.")
    return found


def control_of(sets: Sets) -> str:
    """Which control there is: `"retrained"`, `"unseen"` or `"none"`."""
    if sets.script.retrained is not None:
        return "retrained"
    return "unseen" if "unseen" in sets.readings else "none"


def check_sizes(sets: Sets) -> None:
    """Raises before a model is loaded."""
    for role in ("forget", "unseen"):
        if role in sets.readings:
            parted(sets.readings[role].dataset, 1, 0)


class _Worlds:
    """The models, loaded once, and what is attacked under a budget: `others` forget rows are not relearned."""

    def __init__(self, sets: Sets, seed: int, control: str, rewordings: Mapping[str, Callable[[str], str]]) -> None:
        script = sets.script
        self._sets, self._seed, self._control, self._rewordings = sets, seed, control, rewordings
        self._model = sets.load(sets.model, to_train=True)
        beside = control == "retrained"
        self._retrained = sets.load(str(script.retrained), to_train=True) if beside else None
        self._before = sets.load(script.before, to_train=True) if script.before and beside else None
        self.others = 0

    def __call__(self, budget: Budget) -> World:
        sets, most = self._sets, min(budget.rows, self._sets.script.eval_rows)
        reader = Reader(sets, budget.new_tokens)
        part, rest, self.others = parted(sets.readings["forget"].dataset, most, self._seed)
        other: Side | None = None
        if self._retrained is not None:
            other = reader.side("retrained", self._retrained, part, rest)
        elif self._control == "unseen":
            unseen = parted(sets.readings["unseen"].dataset, most, self._seed)
            other = reader.side("unseen", self._model, *unseen[:2])
        beside = {role: reading.dataset for role, reading in sets.readings.items() if role not in ("forget", "unseen")}
        ours = reader.side("unlearned", self._model, part, rest)
        return World(reader, budget, self._seed, ours, other, self._before, beside, rewordings=self._rewordings)


def _tried(attack: Attack, world: World) -> dict[str, Any]:
    """What the attack found. One that this model or these rows do not allow is not judged, and says why."""
    try:
        return attack.run(world)
    except (ValueError, FloatingPointError) as error:
        return {"numbers": {}, "control": {}, "compared": {}, "recovered": None, "why": str(error)}


def _run(
    attacks: Sequence[Attack], world: World, certificate: Certificate, seconds: Mapping[str, float] | None
) -> None:
    done = certificate.attacks
    left = [one for one in attacks if one.name not in done]
    plain = done.get("plain question")
    if plain is not None:
        world.plain = plain["rows"]
    if not left:
        return
    sys.stderr.write(f"{plan_table(attacks, seconds or seconds_of(world), list(done))}\n")
    with tqdm(total=len(left), desc="Attack") as bar:
        for attack in left:
            bar.set_description(f"Attack: {attack.name}")
            begin = time.perf_counter()
            found = _tried(attack, world)
            spent = round(time.perf_counter() - begin, 1)
            what = {"name": attack.name, "kind": attack.kind, "settings": attack.settings, "cost": attack.cost}
            certificate.add({**what, **found, "seconds": spent})
            bar.update()
