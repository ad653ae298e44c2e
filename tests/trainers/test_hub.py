"""The Hub, mocked: what is uploaded and when, that no text to be forgotten goes along, and that no token is written."""

import json
import logging
from pathlib import Path

import pytest
import transformers.trainer
from huggingface_hub import ModelCard
from peft import LoraConfig
from support.hub import Hub
from support.models import examples, tiny_llama
from support.runs import settings
from support.tiny_tokenizer import tiny_tokenizer
from transformers import Trainer, TrainerState, TrainingArguments

from blur_trainer.models.carried_code import MODULES
from blur_trainer.saving.manifest import MANIFEST_NAME
from blur_trainer.trainers.blur import BLURTrainer
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.uld.trainer import ULDConfig, ULDTrainer

FORGET, RETAIN = examples(4, seed=1), examples(4, seed=2)
SECRET = "hf_thisIsTheTokenOfTheUser"
LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
MODEL = {"config.json", "generation_config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    return hub


def make(folder, model=None, tokenizer=None, **kwargs):
    given = {"max_steps": 1, "push_to_hub": True, "hub_model_id": "me/m", "hub_token": SECRET, **kwargs}
    model = tiny_llama() if model is None else model
    return BLURTrainer(model, settings(folder, **given), FORGET, RETAIN, processing_class=tokenizer)


def crowded(folder: Path) -> None:
    """What a run and its user may leave beside the model."""
    names = ["metrics.json", "report.html", "reference_logps.safetensors", "samples.jsonl", "target/model.safetensors"]
    names += ["target/config.json", "retrain/model.safetensors", "retrain/adapter_config.json", "notes.md", ".training"]
    names += ["checkpoint-9/model.safetensors", "figures/plane.png", "figures/answers.png", "tasks/forget.jsonl"]
    names += ["model-00001-of-00002.safetensors", "run.py", "runs/events.out.tfevents", "trainer_state.json"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("the answer is forty-two")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A trained model with a tokenizer; the Hub is asked for nothing but the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.trainer, "hf_api", Hub)
        model = tiny_llama()
        model.resize_token_embeddings(300)
        trainer = make(tmp_path_factory.mktemp("run") / "m", model, tiny_tokenizer())
        trainer.train()
    return trainer


def test_the_model_goes_up_and_nothing_that_lies_beside_it(hub, finished):
    folder = Path(finished.output_dir)
    crowded(folder)
    finished.args.push_report = False
    assert finished.push_to_hub(license="mit", tags="x") == "commit"
    assert set(hub.files[0]) == MODEL | TOKENIZER | {"README.md", "figures/plane.png"}
    assert hub.calls[0]["commit_message"] == "End of training" and hub.calls[0]["token"] == SECRET
    data = ModelCard(hub.files[0]["README.md"].decode()).data
    assert data.license == "mit" and {"x", "unlearning", "generated_from_trainer"} <= set(data.tags)
    assert not list(folder.glob(".upload-*")) and (folder / "metrics.json").exists()

    finished.args.push_report = True
    assert finished.push_to_hub("later", blocking=False, revision="dev", token="other").result() == "commit"
    assert set(hub.files[1]) - set(hub.files[0]) == {"metrics.json", "report.html"}
    assert hub.calls[1]["revision"] == "dev" and hub.calls[1]["token"] == "other"
    assert not list(folder.glob(".upload-*"))

    hub.error = ConnectionError("no route")
    finished.save_model()  # under `push_to_hub=True`, as in Trainer
    assert hub.calls[2]["commit_message"] == "Model save" and not hub.calls[2]["run_as_future"]


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_each_save_is_uploaded_as_the_strategy_says(hub, tmp_path, strategy):
    out = tmp_path / "m"
    crowded(out / "kept")  # not of this run: it is no folder that a model is saved to
    given = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 2}
    trainer = make(out, hub_strategy=strategy, precompute_ref_logps=True, **given)
    trainer.train()
    assert (out / "reference_logps.safetensors").exists()
    models = [files for files in hub.files if "README.md" in files]
    checkpoints = [files for files in hub.files if files not in models]
    assert len(models) == (0 if strategy == "end" else 2)
    for step, files in enumerate(models, 1):
        assert set(files) == MODEL | {"README.md"}
        assert f"at step {step} of 2" in files["README.md"].decode()
    inside = {"checkpoint": ["last-checkpoint"] * 2, "all_checkpoints": ["checkpoint-1", "checkpoint-2"]}
    assert [call["path_in_repo"] for call in hub.calls if call["path_in_repo"]] == inside.get(strategy, [])
    for files in checkpoints:
        (manifest,) = (name for name in files if name.endswith(MANIFEST_NAME))
        listed = json.loads(files[manifest])["files"]  # closed: all of it is there
        assert {name.split("/", 1)[1] for name in files} == {*listed, MANIFEST_NAME}
        assert {"optimizer.pt", "trainer_state.json", "model.safetensors"} <= set(listed)
        assert "training_args.bin" not in listed and set(json.loads(files[manifest])) == {"files"}
    assert not any("logps" in name or "kept" in name for files in hub.files for name in files)
    assert all(call["run_as_future"] and call["token"] == SECRET for call in hub.calls)
    assert not list(out.glob(".upload-*"))


@pytest.mark.parametrize("always, uploads", [(False, 1), (True, 2)])
def test_a_running_upload_is_not_doubled(hub, tmp_path, always, uploads):
    hub.slow = True
    trainer = make(tmp_path / "m", hub_always_push=always)
    for step in (1, 2):
        checkpoint = tmp_path / "m" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(b"%d" % step)
        trainer._push_from_checkpoint(str(checkpoint))
        trainer.push_checkpoint()
        (checkpoint / "model.safetensors").unlink()  # rotated away
    assert [files["model.safetensors"] for files in hub.files] == [b"1", b"2"][:uploads]
    waiting = list((tmp_path / "m").glob(".upload-*/model.safetensors"))
    assert len(waiting) == uploads  # they outlive their checkpoint
    for job in hub.jobs:
        job.set_result("commit")
    assert trainer.push_in_progress.is_done() and not list((tmp_path / "m").glob(".upload-*"))


def test_a_failed_upload_is_told_and_what_a_kill_left_is_removed(hub, tmp_path, caplog):
    hub.error = ConnectionError("no route")
    (tmp_path / "m" / ".upload-old").mkdir(parents=True)
    trainer = make(tmp_path / "m", save_strategy="steps", save_steps=1)
    with caplog.at_level(logging.ERROR, logger="blur_trainer.trainers.hub"):
        trainer.train()
    assert "'Training in progress, step 1' to me/m failed: no route" in caplog.text
    assert not list((tmp_path / "m").glob(".upload-*"))


def test_another_transformers_is_refused_before_it_uploads_everything(hub, tmp_path, monkeypatch):
    assert callable(Trainer._push_from_checkpoint)  # what `hub.py` overrides, and Trainer calls at each save
    monkeypatch.delattr(Trainer, "_push_from_checkpoint")
    with pytest.raises(RuntimeError, match="might take along the texts to be forgotten"):
        make(tmp_path / "m")
    make(tmp_path / "m", push_to_hub=False)


def test_shards_and_code_go_along(hub, tmp_path):
    model = tiny_llama()
    trainer = make(tmp_path / "m", model)
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    save = model.save_pretrained
    model.save_pretrained = lambda *args, **kwargs: save(*args, **(kwargs | {"max_shard_size": "10KB"}))
    (tmp_path / "m").mkdir(exist_ok=True)
    (tmp_path / "m" / "modeling_mine.py").write_text("from .layers_mine import x\n")
    (tmp_path / "m" / "layers_mine.py").write_text("x = 1\n")
    (tmp_path / "m" / "secret.py").write_text("x = 1\n")
    trainer.push_to_hub()
    index = json.loads(hub.files[0]["model.safetensors.index.json"])
    shards = set(index["weight_map"].values())
    assert len(shards) > 1 and shards <= set(hub.files[0])
    assert {name for name in hub.files[0] if name.endswith(".py")} == {"modeling_mine.py", "layers_mine.py"}


def test_an_adapter_goes_up_without_its_base_and_without_other_adapters(hub, tmp_path, caplog):
    tiny_llama().save_pretrained(tmp_path / "base")
    args = settings(tmp_path / "m", max_steps=1, push_to_hub=True, hub_model_id="me/m")
    trainer = BLURTrainer(str(tmp_path / "base"), args, FORGET, RETAIN, peft_config=LORA)
    trainer.model.add_adapter("retrain", LORA)
    with caplog.at_level(logging.WARNING, logger="blur_trainer.trainers.hub"):
        trainer.push_to_hub()
    assert (tmp_path / "m" / "retrain" / "adapter_model.safetensors").exists()
    assert set(hub.files[0]) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert "which others do not have" in caplog.text
    text = hub.files[0]["README.md"].decode()
    assert "still knows what was unlearned" in text and ModelCard(text).data.library_name == "peft"


def test_uld_goes_up_without_the_target(hub, tmp_path):
    tiny_llama(layers=4).save_pretrained(tmp_path / "target")
    own = {"num_assistant_layers": 2, "save_strategy": "steps", "save_steps": 1, "hub_strategy": "every_save"}
    own |= {"max_steps": 1, "push_to_hub": True, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    args = ULDConfig(str(tmp_path / "m"), per_device_train_batch_size=2, **own)
    no = {"augment_forget": "none", "augment_retain": "none"}
    trainer = ULDTrainer(str(tmp_path / "target"), args, FORGET, RETAIN, **no)
    trainer.train()
    trainer.push_to_hub()
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    beside = {"README.md", "config.json", "generation_config.json"} | {f"{name}.py" for name in MODULES}
    assert [set(files) for files in hub.files] == [
        adapter | beside,
        {f"assistant/{name}" for name in adapter} | beside,
    ]
    assert all("still knows what was unlearned" in files["README.md"].decode() for files in hub.files)


# ---- the card ----


def card(trainer) -> ModelCard:
    return ModelCard.load(Path(trainer.output_dir) / "README.md")


def test_the_card_takes_trainers_own_arguments(finished):
    assert issubclass(type(finished), Trainer)
    finished.create_model_card(
        "en", "apache-2.0", ["a"], "mine", "org/base", "text-generation", "org/data", "Data", "v"
    )
    data = card(finished).data
    found = data.language, data.license, data.base_model, data.datasets, data.pipeline_tag
    assert found == ("en", "apache-2.0", "org/base", ["org/data"], "text-generation")
    assert "a" in data.tags and "# mine\n" in card(finished).content
    with pytest.raises(ValueError, match=r"unknown keys \['licence'\]"):
        finished.create_model_card(licence="mit")
    finished._told = (None, {})


def test_a_card_repeats_what_was_measured_until_the_next_training(hub, finished):
    column = {"name": "forget", "label": "Forget", "goal": "min"}
    rows = [
        {"name": "ours", "kind": "unlearned", "metrics": {"forget": 1.5}},
        {"name": "theirs", "kind": "baseline", "metrics": {"forget": 7.0}},
    ]
    finished.create_model_card(tags="first", metrics={"benchmark": "B", "columns": [column], "rows": rows}, row="ours")
    finished.push_to_hub(tags=["second"])
    data = ModelCard(hub.files[-1]["README.md"].decode()).data
    assert [(result.metric_value, result.dataset_name) for result in data.eval_results] == [(1.5, "B")]
    assert {"first", "second"} <= set(data.tags)
    finished.state = TrainerState()  # as each training begins: the numbers are of the model before
    finished.create_model_card()
    assert card(finished).data.eval_results is None and "first" in card(finished).data.tags
    finished._told = (None, {})


# ---- tokens ----


def test_no_token_is_written(hub, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "target")
    given = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "hub_strategy": "all_checkpoints"}
    given |= {"hub_token": SECRET, "push_to_hub": True, "model_init_kwargs": {"token": SECRET, "dtype": "float32"}}
    args = settings(tmp_path / "m", **given)
    trainer = BLURTrainer(str(tmp_path / "target"), args, FORGET, RETAIN)
    trainer.train()
    trainer.save_model()
    written = [path for path in (tmp_path / "m").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in written)
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
    assert not any(SECRET.encode() in content for files in hub.files for content in files.values())
    assert args.hub_token == SECRET and args.model_init_kwargs["token"] == SECRET
    assert {call["token"] for call in hub.calls} == {SECRET}


@pytest.mark.parametrize("kind", [UnlearningConfig, ULDConfig], ids=lambda kind: kind.__name__)
def test_no_token_is_shown(tmp_path, kind):
    nested = {"token": SECRET, "config": {"use_auth_token": SECRET}, "local_files_only": True}
    args = kind(str(tmp_path), use_cpu=True, hub_token=SECRET, model_init_kwargs=nested)
    for text in (str(args), repr(args), args.to_json_string(), str(args.to_dict()), str(args.to_sanitized_dict())):
        assert SECRET not in text
    assert args.to_dict()["model_init_kwargs"]["token"] == "<TOKEN>"
    assert args.to_dict()["hub_token"] == TrainingArguments(str(tmp_path), hub_token="x").to_dict()["hub_token"]
    assert args.model_init_kwargs == nested
