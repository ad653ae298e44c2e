"""The method of a training: its rule and objectives, from objects or from the names in the config."""

from dataclasses import dataclass
from typing import Any

from blur_trainer.gradients.rules import Rule
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.level import with_level
from blur_trainer.trainers import setup
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.mask_config import check_mask
from blur_trainer.trainers.procedures import SAM, Procedure
from blur_trainer.trainers.rule_state import check_rule_state
from blur_trainer.trainers.single_buffer import check_single_buffer
from blur_trainer.trainers.topics import settle_topics

_RULE = ("rule", "gamma", "alpha", "lower_level", "clamp", "forget_weight", "retain_weight", "rule_kwargs")


@dataclass(frozen=True)
class MethodChoice:
    """
    Chooses rule and objectives: the objects that the trainer was given, else what the settings say.

    `topics`: the names of the forget sets, if there are several. `retains`: whether there is a retain set.
    """

    rule: Rule | None
    forget_procedure: Procedure | None
    forget_objective: Objective | None
    retain_objective: Objective | None
    topics: tuple[str, ...]
    retains: bool

    @property
    def unread(self) -> set[str]:
        """The settings that are not read, because there is an object."""
        return {
            *(_RULE if self.rule is not None else ()),
            *(("sam_rho",) if self.forget_procedure is not None else ()),
            *(("forget_objective", "forget_objective_kwargs") if self.forget_objective is not None else ()),
            *(("retain_objective", "retain_objective_kwargs") if self.retain_objective is not None else ()),
        }

    @property
    def variable(self) -> set[str]:
        """The settings that a later training of the same trainer may have changed."""
        return {*_RULE, "forget_objective_kwargs", "retain_objective_kwargs", "topics", "sam_rho"} - self.unread

    def procedure(self, args: UnlearningConfig) -> Procedure | None:
        """How the forget gradient is made; `None`: by one pass."""
        given = self.forget_procedure
        if given is None:
            return None if args.sam_rho is None else SAM(args.sam_rho)
        if not callable(given) or isinstance(given, type):
            raise TypeError(f"`forget_procedure` must be a procedure such as `SAM(rho=0.01)`, got {given!r}.")
        return given

    def settle(self, args: UnlearningConfig) -> tuple[Rule, dict[str, Objective], list[Rule]]:
        """The rule, the objectives by role, and the rule of each topic. Raises for what does not go together."""
        rule = args.build_rule() if self.rule is None else self.rule
        setup.check_rule(rule)
        check_rule_state(rule, args.fp16 or args.mixed_precision == "fp16")  # the latter: of `accelerate launch`
        forget: Any = self.forget_objective
        if forget is None:
            forget = args.build_forget_objective()
        elif isinstance(forget, Objective):  # anything else is refused below
            forget = with_level(forget, args.forget_level, args.level_two_sided)
        objectives = {"forget": forget}
        if self.retains:
            retain: Any = args.build_retain_objective() if self.retain_objective is None else self.retain_objective
            objectives["retain"] = retain
        else:
            setup.check_retain_free(rule)
        setup.check_objectives(objectives, args.precompute_ref_logps, bool(args.retain_set_weights))
        check_mask(args, objectives)
        check_single_buffer(args, rule, objectives, one_pass=self.procedure(args) is None)
        return rule, objectives, settle_topics(objectives, rule, self.topics, args)
