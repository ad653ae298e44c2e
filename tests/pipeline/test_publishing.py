"""The push of `unlearn` to the mocked Hub: what goes up, and that no text of the sets does."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers.trainer
from huggingface_hub import ModelCard
from safetensors.torch import load
from support.hub import Hub
from support.own_data import write_own_data

import blur_trainer as bt
from blur_trainer.cli.main import main
from blur_trainer.pipeline.publishing import publish
from blur_trainer.report.verdict import judge

SHORT = ["--num_train_epochs", "1", "--replay", "8", "--eval_rows", "4", "--disable_tqdm", "true"]
MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
MEASURED = {"README.md", "verdict.json", "figures/sets.png"}
REPORT = {"metrics.json", "report.html"}
REDACTED = SimpleNamespace(script=SimpleNamespace(redact=True))
VERDICT = judge({"forget_loss": 0.5}, {"forget_loss": 2.5}, 2.4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    sets = write_own_data(folder, epochs=2)
    (folder / "model").rename(folder / "my-model")
    (folder / "retain.jsonl").rename(folder / "chats.jsonl")
    return folder, sets


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    return hub


def report(out):
    """A report with a text of the sets where the metrics have one. Drawing the figures takes longer than all else."""
    (out / "figures").mkdir()
    (out / "figures" / "sets.png").write_bytes(b"numbers")
    (out / "report.html").write_text((out / "metrics.json").read_text(encoding="utf-8"), encoding="utf-8")
    return out / "report.html"


@pytest.fixture
def pushed(world, hub, tmp_path, monkeypatch):
    """Runs the command with these words; answers its folder, the last upload, and the files with a text of the sets."""
    folder, sets = world
    monkeypatch.chdir(folder)
    monkeypatch.setattr("blur_trainer.scripts.output.write_report", report)
    secrets = {text for rows in sets.values() for row in rows for text in (row["question"], row["answer"])}

    def call(words):
        out = tmp_path / "out"
        assert main(["unlearn", *words, *SHORT, "--output_dir", str(out)]) == 0
        texts = {name: content.decode("utf-8", errors="replace") for name, content in hub.files[-1].items()}
        told = {name for name, text in texts.items() if name != "tokenizer.json" and any(s in text for s in secrets)}
        return out, hub.files[-1], told

    return call


def documented():
    """The words of the command in the page's section about the Hub, without the command itself."""
    page = (Path(bt.__file__).parents[1] / "docs" / "your-own-data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"## To the Hub\n+```bash\n(.*?)```", page, re.DOTALL)
    words = shlex.split(block.replace("\\\n", " "))
    assert words[:2] == ["blur-trainer", "unlearn"]
    return words[2:]


def test_the_tutorials_command_pushes_what_holds_no_texts(pushed, hub, capsys):
    out, files, told = pushed(documented())
    assert set(files) == MODEL | MEASURED and told == set()
    assert {"replay.json", "run.yaml"} | REPORT <= {path.name for path in out.iterdir()}
    verdict, numbers = json.loads(files["verdict.json"]), json.loads((out / "metrics.json").read_text())["rows"][-1]
    card = ModelCard(files["README.md"].decode())
    assert verdict["word"].replace("_", " ") in card.content.lower()
    assert {result.metric_value for result in card.data.eval_results} <= set(numbers["metrics"].values())
    assert [call["commit_message"] for call in hub.calls] == ["Model save", f"End of unlearning: {verdict['word']}"]
    assert hub.created[0] == "me/x" and hub.created[1]["private"] is True
    assert load(files["model.safetensors"]).keys() == load((out / "model.safetensors").read_bytes()).keys()
    assert not any("digest" in content.decode("utf-8", errors="replace") for content in files.values())
    assert "Pushed to me/x. report.html and metrics.json hold texts of the sets" in capsys.readouterr().out


def test_a_redacted_report_goes_up_and_has_neither_texts_nor_digests(pushed, capsys):
    start = "Question: Where was"
    kwargs = json.dumps({"prompts": [start], "max_new_tokens": 8})
    _, files, told = pushed([*documented(), "--redact", "true", "--replay_kwargs", kwargs])
    assert set(files) == MODEL | MEASURED | REPORT and told == set()
    metrics = files["metrics.json"].decode()
    assert "digest" not in metrics and start not in metrics and "forget.csv: 8 rows" in metrics
    assert capsys.readouterr().out.endswith("\n\nPushed to me/x.\n")


@pytest.mark.full
def test_a_report_with_texts_goes_up_if_that_is_asked(pushed):
    _, files, told = pushed([*documented(), "--push_report", "true", "--use_peft", "true"])
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"} | MEASURED | REPORT | MODEL - {
        "config.json", "generation_config.json", "model.safetensors"
    }  # fmt: skip
    assert told == REPORT


def test_a_push_that_fails_is_said():
    def push_to_hub(commit_message):
        raise ConnectionError("no route.")

    args = SimpleNamespace(push_report=False)
    trained = SimpleNamespace(
        trainer=SimpleNamespace(args=args, hub_model_id="me/x", push_to_hub=push_to_hub), saved=True
    )
    (note,) = publish(REDACTED, trained, VERDICT)
    assert note.startswith("The push to me/x failed: no route. To push it by hand") and args.push_report


@pytest.mark.parametrize(
    ("saved", "said"), [(False, "Nothing was pushed, as there is no model."), (True, "Numbers and verdict were not")]
)
def test_where_there_is_no_trainer_it_is_said(saved, said):
    (note,) = publish(REDACTED, SimpleNamespace(trainer=None, saved=saved), VERDICT)
    assert note.startswith(said)
