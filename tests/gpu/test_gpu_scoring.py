"""What evaluations compute on the device is what they compute on the CPU, to rounding."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.device import DEVICE
from support.models import examples
from support.scoring_helpers import SENTENCES, build_model, build_tokenizer, muse_data

from blur_trainer.evaluation.answer_scoring import can_share_prompts, score_variants
from blur_trainer.evaluation.muse import MUSEEvaluation
from blur_trainer.evaluation.robustness.quantization import quantize_dequantize
from blur_trainer.evaluation.robustness.relearning import relearn
from blur_trainer.evaluation.scoring import generate, token_logps
from blur_trainer.evaluation.tofu.suite import TOFUEvaluation
from blur_trainer.models.logit_difference import LogitDifferenceConfig, LogitDifferenceModel
from blur_trainer.models.lora_assistant import lora_assistant

PROMPTS = ["The", SENTENCES[1], "Question: Where?\nAnswer: ", "spoke of crime novels and"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def models():
    """On the CPU, and the same weights on the device."""
    model = build_model().eval()
    return model, copy.deepcopy(model).to(DEVICE)


def test_log_probabilities_and_texts_are_the_cpus(models, tokenizer):
    scores = [token_logps(model, examples(9, seed=1), pad_token_id=0, batch_size=4) for model in models]
    assert sum(map(len, scores[0])) > 20
    for cpu, device in zip(*scores, strict=True):
        np.testing.assert_allclose(device, cpu, atol=1e-4)
    texts = [generate(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=3) for model in models]
    assert texts[1] == texts[0] and len("".join(texts[0])) > 10


def difference():
    target = build_model(num_hidden_layers=3).eval()
    torch.manual_seed(2)
    assistant = lora_assistant(target, 2)
    for name, parameter in assistant.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    config = LogitDifferenceConfig(weight=-0.7, top_logit_filter=0.01)
    return LogitDifferenceModel(config, target, assistant.eval()).eval()


@pytest.mark.parametrize("make", [lambda: build_model().eval(), difference], ids=["llama", "logit difference"])
def test_answers_after_a_shared_prompt_are_scored_as_on_the_cpu(make):
    generator = torch.Generator().manual_seed(0)
    questions = []
    for _ in range(3):
        prompt = torch.randint(3, 300, (7,), generator=generator).tolist()
        answers = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (3, 5, 2)]
        questions.append([{"input_ids": prompt + a, "labels": [-100] * 7 + a} for a in answers])
    model = make()
    twin = copy.deepcopy(model).to(DEVICE)
    assert can_share_prompts(twin)
    scores = [score_variants(m, questions, pad_token_id=0, batch_size=4) for m in (model, twin)]
    for cpu, device in zip(*([row for question in found for row in question] for found in scores), strict=True):
        assert device.nll == pytest.approx(cpu.nll, abs=1e-3)


def test_a_whole_muse_evaluation_is_the_cpus(models, tokenizer):
    evaluation = MUSEEvaluation(
        muse_data(), tokenizer, max_new_tokens_verbmem=6, max_new_tokens_knowmem=5, auc_retrain=0.5, progress=False
    )
    cpu, device = (evaluation(model) for model in models)
    assert device == pytest.approx(cpu, abs=1e-3) and len(cpu) == 8


def question(tag, index, *, paraphrased=True, perturbed=2):
    row = {"question": f"Where was {tag} {'x' * index}?", "answer": f"In {tag} hall{' again' * (index % 3)}."}
    if paraphrased:
        row["paraphrased_answer"] = f"{tag.title()}{index} it was."
    if perturbed:
        row["perturbed_answer"] = [f"In {word}{' now' * index}." for word in ("May", "Norvale")[:perturbed]]
    return row


def tofu_data():
    splits = {
        **{"forget_perturbed": (4, "forget", {}), "retain_perturbed": (3, "retain", {})},
        **{"real_authors_perturbed": (2, "author", {"paraphrased": False})},
        **{"world_facts_perturbed": (2, "fact", {"paraphrased": False})},
        **{"holdout": (3, "other", {"paraphrased": False, "perturbed": 0})},
    }
    return {
        name: Dataset.from_list([question(tag, index, **more) for index in range(count)])
        for name, (count, tag, more) in splits.items()
    }


def test_a_whole_tofu_evaluation_is_the_cpus(models, tokenizer):
    """With the membership attacks, which differentiate."""
    evaluation = TOFUEvaluation(tofu_data(), tokenizer, max_new_tokens=6, progress=False)
    cpu, device = (evaluation(model) for model in models)
    assert device == pytest.approx(cpu, rel=1e-3, abs=1e-3) and len(cpu) > 10


def test_attacks_on_what_was_forgotten_are_the_cpus(models):
    """Relearning, and weights in few bits: a draw of a rounding may fall elsewhere only at a tie."""
    rows = examples(6, seed=3)

    def nll(model):
        scores = token_logps(model, rows, pad_token_id=0)
        return {"nll": -sum(float(row.sum()) for row in scores) / sum(map(len, scores))}

    curves = []
    for model in models:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        points = relearn(model, rows, nll, steps=(2, 4), learning_rate=1e-3, batch_size=3)
        curves.append([point["metrics"]["nll"] for point in points])
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert curves[1] == pytest.approx(curves[0], rel=1e-3) and curves[0][0] > curves[0][2]
    weight = torch.randn(8, 70, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(quantize_dequantize(weight.to(DEVICE), 4).cpu(), quantize_dequantize(weight, 4))
