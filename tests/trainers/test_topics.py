"""Topics in turns: which examples come when, the settings of each topic, and a shortage that is no silent stop."""

import datasets
import pytest
import torch
from support import reference
from support.models import examples, tiny_llama
from support.runs import distance, settings, weights

from blur_trainer.data.collators import UnlearningCollator
from blur_trainer.data.topics import TopicDataset
from blur_trainer.gradients.rules import BLUR, MGDA, Sum
from blur_trainer.objectives.activations import ActivationMatch
from blur_trainer.objectives.control_vectors import NAME, control_vector, load_vectors
from blur_trainer.objectives.preference import NPO
from blur_trainer.objectives.rmu import RMU
from blur_trainer.trainers.blur import BLURTrainer

LAYER = 1


def numbered(name, count):
    return [{"name": f"{name}{i}"} for i in range(count)]


def build(bio=6, cyber=6, block=2, retain=5, **kwargs):
    forget = {"bio": numbered("b", bio), "cyber": numbered("c", cyber)}
    return TopicDataset(forget, numbered("r", retain), block, **kwargs)


# ---- the order ----


def test_one_topic_per_step_in_turns():
    items = list(map(build(block=2).__getitem__, range(12)))
    assert [item["forget"]["topic"] for item in items] == [0, 0, 1, 1] * 3
    assert [item["retain"]["topic"] for item in items] == [0, 0, 1, 1] * 3
    seen = {topic: sorted(i["forget"]["name"] for i in items if i["forget"]["topic"] == topic) for topic in (0, 1)}
    assert seen == {0: [f"b{i}" for i in range(6)], 1: [f"c{i}" for i in range(6)]}


def test_an_item_depends_on_seed_epoch_and_position_alone():
    one, other = build(seed=3), build(seed=3)
    for epoch in (2, 0):
        one.set_epoch(epoch), other.set_epoch(epoch)
        backwards = [other[i] for i in reversed(range(12))][::-1]
        assert [one[i] for i in range(12)] == backwards
    assert [build(seed=4)[i] for i in range(12)] != backwards
    one.set_epoch(1)
    assert [one[i] for i in range(12)] != backwards


def test_every_row_is_used_equally_often_over_epochs():
    rows = build(bio=5, cyber=3, retain=7, block=2, repeat=True)
    counts = {}
    for epoch in range(5):
        rows.set_epoch(epoch)
        for item in map(rows.__getitem__, range(len(rows))):
            counts[item["forget"]["name"]] = counts.get(item["forget"]["name"], 0) + 1
    for letter, size in (("b", 5), ("c", 3)):
        of_topic = [counts.get(f"{letter}{i}", 0) for i in range(size)]
        assert sum(of_topic) == 30 and max(of_topic) - min(of_topic) <= 1


def test_each_topic_may_have_its_own_retain_set():
    forget = {"bio": numbered("b", 2), "cyber": numbered("c", 2)}
    rows = TopicDataset(forget, {"cyber": numbered("y", 2), "bio": numbered("x", 2)}, 1)
    assert {(rows[i]["forget"]["name"][0], rows[i]["retain"]["name"][0]) for i in range(4)} == {("b", "x"), ("c", "y")}
    with pytest.raises(ValueError, match=r"has the topics \['bio'\], `forget_dataset` \['bio', 'cyber'\]"):
        TopicDataset(forget, {"bio": numbered("x", 2)}, 1)


@pytest.mark.parametrize(
    ("sizes", "kwargs"), [((6, 4), {}), ((6, 6), {"steps": 7}), ((6, 5), {"steps": 6}), ((1, 9), {"steps": 1})]
)
def test_a_shortage_is_an_error(sizes, kwargs):
    bio, cyber = sizes
    with pytest.raises(ValueError, match=rf"too few examples \(bio {bio}, cyber {cyber}\).*`repeat_topics=True`"):
        build(bio, cyber, **kwargs)
    assert len(build(bio, cyber, repeat=True, **kwargs)) > 0


def test_the_error_says_how_many_steps_are_possible():
    with pytest.raises(ValueError, match=r"at most 4 here"):
        build(6, 5, steps=6)
    assert len(build(6, 5, steps=4)) == 8


def test_the_collator_carries_the_topic():
    row = {"input_ids": [1, 2], "labels": [1, 2]}
    forget = [{"forget": {**row, "topic": t}, "retain": {**row, "topic": t}} for t in (1, 0)]
    batch = UnlearningCollator(0)(forget)
    assert torch.equal(batch["forget"]["topic"], torch.tensor([1, 0])) and "topic" in batch["retain"]


# ---- in the trainer ----


def texts(count, seed):
    """Without prompts, of which nothing but the prompt could be left at `max_length`."""
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in examples(count, seed)]


DATA = {"bio": texts(8, 1), "cyber": texts(8, 2)}
RETAIN = examples(6, seed=3)
TOPICS = {"bio": {"coefficient": 2.0, "alpha": 50.0}, "cyber": {"coefficient": 4.0, "alpha": 200.0, "max_length": 6}}
FIXED = {"lr_scheduler_type": "constant", "learning_rate": 1e-2, "max_steps": 4, "train_layers": "0,1"}


def model():
    return tiny_llama(0, layers=3)


def start(folder, forget=DATA, retain=RETAIN, rule=None, objective=None, **config):
    objective = objective or RMU(LAYER)
    args = settings(folder, **{"topics": TOPICS, **FIXED, **config})
    objectives = {"forget_objective": objective, "retain_objective": ActivationMatch(LAYER)}
    return BLURTrainer(model(), args, forget, retain, rule=rule or BLUR(), **objectives)


def literal(data, steps, batch, blur=True):
    """Each step by the vector, coefficient and alpha of its topic; the data's order is the dataset's (tested above)."""
    want = model()
    for name, parameter in want.named_parameters():
        parameter.requires_grad_(name.startswith(("model.layers.0.", "model.layers.1.")))
    frozen, index = reference.as_frozen(want, LAYER), iter(range(len(data)))
    parameters = [p for p in want.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        topic = ("bio", "cyber")[step % 2]
        items = [data[next(index)] for _ in range(batch)]
        goal = reference.towards(control_vector(topic, 16, 0), TOPICS[topic]["coefficient"])
        losses = {
            "forget": reference.token_mean_distance(LAYER, goal),
            "retain": reference.token_mean_distance(LAYER, frozen),
        }
        flat = {
            role: torch.cat(
                [g.flatten() for g in reference.full_gradient(want, loss(want, [item[role] for item in items]))]
            ).double()
            for role, loss in losses.items()
        }
        alpha = TOPICS[topic]["alpha"]
        direction = flat["forget"] + alpha * flat["retain"]
        if blur:
            direction = reference.blur_direction(flat["forget"], flat["retain"], "forget", 1.0, alpha, False)
        direction = direction * min(1.0, 1.0 / (direction.norm() + 1e-6))
        for parameter, part in zip(parameters, direction.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).float()
        optimizer.step()
    return want


@pytest.mark.parametrize(("accumulation", "rule"), [(1, BLUR()), (2, BLUR()), (1, Sum())])
def test_every_step_is_of_its_topic(accumulation, rule, tmp_path):
    batch = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    got = start(tmp_path, rule=rule, **batch)
    assert got.objectives["forget"].topics == ("bio", "cyber")
    assert got.objectives["forget"].coefficients == [2.0, 4.0]
    lengths = {t: max(len(row["input_ids"]) for row in rows) for t, rows in got.train_dataset.forget_by_topic.items()}
    assert lengths["cyber"] == 6 < lengths["bio"]
    got.train()
    assert got.state.global_step == 4
    want = literal(got.train_dataset, 4, 4, blur=rule == BLUR())
    assert distance(weights(want), weights(model())) > 1e-2
    assert distance(weights(got.model), weights(want)) < 5e-6


def test_the_card_names_the_topics(tmp_path):
    trainer = start(tmp_path, max_steps=2)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| forget | bio, cyber | 16 |" in card and "| retain | not stated | 6 |" in card
    assert "| topics | " in card and "training 18 of 30 tensors" in card


def test_resume_continues_with_the_next_topic(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = start(tmp_path / "whole", **saving)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    resumed = start(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert distance(weights(whole.model), weights(resumed.model)) <= 1e-7
    saved = load_vectors(checkpoint, ["bio", "cyber"], 16)
    assert torch.equal(saved[1], control_vector("cyber", 16, 0)) and (checkpoint / NAME).is_file()
    swapped = start(tmp_path / "swapped", forget=dict(reversed(DATA.items())))
    with pytest.raises(ValueError, match=r"topics=\[bio, cyber\], .* and is .*topics=\[cyber, bio\]"):
        swapped.train(resume_from_checkpoint=str(checkpoint))


def test_other_objectives_take_topics_too(tmp_path):
    trainer = start(tmp_path, objective=NPO(), topics={"bio": {"alpha": 2.0}}, max_steps=2, train_layers=None)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"topics": {"chem": {"alpha": 1}}}, ValueError, r"settings of \['chem'\].*\['bio', 'cyber'\]"),
        ({"topics": {"bio": {"beta": 1}}}, ValueError, "accepted: alpha, coefficient, max_length"),
        ({"topics": {"bio": 3}}, ValueError, "must be a dict"),
        ({"topics": {"bio": {"alpha": "x"}}}, TypeError, "must be a number"),
        ({"rule": MGDA()}, ValueError, "an `alpha` for .* of the rules BLUR and Sum, not MGDA"),
        ({"objective": NPO()}, ValueError, "a `coefficient` for .* is RMU's"),
        ({"forget": examples(8)}, ValueError, "no topics: give a mapping"),
        ({"max_steps": 5}, ValueError, "too few examples .*`repeat_topics=True`"),
        ({"precompute_ref_logps": True, "objective": NPO(), "topics": None}, ValueError, "does not go with"),
        ({"train_sampling_strategy": "group_by_length"}, ValueError, "does not go with topics"),
        ({"retain": {"bio": RETAIN}}, ValueError, r"has the topics \['bio'\]"),
        (
            {"forget": {**DATA, "cyber": datasets.IterableDataset.from_generator(lambda: iter(DATA["bio"]))}},
            TypeError,
            "'cyber' is a stream",
        ),
    ],
)
def test_bad_input(kwargs, error, message, tmp_path):
    with pytest.raises(error, match=message):
        start(tmp_path, per_device_train_batch_size=4, **kwargs)


def test_short_topics_are_repeated_when_asked(tmp_path):
    trainer = start(tmp_path, per_device_train_batch_size=4, max_steps=6, repeat_topics=True)
    trainer.train()
    assert trainer.state.global_step == 6
