"""What benchmarks/own_data.py gives to `unlearn`: a model, and rows to forget, to retain and to measure."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence_data import read_world

EMBEDDED = ("embedded-tofu", "embedded-muse")
#: names of transformers' configurations, and what a small one of a width takes beside width, depth and heads
ARCHITECTURES = {"llama": {}, "qwen2": {"num_key_value_heads": 2}, "gpt_neox": {}}


@dataclass(frozen=True)
class World:
    """`facts`: rows of question and answer that are measured apart; none in MUSE."""

    target: str
    retrained: str
    sets: dict[str, list[dict[str, str]]]
    facts: list[dict[str, str]]


def world(name: str, folder: Path) -> World:
    """A folder as of benchmarks/evidence_world.py, or an embedded world, whose models go to `folder`."""
    if name not in EMBEDDED:
        rows = read_world(Path(name))
        return World(f"{name}/target", f"{name}/retrain", rows, rows["facts"])
    return _tofu(folder) if name == "embedded-tofu" else _muse(folder)


def reshaped(of: World, architecture: str, width: int, folder: Path) -> World:
    """The same world, known by heart by a model of another kind."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

    from blur_trainer.data.formats import tokenize_dataset
    from blur_trainer.toy.memorize import memorize

    name = folder / f"{architecture}-{width}"
    if not (name / "model.safetensors").exists():
        AutoTokenizer.from_pretrained(of.target).save_pretrained(name)
        AutoConfig.for_model(architecture).save_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)  # of the class that belongs to the architecture
        shape = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": 6}
        shape |= {"num_attention_heads": 4, "max_position_embeddings": 512, "vocab_size": len(tokenizer)}
        ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
        config = AutoConfig.for_model(architecture, **shape, **ids, **ARCHITECTURES[architecture])
        set_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
        texts = [row for key in ("forget", "retain", "hold") for row in of.sets[key]]
        tokens = tokenize_dataset(texts, tokenizer, role="known", max_length=512)
        rate = 3e-3 * min(1.0, 128 / width)
        memorize(model, tokenizer, tokens, learning_rate=rate).save_pretrained(name)
        print(f"{name.name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters", flush=True)
    return World(str(name), of.retrained, of.sets, of.facts)


def _tofu(folder: Path) -> World:
    """Authors. `hold`: the real authors and the world facts that the target knows too."""
    import blur_trainer as bt
    from blur_trainer.scripts.tofu import TOFUArguments, tiny_models

    data = bt.load_tofu("embedded")
    _, target, retrained = tiny_models(data, TOFUArguments(models_dir=str(folder)))
    sets = {name: _rows(data[name], "question", "answer") for name in ("forget", "retain", "holdout")}
    facts = [_rows(data[f"{name}_perturbed"], "question", "answer") for name in ("real_authors", "world_facts")]
    known = [row for rows in facts for row in rows]
    return World(target, retrained, sets | {"unseen": sets["holdout"], "hold": known}, known)


def _muse(folder: Path) -> World:
    """Articles, and questions about them: both stand in each set, as texts."""
    import blur_trainer as bt
    from blur_trainer.scripts.muse import tiny_models
    from blur_trainer.toy.muse import training_texts

    data = bt.load_muse("embedded")
    _, target, retrained = tiny_models(data, folder)
    sets = {name: _rows(training_texts(data, [name]), "text") for name in ("forget", "retain", "hold")}
    return World(target, retrained, sets | {"unseen": _rows(data["privleak_holdout"], "text")}, [])


def _rows(data: Any, *columns: str) -> list[dict[str, str]]:
    return [{column: row[column] for column in columns} for row in data]
