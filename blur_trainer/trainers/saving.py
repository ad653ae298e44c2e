"""What the trainers write: the model with its card, and the state of a finished training."""

from pathlib import Path
from typing import Any

from blur_trainer.atomic_write import atomic_write
from blur_trainer.gradients.backend import GradientBackend
from blur_trainer.saving import output_dir as saving
from blur_trainer.trainers.hidden_tokens import tokens_put_aside
from blur_trainer.trainers.hub import HubMixin
from blur_trainer.trainers.loading import whole_state
from blur_trainer.trainers.masking import MaskCallback
from blur_trainer.trainers.rule_state import RuleStateCallback
from blur_trainer.trainers.schedule_free import to_averaged_point


class SavingMixin(HubMixin):
    """Gives a `Trainer` saves that a kill cannot harm."""

    _rule_state: RuleStateCallback
    _masking: MaskCallback
    _backend: GradientBackend | None

    @property
    def output_dir(self) -> str:
        return str(self.args.output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, with a model card. After a kill the folder holds the old or the new model.

        Raises `FloatingPointError` if training has ruined the weights, and writes nothing then.
        """
        self.check_weights()
        if _internal_call and output_dir:  # into a checkpoint folder, which is complete when its manifest is closed
            self.checkpoints.begin(Path(output_dir), self.args.should_save)
            if self.args.should_save:
                self._save_objectives(output_dir)
            for kept in (self._rule_state, self._masking):
                kept.save(output_dir, self._backend, self.args.should_save)
            self._write_model(output_dir, resumable=True)
            return self.checkpoints.model_written(self.args)
        output_dir = output_dir or self.output_dir
        with saving.staged(output_dir, writes=self.args.should_save) as staging, whole_state(self.accelerator):
            self._write_model(staging, resumable=False)
        self.create_model_card(output_dir=output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_objectives(self, checkpoint: str) -> None:
        model: Any = self.model
        for objective in self.objectives.values():
            objective.save_state(checkpoint, model)

    def _load_objectives(self, checkpoint: str) -> None:
        model: Any = self.model
        for objective in self.objectives.values():
            objective.load_state(checkpoint, model)

    def _write_model(self, folder: str, resumable: bool) -> None:
        """Writes weights, configuration and tokenizer. `resumable`: where Trainer's resuming finds them."""
        to_averaged_point(self.optimizer)
        with tokens_put_aside(self.args):  # Trainer stores the arguments as they are
            super().save_model(folder, _internal_call=True)

    def save_state(self) -> None:
        """As `Trainer.save_state`, but atomically, because the file is a sign that a training has ended."""
        if self.is_world_process_zero():
            atomic_write(Path(self.output_dir, saving.STATE_NAME), lambda file: self.state.save_to_json(str(file)))
