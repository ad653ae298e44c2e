"""Checkpoint + resume continues the identical trajectory, and what is saved is what was trained."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel
from support.models import examples, tiny_llama
from support.runs import distance, logits, settings, train, training_logs, weights
from transformers import AutoModelForCausalLM, TrainerCallback

from blur_trainer.gradients.rules import BLUR
from blur_trainer.gradients.stateful_rules import GRU
from blur_trainer.objectives.distributions import KL
from blur_trainer.objectives.likelihood import GradAscent
from blur_trainer.objectives.preference import NPO
from blur_trainer.trainers.blur import BLURTrainer

LOGGED = ("loss", "grad_norm", "learning_rate", "loss/forget", "loss/retain", "grad/forget_norm", "grad/retain_norm")
LOGGED += ("grad/cosine", "grad/weight_forget", "grad/weight_retain", "epoch", "step")


def lora(dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_dropout=dropout)


def trained_adapter() -> PeftModel:
    """A LoRA that already changes the model, the same at each call."""
    from peft import get_peft_model

    model = get_peft_model(tiny_llama(), lora())
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return model


@dataclass
class Run:
    """One way to train; 7 forget examples, 2 a batch: 4 batches, the last one short."""

    config: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    model: Any = tiny_llama
    forget: Any = field(default_factory=lambda: examples(7))
    retain: Any = field(default_factory=lambda: examples(5, 1))

    def start(self, output_dir: Path, **config: Any) -> BLURTrainer:
        args = settings(output_dir, **(self.config | config))
        return BLURTrainer(self.model(), args, self.forget, self.retain, **self.trainer)


RUNS = {
    "plain": Run(),
    "accumulation with a last short window": Run({"gradient_accumulation_steps": 3}),
    "accumulation over epochs": Run({"gradient_accumulation_steps": 2, "num_train_epochs": 3}),
    "retain shorter": Run({"num_train_epochs": 3}, retain=examples(3, 1)),
    "retain longer": Run({"num_train_epochs": 3}, retain=examples(11, 1)),
    "dropout": Run(model=lambda: tiny_llama(dropout=0.3)),
    "dropout and accumulation": Run({"gradient_accumulation_steps": 2}, model=lambda: tiny_llama(dropout=0.3)),
    "frozen reference, KL": Run(trainer={"retain_objective": KL()}),
    "precomputed": Run({"precompute_ref_logps": True}),
    "precomputed with dropout": Run({"precompute_ref_logps": True}, model=lambda: tiny_llama(dropout=0.3)),
    "LoRA": Run(trainer={"peft_config": lora(0.2)}),
    "LoRA, precomputed": Run({"precompute_ref_logps": True}, trainer={"peft_config": lora()}),
    "trained adapter": Run(model=trained_adapter),
    "trained adapter, KL": Run(model=trained_adapter, trainer={"retain_objective": KL()}),
    "data_seed": Run({"data_seed": 123, "num_train_epochs": 3}),
    "no shuffling": Run({"train_sampling_strategy": "sequential"}),
    "bf16": Run({"bf16": True}),
    "gradient checkpointing": Run({"gradient_checkpointing": True}),
    "several weights a log": Run({"logging_steps": 2}),
    "tied embeddings": Run(model=lambda: tiny_llama(tie=True)),
    "workers": Run({"dataloader_num_workers": 1}),
    "max_steps": Run({"max_steps": 6, "lr_scheduler_type": "cosine", "warmup_steps": 2}),
    "sgd with momentum": Run({"optim": "sgd", "optim_args": "momentum=0.9"}),
    "GRU": Run(trainer={"rule": GRU(retain_weight=1.0)}),
    "PDU": Run({"rule": "pdu", "rule_kwargs": {"warmup_epochs": 0.5}}),
    "a level": Run({"forget_level": 4.5}, model=lambda: tiny_llama(dropout=0.3)),
    "SAM": Run({"sam_rho": 0.1}, model=lambda: tiny_llama(dropout=0.3)),
    "no retain set": Run({"rule": "sum", "retain_weight": 0.0}, retain=None),
}
#: what other runs do too, together with something else
COVERED = [
    "a level",
    "accumulation over epochs",
    "retain longer",
    "dropout and accumulation",
    "trained adapter",
    "no shuffling",
    "precomputed",
    "LoRA, precomputed",
    "data_seed",
    "several weights a log",
    "max_steps",
    "tied embeddings",
]
QUICK = ["plain", "accumulation with a last short window", "dropout", "LoRA"]


def _trainable(trainer: BLURTrainer) -> dict[str, torch.Tensor]:
    return weights(trainer.model)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full if n in COVERED else ()) for n in RUNS])
def test_resumed_run_equals_the_uninterrupted_one(name, tmp_path):
    """From every checkpoint that the run left behind, with a fresh model in a fresh trainer."""
    run = RUNS[name]
    whole = run.start(tmp_path / "whole", save_strategy="steps", save_steps=1)
    whole.train()
    final, steps = _trainable(whole), whole.state.global_step
    assert distance(_trainable(run.start(tmp_path / "unused")), final) > 1e-4  # it moved at all
    # in the middle of an epoch, or of several weights a log, and where the epoch ends; the quick ones everywhere
    stops = range(1, steps) if name in QUICK else {steps // 2, steps - 1}
    for stop in sorted(stops):
        resumed = run.start(tmp_path / f"resumed-{stop}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert resumed.state.global_step == steps
        assert distance(final, _trainable(resumed)) <= 1e-7, f"after resuming from step {stop} of {steps}"


def test_saving_changes_nothing(tmp_path):
    run = RUNS["dropout and accumulation"]
    silent = run.start(tmp_path / "a")
    silent.train()
    saving = run.start(tmp_path / "b", save_strategy="steps", save_steps=1)  # constructing sets the seed
    saving.train()
    assert distance(_trainable(silent), _trainable(saving)) == 0


@pytest.mark.parametrize("which", ["forget", "retain", "both"])
def test_resume_in_the_middle_of_a_stream(tmp_path, which):
    def stream(rows):
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    forget, retain = examples(12), examples(5, 1)
    run = Run(
        {"max_steps": 5},
        forget=stream(forget) if which != "retain" else forget,
        retain=stream(retain) if which != "forget" else retain,
    )
    whole = run.start(tmp_path / "whole", save_strategy="steps", save_steps=1)
    whole.train()
    for stop in (1, 3):
        resumed = run.start(tmp_path / f"resumed-{stop}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert distance(_trainable(whole), _trainable(resumed)) <= 1e-7


def test_the_examples_seen_are_the_same(tmp_path):
    """Weights could agree by luck on few examples; the batches themselves must, retain partners included."""

    def watched(run: Run, folder: Path, **config: Any):
        trainer, seen = run.start(folder, **config), []
        original = trainer.training_step

        def step(model, inputs, num_items_in_batch=None):
            seen.append({role: inputs[role]["input_ids"].tolist() for role in inputs})
            return original(model, inputs, num_items_in_batch)

        trainer.training_step = step
        return trainer, seen

    run = Run({"num_train_epochs": 3}, forget=examples(6), retain=examples(10, 1))
    whole, everything = watched(run, tmp_path / "whole", save_strategy="steps", save_steps=1)
    whole.train()
    assert len(everything) == 9
    epochs = [everything[0:3], everything[3:6], everything[6:9]]
    forgets = [sorted(str(row) for batch in epoch for row in batch["forget"]) for epoch in epochs]
    assert len({str(epoch) for epoch in epochs}) == 3  # shuffled anew
    assert all(len(rows) == 6 for rows in forgets)
    for stop in (2, 3, 7):
        resumed, rest = watched(run, tmp_path / f"resumed-{stop}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert rest == everything[stop:]


def test_log_history_continues(tmp_path):
    run = RUNS["accumulation over epochs"]
    whole = run.start(tmp_path / "whole", save_strategy="steps", save_steps=1)
    whole.train()
    resumed = run.start(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected, found = training_logs(whole), training_logs(resumed)
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected] == list(range(1, 7))
    for ours, theirs in zip(found, expected, strict=True):
        assert set(LOGGED) <= set(ours)
        for key in LOGGED:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-8), key


# ---- which checkpoint ----


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run of 8 steps with all its checkpoints, and the weights at its end."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    whole = RUNS["plain"].start(folder, save_strategy="steps", save_steps=1)
    whole.train()
    return folder, _trainable(whole)


@pytest.fixture
def interrupted(uninterrupted, tmp_path):
    """A folder with the checkpoints 1..4 of that run, and the weights at its end."""
    whole, final = uninterrupted
    folder = tmp_path / "run"
    folder.mkdir()
    for stop in (1, 2, 3, 4):
        shutil.copytree(whole / f"checkpoint-{stop}", folder / f"checkpoint-{stop}")
    return RUNS["plain"], folder, final


class FirstStep(TrainerCallback):
    """Remembers where training took up."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


def _resume(run: Run, folder: Path, final, given: Any = True) -> int:
    trainer, first = run.start(folder), FirstStep()
    trainer.add_callback(first)
    trainer.train(resume_from_checkpoint=given)
    assert distance(final, _trainable(trainer)) <= 1e-7
    return first.step


def test_true_means_the_newest(interrupted):
    assert _resume(*interrupted) == 4


@pytest.mark.parametrize("max_steps", [3, 4, 6])
def test_a_finished_training_is_not_continued(max_steps, tmp_path):
    """In the middle of an epoch, Trainer alone would take one step more."""
    run = Run({"max_steps": max_steps, "lr_scheduler_type": "constant"})
    whole = run.start(tmp_path, save_strategy="steps", save_steps=1)
    whole.train()
    again = run.start(tmp_path, save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == max_steps and training_logs(again) == training_logs(whole)
    assert distance(_trainable(whole), _trainable(again)) == 0
    assert not (tmp_path / f"checkpoint-{max_steps + 1}").exists()


def test_newest_by_number_not_by_name(tmp_path):
    """checkpoint-8 comes after checkpoint-10 in the alphabet."""
    run = Run({"max_steps": 12, "per_device_train_batch_size": 1})
    folder = tmp_path / "long"
    long = run.start(folder, save_strategy="steps", save_steps=2)
    long.train()
    shutil.rmtree(folder / "checkpoint-12")
    assert _resume(run, folder, _trainable(long)) == 10


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "a list", "no step", "empty folder", "binary"])
def test_an_incomplete_newest_checkpoint_is_passed_over(interrupted, damage):
    run, folder, final = interrupted
    state = folder / "checkpoint-4" / "trainer_state.json"
    if damage == "missing":
        state.unlink()
    elif damage == "empty folder":
        shutil.rmtree(folder / "checkpoint-4")
        (folder / "checkpoint-4").mkdir()
    else:
        text = state.read_text()
        content = {
            "empty": "",
            "half": text[: len(text) // 2],
            "a list": "[]",
            "no step": "{}",
            "binary": "\udcff\udc80",
        }
        state.write_bytes(content[damage].encode("utf-8", "surrogateescape"))
    assert _resume(run, folder, final) == 3


def test_two_incomplete_checkpoints_are_passed_over(interrupted):
    run, folder, final = interrupted
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    (folder / "checkpoint-3" / "trainer_state.json").write_text("{")
    assert _resume(run, folder, final) == 2


def test_a_path_is_taken_as_given(interrupted):
    run, folder, final = interrupted
    for newer in (3, 4):
        shutil.rmtree(folder / f"checkpoint-{newer}")
    assert _resume(run, folder, final, str(folder / "checkpoint-2")) == 2


@pytest.mark.parametrize("elsewhere", [False, True])
def test_newer_checkpoints_are_never_overwritten(interrupted, elsewhere, uninterrupted):
    run, folder, _ = interrupted
    given = uninterrupted[0] / "checkpoint-2" if elsewhere else folder / "checkpoint-2"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"overwrite newer checkpoints .*\(checkpoint-3, checkpoint-4\)") as raised:
        run.start(folder).train(resume_from_checkpoint=str(given))
    assert "resume_from_checkpoint=True" in str(raised.value) and "\n" not in str(raised.value)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["nothing", "only broken ones", "no folder"])
def test_resume_with_nothing_there(interrupted, what, tmp_path):
    run, folder, _ = interrupted
    if what == "only broken ones":
        for path in folder.glob("*/trainer_state.json"):
            path.unlink()
    else:
        folder = tmp_path / "empty"
    trainer = run.start(folder)
    if what == "no folder":
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"No complete checkpoint in output_dir .*resume") as raised:
        trainer.train(resume_from_checkpoint=True)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)
    assert trainer.state.global_step == 0


def test_false_and_none_start_anew_and_refuse_a_used_folder(interrupted):
    run, folder, _ = interrupted
    for given in (None, False):
        with pytest.raises(ValueError, match="already holds a run"):
            run.start(folder).train(resume_from_checkpoint=given)


# ---- what is saved ----


@pytest.mark.parametrize("tie", [False, True])
def test_saved_model_reloads_and_gives_the_same_logits(tmp_path, tie):
    trainer = train(settings(tmp_path / "run"), examples(5), examples(5, 1), model=tiny_llama(tie=tie))
    trainer.save_model()
    folder = tmp_path / "run"
    assert (folder / "model.safetensors").is_file()
    assert not list(folder.rglob("pytorch_model*")) and not list(folder.rglob("adapter_model.bin"))
    reloaded = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    assert torch.equal(logits(reloaded), logits(trainer.model))
    assert not torch.equal(logits(reloaded), logits(tiny_llama(tie=tie)))


def test_a_name_is_trained_like_the_model_itself(tmp_path):
    """The first line of the README: a path instead of a model."""
    tiny_llama().save_pretrained(tmp_path / "model")
    by_name = BLURTrainer(str(tmp_path / "model"), settings(tmp_path / "a"), examples(5), examples(5, 1))
    by_name.train()
    itself = train(settings(tmp_path / "b"), examples(5), examples(5, 1))
    assert distance(weights(by_name.model), weights(itself.model)) <= 1e-7


@pytest.mark.parametrize("model", [tiny_llama, trained_adapter], ids=["fresh", "trained"])
def test_saved_adapter_reloads_and_gives_the_same_logits(tmp_path, model):
    kwargs = {"peft_config": lora()} if model is tiny_llama else {}
    trainer = train(settings(tmp_path / "run"), examples(5), examples(5, 1), model=model(), **kwargs)
    trainer.save_model()
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    reloaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "run")
    assert torch.equal(logits(reloaded), logits(trainer.model))


def test_save_total_limit_is_honoured(tmp_path):
    config = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    train(settings(tmp_path / "run", **config), examples(5), examples(5, 1))
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-5", "checkpoint-6"]


def test_checkpoint_state_is_json_with_our_columns(tmp_path):
    config = {"save_strategy": "steps", "save_steps": 2}
    train(settings(tmp_path / "run", **config), examples(5), examples(5, 1))
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [1, 2, 3, 4]
    assert all(set(LOGGED) <= set(entry) for entry in state["log_history"])


def test_objects_resume_as_names_do(tmp_path):
    """A checkpoint stores neither objectives nor rules: pass the same ones, as objects or by name."""
    run = Run(trainer={"forget_objective": GradAscent(), "rule": BLUR(gamma=0.2)})
    named = Run({"forget_objective": "grad_ascent", "gamma": 0.2})
    whole = run.start(tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    resumed = named.start(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert distance(_trainable(whole), _trainable(resumed)) <= 1e-7


def test_the_reference_of_a_resumed_run_is_the_model_before_unlearning(tmp_path):
    """Not the checkpoint's weights: NPO would start over at its steepest point."""
    run = Run({"num_train_epochs": 3, "learning_rate": 1e-2}, trainer={"forget_objective": NPO(beta=0.5)})
    whole = run.start(tmp_path / "whole", save_strategy="steps", save_steps=4)
    whole.train()
    resumed = run.start(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert torch.equal(logits(resumed.reference.model), logits(tiny_llama()))
    assert training_logs(resumed)[4]["loss/forget"] == pytest.approx(training_logs(whole)[4]["loss/forget"], rel=1e-6)
