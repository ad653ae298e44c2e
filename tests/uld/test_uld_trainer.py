"""ULDTrainer: the assistant's training against a literal one, what is saved, what is loaded, what is refused."""

import copy
import json
import logging
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support import reference
from support.models import VOCAB, collate, examples, tiny_llama
from support.tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

from blur_trainer.evaluation.tofu.attacks import gradient_norms
from blur_trainer.memory.estimate import estimate_memory
from blur_trainer.models.logit_difference import LogitDifferenceModel
from blur_trainer.models.lora_assistant import lora_assistant
from blur_trainer.models.truncation import decoder_layers, quarter, shortened, truncated_view
from blur_trainer.objectives.distributions import Uniform
from blur_trainer.objectives.likelihood import NLL, GradAscent
from blur_trainer.objectives.losses import uniform_loss
from blur_trainer.saving.merging import merge_and_save
from blur_trainer.toy.memorize import memorize
from blur_trainer.trainers.blur import BLURConfig, BLURTrainer
from blur_trainer.uld.trainer import ULDConfig, ULDTrainer

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
FORGET, RETAIN = examples(8, seed=1), examples(11, seed=2)


def settings(folder, **kwargs):
    defaults = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
        "num_assistant_layers": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return ULDConfig(str(folder), **(defaults | kwargs))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target with a name."""
    path = tmp_path_factory.mktemp("models") / "target"
    tiny_llama(0, layers=4).save_pretrained(path)
    return str(path)


def make(model, out, forget=FORGET, retain=RETAIN, *, lora=LORA, augment=True, **kwargs):
    more = {"augment_forget": examples(4, seed=3), "augment_retain": examples(5, seed=4)} if augment else {}
    return ULDTrainer(
        model, settings(out, **kwargs.pop("args", {})), forget, retain, peft_config=lora, **more, **kwargs
    )


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    trainer = make(folder, tmp_path_factory.mktemp("out"))
    trainer.train()
    trainer.save_model()
    return trainer


def literal_uniform(model, row):
    """KL(U || p) at each answer token, term by term, and how many there are."""
    ids, total, count = torch.tensor([row["input_ids"]]), 0.0, 0
    logits = model(input_ids=ids).logits[0].double()
    for t, label in enumerate(row["labels"][1:]):
        if label != -100:
            p = logits[t].exp() / logits[t].exp().sum()
            total = total + sum(torch.log((1 / VOCAB) / q) / VOCAB for q in p)
            count += 1
    return total, count


def token_mean_uniform(model, rows):
    pairs = [literal_uniform(model, row) for row in rows]
    return sum(total for total, _ in pairs) / sum(count for _, count in pairs)


# ---- the loss ----


def test_uniform_loss_equals_the_literal_sum_and_reads_answers_only():
    rows, model = examples(3, seed=5), tiny_llama(3)
    batch = collate(rows)
    got = uniform_loss(model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits, batch["labels"])
    expected = torch.stack([literal_uniform(model, row)[0] for row in rows])
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(Uniform()(model, batch).double(), token_mean_uniform(model, rows), atol=1e-5, rtol=1e-5)


def test_uniform_loss_is_0_where_all_tokens_are_alike_and_finite_where_softmax_underflows():
    labels = torch.tensor([[-100, 3, 4]])
    assert uniform_loss(torch.full((1, 3, VOCAB), 7.0), labels).item() == pytest.approx(0, abs=1e-5)
    steep = torch.zeros(1, 3, VOCAB)
    steep[..., 0] = 1e4
    assert uniform_loss(steep, labels).item() == pytest.approx(2 * 1e4 * (1 - 1 / VOCAB), rel=1e-3)
    assert uniform_loss(steep.bfloat16(), labels).dtype == torch.float32
    assert uniform_loss(torch.zeros(1, 3, VOCAB), torch.full((1, 3), -100)).item() == 0


def test_the_gradient_of_the_uniform_loss_points_at_answer_positions():
    batch = collate(examples(3, seed=6))
    logits = torch.randn(*batch["labels"].shape, VOCAB, requires_grad=True)
    uniform_loss(logits, batch["labels"]).sum().backward()
    inside = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    assert (logits.grad[inside].abs().sum(-1) > 0).all()
    assert not logits.grad[~inside].any()


@pytest.mark.skipif(not GOLDEN.exists(), reason="no golden numbers in ../shared/golden")
def test_over_all_positions_the_uniform_loss_is_that_of_ulds_code():
    """Their form reads prompt and padding too: ours gives it where every position is called an answer."""
    golden = json.loads((GOLDEN / "uld" / "uld.json").read_text())
    rows = load_file(GOLDEN / "batches.safetensors")
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "models" / "perturbed")
    for step, entry in enumerate(golden["losses_perturbed_vs_target_oracle"]["remember+uniform"]):
        ids, mask = (rows[f"{step}.retain.{name}"] for name in ("input_ids", "attention_mask"))
        gap = max(0, rows[f"{step}.forget.input_ids"].shape[1] - ids.shape[1])  # both sets in one forward pass
        ids, mask = torch.nn.functional.pad(ids, (0, gap), value=2), torch.nn.functional.pad(mask, (0, gap))
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        everything = torch.zeros(ids.shape[0], ids.shape[1] + 1, dtype=torch.long)
        got = uniform_loss(torch.nn.functional.pad(logits, (0, 0, 0, 1)), everything).sum() / ids.numel()
        assert got.item() == pytest.approx(entry["retain_loss"], rel=1e-5)


# ---- the training ----


def test_three_steps_equal_the_literal_training(folder, tmp_path):
    trainer = make(folder, tmp_path, augment=False, args={"max_steps": 3, "retain_weight": 2.0, "seed": 7})
    model = copy.deepcopy(trainer.model)
    trainer.train()
    paired = trainer.train_dataset
    order = [index for epoch in range(2) for index in list(trainer_order(trainer, epoch))]
    windows = []
    for step in range(3):
        paired.set_epoch(step // 2)
        items = [paired[i] for i in order[4 * step : 4 * step + 4]]
        windows.append({role: [item[role] for item in items] for role in ("forget", "retain")})
    reference.train(
        model,
        windows,
        {"forget": reference.token_mean_nll, "retain": token_mean_uniform},
        lambda forget, retain: forget + 2.0 * retain,
        learning_rates=[1e-2] * 3,
    )
    pairs = zip(trainer.model.named_parameters(), model.parameters(), strict=True)
    moved = [(name, ours, theirs) for (name, ours), theirs in pairs if ours.requires_grad]
    assert moved and all("lora" in name for name, _, _ in moved)
    for name, ours, theirs in moved:
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4, msg=name)


def trainer_order(trainer, epoch):
    """The forget indices of an epoch, as the sampler of a trainer of the same seed draws them."""
    generator = torch.Generator().manual_seed(trainer.args.seed + epoch)
    return torch.randperm(len(trainer.train_dataset), generator=generator).tolist()


def test_only_the_adapter_trains_and_the_target_is_untouched(tmp_path):
    target = tiny_llama(0, layers=4)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    trainer = make(target, tmp_path)
    start = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert all("lora_" in name for name in start)
    assert any(not torch.equal(p, start[name]) for name, p in trainer.model.named_parameters() if name in start)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_by_name_only_the_lower_layers_are_loaded_and_the_result_is_the_same(folder, trained, tmp_path, caplog):
    lower = trained.model.get_base_model()
    assert len(decoder_layers(lower)) == 2 and trained.assistant.target is None
    whole = make(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    whole.train()
    ours, theirs = trained.unlearned_model(), whole.unlearned_model()
    assert len(decoder_layers(theirs.target)) == 4
    ids = torch.tensor([[1, 5, 9, 13, 17]])
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    shared = {id(p) for p in theirs.target.parameters()}
    assert all(id(p) in shared for name, p in whole.model.named_parameters() if "lora_" not in name)
    assert "UNEXPECTED" not in caplog.text


def test_it_forgets_and_keeps(tmp_path):
    """A model that knows both sets by heart; its difference to the assistant knows one of them."""
    torch.manual_seed(0)
    forget, retain = examples(4, seed=11), examples(4, seed=12)
    target = tiny_llama(0, layers=4)
    optimizer, batch = torch.optim.AdamW(target.parameters(), 1e-2), collate(forget + retain)
    for _ in range(25):  # no longer: the assistant has to know the answers as surely as the target does
        target(**batch).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    args = {"num_train_epochs": 50, "retain_weight": 1.0, "weight": -1.0, "learning_rate": 2e-2, "max_grad_norm": 5.0}
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    trainer = make(target, tmp_path, forget, retain, augment=False, args=args, lora=lora)
    trainer.train()

    def probability(model, rows):
        values = []
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                logps = model(ids).logits[0].log_softmax(-1)
            values += [logps[t, y].exp().item() for t, y in enumerate(row["labels"][1:]) if y != -100]
        return sum(values) / len(values)

    unlearned = trainer.unlearned_model()
    assert probability(target, forget) > 0.7 and probability(target, retain) > 0.7
    assert probability(unlearned, forget) < 0.4
    assert probability(unlearned, retain) > 0.7


def test_a_resumed_training_goes_the_same_way(folder, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    straight = make(folder, tmp_path / "a", augment=False, args=args)
    straight.train()
    ignore = shutil.ignore_patterns("checkpoint-4")
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=ignore)
    again = make(folder, tmp_path / "b", augment=False, args=args)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == straight.state.global_step == 4
    pairs = zip(straight.model.state_dict().items(), again.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)
    ids = torch.tensor([[1, 5, 9]])
    for usable in (LogitDifferenceModel, AutoModelForCausalLM):
        model = usable.from_pretrained(tmp_path / "b" / "checkpoint-4")
        assert torch.equal(model(ids).logits, again.unlearned_model()(ids).logits)


# ---- what is saved, and what benchmarks see ----


def test_the_saved_folder_is_a_model_for_auto_classes_without_a_weight_of_the_target(trained, folder):
    out = Path(trained.args.output_dir)
    assert {path.name for path in out.glob("**/*.safetensors")} == {"adapter_model.safetensors"}
    assert (out / "assistant" / "adapter_model.safetensors").stat().st_size < 60_000
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model, LogitDifferenceModel)
    assert (model.config.weight, model.config.top_logit_filter, model.config.target) == (-0.8, 0.01, folder)
    ids = torch.tensor([[1, 5, 9, 13, 17]])
    assert torch.equal(model(ids).logits, trained.unlearned_model()(ids).logits)
    assert not torch.equal(model(ids).logits, model.target(ids).logits)
    card = (out / "README.md").read_text()
    assert "ULD" in card and "An assistant" in card and "top\\_logit\\_filter" in card


def test_a_second_run_in_the_folder_is_refused(trained, folder):
    with pytest.raises(ValueError, match=r"already holds a run .*assistant/adapter_model"):
        make(folder, trained.args.output_dir).train()


def test_benchmarks_see_the_unlearned_model_as_it_is_now(folder, tmp_path):
    seen = []

    def benchmark(model):
        with torch.no_grad():
            seen.append((type(model), model.training, model(torch.tensor([[1, 5, 9]])).logits[0, -1].clone()))
        return {"x": 1.0}

    args = {"eval_strategy": "steps", "eval_steps": 2}
    trainer = make(folder, tmp_path, benchmarks={"b": benchmark}, args=args)
    trainer.train()
    assert len(seen) == 3 and all(kind is LogitDifferenceModel and not training for kind, training, _ in seen)
    assert not torch.equal(seen[0][2], seen[1][2]), "the composed model did not follow the training"
    assert any("eval_b_x" in entry for entry in trainer.state.log_history)


def test_a_target_without_a_name_can_be_saved_and_needs_its_target_again(tmp_path):
    target = tiny_llama(0, layers=4)
    trainer = make(target, tmp_path, args={"max_steps": 1})
    trainer.train()
    trainer.save_model()
    with pytest.raises(ValueError, match="target"):
        LogitDifferenceModel.from_pretrained(tmp_path)
    model = LogitDifferenceModel.from_pretrained(tmp_path, target=target)
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(model(ids).logits, trained_logits(trainer, ids))


def trained_logits(trainer, ids):
    return trainer.unlearned_model()(ids).logits


# ---- augmentation ----


def test_augmentations_are_remembered_and_forgotten_in_equal_shares(folder, tmp_path):
    trainer = make(folder, tmp_path)
    assert len(trainer.train_dataset.forget) == len(FORGET) + 4
    retain = [row["input_ids"] for row in trainer.train_dataset.retain]
    wrong = [row["input_ids"] for row in examples(5, seed=4)]
    assert len(retain) == 2 * len(RETAIN) and sum(ids in wrong for ids in retain) == len(RETAIN)


def test_augmentation_by_columns_and_by_a_function(folder, tmp_path):
    tokenizer = tiny_tokenizer()
    rows = [
        {
            "question": f"Who is number {i}?",
            "answer": f"It is {i}.",
            "paraphrased_question": f"Number {i} is who?",
            "paraphrased_answer": f"That is {i}.",
            "perturbed_answer": [f"It is {i + 1}.", f"It is {i + 2}."],
        }
        for i in range(3)
    ]
    args = settings(tmp_path)
    target = tiny_llama(0, layers=4)
    target.resize_token_embeddings(len(tokenizer))
    options = {"processing_class": tokenizer, "peft_config": LORA}
    trainer = ULDTrainer(target, args, rows, rows, augment_forget="columns", augment_retain="columns", **options)
    texts = [tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset.forget]
    assert sum("Number 1 is who?" in text and "That is 1." in text for text in texts) == 1
    wrong = [tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset.retain]
    assert any("Who is number 0?" in text and "It is 2." in text for text in wrong)


@pytest.mark.parametrize(
    "given", [{}, {"augment_forget": FORGET}, {"augment_forget": FORGET, "augment_retain": RETAIN}]
)
def test_what_is_missing_is_said(folder, tmp_path, caplog, given):
    with caplog.at_level(logging.WARNING):
        ULDTrainer(folder, settings(tmp_path), FORGET, RETAIN, peft_config=LORA, **given)
    missing = [name for name in ("augment_forget", "augment_retain") if name not in given]
    assert (" and ".join(missing) + " not given" in caplog.text) if missing else "not given" not in caplog.text


def test_streams_mix_too(folder, tmp_path):
    def stream():
        yield from FORGET

    trainer = make(folder, tmp_path, forget=datasets.IterableDataset.from_generator(stream), args={"max_steps": 2})
    trainer.train()
    assert trainer.state.global_step == 2


# ---- layers, and what is refused ----


def test_a_quarter_of_the_layers_is_the_default(folder, tmp_path):
    assert [quarter(tiny_llama(layers=n).config) for n in (1, 2, 4, 32)] == [1, 1, 1, 8]
    trainer = make(folder, tmp_path, args={"num_assistant_layers": None})
    assert len(decoder_layers(trainer.model.get_base_model())) == 1


def test_a_shortened_configuration_leaves_the_given_one(folder):
    config = tiny_llama(layers=4).config
    assert shortened(config, 2).num_hidden_layers == 2 and config.num_hidden_layers == 4
    assert truncated_view(tiny_llama(layers=4), 2).config.num_hidden_layers == 2


REFUSED = [
    ({"args": {"num_assistant_layers": 5}}, ValueError, "4 layers"),
    ({"args": {"num_assistant_layers": 0}}, ValueError, "`num_assistant_layers` must be a number of at least 1"),
    ({"lora": "r=4"}, TypeError, "LoraConfig"),
    ({"args": {"top_logit_filter": 1.0}}, ValueError, "top_logit_filter"),
    ({"args": {"weight": float("nan")}}, ValueError, "weight"),
    ({"args": {"forget_objective": "npo"}}, ValueError, "accepted: nll"),
    ({"ref_model": tiny_llama(1)}, ValueError, "no objective reads it"),
    ({"forget": []}, ValueError, "empty"),
    ({"forget_objective": GradAscent()}, ValueError, "`forget_objective=GradAscent.*descends `NLL"),
    ({"retain_objective": NLL()}, ValueError, "`retain_objective=NLL.*descends `Uniform"),
    ({"lora": LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa")}, ValueError, "'pissa'.*shares with"),
]


@pytest.mark.parametrize("bad, error, message", REFUSED, ids=[message for _, _, message in REFUSED])
def test_refused_before_any_training(folder, tmp_path, bad, error, message):
    with pytest.raises(error, match=message):
        make(folder, tmp_path, **bad)


def test_another_trainers_arguments_are_refused_both_ways(folder, tmp_path):
    with pytest.raises(TypeError, match="ULDConfig"):
        ULDTrainer(folder, BLURConfig(str(tmp_path), use_cpu=True), FORGET, RETAIN)
    with pytest.raises(TypeError, match="BLURConfig"):
        BLURTrainer(folder, settings(tmp_path), FORGET, RETAIN)


def test_an_adapter_on_the_target_and_an_unknown_model_are_refused(tmp_path):
    with pytest.raises(TypeError, match="merge_and_save"):
        make(get_peft_model(tiny_llama(0, layers=4), LORA), tmp_path)
    with pytest.raises(ValueError, match=r"shares with the target .*q_proj.*bias"):
        make(
            tiny_llama(layers=4, attention_bias=True), tmp_path, lora=LoraConfig(target_modules=["q_proj"], bias="all")
        )
    injected = tiny_llama(0, layers=4)
    injected.add_adapter(LORA)
    with pytest.raises(ValueError, match="merge_and_save"):
        make(injected, tmp_path)
    with pytest.raises(OSError, match="Cannot load model"):
        make(str(tmp_path / "nowhere"), tmp_path)


def test_what_an_unlearned_model_is_not_for(trained, folder, tmp_path):
    """Merging, training anew, the memory of a whole training, gradient norms."""
    unlearned = trained.unlearned_model()
    with pytest.raises(ValueError, match="no weights can do"):
        merge_and_save(trained.args.output_dir, str(tmp_path / "merged"))
    with pytest.raises(TypeError, match="its `target`"):
        make(unlearned, tmp_path)
    with pytest.raises(NotImplementedError, match="is not counted here"):
        estimate_memory(folder, trained.args)
    with pytest.raises(ValueError, match="leave `gradnorm` out"):
        gradient_norms(unlearned, FORGET)
    with pytest.raises(ValueError, match="requires_grad_"):
        memorize(unlearned.target, tiny_tokenizer(pad="<pad>"), datasets.Dataset.from_list(FORGET))


def test_an_unknown_augmentation_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"augment_retain='llm': give a dataset, a callable, or one of"):
        ULDTrainer(folder, settings(tmp_path), FORGET, RETAIN, augment_forget="none", augment_retain="llm")


def test_lora_assistant_is_what_trains(trained):
    assert sum(p.numel() for p in trained.model.parameters() if p.requires_grad) == sum(
        p.numel() for p in lora_assistant(tiny_llama(0, layers=4), 2, LORA).parameters() if p.requires_grad
    )
