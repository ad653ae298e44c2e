"""What is found inside a model on the device is what is found on the CPU, to rounding."""

import copy

import pytest
from support.device import DEVICE
from support.models import examples, tiny_llama
from support.scoring_helpers import build_model, build_tokenizer
from support.tiny_tokenizer import tiny_tokenizer

from blur_trainer.evaluation.inside.choices import probe_choices
from blur_trainer.evaluation.inside.patching import unlearning_depth
from blur_trainer.evaluation.inside.probes import probe_layers


def test_probes_and_patching_find_the_same():
    target, unlearned, retrained = (tiny_llama(seed).eval() for seed in range(3))
    moved = [copy.deepcopy(model).to(DEVICE) for model in (target, unlearned, retrained)]
    forget = examples(9, seed=2)
    placed = [(target, unlearned, retrained), moved, (moved[0], unlearned, moved[2])]  # the last ones on two devices
    depths = [unlearning_depth(*models, forget, batch_size=4, progress=False) for models in placed]
    for found in depths[1:]:
        assert found.score == pytest.approx(depths[0].score, rel=1e-2)
        assert found.retrained == pytest.approx(depths[0].retrained, abs=1e-3)
        assert found.unlearned == pytest.approx(depths[0].unlearned, abs=1e-3)
    how = {"train": examples(20, seed=3), "forget": forget, "learning_rate": 1e-2, "max_epochs": 3, "progress": False}
    first, second = (probe_layers(model, tiny_tokenizer(), **how) for model in (target, moved[0]))
    assert second.models[0].forget_loss == pytest.approx(first.models[0].forget_loss, rel=1e-3)
    cpu, prompts, answers = build_model().eval(), [f"The {i}" for i in range(12)], [i % 2 for i in range(12)]
    first, second = (
        probe_choices(model, build_tokenizer(), prompts, answers, folds=2, progress=False)
        for model in (cpu, copy.deepcopy(cpu).to(DEVICE))
    )
    assert second.accuracy == pytest.approx(first.accuracy, abs=0.1)  # one question of twelve may tip
