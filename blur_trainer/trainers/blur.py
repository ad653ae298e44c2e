"""BLUR: `UnlearningTrainer` with other defaults."""

from dataclasses import dataclass, field

from blur_trainer.gradients.by_name import RULES
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.unlearning import UnlearningTrainer


@dataclass
class BLURConfig(UnlearningConfig):
    """[`UnlearningConfig`] with `rule="blur"`: NPO as lower, NLL as upper level (BLUR-NPO, arXiv 2506.08164)."""

    rule: str = field(default="blur", metadata={"help": "How both gradients are combined.", "choices": list(RULES)})


class BLURTrainer(UnlearningTrainer):
    """Bi-level unlearning. See [`UnlearningTrainer`] for the arguments and [`BLUR`] for the rule.

    ```python
    trainer = BLURTrainer(model, BLURConfig("out", gamma=0.2), forget_ds, retain_ds)
    trainer.train()
    ```
    """

    config_class = BLURConfig
