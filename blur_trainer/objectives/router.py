"""The load-balancing loss of a mixture of experts."""

from collections.abc import Mapping

from accelerate.logging import get_logger
from torch import nn

from blur_trainer.models.forward import router_configs
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.level import without_level
from blur_trainer.objectives.likelihood import IDK, NLL

logger = get_logger(__name__)


def check_router(model: nn.Module, objectives: Mapping[str, Objective]) -> None:
    """Raises if the model asks for a load-balancing loss that has no coefficient; says if no objective has it."""
    for config in router_configs(model):
        if getattr(config, "router_aux_loss_coef", None) is None:
            raise ValueError(
                f"`config.output_router_logits=True`, but `{type(config).__name__}` has no `router_aux_loss_coef`, by "
                "which its load-balancing loss would count: set `model.config.output_router_logits = False`."
            )
        if not any(isinstance(without_level(objective), NLL | IDK) for objective in objectives.values()):
            logger.warning(
                "`config.output_router_logits=True`: the router's load-balancing loss is part of the objectives `nll` "
                f"and `idk` only, and is left out of {', '.join(map(str, objectives.values()))}."
            )
