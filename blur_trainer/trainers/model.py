"""Loads the trainer's model and settles everything that belongs to it alone."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from peft import PeftConfig, PeftModel
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from blur_trainer.models.loading import load_pretrained
from blur_trainer.models.reference import is_partitioned
from blur_trainer.objectives.base import Objective
from blur_trainer.trainers import setup
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.given_back import Freezing
from blur_trainer.trainers.loading import unsharded_loading
from blur_trainer.trainers.precision import describe, loading_arguments, warn_of_rounding
from blur_trainer.trainers.tokenizer import load_tokenizer

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.getLogger(__name__)


class ModelMixin(_Base):
    """Gives a trainer its model, as it is to be trained."""

    objectives: dict[str, Objective]
    freezing: Freezing
    #: which parameters are trained, for the model card
    trained: str
    #: the model, if it got its adapter here
    adapted: PeftModel | None = None
    _given_name: tuple[str, UnlearningConfig] | None = None

    def _load_model(self, model: Any, args: Any, peft_config: PeftConfig | None) -> PreTrainedModel | PeftModel:
        """The model to train."""
        self._given_name = (model, args) if isinstance(model, str) else None
        loaded = setup.load_model(model, args, peft_config)
        self.adapted = loaded if peft_config is not None and isinstance(loaded, PeftModel) else None
        return loaded

    def speaker(self, model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
        """The model before unlearning, whose texts are replayed: the one to train, as it is before the first step.

        ZeRO-3 partitions a model that is given by name while it loads. Then it is loaded once more, whole.
        """
        if self._given_name is None or not is_partitioned(model):
            return model
        name, args = self._given_name
        with unsharded_loading(args):
            return load_pretrained(name, loading_arguments(args, frozen=True))

    def choose_trainable(self, model: PreTrainedModel | PeftModel, args: UnlearningConfig) -> None:
        """Freezes what is not to be trained."""
        self.freezing = Freezing(model, args, self.objectives)
        self.trained = self.freezing.chosen

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Around a training. A model that an engine has sharded stays with the engine, and so do its flags."""
        if self.model is not None:  # a trial of a search has none yet: `call_model_init` makes it, frozen
            self.freezing.freeze(cast(nn.Module, self.model))
        try:
            yield
        finally:
            if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                self.freezing.release(cast(nn.Module, self.model))  # with `model_init` another one than before

    def _settle_model(
        self,
        model: PreTrainedModel | PeftModel,
        args: UnlearningConfig,
        processing_class: PreTrainedTokenizerBase | None,
        ref_model: PreTrainedModel | None,
        optimizer: Optimizer | None,
    ) -> PreTrainedTokenizerBase | None:
        """Freezes what is not to be trained, and checks what belongs to the model. Returns its tokenizer."""
        self.choose_trainable(model, args)
        tokenizer = load_tokenizer(processing_class, model, args)
        setup.check_models(model, tokenizer, ref_model, args)
        setup.check_training(model, self.objectives, optimizer)
        if args.should_log:
            logger.info(describe(model, args))
        if optimizer is None:  # the user's has a learning rate of its own
            warn_of_rounding(model, args)
        return tokenizer
