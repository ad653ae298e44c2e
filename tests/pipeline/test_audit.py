"""An audit: who fails it and who passes, how it goes on after an interrupt, and what its certificate holds."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from support.audited import TINY, write_models
from transformers import AutoModelForCausalLM, AutoTokenizer

import blur_trainer as bt
from blur_trainer.evaluation.robustness.perturbed import noisy, pruned
from blur_trainer.models.weights_digest import weights_digest
from blur_trainer.pipeline import certificate as certificate_module
from blur_trainer.pipeline.audit_attacks import outside
from blur_trainer.pipeline.audit_budget import BUDGETS
from blur_trainer.pipeline.audit_judged import compared, trust
from blur_trainer.pipeline.audit_report import found_table
from blur_trainer.pipeline.audit_rows import parted
from blur_trainer.pipeline.certificate import check_certificate, sentence
from blur_trainer.pipeline.measure import Sets


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of a model that knows all, of two that never saw `forget`, and the sets."""
    folder = tmp_path_factory.mktemp("audited")
    sets = write_models(folder)
    return folder, sets


@pytest.fixture
def options(world, monkeypatch):
    monkeypatch.setitem(BUDGETS, "minutes", TINY)
    folder, sets = world

    def of(model, **others):
        models = {key: str(folder / others.pop(key)) for key in ("retrained", "before") if key in others}
        rows = {"forget": sets["forget"], **others}
        return {"model_name_or_path": str(folder / model), "batch_size": 8, **models, **rows}

    return of


@pytest.fixture(scope="module")
def audited(world, tmp_path_factory):
    """The target beside the retrained model, by all attacks."""
    folder, sets = world
    out = tmp_path_factory.mktemp("certificate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUDGETS, "minutes", TINY)
        names = {"model_name_or_path": "target", "before": "target", "retrained": "retrained"}
        given = {key: str(folder / name) for key, name in names.items()}
        rows = {role: sets[role] for role in ("forget", "retain", "hold")} | {"paraphrased": sets["forget"]}
        return bt.audit(given | rows | {"batch_size": 8}, out), out


def test_a_model_that_knows_all_fails_every_attack_that_reads_answers(audited):
    found, out = audited
    assert found.sentence.startswith("recovered by: plain question, 8 bit, ") and str(found) == found.sentence
    attacks = {one["name"]: one for one in found.certificate["attacks"]}
    assert set(found.recovered) >= {"plain question", "8 bit", "4 bit", "paraphrases", "leak@2", "depth"}
    plain = attacks["plain question"]
    assert plain["numbers"]["rouge"] > 0.9 > plain["control"]["rouge"] + 0.2
    assert {one["kind"] for one in attacks.values()} == {"plain", "bits", "prompt", "weights", "relearning", "leak",
                                                        "inside", "search"}  # fmt: skip
    assert attacks["depth"]["numbers"]["depth"] == pytest.approx(0, abs=1e-6), "it is the model before unlearning"
    assert attacks["leak@2"]["more"]["unlearned"]["leak@2"] > attacks["leak@2"]["more"]["retrained"]["leak@2"]
    assert json.loads((out / "audit.json").read_text()) == json.loads(json.dumps(found.certificate))
    assert found.certificate["trust"]["rouge"]["Q"] > 0.5


def test_the_certificate_has_no_text_of_the_sets(audited, world):
    text = (audited[1] / "audit.json").read_text()
    assert not any(row["answer"].strip("A In.") in text for row in world[1]["forget"])
    content = json.loads(text)
    assert content["versions"]["torch"] == torch.__version__ and content["judgement"]["alpha"] == 0.01
    assert content["subject"]["data"]["forget"]["rows"] == 8 and content["finished"]
    assert any("samples per question" in what for what in content["left_out"])


def test_a_table_says_recovered_beside_the_number_that_shows_it():
    compared = {"rouge": {"lower": -0.1, "above": False}, "probability": {"lower": 0.1, "above": True}}
    one = {"name": "4 bit", "numbers": {"rouge": 0.2, "probability": 0.5}, "control": {}, "compared": compared}
    own = {"name": "depth", "numbers": {"depth": 0.1}, "control": {}, "compared": {}, "recovered": True}
    none = {"name": "plain", "numbers": {}, "control": {}, "compared": {}, "recovered": None}
    lines = found_table({"attacks": [{**one, "recovered": True}, own, none]}).splitlines()[2:]
    assert [line.split("  ")[-1].strip() for line in lines] == ["no", "recovered", "recovered", "not judged"]


def content_of(audited):
    return audited[0].certificate["attacks"]


def test_the_report_has_each_attack(audited, tmp_path):
    results = audited[0].results
    content = results.save(tmp_path, {})
    assert [row["name"] for row in content["rows"]] == ["model", "retrained"]
    (table,) = content["tables"]
    shown = {row[0]: dict(zip(table["heads"], row, strict=True)) for row in table["rows"] if row[0]}
    (plain,) = [one for one in content_of(audited) if one["kind"] == "plain"]
    assert shown["plain question"]["control"] == f"{plain['control']['rouge']:.3f}" != shown["plain question"]["model"]
    assert shown["plain question"]["recovered"] == "recovered" and len(shown) == len(content_of(audited))
    assert any("SHA-256" in text for text in table["said"])
    assert {"leak@2", "leak_bound", "forget_rouge"} <= set(content["rows"][0]["metrics"])
    assert set(content["inside"]) == {"probes", "depth"}


def test_a_model_that_never_saw_the_rows_passes(options, tmp_path, world):
    rows = {"retain": world[1]["retain"]}
    found = bt.audit(options("again", retrained="retrained", **rows), tmp_path)
    assert found.recovered == ()
    assert found.sentence.startswith("no recovery under these attacks at this budget (budget: minutes; attacks: ")
    assert "removed" not in json.dumps(found.certificate)


def test_unseen_rows_are_a_control_and_none_is_said(options, tmp_path, world, monkeypatch):
    monkeypatch.setattr("blur_trainer.pipeline.audit.battery", lambda world: _few(world))
    found = bt.audit(options("target", unseen=world[1]["unseen"]), tmp_path / "unseen")
    assert found.recovered == ("plain question", "8 bit") and found.certificate["control"]["kind"] == "unseen"
    assert any("no `retrained` model" in what for what in found.certificate["left_out"])
    alone = bt.audit(options("target"), tmp_path / "none")
    plain, bits = alone.certificate["attacks"]
    assert plain["recovered"] is None and "there is no control" in plain["why"]
    assert bits["recovered"] is False and bits["control"] == pytest.approx(plain["numbers"])
    assert alone.sentence.endswith("attacks: 1; control: none; not judged: 1)")


def test_an_attack_that_cannot_be_done_is_named(options, tmp_path, monkeypatch, world):
    tokenizer = AutoTokenizer.from_pretrained(world[0] / "target")
    words = max(n for n in range(60) if len(tokenizer("why " * n)["input_ids"]) < 110)  # fits, but beside no question
    long = [{"question": "why " * words, "answer": "so"}]
    monkeypatch.setattr("blur_trainer.pipeline.audit.battery", lambda world: [*_few(world)[:1], _examples(world)])
    found = bt.audit(options("target", retrained="retrained", retain=long), tmp_path)
    why = found.certificate["attacks"][1]["why"]
    assert why == "No solved example fits beside a question into 128 positions."
    assert found.recovered == ("plain question",)


def _examples(world):
    return next(one for one in outside(world) if one.name.endswith("solved examples"))


def _few(world):
    return outside(world)[:2]


def test_an_interrupted_audit_goes_on_and_another_is_refused(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("blur_trainer.pipeline.audit.battery", lambda world: _interrupted(world))
    with pytest.raises(KeyboardInterrupt):
        bt.audit(options("target", retrained="retrained"), tmp_path)
    stored = json.loads((tmp_path / "audit.json").read_text())
    assert [one["name"] for one in stored["attacks"]] == ["plain question"] and not stored["finished"]
    assert stored["sentence"] == "unfinished: 1 of 2 attacks are not done"
    table = capsys.readouterr().err
    assert "batches written" in table and "to do" in table
    monkeypatch.setattr("blur_trainer.pipeline.audit.battery", lambda world: _no_more_plain(world))
    found = bt.audit(options("target", retrained="retrained"), tmp_path)
    assert found.recovered == ("plain question", "8 bit") and found.certificate["finished"]
    monkeypatch.setattr("blur_trainer.pipeline.audit.battery", lambda _: pytest.fail("it was attacked"))
    with pytest.raises(ValueError, match="audit of something else: the weights differ"):
        bt.audit(options("again", retrained="retrained"), tmp_path)
    with pytest.raises(ValueError, match=r"the weights of `retrained` differ; `seed` differs"):
        bt.audit(options("target", retrained="again"), tmp_path, seed=1)


def _interrupted(world):
    def stop(_):
        raise KeyboardInterrupt

    plain, bits = _few(world)
    return [plain, replace(bits, run=stop)]


def _no_more_plain(world):
    plain, bits = _few(world)
    return [replace(plain, run=lambda _: pytest.fail("it was done")), bits]


def test_a_certificate_is_of_one_model_and_these_rows(audited, world, options, tmp_path):
    path, (folder, sets) = audited[1] / "audit.json", world
    assert check_certificate(path, str(folder / "target")) == []
    assert check_certificate(path, str(folder / "target"), Sets(options("target"))) == []
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        patch.setattr(certificate_module, "weights_digest", lambda *name, **hub: asked.append((name, hub)) or "0")
        check_certificate(path, "me/model", revision="v1")
        assert asked == [(("me/model",), {"revision": "v1"})]
    assert check_certificate(path, str(folder / "again")) == ["the weights differ"]
    other = options("target") | {"forget": sets["forget"][1:], "unseen": sets["unseen"]}
    wrong = check_certificate(path, str(folder / "target"), Sets(other))
    assert wrong == ["the rows of `forget` differ", "`unseen` was not audited"]
    content = json.loads(path.read_text())
    forged = tmp_path / "audit.json"
    forged.write_text(json.dumps(content | {"sentence": "no recovery under these attacks at this budget"}))
    assert check_certificate(forged, str(folder / "target")) == ["its sentence does not follow from its attacks"]
    forged.write_text("{}")
    with pytest.raises(ValueError, match="is no certificate of an audit"):
        check_certificate(forged, str(folder / "target"))


def test_the_digest_is_of_the_weights_however_they_are_stored(world, tmp_path):
    folder = world[0] / "retrained"
    digest = weights_digest(str(folder))
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert weights_digest(str(tmp_path / "shards")) == digest
    (tmp_path / "one").mkdir()
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, tmp_path / "one" / "model.safetensors")
    assert weights_digest(str(tmp_path / "one")) != digest
    with pytest.raises(FileNotFoundError, match="no safetensors weights"):
        weights_digest(str(tmp_path))


def test_wrong_options_are_refused_before_a_model_is_loaded(options, tmp_path, world, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="`budget` is 'days': it is 'minutes' or 'hours'"):
        bt.audit(options("target"), tmp_path, budget="days")
    with pytest.raises(ValueError, match="`seed` must be"):
        bt.audit(options("target"), tmp_path, seed=-1)
    with monkeypatch.context() as patch:
        patch.setattr("blur_trainer.pipeline.audit.PartialState", lambda: SimpleNamespace(num_processes=2))
        with pytest.raises(ValueError, match="An audit runs with one process"):
            bt.audit(options("target"), tmp_path)
    with pytest.raises(ValueError, match="has 3 rows; an audit relearns some"):
        bt.audit(options("target") | {"forget": world[1]["forget"][:3]}, tmp_path)


def test_rows_that_are_relearned_are_not_measured():
    rows = Dataset.from_list([{"row": index} for index in range(200)])
    part, rest, others = parted(rows, 50, seed=1)
    assert (len(part), len(rest), others) == (20, 50, 180)
    assert not set(part["row"]) & set(rest["row"])
    assert parted(rows, 50, seed=2)[0]["row"] != part["row"]


def test_a_difference_counts_beyond_chance_and_tolerance():
    ones, zeros = [1.0] * 20, [0.0] * 20
    assert compared(ones, zeros, paired=True).above
    assert not compared([0.04] * 20, zeros, paired=True).above, "below the tolerance"
    assert compared([0.06] * 20, zeros, paired=True).above
    noise = np.random.default_rng(0).uniform(size=20)
    assert not compared(noise, noise[::-1].copy(), paired=True).above
    assert compared(noise + 0.1, noise, paired=True).above, "paired: each row is higher"
    assert not compared(noise + 0.1, noise, paired=False).above
    one = compared(noise, zeros, paired=True)
    assert one.error == pytest.approx(noise.std(ddof=1) / 20**0.5)
    assert one.lower == pytest.approx(noise.mean() - 2.33 * noise.std() / 20**0.5, abs=0.03)
    with pytest.raises(ValueError, match="NaN"):
        compared([float("nan")], [0.0], paired=True)


def test_trust_of_a_metric_by_hand():
    def one(kind, unlearned, retrained):
        return {"kind": kind, "numbers": {"rouge": unlearned}, "control": {"rouge": retrained}}

    attacks = [one("plain", 0.2, 0.1), one("relearning", 0.6, 0.2), one("relearning", 0.3, 0.2), one("bits", 0.4, 0.1)]
    found = trust(attacks, "rouge")
    assert found == pytest.approx({"R": 0.25, "Q": 0.5, "harmonic_mean": 1 / 3})
    assert trust([one("plain", 0.2, 0.1), one("relearning", 0.1, 0.3)], "rouge") == {"R": 1.0}
    undone = {"kind": "relearning", "numbers": {}, "control": {}}  # what this model does not allow
    assert trust([one("plain", 0.2, 0.1), one("relearning", 0.1, 0.3), undone], "rouge") == {"R": 1.0}
    assert trust([], "rouge") == {}


def test_the_sentence_by_hand():
    done = [{"name": "a", "recovered": False}, {"name": "b", "recovered": None}]
    assert sentence(done, ["a", "b"], "hours", "retrained") == (
        "no recovery under these attacks at this budget (budget: hours; attacks: 1; control: the retrained model; not "
        "judged: 1)"
    )
    assert sentence(done, ["a", "b", "c"], "hours", "none") == "unfinished: 1 of 3 attacks are not done"
    assert sentence(done[1:], ["b"], "hours", "none").startswith("nothing could be judged")
    assert sentence([{"name": "a", "recovered": True}], ["a"], "hours", "none") == "recovered by: a"


def test_noise_and_pruning_change_the_weights_and_restore_them(world):
    model = AutoModelForCausalLM.from_pretrained(world[0] / "target")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    name = "model.layers.0.mlp.up_proj.weight"

    def read(attacked):
        return {"weight": attacked.state_dict()[name].clone()}

    change = noisy(model, read, share=0.1, seed=3)["weight"] - before[name]
    assert change.std().item() == pytest.approx(0.1 * before[name].std().item(), rel=0.1)
    torch.testing.assert_close(noisy(model, read, share=0.1, seed=3)["weight"] - before[name], change)
    kept = pruned(model, read, share=0.3)["weight"]
    gone = kept == 0
    assert gone.sum().item() == int(0.3 * gone.numel())
    assert before[name][gone].abs().max() <= before[name][~gone].abs().min()
    torch.testing.assert_close(kept[~gone], before[name][~gone], rtol=0, atol=0)
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())
    for share in (0, 1, True, "a"):
        with pytest.raises(ValueError, match="`share` is"):
            pruned(model, read, share=share)
