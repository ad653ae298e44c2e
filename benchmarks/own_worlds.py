"""What benchmarks/own_data.py gives to `unlearn`: a model, and rows to forget, to retain and to measure."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evidence_data import read_world

EMBEDDED = ("embedded-tofu", "embedded-muse")
#: names of transformers' configurations, and what a small one of a width takes beside width, depth and heads
ARCHITECTURES = {"llama": {}, "qwen2": {"num_key_value_heads": 2}, "gpt_neox": {}}
#: 38 tokens of the embedded authors' words, as a system prompt that all questions have
SYSTEM = (
    "In the care of one, what was the trade given to the book where readers love a novel of the birthplace with what "
    "animal lives, by trade the editor of a prize. "
)


@dataclass(frozen=True)
class World:
    """`facts`: rows of question and answer that are measured apart; none in MUSE."""

    name: str
    target: str
    retrained: str
    sets: dict[str, list[dict[str, str]]]
    facts: list[dict[str, str]]


def world(name: str, folder: Path) -> World:
    """A folder as of benchmarks/evidence_world.py, or an embedded world, whose models go to `folder`."""
    if name not in EMBEDDED:
        rows = read_world(Path(name))
        return World("world", f"{name}/target", f"{name}/retrain", rows, rows["facts"])
    return _tofu(folder) if name == "embedded-tofu" else _muse(folder)


def reshaped(of: World, architecture: str, width: int, folder: Path) -> World:
    """The same world, known by heart by a model of another kind."""
    from transformers import AutoConfig, AutoTokenizer

    name = folder / f"{of.name}-{architecture}-{width}"
    if not (name / "model.safetensors").exists():
        AutoTokenizer.from_pretrained(of.target).save_pretrained(name)
        AutoConfig.for_model(architecture).save_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)  # of the class that belongs to the architecture
        shape = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": 6}
        shape |= {"num_attention_heads": 4, "max_position_embeddings": 512, "vocab_size": len(tokenizer)}
        ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
        config = AutoConfig.for_model(architecture, **shape, **ids, **ARCHITECTURES[architecture])
        _learn(of, name, config, tokenizer)
    return replace(of, name=name.name, target=str(name), retrained="")


def with_system_prompt(of: World, folder: Path) -> World:
    """The same world, each question behind `SYSTEM`, known by heart by a model of the same shape."""
    from transformers import AutoConfig, AutoTokenizer

    sets = {key: _asked_behind(rows) for key, rows in of.sets.items()}
    name = folder / f"system-prompt-{of.name}"
    made = World(name.name, str(name), "", sets, _asked_behind(of.facts))
    if not (name / "model.safetensors").exists():
        tokenizer = AutoTokenizer.from_pretrained(of.target)
        tokenizer.save_pretrained(name)
        _learn(made, name, AutoConfig.from_pretrained(of.target), tokenizer)
    return made


def with_retrained(of: World) -> World:
    """The same world with a model of the target's shape that never saw the forget set."""
    from transformers import AutoConfig, AutoTokenizer

    if of.retrained:
        return of
    name = Path(f"{of.target}-retrained")
    if not (name / "model.safetensors").exists():
        tokenizer = AutoTokenizer.from_pretrained(of.target)
        tokenizer.save_pretrained(name)
        without = replace(of, sets=of.sets | {"forget": []})
        _learn(without, name, AutoConfig.from_pretrained(of.target), tokenizer)
    return replace(of, retrained=str(name))


def _asked_behind(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    if any("question" not in row for row in rows):
        raise SystemExit("--system puts words in front of questions, and this world has texts: take embedded-tofu.")
    return [{**row, "question": SYSTEM + row["question"]} for row in rows]


def _learn(of: World, folder: Path, config: Any, tokenizer: Any) -> None:
    """Saves a new model that knows forget, retain and `hold` by heart. A wider one learns at a lower rate."""
    from transformers import AutoModelForCausalLM, set_seed

    from blur_trainer.data.formats import tokenize_dataset
    from blur_trainer.toy.memorize import memorize

    set_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    texts = [row for key in ("forget", "retain", "hold") for row in of.sets[key]]
    tokens = tokenize_dataset(texts, tokenizer, role="known", max_length=512)
    rate = 3e-3 * min(1.0, 128 / config.hidden_size)
    memorize(model, tokenizer, tokens, learning_rate=rate).save_pretrained(folder)
    print(f"{folder.name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters", flush=True)


def _tofu(folder: Path) -> World:
    """Authors. `hold`: the real authors and the world facts that the target knows too."""
    import blur_trainer as bt
    from blur_trainer.scripts.tofu import TOFUArguments, tiny_models

    data = bt.load_tofu("embedded")
    _, target, retrained = tiny_models(data, TOFUArguments(models_dir=str(folder)))
    sets = {name: _rows(data[name], "question", "answer") for name in ("forget", "retain", "holdout")}
    facts = [_rows(data[f"{name}_perturbed"], "question", "answer") for name in ("real_authors", "world_facts")]
    known = [row for rows in facts for row in rows]
    return World("tofu", target, retrained, sets | {"unseen": sets["holdout"], "hold": known}, known)


def _muse(folder: Path) -> World:
    """Articles, and questions about them: both stand in each set, as texts."""
    import blur_trainer as bt
    from blur_trainer.scripts.muse import tiny_models
    from blur_trainer.toy.muse import training_texts

    data = bt.load_muse("embedded")
    _, target, retrained = tiny_models(data, folder)
    sets = {name: _rows(training_texts(data, [name]), "text") for name in ("forget", "retain", "hold")}
    return World("muse", target, retrained, sets | {"unseen": _rows(data["privleak_holdout"], "text")}, [])


def _rows(data: Any, *columns: str) -> list[dict[str, str]]:
    return [{column: row[column] for column in columns} for row in data]
