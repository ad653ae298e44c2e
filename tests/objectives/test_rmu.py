"""RMU and BLUR-RMU in the trainer: the literal training, vectors, the frozen copy, topics, and what is refused."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from support import reference
from support.models import collate, examples, tiny_llama
from support.runs import distance, settings, train, weights

from blur_trainer.data.pairing import PairedDataset
from blur_trainer.gradients.rules import BLUR, Sum
from blur_trainer.models.reference import FrozenModel, OtherAdapter
from blur_trainer.models.truncation import frozen_lower
from blur_trainer.objectives.activations import ActivationMatch
from blur_trainer.objectives.control_vectors import NAME, control_vector, load_vectors, save_vectors
from blur_trainer.objectives.likelihood import NLL, GradAscent
from blur_trainer.objectives.losses import activation_loss
from blur_trainer.objectives.rmu import RMU
from blur_trainer.trainers.blur import BLURTrainer

WIDTH, LAYER, COEFFICIENT = 16, 1, 3.0
FORGET, RETAIN = examples(12, seed=5), examples(5, seed=6)
CHOSEN = {"train_layers": "0,1", "train_parameters": "mlp.down_proj"}
FIXED = {"lr_scheduler_type": "constant", "learning_rate": 1e-2, "train_sampling_strategy": "sequential"}


def model(seed=0):
    return tiny_llama(seed, layers=3)


def objectives(**kwargs):
    forget = RMU(LAYER, coefficient=COEFFICIENT, **kwargs)
    return {"forget_objective": forget, "retain_objective": ActivationMatch(LAYER)}


def kept(*rows, **config):
    """A trainer that skips the start which retain rows share."""
    held = ActivationMatch(LAYER, skip_shared_start=True)
    return BLURTrainer(*(model(), *rows), forget_objective=RMU(LAYER), retain_objective=held, **config)


def start(folder, forget=FORGET, retain=RETAIN, trained=None, rule=None, **config):
    args = settings(folder, **{"max_steps": 3, **FIXED, **CHOSEN, **config})
    return BLURTrainer(trained or model(), args, forget, retain, rule=rule, **objectives())


# ---- the loss ----


def test_the_loss_is_the_mean_over_real_tokens():
    hidden, goal = torch.randn(2, 3, 4), torch.randn(2, 1, 4)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    want = [sum(((hidden[b, t] - goal[b, 0]) ** 2).mean() for t in range(n)) for b, n in ((0, 3), (1, 1))]
    torch.testing.assert_close(activation_loss(hidden, goal, mask), torch.stack(want))
    hidden[1, 1:] = torch.nan  # what padding holds does not matter
    assert activation_loss(hidden, goal, mask).isfinite().all()
    assert activation_loss(hidden.bfloat16(), goal, mask).dtype == torch.float32


def test_unmasked_is_the_plain_mean_over_the_batch():
    """The official form."""
    batch, trained = collate(examples(3)), model()
    objective = RMU(LAYER, masked=False, coefficient=COEFFICIENT)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = trained(**inputs, output_hidden_states=True).hidden_states[LAYER + 1]
    want = torch.nn.functional.mse_loss(hidden, (COEFFICIENT * control_vector("forget", WIDTH, 0)).expand_as(hidden))
    torch.testing.assert_close(objective(trained, batch), want)
    assert objective.num_items(batch) == batch["input_ids"].numel()
    assert RMU(LAYER).num_items(batch) == batch["attention_mask"].sum() < batch["input_ids"].numel()


# ---- what forget and retain examples begin with alike ----


def test_a_shared_start_is_not_steered():
    batch, trained = collate(examples(4, low=7)), model()
    batch["shared_start"] = torch.tensor([0, 1, 3, 6])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = trained(**inputs, output_hidden_states=True).hidden_states[LAYER + 1]
    goal = COEFFICIENT * control_vector("forget", WIDTH, 0)
    lengths = batch["attention_mask"].sum(-1).tolist()
    want = [((hidden[b, t] - goal) ** 2).mean() for b in range(4) for t in range([0, 1, 3, 6][b], lengths[b])]
    objective = RMU(LAYER, coefficient=COEFFICIENT, skip_shared_start=True)
    torch.testing.assert_close(objective(trained, batch), torch.stack(want).mean())
    assert objective.num_items(batch) == len(want)
    padded = {name: value.roll(3, 1) if value.dim() == 2 else value for name, value in batch.items()}
    assert objective.mask(padded).sum(-1).tolist() == objective.mask(batch).sum(-1).tolist()  # of any side of padding


@pytest.mark.parametrize("level", [None, 20.0])
def test_a_trainer_counts_the_shared_start(level, tmp_path):
    """Rows that differ from the retain rows from their third token on. With a level nothing changes."""
    forget = [{"input_ids": [5, 6, 7 + i, 9], "labels": [-100, 6, 7 + i, 9]} for i in range(4)]
    retain = [{"input_ids": [5, 6, 30 + i], "labels": [5, 6, 30 + i]} for i in range(4)]
    args = settings(tmp_path, max_steps=1, forget_level=level, **FIXED)
    trainer = BLURTrainer(model(), args, forget, retain, **objectives(skip_shared_start=True))
    item = trainer.train_dataset[0]
    assert item["forget"]["shared_start"] == 2 and "shared_start" not in item["retain"]
    assert trainer.objectives["forget"].num_items(trainer.data_collator([item])["forget"]) == 2
    trainer.train()


def test_topics_count_the_shared_start_against_all_retain_rows(tmp_path):
    args = settings(tmp_path, max_steps=2, **FIXED)
    row = lambda *ids: {"input_ids": list(ids), "labels": list(ids)}  # noqa: E731
    forget = {"a": [row(5, 6, 7)] * 2, "b": [row(8, 9, 10)] * 2}
    retain = {"a": [row(8, 9, 11)] * 2, "b": [row(5, 12)] * 2}
    trainer = BLURTrainer(model(), args, forget, retain, **objectives(skip_shared_start=True))
    starts = [trainer.train_dataset[place]["forget"]["shared_start"] for place in range(4)]
    assert sorted(starts) == [1, 1, 2, 2]
    trainer.train()


@pytest.mark.parametrize("topics", [False, True])
def test_a_start_of_several_retain_rows_is_held_in_one(topics, tmp_path):
    """Of a system prompt of two tokens and what follows, each start counts once in all rows together."""
    retain = [{"input_ids": [5, 6, 30 + i, 8], "labels": [-100, 6, 30 + i, 8]} for i in (3, 1, 2, 0)]
    sets = ({"a": FORGET, "b": FORGET}, {"a": retain, "b": retain}) if topics else (FORGET, retain)
    trainer = kept(settings(tmp_path, max_steps=2, **FIXED), *sets)
    starts = {str(row["input_ids"]): row["shared_start"] for _, row in map(dict.values, trainer.train_dataset)}
    assert starts.items() <= {str([5, 6, 30 + i, 8]): 0 if i == 0 else 2 for i in range(4)}.items()
    assert set(starts.values()) == {0, 2}
    batch = trainer.data_collator([{"forget": FORGET[0], "retain": {**retain[0], "shared_start": 2}}])["retain"]
    assert trainer.objectives["retain"].num_items(batch) == 2
    trainer.train()


def test_a_shared_start_needs_the_whole_sets(tmp_path):
    stream = Dataset.from_list(RETAIN).to_iterable_dataset()
    with pytest.raises(TypeError, match="compares each example with the whole retain set, and there is a stream"):
        BLURTrainer(*(model(), settings(tmp_path, max_steps=1), FORGET, stream), **objectives(skip_shared_start=True))
    with pytest.raises(TypeError, match="compares each example with the whole retain set, and there is a stream"):
        kept(settings(tmp_path, max_steps=1), FORGET, stream)
    for objective in (RMU, ActivationMatch):
        with pytest.raises(ValueError, match=f"{objective.__name__}: `masked=False` counts every position"):
            objective(LAYER, masked=False, skip_shared_start=True)
        with pytest.raises(ValueError, match=f"{objective.__name__}: .* a trainer makes it from the sets"):
            objective(LAYER, skip_shared_start=True).mask(collate(FORGET[:2]))


# ---- answers alone ----


def test_answers_alone_are_steered():
    """The answer's tokens and the one before them, from which the first is said; of a second answer, too."""
    batch, trained = collate(examples(3, low=8)), model()
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    places = [[3, 4], [0, 1], [2, 5, 6]]  # the answers' tokens
    for row, those in enumerate(places):
        batch["labels"][row, those] = batch["input_ids"][row, those]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = trained(**inputs, output_hidden_states=True).hidden_states[LAYER + 1]
    goal = COEFFICIENT * control_vector("forget", WIDTH, 0)
    steered = [[2, 3, 4], [0, 1], [1, 2, 4, 5, 6]]
    want = [((hidden[b, t] - goal) ** 2).mean() for b in range(3) for t in steered[b]]
    objective = RMU(LAYER, coefficient=COEFFICIENT, answers_only=True)
    torch.testing.assert_close(objective(trained, batch), torch.stack(want).mean())
    assert objective.num_items(batch) == len(want)
    shared = RMU(LAYER, answers_only=True, skip_shared_start=True)
    assert shared.items({**batch, "shared_start": torch.tensor([3, 0, 5])}).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="so `answers_only` has no effect"):
        RMU(LAYER, masked=False, answers_only=True)
    with pytest.raises(ValueError, match="so `answers_only` has no effect"):
        RMU(LAYER, answers_only=True, own_words=0.2)


# ---- control vectors ----


def test_a_vector_is_of_its_topic_and_seed_alone():
    one = control_vector("bio", 8, 0)
    assert torch.equal(one, control_vector("bio", 8, 0)) and one.norm().item() == pytest.approx(1)
    assert (one >= 0).all() and one.dtype == torch.float32
    torch.manual_seed(5)
    torch.rand(3)
    assert torch.equal(one, control_vector("bio", 8, 0))
    others = [control_vector("cyber", 8, 0), control_vector("bio", 8, 1)]
    assert not any(torch.allclose(one, other) for other in others)


def test_each_row_goes_to_the_vector_of_its_topic():
    objective = RMU(LAYER, coefficient={"bio": 2.0, "cyber": 3.0}, topics=("bio", "cyber"))
    batch = {**collate(examples(3)), "topic": torch.tensor([1, 0, 1])}
    want = torch.stack([3 * control_vector("cyber", 8, 0), 2 * control_vector("bio", 8, 0)])[[0, 1, 0]]
    torch.testing.assert_close(objective.target(8, batch, None), want[:, None])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layer": -1}, "`layer` must be a number of at least 0, got -1"),
        ({"layer": "7"}, "`layer` must be a whole number, got '7'"),
        ({"coefficient": 0}, "`coefficient` must be a number above 0"),
        ({"coefficient": {"a": 1.0}}, r"`coefficient` has \['a'\], and not 'forget'"),
        ({"topics": ("a", "a")}, "different names"),
        ({"topics": ()}, "at least one"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        RMU(**kwargs)


def test_saved_vectors_are_of_their_topics_and_size(tmp_path):
    vectors = torch.rand(2, 8)
    save_vectors(tmp_path, ["a", "b"], vectors)
    assert torch.equal(load_vectors(tmp_path, ["a", "b"], 8), vectors)
    for topics, size, message in ((["b", "a"], 8, r"topics \['a', 'b'\]"), (["a", "b"], 9, "8 entries")):
        with pytest.raises(ValueError, match=message):
            load_vectors(tmp_path, topics, size)
    with pytest.raises(ValueError, match="is missing"):
        load_vectors(tmp_path / "elsewhere", ["a"], 8)


# ---- the training ----


@pytest.mark.parametrize(
    ("rule", "direction"),
    [
        (BLUR(gamma=1.0, alpha=800.0), lambda f, r: reference.blur_direction(f, r, "forget", 1.0, 800.0, False)),
        (Sum(1.0, 1200.0), lambda f, r: f + 1200.0 * r),
    ],
    ids=["BLUR-RMU", "RMU"],
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_steps_equal_the_literal_loop(rule, direction, accumulation, tmp_path):
    batch = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    got = start(tmp_path, rule=rule, **batch)
    got.train()
    pairs = PairedDataset(FORGET, RETAIN, seed=42)
    rows = [[pairs[i] for i in range(k, k + 4)] for k in (0, 4, 8)]
    want = model()
    for name, parameter in want.named_parameters():
        parameter.requires_grad_(name in [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)])
    losses = {
        "forget": reference.token_mean_distance(
            LAYER, reference.towards(control_vector("forget", WIDTH, 0), COEFFICIENT)
        ),
        "retain": reference.token_mean_distance(LAYER, reference.as_frozen(want, LAYER)),
    }
    windows = [{role: [item[role] for item in window] for role in ("forget", "retain")} for window in rows]
    reference.train(want, windows, losses, direction, learning_rates=[1e-2] * 3)
    assert distance(weights(want), weights(model())) > 1e-2
    assert distance(weights(got.model), weights(want)) < 2e-6


def test_only_what_is_chosen_is_trained_and_said(tmp_path):
    trainer = start(tmp_path)
    assert trainer.trained.startswith("training 2 of 30 tensors, 1.0k of ")
    assert "model.layers.0.mlp.down_proj.weight, model.layers.1.mlp.down_proj.weight" in trainer.trained
    before = weights(trainer.model)
    trainer.train()
    moved = [name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])]
    assert moved == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    assert len(trainer._backend.parameters) == 2
    grouped = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(grouped) == 2


def test_parameters_are_chosen_for_every_objective(tmp_path):
    trainer = train(settings(tmp_path, max_steps=1, train_parameters=r"layers\.2\..*proj"), FORGET, RETAIN, model())
    assert "training 7 of 30 tensors" in trainer.trained


def test_what_gets_no_gradient_is_frozen(tmp_path):
    """Both objectives end at layer 1: layer 2 and the head have nothing to learn from."""
    trainer = start(tmp_path, train_layers=None, train_parameters=None)
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("model.layers.2", "model.norm", "lm_head")) for name in names)
    assert "model.embed_tokens.weight" in names and "model.layers.1.mlp.up_proj.weight" in names
    trainer.train()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_layers": "0,9"}, r"`train_layers` \[0, 9\]: the model has the layers 0 to 2, and no layer 9"),
        ({"train_layers": "2"}, "objectives end at layer 1, and layer 2 would get no gradient"),
        ({"train_parameters": "w2"}, r"There are: model.embed_tokens.weight, model.layers.\*.self_attn.q_proj.weight"),
        ({"train_layers": "five"}, "layer numbers such as '5,6,7', got 'five'"),
        ({"train_parameters": "("}, "must be a regular expression"),
    ],
)
def test_a_bad_choice(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        start(tmp_path, **config)


def test_an_objective_that_would_train_nothing(tmp_path):
    """NLL reaches layer 2, RMU ends below it."""
    with pytest.raises(ValueError, match=r"`forget_objective` RMU\(.*would train nothing: .* lies above layer 1"):
        BLURTrainer(
            model(),
            settings(tmp_path, train_layers="2"),
            FORGET,
            RETAIN,
            forget_objective=RMU(1),
            retain_objective=NLL(),
        )


def test_no_such_layer(tmp_path):
    with pytest.raises(ValueError, match=r"`forget_objective` RMU\(.*layers 0 to 2, and no layer 7"):
        BLURTrainer(model(), settings(tmp_path, forget_objective="rmu"), FORGET, RETAIN)


def test_one_buffer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ends the forward pass at a layer"):
        start(tmp_path, single_gradient_buffer=True)


# ---- the frozen copy ----


def test_the_frozen_copy_has_the_trained_parameters_of_the_lower_layers_only(tmp_path):
    trainer = start(tmp_path)
    frozen = trainer.reference
    assert isinstance(frozen, FrozenModel) and len(frozen.model.model.layers) == LAYER + 1
    own = {id(p): name for name, p in trainer.model.named_parameters()}
    copied = [name for name, p in frozen.model.named_parameters() if id(p) not in own]
    assert copied == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    assert not any(p.requires_grad for p in frozen.model.parameters())
    before = frozen.activations(collate(FORGET[:2]), LAYER)
    trainer.train()
    assert torch.equal(frozen.activations(collate(FORGET[:2]), LAYER), before)


def test_without_sharing_nothing_is_shared():
    trained = model().requires_grad_(False)
    shared = {p.data_ptr() for p in trained.parameters()}
    assert not shared & {p.data_ptr() for p in frozen_lower(trained, 2, share=False).parameters()}
    assert {p.data_ptr() for p in frozen_lower(trained, 2, share=True).parameters()} <= shared


def test_with_an_adapter_it_is_switched_off(tmp_path):
    args = settings(tmp_path, max_steps=2, **FIXED)
    lora = LoraConfig(target_modules=["down_proj"], r=2)
    trainer = train(args, FORGET, RETAIN, model(), peft_config=lora, **objectives())
    assert isinstance(trainer.reference, OtherAdapter)
    batch = collate(FORGET[:2])
    frozen = FrozenModel(model()).activations(batch, LAYER)
    torch.testing.assert_close(trainer.reference.activations(batch, LAYER), frozen)
    assert ".layers.1." in trainer.trained and ".layers.2." not in trainer.trained


def test_beside_an_objective_on_answers_the_whole_model_runs(tmp_path):
    args = settings(tmp_path, max_steps=1)
    trainer = BLURTrainer(
        model(), args, FORGET, RETAIN, forget_objective=GradAscent(), retain_objective=ActivationMatch(LAYER)
    )
    assert all(p.requires_grad for p in trainer.model.parameters()) and "training 30 of 30" in trainer.trained
    trainer.train()
    forward = BLURTrainer(model(), settings(tmp_path / "b", max_steps=1), FORGET, RETAIN, forget_objective=RMU(LAYER))
    assert isinstance(forward.objectives["retain"], NLL) and forward.reference is None
    forward.train()


# ---- resume ----


def test_resume_keeps_the_vectors(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = start(tmp_path / "whole", **saving)
    vectors = torch.rand(1, WIDTH)  # of another torch, say: not what the seed gives here
    whole.objectives["forget"].restore(vectors)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert torch.equal(load_file(checkpoint / NAME)["vectors"], vectors)
    resumed = start(tmp_path / "resumed", **saving)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert distance(weights(whole.model), weights(resumed.model)) <= 1e-7
    other = start(tmp_path / "fresh", max_steps=3)
    other.train()
    assert distance(weights(whole.model), weights(other.model)) > 1e-4
    lost = tmp_path / "lost" / "checkpoint-2"
    shutil.copytree(checkpoint, lost)
    Path(lost, NAME).unlink()
    with pytest.raises(ValueError, match="missing"):
        start(tmp_path / "again").train(resume_from_checkpoint=str(lost))


def test_a_copy_of_the_objective_has_vectors_of_its_own():
    one = RMU(LAYER)
    one.restore(torch.zeros(1, 8))
    assert RMU(LAYER) == one and not torch.equal(RMU(LAYER).vectors(8), one.vectors(8))
    assert torch.equal(copy.deepcopy(one).vectors(8), one.vectors(8))


def test_vectors_set_by_restore_stay_with_their_topics(tmp_path):
    vectors = torch.eye(2, WIDTH)
    given = RMU(LAYER, coefficient=COEFFICIENT, topics=("a", "b"))
    given.restore(vectors)
    forget = {"b": FORGET[:4], "a": FORGET[4:8]}  # in another order
    args = settings(tmp_path, max_steps=2, **FIXED, **CHOSEN)
    others = {"forget_objective": given, "retain_objective": ActivationMatch(LAYER)}
    trainer = BLURTrainer(model(), args, forget, RETAIN, **others)
    assert torch.equal(trainer.objectives["forget"].vectors(WIDTH), vectors.flip(0))
    with pytest.raises(ValueError, match=r"topics \['a', 'b'\].*none is known for \['c'\]"):
        BLURTrainer(model(), args, {"a": FORGET[:4], "c": FORGET[4:8]}, RETAIN, **others)


def test_restore_takes_one_vector_per_topic_of_the_models_size():
    rmu = RMU(LAYER, topics=("a", "b"))
    for wrong in (torch.zeros(1, WIDTH), torch.zeros(3, WIDTH), torch.zeros(WIDTH)):
        with pytest.raises(ValueError, match=r"vectors of shape \(2, hidden size\)"):
            rmu.restore(wrong)
    rmu.restore(torch.zeros(2, WIDTH + 1))
    with pytest.raises(ValueError, match=f"{WIDTH + 1} entries, the model's hidden size is {WIDTH}"):
        rmu.vectors(WIDTH)
