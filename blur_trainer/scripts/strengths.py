"""The one setting that says how strongly a method forgets, and how a sweep varies it."""

import json
from typing import Any, NamedTuple

from blur_trainer.scripts.methods import changed

WEIGHTS, RATES = (0.03, 0.1, 0.3, 1.0), (3e-5, 1e-4, 3e-4, 1e-3)


class Strength(NamedTuple):
    """A setting, the values that `benchmarks/tune_tofu.py` tries, and whether a larger one forgets less."""

    setting: str
    tried: tuple[float, ...]
    inverse: bool = False

    def of(self, args: Any) -> float:
        """The value among the arguments of a run. PDU's first multiplier is an argument of its rule."""
        if self.setting != "initial":
            return getattr(args, self.setting)
        if "initial" not in (given := _rule_kwargs(args)):
            raise ValueError(f'The strength of pdu is its first multiplier, but rule_kwargs={given}: add "initial".')
        return given["initial"]

    def put(self, args: Any, value: float) -> Any:
        """A copy of the arguments with this value."""
        return changed(args, **self._given(args, value))

    def scaled(self, args: Any, factor: float) -> float:
        """The value that forgets `factor` times as strongly as the one among the arguments, to six digits."""
        value = self.of(args) / factor if self.inverse else self.of(args) * factor
        return float(f"{value:.6g}")  # 0.3, not 0.30000000000000004: it names rows and is written on a command line

    def flags(self, args: Any, value: float) -> list[str]:
        """The value for the command line of a run with these arguments."""
        return [f"--{name}={json.dumps(given)}" for name, given in self._given(args, value).items()]

    def _given(self, args: Any, value: float) -> dict[str, Any]:
        if self.setting == "initial":
            return {"rule_kwargs": {**_rule_kwargs(args), self.setting: value}}
        return {self.setting: value}


def _rule_kwargs(args: Any) -> dict[str, Any]:
    """The arguments of the rule. The command line gives a text."""
    given = args.rule_kwargs or {}
    return json.loads(given) if isinstance(given, str) else given


# method of run_tofu.py or run_wmdp.py -> its strength; of the others the weight of the forget gradient
_STRENGTHS = {
    **dict.fromkeys(("blur", "blur-target", "blur-npo", "blur-rmu"), Strength("gamma", WEIGHTS)),
    # no weight moves these: they have no retain set, or their rule sees directions only
    **dict.fromkeys(("gradascent", "undial", "ce-u", "flat", "ngdiff", "gru"), Strength("learning_rate", RATES)),
    "pdu": Strength("initial", (30.0, 100.0, 300.0, 1000.0), inverse=True),  # the first weight of the retain loss
    "uld": Strength("weight", (-0.5, -0.8, -1.1, -1.5)),
}


def strength_of(method: str) -> Strength:
    """The strength of a method by its name on the command line."""
    return _STRENGTHS.get(method, Strength("forget_weight", WEIGHTS))
