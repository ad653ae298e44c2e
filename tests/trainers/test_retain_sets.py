"""Several retain sets by name: how they are joined, and what their weights do to the retain loss."""

import logging

import pytest
import torch
from datasets import Dataset
from support import reference
from support.cases import every
from support.models import collate, examples, tiny_llama
from support.runs import distance, settings, weights
from support.tiny_tokenizer import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from blur_trainer.data.collators import UnlearningCollator
from blur_trainer.gradients.rules import Sum
from blur_trainer.models.reference import FrozenModel
from blur_trainer.objectives.activations import ActivationMatch
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.distributions import JSD, KL
from blur_trainer.objectives.likelihood import NLL
from blur_trainer.trainers.blur import BLURConfig, BLURTrainer

FORGET, RETAIN, GENERAL = examples(6, seed=1), examples(5, seed=2), examples(4, seed=3)
SETS = {"retain": RETAIN, "general": GENERAL}


def made(folder, retain, forget=FORGET, **kwargs):
    given = {name: kwargs.pop(name) for name in ("retain_objective", "processing_class", "rule") if name in kwargs}
    of = kwargs.pop("of", None)
    return BLURTrainer(tiny_llama() if of is None else of, settings(folder, **kwargs), forget, retain, **given)


def rows_with(weight):
    rows = examples(4, seed=4)
    return [row | {"weight": each} for row, each in zip(rows, weight, strict=True)]


# ---- the loss ----


def test_the_nll_is_the_weighted_mean_of_all_tokens():
    model = tiny_llama().double()
    rows = rows_with([1.0, 0.25, 3.0, 1.0])
    batch = collate(rows) | {"weight": torch.tensor([row["weight"] for row in rows])}
    assert NLL()(model, batch).item() == pytest.approx(reference.token_mean_nll(model, rows).item(), rel=1e-6)
    bare = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    assert abs(NLL()(model, collate(bare)).item() - NLL()(model, batch).item()) > 1e-3


@pytest.mark.parametrize(
    "objective", [NLL(), KL(), JSD(), ActivationMatch(0), ActivationMatch(0, masked=False)], ids=str
)
def test_every_retain_objective_honours_weights_over_micro_batches(objective):
    """`sum_i w_i l_i / sum_i w_i n_i`, with the losses of examples one at a time, padded alike."""
    model, before = tiny_llama(1), FrozenModel.copy_of(tiny_llama(0))
    weight = [1.0, 0.25, 3.0, 1.0]
    whole = collate(rows_with(weight))
    alone = [{name: tensor[i : i + 1] for name, tensor in whole.items()} for i in range(4)]
    losses = [objective.losses(model, one, before).item() for one in alone]
    counts = [int(objective.num_items(one)) for one in alone]
    expected = sum(w * x for w, x in zip(weight, losses, strict=True)) / sum(
        w * n for w, n in zip(weight, counts, strict=True)
    )
    weighed = whole | {"weight": torch.tensor(weight)}
    assert objective(model, weighed, before).item() == pytest.approx(expected, rel=1e-5)
    parts = [{name: tensor[rows] for name, tensor in weighed.items()} for rows in (slice(0, 1), slice(1, 4))]
    total = sum(objective.num_items(part) for part in parts)
    summed = sum(objective(model, part, before, total).item() for part in parts)
    assert summed == pytest.approx(expected, rel=1e-5)
    assert total.item() == pytest.approx(sum(w * n for w, n in zip(weight, counts, strict=True)))


def test_the_collator_gives_weights():
    collator = UnlearningCollator(0)
    batch = collator(rows_with([1.0, 0.5, 1.0, 2.0]))
    assert batch["weight"].tolist() == [1.0, 0.5, 1.0, 2.0] and batch["weight"].dtype == torch.float32
    assert "weight" not in collator(examples(2))


# ---- a training ----


def test_without_weights_it_is_the_training_on_the_joined_rows_bit_for_bit(tmp_path):
    short = {"num_train_epochs": 1}
    joined = made(tmp_path / "joined", RETAIN + GENERAL, **short)
    named = made(tmp_path / "named", SETS, **short)
    assert named.train_dataset.retain.column_names == ["input_ids", "labels"]
    even = made(tmp_path / "even", SETS, retain_set_weights={"general": 1.0}, **short)
    light = made(tmp_path / "light", SETS, retain_set_weights='{"general": 0.1}', **short)
    for trainer in (joined, named, even, light):
        trainer.train()
    assert distance(weights(named.model), weights(joined.model)) == 0.0
    assert distance(weights(even.model), weights(joined.model)) < 1e-6
    assert distance(weights(light.model), weights(joined.model)) > 1e-3


def test_sets_of_different_formats(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    forget = [{"question": f"Who painted mural {i}?", "answer": f"Mara Velin, in {i} weeks"} for i in range(4)]
    sets = {
        "retain": [{"question": f"Who built harbour {i}?", "answer": f"Ostrava Bay, {i} times"} for i in range(3)],
        "general": [{"text": "The harbour of Ostrava Bay was rebuilt twice, once after the storm. " * 4}],
        "tokens": Dataset.from_list([{"input_ids": [5, 6, 7], "ref_logps": -1.0}]),
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes))
    options = {"of": model, "processing_class": tokenizer, "retain_set_weights": {"general": 0.5, "tokens": 2}}
    trainer = made(tmp_path, sets, forget, max_length=48, **options)
    retain = trainer.train_dataset.retain
    pieces = list(retain["weight"]).count(0.5)
    assert pieces > 1 and list(retain["weight"]) == [1.0] * 3 + [0.5] * pieces + [2.0]
    assert retain[-1] == {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "weight": 2.0}
    for name, count, weight in (("retain", 3, "1"), ("general", pieces, "0.5"), ("tokens", 1, "2")):
        assert f"The retain set '{name}' has {count} examples, weight {weight}." in caplog.text
    trainer.train()


class CountsByItself(NLL):
    def num_items(self, batch):
        return (batch["labels"][:, 1:] != -100).sum()


class CountsEach(NLL):
    def items(self, batch):
        return 2 * Objective.items(self, batch)


def test_what_does_not_go_together_is_said(tmp_path):
    stream = Dataset.from_list(GENERAL).to_iterable_dataset()
    splits = {"train": RETAIN, "test": GENERAL}

    def check(words, retain, error=ValueError, **kwargs):
        with pytest.raises(error, match=words):
            made(tmp_path / "run", retain, **kwargs)

    weigh = {"retain_set_weights": {"general": 2.0}}
    check(r"has weights of \['general'\], but the retain sets are \['retain'\]", RETAIN, **weigh)
    check(r"weights of \['books'\], .*\['retain', 'general'\]", SETS, retain_set_weights={"books": 1.0})
    check(r"The retain set 'general' is a stream", {"retain": RETAIN, "general": stream}, TypeError)
    check(r"splits \['test', 'train'\]: pick one of them", splits, TypeError)
    check(r"`retain \(general\)` dataset is empty", {"retain": RETAIN, "general": []})
    check(r"it override `items`", SETS, retain_objective=CountsByItself(), **weigh)
    made(tmp_path / "each", SETS, retain_objective=CountsEach(), **weigh)
    made(tmp_path / "bare", SETS, retain_objective=CountsByItself())
    check("there is no `retain_dataset`: pass one", None, rule=Sum(retain_weight=0.0), **weigh)

    def refused(words, given, error=ValueError):
        with pytest.raises(error, match=words):
            BLURConfig(str(tmp_path), retain_set_weights=given)

    cases = [
        (r"`retain_set_weights\['a'\]` must be a number above 0", {"a": 0}),
        (r"`retain_set_weights\['a'\]` must be a number, got 'x'", {"a": "x"}, TypeError),
        ("`retain_set_weights` must be a dict or a JSON object", "[1]"),
    ]
    every(cases, refused)


def test_topics_keep_their_meaning(tmp_path):
    forget = {"a": FORGET[:4], "b": FORGET[:4]}
    apart = made(tmp_path / "apart", {"a": RETAIN, "b": GENERAL}, forget, max_steps=2)
    assert {topic: len(rows) for topic, rows in apart.train_dataset.retain_by_topic.items()} == {"a": 5, "b": 4}
    weighed = made(tmp_path / "one", RETAIN, forget, max_steps=2, retain_set_weights={"retain": 2.0})
    assert weighed.train_dataset.retain_by_topic["b"]["weight"][0] == 2.0
    with pytest.raises(ValueError, match="`retain_dataset` has the topics"):
        made(tmp_path / "sets", SETS, forget, max_steps=2)
