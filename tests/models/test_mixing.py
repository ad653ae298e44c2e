"""Mixtures of weights, the dial of every kind of model, and the smallest mixture that reaches a level."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from support.logit_models import CLOSE, learned
from support.models import collate, examples, tiny_llama
from support.reference import mixed_value

from blur_trainer.models.logit_difference import LogitDifferenceModel
from blur_trainer.models.logit_difference_config import LogitDifferenceConfig
from blur_trainer.models.lora_assistant import lora_assistant
from blur_trainer.models.mixing import smallest_mix, weight_mix
from blur_trainer.models.strength import strength_dial

BATCH = {name: rows for name, rows in collate(examples(3)).items() if name != "labels"}


def pair(dtype=torch.float32, **options):
    """A model before and after some training that left the embedding alone."""
    before, after = tiny_llama(**options).to(dtype).eval(), tiny_llama(**options).to(dtype).eval()
    generator = torch.Generator().manual_seed(3)
    for name, weight in after.named_parameters():
        if "embed" not in name:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator).to(dtype)
    return before, after


def copied(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def lora(**options):
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], **options)
    return learned(get_peft_model(tiny_llama(), config))


# ---- weights ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_weight_is_between_both(dtype):
    before, after = pair(dtype)
    old, new = copied(before), copied(after)
    with weight_mix(after, before) as at:
        for strength in (0.3, 0.85, 1.5):
            assert at(strength) is after
            for name, weight in after.state_dict().items():
                for i in (0, 7):
                    expected = mixed_value(old[name].view(-1)[i].item(), new[name].view(-1)[i].item(), 1 - strength)
                    found, unit = weight.view(-1)[i], torch.finfo(dtype).eps
                    assert found.item() == pytest.approx(expected, rel=4 * unit, abs=unit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ends_are_exact_and_nothing_is_left_behind(dtype):
    before, after = pair(dtype)
    old, new = copied(before), copied(after)
    with weight_mix(after, before) as at:
        at(0.4)
        assert same(copied(at(0.0)), old) and same(copied(at(1.0)), new)
        at(0.7)
    assert same(copied(after), new) and same(copied(before), old)
    with pytest.raises(KeyError), weight_mix(after, before) as at:
        at(0.5)
        raise KeyError
    assert same(copied(after), new), "an error in the block left a mixture"


def test_broken_weights_come_back_too():
    """Arithmetic would make NaN of an infinite weight, and 0 of -0."""
    before, after = pair()
    weight = after.lm_head.weight.data
    weight[0, :2] = torch.tensor([float("inf"), -0.0])
    bits = weight.clone().view(torch.int32)
    with weight_mix(after, before) as at:
        at(0.5)
    assert torch.equal(after.lm_head.weight.data.view(torch.int32), bits)


def test_only_what_differs_is_copied(monkeypatch):
    before, after = pair(tie=True)
    copies, to = [], torch.Tensor.to

    def counted(self, *args, **options):
        copies.extend([self.shape] if options.get("copy") else [])
        return to(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    with weight_mix(after, before) as at:
        at(0.5)
    assert len(copies) == len(list(after.parameters())) - 1, "the tied embedding has not changed"


def test_what_cannot_be_mixed():
    before, after = pair()
    smaller = tiny_llama()
    smaller.resize_token_embeddings(40)
    odd = ((tiny_llama(layers=3), "9 tensors are in one only"), (smaller, r"is \(48, 16\) in the model and \(40, 16\)"))
    for other, words in odd:
        with pytest.raises(ValueError, match=words), weight_mix(after, other):
            pass
    with pytest.raises(ValueError, match="strength=nan"), weight_mix(after, before) as at:
        at(float("nan"))
    before.register_buffer("step", torch.tensor(1)), after.register_buffer("step", torch.tensor(2))
    with pytest.raises(ValueError, match=r"'step' .*cannot be mixed"), weight_mix(after, before):
        pass


# ---- the dial ----


def test_the_dial_of_a_lora_is_the_mixture_of_the_merged_model():
    adapted, merged = lora(), lora().merge_and_unload().eval()
    trained = logits(adapted)
    with strength_dial(adapted) as dial, strength_dial(merged, tiny_llama().eval()) as mix:
        for strength in (0.0, 0.25, 0.6, 1.0):
            torch.testing.assert_close(logits(dial(strength)), logits(mix(strength)), **CLOSE)
        assert torch.equal(logits(dial(0.0)), logits(tiny_llama().eval()))
        assert not torch.allclose(logits(dial(0.5)), trained)
    assert torch.equal(logits(adapted), trained)


def uld(weight: float):
    target = tiny_llama(layers=3).eval()
    torch.manual_seed(0)
    assistant = learned(lora_assistant(target, 2, LoraConfig(r=2, target_modules=["q_proj"])))
    return LogitDifferenceModel(LogitDifferenceConfig(weight=weight), target, assistant)


def test_the_dial_of_logits_is_their_weight():
    model = uld(-1.2)
    with strength_dial(model) as at:
        torch.testing.assert_close(logits(at(0.5)), logits(uld(-0.6)))
        assert torch.equal(logits(at(0.0)), logits(model.target))
    assert model.config.weight == -1.2 and torch.equal(logits(model), logits(uld(-1.2)))


def test_models_without_a_dial():
    ia3 = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    for make, words in (
        (lambda: lora(use_dora=True), r"LoraConfig, use_dora\) is more than a LoRA"),
        (lambda: lora(bias="all"), r"bias\) is more than a LoRA"),
        (lambda: get_peft_model(tiny_llama(), ia3), "IA3Config"),
        (tiny_llama, "pass `before`"),
    ):
        with pytest.raises(ValueError, match=words), strength_dial(make()):
            pass
    for model in (lora(), uld(-1.0)):
        with pytest.raises(ValueError, match="leave `before` out"), strength_dial(model, tiny_llama()):
            pass
    merged, two = lora(), lora()
    merged.merge_adapter()
    two.add_adapter("more", LoraConfig(r=2, target_modules=["q_proj"]))
    two.base_model.set_adapter(["default", "more"])
    for model, words in ((merged, "unmerge it first"), (two, r"'more'.* are active")):
        with pytest.raises(ValueError, match=words), strength_dial(model):
            pass


# ---- the smallest mixture ----


@pytest.mark.parametrize("edge", [0.01, 0.25, 0.26, 0.6, 0.99, 1.0])
def test_the_smallest_share_that_reaches_the_level(edge):
    found = smallest_mix(lambda a: a, edge)
    assert edge <= found.a < edge + 1 / 64 and found.value == found.a
    assert len(found.tried) <= 9 and len(dict(found.tried)) == len(found.tried), "the same mixture twice"
    missed = [a for a, value in found.tried if value < edge]
    assert max(missed) == found.a - 1 / 64


def test_the_ends_of_the_search():
    assert smallest_mix(lambda a: 0.9, 0.9).a == 0 and len(smallest_mix(lambda a: 0.9, 0.9).tried) == 1
    never = smallest_mix(lambda a: float("nan") if a < 0.5 else 0.1, 0.9)
    assert (never.a, never.value, len(never.tried)) == (None, None, 5)
    assert smallest_mix(lambda a: a, 0.3, grid=2, halvings=0).a == 1
    for wrong in ({"grid": 1}, {"halvings": -1}, {"level": float("inf")}):
        with pytest.raises(ValueError, match="at least 2 points"):
            smallest_mix(lambda a: a, **{"level": 0.5, **wrong})


def test_a_measure_that_does_not_rise():
    """It is reached near .25, lost, and reached again at 1: the first point of the grid counts."""
    found = smallest_mix(lambda a: float(0.2 < a < 0.3 or a == 1), 1.0)
    assert 0.2 < found.a <= 0.25 and found.value == 1
