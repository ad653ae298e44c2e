"""The trainer against a literal training loop: the same weights after three AdamW steps, whatever Trainer is told."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import reference
from support.fake_device import DEVICE, FakeDevice
from support.models import examples, tiny_llama
from transformers import TrainerCallback

from blur_trainer.data.pairing import PairedDataset
from blur_trainer.gradients.backend import GradientBackend
from blur_trainer.gradients.rules import BLUR, MGDA, NGDiff, PCGrad, Sum
from blur_trainer.objectives.distributions import KL
from blur_trainer.objectives.likelihood import NLL, GradAscent
from blur_trainer.objectives.preference import NPO
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.unlearning import UnlearningTrainer

LEARNING_RATE, STEPS, WINDOW = 1e-2, 3, 4
FORGET, RETAIN = examples(STEPS * WINDOW, seed=5), examples(7, seed=6)

RULES = {
    "blur": (BLUR(gamma=0.5), lambda f, r: reference.blur_direction(f, r, "forget", 0.5, 1.0, False)),
    "blur_wdmp": (BLUR(alpha=20.0), lambda f, r: reference.blur_direction(f, r, "forget", 1.0, 20.0, False)),
    "blur_clamp": (BLUR(gamma=0.0, clamp=True), lambda f, r: reference.blur_direction(f, r, "forget", 0.0, 1.0, True)),
    "blur_upper": (BLUR(lower_level="retain"), lambda f, r: reference.blur_direction(f, r, "retain", 1.0, 1.0, False)),
    "sum": (Sum(1.0, 2.0), lambda f, r: f + 2.0 * r),
    "pcgrad": (PCGrad(), reference.pcgrad_direction),
    "mgda": (MGDA(), reference.mgda_direction),
    "ngdiff": (NGDiff(), reference.ngdiff_direction),
}


def ours(
    model,
    tmp_path,
    rule,
    *,
    batch_size=2,
    accumulation=2,
    forget=FORGET,
    forget_objective=None,
    retain_objective=None,
    ref_model=None,
    **args,
):
    config = UnlearningConfig(
        str(tmp_path),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=STEPS,
        train_sampling_strategy="sequential",
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **args,
    )
    trainer = UnlearningTrainer(
        model,
        config,
        forget,
        RETAIN,
        rule=rule,
        ref_model=ref_model,
        forget_objective=forget_objective or GradAscent(),
        retain_objective=retain_objective or NLL(),
    )
    trainer.train()
    return trainer


def windows(steps=STEPS, size=WINDOW):
    """The pairs that the trainer sees in order, from the pairing alone (which has tests of its own)."""
    pairs = PairedDataset(FORGET, RETAIN, seed=42)
    items = [pairs[i] for i in range(steps * size)]
    return [
        {role: [item[role] for item in items[k : k + size]] for role in ("forget", "retain")}
        for k in range(0, steps * size, size)
    ]


def literal(model, direction, max_grad_norm=1.0, forget_loss=None, retain_loss=None):
    losses = {
        "forget": forget_loss or (lambda m, rows: -reference.token_mean_nll(m, rows)),
        "retain": retain_loss or reference.token_mean_nll,
    }
    return reference.train(
        model, windows(), losses, direction, learning_rates=[LEARNING_RATE] * STEPS, max_grad_norm=max_grad_norm
    )


def update_error(got, want, start):
    """Largest difference of the weights relative to the largest update."""
    update = max((w - s).abs().max() for w, s in zip(want.parameters(), start.parameters(), strict=True))
    error = max((g - w).abs().max() for g, w in zip(got.parameters(), want.parameters(), strict=True))
    assert update > 1e-3, "the reference did not move: the comparison would prove nothing"
    return (error / update).item()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (1, 4)])
def test_every_rule_with_and_without_accumulation(name, batch_size, accumulation, tmp_path):
    rule, direction = RULES[name]
    start = tiny_llama(0)
    got = ours(copy.deepcopy(start), tmp_path, rule, batch_size=batch_size, accumulation=accumulation).model
    want = literal(copy.deepcopy(start), direction)
    assert update_error(got, want, start) < 2e-4


def case(**kwargs):
    return pytest.param(kwargs, id="-".join(kwargs))


@pytest.mark.parametrize("name", ["blur", "sum"])
@pytest.mark.parametrize(
    "features",
    [
        case(tie=True),
        case(frozen=True),
        case(unused=True),
        case(lora=True),
        case(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
        case(reentrant=True, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
        case(lora=True, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    ],
)
def test_features(name, features, tmp_path):
    features = dict(features)
    start = tiny_llama(0, tie=features.pop("tie", False))
    features.pop("reentrant", None)
    if features.pop("frozen", False):
        start.model.layers[0].requires_grad_(False)
        start.model.embed_tokens.requires_grad_(False)
    if features.pop("unused", False):
        start.never_called = torch.nn.Linear(3, 3)
    if features.pop("lora", False):
        torch.manual_seed(0)
        start = get_peft_model(start, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if features.get("gradient_checkpointing_kwargs", {}).get("use_reentrant"):
        # a reentrant checkpoint needs an input with gradient, which embeddings give
        assert start.get_input_embeddings().weight.requires_grad
    rule, direction = RULES[name]
    got = ours(copy.deepcopy(start), tmp_path, rule, **features).model
    want = literal(copy.deepcopy(start), direction)
    assert update_error(got, want, start) < 2e-4
    for (key, a), b in zip(got.named_parameters(), start.parameters(), strict=True):
        if not a.requires_grad or "never_called" in key:
            assert torch.equal(a, b), f"{key} moved"


@pytest.mark.parametrize("max_grad_norm", [0.05, 0.0])
def test_clipping_acts_on_the_combined_gradient(max_grad_norm, tmp_path):
    """The official code clips while `.grad` is None. SGD: under Adam a clipped step looks like an unclipped one."""
    start = tiny_llama(0)
    rule, _ = RULES["blur"]
    trainer = ours(copy.deepcopy(start), tmp_path, rule, max_grad_norm=max_grad_norm, optim="sgd")
    moved = torch.cat([(a - b).flatten() for a, b in zip(trainer.model.parameters(), start.parameters(), strict=True)])
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert min(logged) > 0.05
    if max_grad_norm:
        assert moved.norm() <= STEPS * LEARNING_RATE * max_grad_norm * (1 + 1e-4)
    else:
        assert moved.norm() > LEARNING_RATE * max(logged) * 0.1


@pytest.mark.parametrize("name", ["blur", "sum"])
def test_npo_and_kl_with_a_reference_model(name, tmp_path):
    start, ref = tiny_llama(0), tiny_llama(1)  # another model: at the reference, KL's gradient is rounding noise
    rule, direction = RULES[name]
    objectives = {"forget_objective": NPO(), "retain_objective": KL(), "ref_model": copy.deepcopy(ref)}
    got = ours(copy.deepcopy(start), tmp_path, rule, **objectives).model

    def kl(model, rows):
        total, count = 0, 0
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            with torch.no_grad():
                ref_logits = ref(input_ids=ids).logits
            total = total + reference.kl(model(input_ids=ids).logits, ref_logits, labels).sum()
            count += sum(label != -100 for label in row["labels"][1:])
        return total / count

    want = literal(copy.deepcopy(start), direction, forget_loss=reference.example_mean_npo(ref, 0.1), retain_loss=kl)
    assert update_error(got, want, start) < 2e-4


def test_batch_8_equals_batch_2_times_4_on_unequal_lengths(tmp_path):
    start, forget = tiny_llama(0), examples(24, seed=7, low=4, high=30)
    a = ours(copy.deepcopy(start), tmp_path / "a", Sum(), batch_size=8, accumulation=1, forget=forget)
    b = ours(copy.deepcopy(start), tmp_path / "b", Sum(), batch_size=2, accumulation=4, forget=forget)
    assert update_error(a.model, b.model, start) < 2e-4
    for x, y in zip(a.state.log_history, b.state.log_history, strict=True):
        for key in ("loss", "loss/forget", "loss/retain", "grad/forget_norm", "grad/cosine", "grad_norm"):
            assert key not in x or x[key] == pytest.approx(y[key], rel=1e-4)


def test_a_short_last_window_is_its_own_mean(tmp_path):
    """12 examples in windows of 5 x 1 leave one of 2."""
    start = tiny_llama(0)
    args = {"batch_size": 1, "accumulation": 5, "max_grad_norm": 1.0}
    got = ours(copy.deepcopy(start), tmp_path, Sum(), **args).model
    pairs = PairedDataset(FORGET, RETAIN, seed=42)
    cuts = [(0, 5), (5, 10), (10, 12)]
    short = [{role: [pairs[i][role] for i in range(a, b)] for role in ("forget", "retain")} for a, b in cuts]
    losses = {"forget": lambda m, rows: -reference.token_mean_nll(m, rows), "retain": reference.token_mean_nll}
    want = reference.train(
        copy.deepcopy(start), short, losses, lambda f, r: f + r, learning_rates=[LEARNING_RATE] * STEPS
    )
    assert update_error(got, want, start) < 2e-4


def test_log_of_each_step_equals_the_literal_numbers(tmp_path):
    start = tiny_llama(0)
    rule, _ = RULES["blur"]
    history = ours(copy.deepcopy(start), tmp_path, rule).state.log_history
    first = windows()[0]
    losses = {
        "forget": -reference.token_mean_nll(start, first["forget"]),
        "retain": reference.token_mean_nll(start, first["retain"]),
    }
    g = {role: torch.cat([x.flatten() for x in reference.full_gradient(start, loss)]) for role, loss in losses.items()}
    rho = torch.dot(g["retain"], g["forget"]) / g["forget"].norm() ** 2
    want = {
        "loss/forget": losses["forget"],
        "loss/retain": losses["retain"],
        "grad/forget_norm": g["forget"].norm(),
        "grad/retain_norm": g["retain"].norm(),
        "grad/cosine": torch.cosine_similarity(g["forget"], g["retain"], dim=0),
        "grad/weight_forget": 0.5 - rho,
        "grad/weight_retain": 1.0,
        "loss": (0.5 - rho) * losses["forget"] + losses["retain"],
        "grad_norm": ((0.5 - rho) * g["forget"] + g["retain"]).norm(),
    }
    for key, value in want.items():
        assert history[0][key] == pytest.approx(torch.as_tensor(value).item(), rel=1e-3), key


def test_bf16_autocast_stays_close_to_float32(tmp_path):
    start = tiny_llama(0)
    rule, _ = RULES["blur"]
    exact = ours(copy.deepcopy(start), tmp_path / "a", rule, optim="sgd").state.log_history
    rough = ours(copy.deepcopy(start), tmp_path / "b", rule, optim="sgd", bf16=True).state.log_history
    assert exact[0]["loss"] != rough[0]["loss"], "autocast was off"
    for key in ("loss/forget", "loss/retain", "grad/forget_norm", "grad/retain_norm"):
        assert exact[0][key] == pytest.approx(rough[0][key], rel=3e-2)


def test_torchjd_rules_run_unchanged(tmp_path):
    aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
    history = ours(tiny_llama(0), tmp_path, aggregation.IMTLGWeighting()).state.log_history
    assert all(torch.isfinite(torch.tensor(entry["grad/weight_forget"])) for entry in history if "loss" in entry)


def test_a_backend_of_ones_own_is_asked_for_once(tmp_path):
    made = []

    class Own(GradientBackend):
        """The gradients as they are, and a note of what was taken."""

        def take(self, role):
            made.append(role)
            super().take(role)

    class Trainer(UnlearningTrainer):
        def create_backend(self, model):
            made.append("backend")
            return Own(self.accelerator, model)

    config = UnlearningConfig(
        str(tmp_path), max_steps=2, report_to="none", save_strategy="no", use_cpu=True, precompute_ref_logps=False
    )
    Trainer(tiny_llama(), config, FORGET, RETAIN, forget_objective=GradAscent()).train()
    assert made == ["backend", *("forget", "retain") * 2]


# ---- on an accelerator ----


def of_package(counts):
    return {key: number for key, number in counts.items() if key.startswith("blur_trainer/")}


class Watch(TrainerCallback):
    """Where the package waits: in each step up to the gradient, and in the log."""

    def __init__(self, device):
        self.device, self.steps, self.log = device, [], {}

    def on_step_end(self, args, state, control, **kwargs):
        self.device.waits.clear()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.steps.append(of_package(self.device.waits))

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.log = of_package(self.device.waits)


def test_a_step_waits_for_the_device_once_and_a_log_once(tmp_path):
    with FakeDevice() as device:
        watch = Watch(device)
        config = UnlearningConfig(
            str(tmp_path), max_steps=2, logging_steps=2, report_to="none", save_strategy="no", fused_lm_head=False
        )
        trainer = UnlearningTrainer(tiny_llama(layers=1), config, FORGET, RETAIN, rule=BLUR(), callbacks=[watch])
        trainer.train()
        assert trainer.model.device == DEVICE
    assert len(watch.steps) == 2
    for waits in (*watch.steps[1:], watch.log):  # before the first, all weights are looked at
        assert list(waits.values()) == [1], waits
    assert next(iter(watch.steps[1])).startswith("blur_trainer/gradients/backend.py")  # the Gramian's three numbers
