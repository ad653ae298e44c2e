"""For tests/evaluation/test_distributed_evaluation.py, on two processes: evaluates models, trains with evaluations."""

import contextlib
import copy
import io
import json
import os
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.parity import ENGINES, forget_engine, whole
from support.processes import freeze_imports
from support.scoring_helpers import PASSAGES, QUESTIONS, SENTENCES, build_model, build_tokenizer, muse_data
from transformers import PrinterCallback

from blur_trainer.evaluation.answer_scoring import score_variants
from blur_trainer.evaluation.forget import ForgetEvaluation
from blur_trainer.evaluation.leakage.leak import LeakEvaluation
from blur_trainer.evaluation.lm_eval import LMEval
from blur_trainer.evaluation.lm_eval_tasks import write_tasks
from blur_trainer.evaluation.muse import MUSEEvaluation
from blur_trainer.evaluation.robustness.battery import robustness
from blur_trainer.evaluation.scoring import generate, token_logps
from blur_trainer.gradients.rules import Sum
from blur_trainer.objectives.likelihood import NLL, GradAscent
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.last_words import mean_nats
from blur_trainer.trainers.unlearning import UnlearningTrainer

NAMES = ("ddp", "fsdp2", "zero3")
LEFT_OUT = ("verbmem_retain", "verbmem_hold", "knowmem_forget_qa", "knowmem_hold_qa")  # of the suite in training
MODELS, TRAINED = ("full", "tied", "lora"), ("full", "lora")
PROMPTS = ["The", SENTENCES[1], "Question: Where?\nAnswer: ", "In", "spoke of crime novels and", "In Norvale é 東京"]
ROWS = [list(range(2, 2 + length)) for length in (9, 3, 17, 4, 2, 30, 9)]
VARIANTS = [
    [{"input_ids": [*row, *range(9, 11 + n)], "labels": [-100] * len(row) + [*range(9, 11 + n)]} for n in range(size)]
    for row, size in zip(ROWS, (3, 1, 2, 4, 1, 5, 2), strict=True)
]
ANSWERS = {group: [f"Question: {q}\nAnswer: {a}\n\n" for q, a in rows] for group, rows in QUESTIONS.items()}
TEXTS = {**ANSWERS, "forget": [*ANSWERS["forget"], *map("".join, PASSAGES)]}


@cache
def tokenizer() -> Any:
    return build_tokenizer()


def tokenized(texts: list[str]) -> list[dict[str, list[int]]]:
    rows = [[*tokenizer()(text)["input_ids"], 1] for text in texts]
    return [{"input_ids": row, "labels": row} for row in rows]


def build(name: str, folder: str) -> torch.nn.Module:
    """A model that knows some of the corpus, as `memorize` has left it in `folder`."""
    model = build_model(tie_word_embeddings=name == "tied")
    model.generation_config.eos_token_id = [1, *range(100, 110)]  # rows, and so processes, end at different times
    if name == "lora":
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    path = Path(folder) / f"{name}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path), strict=False)
    return model


def memorize(names: set[str], folder: str) -> None:
    """Else every ROUGE would be 0, and equal without proving anything. Once: processes must not differ by a bit."""
    for name in names:
        model = build(name, folder)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(30):
            for row in tokenized([text for texts in TEXTS.values() for text in texts]):
                ids = torch.tensor([row["input_ids"]])
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights = {key: value.detach().clone() for key, value in model.named_parameters()}
        save_file(weights, Path(folder) / f"{name}.safetensors")
    rows = [{"question": f"{q} {i}", "choices": [*"stxe"], "answer": i % 4} for i, q in enumerate(PROMPTS[:5])]
    write_tasks(f"{folder}/tasks", {"forget_five": Dataset.from_list(rows), "retain_one": Dataset.from_list(rows[:1])})


def suite(*without: str, **kwargs: Any) -> MUSEEvaluation:
    lengths = {"max_new_tokens_verbmem": 10, "max_new_tokens_knowmem": 6}
    return MUSEEvaluation(
        muse_data(*without), tokenizer(), auc_retrain=0.5, batch_size=2, icl=False, **lengths, **kwargs
    )


def results(model: torch.nn.Module, folder: str) -> dict[str, Any]:
    """Everything that evaluation answers: of unequal shares, of one row, of none."""
    found: dict[str, Any] = {"forwards": []}
    random_state = torch.get_rng_state()
    for count in (6, 1, 0):  # first: a `PeftModel` that generates before any forward of its own
        texts = generate(model, tokenizer(), PROMPTS[:count], max_new_tokens=12, batch_size=2, stop_strings=["e"])
        found[f"texts of {count}"] = texts
    forwards: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    for count in (7, 1, 0):
        forwards.clear()
        rows = [{"input_ids": ids, "labels": ids} for ids in ROWS[:count]]
        logps = token_logps(model, rows, pad_token_id=1, batch_size=3)
        found[f"logps of {count}"] = [row.tolist() for row in logps]
        found["forwards"].append(len(forwards))
    hook.remove()
    for count in (7, 1, 0):  # batches of unequally many answers, with a shared prompt and without
        scores = score_variants(model, VARIANTS[:count], pad_token_id=1, batch_size=2)
        found[f"variants of {count}"] = [[answer.logps.tolist() for answer in answers] for answers in scores]
    unseen = [{"text": text} for text in SENTENCES]
    own = ForgetEvaluation(
        tokenizer(), tokenized(TEXTS["forget"]), unseen=unseen, max_new_tokens=8, batch_size=2, progress=False
    )
    found["own"], found["own samples"] = own(model), own.samples(9)
    few: dict[str, Any] = {"samples": 3, "threshold": 0.2, "max_new_tokens": 6}
    leaks = LeakEvaluation(tokenizer(), tokenized(TEXTS["forget"]), batch_size=2, progress=False, **few)
    found["leaks"], found["leak details"] = leaks(model), leaks.details
    found["nats"] = mean_nats(model, tokenized(TEXTS["forget"][:3]))
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        evaluation = suite()
        found["muse"] = evaluation(model)
        found["samples"] = evaluation.samples(100)
        found["auc"] = evaluation.privleak_auc(model)
        if find_spec("lm_eval"):
            found["harness"], found["harness forwards"] = {}, {}
            for task in ("forget_five", "retain_one"):  # one row and two processes: nothing to share
                harness = LMEval([task], tokenizer(), include_path=f"{folder}/tasks", batch_size=2)
                forwards.clear()
                hook = model.register_forward_pre_hook(lambda *_: forwards.append(1))
                found["harness"] |= harness(model)
                hook.remove()
                found["harness forwards"][task] = len(forwards)
    found["bars"] = "PrivLeak forget" in stderr.getvalue()
    found["draws"] = not torch.equal(random_state, torch.get_rng_state())
    return found


def attacked(model: torch.nn.Module) -> dict[str, Any]:
    """All processes attack: each trains the same, they share the benchmark."""
    rows = {"forget": tokenized(TEXTS["forget"])}
    how: dict[str, Any] = {"steps": [2], "learning_rate": 1e-2, "progress": False}
    return robustness(model, suite(*LEFT_OUT, progress=False), relearning=rows, bits=[4], **how)


def accelerator(engine: str) -> Accelerator:
    forget_engine()
    if engine == "fsdp2":
        # accelerate shards several GPU processes only, not several CPU ones: call these processes GPU ones
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        return Accelerator(cpu=True, fsdp_plugin=plugin)
    if engine == "zero3":
        return Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(
                hf_ds_config=ENGINES["zero3"]["deepspeed"] | {"train_micro_batch_size_per_gpu": 1}
            )
        )
    return Accelerator(cpu=True)


def prepared(engine: str, name: str, folder: str) -> torch.nn.Module:
    here, model = accelerator(engine), build(name, folder)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, _ = here.prepare(model, torch.optim.SGD(trainable, lr=0.1))  # FSDP2 wants an optimizer beside the model
    return here.unwrap_model(model)


def train(engine: str, name: str, folder: str) -> dict[str, Any]:
    """Three steps, each followed by an evaluation and a checkpoint; the best one's weights at the end."""
    forget_engine()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = UnlearningConfig(
        f"{folder}/{engine}-{name}-{processes}",
        per_device_train_batch_size=4 // processes,
        per_device_eval_batch_size=2,  # the last batches of three and of five rows are not full
        learning_rate=3e-3,
        max_steps=3,
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_muse_forget_verbmem",
        greater_is_better=False,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **(copy.deepcopy(ENGINES[engine]) if processes > 1 else {}),
    )
    rows = tokenized(TEXTS["forget"])
    trainer = UnlearningTrainer(
        build(name, folder),
        args,
        rows[:4],  # as many as a window takes: nothing is repeated to fill one
        tokenized(TEXTS["retain"]),
        eval_dataset={"three": rows[:3], "five": rows},
        rule=Sum(),
        forget_objective=GradAscent(),
        retain_objective=NLL(),
        benchmarks={
            "muse": suite(*LEFT_OUT, progress=False),
            "mine": lambda model: {"training": float(model.training)},
        },
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    keep = ("eval_muse_", "eval_mine_", "eval_three_loss", "eval_five_loss")
    weights = {key: p for key, p in trainer.model.named_parameters() if p.requires_grad}
    kept = {key: whole(p, engine if processes > 1 else "ddp").flatten()[:50].tolist() for key, p in weights.items()}
    return {
        "history": [
            {key: value for key, value in entry.items() if key.startswith(keep)} for entry in trainer.state.log_history
        ],
        "best": Path(trainer.state.best_model_checkpoint).name,
        "weights": kept,
        "after": {key: value for key, value in trainer.evaluate().items() if key.startswith(keep)},
    }


def main(case: str, folder: str) -> None:
    """`ENGINE-MODEL` is evaluated, `ENGINE-train-MODEL` trained with evaluations."""
    engine, *training, name = case.split("-")
    if engine == "zero3":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # plain gloo instead of minutes of g++
    rank = os.environ["RANK"]
    if training:
        Path(folder, f"{case}-{rank}.json").write_text(json.dumps(train(engine, name, folder)))
        return
    model = prepared(engine, name, folder)
    Path(folder, f"{case}-{rank}.json").write_text(json.dumps(results(model, folder)))
    if engine == "ddp":
        Path(folder, f"attacked-{name}-{rank}.json").write_text(json.dumps(attacked(model)))
    else:
        with contextlib.suppress(ValueError):
            attacked(model)
            raise RuntimeError("attacked a part of a model")


if __name__ == "__main__":
    freeze_imports()
    for case in sys.argv[2].split(","):
        main(case, sys.argv[1])
    PartialState().wait_for_everyone()
    os._exit(0)  # gloo's teardown aborts the interpreter now and then: see tests/support/engine_worker.py
