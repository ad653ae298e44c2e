"""Request after request: what the ledger says of each, then and now, how it goes on, and what is never retained."""

import json

import pytest
import yaml
from safetensors.torch import load_file, save_file
from support.own_data import write_own_data

import blur_trainer as bt
from blur_trainer.cli import unlearn as command
from blur_trainer.cli.main import main
from blur_trainer.pipeline import audit as audit_module
from blur_trainer.pipeline import sequence as module
from blur_trainer.pipeline.ledger import Ledger, ledger_table, meets, sentences
from blur_trainer.pipeline.sequence import unlearn_sequence

SHORT = {"num_train_epochs": 2, "replay": 8, "disable_tqdm": True}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Files of two requests and of a third one, whose rows are in `retain`, too."""
    folder = tmp_path_factory.mktemp("requests")
    sets = write_own_data(folder)
    parts = {"one": sets["forget"][:4], "two": sets["forget"][4:], "three": sets["retain"][:4]}
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return folder, sets | parts


@pytest.fixture
def sequence(world, tmp_path, monkeypatch):
    """`unlearn_sequence` in the folder of the files, into one folder; figures are left out."""
    monkeypatch.chdir(world[0])
    monkeypatch.setattr("blur_trainer.report.html.draw_all", lambda *_: [])

    def call(*requests, out="out", retain="retain.jsonl", **options):
        return unlearn_sequence("model", list(requests), retain, tmp_path / out, **{**SHORT, **options})

    return call


def stored(done):
    return json.loads((done.output_dir / "ledger.json").read_text(encoding="utf-8"))


def test_each_request_starts_from_the_one_before_and_old_ones_are_measured_again(sequence, world):
    done = sequence("one.jsonl", "two.jsonl", hold="hold.jsonl", unseen="unseen.jsonl")
    first, second = stored(done)["requests"]
    assert [(each["name"], each["rows"]) for each in (first, second)] == [("one.jsonl", 4), ("two.jsonl", 4)]
    runs = [yaml.safe_load((done.output_dir / each["settings"]).read_text()) for each in (first, second)]
    assert runs[0]["model_name_or_path"] == "model"
    assert runs[1]["model_name_or_path"] == str(done.output_dir / "request-1")
    assert runs[1]["forgotten"] == ["one.jsonl", "two.jsonl"] and runs[1]["forget"] == "two.jsonl"
    assert done.model == done.output_dir / "request-2" and done.last.output_dir == done.model
    assert [state["after"] for state in first["states"]] == [1, 2] and [s["after"] for s in second["states"]] == [2]
    then, now = first["states"]
    kept = second["states"][0]["numbers"]
    assert now["numbers"]["retain_rouge"] == kept["retain_rouge"] and now["numbers"]["hold_loss"] == kept["hold_loss"]
    assert now["numbers"]["forget_loss"] != then["numbers"]["forget_loss"] and "membership_auc" in now["numbers"]
    text = (done.output_dir / "ledger.json").read_text()
    assert not [row["answer"] for row in world[1]["forget"] if row["question"] in text], "a text is in the ledger"
    said = str(done)
    assert "1: one.jsonl" in said and all(each in said for each in done.sentences)
    page, card = ((done.model / name).read_text() for name in ("report.html", "README.md"))
    assert "<h2>Requests</h2>" in page and "1: one.jsonl" in page
    assert "## Requests" in card and "| 2: two.jsonl | 4 |" in card and card.count("<!-- tables -->") == 1


def test_the_file_of_a_sequence_goes_on_with_it(sequence, monkeypatch, capsys):
    done = sequence("one.jsonl")
    words = ["unlearn", "--config", str(done.output_dir / "run.yaml"), "--sequence"]
    assert main([*words, "one.jsonl"]) == 0
    told = capsys.readouterr().out
    assert "1: one.jsonl" in told and f"The model is in {done.model}" in told and "Report:" not in told, "all was done"
    monkeypatch.setattr(command, "run_sequence", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([*words, "two.jsonl"]) == 130
    assert "it goes on at the first request that is not finished" in capsys.readouterr().err


def test_what_a_later_request_undoes_is_seen(sequence, world, tmp_path, capsys):
    """The retain set of the second call teaches the first one again: as texts, which are no questions."""
    how = {"num_train_epochs": None, "replay": 32, "hold": "hold.jsonl", "unseen": "unseen.jsonl"}
    assert sequence("one.jsonl", **how).sentences == ("The request is forgotten.",)
    rows = world[1]["retain"] + world[1]["one"] * 4
    texts = [{"text": "Question: {question}\nAnswer: {answer}".format(**row)} for row in rows]
    done = sequence("two.jsonl", retain=texts, method="graddiff", **how)
    assert done.sentences[0].startswith("request 1 was forgotten, and is known again since request 2 (the forget set")
    assert not done.meets("forgotten") and "known again since request 2" in str(done).splitlines()[-2]
    words = [f"--{name}={value}" for name, value in {**SHORT, **how, "output_dir": tmp_path / "out"}.items() if value]
    words = ["unlearn", "--model_name_or_path=model", "--retain=retain.jsonl", *words, "--require=forgotten"]
    assert main([*words, "--sequence", "one.jsonl", "two.jsonl"]) == 1
    assert "request 1 was forgotten, and is known again" in capsys.readouterr().out


def test_rows_of_all_requests_so_far_are_kept_by_nothing(sequence, world):
    done = sequence("three.jsonl", "one.jsonl", hold=world[1]["retain"][2:8])
    first, second = (each["states"][0]["after"] for each in done.requests)
    assert (first, second) == (1, 2)
    for request in done.requests:
        data = json.loads((done.output_dir / request["folder"] / "metrics.json").read_text())["settings"]["data"]
        assert "left out: 4 rows that were to be forgotten" in data["retain"]
        assert "left out: 2 rows that were to be forgotten" in data["hold"]
    texts = json.loads((done.output_dir / "request-2" / "replay.json").read_text())
    assert len(texts["retain"]) == 64 and texts["settings"]["replay"] == 8
    with pytest.raises(ValueError, match="No row is left"):
        sequence("three.jsonl", retain="three.jsonl", out="nothing")


def test_an_interrupted_sequence_goes_on_and_a_later_call_appends(sequence, monkeypatch, tmp_path):
    real = module.run

    def stop(prepared):
        if str(prepared.args.output_dir).endswith("request-2"):
            raise KeyboardInterrupt
        return real(prepared)

    monkeypatch.setattr(module, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        sequence("one.jsonl", "two.jsonl")
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert [bool(each["finished"]) for each in ledger["requests"]] == [True, False]
    first = load_file(tmp_path / "out" / "request-1" / "model.safetensors")
    ran = []
    monkeypatch.setattr(module, "run", lambda prepared: ran.append(prepared.args.output_dir) or real(prepared))
    done = sequence("three.jsonl", resume_from_checkpoint=True)
    assert [path.split("/")[-1] for path in ran] == ["request-2", "request-3"]
    assert [each["name"] for each in done.requests] == ["one.jsonl", "two.jsonl", "three.jsonl"]
    assert [state["after"] for state in done.requests[0]["states"]] == [1, 2, 3]
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["sequence"] == [each["name"] for each in
                                                                                       done.requests]  # fmt: skip
    assert all(
        value.equal(first[name]) for name, value in load_file(tmp_path / "out/request-1/model.safetensors").items()
    )
    assert sequence("one.jsonl", "three.jsonl").last is None and len(ran) == 2, "all was done"


def test_rows_that_are_gone_are_said_and_a_changed_model_is_refused(sequence, world, tmp_path):
    rows = world[1]["two"]
    done = sequence(rows)
    assert done.requests[0]["name"] == "a list in memory"
    done = sequence("one.jsonl")
    assert done.sentences[0].startswith("request 1 is not measured after request 2: its rows are not there any more")
    assert not done.meets("forgotten") and "not measured" in str(done)
    assert sequence("three.jsonl", rows).requests[0]["states"][-1]["verdict"], "given again, it is measured"
    path = tmp_path / "out" / "request-3" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] += 1
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match="request-3 are others than the ledger has"):
        sequence("hold.jsonl")


def test_an_audit_then_and_now(sequence, monkeypatch):
    whole = audit_module.battery
    monkeypatch.setattr(audit_module, "battery", lambda of: [one for one in whole(of) if one.kind == "plain"])
    done = sequence("one.jsonl", "two.jsonl", unseen="unseen.jsonl", audit="minutes", learning_rate=1e-7)
    then, now = done.requests[0]["states"]
    assert then["audit"]["recovered"] == now["audit"]["recovered"] == ["plain question"]
    out = done.output_dir
    own, later = out / "request-1" / "audit" / "audit.json", out / "request-2" / "audit-of-1" / "audit.json"
    subjects = [json.loads(path.read_text())["subject"] for path in (own, later)]
    assert subjects[0]["data"] == subjects[1]["data"]
    assert subjects[0]["models"]["before"] == subjects[1]["models"]["before"]
    assert subjects[1]["models"]["model"]["sha256"] == done.requests[1]["sha256"]
    assert "audit now" in str(done) and "request 2: recovered by plain question" in done.sentences


def test_adapters_are_merged_for_the_next_request(sequence):
    done = sequence("one.jsonl", "two.jsonl", use_peft=True)
    assert done.model == done.output_dir / "request-2" / "merged"
    run = yaml.safe_load((done.output_dir / "request-2" / "run.yaml").read_text())
    assert run["model_name_or_path"].endswith("request-1/merged")


def test_a_request_that_leaves_no_model_ends_the_sequence(sequence):
    ruined = {"method": "graddiff", "forget_objective": "grad_ascent", "learning_rate": 1e18}
    done = sequence("one.jsonl", "two.jsonl", **ruined)
    assert done.model is None and done.sentences == ("not finished: request 1, 2",) and not done.meets("broken")
    assert "No model was saved." in str(done)
    assert sequence("one.jsonl").model is not None, "it is tried again"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forget": "one.jsonl"}, "`sequence` says what to forget"),
        ({"redact": True}, "The ledger has digests"),
        ({"push_to_hub": True}, "would publish each model"),
        ({"paraphrased": "one.jsonl"}, "of one forget set"),
        ({"method": "uld"}, "not for uld"),
        ({"gama": 1}, "Did you mean `gamma`"),
        ({"requests": []}, "takes a list of sets to forget"),
        ({"requests": "one.jsonl"}, "takes a list of sets to forget, one or more, got"),
        ({"requests": ["-"]}, "standard input can be read once"),
        ({"requests": ["nowhere.csv"]}, "There is no file or folder"),
        ({"resume_from_checkpoint": "model"}, "goes on by itself"),
    ],
)
def test_wrong_options_are_refused_before_a_folder_is_made(sequence, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(module, "run", lambda _: pytest.fail("something was trained"))
    requests = options.pop("requests", ["one.jsonl"])
    with pytest.raises((ValueError, TypeError), match=message):
        unlearn_sequence("model", requests, "retain.jsonl", tmp_path / "out", **{**SHORT, **options})
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="call that"):
        bt.unlearn("model", "one.jsonl", "retain.jsonl", tmp_path / "out", sequence=["one.jsonl"])


def test_a_folder_of_something_else_is_refused(sequence, world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run that is no sequence"):
        sequence("one.jsonl")
    (tmp_path / "out" / "trainer_state.json").unlink()
    path = tmp_path / "out" / "ledger.json"
    path.write_text(json.dumps({"model": {"name": "other", "sha256": "0"}, "requests": []}))
    with pytest.raises(ValueError, match="begins with the model 'other', whose weights are others"):
        sequence("one.jsonl")
    path.write_text("[]")
    with pytest.raises(ValueError, match="is no ledger"):
        sequence("one.jsonl")


def test_the_first_model_is_digested_as_it_is_read(sequence, monkeypatch):
    asked = []

    def digest(name, **hub):
        asked.append((name, hub))
        raise ValueError("enough")

    monkeypatch.setattr(module, "weights_digest", digest)
    with pytest.raises(ValueError, match="enough"):
        sequence("one.jsonl", model_revision="v1", model_init_kwargs={"cache_dir": "c", "attn_implementation": "eager"})
    assert asked == [("model", {"revision": "v1", "cache_dir": "c"})], "what a download takes, and no more"


# ---- the ledger by hand ----


def state(after, verdict="forgotten", known=False, recovered=None):
    numbers = {"forget_loss": 2.0 + after, "forget_rouge": 0.25}
    audit = None if recovered is None else {"sentence": "", "recovered": recovered}
    return {"after": after, "verdict": verdict, "sentence": "", "known": known, "because": ["why"], "numbers": numbers,
            "audit": audit}  # fmt: skip


def request(number, *states):
    return {"number": number, "name": f"{number}.csv", "rows": 5, "states": list(states),
            "finished": "2026-11-27 10:00" if states else None, "level": {"nats": 2.5, "source": "unseen"}}  # fmt: skip


def test_sentences_by_hand():
    known = [state(1), state(2), state(3, "not_forgotten", True), state(4, "broken", True)]
    assert sentences([request(1, *known)]) == ["request 1 was forgotten, and is known again since request 3 (why)"]
    assert sentences([request(1, state(1), state(2))]) == ["The request is forgotten."]
    both = [request(1, state(1), state(2)), request(2, state(2))]
    assert sentences(both) == ["All 2 requests are forgotten."] and meets(both, "forgotten")
    assert sentences([*both, request(3)])[-1] == "not finished: request 3" and not meets(
        [*both, request(3)], "forgotten"
    )
    lost = request(1, state(1), state(2, "broken"), state(3, "broken"))
    assert sentences([lost]) == ["request 1 was forgotten, and is broken since request 2 (why)"]
    assert sentences([request(1, state(1, "broken"), state(2, "broken"))]) == ["request 1 is broken (why)"]
    kept = request(1, state(1, "not_forgotten", True), state(2, "not_forgotten", True))
    assert sentences([kept]) == ["request 1 was not forgotten, and is known (why)"]
    back = request(1, state(1, recovered=[]), state(2, recovered=["4 bit"]))
    assert sentences([back]) == ["request 1: recovered by 4 bit, which then brought nothing back"]
    assert not meets([back], "forgotten") and meets([request(1, state(1, recovered=[]))], "forgotten")


def test_the_table_by_hand():
    table = ledger_table([request(1, state(1, recovered=[]), state(2, "broken", recovered=["4 bit"])), request(2)])
    assert table["rows"][0] == [
        *("1: 1.csv", "5", "2026-11-27", "2.50", "forgotten", "3.00", "0.25", "broken", "4.00", "0.25"),
        *("no recovery", "4 bit"),
    ]
    assert table["rows"][1] == ["2: 2.csv", "5", *["—"] * 10] and len(table["heads"]) == 12
    assert len(ledger_table([request(1, state(1))])["heads"]) == 10


def test_equal_rows_are_found_as_often_as_they_are_named(tmp_path):
    ledger = Ledger(tmp_path, {"name": "model", "sha256": "0"})
    one, other = (ledger.add(name, 4, digest, {}) for name, digest in (("a", "x"), ("b", "y")))
    assert ledger.find(["x", "y", "z"]) == [one, other, None]
    assert ledger.find(["x", "x", "y"]) == [one, None, other]
    ledger.add("a", 4, "x", {})
    assert ledger.find(["x", "x"]) == [one, ledger.requests[2]]
