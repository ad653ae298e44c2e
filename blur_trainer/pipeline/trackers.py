"""What trackers get of a run beside the log of its steps: the numbers of all models, the verdict, the figures.

The log of the steps is Trainer's own (`report_to`). No prompt and no answer of a set goes to a tracker, and no prompt
of replay. wandb also takes what the terminal shows and the words of the command line, unless it is told not to: here
it is.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.integrations import get_reporting_integration_callbacks

from blur_trainer.report.figures import NAMES
from blur_trainer.report.verdict import Verdict

#: of a run: the numbers by `row/metric`, the verdict, and the figures by name
_Send = Callable[[Any, Mapping[str, float], Verdict, Mapping[str, Path]], None]


def named_trackers(report_to: Any) -> Any:
    """`report_to` as Trainer takes it. Words of a command line name several trackers with commas between them."""
    names = report_to.split(",") if isinstance(report_to, str) else report_to
    return [name.strip() for name in names] if isinstance(names, list) and len(names) > 1 else report_to


def check_trackers(args: Any) -> None:
    """Raises `ValueError` for a tracker that Trainer does not know, or that is not installed."""
    for name in args.report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (RuntimeError, ImportError) as error:
            extra = " (`pip install 'blur_trainer[trackers]'` has all that get results)" if name in _SENDS else ""
            raise ValueError(
                f"`report_to` names {name}, which cannot be used: {error}{extra} Or leave it out of `report_to`."
            ) from error
        except ValueError as error:
            raise ValueError(
                f"`report_to` is {name!r}: {error} {', '.join(_SENDS)} also get the results of a run. Several: with "
                "commas between them."
            ) from error


@contextmanager
def tracked(args: Any) -> Iterator[None]:
    """Around a run on the main process: its name, so that its end joins its steps, and wandb without the terminal."""
    if not args.report_to:
        yield
        return
    args.run_name = args.run_name or f"{Path(str(args.output_dir)).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if "wandb" not in args.report_to or not PartialState().is_main_process:
        yield
        return
    import wandb  # of the extra `trackers`

    if wandb.run is not None:  # of the user, who ends it
        yield
        return
    try:
        run = wandb.init(
            project=os.getenv("WANDB_PROJECT", "huggingface"),  # as Trainer's callback has it
            name=args.run_name,
            settings=wandb.Settings(console="off", x_disable_meta=True),
        )
    except wandb.Error as error:
        raise ValueError(f"`report_to` names wandb, which does not start: {error}") from error
    with run:
        yield


def send_results(args: Any, metrics: Mapping[str, Mapping[str, float]], verdict: Verdict) -> None:
    """
    Sends the end of a run to those of its trackers that take one. The main process calls it.

    Args:
        args: of the trainer, with `report_to`, and `output_dir`, where the report's figures are.
        metrics: by the names of their rows: before, after, retrained.
        verdict: of the run. Its sentence holds numbers and no texts.
    """
    numbers = {f"{row}/{name}": value for row, found in metrics.items() for name, value in found.items()}
    folder = Path(str(args.output_dir), "figures")
    figures = {name: path for name in NAMES if (path := folder / f"{name}.png").is_file()}
    for name in args.report_to:
        if name in _SENDS:
            _SENDS[name](args, numbers, verdict, figures)


def _verdict_texts(verdict: Verdict) -> dict[str, str]:
    return {"verdict/word": verdict.word, "verdict/sentence": verdict.sentence}


def _verdict_numbers(verdict: Verdict) -> dict[str, float]:
    return {} if verdict.level is None else {"verdict/level": float(verdict.level)}


def _to_wandb(args: Any, numbers: Mapping[str, float], verdict: Verdict, figures: Mapping[str, Path]) -> None:
    """Into the summary of the run, and its media."""
    import wandb

    run: Any = wandb.run
    run.summary.update({**numbers, **_verdict_numbers(verdict), **_verdict_texts(verdict)})
    run.log({f"figures/{name}": wandb.Image(str(path)) for name, path in figures.items()})


def _to_trackio(args: Any, numbers: Mapping[str, float], verdict: Verdict, figures: Mapping[str, Path]) -> None:
    """Trainer's callback has ended the run: it is taken up again by its name. That replaces its settings."""
    import trackio

    where = {"space_id": args.trackio_space_id, "bucket_id": args.trackio_bucket_id, "private": args.hub_private_repo}
    quietly: dict[str, Any] = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
    trackio.init(args.project, args.run_name, config=args.to_dict(), resume="allow", **quietly, **where)
    images = {f"figures/{name}": trackio.Image(path) for name, path in figures.items()}
    said = {"verdict": trackio.Markdown(f"**{verdict.word}**\n\n{verdict.sentence}")}
    trackio.log({**numbers, **_verdict_numbers(verdict), **said, **images})
    trackio.finish()


def _to_tensorboard(args: Any, numbers: Mapping[str, float], verdict: Verdict, figures: Mapping[str, Path]) -> None:
    """Into the folder of the last training, where Trainer's callback has written the steps."""
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    runs = sorted(Path(str(args.output_dir), "runs").glob("*"), key=lambda path: path.stat().st_mtime)
    folder = os.getenv("TENSORBOARD_LOGGING_DIR") or (runs[-1] if runs else Path(str(args.output_dir), "runs", "end"))
    with SummaryWriter(str(folder)) as writer:
        for name, value in {**numbers, **_verdict_numbers(verdict)}.items():
            writer.add_scalar(name, value)
        for name, text in _verdict_texts(verdict).items():
            writer.add_text(name, text)
        for name, path in figures.items():
            writer.add_image(f"figures/{name}", imread(path), dataformats="HWC")


_SENDS: dict[str, _Send] = {"wandb": _to_wandb, "trackio": _to_trackio, "tensorboard": _to_tensorboard}
