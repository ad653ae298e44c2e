"""Arguments and settings of `transformers.Trainer`: each works as it does there, or is refused by name."""

import signal

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from support.cases import every
from support.models import collate, examples, tiny_llama
from support.runs import distance, settings, train, training_logs, weights
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback
from trl import DPOConfig, SFTConfig

from blur_trainer.trainers.blur import BLURConfig, BLURTrainer
from blur_trainer.trainers.ending import TrainingInterrupted

FORGET, RETAIN = examples(10, seed=1), examples(7, seed=2)


# ---- arguments ----


def nll_of(predictions, labels):
    logits, labels = torch.from_numpy(predictions[:, :-1]), torch.from_numpy(labels[:, 1:])
    return cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100).item()


def test_metrics_of_an_evaluation(tmp_path):
    """`compute_metrics` and `preprocess_logits_for_metrics`, on the whole set or batch by batch."""
    totals = []

    def whole(prediction):
        return {"nll": nll_of(prediction.predictions, prediction.label_ids), "rows": len(prediction.predictions)}

    def running(prediction, compute_result):
        totals.append(nll_of(prediction.predictions.numpy(), prediction.label_ids.numpy()))
        return {"nll": float(np.mean(totals)), "batches": len(totals)} if compute_result else {}

    def evaluated(**kwargs):
        args = settings(tmp_path, per_device_eval_batch_size=7, **kwargs.pop("config", {}))
        trainer = BLURTrainer(tiny_llama(), args, FORGET, RETAIN, eval_dataset=RETAIN + FORGET[:7], **kwargs)
        return trainer.evaluate()

    rows = RETAIN + FORGET[:7]
    with torch.no_grad():
        literal = tiny_llama()(**collate(rows)).loss.item()
    got = evaluated(compute_metrics=whole)
    assert got["eval_nll"] == pytest.approx(literal, rel=1e-5) and got["eval_rows"] == 14
    got = evaluated(compute_metrics=running, config={"batch_eval_metrics": True})
    assert got["eval_nll"] == pytest.approx(got["eval_loss"], rel=1e-5) and got["eval_batches"] == 2
    best = evaluated(
        compute_metrics=lambda p: {"best": int(p.predictions.max()), "ndim": p.predictions.ndim},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    assert best["eval_ndim"] == 2 and best["eval_best"] < 48


def test_a_collator_of_ones_own_pads_each_role(tmp_path):
    def left(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        fill = lambda row, name, value: [value] * (longest - len(row["input_ids"])) + row[name]  # noqa: E731
        batch = {name: [fill(row, name, value) for row in rows] for name, value in (("input_ids", 0), ("labels", -100))}
        batch["attention_mask"] = [[int(token != 0) for token in ids] for ids in batch["input_ids"]]
        return {name: torch.tensor(values) for name, values in batch.items()} | {"rows": torch.tensor(len(rows))}

    def start(collator):
        args = settings(tmp_path, max_steps=1, per_device_train_batch_size=4)
        trainer = BLURTrainer(tiny_llama(), args, FORGET, RETAIN, data_collator=collator)
        return next(iter(trainer.get_train_dataloader())), trainer

    batch, trainer = start(left)
    for role in ("forget", "retain"):
        assert (batch[role]["attention_mask"][:, -1] == 1).all() and (batch[role]["attention_mask"][:, 0] == 0).any()
        assert batch[role]["rows"] == 4  # for a `compute_loss` of one's own
    trainer.train()
    with pytest.raises(ValueError, match=r"`data_collator` must make one batch .*attention_mask.*of 4 rows"):
        start(lambda rows: {"input_ids": torch.ones(4, 3), "labels": torch.ones(4, 3)})


def test_an_optimizer_by_class(tmp_path):
    trainer = train(
        settings(tmp_path, max_steps=1), FORGET, RETAIN, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5})
    )
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is torch.optim.SGD and optimizer.param_groups[0]["initial_lr"] == 0.5


def test_other_arguments_are_refused_by_name(tmp_path):
    def refuse(name, said):
        with pytest.raises(TypeError, match=rf"BLURTrainer takes no `{name}`.*{said}"):
            BLURTrainer(tiny_llama(), settings(tmp_path), FORGET, RETAIN, **{name: print})

    every(
        [
            ("compute_loss_func", "`forget_objective` or `retain_objective` of your own, or override `compute_loss`"),
            ("train_dataset", "`forget_dataset` and `retain_dataset`"),
            ("tokenizer", "`processing_class`"),
            ("refmodel", "Did you mean `ref_model`"),
            ("nonsense", ""),
        ],
        refuse,
    )


# ---- settings ----


def test_configs_of_other_libraries(tmp_path):
    common = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    taken = BLURConfig.from_training_arguments(SFTConfig(**common, max_length=77, learning_rate=0.25))
    assert (taken.rule, taken.max_length, taken.learning_rate) == ("blur", 77, 0.25)

    def refuse(config, said, **setting):
        with pytest.raises(ValueError, match=rf"`{config.__name__}` has `{next(iter(setting))}=.*{said}"):
            BLURTrainer(tiny_llama(), config(**common, **setting), FORGET, RETAIN)

    every(
        {
            "beta": (lambda: refuse(DPOConfig, r"`forget_objective_kwargs=\{'beta': 0.5\}`", beta=0.5)),
            "logps": (lambda: refuse(DPOConfig, "`precompute_ref_logps=True`", precompute_ref_log_probs=True)),
            "packing": (lambda: refuse(SFTConfig, "leave it at its default", packing=True)),
        },
        lambda act: act(),
    )


def test_batches_of_like_length(tmp_path):
    """Every row once per epoch, in an order that a resumed training finds again, and less padding than at random."""
    rows = examples(160, seed=3, low=5, high=30)
    args = settings(tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=4)
    trainer = BLURTrainer(tiny_llama(), args, rows, RETAIN)
    batches = [batch["forget"] for batch in trainer.get_train_dataloader()]
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert real > 0.9 * sum(batch["attention_mask"].numel() for batch in batches)  # at random 0.7
    read, orders = [tuple(ids[ids != 0].tolist()) for batch in batches for ids in batch["input_ids"]], []
    for epoch in (0, 1):
        trainer.train_dataset.set_epoch(epoch)
        orders.append([tuple(trainer.train_dataset[i]["forget"]["input_ids"]) for i in range(160)])
    assert read == orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(tuple(row["input_ids"]) for row in rows)
    assert args.train_sampling_strategy == "group_by_length"


def test_orders_that_do_not_go_with_pairs_are_refused(tmp_path):
    stream = Dataset.from_list(FORGET).to_iterable_dataset()
    for strategy, forget, said in (("batch_rebalance", FORGET, "has two"), ("group_by_length", stream, "a stream")):
        args = settings(tmp_path, train_sampling_strategy=strategy, max_steps=1)
        with pytest.raises(ValueError, match=f"`train_sampling_strategy='{strategy}'`.*{said}"):
            BLURTrainer(tiny_llama(), args, forget, RETAIN)


@pytest.mark.parametrize("count", ["all", "non_padding"])
def test_tokens_seen(count, tmp_path):
    args = settings(tmp_path, include_num_input_tokens_seen=count, max_steps=2, gradient_accumulation_steps=2)
    forget = Dataset.from_list(FORGET[:6]).to_iterable_dataset()  # three batches: the second window is short
    trainer = BLURTrainer(tiny_llama(), args, forget, RETAIN)
    batches = [batch[role] for batch in trainer.get_train_dataloader() for role in batch]
    trainer.train()
    masks = [batch["attention_mask"] for batch in batches]
    want = sum(mask.numel() if count == "all" else int(mask.sum()) for mask in masks)
    assert trainer.state.num_input_tokens_seen == want == training_logs(trainer)[-1]["num_input_tokens_seen"]


# ---- streams ----


class Rows(BLURTrainer):
    """Notes the first token of each forget row that a step reads."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "forget" in inputs:
            read = self.seen.setdefault(self.state.global_step, [])
            read += inputs["forget"]["input_ids"][:, 0].tolist()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.mark.parametrize(
    ("count", "config", "want"),
    [
        (10, {"max_steps": 4, "gradient_accumulation_steps": 4}, [8, 2, 8, 2]),
        (6, {"max_steps": 2, "gradient_accumulation_steps": 4}, [6, 6]),  # shorter than a window
        (10, {"num_train_epochs": 1, "per_device_train_batch_size": 4, "dataloader_num_workers": 2}, [4, 4, 2]),
    ],
    ids=["a short last window", "no whole window", "workers"],
)
def test_a_stream_is_read_to_its_end(count, config, want, tmp_path):
    forget = [row | {"input_ids": [3 + i, *row["input_ids"][1:]]} for i, row in enumerate(FORGET[:count])]
    retain = RETAIN
    if "dataloader_num_workers" in config:  # then the length of the forget set is known
        retain = Dataset.from_list(RETAIN).to_iterable_dataset(num_shards=2)
    else:
        forget = Dataset.from_list(forget).to_iterable_dataset()
    trainer = Rows(tiny_llama(), settings(tmp_path, **config), forget, retain)
    trainer.seen = {}
    trainer.train()
    assert [len(rows) for rows in trainer.seen.values()] == want
    steps = list(trainer.seen.values())
    per_epoch = len(steps) // (sum(want) // count)
    for first in range(0, len(steps), per_epoch):
        epoch = [token for rows in steps[first : first + per_epoch] for token in rows]
        assert sorted(epoch) == list(range(3, 3 + count))


def test_a_short_window_is_a_step_of_its_own(tmp_path):
    """Its gradient is the mean over what it has, as of a dataset of known length."""
    config = {"gradient_accumulation_steps": 4, "max_steps": 2, "train_sampling_strategy": "sequential"}
    retain = RETAIN[:1]  # any pairing is the same
    stream = Dataset.from_list(FORGET).to_iterable_dataset()
    got, want = (train(settings(tmp_path / n, **config), f, retain) for n, f in (("a", stream), ("b", FORGET)))
    assert distance(weights(got.model), weights(want.model)) == 0


def test_a_stream_that_is_not_found_again_is_said(tmp_path, caplog):
    stream = Dataset.from_list(FORGET[:4]).to_iterable_dataset()  # two batches
    args = settings(tmp_path, max_steps=3, save_strategy="steps", save_steps=3, lr_scheduler_type="constant")
    train(args, stream, RETAIN)
    args.max_steps = 4
    with caplog.at_level("WARNING", logger="blur_trainer"):
        BLURTrainer(tiny_llama(), args, stream, RETAIN).train(resume_from_checkpoint=True)
    assert any("begins it anew" in record.getMessage() for record in caplog.records)


# ---- schedule-free optimizers ----


def test_the_averaged_point_is_what_is_measured_and_saved(tmp_path):
    optimizer = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "learning_rate": 2e-2}
    schedule = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}

    def measured(name, steps, **kwargs):
        seen = []

        def bench(model):
            with torch.no_grad():
                seen.append(model(**collate(RETAIN)).loss.item())
            return {"nll": seen[-1]}

        args = settings(tmp_path / name, max_steps=steps, **optimizer, **schedule)
        return seen, train(args, FORGET, RETAIN, benchmarks={"b": bench}, **kwargs)

    alone, trainer = measured("a", 4)
    beside, _ = measured("b", 4, eval_dataset=RETAIN)
    assert alone == beside and len(alone) == 2
    averaged = weights(trainer.model)
    trainer.optimizer.train()
    assert distance(averaged, weights(trainer.model)) > 1e-4, "both points are one: nothing would be noticed"
    trainer.save_model()
    saved = load_file(tmp_path / "a" / "model.safetensors")
    assert max((saved[name] - averaged[name]).abs().max() for name in saved) < 1e-6
    third, (_, stopped) = load_file(tmp_path / "a" / "checkpoint-3" / "model.safetensors"), measured("c", 3)
    assert distance(third, weights(stopped.model)) < 1e-6


# ---- signals and workers ----


@pytest.mark.parametrize("jit", [False, True], ids=["", "enable_jit_checkpoint"])
def test_a_signal_saves_and_the_handlers_are_given_back(jit, tmp_path):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    args = settings(tmp_path, max_steps=4, enable_jit_checkpoint=jit)
    trainer = BLURTrainer(tiny_llama(), args, FORGET, RETAIN, callbacks=[Stop()])
    with pytest.raises(TrainingInterrupted):
        trainer.train()
    assert trainer.state.global_step == 2 and (tmp_path / "checkpoint-2" / "trainer_state.json").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_persistent_workers_do_not_change_a_resumed_dropout(tmp_path):
    config = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "save_strategy": "steps"}
    args = settings(tmp_path, save_steps=3, per_device_train_batch_size=5, num_train_epochs=3, **config)
    whole = train(args, FORGET, RETAIN, model=tiny_llama(dropout=0.3))  # 3 epochs of 2 steps
    want = weights(whole.model)
    (tmp_path / "checkpoint-6").rename(tmp_path / "kept")
    again = BLURTrainer(tiny_llama(dropout=0.3), args, FORGET, RETAIN)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert distance(want, weights(again.model)) == 0


def test_tf32_stays_off_where_it_was_switched_off(tmp_path):
    """accelerate switches it on for compiled models on a GPU, whatever `tf32` says: the weights were off by 2 %."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for tf32, after in ((False, "ieee"), (None, "tf32")):
            matmul.fp32_precision = "tf32"
            args = settings(tmp_path / str(tf32), max_steps=1)
            args.tf32 = tf32
            BLURTrainer(tiny_llama(), args, examples(2), examples(2, 1))
            assert matmul.fp32_precision == after
    finally:
        matmul.fp32_precision = before
