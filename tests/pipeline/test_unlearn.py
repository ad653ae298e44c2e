"""One call from files to a verdict: what it writes, what it says however the training ends, and that it repeats."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from support.own_data import write_own_data
from support.tiny_tokenizer import CHAT_TEMPLATE
from transformers import AutoModelForCausalLM, AutoTokenizer

import blur_trainer as bt
from blur_trainer.cli.main import main
from blur_trainer.models.weights_digest import weights_digest
from blur_trainer.pipeline import audit as audit_module
from blur_trainer.trainers.replay_rows import NoLossFilter, NothingToReplay

SHORT = {"num_train_epochs": 1, "replay": 8, "disable_tqdm": True}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    return folder, write_own_data(folder)


@pytest.fixture
def no_report(monkeypatch):
    """Its figures take longer than all else of such a run."""
    monkeypatch.setattr("blur_trainer.scripts.output.write_report", lambda out: out / "report.html")


@pytest.fixture
def unlearn(world, tmp_path, monkeypatch):
    """`unlearn` in the folder of the files, into a new folder; a set that is not given is the one there."""
    monkeypatch.chdir(world[0])

    def call(out="out", model="model", forget="forget.csv", retain="retain.jsonl", **options):
        return bt.unlearn(model, forget, retain, tmp_path / out, **{**SHORT, **options})

    return call


def stored(done):
    return json.loads((done.output_dir / "metrics.json").read_text(encoding="utf-8"))


def weights(done):
    return load_file(done.output_dir / "model.safetensors")


def test_settings_that_nobody_chose_forget_and_leave_a_whole_folder(unlearn, no_report):
    done = unlearn(hold="hold.jsonl", num_train_epochs=None, replay=64)
    assert done.metrics["before"]["forget_loss"] < 0.1, "the model does not know what it is to forget"
    assert done.metrics["after"]["forget_loss"] > 0.8 * done.verdict.level
    assert done.metrics["after"]["retain_rouge"] > 0.9
    names = {path.name for path in done.output_dir.iterdir()}
    assert {"model.safetensors", "README.md", "metrics.json", "verdict.json", "run.yaml"} <= names
    assert json.loads((done.output_dir / "verdict.json").read_text())["word"] == done.verdict.word
    assert str(done.verdict) in str(done) and "BLUR-RMU" in done.table
    plain = AutoModelForCausalLM.from_pretrained(done.output_dir)
    assert plain.num_parameters() == sum(each.numel() for each in weights(done).values())
    AutoTokenizer.from_pretrained(done.output_dir)


def test_what_a_run_writes_makes_the_same_run_again(unlearn, tmp_path, no_report):
    done, again = unlearn(num_train_epochs=None, max_steps=4), tmp_path / "again"
    assert main(["unlearn", "--config", str(done.output_dir / "run.yaml"), "--output_dir", str(again)]) == 0
    first, second = stored(done), json.loads((again / "metrics.json").read_text())
    assert [row["metrics"] for row in first["rows"]] == [row["metrics"] for row in second["rows"]]
    assert first["verdict"] == second["verdict"]
    other = load_file(again / "model.safetensors")
    assert all(value.equal(other[name]) for name, value in weights(done).items())
    both = [yaml.safe_load((folder / "run.yaml").read_text()) for folder in (done.output_dir, again)]
    assert {**both[0], "output_dir": ""} == {**both[1], "output_dir": ""} and both[0]["derived"]["learning_rate"]


def test_an_audit_attacks_what_was_saved_and_counts_for_require(world, unlearn, no_report, monkeypatch, capsys):
    monkeypatch.setattr("blur_trainer.pipeline.audited.write_report", lambda folder: None)
    monkeypatch.setattr("blur_trainer.report.html.draw_all", lambda *_: [])
    whole = audit_module.battery
    monkeypatch.setattr(audit_module, "battery", lambda of: [one for one in whole(of) if one.kind == "plain"])
    done = unlearn(unseen="unseen.jsonl", audit="minutes", learning_rate=1e-7)
    content = json.loads((done.output_dir / "audit" / "audit.json").read_text())
    models, data = content["subject"]["models"], content["subject"]["data"]
    assert models["model"]["sha256"] == weights_digest(str(done.output_dir)) != models["before"]["sha256"]
    assert data["forget"]["rows"] == len(world[1]["forget"]) and content["control"]["kind"] == "unseen"
    assert done.audit.recovered == ("plain question",) and "recovered by: plain question" in str(done)
    card, page = ((done.output_dir / name).read_text() for name in ("README.md", "report.html"))
    assert "## Audit" in card and "| plain question | rouge | 1.000 |" in card and card.count("<!-- tables -->") == 1
    assert card.index("## Results") < card.index("## Audit") < card.index("## Limitations")
    assert "<h2>Audit</h2>" in page and "Recovered by: plain question." in page
    again = ["--config", str(done.output_dir / "run.yaml"), "--output_dir", str(done.output_dir.parent / "again")]
    assert main(["unlearn", *again, "--require", done.verdict.word]) == 1, "what came back is not forgotten"
    assert done.audit.sentence in capsys.readouterr().out


def test_what_was_forgotten_before_is_not_kept(world, unlearn, no_report):
    _, sets = world
    before = [sets["retain"][:3], "hold.jsonl"]
    done = unlearn(forgotten=before, hold=sets["hold"] + sets["retain"][3:5])
    settings = stored(done)["settings"]
    assert (
        "left out: 3 rows that were to be forgotten" in settings["data"]["retain"] and len(settings["forgotten"]) == 2
    )
    assert "left out: 8 rows that were to be forgotten" in settings["data"]["hold"]
    assert "# forgotten: a list in memory" in (done.output_dir / "run.yaml").read_text()
    with pytest.raises(TypeError, match="`forgotten` is a list of sets, got"):
        unlearn("two", forgotten="hold.jsonl")


def test_data_in_memory_is_read_and_is_in_no_file(world, unlearn, no_report):
    _, sets = world
    done = unlearn(forget=sets["forget"], retain=sets["retain"], redact=True, model=Path("model"))
    said = (done.output_dir / "run.yaml").read_text(encoding="utf-8")
    assert "# forget: a list in memory" in said and "forget" not in yaml.safe_load(said)
    known = json.dumps(stored(done))
    assert not [row["answer"] for row in sets["forget"] if row["question"] in known]


def test_redact_leaves_no_text_of_the_sets(world, unlearn, monkeypatch):
    """Nor the words that all questions begin with: in no file, but those of the tokenizer, which is the model's."""
    _, sets = world
    monkeypatch.setattr("blur_trainer.report.html.draw_all", lambda *_: [])
    start = "Zanzibar flimwort"
    marked = {
        role: [{**row, "question": f"{start}: {row['question']}"} for row in sets[role]]
        for role in ("forget", "retain")
    }
    secrets = [start, *(text for role in marked for row in sets[role] for text in (row["question"], row["answer"]))]

    def found(done):
        files = [path for path in done.output_dir.rglob("*") if path.is_file() and "tokenizer" not in path.name]
        assert {"report.html", "training_args.bin", "run.yaml", "README.md"} <= {path.name for path in files}
        return {path.name for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)}

    done = unlearn("redacted", replay=32, redact=True, save_strategy="epoch", **marked)
    assert found(done) == set() and (done.output_dir / "checkpoint-1").is_dir()
    assert not (done.output_dir / "replay.json").exists(), "what the model says itself may be what it learnt"
    shown = found(unlearn("shown", replay=32, **marked))
    assert {"metrics.json", "report.html", "run.yaml", "training_args.bin", "replay.json"} <= shown


@pytest.mark.parametrize(
    ("options", "word", "saved"),
    [
        ({"learning_rate": 0.0}, "not_forgotten", True),
        pytest.param({"learning_rate": 1e-7}, "not_forgotten", True, marks=pytest.mark.full),
        ({"learning_rate": 0.5, "num_train_epochs": 4}, "broken", True),
        pytest.param({"gamma": 0.0}, "not_forgotten", True, marks=pytest.mark.full),
        ({"retain": "forget.csv"}, "not_forgotten", True),
        ({"method": "graddiff", "forget_objective": "grad_ascent", "learning_rate": 1e18}, "broken", False),
        ({"method": "graddiff", "forget_weight": 1e38, "retain_weight": 1e38}, "not_forgotten", False),
    ],
    ids=["lr 0", "lr 1e-7", "lr .5", "gamma 0", "forget = retain", "ruined", "skipped"],
)
def test_however_a_training_ends_there_is_a_verdict(unlearn, options, word, saved, no_report):
    done = unlearn(**options)
    assert done.verdict.word == word, done.verdict
    assert (done.output_dir / "verdict.json").is_file() and (done.output_dir / "metrics.json").is_file()
    assert (done.output_dir / "model.safetensors").is_file() is saved
    assert ("No model was saved." in done.notes) is not saved and saved is not bool(done.notes)


def test_nothing_to_replay_is_said_and_the_run_goes_on(unlearn, monkeypatch, capsys, no_report):
    real = bt.BLURTrainer.__init__

    def init(self, model, args, *rest, **kwargs):
        if args.replay is not None:
            raise NothingToReplay("replay: 8 texts were sampled: none is left to train on.")
        real(self, model, args, *rest, **kwargs)

    monkeypatch.setattr(bt.BLURTrainer, "__init__", init)
    done = unlearn()
    assert "Nothing is replayed" in done.notes[0] and "Nothing is replayed" in capsys.readouterr().err
    assert (done.output_dir / "model.safetensors").is_file()


def test_a_model_without_a_forward_mode_replays_by_words_alone(unlearn, monkeypatch, no_report):
    monkeypatch.setattr(
        "blur_trainer.trainers.replay_rows.loss_drops", lambda *_: (_ for _ in ()).throw(NotImplementedError("jvp"))
    )
    done = unlearn(replay=8)
    assert "by their words alone" in done.notes[0] and "(jvp)" in done.notes[0]
    with pytest.raises(NoLossFilter):
        unlearn("asked", replay=8, replay_kwargs={"loss_quantile": 0.5})


def test_an_adapter_leaves_a_base_that_knows_and_merge_writes_the_whole(unlearn, capsys, no_report):
    done = unlearn("adapter", use_peft=True)
    assert "the base model still knows" in str(done)
    assert not (done.output_dir / "model.safetensors").exists()
    config = json.loads((done.output_dir / "adapter_config.json").read_text())
    assert {"q_proj", "up_proj"} <= {name.split(".")[-1] for name in config["target_modules"]}
    done = unlearn("merged", use_peft=True, merge=True)
    assert "still knows" not in str(done) and (done.output_dir / "merged" / "model.safetensors").is_file()
    assert str(done.output_dir / "merged") in str(done)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": True}, "`merge` is for LoRA"),
        ({"merge": True, "method": "uld"}, "`merge` is for LoRA. ULD"),
        ({"method": "npo", "gamma": 1.0}, r"NPO combines by Sum.*does not read \['gamma'\]: leave it out"),
        ({"audit": "days"}, "`audit` is 'days': choose among minutes, hours"),
        ({"audit": "hours", "redact": True}, "digests of the rows, which `redact` leaves out"),
        ({"gama": 1}, "`gama` is no option of unlearn with the method blur. Did you mean `gamma`"),
        ({"num_assistant_layers": 1}, "It is one of uld"),
        ({"method": "foo"}, "`method` is 'foo': choose among blur"),
        ({"level": "unseen"}, "there is no `unseen`"),
        ({"level": "-1"}, "`level` is '-1'"),
        ({"retrained": "nowhere"}, "Cannot load model 'nowhere'"),
        ({"thresholds": {"hold": 2}}, "`hold`"),
        ({"forget": "nowhere.csv"}, "There is no file or folder"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_loaded(unlearn, monkeypatch, options, message):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        unlearn(**options)


def test_a_folder_with_a_run_is_refused_before_anything_is_read(unlearn, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="already holds a run"):
        unlearn(forget="nowhere.csv")


def test_the_level_is_of_the_best_source_there_is(unlearn, no_report):
    done = unlearn(unseen="unseen.jsonl")
    assert done.verdict.level == pytest.approx(done.metrics["before"]["unseen_loss"], abs=0.05)
    assert "unseen" in done.verdict.level_source
    assert unlearn("two", level="2.5", unseen="unseen.jsonl").verdict.level == 2.5


@pytest.mark.full
def test_uld_goes_on_after_an_interrupt_with_the_weight_it_had(unlearn, no_report):
    done = unlearn(method="uld", num_train_epochs=8)
    assert "the base model still knows" in str(done) and done.metrics["after"]["forget_loss"] > 0.5
    again = unlearn(method="uld", num_train_epochs=8, resume_from_checkpoint=True)
    assert again.metrics["after"] == pytest.approx(done.metrics["after"], abs=1e-4)


@pytest.mark.full
def test_a_chat_model_is_asked_in_its_template_and_replays_what_it_is_asked(tmp_path, monkeypatch, capsys, no_report):
    monkeypatch.chdir(tmp_path)
    write_own_data(tmp_path, chat_template=CHAT_TEMPLATE)
    done = bt.unlearn("model", "forget.csv", "retain.jsonl", "out", **SHORT)
    assert "asked through the chat template" in capsys.readouterr().err
    assert yaml.safe_load((done.output_dir / "run.yaml").read_text())["derived"]["replay_kwargs"]["prompts"] == "retain"
    assert done.metrics["before"]["forget_exact"] == 1.0


@pytest.mark.full
def test_texts_are_forgotten_too(world, unlearn, tmp_path, no_report):
    _, sets = world
    for name in ("forget", "retain"):
        (tmp_path / name).mkdir()
        for i, row in enumerate(sets[name]):
            text = "Question: {question}\nAnswer: {answer}".format(**row)
            (tmp_path / name / f"{i}.txt").write_text(text, encoding="utf-8")
    done = unlearn(forget=str(tmp_path / "forget"), retain=str(tmp_path / "retain"), replay=None, num_train_epochs=8)
    assert done.metrics["after"]["forget_loss"] != done.metrics["before"]["forget_loss"]
    derived = yaml.safe_load((done.output_dir / "run.yaml").read_text())["derived"]
    assert derived["replay"] == 512 and "prompts" not in derived["replay_kwargs"], "texts begin with BOS"
