"""`compute_loss` is what every pass of a step asks: what it answers, and that a subclass's is heard everywhere."""

import pytest
import torch
from accelerate.utils import DistributedType
from support.ddp_worker import OwnLoss
from support.models import collate, examples, tiny_llama
from support.runs import distance, settings, training_logs, weights
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from blur_trainer.gradients.engines import check_unchanged
from blur_trainer.gradients.rules import BLUR, Sum
from blur_trainer.objectives.likelihood import NLL, GradAscent
from blur_trainer.trainers.blur import BLURTrainer
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.unlearning import UnlearningTrainer

FORGET, RETAIN = examples(8, seed=1), examples(8, seed=2)
NAN = float("nan")


class Doubled(BLURTrainer):
    """Twice the retain loss, by the road that Trainer's documentation shows."""

    asked: tuple = ()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.asked = (*self.asked, *inputs)
        return 2 * loss if "retain" in inputs else loss


PLACES = {
    "one batch": {},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "one buffer": {"single_gradient_buffer": True},
    "topics": {"forget": {"a": FORGET[:4], "b": FORGET[4:]}, "max_steps": 2},
}


def make(cls, folder, rule, forget=FORGET, retain=RETAIN, model=None, **config):
    args = settings(folder, UnlearningConfig, **({"max_steps": 1, "per_device_train_batch_size": 4} | config))
    model = tiny_llama() if model is None else model
    return cls(model, args, forget, retain, rule=rule, forget_objective=GradAscent())


@pytest.mark.parametrize("place", PLACES)
def test_a_subclass_is_heard(place, tmp_path):
    """For `d = gamma g_f + alpha (g_r - rho g_f)` twice the retain loss is twice alpha."""
    trainer = make(Doubled, tmp_path / "a", BLUR(), **PLACES[place])
    trainer.train()
    assert set(trainer.asked) == {"forget", "retain"}, "each pass asks for one role"
    want = make(BLURTrainer, tmp_path / "b", BLUR(alpha=2.0), **PLACES[place])
    want.train()
    assert distance(weights(trainer.model), weights(want.model)) < 1e-6
    for a, b in zip(training_logs(trainer), training_logs(want), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["loss/retain"] == pytest.approx(2 * b["loss/retain"], rel=1e-5)
        assert a["grad/retain_norm"] == pytest.approx(2 * b["grad/retain_norm"], rel=1e-4)


@pytest.mark.parametrize("buffer", [False, True], ids=["two buffers", "one buffer"])
def test_a_loss_of_ones_own(buffer, tmp_path):
    """Without any objective's help: -1/2 and twice the token-mean NLL."""
    got = make(OwnLoss, tmp_path / "a", Sum(2.0, 0.5), single_gradient_buffer=buffer)
    want = make(UnlearningTrainer, tmp_path / "b", Sum())
    got.train(), want.train()
    assert distance(weights(got.model), weights(want.model)) < 1e-6


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_an_operation_without_forward_mode_is_refused_with_one_buffer(tmp_path):
    class Own(BLURTrainer):
        def compute_loss(self, *args, **kwargs):
            return Opaque.apply(super().compute_loss(*args, **kwargs))

    make(Own, tmp_path / "a", BLUR()).train()
    with pytest.raises(NotImplementedError, match=r"`single_gradient_buffer=True`.*`compute_loss` of your own.*leave"):
        make(Own, tmp_path / "b", BLUR(), single_gradient_buffer=True).train()


def test_what_it_answers(tmp_path):
    trainer = make(BLURTrainer, tmp_path, BLUR(gamma=0.5), eval_strategy="no")
    model, pair = trainer.model, next(iter(trainer.get_train_dataloader()))
    one = {role: trainer.compute_loss(model, {role: pair[role]}) for role in pair}
    assert torch.equal(one["forget"], GradAscent()(model, pair["forget"]))
    assert torch.equal(one["retain"], NLL()(model, pair["retain"]))
    divided = trainer.compute_loss(model, {"retain": pair["retain"]}, num_items_in_batch=7)
    torch.testing.assert_close(divided, NLL().losses(model, pair["retain"], None).sum() / 7)
    with pytest.raises(ValueError, match=r"BLUR.*no step was made yet"):
        trainer.compute_loss(model, pair)
    trainer.train()
    weight = {role: trainer.state.log_history[0][f"grad/weight_{role}"] for role in pair}  # of the last step
    loss, losses = trainer.compute_loss(model, pair, return_outputs=True)
    assert loss.item() == pytest.approx(sum(weight[role] * losses[role].item() for role in pair), rel=1e-5)
    with pytest.raises(ValueError, match="one number per role"):
        trainer.compute_loss(model, pair, num_items_in_batch=4)
    fixed = make(UnlearningTrainer, tmp_path, Sum(2.0, 3.0), model=model)
    torch.testing.assert_close(fixed.compute_loss(model, pair), 2 * losses["forget"] + 3 * losses["retain"])
    plain, (loss, outputs) = collate(RETAIN), trainer.compute_loss(model, collate(RETAIN), return_outputs=True)
    assert torch.equal(loss, Trainer.compute_loss(trainer, model, plain)) and outputs.logits.ndim == 3
    alone = BLURTrainer(model, settings(tmp_path), FORGET, rule=Sum(1.0, 0.0))
    with pytest.raises(ValueError, match="no retain objective"):
        alone.compute_loss(model, {"retain": pair["retain"]})


def test_a_step_by_hand_counts_its_items_itself(tmp_path):
    """`trainer.training_step(model, batch)`, as Trainer's documentation calls it."""
    trainer = make(UnlearningTrainer, tmp_path, Sum())
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.training_step(trainer.model, batch)
    want = GradAscent()(trainer.model, batch["forget"]) + NLL()(trainer.model, batch["retain"])
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert any(p.grad.any() for p in trainer.model.parameters())


def test_means_of_processes_are_averaged_if_tokens_are_not(tmp_path, monkeypatch):
    """`average_tokens_across_devices=False`: each process divides by its own tokens, and DDP averages."""
    for average, factor in ((True, 4), (False, 2)):  # two processes, of which the other one has thrice as many tokens
        trainer = make(UnlearningTrainer, tmp_path, Sum(), average_tokens_across_devices=average)
        loader = iter(trainer.get_train_dataloader())
        with monkeypatch.context() as patch:
            patch.setattr(trainer.accelerator.state, "num_processes", 2)
            patch.setattr(trainer.accelerator, "reduce", lambda tensor, how: 4 * tensor)
            batches, counts = trainer.get_batch_samples(loader, 1, torch.device("cpu"))
        # a pass multiplies the loss by the number of processes, which DDP's average undoes
        assert counts["retain"] == factor * NLL().num_items(batches[0]["retain"])


# ---- what else a step does as Trainer's does ----


class Unfreeze(TrainerCallback):
    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.requires_grad_(True)


@pytest.mark.parametrize("buffer", [False, True], ids=["two buffers", "one buffer"])
def test_parameters_unfrozen_during_training_are_combined_too(buffer, tmp_path):
    def trained(frozen, held, seen):
        model = tiny_llama()
        model.model.layers[1].requires_grad_(not frozen)
        own = torch.optim.SGD([p for p in model.parameters() if held or p.requires_grad], lr=1e-7)
        args = settings(tmp_path, max_steps=2, max_grad_norm=0.0, single_gradient_buffer=buffer)
        schedule = LambdaLR(own, lambda _: 1.0)
        objects = {"rule": Sum(0.5, 0.25), "callbacks": [seen], "optimizers": (own, schedule)}
        BLURTrainer(model, args, FORGET, RETAIN, **objects, forget_objective=GradAscent()).train()

    late, early = Unfreeze(), Unfreeze()
    trained(True, True, late), trained(False, True, early)
    assert len(late.gradients[0]) < len(early.gradients[0])
    assert distance(late.gradients[1], early.gradients[1]) < 1e-5
    with pytest.raises(ValueError, match=r"layers\.1.*unfrozen.*add_param_group"):
        trained(True, False, Unfreeze())


def test_engines_that_cannot_follow_say_so(tmp_path, monkeypatch):
    trainer = make(UnlearningTrainer, tmp_path, Sum())
    for engine in (DistributedType.MULTI_GPU, DistributedType.FSDP, DistributedType.DEEPSPEED):
        with monkeypatch.context() as patch:
            patch.setattr(trainer.accelerator.state, "distributed_type", engine)
            with pytest.raises(NotImplementedError, match=rf"a\.weight was frozen or unfrozen.*{engine.value}"):
                check_unchanged(trainer.accelerator, trainer.model, ["a.weight"], None)
