"""Resuming, skipping a step, loading by name and saving, on every engine with two processes (gloo, CPU).

And under DDP, that two processes give the weights and the log of one process with the same windows.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from support import ddp_worker, reference
from support.cases import chosen
from support.engine_worker import ENGINES, alternatives
from support.models import tiny_llama
from support.parity import DEFAULT_TOLERANCE, FORGET, LEARNING_RATE, RETAIN, STEPS, WINDOW
from support.processes import SUPPORT, forked
from transformers import AutoModelForCausalLM

from blur_trainer.data.pairing import PairedDataset

#: the parity cells cover what is special about these
FULL = ("fsdp2_lean", "zero1", "zero2_offload")
EVERY = [pytest.param(name, marks=pytest.mark.full) if name in FULL else name for name in ENGINES]


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    forked(SUPPORT / "engine_worker.py", str(folder), ";".join(dict.fromkeys(["ddp", *chosen(request, "engine")])))
    return folder


def relative(got, want, start):
    distance = sum((got[name].double() - want[name].double()).square().sum() for name in want)
    moved = sum((want[name].double() - start[name].double()).square().sum() for name in want)
    assert got.keys() == want.keys() and moved > 1e-4
    return (distance / moved).sqrt().item()


START = dict(tiny_llama(0).named_parameters())
pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("engine", EVERY)
def test_a_resumed_training_is_the_uninterrupted_one(folder, engine):
    straight, resumed = (load_file(folder / f"{engine}-{kind}.safetensors") for kind in ("straight", "resumed"))
    assert relative(resumed, straight, START) == 0.0
    one, two = json.loads((folder / f"{engine}-logs.json").read_text())
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two] == [1, 2, 3, 4]
    for a, b in zip(one, two, strict=True):
        assert {key: a[key] for key in a if "grad" in key or "loss" in key} == {
            key: b[key] for key in b if "grad" in key or "loss" in key
        }


@pytest.mark.parametrize("engine", EVERY)
def test_shards_are_counted_by_layer_and_module(folder, engine):
    """The mask of all engines is one, and so is its summary, whatever the places of a gradient are."""
    rows = [PairedDataset(FORGET, RETAIN, seed=42)[i]["forget"] for i in range(STEPS * WINDOW)]
    model = tiny_llama(0)
    scores = reference.saliency_scores(model, rows, lambda m, some: -reference.token_mean_nll(m, some))
    kept = iter(reference.top_share(scores, 0.5))
    counts = {name: (sum(next(kept) for _ in range(p.numel())), p.numel()) for name, p in model.named_parameters()}
    summary = json.loads((folder / "straight" / f"{engine}-gru" / "mask.json").read_text())
    layer = [counts[name] for name in counts if ".layers.1." in name]
    down = [counts[name] for name in counts if "down_proj" in name]
    assert summary["kept"] == sum(count for count, _ in counts.values())
    for shares, found in ((layer, summary["by_layer"]["1"]), (down, summary["by_module"]["down_proj"])):
        assert found == sum(count for count, _ in shares) / sum(size for _, size in shares)


@pytest.mark.parametrize("engine", EVERY)
def test_what_is_saved_is_a_whole_model_of_the_trained_weights(folder, engine):
    model = AutoModelForCausalLM.from_pretrained(folder / f"{engine}-saved")
    trained = load_file(folder / f"{engine}-resumed.safetensors")
    for name, value in model.named_parameters():
        assert torch.equal(value, trained[name]), name
    assert (folder / f"{engine}-saved" / "README.md").exists()


@pytest.mark.parametrize("engine", EVERY)
def test_a_step_without_a_finite_gradient_leaves_weights_and_moments(folder, engine):
    """The reference never sees the second window, but its schedule does."""
    pairs = PairedDataset(FORGET, RETAIN, seed=42)
    items = [pairs[i] for i in range(STEPS * WINDOW)]
    windows = [
        {role: [item[role] for item in items[k : k + WINDOW]] for role in ("forget", "retain")} for k in (0, 2 * WINDOW)
    ]
    want = reference.train(
        tiny_llama(0),
        windows,
        {"forget": lambda m, rows: -reference.token_mean_nll(m, rows), "retain": reference.token_mean_nll},
        lambda f, r: f + 2.0 * r,
        learning_rates=[LEARNING_RATE] * 2,
    )
    got = load_file(folder / f"{engine}-skipped.safetensors")
    assert relative(got, dict(want.named_parameters()), START) <= DEFAULT_TOLERANCE


@pytest.mark.parametrize("engine", EVERY)
def test_a_model_given_by_name_with_its_own_reference(folder, engine):
    want, got = (load_file(folder / f"{kind}-named.safetensors") for kind in ("ddp", engine))
    assert relative(got, want, START) <= DEFAULT_TOLERANCE


@pytest.mark.parametrize("engine", EVERY)
def test_every_process_prefers_and_replays_and_steers_towards_the_same_as_one_alone(folder, engine):
    first, second = json.loads((folder / f"{engine}-2-answers.json").read_text())
    assert first == second and len(first["texts"]) > 8 and any(first["vector"])
    if not (folder / "alone").exists():
        alternatives("ddp", folder / "alone")
    (alone,) = json.loads((folder / "alone" / "ddp-1-answers.json").read_text())
    assert alone["texts"] == first["texts"] and alone["vector"] == pytest.approx(first["vector"], abs=1e-4)


# ---- two processes and one ----


@pytest.fixture(scope="module")
def alone(folder):
    """What two processes did in `folder`, done by one."""
    for name in ddp_worker.CASES:
        ddp_worker.main(name, str(folder))


@pytest.mark.parametrize("name", ddp_worker.CASES)
def test_weights_of_two_processes_equal_those_of_one(folder, alone, name):
    one, two = (load_file(folder / f"{name}-{count}.safetensors") for count in (1, 2))
    start = dict(tiny_llama(0).named_parameters())
    moved = max((value - start[key]).abs().max() for key, value in one.items())
    assert moved > 1e-3, "nothing moved: the comparison would prove nothing"
    error = max((one[key] - two[key]).abs().max() for key in one)
    assert one.keys() == two.keys()
    assert error / moved < 2e-4


@pytest.mark.parametrize("name", ddp_worker.CASES)
def test_the_log_is_that_of_the_whole_batch(folder, alone, name):
    one, two = (json.loads((folder / f"{name}-{count}.json").read_text()) for count in (1, 2))
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        for key in (
            "loss",
            "loss/forget",
            "loss/retain",
            "grad/forget_norm",
            "grad/retain_norm",
            "grad/cosine",
            "grad_norm",
        ):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), key
