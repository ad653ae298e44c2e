"""RMU on an answer's own words: where it steers, how its vector is learned, and what a trainer makes of both."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from support.models import VOCAB, collate, tiny_llama
from support.runs import distance, settings, weights

from blur_trainer.constants import KINDS
from blur_trainer.data.collators import UnlearningCollator
from blur_trainer.models.early_exit import activations
from blur_trainer.models.patched import patched
from blur_trainer.objectives.activations import ActivationMatch
from blur_trainer.objectives.learned_vectors import STARTS, Words, _descended, learned_vectors
from blur_trainer.objectives.rmu import RMU
from blur_trainer.trainers.blur import BLURTrainer
from blur_trainer.trainers.learned_vectors import VECTORS_NAME

LAYER, WIDTH = 1, 16
FIXED = {"lr_scheduler_type": "constant", "learning_rate": 1e-2, "train_sampling_strategy": "sequential"}


def row(*ids, prompt=2):
    return {"input_ids": list(ids), "labels": [-100] * prompt + list(ids[prompt:])}


#: `5 6 7` stand in all rows, one other token in each; in the retain rows others than in the forget rows
FORGET = [row(3, 5, 6, 10 + i, 7) for i in range(8)]
RETAIN = [row(3, 5, 6, 20 + i, 7) for i in range(8)]


#: own words of two kinds, and what may be said instead of each
OWN = [[0, 0, 0, 1, 0]] * 4 + [[0, 0, 0, 2, 0]] * 4
INSTEAD = [range(20, 24), range(24, 28)]


def model(seed=0):
    return tiny_llama(seed, layers=3)


def batch(rows, own):
    return collate(rows) | {"own_words": torch.tensor(own)}


def words(begins=range(10, VOCAB)):
    """Of these tokens, which begin a word, `INSTEAD` may be said instead; of the others none."""
    beginning, instead = torch.zeros(VOCAB, dtype=torch.bool), torch.zeros(KINDS, 2, VOCAB, dtype=torch.bool)
    beginning[list(begins)] = True
    for kind, tokens in enumerate(INSTEAD):
        instead[kind, 1, list(tokens)] = True
    return Words(beginning, instead)


def trainer(folder, forget=FORGET, retain=RETAIN, trained=None, objective=None, **config):
    args = settings(folder, **{"max_steps": 4, **FIXED, **config})
    forget_objective = objective or RMU(LAYER, own_words=0.2)
    held = ActivationMatch(LAYER)
    return BLURTrainer(
        trained or model(), args, forget, retain, forget_objective=forget_objective, retain_objective=held
    )


def literal_loss(asked, vectors, rows, own):
    """Row by row and token by token, the layers above run on the replaced activations of one row."""
    lost, instead, rest = [], [], []
    for one, marks in zip(rows, own, strict=True):
        at = torch.tensor([[*marks[1:], 0]])
        kind = max(marks) - 1
        inputs = {"input_ids": torch.tensor([one["input_ids"]]), "attention_mask": torch.ones(1, len(marks))}

        def put(module, given, output, at=at, kind=kind):
            return torch.where(at.bool()[..., None], vectors[kind], output)

        handle = asked.model.layers[LAYER].register_forward_hook(put)
        logps = asked(**inputs).logits[0].log_softmax(-1)
        handle.remove()
        for place, label in enumerate(one["labels"][1:]):
            if label == -100:
                continue
            loss = -logps[place, label]
            if not marks[place + 1]:
                rest.append(loss)
                continue
            lost.append(loss.clamp(max=2 * math.log(VOCAB)))
            others = [logps[place, word].exp() for word in INSTEAD[kind] if word != label]
            instead.append(sum(others).log())
    mean = lambda values: torch.stack(values).mean()  # noqa: E731
    return -mean(lost) - mean(instead) + mean(rest)


# ---- where it steers ----


def test_the_places_are_steered_from_which_own_words_are_said():
    made, trained = batch(FORGET[:2], [[0, 0, 0, 1, 0], [0, 0, 1, 3, 0]]), model()
    objective, vectors = RMU(LAYER, own_words=0.2), torch.randn(1, KINDS, WIDTH)
    objective.restore(vectors)
    hidden = activations(trained, made, LAYER)
    want = [((hidden[b, t] - vectors[0, kind]) ** 2).mean() for b, t, kind in ((0, 2, 0), (1, 1, 0), (1, 2, 2))]
    torch.testing.assert_close(objective(trained, made), torch.stack(want).mean())
    assert objective.num_items(made) == 3
    shared = RMU(LAYER, own_words=0.2, skip_shared_start=True)
    assert shared.items({**made, "shared_start": torch.tensor([0, 2])}).tolist() == [1, 1]
    twice = RMU(LAYER, own_words=0.2, coefficient=2.0)
    twice.restore(vectors)
    torch.testing.assert_close(twice.target(WIDTH, made, None)[1, 2], 2 * vectors[0, 2])


def test_rows_without_a_place_to_steer_cost_nothing(tmp_path):
    """Such as those that a retain row equals up to the own word: there it has the same activation."""
    objective = RMU(LAYER, own_words=0.2, skip_shared_start=True)
    batches = {"per_device_train_batch_size": 1, "max_steps": 4, "logging_steps": 1}
    forget = [*FORGET[:2], row(4, 9, 6, 30, 7), row(4, 9, 6, 31, 7)]
    started = trainer(tmp_path, forget, objective=objective, **batches)
    assert [started.train_dataset.forget[place]["shared_start"] for place in range(4)] == [3, 3, 0, 0]
    started.train()
    losses = [log["loss/forget"] for log in started.state.log_history if "loss/forget" in log]
    assert losses[:2] == [0, 0] and min(losses[2:]) > 0.01 and len(losses) == 4


def test_what_it_needs():
    with pytest.raises(ValueError, match="so `own_words` has no effect"):
        RMU(LAYER, masked=False, own_words=0.2)
    with pytest.raises(ValueError, match="a trainer makes it from the sets"):
        RMU(LAYER, own_words=0.2).mask(collate(FORGET))
    with pytest.raises(ValueError, match="a trainer learns them"):
        RMU(LAYER, own_words=0.2).vectors(WIDTH)
    with pytest.raises(ValueError, match=r"of shape \(1, 16, hidden size\)"):
        RMU(LAYER, own_words=0.2).restore(torch.zeros(1, WIDTH))
    with pytest.raises(TypeError, match="`own_words` must be a number or None, got True"):
        RMU(LAYER, own_words=True)


# ---- its vectors ----


def test_the_learned_vector_descends_the_literal_loss():
    asked, objective = model(), RMU(LAYER, own_words=0.2)
    before, made = weights(asked), batch(FORGET, OWN)
    found = learned_vectors(asked, [made], objective, words())
    length = activations(asked, made, LAYER)[:, 2].norm(dim=-1).mean().item()
    assert found.norm(dim=-1).tolist() == pytest.approx([length] * KINDS, rel=1e-4)
    assert not torch.allclose(found[0], found[1], atol=0.1), "each kind has its own"
    assert distance(before, weights(asked)) == 0 and asked.training == model().training
    assert all(weight.grad is None and weight.requires_grad for weight in asked.parameters())

    first = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)).expand(KINDS, -1)
    loss = lambda vectors: literal_loss(asked, vectors, FORGET, OWN).item()  # noqa: E731
    assert loss(found) < loss(length * F.normalize(first, dim=-1)) - 1
    nearby = [length * F.normalize(found + 0.3 * torch.randn(KINDS, WIDTH), dim=-1) for _ in range(10)]
    assert loss(found) < min(map(loss, nearby)), "a minimum of the literal loss"
    assert learned_vectors(asked, [made], objective, words(), length=2.0)[0].norm().item() == pytest.approx(2, rel=1e-4)


def test_of_several_starts_the_one_is_taken_after_whose_words_answers_go_on_best():
    asked, objective = model(), RMU(LAYER, own_words=0.2, seed=3)
    made, generator = batch(FORGET, OWN), torch.Generator().manual_seed(3)
    length, tried = activations(asked, made, LAYER)[:, 2].norm(dim=-1).mean().item(), {}
    for _ in range(STARTS):
        start = torch.randn(WIDTH, generator=generator).repeat(KINDS, 1)
        vectors = _descended(asked, [made], objective, words(), start, length)
        places = objective.mask(made).nonzero(as_tuple=True)
        states = vectors[[0] * 4 + [1] * 4]
        with patched(asked.model.layers[LAYER], places, states), torch.no_grad():
            spoken_words = (
                asked(**{name: made[name] for name in ("input_ids", "attention_mask")}).logits[:, 2].argmax(-1)
            )
        spoken = [
            each | {"input_ids": [*each["input_ids"][:3], int(word), 7]}
            for each, word in zip(FORGET, spoken_words, strict=True)
        ]
        tried[literal_loss(asked, vectors, spoken, OWN).item()] = vectors
    torch.testing.assert_close(learned_vectors(asked, [made], objective, words()), tried[min(tried)])
    assert max(tried) > min(tried) + 0.01, "starts that end alike would prove nothing"


def test_no_own_word_outside_of_the_start():
    made = batch(FORGET, OWN) | {"shared_start": torch.full((8,), 4)}
    objective = RMU(LAYER, own_words=0.2, skip_shared_start=True)
    with pytest.raises(ValueError, match="no token of the forget set is its own"):
        learned_vectors(model(), [made], objective, words())


def test_what_is_said_instead_is_another_token():
    other = words().other_than(torch.tensor([10, 21, 21, 3]), torch.tensor([0, 0, 1, 0]))
    found = [row.nonzero().flatten().tolist() for row in other[:3]]
    assert found == [[20, 21, 22, 23], [20, 22, 23], [24, 25, 26, 27]]
    assert other[3].all(), "nothing else may be said instead of 3"


# ---- in a trainer ----


@pytest.mark.parametrize("level", [None, 20.0])
def test_a_trainer_finds_the_words_and_learns_the_vector(level, tmp_path):
    started = trainer(tmp_path, forget_level=level)
    item = started.train_dataset[0]["forget"]
    assert item["own_words"] == [0, 0, 0, 1, 0]
    kept = json.loads((tmp_path / VECTORS_NAME).read_text())["learned_vectors"]
    rmu = getattr(started.objectives["forget"], "objective", started.objectives["forget"])
    torch.testing.assert_close(rmu.vectors(WIDTH), torch.tensor(kept))
    made = UnlearningCollator(0)([started.train_dataset[place]["forget"] for place in range(8)])
    length = activations(model(), made, LAYER)[:, 2].norm(dim=-1).mean()
    torch.testing.assert_close(rmu.vectors(WIDTH)[0, 0].norm(), length, rtol=1e-4, atol=0)
    started.train()


def test_a_resumed_training_goes_on_towards_the_same_vector(tmp_path, monkeypatch):
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    (tmp_path / "part").mkdir()
    for name in ("checkpoint-2", VECTORS_NAME):
        (tmp_path / "whole" / name).rename(tmp_path / "part" / name)
    monkeypatch.delattr("blur_trainer.trainers.learned_vectors.learned_vectors")  # nothing is learned again
    resumed = trainer(tmp_path / "part", save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert distance(weights(whole.model), weights(resumed.model)) < 1e-6


def test_a_second_training_goes_on_with_the_vector_or_refuses(tmp_path):
    args = settings(tmp_path / "a", max_steps=1, **FIXED, forget_objective="rmu", retain_objective="activation_match")
    args.forget_objective_kwargs, args.retain_objective_kwargs = {"layer": 1, "own_words": 0.2}, {"layer": 1}
    started = BLURTrainer(model_init=lambda: model(), args=args, forget_dataset=FORGET, retain_dataset=RETAIN)
    learned = started.objectives["forget"].restored
    started.args.gamma = 0.7
    started.train()
    assert started.rule.gamma == 0.7 and torch.equal(started.objectives["forget"].restored, learned)
    started.args.forget_objective_kwargs = {"layer": 0, "own_words": 0.2}
    started.args.output_dir = str(tmp_path / "b")
    with pytest.raises(ValueError, match="make a new trainer"):
        started.train()


def test_vectors_that_the_objective_has_are_kept(tmp_path, caplog):
    given = RMU(LAYER, own_words=0.2)
    given.restore(torch.ones(1, KINDS, WIDTH))
    trainer(tmp_path, objective=given)
    assert torch.equal(given.vectors(WIDTH), torch.ones(1, KINDS, WIDTH)) and not (tmp_path / VECTORS_NAME).exists()
    assert "none is learned" in caplog.text


def test_each_topic_has_a_vector_of_its_own(tmp_path):
    other = [row(3, 5, 6, 30 + i, 7) for i in range(4)]
    started = trainer(tmp_path, {"a": FORGET, "b": other}, {"a": RETAIN, "b": RETAIN})
    vectors = started.objectives["forget"].vectors(WIDTH)
    assert vectors.shape == (2, KINDS, WIDTH) and not torch.allclose(*vectors)
    started.train()
    given = {"a": {"coefficient": 2.0}, "b": {"coefficient": 3.0}}
    started = trainer(tmp_path / "given", {"a": FORGET, "b": other}, {"a": RETAIN, "b": RETAIN}, topics=given)
    made = {**batch(FORGET[:2], OWN[:2]), "topic": torch.tensor([0, 1])}
    table = started.objectives["forget"].target(WIDTH, made, None)
    assert table[:, 2].norm(dim=-1).tolist() == pytest.approx([2, 3], rel=1e-4)
    with pytest.raises(ValueError, match="give one for each of"):
        trainer(tmp_path / "one", {"a": FORGET, "b": other}, RETAIN, topics={"a": {"coefficient": 2.0}})


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(TypeError, match="`own_words` compares each example with the whole retain set"):
        trainer(tmp_path, retain=Dataset.from_list(RETAIN).to_iterable_dataset())
