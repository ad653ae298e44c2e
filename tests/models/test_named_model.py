"""Which target a logit-difference model loads: the recorded one, beside it or at its commit, and no code with it."""

import json
import shutil
from types import SimpleNamespace

import pytest
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support.models import tiny_llama
from transformers import AutoModelForCausalLM

from blur_trainer.models.logit_difference import LogitDifferenceConfig, LogitDifferenceModel
from blur_trainer.models.lora_assistant import lora_assistant
from blur_trainer.models.origin import record, weights_digest


@pytest.fixture
def model():
    target = tiny_llama()
    return LogitDifferenceModel(LogitDifferenceConfig(), target, lora_assistant(target, 1, LoraConfig(r=2)))


@pytest.fixture
def saved(model, tmp_path):
    model.target.save_pretrained(tmp_path / "target")
    model.config.target = str(tmp_path / "target")
    model.save_pretrained(tmp_path / "unlearned")
    return tmp_path / "unlearned"


def configuration(folder, **changed):
    """Writes a saved model's configuration anew, with other values."""
    stored = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps(stored))
    return stored


def test_the_target_is_recorded_when_the_model_is_saved(saved, tmp_path):
    target = str(tmp_path / "target")
    assert configuration(saved)["origins"] == {target: {"folder": weights_digest(tmp_path / "target")}}


def test_a_relative_folder_is_saved_as_absolute_and_found_from_anywhere(model, tmp_path, monkeypatch):
    model.target.save_pretrained(tmp_path / "models" / "llm")
    monkeypatch.chdir(tmp_path)
    model.config.target, model.config.origins = "models/llm", None
    model.save_pretrained("unlearned")
    monkeypatch.chdir(tmp_path / "models")
    loaded = LogitDifferenceModel.from_pretrained(tmp_path / "unlearned")
    assert loaded.config.target == str(tmp_path / "models" / "llm")


def test_a_relative_target_is_beside_the_configuration_and_nowhere_else(saved, tmp_path, monkeypatch, caplog):
    configuration(saved, target="models/llm", origins=None)  # also a hub id, and a folder of the working directory
    monkeypatch.chdir(tmp_path)
    shutil.copytree("target", "models/llm")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("asked"))
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*unlearned/models/llm'.*nor on the Hub"):
        LogitDifferenceModel.from_pretrained("unlearned")
    monkeypatch.undo()
    shutil.copytree(tmp_path / "target", saved / "models" / "llm")
    with caplog.at_level("WARNING", logger="blur_trainer.models.origin"):
        LogitDifferenceModel.from_pretrained(saved)  # an older folder, without a digest
    assert "No digest of the target is recorded" in caplog.text


def test_another_target_of_the_same_shapes_is_noticed(saved, tmp_path, model):
    stored = tmp_path / "target" / "model.safetensors"
    tensors = load_file(stored)
    name = max(tensors)
    before = tensors[name].clone()
    tensors[name][-1] += 1e-3
    save_file(tensors, stored, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is not the model that was there when this one was saved"):
        LogitDifferenceModel.from_pretrained(saved)
    LogitDifferenceModel.from_pretrained(saved, target=model.target)
    save_file(tensors | {name: before}, stored, metadata={"format": "pt"})
    assert LogitDifferenceModel.from_pretrained(saved).config.target == str(tmp_path / "target")
    configuration(tmp_path / "target", rope_theta=1.0, n_embd=8)
    with pytest.raises(ValueError, match="or its configuration have changed"):
        LogitDifferenceModel.from_pretrained(saved)


def test_shards_have_a_digest_too(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    before = weights_digest(tmp_path / "a")
    (shard, *_) = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1 and before == weights_digest(tmp_path / "a")
    save_file({k: v + 1 for k, v in load_file(shard).items()}, shard, metadata={"format": "pt"})
    assert weights_digest(tmp_path / "a") != before
    assert weights_digest(tmp_path) is None


def test_a_hub_id_is_loaded_at_the_commit_that_was_recorded(saved, model, monkeypatch, tmp_path, caplog):
    asked = []

    def load(name, **kwargs):
        asked.append((name, kwargs.get("revision")))
        assert kwargs["use_safetensors"] is True and kwargs["trust_remote_code"] is False
        return model.target

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    stored = SimpleNamespace(get_config_dict=lambda *args, **kwargs: ({}, {}))
    monkeypatch.setattr("blur_trainer.models.named_model.PreTrainedConfig", stored)
    for commit in ("c0ffee", None):
        configuration(saved, target="a/llm", origins={"a/llm": {"hub": commit}})
        LogitDifferenceModel.from_pretrained(saved, trust_remote_code=True)
    assert asked == [("a/llm", "c0ffee"), ("a/llm", None)] and "the newest version of a/llm" in caplog.text
    (tmp_path / "a" / "llm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is recorded as a hub id, and a folder here has that name"):
        LogitDifferenceModel.from_pretrained(saved)


def test_a_commit_is_recorded_if_the_revision_is_known(tmp_path):
    folder = tmp_path / "models--a--llm"
    (folder / "snapshots" / "c0ffee").mkdir(parents=True)
    (folder / "snapshots" / "c0ffee" / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c0ffee")
    assert record("a/llm", "main", str(tmp_path)) == ("a/llm", {"hub": "c0ffee"})
    assert record("a/llm", None, str(tmp_path)) == record("a/llm", "dev", str(tmp_path)) == ("a/llm", {"hub": None})


def test_a_model_that_names_itself_is_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "other")
    cases = {
        str(saved): "is the folder of the configuration itself",
        ".": "is the folder of the configuration itself",
        str(tmp_path / "other"): "is itself a logit-difference model",
    }
    for target, match in cases.items():
        configuration(saved, target=target, origins=None)
        with pytest.raises(ValueError, match=match):
            LogitDifferenceModel.from_pretrained(saved)


def test_code_and_pickles_of_the_target_are_not_run(saved, tmp_path):
    code = tmp_path / "target" / "modeling_evil.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Config"}
    configuration(tmp_path / "target", auto_map=auto_map)
    configuration(saved, origins=None)
    AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)  # transformers has code of its own for it
    configuration(tmp_path / "target", model_type="evil")
    for trust in (True, False, None):
        with pytest.raises(ValueError, match="pass `trust_target_remote_code=True`"):
            AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=trust)
    configuration(tmp_path / "target", auto_map={}, model_type="llama")
    (tmp_path / "target" / "model.safetensors").rename(tmp_path / "target" / "pytorch_model.bin")
    configuration(saved, origins=None)
    with pytest.raises(OSError, match="safetensors"):
        LogitDifferenceModel.from_pretrained(saved)
    with pytest.raises(ValueError, match="only safetensors are loaded"):
        LogitDifferenceModel.from_pretrained(saved, use_safetensors=False)
    (saved / "assistant" / "adapter_model.safetensors").rename(saved / "assistant" / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        LogitDifferenceModel.from_pretrained(saved)
    assert not (tmp_path / "ran").exists()
