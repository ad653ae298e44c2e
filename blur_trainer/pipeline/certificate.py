"""`audit.json`, the certificate: what was tried on which weights and data, and what came back."""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from blur_trainer.atomic_write import atomic_write
from blur_trainer.models.weights_digest import weights_digest
from blur_trainer.pipeline.audit_fit import is_cut
from blur_trainer.pipeline.audit_judged import ALPHA, ERRORS, TOLERANCE, trust
from blur_trainer.pipeline.measure import Sets
from blur_trainer.report.results import package_versions

NAME = "audit.json"
_PACKAGES = ("torch", "transformers", "peft", "safetensors")
_KEYS = ("subject", "control", "attacks", "sentence", "planned", "left_out")
CONTROLS = {
    "retrained": "the retrained model, attacked in the same way, on the same rows",
    "unseen": "the model itself, attacked in the same way, on rows that no model saw",
    "none": "no control: each attack is compared with the model as it is, so relearning counts what it teaches, too",
}


def subject(sets: Sets, budget: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What an audit is of. Two audits of the same subject say the same."""
    script = sets.script
    models = {"model": sets.model, "retrained": script.retrained, "before": script.before}
    digests = {role: {"name": name, "sha256": _digest(sets, name)} for role, name in models.items() if name}
    data = {role: {"digest": reading.digest, "rows": len(reading.dataset)} for role, reading in sets.readings.items()}
    reads = {"max_length": script.max_length, "qa_template": script.qa_template, "eval_rows": script.eval_rows}
    return {"models": digests, "data": data, "budget": dict(budget), "seed": seed, "reads": reads}


def _digest(sets: Sets, name: str) -> str:
    revision = sets.load.options.get("revision")
    return weights_digest(name, **({"revision": revision} if revision and name == sets.model else {}))


class Certificate:
    """
    The file `audit.json` in a folder, written anew after each attack, whole or not at all.

    Raises:
        `ValueError`: the one that is there is of another subject, or cannot be read.
    """

    def __init__(self, folder: Path, of: Mapping[str, Any], control: str) -> None:
        self.path, self._of, self._control = folder / NAME, json.loads(json.dumps(of)), control
        self.attacks: dict[str, dict[str, Any]] = {}
        self.planned: list[str] = []
        self.left_out: list[str] = []
        #: of `fit`; `None` before it was decided
        self.cut: dict[str, Any] | None = None
        if self.path.exists():
            stored = read_certificate(self.path)
            other = differences(stored["subject"], self._of)
            if other:
                raise ValueError(
                    f"{self.path} is the audit of something else: {'; '.join(other)}. Pass another `output_dir`, or "
                    "move it away."
                )
            self.attacks = {one["name"]: one for one in stored["attacks"]}
            self.cut = stored.get("cut")

    def add(self, found: Mapping[str, Any]) -> None:
        """Writes down an attack that is done."""
        self.attacks[found["name"]] = json.loads(json.dumps(found))
        self.write()

    def write(self) -> None:
        text = json.dumps(self.content(), indent=1) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, lambda partial: partial.write_text(text, encoding="utf-8"))

    def content(self) -> dict[str, Any]:
        attacks = list(self.attacks.values())
        judgement = {"alpha": ALPHA, "standard_errors": ERRORS, "tolerance": TOLERANCE}
        budget = _budget_said(self._of["budget"]["name"], self.cut)
        content = {
            "sentence": sentence(attacks, self.planned, budget, self._control),
            "finished": not unfinished(attacks, self.planned),
            "date": date.today().isoformat(),
            "versions": package_versions(*_PACKAGES),
            "subject": self._of,
            "control": {"kind": self._control, "what": CONTROLS[self._control]},
            "judgement": judgement,
            "planned": self.planned,
            "left_out": self.left_out,
            "cut": self.cut,
            "attacks": attacks,
        }
        if self._control == "retrained":
            content["trust"] = {metric: trust(attacks, metric) for metric in ("rouge", "probability")}
        return content


def sentence(attacks: Sequence[Mapping[str, Any]], planned: Sequence[str], budget: str, control: str) -> str:
    """What the audit says, in one sentence."""
    if left := unfinished(attacks, planned):
        return f"unfinished: {len(left)} of {len(planned)} attacks are not done"
    back = [one["name"] for one in attacks if one["recovered"]]
    if back:
        return f"recovered by: {', '.join(back)}"
    judged = sum(one["recovered"] is not None for one in attacks)
    beside = {"retrained": "the retrained model", "unseen": "unseen rows", "none": "none"}[control]
    how = f"budget: {budget}; attacks: {judged}; control: {beside}"
    how += f"; not judged: {len(attacks) - judged}" * (judged < len(attacks))
    return f"no recovery under these attacks at this budget ({how})" if judged else f"nothing could be judged ({how})"


def _budget_said(name: str, cut: Mapping[str, Any] | None) -> str:
    return f"{name}, cut to fit" if is_cut(cut) else name


def unfinished(attacks: Sequence[Mapping[str, Any]], planned: Sequence[str]) -> list[str]:
    done = {one["name"] for one in attacks}
    return [name for name in planned if name not in done]


def read_certificate(path: str | Path) -> dict[str, Any]:
    """The content of an `audit.json`. Raises `ValueError` for anything else, `OSError` for no file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no certificate of an audit: {error}.") from error
    if not isinstance(content, dict) or not set(_KEYS) <= set(content):
        raise ValueError(f"{path} is no certificate of an audit: it lacks some of {', '.join(_KEYS)}.")
    return content


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In which parts two subjects differ. Names of models and folders do not count, their weights do."""
    found = []
    for role in dict.fromkeys([*stored["models"], *now["models"]]):
        if _at(stored, "models", role, "sha256") != _at(now, "models", role, "sha256"):
            found.append(f"{'the weights' if role == 'model' else f'the weights of `{role}`'} differ")
    for role in dict.fromkeys([*stored["data"], *now["data"]]):
        if _at(stored, "data", role, "digest") != _at(now, "data", role, "digest"):
            found.append(f"the rows of `{role}` differ")
    for name in ("budget", "seed", "reads"):
        if stored[name] != now[name]:
            found.append(f"`{name}` differs")
    return found


def _at(content: Mapping[str, Any], *path: str) -> Any:
    for name in path:
        content = content.get(name) or {}
    return content or None


def check_certificate(path: str | Path, model: str, sets: Sets | None = None, revision: str | None = None) -> list[str]:
    """
    Whether a certificate is of this model and these data: what speaks against it, nothing where it is.

    Args:
        path: of an `audit.json`.
        model: a folder, or a name on the Hub.
        sets: the data. Roles that are not given are not compared.
        revision: of a model on the Hub.

    Raises:
        `ValueError`: the file is no certificate. `OSError`: there is no such file, or no such model.
    """
    content = read_certificate(path)
    stored = content["subject"]
    found = []
    if _at(stored, "models", "model", "sha256") != weights_digest(
        model, **({"revision": revision} if revision else {})
    ):
        found.append("the weights differ")
    for role, reading in ({} if sets is None else sets.readings).items():
        if _at(stored, "data", role, "digest") != reading.digest:
            found.append(f"the rows of `{role}` differ" if role in stored["data"] else f"`{role}` was not audited")
    budget, control = _budget_said(stored["budget"]["name"], content.get("cut")), content["control"]["kind"]
    if content["sentence"] != sentence(content["attacks"], content["planned"], budget, control):
        found.append("its sentence does not follow from its attacks")
    if unfinished(content["attacks"], content["planned"]):
        found.append("it is not finished")
    return found
