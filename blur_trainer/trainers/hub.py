"""Uploads to the Hub: the model, its tokenizer, the card and the figures. Nothing that holds what is to be forgotten.

Trainer uploads all of `output_dir`, and has no documented way to choose. So `push_to_hub` is our own here, and
`_push_from_checkpoint`, by which Trainer uploads at each save (`hub_strategy`), is the one private method that we
override: it only notes the folder, and the upload comes when the checkpoint is complete. If a later transformers has no
such method, `push_to_hub=True` is refused.
"""

import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import transformers.trainer
from accelerate.logging import get_logger
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from blur_trainer.report.model_card import write_model_card
from blur_trainer.saving import upload
from blur_trainer.trainers.described import CardMixin

logger = get_logger(__name__)
_FOLDER = ".upload-"  # in output_dir, as hard links need one file system


class PushCallback(TrainerCallback):
    """Uploads after each save, when the checkpoint's manifest is closed."""

    def __init__(self, trainer: "HubMixin") -> None:
        self.trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.push_checkpoint()


class HubMixin(CardMixin):
    """Gives a `Trainer` uploads of chosen files, by `push_to_hub` and by `hub_strategy`."""

    push_in_progress: Any  # Trainer's: it waits for these uploads before it returns
    _saved: Path | None = None  # the checkpoint to upload

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._open: set[Path] = set()  # folders that are being uploaded
        super().__init__(*args, **kwargs)
        if self.args.push_to_hub:
            if not callable(getattr(Trainer, "_push_from_checkpoint", None)):
                raise RuntimeError(
                    "`push_to_hub=True`: this transformers uploads in another way than the versions that setup.cfg "
                    "names, and might take along the texts to be forgotten. Call `trainer.push_to_hub()` at the end."
                )
            self.add_callback(PushCallback(self))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer.push_to_hub`, but uploads only the model, its tokenizer, `README.md`, figures and the verdict.

        With `push_report=True` also `metrics.json` and `report.html`, which hold texts of the forget set.

        Args:
            kwargs: for `create_model_card`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        named = self.args.hub_model_id or str(self.args.output_dir)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = kwargs.pop("tags", None) or []
        tags = [*([tags] if isinstance(tags, str) else tags), *(getattr(self.model, "model_tags", None) or [])]
        self.create_model_card(**{"model_name": Path(named).name, **kwargs, "tags": tags})
        if self.push_in_progress is not None:
            self.push_in_progress.wait_until_done()
        source = Path(str(self.args.output_dir))
        report = [name for name in upload.REPORT if self.args.push_report and (source / name).is_file()]
        folder = self._gather_model(source, [upload.CARD, *upload.figures(source), *upload.verdict(source), *report])
        return self._upload(folder, commit_message, not blocking, token=token, revision=revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._saved = Path(checkpoint_folder)

    def push_checkpoint(self) -> None:
        """Uploads the last saved checkpoint as `hub_strategy` says, in the background."""
        saved, self._saved = self._saved, None
        strategy = HubStrategy(self.args.hub_strategy)
        if saved is None or strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if running and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        place = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch or 0)}"
        jobs = []
        if upload.has_weights(upload.model_files(saved)):
            folder = self._gather_model(saved, [])
            ending = f"In training, at step {self.state.global_step} of {self.state.max_steps}"
            write_model_card(folder, {**self.card_info(), "ending": ending})
            jobs.append(self._upload(folder, f"Training in progress, {place}", True))
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            inside = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else saved.name
            folder = self._new_folder()
            upload.gather_checkpoint(saved, folder)
            message = f"Training in progress, {place}, checkpoint"
            jobs.append(self._upload(folder, message, True, path_in_repo=inside))
        if running:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)  # type: ignore[arg-type]  # its annotation lacks the list

    def _new_folder(self) -> Path:
        run = str(self.args.output_dir)
        for left in set(Path(run).glob(f"{_FOLDER}*")) - self._open:  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=run))
        self._open.add(folder)
        return folder

    def _gather_model(self, source: Path, more: list[str]) -> Path:
        """A folder with what may be uploaded of the model in `source`."""
        model: Any = self.model
        active = model.active_adapters if isinstance(model, PeftModel) else []
        folder = self._new_folder()
        upload.gather(source, [*upload.model_files(source, active), *more], folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(folder))  # it knows its files
        base = getattr(getattr(model, "active_peft_config", None), "base_model_name_or_path", None)
        if base and Path(base).is_dir():
            logger.warning(
                f"The uploaded adapter names the local folder {base!r} as its base model, which others do not have: "
                "train from a model of the Hub, or merge the adapter with `merge_and_save`."
            )
        return folder

    def _upload(
        self, folder: Path, message: str | None, background: bool, token: str | None = None, **where: Any
    ) -> Any:
        """Uploads a folder and removes it. Trainer's own client is asked, as Trainer finds it."""
        where.setdefault("revision", None)
        where["revision"] = where["revision"] or self.args.hub_revision

        def remove(job: Any = None) -> None:
            self._open.discard(folder)
            shutil.rmtree(folder, ignore_errors=True)
            if job is not None and not job.cancelled() and (error := job.exception()) is not None:
                logger.error(f"The upload {message!r} to {self.hub_model_id} failed: {error}")

        ended, client = None, cast(Any, transformers.trainer.hf_api())
        try:
            ended = client.upload_folder(
                repo_id=self.hub_model_id,
                folder_path=str(folder),
                commit_message=message,
                token=token or self.args.hub_token,
                run_as_future=background,
                **where,
            )
        finally:
            if not isinstance(ended, Future):
                remove()
        if isinstance(ended, Future):
            ended.add_done_callback(remove)
        return ended
