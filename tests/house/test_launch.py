"""The README's launch lines from the repository root, on two CPU processes: `accelerate launch` and `deepspeed`.

A launch costs half a minute of imports on both cores, so they are behind `full`. `.ci/run` runs `deepspeed` with
run_wmdp.py, as in the README. The others: `accelerate` with run_muse.py and every file that the repository ships;
test_engines.py trains with zero2.json.

Each launch trains two steps on prepared models, and is told by its checkpoint which engine it ran on.
"""

import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from support.example_runs import FILES as WRITTEN
from support.example_runs import as_the_hub, launch, load, prepared, with_ignorant_models
from support.runs import distance, weights
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

import blur_trainer as bt
from blur_trainer.data.muse import limit_documents
from blur_trainer.gradients.deepspeed_checks import check_deepspeed
from blur_trainer.toy.model import tiny_llama, train_tokenizer
from blur_trainer.toy.wmdp import topic_lessons

ROOT = Path(__file__).parents[2]
FILES = {path.stem: path for path in sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))}
DS_CONFIGS = {path.stem: path for path in sorted((ROOT / "ds_configs").glob("*.json"))}

# ---- the files ----


def test_all_files_are_tested():
    assert set(FILES) == {"ddp", "fsdp2", "zero2", "zero3"}
    assert set(DS_CONFIGS) == {"zero1", "zero2", "zero3", "zero3_offload"}


@pytest.mark.parametrize("name", DS_CONFIGS)
@pytest.mark.parametrize("bf16", [False, True])
def test_deepspeed_takes_its_sizes_from_the_arguments(name, bf16, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    args = bt.BLURConfig(
        tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=5, max_grad_norm=0.7, bf16=bf16
    )
    settings = HfTrainerDeepSpeedConfig(str(DS_CONFIGS[name]))
    settings.trainer_config_process(args)
    settings.trainer_config_finalize(args, tiny_llama(train_tokenizer(["a"]), hidden_size=16), 10)
    assert "auto" not in json.dumps(settings.config)
    assert settings.get_value("train_micro_batch_size_per_gpu") == 3
    assert settings.get_value("gradient_accumulation_steps") == 5
    assert settings.get_value("gradient_clipping") == 0.7
    assert settings.get_value("bf16.enabled") is bf16
    assert settings.get_value("zero_optimization.stage") == int(name[4])
    assert settings.is_offload() == name.endswith("offload")
    check_deepspeed(settings.config)  # refuses what is not exact, or saves no model


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_its_files(name):
    settings = load_config_from_file(str(FILES[name]))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert settings.distributed_type.value == kinds[name] and settings.num_processes == 2
    if name == "fsdp2":
        assert settings.fsdp_config["fsdp_version"] == 2
        assert settings.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    if name.startswith("zero"):
        assert ROOT / settings.deepspeed_config["deepspeed_config_file"] == DS_CONFIGS[name]


# ---- the lines ----

ZERO = "global_step2/zero_pp_rank_1_mp_rank_00"
#: what only this engine leaves in a checkpoint: optimizer states of the second process, its part of the model
LINES = {
    "accelerate launch --config_file examples/accelerate/ddp.yaml examples/run_muse.py": {"optimizer.pt"},
    "accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/run_muse.py": {"pytorch_model_fsdp.bin"},
    "accelerate launch --config_file examples/accelerate/zero3.yaml examples/run_muse.py": {
        f"{ZERO}_optim_states.pt",
        f"{ZERO}_model_states.pt",
    },
}
TRACES = set().union(*LINES.values())
SHORT = (
    "--recipe paper --max_documents 2 --max_steps 2 --eval_strategy no --no_baseline --save_strategy steps "
    "--save_steps 2"
)


def command(line: str) -> list[str]:
    """On a port of its own: both launchers take 29500 otherwise, as whoever runs beside this."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    launcher, *words = line.split()
    script = Path(sys.executable).with_name(launcher)
    if launcher == "accelerate":
        return [script, words[0], "--main_process_port", port, *words[1:]]
    return [script, "--master_port", port, *words]


@pytest.mark.distributed
@pytest.mark.full
@pytest.mark.parametrize("line", LINES)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="the launchers would take the accelerator, not two CPUs")
def test_the_line_runs(line, tmp_path):
    """Every file once and whole, the table once, the folder's models not made again."""
    data, more = bt.load_muse("embedded"), []
    if "ddp" in line:  # both processes read a folder
        more = ["--data_dir", as_the_hub(tmp_path / "news")]
        data = bt.load_muse("news", more[1])
    out = with_ignorant_models(tmp_path / "run", limit_documents(data, 2, seed=42))
    done = launch(*command(line), *SHORT.split(), *more, "--output_dir", out, folder=ROOT)
    # gloo's teardown aborts an exit now and then, with this message, after everything is written
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr[-3000:]

    checkpoint = out / "checkpoint-2"
    assert {path for path in TRACES if (checkpoint / path).exists()} == LINES[line], "another engine"
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2, "not two processes"

    assert done.stdout.count("PrivLeak →0") == 1 and done.stdout.count("Report:") == 1, done.stdout
    assert {path.name for path in out.iterdir() if path.is_file()} == WRITTEN
    assert [row["name"] for row in load(out)["rows"]] == ["target", "BLUR-NPO", "retrain"]
    assert load(out, "trainer_state.json")["global_step"] == 2
    trained, target = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, out / "target"))
    assert distance(weights(trained), weights(target)) > 1e-4
    assert AutoTokenizer.from_pretrained(out)


@pytest.mark.distributed
@pytest.mark.full
@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
@pytest.mark.skipif(torch.accelerator.is_available(), reason="the launchers would take the accelerator, not two CPUs")
def test_the_assistant_is_trained_and_loaded_again(name, tmp_path, monkeypatch):
    """ULD: one process writes the folder, and both load it right after the training."""
    line = f"accelerate launch --config_file examples/accelerate/{name}.yaml examples/run_tofu.py"
    more = [*prepared("run_tofu", tmp_path, monkeypatch), "--method", "uld", "--compare", "npo", "--max_steps", "2"]
    done = launch(*command(line), *more, folder=ROOT)
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr[-3000:]
    assert [row["name"] for row in load(tmp_path / "run")["rows"]] == ["target", "ULD", "NPO", "retrain"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


@pytest.mark.distributed
@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [pytest.param("", id="as in the README"), pytest.param("--num_gpus 2", id="two processes, ZeRO-3")],
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="the launcher would take the accelerator, not the CPU")
def test_deepspeed_runs_wmdp(options, tmp_path):
    """The control vectors are in the checkpoint, and only what lies below the chosen layer was trained."""
    sheets = [text for rows in bt.load_wmdp(corpus="embedded").values() for text in rows["text"]]
    lessons = topic_lessons()
    tokenizer = train_tokenizer([*sheets, *(row["prompt"] + row["completion"] for row in lessons)])
    target, out = tiny_llama(tokenizer), tmp_path / "run"  # knows nothing: to learn takes longer than the launch
    for name in ("target", "retrain-dishes"):
        target.save_pretrained(tmp_path / "models" / name)
    zero3 = ["--deepspeed", "ds_configs/zero3.json"] if options else []
    short = ["--max_steps", "2", "--eval_strategy", "no", "--compare", "none", "--save_strategy", "steps"]
    line = f"deepspeed {options} examples/run_wmdp.py"
    kept = ["--save_steps", "2", "--models_dir", str(tmp_path / "models"), "--output_dir", str(out)]
    kept += ["--no_robustness"] * bool(options)  # once is enough
    done = launch(*command(line), *short, *zero3, *kept, folder=ROOT)
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr[-3000:]
    checkpoint = out / "checkpoint-2"
    assert (checkpoint / "control_vectors.safetensors").is_file()
    assert (checkpoint / f"{ZERO}_model_states.pt").is_file() == bool(options), "another engine"
    assert done.stdout.count("potions forget ↓") == 2 - bool(options) and done.stdout.count("Report:") == 1, done.stdout
    trained = AutoModelForCausalLM.from_pretrained(out)
    moved = {name for name, p in weights(trained).items() if not torch.equal(p, weights(target)[name])}
    lower = {name for name in weights(target) if name.startswith(("model.embed_tokens", *LOWER))}
    assert moved == lower


LOWER = tuple(f"model.layers.{layer}." for layer in range(3))
