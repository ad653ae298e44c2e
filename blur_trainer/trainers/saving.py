"""What the trainers write: the model with its card, and the state of a finished training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl.trainer.utils import get_config_model_id

from blur_trainer.atomic_write import atomic_write
from blur_trainer.report.model_card import write_model_card
from blur_trainer.report.results import package_versions
from blur_trainer.saving import output_dir as saving
from blur_trainer.trainers.card import sets_info, settings_info
from blur_trainer.trainers.loading import whole_state
from blur_trainer.trainers.running import RunningMixin
from blur_trainer.trainers.schedule_free import to_averaged_point


class SavingMixin(RunningMixin):
    """Gives a `Trainer` saves that a kill cannot harm, and a model card."""

    #: on the model card: what the method is, where objectives and rule do not say it all
    about: str | None = None

    @property
    def output_dir(self) -> str:
        return str(self.args.output_dir)

    @property
    def method(self) -> str:
        """The method's name on the model card."""
        return f"{type(self.rule).__name__}-{type(self.objectives['forget']).__name__}"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, with a model card. After a kill the folder holds the old or the new model.

        Raises `FloatingPointError` if training has ruined the weights, and writes nothing then.
        """
        self.check_weights()
        if _internal_call and output_dir:  # into a checkpoint folder, which is complete when its manifest is closed
            self.checkpoints.begin(Path(output_dir), self.args.should_save)
            if self.args.should_save:
                self._save_objectives(output_dir)
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
        super().save_model(folder, _internal_call=True)

    def save_state(self) -> None:
        """As `Trainer.save_state`, but atomically, because the file is a sign that a training has ended."""
        if self.is_world_process_zero():
            atomic_write(Path(self.output_dir, saving.STATE_NAME), lambda file: self.state.save_to_json(str(file)))

    def create_model_card(self, output_dir: str | None = None, **info: Any) -> None:  # type: ignore[override]
        """Writes `README.md`. `info` overrides the content of the card, e.g. `metrics`."""
        if self.nothing_trained:
            return  # `train` has raised: the card would say "after unlearning"
        if self.is_world_process_zero():
            write_model_card(output_dir or self.output_dir, {**self._card_info(), **info})

    def _card_info(self) -> Mapping[str, Any]:
        model: Any = self.model
        settings = settings_info(self.args, self.objectives, self.rule, self.trained, self.accelerator.num_processes)
        return {
            "method": self.method,
            "about": self.about,
            "ending": self.interrupted_at,
            "base_model": get_config_model_id(model.config) or None,
            **sets_info(self.train_dataset),
            "hyperparameters": {"trainer": type(self).__name__, **settings},
            "versions": package_versions("transformers", "torch", "accelerate", "peft"),
        }
