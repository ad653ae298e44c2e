"""Attacks of an audit by other questions, other searches and LoRA; and what is cut where the time is short."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from support.audited import TINY, write_models
from transformers import AutoModelForCausalLM

import blur_trainer as bt
from blur_trainer.evaluation.robustness.least_likely import LeastLikely
from blur_trainer.evaluation.scoring import generate_ids
from blur_trainer.pipeline import audit as audit_module
from blur_trainer.pipeline.audit_attacks import outside
from blur_trainer.pipeline.audit_budget import BUDGETS
from blur_trainer.pipeline.audit_fit import FLOORS, WHOLE, cut_budget, cuts_said, fit, smaller
from blur_trainer.pipeline.audit_prompts import with_questions
from blur_trainer.pipeline.audit_rows import Reader
from blur_trainer.pipeline.audit_world import Attack
from blur_trainer.pipeline.certificate import check_certificate, sentence
from blur_trainer.pipeline.measure import Sets


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked")
    return folder, write_models(folder, ("target", "retrained"))


@pytest.fixture
def audit(world, tmp_path, monkeypatch):
    """An audit of some attacks, beside the retrained model."""
    folder, sets = world

    def call(chosen, model="target", out="out", limits=TINY, **others):
        monkeypatch.setitem(BUDGETS, "minutes", limits)
        monkeypatch.setattr(audit_module, "battery", lambda of: [one for one in outside(of) if chosen(one)])
        models = {"model_name_or_path": str(folder / model), "retrained": str(folder / "retrained")}
        found = bt.audit(models | {"forget": sets["forget"], "batch_size": 8}, tmp_path / out, **others)
        return found, {one["name"]: one for one in found.certificate["attacks"]}

    return call


def test_what_was_pushed_to_the_bottom_is_found_by_a_search_turned_around(audit, world):
    """A model that gives its likeliest tokens the lowest scores answers nonsense, and still knows all."""
    model = AutoModelForCausalLM.from_pretrained(world[0] / "target")
    with torch.no_grad():
        model.lm_head.weight.neg_()
    model.save_pretrained(world[0] / "pushed")
    Sets({"model_name_or_path": str(world[0] / "target"), "forget": world[1]["forget"]}).tokenizer.save_pretrained(
        world[0] / "pushed"
    )
    found, attacks = audit(lambda one: one.kind in ("plain", "search"), model="pushed")
    assert found.recovered == ("inverse greedy", "inverse beam search")
    assert attacks["inverse greedy"]["numbers"]["rouge"] > 0.9 > 0.3 > attacks["plain question"]["numbers"]["rouge"]
    assert attacks["beam search"]["settings"] == {"beams": 2} and attacks["inverse greedy"]["settings"] == {"beams": 1}


def test_searches_by_hand(world):
    sets = Sets({"model_name_or_path": str(world[0] / "target"), "forget": world[1]["forget"]})
    model, tokenizer = sets.load(sets.model), sets.tokenizer
    ids = tokenizer("Question: Where")["input_ids"]
    wanted = model.generate(torch.tensor([ids]), num_beams=3, max_new_tokens=4, do_sample=False)[0, len(ids) :].tolist()
    found = generate_ids(model, tokenizer, [ids], max_new_tokens=4, beams=3)[0]
    assert found == wanted[: len(found)]
    scores = torch.arange(float(model.config.vocab_size + 3)).flip(0).unsqueeze(0)
    turned = LeastLikely(model, tokenizer)(None, scores)
    assert turned[0, len(tokenizer) :].tolist() == [-torch.inf] * (scores.shape[1] - len(tokenizer))
    assert all(turned[0, token] == -torch.inf for token in tokenizer.all_special_ids)
    allowed = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    assert turned[0].argmax() == allowed[-1] and turned[0, allowed[0]] == -scores[0, allowed[0]]


def test_lora_and_nf4_are_in_the_battery(audit):
    found, attacks = audit(lambda one: one.name == "NF4" or "LoRA" in one.name)
    assert list(attacks) == ["NF4", "relearned forget by LoRA at 0.001"]
    assert attacks["relearned forget by LoRA at 0.001"]["settings"]["rank"] == 8
    assert set(found.recovered) == set(attacks)


def test_questions_are_asked_as_a_function_makes_them(audit, world, monkeypatch):
    heard = []

    def shout(question):
        heard.append(question)
        return question.upper()

    asked = {"loud": shout, "same": lambda text: text, "silent": lambda _: " "}
    found, attacks = audit(lambda one: one.name.startswith("asked") or one.kind == "plain", perturb=asked)
    assert attacks["asked: same"]["numbers"] == pytest.approx(attacks["plain question"]["numbers"])
    assert attacks["asked: loud"]["numbers"]["probability"] < attacks["asked: same"]["numbers"]["probability"]
    assert {row["question"] for row in world[1]["forget"]} >= set(heard) and len(heard) == 2 * 4, "model and control"
    assert "A rewording gave ' '" in attacks["asked: silent"]["why"]
    assert not any("perturb" in what for what in found.certificate["left_out"])
    for wrong in ({"loud": "upper"}, {1: str.upper}):
        with pytest.raises(TypeError, match="maps names to functions of a question"):
            audit(lambda _: True, out="wrong", perturb=wrong)


def test_the_question_of_each_format_is_changed():
    said = (("user", "a"), ("assistant", "b"), ("user", "c"))
    messages = [{"role": role, "content": text} for role, text in said]
    rows = {
        "question": {"question": "a", "answer": "b"},
        "prompt": {"prompt": "a ", "completion": "b"},
        "messages": {"messages": [*messages, {"role": "assistant", "content": "d"}]},
    }
    for name, row in rows.items():
        (made,) = with_questions(Dataset.from_list([row]), str.upper)
        kept = {key: value for key, value in row.items() if key != name}
        assert {key: made[key] for key in kept} == kept
        said = made[name] if isinstance(made[name], str) else "".join(each["content"] for each in made[name])
        assert said == {"question": "A", "prompt": "A ", "messages": "abCd"}[name]
    with pytest.raises(ValueError, match="have no question to reword"):
        with_questions(Dataset.from_list([{"text": "a"}]), str.upper)
    with pytest.raises(ValueError, match="no message of a user"):
        with_questions(Dataset.from_list([{"messages": messages[1:2]}]), str.upper)


# ---- what fits ----


def timed(budget):
    """A world whose rows are the budget's, with answers of 20 tokens at most."""
    answer = [0] * min(20, budget.new_tokens)
    return SimpleNamespace(budget=budget, unlearned=SimpleNamespace(asked=[SimpleNamespace(answer=answer)]))


def by_hand(world):
    rows, steps = world.budget.rows, world.budget.steps
    costs = {
        "plain question": (rows, rows, 0),
        "relearned": (rows, rows, steps),
        "leak": (0, rows * world.budget.samples, 0),
    }
    keys = ("forward", "write", "train")
    return [Attack(name, "", {}, dict(zip(keys, cost, strict=True)), None) for name, cost in costs.items()]


LIMITS = replace(BUDGETS["minutes"], seconds=100, rows=40, samples=16, steps=20, k=8)
SECONDS = {"forward": 0.1, "write": 0.2, "train": 0.5}


def test_a_budget_is_cut_until_it_fits():
    assert fit(replace(LIMITS, seconds=1000), timed, SECONDS, by_hand) == WHOLE
    cut = fit(LIMITS, timed, SECONDS, by_hand)  # 162 seconds; with 8 samples 98
    assert cut == {"budget": {"samples": 8}, "not_tried": [], "seconds": 162}
    assert cut_budget(LIMITS, cut) == replace(LIMITS, samples=8)
    (said,) = cuts_said(LIMITS, cut)
    assert said == "all of `minutes` would take about 162 seconds here, and 100 are allowed: samples 16 -> 8"
    least = fit(replace(LIMITS, seconds=5), timed, SECONDS, by_hand)
    assert least["not_tried"] == ["leak", "relearned"] and least["budget"]["rows"] == 8 and least["budget"]["k"] == 4
    assert least["budget"]["rates"] == [1e-3] and cut_budget(LIMITS, least).rates == (1e-3,)


def test_budgets_become_smaller_one_by_one_down_to_the_smallest():
    found = [LIMITS, *smaller(LIMITS)]
    assert all(one != other for one, other in itertools.pairwise(found))
    assert all(each.k <= each.samples for each in found)
    last = found[-1]
    assert {name: getattr(last, name) for name in FLOORS} == FLOORS and len(last.rates) == len(last.pruned) == 1
    already = replace(LIMITS, rows=4, samples=2)
    assert all(one.rows == 4 and one.samples == 2 for one in smaller(already)), "nothing grows"


def test_an_audit_that_was_cut_says_so_and_goes_on_as_it_was_cut(audit, world, tmp_path, monkeypatch):
    monkeypatch.setattr(audit_module, "seconds_of", lambda _: {"forward": 1.0, "write": 1.0, "train": 1.0})
    short = replace(TINY, seconds=9)  # each of the four takes 4

    def of_four(one):
        return one.name in ("plain question", "8 bit", "4 bit", "leak@2")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "__call__", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            audit(of_four, limits=short)
    monkeypatch.setattr(audit_module, "fit", lambda *_: pytest.fail("it was decided"))
    found, attacks = audit(of_four, limits=short)
    assert list(attacks) == ["plain question", "leak@2"] and found.certificate["cut"]["not_tried"] == ["8 bit", "4 bit"]
    assert "not tried, for want of time: 8 bit" in found.certificate["left_out"]
    path = tmp_path / "out" / "audit.json"
    assert check_certificate(path, str(world[0] / "target")) == []
    content = json.loads(path.read_text())
    content["attacks"] = [one | {"recovered": False} for one in content["attacks"]]
    content["sentence"] = sentence(content["attacks"], [], "minutes, cut to fit", "retrained")
    path.write_text(json.dumps(content))
    assert check_certificate(path, str(world[0] / "target")) == [], "the sentence says that it was cut"
