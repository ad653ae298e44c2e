"""What happens beside the step: interruption with real signals, the pairing's epoch, the report."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.cases import chosen
from support.models import examples, tiny_llama
from support.runs import distance, settings, train, training_logs, weights
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from blur_trainer.trainers.blur import BLURTrainer
from blur_trainer.trainers.callbacks import InterruptCallback, PairingCallback, ProgressBarCallback, ReportCallback
from blur_trainer.trainers.ending import TrainingInterrupted

FORGET, RETAIN = examples(7), examples(5, 1)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: a process each; of SIGTERM from outside, two processes and a launcher are stopped in tests/saving/test_faults.py
FROM_OUTSIDE = [
    pytest.param(signal.SIGINT, id="SIGINT"),
    pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.full),
]
CONFIG = {"num_train_epochs": 2, "gradient_accumulation_steps": 2}  # 4 steps

# Step 3 waits for the signal, so that it arrives in the middle of a step whatever the machine is doing.
CHILD = """
import sys, time
from pathlib import Path
from support.models import tiny_llama
from test_callbacks import CONFIG, FORGET, RETAIN, AtStep, settings
from blur_trainer.trainers.blur import BLURTrainer

folder = Path(sys.argv[1])

def wait():
    (folder / "waiting").touch()
    for _ in range(6000):
        if trainer.interrupt.interrupted:
            return
        time.sleep(0.01)

folder.mkdir()
args = settings(folder / "run", **CONFIG)
trainer = BLURTrainer(tiny_llama(dropout=0.2), args, FORGET, RETAIN, callbacks=[AtStep(2, wait)])
trainer.train()
print("ended")
"""


class AtStep(TrainerCallback):
    """Does something at the beginning of the step after `step` finished ones."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def interrupt_self(number=signal.SIGINT):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python runs the handler between two bytecodes


@pytest.fixture(scope="module")
def killed(request, tmp_path_factory):
    """One training per signal, each in a process of its own and interrupted from outside; all at the same time."""
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), str(here.parents[1])]),
        "OMP_NUM_THREADS": "1",
    }
    folders = {number: tmp_path_factory.mktemp(number.name) / "child" for number in chosen(request, "outside")}
    children = {
        number: subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, folder in folders.items()
    }
    answers = {}
    try:
        for number, child in children.items():
            deadline = time.monotonic() + 300
            while not (folders[number] / "waiting").exists() and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if child.poll() is None:
                child.send_signal(number)
        for number, child in children.items():
            output, errors = child.communicate(timeout=120)
            answers[number] = SimpleNamespace(
                code=child.returncode, out=output, err=errors, run=folders[number] / "run"
            )
    finally:
        for child in children.values():
            child.kill()
    return answers


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    args = settings(tmp_path_factory.mktemp("whole") / "run", **CONFIG)
    trainer = train(args, FORGET, RETAIN, model=tiny_llama(dropout=0.2))
    return weights(trainer.model), training_logs(trainer)


@pytest.mark.parametrize("outside", FROM_OUTSIDE)
def test_a_signal_ends_the_process_cleanly_with_a_checkpoint(killed, outside):
    child = killed[outside]
    assert child.code == 128 + outside, child.err[-2000:]
    assert "ended" not in child.out and "Interrupted at step 3 of 4" in child.err
    assert "Traceback" not in child.err
    assert f"{outside.name}: finishing this step, then saving a checkpoint." in child.err
    assert [path.name for path in child.run.glob("checkpoint-*")] == ["checkpoint-3"]
    state = json.loads((child.run / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert [entry["step"] for entry in state["log_history"]] == [1, 2, 3]


@pytest.mark.parametrize("outside", FROM_OUTSIDE)
def test_the_interrupted_run_is_continued_to_the_same_weights(killed, outside, uninterrupted):
    final, logs = uninterrupted
    trainer = BLURTrainer(tiny_llama(dropout=0.2), settings(killed[outside].run, **CONFIG), FORGET, RETAIN)
    trainer.train(resume_from_checkpoint=True)
    assert not trainer.interrupt.interrupted
    assert distance(final, weights(trainer.model)) <= 1e-7
    assert [entry["loss"] for entry in training_logs(trainer)] == pytest.approx([entry["loss"] for entry in logs])


# ---- in this process ----


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.fixture
def own_handlers():
    """Handlers that somebody had installed before us."""
    before = handlers()
    ours = [lambda number, frame: None, lambda number, frame: None]
    for number, handler in zip(SIGNALS, ours, strict=True):
        signal.signal(number, handler)
    yield ours
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def start(folder, *callbacks, **config) -> BLURTrainer:
    return BLURTrainer(tiny_llama(), settings(folder, **(CONFIG | config)), FORGET, RETAIN, callbacks=list(callbacks))


def interrupted(trainer):
    """A training that a signal ends."""
    with pytest.raises(TrainingInterrupted) as raised:
        trainer.train()
    return raised.value


def test_handlers_are_ours_during_training_only(tmp_path, own_handlers):
    seen = []
    trainer = start(tmp_path / "run", AtStep(1, lambda: seen.append(handlers())))
    assert handlers() == own_handlers
    trainer.train()
    assert seen and all(handler.__self__ is trainer.interrupt for handler in seen[0])
    assert handlers() == own_handlers


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_handlers_come_back_after_an_exception(tmp_path, own_handlers, error):
    def fail():
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        start(tmp_path / "run", AtStep(2, fail)).train()
    assert handlers() == own_handlers


def test_handlers_come_back_when_training_never_begins(tmp_path, own_handlers):
    trainer = start(tmp_path / "run")
    with pytest.raises(ValueError, match="checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    assert handlers() == own_handlers


def test_handlers_come_back_after_an_interruption(tmp_path, own_handlers):
    interrupted(start(tmp_path / "run", AtStep(1, interrupt_self)))
    assert handlers() == own_handlers


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_step_is_finished_and_no_other_begun(tmp_path, number, own_handlers):
    begun = []

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            begun.append(state.global_step)

    trainer = start(tmp_path / "run", Count(), AtStep(1, lambda: interrupt_self(number)))
    assert interrupted(trainer).code == 128 + number
    assert trainer.interrupt.interrupted
    assert (trainer.state.global_step, begun) == (2, [0, 1])
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").is_file()


def test_a_second_ctrl_c_stops_at_once(tmp_path, own_handlers):
    def twice():
        interrupt_self()
        interrupt_self()

    trainer = start(tmp_path / "run", AtStep(1, twice))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert handlers() == own_handlers


def test_terminated_twice_still_saves(tmp_path, own_handlers):
    """Schedulers repeat SIGTERM; only a person who presses Ctrl-C again wants no checkpoint."""

    def twice():
        interrupt_self(signal.SIGTERM)
        interrupt_self(signal.SIGTERM)

    interrupted(start(tmp_path / "run", AtStep(1, twice)))
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


def test_an_interrupted_trainer_can_go_on_itself(tmp_path, own_handlers):
    whole = start(tmp_path / "whole")
    whole.train()
    trainer = start(tmp_path / "run", AtStep(1, interrupt_self))
    interrupted(trainer)
    trainer.save_model()
    assert "**Interrupted at step 2 of 4**" in (tmp_path / "run" / "README.md").read_text()
    trainer.remove_callback(AtStep)
    trainer.train(resume_from_checkpoint=True)
    assert not trainer.interrupt.interrupted
    assert distance(weights(whole.model), weights(trainer.model)) <= 1e-7
    trainer.save_model()
    assert "Interrupted" not in (tmp_path / "run" / "README.md").read_text()


def test_training_in_another_thread(tmp_path, own_handlers):
    """Notebooks and servers: Python allows handlers in the main thread only, and training must not mind."""
    seen, failures = [], []

    def work():
        try:
            start(tmp_path / "run", AtStep(1, lambda: seen.append(handlers()))).train()
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=120)
    assert not thread.is_alive() and failures == []
    assert seen == [own_handlers] and handlers() == own_handlers


def test_restoring_twice_is_harmless(own_handlers):
    callback = InterruptCallback()
    callback.on_train_begin(None, TrainerState(), TrainerControl())
    assert handlers() != own_handlers
    callback.restore()
    callback.restore()
    assert handlers() == own_handlers


# ---- the pairing's epoch ----


class Epochs(TrainerCallback):
    """The paired dataset's epoch in each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
        self.seen.append(train_dataloader.dataset.epoch)


def test_the_pairing_knows_its_epoch_also_after_a_resume(tmp_path):
    whole = Epochs()
    config = {"num_train_epochs": 3, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1}
    start(tmp_path / "run", whole, **config).train()
    assert whole.seen == [0] * 4 + [1] * 4 + [2] * 4
    for stop in (1, 4, 6, 8, 11):
        resumed = Epochs()
        trainer = start(tmp_path / f"from-{stop}", resumed, num_train_epochs=3, gradient_accumulation_steps=1)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
        assert resumed.seen == whole.seen[stop:]


@pytest.mark.parametrize(("epoch", "expected"), [(None, 0), (0, 0), (0.5, 0), (1.0, 1), (2.75, 2)])
def test_pairing_callback_alone(epoch, expected):
    class Dataset:
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

    dataset = Dataset()
    state = TrainerState(epoch=epoch)
    PairingCallback().on_epoch_begin(None, state, TrainerControl(), train_dataloader=SimpleNamespace(dataset=dataset))
    assert dataset.epoch == expected


def test_pairing_callback_leaves_other_datasets_alone():
    loader = SimpleNamespace(dataset=[1, 2])
    PairingCallback().on_epoch_begin(None, TrainerState(epoch=1.0), TrainerControl(), train_dataloader=loader)
    assert loader.dataset == [1, 2]


# ---- the report ----


def test_report_callback_writes_state_and_report(tmp_path):
    trainer = start(tmp_path / "run", ReportCallback())
    trainer.train()
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert all({"loss/forget", "loss/retain", "grad/cosine", "grad/weight_forget"} <= set(entry) for entry in steps)
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html") and page.rstrip().endswith("</html>")
    assert "data:image/png;base64," in page
    assert not any(loads in page for loads in ('src="http', "<link", "@import", "url(http"))  # a link to read is fine
    figures = sorted(path.name for path in (tmp_path / "run" / "figures").glob("*.png"))
    assert len(figures) >= 2
    assert all((tmp_path / "run" / "figures" / name).read_bytes()[:4] == b"\x89PNG" for name in figures)


def test_report_includes_evaluations(tmp_path):
    args = settings(tmp_path / "run", eval_strategy="steps", eval_steps=2, **CONFIG)
    train(args, FORGET, RETAIN, eval_dataset={"hold": examples(3, 2)}, callbacks=[ReportCallback()])
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_hold_loss" in entry] == [2, 4]
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_only_the_first_process_writes(tmp_path):
    (tmp_path / "run").mkdir()
    state = TrainerState(is_world_process_zero=False)
    ReportCallback().on_train_end(settings(tmp_path / "run"), state, TrainerControl())
    assert list((tmp_path / "run").iterdir()) == []


def test_no_report_of_a_training_that_failed(tmp_path):
    def fail():
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        start(tmp_path / "run", ReportCallback(), AtStep(2, fail)).train()
    assert not (tmp_path / "run" / "report.html").exists()


def test_an_interrupted_run_has_a_report_and_can_be_continued(tmp_path, own_handlers):
    interrupted(start(tmp_path / "run", ReportCallback(), AtStep(1, interrupt_self)))
    first = (tmp_path / "run" / "report.html").read_text()
    resumed = start(tmp_path / "run", ReportCallback())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "report.html").read_text() != first


def test_the_users_callbacks_come_after_ours(tmp_path):
    """The pairing must know its epoch before anything else looks at the dataset."""
    trainer = start(tmp_path / "run", Epochs())
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.index(PairingCallback) < kinds.index(InterruptCallback) < kinds.index(Epochs)


def test_the_progress_bar_is_named_and_shows_both_losses(tmp_path, capsys):
    args = settings(tmp_path / "run", disable_tqdm=False, eval_strategy="epoch")
    trainer = BLURTrainer(tiny_llama(), args, FORGET, RETAIN, eval_dataset=RETAIN)
    trainer.remove_callback(ProgressCallback)
    bar = ProgressBarCallback("BLUR-NPO")
    trainer.add_callback(bar)
    shown = []
    update = type(bar).on_log

    def spy(self, args, state, control, logs=None, **kwargs):
        update(self, args, state, control, logs=logs, **kwargs)
        if "loss" in (logs or {}):
            shown.append((self.training_bar.desc, self.training_bar.postfix, logs["loss/forget"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressBarCallback, "on_log", spy)
        trainer.train()
    assert len(shown) == trainer.state.global_step
    for desc, postfix, loss in shown:
        assert desc.startswith("BLUR-NPO") and f"loss/forget={loss:.3g}" in postfix and "loss/retain=" in postfix
    out = capsys.readouterr()
    assert "'learning_rate'" not in out.out + out.err, "the dictionary is printed all the same"
    lines = [line.strip() for line in re.split(r"[\r\n]", out.err) if "it/s]" in line]
    assert any(line.startswith("BLUR-NPO, evaluation:") for line in lines)
    assert all(line.startswith("BLUR-NPO") for line in lines), "a bar has no name"
