"""What is written into `output_dir`: files whole or not at all, nothing of the user's replaced, no pickle, a card."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file
from support.models import examples, tiny_llama
from support.runs import distance, logits, settings, train, weights
from support.tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from blur_trainer.gradients.rules import BLUR
from blur_trainer.objectives.distributions import KL
from blur_trainer.objectives.likelihood import GradAscent
from blur_trainer.report.model_card import MARKER
from blur_trainer.saving.checkpoints import last_complete_checkpoint
from blur_trainer.saving.output_dir import check_output_dir, staged

FORGET, RETAIN = examples(7), examples(5, 1)
LORA = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)


def trained(folder, **kwargs):
    config = {"max_steps": 1} | kwargs.pop("config", {})
    return train(settings(folder, **config), kwargs.pop("forget", FORGET), kwargs.pop("retain", RETAIN), **kwargs)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write(folder, **contents):
    """Files by name; `__` stands for a dot and `_in_` for a folder."""
    for name, text in contents.items():
        path = folder / name.replace("_in_", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


# ---- staged ----


def test_staged_files_replace_those_of_the_same_name_only(tmp_path):
    write(tmp_path, model__bin="old", notes__txt="mine", deep_in_a__json="old")
    with staged(str(tmp_path), writes=True) as folder:
        write(Path(folder), model__bin="new", deep_in_a__json="new", other_in_b__json="new")
        assert files(tmp_path)["model.bin"] == b"old", "not before all are written"
    want = {"model.bin": "new", "notes.txt": "mine", "deep/a.json": "new", "other/b.json": "new"}
    assert files(tmp_path) == {name: text.encode() for name, text in want.items()}
    assert not (tmp_path / ".saving").exists()


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"])
def test_a_failure_in_the_middle_leaves_the_old_files(tmp_path, error):
    write(tmp_path, model__bin="old", config__json="old")
    before = files(tmp_path)
    with pytest.raises(type(error)), staged(str(tmp_path), writes=True) as folder:
        write(tmp_path / ".saving", model__bin="half of the ne")
        assert folder == str(tmp_path / ".saving")
        raise error
    assert files(tmp_path) == before
    assert not (tmp_path / ".saving").exists()


def test_a_failure_while_replacing_leaves_each_file_whole(tmp_path, monkeypatch):
    write(tmp_path, a="old a", b="old b")

    replace = os.replace

    def fail_on_b(source, target):
        if str(target).endswith("b"):
            raise OSError("the disk went away")
        replace(source, target)

    monkeypatch.setattr("blur_trainer.saving.output_dir.os.replace", fail_on_b)
    with pytest.raises(OSError, match="went away"), staged(str(tmp_path), writes=True):
        write(tmp_path / ".saving", a="new a", b="new b")
    assert files(tmp_path) == {"a": b"new a", "b": b"old b"}


def test_leftovers_of_a_killed_save_are_not_taken_for_new_files(tmp_path):
    write(tmp_path / ".saving", model__bin="half", junk="junk")
    with staged(str(tmp_path), writes=True):
        write(tmp_path / ".saving", config__json="new")
    assert files(tmp_path) == {"config.json": b"new"}


def test_processes_that_do_not_write_touch_nothing(tmp_path):
    """They leave before the main one has finished, whose staging folder must stay."""
    write(tmp_path / ".saving", model__bin="the main process is writing this")
    before = files(tmp_path)
    with staged(str(tmp_path), writes=False) as folder:
        assert folder == str(tmp_path / ".saving")
    assert files(tmp_path) == before
    with pytest.raises(OSError), staged(str(tmp_path), writes=False):
        raise OSError
    assert files(tmp_path) == before


def test_nothing_written_is_nothing_replaced(tmp_path):
    with staged(str(tmp_path / "new"), writes=True):
        pass
    assert not (tmp_path / "new").exists()


# ---- save_model ----


def test_what_is_saved_can_be_loaded_and_is_what_was_trained(tmp_path):
    trainer = trained(tmp_path)
    trainer.save_model()
    assert not (tmp_path / ".saving").exists()
    assert set(files(tmp_path)) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "training_args.bin",
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert distance(weights(loaded), weights(trainer.model)) == 0
    assert distance(weights(loaded), weights(tiny_llama())) > 1e-4
    assert torch.equal(logits(loaded), logits(trainer.model))


def test_no_pickle_but_trainers_own_arguments(tmp_path):
    """By content, not by name: pickles begin with byte 0x80, torch's archives are zip files."""
    trained(tmp_path).save_model()
    suspicious = [name for name, content in files(tmp_path).items() if content[:1] == b"\x80" or content[:2] == b"PK"]
    assert suspicious == ["training_args.bin"]
    assert load_file(tmp_path / "model.safetensors")


def test_saving_twice_with_training_between(tmp_path):
    trainer = trained(tmp_path)
    trainer.save_model()
    first = files(tmp_path)
    trainer.save_model()
    assert files(tmp_path) == first
    trainer.train()
    trainer.save_model()
    second = files(tmp_path)
    assert second["model.safetensors"] != first["model.safetensors"] and second.keys() == first.keys()
    assert distance(weights(AutoModelForCausalLM.from_pretrained(tmp_path)), weights(trainer.model)) == 0


def test_save_model_elsewhere(tmp_path):
    trainer = trained(tmp_path / "run")
    trainer.save_model(str(tmp_path / "elsewhere" / "deep"))
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    assert (tmp_path / "elsewhere" / "deep" / "README.md").is_file()
    assert (
        distance(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere" / "deep")), weights(trainer.model))
        == 0
    )


def test_a_save_that_fails_leaves_the_previous_model(tmp_path, monkeypatch):
    trainer = trained(tmp_path)
    trainer.save_model()
    before = files(tmp_path)
    trainer.train()

    def disk_full(self, folder, **kwargs):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(type(trainer.model), "save_pretrained", disk_full)
    with pytest.raises(OSError, match="No space"):
        trainer.save_model()
    assert files(tmp_path) == before
    assert not (tmp_path / ".saving").exists()


def test_the_tokenizer_is_saved_beside_the_model(tmp_path):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    rows = [{"text": "The lame goat of Larkford."}]
    trained(tmp_path, model=model, forget=rows, retain=rows, processing_class=tokenizer).save_model()
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(rows[0]["text"])["input_ids"] == tokenizer(rows[0]["text"])["input_ids"]


def test_checkpoints_are_left_to_trainer(tmp_path):
    """In a checkpoint folder nothing is staged, and no card is written: its state, written last, makes it count."""
    trained(tmp_path, config={"save_strategy": "steps", "save_steps": 1})
    names = set(files(tmp_path / "checkpoint-1"))
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= names
    assert "README.md" not in names
    assert not list(tmp_path.rglob(".saving"))


# ---- the card ----


def card_rows(folder):
    lines = (folder / "README.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_the_card_tells_objectives_rule_and_sizes(tmp_path):
    trained(
        tmp_path,
        rule=BLUR(gamma=0.25, lower_level="retain"),
        forget_objective=GradAscent(),
        retain_objective=KL(),
        config={"learning_rate": 0.002, "gradient_accumulation_steps": 3},
    ).save_model()
    text = (tmp_path / "README.md").read_text()
    assert MARKER in text and "BLUR-GradAscent" in text
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert {"unlearning", "blur_trainer"} <= set(data["tags"])
    rows = card_rows(tmp_path)
    for row in (
        ["forget", "not stated", "7"],
        ["retain", "not stated", "5"],
        [r"learning\_rate", "`0.002`"],
        [r"gradient\_accumulation\_steps", "`3`"],
        [r"forget\_objective", "`GradAscent()`"],
        [r"retain\_objective", "`KL()`"],
        ["trainer", "`BLURTrainer`"],
    ):
        assert row in rows, row
    (rule,) = [row[1] for row in rows if row[0] == "rule"]
    assert "lower_level='retain'" in rule and "gamma=0.25" in rule
    assert str(tmp_path) not in text


def test_the_card_without_a_retain_set(tmp_path):
    trained(tmp_path, retain=None, config={"rule": "sum", "retain_weight": 0.0}).save_model()
    rows = card_rows(tmp_path)
    assert ["forget", "not stated", "7"] in rows
    assert not any(row[0] == r"retain\_objective" for row in rows)


def test_metrics_may_be_added_to_the_card_later(tmp_path):
    trainer = trained(tmp_path)
    trainer.save_model()
    columns = [{"name": "forget_verbmem", "label": "VerbMem forget", "goal": "min"}]
    rows = [{"name": "target", "kind": "target", "metrics": {"forget_verbmem": 98.76}}]
    trainer.create_model_card(metrics={"benchmark": "MUSE", "columns": columns, "rows": rows})
    assert ["target", "98.8"] in card_rows(tmp_path)
    assert ["forget", "not stated", "7"] in card_rows(tmp_path)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "LoRA"])
def test_a_users_readme_is_never_replaced(tmp_path, peft_config):
    """PEFT writes a template of its own on each save, with "[More Information Needed]" in it."""
    (tmp_path / "README.md").write_text("# My notes\n")
    trainer = trained(tmp_path, peft_config=peft_config)
    trainer.save_model()
    trainer.save_model()
    assert (tmp_path / "README.md").read_text() == "# My notes\n"


def test_an_adapter_has_our_card_and_loads(tmp_path):
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    trainer = trained(tmp_path / "run", model=AutoModelForCausalLM.from_pretrained(base), peft_config=LORA)
    trainer.save_model()
    text = (tmp_path / "run" / "README.md").read_text()
    assert MARKER in text and "More Information Needed" not in text
    assert set(files(tmp_path / "run")) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "training_args.bin",
    }
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    assert torch.equal(logits(loaded), logits(trainer.model))
    assert not torch.equal(logits(loaded), logits(tiny_llama()))
    trainer.save_model()  # our own card is renewed, not taken for a user's
    assert (tmp_path / "run" / "README.md").read_text() == text


def test_our_card_is_renewed_by_a_second_save(tmp_path):
    trainer = trained(tmp_path)
    trainer.save_model()
    (tmp_path / "README.md").write_text(f"stale {MARKER}")
    trainer.save_model()
    assert "stale" not in (tmp_path / "README.md").read_text()


# ---- directories ----


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors", "trainer_state.json"])
def test_a_used_directory_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError) as raised:
        check_output_dir(str(tmp_path))
    message = str(raised.value)
    assert "\n" not in message
    for word in (str(tmp_path), name, "another `output_dir`", "`resume_from_checkpoint=True`"):
        assert word in message
    assert files(tmp_path) == {name: b"precious"}


def test_a_long_list_of_what_was_found_is_cut(tmp_path):
    for step in range(1, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(ValueError, match=r"\(checkpoint-1, checkpoint-2, checkpoint-3, checkpoint-4, \.\.\.\)"):
        check_output_dir(str(tmp_path))


def test_directories_that_are_free(tmp_path):
    check_output_dir(str(tmp_path))
    check_output_dir(str(tmp_path / "not" / "there"))
    write(tmp_path, notes__txt="mine", target_in_model__safetensors="another model, in a folder of its own")
    check_output_dir(str(tmp_path))


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; pass a directory"):
        check_output_dir(str(tmp_path / "file"))


# ---- checkpoints ----


def checkpoint(folder, step, state=None):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    if state is not False:
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}) if state is None else state)
    return str(path)


@pytest.mark.parametrize("damage", [False, "", '{"global_step": 3', "\x00\x00"], ids=["absent", "empty", "half", "nul"])
def test_the_newest_checkpoint_that_is_complete(tmp_path, damage):
    older = checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 30, damage)
    assert last_complete_checkpoint(str(tmp_path)) == older
    newest = checkpoint(tmp_path, 100)  # "checkpoint-100" < "checkpoint-9" as text
    assert last_complete_checkpoint(str(tmp_path)) == newest


@pytest.mark.parametrize("what", ["empty", "only broken ones", "no folder"])
def test_no_complete_checkpoint(tmp_path, what):
    if what == "only broken ones":
        checkpoint(tmp_path, 1, "{")
    folder = tmp_path / "none" if what == "no folder" else tmp_path
    with pytest.raises(ValueError, match="No complete checkpoint") as raised:
        last_complete_checkpoint(str(folder))
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_a_killed_save_does_not_hide_the_last_good_one(tmp_path):
    """The folder as a kill leaves it: weights there, the state that is written last is not."""
    trainer = trained(tmp_path, config={"max_steps": 2, "save_strategy": "steps", "save_steps": 1})
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert trainer.state.global_step == 2
