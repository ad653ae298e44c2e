"""Settings that nobody has chosen: what they follow from."""

import math

import pytest
from accelerate import PartialState
from support.models import tiny_llama
from support.tiny_tokenizer import tiny_tokenizer

import blur_trainer as bt
from blur_trainer.pipeline.methods import METHODS
from blur_trainer.pipeline.preparing import lora_targets, prepare
from blur_trainer.pipeline.settings import Size, derived, process_count, start_of_texts


def rows(count, length=10, prompt=4):
    return [{"input_ids": [5] * length, "labels": [-100] * prompt + [5] * (length - prompt)} for _ in range(count)]


def settings(
    method="blur",
    forget=40,
    retain=80,
    parameters=3_000_000,
    layers=8,
    positions=512,
    lora=False,
    length=10,
    processes=1,
):
    size = Size(layers, parameters, positions)
    return derived(method, size, rows(forget, length), rows(retain, length), ["Question:"], lora, processes)


def test_a_size_is_counted_without_weights():
    model = tiny_llama(layers=3)
    assert Size.of(model.config) == Size(3, sum(each.numel() for each in model.parameters()), 64)


def test_the_rate_falls_with_the_size_and_rises_for_an_adapter():
    assert settings()["learning_rate"] == settings(parameters=1000)["learning_rate"] == 1e-3
    assert settings(parameters=3_000_000_000)["learning_rate"] == pytest.approx(1e-3 * 1000**-0.4, rel=0.02)
    assert settings(lora=True)["learning_rate"] == 1e-2
    assert settings("uld")["learning_rate"] == 5e-3


@pytest.mark.parametrize(("count", "batch", "epochs"), [(1, 1, 400), (8, 8, 400), (80, 8, 40), (100_000, 8, 3)])
def test_batch_and_epochs_give_some_four_hundred_steps(count, batch, epochs):
    found = settings(forget=count)
    assert (found["per_device_train_batch_size"], found["num_train_epochs"]) == (batch, epochs)


@pytest.mark.parametrize("count", [1, 5, 8, 80, 1000, 5000])
@pytest.mark.parametrize("processes", [2, 3, 4, 8, 16])
def test_several_processes_make_the_steps_of_one(count, processes):
    """Of the same batch where it can be divided; else of the next smaller one, or of one row on each."""

    def steps(found, processes):
        return math.ceil(count / (found["per_device_train_batch_size"] * processes)) * found["num_train_epochs"]

    alone, found = settings(forget=count), settings(forget=count, processes=processes)
    whole, own = alone["per_device_train_batch_size"], found["per_device_train_batch_size"]
    assert own * processes == whole if whole % processes == 0 else own == max(1, whole // processes)
    assert steps(alone, 1) <= steps(found, processes) < steps(alone, 1) + math.ceil(count / (own * processes))
    assert {**found, **{name: alone[name] for name in ("per_device_train_batch_size", "num_train_epochs")}} == alone


def test_processes_on_cpus_are_counted_before_a_configuration_is_made(monkeypatch):
    assert process_count() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert process_count() == 4


def test_settings_of_another_number_of_processes_are_derived_anew(tmp_path, monkeypatch, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_llama().save_pretrained(tmp_path / "model")
    asked = [{"question": f"Who is {name}?", "answer": name} for name in "ABCDEFGH"]
    given = {"model_name_or_path": str(tmp_path / "model"), "forget": asked, "retain": asked, "output_dir": "out"}

    def among(processes):
        monkeypatch.setattr(PartialState(), "num_processes", processes)  # a configuration sets it anew

    def prepared(processes, **more):
        among(processes)
        return prepare({**given, "use_cpu": True, **more}).settings

    alone, two = prepared(1), prepared(2)
    assert alone["per_device_train_batch_size"] == 8 and "processes" not in alone
    assert two["per_device_train_batch_size"] == 4 and two["processes"] == 2
    among(2)
    assert (
        bt.recommended(given["model_name_or_path"], asked, asked, method="npo", level=2.0)[
            "per_device_train_batch_size"
        ]
        == 4
    )
    changed = {"derived": {**two, "learning_rate": 7e-4}}
    assert prepared(2, **changed)["learning_rate"] == 7e-4 and "derived anew" not in capsys.readouterr().err
    assert prepared(1, **changed) == alone and "derived anew" in capsys.readouterr().err


def test_lengths_are_those_of_the_rows_and_the_model():
    assert settings()["max_length"] == 10
    assert settings(length=600)["max_length"] == 512 and settings(length=600, positions=None)["max_length"] == 600
    assert settings(length=5000, positions=None)["max_length"] == 2048
    assert settings("uld")["max_length"] == 84, "paraphrases are longer than their questions"


@pytest.mark.parametrize(("retain", "replay"), [(1, 512), (400, 1200), (10_000, 2048)])
def test_replay_is_sized_by_the_retain_set(retain, replay):
    assert settings(retain=retain)["replay"] == replay


@pytest.mark.parametrize(("layers", "layer"), [(1, 0), (2, 1), (8, 2), (32, 8)])
def test_the_layer_is_a_share_of_the_depth(layers, layer):
    found = settings(layers=layers)
    kept = {"layer": layer, "skip_shared_start": True}
    assert found["retain_objective_kwargs"] == kept
    assert found["forget_objective_kwargs"] == kept
    assert "retain_objective_kwargs" not in settings("npo", layers=layers)


def test_what_breaks_more_at_first_takes_longer():
    steps = {method: settings(method)["num_train_epochs"] for method in METHODS}
    assert steps["blur"] == steps["rmu"] == 2 * steps["npo"] == 2 * steps["uld"]


@pytest.mark.parametrize(("method", "own"), [("blur", {"gamma": 0.7}), ("rmu", {})])
def test_an_adapter_gets_another_rate_and_strength(method, own):
    whole, adapter = settings(method), settings(method, lora=True)
    longer = {"learning_rate": 10 * whole["learning_rate"], "num_train_epochs": 1.5 * whole["num_train_epochs"]}
    assert adapter == {**whole, **longer, **own}


@pytest.mark.parametrize("method", METHODS)
def test_they_are_settings_of_the_method(method, tmp_path):
    """Its configuration takes them, and they make it the method."""
    found = settings(method)
    args = METHODS[method].trainer.config_class(output_dir=str(tmp_path), use_cpu=True, **found)
    assert {name: getattr(args, name) for name in METHODS[method].settings} == METHODS[method].settings
    assert args.logging_first_step and args.save_strategy == "no"
    held = args.retain_objective == "activation_match"
    assert found["replay_kwargs"].get("scrambled", 0) == (0.5 if held else 0), "targets of a likelihood are no noise"


def starts(prompts, template=False, public=None, **how):
    tokenizer = tiny_tokenizer(**how)
    made = []
    for text in prompts:
        ids = tokenizer(text)["input_ids"]
        made.append({"input_ids": [*ids, 9], "labels": [-100] * len(ids) + [9]})
    return start_of_texts(tokenizer, made, template, public)


def test_texts_start_as_all_prompts_do():
    asked = ["Question: Who painted it?\nAnswer:", "Question: Who sold it?\nAnswer:"]
    assert starts(asked) == ["Question: Who"]
    assert starts([*asked, "Question: When?\nAnswer:"]) == ["Question:"]
    assert starts(["Mara painted", "Who sold it?"]) == "retain"
    assert starts(asked[:1]) == "retain", "one prompt says nothing about others"
    assert starts(asked, template=True) == "retain"


def test_where_texts_are_hidden_they_start_with_words_of_the_template_alone():
    asked = ["Question: Who painted it?\nAnswer:", "Question: Who sold it?\nAnswer:"]
    assert starts(asked, public="Question:") == ["Question:"]
    assert starts(asked, public="Frage:") == starts(asked, public="") == "retain"


def test_texts_without_a_prompt_start_with_bos_or_as_the_retain_set_does():
    tokenizer = tiny_tokenizer(add_bos=False)
    row = {"input_ids": [7, 8], "labels": [7, 8]}
    assert start_of_texts(tokenizer, [row], False) is None
    tokenizer.bos_token = None
    assert start_of_texts(tokenizer, [row], False) == "retain"


def test_an_adapter_is_on_all_linear_layers_unless_others_are_named():
    assert lora_targets({"use_peft": True}) == {"lora_target_modules": "all-linear"}
    assert lora_targets({}) == lora_targets({"use_peft": True, "lora_target_modules": ["q_proj"]}) == {}
