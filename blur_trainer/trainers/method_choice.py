"""The method of a training: its rule and objectives, from objects or from the names in the config."""

from dataclasses import dataclass
from typing import Any

from blur_trainer.gradients.rules import Rule
from blur_trainer.objectives.base import Objective
from blur_trainer.trainers import setup
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.single_buffer import check_single_buffer
from blur_trainer.trainers.topics import settle_topics

_RULE = ("rule", "gamma", "alpha", "lower_level", "clamp", "forget_weight", "retain_weight")


@dataclass(frozen=True)
class MethodChoice:
    """
    Chooses rule and objectives: the objects that the trainer was given, else what the settings say.

    `topics`: the names of the forget sets, if there are several. `retains`: whether there is a retain set.
    """

    rule: Rule | None
    forget_objective: Objective | None
    retain_objective: Objective | None
    topics: tuple[str, ...]
    retains: bool

    @property
    def unread(self) -> set[str]:
        """The settings that are not read, because there is an object."""
        return {
            *(_RULE if self.rule is not None else ()),
            *(("forget_objective", "forget_objective_kwargs") if self.forget_objective is not None else ()),
            *(("retain_objective", "retain_objective_kwargs") if self.retain_objective is not None else ()),
        }

    @property
    def variable(self) -> set[str]:
        """The settings that a later training of the same trainer may have changed."""
        return {*_RULE, "forget_objective_kwargs", "retain_objective_kwargs", "topics"} - self.unread

    def settle(self, args: UnlearningConfig) -> tuple[Rule, dict[str, Objective], list[Rule]]:
        """The rule, the objectives by role, and the rule of each topic. Raises for what does not go together."""
        rule = args.build_rule() if self.rule is None else self.rule
        setup.check_rule(rule)
        forget: Any = args.build_forget_objective() if self.forget_objective is None else self.forget_objective
        objectives = {"forget": forget}
        if self.retains:
            retain: Any = args.build_retain_objective() if self.retain_objective is None else self.retain_objective
            objectives["retain"] = retain
        else:
            setup.check_retain_free(rule)
        setup.check_objectives(objectives, args.precompute_ref_logps)
        check_single_buffer(args, rule, objectives)
        return rule, objectives, settle_topics(objectives, rule, self.topics, args)
