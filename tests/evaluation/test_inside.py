"""Probes and patching, against slow literal forms and on every kind of decoder. The models never notice."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from support.decoders import CONFIGS, LAYERS
from support.literal_inside import LiteralProbe, drop, score
from support.models import VOCAB, examples, tiny_llama
from support.scoring_helpers import build_model, build_tokenizer
from support.tiny_tokenizer import tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FalconConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
)

from blur_trainer.evaluation.inside import fitting, patching, probes
from blur_trainer.evaluation.inside.choices import probe_choices
from blur_trainer.evaluation.inside.patching import unlearning_depth
from blur_trainer.evaluation.inside.probes import probe_layers
from blur_trainer.evaluation.inside.states import layer_states
from blur_trainer.evaluation.inside.top import Top
from blur_trainer.evaluation.scoring import generate_ids
from blur_trainer.evaluation.token_scores import scored_positions
from blur_trainer.models.forward import evaluating
from blur_trainer.models.layers import find_layers
from blur_trainer.models.logit_difference import LogitDifferenceModel
from blur_trainer.models.logit_difference_config import LogitDifferenceConfig
from blur_trainer.models.lora_assistant import lora_assistant

SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODERS = CONFIGS | {
    "opt": OPTConfig(**SMALL, **ENDS, ffn_dim=32, word_embed_proj_dim=8, max_position_embeddings=64),  # projects
    "falcon": FalconConfig(**SMALL, **ENDS),  # its layers answer tuples
}
TOKENIZER = tiny_tokenizer()
TRAIN, FORGET = examples(10, seed=1), examples(5, seed=2)


def decoder(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(DECODERS[name]).eval()


def scored(rows):
    return [(row["input_ids"], scored_positions(row["labels"])) for row in rows]


# ---- what stands above the layers ----


@pytest.mark.parametrize("name", DECODERS)
def test_the_top_is_what_the_model_runs_above_its_layers(name):
    model, ids = decoder(name), FORGET[0]["input_ids"]
    top = Top(model)
    (states,) = layer_states(model, [ids], [range(len(ids))], [LAYERS - 1], batch_size=1)
    with evaluating(model):
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        with top.alone(top.copies()) as run:
            torch.testing.assert_close(run(states[0]), logits)
        whole = generate_ids(model, TOKENIZER, [ids], max_new_tokens=5)
        with top.behind(LAYERS - 1, top.copies()):
            assert generate_ids(model, TOKENIZER, [ids], max_new_tokens=5) == whole
        with top.behind(0, top.copies()):
            first = model(input_ids=torch.tensor([ids])).logits[0]
    (lower,) = layer_states(model, [ids], [range(len(ids))], [0], batch_size=1)
    with evaluating(model), top.alone(top.weights) as run:
        torch.testing.assert_close(run(lower[0]), first)


def test_the_weights_of_the_top():
    above = {
        "llama": {"model.norm.weight", "lm_head.weight"},
        "gpt2": {"transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"},
        "gpt_neox": {"gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias", "lm_head.weight"},
        "opt": {"model.decoder.project_out.weight", "lm_head.weight"}
        | {f"model.decoder.final_layer_norm.{name}" for name in ("weight", "bias")},
    }
    for name, expected in above.items():
        model = decoder(name)
        names = {part: key for key, part in model.named_modules()}
        assert {f"{names[part]}.{attribute}" for part, attribute in Top(model).weights} == expected


def test_layer_states_are_those_of_one_row_at_a_time():
    model = tiny_llama(layers=3)
    rows = [row["input_ids"] for row in TRAIN]
    places = [[len(row) - 1, 0] for row in rows]
    found = layer_states(model, rows, places, [0, 2], batch_size=4)
    seen = []
    handles = [model.model.layers[i].register_forward_hook(lambda m, a, output: seen.append(output[0])) for i in (0, 2)]
    for row, positions, states in zip(rows, places, found, strict=True):
        seen.clear()
        with torch.no_grad():
            model.eval()(input_ids=torch.tensor([row]))
        for mine, whole in zip(states, seen, strict=True):
            torch.testing.assert_close(mine, whole[positions], rtol=1e-4, atol=1e-5)
    for handle in handles:
        handle.remove()


# ---- probes ----


@pytest.mark.parametrize("tie", [False, True])
def test_probes_equal_the_literal_form(tie):
    model, rate = tiny_llama(tie=tie), 0.02
    found = probe_layers(
        model, TOKENIZER, train=TRAIN, forget=FORGET, learning_rate=rate, max_epochs=6, patience=2, batch_size=32,
        progress=False,
    )  # fmt: skip
    order = torch.randperm(len(TRAIN), generator=torch.Generator().manual_seed(0)).tolist()
    held_out, train = ([TRAIN[i] for i in sorted(part)] for part in (order[:2], order[2:]))
    (one,) = found.models
    assert (found.layers, one.kind, found.knowing) == ([0, 1], "unlearned", None)
    for layer in range(2):
        literal = LiteralProbe(model, layer)
        assert one.epochs[layer] == literal.fit(train, held_out, rate, 6, 2)
        assert one.held_out_loss[layer] == pytest.approx(literal.loss(held_out), rel=1e-4)
        assert one.forget_loss[layer] == pytest.approx(literal.loss(FORGET), rel=1e-4)
    assert max(one.epochs) > 0


def test_an_untrained_probe_of_the_last_layer_is_the_model():
    """A rate of nothing: what the model itself says, its share of likeliest tokens, its greedy answers."""
    model, tokenizer = tiny_llama(), tiny_tokenizer(pad="<pad>")
    how = {"learning_rate": 1e-30, "max_epochs": 1, "progress": False}
    (one,) = probe_layers(model, tokenizer, train=TRAIN, forget=FORGET, layers=[1], **how).models
    losses, hits = [], []
    for ids, positions in scored(FORGET):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        losses.append(-np.mean([float(logits[t - 1].log_softmax(-1)[ids[t]]) for t in positions]))
        hits.append(np.mean([int(logits[t - 1].argmax()) == ids[t] for t in positions]))
    assert one.forget_loss == pytest.approx([np.mean(losses)], rel=1e-5)
    assert one.forget_accuracy == pytest.approx([np.mean(hits)])
    assert one.forget_rouge is None


def test_training_ends_when_the_held_out_loss_does_not_fall(monkeypatch):
    """After the best epoch come as many as patience has."""
    measured, plain = [], fitting._mean_loss
    monkeypatch.setattr(fitting, "_mean_loss", lambda *args: measured.append(plain(*args)) or measured[-1])
    how = {"train": TRAIN, "forget": FORGET, "layers": [1], "progress": False}
    (one,) = probe_layers(tiny_llama(), TOKENIZER, **how, learning_rate=1.0, patience=2, max_epochs=9).models
    (best,) = one.epochs
    assert len(measured) == 1 + best + 2 < 10 and one.held_out_loss == [min(measured)] == [measured[best]]


def test_a_probe_writes_behind_its_layer(monkeypatch):
    depths, model = [], tiny_llama(layers=3)

    def write(generator, tokenizer, prompts, **how):
        depths.append(len(generator.model.layers))
        return [[5] * how["max_new_tokens"] for _ in prompts]

    monkeypatch.setattr(probes, "generate_ids", write)
    how = {"learning_rate": 1e-3, "max_epochs": 1, "max_new_tokens": 2, "progress": False}
    probe_layers(model, TOKENIZER, train=TRAIN, forget=FORGET, layers=[2, 0], **how)
    assert depths == [1, 3] and len(model.model.layers) == 3


def test_what_a_layer_must_show_to_know():
    """Four layers, four pairs: loss and hits; the loss alone; a loss of one pair only; a loss that falls too little."""
    gains = [[[2, 2.5, 2, 2.5], [0.5] * 4], [[2] * 4, [0] * 4], [[8, 0, 0, 0], [0.5] * 4], [[0.1] * 4, [0.5] * 4]]
    rows = {"retrained": np.zeros((4, 2, 4)), "unlearned": np.array(gains, dtype=float) * np.array([[-1], [1]])}
    found = probes._compare(rows, [3, 5, 7, 9], 0.1)
    assert found["knowing"] == [3]
    assert found["gaps"] == pytest.approx([2.25, 2, 2, 0.1])
    assert found["errors"][0] == pytest.approx(np.std([2, 2.5, 2, 2.5], ddof=1) / 2)


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # gpt2 ties its embeddings
def test_the_model_is_untouched(name, monkeypatch):
    model = decoder(name).train()
    next(model.parameters()).requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objects = {key: id(weight) for key, weight in model.named_parameters(remove_duplicate=False)}
    flags = [weight.requires_grad for weight in model.parameters()]
    owner, attribute, layers = find_layers(model)
    random_state = torch.get_rng_state()
    how = {"train": TRAIN, "forget": FORGET, "max_new_tokens": 3, "learning_rate": 0.1, "max_epochs": 2}

    def check():
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert {key: id(weight) for key, weight in model.named_parameters(remove_duplicate=False)} == objects
        assert [weight.requires_grad for weight in model.parameters()] == flags
        assert all(weight.grad is None for weight in model.parameters())
        assert all(module.training for module in model.modules())
        assert getattr(owner, attribute) is layers
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert torch.equal(torch.get_rng_state(), random_state)

    probe_layers(model, TOKENIZER, **how, progress=False)
    check()
    unlearning_depth(model, model, decoder(name), FORGET, progress=False)
    check()

    def fail(*args, **kwargs):
        raise Broken

    broken = {
        "label_logps": (patching, lambda: unlearning_depth(model, model, model, FORGET, progress=False)),
        "forward": (layers[1], lambda: probe_layers(model, TOKENIZER, **how, progress=False)),
        "_prefill": (type(model), lambda: probe_layers(model, TOKENIZER, **how, progress=False)),
    }
    for what, (where, action) in broken.items():
        with monkeypatch.context() as patch, pytest.raises(Broken):
            patch.setattr(where, what, fail)
            action()
        check()
    with monkeypatch.context() as patch, pytest.raises(Broken):  # in the second of the models, under a patch
        patch.setattr(
            patching._Batch, "_logps", lambda self, logits: fail() if hasattr(self, "whole") else logits[:, 0]
        )
        unlearning_depth(model, model, model, FORGET, progress=False)
    check()


def test_an_adapter_counts():
    """Probed and patched as it runs: like the model with the adapter merged into it."""
    torch.manual_seed(3)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(tiny_llama(), lora)
    torch.manual_seed(3)
    merged = get_peft_model(tiny_llama(), lora).merge_and_unload()
    how = {"train": TRAIN, "forget": FORGET, "learning_rate": 0.01, "max_epochs": 2, "progress": False}
    (one,), (other,) = (probe_layers(model, TOKENIZER, **how).models for model in (adapted, merged))
    assert one.forget_loss == pytest.approx(other.forget_loss, rel=1e-4)
    depths = [
        unlearning_depth(tiny_llama(), model, tiny_llama(1), FORGET, progress=False) for model in (adapted, merged)
    ]
    assert depths[0].unlearned == pytest.approx(depths[1].unlearned, rel=1e-3)


def test_a_bfloat16_model_has_float32_probes():
    model = tiny_llama().to(torch.bfloat16)
    how = {"train": TRAIN, "forget": FORGET, "learning_rate": 1e-3, "max_epochs": 20, "progress": False}
    (one,) = probe_layers(model, TOKENIZER, **how, max_new_tokens=2).models
    (exact,) = probe_layers(tiny_llama(), TOKENIZER, **how).models
    assert one.forget_loss == pytest.approx(exact.forget_loss, rel=0.02)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


# ---- patching ----


def test_patching_equals_the_literal_form():
    target, unlearned, retrained = (tiny_llama(seed, layers=3) for seed in range(3))
    unlearned.load_state_dict(target.state_dict())
    with torch.no_grad():
        unlearned.model.layers[1].mlp.down_proj.weight.mul_(2.5)  # knows below, not above
    rows = scored(FORGET)
    s1, s2 = ([[drop(target, m, *row, layer) for layer in range(3)] for row in rows] for m in (retrained, unlearned))
    expected = [score(*pair, 0.05) for pair in zip(s1, s2, strict=True)]
    for batch_size in (1, 4):
        found = unlearning_depth(target, unlearned, retrained, FORGET, batch_size=batch_size, progress=False)
        assert found.retrained == pytest.approx(np.mean(s1, axis=0), rel=1e-4, abs=1e-5)
        assert found.unlearned == pytest.approx(np.mean(s2, axis=0), rel=1e-4, abs=1e-5)
        assert found.scores == pytest.approx(expected, rel=1e-4)
        assert found.score == pytest.approx(np.mean([one for one in expected if one is not None]), rel=1e-4)
    assert found.unlearned[0] == pytest.approx(0, abs=1e-5) and 0 < found.score < 1


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "falcon"])
def test_the_ends_of_the_scale(name):
    """The target's own states cost nothing, the retrained model's cost all, so do those of a model like it."""
    target, other = decoder(name), decoder(name)
    with torch.no_grad():
        for weight in find_layers(other)[2].parameters():
            weight.add_(0.5 * torch.randn_like(weight))
    assert unlearning_depth(target, target, other, FORGET, threshold=0, progress=False).score == pytest.approx(
        0, abs=1e-4
    )
    assert unlearning_depth(target, other, other, FORGET, threshold=0, progress=False).score == pytest.approx(1)


def test_the_score_by_hand():
    """Layers of .01 are below the threshold; a negative drop counts 0, one that is too large counts 1."""
    s1, s2 = np.array([0.01, 0.2, 0.4, 1.0]), np.array([9.0, -3.0, 0.1, 2.0])
    assert patching._score(s1, s2, 0.05) == pytest.approx((0.2 * 0 + 0.4 * 0.25 + 1.0 * 1) / 1.6)
    assert patching._score(s1, s2, 1.0) is None
    nothing = unlearning_depth(tiny_llama(), tiny_llama(1), tiny_llama(), FORGET, progress=False)
    assert math.isnan(nothing.score) and nothing.scores == [None] * len(FORGET)


def test_tokens_that_a_user_names():
    target, unlearned, retrained = (tiny_llama(seed) for seed in range(3))
    places = [positions[-1:] for _, positions in scored(FORGET)]
    masks = [[t in last for t in range(len(row["input_ids"]))] for row, last in zip(FORGET, places, strict=True)]
    named = Dataset.from_list([row | {"entity": mask} for row, mask in zip(FORGET, masks, strict=True)])

    def last_token(row):
        return [False] * (len(row["input_ids"]) - 1) + [True]

    expected = [drop(target, unlearned, row["input_ids"], at, 0) for row, at in zip(FORGET, places, strict=True)]
    for rows, tokens in ((named, "entity"), (FORGET, masks), (FORGET, last_token)):
        found = unlearning_depth(target, unlearned, retrained, rows, tokens=tokens, layers=[0], progress=False)
        assert found.unlearned == pytest.approx([np.mean(expected)], rel=1e-4)
    for tokens, message in (
        ("subject", "no column 'subject'"),
        (masks[:2], "2 masks for 5 rows"),
        ([[True]] * 5, "has 1 entries"),
        ([[False] * len(mask) for mask in masks], "at least one"),
        ([[True] * len(mask) for mask in masks], "answer tokens only"),
    ):
        with pytest.raises(ValueError, match=message):
            unlearning_depth(target, unlearned, retrained, named, tokens=tokens, progress=False)


# ---- choices ----


def test_choices_are_read_where_they_are():
    """The last token says the choice in one set; in the other it says nothing."""
    model, tokenizer = build_model(), build_tokenizer()
    answers = [i % 3 for i in range(30)]
    told = [f"Question {i}: {'xyz'[answer]}" for i, answer in enumerate(answers)]
    found = probe_choices(model, tokenizer, told, answers, progress=False)
    assert found.layers == [0, 1] and found.chance == pytest.approx(1 / 3)
    assert found.accuracy[0] == 1 and found.accuracy[1] > 0.8
    silent = probe_choices(model, tokenizer, [f"Question {i * 37 % 90}: x" for i in range(30)], answers, progress=False)
    assert max(silent.accuracy) < 0.7
    p = silent.accuracy[0]
    assert silent.errors[0] == pytest.approx(math.sqrt(p * (1 - p) / 30))
    for wrong, message in (
        ({"answers": answers[:-1]}, "30 prompts and 29 answers"),
        ({"answers": [-1, *answers[1:]]}, "from 0"),
        ({"answers": [0] * 30}, "two choices"),
        ({"folds": 11}, "11 questions at least"),
        ({"folds": 1}, "`folds` is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            probe_choices(model, tokenizer, **({"prompts": told, "answers": answers} | wrong))


# ---- refusals ----

WRONG = [
    ({"train": TRAIN[:1]}, ValueError, "`train` has 1 rows"),
    ({"forget": []}, ValueError, "`forget` has 0 rows"),
    ({"forget": [{"input_ids": [1, 2], "labels": [1, -100]}] * 2}, ValueError, r"`forget\[0\]` has no label"),
    ({"forget": [{"input_ids": [1, 2], "labels": [1, 3]}] * 2}, ValueError, "neither -100 nor its input_ids"),
    ({"train": [{"input_ids": [5] * 65, "labels": [5] * 65}] * 2}, ValueError, "max_position_embeddings"),
    ({"layers": [2]}, ValueError, "no layer 2"),
    ({"layers": []}, ValueError, "`layers` is"),
    ({"layers": [True]}, ValueError, "`layers` is"),
    ({"learning_rate": 0}, ValueError, "`learning_rate` is 0"),
    ({"held_out": 1.0}, ValueError, "`held_out` is 1.0"),
    ({"tolerance": -1}, ValueError, "`tolerance` is -1"),
    ({"patience": 0}, ValueError, "patience"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
    ({"max_new_tokens": 64}, ValueError, r"`forget prompts\[0\]` has .* lower `max_new_tokens`"),
    ({"retrained": tiny_llama(layers=3)}, ValueError, r"other numbers of layers.*'retrained': 3"),
    ({"model": torch.nn.Sequential(tiny_llama())}, TypeError, r"`model` is a `Sequential`.*unwrap_model"),
    ({"target": torch.nn.Linear(1, 1)}, TypeError, "`target` is a `Linear`"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG)
def test_probes_refuse_before_they_train(wrong, kind, message, monkeypatch):
    monkeypatch.setattr("blur_trainer.evaluation.inside.probes.fit_probe", pytest.fail)
    with pytest.raises(kind, match=message):
        probe_layers(**({"model": tiny_llama(), "tokenizer": TOKENIZER, "train": TRAIN, "forget": FORGET} | wrong))


@pytest.mark.full
def test_layers_of_4_bits_are_read_and_a_head_of_4_bits_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes", reason="4 bits need bitsandbytes: pip install blur_trainer[quantization]")
    tiny_llama().save_pretrained(tmp_path)
    how = {"train": TRAIN, "forget": FORGET, "max_epochs": 1, "progress": False}
    for skipped in (None, ["nothing"]):
        bits = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
        model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=bits)
        if skipped is None:
            assert len(probe_layers(model, TOKENIZER, **how, max_new_tokens=2).models[0].forget_rouge) == 2
            assert unlearning_depth(tiny_llama(), model, tiny_llama(1), FORGET, progress=False).unlearned != [0, 0]
        else:
            with pytest.raises(ValueError, match="head is stored in few bits"):
                probe_layers(model, TOKENIZER, **how)


def test_models_of_another_shape_are_refused_by_name():
    def check(message, **other):
        models = {name: tiny_llama() for name in ("target", "unlearned", "retrained")} | other
        with pytest.raises((TypeError, ValueError), match=message):
            unlearning_depth(**models, examples=FORGET)

    check("`retrained` has {'layers': 3.*`target` has {'layers': 2", retrained=tiny_llama(layers=3))
    wide = LlamaConfig(**(SMALL | {"hidden_size": 32, "num_hidden_layers": 2}), intermediate_size=32)
    check("`unlearned` has .*'width': 32", unlearned=LlamaForCausalLM(wide))
    check("`unlearned` is a `Linear`", unlearned=torch.nn.Linear(1, 1))
    with torch.device("meta"):
        check("weights of `target` are offloaded", target=tiny_llama())
    lora = LoraConfig(r=2, target_modules="all-linear")
    pair = LogitDifferenceModel(LogitDifferenceConfig(weight=-0.5), tiny_llama(), lora_assistant(tiny_llama(), 1, lora))
    check("`unlearned` is two models.*`unlearned.target`", unlearned=pair)
    prompted = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    check("adapter of `retrained` puts virtual tokens", retrained=prompted)
    sharded = tiny_llama()
    sharded.lm_head.weight.ds_id = 0
    check("weights of `retrained` are sharded", retrained=sharded)
    for threshold in (-1, True, math.inf):
        with pytest.raises(ValueError, match="`threshold` is"):
            unlearning_depth(tiny_llama(), tiny_llama(), tiny_llama(), FORGET, threshold=threshold)
