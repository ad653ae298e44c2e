"""Attacks on what was forgotten: they do what they say, and the model never notices."""

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.models import collate, examples, tiny_llama
from support.runs import distance, logits, weights
from support.scoring_helpers import build_model, build_tokenizer, muse_data
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import blur_trainer as bt
from blur_trainer.data.subset import limit_rows, sample_rows
from blur_trainer.evaluation.muse import MUSEEvaluation
from blur_trainer.evaluation.robustness.battery import prefixed, quantized, robustness
from blur_trainer.evaluation.robustness.quantization import quantize_dequantize
from blur_trainer.evaluation.robustness.relearning import relearn
from blur_trainer.evaluation.scoring import token_logps
from blur_trainer.models.logit_difference_config import LogitDifferenceConfig
from blur_trainer.models.lora_assistant import lora_assistant
from blur_trainer.report.figures import LIGHT
from blur_trainer.report.figures.robustness import draw_relearning
from blur_trainer.report.html import write_report
from blur_trainer.report.seeds import mean_and_spread
from blur_trainer.report.tables import robustness_rows

ROWS = examples(6, seed=3)


def nll(model):
    """A benchmark: mean negative log-likelihood of the rows."""
    scores = token_logps(model, ROWS, pad_token_id=0)
    return {"forget_nll": -sum(float(row.sum()) for row in scores) / sum(map(len, scores))}


def literal_relearning(model, rows, steps, learning_rate):
    """Full batches only: no order to agree on."""
    model = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**collate(rows)).loss.backward()  # transformers' own: mean over the labels
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return nll(model)["forget_nll"]


@pytest.mark.parametrize("tie", [False, True])
def test_relearning_is_plain_fine_tuning(tie):
    model = tiny_llama(tie=tie)
    points = relearn(model, ROWS, nll, steps=(2, 5), learning_rate=1e-2, batch_size=len(ROWS))
    assert [point["steps"] for point in points] == [0, 2, 5]
    found = [point["metrics"]["forget_nll"] for point in points]
    expected = [literal_relearning(model, ROWS, steps, 1e-2) for steps in (0, 2, 5)]
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[0] > found[1] > found[2]


def test_relearning_repeats_and_shuffles_by_its_seed():
    def curve(seed):
        return relearn(tiny_llama(), ROWS, nll, steps=[4], learning_rate=1e-2, batch_size=2, seed=seed)

    torch.manual_seed(1)
    first = curve(0)
    torch.manual_seed(2)
    assert curve(0) == first != curve(1)


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("attack", ["relearn", "quantized", "benchmark fails"])
def test_the_model_is_untouched(attack):
    model = tiny_llama(dropout=0.1).to(torch.bfloat16).train()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    gradient = model.lm_head.weight.grad
    before = weights(model)
    storages = [parameter.data_ptr() for parameter in model.parameters()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    seen = []

    def benchmark(attacked):
        seen.append(weights(attacked))
        if attack == "benchmark fails" and len(seen) == 2:
            raise Broken
        return {"x": 1.0}

    if attack == "quantized":
        quantized(model, benchmark, bits=3)
    elif attack == "relearn":
        relearn(model, ROWS, benchmark, steps=[2], learning_rate=0.1)
    else:
        with pytest.raises(Broken):
            relearn(model, ROWS, benchmark, steps=[2], learning_rate=0.1)
    assert any(not torch.equal(seen[-1][name], before[name]) for name in before)  # it was attacked
    assert all(torch.equal(new, before[name]) for name, new in weights(model).items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == storages
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert model.lm_head.weight.grad is gradient and bool((gradient == 1).all())
    assert torch.equal(torch.get_rng_state(), random_state)


def literal_round_trip(weight, bits, group_size):
    """Weight by weight."""
    out = weight.double().clone()
    for row in out:
        for start in range(0, len(row), group_size or len(row)):
            group = row[start : start + (group_size or len(row))]
            scale = max(abs(value) for value in group.tolist()) / (2 ** (bits - 1) - 1)
            group.copy_(torch.tensor([round(v / scale) * scale if scale else 0.0 for v in group.tolist()]))
    return out


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [3, 8, None])
def test_round_trip(bits, group_size):
    torch.manual_seed(0)
    weight = torch.randn(4, 8)
    weight[1, :3] = 0
    found = quantize_dequantize(weight, bits, group_size)
    torch.testing.assert_close(found.double(), literal_round_trip(weight, bits, group_size), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantize_dequantize(found, bits, group_size), found)  # what is rounded stays
    assert quantize_dequantize(weight.bfloat16(), bits, group_size).dtype == torch.bfloat16


def test_quantized_spares_the_head_and_hurts_more_with_fewer_bits():
    model, seen = tiny_llama(), []

    def benchmark(attacked):
        seen.append(weights(attacked))
        return nll(attacked)

    before = weights(model)
    assert len({quantized(model, benchmark, bits=bits)["forget_nll"] for bits in (8, 4, 2)}) == 3
    errors = [sum((now[name] - before[name]).square().sum() for name in before) for now in seen]
    assert errors[0] < errors[1] < errors[2]
    changed = {name for name in before if not torch.equal(before[name], seen[-1][name])}
    assert changed and all("_proj" in name for name in changed)
    assert len(changed) == sum("_proj" in name for name in before)


# ---- models that are not plain ----


def adapted(model=None, injected=False):
    """LoRA with B not 0."""
    model, lora = model or tiny_llama(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    if injected:  # as `AutoModelForCausalLM` loads a folder with an adapter
        model.add_adapter(lora)
        return model
    return get_peft_model(model, lora)


def uld(weight=-0.5):
    assistant = lora_assistant(target := tiny_llama(), 1, LoraConfig(r=2, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in assistant.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return bt.LogitDifferenceModel(LogitDifferenceConfig(weight=weight, top_logit_filter=0.001), target, assistant)


def seen_by(benchmark, seen):
    def watch(model):
        seen.append(weights(model))
        return benchmark(model)

    return watch


@pytest.mark.parametrize("injected", [False, True])
def test_an_adapter_is_merged_for_the_attack(injected):
    """Relearned and rounded as the model that one would give away; afterwards it is an adapter again."""
    model = adapted(injected=injected)
    merged = adapted().merge_and_unload()
    before, answer = weights(model), logits(model)
    for attack in (
        lambda attacked: relearn(attacked, ROWS, nll, steps=[1, 3], learning_rate=1e-2)[-1]["metrics"],
        lambda attacked: quantized(attacked, nll, bits=3),
    ):
        assert attack(model)["forget_nll"] == pytest.approx(attack(merged)["forget_nll"], rel=1e-4)
        assert distance(weights(model), before) == 0 and torch.equal(logits(model), answer)
    tuned = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert tuned and not any(module.merged for module in tuned)
    assert {p.requires_grad for name, p in model.named_parameters() if "lora_" not in name} == {False}


def test_an_adapter_that_is_switched_off_stays_so():
    model = adapted()
    with model.disable_adapter():
        found = relearn(model, ROWS, nll, steps=[1], learning_rate=1e-2)
    assert found == relearn(tiny_llama(), ROWS, nll, steps=[1], learning_rate=1e-2)


def test_of_a_logit_difference_the_adapter_relearns_and_the_base_is_rounded():
    model, seen = uld(), []
    before, answer = weights(model), logits(model)
    points = relearn(model, ROWS, seen_by(nll, seen), steps=[5], learning_rate=1e-2)
    assert points[1]["metrics"]["forget_nll"] < points[0]["metrics"]["forget_nll"] - 0.01
    changed = {name for name in before if not torch.equal(before[name], seen[-1][name])}
    assert changed and all("lora_" in name for name in changed)
    quantized(model, seen_by(nll, seen), bits=3)
    for name, value in seen[-1].items():
        rounded = "_proj" in name and "lora_" not in name
        expected = quantize_dequantize(before[name], 3) if rounded else before[name]  # once, though two modules have it
        assert torch.equal(value, expected), name
    assert distance(weights(model), before) == 0 and torch.equal(logits(model), answer)


def test_small_steps_add_up_in_bfloat16():
    """Of 0.2 the next bfloat16 is 0.001 away: a step of 0.0002 alone would round away, each time."""
    drops = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama().to(dtype)
        first, last = relearn(model, ROWS, nll, steps=[20], learning_rate=2e-4, batch_size=len(ROWS))
        drops[dtype] = first["metrics"]["forget_nll"] - last["metrics"]["forget_nll"]
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert drops[torch.bfloat16] == pytest.approx(drops[torch.float32], rel=0.1)


def test_models_that_cannot_be_attacked():
    sharded = tiny_llama()
    sharded.lm_head.weight.ds_id = 0
    with torch.device("meta"):
        offloaded = tiny_llama()
    wrong = {
        "unwrap_model": (TypeError, torch.nn.Sequential(tiny_llama())),
        "sharded": (ValueError, sharded),
        "offloaded": (ValueError, offloaded),
    }
    for words, (kind, model) in wrong.items():
        for attack in (lambda m: relearn(m, ROWS, pytest.fail), lambda m: quantized(m, pytest.fail)):
            with pytest.raises(kind, match=words):
                attack(model)
    for words, model in {"bfloat16": tiny_llama().half(), "weight": uld(weight=0)}.items():
        with pytest.raises(ValueError, match=words):
            relearn(model, ROWS, pytest.fail)


def test_a_4_bit_model_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes", reason="4 bits need bitsandbytes: pip install blur_trainer[quantization]")
    tiny_llama().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    for attacked in (model, get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))):
        with pytest.raises(ValueError, match=r"few bits.*merge_and_save"):
            robustness(attacked, pytest.fail)


# ---- other prompts, all together ----


def test_prefixed():
    data = muse_data()
    changed = prefixed(data, "Truly: ")
    assert changed["verbmem_forget"]["prompt"] == [f"Truly: {text}" for text in data["verbmem_forget"]["prompt"]]
    assert list(changed["verbmem_forget"]["gt"]) == list(data["verbmem_forget"]["gt"])
    assert changed["knowmem_forget_qa"]["question"][0] == "Truly: Where?"
    assert list(changed["knowmem_forget_qa_icl"]["question"]) == list(data["knowmem_forget_qa_icl"]["question"])
    for wrong, prefix, message in (
        (data, "", "`prefix` is"),
        ({"a": Dataset.from_dict({"text": ["x"]})}, "p", "no prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            prefixed(wrong, prefix)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": [2, 1]}, "rising"),
        ({"steps": []}, "rising"),
        ({"steps": [0]}, r"steps\[0\]"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"examples": [ROWS[0], {"input_ids": [1, 2], "labels": [1, -100]}]}, r"examples\[1\].* no label"),
        ({"examples": [{"input_ids": [1] * 65, "labels": [1] * 65}]}, "max_position_embeddings"),
        ({"examples": []}, "nothing to relearn"),
        ({"examples": [{"input_ids": [1]}]}, "lacks"),
    ],
)
def test_relearn_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        relearn(tiny_llama(), **({"examples": ROWS, "evaluation": pytest.fail} | kwargs))


@pytest.mark.parametrize(("bits", "group_size", "message"), [(1, 64, "bits"), (16, 64, "bits"), (4, 0, "group_size")])
def test_quantized_refuses(bits, group_size, message):
    with pytest.raises(ValueError, match=message):
        quantized(tiny_llama(), pytest.fail, bits=bits, group_size=group_size)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bits": [8, 16]}, "`bits` is 16"),
        ({"relearning": {"good": ROWS, "bad": []}}, "`bad` has no rows"),
        ({"relearning": {"good": ROWS}, "steps": [3, 3]}, "rising"),
        ({"retrained": tiny_llama()}, "`relearning`"),
    ],
)
def test_robustness_refuses_before_it_measures(kwargs, message):
    with pytest.raises(ValueError, match=message):
        robustness(tiny_llama(), pytest.fail, **kwargs)


def test_what_is_known_is_not_measured_again(capsys):
    seen, known = [], {"forget_nll": 7.0}
    found = robustness(
        tiny_llama(), seen_by(nll, seen), relearning={"a": ROWS, "b": ROWS}, bits=[], steps=[1, 2], unchanged=known
    )
    assert len(seen) == 4 and found["attacks"] == [{"name": "unchanged", "metrics": known}]
    assert [curve["points"][0] for curve in found["relearning"]] == [{"steps": 0, "metrics": known}] * 2
    bar = capsys.readouterr().err
    assert "Attack: relearning a" in bar and "Attack: relearning b" in bar and "4/4" in bar
    both = robustness(tiny_llama(), nll, relearning={"a": ROWS, "b": ROWS}, bits=[], steps=[2], retrained=tiny_llama(1))
    points = relearn(tiny_llama(1), ROWS, nll, steps=[2])
    assert len(both["relearning"]) == 3
    assert both["relearning"][2] == {"name": "a (retrain)", "kind": "retrain", "points": points}
    assert "5/5" in capsys.readouterr().err
    relearn(tiny_llama(), ROWS, nll, steps=[1], desc="again"), robustness(tiny_llama(), nll, bits=[4], progress=False)
    bar = capsys.readouterr().err
    assert "again: 100%" in bar and "Attack" not in bar


def test_of_tofu_and_wmdp():
    """Both on a random model: all attacks, each measured under all metrics."""
    tokenizer, model = build_tokenizer(), build_model()
    tofu = limit_rows(bt.load_tofu("embedded", "forget01"), 2)
    questions = {"forget_potions": bt.load_wmdp_questions("potions").select(range(3))}
    suites = {
        "tofu": lambda data: bt.TOFUEvaluation(data, tokenizer, max_new_tokens=2, progress=False),
        "wmdp": lambda data: bt.WMDPEvaluation(data, tokenizer, progress=False),
    }
    for name, data in (("tofu", tofu), ("wmdp", questions)):
        suite, changed = suites[name](data), suites[name](prefixed(data, "Truly: "))
        rows = bt.tokenize_dataset(sample_rows(tofu["forget"], 2), tokenizer, role="forget", max_length=128)
        how = {"steps": [3], "learning_rate": 1e-2, "progress": False}
        found = robustness(model, suite, relearning={"forget": rows}, bits=[2], prompted={"truly": changed}, **how)
        table = robustness_rows(found, [{"name": "t", "kind": "target"}, {"name": "u", "kind": "unlearned"}])
        assert [row["name"] for row in table] == ["t", "unchanged", "2 bit", "truly", "relearned forget, 3 steps"]
        assert all(set(row["metrics"]) == set(suite.metric_keys) for row in table[1:])
        if name == "tofu":
            told = [row["metrics"]["forget_probability"] for row in table[1:]]
            assert len(set(told)) == 4 and told[-1] > 1.5 * told[0]  # rounded, asked anew, relearned


def test_sample_rows():
    rows = Dataset.from_dict({"text": [str(i) for i in range(20)]})
    few = sample_rows(rows, 5)["text"]
    assert len(set(few)) == 5 and list(few) == sorted(few, key=int)
    assert list(few) == list(sample_rows(rows, 5)["text"]) != list(sample_rows(rows, 5, seed=1)["text"])
    assert len(sample_rows(rows, 99)) == 20
    assert sample_rows(rows.to_list(), 5) == sample_rows(rows, 5).to_list()
    for wrong, kind in ((0, ValueError), (0.1, ValueError), (True, ValueError)):
        with pytest.raises(kind, match="n is"):
            sample_rows(rows, wrong)
    with pytest.raises(TypeError, match="one `Dataset`"):
        sample_rows(muse_data(), 2)


def test_everything_of_a_suite_reaches_the_report(tmp_path):
    """MUSE on a random model: curve and table, from the JSON that is written."""
    tokenizer, model = build_tokenizer(), build_model()
    data = muse_data("verbmem_retain", "verbmem_hold", "knowmem_retain_qa", "knowmem_hold_qa")
    how = {"max_new_tokens_verbmem": 4, "max_new_tokens_knowmem": 3, "icl": False, "progress": False}
    suite = MUSEEvaluation(data, tokenizer, **how)
    ids = tokenizer(list(data["privleak_forget"]["text"]))["input_ids"]
    texts = [{"input_ids": row, "labels": row} for row in ids if len(row) > 2]
    found = robustness(
        model,
        suite,
        relearning={"forget <set>": texts, "unrelated": texts[:1]},
        prompted={"truly": MUSEEvaluation(prefixed(data, "Truly: "), tokenizer, **how)},
        steps=[1, 2],
        learning_rate=1e-3,
    )
    assert [attack["name"] for attack in found["attacks"]] == ["unchanged", "8 bit", "4 bit", "truly"]
    assert found["attacks"][0]["metrics"] == suite(model)
    rows = [{"name": kind, "kind": kind, "metrics": {"forget_verbmem": 12.3}} for kind in ("target", "retrain")]
    metrics = {"benchmark": "MUSE", "columns": suite.columns, "rows": rows, "robustness": found}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    page = write_report(tmp_path).read_text()
    assert (tmp_path / "figures" / "relearning.png").stat().st_size > 1000
    for words in (
        "<h2>Robustness</h2>",
        "4 bit",
        "truly",
        "relearned forget &lt;set&gt;, 2 steps",
        "12.3",
        "not attacked",
        "dashed line",
        "dotted line",
        "<h2>Relearning</h2>",
    ):
        assert words in page
    runs = [metrics | {"rows": [{"name": "a", "metrics": {}}]}] * 2
    assert "robustness" not in mean_and_spread(runs) and "robustness" in mean_and_spread(runs[:1])


@pytest.mark.parametrize(
    "robust", [[], {"attacks": [{}]}, {"relearning": [{"name": "x"}]}, {"relearning": [{"points": [{"metrics": {}}]}]}]
)
def test_the_report_refuses_other_data(robust, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"rows": [], "robustness": robust}))
    if robust == []:
        with pytest.raises(ValueError, match="robustness"):
            write_report(tmp_path)
    else:
        with pytest.raises(ValueError, match="must be a list of JSON objects"):
            write_report(tmp_path)


def test_the_curve_stands_between_the_levels_of_target_and_retrained():
    def points(*numbers):
        return [{"steps": i, "metrics": {"a": n, "b": 50.0, "p": 0.5}} for i, n in enumerate(numbers)]

    curves = [
        {"name": "f", "points": points(5, 9)},
        {"name": "r", "kind": "retrain", "points": points(7, math.nan)},
    ]
    rows = [{"name": kind, "kind": kind, "metrics": {"a": n}} for kind, n in (("target", 99.0), ("retrain", 7.5))]
    columns = [{"name": name, "goal": goal} for name, goal in (("b", "max"), ("p", "max"), ("a", "min"))]
    metrics = {"columns": columns, "rows": rows, "plane": {"x": "a", "y": "b"}, "robustness": {"relearning": curves}}
    figure = draw_relearning(metrics, LIGHT).figure
    by_title = {ax.get_title(loc="left"): ax for ax in figure.axes}
    assert list(by_title) == ["b ↑", "a ↓", "p ↑"]  # those of the plane first
    lines = {line.get_color(): list(line.get_ydata()) for line in by_title["a ↓"].lines if line.get_marker() == "None"}
    assert lines == {LIGHT.target: [99.0, 99.0], LIGHT.retrain: [7.5, 7.5]}
    assert [line.get_ydata()[0] for line in by_title["a ↓"].lines] == [99.0, 7.5, 5, 7]
    assert len(by_title["b ↑"].lines) == 2  # no level is known of it
    assert by_title["a ↓"].get_ylim() == by_title["b ↑"].get_ylim() != by_title["p ↑"].get_ylim()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["f", "r", "target", "retrain"]
