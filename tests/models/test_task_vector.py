"""Task vectors: the arithmetic against whole models, adapters against PEFT's merge, every folder that does not fit."""

import json
import math
import os
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.models import VOCAB, tiny_llama
from support.tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from blur_trainer.models import task_vector as module
from blur_trainer.models.checkpoint_tensors import CheckpointTensors
from blur_trainer.models.task_vector import task_vector

SHARD = {"sharded": "4KB", "whole": "1GB"}


def moved(model, seed: int = 1, size: float = 0.05):
    """The same architecture, some training later."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def save(model, folder, shards: str = "whole", tokenizer: bool = False) -> str:
    model.save_pretrained(folder, max_shard_size=SHARD[shards])
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def loaded(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def literal(target, finetuned, scale: float) -> dict[str, torch.Tensor]:
    theirs = finetuned.state_dict()
    return {
        name: (w.double() - scale * (theirs[name].double() - w.double())).to(w.dtype)
        for name, w in target.state_dict().items()
    }


@pytest.mark.parametrize("scale", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("target_shards", SHARD)
@pytest.mark.parametrize("finetuned_shards", SHARD)
def test_the_arithmetic(scale, target_shards, finetuned_shards, tmp_path):
    target, finetuned = tiny_llama(), moved(tiny_llama())
    folders = save(target, tmp_path / "t", target_shards), save(finetuned, tmp_path / "f", finetuned_shards)
    out = task_vector(*folders, tmp_path / "new" / "out", scale=scale)
    assert out == str(tmp_path / "new" / "out")
    expected = literal(target, finetuned, scale)
    for name, value in loaded(out).items():
        torch.testing.assert_close(value, expected[name])
    assert sorted(os.listdir(out)) == sorted(os.listdir(folders[0]))  # the same shards
    assert os.listdir(tmp_path / "new") == ["out"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_once_and_to_the_targets_dtype(dtype, tmp_path):
    """A fine-tuned copy in float32 keeps updates that half precision would lose; the target's dtype stays."""
    target, finetuned = tiny_llama().to(dtype), moved(tiny_llama().to(dtype).float(), size=1e-3)
    out = task_vector(save(target, tmp_path / "t"), save(finetuned, tmp_path / "f"), tmp_path / "out", scale=0.3)
    expected, naive_is_exact = literal(target, finetuned, 0.3), []
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert value.dtype == dtype
        assert torch.equal(value, expected[name])
        weight = target.state_dict()[name]
        naive = weight - 0.3 * (finetuned.state_dict()[name].to(dtype) - weight)
        naive_is_exact.append(torch.equal(naive, expected[name]))
    assert not all(naive_is_exact)
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == dtype


def test_there_and_back(tmp_path):
    """`scale=-1` is the fine-tuned model."""
    target, finetuned = tiny_llama(), moved(tiny_llama())
    out = task_vector(save(target, tmp_path / "t"), save(finetuned, tmp_path / "f"), tmp_path / "out", scale=-1.0)
    for name, value in loaded(out).items():
        torch.testing.assert_close(value, finetuned.state_dict()[name])


def test_configuration_and_tokenizer_go_along(tmp_path):
    target = tiny_llama()
    target.generation_config.max_new_tokens = 7
    folder = save(target, tmp_path / "t", tokenizer=True)
    (tmp_path / "t" / "trainer_state.json").write_text("{}")
    out = task_vector(folder, save(moved(tiny_llama()), tmp_path / "f"), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tiny_tokenizer().get_vocab()
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.max_new_tokens == 7
    assert "trainer_state.json" not in os.listdir(out)


def test_tied_weights_stay_tied(tmp_path):
    target, finetuned = tiny_llama(tie=True), moved(tiny_llama(tie=True))
    out = task_vector(save(target, tmp_path / "t"), save(finetuned, tmp_path / "f"), tmp_path / "out")
    torch.testing.assert_close(loaded(out)["lm_head.weight"], literal(target, finetuned, 1.0)["lm_head.weight"])


def test_one_shard_in_memory(tmp_path, monkeypatch):
    target, finetuned = tiny_llama(), moved(tiny_llama())
    folders = save(target, tmp_path / "t", "sharded"), save(finetuned, tmp_path / "f")
    sizes, write = [], module.save_file
    monkeypatch.setattr(
        module, "save_file", lambda tensors, *a, **kw: sizes.append(len(tensors)) or write(tensors, *a, **kw)
    )
    task_vector(*folders, tmp_path / "out")
    assert len(sizes) > 3 and sum(sizes) == len(target.state_dict())


def test_a_hub_id(tmp_path):
    """Out of the hub's cache, as `snapshot_download` lays it out."""
    commit, repo = "0" * 40, tmp_path / "cache" / "models--org--target"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    target, finetuned = tiny_llama(), moved(tiny_llama())
    save(target, repo / "snapshots" / commit)
    hub = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    out = task_vector("org/target", save(finetuned, tmp_path / "f"), tmp_path / "out", **hub)
    torch.testing.assert_close(loaded(out), literal(target, finetuned, 1.0))
    for name in ("org/other", "not a name at all"):
        with pytest.raises(FileNotFoundError, match=f"'{name}' is no local folder, and no hub repository"):
            task_vector(name, tmp_path / "f", tmp_path / "out2", **hub)


# --- adapters ---------------------------------------------------------------------------------------------------------


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32))


ADAPTERS = {
    "plain": (tiny_llama, {"target_modules": "all-linear"}),
    "rank-stabilized": (tiny_llama, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "ranks by pattern": (
        tiny_llama,
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "k_proj"]}),
    "head, along with which PEFT saves both ends": (
        tiny_llama,
        {"target_modules": ["lm_head", "q_proj"], "save_embedding_layers": True},
    ),
    "transposed": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


def adapter(make, folder, save_embedding_layers=False, **kwargs) -> str:
    model = get_peft_model(make(), LoraConfig(**{"r": 4, "lora_alpha": 8, **kwargs}))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return str(folder)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_subtracted_as_it_is_merged(kind, tmp_path):
    make, kwargs = ADAPTERS[kind]
    folder = adapter(make, tmp_path / "lora", **kwargs)
    merged = PeftModel.from_pretrained(make(), folder).merge_and_unload()
    out = task_vector(save(make(), tmp_path / "t", "sharded"), folder, tmp_path / "out", scale=0.5)
    expected, found = literal(make(), merged, 0.5), loaded(out)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    changed = [name for name in found if not torch.equal(found[name], make().state_dict()[name])]
    assert 2 <= len(changed) < len(found)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
    ],
)
def test_more_than_a_lora_is_refused(extra, reason, tmp_path):
    folder = adapter(tiny_llama, tmp_path / "lora", target_modules=["q_proj"], **extra)
    with pytest.raises(ValueError, match=rf"{reason}.*is more than a LoRA: merge it"):
        task_vector(save(tiny_llama(), tmp_path / "t"), folder, tmp_path / "out")


def test_adapters_that_do_not_fit(tmp_path):
    target = save(tiny_llama(), tmp_path / "t")
    wide = adapter(lambda: tiny_llama(layers=3), tmp_path / "deep", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"is not of target "):
        task_vector(target, wide, tmp_path / "out")
    head = {"target_modules": ["lm_head"], "save_embedding_layers": True}
    another = adapter(lambda: tiny_llama(seed=5), tmp_path / "head", **head)
    with pytest.raises(ValueError, match=r"is not of target .*weight', which it brings along, is another one"):
        task_vector(target, another, tmp_path / "out")
    other = adapter(gpt2, tmp_path / "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(ValueError, match=r"is not of target "):
        task_vector(target, other, tmp_path / "out")
    with pytest.raises(ValueError, match=r"target .* is an adapter: merge it into its model first"):
        task_vector(wide, target, tmp_path / "out")
    (tmp_path / "deep" / "adapter_model.safetensors").rename(tmp_path / "deep" / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no adapter_model.safetensors"):
        task_vector(target, wide, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["deep", "gpt2", "head", "t"]


# --- what does not go -------------------------------------------------------------------------------------------------


def rewrite(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def to_bin(folder) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def quantize(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


def drop_shard(folder) -> None:
    shutil.rmtree(folder)
    save(tiny_llama(), folder, "sharded")
    next(folder.glob("model-00002-*")).unlink()


def lie_in_index(folder) -> None:
    shutil.rmtree(folder)
    save(tiny_llama(), folder, "sharded")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost"] = min(index["weight_map"].values())
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def other_words(folder) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))


BROKEN = {
    "a tensor less": (
        lambda f: rewrite(f, lambda t: t.pop("lm_head.weight")),
        r"1 tensors.*'lm_head.weight' in target",
    ),
    "a tensor more": (lambda f: rewrite(f, lambda t: t.update(x=torch.ones(1))), r"1 tensors.*'x' in finetuned"),
    "vocabulary": (
        lambda f: rewrite(f, lambda t: t.update({"lm_head.weight": torch.zeros(50, 16)})),
        r"'lm_head.weight' is \(48, 16\) in target and \(50, 16\) in finetuned.*vocabulary",
    ),
    "other words": (other_words, r"tokenizers with different vocabularies"),
    "no safetensors": (to_bin, r"no model.safetensors.*only pytorch_model.bin: load it and save it anew"),
    "nothing": (
        lambda f: (f / "model.safetensors").unlink(),
        r"no model.safetensors and no model.safetensors.index.json",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"it has no config.json"),
    "quantized": (quantize, r"are quantized"),
    "a shard less": (drop_shard, r"misses model-00002-.*which its index names"),
    "a wrong index": (lie_in_index, r"'ghost' is in the index but in no shard"),
    "no fine-tuning": (
        lambda f: shutil.copyfile(f.parent / "t" / "model.safetensors", f / "model.safetensors"),
        r"no task",
    ),
    "infinite": (
        lambda f: rewrite(f, lambda t: t["lm_head.weight"].fill_(math.inf)),
        r"'lm_head.weight' leaves the range of torch.float32",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_that_does_not_fit_is_refused(what, tmp_path):
    target = save(tiny_llama(), tmp_path / "t", tokenizer=True)
    finetuned = save(moved(tiny_llama()), tmp_path / "f", tokenizer=True)
    breaks, message = BROKEN[what]
    breaks(tmp_path / "f")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        task_vector(target, finetuned, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["f", "t"]  # nothing written, nothing left over


@pytest.mark.parametrize("scale", [math.nan, math.inf, 0.0])
def test_the_scale_is_checked(scale, tmp_path):
    with pytest.raises(ValueError, match=rf"scale={scale}"):
        task_vector("t", "f", tmp_path / "out", scale=scale)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match=r"exists: pass a folder that does not"):
        task_vector("t", "f", tmp_path / "out")


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    folders = save(tiny_llama(), tmp_path / "t", "sharded"), save(moved(tiny_llama()), tmp_path / "f")
    written, write = [], module.save_file

    def full(*args, **kwargs):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(write(*args, **kwargs))

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        task_vector(*folders, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["f", "t"]
    monkeypatch.undo()
    (tmp_path / ".out.partial").mkdir()  # of a killed call
    assert loaded(task_vector(*folders, tmp_path / "out"))
    assert CheckpointTensors(tmp_path / "out").shards == CheckpointTensors(tmp_path / "t").shards


@pytest.mark.parametrize("place", ["absolute", "outside", "deeper", "pickle", "empty", "hidden"])
def test_an_index_that_names_files_elsewhere_is_refused_and_nothing_is_written(place, tmp_path):
    target, other = save(tiny_llama(), tmp_path / "t", "sharded"), save(moved(tiny_llama()), tmp_path / "f")
    shards = sorted((tmp_path / "t").glob("*.safetensors"))
    (tmp_path / "t" / "in").mkdir()
    entries = {
        "absolute": str(tmp_path / "victim.safetensors"),
        "outside": "../victim.safetensors",
        "deeper": "in/victim.safetensors",
        "pickle": "victim.bin",
        "empty": "",
        "hidden": ".victim.safetensors",
    }
    victim = tmp_path / "t" / entries[place] if entries[place] else tmp_path / "victim"
    shutil.copy(shards[0], victim)
    before = victim.read_bytes()
    index = json.loads((tmp_path / "t" / "model.safetensors.index.json").read_text())
    for name, shard in index["weight_map"].items():
        index["weight_map"][name] = entries[place] if shard == shards[0].name else shard
    (tmp_path / "t" / "model.safetensors.index.json").write_text(json.dumps(index))
    for pair in ((target, other), (other, target)):  # read, and written
        with pytest.raises(ValueError, match=r"In '.*index.json': the file .* is no (plain file name|safetensors)"):
            task_vector(*pair, tmp_path / "new" / "out")
    assert victim.read_bytes() == before and not (tmp_path / "new").exists()
