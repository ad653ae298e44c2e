"""Several GPUs, without one: tests/support/fake_cuda.py makes processes believe in them.

Every run: one rank of four in this process, device by device. `pytest -m full`: the examples, two and four processes.
"""

import importlib
import json
import socket
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.example_runs import prepared
from support.fake_cuda import FakeCuda, home
from support.models import examples, tiny_llama
from support.processes import SUPPORT, torchrun
from support.runs import settings
from transformers import AutoModelForCausalLM
from trl import ModelConfig

import blur_trainer as bt
from blur_trainer.evaluation.distributed import in_shares
from blur_trainer.scripts import compare, running
from blur_trainer.scripts.loading import ModelLoader
from blur_trainer.toy import memorize as memorizing
from blur_trainer.toy.model import tiny_llama as toy_llama
from blur_trainer.toy.model import train_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="the fake is of a machine without a GPU")


@contextmanager
def on_gpus(gpus, local_rank=None):
    """This process on a host with GPUs; with a rank it is the only process of a group, as if it ran on that GPU."""
    fake = FakeCuda(gpus).install()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the fake is one thread's
        if local_rank is not None:
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                port = probe.getsockname()[1]
            place = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": local_rank, "MASTER_ADDR": "localhost"}
            for name, value in (place | {"MASTER_PORT": port}).items():
                patch.setenv(name, str(value))
        try:
            with fake:
                yield fake
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)
            fake.uninstall()


@pytest.fixture
def rank():
    with on_gpus(4, local_rank=2) as fake:
        yield fake


def used(fake):
    """All GPUs that were made current, or that a tensor went to."""
    return {index for (index,) in fake.of("set_device") + fake.of("to")}


# ---- the fake ----


def test_the_fake_refuses_what_gpus_refuse(rank):
    settings("unused", use_cpu=False)  # makes the process group
    here, there = torch.ones(2, device="cuda"), torch.ones(2, device="cuda:1")
    assert (str(here.device), str(there.device), (here * 2).is_cuda) == ("cuda:2", "cuda:1", True)
    assert not here.cpu().is_cuda and here.tolist() == [1, 1]
    assert not rank.of("mixed")
    _ = here + there, here * torch.ones(2), here * torch.tensor(3.0)  # a number may be anywhere
    assert len(rank.of("mixed")) == 2
    with pytest.raises(TypeError, match="numpy"):
        here.numpy()
    with pytest.raises(RuntimeError, match="device type cpu"):
        dist.all_reduce(torch.ones(2))
    with pytest.raises(RuntimeError, match="while 2 is current"):
        dist.all_reduce(there)
    with pytest.raises(RuntimeError, match="ordinal"):
        here.to("cuda:4")
    with pytest.raises(RuntimeError, match="DataParallel"):
        torch.nn.DataParallel(torch.nn.Linear(1, 1))


# ---- one rank of four ----


def test_a_rank_trains_and_evaluates_on_its_gpu(rank, tmp_path):
    seen = []

    def measure(model):
        seen.append(next(model.parameters()).device)
        return {"sum": sum(in_shares(model, [[0], [1]], lambda indices: indices, None))}

    args = settings(tmp_path, use_cpu=False, max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer = bt.BLURTrainer(tiny_llama(layers=1), args, examples(2), examples(2, 1), benchmarks={"mine": measure})
    trainer.train()
    trainer.save_model()
    assert rank.of("group") == [["nccl"]] and not rank.of("data_parallel")
    assert used(rank) == {2} and not rank.of("mixed")
    assert [str(device) for device in seen] == ["cuda:2"]
    objects = [event for event in rank.of("collective") if "object" in event[0]]
    assert objects and all(current == 2 and tensors == 0 for _, current, tensors in objects)


def test_memorizing_leaves_the_rank_its_gpu(rank, tmp_path):
    """`LOCAL_RANK=-1` and device 0 would be current for the next collective: NCCL finds the GPU taken twice."""
    args = settings(tmp_path, use_cpu=False)
    tokenizer = train_tokenizer(["a"])
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4)
    model = toy_llama(tokenizer, hidden_size=8, num_layers=1, num_heads=1)
    memorizing.memorize(model, tokenizer, rows, num_train_epochs=1, disable_tqdm=True)
    assert {home(parameter) for parameter in model.parameters()} == {None}
    assert rank.current == 2 and used(rank) == {2} and not rank.of("data_parallel")
    assert str(PartialState().device) == str(args.device) == "cuda:2" and PartialState().num_processes == 1
    dist.all_reduce(torch.ones(1, device=PartialState().device))


def test_evaluated_models_are_on_the_rank_s_gpu(rank, tmp_path):
    """Also an adapter, which PEFT would read onto the first GPU in every process."""
    args = settings(tmp_path / "uld", bt.ULDConfig, use_cpu=False, num_assistant_layers=1)
    tiny_llama().save_pretrained(tmp_path / "target")
    silent = {"augment_forget": "none", "augment_retain": "none"}
    bt.ULDTrainer(str(tmp_path / "target"), args, examples(2), examples(2, 1), **silent).save_model()
    load = ModelLoader(args, ModelConfig(dtype="float32"))
    for folder in ("target", "uld"):
        model = load(str(tmp_path / folder))
        assert {str(parameter.device) for parameter in model.parameters()} == {"cuda:2"}
        model(torch.tensor([[1, 5]], device=model.device))
    assert used(rank) == {2} and not rank.of("mixed")


def test_merging_takes_no_other_gpu(rank, tmp_path):
    rank.set_device(2)
    tiny_llama(layers=1).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "lora")
    bt.merge_and_save(str(tmp_path / "lora"), str(tmp_path / "merged"))
    assert used(rank) == {2}


# ---- what only some processes do ----


class Processes(SimpleNamespace):
    """A `PartialState` that counts how often it waits for the others."""

    waits = 0

    def wait_for_everyone(self):
        self.waits += 1


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize("exists", [True, False])
def test_all_processes_wait_for_a_memorized_model(tmp_path, monkeypatch, is_main, exists):
    """One that finds the folder just made by the main process must wait too, or the next collective has no partner."""
    made, process, tokenizer = [], Processes(is_main_process=is_main), train_tokenizer(["a"])
    monkeypatch.setattr(memorizing, "PartialState", lambda: process)
    monkeypatch.setattr(memorizing, "memorize", lambda model, *args, **kwargs: (made.append(1), model)[1])
    monkeypatch.setattr(memorizing, "tiny_llama", lambda *args, **kwargs: tiny_llama(layers=1))
    if exists:
        (tmp_path / "target").mkdir()
    memorizing.memorized(tmp_path / "target", tokenizer, None)
    assert process.waits == 1 and len(made) == (is_main and not exists)


def test_all_processes_wait_until_a_trained_model_is_written(tmp_path, monkeypatch):
    process, order = Processes(), []
    trainer = SimpleNamespace(args=SimpleNamespace(resume_from_checkpoint=None, output_dir=tmp_path, disable_tqdm=True))
    for name in ("train", "remove_callback", "add_callback", "save_model", "save_state"):
        setattr(trainer, name, lambda *args, name=name, **kwargs: order.append((name, process.waits)))
    monkeypatch.setattr(running, "PartialState", lambda: process)
    running.train_and_save(trainer, "label")
    assert order[-2:] == [("save_model", 0), ("save_state", 0)] and process.waits == 1


# ---- several GPUs and no launcher ----


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = ("compare", "run_muse", "run_tofu", "run_wmdp")
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["run_muse", "run_tofu", "run_wmdp", "compare"])
def test_a_script_without_a_launcher_says_what_to_do(example, tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", "--output_dir", str(tmp_path / "out")])
    remedy = "--launcher 'accelerate launch'" if name == "compare" else f"`accelerate launch examples/{name}.py`"
    with on_gpus(4), pytest.raises(ValueError, match="4 GPUs are visible") as raised:
        example(name).main()
    assert remedy in str(raised.value) and "CUDA_VISIBLE_DEVICES=0" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_one_gpu_or_a_model_spread_over_them_needs_no_launcher(tmp_path):
    for gpus, spread in ((1, None), (4, {"device_map": "auto"})):
        with on_gpus(gpus):
            running.check_launch(settings(tmp_path, use_cpu=False, model_init_kwargs=spread), "")
    with on_gpus(4), pytest.raises(ValueError, match="4 GPUs"):
        running.check_launch(settings(tmp_path, use_cpu=False, model_init_kwargs={"dtype": "auto"}), "")


def test_comparing_with_a_launcher_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare.py", "--output_dir", str(tmp_path), "--launcher", "accelerate launch"])
    with on_gpus(4):
        assert compare.parse()[0].launcher == "accelerate launch"


def test_the_trainer_without_a_launcher_says_what_to_do(tmp_path):
    with on_gpus(4), pytest.raises(NotImplementedError, match=r"DataParallel.*accelerate launch.*CUDA_VISIBLE_DEVICES"):
        bt.BLURTrainer(tiny_llama(layers=1), settings(tmp_path, use_cpu=False), examples(2), examples(2, 1))


# ---- the examples, launched ----


RUNS = {
    "muse, stages": ("run_muse", 2, ["--sequence", "--max_steps", "1"]),
    "muse, attacks": ("run_muse", 2, ["--robustness", "--no_baseline", "--max_steps", "1"]),
    "tofu, ULD": ("run_tofu", 2, ["--method", "uld", "--compare", "npo", "--max_steps", "2"]),
    "tofu, four": ("run_tofu", 4, ["--method", "blur-npo", "--compare", "uld", "--max_steps", "2"]),
    "wmdp": ("run_wmdp", 2, ["--no_robustness", "--max_steps", "2"]),
}


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("run", RUNS)
def test_every_rank_takes_the_same_path_on_its_own_gpu(run, tmp_path, monkeypatch):
    name, ranks, options = RUNS[run]
    arguments = prepared(name, tmp_path, monkeypatch)
    script = [str(ranks), str(tmp_path), str(EXAMPLES / f"{name}.py"), *arguments, *options]
    torchrun(SUPPORT / "fake_cuda.py", *script, processes=ranks)
    found = [Recorded(tmp_path / f"{rank}.json") for rank in range(ranks)]
    for rank, events in enumerate(found):
        assert used(events) == {rank}, "another rank's GPU"
        assert {tuple(ids) for (ids,) in events.of("ddp")} == {(rank,)} and not events.of("data_parallel")
        assert events.of("group") == [["nccl"]] and not events.of("mixed")
        objects = [event for event in events.of("collective") if "object" in event[0]]
        assert len(objects) > 5 and all(event[1:] == [rank, 0] for event in objects)
        assert events.path() == found[0].path(), "another sequence of collectives"
        assert bool(events.of("wrote")) == (rank == 0)
    assert (tmp_path / "run" / "metrics.json").is_file()
    if name != "run_muse":  # whose few texts are repeated on each rank to fill the batch, as Trainer does
        assert len({json.dumps(events.of("forward")) for events in found}) > 1, "the same data on all ranks"


class Recorded:
    """What a rank left behind."""

    def __init__(self, path):
        self.events = json.loads(path.read_text())

    of = FakeCuda.of

    def path(self):
        """Collectives with what must agree over the ranks, and the passes in which DDP has its own."""
        of_objects, both = (lambda name: "object" in name or name == "barrier"), []
        for kind, *what in self.events:
            if kind == "collective":
                both.append(what[:1] if of_objects(what[0]) else what)
            elif kind == "forward":
                both.append([kind, what[0]])
        return both
