"""Rules by their names on the command line."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from blur_trainer.gradients.rules import BLUR, MGDA, NGDiff, PCGrad, Rule, Sum
from blur_trainer.gradients.stateful_rules import GRU, PDU, Constrained

RULES: dict[str, type] = {
    "blur": BLUR,
    "sum": Sum,
    "pcgrad": PCGrad,
    "mgda": MGDA,
    "ngdiff": NGDiff,
    "gru": GRU,
    "constrained": Constrained,
    "pdu": PDU,
}
#: rules whose arguments are settings of their own; the others take `rule_kwargs`
FLAGS = {
    "blur": ("lower_level", "gamma", "alpha", "clamp"),
    "sum": ("forget_weight", "retain_weight"),
}


def rule_by_name(name: str, settings: Any, arguments: Mapping[str, Any] | None) -> Rule:
    """
    The rule of a configuration.

    Args:
        name: one of `RULES`.
        settings: has the fields that `FLAGS` names.
        arguments: `rule_kwargs`. A constraint's `rule` is a name too; its arguments are `settings`.

    Raises:
        ValueError: an unknown name, or an argument that the rule does not take.
    """
    arguments = dict(arguments or {})
    if name not in RULES:
        raise ValueError(f"Unknown rule {name!r}; accepted: {', '.join(sorted(RULES))}.")
    if name in FLAGS:
        if arguments:
            raise ValueError(f"The rule {name!r} takes no `rule_kwargs`; its settings are {', '.join(FLAGS[name])}.")
        return RULES[name](**{flag: getattr(settings, flag) for flag in FLAGS[name]})
    accepted = [f.name for f in fields(RULES[name]) if f.init]
    if unknown := sorted(set(arguments) - set(accepted)):
        raise ValueError(f"The rule {name!r} takes no argument {unknown}; accepted: {accepted or 'none'}.")
    inner = arguments.setdefault("rule", "sum") if issubclass(RULES[name], Constrained) else None
    unread = {flag for owner, flags in FLAGS.items() if owner != inner for flag in flags}
    if ignored := [f.name for f in fields(settings) if f.name in unread and getattr(settings, f.name) != f.default]:
        raise ValueError(f"The rule {name!r} does not read {ignored}: its arguments go into `rule_kwargs`.")
    if isinstance(inner, str):
        arguments["rule"] = rule_by_name(inner, settings, None)
    return RULES[name](**arguments)
