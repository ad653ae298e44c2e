"""The push of a run to the Hub: the model with what was measured, and no text of the sets."""

from blur_trainer.pipeline.preparing import Prepared
from blur_trainer.pipeline.training import Trained
from blur_trainer.report.verdict import Verdict

_BY_HAND = "To push it by hand, load the folder with transformers and call `push_to_hub` of model and tokenizer."


def publish(prepared: Prepared, trained: Trained, verdict: Verdict) -> tuple[str, ...]:
    """
    Pushes once more when everything is measured: the trainer has pushed the model when it saved it, without numbers.

    Weights, tokenizer, model card, figures and `verdict.json` go up, whatever the verdict is. `report.html` and
    `metrics.json` go with them only if they hold no texts (`redact`), or if `push_report` asks for it. All processes
    call it.

    Returns:
        What the user must know of it. A failure is a note, too: the run is done, and its folder is whole.
    """
    trainer, redacted = trained.trainer, prepared.script.redact
    if not trained.saved:
        return ("Nothing was pushed, as there is no model.",)
    if trainer is None:
        return (f"Numbers and verdict were not pushed: the training had ended before this start. {_BY_HAND}",)
    trainer.args.push_report = trainer.args.push_report or redacted
    try:
        trainer.push_to_hub(commit_message=f"End of unlearning: {verdict.word}")
    except OSError as error:
        return (f"The push to {trainer.hub_model_id} failed: {error} {_BY_HAND}",)
    said = f"Pushed to {trainer.hub_model_id}."
    if not trainer.args.push_report:
        said += (
            " report.html and metrics.json hold texts of the sets and stayed here; `--push_report true` uploads them, "
            "and `--redact true` makes them without texts."
        )
    return (said,)
