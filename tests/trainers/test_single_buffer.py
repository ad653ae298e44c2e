"""One gradient buffer: the weights of the literal training and of the step with two, and what it refuses by name."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import test_step
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from support import reference
from support.models import collate, examples, tiny_llama
from support.runs import distance, settings, train, training_logs, weights
from test_skips import CONFIG, Broken, Snapshots, without
from test_step import RULES, case, literal, update_error

from blur_trainer.gradients.forward_mode import directional_derivative
from blur_trainer.gradients.rules import BLUR, MGDA, PCGrad, Sum
from blur_trainer.models.reference import REFERENCE_ADAPTER
from blur_trainer.objectives.distributions import KL
from blur_trainer.objectives.likelihood import NLL, GradAscent
from blur_trainer.objectives.preference import NPO
from blur_trainer.trainers import single_buffer
from blur_trainer.trainers.unlearning import UnlearningTrainer

FORGET, RETAIN = examples(10, seed=5), examples(1, seed=6)


def ours(model, tmp_path, rule, single_gradient_buffer=True, **kwargs):
    return test_step.ours(model, tmp_path, rule, single_gradient_buffer=single_gradient_buffer, **kwargs)


# ---- the inner product ----


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_derivative_is_the_inner_product_with_the_gradient(tie, attention):
    """With grouped queries, padding and prompts; float64, but Llama normalizes in float32."""
    model = tiny_llama(0, tie=tie, attn_implementation=attention).double()
    batch = collate(examples(5, seed=3))
    gradient = reference.full_gradient(model, NLL()(model, batch))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    along = {name: torch.randn(g.shape, generator=generator).double() for name, g in zip(names, gradient, strict=True)}
    want = sum((g * along[name]).sum() for name, g in zip(names, gradient, strict=True))
    got = directional_derivative(model, along, lambda m: NLL()(m, batch))
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert not got.requires_grad and all(p.grad is None for p in model.parameters())


def test_a_direction_that_the_loss_does_not_see():
    model = tiny_llama(0)
    assert directional_derivative(model, {}, lambda m: NLL()(m, collate(examples(2)))) == 0


def test_layers_are_not_checkpointed():
    """Before torch 2.13 a checkpoint has no forward mode, and there is nothing to recompute."""
    model, batch = tiny_llama(0), collate(examples(2))
    along = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    want = directional_derivative(model, along, lambda m: NLL()(m, batch))
    model.activation_checkpointing_enable()
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = lambda *args, **kwargs: pytest.fail("checkpointed")
    assert directional_derivative(model.train(), along, lambda m: NLL()(m, batch)) == want
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


# ---- the same weights ----


@pytest.mark.parametrize("name", ["blur", "blur_wdmp", "blur_clamp", "sum"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (1, 4)])
def test_rules_with_and_without_accumulation(name, batch_size, accumulation, tmp_path):
    rule, direction = RULES[name]
    start = tiny_llama(0)
    batches = {"batch_size": batch_size, "accumulation": accumulation}
    got = ours(copy.deepcopy(start), tmp_path / "a", rule, **batches)
    assert update_error(got.model, literal(copy.deepcopy(start), direction), start) < 2e-4
    two = ours(copy.deepcopy(start), tmp_path / "b", rule, single_gradient_buffer=False, **batches)
    assert update_error(got.model, two.model, start) < 2e-4


@pytest.mark.parametrize("name", ["blur", "sum"])
@pytest.mark.parametrize(
    "features",
    [
        case(tie=True),
        case(frozen=True),
        case(unused=True),
        case(lora=True),
        case(activation_checkpointing=True),
        case(lora=True, activation_checkpointing=True),
        case(fused_lm_head=True),
        case(clipped=True, max_grad_norm=0.05),
    ],
)
def test_features(name, features, tmp_path):
    features = dict(features)
    start = tiny_llama(0, tie=features.pop("tie", False))
    if features.pop("frozen", False):
        start.model.layers[0].requires_grad_(False)
        start.model.embed_tokens.requires_grad_(False)
    if features.pop("unused", False):
        start.never_called = torch.nn.Linear(3, 3)
    if features.pop("lora", False):
        torch.manual_seed(0)
        start = get_peft_model(start, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if features.pop("clipped", False):  # under Adam a clipped step looks like an unclipped one
        features["optim"] = "sgd"
    rule, direction = RULES[name]
    got = ours(copy.deepcopy(start), tmp_path / "a", rule, **features)
    two = ours(copy.deepcopy(start), tmp_path / "b", rule, single_gradient_buffer=False, **features)
    assert distance(weights(got.model), weights(two.model)) < 2e-4 * distance(weights(got.model), weights(start))
    if "optim" not in features:
        assert update_error(got.model, literal(copy.deepcopy(start), direction), start) < 2e-4
    for (key, a), b in zip(got.model.named_parameters(), start.parameters(), strict=True):
        if not a.requires_grad or "never_called" in key:
            assert torch.equal(a, b), f"{key} moved"


@pytest.mark.parametrize("lora", [False, True])
def test_npo_and_kl(lora, tmp_path):
    """The reference's logits have no derivative along the weights, also where the reference is the model itself."""
    start, ref = tiny_llama(0), tiny_llama(1)
    objectives = {"forget_objective": NPO(), "retain_objective": KL(), "ref_model": ref}
    if lora:
        torch.manual_seed(0)
        start = get_peft_model(start, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        objectives.pop("ref_model")
    one, two = (
        ours(copy.deepcopy(start), tmp_path / str(on), RULES["blur"][0], on, **copy.deepcopy(objectives))
        for on in (True, False)
    )
    copied = {k: v for k, v in weights(two.model).items() if f".{REFERENCE_ADAPTER}" in k}
    moved = distance(weights(two.model), weights(start) | copied)
    assert moved > 1e-3
    assert distance(weights(one.model), weights(two.model)) < 2e-4 * moved


def test_both_passes_over_the_retain_set_see_one_dropout_mask(tmp_path):
    one, two = (
        ours(tiny_llama(0, dropout=0.3), tmp_path / str(on), BLUR(gamma=0.5), on, accumulation=2)
        for on in (True, False)
    )
    assert update_error(one.model, two.model, tiny_llama(0)) < 2e-4


def test_bf16_autocast(tmp_path):
    logs = [
        training_logs(ours(tiny_llama(0), tmp_path / str(on), BLUR(gamma=0.5), on, optim="sgd", bf16=bf16))[0]
        for on, bf16 in ((True, True), (False, True), (False, False))
    ]
    one, two, exact = logs
    assert two["loss"] != exact["loss"], "autocast was off"
    assert one["grad/forget_norm"] == two["grad/forget_norm"]
    for key in ("grad/weight_forget", "grad/retain_norm", "grad/cosine", "grad_norm"):
        assert one[key] == pytest.approx(two[key], rel=3e-2, abs=3e-3), key


# ---- what it logs ----


def test_the_log_is_that_of_two_buffers(tmp_path):
    """`||g_r||` and the cosine too: they follow from the norm of the combination."""
    rule = BLUR(gamma=0.5, alpha=2.0)
    one, two = (training_logs(ours(tiny_llama(0), tmp_path / str(on), rule, on)) for on in (True, False))
    assert len(one) == len(two) == 3
    for got, want in zip(one, two, strict=True):
        assert got.keys() == want.keys() and "grad/cosine" in got
        for key in ("loss", "grad_norm", *(key for key in got if "/" in key)):
            assert got[key] == pytest.approx(want[key], rel=2e-3), key


def test_a_fixed_sum_pays_for_no_inner_product(tmp_path, monkeypatch):
    monkeypatch.setattr(single_buffer, "_inner_product", lambda *args: pytest.fail("not needed"))
    for entry in training_logs(ours(tiny_llama(0), tmp_path, Sum())):
        assert {"loss/forget", "loss/retain", "grad/forget_norm", "grad/weight_retain"} <= entry.keys()
        assert not {"grad/retain_norm", "grad/cosine"} & entry.keys()


def test_a_norm_lost_in_rounding_is_left_out(tmp_path):
    logs = training_logs(ours(tiny_llama(0), tmp_path, BLUR(alpha=1e-4)))
    assert all("grad/forget_norm" in entry and "grad/retain_norm" not in entry for entry in logs)


# ---- steps that are not finite ----


def skipping(tmp_path, role, value, snapshots, single=True, rule=None):
    healthy = {"forget": GradAscent(), "retain": NLL()}
    # of the retain objective every second call is the forward mode's
    calls = ((4, 5) if value == 1e30 else (4,)) if role == "retain" and not isinstance(rule, Sum) and single else (2,)
    objectives = healthy | {role: Broken(healthy[role], calls, value)}
    args = settings(tmp_path, **CONFIG, single_gradient_buffer=single)
    names = {f"{key}_objective": objective for key, objective in objectives.items()}
    return train(args, FORGET, RETAIN, rule=rule, callbacks=[snapshots], **names)


@pytest.fixture(scope="module")
def never_shown(tmp_path_factory):
    """The weights that a rule ends with where the third forget batch is missing: the same whatever broke it."""
    known = {}

    def end(rule):
        if rule not in known:
            args = settings(tmp_path_factory.mktemp("never"), **CONFIG, single_gradient_buffer=True)
            objectives = {"forget_objective": GradAscent(), "retain_objective": NLL()}
            known[rule] = weights(train(args, without(2), RETAIN, rule=rule, **objectives).model)
        return known[rule]

    return end


@pytest.mark.parametrize("rule", [BLUR(gamma=0.5), BLUR(clamp=True), Sum()], ids=["blur", "clamp", "sum"])
@pytest.mark.parametrize("role", ["forget", "retain"])
@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 1e30], ids=["nan", "inf", "-inf", "overflow"]
)
def test_a_step_that_is_not_finite_moves_nothing(rule, role, value, never_shown, tmp_path):
    seen = Snapshots()
    trainer = skipping(tmp_path / "a", role, value, seen, rule=rule)
    for step in range(5):
        moved = distance(seen.weights[step], seen.weights[step + 1])
        assert (moved == 0) == (step == 2), f"step {step + 1} moved the weights by {moved}"
    assert [entry.get("grad/skipped") for entry in training_logs(trainer)] == [None, None, 1.0, None, None]
    assert distance(weights(trainer.model), never_shown(rule)) == 0


def test_a_retain_gradient_that_breaks_in_its_backward_pass_only(tmp_path):
    """Its derivative along the forget gradient was finite, and so were the weights: the combination is looked at."""

    class Breaking(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(losses):
            return losses.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.nan

        @staticmethod
        def jvp(ctx, tangent):
            return tangent.clone()

    calls = []

    @dataclass(frozen=True)
    class Breaks(NLL):
        def losses(self, model, batch, reference):
            calls.append(batch)
            losses = super().losses(model, batch, reference)
            return Breaking.apply(losses) if len(calls) in (5, 6) else losses

    seen = Snapshots()
    args = settings(tmp_path, **CONFIG, single_gradient_buffer=True)
    objectives = {"forget_objective": GradAscent(), "retain_objective": Breaks()}
    trainer = train(args, FORGET, RETAIN, callbacks=[seen], **objectives)
    assert [distance(a, b) == 0 for a, b in zip(seen.weights, seen.weights[1:], strict=False)] == [
        step == 2 for step in range(5)
    ]
    assert training_logs(trainer)[2]["grad/skipped"] == 1.0


def test_a_forget_gradient_of_zero(tmp_path):
    """Saturated, as `rho = 0` says: only retain acts."""

    @dataclass(frozen=True)
    class Saturated(GradAscent):
        def losses(self, model, batch, reference):
            return super().losses(model, batch, reference) * 0.0

    start = tiny_llama(0)
    got = ours(copy.deepcopy(start), tmp_path, BLUR(gamma=0.5), forget_objective=Saturated())
    want = literal(copy.deepcopy(start), lambda f, r: r)
    assert update_error(got.model, want, start) < 2e-4


# ---- refused by name ----


@pytest.mark.parametrize(
    ("rule", "config", "words"),
    [
        (BLUR(lower_level="retain"), {}, ["lower_level='retain'", "norm of the retain gradient", "`sum`"]),
        (PCGrad(), {}, ["PCGrad()", "needs_retain_norm"]),
        (MGDA(), {}, ["MGDA()", "lower_level='forget'"]),
        (lambda gramian: torch.ones(2), {}, ["needs_retain_norm = False"]),
        (Sum(), {"offload_forget_gradient": True}, ["offload_forget_gradient=True"]),
        (Sum(), {"fp16": True}, ["fp16=True", "`bf16=True`"]),
        (
            Sum(),
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            ["reentrant", "'use_reentrant': False"],
        ),
    ],
)
def test_refused_settings(rule, config, words, tmp_path):
    with pytest.raises(ValueError, match="single_gradient_buffer=True") as raised:
        ours("no/such-model", tmp_path, rule, **config)  # said before it is looked for
    assert [word for word in words if word not in str(raised.value)] == []


def test_refused_without_a_retain_dataset(tmp_path):
    args = settings(tmp_path, single_gradient_buffer=True)
    with pytest.raises(ValueError, match="only one gradient"):
        UnlearningTrainer(tiny_llama(), args, FORGET, rule=Sum(retain_weight=0.0))


@pytest.mark.parametrize("engine", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_refused_where_the_engine_shards(engine):
    with pytest.raises(NotImplementedError, match="DDP, not under FSDP or DeepSpeed"):
        single_buffer.check_forward_mode(None, SimpleNamespace(single_gradient_buffer=True), engine)


def test_refused_for_a_model_without_forward_mode(tmp_path):
    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    class Fused(torch.nn.Module):
        def forward(self, x):
            return Kernel.apply(x)

    model = tiny_llama()
    model.model.norm = Fused()
    with pytest.raises(NotImplementedError, match=r"attn_implementation='sdpa'.*jvp"):
        ours(model, tmp_path, Sum())


def test_a_rule_that_says_it_does_not_need_the_norm(tmp_path):
    @dataclass(frozen=True)
    class Mine(BLUR):
        needs_retain_norm = False

    start = tiny_llama(0)
    got = ours(copy.deepcopy(start), tmp_path, Mine(gamma=0.5))
    assert update_error(got.model, literal(copy.deepcopy(start), RULES["blur"][1]), start) < 2e-4
