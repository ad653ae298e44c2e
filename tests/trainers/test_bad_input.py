"""Wrong input through the public surface: one line that names it, before training, and nothing written.

`refuse` is the common judge: exception type, one line, the words that a user needs, and an untouched `output_dir`.
"""

import re
from itertools import product
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from support.cases import every
from support.models import VOCAB, examples, tiny_llama
from support.runs import distance, settings, weights
from support.tiny_tokenizer import tiny_tokenizer
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from blur_trainer.gradients.rules import BLUR, Sum
from blur_trainer.objectives.by_name import FORGET_OBJECTIVES, RETAIN_OBJECTIVES
from blur_trainer.objectives.distributions import KL
from blur_trainer.objectives.likelihood import IDK, NLL, GradAscent
from blur_trainer.objectives.preference import DPO, NPO, SimNPO
from blur_trainer.trainers.blur import BLURConfig, BLURTrainer
from blur_trainer.trainers.grad_diff import GradDiffConfig, GradDiffTrainer

FORGET, RETAIN = examples(4), examples(4, 1)
LORA = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)


def snapshot(folder: Path) -> dict[str, bytes] | None:
    """Every file below `folder`; `None` where there is no folder."""
    if not folder.exists():
        return None
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(error, words, output_dir, action, *, untouched=True):
    """`action` raises exactly `error`, in one line with all `words`, and leaves `output_dir` as it was."""
    before = snapshot(output_dir)
    with pytest.raises(error) as raised:
        action()
    message = str(raised.value)
    assert type(raised.value) is error
    assert "\n" not in message, f"more than one line: {message!r}"
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in {message!r}"
    after = snapshot(output_dir)
    assert after == before or (not untouched and not after), f"written: {sorted(set(after or {}) - set(before or {}))}"
    return message


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def attempt(out):
    """Construct and train with one thing wrong; constructing is where it should end."""

    def run(forget=FORGET, retain=RETAIN, *, model=None, args=None, trainer_class=BLURTrainer, config=None, **kwargs):
        args = settings(out, **(config or {})) if args is None else args
        return trainer_class(tiny_llama() if model is None else model, args, forget, retain, **kwargs)

    return run


def text_model() -> LlamaForCausalLM:
    """Large enough for `tiny_tokenizer`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


# ---- datasets ----


def stream(rows):
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


def test_empty_dataset(attempt, out):
    empty = [[], datasets.Dataset.from_list([]), datasets.Dataset.from_list(FORGET).select([]), stream([])]

    def check(role, empty):
        refuse(ValueError, [f"`{role}`", "empty", "at least one"], out, lambda: attempt(**{role: empty}))

    every(product(["forget", "retain"], empty), check)


WRONG_TYPE_OF_DATASET = {
    "name": ("locuslab/TOFU", ["string", "locuslab/TOFU", "load_dataset"]),
    "dict": ({"train": FORGET}, ["splits", "train"]),
    "DatasetDict": (datasets.DatasetDict({"train": datasets.Dataset.from_list(FORGET)}), ["DatasetDict", "train"]),
    "tuple": (tuple(FORGET), ["tuple", "list of dicts"]),
    "int": (42, ["int", "list of dicts"]),
    "strings": (["some text"], ["Row 0", "str", "dict"]),
    "torch dataset": (torch.utils.data.TensorDataset(torch.ones(3)), ["TensorDataset", "datasets.Dataset"]),
}


def test_wrong_type_of_dataset(attempt, out):
    def check(role, wrong, words):
        refuse(TypeError, [f"`{role}`", *words], out, lambda: attempt(**{role: wrong}))

    every(((role, *case) for role in ["forget", "retain"] for case in WRONG_TYPE_OF_DATASET.values()), check)


def test_forget_left_out(out):
    action = lambda: BLURTrainer(tiny_llama(), settings(out), retain_dataset=RETAIN)  # noqa: E731
    refuse(TypeError, ["`forget`", "NoneType", "datasets.Dataset"], out, action)


def test_missing_columns(attempt, out):
    def check(role, rows):
        words = [
            f"`{role}`",
            *rows[0],
            "`text`",
            "`prompt`+`completion`",
            "`messages`",
            "`question`+`answer`",
            "`input_ids`",
        ]
        refuse(ValueError, words, out, lambda: attempt(**{role: rows}))

    rows = [{"body": "x"}, {"prompt": "x"}, {"question": "x"}, {"labels": [1, 2]}, {}]
    every(product(["forget", "retain"], [[row] for row in rows]), check)


FIELD_THAT_IS_NO_STRING = {
    "null text": ([{"text": "fine"}, {"text": None}], "text", "NoneType"),
    "number": ([{"text": "fine"}, {"text": 3}], "text", "int"),
    "null completion": (
        [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}],
        "completion",
        "NoneType",
    ),
    "list question": ([{"question": "a", "answer": "b"}, {"question": ["a"], "answer": "b"}], "question", "list"),
    "absent answer": ([{"question": "a", "answer": "b"}, {"question": "a"}], "answer", "NoneType"),
    "string messages": ([{"messages": [{"role": "user", "content": "a"}]}, {"messages": "hello"}], "messages", ""),
}


def test_field_that_is_no_string(attempt, out):
    """The first row of a stream is checked at once, so the bad row comes first there."""

    def check(role, rows, column, kind, kind_of_set):
        if kind_of_set == "stream" and column not in rows[1]:
            rows = [rows[0], rows[1] | {column: None}]  # a stream has the columns of its first row
        given = rows if kind_of_set == "list" else stream(rows[::-1])
        config = {"max_steps": 1}
        role_first = column == "messages" and kind_of_set == "list"
        error = ValueError if role_first else TypeError
        refuse(
            error,
            [f"`{role}`", f"`{column}`", "row 1" if error is TypeError and kind_of_set == "list" else "row 0", kind],
            out,
            lambda: attempt(model=text_model(), processing_class=tiny_tokenizer(), config=config, **{role: given}),
        )

    every(
        (
            (role, *case, kind)
            for role in ["forget", "retain"]
            for case in FIELD_THAT_IS_NO_STRING.values()
            for kind in ["list", "stream"]
        ),
        check,
    )


BAD_TOKENS = {
    "string": ({"input_ids": "1 2 3"}, TypeError, ["`input_ids`", "str", "integers"]),
    "floats": ({"input_ids": [1.0, 2.0]}, TypeError, ["`input_ids`", "float", "integers"]),
    "other length": ({"input_ids": [1, 2, 3], "labels": [1, 2]}, ValueError, ["3", "2", "one label per token"]),
    "id = vocab": ({"input_ids": [5, VOCAB]}, ValueError, [str(VOCAB), "vocabulary", "resize_token_embeddings"]),
    "negative id": ({"input_ids": [5, -1]}, ValueError, ["-1", "vocabulary"]),
    "label > vocab": (
        {"input_ids": [5, 6], "labels": [5, VOCAB + 3]},
        ValueError,
        [str(VOCAB + 3), "`labels`", "vocabulary"],
    ),
}


def test_bad_tokens(attempt, out):
    def check(role, row, error, words):
        message = refuse(error, [f"`{role}`", *words], out, lambda: attempt(**{role: [row]}))
        assert "row 0" in message.lower()

    every(((role, *case) for role in ["forget", "retain"] for case in BAD_TOKENS.values()), check)


def test_text_without_tokenizer(attempt, out):
    refuse(
        ValueError,
        ["`forget`", "`text`", "`processing_class`", "`input_ids`"],
        out,
        lambda: attempt([{"text": "a document"}]),
    )


@pytest.mark.parametrize("role", ["forget", "retain"])
def test_no_answer_token_after_truncation_counts_and_names(attempt, out, role):
    def row(prompt):
        return {"input_ids": list(range(3, 13)), "labels": [-100] * prompt + list(range(3 + prompt, 13))}

    rows, other = [row(2), row(7), row(1), row(8)], "retain" if role == "forget" else "forget"
    sets = {role: rows, other: [row(1)]}
    words = ["2 of the 4", f"`{role}`", "rows 1, 3", "max_length=6", "`drop_empty=True`"]
    refuse(ValueError, words, out, lambda: attempt(config={"max_length": 6}, **sets))
    trainer = attempt(config={"max_length": 6, "drop_empty": True}, **sets)
    kept = getattr(trainer.train_dataset, role)
    assert [example["labels"].count(-100) for example in kept] == [2, 1]


def test_model_context_truncates_too(attempt, out):
    """64 positions: a prompt of 70 tokens leaves no answer whatever `max_length` says."""
    row = {"input_ids": [5] * 80, "labels": [-100] * 70 + [5] * 10}
    refuse(ValueError, ["1 of the 1", "rows 0", "max_length=64"], out, lambda: attempt([row]))


def test_drop_empty_that_leaves_nothing(attempt, out):
    row = {"input_ids": [5] * 8, "labels": [-100] * 8}
    refuse(
        ValueError,
        ["1 of the 1", "`drop_empty=True`", "none"],
        out,
        lambda: attempt([row], config={"drop_empty": True}),
    )


def test_refusals_need_a_prompt(attempt, out):
    def check(name):
        refuse(
            ValueError,
            ["`forget`", "`prompt`+`completion`", "`question`+`answer`"],
            out,
            lambda: attempt(config={"forget_objective": name}),
        )

    every(["dpo", "idk"], check)


def test_evaluation_sets_are_checked_and_named(attempt, out):
    refuse(ValueError, ["`eval`", "empty"], out, lambda: attempt(eval_dataset=[]))
    refuse(ValueError, ["`eval_hold`", "empty"], out, lambda: attempt(eval_dataset={"forget": FORGET, "hold": []}))
    refuse(ValueError, ["`eval`", "body"], out, lambda: attempt(eval_dataset=[{"body": "x"}]))


def test_rows_with_other_columns_than_the_first(attempt, out):
    """Arrow would take the first row's columns and drop the rest of the others' in silence."""

    def check(role):
        rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
        refuse(ValueError, [f"`{role}`", "labels"], out, lambda: attempt(**{role: rows}))

    every(["forget", "retain"], check)


# ---- retain left out ----


def test_retain_left_out_where_the_rule_needs_it(attempt, out):
    def check(rule):
        refuse(ValueError, ["`retain_dataset`", "Sum(retain_weight=0)"], out, lambda: attempt(retain=None, rule=rule))

    every([None, BLUR(), Sum(), Sum(retain_weight=0.5), lambda gramian: gramian.new_ones(2)], check)


@pytest.mark.parametrize("how", ["rule", "config"])
def test_retain_left_out_where_nothing_needs_it(attempt, how):
    """Allowed, and it trains: the forget loss falls, and weights move as with a retain set of weight 0."""
    config = {"rule": "sum", "retain_weight": 0.0, "forget_objective": "grad_ascent"}
    kwargs = (
        {"config": config}
        if how == "config"
        else {"config": {"forget_objective": "grad_ascent"}, "rule": Sum(1.0, 0.0)}
    )
    alone = attempt(retain=None, **kwargs)
    alone.train()
    logs = [entry for entry in alone.state.log_history if "loss" in entry]
    assert logs[-1]["loss/forget"] < logs[0]["loss/forget"]
    assert logs[0]["loss"] == pytest.approx(logs[0]["loss/forget"])
    assert not any(key in entry for entry in logs for key in ("loss/retain", "grad/retain_norm", "grad/weight_retain"))
    both = attempt(**kwargs)
    both.train()
    assert distance(weights(alone.model), weights(both.model)) <= 1e-7


# ---- names and objects ----


SETTINGS_THAT_SAY_NOTHING = [
    ({"forget_objective": "nop"}, ["forget_objective", "'nop'", ", ".join(sorted(FORGET_OBJECTIVES))]),
    ({"forget_objective": "NPO"}, ["forget_objective", "'NPO'", "npo"]),
    ({"forget_objective": "nll"}, ["forget_objective", "'nll'", "grad_ascent"]),
    ({"retain_objective": "npo"}, ["retain_objective", "'npo'", ", ".join(sorted(RETAIN_OBJECTIVES))]),
    ({"rule": "blurr"}, ["rule", "'blurr'", "blur, mgda, pcgrad, sum"]),
    ({"forget_objective_kwargs": {"betta": 1}}, ["forget_objective", "'npo'", "'betta'", "'beta'"]),
    ({"retain_objective_kwargs": {"beta": 1}}, ["retain_objective", "'nll'", "'beta'", "none"]),
    ({"forget_objective_kwargs": "{beta: 1}"}, ["`forget_objective_kwargs`", "JSON", "{beta: 1}"]),
    ({"forget_objective_kwargs": "[1]"}, ["`forget_objective_kwargs`", "JSON", "list"]),
    ({"retain_objective_kwargs": 3}, ["`retain_objective_kwargs`", "int"]),
    ({"model_init_kwargs": "no"}, ["`model_init_kwargs`", "JSON"]),
    ({"forget_objective_kwargs": {"beta": 0}}, ["NPO", "`beta`", "above 0", "got 0"]),
    ({"forget_objective_kwargs": {"beta": float("nan")}}, ["NPO", "`beta`", "nan"]),
    ({"forget_objective": "simnpo", "forget_objective_kwargs": {"beta": -1}}, ["SimNPO", "`beta`", "-1"]),
    ({"lower_level": "neither"}, ["`lower_level`", "'neither'", "'forget'", "'retain'"]),
    ({"gamma": -0.1}, ["`gamma`", "-0.1", "at least 0"]),
    ({"alpha": -1.0}, ["`alpha`", "-1.0", "at least 0"]),
    ({"max_skipped_steps": 0}, ["`max_skipped_steps`", "0", "at least 1"]),
    ({"max_length": 1}, ["`max_length`", "1", "at least 2"]),
    ({"label_smoothing_factor": 0.1}, ["`label_smoothing_factor`"]),
    ({"qa_template": "Q:"}, ["`qa_template`", "'Q:'", "{question}"]),
]


def test_settings_that_say_nothing(attempt, out):
    def check(config, words):
        refuse(ValueError, words, out, lambda: attempt(config=config))

    every(SETTINGS_THAT_SAY_NOTHING, check)


def test_rates_that_are_no_number(attempt, out):
    """NaN compares as neither negative nor positive, and would skip every step."""

    def check(config):
        refuse(ValueError, [f"`{next(iter(config))}`"], out, lambda: attempt(config=config))

    every([{"gamma": float("nan")}, {"alpha": float("nan")}, {"gamma": float("inf")}], check)


KWARGS_OF_ANOTHER_TYPE = [
    ({"forget_objective_kwargs": {"beta": "0.1"}}, ["NPO", "`beta`", "'0.1'"]),
    ({"forget_objective_kwargs": {"beta": None}}, ["NPO", "`beta`", "None"]),
    ({"forget_objective_kwargs": {"beta": [0.1]}}, ["NPO", "`beta`", "[0.1]"]),
]


def test_kwargs_of_another_type(out):
    """A quoted number in JSON is the commonest slip: the error says which argument, not "'>' not supported"."""

    def check(config, words):
        before = snapshot(out)
        with pytest.raises((TypeError, ValueError)) as raised:
            settings(out, **config)
        assert "\n" not in str(raised.value)
        assert [word for word in words if word not in str(raised.value)] == []
        assert snapshot(out) == before

    every(KWARGS_OF_ANOTHER_TYPE, check)


def test_objective_that_is_none(attempt, out):
    def check(role, wrong):
        words = [f"`{role}_objective`", "instance", "NPO(beta=0.1)"]
        refuse(TypeError, words, out, lambda: attempt(**{f"{role}_objective": wrong}))

    every(product(["forget", "retain"], ["npo", NPO, lambda model, batch: 0, 3]), check)


def test_rule_that_is_none(attempt, out):
    def check(wrong):
        refuse(TypeError, ["`rule`", "BLUR"], out, lambda: attempt(rule=wrong))

    every(["blur", BLUR, 0.5], check)


ARGS_THAT_ARE_NONE = {
    "dict": ({"output_dir": "x"}, ["`args`", "dict", "BLURConfig"]),
    "string": ("out", ["`args`", "str"]),
    "other config": (LORA, ["`args`", "LoraConfig"]),
}


def test_args_that_are_none(attempt, out):
    def check(wrong, words):
        refuse(TypeError, words, out, lambda: attempt(args=wrong))

    every(ARGS_THAT_ARE_NONE, check)


@pytest.mark.parametrize("role", ["forget", "retain"])
def test_an_objective_for_the_other_role_is_no_error(attempt, role):
    """Any forget x any retain x any rule: objects are not checked against the role they were written for."""
    attempt(config={"max_steps": 1}, **{f"{role}_objective": SimNPO()}).train()


# ---- output_dir ----


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model.safetensors.index.json",
        "adapter_model.safetensors",
        "trainer_state.json",
        "checkpoint-5/model.safetensors",
        "checkpoint-5/junk",
    ],
)
def test_output_dir_that_holds_another_run(attempt, out, name):
    path = out / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    trainer = attempt(config={"save_strategy": "steps", "save_steps": 1})
    first = name.split("/")[0]
    refuse(ValueError, [str(out), first, "another `output_dir`", "`resume_from_checkpoint=True`"], out, trainer.train)
    assert trainer.state.global_step == 0


def test_output_dir_of_a_finished_run(attempt, out):
    attempt(config={"max_steps": 1}).train()
    first = attempt(config={"max_steps": 1})
    first.train()
    first.save_model()
    refuse(ValueError, [str(out), "model.safetensors"], out, attempt(config={"max_steps": 1}).train)


def test_output_dir_that_is_a_file(attempt, out):
    out.write_text("a file")
    with pytest.raises((ValueError, OSError)) as raised:
        attempt().train()
    assert str(out) in str(raised.value) and "\n" not in str(raised.value)
    assert out.read_text() == "a file"


def test_other_files_in_output_dir_are_no_run(attempt, out):
    """Logs, notes and metrics of an earlier evaluation are not what training would overwrite."""
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    attempt(config={"max_steps": 1}).train()
    assert (out / "notes.txt").read_text() == "mine"


def test_training_twice_with_one_trainer_is_allowed_where_nothing_is_overwritten(attempt, out):
    trainer = attempt(config={"max_steps": 1, "save_strategy": "no"})
    trainer.train()
    trainer.train()
    trainer.args.save_strategy = "epoch"
    trainer.train()
    refuse(ValueError, [str(out), "checkpoint-1"], out, trainer.train)


@pytest.mark.parametrize("given", [True, "missing"])
def test_resume_where_nothing_is(attempt, out, given):
    trainer = attempt(config={"max_steps": 1})
    before = weights(trainer.model)
    resume = True if given is True else str(out / "checkpoint-7")
    words = [str(out)] + ([] if given is True else ["checkpoint-7"])
    refuse(ValueError, words, out, lambda: trainer.train(resume_from_checkpoint=resume))
    assert distance(before, weights(trainer.model)) == 0


def test_a_model_in_the_shards_of_an_earlier_trainer(out):
    model = tiny_llama()
    model.__class__ = type("FSDPLlama", (FSDPModule, type(model)), {})  # what `fully_shard` makes of it
    refuse(ValueError, ["earlier trainer", "save it"], out, lambda: BLURTrainer(model, settings(out), FORGET, RETAIN))


# ---- reference model ----


PRECOMPUTE_WHERE_NOTHING_READS_IT = {
    "only KL": ({"forget_objective": GradAscent(), "retain_objective": KL()}, ["GradAscent()", "KL()"]),
    "none": ({"forget_objective": GradAscent()}, ["GradAscent()", "NLL()"]),
    "simnpo": ({"forget_objective": SimNPO()}, ["SimNPO"]),
}


def test_precompute_where_nothing_reads_it(attempt, out):
    def check(objectives, words):
        action = lambda: attempt(config={"precompute_ref_logps": True}, **objectives)  # noqa: E731
        refuse(ValueError, ["`precompute_ref_logps=True`", "`npo`", "`dpo`", *words], out, action)

    every(PRECOMPUTE_WHERE_NOTHING_READS_IT, check)


def test_precompute_on_the_retain_side_is_never_ignored(attempt, out):
    """Reference log-probabilities are computed for the forget set: NPO as a *retain* objective cannot use them."""
    refuse(
        ValueError,
        ["`precompute_ref_logps"],
        out,
        lambda: attempt(config={"precompute_ref_logps": True}, forget_objective=GradAscent(), retain_objective=NPO()),
    )


@pytest.mark.parametrize("which", ["forget", "retain"])
def test_precompute_with_a_stream(out, which):
    """Refused when constructed: tokenizing hours of data first would be a waste."""
    sets = {"forget": FORGET, "retain": RETAIN} | {which: stream(FORGET)}
    args = settings(out, precompute_ref_logps=True, max_steps=2)
    if which == "retain":
        # the retain set is not gone over for log-probabilities, but pairs of a stream have no length
        words = ["`precompute_ref_logps=True`", "stream"]
    else:
        words = ["`precompute_ref_logps=True`", "stream", "length"]
    refuse(ValueError, words, out, lambda: BLURTrainer(tiny_llama(), args, sets["forget"], sets["retain"]))


def test_quantized_model_is_not_copied(attempt, out):
    model = tiny_llama()
    model.is_quantized = True
    refuse(ValueError, ["quantized", "`peft_config`", "`ref_model`"], out, lambda: attempt(model=model))


def test_ref_model_that_is_the_model(attempt, out):
    model = tiny_llama()
    refuse(ValueError, ["`ref_model`", "leave it out"], out, lambda: attempt(model=model, ref_model=model))


@pytest.mark.parametrize("how", ["PeftModel", "peft_config"])
def test_ref_model_that_is_the_model_inside_the_adapter(attempt, out, how):
    """PEFT puts the adapter into the very object: as `ref_model` it would be frozen, adapter and all."""
    model = tiny_llama()

    def action():
        if how == "PeftModel":
            return attempt(model=get_peft_model(model, LORA), ref_model=model)
        return attempt(model=model, peft_config=LORA, ref_model=model)

    refuse(ValueError, ["`ref_model`", "leave it out"], out, action)


def test_ref_model_with_another_vocabulary(attempt, out):
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    refuse(ValueError, ["`ref_model`", "40", str(VOCAB)], out, lambda: attempt(ref_model=other))


def test_ref_model_that_is_no_model(attempt, out):
    def check(wrong):
        refuse(TypeError, ["`ref_model`", type(wrong).__name__], out, lambda: attempt(ref_model=wrong))

    every(["some/name", {"a": 1}], check)


def test_ref_model_that_nothing_reads(attempt, out):
    action = lambda: attempt(ref_model=tiny_llama(1), forget_objective=GradAscent())  # noqa: E731
    refuse(ValueError, ["`ref_model`", "GradAscent()", "leave it out"], out, action)


# ---- model and tokenizer ----


def test_tokenizer_larger_than_the_model(attempt, out):
    tokenizer = tiny_tokenizer()
    words = [str(len(tokenizer)), str(VOCAB), "`processing_class`", "resize_token_embeddings"]
    refuse(ValueError, words, out, lambda: attempt(processing_class=tokenizer))


def test_processing_class_that_is_no_tokenizer(attempt, out):
    def check(wrong):
        refuse(TypeError, ["`processing_class`", type(wrong).__name__], out, lambda: attempt(processing_class=wrong))

    every(["gpt2", 3], check)


def test_peft_config_beside_a_peft_model(attempt, out):
    model = get_peft_model(tiny_llama(), LORA)
    words = ["`PeftModel`", "`peft_config`", "merge_and_save"]
    refuse(ValueError, words, out, lambda: attempt(model=model, peft_config=LORA))


def test_peft_config_that_is_none(attempt, out):
    refuse(TypeError, ["`peft_config`", "LoraConfig", "dict"], out, lambda: attempt(peft_config={"r": 8}))


def test_peft_config_that_fits_no_module(attempt, out):
    with pytest.raises(ValueError, match="nowhere") as raised:  # PEFT's own subclass
        attempt(peft_config=LoraConfig(target_modules=["nowhere"]))
    assert "\n" not in str(raised.value) and snapshot(out) is None


def test_model_that_is_none(out):
    def check(wrong):
        action = lambda: BLURTrainer(wrong, settings(out), FORGET, RETAIN)  # noqa: E731
        refuse(TypeError, ["`model`", "PreTrainedModel", type(wrong).__name__], out, action)

    every([torch.nn.Linear(2, 2), 3, None], check)


def test_model_with_nothing_to_train(attempt, out):
    model = tiny_llama().requires_grad_(False)
    refuse(ValueError, ["requires_grad"], out, lambda: attempt(model=model))


@pytest.mark.parametrize(
    "how", ["absent", "empty folder", "weights missing", "pickled weights only", "config without architecture"]
)
def test_model_path_without_a_model(tmp_path, out, how):
    path = tmp_path / "model"
    if how != "absent":
        path.mkdir()
    if how in ("weights missing", "pickled weights only", "config without architecture"):
        config = tiny_llama().config
        config.architectures = None if how == "config without architecture" else ["LlamaForCausalLM"]
        config.save_pretrained(path)
    if how == "pickled weights only":
        torch.save(tiny_llama().state_dict(), path / "pytorch_model.bin")
    with pytest.raises((OSError, ValueError)) as raised:
        BLURTrainer(str(path), settings(out), FORGET, RETAIN)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert snapshot(out) is None


def test_model_init_kwargs_beside_a_loaded_model(attempt, out):
    refuse(
        ValueError,
        ["`model_init_kwargs`", "name"],
        out,
        lambda: attempt(config={"model_init_kwargs": {"dtype": "auto"}}),
    )


# ---- engines ----


def test_engines_without_a_backend(attempt, out, monkeypatch):
    def check(kind):
        monkeypatch.setattr(Accelerator, "distributed_type", getattr(DistributedType, kind))
        words = [getattr(DistributedType, kind).value, "one process", "DDP", "FSDP2", "DeepSpeed"]
        with pytest.raises(NotImplementedError) as raised:
            attempt()
        assert "\n" not in str(raised.value) and all(word in str(raised.value) for word in words)
        assert not snapshot(out)

    every(["MEGATRON_LM", "XLA"], check)


SETTINGS_WITHOUT_AN_EXACT_GRADIENT = [
    ({"ddp_static_graph": True, "gradient_accumulation_steps": 2}, ["`ddp_static_graph=True`", "accumulation"]),
    ({"optim": "lomo"}, ["lomo", "backward"]),
    ({"optim": "adalomo"}, ["adalomo", "backward"]),
]


def test_settings_without_an_exact_gradient(attempt, out):
    def check(config, words):
        refuse(NotImplementedError, words, out, lambda: attempt(config=config), untouched=False)

    every(SETTINGS_WITHOUT_AN_EXACT_GRADIENT, check)


def test_layerwise_optimizers(attempt, out):
    """They step inside backward hooks, as LOMO does."""

    def check(optim):
        action = lambda: attempt(config={"optim": optim, "optim_target_modules": ["q_proj"]}).train()  # noqa: E731
        refuse(NotImplementedError, [optim, "backward"], out, action, untouched=False)

    every(["galore_adamw_layerwise", "apollo_adamw_layerwise"], check)


def test_data_parallel_of_one_process(attempt, out, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(NotImplementedError, match=r"DataParallel.*accelerate launch") as raised:
        attempt()
    assert "\n" not in str(raised.value) and not snapshot(out)


def test_static_graph_without_accumulation_is_allowed(attempt):
    attempt(config={"ddp_static_graph": True, "max_steps": 1}).train()


# ---- the same through the other presets ----


def test_grad_diff_refuses_the_same(attempt, out):
    args = GradDiffConfig(str(out), use_cpu=True, report_to="none")
    refuse(ValueError, ["`retain`", "empty"], out, lambda: attempt(retain=[], args=args, trainer_class=GradDiffTrainer))
    words = ["`retain_dataset`", "retain_weight=0"]
    refuse(ValueError, words, out, lambda: attempt(retain=None, args=args, trainer_class=GradDiffTrainer))


def test_messages_have_the_tone_of_a_sentence(attempt, out):
    """What was given, what is accepted, what to do: not a bare name, and it ends as a sentence does."""
    actions = [
        lambda: attempt(retain=None),
        lambda: attempt(forget=[]),
        lambda: attempt(processing_class=tiny_tokenizer()),
        lambda: attempt(forget_objective="npo"),
        lambda: attempt(config={"rule": "blurr"}),
    ]
    for action in actions:
        with pytest.raises((TypeError, ValueError)) as raised:
            action()
        assert re.search(r"\w{2,}.*[.)]$", str(raised.value)) and len(str(raised.value)) > 40
    assert snapshot(out) is None


def test_objects_that_need_refusals_are_checked_as_names_are(attempt, out):
    def check(objective):
        refuse(ValueError, ["`forget`", "prompt"], out, lambda: attempt(forget_objective=objective))

    every([DPO(), IDK()], check)


def test_refusals_on_the_retain_side(attempt, out):
    """Refusals are made for the forget set only: said at construction, not as a KeyError in the first step."""

    def check(objective):
        rows = [{"question": "Who?", "answer": "Nobody."}]
        action = lambda: attempt(  # noqa: E731
            rows, rows, model=text_model(), processing_class=tiny_tokenizer(), retain_objective=objective
        )
        refuse(ValueError, ["retain", "refusal"], out, action)

    every([DPO(), IDK()], check)


def test_the_reference_config_trains(attempt):
    """What all refusals above differ from by one thing does train, with each kind of objective."""
    assert isinstance(attempt().args, BLURConfig)
    for forget in (GradAscent(), NPO(), SimNPO(), NLL()):
        for retain in (NLL(), KL()):
            trainer = attempt(forget_objective=forget, retain_objective=retain, config={"max_steps": 1})
            trainer.train()
            assert trainer.state.global_step == 1
