"""Configs: command line, JSON, plain `TrainingArguments`, and what is written down of a run."""

import dataclasses
import json

import pytest
import torch
from support.cases import every
from support.models import examples, tiny_llama
from support.runs import settings, train
from transformers import HfArgumentParser, TrainingArguments

from blur_trainer.gradients.by_name import RULES
from blur_trainer.gradients.rules import BLUR, MGDA, NGDiff, PCGrad, Sum
from blur_trainer.gradients.stateful_rules import GRU, PDU, Constrained
from blur_trainer.objectives.activations import ActivationMatch
from blur_trainer.objectives.by_name import FORGET_OBJECTIVES, RETAIN_OBJECTIVES
from blur_trainer.objectives.contrast import FLAT, JensUn
from blur_trainer.objectives.distributions import CEU, JSD, KL, UNDIAL, ClampedEntropy, Distillation, Margin, Uniform
from blur_trainer.objectives.level import TargetLoss, Until
from blur_trainer.objectives.likelihood import IDK, NLL, GradAscent
from blur_trainer.objectives.preference import DPO, NPO, AltPO, SimNPO
from blur_trainer.objectives.rmu import RMU
from blur_trainer.objectives.weighted import WGA, SatImp
from blur_trainer.trainers.blur import BLURConfig, BLURTrainer
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.grad_diff import GradDiffConfig, GradDiffTrainer
from blur_trainer.trainers.unlearning import UnlearningTrainer
from blur_trainer.uld.trainer import ULDConfig

CONFIGS = [UnlearningConfig, BLURConfig, GradDiffConfig]


def parse(config_class, *words):
    (args,) = HfArgumentParser(config_class).parse_args_into_dataclasses(
        ["--output_dir", "out", "--use_cpu", "--report_to", "none", *words]
    )
    return args


@pytest.mark.parametrize(
    ("config_class", "forget", "retain", "rule"),
    [
        (UnlearningConfig, NPO(), NLL(), Sum()),
        (BLURConfig, NPO(), NLL(), BLUR()),
        (GradDiffConfig, GradAscent(), NLL(), Sum()),
    ],
)
@pytest.mark.parametrize("how", ["python", "command line"])
def test_defaults(config_class, forget, retain, rule, how):
    args = config_class("out") if how == "python" else parse(config_class)
    assert args.build_forget_objective() == forget
    assert args.build_retain_objective() == retain
    assert args.build_rule() == rule
    assert args.remove_unused_columns is False
    assert (args.learning_rate, args.logging_steps, args.max_length) == (1e-5, 10, 1024)
    assert not (args.precompute_ref_logps or args.drop_empty or args.clamp)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_command_line_reaches_objects(config_class):
    args = parse(
        config_class,
        *("--forget_objective", "simnpo", "--forget_objective_kwargs", '{"beta": 2.5, "delta": 0.5}'),
        *("--retain_objective", "kl", "--retain_objective_kwargs", "{}"),
        *("--rule", "blur", "--gamma", "0.2", "--alpha", "800", "--lower_level", "retain", "--clamp", "True"),
        *("--precompute_ref_logps", "--max_length", "256", "--drop_empty", "true", "--learning_rate", "3e-4"),
        *("--qa_template", "Q: {question}", "--max_skipped_steps", "3", "--dataset_num_proc", "2"),
        *("--model_init_kwargs", '{"dtype": "bfloat16"}'),
    )
    assert args.build_forget_objective() == SimNPO(beta=2.5, delta=0.5)
    assert args.build_retain_objective() == KL()
    assert args.build_rule() == BLUR(lower_level="retain", gamma=0.2, alpha=800.0, clamp=True)
    assert args.model_init_kwargs == {"dtype": "bfloat16"}
    assert (args.precompute_ref_logps, args.drop_empty) == (True, True)
    assert (args.max_length, args.max_skipped_steps, args.dataset_num_proc) == (256, 3, 2)
    assert (args.learning_rate, args.qa_template) == (3e-4, "Q: {question}")


def test_sum_weights_from_the_command_line():
    args = parse(BLURConfig, "--rule", "sum", "--forget_weight", "0.125", "--retain_weight", "0")
    assert args.build_rule() == Sum(forget_weight=0.125, retain_weight=0.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grad_ascent", GradAscent()),
        ("npo", NPO()),
        ("simnpo", SimNPO()),
        ("dpo", DPO()),
        ("idk", IDK()),
        ("rmu", RMU()),
        ("wga", WGA()),
        ("satimp", SatImp()),
        ("jensun", JensUn()),
        ("flat", FLAT()),
        ("altpo", AltPO()),
        ("undial", UNDIAL()),
        ("ce_u", CEU()),
        ("uniform", Uniform()),
        ("clamped_entropy", ClampedEntropy()),
        ("margin", Margin()),
        ("target_loss", TargetLoss()),
        ("distill", Distillation()),
    ],
)
def test_every_forget_name(name, expected):
    assert set(FORGET_OBJECTIVES) == {
        "grad_ascent",
        "npo",
        "simnpo",
        "dpo",
        "idk",
        "rmu",
        "wga",
        "satimp",
        "jensun",
        "flat",
        "altpo",
        "undial",
        "ce_u",
        "uniform",
        "clamped_entropy",
        "margin",
        "target_loss",
        "distill",
    }
    assert parse(BLURConfig, "--forget_objective", name).build_forget_objective() == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nll", NLL()),
        ("kl", KL()),
        ("activation_match", ActivationMatch()),
        ("jsd", JSD()),
    ],
)
def test_every_retain_name(name, expected):
    assert set(RETAIN_OBJECTIVES) == {
        "nll",
        "kl",
        "activation_match",
        "jsd",
    }
    assert parse(BLURConfig, "--retain_objective", name).build_retain_objective() == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[("blur", BLUR()), ("sum", Sum()), ("pcgrad", PCGrad()), ("mgda", MGDA()), ("ngdiff", NGDiff())],
        *[("gru", GRU()), ("constrained", Constrained()), ("pdu", PDU())],
    ],
)
def test_every_rule_name(name, expected):
    assert set(RULES) == {"blur", "sum", "pcgrad", "mgda", "ngdiff", "gru", "constrained", "pdu"}
    assert parse(BLURConfig, "--rule", name).build_rule() == expected


def test_rule_kwargs():
    config = parse(BLURConfig, "--rule", "pdu", "--rule_kwargs", '{"epsilon": 0.1, "rate": 2}')
    assert config.build_rule() == PDU(epsilon=0.1, rate=2)
    config = BLURConfig("out", rule="constrained", rule_kwargs={"rule": "blur", "epsilon": 0.1}, gamma=0.2)
    assert config.build_rule() == Constrained(BLUR(gamma=0.2), epsilon=0.1)
    config = BLURConfig("out", rule="constrained", forget_weight=0.1)
    assert config.build_rule() == Constrained(Sum(forget_weight=0.1))
    with pytest.raises(ValueError, match=r"'gru' does not read \['retain_weight'\]"):
        BLURConfig("out", rule="gru", retain_weight=3.0)
    with pytest.raises(ValueError, match=r"'pdu' takes no argument \['eps'\]; accepted: \['rule', 'epsilon'"):
        BLURConfig("out", rule="pdu", rule_kwargs={"eps": 0.1})
    with pytest.raises(ValueError, match="'blur' takes no `rule_kwargs`; its settings are lower_level, gamma"):
        BLURConfig("out", rule_kwargs={"gamma": 0.1})
    with pytest.raises(ValueError, match="GRU: `smoothing` must be a number above 0"):
        BLURConfig("out", rule="gru", rule_kwargs={"smoothing": 0})


def test_json_file_as_the_only_argument(tmp_path):
    path = tmp_path / "args.json"
    path.write_text(
        json.dumps({"output_dir": "out", "use_cpu": True, "gamma": 0.1, "forget_objective_kwargs": {"beta": 0.4}})
    )
    (args,) = HfArgumentParser(BLURConfig).parse_json_file(str(path))
    assert args.build_rule() == BLUR(gamma=0.1)
    assert args.build_forget_objective() == NPO(beta=0.4)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_help_names_every_field(config_class, capsys):
    with pytest.raises(SystemExit) as stop:
        HfArgumentParser(config_class).parse_args_into_dataclasses(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(config_class)} - inherited
    assert len(own) >= 15
    assert [name for name in own if f"--{name}" not in text] == []
    missing = [f.name for f in dataclasses.fields(config_class) if f.name in own and not f.metadata.get("help")]
    assert missing == []


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--forget_objective", "nop"], ["nop", "npo", "simnpo"]),
        (["--retain_objective", "npo"], ["npo", "nll", "kl"]),
        (["--rule", "blurr"], ["blurr", "blur", "mgda"]),
        (["--lower_level", "neither"], ["neither", "forget", "retain"]),
    ],
)
def test_the_parser_refuses_unknown_names(words, names, capsys):
    with pytest.raises(SystemExit):
        parse(BLURConfig, *words)
    error = capsys.readouterr().err
    assert all(name in error for name in names)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_round_trip_through_json(config_class, tmp_path):
    args = config_class(
        str(tmp_path),
        forget_objective="npo",
        forget_objective_kwargs='{"beta": 0.3}',
        rule="blur",
        gamma=0.2,
        use_cpu=True,
    )
    path = tmp_path / "args.json"
    path.write_text(args.to_json_string())
    (again,) = HfArgumentParser(config_class).parse_json_file(str(path), allow_extra_keys=True)
    assert again.build_forget_objective() == NPO(beta=0.3)
    assert again.build_rule() == BLUR(gamma=0.2)
    assert again.to_dict() == args.to_dict()


def test_dict_from_a_plain_training_arguments_reaches_the_trainer(tmp_path):
    plain = TrainingArguments(
        str(tmp_path / "run"),
        per_device_train_batch_size=3,
        learning_rate=1e-3,
        max_steps=1,
        use_cpu=True,
        report_to="none",
    )
    for trainer_class, config_class, rule in [
        (BLURTrainer, BLURConfig, BLUR()),
        (GradDiffTrainer, GradDiffConfig, Sum()),
        (UnlearningTrainer, UnlearningConfig, Sum()),
    ]:
        trainer = trainer_class(tiny_llama(), plain, examples(4), examples(4, 1))
        assert type(trainer.args) is config_class
        assert (trainer.args.per_device_train_batch_size, trainer.args.learning_rate) == (3, 1e-3)
        assert trainer.args.output_dir == str(tmp_path / "run")
        assert trainer.args.remove_unused_columns is False
        assert trainer.rule == rule


def test_another_presets_defaults_are_refused(tmp_path):
    """`BLURTrainer` never runs a sum because of its config's class; what was set otherwise, or passed, counts."""
    given = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}

    def refuse(trainer, config, setting, **kwargs):
        with pytest.raises(TypeError, match=f"{config.__name__}.*{setting}.*{trainer.config_class.__name__}"):
            trainer(tiny_llama(), config(**given, **kwargs), examples(4), examples(4, 1))
        with pytest.raises(TypeError, match=setting):
            trainer.config_class.from_training_arguments(config(**given, **kwargs))

    every(
        {
            "a sum": (lambda: refuse(BLURTrainer, UnlearningConfig, "rule='sum'")),
            "GradDiff, with the rule": (lambda: refuse(BLURTrainer, GradDiffConfig, "forget_objective", rule="blur")),
            "NPO": (lambda: refuse(GradDiffTrainer, UnlearningConfig, "forget_objective='npo'")),
            "BLUR": (lambda: refuse(GradDiffTrainer, BLURConfig, "blur", forget_objective="simnpo")),
        },
        lambda act: act(),
    )
    said = UnlearningConfig(**given, rule="pcgrad")
    assert BLURTrainer(tiny_llama(), said, examples(4), examples(4, 1)).rule == PCGrad()
    passed = BLURTrainer(tiny_llama(), UnlearningConfig(**given), examples(4), examples(4, 1), rule=Sum(2.0))
    assert passed.rule == Sum(2.0)
    general = UnlearningTrainer(tiny_llama(), BLURConfig(**given), examples(4), examples(4, 1))
    assert general.rule == BLUR()


def test_default_arguments_are_named_after_model_and_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    model.config._name_or_path = "some/where/little-model"
    trainer = BLURTrainer(model, None, examples(4), examples(4, 1))
    assert trainer.args.output_dir == "little-model-BLUR"
    assert type(trainer.args) is BLURConfig


def test_arguments_are_saved_with_the_model_and_readable(tmp_path):
    trainer = train(settings(tmp_path / "run", gamma=0.25, max_steps=1), examples(4), examples(4, 1))
    trainer.save_model()
    with torch.serialization.safe_globals([BLURConfig]):
        saved = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert type(saved) is BLURConfig
    assert saved.build_rule() == BLUR(gamma=0.25)
    assert saved.to_dict() == trainer.args.to_dict()
    json.dumps(trainer.args.to_dict())  # what trackers are given


def test_kwargs_objects_beat_names(tmp_path):
    trainer = BLURTrainer(
        tiny_llama(),
        settings(tmp_path, forget_objective="grad_ascent", rule="sum"),
        examples(4),
        examples(4, 1),
        forget_objective=SimNPO(beta=2.5),
        retain_objective=KL(),
        rule=PCGrad(),
    )
    assert trainer.objectives == {"forget": SimNPO(beta=2.5), "retain": KL()}
    assert trainer.rule == PCGrad()


@pytest.mark.parametrize(
    ("field", "value"), [("bf16", False), ("seed", 7), ("max_grad_norm", 0.3), ("warmup_steps", 0.1)]
)
def test_training_arguments_fields_keep_their_meaning(field, value):
    assert getattr(BLURConfig("out", use_cpu=True, **{field: value}), field) == value


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--forget_level", "4.5"], Until(NPO(), 4.5)),
        (["--forget_level", "column"], Until(NPO())),
        (["--forget_level", "4.5", "--forget_objective", "target_loss"], TargetLoss(4.5)),
        (["--forget_level", "column", "--forget_objective", "target_loss"], TargetLoss()),
        (["--forget_level", "4", "--level_two_sided", "true", "--forget_objective", "rmu"], Until(RMU(), 4.0, True)),
    ],
)
def test_a_level_is_target_losses_own_and_wraps_every_other_objective(words, expected):
    assert parse(BLURConfig, *words).build_forget_objective() == expected


@pytest.mark.parametrize("level", [0.0, -1, float("nan"), float("inf"), "high", True])
def test_a_level_that_cannot_be(level, tmp_path):
    with pytest.raises((TypeError, ValueError), match="`forget_level` must be"):
        BLURConfig(str(tmp_path), use_cpu=True, forget_level=level)


def test_two_levels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one place only"):
        BLURConfig(
            str(tmp_path),
            use_cpu=True,
            forget_objective="target_loss",
            forget_objective_kwargs={"level": 3.0},
            forget_level=4.0,
        )


def test_uld_takes_no_level(tmp_path):
    with pytest.raises(ValueError, match=r"forget_level=4\.0.*tune_weight"):
        ULDConfig(str(tmp_path), use_cpu=True, forget_level=4.0)
