"""What the estimate says of engines: shares, dtypes, copies beside the slots; with `full` against two processes."""

import json
from types import SimpleNamespace

import pytest
from support.models import tiny_llama
from support.processes import SUPPORT, forked
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from blur_trainer.memory.estimate import estimate_memory
from blur_trainer.trainers.blur import BLURConfig

CELLS = [
    *("ddp:sum", "fsdp2:sum", "fsdp2:bf16", "zero0:sum", "zero1:sum", "zero1:bf16", "zero2:bf16", "zero3:sum"),
    *("zero3:bf16", "zero1_fp32_sums:bf16", "zero2_fp32_sums:bf16"),
]


def estimate(config=None, *, processes=8, **kwargs):
    """Short examples, so that gradients outweigh activations; `config`: DeepSpeed's."""
    args = BLURConfig(
        "unused",
        use_cpu=True,
        report_to="none",
        max_length=2,
        per_device_train_batch_size=1,
        bf16=kwargs.pop("bf16", False),
    )
    if config is not None:
        args.hf_deepspeed_config = SimpleNamespace(config=config)
    return estimate_memory(tiny_llama(), args, processes, reference="none", **kwargs)


def zero(stage, **kwargs):
    return {"zero_optimization": {"stage": stage}} | kwargs


def trained():
    return sum(p.numel() for p in tiny_llama().parameters())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_under_bf16_deepspeed_casts_weights_and_gradients(stage):
    """Then it also updates float32 weights, which autocast has no need of."""
    n = trained()
    result, exact = estimate(zero(stage), bf16=True), estimate(zero(stage))
    assert result.forget_slot == pytest.approx(2 * n / 8, abs=1)
    assert exact.forget_slot == pytest.approx(4 * n / 8, abs=1)
    assert result.parameters == pytest.approx(exact.parameters / 2, abs=1)
    assert result.optimizer == exact.optimizer == round(12 * n / 8)
    assert result.parameters == estimate(zero(stage), dtype="bfloat16").parameters
    assert estimate(bf16=True).forget_slot == 4 * n  # autocast


def test_float32_sums_are_kept_in_float32():
    n, sums = trained(), {"data_types": {"grad_accum_dtype": "fp32"}}
    assert estimate(zero(2, **sums), bf16=True).forget_slot == pytest.approx(4 * n / 8, abs=1)
    assert estimate(zero(1, **sums), bf16=True).forget_slot == 4 * n  # whole, on each process
    assert estimate(zero(1), bf16=True).forget_slot == pytest.approx(2 * n / 8, abs=1)


def test_the_engines_own_gradients_are_beside_the_slots():
    """ZeRO 3 keeps its partitions all the time; ZeRO 2's are there until a slot is copied from them."""
    n = trained()
    share = pytest.approx(4 * n / 8, abs=2)
    two, three = estimate(sharding="zero2"), estimate(sharding="zero3")
    assert two.gradients == share and three.gradients == 2 * two.gradients == 2 * two.forget_slot
    height = two.total - two.parameters - two.optimizer
    assert height == 3 * two.gradients  # both slots, and what the second one is copied from
    assert three.total - three.parameters - three.optimizer >= 3 * two.gradients
    assert estimate(sharding="fsdp").total < three.total - three.optimizer / 3  # no copy, no float32 weights
    for sharding in ("zero2_offload", "zero3_offload"):  # slots are where the partitions are
        assert estimate(sharding=sharding).gradients == estimate(sharding=sharding).forget_slot == 0


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"processes": 1, "device": "cuda"}, ()),
        ({"processes": 1, "device": "cpu", "sharding": "zero2"}, ()),
        ({"device": "cuda", "sharding": "zero3"}, ("8 processes", "the engine's sharding")),
        ({"processes": 1, "device": "cuda", "bits": 4}, ("4-bit weights",)),
        ({"processes": 1, "device": "cuda", "optim": "adamw_8bit"}, ("the state of adamw_8bit",)),
    ],
)
def test_what_no_gpu_has_shown_is_said(kwargs, words):
    kwargs = dict(kwargs)
    args = BLURConfig("unused", use_cpu=True, report_to="none", optim=kwargs.pop("optim", "adamw_torch"))
    result = estimate_memory(tiny_llama(), args, kwargs.pop("processes", 8), **kwargs)
    assert result.unchecked == words
    last = str(result).splitlines()[-1]
    assert last == f"not checked on a GPU: {', '.join(words)}" if words else last.startswith("total")


def test_under_zero_3_nothing_is_partitioned():
    """With such a configuration alive, transformers partitions each model that is made. The estimate's is on meta."""
    config = HfDeepSpeedConfig(zero(3, train_micro_batch_size_per_gpu=1))
    try:
        args = BLURConfig("unused", use_cpu=True, report_to="none", max_length=2)
        args.hf_deepspeed_config = config
        args.deepspeed_plugin = SimpleNamespace(set_deepspeed_weakref=lambda: set_hf_deepspeed_config(config))
        result = estimate_memory(tiny_llama().config, args, 8, reference="none")
        assert is_deepspeed_zero3_enabled()  # again
    finally:
        unset_hf_deepspeed_config()
    assert result.forget_slot == pytest.approx(4 * trained() / 8, abs=1)


@pytest.mark.full
@pytest.mark.distributed
def test_slots_hold_what_is_estimated(tmp_path):
    """DeepSpeed pads its partitions; FSDP2 its shards."""
    forked(SUPPORT / "slot_worker.py", str(tmp_path), ";".join(CELLS))
    found = json.loads((tmp_path / "slots.json").read_text())
    assert list(found) == CELLS
    for cell, slot in found.items():
        assert slot["held"]["forget"] == pytest.approx(slot["estimated"], rel=0.05), cell
