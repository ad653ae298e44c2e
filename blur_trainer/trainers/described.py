"""The model card of a trainer, with the arguments of `Trainer.create_model_card` and those of our own."""

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from transformers import TrainerState
from trl.trainer.utils import get_config_model_id

from blur_trainer.models.logit_difference import LogitDifferenceModel
from blur_trainer.objectives.level import Until, without_level
from blur_trainer.report.card_metadata import base_metadata, texts
from blur_trainer.report.model_card import write_model_card
from blur_trainer.report.results import package_versions
from blur_trainer.trainers.card import sets_info, settings_info
from blur_trainer.trainers.running import RunningMixin


class CardMixin(RunningMixin):
    """Gives a `Trainer` a model card that says what was unlearned and how, and what was measured."""

    #: what the method is, where objectives and rule do not say it all
    about: str | None = None
    #: what loads the saved model, where it is not PEFT for an adapter and transformers for a model
    library: str | None = None

    _told: tuple[TrainerState | None, dict[str, Any]] = (None, {})
    _base: tuple[str | None, dict[str, Any]] | None = None

    @property
    def method(self) -> str:
        """The method's name on the model card."""
        names = [type(self.rule).__name__, type(without_level(self.objectives["forget"])).__name__]
        names += ["Until"] * isinstance(self.objectives["forget"], Until)
        return "-".join(names + [type(self.forget_procedure).__name__] * (self.forget_procedure is not None))

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: Any = None,
        *,
        output_dir: str | None = None,
        **info: Any,
    ) -> None:
        """Writes `README.md`. The positional arguments are those of `Trainer.create_model_card`.

        Until the next training each card repeats what the earlier ones were given, so that the numbers of an evaluation
        are still there when the model is saved or pushed afterwards.

        Args:
            license, language: default: those of the base model's card, if it has them.
            finetuned_from: the base model. Default: the one that was loaded.
            output_dir: default: the trainer's.
            info: replaces content of the card, e.g. `metrics`: see [`write_model_card`].
        """
        given = {
            **{"language": language, "license": license, "model_name": model_name, "base_model": finetuned_from},
            **{"tasks": tasks, "datasets": dataset_tags, "dataset": dataset, "dataset_args": dataset_args},
            **info,
        }
        told = self._repeated()
        known = told.get("tags", [])
        given["tags"] = [*known, *(tag for tag in texts("tags", tags) if tag not in known)]
        self._told = (self.state, told | {key: item for key, item in given.items() if item is not None})
        if self.is_world_process_zero() and not self.nothing_trained:  # else it would say "after unlearning"
            write_model_card(output_dir or str(self.args.output_dir), self.card_info())

    def _repeated(self) -> dict[str, Any]:
        state, told = self._told
        if state is self.state:
            return told
        return {key: item for key, item in told.items() if key not in ("metrics", "row")}  # another training's numbers

    def card_info(self) -> Mapping[str, Any]:
        """The content of the card, as of [`write_model_card`]."""
        model: Any = self.model
        told = self._repeated()
        base = told.get("base_model") or get_config_model_id(model.config) or None
        settings = settings_info(self.args, self.objectives, self.rule, self.trained, self.accelerator.num_processes)
        if self.forget_procedure is not None:
            settings["forget_procedure"] = repr(self.forget_procedure)
        inherited = self._inherited(base)
        if "license" in told:  # the base's name and link of a license are of that one
            inherited = {key: item for key, item in inherited.items() if not key.startswith("license")}
        return {
            **inherited,
            "method": self.method,
            "about": self.about,
            "ending": self.interrupted_at,
            "adapter": isinstance(model, PeftModel | LogitDifferenceModel),
            "library": self.library or ("peft" if isinstance(model, PeftModel) else None),
            "base_model": base,
            **sets_info(self.train_dataset),
            "hyperparameters": {"trainer": type(self).__name__, **settings},
            "versions": package_versions("transformers", "torch", "accelerate", "peft"),
            **told,
            "tags": [*told.get("tags", []), "generated_from_trainer"],
        }

    def _inherited(self, base: str | None) -> dict[str, Any]:
        """License and language of the base. The Hub is asked only if this model goes there, and once."""
        online = self.hub_model_id is not None
        if self._base is None or self._base[0] != base or (online and not self._base[1]):
            self._base = (base, base_metadata(base, online=online))
        return self._base[1]
