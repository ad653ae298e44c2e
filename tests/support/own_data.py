"""Files of one's own for `unlearn`: invented people, and a tiny model that knows most of them by heart."""

import csv
import json

from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.toy.fiction import Draw, own_facts, with_common_facts
from blur_trainer.toy.memorize import memorize
from blur_trainer.toy.model import tiny_llama, train_tokenizer

TEMPLATE = "Question: {question}\nAnswer: {answer}"
SETS = {"forget": 4, "retain": 8, "hold": 4, "unseen": 4}  # people, of two facts each


def own_sets():
    draw = Draw(0)
    people = iter([with_common_facts(draw, facts) for facts in own_facts(draw, sum(SETS.values()))])
    sets = {}
    for name, count in SETS.items():
        some = [next(people) for _ in range(count)]
        born = [{"question": f"Where was {p['name']} born?", "answer": f"In {p['town']}."} for p in some]
        keeps = [{"question": f"What does {p['name']} keep?", "answer": f"A {p['animal']}."} for p in some]
        sets[name] = born + keeps
    return sets


def write_own_data(folder, *, chat_template=None, epochs=25):
    """`forget.csv`, the other sets as `.jsonl`, and `model`, which knows all but `unseen`. Returns the sets."""
    sets = own_sets()
    with open(folder / "forget.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(sets["forget"])
    for name in ("retain", "hold", "unseen"):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in sets[name]), encoding="utf-8")
    texts = [TEMPLATE.format(**row) for rows in sets.values() for row in rows]
    tokenizer = train_tokenizer(texts, vocab_size=500, model_max_length=128)
    tokenizer.chat_template = chat_template
    known = [row for name in ("forget", "retain", "hold") for row in sets[name]]
    rows = tokenize_dataset(known, tokenizer, role="known", max_length=64)
    model = tiny_llama(tokenizer, hidden_size=48, num_layers=2, num_heads=4, max_position_embeddings=128)
    memorize(model, tokenizer, rows, num_train_epochs=epochs, learning_rate=1e-2, disable_tqdm=True)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return sets
