"""A small audit: its budget, and models that know the sets of one's own data and that never saw them."""

from dataclasses import replace

from support.own_data import TEMPLATE, own_sets

import blur_trainer as bt
from blur_trainer.pipeline.audit_budget import BUDGETS
from blur_trainer.toy.memorize import memorize
from blur_trainer.toy.model import tiny_llama, train_tokenizer

TINY = replace(
    BUDGETS["minutes"], rows=8, samples=4, k=2, new_tokens=8, steps=2, rates=(1e-3,), shots=1, probe_epochs=2,
    probe_layers=2, probe_rows=16, beams=2,
)  # fmt: skip
MODELS = (("target", 0, ("forget", "retain")), ("retrained", 0, ("retain",)), ("again", 1, ("retain",)))


def write_models(folder, names=("target", "retrained", "again")):
    """The target knows all, the two others never saw `forget`. Returns the sets."""
    sets = own_sets()
    tokenizer = train_tokenizer([TEMPLATE.format(**row) for rows in sets.values() for row in rows], vocab_size=500)
    for name, seed, roles in [model for model in MODELS if model[0] in names]:
        known = [row for role in roles for row in sets[role]]
        rows = bt.tokenize_dataset(known, tokenizer, role="known", max_length=64)
        model = tiny_llama(tokenizer, hidden_size=48, num_layers=2, max_position_embeddings=128, seed=seed)
        epochs = 20 if name == "target" else 12
        memorize(model, tokenizer, rows, num_train_epochs=epochs, learning_rate=1e-2, seed=seed, disable_tqdm=True)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return sets
