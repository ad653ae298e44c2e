"""The mask in a training: the weights of the literal form, what may not move, checkpoints, errors, what is said."""

import copy
import json
import logging

import datasets
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from support import reference
from support.models import examples, tiny_llama
from support.runs import distance, settings, weights
from test_rule_state import NaNInStepTwo
from test_step import LEARNING_RATE, RULES, STEPS, literal, ours, update_error, windows
from transformers import TrainerCallback

from blur_trainer.gradients.rules import Sum
from blur_trainer.objectives.activations import ActivationMatch
from blur_trainer.objectives.distributions import KL
from blur_trainer.objectives.likelihood import IDK
from blur_trainer.objectives.rmu import RMU
from blur_trainer.trainers.blur import BLURTrainer
from blur_trainer.trainers.masking import in_words, summarize

LOSSES = {"forget": lambda m, rows: -reference.token_mean_nll(m, rows), "retain": reference.token_mean_nll}
FORGET, RETAIN = examples(7), examples(5, 1)


def rows():
    return [item for window in windows() for item in window["forget"]]


def saliency(model, share):
    scores = reference.saliency_scores(model, rows(), LOSSES["forget"])
    return torch.tensor(reference.top_share(scores, share)).double()


def fisher(model, share, size=2):
    """As the trainer's batches of two, in the order that the seed draws."""
    items = [{role: window[role][i] for role in window} for window in windows() for i in range(len(window["forget"]))]
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(42)).split(size)
    batches = [{role: [items[i][role] for i in part] for role in ("forget", "retain")} for part in order]
    return torch.tensor(reference.top_share(reference.fisher_scores(model, batches), share)).double()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("score", "share"), [("saliency", 0.3), pytest.param("saliency", 0.02, marks=pytest.mark.full), ("fisher", 0.2)]
)
def test_trained_weights_are_those_of_the_literal_form(score, share, tmp_path):
    rule, direction = RULES["blur"]
    start = tiny_llama(0).double()
    got = ours(copy.deepcopy(start), tmp_path, rule, mask_share=share, mask_score=score).model
    mask = {"saliency": saliency, "fisher": fisher}[score](copy.deepcopy(start), share)
    rates = [LEARNING_RATE] * STEPS
    want = reference.train(copy.deepcopy(start), windows(), LOSSES, direction, learning_rates=rates, mask=mask)
    assert update_error(got, want, start) < 2e-4
    assert update_error(got, literal(copy.deepcopy(start), direction), start) > 1e-2  # the mask is not for nothing
    moved = flat(got) != flat(start)
    assert not moved[mask == 0].any() and moved[mask == 1].float().mean() > 0.9


CASES = {
    "clipped": {"max_grad_norm": 0.01},
    "one buffer": {"single_gradient_buffer": True},
    "GRU": {"rule": "gru"},
    "SAM": {"sam_rho": 0.3},
    "offloaded": {"offload_forget_gradient": True},
    "Adafactor": {"optim": "adafactor"},
    "SGD": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "KL": {"objects": {"retain_objective": KL()}},
    "Fisher, KL": {"mask_score": "fisher", "objects": {"retain_objective": KL()}},
    "RMU": {"objects": {"forget_objective": RMU(0, coefficient=5.0), "retain_objective": ActivationMatch(0)}},
    "Fisher, RMU": {
        **{"mask_score": "fisher", "mask_batches": 1},
        "objects": {"forget_objective": RMU(0, coefficient=5.0), "retain_objective": ActivationMatch(0)},
    },
    "precomputed": {"precompute_ref_logps": True},
    "refusals": {
        "objects": {"forget_objective": IDK()},
        "forget": [r | {f"refusal_{k}": examples(7, 3)[i][k] for k in r} for i, r in enumerate(FORGET)],
    },
}


def start(folder, model=None, share=0.2, forget=FORGET, retain=RETAIN, **config):
    objects = config.pop("objects", {})
    args = settings(folder, mask_share=share, **{"max_steps": 3, **config})
    return BLURTrainer(tiny_llama() if model is None else model, args, forget, retain, **objects)


EVERY_RUN = {"clipped", "one buffer", "SAM", "offloaded", "Fisher, RMU", "refusals"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in EVERY_RUN else pytest.mark.full) for n in CASES])
def test_a_frozen_entry_keeps_every_bit_and_others_move(name, tmp_path):
    trainer = start(tmp_path, **copy.deepcopy(CASES[name]))
    before = {id(p): p.detach().clone() for p in trainer.model.parameters()}
    trainer.train()
    kept = total = moved = 0
    for parameter, frozen in zip(trainer._backend.parameters, trainer._masking.mask.frozen, strict=True):
        old = before[id(parameter)]
        may = torch.zeros_like(old, dtype=torch.bool) if frozen is None else ~frozen
        assert torch.equal(parameter[~may], old[~may])
        kept, total, moved = kept + int(may.sum()), total + old.numel(), moved + int((parameter != old)[may].sum())
    assert 0.18 * total <= kept <= 0.22 * total
    assert moved > 0.5 * kept


@pytest.mark.parametrize("score", ["saliency", "fisher"])
def test_a_resumed_training_makes_no_other_mask(score, tmp_path):
    config = {"mask_score": score, "max_steps": 4}

    def model():
        return tiny_llama(dropout=0.3)

    whole = start(tmp_path / "whole", model(), save_strategy="steps", save_steps=1, **config)
    whole.train()
    for step in (1,) if score == "fisher" else (1, 3):
        # so few batches would give another mask
        resumed = start(tmp_path / f"resumed-{step}", model(), mask_batches=1, **config)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for ours_, theirs in zip(resumed._masking.mask.frozen, whole._masking.mask.frozen, strict=True):
            assert (ours_ is None and theirs is None) or torch.equal(ours_, theirs)
        assert distance(weights(resumed.model), weights(whole.model)) == 0
        assert (tmp_path / f"resumed-{step}" / "mask.json").read_text() == (tmp_path / "whole/mask.json").read_text()


def test_checkpoints_hold_one_bit_per_entry(tmp_path):
    trainer = start(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    held = load_file(tmp_path / "checkpoint-1" / "mask-00000-of-00001.safetensors")
    for place, frozen in enumerate(trainer._masking.mask.frozen):
        if frozen is None:
            assert str(place) not in held
        else:
            assert held[str(place)].dtype == torch.uint8
            assert held[str(place)].numel() == -(-frozen.numel() // 8)


def test_a_checkpoint_without_the_mask_or_of_another_share_is_refused(tmp_path):
    start(tmp_path, save_strategy="steps", save_steps=1, max_steps=2).train()
    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(ValueError, match=r"`mask_share` was 0.2 and is 0.3"):
        start(tmp_path / "other", share=0.3).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "mask-00000-of-00001.safetensors").unlink()
    (checkpoint / "blur_checkpoint.json").unlink()
    with pytest.raises(ValueError, match=r"mask-00000-of-00001.safetensors' is missing"):
        start(tmp_path / "on").train(resume_from_checkpoint=str(checkpoint))


def test_a_second_training_makes_its_own_mask(tmp_path):
    trainer = start(tmp_path / "a")
    trainer.train()
    first = trainer._masking.mask
    trainer.train()
    assert trainer._masking.mask is not first


def test_topics_have_batches_of_their_own(tmp_path):
    topics = {"a": examples(4), "b": examples(4, 2)}
    objects = {"forget_objective": RMU(0, coefficient=5.0), "retain_objective": ActivationMatch(0)}
    trainer = start(tmp_path, forget=topics, max_steps=2, objects=objects)
    trainer.train()
    assert 0.18 < json.loads((tmp_path / "mask.json").read_text())["kept"] / 6224 * 2 < 0.5


def test_what_was_chosen_is_written_and_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer = start(tmp_path, max_steps=1)
        trainer.train()
    summary = json.loads((tmp_path / "mask.json").read_text())
    named = dict(trainer.model.named_parameters())
    kept = dict(zip(named, trainer._masking.mask.frozen, strict=True))
    counts = {name: 0 if f is None else int((~f).sum()) for name, f in kept.items()}
    assert summary["kept"] == sum(counts.values()) and summary["of"] == sum(p.numel() for p in named.values())
    layer = [name for name in named if ".layers.1." in name]
    assert summary["by_layer"]["1"] == sum(counts[n] for n in layer) / sum(named[n].numel() for n in layer)
    down = [name for name in named if "down_proj" in name]
    assert summary["by_module"]["down_proj"] == sum(counts[n] for n in down) / sum(named[n].numel() for n in down)
    assert list(summary["by_layer"]) == ["embed_tokens", "0", "1", "norm", "lm_head"]
    assert in_words(summary) in caplog.text


def test_the_names_of_an_adapter():
    names = ["base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight", "model.layers.3.mlp.experts.down"]
    summary = summarize(dict.fromkeys(names, 2), dict.fromkeys(names, 8))
    assert summary["by_layer"] == {"3": 0.25}
    assert summary["by_module"] == {"up_proj.lora_A": 0.25, "down": 0.25}


def test_no_state_for_parameters_that_cannot_move(tmp_path):
    """A fresh adapter's A has no gradient: only B is chosen, and AdamW keeps moments of B alone."""
    objects = {"peft_config": LoraConfig(r=2, target_modules="all-linear")}
    trainer = start(tmp_path, objects=objects, max_steps=1)
    trainer.train()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    assert all("lora_B" in names[id(p)] for p in trainer.optimizer.state) and len(trainer.optimizer.state) > 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mask_share": 1.5}, "`mask_share` must be a number above 0 and below 1"),
        ({"mask_share": 0.1, "mask_score": "magnitude"}, "`mask_score` must be 'saliency' or 'fisher'"),
        ({"mask_share": 0.1, "mask_batches": 0}, "`mask_batches` must be"),
        ({"mask_share": 0.1, "weight_decay": 0.01}, "`weight_decay=0.01` would shrink all weights"),
        ({"mask_share": 0.1, "optim": "galore_adamw", "optim_target_modules": "mlp"}, "turns the gradient"),
        ({"mask_share": 0.1, "optim": "apollo_adamw", "optim_target_modules": "mlp"}, "turns the gradient"),
    ],
)
def test_settings_that_cannot_be(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        start(tmp_path, share=config.pop("mask_share"), **config)


def test_fisher_without_a_retain_set(tmp_path):
    args = settings(tmp_path, mask_share=0.1, mask_score="fisher")
    with pytest.raises(ValueError, match="choose 'saliency'"):
        BLURTrainer(tiny_llama(), args, FORGET, rule=Sum(retain_weight=0.0))


def test_a_stream_is_refused(tmp_path):
    stream = datasets.IterableDataset.from_generator(lambda: iter(FORGET))
    with pytest.raises(ValueError, match="not a stream"):
        start(tmp_path, forget=stream)


def test_an_optimizer_that_decays_weights_is_refused(tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    with pytest.raises(ValueError, match=r"weight_decay=0.1"):
        start(tmp_path, model, objects={"optimizers": (optimizer, None)}).train()


def test_nothing_to_train(tmp_path):
    class Nothing(NaNInStepTwo):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs) * 0.0

    with pytest.raises(ValueError, match="the forget gradient is 0 before training"):
        start(tmp_path, objects={"forget_objective": Nothing(calls=[1, 1, 1])}).train()


def test_a_gradient_that_is_not_finite_gives_no_scores(tmp_path):
    with pytest.raises(FloatingPointError, match="`mask_share` has no scores"):
        start(tmp_path, objects={"forget_objective": NaNInStepTwo()}).train()


def test_frozen_on_the_way(tmp_path):
    class Freezes(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.lm_head.requires_grad_(False)

    with pytest.raises(ValueError, match="freeze them before `train"):
        start(tmp_path, objects={"callbacks": [Freezes()]}).train()
